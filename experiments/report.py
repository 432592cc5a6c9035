"""One page about a checkpoint: scores, confusions, retrieval, attention maps, loss curves.

    python -m experiments.report runs/shapes/checkpoint.pt report.html
    python -m experiments.report runs/shapes/checkpoint.pt report.html --image a.jpg b.png
    python -m experiments.report runs/shapes/checkpoint.pt report.html --image *.png --find "a ring"

The page needs no other file, no network and no script.
"""
import argparse
import base64
import html
import io
import json
import math
from collections import Counter

import numpy as np
import torch

from coca import PAD
from data import pillow, run_program
from eval import (
    add_common_flags,
    as_text,
    distinct,
    embed_classes,
    embed_images,
    embed_texts,
    evaluate,
    in_batches,
    load_checkpoint,
    load_split,
    new_file,
    pick_device,
    settings_of,
    write_new,
    zero_shot,
)
from experiments.own_pictures import add_image_flags, check_image_flags, ranked, show_texts

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
:root { color-scheme: light dark }
body { margin: auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; height: max-content }
caption, th, td { padding: .15rem .5rem; border-bottom: 1px solid #8888; text-align: left }
.row { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0 }
figure { margin: 0; width: 7rem; font-size: .875rem; line-height: 1.3 }
img { display: block; width: 7rem; height: 7rem; image-rendering: pixelated }
.map img { background: var(--picture) 0 0 / 100% 100%; print-color-adjust: exact }
svg { width: 32rem; max-width: 100% }
</style>"""

# ------------------------------------------------------------------------------------------------
# HTML


class Html(str):
    """Text that is HTML already. `tag` escapes all other text, so that none can be forgotten."""


def tag(name, /, *content, **attributes):
    """tag("a", "x < y", class_="c") -> <a class="c">x &lt; y</a>. "_" in a name stands for "-"."""
    given = ""
    for key, value in attributes.items():
        given += f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    if name == "img":  # has no content, and no end
        return Html(f"<img{given}>")
    inside = ""
    for part in content:
        inside += part if isinstance(part, Html) else html.escape(str(part))
    return Html(f"<{name}{given}>{inside}</{name}>")


def table(title, columns, rows):
    """rows: lists of cells, of which the first heads the row."""
    lines = [tag("tr", *[tag("th", name, scope="col") for name in columns])]
    for first, *rest in rows:
        cells = [tag("td", cell) for cell in rest]
        lines.append(tag("tr", tag("th", first, scope="row"), *cells))
    return tag("table", tag("caption", title), *lines)


def figure(source, alt, *text, **attributes):
    return tag("figure", tag("img", src=source, alt=alt), tag("figcaption", *text), **attributes)


def row(parts):
    return tag("div", *parts, class_="row")


def png(pixels):
    """uint8 (H, W, 3) or, with alpha, (H, W, 4) -> a PNG file as a data: URI."""
    file = io.BytesIO()
    pillow().fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def picture(image):
    """(3, S, S) uint8 -> PNG of at most 128 x 128 pixels, so that the page stays small."""
    step = math.ceil(image.shape[1] / 128)
    return png(image[:, ::step, ::step].transpose(1, 2, 0))


def heat(shares):
    """(H, W) in [0, 1] -> PNG from dark blue to yellow, to lie over a picture."""
    low = np.array([20, 20, 90, 110])  # RGBA
    high = np.array([255, 225, 0, 150])
    return png((low + shares[..., None] * (high - low)).astype(np.uint8))


def spread(n, k):
    """At most k of the numbers 0, ..., n - 1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, k).astype(int))


# ------------------------------------------------------------------------------------------------
# Loss curves

STROKES = [("#0a7bd0", "none"), ("#d55e00", "7 3"), ("#009e73", "2 3")]  # colours, dashes


def chart(title, seen, curves):
    """SVG of curves {name: values (n,)} over images seen (n,), log scale.

    A point is the mean of a window, of which there are at most 300.
    """
    means = {}
    for name, values in curves.items():
        windows = np.array_split(values, min(len(values), 300))
        means[name] = np.array([max(window.mean(), 1e-4) for window in windows])
    low = min(y.min() for y in means.values())
    high = max(1.01 * low, *[y.max() for y in means.values()])

    def down(value):  # -> pixels from the top
        return 190 - 160 * np.log(value / low) / np.log(high / low)

    parts = []
    for value in np.geomspace(low, high, 5):
        parts.append(tag("path", d=f"M60 {down(value):.0f}H345", stroke="#8888"))
        parts.append(tag("text", f"{value:.2g}", x=55, y=round(down(value)) + 4, text_anchor="end"))
    for x, name in ((60, f"{seen[0]:,.0f}"), (202, "images seen"), (345, f"{seen[-1]:,.0f}")):
        parts.append(tag("text", name, x=x, y=208, text_anchor="middle"))
    for i, (name, y) in enumerate(means.items()):
        colour, dashes = STROKES[i % len(STROKES)]
        look = dict(fill="none", stroke=colour, stroke_dasharray=dashes, stroke_width=1.5)
        places = zip(np.linspace(60, 345, len(y)), y)
        points = " ".join(f"{x:.1f},{down(value):.1f}" for x, value in places)
        parts.append(tag("polyline", points=points, **look))
        parts.append(tag("path", d=f"M{60 + 95 * i} 14h20", **look))  # the legend
        parts.append(tag("text", name, x=85 + 95 * i, y=18))
        title += f"; {name}: {y[0]:.3g} at first, {y[-1]:.3g} at last"
    return tag("svg", tag("title", title), *parts, viewBox="0 0 370 215", role="img",
               fill="currentColor", font_size=12)


def loss_curves(names, metrics):
    """names of the columns of metrics (steps, columns), as the checkpoint holds them."""
    if len(metrics) < 2:
        return [tag("p", "No curves: the run has fewer than two steps.")]
    column = dict(zip(names, metrics.numpy().T))
    names = ("loss", "loss_con", "loss_cap")
    curves = {name: column[name] for name in names if column[name].any()}
    text = "loss_con is Eq. (2), loss_cap Eq. (3), loss their weighted sum, Eq. (4)."
    return [tag("p", text), chart("Losses, log scale", column["images"], curves)]


# ------------------------------------------------------------------------------------------------
# Confusions and retrieval


def confusions(predicted, data):
    """predicted (N,) classes of data's images, -1 = none -> a table of the commonest mistakes."""
    images = Counter(data.labels)
    rows = []
    for (true, other), count in Counter(zip(data.labels, predicted)).most_common():
        if true != other and other >= 0:
            rows.append([data.classes[true], data.classes[other], f"{count} of {images[true]}"])
    return [table("The commonest confusions", ["true", "taken for", "images"], rows[:10])]


def texts_for_images(found, pictures, most=None):
    """found {image: {text: nearness}}, the first `most`; pictures {image: (3, S, S) uint8}."""
    parts = []
    for image, texts in found.items():
        rows = [[text, f"{value:.3f}"] for text, value in list(texts.items())[:most]]
        seen = tag("img", src=picture(pictures[image]), alt=image)
        parts.append(row([seen, table(f"Texts for {image}", ["text", "how near"], rows)]))
    return parts


def images_for_texts(found, pictures, most=None):
    """found {text: {image: nearness}}, the first `most`; pictures {image: (3, S, S) uint8}."""
    parts = []
    for text, images in found.items():
        parts.append(tag("p", f"Images for “{text}”"))
        near = []
        for image, value in list(images.items())[:most]:
            near.append(figure(picture(pictures[image]), image, f"{value:.3f} {image}"))
        parts.append(row(near))
    return parts


def nearest(model, tokenizer, data, shown=4, best=5):
    """For some images the nearest texts of the whole set, for some texts the nearest images."""
    texts, _ = distinct(data.captions, model.config.text_len)
    names = [f"image {i}: {captions[0]}" for i, captions in enumerate(data.captions)]
    pictures = dict(zip(names, data.images))
    cosine = embed_images(model, data.images) @ embed_texts(model, tokenizer, texts).T
    parts = [tag("p", f"By cosine, among {len(data):,} images and {len(texts):,} texts.")]
    some = spread(len(data), shown)
    found = ranked([names[i] for i in some], texts, cosine[some])
    parts += texts_for_images(found, pictures, best)
    some = spread(len(texts), shown)
    found = ranked([texts[j] for j in some], names, cosine.T[some])
    return parts + images_for_texts(found, pictures, best)


# ------------------------------------------------------------------------------------------------
# Attention

MAPS_AT_ONCE = 64  # pictures


def attention_maps(model, images, tokens):
    """Where a model looks, as shares of the P patches, means over heads.

    images (B, 3, S, S) float, tokens (B, L) -> of each word (B, L - 1, P), the last layer's
    cross-attention as tokens[:, 1:] are predicted, followed through the generative pooler; the
    words' probabilities (B, L - 1); of the image embedding (B, 1, P); of the generative pooler's
    queries (B, Q, P), each patch by itself if there is no such pooler.
    """
    image_tokens = model.encoder(images)                                # (B, P, D)
    context = image_tokens
    queries = torch.eye(image_tokens.shape[1], device=images.device).expand(len(images), -1, -1)
    if model.generative_pooler is not None:
        context = model.generative_pooler(image_tokens)                 # (B, Q, D)
        queries = model.generative_pooler.weights(image_tokens).mean(1)  # (B, Q, P)
    cross = model.multimodal.blocks[-1].cross_attention
    inputs = []  # of it: the states before it (B, L, D), and the context
    hook = cross.register_forward_pre_hook(lambda module, given: inputs.extend(given))
    states = model.decode(images, tokens)                               # (B, L, D)
    hook.remove()
    weights = cross.weights(*inputs).mean(1)                            # (B, L, Q or P)
    words = weights[:, :-1] @ queries                                   # (B, L - 1, P)
    p = model.multimodal.head(states[:, :-1]).softmax(-1)               # (B, L - 1, V)
    p = p.gather(-1, tokens[:, 1:, None])[..., 0]                       # (B, L - 1)
    if model.config.pooler == "cascade":
        embedding = model.contrastive_pooler.weights(context).mean(1) @ queries  # (B, 1, P)
    else:
        embedding = model.contrastive_pooler.weights(image_tokens).mean(1)  # (B, 1, P)
    return words, p, embedding, queries


def map_figure(weights, name, *text):
    """weights (P,) -> one pixel a patch; the style sheet lays it over the article's picture."""
    grid = math.isqrt(len(weights))
    most = int(weights.argmax())
    alt = (f"{name}: most attention ({weights[most]:.0%}) on row {most // grid + 1}, "
           f"column {most % grid + 1} of {grid} x {grid} patches")
    shares = (weights / weights[most]).reshape(grid, grid)
    return figure(heat(shares), alt, tag("strong", name), *text, class_="map")


def captions_with_maps(model, tokenizer, images, names):
    """images (N, 3, S, S) uint8 -> of each its caption, word by word, and where the model looked."""
    max_len = math.inf if model.config.lambda_cap else 1  # 1: only BEGIN, as it cannot write
    articles = []
    for x in in_batches(model, images, "attention maps", MAPS_AT_ONCE):
        tokens = model.generate(x, max_len)                             # (B, L)
        maps = [values.cpu().numpy() for values in attention_maps(model, x, tokens)]
        for ids, *of_one in zip(tokens.tolist(), *maps):
            i = len(articles)
            articles.append(article(model, tokenizer, images[i], names[i], ids, *of_one))
    return articles


def article(model, tokenizer, image, name, ids, words, p, embedding, queries):
    """One picture with its maps. ids: tokens; the others: a row of each of attention_maps."""
    c = model.config
    seen = picture(image)
    maps = [figure(seen, name, "the image")]
    if c.lambda_con:
        maps.append(map_figure(embedding[0], "image embedding"))
    for token, share, weights in zip(ids[1:], p, words):
        if token != PAD:
            maps.append(map_figure(weights, tokenizer.words[token], f" {share:.1%}"))
    parts = [tag("h3", tokenizer.decode(ids) or "no caption"), tag("p", name), row(maps)]
    if c.n_query and (c.lambda_cap or c.pooler == "cascade"):  # else it never learned
        maps = [map_figure(weights, f"query {j}") for j, weights in enumerate(queries[:64])]
        title = tag("summary", f"The generative pooler's {c.n_query} queries")
        parts.append(tag("details", title, row(maps)))
    return tag("article", *parts, style=f"--picture:url({seen})")


# ------------------------------------------------------------------------------------------------
# The page


def about_data(model, tokenizer, s):
    """Scores and examples of the data of settings s -> scores, {title: parts}."""
    scores = evaluate(model, tokenizer, s)
    rows = []
    for what, found in scores.items():
        rows.append([what, as_text(what, found["score"]), as_text(what, found["chance"])])
    val = load_split(model, s, "val")
    title = f"{s['data']}, {len(val):,} validation images"
    sections = {"Scores": [table(title, ["task", "score", "chance"], rows)]}
    if not model.config.lambda_con:
        text = "lambda_con is 0: its embeddings mean nothing, so nothing is zero-shot or retrieved."
        sections["Scores"].append(tag("p", text))
    if "zero-shot top-1" in scores:
        data = load_split(model, s, "zeroshot")
        classes = embed_classes(model, tokenizer, data.classes, data.templates)
        predicted = zero_shot(embed_images(model, data.images), classes).tolist()
        sections["Zero-shot classification"] = confusions(predicted, data)
    if "image to text R@1" in scores:
        sections["Retrieval"] = nearest(model, tokenizer, val)
    some = spread(len(val), 8)
    names = [f"true: {val.captions[i][0]}" for i in some]
    sections["Captions and attention"] = attention(model, tokenizer, val.images[some], names)
    return scores, sections


def about_pictures(args, model, tokenizer):
    """Your own pictures -> scores, {title: parts}."""
    images, scores = show_texts(args, model, tokenizer)
    pictures = dict(zip(args.image, images))
    sections = {}
    if args.labels:
        found = texts_for_images(scores["labels"], pictures)
        sections["Labels"] = [tag("p", "Probabilities among these labels, by Eq. (2)."), *found]
    if args.find:
        found = images_for_texts(scores["find"], pictures)
        sections["Find"] = [tag("p", "By cosine."), *found]
    sections["Captions and attention"] = attention(model, tokenizer, images, args.image)
    return scores, sections


def attention(model, tokenizer, images, names):
    text = "lambda_cap is 0: the model never learned to write."
    if model.config.lambda_cap:
        text = ("Under each word its probability; over the image the last layer's cross-attention "
                "as the word is written, mean of the heads, followed through the pooler to the "
                "patches. The brightest patch has most.")
    return [tag("p", text), *captions_with_maps(model, tokenizer, images, names)]


def page(title, sections):
    parts = [tag("h1", "CoCa report"), tag("p", title)]
    for name, content in sections.items():
        parts.append(tag("section", tag("h2", name), *content))
    head = HEAD + tag("title", f"CoCa: {title}") + "</head>"
    return head + tag("body", tag("main", *parts)) + "</html>\n"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                prog="python -m experiments.report",
                                usage="%(prog)s CHECKPOINT FILE [options]")
    add_common_flags(p)
    p.add_argument("file", type=new_file, help="the page to make")
    add_image_flags(p)
    args = p.parse_args(argv)
    check_image_flags(p, args)
    return args


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint)
    model.to(pick_device(args.device)).eval()
    if args.image:
        scores, sections = about_pictures(args, model, tokenizer)
    else:
        scores, sections = about_data(model, tokenizer, settings_of(args, checkpoint))
    sections["Loss curves"] = loss_curves(checkpoint["metrics_names"], checkpoint["metrics"])
    facts = {**checkpoint["settings"], **checkpoint["config"], "step": checkpoint["step"]}
    sections["Settings"] = [table("The run and the model", ["name", "value"], facts.items())]
    write_new(args.file, page(args.checkpoint, sections))
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_program(main)
