"""Captions of pairs never seen, and whether attention goes to the thing that a word names."""
import numpy as np
import pytest
import torch
from helpers import fails
from toys import toy_checkpoint

import data
from data import CORNERS, UNSEEN, DoesNotApply, captions_of, scene, words
from experiments import grounding
from experiments.grounding import NEXT_THING, PLACES, point, pointing_task, quadrants, unseen_task


def test_captions_are_of_pairs_that_training_held_back(monkeypatch):
    shown = []

    def describe(model, tokenizer, images, **how):
        truth = data.shapes("zeroshot", model.config.image_size, 3)
        assert np.array_equal(images, truth.images)
        shown.extend(images)
        return [texts[0] for texts in truth.captions[:450]] + ["a ring"] * 150

    monkeypatch.setattr("eval.caption", describe)
    model, tokenizer, s = toy_checkpoint()
    found = unseen_task(model, tokenizer, {**s, "seed": 3})
    assert list(found) == ["captions of unseen pairs"]
    score, chance = found["captions of unseen pairs"]
    assert score == 0.75 and 0 < chance < 0.1 and len(shown) == 600
    for i in range(600):
        (thing,), _ = scene(3, "zeroshot", i)
        assert (thing.colour, thing.shape) in UNSEEN
    with pytest.raises(DoesNotApply, match="only generated scenes"):
        unseen_task(model, tokenizer, {**s, "data": "coco"})


def test_a_caption_has_its_words_where_they_are_asked():
    for i in range(20):
        things, _ = scene(0, "val", i)
        if len(things) == 2:
            found = ["<begin>", *words(captions_of(things)[0])]
            for k, thing in enumerate(things):
                place = [found[n + k * NEXT_THING] for n in PLACES["place"]]
                assert " ".join(place) == thing.corner()
                for kind in ("size", "colour", "shape"):
                    assert found[PLACES[kind][0] + k * NEXT_THING] == getattr(thing, kind)


def test_each_patch_lies_in_one_quadrant():
    here = quadrants(4)
    assert here.shape == (4, 16) and (here.sum(0) == 1).all() and (here.sum(1) == 4).all()
    for corner, patch in (("top left", 5), ("top right", 2), ("bottom left", 8),
                          ("bottom right", 15)):
        assert here[CORNERS.index(corner), patch]


def attending(patch, target, elsewhere):
    """From now on each word looks at its own thing with weight 0.7, or at another place."""
    def maps(model, images, tokens):
        B, L = tokens.shape
        words = torch.zeros(B, L - 1, 16)
        for b, things in enumerate(target):
            for t in range(L - 1):
                thing = things[t + 1 >= NEXT_THING]  # of words[t], which predicts token t + 1
                own = quadrants(4)[CORNERS.index(thing.corner())].nonzero()[0]
                other = quadrants(4)[elsewhere].nonzero()[0]
                words[b, t, own] += 0.7
                words[b, t, other] += 0.3
        embedding = torch.full((B, 1, 16), 1 / 16)
        return words, None, embedding, None

    patch.setattr(grounding, "attention_maps", maps)


def test_words_point_into_the_quadrant_of_the_thing_they_name(monkeypatch):
    model, tokenizer, _ = toy_checkpoint(image_size=16, patch_size=4)
    things = [scene(0, "val", i)[0] for i in range(40)]
    things = [both for both in things if len(both) == 2]
    free = [CORNERS.index(c) for c in CORNERS if c not in [t.corner() for t in things[0]]][0]
    things = [both for both in things if CORNERS[free] not in [t.corner() for t in both]]
    tokens = tokenizer.encode([captions_of(both)[0] for both in things], 32)
    images = torch.zeros(len(things), 3, 16, 16)
    attending(monkeypatch, things, free)
    found = point(model, images, tokens, things)
    for kind in PLACES:
        assert found[f"pointing, {kind}"] == (1, 1 / 4)
        share, chance = found[f"attention there, {kind}"]
        assert (float(share), chance) == (pytest.approx(0.7), 1 / 4)
    share, chance = found["attention, image embedding"]
    assert (float(share), chance) == (pytest.approx(0.5), 2 / 4)
    with fails:  # control: the words of the one looked at as those of the other
        swapped = point(model, images, tokens, [both[::-1] for both in things])
        assert swapped["pointing, shape"][0] > 0.5


@torch.no_grad()
def test_pointing_is_asked_of_the_trained_and_of_an_untrained_model(monkeypatch):
    asked = []

    def note_point(model, images, tokens, things):
        asked.append((model, images, tokens, things))
        return {"x": (len(asked) / 10, 1 / 4)}

    monkeypatch.setattr(grounding, "point", note_point)
    model, tokenizer, s = toy_checkpoint(image_size=16, patch_size=4)
    found = pointing_task(model, tokenizer, s)
    assert found == {"x": (0.1, 1 / 4), "x, untrained": (0.2, 1 / 4)}
    (trained, images, tokens, things), (untrained, *same) = asked
    assert trained is model and untrained.config == model.config
    assert not torch.equal(trained.unimodal.token.weight, untrained.unimodal.token.weight)
    assert torch.equal(images, same[0]) and torch.equal(tokens, same[1]) and things == same[2]
    assert len(images) == len(things) == 200 and all(len(both) == 2 for both in things)
    val = data.shapes("val", 16, 0)
    first = next(i for i, captions in enumerate(val.captions) if len(captions) == 2)
    assert torch.equal(images[0], data.to_model(torch.tensor(val.images[first])))
    assert tokens[0].tolist() == tokenizer.encode(val.captions[first][:1], 32)[0].tolist()
    with pytest.raises(DoesNotApply):
        pointing_task(*toy_checkpoint(lambda_cap=0.0, image_size=16, patch_size=4))
    with pytest.raises(DoesNotApply, match="even grid"):
        pointing_task(*toy_checkpoint(image_size=12, patch_size=4))
