"""Draws the README's pictures into assets/ (SVG on white, so they look the same in the dark).

    python tests/pictures.py runs/shapes/checkpoint.pt     scenes, attention, mask and losses
    python tests/pictures.py                               entropy and ablations, from tests/*.csv

pytest does not collect this file. Curves and maps are drawn by the functions of eval.py's report.
"""
import csv
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from ablations import BOTH_WAYS, IMAGES, QUESTION, TABLE_8, ZERO_SHOT, read_lines, values_of

from coca import PAD, who_looks_at_whom
from data import UserError, load, to_model
from eval import attention_maps, chart, heat, load_checkpoint, picture, spread, tag

HERE = Path(__file__).parent
ASSETS = HERE.parent / "assets"


def save(name, title, width, height, *parts):
    """Writes assets/NAME.svg; title: what a screen reader says."""
    card = tag("rect", width=width, height=height, rx=6, fill="#fff")
    page = tag("svg", tag("title", title), card, *parts, xmlns="http://www.w3.org/2000/svg",
               viewBox=f"0 0 {width} {height}", width=width, height=height, font_size=12,
               font_family="system-ui, sans-serif", fill="#1a1a1a", color="#1a1a1a")
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / f"{name}.svg"
    path.write_text(page, encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")


def image(source, x, y, side):
    return tag("image", href=source, x=x, y=y, width=side, height=side,
               style="image-rendering: pixelated")


def text(words, x, y, **how):
    return tag("text", words, x=x, y=y, **how)


def lines(words, x, y, width=24):
    """Text in lines of `width` letters."""
    parts = []
    for i, line in enumerate(textwrap.wrap(words, width)):
        parts.append(text(line, x, y + 14 * i))
    return parts


def save_charts(name, title, charts):
    """Writes assets/NAME.svg of charts {title: chart}, side by side."""
    parts = []
    for i, (above, drawn) in enumerate(charts.items()):
        parts.append(text(above, 60 + 370 * i, 20, font_weight="bold"))
        parts.append(tag("svg", drawn, x=370 * i, y=26, width=370, height=215))
    save(name, title, 740, 246, *parts)


@torch.no_grad()
def draw_scenes(model, tokenizer, val):
    """Eight validation scenes with the captions that the model writes, wrong ones in red."""
    parts = []
    some = spread(len(val), 8)
    tokens = model.generate(to_model(torch.tensor(val.images[some])))
    for k, (i, row) in enumerate(zip(some, tokens)):
        x = 12 + 178 * (k % 4)
        y = 12 + 215 * (k // 4)
        written = tokenizer.decode(row)
        right = written in val.captions[i]
        colour = "#1a1a1a" if right else "#c00000"
        parts.append(image(picture(val.images[i]), x, y, 128))
        parts.append(tag("g", *lines(written, x, y + 144), fill=colour))
    save("scenes", "Eight generated scenes, each with the caption that the model wrote", 720, 440,
         *parts)


@torch.no_grad()
def draw_attention(model, tokenizer, val):
    """One scene of two things, and where the model looks as it writes each word."""
    i = next(i for i, captions in enumerate(val.captions) if len(captions) == 2)
    x = to_model(torch.tensor(val.images[i:i + 1]))
    tokens = model.generate(x)
    maps, _, embedding, _ = attention_maps(model, x, tokens)
    grid = model.config.image_size // model.config.patch_size
    cells = [("the scene", None), ("image embedding", embedding[0, 0])]
    for token, weights in zip(tokens[0, 1:].tolist(), maps[0]):
        if token != PAD:
            cells.append((tokenizer.words[token], weights))
    parts = []
    for k, (name, weights) in enumerate(cells):
        left = 10 + 100 * (k % 7)
        top = 10 + 118 * (k // 7)
        parts.append(image(picture(val.images[i]), left, top, 90))
        if weights is not None:
            shares = (weights / weights.max()).reshape(grid, grid).numpy()
            parts.append(image(heat(shares), left, top, 90))
        parts.append(text(name, left + 45, top + 104, text_anchor="middle", font_size=11))
    rows = -(-len(cells) // 7)
    save("attention", "Where the model looks in a scene as it writes each word", 710, 12 + 118 * rows,
         *parts)


def draw_mask(model, tokenizer):
    """Attention weights of the first unimodal layer: what causal_mask forbids is exactly 0."""
    captions = ["a small red ring at the top left", "a large blue bar at the bottom right and a"]
    tokens = tokenizer.encode(captions, model.config.text_len)[:, :12]
    weights = who_looks_at_whom(model, tokens)[0]                       # (L + 1, L + 1)
    names = ["<begin>", *captions[0].split(), "<end>", "[CLS]"]
    names += ["<pad>"] * (len(weights) - len(names))
    parts = []
    for i, name in enumerate(names):
        y = 78 + 30 * i
        parts.append(text(name, 74, y + 19, text_anchor="end"))
        parts.append(text(name, 0, 0, transform=f"translate({100 + 34 * i} 70) rotate(-40)"))
        for j, weight in enumerate(weights[i].tolist()):
            x = 84 + 34 * j
            box = dict(x=x, y=y, width=32, height=28)
            if weight:
                parts.append(tag("rect", **box, fill="#0a7bd0", fill_opacity=f"{weight**0.5:.2f}"))
                parts.append(text(f"{weight:.2f}", x + 16, y + 18, text_anchor="middle",
                                  font_size=10))
            else:
                parts.append(tag("rect", **box, fill="#e4e4e4"))
    save("mask", "Who looks at whom: attention weights of a caption's words, [CLS] and padding, "
         "zero above the diagonal", 94 + 34 * len(names) + 40, 90 + 30 * len(names), *parts)


def draw_losses(checkpoint):
    column = dict(zip(checkpoint["metrics_names"], checkpoint["metrics"].numpy().T))
    seen = column["images"]
    charts = {}
    for title, name in (("Contrastive loss, Eq. (2)", "loss_con"),
                        ("Captioning loss, Eq. (3)", "loss_cap")):
        charts[title] = chart(title, seen, {"in training": column[name]})
    save_charts("losses", "Both losses over images seen", charts)


def draw_entropy(file):
    """Means over the seeds of tests/bench.py entropy."""
    with open(file, newline="") as f:
        rows = list(csv.DictReader(f))
    curves = {"entropy": {}, "val_cap": {}}
    for start in dict.fromkeys(row["start"] for row in rows):
        mine = [row for row in rows if row["start"] == start]
        seen = sorted({int(row["images"]) for row in mine})
        for what, found in curves.items():
            means = []
            for images in seen:
                values = [float(row[what]) for row in mine if int(row["images"]) == images]
                means.append(np.mean(values))
            found[start] = np.array(means)
    charts = {}
    for title, what in (("Entropy of the pooler's attention, nats", "entropy"),
                        ("Validation captioning loss", "val_cap")):
        charts[title] = chart(title, seen, curves[what])
    save_charts("entropy", "The pooler's entropy and the validation captioning loss", charts)


def draw_ablations(file):
    """Table 8 at small scale: a dot for each run, a line at the default's mean."""
    runs = [line for line in read_lines(file).values()
            if line["data"] == "shapes" and int(line["images"]) == IMAGES["b"]]
    entries = [("default: both, 2 : 1, n_uni 2, cascade, 16", "default")]
    for row in "bcdef":
        entries += [(f"({row}) {what}", variant) for what, variant, _ in TABLE_8[row][1][1:]]
    bottom = 52 + 22 * len(entries)
    key = "A dot is a run, the line the default's mean; no dots: that loss was not trained."
    parts = [text(key, 12, bottom + 22)]
    for i, (what, _) in enumerate(entries):
        parts.append(text(what, 12, 60 + 22 * i))
    titles = {ZERO_SHOT: "zero-shot", BOTH_WAYS: "retrieval, R@1",
              "captions exactly right": "captions", QUESTION: "questions"}
    for k, (score, title) in enumerate(titles.items()):
        panel = score_panel(runs, score, [variant for _, variant in entries], bottom)
        header = text(title, 45, 20, text_anchor="middle", font_weight="bold")
        parts.append(tag("g", header, *panel, transform=f"translate({275 + 120 * k} 0)"))
    save("ablations", "Scores of each variant of Table 8 on generated scenes, a dot for each run",
         740, bottom + 34, *parts)


def score_panel(runs, score, variants, bottom):
    """One score of all variants, from its least to its greatest value over 90 pixels."""
    there = [float(line[score]) for line in runs if line[score]]
    low = min(there)
    high = max(there)

    def across(value):  # -> pixels from the left
        return round(90 * (value - low) / max(high - low, 1e-9), 1)

    mean = across(np.mean(values_of(runs, "default", score)))
    parts = [tag("path", d=f"M{mean} 44V{bottom}", stroke="#d55e00")]
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(text(f"{value:.0%}", across(value), 38, text_anchor=anchor, font_size=11))
    for i, variant in enumerate(variants):
        y = 56 + 22 * i
        parts.append(tag("path", d=f"M0 {y}h90", stroke="#8886"))
        for value in values_of(runs, variant, score):
            parts.append(tag("circle", cx=across(value), cy=y, r=4, fill="#0a7bd0",
                             fill_opacity=0.6))
    return parts


def main():
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    if len(sys.argv) == 2:
        model, tokenizer, checkpoint = load_checkpoint(sys.argv[1])
        if checkpoint["settings"]["data"] != "shapes":
            raise UserError("other people's photographs are not drawn; give a checkpoint of scenes")
        val = load("shapes", split="val", size=model.config.image_size,
                   seed=checkpoint["settings"]["seed"])
        draw_scenes(model, tokenizer, val)
        draw_attention(model, tokenizer, val)
        draw_mask(model, tokenizer)
        draw_losses(checkpoint)
    if (HERE / "entropy.csv").exists():
        draw_entropy(HERE / "entropy.csv")
    if (HERE / "ablations.csv").exists():
        draw_ablations(HERE / "ablations.csv")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
