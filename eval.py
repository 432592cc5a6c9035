"""Evaluate a CoCa checkpoint: zero-shot (Sec. 3.3), or by training on the task (Sec. 3.3, 4.2).

    python eval.py runs/shapes                                zero-shot, retrieval, captions
    python eval.py runs/shapes --task frozen finetuned        train a classifier on the model
    python eval.py runs/shapes --image a.jpg b.png            caption your pictures
    python eval.py runs/coco --data cifar10 --data-dir DIR    other data
    python eval.py runs/shapes --json scores.json             scores for machines

You see how each score is computed: classes by prompts, retrieval, captions, and classifiers that
learn on frozen or finetuned features. Each is printed with its chance level. Checkpoints and files,
below the line, may be skipped. Videos, questions, your own texts for your own pictures and a page
with pictures are in experiments/.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from coca import UNKNOWN, AttentionalPooler, CoCa, CoCaConfig
from data import (
    NAMES,
    DoesNotApply,
    Tokenizer,
    UserError,
    drawn,
    load,
    note,
    note_lost,
    read_image,
    replacing,
    run_program,
    select,
    to_model,
    words,
)

# ------------------------------------------------------------------------------------------------
# Embeddings


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
    for i in tqdm(range(0, len(texts), batch), "embedding texts", leave=False):
        tokens = tokenizer.encode(texts[i:i + batch], model.config.text_len)
        parts.append(model.encode_text(tokens.to(device_of(model))))
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------
# A task is a function (model, tokenizer, settings) -> {what: (score, chance)}. DoesNotApply if the
# checkpoint or its data lack what it asks for.


def load_data(s, split):
    """The data of a run's settings s (a dict) -> Dataset of the split, one of data.load's."""
    return load(s["data"], s["data_dir"], split, size=s["image_size"], subset=s.get("subset", 0),
                seed=s["seed"], val_from_train=s.get("val_from_train", 0))


def load_split(model, s, split):
    """The same at the model's size, by the load_data in s, where a run has one of its own."""
    return s.get("load_data", load_data)({**s, "image_size": model.config.image_size}, split)


def load_classes(model, s, split="zeroshot"):
    data = load_split(model, s, split)
    if not data.classes:
        raise DoesNotApply("the images have no classes")
    return data


def need_embeddings(model):
    if not model.config.lambda_con:
        raise DoesNotApply("trained with --lambda-con 0, its embeddings mean nothing")


def constant_answer(labels):
    """labels (N,) -> the share that the best constant answer gets right: chance."""
    return np.bincount(labels).max() / len(labels)


# ------------------------------------------------------------------------------------------------
# Zero-shot classification (Sec. 3.3, Table 4)

TIE = 1e-6  # cosines that differ by less are equal, except for rounding


def embed_classes(model, tokenizer, classes, templates=("{}",)):
    """-> (classes, E) unit norm. As in CLIP, a class is the mean of its prompts' embeddings."""
    prompts = []
    for name in classes:
        prompts += [template.format(name) for template in templates]
    text = embed_texts(model, tokenizer, prompts)                       # (classes * templates, E)
    text = text.unflatten(0, (len(classes), -1)).mean(1)                # (classes, E)
    return F.normalize(text, dim=-1)


def zero_shot(image_embedding, class_embedding):
    """(N, E), (classes, E) -> the class (N,) nearest to each image.

    -1 if two classes or more share the largest cosine, or if one is NaN: that image is wrong.
    """
    cosine = image_embedding @ class_embedding.T                        # (N, classes)
    best, predicted = cosine.max(1)
    nearest = (cosine >= best[:, None] - TIE).sum(1)  # how many; 0 if the largest is NaN
    return torch.where(nearest == 1, predicted, -1)


def zero_shot_score(model, data, class_embedding):
    """-> share of data's images whose nearest class is the right one, and chance."""
    predicted = zero_shot(embed_images(model, data.images), class_embedding).cpu().numpy()
    return (predicted == data.labels).mean(), constant_answer(data.labels)


def load_known_classes(model, tokenizer, s):
    """The images to classify, of those classes only that the model can know: it has met a word of
    their names. (Else chance would be scored as if it were an answer.)
    """
    data = load_classes(model, s)
    known = are_known(data.classes, tokenizer, model).numpy()           # (classes,)
    unknown = [name for name, is_known in zip(data.classes, known) if not is_known]
    if not known[data.labels].any():
        raise DoesNotApply(f"the checkpoint knows no word of the classes {', '.join(unknown):.200}")
    if unknown:
        note(f"{len(unknown)} of {len(known)} classes left out, the checkpoint knows no word of "
             f"them: {', '.join(unknown):.200}")
    data = select(data, np.flatnonzero(known[data.labels]))
    data.labels = (known.cumsum() - 1)[data.labels]
    data.classes = [name for name in data.classes if name not in unknown]
    return data


def are_known(texts, tokenizer, model):
    """Which of the texts (n,) have a word that the tokenizer knows."""
    return tokenizer.encode(texts, model.config.text_len).amax(1) > UNKNOWN


ZERO_SHOT = "zero-shot top-1"
SUPERVISED = "top-1 by prompts, supervised"  # the classes were learned, from labelled images


def zero_shot_task(model, tokenizer, s):
    """Share of images whose nearest class is the right one. A class is the mean of its prompts
    (embed_classes); ties and NaN count as wrong (zero_shot).
    """
    need_embeddings(model)
    data = load_known_classes(model, tokenizer, s)
    classes = embed_classes(model, tokenizer, data.classes, data.templates)
    name = ZERO_SHOT
    if s["data"].startswith("cifar") and s.get("trained_on", s["data"]) == s["data"]:
        name = SUPERVISED
    return {name: zero_shot_score(model, data, classes)}


# ------------------------------------------------------------------------------------------------
# Zero-shot retrieval (Sec. 3.3, Table 3)

BLOCK = 2**25  # cosines in one tensor at most: 128 MiB of float32


def ranks(queries, items, relevant):
    """For each query: how many wrong items have a cosine at least as large as its best right item.
    0 = a right item is first.

    queries (n, E), items (N, E), relevant: for each query the list of its items, each once -> n
    numbers, infinite where a cosine is NaN.
    """
    found = []
    for start in range(0, len(queries), max(1, BLOCK // len(items))):
        cosines = queries[start:start + max(1, BLOCK // len(items))] @ items.T
        for row, right in zip(cosines, relevant[start:]):
            best = row[right].max() - TIE
            wrong = (row >= best).sum() - (row[right] >= best).sum()
            found.append(math.inf if row.max().isnan() else wrong.item())
    return found


def recall(queries, items, relevant, ks=(1, 5, 10)):
    """As for ranks -> {K: (share of queries with a right item among the K nearest, by chance)}."""
    places = ranks(queries, items, relevant)
    sizes = Counter(len(right) for right in relevant)
    N = len(items)
    found = {}
    for k in ks:
        k_items = min(k, N)
        miss = 0.0  # the chance that K items drawn blindly hold none of the right ones
        for size, count in sizes.items():
            miss += count / len(relevant) * math.comb(N - size, k_items) / math.comb(N, k_items)
        hits = sum(place < k for place in places)
        found[k] = hits / len(places), 1 - miss
    return found


def as_seen(text, text_len):
    """What a model can tell texts apart by: their first words. Equal ones are one text."""
    return tuple(words(text)[:text_len - 2])


def distinct(captions, text_len):
    """A list of texts per image -> all texts, equal ones once; which of them each image has."""
    first = {}  # of equal texts
    for text in itertools.chain(*captions):
        first.setdefault(as_seen(text, text_len), text)
    number = {seen: i for i, seen in enumerate(first)}
    of_image = [sorted({number[as_seen(text, text_len)] for text in own}) for own in captions]
    return [*first.values()], of_image


def retrieval(image_embedding, model, tokenizer, captions, image="image"):
    """By cosine over the whole set -> {"image to text R@1": (score, chance), ...}, both directions.

    captions: a list of texts per image, all used. A text that several images carry is one item,
    right for each of them.
    """
    texts, of_image = distinct(captions, model.config.text_len)
    of_text = [[] for _ in texts]
    for i, numbers in enumerate(of_image):
        for j in numbers:
            of_text[j].append(i)
    text_embedding = embed_texts(model, tokenizer, texts)
    found = {}
    for k, scores in recall(image_embedding, text_embedding, of_image).items():
        found[f"{image} to text R@{k}"] = scores
    for k, scores in recall(text_embedding, image_embedding, of_text).items():
        found[f"text to {image} R@{k}"] = scores
    return found


def retrieval_task(model, tokenizer, s):
    need_embeddings(model)
    val = load_split(model, s, "val")
    if val.classes:
        raise DoesNotApply(f"the captions of {s['data']} are class names, shared by many images; "
                           "see zero-shot")
    return retrieval(embed_images(model, val.images), model, tokenizer, val.captions)


# ------------------------------------------------------------------------------------------------
# Captioning (Table 7)


def caption(model, tokenizer, images, **how):
    """images (N, 3, S, S) uint8 -> N captions; how: see CoCa.generate."""
    texts = []
    for x in in_batches(model, images, "captioning"):
        texts += [tokenizer.decode(tokens) for tokens in model.generate(x, **how).tolist()]
    return texts


def tokenised(text, most=None):
    """Text -> its words only, about as COCO's Java tokeniser has them; of its first `most` words
    and marks.
    """
    return " ".join(word for word in words(text)[:most] if any(map(str.isalnum, word)))


def n_grams(text):
    """A tokenised text -> how often it has each n-gram, a Counter for each n = 1, 2, 3, 4."""
    found = text.split()
    return [Counter(zip(*(found[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def bleu(candidates, references):
    """BLEU (Papineni et al. 2002) of the whole set -> [BLEU-1, ..., BLEU-4], each in [0, 1].

    candidates: a tokenised text per image; references: a list of them per image. BLEU-n is the
    geometric mean over k = 1, ..., n of the share of the candidates' k-grams that are right, times
    a penalty if they are too short. Like CIDEr-D below it is as in the COCO evaluation code,
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
    return np.mean(scores)


def captioning_task(model, tokenizer, s, most=1000, examples=2):
    """Greedy captions of at most `most` images; it prints a few. Chance: the same captions,
    each scored on another image, half of the set further on (neighbours are often of one series).
    """
    if not model.config.lambda_cap:
        raise DoesNotApply("trained with --lambda-cap 0, its decoder never learned to write")
    val = load_split(model, s, "val")
    rows = drawn(len(val), most)
    if len(rows) < len(val):
        note(f"captions of {len(rows):,} of the {len(val):,} images, drawn at random")
    val = select(val, rows)
    text_len = model.config.text_len
    everything = [text for texts in val.captions for text in texts]
    note_lost(everything, tokenizer.encode(everything, text_len), text_len)
    captions = caption(model, tokenizer, val.images)
    references = [[tokenised(text) for text in texts] for texts in val.captions]
    seen = [[tokenised(text, text_len - 2) for text in texts] for texts in val.captions]

    def score(captions):
        candidates = [tokenised(text) for text in captions]
        right = []
        for text, candidate, texts in zip(captions, candidates, seen):
            right.append("<unk>" not in text and candidate in texts)
        scores = {"captions exactly right": np.mean(right)}
        for n, value in enumerate(bleu(candidates, references), 1):
            scores[f"BLEU-{n}"] = value
        name = "CIDEr-D" if len(captions) > 1 else "CIDEr-D (of one image always 0)"
        scores[name] = cider_d(candidates, references)
        return scores

    half = len(captions) // 2
    chance = score(captions[half:] + captions[:half] if half else [""])
    found = {name: (value, chance[name]) for name, value in score(captions).items()}
    found["distinct captions"] = len(set(captions)) / len(captions), 1 / len(captions)
    for text, texts in list(zip(captions, val.captions))[:examples]:
        same = text if text in texts else texts[0]  # scenes have two captions, in either order
        print(f"  generated: {text}\n       true: {same}")
    return found


# ------------------------------------------------------------------------------------------------
# Learned classifiers: frozen features and finetuning (Sec. 3.3, Table 2)


class Classifier(nn.Module):
    """A *new* one-query pooler and a linear layer, on tokens of encoder or decoder (Sec. 3.3, 4.2).

    Frozen: it alone learns. Finetuned: the encoder learns, too. Both tasks here read the encoder's
    tokens, and no pretrained pooler. pooled=False: a linear probe on the mean token.
    """

    def __init__(self, width, heads, classes, pooled=True):
        super().__init__()
        self.pooler = None
        if pooled:
            self.pooler = AttentionalPooler(width, heads, 1)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens, mask=None):
        """tokens (B, P, D), mask (..., 1, P) True = may look -> logits (B, classes)."""
        if self.pooler is None:
            return self.linear(tokens.mean(1))                          # (B, classes)
        pooled = self.pooler(tokens, mask)                              # (B, 1, D)
        return self.linear(pooled[:, 0])                                # (B, classes)


@dataclass
class Recipe:
    """How a task is learned: hyperparameters from Tables 9 and 10 where they apply.

    For classes theirs are 50,000 to 200,000 steps, batches of 64 to 512, some RandAugment. Where
    the paper disagrees with itself (finetuning at 5e-4 in Table 9, at 1e-4 in its text) Table 9 is
    followed. "Encoder" in Table 10 seems to mean all that is pretrained. We take it for the encoder
    alone; decoder and poolers, where a task reads them, learn at lr, our choice.
    """

    lr: float = 5e-4  # of the classifier and, where they learn, of poolers and decoder
    encoder_lr: float = 0.0  # 0 = the model is frozen
    smoothing: float = 0.0
    weight_decay: float = 0.0
    warm_up: int = 0
    steps: int = 1000
    batch: int = 64


FROZEN = Recipe(smoothing=0.2, weight_decay=0.01)
FINETUNED = Recipe(encoder_lr=5e-4, smoothing=0.5, weight_decay=0.01, steps=400)


def image_tokens(model, images):
    """What a classifier of images reads: images (B, 3, S, S) uint8 -> (tokens (B, P, D),)."""
    return (model.encoder(to_model(images)),)


class Learner(nn.Module):
    """A model, what is read from it, and the classifier that reads it: inputs -> logits."""

    def __init__(self, model, read, classifier):
        super().__init__()
        self.model = model
        self.read = read
        self.classifier = classifier

    def forward(self, *inputs):
        return self.classifier(*self.read(self.model, *inputs))


@torch.no_grad()
def run_in_parts(function, inputs, device):
    """function(*inputs) -> a tuple of tensors, taken 256 rows at a time and put together again."""
    outputs = []
    for part in zip(*(t.split(256) for t in inputs)):
        outputs.append(function(*(t.to(device) for t in part)))
    return [torch.cat(parts) for parts in zip(*outputs)]


def accuracy(learner, test):
    """Share of the test's inputs whose likeliest class is the right one."""
    def predict(*inputs):
        return (learner(*inputs).argmax(1),)

    inputs, labels = test
    predicted, = run_in_parts(predict, inputs, device_of(learner.model))
    return (predicted.cpu() == labels).float().mean().item()


@torch.enable_grad()
def transfer(model, read, classifier, train, test, recipe, what):
    """Trains a classifier, and a copy of the model too unless it is frozen -> the Learner and its
    accuracy on test.

    The loss is Eq. (1). train and test: inputs of `read` as tensors (N, ...), labels (N,). The
    Learner has averaged weights, which remember about the last tenth of the steps. (Table 9's decay
    of 0.9999 would need some 10,000 steps to forget the first weights.)
    """
    device = device_of(model)
    inputs, labels = train
    groups = [dict(params=classifier.to(device).parameters(), lr=recipe.lr)]
    learner = Learner(model, read, classifier)
    if recipe.encoder_lr:
        learned = learner
        learner.model = copy.deepcopy(model)
        for name, module in learner.model.named_children():
            lr = recipe.encoder_lr if name == "encoder" else recipe.lr
            groups.append(dict(params=module.parameters(), lr=lr))
    else:  # the model runs once, and the classifier learns from its outputs
        learned = classifier
        inputs = run_in_parts(functools.partial(read, model), inputs, device)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def schedule(t):  # warm-up, then a cosine to zero
        warm_up = min(1, (t + 1) / max(1, recipe.warm_up))
        return warm_up * (1 + math.cos(math.pi * t / recipe.steps)) / 2

    def moving_average(mean, new, n):
        return mean + (new - mean) * 9 / (10 + n)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    average = AveragedModel(learned, avg_fn=moving_average)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(recipe.steps), what, leave=False):
        rows = torch.randint(len(labels), (recipe.batch,), generator=generator)
        logits = learned(*(t[rows].to(device) for t in inputs))
        loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(learned)
    if recipe.encoder_lr:
        learner = average.module
    else:
        learner.classifier = average.module
    return learner, accuracy(learner, test)


def new_classifier(model, s, data, **how):
    """A Classifier for data's classes, the same in every run of a seed."""
    torch.manual_seed(s["seed"])
    return Classifier(model.config.width, model.config.heads, len(data.classes), **how)


def tensors(data):
    """Dataset with labels -> (images,), labels as torch tensors."""
    return (torch.from_numpy(np.array(data.images)),), torch.from_numpy(data.labels)


def learn_images(model, s, data, test, recipe, what, **how):
    """Learns the images of data with a new classifier -> the Learner, and its accuracy on test's
    beside chance.
    """
    classifier = new_classifier(model, s, data, **how)
    learner, score = transfer(model, image_tokens, classifier, tensors(data), tensors(test), recipe,
                              what)
    return learner, (score, constant_answer(test.labels))


def frozen_task(model, tokenizer, s):
    """Sec. 3.3 "Frozen-feature evaluation": a linear probe, and the paper's way: a new pooler."""
    data = load_classes(model, s, "labelled")
    test = load_classes(model, s, "labelled-val")
    _, linear = learn_images(model, s, data, test, FROZEN, "linear probe", pooled=False)
    _, pooled = learn_images(model, s, data, test, FROZEN, "new pooler")
    return {"frozen, linear probe": linear, "frozen, new pooler": pooled}


def finetuned_task(model, tokenizer, s):
    """A new pooler once more, with the encoder learning, too."""
    data = load_classes(model, s, "labelled")
    test = load_classes(model, s, "labelled-val")
    return {"finetuned": learn_images(model, s, data, test, FINETUNED, "finetuning")[1]}


DEFAULT_TASKS = {"zero-shot": zero_shot_task, "retrieval": retrieval_task,
                 "captioning": captioning_task}
TASKS = {**DEFAULT_TASKS, "frozen": frozen_task, "finetuned": finetuned_task}


def evaluate(model, tokenizer, settings, tasks=DEFAULT_TASKS, strict=False, notes=True):
    """Runs tasks {name: function} -> {what: {"score": ..., "chance": ...}}, printed as it comes.

    R@5 and BLEU-1 to 3 are not printed. A task that does not apply is left out, with a note if
    notes; strict: it is a UserError, as data that cannot be read always are.
    """
    model.eval()
    scores = {}
    head = settings["data"]
    if settings.get("val_from_train"):
        head += f", {settings['val_from_train']} training images kept apart"
    print(f"{head:40}{'score':>9}{'chance':>9}{'seconds':>9}")
    for name, task in tasks.items():
        began = time.perf_counter()
        try:
            with torch.no_grad():
                found = task(model, tokenizer, settings)
        except DoesNotApply as e:
            if strict:
                raise UserError(f"{name}: {e}") from None
            if notes:
                note(f"{name} left out: {e}")
            continue
        seconds = f"{time.perf_counter() - began:9.1f}"
        for what, (score, chance) in found.items():
            scores[what] = {"score": float(score), "chance": float(chance)}
            if not what.endswith(("R@5", "BLEU-1", "BLEU-2", "BLEU-3")):
                print(f"{what:40}{as_text(what, score):>9}{as_text(what, chance):>9}{seconds}")
                seconds = ""  # of the whole task, beside its first score
    return scores


def as_text(what, value):
    """A score as it is printed: a share in per cent, CIDEr-D as it is."""
    return f"{value:.3f}" if what.startswith("CIDEr-D") else f"{value:.2%}"


# ------------------------------------------------------------------------------------------------
# Plumbing: nothing about CoCa below

# Your own pictures


def caption_files(files, model, tokenizer):
    """Prints captions of image files -> {file: caption}."""
    if not model.config.lambda_cap:
        raise DoesNotApply("no captions: the checkpoint was trained with --lambda-cap 0")
    texts = caption(model, tokenizer, read_images(files, model.config.image_size))
    for file, text in zip(files, texts):
        print(f"{file}: {text}")
    return dict(zip(files, texts))


def read_images(files, size):
    """Image files -> (N, 3, size, size) uint8."""
    return np.stack([read_image(Path(file), size) for file in files])


# Command line


def add_common_flags(p):
    """Flags that experiments/ have, too."""
    p.add_argument("checkpoint", help="OUT of train.py, or its checkpoint.pt")
    p.add_argument("--data", choices=NAMES, help="default: what it was trained on")
    p.add_argument("--data-dir", help="where the data are now (default: as in training)")
    p.add_argument("--json", metavar="FILE", type=new_file, help="also write the scores there")
    p.add_argument("--device", default="auto",
                   help="cuda, mps or cpu (default: the first there is)")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python eval.py CHECKPOINT [options]")
    add_common_flags(p)
    p.add_argument("--task", nargs="+", choices=TASKS,
                   help="these tasks only (default: zero-shot, retrieval and captioning)")
    p.add_argument("--image", nargs="+", metavar="FILE", help="caption these image files instead")
    args = p.parse_args(argv)
    if args.image and (args.task or args.data or args.data_dir):
        p.error("--image looks at these pictures only; leave --task and --data out")
    return args


def settings_of(args, checkpoint):
    """The checkpoint's settings, with the data of args where they are given."""
    settings = {**checkpoint["settings"], "trained_on": checkpoint["settings"]["data"]}
    if args.data and args.data != settings["data"]:
        settings.update(data=args.data, data_dir=None, val_from_train=0)
    if args.data_dir is not None:
        settings["data_dir"] = args.data_dir
    return settings


def evaluate_checkpoint(args, tasks, model, tokenizer, checkpoint):
    """Tasks {name: function} on the checkpoint's data, or on what args name."""
    chosen = {name: tasks[name] for name in args.task or tasks}
    return evaluate(model, tokenizer, settings_of(args, checkpoint), chosen, strict=bool(args.task))


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint)
    model.to(pick_device(args.device))
    if args.image:
        if checkpoint["settings"]["data"] == "shapes":
            note("this model has learned from generated scenes only: it can name nothing else")
        scores = caption_files(args.image, model, tokenizer)
    else:
        tasks = TASKS if args.task else DEFAULT_TASKS
        scores = evaluate_checkpoint(args, tasks, model, tokenizer, checkpoint)
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


# Loading, and devices

FORMAT = 3  # of a checkpoint; goes up when older ones can no longer be read
CONTENT = "format config vocabulary settings model optimizer step metrics metrics_names".split()


def load_checkpoint(path):
    """The file or its folder -> model on the CPU, tokenizer, the whole checkpoint: a dict of plain
    types, made in train.save. Loading runs no code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; python train.py makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacking = [name for name in CONTENT if name not in checkpoint]
        if lacking:
            raise KeyError(*lacking)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"format {checkpoint['format']}, and this version reads {FORMAT}")
        model = CoCa(CoCaConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model, Tokenizer(checkpoint["vocabulary"]), checkpoint
    except Exception as e:  # cut off, foreign, or with code in it: torch names each differently
        why = str(e).split(". ")[0]  # (torch goes on to advise to run the code)
        raise UserError(f"{path}: not a checkpoint of this version; train again, or give another "
                        f"({type(e).__name__}: {why!r:.160})") from None


def pick_device(name):
    """"auto" -> cuda, mps or cpu, the first there is. UserError if the one asked for is not."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found.type if found else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as e:  # each device raises a kind of its own
        why = str(e).splitlines()[0][:60]
        raise UserError(f"--device {name}: cannot be used here ({why}); leave it out") from None
    return name


def new_file(path):
    """For argparse: a path where a new file can be made. So it is known before the work."""
    folder = os.path.join(os.path.dirname(path) or ".", ".")  # "/.": no file has that
    if os.path.lexists(path) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} is there already or cannot be made; give another")
    return path


def write_new(path, text):
    """Writes a file that was not there, or nothing. (File names in the text may be no Unicode.)"""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already and stays as it is; give another name")
    with replacing(Path(path)) as f:
        f.write(text.encode("utf-8", "replace"))


if __name__ == "__main__":
    run_program(main)
