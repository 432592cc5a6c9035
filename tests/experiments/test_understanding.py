"""Questions and captions: answers are right, one half says nothing, the test is not learned from."""
import functools
import re
from collections import Counter, defaultdict
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import CONTROL, cases, fails, logits_of, refused
from hypothesis import given
from toys import WORDS, drawn_by, record_lessons, toy_checkpoint

from data import COLOURS, Dataset, DoesNotApply, captions_of, place, to_model
from experiments import understanding
from experiments.understanding import (
    ANSWERS,
    decoder_states,
    entailment,
    hide_images,
    questions,
    states_of_one_image,
)


@torch.no_grad()
@given(cases())
def test_what_the_decoder_gives_is_seen_with_the_image_and_says_what_is_padding(case):
    model, _, tokens = case.example(extra=2)
    images = (case.images() * 127.5 + 127.5).to(torch.uint8)
    states, mask = decoder_states(model, images, tokens)
    logits = logits_of(model, to_model(images), tokens)
    torch.testing.assert_close(model.multimodal.head(states), logits)
    assert not torch.allclose(states, decoder_states(model, 255 - images, tokens)[0])
    assert mask.shape == (len(tokens), 1, 1, tokens.shape[1])
    assert mask.flatten(1).sum(1).tolist() == case.lengths and mask[..., 0].all()


def check_one_image_stands_for_all(case, hidden):
    """Values and gradients, where the images are hidden."""
    model, _, tokens = case.example()
    images = (case.images() * 127.5 + 127.5).to(torch.uint8).numpy()
    if hidden:
        images = hide_images(Dataset(images, [])).images
    found = []
    for read in (decoder_states, states_of_one_image):
        model.zero_grad()
        states, mask = read(model, torch.from_numpy(images), tokens)
        (states * mask[:, 0, 0, :, None]).square().sum().backward()
        found.append([states, mask, *[p.grad for p in model.encoder.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@given(cases())
def test_of_hidden_images_one_stands_for_all(case):
    check_one_image_stands_for_all(case, hidden=True)
    with fails:  # control
        check_one_image_stands_for_all(CONTROL, hidden=False)


# What one half says


def table_score(keys, answers):
    """The commonest answer to each key in the first half of the pairs: its share right in the second."""
    half = len(keys) // 2
    seen = defaultdict(Counter)
    for key, answer in zip(keys[:half], answers[:half]):
        seen[key][answer] += 1
    right = 0
    for key, answer in zip(keys[half:], answers[half:]):
        right += key in seen and seen[key].most_common(1)[0][0] == answer
    return right / (len(keys) - half)


@functools.cache
def many(make):
    """-> the things of 4500 pictures, and the Dataset with these."""
    return drawn_by(understanding, make, 1, 4500)


def check_one_half_of_a_question_says_nothing(scenes, made):
    texts = [text for text, in made.captions]
    for kind, chance in enumerate((1 / 8, 1 / 2, 1 / 2)):
        score = table_score(texts[kind::3], made.labels[kind::3])
        assert score == pytest.approx(chance, abs=0.08)
    for look in (lambda left, right: left.shape == right.shape,
                 lambda left, right: left.colour == right.colour,
                 lambda left, right: left.colour, lambda left, right: right.colour):
        score = table_score([look(*things) for things in scenes], made.labels)
        assert score == pytest.approx(1 / 6, abs=0.035)


def not_so_often(answer, ask):
    """The question, but of those with this answer half are asked anew."""
    def ask_again(left, right, rng):
        text, found = ask(left, right, rng)
        return ask_again(left, right, rng) if found == answer and rng.integers(2) else (text, found)
    return ask_again


def test_one_half_of_a_question_says_nothing(monkeypatch):
    check_one_half_of_a_question_says_nothing(*many(questions))
    for kind, answer in ((1, "no"), (2, "0")):
        kinds = list(understanding.KINDS)
        kinds[kind] = not_so_often(answer, kinds[kind])
        with monkeypatch.context() as patch, fails:  # control
            patch.setattr(understanding, "KINDS", kinds)
            check_one_half_of_a_question_says_nothing(*many.__wrapped__(questions))


def facts(things):
    """Of two things (size, colour, shape, corner) all that one property says of both, and more."""
    a, b = things
    pairs = list(zip(a, b))
    return [*pairs, *[x == y for x, y in pairs], a, b]


def read_caption(text):
    return re.findall(r"a (\w+) (\w+) (\w+) at the (\w+ \w+)", text)


def read_picture(things):
    return [(thing.size, thing.colour, thing.shape, thing.corner()) for thing in things]


def check_one_half_of_a_caption_says_nothing(scenes, made):
    captions = [read_caption(text) for text, in made.captions]
    for known in (captions, [read_picture(things) for things in scenes]):
        for keys in zip(*map(facts, known)):
            assert table_score(keys, made.labels) == pytest.approx(0.5, abs=0.045)


def into_any_corner(things, rng):
    """What once was: the changed thing may lie on the other."""
    moved = place(rng, [rng.integers(4)])[0]
    return [things[0]._replace(x=moved.x, y=moved.y), things[1]]


def made_large(things, rng):
    return [things[0]._replace(size="large"), things[1]]


def test_one_half_of_a_caption_says_nothing(monkeypatch):
    check_one_half_of_a_caption_says_nothing(*many(entailment))
    for broken in (into_any_corner, made_large):
        monkeypatch.setattr(understanding, "corrupt", broken)
        with fails:  # control
            check_one_half_of_a_caption_says_nothing(*many.__wrapped__(entailment))


# Labels


def true_answer(things, text):
    left, right = sorted(things, key=lambda thing: thing.x)
    if match := re.fullmatch(r"what colour is the shape (left|right) of the (\w+)", text):
        asked, beside = (left, right) if match[1] == "left" else (right, left)
        assert beside.shape == match[2]
        return asked.colour
    if match := re.fullmatch(r"is there a (\w+) (\w+)", text):
        pairs = [(thing.colour, thing.shape) for thing in things]
        return "yes" if match.groups() in pairs else "no"
    shape = re.fullmatch(r"how many (\w+)", text)[1]
    return str(sum(thing.shape == shape for thing in things))


def test_answers_are_right_and_all_occur():
    scenes, made = many(questions)
    answers = [ANSWERS[label] for label in made.labels]
    right = [true_answer(things, text) for things, (text,) in zip(scenes, made.captions)]
    assert right == answers
    assert right != answers[3:] + answers[:3]  # control: the answers to other scenes
    assert all(one.colour != other.colour for one, other in scenes)
    for kind, possible in enumerate((COLOURS, ["no", "yes"], ["0", "1", "2"])):
        assert set(answers[kind::3]) == set(possible)


def test_captions_hold_or_differ_by_any_one_property_as_labelled():
    scenes, made = many(entailment)
    wrong = Counter()
    for things, (text,), label in zip(scenes, made.captions, made.labels):
        assert (text in captions_of(things)) == label
        differ = []  # in which properties from each true caption
        for true in captions_of(things):
            pairs = zip(sum(read_caption(text), ()), sum(read_caption(true), ()))
            differ.append([i % 4 for i, (said, shown) in enumerate(pairs) if said != shown])
        nearest = min(differ, key=len)
        assert len(nearest) == 1 - label
        wrong.update(nearest)
        for described in (read_caption(text), read_picture(things)):
            assert described[0][3] != described[1][3]  # two corners
    assert len(wrong) == 4 and min(wrong.values()) > 450


# The task


def test_the_last_600_pairs_are_tested_and_never_learned_and_controls_hide_one_half(monkeypatch):
    model, tokenizer, settings = toy_checkpoint()
    lessons = record_lessons(monkeypatch, understanding)
    made = {}
    for make in (questions, entailment):
        made[make.__name__] = make(8, 4000, 0)
        double = mock.Mock(return_value=made[make.__name__])
        monkeypatch.setattr(understanding, make.__name__, double)
    with torch.no_grad():
        found = understanding.understanding_task(model, tokenizer, settings)
    lessons = dict(zip(found, lessons, strict=True))
    assert len(lessons) == 6
    for name, chance in (("questions", 0.375), ("entailment", 0.5)):
        data = made[name]
        getattr(understanding, name).assert_called_once_with(8, 4000, 0)
        assert len({image.tobytes() for image in data.images}) == 4000  # none is there twice
        tokens = tokenizer.encode([text for text, in data.captions], 32)
        for hidden in ("", ", image hidden", ", text hidden"):
            lesson = lessons[name + hidden]
            (images, texts), labels = lesson.train
            (test_images, test_texts), test_labels = lesson.test
            assert len(labels) == len(images) == len(texts) == 3400 and len(test_labels) == 600
            assert torch.cat([labels, test_labels]).tolist() == data.labels.tolist()
            images = torch.cat([images, test_images])
            texts = torch.cat([texts, test_texts])
            assert np.array_equal(images, data.images) == ("image" not in hidden)
            assert len(images.unique()) == 1 or "image" not in hidden
            assert torch.equal(texts, tokens) == ("text" not in hidden)
            assert len(texts.unique(dim=0)) == 1 or "text" not in hidden
            reads = states_of_one_image if "image" in hidden else decoder_states
            assert lesson.model is model and lesson.read is reads
            assert lesson.recipe.encoder_lr == 2e-5 and lesson.recipe.lr == 5e-4
            assert lesson.classifier.linear.out_features == len(data.classes)
            if name == "questions" and "text" in hidden:
                chance = 1 / 6  # without a text a question has no kind
            assert found[name + hidden] == (0.125, pytest.approx(chance, abs=0.02))


@pytest.mark.parametrize("word", ["cyan", "bar", "large", "bottom", "left"])
def test_the_words_of_scenes_are_needed(word):
    words = [one for one in WORDS if one != word]
    with pytest.raises(DoesNotApply):
        understanding.understanding_task(*toy_checkpoint(words))
    refused("lacks words of generated scenes", understanding.understanding_task, *toy_checkpoint(words))
