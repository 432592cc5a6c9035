"""The page of --report: sound and closed HTML whatever the texts, pictures that say what is so."""
import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails, recorded_weights, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
from coca import PAD, CoCa
from data import Dataset, Tokenizer, to_model
from eval import (
    Html,
    attention_maps,
    chart,
    confusions,
    loss_curves,
    nearest,
    table,
    tag,
)

HOSTILE = """<script>alert("1&amp;2")<img src=x onerror='x'>&"""  # a file may be called that, too
CLASSES = [f"{HOSTILE} cat", "dog"]
METRICS = ["step", "images", "loss_con", "loss_cap", "loss"]


class Page(HTMLParser):
    """Reads a page and notes what is wrong with it in `faults`."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.faults = [], [], [], []
        self.feed(page)
        self.close()
        self.faults += [f"{name} is left open" for name in self.open]
        for word in ("http:", "https:", "//", "@import"):
            if word in re.sub(r"base64,[^\")]*", "", page):
                self.faults.append(f"{word} in the page")

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append((name, attributes))
        if name not in ("img", "meta", "link"):
            self.open.append(name)
        if name == "img" and not attributes.get("alt"):
            self.faults.append("an image without alt")
        if name in ("script", "iframe", "object"):
            self.faults.append(f"{name} may run something")
        for key in attributes:
            if key.startswith("on"):
                self.faults.append(f"{key} may run something")

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.faults.append(f"</{name}> closes nothing")

    def handle_data(self, text):
        self.texts.append(text)


@pytest.mark.parametrize("broken", [
    "<p>", "</p>", "<p><b></p></b>", "<img src='data:,'>", "<img src='https://a.b' alt=c>",
    "<b onclick=x></b>", tag("p", Html(HOSTILE))])
def test_control_a_fault_in_a_page_is_seen(broken):
    assert Page(broken).faults and not Page(tag("p", HOSTILE, id=HOSTILE)).faults


def decoded(source):
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


# The page


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page of a random model on hostile classes, captions, words and file names."""
    def write(*flags, **changes):
        folder = tmp_path / HOSTILE.replace("/", "")
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = ["<pad>", "<begin>", "<end>", "<unk>", HOSTILE, "cat", "dog"]
        torch.manual_seed(0)
        model = CoCa(CONTROL.config(vocab_size=len(words), text_len=5, **changes))
        metrics = torch.tensor([[1, 8, 4, 3, 10], [2, 16, 0.3, 2, 4.3]])
        settings = dict(data="cifar10", data_dir=HOSTILE, seed=0)
        evaluation.save_checkpoint(folder / "checkpoint.pt", model, Tokenizer(words), step=2,
                                   settings=settings, metrics=metrics, metrics_names=METRICS)
        images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
        Image.fromarray(images[0].transpose(1, 2, 0)).save(folder / f"{HOSTILE}.png")
        labels = np.arange(6) % 2
        texts = [[f"a {CLASSES[i]}", f"the {CLASSES[i]}"] for i in labels]
        data = Dataset(images, texts, labels, CLASSES, ["a {}", "the {}"])
        monkeypatch.setattr(evaluation, "load", lambda *args, **named: data)
        checkpoint = str(folder / "checkpoint.pt")
        evaluation.main([checkpoint, "--report", "page.html", "--device", "cpu", *flags])
        return Path("page.html").read_text()
    return write


@pytest.mark.parametrize("flags, changes, there, absent", [
    ((), {}, ["Zero-shot classification", "Retrieval", "captions exactly right"], "is 0:"),
    ((), dict(pooler="parallel"), ["3 queries"], "is 0:"),
    ((), dict(n_query=0), ["Retrieval"], "3 queries"),
    ((), dict(lambda_con=0.0), ["--lambda-con 0"], "Zero-shot classification"),
    ((), dict(lambda_cap=0.0), ["lambda_cap is 0", "Retrieval", "3 queries"], "<end>"),
    ((), dict(lambda_cap=0.0, pooler="parallel"), ["image embedding"], "3 queries"),
    (("--image", f"{HOSTILE}.png"), {}, ["Captions and", f"{HOSTILE}.png"], "Retrieval")])
def test_a_page_is_sound_and_closed_whatever_the_model_and_the_texts(
        make, flags, changes, there, absent):
    text = make(*flags, **changes)
    page = Page(text)
    shown = " | ".join(page.texts)
    assert page.faults == [] and HOSTILE in shown  # as text, to be read
    assert "<script>" not in text and "<img src=x" not in text
    assert "default-src 'none'" in text
    assert any(HOSTILE in attributes["alt"] for name, attributes in page.tags if name == "img")
    assert all(phrase in shown for phrase in there) and absent not in shown


@pytest.mark.parametrize("name, flags", [
    ("embed_images", ()), ("zero_shot", ()), ("read_image", ("--image", f"{HOSTILE}.png"))])
def test_scores_and_page_share_what_they_read_and_compute(make, monkeypatch, name, flags):
    calls = []
    original = getattr(evaluation, name)

    def count(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(evaluation, name, count)
    make(*flags)
    assert len(calls) == 1


def test_a_page_is_never_written_over_another_file(make, capsys):
    before = make()
    with pytest.raises(SystemExit):
        evaluation.main(["checkpoint.pt", "--report", "page.html"])
    assert "is there already" in capsys.readouterr().err
    args = evaluation.parse_args(["\udcff.pt", "--image", f"{HOSTILE}.png", "--report", "late"])
    Path("late").write_text("mine")  # came while the model was at work
    images = np.zeros((1, 3, 8, 8), np.uint8)
    loaded = evaluation.load_checkpoint("checkpoint.pt")
    refused("late: cannot be written", evaluation.write_report, args, *loaded, {}, images)
    assert Path("late").read_text() == "mine" and Path("page.html").read_text() == before
    args.report = "other name.html"
    evaluation.write_report(args, *loaded, {}, images)  # \udcff is no Unicode
    assert not Page(Path("other name.html").read_text()).faults


# Attention


def followed(record, model, layer=-1):
    """Of the weights of a forward pass: the cross-attention of a layer, and through the pooler."""
    c = model.config
    layers = [weights.mean(1)[:, :-1] for causal, weights in record if not causal][-c.n_multi:]
    if not c.n_query:
        return layers[layer]
    return layers[layer] @ record[c.encoder_layers][1].mean(1)


@torch.no_grad()
def check_maps(case, layer=-1, later=0):
    """The maps of the words are those of a layer, `later` words later; all are shares of one."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    with recorded_weights() as record:
        logits = model(images, tokens).logits
    words, p, embedding, queries = attention_maps(model, images, tokens)
    for maps in (words, embedding, queries):
        assert maps.shape[2] == 4 and (maps >= 0).all()
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
    expected = followed(record, model, layer)[:, :words.shape[1] - later]
    torch.testing.assert_close(words[:, later:], expected)
    probability = logits.softmax(-1)
    for b, t in np.ndindex(*p.shape):
        torch.testing.assert_close(p[b, t], probability[b, t, tokens[b, t + 1]])
    contrastive = record[model.config.encoder_layers + bool(case.n_query)][1].mean(1)
    through = case.n_query and case.pooler == "cascade"
    torch.testing.assert_close(embedding, contrastive @ queries if through else contrastive)


@given(cases())
def test_maps_are_the_weights_of_the_forward_pass_and_shares_of_one(case):
    check_maps(case)


@pytest.mark.parametrize("wrong", [dict(layer=0), dict(later=1)])
def test_control_maps_of_another_layer_or_word_differ(wrong):
    with fails:
        check_maps(CONTROL, **wrong)


def test_a_map_lies_on_the_patch_with_the_most_weight():
    page = Page(evaluation.map_figure(np.array([0.1, 0.1, 0.6, 0.2]), "word"))
    (_, image), = [one for one in page.tags if one[0] == "img"]
    assert "row 2, column 1 of 2 x 2" in image["alt"] and "60%" in image["alt"]
    red = decoded(image["src"])[..., 0]
    assert red[1, 0] == 255 and red[0, 0] == red[0, 1] < red[1, 1] < 255


@torch.no_grad()
def test_under_each_map_stand_its_word_and_probability():
    case = dataclasses.replace(CONTROL, seed=30)  # which writes captions of different lengths
    model, images = case.model(), (case.images() * 127.5 + 127.5).to(torch.uint8)
    words = ["<pad>", "<begin>", "<end>", *(f"w{i}" for i in range(3, 13))]
    tokens = model.generate(to_model(images))
    p = attention_maps(model, to_model(images), tokens)[1]
    articles = evaluation.captions_with_maps(model, Tokenizer(words), images.numpy(), "xyz")
    lengths = (tokens != PAD).sum(1)
    assert lengths.min() < lengths.max()
    for row, share, n, article in zip(tokens, p, lengths, articles, strict=True):
        expected = ["image embedding"]
        for t in range(1, n):
            expected += [words[row[t]], f"{share[t - 1]:.1%}"]
        shown = Page(article).texts
        start = shown.index("image embedding")
        assert shown[start:][:len(expected) + 1] == [*expected, "The generative pooler's 3 queries"]


# Curves, tables, pictures


@pytest.mark.parametrize("rows, curves", [
    ([], 0), ([[1, 8, 4, 3, 10]], 0), ([[1, 8, 4, 3, 10], [2, 16, 0.3, 2, 4.3]], 3),
    ([[1, 8, 4, 0, 4], [2, 16, 0.3, 0, 0.3]], 2)])
def test_there_is_a_curve_for_each_loss_that_was_learned(rows, curves):
    text = "".join(loss_curves(METRICS, torch.tensor(rows).reshape(-1, 5)))
    assert text.count("<polyline") == curves and not Page(text).faults
    assert ("No curves" in text) == (curves == 0)


def test_curves_share_one_scale_and_each_is_named():
    """Of which 10 is the top and 0.1 the bottom, on a log scale."""
    svg = chart("x", np.arange(2), {"high": np.array([10.0, 1]), "low": np.array([1.0, 0.1])})
    high, low = re.findall('points="([^"]+)"', svg)
    assert (high, low) == ("60.0,30.0 345.0,110.0", "60.0,110.0 345.0,190.0")
    page = Page(svg)
    assert not page.faults and {"high", "low"} <= set(page.texts)
    dashes = [attributes["stroke-dasharray"] for name, attributes in page.tags if name == "polyline"]
    assert dashes[0] != dashes[1]  # told apart without colours, too


@given(st.integers(2, 1000))
def test_a_curve_stays_in_its_frame_and_falls_where_the_loss_falls(n):
    values = np.geomspace(10, 0.01, n)
    for losses, down in ((values, True), (values[::-1], False)):  # the second is the control
        points = re.search('points="([^"]+)"', chart("loss", np.arange(n) + 1.0, {"loss": losses}))[1]
        points = np.array([pair.split(",") for pair in points.split()], float)
        assert len(points) == min(n, 300) and (np.diff(points[:, 0]) > 0).all()
        assert points.min(0) == pytest.approx([60, 30])
        assert points.max(0) == pytest.approx([345, 190])
        assert (np.diff(points[:, 1]) > 0).all() == down  # SVG counts downwards


def check_confusions(predicted, shares, rows):
    """Of 3 images of class a and 2 of class c."""
    labels = np.array([0, 0, 0, 2, 2])
    data = Dataset(np.zeros((5, 3, 1, 1)), [], labels, ["a", "b", "c", "d"])
    matrix, top = map(Page, confusions(np.array(predicted), data))
    (_, image), = [one for one in matrix.tags if one[0] == "img"]
    red = (20 + 235 * np.array(shares)).astype(int)
    assert np.array_equal(decoded(image["src"])[..., 0], red)
    assert top.texts[4:] == rows


def test_confusions_by_hand():
    """d is neither true nor predicted; where the model says nothing, -1, is left out."""
    shares = [[1 / 3, 2 / 3, 0], [0, 0, 0], [1 / 2, 0, 1 / 2]]
    check_confusions([0, 1, 1, 2, 0], shares, ["a", "b", "2 of 3", "c", "a", "1 of 2"])
    half = [[1 / 2, 1 / 2, 0], [0, 0, 0], [0, 0, 1]]
    check_confusions([0, -1, 1, 2, -1], half, ["a", "b", "1 of 2"])
    with fails:  # control
        check_confusions([0, 1, 1, 2, 2], shares, ["a", "b", "2 of 3"])


def test_confusions_of_a_model_that_says_nothing_are_a_page_too():
    data = Dataset(np.zeros((5, 3, 1, 1)), [], np.arange(5), list("abcde"))
    assert not Page("".join(confusions(np.full(5, -1), data))).faults


def test_retrieval_examples_show_the_nearest_first(monkeypatch):
    texts = F.normalize(torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), dim=-1)
    monkeypatch.setattr(evaluation, "embed_texts", lambda *args: texts)
    data = Dataset(np.zeros((2, 3, 1, 1), np.uint8), [["x", "y"], ["z"]])
    for images, of_image, of_text in (
            (torch.eye(2), "x 1.000 y 0.600 z 0.000", "1.000 image 0: x 0.000 image 1: z"),
            (torch.eye(2).flip(0), "z 1.000 y 0.800 x 0.000", "1.000 image 1: z 0.000 image 0: x")):
        shown = " ".join(Page("".join(nearest(images, None, None, data))).texts)
        assert f"Texts for image 0: x text how near {of_image}" in shown
        assert f"Images for “x” {of_text}" in shown


def test_the_cells_of_a_table_have_heads():
    page = Page(table("title", ["a", "b"], [[HOSTILE, 1]]))
    assert page.texts == ["title", "a", "b", HOSTILE, "1"]
    scopes = [attributes["scope"] for name, attributes in page.tags if name == "th"]
    assert scopes == ["col", "col", "row"]
