"""Evaluate a CoCa checkpoint without training anything on the task (Sec. 3.3 "Zero-shot transfer").

    python eval.py runs/shapes/checkpoint.pt                             on the data it was trained on
    python eval.py runs/shapes/checkpoint.pt --image a.jpg b.png         caption your own pictures
    python eval.py runs/coco/checkpoint.pt --data cifar10 --data-dir D   another task, never trained for
    python eval.py runs/shapes/checkpoint.pt --json scores.json          the same for machines
    python eval.py runs/shapes/checkpoint.pt --report report.html        the same to look at: a page with pictures
    python eval.py --bench --config bench-tiny bench-small               speed and memory of this machine

Classification by prompt ensembles (the templates: TEMPLATES and `shapes` in data.py), image-text retrieval
both ways, greedy captions; the chance level stands beside each score.
"""
import argparse
import base64
import dataclasses
import html
import json
import math
import statistics
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from coca import BEGIN, CONFIGS, END, PAD, Block, CoCa, CoCaConfig, contrastive_loss
from data import CIFAR, NAMES, Batches, DataError, Dataset, Tokenizer, load, read_image, to_model

# ------------------------------------------------------------------------------------------------
# Embeddings


def in_batches(model, images, what, batch=256):
    """Batches of images (N, 3, S, S) uint8 as the model takes them, with progress."""
    for i in tqdm(range(0, len(images), batch), what, leave=False):
        yield to_model(torch.tensor(images[i:i + batch]).to(model.log_temperature.device))


def embed_images(model, images):
    """images (N, 3, S, S) uint8 array -> (N, E) unit norm."""
    return torch.cat([model.encode_image(x) for x in in_batches(model, images, "embedding images")])


def embed_texts(model, tokenizer, texts, batch=1024):
    """texts -> (len(texts), E) unit norm."""
    device = model.log_temperature.device
    parts = [model.encode_text(tokenizer.encode(texts[i:i + batch], model.config.text_len).to(device))
             for i in range(0, len(texts), batch)]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------
# Tasks


def zero_shot(image_embedding, model, tokenizer, data):
    """Zero-shot classification (Table 4) -> predictions (N,): the class whose prompts lie nearest.

    Prompt ensembling as in CLIP: a class is the mean of its prompts' embeddings.
    """
    prompts = [template.format(name) for name in data.classes for template in data.templates]
    text = embed_texts(model, tokenizer, prompts).unflatten(0, (len(data.classes), -1))  # (classes, templates, E)
    text = F.normalize(text.mean(1), dim=-1)                            # (classes, E)
    return (image_embedding @ text.T).argmax(1)


def recall(scores, relevant, ks=(1, 5, 10)):
    """Share of queries with a relevant item among their K nearest, and the same by chance -> {K: (recall, chance)}.

    scores (queries, items); relevant: for each query the list of its items. Several relevant items count
    once, by the best ranked. A tie counts against: equal embeddings for everything must not score.
    """
    items, ranks = scores.shape[1], []
    for row, mine in zip(scores, relevant):
        best = row[mine].max()
        ranks.append(int((row >= best).sum() - (row[mine] >= best).sum()))
    ranks = torch.tensor(ranks)

    def miss(g, k):  # probability that k of the items, drawn at random, hold none of g
        return math.prod(max(items - g - j, 0) / (items - j) for j in range(min(k, items)))

    return {k: ((ranks < k).float().mean().item(), 1 - sum(miss(len(mine), k) for mine in relevant) / len(relevant)) for k in ks}


def retrieval(image_embedding, model, tokenizer, captions):
    """Zero-shot retrieval (Table 3), cosine over the whole set -> {"image to text": {K: ...}, "text to image": ...}.

    captions: a list of texts per image, all used. A text that several images carry is one item, right for each.
    """
    texts = list(dict.fromkeys(text for mine in captions for text in mine))
    index = {text: i for i, text in enumerate(texts)}
    of_image = [sorted({index[text] for text in mine}) for mine in captions]
    of_text = [[] for _ in texts]
    for i, mine in enumerate(of_image):
        for j in mine:
            of_text[j].append(i)
    scores = image_embedding @ embed_texts(model, tokenizer, texts).T   # (images, texts)
    return {"image to text": recall(scores, of_image), "text to image": recall(scores.T, of_text)}


def caption(model, tokenizer, images, **how):
    """images (N, 3, S, S) uint8 -> N captions, greedy unless `how` (see CoCa.generate) says otherwise."""
    return [tokenizer.decode(row) for x in in_batches(model, images, "captioning") for row in model.generate(x, **how).tolist()]


@torch.no_grad()
def evaluate(model, tokenizer, settings, captioned=1000):
    """All tasks that `settings` (data, data_dir, seed) have data for -> a dict of plain numbers and texts.

    captioned: caption at most that many validation images.
    """
    model.eval()
    name, where = settings["data"], dict(data_dir=settings["data_dir"], size=model.config.image_size, seed=settings["seed"])
    data = load(name, split="val", **where)
    image_embedding = embed_images(model, data.images)
    scores = {"data": name, "images": len(data)}
    if name == "shapes" or name in CIFAR:
        labelled, embedding = data, image_embedding
        if name == "shapes":
            labelled = load(name, split="zeroshot", **where)
            embedding = embed_images(model, labelled.images)
        right = zero_shot(embedding, model, tokenizer, labelled).cpu() == torch.from_numpy(labelled.labels)
        scores["zero-shot top-1"] = {"score": right.float().mean().item(), "chance": 1 / len(labelled.classes), "images": len(right)}
    for way, found in retrieval(image_embedding, model, tokenizer, data.captions).items():
        for k, (score, chance) in found.items():
            scores[f"{way} R@{k}"] = {"score": score, "chance": chance}
    texts = caption(model, tokenizer, data.images[:captioned])
    plain = [{tokenizer.decode(row) for row in tokenizer.encode(mine, model.config.text_len)} for mine in data.captions[:captioned]]
    scores["captions exactly right"] = {"score": sum(text in mine for text, mine in zip(texts, plain)) / len(texts), "chance": 0.0}
    scores["distinct captions"] = {"score": len(set(texts)) / len(texts), "chance": 1 / len(texts)}
    scores["captions"] = [{"generated": text, "true": mine} for text, mine in zip(texts[:5], data.captions)]
    return scores


def report(scores):
    """Prints what evaluate returned."""
    print(f"{scores['data']}: {scores['images']} validation images")
    print(f"{'':24} {'score':>8} {'chance':>8}")
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"{name:24} {value['score']:8.2%} {value['chance']:8.2%}")
    for pair in scores["captions"]:
        print(f"  generated: {pair['generated']}\n       true: {pair['true'][0]}")


# ------------------------------------------------------------------------------------------------
# Report: one HTML page that needs no other file, no network and no script

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --line: #c8c8c8; --tint: #ffb74d; --curve: #0059b3 }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e8e8; --line: #484d55; --tint: #8a4b00; --curve: #7ab8ff } }
body { margin: auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
a { color: var(--curve); margin-right: 1rem }
.skip:not(:focus) { position: absolute; transform: translateY(-200%) }
.scroll { overflow-x: auto; overflow-wrap: normal; margin-bottom: .75rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption, th, td { padding: .15rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
.heat, .bar { display: block; padding: 0 .3rem; background: color-mix(in srgb, var(--tint) calc(var(--share) * 100%), transparent) }
.bar { min-width: 6rem; background: linear-gradient(to right, var(--tint) calc(var(--share) * 100%), transparent 0) }
.row { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0 }
figure { margin: 0; width: 7rem; font-size: .875rem; line-height: 1.3 }
img { display: block; width: 7rem; height: 7rem; image-rendering: pixelated }
.map img { background: var(--picture) 0 0 / 100% 100%; print-color-adjust: exact }
.matrix, .matrix img { width: min(100%, 40rem); height: auto; background: #000; color: #fff }
svg { width: 22rem; max-width: 100%; fill: none; stroke: var(--line) }
text { fill: var(--ink); stroke: none; font-size: 12px }
</style>"""


class Html(str):
    """Text that is HTML already. `tag` escapes all other text, so that none can be forgotten."""


def tag(name, /, *content, **attributes):
    """tag("a", "x < y", href="#b", class_="c") -> <a href="#b" class="c">x &lt; y</a>. "_" in a name stands for "-"."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items())
    inside = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content)
    return Html(f"<{name}{given}>" + ("" if name == "img" else f"{inside}</{name}>"))


def png(pixels):
    """uint8 (H, W, 3) or, with alpha, (H, W, 4) -> a PNG file as a data: URI."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    H, W, channels = pixels.shape
    rows = np.pad(pixels.reshape(H, -1), ((0, 0), (1, 0))).tobytes()  # a 0 before each row: no filter
    header = struct.pack(">IIBBBBB", W, H, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


def picture(image):
    """(3, S, S) uint8 -> PNG of at most 128 x 128 pixels, so that the page stays small."""
    step = math.ceil(image.shape[1] / 128)
    return png(image[:, ::step, ::step].transpose(1, 2, 0))


def heat(shares):
    """(H, W) in [0, 1] -> PNG from dark blue to yellow, to lie over a picture."""
    low, high = np.array([20, 20, 90, 110]), np.array([255, 225, 0, 150])  # RGBA
    return png((low + shares[..., None] * (high - low)).astype(np.uint8))


def figure(source, alt, *text, **attributes):
    return tag("figure", tag("img", src=source, alt=alt), tag("figcaption", *text), **attributes)


def table(title, columns, rows):
    """rows: lists of cells, of which the first heads the row. A wide table scrolls by itself, by keyboard too."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in columns)))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    return tag("div", tag("table", tag("caption", title), head, tag("tbody", *body)), class_="scroll", tabindex=0, role="region",
               aria_label=title)


def tinted(share, text, kind="heat"):
    return tag("span", text, class_=kind, style=f"--share:{min(max(share, 0), 1):.3f}")


def spread(n, k):
    return np.unique(np.linspace(0, n - 1, k).astype(int))


def chart(name, steps, values):
    """SVG of values (n,) over steps (n,), on a log scale, as means of at most 300 windows."""
    y = np.array([max(part.mean(), 1e-4) for part in np.array_split(values, min(len(values), 300))])
    low, high = y.min(), max(y.max(), 1.01 * y.min())
    down = lambda y: 190 - 160 * np.log(y / low) / np.log(high / low)  # noqa: E731
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(np.linspace(60, 345, len(y)), down(y)))
    axes = [f'<path d="M60 {down(t):.0f}H345"/><text x="55" y="{down(t) + 4:.0f}" text-anchor="end">{t:.3g}</text>'
            for t in np.geomspace(low, high, 5)]
    axes += [f'<text x="{x}" y="208" text-anchor="middle">{step:,.0f}</text>' for x, step in ((60, steps[0]), (345, steps[-1]))]
    summary = f"{name}: {values[0]:.3g} at step {steps[0]:,.0f}, least {values.min():.3g}, {values[-1]:.3g} at step {steps[-1]:,.0f}"
    return tag("svg", tag("title", summary), tag("text", f"{name} (log scale) over steps", x=60, y=18), Html("".join(axes)),
               tag("polyline", points=points, style="stroke: var(--curve)"), viewBox="0 0 370 215", role="img")


def loss_curves(path):
    """What metrics.csv of a run shows."""
    try:
        names, *rows = (line.split(",") for line in path.read_text().splitlines())
        rows = np.array([row for row in rows if len(row) == len(names)], float)  # the last one may be cut off
        if len(rows) < 2:
            raise ValueError("fewer than two steps")
        column = dict(zip(names, rows.T))
        charts = [chart(name, column["step"], column[name]) for name in ("loss_con", "loss_cap", "loss") if column[name].any()]
    except (OSError, ValueError, KeyError) as e:
        return [tag("p", f"No curves: {path} cannot be used ({e}).")]
    return [tag("p", "loss_con is Eq. (2), loss_cap Eq. (3), loss their weighted sum, Eq. (4)."), tag("div", *charts, class_="row")]


def confusions(predicted, data):
    """predicted (N,) classes of data's images. Left out: rows of classes without images, columns of those never predicted either."""
    C = len(data.classes)
    counts = np.bincount(data.labels * C + predicted, minlength=C * C).reshape(C, C)  # (true, predicted)
    rows, columns = np.flatnonzero(counts.sum(1)), np.flatnonzero(counts.sum(0) + counts.sum(1))
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    title = f"Rows: {len(rows)} true classes; columns: {len(columns)} predicted"
    if len(columns) <= 20:
        matrix = table(title, ["true", *(data.classes[j] for j in columns)], [
            [data.classes[i], *(tinted(shares[i, j], counts[i, j]) for j in columns)] for i in rows])
    else:
        matrix = figure(heat(shares[rows][:, columns] / shares.max()), f"Heat map. {title}. The next table has its main entries.",
                        f"{title}, in the data's order; the brighter, the larger the share of the row", class_="matrix")
    wrong = (counts * (1 - np.eye(C, dtype=int))).ravel()
    top = [divmod(int(k), C) for k in wrong.argsort(kind="stable")[::-1][:10] if wrong[k]]
    return [matrix, table("The commonest confusions", ["true", "taken for", "images"], [
        [data.classes[i], data.classes[j], f"{counts[i, j]} of {counts[i].sum()}"] for i, j in top])]


def nearest(image_embedding, model, tokenizer, data, shown=4, best=5):
    """For some images the nearest texts of the whole set, for some texts the nearest images, with cosines."""
    texts = list(dict.fromkeys(text for mine in data.captions for text in mine))
    cosine = (image_embedding @ embed_texts(model, tokenizer, texts).T).cpu().numpy()  # (images, texts)
    right = lambda i, j: "right" if texts[j] in data.captions[i] else "wrong"  # noqa: E731
    to_text, to_image = [], []
    for i in spread(len(data), shown):
        found = [[texts[j], f"{cosine[i, j]:.3f}", right(i, j)] for j in (-cosine[i]).argsort()[:best]]
        to_text.append(tag("div", tag("img", src=picture(data.images[i]), alt=f"Image {i}: {data.captions[i][0]}"),
                           table(f"Texts nearest to image {i}", ["text", "cosine", "right?"], found), class_="row"))
    for j in spread(len(texts), shown):
        found = [figure(picture(data.images[i]), f"Image {i}: {data.captions[i][0]}", f"{cosine[i, j]:.3f}, {right(i, j)}")
                 for i in (-cosine[:, j]).argsort()[:best]]
        to_image += [tag("p", f"“{texts[j]}”"), tag("div", *found, class_="row")]
    return [tag("p", f"Among {len(data):,} images and {len(texts):,} texts."), tag("h3", "Image to text"), *to_text,
            tag("h3", "Text to image"), *to_image]


def attention_maps(model, images, tokens):
    """Where a model looks: shares of the P patches, means over heads. images (B, 3, S, S) float, tokens (B, L) ->

    of each word (B, L - 1, P), the last layer's cross-attention as tokens[:, 1:] are predicted, followed through the generative
    pooler; the words' probabilities (B, L - 1); of the image embedding (B, 1, P); of the pooler's queries (B, Q, P) or None.
    """
    cross, inputs = model.multimodal.blocks[-1].cross_attention, []
    hook = cross.register_forward_pre_hook(lambda module, given: inputs.extend(given))
    p = model(images, tokens).logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    hook.remove()
    words = cross(*inputs, return_weights=True)[1].mean(1)[:, :-1]      # (B, L - 1, Q), or P instead of Q without a pooler
    source, queries, cascade = model.encoder(images), None, model.config.pooler == "cascade"
    if model.generative_pooler is not None:
        pooled, queries = model.generative_pooler(source, return_weights=True)
        source, queries = pooled if cascade else source, queries.mean(1)
        words = words @ queries                                         # (B, L - 1, P)
    embedding = model.contrastive_pooler(source, return_weights=True)[1].mean(1)
    if queries is not None and cascade:
        embedding = embedding @ queries                                 # (B, 1, P)
    return words, p, embedding, queries


def map_figure(weights, name, *text):
    """weights (P,) -> a picture of one pixel a patch; the style sheet lays it over its article's picture."""
    grid, at = math.isqrt(len(weights)), int(weights.argmax())
    alt = f"{name}: most attention ({weights[at]:.0%}) on row {at // grid + 1}, column {at % grid + 1} of {grid} x {grid} patches"
    return figure(heat((weights / weights[at]).reshape(grid, grid)), alt, tag("strong", name), *text, class_="map")


def captions_with_maps(model, tokenizer, images, names):
    """images (N, 3, S, S) uint8 -> for each its caption, word by word with its probability, and where the model looked."""
    c, x = model.config, to_model(torch.tensor(images).to(model.log_temperature.device))
    tokens = model.generate(x, max_len=None if c.lambda_cap else 1)     # (N, L); a dual encoder cannot write: only BEGIN
    words, p, embedding, queries = (t if t is None else t.cpu().numpy() for t in attention_maps(model, x, tokens))
    for i, (row, name) in enumerate(zip(tokens.tolist(), names)):
        maps = [figure(picture(images[i]), name, "the image")]
        if c.lambda_con:
            maps.append(map_figure(embedding[i, 0], "image embedding"))
        maps += [map_figure(weights, tokenizer.words[token], tinted(share, f"{share:.1%}", "bar"))
                 for token, share, weights in zip(row[1:], p[i], words[i]) if token != PAD]
        parts = [tag("h3", tokenizer.decode(row) or "no caption"), tag("p", name), tag("div", *maps, class_="row")]
        if queries is not None and (c.lambda_cap or c.pooler == "cascade"):  # else it never learned
            maps = [map_figure(weights, f"query {j}") for j, weights in enumerate(queries[i][:64])]
            parts.append(tag("details", tag("summary", f"The generative pooler's {c.n_query} queries"), tag("div", *maps, class_="row")))
        yield tag("article", *parts, style=f"--picture:url({picture(images[i])})")


def new_file(path):
    """The path, if a file can be made there: told before the work, not after."""
    if Path(path).exists():
        raise DataError(f"{path}: is there already; delete it or give another --report")
    if not Path(path).parent.is_dir():
        raise DataError(f"{path}: its folder is not there; make it or give another --report")
    return path


@torch.no_grad()
def html_report(args, model, tokenizer, checkpoint, scores, settings=None):
    """Writes args.report: with the `settings` of `evaluate` about its scores and their data, without about args.image."""
    c, sections = model.config, {}
    facts = {**checkpoint["settings"], "step": checkpoint["step"], **dataclasses.asdict(c)}.items()
    if settings:
        name, where = settings["data"], dict(data_dir=settings["data_dir"], size=c.image_size, seed=settings["seed"])
        data = load(name, split="val", **where)
        some, embedding = spread(len(data), 8), embed_images(model, data.images)
        images, names = data.images[some], [f"true: {data.captions[i][0]}" for i in some]
        sections["Scores"] = [table(f"{name}, {len(data):,} validation images", ["task", "score", "chance"], [
            [task, tinted(value["score"], f"{value['score']:.2%}", "bar"), f"{value['chance']:.2%}"]
            for task, value in scores.items() if isinstance(value, dict)])]
    else:
        images, names = np.stack([read_image(Path(file), c.image_size) for file in args.image]), args.image
    sections["Loss curves"] = loss_curves(Path(args.checkpoint).parent / "metrics.csv")
    if settings and c.lambda_con:
        labelled = load(name, split="zeroshot", **where) if name == "shapes" else data
        if labelled.classes:
            seen = embedding if labelled is data else embed_images(model, labelled.images)
            sections["Zero-shot classification"] = confusions(zero_shot(seen, model, tokenizer, labelled).cpu().numpy(), labelled)
        sections["Retrieval"] = nearest(embedding, model, tokenizer, data)
    elif settings:
        sections["Scores"].append(tag("p", "lambda_con is 0: images and texts share no space, classification and retrieval mean nothing."))
    sections["Captions and attention"] = [tag("p", (
        "Under each word its probability; over the image the last layer's cross-attention as the word is written, mean of the heads, "
        "followed through the pooler to the patches. The brightest patch has most." if c.lambda_cap else
        "lambda_cap is 0: the model never learned to write.")), *captions_with_maps(model, tokenizer, images, names)]
    page = HEAD + tag("title", f"CoCa: {args.checkpoint}") + "</head>" + tag(
        "body", tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("nav", *(tag("a", title, href=f"#part-{i}") for i, title in enumerate(sections)), aria_label="Sections"),
        tag("main", tag("h1", "CoCa report"), tag("p", args.checkpoint),
            tag("details", tag("summary", "Settings"), table("The run and the model", ["name", "value"], facts)),
            *(tag("section", tag("h2", title, id=f"part-{i}"), *parts) for i, (title, parts) in enumerate(sections.items())),
            id="main")) + "</html>\n"
    try:
        with open(args.report, "x", encoding="utf-8", errors="replace") as f:  # a file name need not be Unicode
            f.write(page)
    except OSError as e:
        raise DataError(f"{args.report}: cannot be written ({e})") from None


# ------------------------------------------------------------------------------------------------
# Benchmark


def timed(function, repeats=5):
    """Median seconds of a call, after one to warm up; with repeats 0, of the first."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:] or times)


def peak_memory(device):
    """Most bytes in use so far: allocated on the GPU, or resident in this process (0 where the system does not say)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_contrastive(device, sizes=(1024, 4096, 16384, 65536), E=512):
    """Time and memory of Eq. (2), forward and backward, up to the paper's batch."""
    for N in sizes:
        x, y = (F.normalize(torch.randn(N, E, device=device), dim=-1).requires_grad_() for _ in range(2))
        seconds = timed(lambda x=x, y=y: contrastive_loss(x, y, 0.07).backward(), 0 if N > 20_000 else 3)
        print(f"contrastive loss and gradient, {N:6,} pairs of {E}: {seconds:8.2f} s, {peak_memory(device) / 2**30:.2f} GiB in use at most")


def synthetic(config, batch, device):
    """Random images, and captions of random words with lengths uniform in [L/4, L], sorted as `Batches` sorts them."""
    generator = torch.Generator().manual_seed(0)
    L, V = config.text_len, config.vocab_size
    lengths = torch.randint(L // 4, L + 1, (batch, 1), generator=generator).sort(0).values
    tokens, at = torch.randint(4, V, (batch, L), generator=generator), torch.arange(L)
    tokens[:, 0] = BEGIN
    tokens = torch.where(at == lengths - 1, END, tokens).where(at < lengths, PAD)
    images = torch.rand(batch, 3, config.image_size, config.image_size, generator=generator) * 2 - 1
    return images.to(device), tokens[:, :lengths.max()].to(device)


def bench_step(config, batch, device):
    """-> seconds of a training step, the step itself, and its model."""
    from train import backward, half_precision, make_optimizer  # (train.py imports this file)
    model = CoCa(config).to(device)
    optimizer, (images, tokens), autocast = make_optimizer(model), synthetic(config, batch, device), half_precision(device)

    def step():
        optimizer.zero_grad()
        backward(model, images, tokens, autocast=autocast)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return timed(step), step, model


def bytes_kept(model, batch):
    """Bytes that a training step keeps for its backward pass, weights apart; the same with --grad-checkpoint."""
    from train import backward
    weights = {p.data_ptr() for p in model.parameters()}
    for recompute in (False, True):
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            backward(model, *batch)
        yield sum(size for address, size in kept.items() if address not in weights)


def bench(name, device):
    """Speed and memory of training and captioning one configuration on synthetic tensors, and how they grow."""
    config, batch = CONFIGS[name], {"bench-small": 32}.get(name, 64)
    kind = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    a, b = torch.randn(2, 4096, 4096, device=device, dtype=kind)
    product = torch.empty_like(a)
    peak = 2 * 4096**3 / timed(lambda: torch.mm(a, b, out=product))
    seconds, step, model = bench_step(config, batch, device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is not counted
        step()
    images, tokens = synthetic(config, batch, device)
    kept, kept_less = bytes_kept(model, (images, tokens))
    with torch.no_grad():
        model.multimodal.head.weight[[PAD, END]] = 0.0  # captions of full length
        captioning = timed(lambda: model.generate(images), 2)
    words = batch * (config.text_len - 1)
    pictures = np.zeros((2 * batch, 3, config.image_size, config.image_size), np.uint8)
    texts = [["a dog runs left of the house"]] * len(pictures)
    batches = Batches(Dataset(pictures, texts, augment=True), Tokenizer.learn(texts[0], 99), config.text_len, batch)
    reading = timed(lambda: batches(0))
    flops = counter.get_total_flops()
    print(f"{name}: batch {batch}, {device}, {torch.get_num_threads()} threads, matmul peak {peak / 1e9:,.0f} GFLOP/s ({kind})\n"
          f"  training {batch / seconds:,.1f} images/s, {seconds * 1e3:,.0f} ms a step, {flops / 1e9:,.1f} GFLOP of matrix products, "
          f"{flops / seconds / peak:.0%} of peak; {kept / 2**20:,.0f} MiB kept for backward, "
          f"{kept_less / 2**20:,.0f} with --grad-checkpoint, "
          f"{peak_memory(device) / 2**20:,.0f} MiB in use at most; reading a batch {reading / seconds:.1%} of a step\n"
          f"  captioning {words / captioning:,.0f} tokens/s, greedy")
    for what in ("batch", "image_size", "text_len", "vocab_size"):
        base = batch if what == "batch" else getattr(config, what)
        sizes = [base // 2, base, base * 2]
        variants = [(config, n) if what == "batch" else (dataclasses.replace(config, **{what: n}), batch) for n in sizes]
        times = [bench_step(*variant, device)[0] for variant in variants]
        exponent = math.log2(times[2] / times[1]) / (2 if what == "image_size" else 1)  # twice the side: four times the tokens
        print(f"  {what:10} " + ", ".join(f"{n}: {t * 1e3:,.0f} ms" for n, t in zip(sizes, times))
              + f"; grows with its {'square (image tokens)' if what == 'image_size' else 'size'} to the power {exponent:.2f}")


# ------------------------------------------------------------------------------------------------
# Checkpoints and the command line


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there first. DataError if the one asked for cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as e:  # torch has a kind of its own for each device
        raise DataError(f"--device {name}: cannot be used here ({str(e).splitlines()[0]}); leave it out") from None
    return name


def load_checkpoint(path, device="cpu"):
    """-> model, tokenizer, the whole checkpoint (plain types only: no code runs on loading). DataError if unfit."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such checkpoint; python train.py makes one")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model = CoCa(CoCaConfig(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        return model, Tokenizer(checkpoint["vocabulary"]), checkpoint
    except Exception as e:  # cut off, foreign, or with code in it: torch names each differently
        raise DataError(f"{path}: not a checkpoint of this program ({type(e).__name__}); give another one") from None


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="python eval.py CHECKPOINT [options]")
    p.add_argument("checkpoint", nargs="?", help="OUT/checkpoint.pt of train.py")
    p.add_argument("--data", choices=NAMES, help="default: what it was trained on")
    p.add_argument("--data-dir", help="folder of the data (default: as in training)")
    p.add_argument("--image", nargs="+", metavar="FILE", default=[], help="caption these image files instead")
    p.add_argument("--json", metavar="FILE", help="also write the scores there")
    p.add_argument("--report", metavar="FILE", type=new_file, help="also make a page to look at there, with curves, examples and attention")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--bench", action="store_true", help="no checkpoint: measure speed and memory on synthetic tensors")
    p.add_argument("--config", nargs="+", choices=[*CONFIGS, "contrastive"], default=["bench-tiny"],
                   help="sizes to measure, or the contrastive loss alone (default: bench-tiny)")
    args = p.parse_args(argv)
    if not args.bench and not args.checkpoint:
        p.error("give a checkpoint (python train.py makes one) or --bench")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.bench:
        for name in args.config:
            bench_contrastive(pick_device(args.device)) if name == "contrastive" else bench(name, pick_device(args.device))
        return
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint, pick_device(args.device))
    if args.image:
        images = torch.stack([torch.from_numpy(read_image(Path(f), model.config.image_size).copy()) for f in args.image])
        scores = dict(zip(args.image, caption(model, tokenizer, images.numpy())))
        for name, text in scores.items():
            print(f"{name}: {text}")
    else:
        settings = dict(checkpoint["settings"])
        if args.data:
            settings.update(data=args.data, data_dir=args.data_dir)
        elif args.data_dir:
            settings["data_dir"] = args.data_dir
        scores = evaluate(model, tokenizer, settings)
        report(scores)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(scores, indent=1))
        except OSError as e:
            raise DataError(f"{args.json}: cannot be written ({e})") from None
    if args.report:
        html_report(args, model, tokenizer, checkpoint, scores, None if args.image else settings)


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
