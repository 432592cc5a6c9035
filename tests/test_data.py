"""data.py: scenes, CIFAR, COCO and own images are read right, and whatever is wrong is one clear line."""
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
import unicodedata
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
from data import HELD_OUT, PAIRS, Batches, Dataset, Tokenizer, UserError, load, words

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def refused(match, function, *args, **named):
    """The call must end in a UserError of one line that says `match`."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **named)
    assert "\n" not in str(error.value)


def same(a, b):
    equal = np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    return equal and a.captions == b.captions


def bytes_of(dataset):
    return {image.tobytes() for image in dataset.images}


# ------------------------------------------------------------------------------------------------
# shapes

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def is_true(caption, things):
    """Whether a caption, read word by word, fits the centres of the things."""
    there = Counter()
    for thing in things:
        row, column = "bottom" if thing.y > 0.5 else "top", "right" if thing.x > 0.5 else "left"
        there[f"a {thing.size} {thing.colour} {thing.shape} at the {row} {column}"] += 1
    return Counter(caption.split(" and ")) == there


@pytest.mark.parametrize("split", data.SPLITS)
def test_every_caption_is_true_of_its_scene_and_its_picture(split):
    for i in range(100):
        things, rng = data.scene(0, split, i)
        image = data.draw(things, rng, 32)
        for text in data.describe(things):
            assert is_true(text, things)
            if len(things) == 1:  # control: the same with another corner
                elsewhere = re.sub("left|right|top|bottom", lambda word: OPPOSITE[word[0]], text)
                assert not is_true(elsewhere, things)
        for thing in things:
            centre = image[:, int(thing.y * 32), int(thing.x * 32)].astype(int)
            assert thing.shape == "ring" or abs(centre - data.COLOURS[thing.colour]).max() < 45


def test_a_scene_depends_on_seed_split_and_index_only():
    image = load("shapes", subset=9, size=16).images[7]
    assert np.array_equal(image, data.draw(*data.scene(0, "train", 7), 16))
    for other in ((1, "train", 7), (0, "val", 7), (0, "train", 8)):
        assert not np.array_equal(image, data.draw(*data.scene(*other), 16))


def test_held_out_pairs_are_in_zero_shot_scenes_only_whose_prompts_are_their_captions():
    pairs = {}
    for split in ("train", "val", "zeroshot"):
        things = sum((data.scene(0, split, i)[0] for i in range(400)), [])
        pairs[split] = {(thing.colour, thing.shape) for thing in things}
    assert pairs["train"] == pairs["val"] == set(PAIRS) - set(HELD_OUT)
    assert pairs["zeroshot"] == set(HELD_OUT)  # control: the same search finds them where they are
    scenes = load("shapes", split="zeroshot", size=8)
    for label, texts in zip(scenes.labels, scenes.captions, strict=True):
        assert texts[0] in [prompt.format(scenes.classes[label]) for prompt in scenes.templates]


# ------------------------------------------------------------------------------------------------
# cifar10, cifar100: tiny files in the official format

FILES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
KEYS = {"cifar10": ("labels", "batches.meta", "label_names"),
        "cifar100": ("fine_labels", "meta", "fine_label_names")}
CLASSES = {"cifar10": [f"class_{i}" for i in range(10)], "cifar100": [f"class_{i}" for i in range(100)]}


class Python2(pickle._Pickler):
    """Writes byte strings as Python 2 did: what the official files hold, and Python 3 does not write."""

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python2(content):
    file = io.BytesIO()
    Python2(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")  # its name before numpy 2


def cifar_batch(name, file):
    rng = np.random.default_rng(list(file.encode()))
    labels = rng.integers(0, len(CLASSES[name]), 4).tolist()
    pixels = rng.integers(0, 256, (4, 3072), np.uint8)
    return {KEYS[name][0]: labels, "coarse_labels": [0] * 4, "data": pixels}


def write_cifar(root, name="cifar10", pickled=python2):
    folder = root / data.CIFAR[name]["folder"]
    folder.mkdir(parents=True)
    _, meta, names = KEYS[name]
    (folder / meta).write_bytes(pickled({names: CLASSES[name]}))
    for file in FILES[name]:
        (folder / file).write_bytes(pickled(cifar_batch(name, file)))
    return folder


@pytest.mark.parametrize("pickled", [python2, pickle.dumps])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_old_and_new_pickles_in_the_folder_or_its_parent(tmp_path, name, pickled):
    folder = write_cifar(tmp_path, name, pickled)
    for split, files in (("train", FILES[name][:-1]), ("val", FILES[name][-1:])):
        batches = [cifar_batch(name, file) for file in files]
        for place in (folder, str(tmp_path)):
            found = load(name, place, split)
            assert found.images.tobytes() == b"".join(batch["data"].tobytes() for batch in batches)
            assert found.labels.tolist() == sum((batch[KEYS[name][0]] for batch in batches), [])
            for label, texts in zip(found.labels, found.captions, strict=True):
                assert all(f"class {label}" in text for text in texts)


def test_missing_cifar_files_are_named_and_some_of_the_batches_are_enough(tmp_path, capsys):
    refused("--data-dir", load, "cifar10")
    refused("none/cifar-100-python/train: no such file.*--download", load, "cifar100", tmp_path / "none")
    folder = write_cifar(tmp_path)
    for i in (2, 3, 5):
        (folder / f"data_batch_{i}").unlink()
    assert load("cifar10", tmp_path, size=48).images.shape == (8, 3, 48, 48)
    assert "2 of 5 train batches" in capsys.readouterr().err
    (folder / "batches.meta").unlink()
    refused("batches.meta: no such file", load, "cifar10", tmp_path)


def test_subset_is_the_same_images_every_time_and_never_more_than_there_are(tmp_path):
    write_cifar(tmp_path)
    few, whole = load("cifar10", tmp_path, subset=7), load("cifar10", tmp_path)
    rows = [i for i, image in enumerate(whole.images) if image.tobytes() in bytes_of(few)]
    assert len(rows) == 7 and same(few, data.select(whole, rows))
    assert same(few, load("cifar10", tmp_path, subset=7))
    assert len(load("cifar10", tmp_path, "val", subset=7)) == 4
    refused(f"{tmp_path}.*--subset 21.* 20", load, "cifar10", tmp_path, subset=21)


@pytest.mark.parametrize("name", ["cifar10", "shapes"])
def test_val_from_train_keeps_training_images_apart_and_reads_no_others(tmp_path, monkeypatch, name):
    shapes = data.shapes
    monkeypatch.setattr(data, "shapes", lambda split, size, subset, seed: shapes(split, 8, 20, seed))
    (write_cifar(tmp_path) / "test_batch").unlink()

    def part(split, subset=0, apart=5):
        return load(name, tmp_path, split, subset=subset, val_from_train=apart)

    train, val = part("train"), part("val")
    assert len(val) == 5 and len(train) == 15
    assert bytes_of(train) | bytes_of(val) == bytes_of(part("train", 0, 0))
    assert same(part("val"), val) and same(part("val", 12), val)  # the same every time, whatever the subset
    assert len(part("train", 12)) == 12 and bytes_of(part("train", 12)) < bytes_of(train)
    if name == "cifar10":
        assert same(part("zeroshot"), val) and same(part("labelled-val"), val)
        assert same(part("labelled"), train)
        refused("test_batch", part, "val", 0, 0)  # control: the evaluation images are not there
    refused("--val-from-train 20.* 20", part, "train", 0, 20)


BATCH = cifar_batch("cifar10", "data_batch_1")
BAD = {"data_batch_1": [b"", python2(BATCH)[:9000], b"random" * 99, python2([1, 2])],
       "batches.meta": [b"", python2({}), python2({"label_names": 5}), python2({"label_names": [1] * 10})]}
for change in ({"labels": [1, 2, 3]}, {"labels": [1, 2, 3, 10]}, {"labels": [1, 2, 3, -1]}, {"labels": 4},
               {"labels": [1, [2, 3], 4, 5]}, {"labels": ["1", "2", "3", "4"]}, {"data": "x"},
               {"data": BATCH["data"][:, :-1]}, {"data": BATCH["data"].view(np.int8)},
               {"labels": [], "data": BATCH["data"][:0]}):
    BAD["data_batch_1"].append(python2(BATCH | change))
for module, name in ((b"numpy", b"ndarray.tofile"), (b"os\nb", b"system")):  # code that wants to run
    BAD["data_batch_1"].append(b"\x80\x04\x8c%c%b\x8c%c%b\x93." % (len(module), module, len(name), name))


@pytest.mark.parametrize("file", BAD)
def test_a_bad_cifar_file_is_refused_by_name(tmp_path, file):
    path = write_cifar(tmp_path) / file
    for content in BAD[file]:
        path.write_bytes(content)
        refused(file, load, "cifar10", tmp_path)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return eval, (f"open({str(self.file)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    content = pickle.dumps({"labels": Evil(tmp_path / "ran")}, protocol)
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(content)
    refused("data_batch_1: refused.*eval", load, "cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # noqa: S301 - control: it does run where nothing refuses it
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------
# --download, from a server inside the test


class Reply(io.BytesIO):
    """A reply that says it has `length` bytes, holds `content`, and then breaks with `error` or just ends."""

    def __init__(self, content, length, error=None):
        super().__init__(content)
        self.headers, self.error = {"Content-Length": str(length)}, error

    def read(self, size=-1):
        block = super().read(size)
        if not block and self.error:
            raise self.error
        return block


def packed(members):
    """A .tar.gz of {name: content}; content None makes a link to the folder above."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, ".."
            tar.addfile(member, io.BytesIO(content or b""))
    return file.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Makes urlopen give these replies and then the archive, or CIFAR's -> the list of what is asked for."""
    def start(*replies, archive=None):
        folder = write_cifar(tmp_path / "source")
        files = {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        archive = archive or packed(files)
        replies, asked = [*replies, Reply(archive, len(archive))], []

        def open_url(url, timeout):
            asked.append(url)
            return replies.pop(0)

        monkeypatch.setattr("urllib.request.urlopen", open_url)
        monkeypatch.setitem(data.CIFAR["cifar10"], "md5", hashlib.md5(archive).hexdigest())
        return asked
    return start


def download(folder):
    return load("cifar10", folder, download=True)


def test_an_archive_is_fetched_once_over_https_and_unpacked(tmp_path, serve):
    asked = serve()
    for _ in range(2):
        assert same(download(tmp_path / "new" / "data"), load("cifar10", tmp_path / "source"))
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), http.client.IncompleteRead(b""), None])
def test_a_download_that_breaks_is_one_line_and_the_next_call_starts_again(tmp_path, serve, error):
    serve(Reply(b"half", 8, error))
    refused("https://.*download failed.*again", download, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())
    assert same(download(tmp_path / "data"), load("cifar10", tmp_path / "source"))


@pytest.mark.parametrize("members", [{"../evil": b"x"}, {"link": None, "link/evil": b"x"}])
def test_an_archive_that_leads_outside_or_has_another_md5_is_refused(tmp_path, serve, monkeypatch, members):
    serve(archive=packed(members))
    refused("cifar-10-python.tar.gz: could not be unpacked", download, tmp_path / "data")
    assert not (tmp_path / "evil").exists()
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", "0" * 32)
    refused("cifar-10-python.tar.gz: wrong md5", download, tmp_path / "data")


@pytest.mark.parametrize("name", ["file", "x" * 300])
def test_a_download_into_what_can_be_no_folder_is_refused(tmp_path, serve, name):
    serve()
    (tmp_path / "file").write_text("")
    refused("download failed", download, tmp_path / name)


# ------------------------------------------------------------------------------------------------
# coco, captions


def paint(path, number=0):
    """An image of one colour that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(path)


def write_coco(root, split="val", year="2017", count=3, more=()):
    """`count` numbered images with two captions each, and `more` captions of the first -> the annotations."""
    images, annotations = [], []
    for i in range(count):
        name = f"{'COCO_' * (year == '2014')}{i:012}.png"
        paint(root / f"{split}{year}" / name, i)
        images.append({"id": 7 * i, "file_name": name})
        annotations += [{"image_id": 7 * i, "caption": f"{text} of {i}"} for text in ("one", "two")]
    annotations += [{"image_id": 0, "caption": text} for text in more]
    file = root / "annotations" / f"captions_{split}{year}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return file


def write_captions(root, names, texts=("one of {}", "two of {}")):
    """Numbered images of these names, or of that many numbers, each with all the texts."""
    rows = [("image", "caption")]
    for i, name in enumerate(names):
        paint(root / "Images" / f"{name}.png", i)
        rows += [(f"{name}.png", text.format(i)) for text in texts]
    with open(root / "captions.txt", "w", newline="") as f:
        csv.writer(f).writerows(rows)


def agrees(found):
    """Whether each image has both of its captions, and no others."""
    numbers = found.images[:, 0, 0, 0]
    return found.captions == [[f"one of {number}", f"two of {number}"] for number in numbers]


def both(root):
    return [load("captions", root, split, size=8) for split in ("train", "val")]


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_coco_keeps_several_captions_with_their_image(tmp_path, year):
    for split, count in (("train", 4), ("val", 3)):
        write_coco(tmp_path, split, year, count)
        found = load("coco", tmp_path, split, size=8)
        assert len(found) == count and agrees(found)
    assert len(load("coco", tmp_path, size=8, subset=2)) == 2


def test_a_coco_caption_of_null_is_empty_and_one_that_is_a_number_is_refused(tmp_path, capsys):
    write_coco(tmp_path, more=[None])
    assert agrees(load("coco", tmp_path, "val", size=8))
    assert "1 empty captions skipped" in capsys.readouterr().err
    write_coco(tmp_path, more=[7])
    refused("captions_val2017.json: not COCO captions", load, "coco", tmp_path, "val")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"images": 5}', '{"images": [], "annotations": []}', "[" * 9999,
    '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
    '{"images": [{"id": 1, "file_name": 5}], "annotations": []}'],
    ids=range(9))
def test_broken_coco_annotations_are_refused_by_name(tmp_path, text):
    write_coco(tmp_path).write_text(text)
    refused("captions_val2017.json", load, "coco", tmp_path, "val")


def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    for name in ("coco", "captions", "cifar10"):
        refused("no such f", load, name, "x" * 300)
    refused("captions_train2017.json: no such file.*--data-dir", load, "coco", tmp_path)
    refused("captions.txt: no such file.*image,caption", load, "captions", tmp_path)
    refused("--download fetches CIFAR only", load, "coco", tmp_path, download=True)
    write_coco(tmp_path)
    for i in (1, 2):
        (tmp_path / "val2017" / f"{i:012}.png").unlink()
    refused("captions_val2017.json: 2 of .*3 .*first .*/000000000001.png", load, "coco", tmp_path, "val")


def test_captions_may_hold_commas_quotes_and_a_byte_order_mark(tmp_path):
    table = b'\xef\xbb\xbfimage,caption\r\n1.png,"A ""big"" dog , runs"\r\n1.png,Plain .\r\n2.png,"A, b"\r\n'
    (tmp_path / "my.csv").write_bytes(table)
    paint(tmp_path / "1.png")
    paint(tmp_path / "2.png")
    train, val = both(tmp_path)
    assert sorted(train.captions + val.captions) == [['A "big" dog , runs', "Plain ."], ["A, b"]]


def test_captions_are_split_by_image_whatever_their_order_and_other_files_move_none_across(tmp_path):
    write_captions(tmp_path, range(40))
    train, val = both(tmp_path)
    assert len(val) == 4 and agrees(train) and agrees(val) and len(train) == 36
    head, *rows = (tmp_path / "captions.txt").read_text().splitlines()
    (tmp_path / "captions.txt").write_text("\n".join([head, *rows[::2], *rows[1::2]]))
    assert same(both(tmp_path)[0], train) and same(both(tmp_path)[1], val)
    write_captions(tmp_path, range(90))
    assert bytes_of(both(tmp_path)[0]) > bytes_of(train) and bytes_of(both(tmp_path)[1]) > bytes_of(val)


def test_images_of_one_name_in_many_folders_fall_on_both_sides(tmp_path):
    write_captions(tmp_path, [f"{i}/1" for i in range(60)])
    train, val = both(tmp_path)
    assert len(train) + len(val) == 60 and 1 < len(val) < 20  # by the bare name all would be on one side


def test_a_file_spelled_in_two_ways_is_one_image(tmp_path):
    write_captions(tmp_path, range(30), ["one of {}"])
    with open(tmp_path / "captions.txt", "a") as f:
        f.writelines(f"./{i}.png,two of {i}\n" for i in range(30))
    assert all(map(agrees, both(tmp_path))) and sum(map(len, both(tmp_path))) == 30


@pytest.mark.parametrize("text", [
    "", "file,text\n1.png,a dog\n", "image;caption\n1.png;a dog\n", "1.png,a dog\n", "image,caption\n",
    "image,caption\n1.png,\n", 'image,caption\n1.png,"a dog\n2.png,a\n', 'image,caption\n"1\n.png",a dog\n',
    "image,caption\nnone.png,a dog\n", "image,caption\na\0,a dog\n", "image,caption\n1.png,caf\udce9\n",
    f"image,caption\n{'x' * 300}.png,a dog\n"], ids=range(12))
def test_a_bad_table_of_captions_is_refused_by_name(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text, "utf-8", "surrogateescape")
    paint(tmp_path / "1.png")
    refused("captions.txt", load, "captions", tmp_path, "val")


@pytest.mark.parametrize("before", [0, 1, 5])
def test_an_error_in_a_table_names_its_line(tmp_path, before):
    rows = '1.png,"two\nlines"\n' * before + "1.png,a dog, running\n1.png,good\n"
    (tmp_path / "captions.txt").write_text("image,caption\n" + rows)
    line = 2 + 2 * before  # the head is line 1
    refused(f"captions.txt: line {line} is not CSV", load, "captions", tmp_path)


def test_empty_captions_are_skipped_and_counted(tmp_path, capsys):
    write_captions(tmp_path, range(20), ["", "one of {}", "  ", "two of {}"])
    assert all(map(agrees, both(tmp_path)))
    assert sum(map(int, re.findall(r"(\d+) empty captions skipped", capsys.readouterr().err))) == 40


def test_one_unreadable_image_in_a_hundred_is_named_and_skipped_but_no_more(tmp_path, capsys):
    write_captions(tmp_path, range(120))
    good = load("captions", tmp_path, size=8)
    first, second = (tmp_path / "Images" / f"{texts[0].split()[-1]}.png" for texts in good.captions[:2])
    first.write_bytes(first.read_bytes()[:50])
    found, noted = load("captions", tmp_path, size=8), capsys.readouterr().err
    assert f"{first}: not a readable image" in noted and "1 of 110" in noted
    assert found.captions == good.captions[1:] and agrees(found)
    second.write_bytes(second.read_bytes()[:50])
    refused(" 2 of .*110", load, "captions", tmp_path, size=8)
    assert f"{second}: not a readable image" in capsys.readouterr().err


GREY, ORANGE, WHITE = (90, 90, 90), (250, 128, 3), (255, 255, 255)


@pytest.mark.parametrize("mode, end, colour, wanted", [
    ("RGB", "jpg", ORANGE, ORANGE), ("L", "png", 90, GREY), ("L", "jpg", 90, GREY), ("1", "png", 1, WHITE),
    ("P", "png", 1, ORANGE), ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
    # 16 bits, unless it holds nothing above 255; floats, unless they hold nothing above 1
    ("I;16", "png", 32768, (128, 128, 128)), ("I;16", "png", 300, (1, 1, 1)), ("I;16", "png", 90, GREY),
    ("I", "tif", 90, GREY), ("I", "tif", 32768, (128, 128, 128)),
    ("F", "tif", 90 / 255, GREY), ("F", "tif", 90.0, GREY),
    # what is transparent shows white, what is half transparent half
    ("RGBA", "png", (*ORANGE, 255), ORANGE), ("RGBA", "png", (*ORANGE, 0), WHITE),
    ("RGBA", "png", (*ORANGE, 128), (252, 191, 129)), ("LA", "png", (90, 255), GREY),
    ("LA", "png", (90, 0), WHITE), ("P transparent", "png", 1, WHITE)])
def test_an_image_of_any_mode_is_read_as_a_viewer_shows_it(tmp_path, mode, end, colour, wanted):
    image = Image.new(mode.split()[0], (20, 12), colour)
    if image.mode == "P":
        image.putpalette([0, 0, 0, *ORANGE])
    image.save(tmp_path / f"x.{end}", **({"transparency": 1} if "transparent" in mode else {}))
    found = data.read_image(tmp_path / f"x.{end}", 8)
    assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    assert abs(found.reshape(3, -1).T.astype(int) - wanted).max() <= 3


def test_an_image_is_turned_as_its_exif_says_and_its_middle_is_kept(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:4, 8:16] = 255  # of the middle the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = data.read_image(tmp_path / "x.png", 8)
    assert (found[:, 4:] == 255).all() and (found[:, :4] == 0).all()


def test_a_second_load_reads_the_cache_and_a_changed_file_is_decoded_anew(tmp_path, monkeypatch):
    write_captions(tmp_path, range(10))
    first = load("captions", tmp_path, size=8)
    with monkeypatch.context() as without:
        without.setattr(data, "read_image", lambda *args: pytest.fail("decoded"))
        assert same(load("captions", tmp_path, size=8), first)
        with pytest.raises(pytest.fail.Exception):  # control: another size is not in the cache
            load("captions", tmp_path, size=4)
    changed = tmp_path / "Images" / f"{first.captions[3][0].split()[-1]}.png"
    paint(changed, 100)
    os.utime(changed, (1, 1))
    assert load("captions", tmp_path, size=8).images[3, 0, 0, 0] == 100 != first.images[3, 0, 0, 0]


@pytest.mark.parametrize("end", ["uint8", "json"])
def test_a_cache_that_was_cut_off_is_made_anew(tmp_path, end):
    write_captions(tmp_path, range(10))
    first = load("captions", tmp_path, size=8)
    for share in (0, 0.01, 0.5, 0.99):
        file, = (tmp_path / "cache").glob(f"*.{end}")
        content = file.read_bytes()
        file.unlink()  # a new file, as the old one may still be mapped
        file.write_bytes(content[:int(share * len(content))])
        assert same(load("captions", tmp_path, size=8), first)


class FullDisk(io.FileIO):
    def write(self, content):
        raise OSError(28, "No space left on device")


def test_a_full_disk_or_no_pillow_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write_captions(tmp_path, range(10))
    with monkeypatch.context() as full:
        full.setattr(data, "open", FullDisk, raising=False)
        refused("No space left on device.*COCA_CACHE", load, "captions", tmp_path, size=8)
        full.setitem(sys.modules, "PIL", None)
        refused("pip install pillow", load, "captions", tmp_path, size=8)
    assert not list((tmp_path / "cache").iterdir())
    assert agrees(load("captions", tmp_path, size=8))  # control: with both


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_data_loads():
    cifar = load("cifar10", REAL, "val")
    assert cifar.images.shape == (10000, 3, 32, 32) and np.bincount(cifar.labels).tolist() == [1000] * 10
    flickr, coco = load("captions", REAL / "flickr8k", subset=20), load("coco", REAL / "coco", "val")
    assert {len(texts) for texts in flickr.captions + coco.captions} == {5} and len(coco) == 119
    assert flickr.images.shape == (20, 3, 32, 32) and flickr.images.std() > 30


# ------------------------------------------------------------------------------------------------
# Text


def round_trip(text):
    tokenizer = Tokenizer.learn([text], 100)
    return tokenizer.decode(tokenizer.encode([text], 99)[0])


@pytest.mark.parametrize("text", ["the dog's ball, and a cat.", "wait! what? 50%; yes: no", "the man’s dog",
                                  "a 3.5 l jug for 1,000 men, or 2.", "un café crème", "एक हिन्दी कैप्शन"])
def test_text_comes_back_readable(text):
    assert round_trip(text.upper()) == round_trip(unicodedata.normalize("NFD", text)) == text


def test_words_by_hand():
    assert words("A man's 3.5 l, 1,000. Cafe\u0301") == "a man 's 3.5 l , 1,000 . café".split()


@given(st.text(max_size=30))
def test_what_comes_back_is_the_same_words_whatever_the_text(text):
    assert words(round_trip(text)) == words(text)


WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), max_size=9)


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(2, 12))
def test_tokens_are_begin_words_end_and_pads_and_no_longer_than_text_len(texts, text_len):
    tokenizer = Tokenizer.learn(map(" ".join, texts), 1000)
    tokens = tokenizer.encode(map(" ".join, texts), text_len)
    longest = max(map(len, texts))
    assert tokens.dtype == torch.int64 and tokens.shape[1] == min(longest + 2, text_len)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = [BEGIN, *map(tokenizer.words.index, text[:text_len - 2]), END]
        assert row == ids + [PAD] * (len(row) - len(ids))


@given(WORDS, st.integers(5, 12), st.randoms(use_true_random=False))
def test_the_vocabulary_is_capped_holds_the_commonest_and_ignores_the_order_of_texts(texts, size, random):
    tokenizer, counts = Tokenizer.learn(texts, size), Counter(texts)
    known = tokenizer.words[4:]
    assert len(tokenizer) == min(size, 4 + len(counts))
    assert all(counts[a] >= counts[b] for a in known for b in set(texts) - set(known))
    assert Tokenizer.learn(random.sample(texts, len(texts)), size).words == tokenizer.words


def test_unknown_words_are_unknown_and_names_of_special_tokens_are_not_special():
    tokenizer = Tokenizer.learn(["a dog"], 100)
    assert tokenizer.encode(["a zebra", ""], 9).tolist() == [[BEGIN, 4, UNKNOWN, END], [BEGIN, END, PAD, PAD]]
    assert set(tokenizer.encode(["<end> <pad> <begin>"], 20)[0, 1:-1].tolist()) == {UNKNOWN}


# ------------------------------------------------------------------------------------------------
# Batches


def make_batches(count=24, batch_size=4, text="picture {}", images=None, text_len=8, augment=False, **how):
    """Images of one grey each, or `images`, with two captions each."""
    if images is None:
        images = np.full((count, 3, 16, 16), np.arange(count)[:, None, None, None], np.uint8)
    captions = [[text.format(i), "again " + text.format(i)] for i in range(count)]
    tokenizer = Tokenizer.learn(sum(captions, []), 1000)
    return Batches(Dataset(images, captions, augment=augment), tokenizer, text_len, batch_size, **how)


def to_bytes(images):
    return ((images + 1) * 127.5).round().byte().numpy()


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    orders = [list(range(24))]
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = make_batches(seed=seed)
        images = torch.cat([batches(step)[0] for step in range(6 * epoch, 6 * epoch + 6)])
        orders.append(to_bytes(images)[:, 0, 0, 0].tolist())
    assert all(sorted(order) == orders[0] for order in orders) and len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_gives_the_same_batch_whatever_came_before_and_processes_their_rows_of_it(augment):
    used = make_batches(batch_size=9, augment=augment)
    before = [used(step) for step in range(4)]
    images, tokens = make_batches(batch_size=9, augment=augment)(3)
    assert torch.equal(before[3][0], images) and torch.equal(before[3][1], tokens)
    assert not torch.equal(before[2][0], images)
    for own in (slice(0, 5), slice(5, 9)):
        own_images, own_tokens = make_batches(batch_size=9, augment=augment, own=own)(3)
        assert torch.equal(own_images, images[own])
        assert torch.equal(own_tokens, tokens[own, :own_tokens.shape[1]])


def test_a_batch_holds_captions_of_its_images_and_values_from_minus_one_to_one():
    batches, texts = make_batches(), set()
    vocabulary = ["<pad>", "<begin>", "<end>", "<unk>", "picture", "again", *sorted(map(str, range(24)))]
    for step in range(12):
        images, tokens = batches(step)
        assert images.dtype == torch.float32 and images.shape == (4, 3, 16, 16)
        assert (tokens[:, -1] != PAD).any()  # no longer than the longest
        for row, number in zip(tokens.tolist(), to_bytes(images)[:, 0, 0, 0]):
            end = row.index(END)
            assert vocabulary[row[end - 1]] == str(number) and set(row[end + 1:]) <= {PAD}
            texts.add(tuple(row[:end]))
    assert len(texts) > 24  # another epoch may draw another caption
    extremes = np.full((2, 3, 16, 16), np.array([0, 255])[:, None, None, None], np.uint8)
    assert make_batches(2, 2, images=extremes)(0)[0].unique().tolist() == [-1, 1]


@pytest.mark.parametrize("text, flips", [("it is left", False), ("the Right side", False), ("a dog", True)])
def test_pictures_are_cropped_from_a_grey_border_and_mirrored_unless_the_caption_has_sides(text, flips):
    originals = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), np.uint8)
    padded = np.pad(originals, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=128)
    places = {}  # pixels of every possible crop -> where it is from
    for i, top, left in np.ndindex(30, 5, 5):
        crop = padded[i, :, top:top + 16, left:left + 16]
        places[crop.tobytes()] = i, top, left, False
        places[crop[..., ::-1].tobytes()] = i, top, left, True
    batches = make_batches(30, 30, text, images=originals, augment=True)
    first, second = ([places[image.tobytes()] for image in to_bytes(batches(step)[0])] for step in (0, 1))
    which, top, left, mirrored = zip(*first)
    assert len(set(which)) == 30 and set(top) == set(left) == set(range(5))
    assert [place[1:] for place in first] != [place[1:] for place in second]
    assert 5 <= sum(mirrored) <= 25 if flips else not any(mirrored)
    plain = make_batches(30, 30, text, images=originals)(0)[0]
    assert {image.tobytes() for image in to_bytes(plain)} == {image.tobytes() for image in originals}


def test_long_captions_are_cut_with_a_note_and_a_batch_larger_than_the_data_is_refused(capsys):
    tokens = make_batches(text_len=3)(0)[1]
    assert tokens.shape == (4, 3) and (tokens[:, -1] == END).all()
    assert "48 captions cut to 1 words" in capsys.readouterr().err
    refused("--batch-size 25 .* 24", make_batches, batch_size=25)
