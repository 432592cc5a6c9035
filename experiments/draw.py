"""What report.py and pictures.py draw with: tags, pictures, curves, and where a model looks.

Pictures are data: URIs and curves are SVG, so that a page or an SVG needs no other file.
"""
import base64
import html
import io
import math

import numpy as np
import torch

from data import pillow


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


STROKES = [("#0a7bd0", "none"), ("#d55e00", "7 3"), ("#009e73", "2 3")]  # colours, dashes


def chart(title, seen, curves):
    """SVG of curves {name: values (n,)} over images seen (n,), log scale.

    A point is the mean of a window; of the at most 300 windows the first holds the first value alone.
    """
    means = {}
    for name, values in curves.items():
        windows = [values[:1], *np.array_split(values[1:], min(len(values) - 1, 299))]
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


if __name__ == "__main__":
    raise SystemExit("no command here; run: python -m experiments.report CHECKPOINT FILE")
