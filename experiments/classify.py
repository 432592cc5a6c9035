"""More ways to classify: by the captioner's likelihood, and scenes drawn in ways never seen.

    python -m experiments CHECKPOINT --task likelihood robustness
"""
import dataclasses

import numpy as np
import torch
from tqdm import tqdm

from coca import PAD
from data import COLOURS, RADII, SHAPES, DoesNotApply, drawn, scene
from eval import (
    FINETUNED,
    FROZEN,
    accuracy,
    constant_answer,
    device_of,
    embed_classes,
    in_batches,
    learn_images,
    load_known_classes,
    load_split,
    need_embeddings,
    tensors,
    zero_shot_score,
)

# ------------------------------------------------------------------------------------------------
# Zero-shot by Eq. (3) in place of the embeddings of Eq. (2)


def log_likelihoods(model, tokens, images):
    """log P(prompt | image), which is Eq. (3) without its minus and its mean: tokens (N, L), images
    (M, 3, S, S) uint8 -> (M, N).
    """
    states, _ = model.unimodal(tokens)  # (N, L, D): the lower half sees no image
    follows = tokens[:, 1:] != PAD                                      # (N, L - 1)
    found = []
    for image in in_batches(model, images, "likelihoods", batch=1):
        image_context, _ = model.pool_image(image)                      # (1, Q, D)
        decoded = model.multimodal(states, image_context.expand(len(states), -1, -1))  # (N, L, D)
        log_p = model.multimodal.head(decoded[:, :-1]).log_softmax(-1)  # (N, L - 1, V)
        log_p = log_p.gather(-1, tokens[:, 1:, None])[..., 0]           # (N, L - 1), of the next
        found.append((log_p * follows).sum(1))                          # (N,), of whole prompts
    return torch.stack(found)


def likelihood_task(model, tokenizer, s):
    """Share of images whose likeliest class is the right one: that with the largest sum of
    P(prompt | image) over its prompts. The images and prompts are those of
    eval.zero_shot_task.

    Once more with the prior taken off, so that a prompt does not win by being likely whatever is
    seen: P(prompt | image) / P(prompt), where log P(prompt) is the mean of log P(prompt | image)
    over 100 training images.
    """
    if not model.config.lambda_cap:
        raise DoesNotApply("trained with --lambda-cap 0, its decoder knows no likelihood")
    data = load_known_classes(model, tokenizer, s)
    train = load_split(model, s, "train")
    prompts = []
    for name in data.classes:
        prompts += [template.format(name) for template in data.templates]
    tokens = tokenizer.encode(prompts, model.config.text_len).to(device_of(model))  # (N, L)
    log_p = log_likelihoods(model, tokens, data.images)                 # (M, N)
    prior = log_likelihoods(model, tokens, train.images[drawn(len(train), 100)]).mean(0)  # (N,)
    found = {}
    for name, of_prompts in (("zero-shot by likelihood", log_p),
                             ("zero-shot by likelihood, prior off", log_p - prior)):
        of_classes = of_prompts.unflatten(1, (len(data.classes), -1)).logsumexp(2)
        share = (of_classes.argmax(1).cpu().numpy() == data.labels).mean()
        found[name] = share, constant_answer(data.labels)
    return found


# ------------------------------------------------------------------------------------------------
# Robustness (the idea of Table 4's ImageNet-A, -R, -Sketch, ...)

CHANGES = {
    "as in training": {},
    "bright backgrounds": dict(background=(90, 150)),
    "noise": dict(noise=30),
    "outlines": dict(outline=0.04),
    "smaller": dict(scale=0.7),
    "larger": dict(scale=1.3),
}


def draw_changed(things, rng, size, background=(0, 60), noise=6, scale=1.0, outline=0.0):
    """data.draw with other backgrounds, noise (grey levels) and radii; outline: only a rim of that
    width, in image sides. With the defaults it draws the same picture.
    """
    centres = (np.arange(size) + 0.5) / size
    image = np.broadcast_to(rng.uniform(*background, (3, 1, 1)), (3, size, size))
    for thing in things:
        r = scale * RADII[thing.size]
        x, y = centres - thing.x, centres[:, None] - thing.y
        inside = r - SHAPES[thing.shape](x, y, r)                       # (size, size)
        if outline:
            inside = np.minimum(inside, outline - inside)
        cover = np.clip(inside * size + 0.5, 0, 1)
        colour = np.array(COLOURS[thing.colour])[:, None, None]
        image = image + cover * (colour - image)
    return (image + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8)


def redraw(data, seed, split, change):
    """The scenes of data, which are the first of a split, drawn with one of CHANGES."""
    images = []
    for i in tqdm(range(len(data)), "drawing scenes anew", leave=False):
        things, rng = scene(seed, split, i)
        images.append(draw_changed(things, rng, data.images.shape[-1], **change))
    return dataclasses.replace(data, images=np.stack(images))


def robustness_task(model, tokenizer, s):
    """Three ways to classify, all learned from scenes as they are, on the same changed scenes of 48
    pairs of colour and shape: by prompts (of the pairs pretraining has shown 42), frozen, finetuned.
    """
    need_embeddings(model)
    if s["data"] != "shapes":
        raise DoesNotApply("robustness is asked of generated scenes; train on --data shapes")
    data = load_split(model, s, "labelled")
    test = load_split(model, s, "labelled-val")
    classes = embed_classes(model, tokenizer, test.classes, test.templates)
    frozen, _ = learn_images(model, s, data, test, FROZEN, "frozen")
    finetuned, _ = learn_images(model, s, data, test, FINETUNED, "finetuned")
    found = {}
    for name, change in CHANGES.items():
        changed = redraw(test, s["seed"], "labelled-val", change)
        found[f"{name}: by prompts"] = zero_shot_score(model, changed, classes)
        for how, learner in (("frozen", frozen), ("finetuned", finetuned)):
            score = accuracy(learner, tensors(changed))
            found[f"{name}: {how}"] = score, constant_answer(changed.labels)
    return found


if __name__ == "__main__":
    raise SystemExit("no command of its own; run: python -m experiments CHECKPOINT --task likelihood")
