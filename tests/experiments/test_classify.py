"""Classes by likelihood, and scenes drawn in other ways."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import fails, logits_of
from toys import SPECIAL, record_lessons, same_tensors, toy_checkpoint

import data
import eval as evaluation
from coca import CoCaConfig
from data import PAIRS, Dataset, DoesNotApply, Tokenizer, draw, scene, to_model
from eval import FINETUNED, FROZEN, embed_classes
from experiments import classify
from experiments.classify import CHANGES, draw_changed, likelihood_task, redraw, robustness_task

CLASSES = [f"{colour} {shape}" for colour, shape in PAIRS[::4]]


def some_images(count):
    squares = np.random.default_rng(0).integers(0, 2, (count, 3, 2, 2), dtype=np.uint8) * 255
    return squares.repeat(4, 2).repeat(4, 3)


def likeliest(model, tokenizer, images, classes, templates):
    """From the definition: the class whose prompts have the largest sum of probabilities."""
    found = []
    for image in images:
        sums = []
        for name in classes:
            total = 0.0
            for template in templates:
                tokens = tokenizer.encode([template.format(name)], 32)
                logits = logits_of(model, to_model(torch.from_numpy(image))[None], tokens)
                log_p = logits[0].log_softmax(-1)
                total += math.exp(sum(log_p[t, i] for t, i in enumerate(tokens[0, 1:])))
            sums.append(total)
        found.append(int(np.argmax(sums)))
    return np.array(found)


def share_right(patch, model, tokenizer, data_set):
    patch.setattr(evaluation, "load", lambda *args, **how: data_set)
    settings = dict(data="shapes", data_dir=None, seed=0)
    return likelihood_task(model, tokenizer, settings)["zero-shot by likelihood"]


@torch.no_grad()
def test_the_likeliest_class_is_found_by_the_probability_of_its_prompts(monkeypatch):
    model, tokenizer, _ = toy_checkpoint()
    model.multimodal.head.weight.mul_(4)  # so that the images matter
    images = some_images(10)
    templates = ["a small {}", "a {} and"]
    expected = likeliest(model, tokenizer, images, CLASSES, templates)
    given = Dataset(images, [[]] * 10, expected, CLASSES, templates)
    assert share_right(monkeypatch, model, tokenizer, given) == (1, np.bincount(expected).max() / 10)
    given.labels = likeliest(model, tokenizer, images, CLASSES, templates[:1])
    with fails:  # control: the first prompt alone
        assert share_right(monkeypatch, model, tokenizer, given)[0] == 1


class WordByWord(nn.Module):
    """A captioner that looks at the last word only: table[i, j] = P(word j after word i)."""

    def __init__(self, table):
        super().__init__()
        self.config = CoCaConfig(vocab_size=len(table))
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.unimodal = lambda tokens: (tokens, None)
        self.pool_image = lambda images: (images[:, 0], None)
        self.multimodal = lambda states, image_context: states
        self.multimodal.head = lambda states: table.log()[states]


@torch.no_grad()
def test_all_prompts_of_a_class_count_and_not_the_likeliest_alone(monkeypatch):
    words = [*SPECIAL, "one", "two", "x", "y"]
    table = torch.full((8, 8), 1e-9)
    table[1, 4:6] = 0.5  # <begin> one, <begin> two
    table[4, [3, 6, 7]] = torch.tensor([0.1, 0.3, 0.6])  # one x, one y
    table[5, [3, 6, 7]] = torch.tensor([0.59, 0.4, 0.01])
    table[6:, 2] = 1  # x <end>, y <end>
    given = Dataset(some_images(1), [[]], np.array([0]), ["x", "y"], ["one {}", "two {}"])
    assert share_right(monkeypatch, WordByWord(table), Tokenizer(words), given)[0] == 1
    assert table[4, 7] > table[4:6, 6].max()  # though the likeliest prompt is one of y's
    given.templates = ["one {}"]
    assert share_right(monkeypatch, WordByWord(table), Tokenizer(words), given)[0] == 0


@torch.no_grad()
def test_a_likelihood_is_of_all_words_of_a_prompt_and_no_mean_of_them(monkeypatch):
    words = [*SPECIAL, "x", "y", "z"]
    given = Dataset(some_images(1), [[]], np.array([0]), ["x", "y z"], ["{}"])
    for z in (0.5, 0.9):
        table = torch.full((7, 7), 1e-9)
        table[1, 3:6] = torch.tensor([0.5, 0.2, 0.3])  # <begin> x, <begin> y
        table[5, [3, 6]] = torch.tensor([1 - z, z])  # y z
        table[[4, 6], 2] = 1  # x <end>, z <end>
        of_x, of_y_z = 0.2, 0.3 * z
        found_x = share_right(monkeypatch, WordByWord(table), Tokenizer(words), given)[0]
        assert found_x == (of_x > of_y_z)
        assert of_x ** (1 / 2) < of_y_z ** (1 / 3)  # control: the mean has "y z" both times


@torch.no_grad()
def test_the_prior_is_of_training_images_and_is_taken_off_each_prompt(monkeypatch):
    model, tokenizer, settings = toy_checkpoint()
    model.multimodal.head.weight.mul_(4)
    templates = ["a small {}", "a {} and"]
    shown = {"zeroshot": some_images(6), "train": 255 - some_images(150), "val": some_images(9)}

    def load(name, data_dir, split, *args, **how):
        images = shown[split]
        return Dataset(images, [["a"]] * len(images), np.arange(len(images)) % 3, CLASSES[:3],
                       templates)

    monkeypatch.setattr(evaluation, "load", load)
    found = likelihood_task(model, tokenizer, settings)["zero-shot by likelihood, prior off"]
    texts = [template.format(name) for name in CLASSES[:3] for template in templates]
    tokens = tokenizer.encode(texts, model.config.text_len)

    def log_p(images):
        x = to_model(torch.from_numpy(images))
        rows = []
        for text in tokens:
            logits = logits_of(model, x, text.expand(len(x), -1)).log_softmax(-1)
            real = [t for t in range(len(text) - 1) if text[t + 1] != 0]
            rows.append(sum(logits[:, t, text[t + 1]] for t in real))
        return torch.stack(rows, 1)

    def share(prior):
        off = (log_p(shown["zeroshot"]) - prior).exp().unflatten(1, (3, 2)).sum(2)
        return (off.argmax(1).numpy() == np.arange(6) % 3).mean(), off

    rows = data.drawn(150, 100)
    right, off = share(log_p(shown["train"][rows]).mean(0))
    assert found == (right, 2 / 6)
    asked = []
    monkeypatch.setattr(classify, "log_likelihoods", lambda model, tokens, images:
                        asked.append(images) or torch.zeros(len(images), len(tokens)))
    likelihood_task(model, tokenizer, settings)
    assert len(asked) == 2 and np.array_equal(asked[1], shown["train"][rows])
    for other in (0, log_p(shown["zeroshot"]).mean(0)):  # controls: no prior, that of other images
        with fails:
            torch.testing.assert_close(share(other)[1], off)


def test_likelihoods_are_of_the_zero_shot_images_and_of_a_captioner(monkeypatch):
    asked = []

    def load(name, data_dir, split, *args, **how):
        asked.append(split)
        return Dataset(some_images(1), [["a ring"]])

    monkeypatch.setattr(evaluation, "load", load)
    for message, changes in (("knows no likelihood", dict(lambda_cap=0.0)), ("no classes", {})):
        with pytest.raises(DoesNotApply, match=message):
            likelihood_task(*toy_checkpoint(**changes))
    assert asked == ["zeroshot"]


# Changed scenes


def test_a_scene_is_drawn_as_in_training_unless_something_is_changed():
    for split in ("zeroshot", "labelled-val", "train"):
        for i in range(4):
            things, rng = scene(3, split, i)
            plain = draw(things, rng, 32)
            for name, change in CHANGES.items():
                things, rng = scene(3, split, i)
                changed = draw_changed(things, rng, 32, **change)
                assert np.array_equal(changed, plain) == (name == "as in training")


def test_each_change_is_what_it_says():
    def picture(thing=True, **change):
        things, rng = scene(0, "zeroshot", 0)
        return draw_changed(things * thing, rng, 64, **change).astype(float)

    empty = picture(thing=False)
    painted = abs(picture() - empty).max(0) > 20
    assert 40 < picture(thing=False, **CHANGES["bright backgrounds"]).mean() - empty.mean() < 150
    assert picture(thing=False, **CHANGES["noise"]).std() > 2 * empty.std()
    for name, more in (("smaller", False), ("larger", True)):
        area = (abs(picture(**CHANGES[name]) - empty).max(0) > 20).sum() / painted.sum()
        assert abs(math.sqrt(area) - CHANGES[name]["scale"]) < 0.1 and (area > 1) == more
    rim = abs(picture(**CHANGES["outlines"]) - empty).max(0) > 20
    assert 0 < rim.sum() < 0.7 * painted.sum() and not (rim & ~painted).any()


def test_redrawn_scenes_are_the_same_scenes():
    data_set = data.shapes("zeroshot", 8, 5)
    plain = redraw(data_set, 5, "zeroshot", {})
    assert np.array_equal(plain.images, data_set.images)
    assert np.array_equal(plain.labels, data_set.labels)
    with fails:  # control: another seed
        assert np.array_equal(redraw(data_set, 6, "zeroshot", {}).images, data_set.images)


def test_robustness_is_learned_once_and_asked_in_three_ways_of_the_same_changed_scenes(monkeypatch):
    def score(learner, test):
        asked.append((learner, test))
        return len(asked) / 100

    def by_prompts(model, shown, classes):
        prompted.append((shown, classes))
        return len(prompted) / 1000, 0.5

    asked = []
    prompted = []
    model, tokenizer, settings = toy_checkpoint()
    for name in ("bright backgrounds", "outlines", "smaller"):
        monkeypatch.delitem(CHANGES, name)
    lessons = record_lessons(monkeypatch, evaluation)
    monkeypatch.setattr(classify, "accuracy", score)
    monkeypatch.setattr(classify, "zero_shot_score", by_prompts)
    with torch.no_grad():
        found = robustness_task(model, tokenizer, settings)
    assert list(found) == [f"{name}: {how}" for name in CHANGES
                           for how in ("by prompts", "frozen", "finetuned")]
    learned = data.shapes("labelled", 8, 0)
    tested = data.shapes("labelled-val", 8, 0)
    assert [lesson.recipe for lesson in lessons] == [FROZEN, FINETUNED]  # not for each change
    for lesson in lessons:
        assert same_tensors(lesson.model, model)
        assert np.array_equal(lesson.train[0][0], learned.images)
    with torch.no_grad():
        all_48 = embed_classes(model, tokenizer, tested.classes, tested.templates)
    assert len(all_48) == 48
    for i, (name, change) in enumerate(CHANGES.items()):
        changed = redraw(tested, 0, "labelled-val", change)
        assert (name == "as in training") == np.array_equal(changed.images, tested.images)
        shown, classes = prompted[i]
        assert np.array_equal(shown.images, changed.images)  # as frozen and finetuned, below
        assert np.array_equal(shown.labels, tested.labels) and torch.equal(classes, all_48)
        assert found[f"{name}: by prompts"] == ((i + 1) / 1000, 0.5)
        for j, (how, lesson) in enumerate(zip(("frozen", "finetuned"), lessons)):
            learner, (images, labels) = asked[2 * i + j]
            assert learner.classifier is lesson.classifier
            assert np.array_equal(images[0], changed.images)
            assert np.array_equal(labels, tested.labels)
            chance = np.bincount(tested.labels).max() / 1000
            assert found[f"{name}: {how}"] == ((2 * i + j + 1) / 100, chance)


def test_robustness_is_of_scenes_and_of_embeddings():
    model, tokenizer, settings = toy_checkpoint()
    with pytest.raises(DoesNotApply, match="generated scenes"):
        robustness_task(model, tokenizer, {**settings, "data": "cifar10"})
    with pytest.raises(DoesNotApply, match="mean nothing"):
        robustness_task(*toy_checkpoint(lambda_con=0.0))


