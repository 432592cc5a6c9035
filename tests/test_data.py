"""data.py: scenes, CIFAR, COCO and captioned images are read right, and whatever is wrong is named in one line."""
import csv
import hashlib
import http.client
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from coca import BEGIN, END, PAD, UNKNOWN
from data import HELD_OUT, PAIRS, Batches, DataError, Dataset, Tokenizer, load

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def refused(match, call):
    """`call` must end in a DataError of one short line that says `match`."""
    with pytest.raises(DataError, match=match) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def same(a, b):
    return np.array_equal(a.images, b.images) and a.captions == b.captions and np.array_equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------
# shapes

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def pairs(split):
    """Colours and shapes that the captions of a split speak of."""
    texts = " ".join(text for i in range(400) for text in data.describe(data.scene(0, split, i)[0]))
    return set(re.findall(r"a (?:small|large) (\w+) (\w+)", texts))


def is_true(caption, things):
    """Whether a caption, read word by word, fits the centres of the things."""
    parts = [re.fullmatch(r"(a \w+ \w+ \w+) at the (top|bottom) (left|right)", part) for part in caption.split(" and ")]
    return len(parts) == len(things) and all(any(
        str(thing) == part[1] and (part[2] == "top") == (thing.y < 0.5) and (part[3] == "left") == (thing.x < 0.5)
        for thing in things) for part in parts)


def test_a_scene_depends_on_seed_split_and_index_only():
    things, image = data.scene(0, "train", 7)[0], data.draw(*data.scene(0, "train", 7), 16)
    assert data.scene(0, "train", 7)[0] == things and np.array_equal(image, load("shapes", subset=9, size=16).images[7])
    for other in ((1, "train", 7), (0, "val", 7), (0, "train", 8)):
        assert data.scene(*other)[0] != things and not np.array_equal(data.draw(*data.scene(*other), 16), image)


def test_held_out_pairs_are_in_zero_shot_scenes_only():
    assert pairs("train") == pairs("val") == set(PAIRS) - set(HELD_OUT)
    assert pairs("zeroshot") == set(HELD_OUT)  # control: the same search finds them where they are


@pytest.mark.parametrize("split", data.SPLITS)
def test_every_caption_is_true_of_its_scene_and_its_picture(split):
    for i in range(200):
        things, rng = data.scene(0, split, i)
        texts, image = data.describe(things), data.draw(things, rng, 32)
        assert texts and all(is_true(text, things) for text in texts)
        lies = [re.sub("|".join(OPPOSITE), lambda word: OPPOSITE[word[0]], text) for text in texts]  # control: the other corner
        assert len(set(map(str, things))) < len(things) or not any(is_true(lie, things) for lie in lies)
        for thing in things:
            centre = image[:, int(thing.y * 32), int(thing.x * 32)].astype(int)
            assert thing.shape == "ring" or abs(centre - data.COLOURS[thing.colour]).max() < 45


def test_zero_shot_labels_and_prompts_agree_with_the_captions():
    scenes = load("shapes", split="zeroshot", size=8)
    assert len(scenes) == len(scenes.labels) == 600 and len(scenes.classes) == len(PAIRS)
    for label, texts in zip(scenes.labels, scenes.captions):
        assert texts[0] in [prompt.format(scenes.classes[label]) for prompt in scenes.templates]


# ------------------------------------------------------------------------------------------------
# cifar10, cifar100: tiny files in the official formats

FOLDERS = {"cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"), "cifar100": ("cifar-100-python", "cifar-100-binary")}
FILES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
CLASSES = {"cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
           "cifar100": ["apple", "aquarium_fish", *(f"class_{i}" for i in range(2, 100))]}
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01("
DTYPE = b"cnumpy\ndtype\nU\x02%bK\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def python2(value):
    """A pickle as Python 2 wrote it, with byte strings: what the official files hold, and Python 3 cannot write."""
    def write(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(write(x) for item in value.items() for x in item) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, np.ndarray):
            return (ARRAY + b"".join(map(write, value.shape)) + b"t" + DTYPE % value.dtype.str[1:].encode()
                    + b"\x89" + write(value.tobytes()) + b"tb")
        value = value if isinstance(value, bytes) else value.encode("latin1")
        return b"T" + struct.pack("<i", len(value)) + value
    return b"\x80\x02" + write(value) + b"."


def cifar_batch(name, file):
    rng = np.random.default_rng(list(file.encode()))
    fine = rng.integers(0, len(CLASSES[name]), 4).tolist()
    labels = {"labels": fine} if name == "cifar10" else {"coarse_labels": rng.integers(0, 20, 4).tolist(), "fine_labels": fine}
    return {"batch_label": file, **labels, "data": rng.integers(0, 256, (4, 3072), np.uint8), "filenames": ["a.png"] * 4}


def write_cifar(root, name="cifar10", pickled=python2, files=None):
    """pickled: python2, another that makes bytes of a dict, or None for the binary layout."""
    folder = root / FOLDERS[name][pickled is None]
    folder.mkdir(parents=True)
    if pickled:
        names = {"label_names" if name == "cifar10" else "fine_label_names": CLASSES[name]}
        (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickled(names))
    else:
        (folder / ("batches.meta.txt" if name == "cifar10" else "fine_label_names.txt")).write_text("\n".join(CLASSES[name]) + "\n\n")
    for file in files or FILES[name]:
        batch = cifar_batch(name, file)
        if pickled:
            (folder / file).write_bytes(pickled(batch))
        else:
            rows = zip(*(batch[key] for key in ("labels", "coarse_labels", "fine_labels") if key in batch), batch["data"])
            (folder / f"{file}.bin").write_bytes(b"".join(bytes(labels) + pixels.tobytes() for *labels, pixels in rows))
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_the_same_from_all_layouts_and_from_the_folder_or_its_parent(tmp_path, name, split):
    batches = [cifar_batch(name, file) for file in (FILES[name][:-1] if split == "train" else FILES[name][-1:])]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels" if name == "cifar10" else "fine_labels"]]
    for i, pickled in enumerate((python2, lambda x: pickle.dumps(x, 2), None)):
        for folder in (write_cifar(tmp_path / str(i), name, pickled), str(tmp_path / str(i))):
            found = load(name, folder, split)
            assert np.array_equal(found.images, images) and found.labels.tolist() == labels
            assert found.classes == [text.replace("_", " ") for text in CLASSES[name]]
            assert all(found.classes[label] in text for label, texts in zip(labels, found.captions) for text in texts)


def test_cifar_with_two_of_five_batches_works_and_says_so(tmp_path, capsys):
    assert len(load("cifar10", write_cifar(tmp_path, files=["data_batch_1", "data_batch_4", "test_batch"]))) == 8
    assert "2 of 5 train batches" in capsys.readouterr().err
    assert len(load("cifar10", tmp_path, "val")) == 4 and not capsys.readouterr().err
    assert load("cifar10", tmp_path, size=48).images.shape == (8, 3, 48, 48)


def test_subset_is_the_same_images_every_time_and_never_more_than_there_are(tmp_path):
    write_cifar(tmp_path)
    few, whole = (load("cifar10", tmp_path, subset=n) for n in (7, 0))
    assert len(few) == 7 and same(few, load("cifar10", tmp_path, subset=7)) and len(load("cifar10", tmp_path, "val", subset=7)) == 4
    rows = [next(i for i, image in enumerate(whole.images) if np.array_equal(image, wanted)) for wanted in few.images]
    assert [whole.labels[i] for i in rows] == few.labels.tolist() and [whole.captions[i] for i in rows] == few.captions
    refused(f"{tmp_path}.*--subset 21.* 20", lambda: load("cifar10", tmp_path, subset=21))


def test_missing_cifar_files_are_named(tmp_path):
    refused("--data-dir", lambda: load("cifar10"))
    refused("none/cifar-100-python/train: no such file.*--download", lambda: load("cifar100", tmp_path / "none"))
    (write_cifar(tmp_path) / "batches.meta").unlink()
    refused("batches.meta: no such file", lambda: load("cifar10", tmp_path))
    (write_cifar(tmp_path / "binary", pickled=None) / "batches.meta.txt").unlink()
    refused("batches.meta.txt: no such file", lambda: load("cifar10", tmp_path / "binary"))


BATCH = cifar_batch("cifar10", "data_batch_1")
BAD = {"empty": b"", "cut off": python2(BATCH)[:9000], "random": np.random.default_rng(0).bytes(5000), "list": python2([1, 2])} | {
    why: python2(BATCH | change) for why, change in {
        "three labels": {"labels": [1, 2, 3]}, "label 10": {"labels": [1, 2, 3, 10]}, "label -1": {"labels": [1, 2, 3, -1]},
        "ragged labels": {"labels": [1, [2, 3], 4, 5]}, "nested labels": {"labels": [[1], [2], [3], [4]]}, "label no list": {"labels": 4},
        "text labels": {"labels": ["1", "2", "3", "4"]}, "narrow data": {"data": BATCH["data"][:, :-1]}, "text data": {"data": "x"},
        "signed data": {"data": BATCH["data"].view(np.int8)}}.items()} | {
    "meta empty": b"", "meta without names": python2({}), "meta number": python2({"label_names": 5}),
    "meta numbers": python2({"label_names": [1] * 10}), "bin empty": b"", "bin cut off": bytes(3072), "bin label 10": b"\x0a" * 3073}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_cifar_file_is_refused_by_name(tmp_path, why):
    file = "batches.meta" if why.startswith("meta") else "data_batch_2.bin" if why.startswith("bin") else "data_batch_1"
    (write_cifar(tmp_path, pickled=None if why.startswith("bin") else python2) / file).write_bytes(BAD[why])
    refused(file, lambda: load("cifar10", tmp_path))


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["system", "eval"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, how, protocol):
    marker = tmp_path / "ran"
    evil = Evil(os.system, f"touch {marker}") if how == "system" else Evil(eval, f"open({str(marker)!r}, 'w').close()")
    content = pickle.dumps({"labels": evil}, protocol)
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(content)
    refused(f"data_batch_1: refused.*{how}", lambda: load("cifar10", tmp_path))
    assert not marker.exists()
    pickle.loads(content)  # noqa: S301 - control: it does run where nothing refuses it
    assert marker.exists()


@pytest.mark.parametrize("module, name", [(b"numpy", b"ndarray.tofile"), (b"os\nb", b"system")])
def test_odd_names_in_a_pickle_are_refused_in_one_line(tmp_path, module, name):
    content = b"\x80\x04\x8c%c%b\x8c%c%b\x93." % (len(module), module, len(name), name)
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(content)
    refused("data_batch_1: refused", lambda: load("cifar10", tmp_path))


# ------------------------------------------------------------------------------------------------
# --download, from a server inside the test


class Reply(io.BytesIO):
    def __init__(self, content, status, length, error):
        super().__init__(content)
        self.status, self.headers, self.error = status, {"Content-Length": str(length)}, error

    def read(self, size=-1):
        if not (block := super().read(size)) and self.error:
            raise self.error
        return block


class Server:
    """Sends `content`; the first time only `cut` bytes of it, then `error` (None: the connection just ends)."""

    def __init__(self, monkeypatch, content, cut=None, error=None, resumes=True):
        self.content, self.cut, self.error, self.resumes, self.ranges = content, cut, error, resumes, []
        monkeypatch.setattr("urllib.request.urlopen", self.open)
        monkeypatch.setitem(data.CIFAR["cifar10"], "md5", hashlib.md5(content).hexdigest())

    def open(self, request, timeout):
        assert request.full_url == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" and timeout
        self.ranges.append(request.get_header("Range"))
        start = int(self.ranges[-1][len("bytes="):-1]) if self.ranges[-1] and self.resumes else 0
        if start == len(self.content):
            raise urllib.error.HTTPError(request.full_url, 416, "Range Not Satisfiable", {}, None)
        cut, error, self.cut, self.error = self.cut, self.error, None, None
        return Reply(self.content[start:cut], 206 if start else 200, len(self.content) - start, error)


def packed(*members):
    """A .tar.gz of (name, content); content None makes a link to the folder above."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = (tarfile.REGTYPE, "", len(content)) if content else (tarfile.SYMTYPE, "..", 0)
            tar.addfile(member, io.BytesIO(content or b""))
    return file.getvalue()


@pytest.fixture
def archive(tmp_path):
    folder = write_cifar(tmp_path / "source")
    return packed(*((f"{folder.name}/{file.name}", file.read_bytes()) for file in folder.iterdir()))


def test_an_archive_is_fetched_once_over_https_and_unpacked(tmp_path, monkeypatch, archive):
    server = Server(monkeypatch, archive)
    for _ in range(2):
        assert same(load("cifar10", tmp_path / "new" / "data", download=True), load("cifar10", tmp_path / "source"))
    assert server.ranges == [None] and data.CIFAR["cifar100"]["url"].startswith("https://")


def test_an_archive_with_another_md5_is_not_unpacked(tmp_path, monkeypatch, archive):
    Server(monkeypatch, archive)
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", "0" * 32)
    refused("cifar-10-python.tar.gz: wrong md5", lambda: load("cifar10", tmp_path / "data", download=True))
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), http.client.IncompleteRead(b""), None], ids=["reset", "cut", "ends"])
@pytest.mark.parametrize("share, resumes", [(0.5, True), (0.5, False), (1, True)])
def test_a_download_that_broke_off_goes_on_or_starts_again(tmp_path, monkeypatch, archive, error, share, resumes):
    cut = int(share * len(archive))
    server = Server(monkeypatch, archive, cut, error, resumes)
    if error or cut < len(archive):
        refused("https://.*download failed.*again", lambda: load("cifar10", tmp_path / "data", download=True))
    assert same(load("cifar10", tmp_path / "data", download=True), load("cifar10", tmp_path / "source"))
    assert cut == len(archive) or server.ranges == [None, f"bytes={cut}-"]


def test_a_download_into_a_file_is_refused(tmp_path, monkeypatch, archive):
    Server(monkeypatch, archive)
    (tmp_path / "file").write_text("")
    refused(f"{tmp_path}/file", lambda: load("cifar10", tmp_path / "file", download=True))


@pytest.mark.parametrize("members", [[("../evil", b"x")], [("link", None), ("link/evil", b"x")]])
def test_an_archive_that_leads_outside_is_refused_and_writes_nothing_there(tmp_path, monkeypatch, members):
    Server(monkeypatch, packed(*members))
    refused("cifar-10-python.tar.gz: could not be unpacked", lambda: load("cifar10", tmp_path / "data", download=True))
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------
# coco, captions


def paint(path, number=0):
    """An image of one colour that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(path)


def write_coco(root, split="val", year="2017", count=3):
    names = {7 * i: f"{f'COCO_{split}2014_' if year == '2014' else ''}{7 * i:012}.png" for i in range(count)}
    for i, name in names.items():
        paint(root / f"{split}{year}" / name, i)
    content = {"info": {}, "licenses": [], "images": [{"id": i, "file_name": name, "height": 8, "width": 8} for i, name in names.items()],
               "annotations": [{"image_id": i, "id": 0, "caption": f"{text} of {i}"} for text in ("one", "two") for i in names]}
    annotations = root / "annotations" / f"captions_{split}{year}.json"
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(content))
    return annotations


def write_captions(root, count, texts=("one of {}", "two of {}"), order=1):
    """`count` numbered images, each with all the texts."""
    for i in range(count):
        paint(root / "Images" / f"{i}.png", i)
    with open(root / "captions.txt", "w", newline="") as f:
        csv.writer(f).writerows([("image", "caption"), *((f"{i}.png", text.format(i)) for text in texts for i in range(count)[::order])])


def agrees(found):
    """Whether each image has both of its captions, and no others."""
    return all(texts == [f"one of {image[0, 0, 0]}", f"two of {image[0, 0, 0]}"] for image, texts in zip(found.images, found.captions))


def both(root):
    return [load("captions", root, split, size=8) for split in ("train", "val")]


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_coco_keeps_several_captions_with_their_image(tmp_path, year):
    for split, count in (("train", 4), ("val", 3)):
        write_coco(tmp_path, split, year, count)
        found = load("coco", tmp_path, split, size=8)
        assert len(found) == count and agrees(found)
    assert len(load("coco", tmp_path, size=8, subset=2)) == 2


def test_missing_coco_files_are_named_and_counted(tmp_path):
    refused("none: no such folder", lambda: load("coco", tmp_path / "none"))
    refused("captions_train2017.json: no such file.*--data-dir", lambda: load("coco", tmp_path))
    refused("--download fetches CIFAR only", lambda: load("coco", tmp_path, download=True))
    write_coco(tmp_path)
    for i in (7, 14):
        (tmp_path / "val2017" / f"{i:012}.png").unlink()
    refused("captions_val2017.json: 2 of the 3 images.*first .*val2017/000000000007.png", lambda: load("coco", tmp_path, "val"))


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"images": 5}', '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "[" * 9999,
    '{"images": [{"id": 1, "file_name": 5}], "annotations": []}', '{"images": [], "annotations": []}'], ids=range(9))
def test_broken_coco_annotations_are_refused_by_name(tmp_path, text):
    write_coco(tmp_path).write_text(text)
    refused("captions_val2017.json", lambda: load("coco", tmp_path, "val"))


def test_captions_may_hold_commas_quotes_and_a_byte_order_mark(tmp_path):
    (tmp_path / "my.csv").write_bytes(b'\xef\xbb\xbfimage,caption\r\n1.png,"A ""big"" dog , running"\r\n1.png,Plain .\r\n2.png,"A, b"\r\n')
    for i in (1, 2):
        paint(tmp_path / f"{i}.png")
    assert sorted(both(tmp_path)[0].captions + both(tmp_path)[1].captions) == [['A "big" dog , running', "Plain ."], ["A, b"]]


def test_captions_are_split_by_image_and_the_same_in_any_order(tmp_path):
    write_captions(tmp_path / "a", 40)
    write_captions(tmp_path / "b", 40, order=-1)
    train, val = both(tmp_path / "a")
    assert len(val) == 4 and agrees(train) and agrees(val)
    assert sorted(texts[0] for texts in train.captions + val.captions) == sorted(f"one of {i}" for i in range(40))
    assert all(same(*found) for found in zip((train, val), both(tmp_path / "b")))


@pytest.mark.parametrize("text", [
    "", "file,text\n1.png,a dog\n", "image;caption\n1.png;a dog\n", "1.png,a dog\n", "image,caption\n", "image,caption\n1.png,\n",
    "image,caption\n1.png,a dog, running\n", 'image,caption\n1.png,"a dog\n2.png,a cat\n', 'image,caption\n"1\n.png",a dog\n',
    "image,caption\nnone.png,a dog\n", "image,caption\n1.png,caf\udce9\n"],
    ids=["nothing", "other columns", "semicolons", "no header", "no rows", "no text", "comma without quotes", "open quote",
         "name of two lines", "no such image", "not UTF-8"])
def test_a_bad_table_of_captions_is_refused_by_name(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text, "utf-8", "surrogateescape")
    paint(tmp_path / "1.png")
    refused("captions.txt", lambda: load("captions", tmp_path, "val"))


def test_a_missing_table_of_captions_is_named(tmp_path):
    refused("captions.txt: no such file.*image,caption", lambda: load("captions", tmp_path))


def test_empty_captions_are_skipped_and_counted(tmp_path, capsys):
    write_captions(tmp_path, 20, ["", "one of {}", "  ", "two of {}"])
    assert all(map(agrees, both(tmp_path)))
    assert sum(map(int, re.findall(r"(\d+) empty captions skipped", capsys.readouterr().err))) == 40


def test_one_unreadable_image_in_a_hundred_is_named_and_skipped_but_no_more(tmp_path, capsys):
    write_captions(tmp_path, 120)
    whole = load("captions", tmp_path, size=8)
    first, second = (tmp_path / "Images" / f"{texts[0].split()[-1]}.png" for texts in whole.captions[:2])
    Image.new("RGB", (8, 8)).save(first, "JPEG")
    first.write_bytes(first.read_bytes()[:400])
    found, noted = load("captions", tmp_path, size=8), capsys.readouterr().err
    assert f"{first}: not a readable image" in noted and "1 of 110" in noted
    assert found.captions == whole.captions[1:] and agrees(found)
    second.write_bytes(second.read_bytes()[:50])
    refused(f"{tmp_path}.* 2 of 110", lambda: load("captions", tmp_path, size=8))
    assert f"{second}: not a readable image" in capsys.readouterr().err and not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("mode, end, colour, wanted", [
    ("L", "png", 90, (90, 90, 90)), ("L", "jpg", 90, (90, 90, 90)), ("LA", "png", (90, 255), (90, 90, 90)),
    ("1", "png", 1, (255, 255, 255)), ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)), ("P", "png", 1, (250, 128, 3)),
    ("RGBA", "png", (250, 128, 3, 255), (250, 128, 3)), ("I;16", "png", 32768, (128, 128, 128)), ("I;16", "png", 300, (1, 1, 1))])
def test_every_colour_mode_becomes_rgb(tmp_path, mode, end, colour, wanted):
    image = Image.new(mode, (20, 12), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 250, 128, 3])
    image.save(tmp_path / f"x.{end}")
    found = data.read_image(tmp_path / f"x.{end}", 8)
    assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    assert abs(found.reshape(3, -1).T.astype(int) - wanted).max() <= 3


def test_without_pillow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    write_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("pip install pillow", lambda: load("coco", tmp_path, "val"))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_second_load_reads_the_cache_and_a_changed_file_is_decoded_anew(tmp_path, monkeypatch):
    write_captions(tmp_path, 10)
    first = load("captions", tmp_path, size=8)
    with monkeypatch.context() as without:
        without.setattr(data, "read_image", lambda *_: pytest.fail("decoded"))
        assert same(load("captions", tmp_path, size=8), first)
        with pytest.raises(pytest.fail.Exception):  # control: another size is not in the cache
            load("captions", tmp_path, size=4)
    changed = tmp_path / "Images" / f"{first.captions[3][0].split()[-1]}.png"
    paint(changed, 100)
    os.utime(changed, (1, 1))
    second = load("captions", tmp_path, size=8)
    assert (second.images[3, 0] == 100).all() and np.array_equal(np.delete(second.images, 3, 0), np.delete(first.images, 3, 0))


@pytest.mark.parametrize("end", ["npy", "json"])
def test_a_cache_that_was_cut_off_is_made_anew(tmp_path, end):
    write_captions(tmp_path, 10)
    first = load("captions", tmp_path, size=8)
    for share in (0, 0.01, 0.5, 0.99):
        file, = (tmp_path / "cache").glob(f"*.{end}")
        content = file.read_bytes()
        file.unlink()  # a new file, as the old one may still be mapped
        file.write_bytes(content[:int(share * len(content))])
        assert same(load("captions", tmp_path, size=8), first)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_data_loads():
    cifar = load("cifar10", REAL, "val")
    assert cifar.images.shape == (10000, 3, 32, 32) and np.bincount(cifar.labels).tolist() == [1000] * 10
    for found, count in ((load("coco", REAL / "coco", "val"), 119), (load("captions", REAL / "flickr8k", subset=20), 20)):
        assert found.images.shape == (count, 3, 32, 32) and found.images.std() > 30 and {len(texts) for texts in found.captions} == {5}


# ------------------------------------------------------------------------------------------------
# text

WORDS = st.text("abcdefgh", min_size=1, max_size=4)


@pytest.mark.parametrize("text", ["the dog's ball, and a cat.", "wait! what? 50%; yes: no", "the man’s dog"])
def test_text_comes_back_readable(text):
    tokenizer = Tokenizer.learn([text], 100)
    assert tokenizer.decode(tokenizer.encode([text.upper()], 32)[0]) == text


@given(st.lists(st.lists(WORDS, max_size=9), min_size=1, max_size=5), st.integers(2, 12))
def test_tokens_are_begin_words_end_and_pads_and_no_longer_than_text_len(texts, text_len):
    tokenizer = Tokenizer.learn(map(" ".join, texts), 1000)
    tokens = tokenizer.encode(map(" ".join, texts), text_len)
    kept = [words[:text_len - 2] for words in texts]
    assert tokens.dtype == torch.int64 and tokens.shape == (len(texts), max(map(len, kept)) + 2)
    for row, words in zip(tokens, kept):
        end = len(words) + 1
        assert row[0] == BEGIN and row[end] == END and (row[end + 1:] == PAD).all() and (row[1:end] > UNKNOWN).all()
        assert tokenizer.decode(row) == " ".join(words)


@given(st.lists(WORDS, max_size=30), st.integers(5, 12), st.randoms(use_true_random=False))
def test_the_vocabulary_is_capped_holds_the_commonest_and_ignores_the_order_of_texts(words, size, random):
    tokenizer, counts = Tokenizer.learn(words, size), Counter(words)
    special, known = tokenizer.words[:4], tokenizer.words[4:]
    assert len(special) == 4 and len(tokenizer) == min(size, 4 + len(counts))
    assert all(counts[a] >= counts[b] for a in known for b in set(words) - set(known))
    assert Tokenizer.learn(random.sample(words, len(words)), size).words == tokenizer.words


def test_unknown_words_are_unknown_and_names_of_special_tokens_are_not_special():
    tokenizer = Tokenizer.learn(["a dog"], 100)
    assert tokenizer.encode(["a zebra", ""], 9).tolist() == [[BEGIN, tokenizer.index["a"], UNKNOWN, END], [BEGIN, END, PAD, PAD]]
    assert set(tokenizer.encode(["<end> <pad> <begin>"], 20)[0, 1:-1].tolist()) == {UNKNOWN}


# ------------------------------------------------------------------------------------------------
# batches


def make_batches(count=24, batch_size=4, text="picture {}", seed=0, augment=False, images=None, text_len=8, own=slice(None)):
    """Images of one grey each, or `images`, with two captions each."""
    images = np.full((count, 3, 16, 16), np.arange(count)[:, None, None, None], np.uint8) if images is None else images
    captions = [[text.format(i), "again " + text.format(i)] for i in range(count)]
    tokenizer = Tokenizer.learn((text for texts in captions for text in texts), 1000)
    return Batches(Dataset(images, captions, augment=augment), tokenizer, text_len, batch_size, seed, own)


def numbers(images):
    return ((images[:, 0, 8, 8] + 1) * 127.5).round().int().tolist()


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    first, second, other_seed = ([n for step in range(start, start + 6) for n in numbers(make_batches(seed=seed)(step)[0])]
                                 for start, seed in ((0, 0), (6, 0), (0, 1)))
    assert sorted(first) == sorted(second) == list(range(24)) and len({tuple(first), tuple(second), tuple(other_seed), range(24)}) == 4


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_gives_the_same_batch_whatever_came_before(augment):
    used, fresh = make_batches(augment=augment), make_batches(augment=augment)
    before = [used(step) for step in range(9)]
    assert all(torch.equal(a, b) for a, b in zip(before[8], fresh(8))) and not torch.equal(before[7][0], before[8][0])


def test_a_batch_holds_captions_of_its_images_and_values_from_minus_one_to_one():
    batches, texts = make_batches(), set()
    words = ["<pad>", "<begin>", "<end>", "<unk>", "picture", "again", *sorted(map(str, range(24)))]
    for step in range(12):
        images, tokens = batches(step)
        assert images.dtype == torch.float32 and images.shape == (4, 3, 16, 16) and tokens.dtype == torch.int64
        ends = (tokens == END).int().argmax(1)
        assert ((tokens == PAD) == (torch.arange(tokens.shape[1]) > ends[:, None])).all() and tokens.shape[1] == ends.max() + 1
        assert [int(words[row[end - 1]]) for row, end in zip(tokens, ends)] == numbers(images)
        texts |= set(map(tuple, tokens.tolist()))
    assert len(texts) > 24  # another epoch may draw another caption
    extremes = np.full((2, 3, 16, 16), np.array([0, 255])[:, None, None, None], np.uint8)
    assert make_batches(2, 2, images=extremes)(0)[0].unique().tolist() == [-1, 1]


@pytest.mark.parametrize("text, flips", [("a dog left of a cat", False), ("the Right side", False), ("a dog above a cat", True)])
def test_pictures_are_mirrored_unless_the_caption_says_left_or_right(text, flips):
    images = np.zeros((40, 3, 16, 16), np.uint8)
    images[..., 8:] = 255
    found = make_batches(40, 40, text, augment=True, images=images)(0)[0]
    mirrored = (found[..., 3:5].mean((1, 2, 3)) > found[..., 11:13].mean((1, 2, 3))).sum()
    assert 8 <= mirrored <= 32 if flips else mirrored == 0
    assert len(found.unique(dim=0)) > 5  # moved all the same
    assert len(make_batches(40, 40, text, images=images)(0)[0].unique(dim=0)) == 1  # control: only where asked for


def test_long_captions_are_cut_with_a_note_and_a_batch_larger_than_the_data_is_refused(capsys):
    tokens = make_batches(text_len=3)(0)[1]
    assert tokens.shape == (4, 3) and (tokens[:, -1] == END).all() and "48 captions cut to 1 words" in capsys.readouterr().err
    refused("--batch-size 25 .* 24", lambda: make_batches(batch_size=25))


def test_processes_get_their_rows_of_one_batch():
    images, tokens = make_batches(batch_size=9, augment=True)(4)
    for own in (slice(0, 5), slice(5, 9)):
        part = make_batches(batch_size=9, augment=True, own=own)(4)
        assert torch.equal(part[0], images[own]) and torch.equal(part[1], tokens[own, :part[1].shape[1]])
