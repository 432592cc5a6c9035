"""eval.py --labels and --find: pictures compared with the user's own words."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
from coca import CoCa
from data import Dataset, Tokenizer, UserError
from eval import check_texts, compare, embed_images, embed_texts, zero_shot

WORDS = ["a", "red", "blue", "green", "circle", "ring", "bar", "big", "cross"]
TOKENIZER = Tokenizer(["<pad>", "<begin>", "<end>", "<unk>", *WORDS])
LABELS = ["a red circle", "a blue ring", "a green bar", "red ring", "big blue cross"]


def some_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 8, 8), np.uint8)


def names(n):
    return [f"{i}.png" for i in range(n)]


# ------------------------------------------------------------------------------------------------
# By hand, and against the definitions


@pytest.fixture
def by_hand(monkeypatch):
    """A model that sees three colours, mixed in "both": cosines are exact."""
    table = {"red": [1, 0, 0], "blue": [0, 1, 0], "green": [0, 0, 1], "both": [0.6, 0.8, 0]}
    images = F.normalize(torch.tensor([[0.0, 1, 0], [1, 0, 0], [0.6, 0.8, 0]]), dim=-1)
    monkeypatch.setattr(evaluation, "embed_images", lambda model, given: images)
    monkeypatch.setattr(evaluation, "embed_texts",
                        lambda model, tokenizer, texts: torch.tensor([table[text] for text in texts]).float())
    model = CONTROL.model()
    model.log_temperature.data.fill_(np.log(0.5))
    return lambda labels, find: compare(model, TOKENIZER, images, ["b", "r", "both"], labels, find)


def test_labels_and_find_by_hand(by_hand):
    found = by_hand(["red", "blue"], ["both"])
    expected = 1 / (1 + np.exp(-1 / 0.5))  # of cosines 1 and 0, at temperature 0.5
    assert found["labels"]["b"] == pytest.approx({"blue": expected, "red": 1 - expected})
    assert found["labels"]["r"] == pytest.approx({"red": expected, "blue": 1 - expected})
    assert list(found["labels"]["b"]) == ["blue", "red"]  # each picture's own label comes first
    assert list(found["labels"]["r"]) == ["red", "blue"]
    assert found["find"]["both"] == pytest.approx({"both": 1, "b": 0.8, "r": 0.6})
    assert list(found["find"]["both"]) == ["both", "b", "r"]
    with fails:  # control: the softmax of the cosines alone
        assert found["labels"]["b"]["blue"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_only_what_is_asked_for_is_there(by_hand):
    assert list(by_hand(["red", "blue"], None)) == ["labels"]
    assert list(by_hand(None, ["green", "red"])) == ["find"]
    assert list(by_hand(None, ["green", "red"])["find"]) == ["green", "red"]


def check_permuted(case, labels, others):
    """Each label has the same probability in both lists; those of an image sum to one."""
    model = case.model()
    images = some_images(3, case.seed)
    first = compare(model, TOKENIZER, images, names(3), labels, None)["labels"]
    second = compare(model, TOKENIZER, images, names(3), others, None)["labels"]
    for name in names(3):
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
    images = some_images(6, case.seed)
    found = compare(model, TOKENIZER, images, names(6), LABELS, LABELS[:2])
    with torch.no_grad():
        embedding = embed_images(model, images)
        cosine = (embedding @ embed_texts(model, TOKENIZER, LABELS[:2]).T).numpy()
        data = Dataset(images, [], None, LABELS, templates)
        predicted = zero_shot(embedding, model, TOKENIZER, data)
    for j, text in enumerate(LABELS[:2]):
        order = (-sign * cosine[:, j]).argsort(kind="stable")
        values = list(found["find"][text].values())
        np.testing.assert_allclose(values, cosine[order, j], atol=1e-5)
        for i in range(6):
            assert found["find"][text][f"{i}.png"] == pytest.approx(cosine[i, j], abs=1e-5)
    for i, label in enumerate(predicted):
        best, second, *_ = found["labels"][f"{i}.png"].items()
        assert best[0] == LABELS[label] or best[1] - second[1] < 1e-4  # a tie


@given(cases())
def test_the_answers_are_the_models_own(case):
    check_against_the_model(case)


@pytest.mark.parametrize("wrong", [dict(sign=-1), dict(templates=["{}", "big cross {}"])])
def test_control_the_other_order_and_other_prompts_are_caught(wrong):
    with fails:
        for seed in range(10):
            check_against_the_model(type(CONTROL)(seed, CONTROL.lengths, "cascade", 3), **wrong)


# ------------------------------------------------------------------------------------------------
# Words the model does not know


def test_unknown_words_are_named_and_known_ones_are_not(capsys):
    check_texts(["A red zebra!", "a lion ring"], CONTROL.model(), TOKENIZER)
    text, = capsys.readouterr().err.splitlines()
    assert text.startswith("note: ") and {"zebra", "lion", "!"} <= set(re.findall(r"\w+|!", text))
    assert not {"red", "ring"} & set(text.split())
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
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_texts(texts, CONTROL.model(), TOKENIZER)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py on a toy checkpoint and pictures 0.png to 3.png -> what it was stopped by, or None."""
    monkeypatch.chdir(tmp_path)
    for name, image in zip(names(4), some_images(4)):
        Image.fromarray(image.transpose(1, 2, 0)).save(name)

    def call(*flags, **changes):
        torch.manual_seed(0)
        model = CoCa(CONTROL.config(**changes))
        evaluation.save_checkpoint(tmp_path / "c.pt", model, TOKENIZER, settings=dict(data="shapes", seed=0),
                                   step=0, metrics=torch.zeros(0, 2), metrics_names=["step", "loss"])
        try:
            evaluation.main(["c.pt", "--device", "cpu", *flags])
        except (SystemExit, UserError) as e:
            return e
    return call


def test_labels_and_find_are_printed_best_first_instead_of_captions(command, capsys):
    assert not command("--image", *names(4), "--labels", *LABELS, "--find", "a ring", "--json", "found.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * (1 + len(LABELS)) + 1 + 4 and lines[0] == "0.png:" and lines[-5] == "a ring:"
    found = json.load(open("found.json"))
    assert list(found) == ["labels", "find"] and list(found["labels"]) == names(4)
    shown = [line.split(maxsplit=1) for line in lines[1:1 + len(LABELS)]]
    assert [label for _, label in shown] == list(found["labels"]["0.png"])
    assert sum(float(share.rstrip("%")) for share, _ in shown) == pytest.approx(100, abs=0.1)
    shown = [line.split() for line in lines[-4:]]
    assert [(name, float(cosine)) for cosine, name in shown] == [
        (name, pytest.approx(value, abs=1e-3)) for name, value in found["find"]["a ring"].items()]
    assert not command("--image", "0.png")  # control: without them the captions are
    assert capsys.readouterr().out.startswith("0.png: ")


def test_the_page_shows_labels_with_bars_and_pictures_in_order(command):
    assert not command("--image", *names(4), "--labels", *LABELS[:2], "--find", "a ring",
                       "--report", "page.html", "--json", "found.json")
    page = open("page.html").read()
    found = json.load(open("found.json"))
    labels, find = page.split("<h2>Find")[0], page.split("<h2>Find")[1].split("<h2>")[0]
    for name in names(4):
        assert f"Texts for {name}" in labels
        for label, p in found["labels"][name].items():
            assert f">{label}</th>" in labels and f'<meter value="{p:.3f}"' in labels
    assert re.findall(r"(-?\d\.\d{3}) (\d\.png)", find) == [
        (f"{value:.3f}", name) for name, value in found["find"]["a ring"].items()]
    assert not command("--image", *names(4), "--report", "plain.html")  # control
    assert "Texts for" not in open("plain.html").read() and "<h2>Find" not in open("plain.html").read()


@pytest.mark.parametrize("flags, changes, message", [
    ("--image 0.png --labels red blue", dict(lambda_con=0.0), "--lambda-con 0; give another one"),
    ("--image 0.png --find red", dict(lambda_con=0.0), "--lambda-con 0; give another one"),
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
    ("--image 0.png --all", "leave --task, --all"),
    ("--image 0.png --clips .", "leave --task, --all")])
def test_flags_that_lack_something_or_do_not_go_together_are_named(
        command, capsys, flags, message):
    assert command(*flags.split()).code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_words_that_do_not_fit_or_are_not_known_are_noted(command, capsys):
    assert not command("--image", "0.png", "--find", "red ring")  # control
    assert "note:" not in capsys.readouterr().err
    assert not command("--image", "0.png", "--find", "red " * 40 + "zebra")
    notes = capsys.readouterr().err
    assert "only its first" in notes and "does not know: zebra" in notes


def test_a_picture_that_is_missing_is_one_line(command):
    error = command("--image", "0.png", "none.png", "--find", "red")
    assert str(error) == "none.png: no such file"
