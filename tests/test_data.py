"""Scenes, CIFAR, COCO and own images are read right, and whatever is wrong is one clear line."""
import csv
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from helpers import Bomb, refused
from PIL import Image

import data
from data import load


def same(a, b):
    equal = np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    return equal and a.captions == b.captions


def bytes_of(dataset):
    return {image.tobytes() for image in dataset.images}


# cifar10, cifar100: tiny files in the official format

FILES = {"cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
         "cifar100": ["train", "test"]}
KEYS = {"cifar10": ("labels", "batches.meta", "label_names"),
        "cifar100": ("fine_labels", "meta", "fine_label_names")}
CLASSES = {"cifar10": [f"class_{i}" for i in range(10)],
           "cifar100": [f"class_{i}" for i in range(100)]}


def old_pickle(content):
    """As the official files: an old protocol, and numpy's name before version 2."""
    return pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core")


def cifar_batch(name, file):
    rng = np.random.default_rng(list(file.encode()))
    labels = rng.integers(0, len(CLASSES[name]), 4).tolist()
    pixels = rng.integers(0, 256, (4, 3072), np.uint8)
    return {KEYS[name][0]: labels, "coarse_labels": [0] * 4, "data": pixels}


def write_cifar(root, name="cifar10", pickled=old_pickle):
    folder = root / data.CIFAR[name]["folder"]
    folder.mkdir(parents=True)
    _, meta, names = KEYS[name]
    (folder / meta).write_bytes(pickled({names: CLASSES[name]}))
    for file in FILES[name]:
        (folder / file).write_bytes(pickled(cifar_batch(name, file)))
    return folder


@pytest.mark.parametrize("pickled", [old_pickle, pickle.dumps])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_old_and_new_pickles_in_the_folder_or_its_parent(
        tmp_path, name, pickled):
    folder = write_cifar(tmp_path, name, pickled)
    for split, files in (("train", FILES[name][:-1]), ("val", FILES[name][-1:])):
        batches = [cifar_batch(name, file) for file in files]
        pixels = b"".join(batch["data"].tobytes() for batch in batches)
        labels = sum((batch[KEYS[name][0]] for batch in batches), [])
        for place in (folder, str(tmp_path)):
            found = load(name, place, split)
            assert found.images.tobytes() == pixels and found.labels.tolist() == labels
            for label, texts in zip(found.labels, found.captions, strict=True):
                assert all(f"class {label}" in text for text in texts)


def test_missing_cifar_files_are_named_and_some_of_the_batches_are_enough(tmp_path, capsys):
    refused("--data-dir", load, "cifar10")
    refused("none/cifar-100-python/train: no such file", load, "cifar100", tmp_path / "none")
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


def test_val_from_train_keeps_training_images_apart_and_reads_no_others(tmp_path):
    (write_cifar(tmp_path) / "test_batch").unlink()

    def part(split, subset=0, apart=5):
        return load("cifar10", tmp_path, split, subset=subset, val_from_train=apart)

    train, val = part("train"), part("val")
    assert len(val) == 5 and len(train) == 15
    assert bytes_of(train) | bytes_of(val) == bytes_of(part("train", 0, 0))
    assert same(part("val", 12), val)  # the same every time, whatever the subset
    assert len(part("train", 12)) == 12 and bytes_of(part("train", 12)) < bytes_of(train)
    assert same(part("zeroshot"), val) and same(part("labelled-val"), val)
    assert same(part("labelled"), train)
    refused("test_batch", part, "val", 0, 0)  # control: the evaluation images are not there
    refused("ask for fewer", part, "train", 0, 20)


BATCH = cifar_batch("cifar10", "data_batch_1")
BAD = {"data_batch_1": [b"", old_pickle(BATCH)[:9000], b"random" * 99, old_pickle([1, 2])],
       "batches.meta": [b"", old_pickle({}), old_pickle({"label_names": [1] * 10})]}
for change in ({"labels": [1, 2, 3]}, {"labels": [1, 2, 3, 10]}, {"labels": [1, 2, 3, -1]},
               {"labels": 4}, {"labels": ["1", "2", "3", "4"]}, {"data": "x"},
               {"data": BATCH["data"][:, :-1]}, {"data": BATCH["data"].view(np.int8)},
               {"labels": [], "data": BATCH["data"][:0]}):
    BAD["data_batch_1"].append(old_pickle(BATCH | change))
BAD["data_batch_1"].append(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")  # wants to run


@pytest.mark.parametrize("file", BAD)
def test_a_bad_cifar_file_is_refused_by_name(tmp_path, file):
    path = write_cifar(tmp_path) / file
    for content in BAD[file]:
        path.write_bytes(content)
        refused(file, load, "cifar10", tmp_path)


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    content = pickle.dumps({"labels": Bomb()}, protocol)
    (write_cifar(tmp_path) / "data_batch_1").write_bytes(content)
    refused("data_batch_1: refused", load, "cifar10", tmp_path)
    with pytest.raises(pytest.fail.Exception):  # control: it does run where nothing refuses it
        pickle.loads(content)  # noqa: S301


def test_byte_strings_of_python_2_are_read(tmp_path):
    (tmp_path / "old").write_bytes(b"(dS'data'\nS'\\xff'\ns.")  # the official files hold such
    assert data.read_pickle(tmp_path / "old") == {"data": "\xff"}


# --download


def serve(monkeypatch, folder, members):
    """Offers {name: content} as the archive of CIFAR-10 -> its file."""
    file = folder / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setitem(data.CIFAR["cifar10"], "url", file.as_uri())
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", hashlib.md5(file.read_bytes()).hexdigest())
    return file


unpacks = pytest.mark.skipif(not hasattr(tarfile, "data_filter"),
                             reason="this Python cannot unpack safely, and data.fetch says so")


@unpacks
def test_an_archive_is_fetched_once_and_again_if_the_connection_breaks(tmp_path, monkeypatch):
    assert data.CIFAR["cifar10"]["url"].startswith("https://")
    folder = write_cifar(tmp_path / "source")
    members = {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    file = serve(monkeypatch, tmp_path, members)
    new = tmp_path / "new" / "data"
    with monkeypatch.context() as broken:
        broken.setattr("shutil.copyfileobj", lambda source, f: f.write(source.read(9)))
        refused("download failed", load, "cifar10", new, download=True)
        assert not list(new.iterdir())
    for _ in range(2):
        assert same(load("cifar10", new, download=True), load("cifar10", tmp_path / "source"))
        file.unlink(missing_ok=True)  # once is enough


@unpacks
def test_an_archive_that_leads_outside_or_has_another_md5_is_refused(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, {"../evil": b"x"})
    refused("could not be unpacked", load, "cifar10", tmp_path / "data", download=True)
    assert not (tmp_path / "evil").exists()
    monkeypatch.setitem(data.CIFAR["cifar10"], "md5", "0" * 32)
    refused("wrong md5", load, "cifar10", tmp_path / "data", download=True)


def test_a_python_that_cannot_unpack_safely_does_not_unpack(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, {"a": b"x"})
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    refused("cannot unpack safely", load, "cifar10", tmp_path / "data", download=True)
    assert [file.suffix for file in (tmp_path / "data").iterdir()] == [".gz"]


# coco, captions


def paint(path, number=0):
    """An image of one colour that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (number, 2 * number, 255 - number)).save(path)


def write_coco(root, split="val", year="2017", count=3, more=()):
    """`count` numbered images with two captions each, and `more` captions of the first."""
    images, annotations = [], []
    for i in range(count):
        name = f"{'COCO_' * (year == '2014')}{i:012}.png"
        paint(root / f"{split}{year}" / name, i)
        images.append({"id": 7 * i, "file_name": name})
        for text in ("one", "two"):
            annotations.append({"image_id": 7 * i, "caption": f"{text} of {i}"})
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


def test_empty_captions_are_skipped_and_one_that_is_a_number_is_refused(tmp_path):
    write_coco(tmp_path, more=[None, "", "  "])
    assert agrees(load("coco", tmp_path, "val", size=8))
    write_coco(tmp_path, more=[7])
    refused("not COCO captions", load, "coco", tmp_path, "val")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"images": 5}', '{"images": [], "annotations": []}', "[" * 9999,
    '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
    '{"images": [{"id": 1, "file_name": 5}], "annotations": []}'],
    ids=range(8))
def test_broken_coco_annotations_are_refused_by_name(tmp_path, text):
    write_coco(tmp_path).write_text(text)
    refused("captions_val2017.json", load, "coco", tmp_path, "val")


def test_files_and_folders_that_are_not_there_are_named(tmp_path):
    for name in ("coco", "captions", "cifar10"):
        refused("no such f", load, name, "x" * 300)
    refused("captions_train2017.json: no such file", load, "coco", tmp_path)
    refused("captions.txt: no such file", load, "captions", tmp_path)
    refused("--download fetches CIFAR only", load, "coco", tmp_path, download=True)
    write_coco(tmp_path)
    (tmp_path / "val2017" / f"{1:012}.png").unlink()
    refused("1 of .*3 .*first .*/000000000001.png", load, "coco", tmp_path, "val")


def test_captions_may_hold_commas_quotes_and_a_byte_order_mark(tmp_path):
    rows = ["\ufeffimage,caption", '1.png,"A ""big"" dog , runs"', "1.png,Plain .", '2.png,"A, b"']
    (tmp_path / "my.csv").write_text("\n".join(rows), "utf-8")
    paint(tmp_path / "1.png")
    paint(tmp_path / "2.png")
    train, val = both(tmp_path)
    assert sorted(train.captions + val.captions) == [['A "big" dog , runs', "Plain ."], ["A, b"]]


def test_captions_are_split_by_image_whatever_their_order_and_other_files_move_none_across(
        tmp_path):
    write_captions(tmp_path, range(40))
    train, val = both(tmp_path)
    assert len(val) == 4 and agrees(train) and agrees(val) and len(train) == 36
    head, *rows = (tmp_path / "captions.txt").read_text().splitlines()
    rows = [*rows[30:], *rows[:30]]
    (tmp_path / "captions.txt").write_text("\n".join([head, *rows[::2], *rows[1::2]]))
    for before, after in zip((train, val), both(tmp_path)):
        assert same(before, after)
    write_captions(tmp_path, range(90))
    for before, after in zip((train, val), both(tmp_path)):
        assert bytes_of(before) < bytes_of(after)


def test_a_file_spelled_in_two_ways_is_one_image(tmp_path):
    write_captions(tmp_path, range(30), ["one of {}"])
    with open(tmp_path / "captions.txt", "a") as f:
        f.writelines(f"./{i}.png,two of {i}\n" for i in range(30))
    assert all(map(agrees, both(tmp_path))) and sum(map(len, both(tmp_path))) == 30


@pytest.mark.parametrize("text", [
    "", "file,text\n1.png,a dog\n", "image;caption\n1.png;a dog\n", "image,caption\n",
    "image,caption\n1.png,\n", 'image,caption\n1.png,"a dog\n2.png,a\n',
    'image,caption\n"1\n.png",a dog\n', "image,caption\nnone.png,a dog\n",
    "image,caption\na\0,a dog\n", "image,caption\n1.png,caf\udce9\n",
    f"image,caption\n{'x' * 300}.png,a dog\n"], ids=range(11))
def test_a_bad_table_of_captions_is_refused_by_name(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text, "utf-8", "surrogateescape")
    paint(tmp_path / "1.png")
    refused("captions.txt", load, "captions", tmp_path, "val")


def test_one_unreadable_image_in_a_hundred_is_named_and_skipped_but_no_more(tmp_path, capsys):
    write_captions(tmp_path, range(120))
    good = load("captions", tmp_path, size=8)
    numbers = [texts[0].split()[-1] for texts in good.captions]
    first, second = (tmp_path / "Images" / f"{number}.png" for number in numbers[:2])
    first.write_bytes(first.read_bytes()[:50])
    found = load("captions", tmp_path, size=8)
    assert f"{first}: not a readable image" in capsys.readouterr().err
    assert found.captions == good.captions[1:] and agrees(found)
    second.write_bytes(second.read_bytes()[:50])
    refused(" 2 of .*110", load, "captions", tmp_path, size=8)


GREY, ORANGE, WHITE = (90, 90, 90), (250, 128, 3), (255, 255, 255)


@pytest.mark.parametrize("mode, end, colour, wanted", [
    ("RGB", "jpg", ORANGE, ORANGE), ("L", "png", 90, GREY), ("1", "png", 1, WHITE),
    ("P", "png", 1, ORANGE), ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
    # 16 bits, unless it holds nothing above 255; floats, unless they hold nothing above 1
    ("I;16", "png", 32768, (128, 128, 128)), ("I;16", "png", 90, GREY),
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
    for share in (0, 0.5, 0.99):
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
        refused("No space left on device", load, "captions", tmp_path, size=8)
        full.setitem(sys.modules, "PIL", None)
        refused("pip install pillow", load, "captions", tmp_path, size=8)
    assert not list((tmp_path / "cache").iterdir())
    assert agrees(load("captions", tmp_path, size=8))  # control: with both


@pytest.mark.parametrize("rank, said", [("0", "note: words\n"), ("1", "")])
def test_of_several_processes_only_the_first_says_a_note(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)  # as torchrun does
    data.note("words")
    assert capsys.readouterr().err == said
