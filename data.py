"""Data for CoCa: generated scenes, CIFAR, COCO and your own captioned images, all as one `Dataset`.

You see what a Dataset is, how captions become tokens, how batches are made, and how scenes are
drawn. Reading files, below the line, may be skipped.

    load("shapes")                generated, nothing to download: what train.py uses by itself
    load("cifar10", "DIR")        or cifar100; the official python files in DIR
    load("coco", "DIR")           DIR/annotations/captions_train2017.json, DIR/train2017/, ...
    load("captions", "DIR")       DIR/captions.csv: lines of image,caption

Whatever is wrong with a file is a UserError of one line: what, where, and what to do.
"""
import contextlib
import csv
import hashlib
import json
import os
import pickle
import re
import shlex
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from coca import BEGIN, END, PAD, UNKNOWN

# ------------------------------------------------------------------------------------------------
# Dataset and load


@dataclass
class Dataset:
    """Images with their texts. An image and all its captions are always in the same split."""

    images: np.ndarray  # (N, 3, S, S) uint8, in memory or memory-mapped
    captions: list  # N lists of texts; training draws one, validation takes the first, tasks all
    labels: np.ndarray = None  # (N,) class of each image, where there are classes
    classes: list = field(default_factory=list)  # their names
    templates: tuple = ("{}",)  # prompts for the names: "a photo of a {}."
    names: list = field(default_factory=list)  # N file names, where images are files
    augment: bool = False  # crop and flip in training
    source: str = "data of your own"  # what they are, such as the file that names them

    def __len__(self):
        return len(self.images)


def select(data, rows):
    """Dataset of these images only."""
    captions = [data.captions[i] for i in rows]
    chosen = replace(data, images=data.images[rows], captions=captions)
    if data.labels is not None:
        chosen.labels = data.labels[rows]
    if data.names:
        chosen.names = [data.names[i] for i in rows]
    return chosen


NAMES = ["shapes", "cifar10", "cifar100", "coco", "captions"]


def load(name, data_dir=None, split="train", size=32, subset=0, seed=0, val_from_train=0):
    """-> Dataset of images of size x size pixels.

    split: "train" or "val"; where there are classes also "zeroshot" (CIFAR: the images of "val")
    and, to learn classes from and to test them, "labelled" and "labelled-val". subset: that many
    training images, the same every time, 0 = all. seed: of generated scenes. val_from_train: that
    many training images are kept apart and take the place of the evaluation images (but not of
    scenes' "zeroshot" and "labelled-val").
    """
    if name == "shapes" and data_dir is not None:
        raise UserError("--data-dir is for files, but scenes are generated; name the --data, too")
    if name == "shapes" and not (val_from_train and split in ("train", "val")):
        return shapes(split, size, seed, subset)
    if name not in NAMES:
        raise UserError(f"{name}: not one of {', '.join(NAMES)}; data of your own are scored where "
                        "they are loaded")
    if name in ("coco", "captions") and split not in ("train", "val"):
        raise DoesNotApply(f"{name} has no classes; CIFAR has: --data cifar10 --data-dir DIR")
    if name != "shapes" and not data_dir:
        raise UserError(f"{name} needs --data-dir, the folder of its files")
    if name != "shapes" and not os.path.exists(data_dir):
        raise UserError(f"--data-dir {data_dir}: no such folder; give the one of {name}'s files")
    files = "train" if val_from_train or split in ("train", "labelled") else "val"
    if name in ("coco", "captions"):
        read = coco if name == "coco" else captions_table
        captions, source, folders = read(Path(data_dir), files)
        paths = sorted(captions)
        rows = pick(len(paths), split, subset, val_from_train)
        captions = {paths[i]: captions[paths[i]] for i in rows}
        return captioned_images(captions, size, f"{name}-{split}", source, folders)
    if name == "shapes":
        data = shapes(files, size, seed)
    else:
        data = cifar(name, Path(data_dir), files, size)
    return select(data, pick(len(data), split, subset, val_from_train))


def pick(count, split, subset, val_from_train):
    """Which of `count` images a split has, the same every time, in order."""
    rows = np.arange(count)
    if val_from_train >= count:
        raise UserError(f"{val_from_train} of {count} training images cannot be kept apart")
    if val_from_train:
        order = np.random.default_rng(1).permutation(count)
        rows = np.sort(order[:val_from_train])
        if split in ("train", "labelled"):
            rows = np.sort(order[val_from_train:])
    if subset and split == "train":
        if subset > len(rows):
            raise UserError(f"--subset {subset}, but there are {len(rows)} images; ask for fewer")
        rows = rows[drawn(len(rows), subset)]
    return rows


def drawn(count, most):
    """At most that many of `count` numbers, drawn at random, the same every time, in order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


# ------------------------------------------------------------------------------------------------
# Words and batches

# Accents and the like, which belong to the word before them
MARKS = "".join(c for c in map(chr, range(0x300, 0xFE30)) if unicodedata.category(c)[0] == "M")
SIGNS = "\u3001-\u30ff\u3400-\u9fff\uff01-\uff9f"  # Chinese, Japanese: each sign is a word
LETTER = rf"(?:(?![{SIGNS}])[\w{MARKS}])"
# Numbers like 3.5; signs; words like t-shirt, and "man's" as man 's; punctuation
WORD = re.compile(rf"\d+(?:[.,]\d+)+|[{SIGNS}][{MARKS}]*|'?{LETTER}+(?:-{LETTER}+)*|[^\w\s]")
NO_BLANK = re.compile(r" (?='(?:[sdmt]|re|ve|ll)\b|'(?: |$)|[.,;:!?%)\]])|(?<=[(\[]) |"
                      rf"(?<=[{SIGNS}{MARKS}]) (?=[{SIGNS}])")  # where decode joins words
SPELLING = str.maketrans("’", "'", "\u00ad\u200b\ufeff")  # these three are invisible, and go


def words(text):
    """Text -> its words and punctuation marks, lower-cased."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower().translate(SPELLING))


def note_lost(texts, tokens, text_len):
    """Says how many texts are longer than text_len tokens, BEGIN and END among them, and how many
    of their words are unknown.
    """
    cut = sum(len(words(text)) > text_len - 2 for text in texts)
    if cut:
        note(f"{cut} of {len(texts)} captions cut to {text_len - 2} words (text_len is {text_len})")
    unknown = (tokens == UNKNOWN).sum() / (tokens > END).sum()
    if unknown > 0:
        note(f"{unknown:.1%} of the captions' words are unknown")


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
    which of its captions an image has. A batch depends on the seed and its number, not on those
    before it: nothing to replay on resume.
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
        note_lost(rows, self.tokens, text_len)
        self.sided = np.array([names_a_side(text) for text in rows])    # (texts,)
        self.epoch = None

    def __call__(self, step):
        epoch, batch = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            rng = np.random.default_rng([self.seed, 0, epoch])
            self.order = rng.permutation(len(self.data))
            self.which = rng.random(self.per_epoch)  # one a batch: equal classes get equal prompts
        rows = self.order[batch * self.batch_size:][:self.batch_size][self.own]
        chosen = [self.choices[i][int(self.which[batch] * len(self.choices[i]))] for i in rows]
        tokens = self.tokens[chosen]                                    # (B, L)
        longest = (tokens != PAD).sum(1).max()
        images = self.data.images[rows]                                 # (B, 3, S, S) uint8
        if self.data.augment:
            rng = np.random.default_rng([self.seed, 1, step])
            border = images.shape[-1] // 8
            corner = rng.integers(0, 2 * border + 1, (self.batch_size, 2))[self.own]
            flip = (rng.random(self.batch_size) < 0.5)[self.own]
            flip &= ~self.sided[chosen]  # "left" must stay true
            images = crop_and_flip(images, border, corner, flip)
        images = torch.from_numpy(images).to(self.device)
        return to_model(images), tokens[:, :longest].to(self.device)


def names_a_side(text):
    """Does the text say left or right, as in left-handed and rightmost, too?"""
    parts = "-".join(words(text)).replace("'", "-").split("-")
    return not {"left", "right", "leftmost", "rightmost"}.isdisjoint(parts)


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
    data = Dataset(np.stack(images), captions, source="generated scenes")
    if split not in ("train", "val"):
        data.labels = np.array(labels)
        data.classes = [f"{colour} {shape}" for colour, shape in PAIRS]  # not the held-out only
        data.templates = [f"a {size} {{}} at the {corner}" for size in RADII for corner in CORNERS]
    return data


# ------------------------------------------------------------------------------------------------
# CIFAR: labels become text by prompts, as JFT's do (Sec. 4.1)

TEMPLATES = [  # 8 of CLIP's 18 for CIFAR
    "a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.",
    "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
    "a photo of a big {}.", "a photo of the {}."]


# ------------------------------------------------------------------------------------------------
# Plumbing: nothing about CoCa below

# Programs: what they say, how they end, and files


class UserError(Exception):
    """Something that the user can put right: one line that says what, where, and what to do."""


class DoesNotApply(UserError):
    """The model or the data lack what is asked for; there may be something else to do."""


def run_program(main):
    """Runs main. What the user can put right, and Ctrl-C, end it with one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # somebody reads no further, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as e:
        sys.exit(f"error: {e}" if first_process() else 1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def first_process():
    """Under torchrun several processes do the same; only the first prints."""
    return os.environ.get("RANK", "0") == "0"


def note(text):
    if first_process():
        tqdm.write(f"note: {text}", file=sys.stderr)  # above a progress bar, not into it


@contextlib.contextmanager
def replacing(path):
    """Opens a file beside path that takes its place when it is written: never half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); it is as before") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_error(path):
    """Whatever is wrong with a file's text becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except UnicodeError as e:
        raise UserError(f"{path}: cannot be read as text ({e}); save it as UTF-8") from None
    except Exception as e:  # others' files can be wrong in any way
        what = e if isinstance(e, ValueError) else repr(e)
        raise UserError(f"{path}: {what!s:.300}; mend it, or get it again") from None


# CIFAR's files


def cifar(name, data_dir, files, size):
    """Dataset of the training or the test images, files "train" or "val"."""
    kind = CIFAR[name]
    root = data_dir / kind["folder"]
    if not root.is_dir():  # DIR may be the folder itself
        root = data_dir
    paths = [root / file for file in kind[files]]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise UserError(f"{paths[0]}: no such file; give its folder as --data-dir, or fetch it: "
                        f"python -m experiments.fetch {name} {shlex.quote(str(data_dir))}")
    if len(found) < len(paths):
        note(f"{len(found)} of {len(paths)} {files} batches of {name} are in {root}; using those")
    classes = read_cifar(root / kind["meta"], kind["names"])
    batches = [read_cifar(path, kind["labels"], classes) for path in found]
    labels = np.concatenate([labels for labels, _ in batches])
    images = resize(np.concatenate([images for _, images in batches]), size)
    captions = [[template.format(classes[label]) for template in TEMPLATES] for label in labels]
    return Dataset(images, captions, labels, classes, TEMPLATES, augment=True, source=str(root))


CIFAR = {
    "cifar10": dict(
        folder="cifar-10-batches-py", train=[f"data_batch_{i}" for i in range(1, 6)],
        val=["test_batch"], meta="batches.meta", names="label_names", labels="labels"),
    "cifar100": dict(
        folder="cifar-100-python", train=["train"], val=["test"],
        meta="meta", names="fine_label_names", labels="fine_labels"),
}


class StandIn:
    """Stands in a pickle for all that numpy and _codecs would make: keeps arguments and state."""

    def __init__(self, *args):
        self.args = args
        self.state = None

    def __setstate__(self, state):
        self.state = state


class PlainUnpickler(pickle.Unpickler):
    """Unpickles plain containers and StandIns, and runs nothing that a file names."""

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, as no CIFAR file does")
        return StandIn


def plain(value):
    """A StandIn of integers -> an array of them. All else stays."""
    if not isinstance(value, StandIn):
        return value
    shape = ()
    order = "C"
    if value.state:  # numpy.ndarray
        _, shape, kind, by_columns, content = value.state
        order = "CF"[by_columns]
    elif len(value.args) == 4:  # numpy's _frombuffer, in protocol 5
        content, kind, shape, order = value.args
    else:  # numpy.int64 and the like
        kind, content = value.args
    if isinstance(content, StandIn):  # _codecs.encode
        content = content.args[0]
    if isinstance(content, str):  # of Python 2, or of protocol 2
        content = content.encode("latin1")
    name = kind.state[1] + kind.args[0]  # such as <i8
    if not re.fullmatch("[<>|][iu][1248]", name):
        raise pickle.UnpicklingError(f"numbers of type {name}")
    return np.frombuffer(content, name).reshape(shape, order=order)


def read_cifar(path, key, classes=()):
    """-> what a CIFAR file holds under key: names of classes, or with these the labels (n,) and the
    images (n, 3, 32, 32).
    """
    try:
        with open(path, "rb") as f:
            content = PlainUnpickler(f, encoding="latin1").load()
        if not classes:
            return [name.replace("_", " ") for name in content[key]]
        labels = np.array([plain(label).__index__() for label in plain(content[key])])
        images = plain(content["data"])
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError("not 3072 bytes for each label")
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels other than 0 to {len(classes) - 1}")
        return labels, images.reshape(-1, 3, 32, 32)
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a CIFAR file, or damaged ({e!r:.200}); fetch it anew, "
                        "for example by python -m experiments.fetch") from None


def resize(images, size):
    """Square images (N, 3, S, S) uint8 -> (N, 3, size, size)."""
    if images.shape[-1] == size:
        return images
    resized = np.empty((len(images), 3, size, size), np.uint8)
    for i in range(0, len(images), 1000):
        part = torch.tensor(images[i:i + 1000])
        resized[i:i + 1000] = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return resized


# Pictures in files

# What Pillow may read. (All it knows would include PostScript, for which it starts a program)
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]


def pillow():
    """Pillow's Image module: imported only where pictures are read or written."""
    try:
        from PIL import Image
        return Image
    except ImportError:
        raise UserError("pictures need Pillow; run: pip install pillow") from None


def to_rgb(image):
    """A Pillow image as a viewer shows it: RGB, transparent parts white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError("more than 8 bits a channel; convert it to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, "white")
        return pillow().alpha_composite(white, image).convert("RGB")
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
        raise UserError(f"{path}: not a readable image of {', '.join(FORMATS)} ({e})") from None


def captioned_images(captions, size, name, source, folders):
    """captions: {path: [caption, ...]} -> Dataset. source: the file that names the paths; folders:
    where the pictures were looked for.
    """
    advice = (f"{source} names them; looked in {' and '.join(map(str, folders))}. Mend them, or "
              f"leave out those that are not there: {converter(source.parent)}")
    images = cached_images([*captions], size, name, advice)
    names = [os.path.basename(path) for path in captions]
    return Dataset(images, [*captions.values()], names=names, augment=True, source=str(source))


def cached_images(paths, size, name, advice):
    """Decodes each picture once -> (N, 3, size, size) uint8, kept in ~/.cache/coca or $COCA_CACHE.

    The file's name ends in a hash of all paths, dates, lengths and the size in pixels: if one
    changes, a new file is made. (Old ones stay until you delete them.)
    """
    facts = [size]
    for path in paths:
        facts.append(path)
        if os.path.isfile(path):  # (else decode_into will say so)
            found = os.stat(path)
            facts += [found.st_mtime_ns, found.st_size]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    shape = (len(paths), 3, size, size)
    folder = os.environ.get("COCA_CACHE") or "~/.cache/coca"
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: no home folder
        raise UserError(f"{folder}: cannot keep the decoded images there ({e}); "
                        "set COCA_CACHE to a folder that can be written") from None
    file = folder / f"{name}-{size}px-{digest[:32]}"
    if not file.exists() or file.stat().st_size != np.prod(shape):
        with replacing(file) as f:
            decode_into(f, paths, size, name, advice)
    return np.memmap(file, np.uint8, "r", shape=shape)


def decode_into(f, paths, size, name, advice):
    """Writes the pictures' pixels. All are tried before a UserError says which cannot be read."""
    def decode(path):
        try:
            return read_image(path, size)
        except UserError as e:
            return e

    pillow()  # its absence should show at once
    broken = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(decode, paths)  # Pillow releases Python's lock
        try:
            for image in tqdm(images, f"decoding {name}", len(paths), leave=False):
                if isinstance(image, UserError):
                    broken.append(str(image))
                else:
                    f.write(image.tobytes())
        finally:
            pool.shutdown(cancel_futures=True)
    if broken:
        raise UserError(f"{len(broken)} of {len(paths)} pictures cannot be read: "
                        f"{'; '.join(broken[:10])}. {advice}")


# COCO and captions: tables of pictures and their captions


def coco(data_dir, files):
    """-> {path: [caption, ...]}, the file they are from, the pictures' folders. files: "train" or
    "val". Both are of one year, the first that is whole.
    """
    for year in ("2017", "2014"):
        wanted = [f"annotations/captions_train{year}.json", f"annotations/captions_val{year}.json",
                  f"train{year}", f"val{year}"]
        if all((data_dir / name).exists() for name in wanted):
            source = data_dir / "annotations" / f"captions_{files}{year}.json"
            folder = data_dir / f"{files}{year}"
            return coco_captions(source, folder), source, [folder]
    raise UserError(f"{data_dir}: not whole; --data-dir must hold annotations/captions_train2017"
                    ".json, annotations/captions_val2017.json, train2017/ and val2017/ (or all of "
                    f"2014). For other files: {converter(data_dir)}, then --data captions")


def coco_captions(source, folder):
    captions = defaultdict(list)
    skipped = 0
    with one_error(source):
        content = json.loads(source.read_text(encoding="utf-8-sig"))
        paths = {}
        for image in content["images"]:
            paths[image["id"]] = os.path.join(folder, image["file_name"])
        for annotation in content["annotations"]:
            text = annotation["caption"] or ""
            if annotation["image_id"] in paths and text.strip():
                captions[paths[annotation["image_id"]]].append(text)
            else:
                skipped += 1
        if not captions:
            raise ValueError("no captions of its images")
    if skipped:
        note(f"{source}: {skipped} captions skipped, empty or of images that it does not list")
    return captions


TABLES = ["coca.csv", "captions.csv", "captions.txt"]  # the first that is there is read


def converter(folder):
    """The command that makes coca.csv of other tables, and of tables whose pictures are not all
    there.
    """
    return f"python -m experiments.tables {shlex.quote(str(folder))}"


def captions_table(data_dir, files):
    """-> {path: [caption, ...]}, the file they are from, the pictures' folders: the first of TABLES
    in data_dir, and data_dir or its Images.

    files: "train" or "val". The table's split train is learned from; test is evaluated on, or val
    where there is no test. Without splits a hash chooses one picture in ten (held_out).
    """
    tables = [data_dir / name for name in TABLES if (data_dir / name).is_file()]
    if not tables:
        raise UserError(f"{data_dir}: no {', '.join(TABLES)} there; {converter(data_dir)} makes "
                        "one of other tables")
    folders = [data_dir, data_dir / "Images"]
    captions = defaultdict(list)
    paths = defaultdict(set)  # of each split
    for picture, caption, split in table_rows(tables[0]):
        path = os.path.abspath(folders[0] / picture)
        if not os.path.isfile(path):
            path = os.path.abspath(folders[1] / picture)
        captions[path].append(caption)
        paths[split].add(path)
    learned = paths["train"]
    tested = paths["test"] or paths["val"]
    if paths[""]:
        tested = held_out(captions)
        learned = captions.keys() - tested
    for path in learned & tested:
        raise UserError(f"{tables[0]}: {path} is in two splits; take it out of one")
    if not learned or not tested:
        raise UserError(f"{tables[0]}: {len(learned)} pictures to learn from and {len(tested)} to "
                        "evaluate on; give at least one of each, for example by a column split")
    chosen = learned if files == "train" else tested
    return {path: captions[path] for path in chosen}, tables[0], folders


def table_rows(table):
    """Of each line the picture, a caption and the split, "" if the table does not say."""
    with one_error(table):
        header, *lines = table.read_text(encoding="utf-8-sig").split("\n")
        if header not in ("image,caption", "image,caption,split"):
            raise UserError(f"{table}: line 1 must be image,caption or image,caption,split; for "
                            f"other tables: {converter(table.parent)}")
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            try:
                cells, = csv.reader([line], strict=True)
            except csv.Error as e:
                raise ValueError(f"line {number}: {e}: a quote is not closed, or not doubled in a "
                                 "caption") from None
            if len(cells) != header.count(",") + 1 or not all(cell.strip() for cell in cells):
                raise ValueError(f"line {number}: must be {header}, and a caption with a comma in "
                                 "quotes")
            picture, caption, split = [*cells, ""][:3]
            if split not in ("", "train", "val", "test"):
                raise ValueError(f"line {number}: the split is {split!r}; write train, val or test")
            yield picture, caption, split


def held_out(paths):
    """About one picture in ten for evaluation, at least one, by a hash of its path below the folder
    that all share. So moving that folder changes no split, and a new file in it moves no old one
    (but the one that is chosen where no hash is small enough).
    """
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    digest = {}
    for path in paths:
        below = Path(path).relative_to(root).as_posix()
        digest[path] = hashlib.sha256(below.encode()).digest()
    chosen = {path for path in paths if digest[path][0] < 26}
    return chosen or {min(paths, key=digest.get)}
