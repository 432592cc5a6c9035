"""Data for CoCa: generated scenes, CIFAR, COCO and your own captioned images, all as one `Dataset`.

    load("shapes")                generated, nothing to download: what train.py uses by itself
    load("cifar10", "DIR")        or cifar100; the official python files in DIR
    load("coco", "DIR")           DIR/annotations/captions_train2017.json, DIR/train2017/, ...
    load("captions", "DIR")       a table of captions and its pictures, see captions_table

Whatever is wrong with a file is a UserError of one line: what, where, and what to do.
"""
import argparse
import contextlib
import csv
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pickle
import posixpath
import re
import sys
import tarfile
import unicodedata
from collections import Counter, defaultdict
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


def run_program(main):
    """Runs main. What the user can put right, and Ctrl-C, end it with one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}" if first_process() else 1)
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def first_process():
    """Under torchrun several processes do the same; only the first prints."""
    return os.environ.get("RANK", "0") == "0"


def note(text):
    if first_process():
        tqdm.write(f"note: {text}", file=sys.stderr)  # above a progress bar, not into it


def pillow():
    """Pillow's Image module: imported only where pictures are read or written."""
    try:
        from PIL import Image
        return Image
    except ImportError:
        raise UserError("pictures need Pillow; run: pip install pillow") from None


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


# ------------------------------------------------------------------------------------------------
# What everybody needs: Dataset, load, Tokenizer, Batches


@dataclass
class Dataset:
    """Images with their texts. An image and all its captions are always in the same split."""

    images: np.ndarray  # (N, 3, S, S) uint8, in memory or memory-mapped
    captions: list  # N lists of texts; training draws one, validation takes the first, tasks all
    labels: np.ndarray = None  # (N,) class of each image, where there are classes
    classes: list = field(default_factory=list)  # their names
    templates: list = field(default_factory=list)  # prompts for the names: "a photo of a {}."
    names: list = field(default_factory=list)  # N file names, where images are files
    augment: bool = False  # crop and flip in training

    def __len__(self):
        return len(self.images)


def select(data, rows):
    """Dataset of these images only."""
    chosen = dataclasses.replace(data, images=data.images[rows],
                                 captions=[data.captions[i] for i in rows])
    if data.labels is not None:
        chosen.labels = data.labels[rows]
    if data.names:
        chosen.names = [data.names[i] for i in rows]
    return chosen


def fingerprint(data):
    """What a run remembers of its data: how many images, and a hash of their names and captions."""
    text = json.dumps([data.names, data.captions])
    return f"{len(data)} {hashlib.sha256(text.encode()).hexdigest()[:32]}"


NAMES = ["shapes", "cifar10", "cifar100", "coco", "captions"]


def load(name, data_dir=None, split="train", size=32, subset=0, seed=0, download=False,
         val_from_train=0):
    """-> Dataset of images of size x size pixels.

    split: "train" or "val"; where there are classes also "zeroshot" (CIFAR: the images of "val")
    and, to learn classes from and to test them, "labelled" and "labelled-val". subset: that many
    training images, the same every time, 0 = all. seed: of generated scenes. val_from_train: that
    many training images are kept apart and take the place of the evaluation images (but not of
    scenes' "zeroshot" and "labelled-val").
    """
    def pick_rows(count):
        return pick(count, split, subset, val_from_train)

    part = "train" if val_from_train or split in ("train", "labelled") else "val"
    if name == "shapes":
        if val_from_train and split in ("train", "val"):
            data = shapes("train", size, seed)
            return select(data, pick_rows(len(data)))
        return shapes(split, size, seed, subset)
    if not data_dir or not (download or os.path.exists(data_dir)):
        raise UserError(f"--data-dir {data_dir}: no such folder; {name} needs that of its files")
    data_dir = Path(data_dir)
    if name in CIFAR:
        data = cifar(name, data_dir, part, size, download)
        return select(data, pick_rows(len(data)))
    read = coco if name == "coco" else captions_table
    captions, source = read(data_dir, part)  # {path: [caption, ...]}
    return captioned_images(captions, pick_rows, size, f"{name}-{part}", source)


def pick(count, split, subset, val_from_train):
    """Which of `count` images a split has, the same every time, in order."""
    rows = np.arange(count)
    if val_from_train >= count:
        raise UserError(f"--val-from-train {val_from_train}, but there are {count} images; "
                        "ask for fewer")
    if val_from_train:
        order = np.random.default_rng(1).permutation(count)
        rows = np.sort(order[:val_from_train])
        if split in ("train", "labelled"):
            rows = np.sort(order[val_from_train:])
    if subset and split == "train":
        if subset > len(rows):
            raise UserError(f"--subset {subset}, but there are {len(rows)} images; ask for fewer")
        order = np.random.default_rng(0).permutation(len(rows))
        rows = rows[np.sort(order[:subset])]
    return rows


CHARACTERS = map(chr, range(0x300, 0xFE30))
MARKS = "".join(c for c in CHARACTERS if unicodedata.category(c).startswith("M"))
# Thai, Lao, Khmer, kana and Han are written without blanks: each letter counts as a word
LETTERS = "\u0e00-\u0eff\u1780-\u17ff\u3000-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff" \
          "\uff00-\uffef\U00020000-\U000323af"
OTHER = rf"(?:(?![{LETTERS}])[\w{MARKS}])+"
# Numbers like 3.5; letters; words like t-shirt, with accents, and "man's" as man 's; punctuation
WORD = re.compile(rf"\d+(?:[.,]\d+)+|[{LETTERS}][{MARKS}]*|['’]?{OTHER}(?:-{OTHER})*|[^\w\s]")
NO_BLANK = re.compile(rf" (?=['’](?:[sdmt]|re|ve|ll)\b|['’](?: |$)|[.,;:!?%)\]])|(?<=[(\[]) |"
                      rf"(?<=[{LETTERS}{MARKS}]) (?=[{LETTERS}])")  # where decode joins words


def words(text):
    """Text -> its words and punctuation marks, lower-cased."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower())


def is_cut(text, text_len):
    """Is the text too long for text_len tokens, BEGIN and END among them?"""
    return len(words(text)) > text_len - 2


def pad_right(rows):
    """Lists of tokens -> (len(rows), longest) int64, PAD at the right."""
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), PAD)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    return tokens


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
        return pad_right(rows)

    def decode(self, tokens):
        """tokens (L,) -> text up to END, without blanks before punctuation, 's and the like."""
        found = []
        for i in map(int, tokens):
            if i == END:
                break
            if i not in (PAD, BEGIN):
                found.append(self.words[i])
        return NO_BLANK.sub("", " ".join(found))


def to_model(images):
    """uint8 -> float in [-1, 1], what CoCa takes."""
    return images.float() / 127.5 - 1


class Batches:
    """Training batches by number: step -> images (B, 3, S, S) float, tokens (B, L).

    Every epoch has its own order; the last, short batch is dropped. One random number a batch says
    which of its captions an image has. A batch depends on its number alone: nothing to replay on
    resume.
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
        left_right = [tokenizer.index.get(word, -1) for word in ("left", "right")]
        self.left_right = torch.tensor(left_right)
        self.epoch = None

    def __call__(self, step):
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            rng = np.random.default_rng([self.seed, 0, epoch])
            self.order = rng.permutation(len(self.data))
            self.which = rng.random(self.per_epoch)  # one a batch: equal classes get equal prompts
        rows = self.order[batch * self.batch_size:][:self.batch_size][self.own]
        drawn = [self.choices[i][int(self.which[batch] * len(self.choices[i]))] for i in rows]
        tokens = self.tokens[drawn]                                     # (B, L)
        longest = (tokens != PAD).sum(1).max()
        images = self.data.images[rows]                                 # (B, 3, S, S) uint8
        if self.data.augment:
            rng = np.random.default_rng([self.seed, 1, step])
            border = images.shape[-1] // 8
            corner = rng.integers(0, 2 * border + 1, (self.batch_size, 2))[self.own]
            flip = (rng.random(self.batch_size) < 0.5)[self.own]
            flip &= ~torch.isin(tokens, self.left_right).any(1).numpy()  # "left" must stay true
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
UNSEEN = list(zip(COLOURS, SHAPES))  # never in training: each shape lacks one colour
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]
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
    pairs = UNSEEN if split == "zeroshot" else PAIRS
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

TEMPLATES = [  # labels become text by prompts, as JFT's do (Sec. 4.1): 8 of CLIP's 18 for CIFAR
    "a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.",
    "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
    "a photo of a big {}.", "a photo of the {}."]
CIFAR = {
    "cifar10": dict(
        folder="cifar-10-batches-py", train=[f"data_batch_{i}" for i in range(1, 6)],
        val=["test_batch"], meta="batches.meta", names="label_names", labels="labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a"),
    "cifar100": dict(
        folder="cifar-100-python", train=["train"], val=["test"],
        meta="meta", names="fine_label_names", labels="fine_labels",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85"),
}


class PickledType:
    """Stands for numpy.dtype in a pickle."""

    def __init__(self, name, *flags):
        self.name = name

    def __setstate__(self, state):
        if state[1] == ">":
            raise pickle.UnpicklingError("big-endian numbers")


class PickledArray:
    """Stands for numpy.ndarray in a pickle."""

    def __init__(self, *ignored):
        self.array = None

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        self.array = numbers(content, kind, shape, "F" if fortran else "C")


def numbers(content, kind, shape, order="C"):
    """Bytes, a PickledType and a shape -> array of integers, the only kind there is in CIFAR."""
    if not re.fullmatch("[iu][1248]", kind.name):
        raise pickle.UnpicklingError(f"numbers of type {kind.name}")
    if isinstance(content, str):  # of Python 2
        content = content.encode("latin1")
    return np.frombuffer(content, kind.name).reshape(shape, order=order)


def number(kind, content):
    return int(numbers(content, kind, ()))


def encode(text, encoding):
    return text.encode("latin1")


# For what numpy 1 and 2 write of arrays and integers, and Python of bytes. (__call__: a pickle
# could set attributes of a function, but not of a method)
STAND_INS = {
    "dtype": PickledType,
    "ndarray": PickledArray,
    "_reconstruct": PickledArray,
    "_frombuffer": numbers.__call__,
    "scalar": number.__call__,
    "encode": encode.__call__,
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickles plain containers and arrays of integers. It calls STAND_INS and nothing else."""

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in STAND_INS:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, as no CIFAR file does")
        return STAND_INS[name]


def read_cifar(path, key, classes=()):
    """-> what a CIFAR file holds under key: names of classes, or with these the labels (n,) and the
    images (n, 3, 32, 32).
    """
    try:
        with open(path, "rb") as f:
            content = PlainUnpickler(f, encoding="latin1").load()
        found = content[key]
        if not classes:
            return [name.replace("_", " ") for name in found]
        labels = np.array([label.__index__() for label in getattr(found, "array", found)])
        images = getattr(content["data"], "array", content["data"])
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError("not 3072 bytes for each label")
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels other than 0 to {len(classes) - 1}")
        return labels, images.reshape(-1, 3, 32, 32)
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a CIFAR file, or damaged ({e!r:.200}); delete it and run "
                        "again with --download") from None


def cifar(name, data_dir, part, size, download):
    kind = CIFAR[name]
    if download:
        fetch(kind["url"], kind["md5"], data_dir)
    root = data_dir / kind["folder"]
    if not root.is_dir():  # DIR may be the folder itself
        root = data_dir
    files = [root / file for file in kind[part]]
    found = [path for path in files if path.is_file()]
    if not found:
        raise UserError(f"{files[0]}: no such file; give its folder as --data-dir, or add "
                        "--download")
    if len(found) < len(files):
        note(f"{len(found)} of {len(files)} {part} batches of {name} are in {root}; using those")
    classes = read_cifar(root / kind["meta"], kind["names"])
    batches = [read_cifar(path, kind["labels"], classes) for path in found]
    labels = np.concatenate([labels for labels, _ in batches])
    images = resize(np.concatenate([images for _, images in batches]), size)
    captions = [[template.format(classes[label]) for template in TEMPLATES] for label in labels]
    return Dataset(images, captions, labels, classes, TEMPLATES, augment=True)


def resize(images, size):
    """images (N, 3, H, W) uint8 -> (N, 3, size, size): the square in the middle."""
    H, W = images.shape[2:]
    if H == W == size:
        return images
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for i in range(0, len(images), 1000):
        square = torch.tensor(images[i:i + 1000, :, top:top + side, left:left + side])
        resized[i:i + 1000] = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return resized


def fetch(url, md5, folder):
    """Downloads an archive, if it is not there, checks its md5 and unpacks it in the folder."""
    archive = folder / url.rsplit("/", 1)[1]
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python cannot unpack safely; update to 3.10.12, 3.11.4 or newer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            torch.hub.download_url_to_file(url, str(archive))  # renamed when it is whole
        if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise OSError(f"its md5 is not {md5}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # no links, devices or paths that lead outside
    except (OSError, EOFError, http.client.HTTPException, tarfile.TarError) as e:
        raise UserError(f"{url}: download failed ({e}); delete {archive}, if it is there, and run "
                        "again") from None


# ------------------------------------------------------------------------------------------------
# Pictures in files

# What Pillow may read. (All it knows would include PostScript, for which it starts a program)
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]


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
        with Image.open(path, formats=FORMATS) as image:
            image.draft(None, (size, size))  # JPEG only: decode at the smallest scale that suffices
            image = to_rgb(ImageOps.exif_transpose(image))
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return np.array(image).transpose(2, 0, 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        if Path(path).suffix.lower() in (".heic", ".heif"):
            raise UserError(f"{path}: HEIC is not read; convert it, for example with ImageMagick: "
                            "magick mogrify -format jpg *.heic") from None
        raise UserError(f"{path}: not a readable image of {', '.join(FORMATS)} ({e})") from None


TO_DO, DONE, BROKEN = 0, 1, 2  # states of a picture in the cache


def cached_images(paths, rows, size, name):
    """Decodes each of paths[rows] once -> which rows can be read, their images (n, 3, size, size).

    They are kept in ~/.cache/coca (or $COCA_CACHE), in one file for all paths, whatever the subset.
    Its name is a hash of all paths, dates, lengths and the size in pixels: if one changes, a new
    file is made. (Old ones stay until you delete them.) Behind the pixels a byte says of each
    picture whether it is TO_DO, DONE or BROKEN. These are written last: a killed run leaves only
    pictures to do.
    """
    facts = [size]
    for path in paths:
        facts.append([os.path.abspath(path)])
        if os.path.isfile(path):
            found = os.stat(path)
            facts[-1] += [found.st_mtime_ns, found.st_size]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(os.environ.get("COCA_CACHE") or Path.home() / ".cache" / "coca")
    file = folder / f"{name}-{size}px-{fingerprint[:32]}"
    pixels = len(paths) * 3 * size * size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as f:
            f.truncate(pixels + len(paths))  # new bytes are 0, and take no space yet
        states = np.fromfile(file, np.uint8, offset=pixels)
        to_do = rows[states[rows] == TO_DO]
        if len(to_do):
            decode_into(file, paths, to_do, size, states, name)
    except OSError as e:
        raise UserError(f"{folder}: cannot keep the decoded images there ({e}); "
                        "set COCA_CACHE to a folder that can be written") from None
    images = np.memmap(file, np.uint8, "r", shape=(len(paths), 3, size, size))
    good = rows[states[rows] == DONE]
    return good, images if len(good) == len(images) else images[good]


def decode_into(file, paths, rows, size, states, name):
    """Writes pixels and states of paths[rows] to their places in the file."""
    def decode(i):
        try:
            return read_image(paths[i], size)
        except UserError:
            return None

    pillow()  # its absence should show at once, not image by image
    # f.write and no memory map: on a full disk it raises an error, a map would kill the process
    with open(file, "r+b") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(decode, rows)  # Pillow releases Python's lock
        try:
            images = tqdm(images, f"decoding {name}", len(rows), leave=False)
            for i, image in zip(rows.tolist(), images):
                states[i] = BROKEN
                if image is not None:
                    f.seek(i * image.size)
                    f.write(image.tobytes())
                    states[i] = DONE
        finally:
            pool.shutdown(cancel_futures=True)
        f.flush()
        os.fsync(f.fileno())
        f.seek(-len(paths), os.SEEK_END)
        f.write(states.tobytes())


def captioned_images(captions, pick_rows, size, name, source):
    """captions: {path: [caption, ...]} -> Dataset. source: the file that names the paths.

    Pictures that are missing or cannot be read are skipped, up to 1 % of them (one, of less than
    100).
    """
    kept = {}
    for path, texts in captions.items():
        kept[path] = [text for text in texts if text.strip()]
    empty = sum(map(len, captions.values())) - sum(map(len, kept.values()))
    if empty:
        note(f"{source}: {empty} empty captions skipped")
    paths = sorted(path for path in kept if kept[path])
    if not paths:
        raise UserError(f"{source}: no pictures with captions; check the file")
    rows = pick_rows(len(paths))
    missing = [i for i in rows if not os.path.isfile(paths[i])]
    allowed = min(max(1, len(rows) // 100), len(rows) - 1)
    if len(missing) <= allowed:
        good, images = cached_images(paths, rows, size, name)
        missing = np.setdiff1d(rows, good)
    if len(missing):
        reasons = "; ".join(why_broken(paths[i], size) for i in missing[:3])
        text = (f"{source}: {len(missing)} of {len(rows)} pictures cannot be read, as these: "
                f"{reasons}")
        if len(missing) > allowed:
            raise UserError(f"{text}. Too many: put them back, or take them out of the table")
        note(f"{text}; skipped")
    names = [os.path.basename(paths[i]) for i in good]
    return Dataset(images, [kept[paths[i]] for i in good], names=names, augment=True)


def why_broken(path, size):
    try:
        read_image(path, size)
        return f"{path}: was broken when it was read first; delete the cache"
    except UserError as e:
        return str(e)


# ------------------------------------------------------------------------------------------------
# coco


def read_text(path):
    """UTF-8 with or without a mark, or UTF-16 with one -> text, its lines ended by \\n."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def one_error(path):
    """Whatever is wrong with a file's text becomes a UserError of one line."""
    try:
        yield
    except UnicodeError as e:
        raise UserError(f"{path}: cannot be read as text ({e}); save it as UTF-8") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        what = e if isinstance(e, ValueError) else repr(e)
        raise UserError(f"{path}: {what!s:.300}; mend it, or get it again") from None


def coco(data_dir, part):
    """-> {path: [caption, ...]}, the file they are from. Both splits are of one year, the first
    that is whole.
    """
    for year in ("2017", "2014"):
        source = data_dir / "annotations" / f"captions_{part}{year}.json"
        wanted = [f"annotations/captions_train{year}.json", f"annotations/captions_val{year}.json",
                  f"train{year}", f"val{year}"]
        if all((data_dir / name).exists() for name in wanted):
            return coco_captions(source, data_dir / f"{part}{year}"), source
    raise UserError(f"{data_dir}: not whole; --data-dir must hold annotations/captions_train2017"
                    ".json, annotations/captions_val2017.json, train2017/ and val2017/ (or all of "
                    "2014)")


def coco_captions(source, folder):
    captions = defaultdict(list)
    unlisted = 0
    with one_error(source):
        content = json.loads(read_text(source))
        paths = {}
        for image in content["images"]:
            paths[image["id"]] = os.path.join(folder, image["file_name"])
        for annotation in content["annotations"]:
            if annotation["image_id"] in paths:
                captions[paths[annotation["image_id"]]].append((annotation["caption"] or "") + "")
            else:
                unlisted += 1
    if unlisted:
        note(f"{source}: {unlisted} captions of images that it does not list skipped")
    return captions


# ------------------------------------------------------------------------------------------------
# captions: a table of your own, or Flickr8k, Flickr30k and Karpathy's splits as downloaded

PICTURE_COLUMNS = ["image", "image_name", "file_name", "filename", "filepath", "name"]  # columns
CAPTION_COLUMNS = ["caption", "comment", "text", "title", "sentence"]  # the first that is there
FOLDERS = ["", "Images", "images", "Flicker8k_Dataset", "flickr30k_images"]  # of pictures
SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val",
               "validation": "val", "dev": "val", "test": "test"}


class Row(NamedTuple):
    """Of a table: a picture's name, its captions, its split ("" = not said), the line's number."""

    picture: str
    captions: list
    split: str
    line: int


def captions_table(data_dir, part):
    """-> {path: [caption, ...]}, the file they are from.

    Which file: data_dir itself if it is one; train.csv and test.csv (or val.csv), the two splits;
    captions.txt; captions.csv; else the only table there is.
    Which split: what the table's split column, Karpathy's file or Flickr8k's lists say: train and
    restval are learned from; test is evaluated on, or val where there is no test. Else a hash of a
    picture's name chooses one in ten to evaluate on.
    """
    folder = os.path.abspath(data_dir if data_dir.is_dir() else data_dir.parent)
    known = [os.path.join(folder, name) for name in FOLDERS]
    subfolders = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    listed = flickr8k_lists(folder)
    paths = {}  # of each picture's name
    captions = defaultdict(list)  # of each path
    splits = {}  # of each path
    for table, of_table in find_tables(data_dir).items():
        for row in read_table(table):
            name = posixpath.normpath(row.picture.strip().replace("\\", "/"))
            if name not in paths:
                paths[name] = find_picture(name, known, subfolders)
            path = paths[name]
            captions[path] += row.captions
            split = of_table or row.split or listed.get(posixpath.basename(name), "")
            if splits.setdefault(path, split) != split:
                raise UserError(f"{table}: line {row.line}: {name} is in two splits, {split} and "
                                f"{splits[path]}; take it out of one")
    learned = {path for path in captions if splits[path] == "train"}
    tested = {path for path in captions if splits[path] == "test"}
    tested = tested or {path for path in captions if splits[path] == "val"}
    if captions and not any(splits.values()):
        tested = {paths[name] for name in held_out(paths)}
        learned = captions.keys() - tested
    if not learned or not tested:
        raise UserError(f"{table}: {len(learned)} pictures to learn from and {len(tested)} to "
                        "evaluate on; give at least one of each")
    chosen = tested
    if part == "train":
        chosen = learned
    return {path: captions[path] for path in chosen}, table


def find_tables(data_dir):
    """-> {table: the split it holds, "" = it holds both}."""
    if data_dir.is_file():
        return {data_dir: ""}
    files = {path.name.lower(): path for path in sorted(data_dir.iterdir()) if path.name[0] != "."}
    for name in ("test.csv", "val.csv"):
        if "train.csv" in files and name in files:
            return {files["train.csv"]: "train", files[name]: "test"}
    for name in ("captions.txt", "captions.csv"):
        if name in files:
            return {files[name]: ""}
    kinds = r".*\.(csv|tsv)|.*(?<!lemma)\.token\.txt|dataset_.*\.json"
    found = [path for name, path in files.items() if re.fullmatch(kinds, name)]
    if len(found) == 1:
        return {found[0]: ""}
    names = ", ".join(path.name for path in found) or "none; its first line must be image,caption"
    raise UserError(f"{data_dir}: one table of captions is needed, there is {names}; name it: "
                    f"--data-dir {data_dir / 'TABLE'}")


def read_table(path):
    """A table of any kind -> its Rows."""
    with one_error(path):
        text = read_text(path)
        if path.suffix.lower() == ".json":
            yield from karpathy_rows(text)
        elif re.match(r"[^\t\n]+#\d+\t", text):
            yield from token_rows(text)
        else:
            yield from column_rows(text)


def karpathy_rows(text):
    """Karpathy's dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json."""
    for image in json.loads(text)["images"]:
        name = posixpath.join(image.get("filepath", ""), image["filename"])
        yield Row(name, [sentence["raw"] + "" for sentence in image["sentences"]],
                  SPLIT_NAMES[image["split"]], 0)


def token_rows(text):
    """Flickr8k.token.txt: lines of name.jpg#0<TAB>caption. One of its names ends in .jpg.1."""
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"(.+?)((?<=\.jpg)\.1)?#\d+\t(.*)", line)
        if match:
            yield Row(match[1], [match[3]], "", number)
        elif line.strip():
            raise ValueError(f"line {number} is not name#number<TAB>caption")


def flickr8k_lists(folder):
    """Flickr_8k.trainImages.txt and .testImages.txt -> {picture: split}, {} if one is missing."""
    lists = {split: Path(folder, f"Flickr_8k.{split}Images.txt") for split in ("train", "test")}
    splits = {}
    if all(path.is_file() for path in lists.values()):
        for split, path in lists.items():
            with one_error(path):
                splits.update(dict.fromkeys(read_text(path).split(), split))
    return splits


def csv_rows(text, delimiter):
    """-> the line that each row starts at, its cells; without empty rows."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if "".join(cells).strip():
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {line}: {e}: a quote is not closed, or not doubled within a "
                         "caption") from None


def column_rows(text):
    """A table with a header line: a column of pictures, one or more of captions, maybe a split."""
    delimiter = max(",|;\t", key=text.lstrip("\n").split("\n")[0].count)
    rows = csv_rows(text, delimiter)
    _, header = next(rows, (1, []))
    header = [re.sub(r"[ _.]?\d+$", "", name.strip().lower()) for name in header]
    pictures = [header.index(name) for name in PICTURE_COLUMNS if name in header]
    kind = next((name for name in CAPTION_COLUMNS if name in header), None)
    if not pictures or not kind:
        raise ValueError("line 1: must name the columns, such as image,caption, not "
                         f"{header!s:.80}")
    names = set()
    broken = []  # cells with a line break
    for line, cells in rows:
        if len(cells) == 2 and delimiter == "|" and header[1:] == ["comment_number", "comment"]:
            # Flickr30k has one row that lacks its second bar
            cells[1:] = re.sub(r"^(\s*\d+)\s", r"\1|", cells[1]).split("|")
        if len(cells) != len(header):
            raise ValueError(f"line {line}: {len(cells)} cells, but {len(header)} columns; quote "
                             f"captions that hold {delimiter!r} or a line break")
        picture = cells[pictures[0]].strip()
        if not picture or "\n" in picture:
            raise ValueError(f"line {line}: no picture's name, or one of two lines")
        names.add(picture)
        broken += [(line, cell) for cell in cells if "\n" in cell]
        split = ""
        if "split" in header:
            split = cells[header.index("split")].strip().lower()
            if split not in SPLIT_NAMES:
                raise ValueError(f"line {line}: the split is {split!r}; write train, val or test")
        captions = [cell.strip() for name, cell in zip(header, cells) if name == kind]
        if captions[0].startswith(("['", '["')):
            raise ValueError(f"line {line}: a list of captions; give each a row of its own")
        yield Row(picture, captions, SPLIT_NAMES.get(split, ""), line)
    # A quote that is closed too late swallows rows: names of pictures then stand inside a cell
    endings = tuple({posixpath.splitext(name)[1] for name in names} - {""})
    for line, cell in broken:
        for name in cell.partition("\n")[2].replace("\n", delimiter).split(delimiter):
            if name.strip() in names or name.strip().endswith(endings):
                raise ValueError(f"line {line}: a quote is opened here and closed behind "
                                 f"{name.strip()}")


def find_picture(name, known, subfolders):
    """Path of a picture: the name below the first of the known folders that holds it, or below the
    only subfolder that does. (An absolute name is its own path.)
    """
    for folder in known:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    holders = [folder for folder in subfolders if os.path.isfile(os.path.join(folder, name))]
    if len(holders) == 1:
        return os.path.join(holders[0], name)
    return os.path.join(known[0], name)  # it is missing there


def held_out(names):
    """About one name in ten for evaluation, at least one, by a hash of it.

    Of the name below the folder that all have in common. So moving that folder changes no split,
    and a new file there changes the split of no old one. (If no hash was small enough, one name was
    chosen all the same; a new file may replace it.)
    """
    try:
        root = posixpath.commonpath([posixpath.dirname(name) for name in names])
    except ValueError:  # absolute and relative ones
        root = ""
    digest = {}
    for name in names:
        below = posixpath.relpath(name, root) if root else name
        digest[name] = hashlib.sha256(below.encode()).digest()
    chosen = {name for name in names if digest[name][0] < 26}
    return chosen or {min(names, key=digest.get)}


# ------------------------------------------------------------------------------------------------
# De-duplication (Sec. 4.1): no near-copy of an evaluation image may be trained on

THRESHOLD = 0.955  # of two thumbnails' cosine; see python -m experiments.dedup --measure


def thumbnails(images):
    """images (N, 3, H, W) uint8 -> (N, 192): 8 x 8 pixels, brightness and contrast taken off."""
    parts = []
    for i in range(0, len(images), 2000):
        x = torch.from_numpy(np.array(images[i:i + 2000])).float()
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
