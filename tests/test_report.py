"""The page of --report: sound and closed HTML whatever the texts, pictures and attention maps that say what is so."""
import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, recorded_weights
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import eval as evaluation
from coca import PAD, CoCa, CoCaConfig
from data import DataError, Dataset, Tokenizer, to_model
from eval import Html, attention_maps, chart, confusions, loss_curves, nearest, png, table, tag

HOSTILE = """<script>alert("1&amp;2")<img src=x onerror='x'>&"""  # a file may be called that, too
CLASSES = [f"{HOSTILE} cat", "dog"]
ROW = "step,images,loss_con,loss_cap,loss,lr,temperature,seconds\n"


class Page(HTMLParser):
    """Reads a page and notes what is wrong with it in `faults`."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.targets, self.faults, self.texts, self.level = [], [], [], [], [], [], 0
        self.feed(page)
        self.close()
        self.faults += [f"{name} is left open" for name in self.open]
        self.faults += [f"id {i} twice" for i in set(self.ids) if self.ids.count(i) > 1]
        self.faults += [f"nothing has id {target}" for target in self.targets if target not in self.ids]
        rest = re.sub(r"base64,[^\")]*", "", page)
        self.faults += [f"{word} in the page" for word in ("http:", "https:", "//", "@import") if word in rest]

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append((name, attributes))
        if name not in ("img", "meta", "link"):
            self.open.append(name)
        if name == "img" and not attributes.get("alt"):
            self.faults.append("an image without alt")
        if name in ("script", "iframe", "object") or any(key.startswith("on") for key in attributes):
            self.faults.append(f"{name} {attributes} may run something")
        if re.fullmatch("h[1-6]", name):
            if int(name[1]) > self.level + 1:
                self.faults.append(f"{name} after h{self.level}")
            self.level = int(name[1])
        self.ids += [attributes["id"]] if "id" in attributes else []
        for key in ("href", "src", "aria-labelledby", "aria-describedby"):
            target = attributes.get(key, "data:")
            if target.startswith("#") or key.startswith("aria"):
                self.targets += [] if target == "data:" else [target.lstrip("#")]
            elif not target.startswith("data:"):
                self.faults.append(f"refers to {target}")

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.faults.append(f"</{name}> closes nothing")

    def handle_data(self, text):
        self.texts.append(text)


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the page of a random model on hostile classes, captions, words and file names -> its text."""
    def make(*flags, **changes):
        folder = tmp_path / HOSTILE.replace("/", "")
        folder.mkdir()
        words = ["<pad>", "<begin>", "<end>", "<unk>", HOSTILE, "cat", "dog"]
        torch.manual_seed(0)
        config = dict(image_size=8, patch_size=4, width=16, heads=2, encoder_layers=1, n_query=3, vocab_size=len(words), text_len=5)
        model = CoCa(CoCaConfig(**{**config, **changes}))
        settings = dict(data="cifar10", data_dir=HOSTILE, seed=0)
        torch.save(dict(config=dataclasses.asdict(model.config), vocabulary=words, settings=settings, model=model.state_dict(), step=7),
                   folder / "checkpoint.pt")
        (folder / "metrics.csv").write_text(ROW + "1,8,4,3,10,0,.07,0\n2,16,0.3,2,4.3,0,.07,1\n3,2")  # cut off by a crash
        images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
        Image.fromarray(images[0].transpose(1, 2, 0)).save(folder / f"{HOSTILE}.png")
        labels = np.arange(6) % 2
        data = Dataset(images, [[f"a {CLASSES[i]}", f"the {CLASSES[i]}"] for i in labels], labels, CLASSES, ["a {}", "the {}"])
        monkeypatch.setattr(evaluation, "load", lambda *a, **k: data)
        monkeypatch.chdir(folder)
        evaluation.main([str(folder / "checkpoint.pt"), "--report", "page.html", *flags])
        return (folder / "page.html").read_text()
    return make


@pytest.mark.parametrize("flags, changes, there, left_out", [
    ((), {}, ["loss_con is Eq. (2)", "Zero-shot classification", "Retrieval", "captions exactly right"], ["is 0:"]),
    ((), dict(pooler="parallel"), ["3 queries"], []),
    ((), dict(n_query=0), ["Retrieval"], ["3 queries"]),
    ((), dict(lambda_con=0.0), ["lambda_con is 0"], ["Zero-shot classification", "Retrieval", "image embedding"]),
    ((), dict(lambda_cap=0.0), ["lambda_cap is 0", "Retrieval", "3 queries"], ["<end>"]),
    ((), dict(lambda_cap=0.0, pooler="parallel"), ["lambda_cap is 0", "image embedding"], ["3 queries"]),
    (("--image", f"{HOSTILE}.png"), {}, ["Captions and attention", f"{HOSTILE}.png"], ["Scores", "Retrieval"]),
])
def test_a_page_is_sound_and_closed_whatever_the_model_and_the_texts(made, flags, changes, there, left_out):
    text = made(*flags, **changes)
    page = Page(text)
    assert page.faults == []
    shown = " | ".join(page.texts)
    assert HOSTILE in shown  # as text, to be read
    assert "<script>" not in text and "<img src=x" not in text
    said = [name for name, attributes in page.tags if name == "img" and HOSTILE in attributes["alt"]]
    assert said or changes.get("lambda_cap") == 0  # captions in alt texts and file names
    for phrase in there:
        assert phrase in shown
    for phrase in left_out:
        assert phrase not in shown
    assert ("html", {"lang": "en"}) in page.tags and "default-src 'none'" in text


@pytest.mark.parametrize("broken", [
    "<p>", "</p>", "<p><b></p></b>", "<h2>a</h2>", "<img src='data:,'>", "<a href='#b'>c</a>", "<b id=x></b><b id=x></b>",
    "<img src='https://a.b' alt=c>", "<b onclick=x></b>", str(tag("p", Html(HOSTILE))), "<svg aria-labelledby=none></svg>"])
def test_a_fault_in_a_page_would_be_seen(broken):
    assert Page(broken).faults
    assert not Page(str(tag("p", HOSTILE, id=HOSTILE))).faults  # (control)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 4]))
def test_a_png_holds_the_pixels_put_in(seed, H, W, channels):
    pixels = np.random.default_rng(seed).integers(0, 256, (H, W, channels), np.uint8)
    assert np.array_equal(decoded(png(pixels)), pixels)
    assert not np.array_equal(decoded(png(pixels + np.uint8(1))), pixels)  # control


def followed(record, model, layer):
    """Of the weights of a forward pass: the cross-attention of a layer, and through the pooler."""
    c, cross = model.config, [weights.mean(1) for causal, weights in record if not causal]
    cross = cross[layer - c.n_multi if layer >= 0 else layer][:, :-1]
    pooler = record[c.encoder_layers][1].mean(1)
    return cross @ pooler if c.n_query else cross


@given(cases())
def test_maps_are_the_weights_of_the_forward_pass_and_shares_of_one(case):
    model, images, tokens = case.model(), case.images(), case.tokens()
    with torch.no_grad(), recorded_weights() as record:
        logits = model(images, tokens).logits
    with torch.no_grad():
        words, p, embedding, queries = attention_maps(model, images, tokens)
    for maps in (words, embedding, *([] if queries is None else [queries])):
        assert maps.shape[2] == 4 and (maps >= 0).all()
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
    torch.testing.assert_close(words, followed(record, model, -1))
    torch.testing.assert_close(p, torch.stack([logits[:, t].softmax(-1)[range(len(p)), tokens[:, t + 1]] for t in range(p.shape[1])], 1))
    contrastive = record[model.config.encoder_layers + bool(case.n_query)][1].mean(1)  # (B, 1, Q or P)
    through = case.n_query and case.pooler == "cascade"
    torch.testing.assert_close(embedding, contrastive @ queries if through else contrastive)
    assert not model.multimodal.blocks[-1].cross_attention._forward_pre_hooks  # nothing is left behind


def test_maps_of_another_layer_or_word_would_be_seen():
    model, images, tokens = CONTROL.model(), CONTROL.images(), CONTROL.tokens()
    with torch.no_grad(), recorded_weights() as record:
        model(images, tokens)
    with torch.no_grad():
        words = attention_maps(model, images, tokens)[0]
    assert not torch.allclose(words, followed(record, model, 0), atol=1e-4)
    assert not torch.allclose(words[:, 1:], followed(record, model, -1)[:, :-1], atol=1e-4)


def test_the_probabilities_of_a_greedy_caption_are_the_largest():
    model, images = CONTROL.model(), CONTROL.images()
    tokens = model.generate(images)
    with torch.no_grad():
        p = attention_maps(model, images, tokens)[1]
        best = model(images, tokens).logits[:, :-1].softmax(-1).amax(-1)
    real = tokens[:, 1:] != PAD
    torch.testing.assert_close(p[real], best[real])


def test_a_map_lies_on_the_patch_with_the_most_weight():
    weights = np.array([0.1, 0.1, 0.6, 0.2])
    figure = Page(evaluation.map_figure(weights, "word"))
    (_, image), = [one for one in figure.tags if one[0] == "img"]
    assert "row 2, column 1 of 2 x 2" in image["alt"] and "60%" in image["alt"]
    brightness = decoded(image["src"])[..., 0]
    assert brightness.shape == (2, 2) and brightness[1, 0] == 255 and brightness[0, 0] == brightness[0, 1] < brightness[1, 1] < 255


def test_under_each_map_stand_its_word_and_probability():
    case = dataclasses.replace(CONTROL, seed=6)  # which writes captions of different lengths
    model, images = case.model(), (case.images() * 127.5 + 127.5).to(torch.uint8)
    words = ["<pad>", "<begin>", "<end>", *(f"w{i}" for i in range(3, 13))]
    with torch.no_grad():
        tokens = model.generate(to_model(images))
        p = attention_maps(model, to_model(images), tokens)[1]
        articles = list(evaluation.captions_with_maps(model, Tokenizer(words), images.numpy(), ["x", "y", "z"]))
    lengths = (tokens != PAD).sum(1)
    assert lengths.min() < lengths.max() <= tokens.shape[1]
    for row, share, n, article in zip(tokens, p, lengths, articles):
        shown = Page(article).texts
        first = shown.index("image embedding") + 1
        expected = [text for t in range(1, n) for text in (words[row[t]], f"{share[t - 1]:.1%}")]
        assert shown[first:][:len(expected) + 1] == [*expected, "The generative pooler's 3 queries"]


def test_a_page_is_never_written_over_another_file(made, tmp_path):
    made()
    for taken, why in (("page.html", "is there already"), ("none/page.html", "folder")):
        with pytest.raises(DataError, match=why):
            evaluation.main(["checkpoint.pt", "--report", taken])
    before = open("page.html").read()
    args = evaluation.parse_args(["checkpoint.pt", "--image", f"{HOSTILE}.png", "--report", "late.html"])
    open("late.html", "w").write("mine")  # came while the model was at work
    with pytest.raises(DataError, match="cannot be written"):
        evaluation.html_report(args, *evaluation.load_checkpoint("checkpoint.pt"), {})
    args.report, args.checkpoint = "other name.html", "\udcff.pt"  # control; a file name that is no Unicode
    evaluation.html_report(args, *evaluation.load_checkpoint("checkpoint.pt"), {})
    assert not Page(open("other name.html").read()).faults
    assert open("late.html").read() == "mine" and open("page.html").read() == before


@pytest.mark.parametrize("content", [None, "", ROW, ROW + "1,8,4,3,10,0,.07,0\n", "a,b\n1,2\n3,4\n", "\0\xff"])
def test_without_metrics_the_page_says_so(tmp_path, content):
    path = tmp_path / f"{HOSTILE[:8]}.csv"
    if content is not None:
        path.write_text(content)
    (only,) = loss_curves(path)
    assert "No curves" in only and not Page(only).faults
    path.write_text(ROW + "1,8,4,3,10,0,.07,0\n2,16,0.3,2,4.3,0,.07,1\n")  # control
    assert "".join(loss_curves(path)).count("<polyline") == 3
    path.write_text(ROW + "1,8,4,0.0,4,0,.07,0\n2,16,0.3,0.0,0.3,0,.07,1\n")  # trained without captions: no curve of them
    assert "".join(loss_curves(path)).count("<polyline") == 2


@given(st.integers(0, 10_000), st.integers(2, 1000))
def test_a_curve_stays_in_its_frame_and_falls_where_the_loss_falls(seed, n):
    noise = np.random.default_rng(seed).uniform(0.9, 1.1, n)
    svg = chart("loss", np.arange(n) + 1.0, np.geomspace(10, 0.01, n) * noise)
    points = np.array([pair.split(",") for pair in re.search('points="([^"]+)"', svg)[1].split()], float)
    assert len(points) == min(n, 300) and (np.diff(points[:, 0]) > 0).all()
    assert points.min(0) == pytest.approx([60, 30]) and points.max(0) == pytest.approx([345, 190])
    assert points[0, 1] < points[-1, 1]  # SVG counts downwards
    rising = chart("loss", np.arange(n) + 1.0, np.geomspace(0.01, 10, n))  # control
    assert points[0, 1] < float(re.search('points="[^,]+,([^ ]+)', rising)[1])


def test_confusions_by_hand():
    data = Dataset(np.zeros((5, 3, 1, 1)), [], np.array([0, 0, 0, 2, 2]), ["a", "b", "c"])
    matrix, top = map(Page, confusions(np.array([0, 1, 1, 2, 0]), data))
    cells = [text for text in matrix.texts if text.strip()]
    assert cells[1:] == ["true", "a", "b", "c", "a", "1", "2", "0", "c", "1", "0", "1"]  # no image is a b
    assert top.texts[1:] == ["true", "taken for", "images", "a", "b", "2 of 3", "c", "a", "1 of 2"]


def test_many_classes_become_a_picture():
    labels = np.arange(30)
    data = Dataset(np.zeros((30, 3, 1, 1)), [], labels, [str(i) for i in labels])
    for predicted in (labels, (labels + 1) % 30):  # the second is the control: off the diagonal
        matrix, top = map(Page, confusions(predicted, data))
        pixels = decoded(matrix.tags[1][1]["src"])
        assert pixels.shape == (30, 30, 4) and (pixels[..., 0].argmax(1) == predicted).all()
        assert ("1 of 1" in top.texts) == (predicted[0] != 0)


def test_retrieval_examples_show_the_nearest_first_and_which_are_right(monkeypatch):
    texts = F.normalize(torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]]), dim=-1)
    monkeypatch.setattr(evaluation, "embed_texts", lambda *a: texts)
    data = Dataset(np.zeros((2, 3, 1, 1), np.uint8), [["x", "y"], ["z"]])
    for images, expected in ((torch.eye(2), "x 1.000 right y 0.600 right z 0.000 wrong"),
                             (torch.eye(2).flip(0), "z 1.000 wrong y 0.800 right x 0.000 right")):  # the control
        shown = " ".join(Page("".join(nearest(images, None, None, data))).texts)
        assert f"Texts nearest to image 0 text cosine right? {expected}" in shown
        assert "“x” 1.000, " + ("right" if expected[0] == "x" else "wrong") in shown


def test_a_wide_table_can_be_scrolled_by_keyboard_and_its_cells_have_heads():
    page = Page(table("title", ["a", "b"], [[HOSTILE, 1]]))
    assert page.tags[0][1]["tabindex"] == "0" and page.tags[0][1]["aria-label"] == "title"
    assert page.texts == ["title", "a", "b", HOSTILE, "1"]
    assert [attributes["scope"] for name, attributes in page.tags if name == "th"] == ["col", "col", "row"]


def test_pictures_are_kept_small():
    image = np.random.default_rng(0).integers(0, 256, (3, 300, 300), np.uint8)
    assert decoded(evaluation.picture(image)).shape == (100, 100, 3)
    assert np.array_equal(decoded(evaluation.picture(image[:, :128, :128])), image[:, :128, :128].transpose(1, 2, 0))
    assert to_model(torch.tensor(image)).max() <= 1
