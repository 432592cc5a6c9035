"""data.py: scenes, CIFAR, COCO and captioned images are read right, and whatever is wrong is one clear line."""
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
from helpers import fails
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from coca import BEGIN, END, PAD, UNKNOWN
from data import HELD_OUT, PAIRS, Batches, Dataset, Tokenizer, UserError, crop_and_flip, held_out, load, words

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def refused(match, function, *args, **named):
    """The call must end in a UserError of one line that says `match`."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **named)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def same(a, b):
    return np.array_equal(a.images, b.images) and a.captions == b.captions and np.array_equal(a.labels, b.labels)


# ------------------------------------------------------------------------------------------------
# shapes

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def pairs_named(split):
    """Colours and shapes that the captions of a split speak of."""
    texts = " ".join(data.describe(data.scene(0, split, i)[0])[0] for i in range(400))
    return set(re.findall(r"a (?:small|large) (\w+) (\w+)", texts))


def is_true(caption, things):
    """Whether a caption, read word by word, fits the centres of the things."""
    there = Counter()
    for thing in things:
        row, column = "bottom" if thing.y > 0.5 else "top", "right" if thing.x > 0.5 else "left"
        there[f"a {thing.size} {thing.colour} {thing.shape} at the {row} {column}"] += 1
    return Counter(caption.split(" and ")) == there


def test_a_scene_depends_on_seed_split_and_index_only():
    things, rng = data.scene(0, "train", 7)
    image = data.draw(things, rng, 16)
    assert data.scene(0, "train", 7)[0] == things
    assert np.array_equal(image, load("shapes", subset=9, size=16).images[7])
    for other in ((1, "train", 7), (0, "val", 7), (0, "train", 8)):
        other_things, other_rng = data.scene(*other)
        assert other_things != things and not np.array_equal(data.draw(other_things, other_rng, 16), image)


def test_held_out_pairs_are_in_zero_shot_scenes_only():
    assert pairs_named("train") == pairs_named("val") == set(PAIRS) - set(HELD_OUT)
    assert pairs_named("zeroshot") == set(HELD_OUT)  # control: the same search finds them where they are


@pytest.mark.parametrize("split", data.SPLITS)
def test_every_caption_is_true_of_its_scene_and_its_picture(split):
    for i in range(150):
        things, rng = data.scene(0, split, i)
        image = data.draw(things, rng, 32)
        for text in data.describe(things):
            assert is_true(text, things)
            if len(things) == 1:  # control: the same with another corner
                assert not is_true(re.sub("left|right|top|bottom", lambda word: OPPOSITE[word[0]], text), things)
        for thing in things:
            centre = image[:, int(thing.y * 32), int(thing.x * 32)].astype(int)
            assert thing.shape == "ring" or abs(centre - data.COLOURS[thing.colour]).max() < 45


def test_zero_shot_labels_and_prompts_agree_with_the_captions():
    scenes = load("shapes", split="zeroshot", size=8)
    assert len(scenes) == len(scenes.labels) == 600 and len(scenes.classes) == len(PAIRS)
    for label, texts in zip(scenes.labels, scenes.captions):
        assert texts[0] in [prompt.format(scenes.classes[label]) for prompt in scenes.templates]


# ------------------------------------------------------------------------------------------------
# cifar10, cifar100: tiny files in the official format

FILES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "cifar100": ["train", "test"]}
KEYS = {"cifar10": ("labels", "batches.meta", "label_names"), "cifar100": ("fine_labels", "meta", "fine_label_names")}
CLASSES = {"cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
           "cifar100": ["apple", "aquarium_fish", *(f"class_{i}" for i in range(2, 100))]}


class Python2(pickle._Pickler):
    """Writes as Python 2 did, with byte strings: what the official files hold, and Python 3 does not write."""

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python2(content):
    file = io.BytesIO()
    Python2(file, 2).dump(content)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")  # its name before numpy 2


def cifar_batch(name, file, count=4):
    rng = np.random.default_rng(list(file.encode()))
    labels = {KEYS[name][0]: rng.integers(0, len(CLASSES[name]), count).tolist()}
    if name == "cifar100":
        labels["coarse_labels"] = rng.integers(0, 20, count).tolist()
    return {"batch_label": file, **labels, "data": rng.integers(0, 256, (count, 3072), np.uint8)}


def write_cifar(root, name="cifar10", pickled=python2, files=None):
    folder = root / data.CIFAR[name]["folder"]
    folder.mkdir(parents=True)
    _, meta, names = KEYS[name]
    (folder / meta).write_bytes(pickled({names: CLASSES[name]}))
    for file in files or FILES[name]:
        (folder / file).write_bytes(pickled(cifar_batch(name, file)))
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_the_same_from_old_and_new_pickles_and_from_the_folder_or_its_parent(tmp_path, name, split):
    files = FILES[name][:-1] if split == "train" else FILES[name][-1:]
    batches = [cifar_batch(name, file) for file in files]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = sum((batch[KEYS[name][0]] for batch in batches), [])
    for i, pickled in enumerate((python2, lambda content: pickle.dumps(content, 2))):
        for folder in (write_cifar(tmp_path / str(i), name, pickled), str(tmp_path / str(i))):
            found = load(name, folder, split)
            assert np.array_equal(found.images, images) and found.labels.tolist() == labels
            assert found.classes == [text.replace("_", " ") for text in CLASSES[name]]
            for label, texts in zip(labels, found.captions):
                assert all(found.classes[label] in text for text in texts)


def test_cifar_with_two_of_five_batches_works_and_says_so(tmp_path, capsys):
    assert len(load("cifar10", write_cifar(tmp_path, files=["data_batch_1", "data_batch_4", "test_batch"]))) == 8
    assert "2 of 5 train batches" in capsys.readouterr().err
    assert len(load("cifar10", tmp_path, "val")) == 4 and not capsys.readouterr().err
    assert load("cifar10", tmp_path, size=48).images.shape == (8, 3, 48, 48)


def test_subset_is_the_same_images_every_time_and_never_more_than_there_are(tmp_path):
    write_cifar(tmp_path)
    few, whole = load("cifar10", tmp_path, subset=7), load("cifar10", tmp_path)
    rows = [i for i, image in enumerate(whole.images) if any(np.array_equal(image, other) for other in few.images)]
    assert len(rows) == 7 and same(few, load("cifar10", tmp_path, subset=7)) and same(few, data.select(whole, rows))
    assert len(load("cifar10", tmp_path, "val", subset=7)) == 4
    refused(f"{tmp_path}.*--subset 21.* 20", load, "cifar10", tmp_path, subset=21)


def bytes_of(dataset):
    return {image.tobytes() for image in dataset.images}


@pytest.mark.parametrize("subset", [0, 12])
def test_val_from_train_keeps_training_images_apart_and_reads_no_evaluation_images(tmp_path, subset):
    (write_cifar(tmp_path) / "test_batch").unlink()
    how = dict(data_dir=tmp_path, val_from_train=5)
    train, val = load("cifar10", subset=subset, **how), load("cifar10", split="val", subset=subset, **how)
    whole = bytes_of(load("cifar10", tmp_path, subset=subset))
    assert len(val) == 5 and bytes_of(train) | bytes_of(val) == whole and not bytes_of(train) & bytes_of(val)
    for split in ("val", "zeroshot", "labelled-val"):
        assert same(load("cifar10", split=split, subset=subset, **how), val)
    for split in ("train", "labelled"):
        assert same(load("cifar10", split=split, subset=subset, **how), train)
    refused("test_batch", load, "cifar10", tmp_path, "val")  # control: without it they are read
    refused("--val-from-train 20.* 20 training images", load, "cifar10", tmp_path, val_from_train=20)


def test_val_from_train_of_generated_scenes():
    train, val = (load("shapes", split=split, size=8, subset=30, val_from_train=10) for split in ("train", "val"))
    assert len(val) == 10 and bytes_of(train) | bytes_of(val) == bytes_of(load("shapes", size=8, subset=30))
    labelled = load("shapes", split="labelled-val", size=8, val_from_train=10)
    assert same(labelled, load("shapes", split="labelled-val", size=8))  # these are drawn anew in any case


def test_missing_cifar_files_are_named(tmp_path):
    refused("--data-dir", load, "cifar10")
    refused("none/cifar-100-python/train: no such file.*--download", load, "cifar100", tmp_path / "none")
    (write_cifar(tmp_path) / "batches.meta").unlink()
    refused("batches.meta: no such file", load, "cifar10", tmp_path)


BATCH = cifar_batch("cifar10", "data_batch_1")
BAD = {"empty": b"", "cut off": python2(BATCH)[:9000], "random": np.random.default_rng(0).bytes(5000), "list": python2([1, 2]),
       "meta empty": b"", "meta without names": python2({}), "meta number": python2({"label_names": 5}),
       "meta numbers": python2({"label_names": [1] * 10})}
for why, change in {
        "three labels": {"labels": [1, 2, 3]}, "label 10": {"labels": [1, 2, 3, 10]}, "label -1": {"labels": [1, 2, 3, -1]},
        "ragged labels": {"labels": [1, [2, 3], 4, 5]}, "label no list": {"labels": 4}, "no labels": {"labels": []},
        "text labels": {"labels": ["1", "2", "3", "4"]}, "narrow data": {"data": BATCH["data"][:, :-1]},
        "text data": {"data": "x"}, "signed data": {"data": BATCH["data"].view(np.int8)}}.items():
    BAD[why] = python2(BATCH | change)


@pytest.mark.parametrize("why", BAD)
def test_a_bad_cifar_file_is_refused_by_name(tmp_path, why):
    file = "batches.meta" if why.startswith("meta") else "data_batch_1"
    (write_cifar(tmp_path) / file).write_bytes(BAD[why])
    refused(file, load, "cifar10", tmp_path)


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
    refused(f"data_batch_1: refused.*{how}", load, "cifar10", tmp_path)
    assert not marker.exists()
    pickle.loads(content)  # noqa: S301 - control: it does run where nothing refuses it
    assert marker.exists()


@pytest.mark.parametrize("module, name", [(b"numpy", b"ndarray.tofile"), (b"os\nb", b"system")])
def test_odd_names_in_a_pickle_are_refused_in_one_line(tmp_path, module, name):
    content = b"\x80\x04\x8c%c%b\x8c%c%b\x93." % (len(module), module, len(name), name)
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(content)
    refused("data_batch_1: refused", load, "cifar10", tmp_path)


# ------------------------------------------------------------------------------------------------
# --download, from a server inside the test


class Reply(io.BytesIO):
    """A reply of `length` bytes that holds fewer of them, and then breaks with `error` or just ends."""

    def __init__(self, content, length, error):
        super().__init__(content)
        self.headers, self.error = {"Content-Length": str(length)}, error

    def read(self, size=-1):
        block = super().read(size)
        if not block and self.error:
            raise self.error
        return block


@pytest.fixture
def serve(monkeypatch):
    """Makes urlopen send these contents, one a call -> the list of addresses asked for. md5: that of the last."""
    def start(*replies):
        asked, replies = [], list(replies)

        def open_url(url, timeout):
            asked.append(url)
            return replies.pop(0)

        monkeypatch.setattr("urllib.request.urlopen", open_url)
        monkeypatch.setitem(data.CIFAR["cifar10"], "md5", hashlib.md5(replies[-1].getvalue()).hexdigest())
        return asked
    return start


def whole(content):
    return Reply(content, len(content), None)


def packed(*members):
    """A .tar.gz of (name, content); content None makes a link to the folder above."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, ".."
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return file.getvalue()


@pytest.fixture
def archive(tmp_path):
    folder = write_cifar(tmp_path / "source")
    return packed(*((f"{folder.name}/{file.name}", file.read_bytes()) for file in folder.iterdir()))


def test_an_archive_is_fetched_once_over_https_and_unpacked(tmp_path, serve, archive):
    asked = serve(whole(archive))
    for _ in range(2):
        assert same(load("cifar10", tmp_path / "new" / "data", download=True), load("cifar10", tmp_path / "source"))
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert data.CIFAR["cifar100"]["url"].startswith("https://")


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), http.client.IncompleteRead(b""), None], ids=["reset", "cut", "ends"])
def test_a_download_that_breaks_is_one_line_and_the_next_call_starts_again(tmp_path, serve, archive, error):
    serve(Reply(archive[:len(archive) // 2], len(archive), error), whole(archive))
    refused("https://.*download failed.*again", load, "cifar10", tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())
    assert same(load("cifar10", tmp_path / "data", download=True), load("cifar10", tmp_path / "source"))


def test_an_archive_with_another_md5_is_not_unpacked(tmp_path, serve, archive, monkeypatch):
    serve(whole(archive))
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", "0" * 32)
    refused("cifar-10-python.tar.gz: wrong md5", load, "cifar10", tmp_path / "data", download=True)
    assert not (tmp_path / "data" / "cifar-10-batches-py").exists()


@pytest.mark.parametrize("name", ["file", "x" * 300])
def test_a_download_into_what_can_be_no_folder_is_refused(tmp_path, serve, archive, name):
    serve(whole(archive))
    (tmp_path / "file").write_text("")
    refused("download failed", load, "cifar10", tmp_path / name, download=True)


@pytest.mark.parametrize("members", [[("../evil", b"x")], [("link", None), ("link/evil", b"x")]], ids=["dots", "link"])
def test_an_archive_that_leads_outside_is_refused_and_writes_nothing_there(tmp_path, serve, members):
    serve(whole(packed(*members)))
    refused("cifar-10-python.tar.gz: could not be unpacked", load, "cifar10", tmp_path / "data", download=True)
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------------------
# coco, captions


def paint(path, number=0):
    """An image of one colour that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(path)


def write_coco(root, split="val", year="2017", count=3):
    """`count` numbered images with two captions each -> the annotations, as file and content."""
    prefix = f"COCO_{split}2014_" if year == "2014" else ""
    content = {"info": {}, "images": [], "annotations": []}
    for i in range(count):
        name = f"{prefix}{7 * i:012}.png"
        paint(root / f"{split}{year}" / name, i)
        content["images"].append({"id": 7 * i, "file_name": name, "height": 8, "width": 8})
    for text in ("one", "two"):
        for i in range(count):
            content["annotations"].append({"image_id": 7 * i, "id": 0, "caption": f"{text} of {i}"})
    annotations = root / "annotations" / f"captions_{split}{year}.json"
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(content))
    return annotations, content


def write_captions(root, names, texts=("one of {}", "two of {}")):
    """Numbered images of these names, each with all the texts."""
    rows = [("image", "caption")]
    for i, name in enumerate(names):
        paint(root / "Images" / name, i)
        rows += [(name, text.format(i)) for text in texts]
    with open(root / "captions.txt", "w", newline="") as f:
        csv.writer(f).writerows(rows)


def numbered(count):
    return [f"{i}.png" for i in range(count)]


def agrees(found):
    """Whether each image has both of its captions, and no others."""
    numbers = found.images[:, 0, 0, 0]
    return found.captions == [[f"one of {n}", f"two of {n}"] for n in numbers]


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
    refused("none: no such folder", load, "coco", tmp_path / "none")
    refused("captions_train2017.json: no such file.*--data-dir", load, "coco", tmp_path)
    refused("--download fetches CIFAR only", load, "coco", tmp_path, download=True)
    write_coco(tmp_path)
    for i in (7, 14):
        (tmp_path / "val2017" / f"{i:012}.png").unlink()
    refused("captions_val2017.json: 2 of the 3 .*first .*val2017/000000000007.png", load, "coco", tmp_path, "val")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"images": 5}', '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "[" * 9999,
    '{"images": [{"id": 1, "file_name": 5}], "annotations": []}', '{"images": [], "annotations": []}'], ids=range(9))
def test_broken_coco_annotations_are_refused_by_name(tmp_path, text):
    write_coco(tmp_path)[0].write_text(text)
    refused("captions_val2017.json", load, "coco", tmp_path, "val")


def test_a_coco_caption_of_null_is_empty_and_one_that_is_a_number_is_refused(tmp_path, capsys):
    annotations, content = write_coco(tmp_path)
    content["annotations"].append({"image_id": 0, "id": 1, "caption": None})
    annotations.write_text(json.dumps(content))
    assert agrees(load("coco", tmp_path, "val", size=8)) and "1 empty captions skipped" in capsys.readouterr().err
    content["annotations"][-1]["caption"] = 7
    annotations.write_text(json.dumps(content))
    refused("captions_val2017.json: not COCO captions", load, "coco", tmp_path, "val", size=8)


def test_captions_may_hold_commas_quotes_and_a_byte_order_mark(tmp_path):
    table = b'\xef\xbb\xbfimage,caption\r\n1.png,"A ""big"" dog , running"\r\n1.png,Plain .\r\n2.png,"A, b"\r\n'
    (tmp_path / "my.csv").write_bytes(table)
    paint(tmp_path / "1.png")
    paint(tmp_path / "2.png")
    train, val = both(tmp_path)
    assert sorted(train.captions + val.captions) == [['A "big" dog , running', "Plain ."], ["A, b"]]


def test_captions_are_split_by_image_and_the_same_in_any_order(tmp_path):
    write_captions(tmp_path / "a", numbered(40))
    train, val = both(tmp_path / "a")
    assert len(val) == 4 and agrees(train) and agrees(val) and len(train) == 36
    table = (tmp_path / "a" / "captions.txt").read_text().splitlines()
    head, *rows = table
    (tmp_path / "a" / "captions.txt").write_text("\n".join([head, *rows[::2], *rows[1::2]]))
    assert same(both(tmp_path / "a")[0], train) and same(both(tmp_path / "a")[1], val)


def test_images_of_one_name_in_many_folders_fall_on_both_sides(tmp_path):
    write_captions(tmp_path, [f"{i}/1.png" for i in range(60)])
    train, val = both(tmp_path)
    assert len(train) + len(val) == 60 and 1 < len(val) < 20  # by the bare name all would be on one side


def test_one_file_under_two_spellings_is_on_one_side_and_keeps_all_captions(tmp_path):
    paint(tmp_path / "one.png")
    rows = ["image,caption"]
    for i in range(30):
        paint(tmp_path / f"{i}.png", i)
        rows += [f"{i}.png,one of {i}", f"./{i}.png,two of {i}"]
    (tmp_path / "captions.txt").write_text("\n".join(rows))
    train, val = both(tmp_path)
    assert agrees(train) and agrees(val) and len(train) + len(val) == 30


def test_adding_files_moves_none_across():
    names = [f"{i}.png" for i in range(400)]
    held = held_out(names)
    assert 20 < len(held) < 60 and held_out(names[:200]) == held & set(names[:200])
    assert len(held_out(["a.png", "b.png"])) == 1  # never none


@pytest.mark.parametrize("text", [
    "", "file,text\n1.png,a dog\n", "image;caption\n1.png;a dog\n", "1.png,a dog\n", "image,caption\n", "image,caption\n1.png,\n",
    'image,caption\n1.png,"a dog\n2.png,a cat\n', 'image,caption\n"1\n.png",a dog\n', "image,caption\nnone.png,a dog\n",
    f"image,caption\n{'x' * 300}.png,a dog\n", "image,caption\na\0.png,a dog\n", "image,caption\n1.png,caf\udce9\n"],
    ids=["nothing", "other columns", "semicolons", "no header", "no rows", "no text", "open quote", "name of two lines",
         "no such image", "a name too long for a file", "no name for a file", "not UTF-8"])
def test_a_bad_table_of_captions_is_refused_by_name(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text, "utf-8", "surrogateescape")
    paint(tmp_path / "1.png")
    refused("captions.txt", load, "captions", tmp_path, "val")


@pytest.mark.parametrize("before", [0, 1, 5])
def test_an_error_in_a_table_names_its_line(tmp_path, before):
    text = "image,caption\n" + '1.png,"two\nlines"\n' * before
    (tmp_path / "captions.txt").write_text(text + "1.png,a dog, running\n1.png,good\n")
    refused(f"captions.txt: line {2 + 2 * before} is not CSV", load, "captions", tmp_path)  # lines are counted from 1


def test_a_folder_or_table_that_is_not_there_is_named(tmp_path):
    refused("captions.txt: no such file.*image,caption", load, "captions", tmp_path)
    for name in ("coco", "captions", "cifar10"):
        refused("no such f", load, name, "x" * 300)


def test_empty_captions_are_skipped_and_counted(tmp_path, capsys):
    write_captions(tmp_path, numbered(20), ["", "one of {}", "  ", "two of {}"])
    assert all(map(agrees, both(tmp_path)))
    assert sum(map(int, re.findall(r"(\d+) empty captions skipped", capsys.readouterr().err))) == 40


def test_one_unreadable_image_in_a_hundred_is_named_and_skipped_but_no_more(tmp_path, capsys):
    write_captions(tmp_path, numbered(120))
    good = load("captions", tmp_path, size=8)
    first, second = (tmp_path / "Images" / f"{texts[0].split()[-1]}.png" for texts in good.captions[:2])
    first.write_bytes(first.read_bytes()[:60])
    found, noted = load("captions", tmp_path, size=8), capsys.readouterr().err
    assert f"{first}: not a readable image" in noted and "1 of 110 images skipped" in noted
    assert found.captions == good.captions[1:] and agrees(found)
    second.write_bytes(second.read_bytes()[:50])
    refused(f"{tmp_path}.* 2 of 110", load, "captions", tmp_path, size=8)
    assert f"{second}: not a readable image" in capsys.readouterr().err


GREY, ORANGE = (90, 90, 90), (250, 128, 3)


@pytest.mark.parametrize("mode, end, colour, wanted", [
    ("L", "png", 90, GREY), ("L", "jpg", 90, GREY), ("1", "png", 1, (255, 255, 255)), ("P", "png", 1, ORANGE),
    ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
    # 16 bits, unless it holds nothing above 255; floats, unless they hold nothing above 1
    ("I;16", "png", 32768, (128, 128, 128)), ("I;16", "png", 300, (1, 1, 1)), ("I;16", "png", 90, GREY),
    ("I", "tif", 90, GREY), ("I", "tif", 32768, (128, 128, 128)), ("F", "tif", 90 / 255, GREY), ("F", "tif", 90.0, GREY),
    # what is transparent shows white, half transparent half
    ("RGBA", "png", (*ORANGE, 255), ORANGE), ("RGBA", "png", (*ORANGE, 0), (255, 255, 255)),
    ("RGBA", "png", (*ORANGE, 128), (252, 191, 129)), ("LA", "png", (90, 255), GREY), ("LA", "png", (90, 0), (255, 255, 255))])
def test_an_image_of_any_mode_is_read_as_a_viewer_shows_it(tmp_path, mode, end, colour, wanted):
    image = Image.new(mode, (20, 12), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, *ORANGE])
    image.save(tmp_path / f"x.{end}")
    found = data.read_image(tmp_path / f"x.{end}", 8)
    assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    assert abs(found.reshape(3, -1).T.astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("transparent, wanted", [(1, (255, 255, 255)), (0, ORANGE)])
def test_a_transparent_colour_of_a_palette_shows_white(tmp_path, transparent, wanted):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    image.save(tmp_path / "x.png", transparency=transparent)
    assert data.read_image(tmp_path / "x.png", 4)[:, 0, 0].tolist() == list(wanted)


def test_an_image_is_turned_as_its_exif_says_and_its_middle_is_kept(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:4, 8:16] = 255  # of the middle the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    found = data.read_image(tmp_path / "x.png", 8)
    assert (found[:, 4:] == 255).all() and (found[:, :4] == 0).all()


def test_without_pillow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    write_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused("pip install pillow", load, "coco", tmp_path, "val")


def test_a_second_load_reads_the_cache_and_a_changed_file_is_decoded_anew(tmp_path, monkeypatch):
    write_captions(tmp_path, numbered(10))
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
    first_red, second_red = first.images[:, 0, 0, 0].tolist(), second.images[:, 0, 0, 0].tolist()
    assert second_red == [*first_red[:3], 100, *first_red[4:]]


@pytest.mark.parametrize("end", ["uint8", "json"])
def test_a_cache_that_was_cut_off_is_made_anew(tmp_path, end):
    write_captions(tmp_path, numbered(10))
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


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    write_captions(tmp_path, numbered(10))
    with monkeypatch.context() as full:
        full.setattr(data, "open", FullDisk, raising=False)
        refused("cache.*No space left on device.*COCA_CACHE", load, "captions", tmp_path, size=8)
    assert not list((tmp_path / "cache").iterdir())
    assert agrees(load("captions", tmp_path, size=8))  # control: with space again


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_real_data_loads():
    cifar = load("cifar10", REAL, "val")
    assert cifar.images.shape == (10000, 3, 32, 32) and np.bincount(cifar.labels).tolist() == [1000] * 10
    for found, count in ((load("coco", REAL / "coco", "val"), 119), (load("captions", REAL / "flickr8k", subset=20), 20)):
        assert found.images.shape == (count, 3, 32, 32) and found.images.std() > 30
        assert {len(texts) for texts in found.captions} == {5}


# ------------------------------------------------------------------------------------------------
# Text

WORDS = st.text("abcdefgh", min_size=1, max_size=4)


def round_trip(text):
    tokenizer = Tokenizer.learn([text], 100)
    return tokenizer.decode(tokenizer.encode([text], 99)[0])


@pytest.mark.parametrize("text", [
    "the dog's ball, and a cat.", "wait! what? 50%; yes: no", "the man’s dog", "a 3.5 l jug for 1,000 men, or 2.", "un café crème",
    "एक हिन्दी कैप्शन"])
def test_text_comes_back_readable(text):
    assert round_trip(text.upper()) == round_trip(unicodedata.normalize("NFD", text)) == text


def test_words_by_hand():
    assert words("A man's 3.5 l, 1,000. T-shirt") == ["a", "man", "'s", "3.5", "l", ",", "1,000", ".", "t", "-", "shirt"]
    assert words("Cafe\u0301") == words("café") == ["café"]
    assert words("हिन्दी में") == ["हिन्दी", "में"]  # vowel signs stay with their letters


@given(st.text(max_size=30))
def test_what_comes_back_is_the_same_words_whatever_the_text(text):
    assert words(round_trip(text)) == words(text)


@given(st.lists(st.lists(WORDS, max_size=9), min_size=1, max_size=5), st.integers(2, 12))
def test_tokens_are_begin_words_end_and_pads_and_no_longer_than_text_len(texts, text_len):
    tokenizer = Tokenizer.learn(map(" ".join, texts), 1000)
    tokens = tokenizer.encode(map(" ".join, texts), text_len)
    kept = [text[:text_len - 2] for text in texts]
    assert tokens.dtype == torch.int64 and tokens.shape == (len(texts), max(map(len, kept)) + 2)
    for row, text in zip(tokens, kept):
        end = len(text) + 1
        assert row[0] == BEGIN and row[end] == END and (row[end + 1:] == PAD).all() and (row[1:end] > UNKNOWN).all()
        assert tokenizer.decode(row) == " ".join(text)


@given(st.lists(WORDS, max_size=30), st.integers(5, 12), st.randoms(use_true_random=False))
def test_the_vocabulary_is_capped_holds_the_commonest_and_ignores_the_order_of_texts(texts, size, random):
    tokenizer, counts = Tokenizer.learn(texts, size), Counter(texts)
    known = tokenizer.words[4:]
    assert len(tokenizer) == min(size, 4 + len(counts))
    assert all(counts[a] >= counts[b] for a in known for b in set(texts) - set(known))
    assert Tokenizer.learn(random.sample(texts, len(texts)), size).words == tokenizer.words


def test_unknown_words_are_unknown_and_names_of_special_tokens_are_not_special():
    tokenizer = Tokenizer.learn(["a dog"], 100)
    assert tokenizer.encode(["a zebra", ""], 9).tolist() == [[BEGIN, tokenizer.index["a"], UNKNOWN, END], [BEGIN, END, PAD, PAD]]
    assert set(tokenizer.encode(["<end> <pad> <begin>"], 20)[0, 1:-1].tolist()) == {UNKNOWN}


# ------------------------------------------------------------------------------------------------
# Batches


def make_batches(count=24, batch_size=4, text="picture {}", seed=0, augment=False, images=None, text_len=8, own=slice(None)):
    """Images of one grey each, or `images`, with two captions each."""
    if images is None:
        images = np.full((count, 3, 16, 16), np.arange(count)[:, None, None, None], np.uint8)
    captions = [[text.format(i), "again " + text.format(i)] for i in range(count)]
    tokenizer = Tokenizer.learn(sum(captions, []), 1000)
    return Batches(Dataset(images, captions, augment=augment), tokenizer, text_len, batch_size, seed, own)


def numbers(images):
    return ((images[:, 0, 8, 8] + 1) * 127.5).round().int().tolist()


def order(seed, epoch):
    batches = make_batches(seed=seed)
    return sum((numbers(batches(step)[0]) for step in range(6 * epoch, 6 * epoch + 6)), [])


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(found) == list(range(24)) for found in orders)
    assert len({tuple(found) for found in [*orders, range(24)]}) == 4


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_gives_the_same_batch_whatever_came_before(augment):
    used, fresh = make_batches(augment=augment), make_batches(augment=augment)
    before = [used(step) for step in range(9)]
    assert all(torch.equal(a, b) for a, b in zip(before[8], fresh(8))) and not torch.equal(before[7][0], before[8][0])


def test_a_batch_holds_captions_of_its_images_and_values_from_minus_one_to_one():
    batches, texts = make_batches(), set()
    vocabulary = ["<pad>", "<begin>", "<end>", "<unk>", "picture", "again", *sorted(map(str, range(24)))]
    for step in range(12):
        images, tokens = batches(step)
        assert images.dtype == torch.float32 and images.shape == (4, 3, 16, 16) and tokens.dtype == torch.int64
        assert (tokens[:, -1] != PAD).any()  # no longer than the longest
        for row, number in zip(tokens.tolist(), numbers(images)):
            end = row.index(END)
            assert vocabulary[row[end - 1]] == str(number) and set(row[end + 1:]) <= {PAD}
            texts.add(tuple(row[:end]))
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


def check_crops(seed, S, border, crop=crop_and_flip):
    """Against a loop over the images, in numpy."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, 3, S, S), np.uint8)
    shift, flip = rng.integers(0, 2 * border + 1, (2, 4)), rng.integers(0, 2, 4).astype(bool)
    found = crop(torch.from_numpy(images), border, torch.from_numpy(shift), torch.from_numpy(flip)).numpy()
    for image, y, x, mirrored, result in zip(images, *shift, flip, found):
        padded = np.pad(image, ((0, 0), (border, border), (border, border)), constant_values=128)
        part = padded[:, y:y + S, x:x + S]
        assert np.array_equal(result, part[:, :, ::-1] if mirrored else part)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 4))
def test_crops_and_mirror_images_are_those_asked_for(seed, S, border):
    check_crops(seed, S, border)


def test_control_rows_for_columns_or_never_mirrored():
    with fails:
        check_crops(0, 8, 4, lambda images, border, shift, flip: crop_and_flip(images, border, shift.flip(0), flip))
    with fails:
        check_crops(0, 8, 4, lambda images, border, shift, flip: crop_and_flip(images, border, shift, flip & False))


def test_long_captions_are_cut_with_a_note_and_a_batch_larger_than_the_data_is_refused(capsys):
    tokens = make_batches(text_len=3)(0)[1]
    assert tokens.shape == (4, 3) and (tokens[:, -1] == END).all() and "48 captions cut to 1 words" in capsys.readouterr().err
    refused("--batch-size 25 .* 24", make_batches, batch_size=25)


def test_processes_get_their_rows_of_one_batch():
    images, tokens = make_batches(batch_size=9, augment=True)(4)
    for own in (slice(0, 5), slice(5, 9)):
        own_images, own_tokens = make_batches(batch_size=9, augment=True, own=own)(4)
        assert torch.equal(own_images, images[own]) and torch.equal(own_tokens, tokens[own, :own_tokens.shape[1]])
