"""Does a caption hold for pairs never seen, and does the model look at the thing that it names?

    python -m experiments CHECKPOINT --task unseen pointing
"""
import numpy as np
import torch

from coca import CoCa
from data import CORNERS, DoesNotApply, scene, shapes, to_model
from eval import captioning_task, device_of, load_data, need_embeddings
from experiments.draw import attention_maps

# ------------------------------------------------------------------------------------------------
# Captions of pairs of colour and shape that no training scene had (Table 7: NoCaps)


def unseen_task(model, tokenizer, s):
    """Captions of the zero-shot images, as eval.captioning_task scores them."""
    def load_unseen(s, split):
        return load_data(s, "zeroshot")

    if s["data"] != "shapes":
        raise DoesNotApply("only generated scenes hold pairs back; train on --data shapes")
    found = captioning_task(model, tokenizer, {**s, "load_data": load_unseen}, examples=0)
    return {"captions of unseen pairs": found["captions exactly right"]}


# ------------------------------------------------------------------------------------------------
# Pointing

SCENES = 200  # of two things
# A caption is BEGIN a SIZE COLOUR SHAPE at the TOP LEFT and a SIZE ...
PLACES = {"size": [2], "colour": [3], "shape": [4], "place": [7, 8]}  # of tokens
NEXT_THING = 9  # tokens further on


def quadrants(grid):
    """(4, P) bool: which patches of a grid x grid image lie in each of CORNERS."""
    lower = np.arange(grid) >= grid / 2
    number = 2 * lower[:, None] + lower  # (grid, grid)
    return torch.tensor(number.reshape(-1) == np.arange(len(CORNERS))[:, None])


def point(model, images, tokens, things):
    """Does attention go where the things are? images (B, 3, S, S) float with two things each, tokens
    (B, L) of captions that name them in this order -> {what: share}, by chance 1/4 or 2/4.
    """
    words, _, embedding, _ = attention_maps(model, images, tokens)      # (B, L - 1, P), (B, 1, P)
    here = quadrants(model.config.image_size // model.config.patch_size).to(words.device)
    corners = [[CORNERS.index(thing.corner()) for thing in both] for both in things]
    own = here[torch.tensor(corners)]                                   # (B, 2, P) of each thing
    found = {}
    for kind, places in PLACES.items():
        hits = []
        shares = []
        for k in range(2):
            for place in places:
                weights = words[:, place + k * NEXT_THING - 1]          # (B, P), as it is predicted
                hits.append(own[:, k].gather(1, weights.argmax(1, keepdim=True)).float().mean())
                shares.append((weights * own[:, k]).sum(1).mean())
        found[f"pointing, {kind}"] = sum(hits) / len(hits), 1 / 4
        found[f"attention there, {kind}"] = sum(shares) / len(shares), 1 / 4
    share = (embedding[:, 0] * own.any(1)).sum(1).mean()
    found["attention, image embedding"] = share, 2 / 4
    return found


def pointing_task(model, tokenizer, s):
    """Share of words whose most attended patch lies in the quadrant of the thing they name, and the
    mean share of attention there: the last layer's, as the word is predicted (draw.attention_maps).
    Beside it those of a model that has learned nothing.
    """
    need_embeddings(model)
    c = model.config
    if s["data"] != "shapes" or not c.lambda_cap or c.image_size // c.patch_size % 2:
        raise DoesNotApply("pointing is asked of captioners of scenes, in an even grid of patches")
    val = shapes("val", c.image_size, s["seed"])
    rows = [i for i, captions in enumerate(val.captions) if len(captions) == 2][:SCENES]
    things = [scene(s["seed"], "val", i)[0] for i in rows]
    device = device_of(model)
    images = to_model(torch.tensor(val.images[rows])).to(device)
    tokens = tokenizer.encode([val.captions[i][0] for i in rows], c.text_len).to(device)
    torch.manual_seed(s["seed"])
    untrained = CoCa(c).to(device)
    found = point(model, images, tokens, things)
    for what, scores in point(untrained, images, tokens, things).items():
        found[f"{what}, untrained"] = scores
    return found


if __name__ == "__main__":
    raise SystemExit("no command of its own; run: python -m experiments CHECKPOINT --task pointing")
