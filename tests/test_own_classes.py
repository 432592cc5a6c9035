"""eval.py --labels and --find: pictures compared with the user's own words."""
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
from data import Tokenizer, UserError
from eval import check_texts, compare, embed_classes, embed_images, embed_texts, zero_shot

WORDS = ["a", "red", "blue", "green", "circle", "ring", "bar", "big", "cross"]
TOKENIZER = Tokenizer(["<pad>", "<begin>", "<end>", "<unk>", *WORDS])
LABELS = ["a red circle", "a blue ring", "a green bar", "red ring", "big blue cross"]
NAMES = ["0.png", "1.png", "2.png", "3.png"]


def some_images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (4, 3, 8, 8), np.uint8)


# By hand, and against the definitions


@pytest.fixture
def by_hand(monkeypatch):
    """A model that sees three colours, mixed in "both": cosines are exact."""
    table = {"red": [1, 0, 0], "blue": [0, 1, 0], "green": [0, 0, 1], "both": [0.6, 0.8, 0]}
    images = F.normalize(torch.tensor([[0.0, 1, 0], [1, 0, 0], [0.6, 0.8, 0]]), dim=-1)

    def texts_by_hand(model, tokenizer, texts):
        return torch.tensor([table[text] for text in texts]).float()

    monkeypatch.setattr(evaluation, "embed_images", lambda model, given: images)
    monkeypatch.setattr(evaluation, "embed_texts", texts_by_hand)
    model = CONTROL.model()
    model.log_temperature.data.fill_(math.log(0.5))
    return lambda labels, find: compare(model, TOKENIZER, images, ["b", "r", "both"], labels, find)


def test_labels_and_find_by_hand(by_hand):
    found = by_hand(["red", "blue"], ["both"])
    expected = 1 / (1 + math.exp(-1 / 0.5))  # of cosines 1 and 0, at temperature 0.5
    assert found["labels"]["b"] == pytest.approx({"blue": expected, "red": 1 - expected})
    assert found["labels"]["r"] == pytest.approx({"red": expected, "blue": 1 - expected})
    assert list(found["labels"]["b"]) == ["blue", "red"]  # each picture's own label comes first
    assert list(found["labels"]["r"]) == ["red", "blue"]
    assert found["find"]["both"] == pytest.approx({"both": 1, "b": 0.8, "r": 0.6})
    assert list(found["find"]["both"]) == ["both", "b", "r"]
    with fails:  # control: the softmax of the cosines alone
        assert found["labels"]["b"]["blue"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_only_what_is_asked_for_is_there(by_hand):
    assert list(by_hand(["red", "blue"], None)) == ["labels"]
    assert list(by_hand(None, ["green", "red"])) == ["find"]
    assert list(by_hand(None, ["green", "red"])["find"]) == ["green", "red"]


def check_permuted(case, labels, others):
    """Each label has the same probability in both lists; those of an image sum to one."""
    model = case.model()
    images = some_images(case.seed)
    first = compare(model, TOKENIZER, images, NAMES, labels, None)["labels"]
    second = compare(model, TOKENIZER, images, NAMES, others, None)["labels"]
    for name in NAMES:
        assert sum(first[name].values()) == pytest.approx(1)
        assert list(first[name].values()) == sorted(first[name].values(), reverse=True)
        assert first[name] == pytest.approx(second[name], abs=1e-5)


@given(cases(), st.permutations(LABELS))
def test_the_order_of_the_labels_changes_nothing(case, permuted):
    check_permuted(case, LABELS, permuted)


def test_control_another_label_in_the_list_changes_the_others():
    with fails:
        check_permuted(CONTROL, LABELS[:3], LABELS[:2] + ["cross"])


def check_against_the_model(case, sign=1, templates=("{}",)):
    """find is sorted by cosine; the best label is what zero-shot classification says."""
    model = case.model()
    images = some_images(case.seed)
    found = compare(model, TOKENIZER, images, NAMES, LABELS, LABELS[:2])
    with torch.no_grad():
        embedding = embed_images(model, images)
        cosine = (embedding @ embed_texts(model, TOKENIZER, LABELS[:2]).T).numpy()
        predicted = zero_shot(embedding, embed_classes(model, TOKENIZER, LABELS, templates))
    for j, text in enumerate(LABELS[:2]):
        order = (-sign * cosine[:, j]).argsort(kind="stable")
        values = list(found["find"][text].values())
        np.testing.assert_allclose(values, cosine[order, j], atol=1e-5)
        for i, name in enumerate(NAMES):
            assert found["find"][text][name] == pytest.approx(cosine[i, j], abs=1e-5)
    for name, label in zip(NAMES, predicted):
        best, second, *_ = found["labels"][name].items()
        assert best[0] == LABELS[label] or best[1] - second[1] < 1e-4  # a tie


@given(cases())
def test_the_answers_are_the_models_own(case):
    check_against_the_model(case)


@pytest.mark.parametrize("wrong", [dict(sign=-1), dict(templates=["{}", "big cross {}"])])
def test_control_the_other_order_and_other_prompts_are_caught(wrong):
    with fails:
        for seed in range(10):
            check_against_the_model(replace(CONTROL, seed=seed), **wrong)


# Words the model does not know


def test_unknown_words_are_named_and_known_ones_are_not(capsys):
    check_texts(["A red zebra!", "a lion ring"], CONTROL.model(), TOKENIZER)
    text, = capsys.readouterr().err.splitlines()
    assert text == "note: words that the checkpoint does not know: !, lion, zebra"
    check_texts(LABELS, CONTROL.model(), TOKENIZER)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("texts, message", [
    (["a red circle", "zebra"], "'zebra': the checkpoint knows none of its words; use words"),
    (["", "red"], "'': the checkpoint knows none"), (["?!"], "knows none"),
    (["zebra", "zebra"], "knows none"),
    (["red", "blue", "red"], "'red' and 'red' are the same to the checkpoint; drop one"),
    (["A Red  circle", "a red circle"], "'A Red  circle' and 'a red circle' are the same"),
    (["red zebra", "red lion"], "'red zebra' and 'red lion' are the same"),
    (["a " * 9 + "red", "a " * 9 + "blue"], "are the same")],  # after 7 words the text is cut
    ids=["unknown", "empty", "marks", "first", "twice", "case", "but for unknown words", "cut"])
def test_texts_that_say_nothing_or_the_same_are_one_clear_line(texts, message):
    refused(re.escape(message), check_texts, texts, CONTROL.model(), TOKENIZER)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py on a toy checkpoint and four pictures -> what it was stopped by, or None."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(NAMES, some_images()):
        Image.fromarray(image.transpose(1, 2, 0)).save(name)

    def call(*flags, **changes):
        model = CONTROL.model(**changes)
        torch.save(dict(format=evaluation.FORMAT, config=asdict(model.config),
                        vocabulary=TOKENIZER.words, settings=dict(data="shapes", seed=0),
                        model=model.state_dict()), "c.pt")
        try:
            evaluation.main(["c.pt", "--device", "cpu", *flags])
        except (SystemExit, UserError) as e:
            return e
    return call


def test_labels_and_find_are_printed_best_first_instead_of_captions(command, capsys):
    assert not command("--image", *NAMES, "--labels", *LABELS, "--find", "a ring", "--json", "found.json")
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(Path("found.json").read_text())
    assert found == compare(CONTROL.model(), TOKENIZER, some_images(), NAMES, LABELS, ["a ring"])
    expected = []
    for name in NAMES:
        expected.append(f"{name}:")
        for label, share in found["labels"][name].items():
            expected.append(f"{share:>9.2%}  {label}")
    expected.append("a ring:")
    for name, cosine in found["find"]["a ring"].items():
        expected.append(f"{cosine:9.3f}  {name}")
    assert lines == expected
    assert not command("--image", "0.png")  # control: without them the captions are
    assert capsys.readouterr().out.startswith("0.png: ")


@pytest.mark.parametrize("flags, changes, message", [
    ("--image 0.png --labels red blue", dict(lambda_con=0.0), "--lambda-con 0"),
    ("--image 0.png --find red", dict(lambda_con=0.0), "--lambda-con 0"),
    ("--image 0.png --labels red zebra", {}, "'zebra': the checkpoint knows none"),
    ("--image 0.png --find zebra", {}, "'zebra': the checkpoint knows none"),
    ("--image 0.png --labels red red", {}, "are the same")])
def test_errors_are_one_line_before_any_picture_is_read(command, monkeypatch, flags, changes, message):
    monkeypatch.setattr(evaluation, "read_image", lambda *args: pytest.fail("work"))
    error = command(*flags.split(), **changes)
    assert isinstance(error, UserError) and message in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("flags, message", [
    ("--labels red blue", "need --image"), ("--find red", "need --image"),
    ("--image 0.png --labels red", "two texts or more"),
    ("--image 0.png --find", "expected at least one"),
    ("--image 0.png --task retrieval", "leave --task out"),
    ("--image 0.png --data shapes", "leave --data out"),
    ("--image 0.png --data-dir .", "leave --data out")])
def test_flags_that_lack_something_or_do_not_go_together_are_named(command, capsys, flags, message):
    assert command(*flags.split()).code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_words_that_do_not_fit_or_are_not_known_are_noted(command, capsys):
    assert not command("--image", "0.png", "--find", "red ring")  # control
    assert "note:" not in capsys.readouterr().err
    assert not command("--image", "0.png", "--find", "red " * 40 + "zebra")
    notes = capsys.readouterr().err
    assert "only its first 7 words count" in notes and "does not know: zebra" in notes


def test_a_picture_that_is_missing_is_one_line(command):
    error = command("--image", "0.png", "none.png", "--find", "red")
    assert str(error) == "none.png: no such file"
