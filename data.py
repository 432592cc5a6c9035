"""Data for CoCa: generated scenes, CIFAR, COCO and your own captioned images, all as one `Dataset`.

    load("shapes")                generated, nothing to download: what train.py uses by itself
    load("cifar10", "DIR")        or cifar100; the official python files in DIR
    load("coco", "DIR")           DIR/annotations/captions_train2014.json, DIR/train2014/, val2014 (or 2017)
    load("captions", "DIR")       DIR/captions.txt or a .csv: image,caption; images in DIR/Images or DIR

Whatever is wrong with a file is a UserError of one line: what, where, and what to do.
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
import shutil
import sys
import tarfile
import unicodedata
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


class UserError(Exception):
    """Something that the user can put right: one line that says what, where, and what to do."""


def note(text):
    if os.environ.get("RANK", "0") == "0":  # several processes say it once
        tqdm.write(f"note: {text}", file=sys.stderr)  # above a progress bar, not into it


def pillow():
    """Pillow's Image module: imported only where pictures are read or written."""
    try:
        from PIL import Image
        return Image
    except ImportError:
        raise UserError("pictures need Pillow; run: pip install pillow") from None


def new_file(path):
    """For argparse: the path, if a new file can be made there. It is tried before the work."""
    try:
        open(path, "x").close()
        os.remove(path)
    except FileExistsError:
        raise argparse.ArgumentTypeError(f"{path} is there already; give another name") from None
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{path} cannot be made ({e.strerror}); give another") from None
    return path


# ------------------------------------------------------------------------------------------------
# What everybody needs: Dataset, load, Tokenizer, Batches


@dataclass
class Dataset:
    """Images with their texts. A caption never leaves its image, whatever the split."""

    images: np.ndarray  # (N, 3, S, S) uint8, in memory or memory-mapped
    captions: list  # N lists of texts; training draws one of them, evaluation uses all
    labels: np.ndarray = None  # (N,) class of each image, where there are classes
    classes: list = field(default_factory=list)  # their names
    templates: list = field(default_factory=list)  # prompts for the names: "a photo of a {}."
    names: list = field(default_factory=list)  # N file names, where images are files
    augment: bool = False  # crop and flip in training

    def __len__(self):
        return len(self.images)


def select(data, rows):
    """Dataset of these images only."""
    captions = [data.captions[i] for i in rows]
    labels = None if data.labels is None else data.labels[rows]
    return dataclasses.replace(data, images=data.images[rows], captions=captions, labels=labels,
                               names=[data.names[i] for i in rows] if data.names else [])


def fingerprint(data):
    """What a run remembers of its data: how many images, and a hash of their names and captions."""
    text = json.dumps([data.names, data.captions])
    return f"{len(data)} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


NAMES = ["shapes", "cifar10", "cifar100", "coco", "captions"]


def load(name, data_dir=None, split="train", size=32, subset=0, seed=0, download=False,
         val_from_train=0):
    """-> Dataset of images of size x size pixels.

    split: "train" or "val"; where there are classes also "zeroshot" and, to learn them, "labelled"
    and "labelled-val". subset: that many training images, the same every time, 0 = all.
    seed: of generated scenes. val_from_train: keep that many training images apart, and let them
    stand for the evaluation images.
    """
    if name == "shapes" and not (val_from_train and split in ("train", "val")):
        return shapes(split, size, seed, subset)
    learned_from = split in ("train", "labelled")
    part = "train" if learned_from or val_from_train else "val"  # where the images are
    if name == "shapes":
        data = shapes(part, size, seed)
        return select(data, pick(len(data), split, subset, val_from_train))
    if not data_dir:
        raise UserError(f"--data {name} needs --data-dir, the folder of its files")
    data_dir = Path(data_dir)
    if name in CIFAR:
        data = cifar(name, data_dir, part, size, download)
        return select(data, pick(len(data), split, subset, val_from_train))
    if download:
        raise UserError(f"--download fetches CIFAR only; get {name} yourself, and give "
                        "its folder as --data-dir")
    if not os.path.isdir(data_dir):
        raise UserError(f"{data_dir}: no such folder; --data-dir must hold your {name} data")
    read = coco if name == "coco" else captions_file
    captions, source = read(data_dir, part)  # {path: [caption, ...]}
    if not captions:
        raise UserError(f"{source}: no images with captions; check the file")
    paths = sorted(captions)
    paths = [paths[i] for i in pick(len(paths), split, subset, val_from_train)]
    return captioned_images(paths, captions, size, f"{name}-{part}", source, data_dir)


def pick(count, split, subset, val_from_train):
    """Which of `count` images a split has, the same every time, in order."""
    rows = np.arange(count)
    if val_from_train >= count:
        raise UserError(f"--val-from-train {val_from_train}, but there are {count} images; "
                        "ask for fewer")
    if val_from_train:
        order = np.random.default_rng(1).permutation(count)
        learned_from = split in ("train", "labelled")
        rows = np.sort(order[val_from_train:] if learned_from else order[:val_from_train])
    if subset and split == "train":
        if subset > len(rows):
            raise UserError(f"--subset {subset}, but there are {len(rows)} images; ask for fewer")
        order = np.random.default_rng(0).permutation(len(rows))
        rows = rows[np.sort(order[:subset])]
    return rows


CHARACTERS = map(chr, range(0x300, 0xFE30))
MARKS = "".join(c for c in CHARACTERS if unicodedata.category(c).startswith("M"))
# Numbers like 3.5; words with their accents and vowel signs, "man's" as man 's; punctuation
WORD = re.compile(rf"\d+(?:[.,]\d+)+|['’]?[\w{MARKS}]+|[^\w\s]")


def words(text):
    """Text -> its words and punctuation marks, lower-cased."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def is_cut(text, text_len):
    """Is the text too long for text_len tokens, BEGIN and END among them?"""
    return len(words(text)) > text_len - 2


class Tokenizer:
    """Numbers for words, learned from captions. (The paper: SentencePiece, 64,000 pieces.)"""

    def __init__(self, words):
        self.words = list(words)
        self.index = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def learn(cls, texts, max_size):
        """The commonest max_size - 4 words of the texts, ties in alphabetical order."""
        counts = Counter()
        for text in texts:
            counts.update(words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(["<pad>", "<begin>", "<end>", "<unk>", *ranked[:max_size - 4]])

    def __len__(self):
        return len(self.words)

    def encode(self, texts, text_len):
        """texts -> tokens (len(texts), longest) int64: BEGIN words END, PAD at the right.

        What is longer than text_len is cut but still gets its END, so a model learns to end there.
        """
        rows = []
        for text in texts:
            ids = [self.index.get(word, UNKNOWN) for word in words(text)]
            rows.append([BEGIN, *ids[:text_len - 2], END])
        tokens = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
        for i, row in enumerate(rows):
            tokens[i, :len(row)] = torch.tensor(row)
        return tokens

    def decode(self, tokens):
        """tokens (L,) -> text up to END, readable: punctuation and 's joined to the word before."""
        found = []
        for i in map(int, tokens):
            if i == END:
                break
            if i not in (PAD, BEGIN):
                found.append(self.words[i])
        return re.sub(r" (['’]\w+|[.,;:!?%)])", r"\1", " ".join(found))


def to_model(images):
    """uint8 -> float in [-1, 1], what CoCa takes."""
    return images.float() / 127.5 - 1


class Batches:
    """Training batches by number: step -> images (B, 3, S, S) float, tokens (B, L).

    Every epoch has its own order; the last, short batch is dropped. Each batch draws anew which of
    its captions an image has. It depends on its number alone: nothing to replay on resume.
    own: which rows of each batch, where processes share it.
    """

    def __init__(self, data, tokenizer, text_len, batch_size, seed=0, own=slice(None),
                 device="cpu"):
        if batch_size > len(data):
            raise UserError(f"--batch-size {batch_size} is more than the {len(data)} training "
                            "images; give a smaller one")
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.own = own
        self.device = device
        self.per_epoch = len(data) // batch_size
        rows = {}  # text -> its row in self.tokens
        self.choices = []  # for each image the rows of its captions
        for texts in data.captions:
            self.choices.append([rows.setdefault(text, len(rows)) for text in texts])
        self.tokens = tokenizer.encode(rows, text_len)                  # (texts, L)
        cut = sum(is_cut(text, text_len) for text in rows)
        if cut:
            note(f"{cut} captions cut to {text_len - 2} words")
        self.sides = torch.tensor([tokenizer.index.get(word, -1) for word in ("left", "right")])
        self.epoch = None

    def __call__(self, step):
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            rng = np.random.default_rng([self.seed, 0, epoch])
            self.order = rng.permutation(len(self.data))
            self.draw = rng.random(self.per_epoch)  # one a batch: equal classes get equal prompts
        rows = self.order[batch * self.batch_size:][:self.batch_size][self.own]
        drawn = [self.choices[i][int(self.draw[batch] * len(self.choices[i]))] for i in rows]
        tokens = self.tokens[drawn]                                     # (B, L)
        longest = (tokens != PAD).sum(1).max()
        images = self.data.images[rows]                                 # (B, 3, S, S) uint8
        if self.data.augment:
            rng = np.random.default_rng([self.seed, 1, step])
            border = images.shape[-1] // 8
            corner = rng.integers(0, 2 * border + 1, (self.batch_size, 2))[self.own]
            flip = (rng.random(self.batch_size) < 0.5)[self.own]
            flip &= ~torch.isin(tokens, self.sides).any(1).numpy()  # "left" must stay true
            images = crop_and_flip(images, border, corner, flip)
        images = torch.from_numpy(images).to(self.device)
        return to_model(images), tokens[:, :longest].to(self.device)


def crop_and_flip(images, border, corner, flip):
    """images (B, 3, S, S) and a grey border, cropped at corner (B, 2), mirrored where flip (B,)."""
    S = images.shape[-1]
    sides = (border, border)
    padded = np.pad(images, ((0, 0), (0, 0), sides, sides), constant_values=128)
    changed = np.empty_like(images)
    for i, (top, left) in enumerate(corner):
        crop = padded[i, :, top:top + S, left:left + S]
        changed[i] = crop[..., ::-1] if flip[i] else crop
    return changed


# ------------------------------------------------------------------------------------------------
# shapes: generated scenes

COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (60, 90, 250),
           "yellow": (240, 220, 50), "purple": (170, 60, 220), "white": (245, 245, 245),
           "orange": (245, 140, 30), "cyan": (60, 215, 230)}


def plus(x, y, r):
    upright = np.maximum(3 * abs(x), abs(y))
    lying = np.maximum(abs(x), 3 * abs(y))
    return np.minimum(upright, lying)


SHAPES = {  # below the radius r = inside; x to the right, y downwards, from the centre
    "circle": lambda x, y, r: np.hypot(x, y),
    "square": lambda x, y, r: 1.15 * np.maximum(abs(x), abs(y)),
    "triangle": lambda x, y, r: np.maximum(1.2 * y, 1.2 * abs(x) - 0.65 * y + 0.25 * r),
    "bar": lambda x, y, r: np.maximum(abs(x), 2.5 * abs(y)),
    "cross": plus,
    "ring": lambda x, y, r: 3.2 * abs(np.hypot(x, y) - 0.7 * r),
}
RADII = {"small": 0.15, "large": 0.22}  # in image sides
CORNERS = ["top left", "top right", "bottom left", "bottom right"]
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = list(zip(COLOURS, SHAPES))  # never in training: each shape lacks one colour
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
SPLITS = ["train", "val", "zeroshot", "labelled", "labelled-val"]  # the last two: to classify


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    x: float  # centre in image sides, from the left
    y: float  # and from the top

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape}"

    def corner(self):
        return CORNERS[2 * (self.y > 0.5) + (self.x > 0.5)]


def place(rng, corners, pairs=PAIRS):
    """Random things near the given corners (numbers of CORNERS)."""
    things = []
    for corner in corners:
        x, y = (corner % 2, corner // 2) + rng.uniform(-1, 1, 2) * 0.05
        size = rng.choice(list(RADII))
        colour, shape = pairs[rng.integers(len(pairs))]
        things.append(Thing(size, colour, shape, 0.25 + 0.5 * x, 0.25 + 0.5 * y))
    return things


def scene(seed, split, index):
    """One or two things in different corners, and the random generator that made them."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    if split in ("train", "val"):
        count = rng.integers(1, 3)
        return place(rng, rng.permutation(4)[:count], SEEN), rng
    pairs = HELD_OUT if split == "zeroshot" else PAIRS
    return place(rng, rng.permutation(4)[:1], pairs), rng


def draw(things, rng, size):
    """Picture of a scene, (3, size, size) uint8: dark background of random hue, things, noise."""
    centres = (np.arange(size) + 0.5) / size
    image = np.broadcast_to(rng.uniform(0, 60, (3, 1, 1)), (3, size, size))
    for thing in things:
        r = RADII[thing.size]
        x, y = centres - thing.x, centres[:, None] - thing.y
        inside = r - SHAPES[thing.shape](x, y, r)                       # (size, size)
        cover = np.clip(inside * size + 0.5, 0, 1)  # soft edges: the share of a pixel
        colour = np.array(COLOURS[thing.colour])[:, None, None]
        image = image + cover * (colour - image)
    return (image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def captions_of(things):
    """All captions of a scene: its things in any order, each with its place."""
    phrases = [f"{thing} at the {thing.corner()}" for thing in things]
    return [" and ".join(order) for order in permutations(phrases)]


def shapes(split, size, seed, subset=0):
    counts = {"train": subset or 10_000, "val": 500, "zeroshot": 600,
              "labelled": 3000, "labelled-val": 1000}
    images = []
    captions = []
    labels = []
    for i in tqdm(range(counts[split]), f"drawing {split} scenes", leave=False):
        things, rng = scene(seed, split, i)
        images.append(draw(things, rng, size))
        captions.append(captions_of(things))
        labels.append(PAIRS.index((things[0].colour, things[0].shape)))
    data = Dataset(np.stack(images), captions)
    if split not in ("train", "val"):
        data.labels = np.array(labels)
        data.classes = [f"{colour} {shape}" for colour, shape in PAIRS]  # not the held-out only
        data.templates = [f"a {size} {{}} at the {corner}" for size in RADII for corner in CORNERS]
    return data


# ------------------------------------------------------------------------------------------------
# cifar10, cifar100

TEMPLATES = [  # labels become text by prompts, as JFT's do (Sec. 4.1): eight of
    # CLIP's eighteen for CIFAR
    "a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.",
    "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
    "a photo of a big {}.", "a photo of the {}."]
CIFAR = {
    "cifar10": dict(
        folder="cifar-10-batches-py", val=["test_batch"],
        train=["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"],
        meta="batches.meta", names="label_names", labels="labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a"),
    "cifar100": dict(
        folder="cifar-100-python", train=["train"], val=["test"],
        meta="meta", names="fine_label_names", labels="fine_labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85"),
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain containers, and nothing that could run code."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
               ("numpy.core.multiarray", "_reconstruct"),
               ("numpy._core.multiarray", "_reconstruct")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise UserError(f"it wants to run {f'{module}.{name}'!r}, which no CIFAR file does: delete it")
        return super().find_class(module, name)


def read_pickle(path):
    again = "delete it and run again with --download"
    try:
        with open(path, "rb") as f:
            content = PlainUnpickler(f, encoding="latin1").load()
    except UserError as e:
        raise UserError(f"{path}: refused, {e!s:.200}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; get it with --download") from None
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: truncated or corrupt ({type(e).__name__}); {again}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a CIFAR file (a {type(content).__name__}); {again}")
    return content


def read_cifar_batch(path, labels_key, classes):
    """-> images (n, 3, 32, 32) uint8, labels (n,)."""
    batch = read_pickle(path)
    try:
        images = batch["data"]
        labels = [label.__index__() for label in batch[labels_key]]
        whole = images.dtype == np.uint8 and images.shape == (len(labels), 3072) and len(labels)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: truncated or corrupt (no {labels_key!r} and 3072 bytes for each "
                        "image); get it again")
    if min(labels) < 0 or max(labels) >= len(classes):
        raise UserError(f"{path}: labels {min(labels)} to {max(labels)} but {len(classes)} class "
                        "names; get it again")
    return images.reshape(-1, 3, 32, 32), np.array(labels)


def cifar(name, data_dir, split, size, download):
    kind = CIFAR[name]
    if download:
        fetch(kind["url"], kind["md5"], data_dir)
    root = data_dir / kind["folder"]
    if not os.path.isdir(root):  # DIR may be the folder itself
        root = data_dir
    found = [root / file for file in kind[split] if os.path.isfile(root / file)]
    if not found:
        wanted = data_dir / kind["folder"] / kind[split][0]
        raise UserError(f"{wanted}: no such file; give its folder as --data-dir, or add --download")
    if len(found) < len(kind[split]):
        note(f"{len(found)} of {len(kind[split])} {split} batches of {name} are in {root}; "
             "using those")
    classes = read_pickle(root / kind["meta"]).get(kind["names"])
    if not classes or not isinstance(classes, list) or {*map(type, classes)} != {str}:
        raise UserError(f"{root / kind['meta']}: no class names in it; get it again")
    batches = [read_cifar_batch(path, kind["labels"], classes) for path in found]
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    if size != 32:
        images = resize(images, size)
    classes = [text.replace("_", " ") for text in classes]
    captions = [[template.format(classes[label]) for template in TEMPLATES] for label in labels]
    return Dataset(images, captions, labels, classes, TEMPLATES, augment=True)


def resize(images, size):
    """images (N, 3, H, W) uint8 -> (N, 3, size, size): the square in the middle."""
    H, W = images.shape[2:]
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for i in range(0, len(images), 1000):
        part = np.ascontiguousarray(images[i:i + 1000, :, top:top + side, left:left + side])
        part = torch.from_numpy(part)
        resized[i:i + 1000] = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return resized


def fetch(url, md5, folder):
    """Downloads an archive, if it is not there, checks its md5 and unpacks it in the folder."""
    archive = folder / url.rsplit("/", 1)[1]
    part = archive.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            with urllib.request.urlopen(url, timeout=60) as reply, open(part, "wb") as f:
                total = int(reply.headers.get("Content-Length", 0))
                with tqdm.wrapattr(reply, "read", total=total, desc=archive.name) as source:
                    shutil.copyfileobj(source, f)
            if part.stat().st_size < total:  # read() returns b"" then, without an error
                raise OSError("the connection ended early")
            os.replace(part, archive)
    except (OSError, http.client.HTTPException) as e:
        if os.path.exists(part):
            part.unlink()
        raise UserError(f"{url}: download failed ({e}); run the same command again") from None
    with open(archive, "rb") as f:
        if hashlib.md5(f.read(), usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{archive}: wrong md5, not {md5}; delete it and run again")
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack safely; update to 3.10.12, 3.11.4 or newer")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # no links, devices or paths that lead outside
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{archive}: could not be unpacked ({e}); delete it and run again") from None


# ------------------------------------------------------------------------------------------------
# coco, captions: images in files


def to_rgb(image):
    """A Pillow image of any mode as a viewer shows it: RGB, transparent parts white."""
    Image = pillow()
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which convert() would cut at 255
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" and values.max() <= 1:
            values = values * 255
        elif values.max() > 255:  # 16 bits; else they are 8-bit values in a larger container
            values = values / 256
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_image(path, size):
    """Image file -> (3, size, size) uint8: the square in the middle."""
    Image = pillow()
    from PIL import ImageOps
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))  # JPEG only: decode at the smallest scale that suffices
            image = to_rgb(ImageOps.exif_transpose(image))
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return np.array(image).transpose(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        raise UserError(f"{path}: not a readable image ({e})") from None


def cached_images(paths, size, name):
    """Decodes files once -> (M, 3, size, size) uint8 memory map, which of the paths it holds (M,).

    It lies in ~/.cache/coca (or $COCA_CACHE) under a name made of the paths, dates and size: if any
    changes, it is made anew. Unreadable files are named and left out.
    """
    facts = [size]
    for path in paths:
        facts.append((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns))
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(os.environ.get("COCA_CACHE") or Path.home() / ".cache" / "coca")
    pixels = folder / f"{name}-{size}px-{fingerprint[:32]}.uint8"
    index = pixels.with_suffix(".json")  # which paths it holds; written last
    try:
        kept = json.loads(index.read_text())
        complete = pixels.stat().st_size == len(kept) * 3 * size * size
    except (OSError, ValueError, TypeError):
        complete = False  # not there, or cut off
    if not complete:
        pillow()  # its absence should show at once, not image by image
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = decode_to(pixels, paths, size, name)
            index.write_text(json.dumps(kept))
        except OSError as e:
            raise UserError(f"{folder}: cannot keep the decoded images there ({e}); "
                            "set COCA_CACHE to a folder that can be written") from None
    return np.memmap(pixels, np.uint8, "r", shape=(len(kept), 3, size, size)), kept


def decode_to(file, paths, size, name):
    """Writes the pixels of all images that can be read into a file -> their indices."""
    def decode(path):
        try:
            return read_image(path, size)
        except UserError as e:
            return e

    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    kept = []
    try:
        # Written, not mapped: a full disk is then an error, and not the end of the process
        with open(temporary, "wb") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
            images = pool.map(decode, paths)  # Pillow decodes outside Python's lock
            try:
                for i, image in enumerate(tqdm(images, f"decoding {name}", len(paths), leave=False)):
                    if isinstance(image, UserError):
                        note(f"{image}: skipped")
                    else:
                        f.write(image.tobytes())
                        kept.append(i)
            finally:
                pool.shutdown(cancel_futures=True)
        failed = len(paths) - len(kept)
        if failed > 0.01 * len(paths):
            raise UserError(f"{paths[0].parent}: {failed} of {len(paths)} images cannot be read; "
                            "replace or remove the files named above")
        if failed:
            note(f"{failed} of {len(paths)} images skipped")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return kept


def captioned_images(paths, captions, size, name, source, data_dir):
    """captions: {path: [caption, ...]} -> Dataset of these paths. source: the file that names them."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{source}: {len(missing)} of the {len(paths)} images it names are not "
                        f"there, first {missing[0]}; get them or take them out of the file")
    images, kept = cached_images(paths, size, name)
    paths = [paths[i] for i in kept]
    return Dataset(images, [captions[path] for path in paths], augment=True,
                   names=[os.path.relpath(path, data_dir) for path in paths])


def without_empty(captions, source):
    """{path: [caption, ...]} without captions of blanks, and without images that have no other."""
    empty = 0
    kept = {}
    for path, texts in captions.items():
        real = [text for text in texts if text.strip()]
        empty += len(texts) - len(real)
        if real:
            kept[path] = real
    if empty:
        note(f"{source}: {empty} empty captions skipped")
    return kept


def read_text(path, what):
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark in front
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({e}); {what}") from None


def coco(data_dir, split):
    """-> {path: [caption, ...]}, the file they are from."""
    for year in ("2014", "2017"):
        annotations = data_dir / "annotations" / f"captions_{split}{year}.json"
        if annotations.exists():
            break
    text = read_text(annotations, "--data-dir must hold annotations/, train2017/ and val2017/")
    paths = {}
    texts = {}
    try:
        content = json.loads(text)
        for image in content["images"]:
            paths[image["id"]] = data_dir / f"{split}{year}" / image["file_name"]
        for annotation in content["annotations"]:
            path = paths[annotation["image_id"]]
            texts.setdefault(path, []).append(annotation["caption"] or "")
            texts[path][-1].strip()  # a caption that is no text is an error here
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{annotations}: not COCO captions ({type(e).__name__}: {e}); "
                        "unpack it again") from None
    return without_empty(texts, annotations), annotations


def captions_file(data_dir, split):
    """-> {path: [caption, ...]}, the file they are from."""
    tables = [data_dir / "captions.txt", *sorted(data_dir.glob("*.csv"))]
    table = next((path for path in tables if path.exists()), tables[0])
    text = read_text(table, "--data-dir must hold captions.txt or a .csv: image,caption")
    rows = csv.DictReader(io.StringIO(text), strict=True)
    texts = {}  # name of the image -> its captions
    try:
        if not {"image", "caption"} <= set(rows.fieldnames or ()):
            raise UserError(f"{table}: the first line must be image,caption, not {rows.fieldnames}")
        for row in rows:
            if None in row or "\n" in (row["image"] or ""):
                raise csv.Error("too many columns, or a name of two lines")
            image = Path((row["image"] or "").strip()).as_posix()  # ./a.jpg and a.jpg are one
            texts.setdefault(image, []).append(row["caption"] or "")
    except csv.Error as e:
        raise UserError(f"{table}: line {rows.reader.line_num} is not CSV ({e}); "
                        "quote captions that hold commas or quotes") from None
    folder = data_dir
    for name in ("Images", "images"):
        if (data_dir / name).is_dir():
            folder = data_dir / name
    unseen = held_out(texts)
    own = {folder / name: texts[name] for name in texts if (name in unseen) == (split == "val")}
    return without_empty(own, table), table


def held_out(names):
    """About one name in ten, by a hash of it, for evaluation. Adding files moves none across, but
    for the first that is chosen where there was none (one name at least is).
    """
    digest = {name: hashlib.sha256(name.encode()).digest() for name in names}
    chosen = {name for name in names if digest[name][0] < 26}
    return chosen or {min(names, key=digest.get, default=None)}


# ------------------------------------------------------------------------------------------------
# De-duplication (Sec. 4.1): no near-copy of an evaluation image may be trained on

THRESHOLD = 0.955  # of the cosine of two thumbnails; python -m experiments.bench dedup shows why


def thumbnails(images):
    """images (N, 3, H, W) uint8 -> (N, 192): 8 x 8 pixels, brightness and contrast taken off."""
    parts = []
    for i in range(0, len(images), 2000):
        x = torch.from_numpy(np.ascontiguousarray(images[i:i + 2000])).float()
        x = F.interpolate(x, size=(8, 8), mode="area").flatten(1)       # (n, 192)
        parts.append(F.normalize(x - x.mean(1, keepdim=True)))
    return torch.cat(parts)


def slight_crops(images, mirrored):
    """The images, then 13 crops of 95 and 90 % of their sides: cropped copies are near one."""
    S = images.shape[-1]
    for share, places in ((1, [0]), (0.95, [0, 1]), (0.9, [0, 0.5, 1])):
        side = round(share * S)
        for y in places:
            for x in places:
                top = round(y * (S - side))
                left = round(x * (S - side))
                crop = images[:, :, top:top + side, left:left + side]
                yield crop
                if mirrored:
                    yield crop[..., ::-1]


def near_duplicates(images, evaluation, threshold=THRESHOLD, mirrored=False):
    """Which images (N, 3, S, S) are near-copies of evaluation images (M, 3, S', S')?

    All are compared with all -> the evaluation image each is nearest to (N,), -1 = it is no copy;
    the cosine (N,), 0 = it is no copy; which of the evaluation images have a copy (M,).
    """
    own = thumbnails(images)                                            # (N, 192)
    nearest = torch.full((len(images),), -1)
    similarity = torch.zeros(len(images))
    copied = torch.zeros(len(evaluation), dtype=torch.bool)
    crops = slight_crops(evaluation, mirrored)
    for crop in tqdm(crops, "looking for duplicates", 14 * (1 + mirrored), leave=False):
        others = thumbnails(crop).T                                     # (192, M)
        for rows in torch.arange(len(images)).split(2000):
            cosine = own[rows] @ others                                 # (2000, M)
            for i in (cosine.amax(1) > threshold).nonzero()[:, 0]:  # few
                copied |= cosine[i] > threshold
                best, where = cosine[i].max(0)
                if best > similarity[rows[i]]:
                    nearest[rows[i]] = where
                    similarity[rows[i]] = best
    return nearest.numpy(), similarity.numpy(), copied.numpy()


def without_duplicates(data, evaluation, mirrored=False):
    """data without the near-duplicates of the evaluation images; says how many."""
    nearest, _, copied = near_duplicates(data.images, evaluation.images, mirrored=mirrored)
    kept = np.flatnonzero(nearest < 0)
    note(f"{len(data) - len(kept):,} of {len(data):,} training images removed, "
         f"near-duplicates of {copied.sum():,} of {len(evaluation):,} evaluation images")
    if not len(kept):
        raise UserError("all training images are near-duplicates of evaluation images")
    return select(data, kept)
