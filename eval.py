"""Evaluate a CoCa checkpoint: zero-shot (Sec. 3.3), or by training on the task (Sec. 3.3, 4.2).

    python eval.py runs/shapes/checkpoint.pt                            zero-shot, captions
    python eval.py runs/shapes/checkpoint.pt --task frozen finetuned    train a classifier on it
    python eval.py runs/shapes/checkpoint.pt --image a.jpg b.png        caption your pictures
    python eval.py runs/shapes/checkpoint.pt --image a.jpg --labels "a ring" "a cross"  which fits
    python eval.py runs/shapes/checkpoint.pt --image *.png --find "a red ring"  best picture first
    python eval.py runs/coco/checkpoint.pt --data cifar10 --data-dir D  other data
    python eval.py runs/shapes/checkpoint.pt --json scores.json         scores for machines

Beside each score stands what chance would give. Videos, questions and a page with pictures are in
experiments/.
"""
import argparse
import copy
import json
import math
import os
import statistics
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
    Tokenizer,
    UserError,
    load,
    note,
    note_cut,
    read_image,
    run_program,
    share_unknown,
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
# A task is a function (model, tokenizer, settings) -> {what: (score, chance)}. UserError if the
# checkpoint or its data lack something for it.


def load_split(model, s, split):
    """The data of settings s (data, data_dir, seed, val_from_train) at the model's size. A run with
    a load_data of its own (train.main) has it in s.
    """
    if "load_data" in s:
        return s["load_data"](s, split)
    return load(s["data"], s["data_dir"], split, model.config.image_size, 0, s["seed"],
                val_from_train=s.get("val_from_train", 0))


def load_classes(model, s, split="zeroshot"):
    data = load_split(model, s, split)
    if not data.classes:
        raise UserError("the images have no classes")
    return data


def need_embeddings(model):
    if not model.config.lambda_con:
        raise UserError("the checkpoint was trained with --lambda-con 0, its embeddings mean "
                        "nothing")


def constant_answer(labels):
    """labels (N,) -> the share that the best constant answer gets right: chance."""
    return np.bincount(labels).max() / len(labels)


# ------------------------------------------------------------------------------------------------
# Zero-shot classification (Sec. 3.3, Table 4)


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
    nearest = (cosine >= best[:, None]).sum(1)  # how many have the largest; 0 if it is NaN
    return torch.where(nearest == 1, predicted, -1)


def zero_shot_score(model, data, class_embedding):
    """-> share of data's images whose nearest class is the right one, and chance."""
    predicted = zero_shot(embed_images(model, data.images), class_embedding).cpu().numpy()
    return (predicted == data.labels).mean(), constant_answer(data.labels)


def zero_shot_task(model, tokenizer, s):
    """Share of images whose nearest class is the right one. A class is the mean of its prompts
    (embed_classes); ties and NaN count as wrong (zero_shot).
    """
    need_embeddings(model)
    data = load_classes(model, s)
    classes = embed_classes(model, tokenizer, data.classes, data.templates)
    return {"zero-shot top-1": zero_shot_score(model, data, classes)}


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
            best = row[right].max()
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


def distinct(captions):
    """A list of texts per image -> all texts, each once; the numbers of each image's texts."""
    number = {}
    of_image = []
    for texts in captions:
        of_image.append([number.setdefault(text, len(number)) for text in dict.fromkeys(texts)])
    return list(number), of_image


def retrieval(image_embedding, model, tokenizer, captions, image="image"):
    """By cosine over the whole set -> {"image to text R@1": (score, chance), ...}, both directions.

    captions: a list of texts per image, all used. A text that several images carry is one item,
    right for each of them.
    """
    texts, of_image = distinct(captions)
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
        raise UserError(f"the captions of {s['data']} are class names, shared by many images; "
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


def tokenised(text):
    """Text -> its words only, about as COCO's Java tokeniser has them."""
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


def captioning_task(model, tokenizer, s, most=1000, examples=2):
    """Greedy captions of at most `most` images, some of which it prints. Chance: the same captions,
    each scored on another image, half of the set further on (neighbours are often of one series).
    """
    if not model.config.lambda_cap:
        raise UserError("the checkpoint was trained with --lambda-cap 0, its decoder never learned "
                        "to write")
    val = load_split(model, s, "val")
    true = val.captions[:most]
    captions = caption(model, tokenizer, val.images[:most])
    references = [[tokenised(text) for text in texts] for texts in true]

    def score(captions):
        candidates = [tokenised(text) for text in captions]
        right = [text in texts for text, texts in zip(candidates, references)]
        scores = {"captions exactly right": statistics.fmean(right)}
        for n, value in enumerate(bleu(candidates, references), 1):
            scores[f"BLEU-{n}"] = value
        name = "CIDEr-D" if len(captions) > 1 else "CIDEr-D (of one image always 0)"
        scores[name] = cider_d(candidates, references)
        return scores

    half = len(captions) // 2
    chance = score(captions[half:] + captions[:half] if half else [""])
    found = {name: (value, chance[name]) for name, value in score(captions).items()}
    found["distinct captions"] = len(set(captions)) / len(captions), 1 / len(captions)
    tokens = tokenizer.encode([text for texts in true for text in texts], model.config.text_len)
    unknown = share_unknown(tokens)
    if unknown:
        print(f"{unknown:.1%} of the words in the true captions are unknown")
    for text, texts in list(zip(captions, true))[:examples]:
        same = text if text in texts else texts[0]  # scenes have two captions, in either order
        print(f"  generated: {text}\n       true: {same}")
    return found


# ------------------------------------------------------------------------------------------------
# Learned classifiers: frozen features and finetuning (Sec. 3.3, Table 2)


class Classifier(nn.Module):
    """A *new* one-query pooler and a linear layer, on tokens of encoder or decoder (Sec. 3.3, 4.2).

    Frozen: it alone learns. Finetuned: the encoder learns, too. Both read the encoder's tokens, and
    no pretrained pooler. pooled=False, in frozen_task only: a linear probe, on the mean token.
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
    """How a task is learned: Tables 9 and 10 as far as they go.

    Theirs are 10,000 to 200,000 steps, batches of 64 to 512 and, for some tasks, RandAugment; ours
    are few and small, without. Where the paper disagrees with itself (finetuning at 5e-4 in Table
    9, at 1e-4 in its text) Table 9 is followed. "Encoder" in Table 10 seems to mean all that is
    pretrained. We take it for the encoder alone; decoder and poolers, where a task reads them,
    learn at lr, our choice.
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
    """A model, what is read from it, and the classifier that reads it."""

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


@torch.enable_grad()
def transfer(model, read, classifier, train, test, recipe, what):
    """Trains a classifier, and a copy of the model too unless it is frozen -> accuracy on test.

    The loss is Eq. (1). train and test: inputs of `read` as tensors (N, ...), labels (N,). The
    accuracy is that of averaged weights, which remember about the last tenth of the steps. (Table
    9's decay of 0.9999 would need some 10,000 steps to forget the first weights.)
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

        def features(*inputs):
            return read(model, *inputs)

        inputs = run_in_parts(features, inputs, device)
        test_inputs = run_in_parts(features, test_inputs, device)
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def schedule(t):  # warm-up, then a cosine to zero
        warm_up = min(1, (t + 1) / max(1, recipe.warm_up))
        return warm_up * (1 + math.cos(math.pi * t / recipe.steps)) / 2

    def moving_average(mean, new, n):
        return mean + (new - mean) * 9 / (10 + n)

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

    def predict(*inputs):
        return (average(*inputs).argmax(1),)

    predicted, = run_in_parts(predict, test_inputs, device)
    return (predicted.cpu() == test_labels).float().mean().item()


def new_classifier(model, s, data, **how):
    """A Classifier for data's classes, the same in every run."""
    torch.manual_seed(s["seed"])
    return Classifier(model.config.width, model.config.heads, len(data.classes), **how)


def tensors(data):
    """Dataset with labels -> (images,), labels as torch tensors."""
    return (torch.from_numpy(np.array(data.images)),), torch.from_numpy(data.labels)


def learn_images(model, s, data, test, recipe, what, **how):
    """Learns the images of data with a new classifier -> accuracy on those of test, and chance."""
    classifier = new_classifier(model, s, data, **how)
    score = transfer(model, image_tokens, classifier, tensors(data), tensors(test), recipe, what)
    return score, constant_answer(test.labels)


def frozen_task(model, tokenizer, s):
    """Sec. 3.3 "Frozen-feature evaluation": a linear probe, and the paper's way: a new pooler."""
    data = load_classes(model, s, "labelled")
    test = load_classes(model, s, "labelled-val")
    linear = learn_images(model, s, data, test, FROZEN, "linear probe", pooled=False)
    pooled = learn_images(model, s, data, test, FROZEN, "new pooler")
    return {"frozen, linear probe": linear, "frozen, new pooler": pooled}


def finetuned_task(model, tokenizer, s):
    """The same with the encoder learning, too."""
    data = load_classes(model, s, "labelled")
    test = load_classes(model, s, "labelled-val")
    return {"finetuned": learn_images(model, s, data, test, FINETUNED, "finetuning")}


DEFAULT_TASKS = {"zero-shot": zero_shot_task, "retrieval": retrieval_task,
                 "captioning": captioning_task}
TASKS = {**DEFAULT_TASKS, "frozen": frozen_task, "finetuned": finetuned_task}


def evaluate(model, tokenizer, settings, tasks=DEFAULT_TASKS, strict=False, notes=True):
    """Runs tasks {name: function} -> {what: {"score": ..., "chance": ...}}, printed as it comes.

    R@5 and BLEU-1 to 3 are not printed. A task that lacks something is left out, with a note if
    notes; strict: it is a UserError.
    """
    model.eval()
    scores = {}
    print(f"{settings['data']:40}{'score':>9}{'chance':>9}{'seconds':>9}")
    for name, task in tasks.items():
        began = time.perf_counter()
        try:
            with torch.no_grad():
                found = task(model, tokenizer, settings)
        except UserError as e:
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
    """A score as it is printed: a share in per cent, CIDEr-D and cosines (find) as they are."""
    return f"{value:.3f}" if what.startswith(("CIDEr-D", "find")) else f"{value:.2%}"


# ------------------------------------------------------------------------------------------------
# Plumbing: nothing about CoCa below

# Your own pictures


def check_texts(texts, model, tokenizer):
    """UserError if a text has no known word or two have the same tokens. Notes unknown words."""
    need_embeddings(model)
    rows = tokenizer.encode(texts, model.config.text_len).tolist()
    for i, text in enumerate(texts):
        if max(rows[i]) <= UNKNOWN:
            raise UserError(f"{text!r}: the checkpoint knows none of its words; use words of the "
                            "captions that it learned from")
        if rows[i] in rows[:i]:
            first = texts[rows.index(rows[i])]
            raise UserError(f"{first!r} and {text!r} are the same to the checkpoint; drop one")
    note_cut(texts, model.config.text_len)
    unknown = sorted(set(words(" ".join(texts))) - set(tokenizer.words))
    if unknown:
        note(f"words that the checkpoint does not know: {', '.join(unknown)}")


@torch.no_grad()
def compare(model, tokenizer, images, names, labels, find):
    """Your images (N, 3, S, S) uint8 beside your texts, the best match first.

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


def ranked(queries, answers, values):
    """values (queries, answers) -> {query: {answer: value}}, the largest first."""
    found = {}
    for query, row in zip(queries, values.tolist()):
        found[query] = dict(sorted(zip(answers, row), key=lambda pair: -pair[1]))
    return found


def own_images(args, model, tokenizer):
    """Prints captions, labels or search results -> args.image (N, 3, S, S) uint8, scores."""
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


# Command line


def add_common_flags(p):
    """Flags that experiments/ have, too."""
    p.add_argument("checkpoint", help="OUT/checkpoint.pt of train.py")
    p.add_argument("--data", choices=NAMES, help="default: what it was trained on")
    p.add_argument("--data-dir", help="folder of the data (default: as in training)")
    p.add_argument("--json", metavar="FILE", type=new_file, help="also write the scores there")
    p.add_argument("--device", default="auto",
                   help="cuda, mps or cpu (default: the first there is)")


def add_image_flags(p):
    p.add_argument("--image", nargs="+", metavar="FILE", help="caption these image files instead")
    p.add_argument("--labels", nargs="+", metavar="TEXT",
                   help="with --image: which of these texts fits each picture, instead of captions")
    p.add_argument("--find", nargs="+", metavar="TEXT",
                   help="with --image: the pictures by likeness to each text, instead of captions")


def check_image_flags(p, args):
    if (args.labels or args.find) and not args.image:
        p.error("--labels and --find need --image, the pictures to compare with")
    if args.labels and len(args.labels) < 2:
        p.error("--labels needs two texts or more to choose from")
    if args.image and (args.data or args.data_dir):
        p.error("--image looks at these pictures only; leave --data out")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python eval.py CHECKPOINT [options]")
    add_common_flags(p)
    p.add_argument("--task", nargs="+", choices=TASKS,
                   help="these tasks only (default: zero-shot, retrieval and captioning)")
    add_image_flags(p)
    args = p.parse_args(argv)
    check_image_flags(p, args)
    if args.image and args.task:
        p.error("--image looks at these pictures only; leave --task out")
    return args


def settings_of(args, checkpoint):
    """The checkpoint's settings, with the data of args where they are given."""
    settings = dict(checkpoint["settings"])
    if args.data:
        settings.update(data=args.data, data_dir=args.data_dir, val_from_train=0)
    elif args.data_dir:
        settings["data_dir"] = args.data_dir
    return settings


def evaluate_checkpoint(args, tasks, model, tokenizer, checkpoint):
    """Tasks {name: function} on the checkpoint's data or those of args."""
    chosen = {name: tasks[name] for name in args.task or tasks}
    settings = settings_of(args, checkpoint)
    return evaluate(model, tokenizer, settings, chosen, strict=bool(args.task))


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint)
    model.to(pick_device(args.device))
    if args.image:
        _, scores = own_images(args, model, tokenizer)
    else:
        tasks = DEFAULT_TASKS
        if args.task:
            tasks = TASKS
        scores = evaluate_checkpoint(args, tasks, model, tokenizer, checkpoint)
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


# Loading, and devices

FORMAT = 3  # of a checkpoint; goes up when older ones can no longer be read


def load_checkpoint(path):
    """-> model on the CPU, tokenizer, the whole checkpoint: a dict, made in train.save.

    Plain types only: loading runs no code.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; python train.py makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "vocabulary" not in checkpoint:
            raise ValueError("something else")
        found = checkpoint.get("format", 1)
        if found == FORMAT:
            model = CoCa(CoCaConfig(**checkpoint["config"]))
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
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except Exception as e:  # each device raises a kind of its own
        why = str(e).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({why}); leave it out") from None
    return name


def new_file(path):
    """For argparse: the path, if a new file can be made there. So it is known before the work."""
    try:
        open(path, "x").close()
        os.remove(path)
    except FileExistsError:
        raise argparse.ArgumentTypeError(f"{path} is there already; give another name") from None
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{path} cannot be made ({e.strerror}); give "
                                         "another") from None
    return path


def write_new(path, text):
    """Writes a file that was not there, or nothing. (File names in the text may be no Unicode.)"""
    try:
        with open(path, "x", encoding="utf-8", errors="replace") as f:
            f.write(text)
    except OSError as e:
        if not isinstance(e, FileExistsError):
            Path(path).unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


if __name__ == "__main__":
    run_program(main)
