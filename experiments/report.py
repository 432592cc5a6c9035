"""One page about a checkpoint: scores, loss curves, confusions, retrieval, attention maps.

    python -m experiments.report runs/shapes/checkpoint.pt report.html
    python -m experiments.report runs/shapes/checkpoint.pt report.html --image a.jpg b.png
    python -m experiments.report runs/shapes/checkpoint.pt report.html --image *.png --find "a ring"

The page needs no other file, no network and no script.
"""
import argparse
import json
import math
import os
from collections import Counter

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.report")

import torch

from coca import PAD
from data import run_program
from eval import (
    SUPERVISED,
    ZERO_SHOT,
    add_common_flags,
    as_text,
    constant_answer,
    distinct,
    embed_classes,
    embed_images,
    embed_texts,
    evaluate,
    in_batches,
    load_checkpoint,
    load_known_classes,
    load_split,
    new_file,
    pick_device,
    settings_of,
    tokenised,
    write_new,
    zero_shot,
)
from experiments.draw import attention_maps, chart, heat, picture, spread, tag
from experiments.own_pictures import add_image_flags, check_image_flags, look_at, ranked

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
.short, [scope=col] { white-space: nowrap }
caption, th, td { padding: .15rem .5rem; border-bottom: 1px solid #8888; text-align: left }
.row { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0 }
figure { margin: 0; width: 7rem; font-size: .875rem; line-height: 1.3 }
img { display: block; width: 7rem; height: 7rem; image-rendering: pixelated }
.map img { background: var(--picture) 0 0 / 100% 100%; print-color-adjust: exact }
svg { width: 32rem; max-width: 100% }
</style>"""

# ------------------------------------------------------------------------------------------------
# HTML


def table(title, columns, rows):
    """rows: lists of cells, of which the first heads the row."""
    lines = [tag("tr", *[tag("th", name, scope="col") for name in columns])]
    for first, *rest in rows:
        kinds = ["short" if len(str(cell)) < 16 else "long" for cell in rest]  # numbers are short
        cells = [tag("td", cell, class_=kind) for cell, kind in zip(rest, kinds)]
        lines.append(tag("tr", tag("th", first, scope="row"), *cells))
    return tag("table", tag("caption", title), *lines)


def figure(source, alt, *text, **attributes):
    return tag("figure", tag("img", src=source, alt=alt), tag("figcaption", *text), **attributes)


def row(parts):
    return tag("div", *parts, class_="row")


# ------------------------------------------------------------------------------------------------
# Loss curves


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
    title = ("The commonest confusions; chance, the commonest class, is right in "
             f"{constant_answer(data.labels):.2%} of the images")
    return [table(title, ["true", "taken for", "images"], rows[:10])]


RIGHT = "✓ "  # before what is right


def texts_for_images(found, pictures, most=None, right=()):
    """found {image: {text: nearness}}, the first `most`; pictures {image: (3, S, S) uint8}; right:
    pairs (image, text).
    """
    parts = []
    for image, texts in found.items():
        rows = []
        for text, value in list(texts.items())[:most]:
            rows.append([RIGHT * ((image, text) in right) + text, f"{value:.3f}"])
        seen = tag("img", src=picture(pictures[image]), alt=image)
        parts.append(row([seen, table(f"Texts for {image}", ["text", "how near"], rows)]))
    return parts


def images_for_texts(found, pictures, most=None, right=()):
    """As texts_for_images, but found {text: {image: nearness}}."""
    parts = []
    for text, images in found.items():
        parts.append(tag("p", f"Images for “{text}”"))
        near = []
        for image, value in list(images.items())[:most]:
            mark = RIGHT * ((image, text) in right)
            near.append(figure(picture(pictures[image]), image, f"{mark}{value:.3f} {image}"))
        parts.append(row(near))
    return parts


def nearest(model, tokenizer, data, shown=4, best=5):
    """For some images the nearest texts of the whole set, for some texts the nearest images."""
    texts, of_image = distinct(data.captions, model.config.text_len)
    names = [f"image {i}: {captions[0]}" for i, captions in enumerate(data.captions)]
    right = {(name, texts[j]) for name, own in zip(names, of_image) for j in own}
    pictures = dict(zip(names, data.images))
    cosine = embed_images(model, data.images) @ embed_texts(model, tokenizer, texts).T
    text = (f"By cosine, among {len(data):,} images and {len(texts):,} texts. {RIGHT}is right, as "
            f"by chance {len(right) / len(data) / len(texts):.2%} are.")
    some = spread(len(data), shown)
    found = ranked([names[i] for i in some], texts, cosine[some])
    parts = [tag("p", text), *texts_for_images(found, pictures, best, right)]
    some = spread(len(texts), shown)
    found = ranked([texts[j] for j in some], names, cosine.T[some])
    return parts + images_for_texts(found, pictures, best, right)


# ------------------------------------------------------------------------------------------------
# Attention

MAPS_AT_ONCE = 64  # pictures


def map_figure(weights, name, *text):
    """weights (P,) -> one pixel a patch; the style sheet lays it over the article's picture."""
    grid = math.isqrt(len(weights))
    most = int(weights.argmax())
    alt = (f"{name}: most attention ({weights[most]:.0%}) on row {most // grid + 1}, "
           f"column {most % grid + 1} of {grid} x {grid} patches")
    shares = (weights / weights[most]).reshape(grid, grid)
    return figure(heat(shares), alt, tag("strong", name), *text, class_="map")


def captions_with_maps(model, tokenizer, images, names, true):
    """images (N, 3, S, S) uint8 -> of each its caption, word by word, and where the model looked.

    true: for each the captions that are right, none if they are not known.
    """
    max_len = math.inf if model.config.lambda_cap else 1  # 1: only BEGIN, as it cannot write
    articles = []
    for x in in_batches(model, images, "attention maps", MAPS_AT_ONCE):
        tokens = model.generate(x, max_len)                             # (B, L)
        maps = [values.cpu().numpy() for values in attention_maps(model, x, tokens)]
        for ids, *of_one in zip(tokens.tolist(), *maps):
            i = len(articles)
            articles.append(article(model, tokenizer, images[i], names[i], true[i], ids, *of_one))
    return articles


def article(model, tokenizer, image, name, true, ids, words, p, embedding, queries):
    """One picture with its maps. ids: tokens; the others: a row of each of attention_maps."""
    c = model.config
    seen = picture(image)
    written = tokenizer.decode(ids)
    right = tokenised(written) in [tokenised(text, c.text_len - 2) for text in true]
    maps = [figure(seen, name, "the image")]
    if c.lambda_con:
        maps.append(map_figure(embedding[0], "image embedding"))
    for token, share, weights in zip(ids[1:], p, words):
        if token != PAD:
            maps.append(map_figure(weights, tokenizer.words[token], f" {share:.1%}"))
    title = RIGHT * right + (written or "no caption")
    parts = [tag("h3", title), tag("p", name), row(maps)]
    if c.n_query and (c.lambda_cap or c.pooler == "cascade"):  # else it never learned
        maps = [map_figure(weights, f"query {j}") for j, weights in enumerate(queries[:64])]
        title = tag("summary", f"The generative pooler's {c.n_query} queries")
        parts.append(tag("details", title, row(maps)))
    return tag("article", *parts, style=f"--picture:url({seen})")


# ------------------------------------------------------------------------------------------------
# The page


CHANCE = ("Chance: always the commonest class; texts or images in random order; captions each "
          "scored on another image, or all the same.")


def about_data(model, tokenizer, s, curves):
    """Scores and examples of the data of settings s -> scores, {title: parts}."""
    scores = evaluate(model, tokenizer, s)
    rows = []
    for what, found in scores.items():
        rows.append([what, as_text(what, found["score"]), as_text(what, found["chance"])])
    val = load_split(model, s, "val")
    title = f"{s['data']}, {len(val):,} validation images"
    sections = {"Scores": [table(title, ["task", "score", "chance"], rows), tag("p", CHANCE)],
                "Loss curves": curves}
    if not model.config.lambda_con:
        text = "lambda_con is 0: its embeddings mean nothing, so nothing is zero-shot or retrieved."
        sections["Scores"].append(tag("p", text))
    if ZERO_SHOT in scores or SUPERVISED in scores:
        data = load_known_classes(model, tokenizer, s)
        classes = embed_classes(model, tokenizer, data.classes, data.templates)
        predicted = zero_shot(embed_images(model, data.images), classes).tolist()
        sections["Classification by prompts"] = confusions(predicted, data)
    if "image to text R@1" in scores:
        sections["Retrieval"] = nearest(model, tokenizer, val)
    some = spread(len(val), 8)
    names = [f"true: {val.captions[i][0]}" for i in some]
    true = [val.captions[i] for i in some]
    sections["Captions and attention"] = attention(model, tokenizer, val.images[some], names, true)
    return scores, sections


def about_pictures(args, model, tokenizer, curves):
    """Your own pictures -> scores, {title: parts}."""
    images, scores = look_at(args, model, tokenizer)
    pictures = dict(zip(args.image, images))
    sections = {}
    if args.labels:
        text = f"Probabilities among these labels, by Eq. (2); chance: {1 / len(args.labels):.3f}."
        sections["Labels"] = [tag("p", text), *texts_for_images(scores["labels"], pictures)]
    if args.find:
        text = "By cosine; by chance each picture is first equally often."
        sections["Find"] = [tag("p", text), *images_for_texts(scores["find"], pictures)]
    unknown = [[] for _ in images]
    sections["Captions and attention"] = attention(model, tokenizer, images, args.image, unknown)
    sections["Loss curves"] = curves
    return scores, sections


def attention(model, tokenizer, images, names, true):
    text = "lambda_cap is 0: the model never learned to write."
    if model.config.lambda_cap:
        text = (f"{RIGHT}stands before a caption that is right, under each word its probability; "
                "over the image the last layer's cross-attention as the word is written, mean of "
                "the heads, followed through the pooler to the patches. The brightest patch has "
                "most.")
    return [tag("p", text), *captions_with_maps(model, tokenizer, images, names, true)]


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
    curves = loss_curves(checkpoint["metrics_names"], checkpoint["metrics"])
    if args.image:
        scores, sections = about_pictures(args, model, tokenizer, curves)
    else:
        scores, sections = about_data(model, tokenizer, settings_of(args, checkpoint), curves)
    facts = {**checkpoint["settings"], **checkpoint["config"], "step": checkpoint["step"]}
    sections["Settings"] = [table("The run and the model", ["name", "value"], facts.items())]
    write_new(args.file, page(args.checkpoint, sections))
    print(f"{args.file}: {os.path.getsize(args.file) / 1024:,.0f} KB, for any browser")
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_program(main)
