"""Draws README's and RESULTS' pictures into assets/ (SVG on white, alike in the dark).

    python -m experiments.pictures runs/shapes     all of scenes
    python -m experiments.pictures runs/cifar10    photographs with captions
    python -m experiments.pictures                 those that need no checkpoint
"""
import argparse
import math
import textwrap
from pathlib import Path

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.pictures")

import numpy as np
import torch
import torch.nn.functional as F

from coca import BEGIN, END, PAD, CoCaConfig, causal_mask, text_mask
from data import UserError, note, replacing, run_program, to_model
from eval import load_checkpoint, load_split, tokenised
from experiments.ablations import LINES, read_lines, values_of
from experiments.draw import attention_maps, chart, heat, picture, spread, tag
from experiments.entropy import ENTROPY, read_entropy
from experiments.variants import (
    BOTH_WAYS,
    IMAGES,
    QUESTION,
    RIGHT,
    TABLES,
    VARIANTS,
    ZERO_SHOT,
)
from train import PRESETS

# ------------------------------------------------------------------------------------------------
# SVG


def page(title, width, height, *parts):
    """-> an SVG as text; title: what a screen reader says."""
    card = tag("rect", width=width, height=height, rx=6, fill="#fff")
    return tag("svg", tag("title", title), card, *parts, xmlns="http://www.w3.org/2000/svg",
               viewBox=f"0 0 {width} {height}", width=width, height=height, font_size=12,
               font_family="system-ui, sans-serif", fill="#1a1a1a", color="#1a1a1a")


def image(source, x, y, side):
    return tag("image", href=source, x=x, y=y, width=side, height=side,
               style="image-rendering: pixelated")


def text(words, x, y, **how):
    return tag("text", words, x=x, y=y, **how)


def lines(words, x, y, width=22):
    """Text in lines of `width` letters."""
    parts = []
    for i, line in enumerate(textwrap.wrap(words, width)):
        parts.append(text(line, x, y + 17 * i, font_size=14))
    return parts


def charts(title, drawn):
    """Page of charts {title: chart}, two a row."""
    parts = []
    for i, (above, curves) in enumerate(drawn.items()):
        x = 370 * (i % 2)
        y = 246 * (i // 2)
        parts.append(text(above, x + 60, y + 20, font_weight="bold"))
        parts.append(tag("svg", curves, x=x, y=y + 26, width=370, height=215))
    return page(title, 740, 246 * math.ceil(len(drawn) / 2), *parts)


# ------------------------------------------------------------------------------------------------
# From a checkpoint


@torch.no_grad()
def draw_captions(title, model, tokenizer, val, some, height):
    """Some images, four a row, with the captions that the model writes, wrong ones in red."""
    parts = []
    tokens = model.generate(to_model(torch.tensor(val.images[some])))
    for k, (i, row) in enumerate(zip(some, tokens)):
        x = 12 + 178 * (k % 4)
        y = 12 + height * (k // 4)
        written = tokenizer.decode(row)
        right = tokenised(written) in map(tokenised, val.captions[i])
        colour = "#1a1a1a" if right else "#c00000"
        parts.append(image(picture(val.images[i]), x, y, 128))
        parts.append(tag("g", *lines(written, x, y + 146), fill=colour))
    return page(title, 720, 12 + height * math.ceil(len(some) / 4), *parts)


@torch.no_grad()
def draw_attention(model, tokenizer, val):
    """One scene of two things, and where the model looks: as it writes each word, and for its image
    embedding; without what it never learned.
    """
    c = model.config
    i = next(i for i, captions in enumerate(val.captions) if len(captions) == 2)
    x = to_model(torch.tensor(val.images[i:i + 1]))
    tokens = model.generate(x, math.inf if c.lambda_cap else 1)  # 1: only BEGIN
    maps, _, embedding, _ = attention_maps(model, x, tokens)
    grid = c.image_size // c.patch_size
    cells = [("the scene", None)]
    if c.lambda_con:
        cells.append(("embedding x", embedding[0, 0]))
    for token, weights in zip(tokens[0, 1:].tolist(), maps[0]):
        if token != PAD:
            cells.append((tokenizer.words[token], weights))
    parts = []
    for k, (name, weights) in enumerate(cells):
        left = 10 + 118 * (k % 6)
        top = 10 + 132 * (k // 6)
        parts.append(image(picture(val.images[i]), left, top, 104))
        if weights is not None:
            shares = (weights / weights.max()).reshape(grid, grid).numpy()
            parts.append(image(heat(shares), left, top, 104))
        parts.append(text(name, left + 52, top + 121, text_anchor="middle", font_size=14))
    rows = -(-len(cells) // 6)
    return page("Where the model looks in a scene as it writes each word", 720, 12 + 132 * rows,
                *parts)


@torch.no_grad()
def attention_weights(model, tokens):
    """Who looks at whom in the first unimodal layer, mean of the heads.

    tokens (B, L) -> weights (B, L + 1, L + 1) of the tokens and, behind them, [CLS].
    """
    block = model.unimodal.blocks[0]
    x = block.self_norm(model.unimodal.embed(tokens))                   # (B, L + 1, D)
    return block.self_attention.weights(x, mask=text_mask(tokens)).mean(1)


def draw_mask(model, tokenizer):
    """Attention weights of a caption and [CLS]: what text_mask forbids is exactly 0."""
    captions = ["a small red ring at the top left", "a large blue bar at the bottom right and a"]
    tokens = tokenizer.encode(captions, model.config.text_len)[:, :12]
    names = [tokenizer.words[i] for i in tokens[0]] + ["[CLS]"]
    parts = []
    for i, row in enumerate(attention_weights(model, tokens)[0].tolist()):
        y = 78 + 30 * i
        parts.append(text(names[i], 74, y + 19, text_anchor="end"))
        parts.append(text(names[i], 0, 0, transform=f"translate({100 + 34 * i} 70) rotate(-40)"))
        for j, weight in enumerate(row):
            x = 84 + 34 * j
            box = dict(x=x, y=y, width=32, height=28)
            if weight:
                parts.append(tag("rect", **box, fill="#0a7bd0", fill_opacity=f"{weight**0.5:.2f}"))
                parts.append(text(f"{weight:.2f}", x + 16, y + 18, text_anchor="middle",
                                  font_size=10))
            else:
                parts.append(tag("rect", **box, fill="#e4e4e4"))
    below = f"first unimodal layer, mean of its {model.config.heads} heads; grey: hidden, exactly 0"
    parts.append(text(below, 12, 100 + 30 * len(names)))
    return page("Who looks at whom: attention weights of a caption's words, padding and [CLS], zero "
                "above the diagonal and on what the mask hides", 94 + 34 * len(names) + 40,
                110 + 30 * len(names), *parts)


def draw_losses(checkpoint):
    """The losses that were learned, and the temperature if Eq. (2) is one of them."""
    column = dict(zip(checkpoint["metrics_names"], checkpoint["metrics"].numpy().T))
    drawn = {}
    for title, name in (("Contrastive loss, Eq. (2)", "loss_con"),
                        ("Captioning loss, Eq. (3)", "loss_cap"), ("Temperature", "temperature")):
        if column[name].any() and (name != "temperature" or column["loss_con"].any()):
            drawn[f"{title}, log scale"] = chart(title, column["images"], {"in training": column[name]})
    return charts("The losses and the temperature over images seen", drawn)


def from_checkpoint(path):
    """-> {name: SVG} of what the checkpoint has learned, with notes on what is left out."""
    model, tokenizer, checkpoint = load_checkpoint(path)
    name = checkpoint["settings"]["data"]
    if name not in ("shapes", "cifar10"):
        raise UserError(f"{path} learned from photographs of other people, which are not drawn; "
                        "give a checkpoint of scenes or of CIFAR-10")
    val = load_split(model, checkpoint["settings"], "val")
    if name == "cifar10":
        if not model.config.lambda_cap:
            raise UserError(f"{path} was trained with --lambda-cap 0, it writes no captions to draw; "
                            "give one that does")
        title = "The first dozen test images of CIFAR-10, each with the caption that the model wrote"
        return {"cifar": draw_captions(title, model, tokenizer, val, range(12), 190)}
    pages = {"mask": draw_mask(model, tokenizer)}
    pages["attention"] = draw_attention(model, tokenizer, val)
    if model.config.lambda_cap:
        title = "Eight generated scenes, each with the caption that the model wrote"
        pages["scenes"] = draw_captions(title, model, tokenizer, val, spread(len(val), 8), 222)
    else:
        note("scenes left out: trained with --lambda-cap 0, the checkpoint writes no captions")
    if checkpoint["step"] > 1:
        pages["losses"] = draw_losses(checkpoint)
    else:
        note("losses left out: the run has fewer than two steps")
    return pages


# ------------------------------------------------------------------------------------------------
# From nothing: the architecture; a mask, and the same with a bug


def box(name, below, x, y, fill, width=200):
    """A module, named as in coca.py, and what it gives; (x, y): the middle of its lower edge."""
    return [tag("rect", x=x - width / 2, y=y - 46, width=width, height=46, rx=8, fill=fill),
            text(name, x, y - 27, text_anchor="middle", font_size=15, font_weight="bold"),
            text(below, x, y - 9, text_anchor="middle", font_size=14)]


def arrow(*points, **how):
    """A line through points (x, y) that ends in a head."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return tag("path", d=path, fill="none", stroke="#555", stroke_width=2, marker_end="url(#head)",
               **how)


def draw_architecture():
    """Figure 2 with the cascade of Sec. 3.2: what CoCa.forward and CoCa.losses do with a batch."""
    c = CoCaConfig(patch_size=PRESETS["shapes"]["patch_size"])
    S, Q, D = c.image_size, c.n_query, c.width
    P = (S // c.patch_size) ** 2
    blue, green, orange, red = "#d7e6fb", "#dff0d8", "#fde9c9", "#f6d5d5"
    left = 118
    right = 378
    head = tag("marker", tag("path", d="M0 0 L8 4 L0 8 z", fill="#555"), id="head", refX=7, refY=4,
               markerWidth=8, markerHeight=8, orient="auto")
    parts = [
        head,
        *box("images", f"(B, 3, {S}, {S})", left, 500, "#eee", 150),
        *box("captions, then [CLS]", "(B, L + 1)", right, 500, "#eee", 196),
        *box("encoder", f"(B, {P}, {D}) image tokens", left, 410, blue),
        *box("generative_pooler", f"(B, {Q}, {D}), {Q} queries", left, 320, blue),
        *box("contrastive_pooler", f"(B, 1, {D}), 1 query", left, 200, blue),
        *box("unimodal", "causal; sees no image", right, 410, green, 180),
        *box("multimodal", "causal; reads the image", right, 260, orange, 180),
        *box("contrastive_loss", "Eq. (2)", left, 70, red),
        *box("captioning_loss", "Eq. (3)", right, 70, red, 180),
        arrow((left, 454), (left, 412)),
        arrow((left, 364), (left, 322)),
        arrow((left, 274), (left, 202)),
        arrow((left, 154), (left, 72)),
        text(f"x (B, {D})", left - 8, 118, font_size=14, text_anchor="end"),
        arrow((right, 454), (right, 412)),
        arrow((right, 364), (right, 262)),
        text(f"(B, L, {D})", right + 8, 318, font_size=14),
        arrow((left + 100, 297), (left + 138, 297), (left + 138, 240), (right - 92, 240),
              stroke_dasharray="6 4"),
        text("cross-attention", left + 120, 262, font_size=14, text_anchor="end"),
        arrow((right - 60, 364), (right - 60, 345), (245, 345), (245, 47), (left + 102, 47)),
        text(f"[CLS]: y (B, {D})", 253, 118, font_size=14),
        arrow((right, 214), (right, 72)),
        text("next words", right + 8, 150, font_size=14),
    ]
    return page("CoCa: an image encoder, two poolers, a text decoder cut in half, and two losses",
                500, 512, *parts)



def shifted_mask(tokens):
    """text_mask with the bug of three public CoCas (open_clip's issue 549): the column of [CLS] is
    added in front, so which columns are hidden is shifted by one.
    """
    is_word = (tokens != PAD) & (tokens != END)                         # (B, L)
    visible = F.pad(is_word, (1, 0), value=True)                        # (B, L + 1)
    return causal_mask(visible.shape[1], tokens.device) & visible[:, None, None]


def draw_masks():
    """Who may look at whom, as in the paper and with the shift; what differs has a red frame."""
    names = ["<begin>", "a", "red", "ring", "<end>", "<pad>", "[CLS]"]
    tokens = torch.tensor([[BEGIN, 4, 5, 6, END, PAD]])
    right = text_mask(tokens)[0, 0]
    shifted = shifted_mask(tokens)[0, 0]
    parts = []
    for k, (title, mask) in enumerate((("as in the paper", right), ("shifted by one", shifted))):
        left = 70 + 300 * k
        parts.append(text(title, left, 24, font_size=16, font_weight="bold"))
        for i, name in enumerate(names):
            y = 92 + 30 * i
            parts.append(text(name, left - 6, y + 19, text_anchor="end", font_size=14))
            turn = f"translate({left + 18 + 30 * i} 84) rotate(-45)"
            parts.append(text(name, 0, 0, transform=turn, font_size=14))
            for j in range(len(names)):
                colour = "#0a7bd0" if mask[i, j] else "#e4e4e4"
                parts.append(tag("rect", x=left + 30 * j, y=y, width=28, height=28, fill=colour))
        for i, j in (right != shifted).nonzero().tolist():
            parts.append(tag("rect", x=left + 30 * j, y=92 + 30 * i, width=28, height=28,
                             fill="none", stroke="#c00000", stroke_width=4))
    return page("Two masks of the text 'a red ring', blue where a row may look at a column: as in the "
                "paper, and shifted by one, where [CLS] sees the end token and not itself", 610, 312,
                *parts)


# ------------------------------------------------------------------------------------------------
# From what was measured


def draw_entropy(rows):
    """Means over the seeds of entropy.py's lines."""
    seen = sorted({int(row["images"]) for row in rows})
    drawn = {}
    for title, column in (("Entropy of the pooler's attention, nats", "entropy"),
                          ("Validation captioning loss", "val_cap")):
        curves = {}
        for start in dict.fromkeys(row["start"] for row in rows):
            means = []
            for images in seen:
                same = [row for row in rows if row["start"] == start and int(row["images"]) == images]
                means.append(np.mean([float(row[column]) for row in same]))
            curves[start] = np.array(means)
        drawn[title] = chart(title, seen, curves)
    return charts("The pooler's entropy and the validation captioning loss", drawn)


def draw_ablations(file):
    """Table 8 at small scale: a dot for each run, a line at the default's mean."""
    names = {"default": "default: both, 2 : 1, n_uni 2, cascade, 16"}
    for row in "bcdef":
        for variant in TABLES[row][1][1:]:
            names[variant] = f"({row}) {VARIANTS[variant].what}"
    runs = []
    lines_there, _ = read_lines(file)
    for line in lines_there.values():
        same = line["data"] == "shapes" and int(line["images"]) == IMAGES["b"]
        if same and line["variant"] in names:
            runs.append(line)
    bottom = 52 + 22 * len(names)
    key = "A dot is a run, the line the default's mean; no dots: that loss was not trained."
    parts = [text(key, 12, bottom + 22)]
    for i, name in enumerate(names.values()):
        parts.append(text(name, 12, 60 + 22 * i))
    titles = {ZERO_SHOT: "zero-shot", BOTH_WAYS: "retrieval, R@1", RIGHT: "captions",
              QUESTION: "questions"}
    for k, (score, title) in enumerate(titles.items()):
        header = text(title, 45, 20, text_anchor="middle", font_weight="bold")
        panel = score_panel(runs, score, names, bottom)
        parts.append(tag("g", header, *panel, transform=f"translate({275 + 120 * k} 0)"))
    return page("Scores of each variant of Table 8 on generated scenes, a dot for each run", 740,
                bottom + 34, *parts)


def score_panel(runs, score, variants, bottom):
    """One score of all variants, from its least to its greatest value over 90 pixels."""
    there = [float(line[score]) for line in runs if line[score]]
    low = min(there)
    high = max(there)

    def across(value):  # -> pixels from the left
        return round(90 * (value - low) / max(high - low, 1e-9), 1)

    mean = across(np.mean([*values_of(runs, "default", score).values()]))
    parts = [tag("path", d=f"M{mean} 44V{bottom}", stroke="#d55e00")]
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(text(f"{value:.0%}", across(value), 38, text_anchor=anchor, font_size=11))
    for i, variant in enumerate(variants):
        y = 56 + 22 * i
        parts.append(tag("path", d=f"M0 {y}h90", stroke="#8886"))
        for value in values_of(runs, variant, score).values():
            parts.append(tag("circle", cx=across(value), cy=y, r=4, fill="#0a7bd0",
                             fill_opacity=0.6))
    return parts


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.pictures [CHECKPOINT] [options]")
    p.add_argument("checkpoint", nargs="?", help="OUT/checkpoint.pt of train.py, on scenes, or OUT")
    p.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets",
                   help="folder, whose pictures are drawn anew (default: assets)")
    args = p.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{args.out}: no folder ({e.strerror}); give another --out") from None
    pages = {"coca": draw_architecture(), "masks": draw_masks()}
    if args.checkpoint:
        pages.update(from_checkpoint(args.checkpoint))
    if ENTROPY.exists():
        pages["entropy"] = draw_entropy(read_entropy())
    if LINES.exists():
        pages["ablations"] = draw_ablations(LINES)
    for name, svg in pages.items():
        path = args.out / f"{name}.svg"
        with replacing(path) as f:
            f.write(svg.encode())
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    run_program(main)
