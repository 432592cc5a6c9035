"""Evaluate a CoCa checkpoint: zero-shot (Sec. 3.3), or by training on the task (Sec. 3.3, 4.2).

    python eval.py runs/shapes/checkpoint.pt                            zero-shot
    python eval.py runs/shapes/checkpoint.pt --all                      also all that learns
    python eval.py runs/shapes/checkpoint.pt --task video --clips DIR   one task; your own videos
    python eval.py runs/shapes/checkpoint.pt --image a.jpg b.png        caption your pictures
    python eval.py runs/shapes/checkpoint.pt --image a.jpg --labels "a ring" "a cross"  which fits
    python eval.py runs/shapes/checkpoint.pt --image *.png --find "a red ring"  best picture first
    python eval.py runs/coco/checkpoint.pt --data cifar10 --data-dir D  other data
    python eval.py runs/shapes/checkpoint.pt --json scores.json         scores for machines
    python eval.py runs/shapes/checkpoint.pt --report report.html       a page with pictures

The chance level stands beside each score.
"""
import argparse
import base64
import copy
import dataclasses
import functools
import html
import io
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from coca import END, PAD, UNKNOWN, Classifier, CoCa, CoCaConfig
from data import (
    COLOURS,
    NAMES,
    SHAPES,
    Tokenizer,
    UserError,
    entailment,
    is_cut,
    load,
    moving_shapes,
    new_file,
    note,
    own_clips,
    pillow,
    questions,
    read_image,
    sample_frames,
    to_model,
    words,
)

# ------------------------------------------------------------------------------------------------
# Checkpoints

FORMAT = 2  # of a checkpoint; goes up when older ones can no longer be read


def replace_file(path, write):
    """write(f) fills a file beside path, which then takes its place: there is never half a file."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        why = str(e).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({why}); the one before is untouched") from None


def save_checkpoint(path, model, tokenizer, **more):
    """All that `load_checkpoint` needs, and what else is given, as plain types and tensors."""
    config = dataclasses.asdict(model.config)
    checkpoint = dict(format=FORMAT, config=config, vocabulary=tokenizer.words,
                      model=model.state_dict(), **more)
    replace_file(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, device="cpu"):
    """-> model, tokenizer, the whole checkpoint (plain types only: loading runs no code)."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; python train.py makes one")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        if "vocabulary" not in checkpoint:
            raise ValueError("something else")
        found = checkpoint.get("format", 1)
        if found == FORMAT:
            model = CoCa(CoCaConfig(**checkpoint["config"])).to(device)
            model.load_state_dict(checkpoint["model"])
            return model, Tokenizer(checkpoint["vocabulary"]), checkpoint
    except Exception as e:  # cut off, foreign, or with code in it: torch names each differently
        raise UserError(f"{path}: not a checkpoint of this program ({type(e).__name__}); "
                        "give another one") from None
    raise UserError(f"{path}: its format is {found}, and this version reads {FORMAT}; train again")


def pick_device(name):
    """"auto" -> cuda, mps or cpu, the first there is. UserError if the one asked for is not."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as e:  # torch has a kind of its own for each device
        why = str(e).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({why}); leave it out") from None
    return name


# ------------------------------------------------------------------------------------------------
# Embeddings and captions of a data set


def device_of(model):
    return model.log_temperature.device


def in_batches(model, images, what, batch=256):
    """Batches of images (N, 3, S, S) uint8 as the model takes them, with progress."""
    for i in tqdm(range(0, len(images), batch), what, leave=False):
        yield to_model(torch.tensor(images[i:i + batch]).to(device_of(model)))


def embed_images(model, images):
    """images (N, 3, S, S) uint8 array -> (N, E) unit norm."""
    return torch.cat([model.encode_image(x) for x in in_batches(model, images, "embedding images")])


def embed_texts(model, tokenizer, texts, batch=1024):
    """texts -> (len(texts), E) unit norm."""
    parts = []
    for i in range(0, len(texts), batch):
        tokens = tokenizer.encode(texts[i:i + batch], model.config.text_len)
        parts.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(parts)


def embed_clips(model, clips, frames=16):
    """clips (N, T, 3, S, S) uint8 -> (N, E) unit norm: mean of 16 evenly spread frames, Sec. 4.2."""
    sampled = clips[:, sample_frames(clips.shape[1], frames)]           # (N, 16, 3, S, S)
    embedding = embed_images(model, sampled.reshape(-1, *clips.shape[2:]))
    return F.normalize(embedding.unflatten(0, (-1, frames)).mean(1), dim=-1)


def caption(model, tokenizer, images, **how):
    """images (N, 3, S, S) uint8 -> N captions; how: see CoCa.generate."""
    texts = []
    for x in in_batches(model, images, "captioning"):
        texts += [tokenizer.decode(tokens) for tokens in model.generate(x, **how).tolist()]
    return texts


# ------------------------------------------------------------------------------------------------
# Metrics


def embed_classes(model, tokenizer, classes, templates=("{}",)):
    """-> (classes, E) unit norm. As in CLIP, a class is the mean of its prompts' embeddings."""
    prompts = []
    for name in classes:
        prompts += [template.format(name) for template in templates]
    text = embed_texts(model, tokenizer, prompts)                       # (classes * templates, E)
    text = text.unflatten(0, (len(classes), -1)).mean(1)                # (classes, E)
    return F.normalize(text, dim=-1)


def zero_shot(image_embedding, model, tokenizer, data):
    """Zero-shot classification (Table 4) -> the class (N,) whose prompts lie nearest.

    -1 where two classes are equally near: a model that tells nothing apart must not score.
    """
    text = embed_classes(model, tokenizer, data.classes, data.templates)
    scores = image_embedding @ text.T                                   # (N, classes)
    best, predicted = scores.max(1)
    alone = (~(scores < best[:, None])).sum(1) == 1  # (NaN is not less than anything)
    return torch.where(alone, predicted, -1)


def recall(scores, relevant, ks=(1, 5, 10)):
    """Share of queries with a relevant item among their K nearest -> {K: (recall, by chance)}.

    scores (queries, items); relevant: for each query the list of its items. Several relevant items
    count once, by the best ranked. A tie counts against, and NaN is never right.
    """
    items = scores.shape[1]
    ranks = []
    for row, right in zip(scores, relevant):
        best = row[right].max()
        ahead = (~(row < best)).sum() - (~(row[right] < best)).sum()
        ranks.append(math.inf if best.isnan() else ahead.item())
    found = {}
    for k in ks:
        hits = sum(rank < k for rank in ranks) / len(ranks)
        draws = math.comb(items, min(k, items))  # of which some hold no relevant item
        misses = sum(math.comb(items - len(right), min(k, items)) / draws for right in relevant)
        found[k] = hits, 1 - misses / len(ranks)
    return found


def distinct(captions):
    """A list of texts per image -> all texts, each once; the numbers of each image's texts."""
    number = {}
    of_image = []
    for texts in captions:
        of_image.append([number.setdefault(text, len(number)) for text in dict.fromkeys(texts)])
    return list(number), of_image


def retrieval(image_embedding, model, tokenizer, captions):
    """Zero-shot retrieval (Table 3) -> {"image to text": {K: ...}, "text to image": ...}.

    By cosine over the whole set. captions: a list of texts per image, all used. A text that several
    images carry is one item, right for each of them.
    """
    texts, of_image = distinct(captions)
    of_text = [[] for _ in texts]
    for i, numbers in enumerate(of_image):
        for j in numbers:
            of_text[j].append(i)
    scores = image_embedding @ embed_texts(model, tokenizer, texts).T   # (images, texts)
    return {"image to text": recall(scores, of_image), "text to image": recall(scores.T, of_text)}


def tokenised(text):
    """Text -> its words only: near COCO's Java tokeniser, which keeps "t-shirt" whole."""
    return " ".join(word for word in words(text) if any(map(str.isalnum, word)))


def n_grams(text):
    """A tokenised text -> how often it has each n-gram, a Counter for each n = 1, 2, 3, 4."""
    found = text.split()
    return [Counter(zip(*(found[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def bleu(candidates, references):
    """BLEU (Papineni et al. 2002) of the whole set -> [BLEU-1, ..., BLEU-4], each in [0, 1].

    candidates: a tokenised text per image; references: a list of them per image. BLEU-n is the
    geometric mean over k = 1, ..., n of the share of the candidates' k-grams that are right, times
    a penalty if they are too short. Like CIDEr-D below it is that of the COCO evaluation code,
    whose METEOR and SPICE need Java and are left out.
    """
    right = [0] * 4
    total = [0] * 4
    wanted = 0
    for text, texts in zip(candidates, references, strict=True):
        reference_grams = [n_grams(reference) for reference in texts]
        for n, counts in enumerate(n_grams(text)):
            total[n] += counts.total()
            for gram, count in counts.items():
                most = max(grams[n][gram] for grams in reference_grams)
                right[n] += min(count, most)  # saying it more often does not help
        length = len(text.split())
        lengths = [len(reference.split()) for reference in texts]
        wanted += min(lengths, key=lambda n: (abs(n - length), n))  # the closest, then the shorter
    # The constants are COCO's and only matter where a count is 0. total[0]: the number of words
    precisions = [(r + 1e-15) / (t + 1e-9) for r, t in zip(right, total)]
    brevity = math.exp(min(0, 1 - (wanted + 1e-9) / (total[0] + 1e-15)))
    return [brevity * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]


def cider_d(candidates, references, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015), mean over images -> a number in [0, 10], near 0 by chance.

    Arguments as for `bleu`. Likeness of a candidate to a reference: the cosine of their n-grams,
    each weighing less the more images have it; mean over n = 1, ..., 4. The images counted are
    those given, so scores on other sets do not compare, and what all images have weighs
    log(1) = 0: a set of one image scores 0.
    """
    images_with = Counter()
    for texts in references:
        grams = set()
        for text in texts:
            grams.update(*n_grams(text))
        images_with.update(grams)

    def tf_idf(text):  # -> a vector {n-gram: weight} for each n
        vectors = n_grams(text)
        for vector in vectors:
            for gram in vector:
                vector[gram] *= math.log(len(references) / max(1, images_with[gram]))
        return vectors

    scores = []
    for text, texts in zip(candidates, references, strict=True):
        candidate = tf_idf(text)
        score = 0.0
        for reference in texts:
            difference = len(text.split()) - len(reference.split())
            penalty = math.exp(-difference**2 / (2 * sigma**2))
            for x, y in zip(candidate, tf_idf(reference)):
                dot = sum(min(x[gram], y[gram]) * y[gram] for gram in x)  # no gain by repeating
                norms = math.hypot(*x.values()) * math.hypot(*y.values())
                score += penalty * dot / (norms or 1)
        scores.append(10 * score / (4 * len(texts)))
    return statistics.fmean(scores)


# ------------------------------------------------------------------------------------------------
# Transfer: one Classifier and one loop for all that is learned (Sec. 3.3 and 4.2, Tables 9 and 10)


@dataclasses.dataclass
class Recipe:
    """Tables 9 and 10, but for steps and batch: theirs are 50,000 to 200,000 steps of 64 to 512.

    No RandAugment. Where the paper disagrees with itself (encoder finetuned at 5e-4 in Table 9, at
    1e-4 in its text; ImageNet batches of 512 and 128) Table 9 is followed. The decoder has no row
    in Table 10: it learns at `lr`. Entailment learns as VQA does: at SNLI-VE's rates, 1e-3 and
    5e-5, it ended near chance in so few steps.
    """

    lr: float = 5e-4  # of the classifier and, in understanding, of poolers and decoder
    encoder_lr: float = 0.0  # 0 = the model is frozen
    smoothing: float = 0.0
    weight_decay: float = 0.0
    warm_up: int = 0
    steps: int = 1000
    batch: int = 64


FROZEN = Recipe(smoothing=0.2, weight_decay=0.01)
FINETUNED = Recipe(encoder_lr=5e-4, smoothing=0.5, weight_decay=0.01, steps=400)
VIDEO_FROZEN = Recipe(smoothing=0.1, warm_up=10, steps=300, batch=16)
VIDEO_FINETUNED = Recipe(encoder_lr=5e-4, smoothing=0.1, warm_up=10, steps=300, batch=16)
UNDERSTANDING = Recipe(encoder_lr=2e-5, weight_decay=0.1, warm_up=10, steps=600)


def image_tokens(model, images):
    """images (B, 3, S, S) uint8 -> (B, P, D); clips (B, frames, 3, S, S) -> (B, frames, P, D).

    Decoder and poolers are discarded, and each frame goes by itself through the encoder (Sec. 3.3).
    """
    tokens = model.encoder(to_model(images.flatten(0, -4)))             # (B * frames, P, D)
    return (tokens.unflatten(0, images.shape[:-3]),)


def decoder_states(model, images, tokens):
    """images (B, 3, S, S) uint8, tokens (B, L) -> decoder outputs (B, L, D), True = real (B, L)."""
    _, _, states = model.features(to_model(images), tokens)
    return states, tokens != PAD


class Learner(nn.Module):
    """A model, what is read from it, and the classifier that reads it."""

    def __init__(self, model, read, classifier):
        super().__init__()
        self.model = model
        self.read = read
        self.classifier = classifier

    def forward(self, *inputs):
        return self.classifier(*self.read(self.model, *inputs))


@torch.no_grad()
def run(function, inputs, device):
    """function(*inputs), 256 rows at a time."""
    outputs = []
    for part in zip(*(t.split(256) for t in inputs)):
        outputs.append(function(*(t.to(device) for t in part)))
    return outputs


@torch.enable_grad()
def transfer(model, read, classifier, train, test, recipe, what):
    """Trains a classifier, and a copy of the model too unless it is frozen -> accuracy on test.

    The loss is Eq. (1). train and test: inputs of `read` as tensors (N, ...), labels (N,).
    """
    device = device_of(model)
    inputs, labels = train
    test_inputs, test_labels = test
    groups = [dict(params=classifier.to(device).parameters(), lr=recipe.lr)]
    if recipe.encoder_lr:
        learner = Learner(copy.deepcopy(model), read, classifier)
        for name, module in learner.model.named_children():
            lr = recipe.encoder_lr if name == "encoder" else recipe.lr
            groups.append(dict(params=module.parameters(), lr=lr))
    else:  # the model runs once, and the classifier learns from its outputs
        learner = classifier
        features = functools.partial(read, model)
        inputs = [torch.cat(parts) for parts in zip(*run(features, inputs, device))]
        test_inputs = [torch.cat(parts) for parts in zip(*run(features, test_inputs, device))]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def schedule(t):  # warm-up, then a cosine to zero
        warm_up = min(1, (t + 1) / max(1, recipe.warm_up))
        return warm_up * (1 + math.cos(math.pi * t / recipe.steps)) / 2

    def moving_average(mean, new, n):  # 0.9999 as in Table 9; less at first, to forget the start
        return mean + (new - mean) * max(1 - 0.9999, 9 / (10 + n))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    average = AveragedModel(learner, avg_fn=moving_average)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(recipe.steps), what, leave=False):
        rows = torch.randint(len(labels), (recipe.batch,), generator=generator)
        logits = learner(*(t[rows].to(device) for t in inputs))
        loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(learner)
    logits = torch.cat(run(average, test_inputs, device)).cpu()
    return (logits.argmax(1) == test_labels).float().mean().item()


def tensors(data):
    """Dataset with labels -> (images,), labels as torch tensors."""
    return (torch.from_numpy(np.array(data.images)),), torch.from_numpy(data.labels)


# ------------------------------------------------------------------------------------------------
# The tasks, by name


class Context:
    """A checkpoint and the data it is evaluated on; what several tasks read is made once."""

    def __init__(self, model, tokenizer, settings, clips=None):
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.clips = clips
        self.size = model.config.image_size
        self.seed = settings["seed"]

    def load(self, split):
        s = self.settings
        apart = s.get("val_from_train", 0)
        return load(s["data"], s["data_dir"], split, self.size, 0, self.seed, val_from_train=apart)

    @functools.cached_property
    def val(self):
        return self.load("val")

    @functools.cached_property
    def image_embedding(self):
        return embed_images(self.model, self.val.images)

    @functools.cached_property
    def labelled(self):
        return self.load("labelled"), self.load("labelled-val")

    @functools.cached_property
    def zero_shot(self):
        """-> predicted classes (N,), and the labelled images they are predicted for."""
        data = self.load("zeroshot")
        if self.settings["data"] == "shapes":
            embedding = embed_images(self.model, data.images)
        else:  # they are the validation images
            embedding = self.image_embedding
        return zero_shot(embedding, self.model, self.tokenizer, data).cpu().numpy(), data

    def classifier(self, data, **how):
        """A new classifier for data's classes, the same in every run."""
        torch.manual_seed(self.seed)
        c = self.model.config
        return Classifier(c.width, c.heads, len(data.classes), **how)


def missing(task, context):
    """What the checkpoint or its data lack for a task; "" if nothing."""
    config = context.model.config
    data = context.settings["data"]
    if task in ("zero-shot", "retrieval", "video-retrieval") and not config.lambda_con:
        return "the checkpoint was trained with --lambda-con 0, its embeddings mean nothing"
    if task == "captioning" and not config.lambda_cap:
        return "the checkpoint was trained with --lambda-cap 0, its decoder never learned to write"
    if task in ("zero-shot", "frozen", "finetuned") and data in ("coco", "captions"):
        return f"{data} has no classes; add --data cifar10 --data-dir DIR"
    known = {*COLOURS, *SHAPES} <= set(context.tokenizer.words)
    if task in ("video-retrieval", "understanding") and not known:
        return "the checkpoint lacks the words of generated scenes; train on --data shapes"
    return ""


def row(score, chance):
    return {"score": score, "chance": chance}


def zero_shot_task(context):
    predicted, data = context.zero_shot
    return {"zero-shot top-1": row((predicted == data.labels).mean().item(), 1 / len(data.classes))}


def retrieval_task(context):
    return retrieval_rows(context.image_embedding, context, context.val.captions)


def retrieval_rows(embedding, context, captions, image="image"):
    rows = {}
    directions = retrieval(embedding, context.model, context.tokenizer, captions)
    for direction, found in directions.items():
        for k, (score, chance) in found.items():
            rows[f"{direction.replace('image', image)} R@{k}"] = row(score, chance)
    return rows


def captioning_task(context, most=1000):
    """Greedy captions of at most `most` images. Chance: each caption scored on the next image."""
    tokenizer = context.tokenizer
    text_len = context.model.config.text_len
    references = []
    readable = []
    unknown = 0
    total = 0
    for texts in context.val.captions[:most]:
        tokens = tokenizer.encode(texts, text_len)
        unknown += (tokens == UNKNOWN).sum().item()
        total += (tokens > END).sum().item()
        references.append([tokenised(text) for text in texts])
        known = [line for line in tokens if UNKNOWN not in line]  # only these can be written
        readable.append([tokenizer.decode(line) for line in known])
    captions = caption(context.model, tokenizer, context.val.images[:most])

    def score(captions):
        candidates = [tokenised(text) for text in captions]
        right = sum(text in texts for text, texts in zip(captions, readable))
        scores = {"captions exactly right": right / len(captions)}
        for n, value in enumerate(bleu(candidates, references), 1):
            scores[f"BLEU-{n}"] = value
        scores["CIDEr-D"] = cider_d(candidates, references)
        return scores

    chance = score(captions[1:] + captions[:1])
    rows = {name: row(value, chance[name]) for name, value in score(captions).items()}
    rows["distinct captions"] = row(len(set(captions)) / len(captions), 1 / len(captions))
    rows["unknown words"] = unknown / max(1, total)
    examples = zip(captions[:5], context.val.captions)
    rows["captions"] = [{"generated": text, "true": texts} for text, texts in examples]
    return rows


def learn(context, name, data, test, recipe, model=None, **how):
    """A new classifier of image tokens, learned from data, tested on test -> {name: row}."""
    classifier = context.classifier(data, **how)
    model = model or context.model
    train = tensors(data)
    score = transfer(model, image_tokens, classifier, train, tensors(test), recipe, name)
    return {name: row(score, 1 / len(data.classes))}


def frozen_task(context):
    """Sec. 3.3 "Frozen-feature evaluation": a linear probe, and the paper's way: a new pooler."""
    data, test = context.labelled
    rows = learn(context, "frozen, linear probe", data, test, FROZEN, pooled=False)
    rows |= learn(context, "frozen, new pooler", data, test, FROZEN)
    return rows


def finetuned_task(context):
    data, test = context.labelled
    return learn(context, "finetuned", data, test, FINETUNED)


def video_task(context, frames=8):
    """Sec. 3.3 "CoCa for Video Action Recognition": frozen, finetuned, and without pretraining.

    All three see the same number of clips. 8 frames, as the paper does not say how many; for
    retrieval it says 16.
    """
    if context.clips:
        data, test = own_clips(context.clips, context.size, frames)
        if not len(data):
            raise UserError(f"{context.clips}: no clips left to learn from; give more")
    else:
        data, moves = moving_shapes("labelled", context.size, 300, context.seed, frames)
        test, test_moves = moving_shapes("labelled-val", context.size, 400, context.seed, frames)
    torch.manual_seed(context.seed)
    untrained = CoCa(context.model.config).to(device_of(context.model))
    rows = learn(context, "video, frozen", data, test, VIDEO_FROZEN)
    rows |= learn(context, "video, finetuned", data, test, VIDEO_FINETUNED)
    rows |= learn(context, "video, from scratch", data, test, VIDEO_FINETUNED, untrained)
    if context.clips:
        return rows
    # The order of frames: each test clip is there forwards and backwards
    both_ways = dataclasses.replace(
        test_moves, images=np.concatenate([test_moves.images, test_moves.images[:, ::-1]]),
        labels=np.concatenate([test_moves.labels, 1 - test_moves.labels]))
    rows |= learn(context, "video order, frozen", moves, both_ways, VIDEO_FROZEN)
    rows |= learn(context, "video order, frozen, temporal embedding", moves, both_ways,
                  VIDEO_FROZEN, frames=frames)
    return rows


def video_retrieval_task(context):
    data, _ = moving_shapes("labelled-val", context.size, 200, context.seed, frames=24)
    return retrieval_rows(embed_clips(context.model, data.images), context, data.captions, "video")


def understanding_task(context):
    """Sec. 4.2 "Multimodal understanding", Table 10: a pooler over the decoder's outputs.

    Controls see only half: a grey image, or an empty text.
    """
    asked = questions(context.size, 4000, context.seed)
    stated = entailment(context.size, 4000, context.seed)
    grey = dataclasses.replace(asked, images=np.full_like(asked.images, 128))
    silent = dataclasses.replace(asked, captions=[[""]] * len(asked))
    chance = (1 / len(COLOURS) + 1 / 2 + 1 / 3) / 3  # of the three kinds of question
    return {"questions": understand(context, asked, UNDERSTANDING, chance),
            "questions, image hidden": understand(context, grey, UNDERSTANDING, chance),
            "questions, text hidden": understand(context, silent, UNDERSTANDING, chance),
            "entailment": understand(context, stated, UNDERSTANDING, 1 / 2)}


def understand(context, data, recipe, chance, learned=3400):
    """Learns from the first pairs of image and text, is tested on the others -> a row."""
    (images,), labels = tensors(data)
    texts = [text for text, in data.captions]
    tokens = context.tokenizer.encode(texts, context.model.config.text_len)
    train = (images[:learned], tokens[:learned]), labels[:learned]
    test = (images[learned:], tokens[learned:]), labels[learned:]
    classifier = context.classifier(data)
    score = transfer(context.model, decoder_states, classifier, train, test, recipe,
                     "understanding")
    return row(score, chance)


TASKS = {
    "zero-shot": zero_shot_task,
    "retrieval": retrieval_task,
    "captioning": captioning_task,
    "frozen": frozen_task,
    "finetuned": finetuned_task,
    "video-retrieval": video_retrieval_task,
    "video": video_task,
    "understanding": understanding_task,
}
STANDARD = ("zero-shot", "retrieval", "captioning")


def evaluate(model, tokenizer, settings, tasks=STANDARD, strict=False, clips=None):
    """Tasks on the data of `settings` (data, data_dir, seed) -> a dict of plain numbers and texts.

    A task that lacks something is left out with a note; strict: it is a UserError.
    """
    return run_tasks(Context(model, tokenizer, settings, clips), tasks, strict)


def run_tasks(context, tasks, strict):
    context.model.eval()
    scores = {"data": context.settings["data"]}
    for name in tasks:
        lacks = missing(name, context)
        if lacks and strict:
            raise UserError(f"{name}: {lacks}")
        if lacks:
            note(f"{name} left out: {lacks}")
            continue
        began = time.perf_counter()
        with torch.no_grad():
            rows = TASKS[name](context)
        first = next(iter(rows))
        rows[first]["seconds"] = time.perf_counter() - began
        scores.update(rows)
    if "val" in vars(context):  # some task has read them
        scores["images"] = len(context.val)
    return scores


def print_scores(scores, examples=1):
    """Prints what evaluate returned, but for R@5 and BLEU-1 to 3.

    A task's seconds stand beside its first score.
    """
    images = f", {scores['images']} validation images" if "images" in scores else ""
    print(f"{scores['data'] + images:40}{'score':>9}{'chance':>9}{'seconds':>9}")
    for name, value in scores.items():
        if not isinstance(value, dict) or name.endswith(("R@5", "BLEU-1", "BLEU-2", "BLEU-3")):
            continue
        score = as_text(name, value["score"])
        chance = as_text(name, value["chance"])
        seconds = f"{value['seconds']:9.1f}" if "seconds" in value else ""
        print(f"{name:40}{score:>9}{chance:>9}{seconds}")
    if scores.get("unknown words"):
        print(f"{scores['unknown words']:.1%} of the words in the true captions are unknown")
    for pair in scores.get("captions", ())[:examples]:
        text = pair["generated"]
        true = text if text in pair["true"] else pair["true"][0]  # scenes: in either order
        print(f"  generated: {text}\n       true: {true}")


def as_text(name, value):
    """A score as it is printed: a share in per cent, CIDEr-D and cosines (find) as they are."""
    return f"{value:.3f}" if name in ("CIDEr-D", "find") else f"{value:.2%}"


# ------------------------------------------------------------------------------------------------
# Your own classes and searches


def check_texts(texts, model, tokenizer):
    """UserError of texts that say nothing to the model; a note of the words that do not."""
    if not model.config.lambda_con:
        raise UserError("--labels and --find need embeddings, and the checkpoint was trained with "
                        "--lambda-con 0; give another one")
    rows = tokenizer.encode(texts, model.config.text_len).tolist()
    for i, text in enumerate(texts):
        if max(rows[i]) <= UNKNOWN:
            raise UserError(f"{text!r}: the checkpoint knows none of its words; use words of the "
                            "captions that it learned from")
        if rows[i] in rows[:i]:
            first = texts[rows.index(rows[i])]
            raise UserError(f"{first!r} and {text!r} are the same to the checkpoint; drop one")
        if is_cut(text, model.config.text_len):
            note(f"{text!r}: only its first {model.config.text_len - 2} words count")
    unknown = sorted(set(words(" ".join(texts))) - set(tokenizer.words))
    if unknown:
        note(f"words that the checkpoint does not know: {', '.join(unknown)}")


@torch.no_grad()
def compare(model, tokenizer, images, names, labels, find):
    """Images (N, 3, S, S) uint8 and texts of your own, where there are any, best first.

    -> {"labels": {image: {label: probability}}, by the softmax of Eq. (2) over the labels,
    "find": {text: {image: cosine}}}.
    """
    embedding = embed_images(model, images)                             # (N, E)
    found = {}
    if labels:
        cosine = embedding @ embed_classes(model, tokenizer, labels).T  # (N, labels)
        found["labels"] = ranked(names, labels, (cosine / model.temperature).softmax(1))
    if find:
        cosine = embed_texts(model, tokenizer, find) @ embedding.T      # (texts, N)
        found["find"] = ranked(find, names, cosine)
    return found


def ranked(queries, answers, values, most=None):
    """values (queries, answers) -> {query: {answer: value}}, at most `most`, the largest first."""
    found = {}
    for query, row in zip(queries, values.tolist()):
        pairs = sorted(zip(answers, row), key=lambda pair: -pair[1])
        found[query] = dict(pairs[:most])
    return found


# ------------------------------------------------------------------------------------------------
# Report: one HTML page that needs no other file, no network and no script

PAGE = """<!doctype html>
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
meter { width: 6rem; margin-right: .5rem }
.row { display: flex; flex-wrap: wrap; gap: .75rem; margin: .75rem 0 }
figure { margin: 0; width: 7rem; font-size: .875rem; line-height: 1.3 }
img { display: block; width: 7rem; height: 7rem; image-rendering: pixelated }
.map img { background: var(--picture) 0 0 / 100% 100%; print-color-adjust: exact }
.matrix, .matrix img { width: min(100%, 30rem); height: auto; background: #000; color: #fff }
svg { width: 32rem; max-width: 100% }
</style>"""


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


def figure(source, alt, *text, **attributes):
    return tag("figure", tag("img", src=source, alt=alt), tag("figcaption", *text), **attributes)


def table(title, columns, rows):
    """rows: lists of cells, of which the first heads the row."""
    lines = [tag("tr", *(tag("th", name, scope="col") for name in columns))]
    for first, *rest in rows:
        lines.append(tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)))
    return tag("table", tag("caption", title), *lines)


def bar(share, text):
    return tag("span", tag("meter", value=f"{share:.3f}", aria_hidden="true"), text)


def spread(n, k):
    """At most k of the numbers 0, ..., n - 1, evenly spread."""
    return np.unique(np.linspace(0, n - 1, k).astype(int))


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
    high = max(1.01 * low, *(y.max() for y in means.values()))

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
        title += f"; {name}: {y[0]:.3g} at first, least {y.min():.3g}, {y[-1]:.3g} at last"
    return tag("svg", tag("title", title), *parts, viewBox="0 0 370 215", role="img",
               fill="currentColor", font_size=12)


def loss_curves(names, metrics):
    """names of the columns of metrics (steps, columns), as the checkpoint holds them."""
    if len(metrics) < 2:
        return [tag("p", "No curves: the run has fewer than two steps.")]
    column = dict(zip(names, metrics.cpu().numpy().T))
    names = ("loss", "loss_con", "loss_cap")
    curves = {name: column[name] for name in names if column[name].any()}
    text = "loss_con is Eq. (2), loss_cap Eq. (3), loss their weighted sum, Eq. (4)."
    return [tag("p", text), chart("Losses, log scale", column["images"], curves)]


def confusions(predicted, data):
    """predicted (N,) classes of data's images, -1 = none -> a picture, a table of the commonest."""
    labels = data.labels[predicted >= 0]
    predicted = predicted[predicted >= 0]
    if not len(predicted):
        return [tag("p", "For no image one class is nearer than all others.")]
    counts = np.zeros((len(data.classes), len(data.classes)))
    np.add.at(counts, (labels, predicted), 1)                           # (true, predicted)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    there = np.union1d(labels, predicted)  # without classes that do not occur
    title = f"Rows: true classes, columns: predicted, {len(there)} of {len(data.classes)} classes"
    matrix = figure(heat(shares[there][:, there]),
                    f"Heat map. {title}. The next table has its main entries.",
                    f"{title}; the brighter, the larger the share of the row", class_="matrix")
    rows = []
    for (i, j), count in Counter(zip(labels, predicted)).most_common():
        if i != j:
            rows.append([data.classes[i], data.classes[j], f"{count} of {counts[i].sum():.0f}"])
    return [matrix, table("The commonest confusions", ["true", "taken for", "images"], rows[:10])]


def texts_for_images(found, pictures):
    """found {image: {text: nearness}}, pictures {image: (3, S, S) uint8}."""
    parts = []
    for image, texts in found.items():
        rows = [[text, bar(value, f"{value:.3f}")] for text, value in texts.items()]
        seen = tag("img", src=picture(pictures[image]), alt=image)
        near = table(f"Texts for {image}", ["text", "how near"], rows)
        parts.append(tag("div", seen, near, class_="row"))
    return parts


def images_for_texts(found, pictures):
    """found {text: {image: nearness}}, pictures {image: (3, S, S) uint8}."""
    parts = []
    for text, images in found.items():
        near = []
        for image, value in images.items():
            near.append(figure(picture(pictures[image]), image, f"{value:.3f} {image}"))
        parts += [tag("p", f"Images for “{text}”"), tag("div", *near, class_="row")]
    return parts


def nearest(image_embedding, model, tokenizer, data, shown=4, best=5):
    """For some images the nearest texts of the whole set, for some texts the nearest images."""
    texts, _ = distinct(data.captions)
    names = [f"image {i}: {captions[0]}" for i, captions in enumerate(data.captions)]
    pictures = dict(zip(names, data.images))
    cosine = image_embedding @ embed_texts(model, tokenizer, texts).T   # (images, texts)
    parts = [tag("p", f"By cosine, among {len(data):,} images and {len(texts):,} texts.")]
    some = spread(len(data), shown)
    found = ranked([names[i] for i in some], texts, cosine[some], best)
    parts += texts_for_images(found, pictures)
    some = spread(len(texts), shown)
    found = ranked([texts[j] for j in some], names, cosine.T[some], best)
    return parts + images_for_texts(found, pictures)


def attention_maps(model, images, tokens):
    """Where a model looks, as shares of the P patches, means over heads.

    images (B, 3, S, S) float, tokens (B, L) -> of each word (B, L - 1, P), the last layer's
    cross-attention as tokens[:, 1:] are predicted, followed through the generative pooler; the
    words' probabilities (B, L - 1); of the image embedding (B, 1, P); of the generative pooler's
    queries (B, Q, P), each patch by itself if there is no such pooler.
    """
    cross = model.multimodal.blocks[-1].cross_attention
    inputs = []
    hook = cross.register_forward_pre_hook(lambda module, given: inputs.extend(given))
    logits = model(images, tokens).logits                               # (B, L, V)
    hook.remove()
    p = logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None])      # (B, L - 1, 1)
    _, weights = cross(*inputs, return_weights=True)                    # (B, H, L, Q or P)
    words = weights.mean(1)[:, :-1]                                     # (B, L - 1, Q or P)
    source = model.encoder(images)                                      # (B, P, D)
    queries = torch.eye(source.shape[1], device=source.device).expand(len(source), -1, -1)
    pooled = source
    if model.generative_pooler is not None:
        pooled, weights = model.generative_pooler(source, return_weights=True)
        queries = weights.mean(1)                                       # (B, Q, P)
    words = words @ queries                                             # (B, L - 1, P)
    cascade = model.config.pooler == "cascade"
    _, weights = model.contrastive_pooler(pooled if cascade else source, return_weights=True)
    embedding = weights.mean(1)                                         # (B, 1, Q or P)
    if cascade:
        embedding = embedding @ queries                                 # (B, 1, P)
    return words, p[..., 0], embedding, queries


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
    c = model.config
    x = to_model(torch.tensor(images).to(device_of(model)))
    tokens = model.generate(x, max_len=None if c.lambda_cap else 1)     # (N, L), or only BEGIN
    found = attention_maps(model, x, tokens)
    words, p, embedding, queries = (t.cpu().numpy() for t in found)
    for i, (ids, name) in enumerate(zip(tokens.tolist(), names)):
        maps = [figure(picture(images[i]), name, "the image")]
        if c.lambda_con:
            maps.append(map_figure(embedding[i, 0], "image embedding"))
        for token, share, weights in zip(ids[1:], p[i], words[i]):
            if token != PAD:
                word = tokenizer.words[token]
                maps.append(map_figure(weights, word, bar(share, f"{share:.1%}")))
        title = tag("h3", tokenizer.decode(ids) or "no caption")
        parts = [title, tag("p", name), tag("div", *maps, class_="row")]
        if c.n_query and (c.lambda_cap or c.pooler == "cascade"):  # else it never learned
            maps = [map_figure(weights, f"query {j}") for j, weights in enumerate(queries[i][:64])]
            title = tag("summary", f"The generative pooler's {c.n_query} queries")
            parts.append(tag("details", title, tag("div", *maps, class_="row")))
        yield tag("article", *parts, style=f"--picture:url({picture(images[i])})")


def data_sections(context, scores):
    """Scores and examples of a data set -> {title: parts}."""
    rows = []
    for task, value in scores.items():
        if isinstance(value, dict):
            score = bar(value["score"], as_text(task, value["score"]))
            rows.append([task, score, as_text(task, value["chance"])])
    title = f"{context.settings['data']}, {len(context.val):,} validation images"
    sections = {"Scores": [table(title, ["task", "score", "chance"], rows)]}
    if not missing("zero-shot", context):
        sections["Zero-shot classification"] = confusions(*context.zero_shot)
    lacks = missing("retrieval", context)
    if lacks:
        sections["Scores"].append(tag("p", f"No retrieval: {lacks}."))
    else:
        sections["Retrieval"] = nearest(context.image_embedding, context.model, context.tokenizer,
                                        context.val)
    return sections


@torch.no_grad()
def write_report(args, model, tokenizer, checkpoint, scores, images=None, context=None):
    """Writes args.report about args.image, which images (N, 3, S, S) hold, or context's data."""
    names = args.image
    sections = {}
    if context:
        some = spread(len(context.val), 8)
        images = context.val.images[some]
        names = [f"true: {context.val.captions[i][0]}" for i in some]
        sections = data_sections(context, scores)
    if args.labels:
        found = texts_for_images(scores["labels"], dict(zip(names, images)))
        sections["Labels"] = [tag("p", "Probabilities among these labels, by Eq. (2)."), *found]
    if args.find:
        found = images_for_texts(scores["find"], dict(zip(names, images)))
        sections["Find"] = [tag("p", "By cosine."), *found]
    text = "lambda_cap is 0: the model never learned to write."
    if model.config.lambda_cap:
        text = ("Under each word its probability; over the image the last layer's cross-attention "
                "as the word is written, mean of the heads, followed through the pooler to the "
                "patches. The brightest patch has most.")
    articles = captions_with_maps(model, tokenizer, images, names)
    sections["Captions and attention"] = [tag("p", text), *articles]
    sections["Loss curves"] = loss_curves(checkpoint["metrics_names"], checkpoint["metrics"])
    facts = {**checkpoint["settings"], **checkpoint["config"], "step": checkpoint["step"]}
    sections["Settings"] = [table("The run and the model", ["name", "value"], facts.items())]
    parts = [tag("h1", "CoCa report"), tag("p", args.checkpoint)]
    for title, content in sections.items():
        parts.append(tag("section", tag("h2", title), *content))
    page = PAGE + tag("title", f"CoCa: {args.checkpoint}") + "</head>"
    write_new(args.report, page + tag("body", tag("main", *parts)) + "</html>\n")


def write_new(path, text):
    """Writes a file that was not there. A name in the text may be no Unicode."""
    try:
        with open(path, "x", encoding="utf-8", errors="replace") as f:
            f.write(text)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e})") from None


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                usage="python eval.py CHECKPOINT [options]")
    p.add_argument("checkpoint", help="OUT/checkpoint.pt of train.py")
    p.add_argument("--data", choices=NAMES, help="default: what it was trained on")
    p.add_argument("--data-dir", help="folder of the data (default: as in training)")
    p.add_argument("--task", nargs="+", choices=TASKS,
                   help="these tasks only (default: zero-shot, retrieval and captioning)")
    p.add_argument("--all", action="store_true",
                   help="every task, those that train a classifier or finetune too")
    p.add_argument("--clips", metavar="DIR", help="task video on your clips: a folder per class, "
                                                  "of folders of frames or .npy arrays")
    p.add_argument("--image", nargs="+", metavar="FILE", help="caption these image files instead")
    p.add_argument("--labels", nargs="+", metavar="TEXT",
                   help="with --image: which of these texts fits each picture, instead of captions")
    p.add_argument("--find", nargs="+", metavar="TEXT",
                   help="with --image: the pictures by likeness to each text, instead of captions")
    p.add_argument("--json", metavar="FILE", type=new_file, help="also write the scores there")
    p.add_argument("--report", metavar="FILE", type=new_file,
                   help="also make a page there, with curves, examples and attention")
    p.add_argument("--device", default="auto",
                   help="cuda, mps or cpu (default: the first there is)")
    args = p.parse_args(argv)
    if (args.labels or args.find) and not args.image:
        p.error("--labels and --find need --image, the pictures to compare with")
    if args.labels and len(args.labels) < 2:
        p.error("--labels needs two texts or more to choose from")
    if args.image and (args.task or args.all or args.data or args.data_dir or args.clips):
        p.error("--image looks at these pictures only; leave --task, --all, --data and --clips out")
    return args


def own_images(args, model, tokenizer):
    """Captions, labels or finds for args.image -> the images (N, 3, S, S) uint8, scores."""
    for texts in (args.labels, args.find):
        if texts:
            check_texts(texts, model, tokenizer)
    images = np.stack([read_image(Path(file), model.config.image_size) for file in args.image])
    scores = {}
    if args.labels or args.find:
        scores = compare(model, tokenizer, images, args.image, args.labels, args.find)
        for task, found in scores.items():
            for query, answers in found.items():
                print(f"{query}:")
                for answer, value in answers.items():
                    print(f"{as_text(task, value):>9}  {answer}")
    elif model.config.lambda_cap:
        scores = dict(zip(args.image, caption(model, tokenizer, images)))
        for name, text in scores.items():
            print(f"{name}: {text}")
    else:
        note("no captions: the checkpoint was trained with --lambda-cap 0")
    return images, scores


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint, pick_device(args.device))
    images = None
    context = None
    if args.image:
        images, scores = own_images(args, model, tokenizer)
    else:
        settings = dict(checkpoint["settings"])
        if args.data:
            settings.update(data=args.data, data_dir=args.data_dir, val_from_train=0)
        elif args.data_dir:
            settings["data_dir"] = args.data_dir
        context = Context(model, tokenizer, settings, args.clips)
        tasks = args.task or STANDARD
        if args.all and not args.task:
            tasks = TASKS
        scores = run_tasks(context, tasks, strict=bool(args.task))
        print_scores(scores, examples=5)
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))
    if args.report:
        write_report(args, model, tokenizer, checkpoint, scores, images, context)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
