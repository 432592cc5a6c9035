"""Folders of numbered pictures with their captions, as a user has them."""
import csv
import hashlib
import os
from multiprocessing import get_context
from pathlib import Path
from threading import RLock

from PIL import Image
from tqdm import tqdm

from data import captions_table, load

NAMES = [f"{i}.png" for i in range(20)]
TEXTS = {name: [f"one of {name}", f"two, of {name}"] for name in NAMES}
TESTED = {name for name in NAMES if hashlib.sha256(name.encode()).digest()[0] < 26}  # 3 of them


def colour(number):
    return [number, 7 * number % 256, 255 - number]


def paint(path, number=0):
    """A picture of one colour that tells its number, up to 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), tuple(colour(number))).save(path)


def write_captions(root, count, texts=("one of {}", "two of {}"), first=0):
    """captions.txt and Images/0.png, 1.png, ... each with all the texts."""
    rows = [("image", "caption")]
    for i in range(first, count):
        paint(root / "Images" / f"{i}.png", i)
        rows += [(f"{i}.png", text.format(i)) for text in texts]
    with open(root / "captions.txt", "w", newline="") as f:
        csv.writer(f).writerows(rows)


def check_captions(found, texts=("one of {}", "two of {}")):
    """Every picture has its own pixels, all of its captions and no others -> their numbers."""
    numbers = found.images[:, 0, 0, 0].tolist()
    for number, image, captions in zip(numbers, found.images, found.captions, strict=True):
        assert (image.reshape(3, -1).T == colour(number)).all()
        assert captions == [text.format(number) for text in texts]
    return numbers


def both(root, size=4):
    """The two splits."""
    return [load("captions", root, split, size=size) for split in ("train", "val")]


def alone(function, *args):
    tqdm.set_lock(RLock())  # its own: a process that is killed gives no other its lock back
    function(*args)


def start(function, *args):
    """Another process. It has all that is imported here."""
    process = get_context("fork").Process(target=alone, args=(function, *args))
    process.start()
    return process


def exit_code(process):
    process.join(100)
    return process.exitcode


def parts(root, known=TEXTS):
    """Names of the pictures to learn from and to evaluate on, whose captions must be right."""
    found = []
    for part in ("train", "val"):
        captions, _, _ = captions_table(Path(root), part)
        for path, texts in captions.items():
            assert os.path.isfile(path) and sorted(known[os.path.basename(path)]) == sorted(texts)
        found.append({os.path.basename(path) for path in captions})
    return found


def check_whole(root):
    assert parts(root) == [TEXTS.keys() - TESTED, TESTED]
