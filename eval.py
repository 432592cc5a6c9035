"""Evaluate a CoCa checkpoint: without training anything on the task (Sec. 3.3 "Zero-shot transfer"), or with (Sec. 4.2).

    python eval.py runs/shapes/checkpoint.pt                             zero-shot, on the data it was trained on
    python eval.py runs/shapes/checkpoint.pt --all                       also what learns: frozen, finetuned, video, understanding
    python eval.py runs/shapes/checkpoint.pt --task video --clips DIR    some tasks only; videos of your own
    python eval.py runs/shapes/checkpoint.pt --image a.jpg b.png         caption your own pictures
    python eval.py runs/coco/checkpoint.pt --data cifar10 --data-dir D   another task, never trained for
    python eval.py runs/shapes/checkpoint.pt --json scores.json          the same for machines
    python eval.py runs/shapes/checkpoint.pt --report report.html        the same to look at: a page with pictures
    python eval.py --bench --config bench-tiny bench-small               speed and memory of this machine

The chance level stands beside each score.
"""
import argparse  # noqa: I001 (the long import below stays two lines)
import base64
import contextlib
import copy
import dataclasses
import functools
import html
import json
import math
import statistics
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from coca import BEGIN, CONFIGS, END, PAD, Block, CoCa, CoCaConfig, Head, contrastive_loss
from data import (COLOURS, NAMES, SHAPES, Batches, DataError, Dataset, Tokenizer, entailment, load, moving_shapes, note, own_clips,
                  questions, read_image, sample_frames, to_model)

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


def tokenised(text):
    """Text -> lower-case words with spaces between, punctuation dropped: near COCO's Java tokeniser, which keeps "t-shirt" whole."""
    return " ".join(word for word in Tokenizer.pattern.findall(text.lower()) if any(map(str.isalnum, word)))


def n_grams(text):
    """A tokenised text -> its n-grams and how often it has each, a Counter for each n = 1, 2, 3, 4."""
    words = text.split()
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def bleu(candidates, references):
    """BLEU (Papineni et al. 2002), one score for the whole set -> [BLEU-1, ..., BLEU-4], each in [0, 1].

    candidates: a tokenised text per image; references: a list of them per image. BLEU-n is the geometric mean over
    k = 1, ..., n of the share of the candidates' k-grams that are right, times a penalty if they are too short.
    By chance: no formula, but people's captions of other images get about 0.31, 0.13, 0.05, 0.02 on Flickr8k.
    Like CIDEr-D below it is that of the COCO evaluation code, whose METEOR and SPICE need Java and are left out.
    """
    right, total, wanted = [0] * 4, [0] * 4, 0
    for text, mine in zip(candidates, references, strict=True):
        for n, (counts, *true) in enumerate(zip(n_grams(text), *map(n_grams, mine))):
            total[n] += counts.total()
            # clipped: an n-gram is right at most as often as the reference that has it most often
            right[n] += sum(min(count, max(other[gram] for other in true)) for gram, count in counts.items())
        length, lengths = len(text.split()), [len(other.split()) for other in mine]
        wanted += min((abs(n - length), n) for n in lengths)[1]  # the closest length; of two the shorter
    # The constants are COCO's and only matter where a count is 0. total[0]: the number of words
    precisions = [(r + 1e-15) / (t + 1e-9) for r, t in zip(right, total)]
    brevity = math.exp(min(0, 1 - (wanted + 1e-9) / (total[0] + 1e-15)))
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def cider_d(candidates, references, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015), mean over images -> a number in [0, 10], not a share; near 0 by chance.

    Arguments as for `bleu`. Likeness of a candidate to each of its references: the cosine of their n-grams, each n-gram
    weighing less the more images have it; mean over n = 1, ..., 4. The images counted are those given, so scores on other
    sets do not compare, and what all images have weighs log(1) = 0: a set of one image scores 0.
    """
    images_with = Counter(gram for mine in references for gram in {g for text in mine for counts in n_grams(text) for g in counts})

    def tf_idf(text):  # -> a vector {n-gram: weight} for each n
        return [{gram: count * math.log(len(references) / max(1, images_with[gram])) for gram, count in counts.items()}
                for counts in n_grams(text)]

    scores = []
    for text, mine in zip(candidates, references, strict=True):
        vectors, score = tf_idf(text), 0.0
        for other in mine:
            penalty = math.exp(-(len(text.split()) - len(other.split())) ** 2 / (2 * sigma**2))
            for x, y in zip(vectors, tf_idf(other)):
                dot = sum(min(x[gram], y[gram]) * y[gram] for gram in x if gram in y)  # clipped: repeating a word gains nothing
                score += penalty * dot / (math.hypot(*x.values()) * math.hypot(*y.values()) or 1)
        scores.append(10 * score / (4 * len(mine)))
    return statistics.fmean(scores)


# ------------------------------------------------------------------------------------------------
# Transfer: one head and one loop for all that is learned (Sec. 3.3 and 4.2, Tables 9 and 10)


@dataclasses.dataclass
class Recipe:
    """Tables 9 and 10, but for steps and batch: theirs are 50,000 to 200,000 steps of 64 to 512.

    No RandAugment. Where the paper disagrees with itself (encoder finetuned at 5e-4 in Table 9, 1e-4 in its text;
    ImageNet batches of 512 and 128) Table 9 is followed. The decoder has no row in Table 10: it learns at `lr`.
    """

    lr: float = 5e-4  # of the head and, in understanding, of poolers and decoder
    encoder_lr: float = 0.0  # 0 = frozen
    smoothing: float = 0.0
    weight_decay: float = 0.0
    warm_up: int = 0
    steps: int = 1000
    batch: int = 64


FROZEN, FINETUNED = Recipe(smoothing=0.2, weight_decay=0.01), Recipe(encoder_lr=5e-4, smoothing=0.5, weight_decay=0.01, steps=400)
VIDEO_FROZEN = Recipe(smoothing=0.1, warm_up=10, steps=600)
VIDEO_FINETUNED = Recipe(encoder_lr=5e-4, smoothing=0.1, warm_up=10, steps=300, batch=16)
UNDERSTANDING = Recipe(encoder_lr=2e-5, weight_decay=0.1, warm_up=10, steps=600)


def image_tokens(model, images):
    """images (B, 3, S, S) uint8 -> (B, P, D), all that a frozen evaluation keeps of the model: the decoder is discarded."""
    return (model.encoder(to_model(images)),)


def clip_tokens(model, clips):
    """clips (B, frames, 3, S, S) uint8 -> (B, frames, P, D): each frame by itself (Sec. 3.3, no early fusion)."""
    return (model.encoder(to_model(clips.flatten(0, 1))).unflatten(0, (len(clips), -1)),)


def decoder_states(model, images, tokens):
    """images (B, 3, S, S) uint8, tokens (B, L) -> decoder outputs (B, L, D), which of them are no pads (B, L)."""
    return model.decode(to_model(images), tokens), tokens != PAD


class Learner(nn.Module):
    """A head on what `read` takes from a model."""

    def __init__(self, model, read, head):
        super().__init__()
        self.model, self.read, self.head = model, read, head

    def forward(self, *inputs):
        return self.head(*self.read(self.model, *inputs))


@torch.enable_grad()
def transfer(model, read, head, train, test, recipe, what):
    """Trains a head, and the model too unless it is frozen, on train -> share of test that is right.

    train and test: inputs of `read` as a tuple of tensors (N, ...), labels (N,). The model itself stays as it is.
    """
    device = model.log_temperature.device

    def run(function, inputs):
        batches = zip(*(t.split(256) for t in inputs))
        with torch.no_grad():
            return [function(*(t.to(device) for t in batch)) for batch in batches]

    (inputs, labels), (unseen, answers) = train, test
    groups = [dict(params=head.to(device).parameters(), lr=recipe.lr)]
    if recipe.encoder_lr:
        learner = Learner(copy.deepcopy(model), read, head)
        others = [p for name, p in learner.model.named_parameters() if not name.startswith("encoder.")]
        groups += [dict(params=learner.model.encoder.parameters(), lr=recipe.encoder_lr), dict(params=others, lr=recipe.lr)]
    else:  # the model is run once, and its outputs kept
        learner = head
        inputs, unseen = ([torch.cat(parts) for parts in zip(*run(lambda *x: read(model, *x), data))] for data in (inputs, unseen))
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / max(1, recipe.warm_up)) * (1 + math.cos(math.pi * t / recipe.steps)) / 2)
    # EMA 0.9999 as in Table 9; less at the beginning, or so few steps would be an average of initial values
    average = AveragedModel(learner, avg_fn=lambda mean, new, n: mean + (new - mean) * max(1 - 0.9999, 9 / (10 + n)))
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(recipe.steps), what, leave=False):
        rows = torch.randint(len(labels), (recipe.batch,), generator=generator)
        logits = learner(*(t[rows].to(device) for t in inputs))
        loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        average.update_parameters(learner)
    predictions = torch.cat([logits.argmax(1).cpu() for logits in run(average, unseen)])
    return (predictions == answers).float().mean().item()


def tensors(data):
    """Dataset with labels -> (images,), labels as torch tensors."""
    return (torch.from_numpy(np.array(data.images)),), torch.from_numpy(data.labels)


# ------------------------------------------------------------------------------------------------
# The tasks, by name


class Unfit(DataError):
    """The checkpoint or its data lack what a task needs."""


def need(condition, text):
    if not condition:
        raise Unfit(text)


class Subject:
    """A checkpoint, and the data it is evaluated on; what several tasks read is made once."""

    def __init__(self, model, tokenizer, settings, clips=None):
        self.model, self.tokenizer, self.settings, self.clips = model, tokenizer, settings, clips
        self.size, self.name = model.config.image_size, settings["data"]

    def load(self, split):
        need(split == "val" or self.name not in ("coco", "captions"), f"{self.name} has no classes; add --data cifar10 --data-dir DIR")
        return load(self.name, self.settings["data_dir"], split, self.size, seed=self.settings["seed"])

    @functools.cached_property
    def val(self):
        return self.load("val")

    @functools.cached_property
    def image_embedding(self):
        return embed_images(self.model, self.val.images)

    @functools.cached_property
    def labelled(self):
        return self.load("labelled"), self.load("labelled-val")

    def zero_shot(self):
        """-> predicted classes (N,), and the labelled images they are predicted for."""
        data = self.load("zeroshot")
        embedding = embed_images(self.model, data.images) if self.name == "shapes" else self.image_embedding  # else they are val's
        return zero_shot(embedding, self.model, self.tokenizer, data).cpu().numpy(), data

    def head(self, data, **how):
        """A new head for data's classes, the same in every run."""
        torch.manual_seed(self.settings["seed"])
        return Head(self.model.config.width, self.model.config.heads, len(data.classes), **how)

    def needs_words(self):
        need({*COLOURS, *SHAPES} <= set(self.tokenizer.words), "the checkpoint lacks the words of generated scenes; train on --data shapes")

    def needs_contrast(self):
        need(self.model.config.lambda_con, "the checkpoint was trained with --lambda-con 0, its embeddings mean nothing")


def row(score, chance):
    return {"score": score, "chance": chance}


def zero_shot_task(s):
    s.needs_contrast()
    predicted, data = s.zero_shot()
    return {"zero-shot top-1": row((predicted == data.labels).mean().item(), 1 / len(data.classes))}


def retrieval_rows(embedding, s, captions, image="image"):
    return {f"{way.replace('image', image)} R@{k}": row(*value)
            for way, found in retrieval(embedding, s.model, s.tokenizer, captions).items() for k, value in found.items()}


def retrieval_task(s):
    s.needs_contrast()
    return retrieval_rows(s.image_embedding, s, s.val.captions)


def captioning_task(s, captioned=1000):
    """Greedy and nucleus captions of at most `captioned` images; chance: the scores of every caption on the next image."""
    need(s.model.config.lambda_cap, "the checkpoint was trained with --lambda-cap 0, its decoder never learned to write")
    true = s.val.captions[:captioned]
    plain = [{s.tokenizer.decode(line) for line in s.tokenizer.encode(mine, s.model.config.text_len)} for mine in true]
    references = [[tokenised(text) for text in mine] for mine in true]

    def scores(texts):
        words = [tokenised(text) for text in texts]
        return {"captions exactly right": sum(text in mine for text, mine in zip(texts, plain)) / len(texts),
                **{f"BLEU-{n}": score for n, score in enumerate(bleu(words, references), 1)},
                "CIDEr-D": cider_d(words, references)}

    rows = {}
    for suffix, how in (("", {}), (", nucleus", dict(temperature=1.0, top_p=0.9))):
        torch.manual_seed(s.settings["seed"])
        texts = caption(s.model, s.tokenizer, s.val.images[:captioned], **how)
        chance = scores(texts[1:] + texts[:1])
        rows |= {name + suffix: row(score, chance[name]) for name, score in scores(texts).items()}
        rows["distinct captions" + suffix] = row(len(set(texts)) / len(texts), 1 / len(texts))
        rows.setdefault("captions", [{"generated": text, "true": mine} for text, mine in zip(texts[:5], true)])
    return rows


def frozen_task(s):
    """Sec. 3.3 "Frozen-feature evaluation": the encoder's tokens, read by a linear probe and by a new pooler."""
    data, unseen = s.labelled
    return {f"frozen, {name}": row(transfer(s.model, image_tokens, s.head(data, pooled=pooled), tensors(data), tensors(unseen),
                                            FROZEN, name), 1 / len(data.classes))
            for name, pooled in (("linear probe", False), ("new pooler", True))}


def finetuned_task(s):
    data, unseen = s.labelled
    score = transfer(s.model, image_tokens, s.head(data), tensors(data), tensors(unseen), FINETUNED, "finetuning")
    return {"finetuned": row(score, 1 / len(data.classes))}


def video_task(s, frames=8):
    """Sec. 3.3 "CoCa for Video Action Recognition": frozen, finetuned, and the same encoder without pretraining."""
    if s.clips:
        data, unseen = own_clips(s.clips, s.size, frames)
        need(len(data), f"{s.clips}: no clips left to learn from; give more")
    else:
        (data, moves), (unseen, unseen_moves) = (moving_shapes(split, s.size, count, s.settings["seed"], frames)
                                                 for split, count in (("labelled", 300), ("labelled-val", 400)))
    torch.manual_seed(s.settings["seed"])
    fresh = CoCa(s.model.config).to(s.model.log_temperature.device)
    rows = {f"video, {name}": row(transfer(model, clip_tokens, s.head(data), tensors(data), tensors(unseen), recipe, name),
                                  1 / len(data.classes))
            for name, model, recipe in (("frozen", s.model, VIDEO_FROZEN), ("finetuned", s.model, VIDEO_FINETUNED),
                                        ("from scratch", fresh, VIDEO_FINETUNED))}
    if s.clips:
        return rows
    (clips,), labels = tensors(unseen_moves)
    both_ways = (torch.cat([clips, clips.flip(1)]),), torch.cat([labels, 1 - labels])  # the same frames, the other way round
    for name, how in (("video order, frozen", {}), ("video order, frozen, temporal embedding", dict(frames=frames))):
        rows[name] = row(transfer(s.model, clip_tokens, s.head(moves, **how), tensors(moves), both_ways, VIDEO_FROZEN, name), 0.5)
    return rows


def embed_clips(model, clips, frames=16):
    """clips (N, T, 3, S, S) uint8 -> (N, E) unit norm: the mean embedding of 16 uniformly sampled frames (Sec. 4.2)."""
    chosen = clips[:, sample_frames(clips.shape[1], frames)]
    return F.normalize(embed_images(model, chosen.reshape(-1, *clips.shape[2:])).unflatten(0, (-1, frames)).mean(1), dim=-1)


def video_retrieval_task(s):
    s.needs_contrast()
    s.needs_words()
    data, _ = moving_shapes("labelled-val", s.size, 200, s.settings["seed"], frames=24)
    return retrieval_rows(embed_clips(s.model, data.images), s, data.captions, "video")


def understanding_task(s):
    """Sec. 4.2 "Multimodal understanding", Table 10: a pooler over the decoder's outputs; controls that see only half."""
    s.needs_words()
    rows = {}
    for name, data, chance in (("questions", questions(s.size, 4000, s.settings["seed"]), (1 / len(COLOURS) + 1 / 2 + 1 / 3) / 3),
                               ("entailment", entailment(s.size, 4000, s.settings["seed"]), 1 / 2)):
        (images,), labels = tensors(data)
        tokens = s.tokenizer.encode([text for text, in data.captions], s.model.config.text_len)
        seen = {name: (images, tokens)}
        if name == "questions":
            seen |= {"questions, image hidden": (torch.full_like(images, 128), tokens),
                     "questions, text hidden": (images, torch.tensor([[BEGIN, END]]).expand(len(tokens), -1))}
        for what, inputs in seen.items():
            train, test = ((tuple(t[part] for t in inputs), labels[part]) for part in (slice(3400), slice(3400, None)))
            rows[what] = row(transfer(s.model, decoder_states, s.head(data), train, test, UNDERSTANDING, what), chance)
    return rows


TASKS = {"zero-shot": zero_shot_task, "retrieval": retrieval_task, "captioning": captioning_task, "frozen": frozen_task,
         "finetuned": finetuned_task, "video-retrieval": video_retrieval_task, "video": video_task, "understanding": understanding_task}


def evaluate(model, tokenizer, settings, tasks=("zero-shot", "retrieval", "captioning"), strict=False, clips=None):
    """Tasks that the checkpoint and `settings` (data, data_dir, seed) are fit for -> a dict of plain numbers and texts.

    strict: Unfit if one of the tasks is not possible, else it is left out with a note.
    """
    model.eval()
    subject = Subject(model, tokenizer, settings, clips)
    scores = {"data": settings["data"]}
    for name in tasks:
        began = time.perf_counter()
        try:
            with torch.no_grad():
                rows = TASKS[name](subject)
        except Unfit as e:
            if strict:
                raise
            note(f"{name} left out: {e}")
            continue
        next(iter(rows.values()))["seconds"] = time.perf_counter() - began
        scores |= rows
    if "val" in vars(subject):  # some task has read them
        scores["images"] = len(subject.val)
    return scores


def report(scores):
    """Prints what evaluate returned; the seconds of a task stand beside its first score."""
    print(f"{scores['data']}: {scores['images']} validation images" if "images" in scores else scores["data"])
    print(f"{'':40} {'score':>8} {'chance':>8} {'seconds':>8}")
    for name, value in scores.items():
        if isinstance(value, dict):
            print(f"{name:40} {value['score']:8.2%} {value['chance']:8.2%}" + (f"{value['seconds']:9.1f}" if "seconds" in value else ""))
    for pair in scores.get("captions", ()):
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
        subject = Subject(model, tokenizer, settings)
        data, some = subject.val, spread(len(subject.val), 8)
        images, names = data.images[some], [f"true: {data.captions[i][0]}" for i in some]
        sections["Scores"] = [table(f"{subject.name}, {len(data):,} validation images", ["task", "score", "chance"], [
            [task, tinted(value["score"], f"{value['score']:.2%}", "bar"), f"{value['chance']:.2%}"]
            for task, value in scores.items() if isinstance(value, dict)])]
    else:
        images, names = np.stack([read_image(Path(file), c.image_size) for file in args.image]), args.image
    sections["Loss curves"] = loss_curves(Path(args.checkpoint).parent / "metrics.csv")
    if settings and c.lambda_con:
        with contextlib.suppress(Unfit):  # no classes
            sections["Zero-shot classification"] = confusions(*subject.zero_shot())
        sections["Retrieval"] = nearest(subject.image_embedding, model, tokenizer, data)
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
    p.add_argument("--task", nargs="+", choices=TASKS, help="these tasks only (default: zero-shot, retrieval and captioning)")
    p.add_argument("--all", action="store_true", help="every task, those that train a head or finetune too")
    p.add_argument("--clips", metavar="DIR", help="task video on your clips: a folder per class, of folders of frames or .npy arrays")
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
        tasks = {"tasks": args.task, "strict": True} if args.task else {"tasks": TASKS} if args.all else {}
        scores = evaluate(model, tokenizer, settings, **tasks, clips=args.clips)
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
