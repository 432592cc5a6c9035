"""Data for CoCa: generated scenes, CIFAR, COCO and your own captioned images, all as one `Dataset`.

    load("shapes")                          generated, nothing to download: what train.py uses by itself
    load("cifar10", "DIR")                  or cifar100; the official python or binary files in DIR
    load("coco", "DIR")                     DIR/annotations/captions_train2017.json, DIR/train2017/*.jpg, ... (or 2014)
    load("captions", "DIR")                 DIR/captions.txt or one .csv with columns image,caption; images in DIR/Images or DIR

    python data.py dedup --data cifar10 --data-dir DIR     near-duplicates of evaluation images among the training images

Labels become text by prompt templates, as the paper does with JFT-3B's labels (Sec. 4.1).
Whatever is wrong with a file is a DataError of one line: what, where, and what to do.
"""
import argparse
import csv
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pickle
import re
import sys
import tarfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from coca import BEGIN, END, PAD, UNKNOWN


class DataError(Exception):
    """Bad input. The message is one line that names the file and says what to do."""


def note(text):
    print(f"note: {text}", file=sys.stderr)


@dataclass
class Dataset:
    """Images with their texts. Indexed by image: a caption never leaves its image, whatever the split."""

    images: np.ndarray  # (N, 3, S, S) uint8, in memory or memory-mapped
    captions: list  # N lists of texts; one is drawn per epoch, all are used in evaluation
    labels: np.ndarray = None  # (N,) class of each image, where there are classes
    classes: list = field(default_factory=list)  # their names
    templates: list = field(default_factory=list)  # prompts that turn a name into a text, "a photo of a {}."
    augment: bool = False  # crop and flip in training

    def __len__(self):
        return len(self.images)


# ------------------------------------------------------------------------------------------------
# shapes: generated scenes

COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 250), "yellow": (240, 220, 50),
           "purple": (170, 60, 220), "white": (245, 245, 245), "orange": (245, 140, 30), "cyan": (60, 215, 230)}
SHAPES = {  # inside where the value is below the radius r; x to the right, y downwards, from the centre
    "circle": lambda x, y, r: np.hypot(x, y),
    "square": lambda x, y, r: 1.15 * np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y, r: np.maximum(1.2 * y, 1.2 * abs(x) - 0.65 * y + 0.25 * r),
    "bar": lambda x, y, r: np.maximum(abs(x), 2.5 * abs(y)),
    "cross": lambda x, y, r: np.minimum(np.maximum(abs(x), 3 * abs(y)), np.maximum(3 * abs(x), abs(y))),
    "ring": lambda x, y, r: 3.2 * abs(np.hypot(x, y) - 0.7 * r),
}
SIZES = {"small": 0.15, "large": 0.22}  # radius, in image sides
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = list(zip(COLOURS, SHAPES))  # six pairs that never occur in training: each shape lacks one colour
SPLITS = ("train", "val", "zeroshot", "labelled", "labelled-val")  # the last two: one thing of any pair, to classify
ANSWERS = ["no", "yes", "0", "1", "2", *COLOURS]


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float  # centre in image sides, from the left
    y: float  # and from the top

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}"

    def corner(self):
        return f"{'top' if self.y < 0.5 else 'bottom'} {'left' if self.x < 0.5 else 'right'}"


def place(rng, corners, pairs=PAIRS):
    """Random things near the corners: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    things = []
    for corner in corners:
        x, y = (corner % 2, corner // 2) + rng.uniform(-1, 1, 2) * 0.05
        things.append(Thing(rng.choice(list(SIZES)), *pairs[rng.integers(len(pairs))], 0.25 + 0.5 * x, 0.25 + 0.5 * y))
    return things


def scene(seed, split, index):
    """Things of scene (seed, split, index) and the generator that made them: one or two, in different corners."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    many = split in ("train", "val")
    pairs = HELD_OUT if split == "zeroshot" else [pair for pair in PAIRS if pair not in HELD_OUT] if many else PAIRS
    count = rng.integers(1, 3) if many else 1
    return place(rng, rng.permutation(4)[:count], pairs), rng


def draw(things, rng, size):
    """Picture of a scene, (3, size, size) uint8: things on a dark background of random hue, with noise."""
    at = (np.arange(size) + 0.5) / size
    image = np.broadcast_to(rng.uniform(0, 60, (3, 1, 1)), (3, size, size))
    for thing in things:
        r = SIZES[thing.size]
        inside = r - SHAPES[thing.shape](at - thing.x, at[:, None] - thing.y, r)      # (size, size)
        cover = np.clip(inside * size + 0.5, 0, 1)  # soft edges: the share of the pixel that is covered
        image = image + cover * (np.array(COLOURS[thing.colour])[:, None, None] - image)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def describe(things):
    """All captions of a scene: its things in any order, each with its place."""
    return [" and ".join(f"{thing} at the {thing.corner()}" for thing in order) for order in permutations(things)]


def shapes(split, size, subset, seed):
    counts = {"train": subset or 20_000, "val": 500, "zeroshot": 600, "labelled": 3000, "labelled-val": 1000}
    scenes = [scene(seed, split, i) for i in tqdm(range(counts[split]), f"drawing {split} scenes", leave=False)]
    images = np.stack([draw(things, rng, size) for things, rng in scenes])
    data = Dataset(images, [describe(things) for things, _ in scenes])
    if split not in ("train", "val"):
        data.classes = [f"{colour} {shape}" for colour, shape in PAIRS]  # told apart from all pairs, not the held-out only
        data.labels = np.array([PAIRS.index(things[0][1:3]) for things, _ in scenes])
        data.templates = [f"a {size} {{}} at the {y} {x}" for size in SIZES for y in ("top", "bottom") for x in ("left", "right")]
    return data


def moving_shapes(split, size, count, seed=0, frames=16):
    """Generated clips of one thing that moves to the right or to the left within its corner.

    -> two Datasets of the same images (count, frames, 3, size, size): labelled by colour and shape, which any
    frame shows, and by direction, which no set of frames shows without their order.
    """
    clips, texts, pair, direction = [], [], [], []
    for i in tqdm(range(count), "drawing clips", leave=False):
        (thing,), rng = scene(seed, split, i)
        direction.append(rng.integers(2))
        path = np.linspace(-0.12, 0.12, frames) * (1 if direction[-1] else -1)
        clips.append(np.stack([draw([thing._replace(x=thing.x + dx)], rng, size) for dx in path]))
        texts.append(describe([thing]))
        pair.append(PAIRS.index(thing[1:3]))
    clips = np.stack(clips)
    return (Dataset(clips, texts, np.array(pair), [" ".join(pair) for pair in PAIRS]),
            Dataset(clips, texts, np.array(direction), ["to the left", "to the right"]))


def questions(size, count, seed=0):
    """Scenes of two things side by side, each with a question of one of three kinds in turn; the answer is the label.

    For each kind all answers are equally likely, and scenes are alike for all kinds: without the image nothing
    beats chance, and without the question not even that can be reached.
    """
    images, texts, answers = [], [], []
    for i in tqdm(range(count), "drawing questions", leave=False):
        rng = np.random.default_rng([seed, len(SPLITS), i])
        left, right = place(rng, [0, 1] if rng.integers(2) else [2, 3])
        shape, other = rng.permutation(list(SHAPES))[:2]
        left, right = left._replace(shape=shape), right._replace(shape=shape if rng.integers(2) else other)
        if i % 3 == 0:
            side, asked, beside = ("left", left, right) if rng.integers(2) else ("right", right, left)
            text, answer = f"what colour is the shape {side} of the {beside.shape}", asked.colour
        elif i % 3 == 1:
            present = rng.integers(2)
            pairs = [p for p in PAIRS if (p in (left[1:3], right[1:3])) == present and p[0] in (left.colour, right.colour)]
            colour, shape = pairs[rng.integers(len(pairs))]
            text, answer = f"is there a {colour} {shape}", ANSWERS[present]
        else:
            there = [left.shape, right.shape]
            kind = rng.choice(there if rng.random() < 2 / 3 else [shape for shape in SHAPES if shape not in there])
            text, answer = f"how many {kind}", str(there.count(kind))
        images.append(draw([left, right], rng, size))
        texts.append([text])
        answers.append(ANSWERS.index(answer))
    return Dataset(np.stack(images), texts, np.array(answers), ANSWERS)


def entailment(size, count, seed=0):
    """Scenes with a caption that holds (label 1) or has one property of one thing wrong (label 0)."""
    images, texts, holds = [], [], []
    for i in tqdm(range(count), "drawing captions", leave=False):
        rng = np.random.default_rng([seed, len(SPLITS) + 1, i])
        things = place(rng, rng.permutation(4)[:2])
        text = describe(things)[0]
        holds.append(rng.integers(2))
        while not holds[-1] and text in describe(things):
            k, wrong = rng.integers(2), place(rng, [rng.integers(4)])[0]
            field = rng.choice(["size", "colour", "shape", "place"])
            change = dict(x=wrong.x, y=wrong.y) if field == "place" else {field: getattr(wrong, field)}
            text = describe([thing._replace(**change) if j == k else thing for j, thing in enumerate(things)])[0]
        images.append(draw(things, rng, size))
        texts.append([text])
    return Dataset(np.stack(images), texts, np.array(holds), ["does not hold", "holds"])


# ------------------------------------------------------------------------------------------------
# cifar10, cifar100

TEMPLATES = [  # from the prompts CLIP uses for CIFAR
    "a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.", "a bad photo of a {}.",
    "a good photo of a {}.", "a photo of a small {}.", "a photo of a big {}.", "a photo of the {}."]
CIFAR = {
    "cifar10": dict(
        python="cifar-10-batches-py", binary="cifar-10-batches-bin", train=[f"data_batch_{i}" for i in range(1, 6)], val=["test_batch"],
        meta="batches.meta", names="label_names", text_meta="batches.meta.txt", labels="labels", label_bytes=1,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", md5="c58f30108f718f92721af3b95e74349a"),
    "cifar100": dict(
        python="cifar-100-python", binary="cifar-100-binary", train=["train"], val=["test"],
        meta="meta", names="fine_label_names", text_meta="fine_label_names.txt", labels="fine_labels", label_bytes=2,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", md5="eb9058c3a382ffc7106e4002c42a8d85"),
}


NAMES = ["shapes", *CIFAR, "coco", "captions"]  # what load() knows


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and nothing that could run code."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise DataError(f"it wants to run {f'{module}.{name}'!r}, which no CIFAR file does: delete it")
        return super().find_class(module, name)


def read_pickle(path):
    try:
        with open(path, "rb") as f:
            content = PlainUnpickler(f, encoding="latin1").load()
    except DataError as e:
        raise DataError(f"{path}: refused, {e}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; get it with --download") from None
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: truncated or corrupt ({type(e).__name__}); delete it and run again with --download") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a CIFAR batch (a {type(content).__name__}); delete it and run again with --download")
    return content


def read_cifar_batch(path, kind, classes):
    """-> images (n, 3, 32, 32) uint8, labels (n,)."""
    if path.suffix == ".bin":
        raw, row = np.fromfile(path, np.uint8), kind["label_bytes"] + 3072
        if not len(raw) or len(raw) % row:
            raise DataError(f"{path}: truncated or corrupt ({len(raw):,} bytes are not rows of {row}); get it again")
        raw = raw.reshape(-1, row)
        images, labels = raw[:, -3072:], raw[:, -3073]  # in CIFAR-100 the fine label is the second
    else:
        batch = read_pickle(path)
        images, labels = batch.get("data"), batch.get(kind["labels"])
    good = (isinstance(images, np.ndarray) and images.dtype == np.uint8 and isinstance(labels, (list, np.ndarray)) and len(labels)
            and images.shape == (len(labels), 3072) and all(isinstance(label, (int, np.integer)) for label in labels))
    if not good:
        raise DataError(f"{path}: truncated or corrupt (no {kind['labels']!r} and 3072 bytes for each image); get it again")
    labels = np.array(labels, np.int64)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{path}: labels {labels.min()} to {labels.max()} but {len(classes)} class names; get it again")
    return images.reshape(-1, 3, 32, 32), labels


def cifar(name, data_dir, split, size, download):
    kind = CIFAR[name]
    if download:
        fetch(kind["url"], kind["md5"], data_dir)
    places = [(data_dir / kind["python"], ""), (data_dir, ""), (data_dir / kind["binary"], ".bin"), (data_dir, ".bin")]
    for root, suffix in places:  # DIR may be the folder itself or the one that holds it
        found = [path for f in kind[split] if (path := root / (f + suffix)).is_file()]
        if found:
            break
    else:
        wanted = data_dir / kind["python"] / kind[split][0]
        raise DataError(f"{wanted}: no such file; give the folder that holds it as --data-dir, or add --download")
    if len(found) < len(kind[split]):
        note(f"{len(found)} of {len(kind[split])} {split} batches of {name} are in {root}; using those")
    meta = root / (kind["text_meta"] if suffix else kind["meta"])
    classes = read_text(meta, "unpack the archive again").split() if suffix else read_pickle(meta).get(kind["names"])
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{meta}: no class names in it; get it again")
    parts = [read_cifar_batch(path, kind, classes) for path in found]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    classes = [name.replace("_", " ") for name in classes]
    texts = [[template.format(name) for template in TEMPLATES] for name in classes]
    if size != 32:
        images = np.concatenate([resize(part, size) for part in np.array_split(images, max(1, len(images) // 1000))])
    return Dataset(images, [texts[label] for label in labels], labels, classes, TEMPLATES, augment=True)


def resize(images, size):
    """images (N, 3, H, W) uint8 -> (N, 3, size, size): the square in the middle."""
    H, W = images.shape[2:]
    top, left, side = max(0, H - W) // 2, max(0, W - H) // 2, min(H, W)
    images = torch.from_numpy(np.ascontiguousarray(images[:, :, top:top + side, left:left + side]))
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True).numpy()


def fetch(url, md5, folder):
    """Downloads an archive over https (going on where an earlier try stopped), checks its md5, unpacks it in folder."""
    archive = folder / url.rsplit("/", 1)[1]
    part = archive.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as reply:
                resumed = reply.status == 206  # the server may also send it all
                total = int(reply.headers.get("Content-Length", 0)) + have * resumed
                with open(part, "ab" if resumed else "wb") as f, tqdm(
                        desc=f"downloading {archive.name}", total=total, initial=have * resumed, unit="B", unit_scale=True) as bar:
                    while block := reply.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            if part.stat().st_size < total:  # http.client's read(n) returns b"" then, without an error
                raise OSError("the connection ended early")
            os.replace(part, archive)
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) != 416:
            raise DataError(f"{url}: download failed ({e}); run the same command again to go on from where it stopped") from None
        os.replace(part, archive)  # nothing follows what we have: it is all there
    if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{archive}: wrong md5, not {md5}; delete it and run again with --download")
    if not hasattr(tarfile, "data_filter"):
        raise DataError("this Python cannot unpack archives safely; update to 3.10.12, 3.11.4 or newer")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # no links, devices or paths that lead outside
    except (tarfile.TarError, OSError, EOFError) as e:
        raise DataError(f"{archive}: could not be unpacked ({e}); delete it and run again with --download") from None


# ------------------------------------------------------------------------------------------------
# coco, captions: images in files


def pillow(path):
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError(f"{path}: reading image files needs Pillow; run: pip install pillow") from None
    return Image, ImageOps


def read_image(path, size):
    """Image file -> (3, size, size) uint8: centre crop to a square, any colour mode made RGB."""
    Image, ImageOps = pillow(path)
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))  # JPEG only: decode at the smallest scale that suffices
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel; convert() would cut at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        raise DataError(f"{path}: not a readable image ({e})") from None


def cached_images(paths, size, name):
    """Decodes image files once -> (M, 3, size, size) uint8 memory map, and the indices of the paths it holds.

    The map lies in ~/.cache/coca (or $COCA_CACHE), beside a fingerprint of the files it was made from:
    another name, size or date of any of them, and it is made anew. Unreadable files are named and left out.
    """
    made_from = json.dumps([size, [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]])
    fingerprint = hashlib.sha256(made_from.encode()).hexdigest()
    folder = Path(os.environ.get("COCA_CACHE") or Path.home() / ".cache" / "coca")
    array_file, info_file = (folder / f"{name}-{size}px-{fingerprint[:16]}.{end}" for end in ("npy", "json"))
    try:
        info = json.loads(info_file.read_text())
        if info["fingerprint"] == fingerprint:
            return np.load(array_file, mmap_mode="r")[:len(info["kept"])], info["kept"]
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or cut off: make it
    pillow(paths[0])
    temporary, kept = array_file.with_suffix(f".{os.getpid()}.tmp"), []

    def decode(path):
        try:
            return read_image(path, size)
        except DataError as e:
            return e

    try:
        folder.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(paths), 3, size, size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside Python's lock
            for i, image in enumerate(tqdm(pool.map(decode, paths), f"decoding {name}", len(paths), leave=False)):
                if isinstance(image, DataError):
                    note(f"{image}: skipped")
                else:
                    array[len(kept)] = image
                    kept.append(i)
        del array
        failed = len(paths) - len(kept)
        if failed > 0.01 * len(paths):
            raise DataError(f"{paths[0].parent}: {failed} of {len(paths)} images cannot be read; replace or remove the files named above")
        if failed:
            note(f"{failed} of {len(paths)} images skipped")
        os.replace(temporary, array_file)
        info_file.write_text(json.dumps({"fingerprint": fingerprint, "kept": kept}))
    except OSError as e:
        raise DataError(f"{folder}: cannot keep the decoded images there ({e}); set COCA_CACHE to a folder that can be written") from None
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(array_file, mmap_mode="r")[:len(kept)], kept


def captioned_images(texts, size, subset, name, source):
    """texts: {path: [caption, ...]} -> Dataset. source: the file that named the paths, for messages."""
    empty = sum(not text.strip() for captions in texts.values() for text in captions)
    if empty:
        note(f"{source}: {empty} empty captions skipped")
    texts = {path: captions for path in texts if (captions := [text for text in texts[path] if text.strip()])}
    paths = take(sorted(texts), subset, source)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{source}: {len(missing)} of the {len(paths)} images it names are not there, first {missing[0]}; "
                        "get them or take them out of the file")
    images, kept = cached_images(paths, size, name)
    return Dataset(images, [texts[paths[i]] for i in kept], augment=True)


def chosen(data, rows):
    """Dataset of these images only."""
    labels = None if data.labels is None else data.labels[rows]
    return dataclasses.replace(data, images=data.images[rows], captions=[data.captions[i] for i in rows], labels=labels)


def take(items, subset, source):
    """The same `subset` of the items every time (0 = all), in order."""
    if subset > len(items):
        raise DataError(f"{source}: --subset {subset} asked for, but there are {len(items)}; ask for fewer")
    if not len(items):
        raise DataError(f"{source}: no images with captions; check the file")
    return [items[i] for i in np.sort(np.random.default_rng(0).permutation(len(items))[:subset or None])]


def read_text(path, what):
    try:
        return path.read_text(encoding="utf-8-sig")  # a spreadsheet's byte order mark is no part of a column name
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {what}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({e}); {what}") from None


def coco(data_dir, split, size, subset):
    for year in ("2017", "2014"):
        annotations, folder = data_dir / "annotations" / f"captions_{split}{year}.json", data_dir / f"{split}{year}"
        if annotations.exists():
            break
    else:
        annotations = data_dir / "annotations" / f"captions_{split}2017.json"
    text = read_text(annotations, "--data-dir must hold COCO's annotations/, train2017/ and val2017/ (or 2014)")
    texts = {}
    try:
        content = json.loads(text)
        paths = {image["id"]: folder / image["file_name"] for image in content["images"]}
        for annotation in content["annotations"]:
            texts.setdefault(paths[annotation["image_id"]], []).append(str(annotation["caption"]))
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise DataError(f"{annotations}: not COCO captions ({type(e).__name__}: {e}); unpack it again") from None
    return captioned_images(texts, size, subset, f"coco-{split}", annotations)


def captions(data_dir, split, size, subset):
    tables = [data_dir / "captions.txt", *sorted(data_dir.glob("*.csv"))]
    table = next((path for path in tables if path.exists()), tables[0])
    text = read_text(table, "--data-dir must hold captions.txt or a .csv with columns image,caption")
    rows = csv.DictReader(io.StringIO(text), strict=True)
    if not {"image", "caption"} <= set(rows.fieldnames or ()):
        raise DataError(f"{table}: the first line must name the columns image and caption, it names {rows.fieldnames}")
    folder = next((data_dir / name for name in ("Images", "images") if (data_dir / name).is_dir()), data_dir)
    texts = {}
    try:
        for row in rows:
            if None in row or "\n" in (row["image"] or ""):
                raise csv.Error("too many columns, or a name of two lines")
            texts.setdefault(folder / (row["image"] or "").strip(), []).append(row["caption"] or "")
    except csv.Error as e:
        raise DataError(f"{table}: line {rows.line_num} is not CSV ({e}); quote captions that hold commas or quotes") from None
    held = held_out(texts)
    texts = {path: texts[path] for path in texts if (path in held) == (split == "val")}
    return captioned_images(texts, size, subset, f"captions-{split}", table)


def held_out(paths):
    """About one path in ten, by a hash of its name, for evaluation: adding files moves none across."""
    digest = {path: hashlib.sha256(path.name.encode()).digest() for path in paths}
    return {path for path in paths if digest[path][0] < 26} or {min(paths, key=digest.get, default=None)}


def sample_frames(count, frames):
    """Indices of that many of `count` frames, uniformly from the first to the last; fewer are repeated."""
    return np.linspace(0, count - 1, frames).round().astype(int)


def own_clips(data_dir, size, frames):
    """A folder per class, in it a clip each as a folder of frames (image files, in the order of their names) or an array
    file .npy (count, height, width, 3) uint8 -> training and evaluation Datasets, images (N, frames, 3, size, size)."""
    classes = sorted(path.name for path in Path(data_dir).glob("*/"))
    paths = [path for name in classes for path in sorted((Path(data_dir) / name).iterdir()) if path.is_dir() or path.suffix == ".npy"]
    if len(classes) < 2 or not paths:
        raise DataError(f"{data_dir}: {len(classes)} classes and {len(paths)} clips; give a folder with a folder of clips for each class")
    clips = np.empty((len(paths), frames, 3, size, size), np.uint8)
    for n, path in enumerate(tqdm(paths, "reading clips", leave=False)):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.is_file())
        else:
            try:
                found = np.load(path, allow_pickle=False, mmap_mode="r")
            except (OSError, ValueError, EOFError) as e:
                raise DataError(f"{path}: not a readable array ({e}); save it with numpy.save") from None
            if found.ndim != 4 or found.shape[-1] != 3 or found.dtype != np.uint8:
                raise DataError(f"{path}: {found.dtype} of shape {found.shape}; a clip is uint8 (count, height, width, 3)")
        if not len(found):
            raise DataError(f"{path}: a clip without frames; put images into it or remove it")
        for i, k in enumerate(sample_frames(len(found), frames)):
            clips[n, i] = read_image(found[k], size) if path.is_dir() else resize(found[k].transpose(2, 0, 1)[None], size)[0]
    labels, apart = np.array([classes.index(path.parent.name) for path in paths]), held_out(paths)
    held = np.array([path in apart for path in paths])
    return tuple(Dataset(clips[rows], [[]] * rows.sum(), labels[rows], classes) for rows in (~held, held))


def load(name, data_dir=None, split="train", size=32, subset=0, seed=0, download=False):
    """-> Dataset. split: "train", "val"; where there are classes also "zeroshot" and, to learn them, "labelled" and
    "labelled-val". size: pixels a side.

    subset: that many training images, the same every time, 0 = all. seed: of the generated scenes.
    """
    if name == "shapes":
        return shapes(split, size, subset, seed)
    if not data_dir:
        raise DataError(f"--data {name} needs --data-dir, the folder of its files")
    data_dir, subset = Path(data_dir), subset if split == "train" else 0
    if name in CIFAR:
        data = cifar(name, data_dir, "train" if split in ("train", "labelled") else "val", size, download)
        return chosen(data, take(np.arange(len(data)), subset, data_dir)) if subset else data
    if download:
        raise DataError(f"--download fetches CIFAR only; get {name} yourself (README, Data)")
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; give the one that holds your {name} data as --data-dir")
    return {"coco": coco, "captions": captions}[name](data_dir, split, size, subset)


# ------------------------------------------------------------------------------------------------
# De-duplication (Sec. 4.1): no near-copy of an evaluation image may be trained on

THRESHOLD = 0.955  # of the cosine of two thumbnails; python data.py dedup --curve shows why


def thumbnails(images):
    """images (N, 3, H, W) uint8 -> (N, 192) 8 x 8 pixels without mean and contrast: brightness and re-encoding change little."""
    parts = []
    for i in range(0, len(images), 2000):
        x = torch.from_numpy(np.ascontiguousarray(images[i:i + 2000])).float()
        x = F.interpolate(x, size=(8, 8), mode="area").flatten(1)       # (n, 192)
        parts.append(F.normalize(x - x.mean(1, keepdim=True)))
    return torch.cat(parts).numpy()


def slight_crops(images, mirrored):
    """The images themselves, then 13 crops of 95 and 90 % of their sides: a cropped copy is near one of them."""
    S = images.shape[-1]
    for share, places in ((1, [0]), (0.95, [0, 1]), (0.9, [0, 0.5, 1])):
        side = round(share * S)
        for top in places:
            for left in places:
                crop = images[:, :, round(top * (S - side)):, round(left * (S - side)):][:, :, :side, :side]
                yield from [crop, crop[..., ::-1]][:1 + mirrored]


def near_duplicates(images, evaluation, threshold=THRESHOLD, mirrored=False):
    """Near-copies in images (N, 3, S, S) of evaluation images (M, 3, S', S') -> which one each is nearest to (N,), -1 = it is
    no copy; the similarity (N,); which of the evaluation images have a copy (M,).

    Only images in one bucket are compared: in 16 tables, the side of each of some random planes is a bit of the bucket's
    number. As many planes as keep buckets small: time grows with the number of images, not of pairs.
    """
    mine, M = thumbnails(images), len(evaluation)
    probes = np.concatenate([thumbnails(crop) for crop in slight_crops(evaluation, mirrored)])  # (14 M, 192)
    bits = int(np.log2(len(mine) + len(probes))) + 3
    # whitened first: all pictures have much in common (sky above, ground below), which must not decide their bucket
    values, vectors = np.linalg.eigh(np.cov(np.concatenate([mine, probes[:M]]).T))
    planes = vectors[:, -32:] / np.sqrt(values[-32:].clip(1e-6)) @ np.random.default_rng(0).standard_normal((32, 16 * bits))

    def buckets(x):
        sides = [part @ planes.astype(np.float32) > 0 for part in np.array_split(x, len(x) // 20_000 + 1)]
        return np.concatenate(sides).reshape(len(x), 16, bits) @ (1 << np.arange(bits))  # (len(x), 16)

    which, similarity, copied = np.full(len(mine), -1), np.zeros(len(mine)), np.zeros(M, bool)
    for own, others in zip(tqdm(buckets(mine).T, "looking for duplicates", leave=False), buckets(probes).T):
        order = others.argsort(kind="stable")
        sorted_others = others[order]
        first, end = (np.searchsorted(sorted_others, own, side) for side in ("left", "right"))
        count = (end - first).clip(max=200)  # a bucket of hundreds holds copies of one image: some of them do
        for rows in np.array_split(np.arange(len(mine)), count.sum() // 1_000_000 + 1):
            n = count[rows]
            i, within = np.repeat(rows, n), np.arange(n.sum()) - np.repeat(n.cumsum() - n, n)
            j = order[np.repeat(first[rows], n) + within]
            cosine = np.einsum("nd,nd->n", mine[i], probes[j])
            near = np.flatnonzero(cosine > threshold)
            copied[j[near] % M] = True
            near = near[cosine[near] > similarity[i[near]]]
            near = near[cosine[near].argsort(kind="stable")]  # the nearest is written last
            which[i[near]], similarity[i[near]] = j[near] % M, cosine[near]
    return which, similarity, copied


def without_duplicates(data, evaluation, mirrored=False):
    """data without the near-duplicates of the evaluation images; says how many. DataError if nothing is left."""
    which, _, copied = near_duplicates(data.images, evaluation.images, mirrored=mirrored)
    kept = np.flatnonzero(which < 0)
    note(f"{len(data) - len(kept):,} of {len(data):,} training images removed, near-duplicates of {copied.sum():,} "
         f"of {len(evaluation):,} evaluation images")
    if not len(kept):
        raise DataError("every training image is a near-duplicate of an evaluation image; give other data")
    return chosen(data, kept)


def plant_copies(images, rng):
    """Images (N, 3, S, S) as their copies are found in the wild -> {kind: (N, 3, S, S)}."""
    Image, _ = pillow("planted copies")
    S = images.shape[-1]

    def jpeg(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return Image.open(file)

    def crop(image):
        side = round(S * rng.uniform(0.88, 1))
        left, top = rng.integers(0, S - side + 1, 2)
        return image.crop((left, top, left + side, top + side)).resize((S, S), Image.Resampling.BICUBIC)

    def brightness(image):
        contrast, shift = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
        return image.point(lambda value: contrast * value + shift)

    kinds = {"re-encoded": jpeg, "resized": lambda image: image.resize((S * 3 // 4,) * 2).resize((S, S)), "cropped": crop,
             "brightness": brightness, "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    return {name: np.stack([np.asarray(change(Image.fromarray(x.transpose(1, 2, 0)))).transpose(2, 0, 1) for x in images])
            for name, change in kinds.items()}


def dedup_curve(data, evaluation, mirrored):
    """Prints recall of planted copies, precision, and how seconds grow with the number of images."""
    planted = plant_copies(evaluation.images[:1000], np.random.default_rng(0))
    n = len(planted["mirrored"])
    images = np.concatenate([data.images, *planted.values()])
    which, similarity, _ = near_duplicates(images, evaluation.images, 0.9, mirrored)
    right = which[len(data):].reshape(-1, n) == np.arange(n)
    print("threshold  precision  recall: " + "  ".join(planted))
    for threshold in (0.9, 0.92, 0.94, 0.95, 0.955, 0.96, 0.97, 0.98, 0.99):
        found = similarity > threshold
        hits = right & found[len(data):].reshape(-1, n)
        print(f"{threshold:9} {hits.sum() / found.sum():10.1%}" + " " * 10 + " ".join(f"{recall:10.1%}" for recall in hits.mean(1)))
    print("(precision: other training images found count as wrong, though some are real copies)")
    many = np.concatenate([data.images, data.images[..., ::-1], data.images[:, :, ::-1]])  # mirrored, upside down: other images
    for N in (6250, 12_500, 25_000, 50_000):
        if N <= len(many):
            began = time.perf_counter()
            near_duplicates(many[:N], evaluation.images, mirrored=mirrored)
            print(f"{N:6,} images against {len(evaluation):,}: {time.perf_counter() - began:.1f} s")


def main(argv=None):
    p = argparse.ArgumentParser(description="Near-duplicates of the evaluation images in the training images (Sec. 4.1)",
                                usage="python data.py dedup --data NAME --data-dir DIR [options]")
    p.add_argument("command", choices=["dedup"])
    p.add_argument("--data", choices=NAMES, default="shapes")
    p.add_argument("--data-dir")
    p.add_argument("--size", type=int, default=32, help="pixels a side (default: 32)")
    p.add_argument("--mirrored", action="store_true", help="mirror images count as copies")
    p.add_argument("--threshold", type=float, default=THRESHOLD, help=f"least cosine of thumbnails (default: {THRESHOLD})")
    p.add_argument("--show", metavar="FILE.png", help="write the 48 likest pairs there: training image, evaluation image")
    p.add_argument("--curve", action="store_true", help="plant copies instead: precision, recall and seconds")
    args = p.parse_args(argv)
    if args.show and Path(args.show).exists():
        raise DataError(f"{args.show}: is there already; delete it or give another --show")
    data, evaluation = (load(args.data, args.data_dir, split, args.size) for split in ("train", "val"))
    if args.curve:
        return dedup_curve(data, evaluation, args.mirrored)
    which, similarity, copied = near_duplicates(data.images, evaluation.images, args.threshold, args.mirrored)
    print(f"{(which >= 0).sum():,} of {len(data):,} training images are near-duplicates "
          f"of {copied.sum():,} of {len(evaluation):,} evaluation images")
    likest = similarity.argsort(kind="stable")[::-1][:48]
    likest = likest[which[likest] >= 0]
    for i in likest[:10]:
        print(f"{similarity[i]:.3f}  train {i}: {data.captions[i][0]}  |  evaluation {which[i]}: {evaluation.captions[which[i]][0]}")
    if args.show and len(likest):
        pairs = np.concatenate([data.images[likest], evaluation.images[which[likest]]], 3)  # (n, 3, S, 2 S)
        pairs = np.pad(pairs, ((0, -len(pairs) % 6), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 3, 1)
        sheet = np.concatenate([np.concatenate(list(line), 1) for line in pairs.reshape(-1, 6, *pairs.shape[1:])])
        pillow(args.show)[0].fromarray(sheet).resize((3 * sheet.shape[1], 3 * sheet.shape[0])).save(args.show)


# ------------------------------------------------------------------------------------------------
# Text and batches


class Tokenizer:
    """Words and punctuation marks, lower-cased; learned from captions. (The paper: SentencePiece, 64,000.)"""

    pattern = re.compile(r"['’]?\w+|[^\w\s]")  # "man's" -> man 's

    def __init__(self, words):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def learn(cls, texts, max_size):
        """The commonest max_size - 4 words of the texts, ties in alphabetical order."""
        counts = Counter(word for text in texts for word in cls.pattern.findall(text.lower()))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(["<pad>", "<begin>", "<end>", "<unk>", *ranked[:max_size - 4]])

    def __len__(self):
        return len(self.words)

    def encode(self, texts, text_len):
        """texts -> tokens (len(texts), longest) int64, cut to text_len with BEGIN and END; PAD at the right."""
        rows = [[self.index.get(word, UNKNOWN) for word in self.pattern.findall(text.lower())] for text in texts]
        rows = [[BEGIN, *row[:text_len - 2], END] for row in rows]
        tokens = np.full((len(rows), max(map(len, rows), default=0)), PAD, np.int64)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = row
        return torch.from_numpy(tokens)

    def decode(self, tokens):
        """tokens (L,) -> text up to END, readable: punctuation and 's joined to the word before."""
        words = []
        for i in map(int, tokens):
            if i == END:
                break
            if i not in (PAD, BEGIN):
                words.append(self.words[i])
        return re.sub(r" (['’]\w+|[.,;:!?%)])", r"\1", " ".join(words))


def to_model(images):
    """uint8 -> float in [-1, 1], what CoCa takes."""
    return images.float() / 127.5 - 1


class Batches:
    """Training batches by number: step -> images (B, 3, S, S) float, tokens (B, L). Nothing to replay on resume.

    Every epoch has its own order and its own caption of each image; the last, short batch is dropped.
    own: which rows of each batch, where processes share it. Bytes go to the device, and are cropped and scaled there.
    """

    def __init__(self, data, tokenizer, text_len, batch_size, seed=0, own=slice(None), device="cpu"):
        if batch_size > len(data):
            raise DataError(f"--batch-size {batch_size} is more than the {len(data)} training images; give a smaller one")
        self.data, self.batch_size, self.seed, self.own, self.device = data, batch_size, seed, own, device
        self.per_epoch = len(data) // batch_size
        unique = {text: i for i, text in enumerate(dict.fromkeys(t for texts in data.captions for t in texts))}
        self.tokens = tokenizer.encode(unique, text_len)                # (texts, L)
        self.lengths = (self.tokens != PAD).sum(1).numpy()              # (texts,)
        cut = sum(len(tokenizer.pattern.findall(text)) > text_len - 2 for text in unique)
        if cut:
            note(f"{cut} captions cut to {text_len - 2} words")
        self.choices = [[unique[text] for text in texts] for texts in data.captions]
        self.sides = torch.tensor([tokenizer.index.get(word, -1) for word in ("left", "right")])
        self.epoch = None

    def __call__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, rng = epoch, np.random.default_rng([self.seed, 0, epoch])
            self.order = rng.permutation(len(self.data))
            self.draw = rng.random(self.per_epoch)  # one for a whole batch: with prompts, equal classes get equal texts
        rows = self.order[at * self.batch_size:][:self.batch_size]
        drawn = np.array([self.choices[i][int(self.draw[at] * len(self.choices[i]))] for i in rows])
        by_length = np.argsort(self.lengths[drawn], kind="stable")  # parts of a batch then need less padding
        rows, drawn = rows[by_length][self.own], drawn[by_length][self.own]
        tokens = self.tokens[drawn, :self.lengths[drawn[-1]]]           # (B, L), no longer than the longest
        images = torch.from_numpy(self.data.images[rows]).to(self.device)  # (B, 3, S, S) uint8
        if self.data.augment:
            rng, by = np.random.default_rng([self.seed, 1, step]), images.shape[-1] // 8
            shift = torch.from_numpy(rng.integers(0, 2 * by + 1, (2, self.batch_size)))[:, self.own]
            flip = torch.from_numpy(rng.random(self.batch_size) < 0.5)[self.own]
            flip &= ~torch.isin(tokens, self.sides).any(1)  # a mirrored picture would make "left" a lie
            images = crop_and_flip(images, by, shift, flip)
        return to_model(images), tokens.to(self.device)


def crop_and_flip(images, by, shift, flip):
    """Pads images (B, 3, S, S) by `by` pixels, crops each at shift (2, B) rows and columns, mirrors where flip (B,)."""
    B, _, S, _ = images.shape
    rows = columns = torch.arange(S).expand(B, S)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    rows, columns = rows + shift[0, :, None], columns + shift[1, :, None]  # (B, S) of the padded image
    b, y, x = (i.to(images.device) for i in (torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None]))
    return F.pad(images, (by, by, by, by), value=128)[b, :, y, x].permute(0, 3, 1, 2)  # (B, 3, S, S)


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
