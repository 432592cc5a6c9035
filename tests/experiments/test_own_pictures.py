"""Your own words for your own pictures; eval.py --image: their captions."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONTROL, cases, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import SPECIAL, save_checkpoint

import eval as evaluation
from data import Tokenizer, UserError
from eval import caption, embed_images, embed_texts
from experiments import own_pictures
from experiments.own_pictures import check_texts, compare

WORDS = ["a", "red", "blue", "green", "circle", "ring", "bar", "big", "cross"]
TOKENIZER = Tokenizer([*SPECIAL, *WORDS])
LABELS = ["a red circle", "a blue ring", "a green bar", "red ring", "big blue cross"]
NAMES = ["0.png", "1.png", "2.png", "3.png"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)


@torch.no_grad()
def check_against_the_model(case, labels, sign=1, prompt="{}", temperature=None):
    """Shares are the softmax of Eq. (2); all is sorted, whatever the order of the labels."""
    model = case.model()
    found = compare(model, TOKENIZER, IMAGES, NAMES, labels, LABELS[:2])
    texts = embed_texts(model, TOKENIZER, [prompt.format(label) for label in LABELS])
    cosines = embed_images(model, IMAGES) @ texts.T
    shares = (cosines / (temperature or model.temperature)).softmax(1)
    for name, row in zip(NAMES, shares.tolist()):
        assert found["labels"][name] == pytest.approx(dict(zip(LABELS, row)), abs=1e-5)
        values = list(found["labels"][name].values())
        assert sum(values) == pytest.approx(1) and values == sorted(values, reverse=True)
    for text, row in zip(LABELS[:2], cosines.T.tolist()):
        assert found["find"][text] == pytest.approx(dict(zip(NAMES, row)), abs=1e-5)
        values = [sign * value for value in found["find"][text].values()]
        assert values == sorted(values, reverse=True)


@given(cases(), st.permutations(LABELS))
def test_the_answers_are_the_models_own_whatever_the_order_of_the_labels(case, labels):
    check_against_the_model(case, labels)


@pytest.mark.parametrize("wrong", [
    dict(sign=-1), dict(prompt="big cross {}"), dict(temperature=1.0),
    dict(labels=LABELS[:-1]), dict(labels=[*LABELS[:-1], "cross"])])
def test_control_another_order_prompt_temperature_or_label_is_caught(wrong):
    with fails:
        check_against_the_model(CONTROL, **{"labels": LABELS, **wrong})


def test_only_what_is_asked_for_is_there():
    model = CONTROL.model()
    assert list(compare(model, TOKENIZER, IMAGES, NAMES, LABELS, None)) == ["labels"]
    found = compare(model, TOKENIZER, IMAGES, NAMES, None, ["green", "red"])
    assert list(found) == ["find"] and list(found["find"]) == ["green", "red"]


# Words the model does not know


def test_words_that_are_not_known_or_do_not_fit_are_noted(capsys):
    check_texts(["A red zebra!", "a lion ring"], CONTROL.model(), TOKENIZER)
    noted = capsys.readouterr().err.splitlines()
    assert noted[1] == "note: words that the checkpoint does not know: !, lion, zebra"
    check_texts(["red " * 8], CONTROL.model(), TOKENIZER)
    assert capsys.readouterr().err.endswith("1 of 1 captions cut to 7 words (text_len is 9)\n")
    check_texts([*LABELS, "red " * 7], CONTROL.model(), TOKENIZER)  # control
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
    """own_pictures.py on a toy checkpoint and four pictures -> what stopped it, or None."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(NAMES, IMAGES):
        Image.fromarray(image.transpose(1, 2, 0)).save(name)

    def call(*flags, main=own_pictures.main, **changes):
        save_checkpoint("c.pt", CONTROL.model(**changes), TOKENIZER, dict(data="shapes", seed=0))
        try:
            main(["c.pt", "--device", "cpu", *flags])
        except (SystemExit, UserError) as e:
            return e
    return call


def test_labels_and_find_are_printed_best_first(command, capsys):
    assert not command("--image", *NAMES, "--labels", *LABELS, "--find", "a ring",
                       "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert found == compare(CONTROL.model(), TOKENIZER, IMAGES, NAMES, LABELS, ["a ring"])
    expected = []
    for name in NAMES:
        expected.append(f"{name}:")
        for label, probability in found["labels"][name].items():
            expected.append(f"{probability:>9.2%}  {label}")
    expected.append("a ring:")
    for name, cosine in found["find"]["a ring"].items():
        expected.append(f"{cosine:9.3f}  {name}")
    assert capsys.readouterr().out.splitlines() == expected


def test_eval_py_captions_images_unless_the_model_never_learned_to_write(command, capsys):
    assert not command("--image", *NAMES[:2], "--json", "captions.json", main=evaluation.main)
    texts = caption(CONTROL.model(), TOKENIZER, IMAGES[:2])
    assert json.loads(Path("captions.json").read_text()) == dict(zip(NAMES, texts))
    said = capsys.readouterr()
    assert said.out == f"0.png: {texts[0]}\n1.png: {texts[1]}\n"
    assert "learned from generated scenes only" in said.err
    error = command("--image", "0.png", main=evaluation.main, lambda_cap=0.0)
    assert "--lambda-cap 0" in str(error) and capsys.readouterr().out == ""


@pytest.mark.parametrize("flags, changes, message", [
    ("--image 0.png --labels red blue", dict(lambda_con=0.0), "--lambda-con 0"),
    ("--image 0.png --find red", dict(lambda_con=0.0), "--lambda-con 0"),
    ("--image 0.png --labels red zebra", {}, "'zebra': the checkpoint knows none"),
    ("--image 0.png --find zebra", {}, "'zebra': the checkpoint knows none"),
    ("--image 0.png --labels red red", {}, "are the same")])
def test_errors_come_before_any_picture_is_read(command, monkeypatch, flags, changes, message):
    monkeypatch.setattr(evaluation, "read_image", lambda *args: pytest.fail("work"))
    error = command(*flags.split(), **changes)
    assert isinstance(error, UserError) and message in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("flags, message", [
    ("--labels red blue", "need --image"), ("--find red", "need --image"),
    ("--image 0.png --labels red", "two texts or more"), ("--image 0.png", "python eval.py"),
    ("--image 0.png --find", "expected at least one")])
def test_flags_that_lack_something_are_named(command, capsys, flags, message):
    assert command(*flags.split()).code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--task retrieval", "--data shapes", "--data-dir ."])
def test_eval_py_looks_at_pictures_only_where_some_are_named(command, capsys, flag):
    assert command("--image", "0.png", *flag.split(), main=evaluation.main).code == 2
    assert "leave --task and --data out" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_is_missing_is_one_line(command):
    error = command("--image", "0.png", "none.png", "--find", "red")
    assert str(error) == "none.png: no such file"
