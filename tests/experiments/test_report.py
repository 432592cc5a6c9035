"""python -m experiments.report: sound and closed HTML whatever the texts, maps that say what is so."""
import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails, logits_of, recorded_weights, refused
from hypothesis import given
from PIL import Image
from toys import COLUMNS, SPECIAL, save_checkpoint, toy_checkpoint

import eval as evaluation
from coca import BEGIN, END, PAD
from data import Dataset, Tokenizer, to_model
from experiments import report
from experiments.draw import Html, attention_maps, chart, tag
from experiments.report import HEAD, confusions, loss_curves, table

HOSTILE = """<script>alert("1&amp;2")<img src=x onerror='x'>&"""  # a file may be called that, too
CLASSES = [f"{HOSTILE} cat", "dog"]


class Page(HTMLParser):
    """Reads a page and notes what is wrong with it in `faults`."""

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.tags = []
        self.texts = []
        self.faults = []
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


def images_of(page):
    return [attributes for name, attributes in page.tags if name == "img"]


def decoded(source):
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


# The page


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page of a random model on hostile classes, captions, words and file names."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    Image.fromarray(images[0].transpose(1, 2, 0)).save(f"{HOSTILE}.png")
    labels = np.arange(6) % 2
    val = Dataset(images, [[f"a {CLASSES[i]}", f"the {CLASSES[i]}"] for i in labels])
    labelled = dataclasses.replace(val, labels=labels, classes=CLASSES, templates=["a {}", "the {}"])
    parts = {"val": val, "zeroshot": labelled}
    for module in (evaluation, report):
        monkeypatch.setattr(module, "load_split", lambda model, s, split: parts[split])

    def write(*flags, file="page.html", checkpoint="checkpoint.pt", known=("cat", "dog"),
              **changes):
        rows = [[1, 8, 4, 3, 10, 0.07], [2, 16, 0.3, 2, 4.3, 0.06]]
        words = [*SPECIAL, HOSTILE, *known, "a"]
        save_checkpoint(checkpoint, *toy_checkpoint(words, **changes), rows=rows)
        report.main([checkpoint, file, "--device", "cpu", *flags])
        return Path(file).read_text()
    return write


PICTURE = ("--image", f"{HOSTILE}.png")


@pytest.mark.parametrize("flags, changes, there, absent", [
    ((), {}, ["Classification by prompts", "Retrieval", "Chance: always the com"], ["is 0:"]),
    ((), dict(pooler="parallel"), ["3 queries"], ["is 0:"]),
    ((), dict(n_query=0), ["Retrieval"], ["3 queries"]),
    ((), dict(lambda_con=0.0), ["lambda_con is 0"], ["Classification by", "image embedding"]),
    ((), dict(lambda_cap=0.0), ["lambda_cap is 0", "Retrieval", "3 queries"], ["<end>"]),
    ((), dict(lambda_cap=0.0, pooler="parallel"), ["image embedding"], ["3 queries"]),
    (PICTURE, {}, ["Captions and", f"{HOSTILE}.png"], ["Retrieval"]),
    ((*PICTURE, "--find", "a cat", "dog"), {},
     ["Images for “a cat”", "Find", "by chance"], ["Labels"]),
    ((*PICTURE, "--labels", "dog", f"{HOSTILE} cat"), {},
     [f"Texts for {HOSTILE}.png", "Labels", "chance: 0.500"], ["Find"])])
def test_a_page_is_sound_and_closed_whatever_the_model_and_the_texts(
        make, flags, changes, there, absent):
    text = make(*flags, **changes)
    page = Page(text)
    shown = " | ".join(page.texts)
    assert page.faults == [] and HOSTILE in shown  # as text, to be read
    assert "<script>" not in text and "<img src=x" not in text
    assert "default-src 'none'" in text
    assert any(HOSTILE in attributes["alt"] for attributes in images_of(page))
    assert all(phrase in shown for phrase in there)
    assert not any(phrase in shown for phrase in absent)
    assert "Loss curves" in shown and "lambda_con" in shown  # settings


def test_a_page_is_never_written_over_another_file(make, monkeypatch, capsys):
    before = make()
    with pytest.raises(SystemExit):
        make()
    assert "is there already" in capsys.readouterr().err
    page = report.page

    def slow_page(*args):
        Path("late.html").write_text("mine")  # came while the model was at work
        return page(*args)

    monkeypatch.setattr(report, "page", slow_page)
    refused("late.html is there already", make, file="late.html")
    assert Path("late.html").read_text() == "mine" and Path("page.html").read_text() == before


def test_a_report_says_what_it_wrote_and_its_curves_come_after_the_scores(make, capsys):
    text = make()
    assert f"page.html: {len(text.encode()) / 1024:,.0f} KB" in capsys.readouterr().out
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:2] == ["Scores", "Loss curves"] and len(titles) > 4
    titles = re.findall("<h2>(.*?)</h2>", make(*PICTURE, "--find", "dog", file="own.html"))
    assert titles == ["Find", "Captions and attention", "Loss curves", "Settings"]


def test_confusions_are_among_the_classes_that_the_score_counts(make):
    for known, classes in ((("cat", "dog"), CLASSES), (("cat",), CLASSES[:1])):
        with mock.patch.object(report, "confusions", return_value=[]) as shown:
            make(file=f"{len(known)}.html", known=known)
        (predicted, data), _ = shown.call_args
        assert data.classes == classes and len(predicted) == len(data.labels) == 3 * len(known)


def test_the_data_are_those_of_the_checkpoint_or_of_the_flags():
    checkpoint = dict(settings=dict(data="coco", data_dir="a", val_from_train=9, seed=1))
    for flags, expected in (([], ("coco", "a", 9)), (["--data-dir", "b"], ("coco", "b", 9)),
                            (["--data", "cifar10", "--data-dir", "b"], ("cifar10", "b", 0))):
        s = report.settings_of(report.parse_args(["checkpoint.pt", "page.html", *flags]), checkpoint)
        assert (s["data"], s["data_dir"], s["val_from_train"]) == expected and s["seed"] == 1


def test_the_name_of_a_checkpoint_may_be_no_unicode(make):
    assert not Page(make(checkpoint="\udcff.pt")).faults


def test_own_pictures_go_through_the_model_in_batches_and_each_keeps_its_name(make, monkeypatch):
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        Image.new("L", (8, 8), 50 * i).save(name)
    monkeypatch.setattr(report, "MAPS_AT_ONCE", 2)
    with mock.patch.object(report, "attention_maps", side_effect=attention_maps) as maps:
        page = Page(make("--image", *names))
    assert [len(call.args[1]) for call in maps.call_args_list] == [2, 2, 1]
    shown = [image for image in images_of(page) if image["alt"] in names]
    assert [image["alt"] for image in shown] == names
    assert [decoded(image["src"])[0, 0, 0] for image in shown] == [0, 50, 100, 150, 200]


def test_own_pictures_without_texts_are_captioned_in_the_scores_too(make, capsys):
    Image.new("L", (8, 8), 50).save("0.png")
    make("--image", "0.png", "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert list(found) == ["0.png"] and f"0.png: {found['0.png']}\n" in capsys.readouterr().out


# Attention


def followed(record, model, layer=-1):
    """Of the weights of a forward pass: the cross-attention of a layer, and through the pooler."""
    c = model.config
    crossing = [weights for _, weights in record[-2 * c.n_multi:]][1::2]  # after self-attention
    weights = crossing[layer].mean(1)[:, :-1]
    if not c.n_query:
        return weights
    return weights @ record[c.encoder_layers][1].mean(1)


@torch.no_grad()
def check_maps(case, layer=-1, later=0):
    """The maps of the words are those of a layer, `later` words later; all are shares of one."""
    model, images, tokens = case.example()
    with recorded_weights() as record:
        logits = logits_of(model, images, tokens)
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
    page = Page(report.map_figure(np.array([0.1, 0.1, 0.6, 0.2]), "word"))
    image, = images_of(page)
    assert "row 2, column 1 of 2 x 2" in image["alt"] and "60%" in image["alt"]
    red = decoded(image["src"])[..., 0]
    assert red[1, 0] == 255 and red[0, 0] == red[0, 1] < red[1, 1] < 255


@torch.no_grad()
def test_under_each_map_stand_its_word_and_probability():
    case = dataclasses.replace(CONTROL, seed=30)  # which writes captions of different lengths
    model = case.model()
    images = (case.images() * 127.5 + 127.5).to(torch.uint8)
    words = ["<pad>", "<begin>", "<end>", *[f"w{i}" for i in range(3, 13)]]
    tokens = model.generate(to_model(images))
    p = attention_maps(model, to_model(images), tokens)[1]
    articles = report.captions_with_maps(model, Tokenizer(words), images.numpy(), "xyz", [[]] * 3)
    lengths = (tokens != PAD).sum(1)
    assert lengths.min() < lengths.max()
    for row, share, n, article in zip(tokens, p, lengths, articles, strict=True):
        expected = ["image embedding"]
        for t in range(1, n):
            expected += [words[row[t]], f" {share[t - 1]:.1%}"]
        shown = Page(article).texts
        start = shown.index("image embedding")
        assert shown[start:][:len(expected) + 1] == [*expected, "The generative pooler's 3 queries"]


@torch.no_grad()
def test_a_caption_that_is_right_is_marked_and_no_other():
    model = CONTROL.model()
    images = (CONTROL.images()[:1] * 127.5 + 127.5).to(torch.uint8)
    tokens = torch.tensor([[BEGIN, 4, 5, END]])
    model.generate = lambda images, max_len: tokens
    tokenizer = Tokenizer(["<pad>", "<begin>", "<end>", "<unk>", "red", "ring", *"abcdefg"])
    for true, mark in ((["a b", "Red ring ."], "✓ "), (["red a", "ring red"], ""), ([], "")):
        article, = report.captions_with_maps(model, tokenizer, images.numpy(), "x", [true])
        assert f"<h3>{mark}red ring</h3>" in article


# Curves, tables


@pytest.mark.parametrize("rows, curves", [
    ([], 0), ([[1, 8, 4, 3, 10]], 0), ([[1, 8, 4, 3, 10], [2, 16, 0.3, 2, 4.3]], 3),
    ([[1, 8, 4, 0, 4], [2, 16, 0.3, 0, 0.3]], 2)])
def test_there_is_a_curve_for_each_loss_that_was_learned(rows, curves):
    text = "".join(loss_curves(COLUMNS, torch.tensor(rows).reshape(-1, 5)))
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
    points = re.search('points="([^"]+)"', chart("x", np.arange(999), {"x": np.arange(999)}))[1]
    assert len(points.split()) == 300  # each the mean of a window
    curves = {"falling": np.array([9.0] + [1.0] * 998), "level": np.full(999, 9.0)}
    first, _ = re.findall('points="([^"]+)"', chart("x", np.arange(999), curves))
    assert first.startswith("60.0,30.0 ")  # the first value is in no mean


def check_confusions(predicted, rows):
    """Of 3 images of class a and 2 of class c."""
    data = Dataset(np.zeros((5, 3, 1, 1)), [], np.array([0, 0, 0, 2, 2]), ["a", "b", "c", "d"])
    page = Page("".join(confusions(predicted, data)))
    assert not page.faults and page.texts[4:] == rows
    assert "chance, the commonest class, is right in 60.00%" in page.texts[0]


def test_confusions_by_hand():
    """Where the model says nothing, -1, no class is taken for another."""
    check_confusions([0, 1, 1, 2, 0], ["a", "b", "2 of 3", "c", "a", "1 of 2"])
    check_confusions([0, -1, 1, 2, -1], ["a", "b", "1 of 3"])
    check_confusions([-1] * 5, [])
    with fails:  # control
        check_confusions([0, 1, 1, 2, 2], ["a", "b", "2 of 3", "c", "a", "1 of 2"])


def test_retrieval_examples_show_the_nearest_first_and_mark_the_right_ones(monkeypatch):
    texts = F.normalize(torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), dim=-1)
    monkeypatch.setattr(report, "embed_texts", lambda *args: texts)
    model = SimpleNamespace(config=SimpleNamespace(text_len=9))
    data = Dataset(np.zeros((2, 3, 1, 1), np.uint8), [["x", "y"], ["z", "Y"]])
    for images, of_image, of_text in (
            (torch.eye(2), "✓ x 1.000 ✓ y 0.600", "✓ 1.000 image 0: x 0.000 image 1: z"),
            (torch.eye(2).flip(0), "z 1.000 ✓ y 0.800", "1.000 image 1: z ✓ 0.000 image 0: x")):
        monkeypatch.setattr(report, "embed_images", lambda *args, images=images: images)
        shown = " ".join(Page("".join(report.nearest(model, None, data, best=2))).texts)
        assert f"Texts for image 0: x text how near {of_image} Texts for" in shown
        assert f"Images for “x” {of_text}" in shown
        assert "by chance 66.67% are" in shown  # 4 of 6 pairs


def check_unbroken(cell, style=HEAD):
    """No line break may fall into a cell of a table, or into the heads of columns."""
    kind, = re.findall('<td class="(.*?)">', table("title", ["a", "b"], [["x", cell]]))
    assert f".{kind}, [scope=col] {{ white-space: nowrap }}" in style


def test_no_number_is_broken_but_long_texts_are():
    for number in ("100.00%", "0.123", "-0.123", "12 of 1,000", 0.0015, 10_000_000, "1e-05"):
        check_unbroken(number)
    with fails:  # controls: a long text, and no such style
        check_unbroken(f"/a/folder/{HOSTILE}")
    with fails:
        check_unbroken("100.00%", HEAD.replace("nowrap", "normal"))


def test_the_cells_of_a_table_have_heads():
    page = Page(table("title", ["a", "b"], [[HOSTILE, 1]]))
    assert page.texts == ["title", "a", "b", HOSTILE, "1"]
    scopes = [attributes["scope"] for name, attributes in page.tags if name == "th"]
    assert scopes == ["col", "col", "row"]
