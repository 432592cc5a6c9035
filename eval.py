"""Evaluate a CoCa checkpoint without training anything on the task (Sec. 3.3 "Zero-shot transfer").

    python eval.py runs/shapes/checkpoint.pt                             on the data it was trained on
    python eval.py runs/shapes/checkpoint.pt --image a.jpg b.png         caption your own pictures
    python eval.py runs/coco/checkpoint.pt --data cifar10 --data-dir D   another task, never trained for
    python eval.py runs/shapes/checkpoint.pt --json scores.json          the same for machines
    python eval.py --bench --config bench-tiny bench-small               speed and memory of this machine

Classification by prompt ensembles (the templates: TEMPLATES and `shapes` in data.py), image-text retrieval
both ways, greedy captions; the chance level stands beside each score.
"""
import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections import Counter
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


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
