"""captions.csv and COCO's annotations: the right data, or one line that says what is wrong."""
import csv
import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from helpers import fails, refused
from own_pictures import NAMES, TESTED, TEXTS, both, check_captions, check_whole, paint, parts

from data import captions_table, load

FORMS = ["", "./", "a/b/", "Images/", "../x/"]  # of a name


def make(folder, texts=TEXTS, form="", split=None, encoding="utf-8", end="\n"):
    """A folder with captions.csv and empty pictures. form: before each name; split: of a name."""
    rows = [["image", "caption", "split"][:3 if split else 2]]
    for name in texts:
        path = folder / form / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        rows += [[form + name, text, *([split(name)] if split else [])] for text in texts[name]]
    table = io.StringIO()
    csv.writer(table, lineterminator=end).writerows(rows)
    (folder / "captions.csv").write_bytes(table.getvalue().encode(encoding))
    return folder


# What is read


@pytest.mark.parametrize("how", [*({"form": form} for form in FORMS), {"end": "\r\n"},
                                 {"encoding": "utf-8-sig"}], ids=str)
def test_a_table_gives_its_captions_and_one_picture_in_ten_to_evaluate_on(tmp_path, how):
    check_whole(make(tmp_path / "x", **how))
    os.rename(tmp_path / "x/captions.csv", tmp_path / "x/captions.txt")
    check_whole(tmp_path / "x")
    os.rename(tmp_path / "x", tmp_path / "moved")
    if how.get("form") != "../x/":
        check_whole(tmp_path / "moved")


def test_pictures_are_below_the_folder_or_its_images(tmp_path):
    check_whole(make(tmp_path, form="Images/"))
    text = (tmp_path / "captions.csv").read_text()
    (tmp_path / "captions.csv").write_text(text.replace("Images/", ""))
    check_whole(tmp_path)
    more = text.replace("image,caption\n", "").replace("Images/", f"{tmp_path}/Images/x/../")
    (tmp_path / "captions.csv").write_text(text + more)  # spelled in another way it is the same
    assert parts(tmp_path, {name: 2 * TEXTS[name] for name in NAMES})[1] == TESTED


def test_captions_come_out_as_they_are_written(tmp_path):
    texts = {"my dog.png": ['A "big" dog , runs', "'quoted'", "7", "NaN", "...", "\u00e9\u2028!"],
             "1.PNG": [" blank ", "dog " * 20000 + "!", "same", "same"]}
    assert set.union(*parts(make(tmp_path, texts), texts)) == texts.keys()


def test_new_pictures_and_another_order_of_rows_move_none_across(tmp_path):
    more = {str(i): ["x"] for i in range(90)}
    train, val = parts(make(tmp_path, dict(reversed((TEXTS | more).items()))), TEXTS | more)
    assert TESTED < val and TEXTS.keys() - TESTED < train and 5 <= len(val) <= 20
    with fails:  # control: other names, another split
        other = {f"x{name}": texts for name, texts in TEXTS.items()}
        assert {name[1:] for name in parts(make(tmp_path / "x", other), other)[1]} == TESTED


def chosen_to_evaluate_on(root):
    return {os.path.relpath(path, root) for path in captions_table(Path(root), "val")[0]}


def test_the_split_is_by_the_path_below_the_folder_that_all_pictures_share(tmp_path):
    texts = {f"{folder}/{name}": ["x"] for folder in ("train", "val") for name in NAMES}
    tested = {name for name in texts if hashlib.sha256(name.encode()).digest()[0] < 26}
    assert chosen_to_evaluate_on(make(tmp_path / "a", texts)) == tested != set()
    found = chosen_to_evaluate_on(make(tmp_path / "b", texts, form="deep/down/"))
    assert found == {f"deep/down/{name}" for name in tested}
    one = {name: texts[name] for name in texts if name.startswith("train")}  # it is shared then
    found = chosen_to_evaluate_on(make(tmp_path / "c", one))
    assert found == {f"train/{name}" for name in TESTED}


def test_the_table_of_the_converter_is_read_before_others_and_its_name_is_kept(tmp_path):
    for name in ("captions.txt", "captions.csv", "coca.csv"):  # the later goes first
        paint(tmp_path / f"{name}.png")
        paint(tmp_path / "other.png")
        table = f"image,caption,split\n{name}.png,a,train\nother.png,b,test\n"
        (tmp_path / name).write_text(table)
        found = load("captions", tmp_path, size=4)
        assert found.names == [f"{name}.png"] and found.source == str(tmp_path / name)


@pytest.mark.parametrize("splits, learned, tested", [
    (("train", "val", "test"), 0, 2), (("test", "train"), 1, 0), (("train", "val"), 0, 1)])
def test_a_tables_own_splits_are_obeyed_and_test_goes_before_val(tmp_path, splits, learned, tested):
    make(tmp_path, split=lambda name: splits[NAMES.index(name) % len(splits)])
    assert parts(tmp_path) == [set(NAMES[i::len(splits)]) for i in (learned, tested)]


FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="Flickr8k is not there")
def test_flickr8k_keeps_its_split():
    for part, count, wanted in (("train", 7006, "65ee151f0e9f"), ("val", 820, "c53ec9e114f9")):
        captions, _, _ = captions_table(FLICKR8K, part)
        names = "\n".join(sorted(map(os.path.basename, captions)))
        assert len(captions) == count and {len(texts) for texts in captions.values()} == {5}
        assert hashlib.sha256(names.encode()).hexdigest()[:12] == wanted


# What is refused

HEAD = "image,caption\n"
SPLIT = "image,caption,split\n1.png,a,train\n"
REFUSED = [  # a table, what is said
    ("", "line 1 must be image,caption.*experiments.tables"), ("1.png,a dog\n", "line 1 must be"),
    ("image;caption\n1.png;a\n", "line 1 must"), (HEAD.encode("utf-16-le"), "line 1 must"),
    (HEAD, "0 pictures to learn from and 0 to"), (HEAD + "1.png,a\n", "0 pictures .* and 1 to ev"),
    (HEAD + "1.png,a\n2.png, \n", "line 3: must be image,caption"), (HEAD + ",a\n", "line 2: must"),
    (HEAD + "1.png,a dog, and a cat\n", "line 2: must be image,caption, and a caption with a comma in"),
    (HEAD + "1.png,a dog\nthat runs\n", "line 3: must be"),
    (HEAD + '1.png,"a dog\nthat runs"\n', "line 2: .*a quote is not closed"),
    (HEAD + '1.png,"a dog" runs\n', "line 2: .*a quote is not closed, or not doubled"),
    (HEAD + '1.png,"a \\"dog\\""\n', "not doubled"), (HEAD + '1.png, "a, b"\n', "line 2: must"),
    (HEAD + "1.png," + "dog " * 40000, "line 2: field larger"),
    (SPLIT + "2.png,b,exam\n", "line 3: the split is 'exam'"), (SPLIT + "2.png,b,\n", "line 3: mu"),
    (SPLIT + "./1.png,b,test\n", "1.png is in two splits"), (SPLIT, "1 pict.* and 0 to"),
    (b"\xff\xfei", "cannot be read as text"), (HEAD.encode() + b"1.png,caf\xe9\n", "as UTF-8"),
    (b"PK\x03\x04" + bytes(range(256)), "cannot be read as text"),
]


@pytest.mark.parametrize("content, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, content, said):
    paint(tmp_path / "1.png")
    (tmp_path / "captions.txt").write_bytes(content if type(content) is bytes else content.encode())
    refused(f"captions.txt: .*{said}|captions.txt: {said}", both, tmp_path)


@pytest.mark.parametrize("name", ["none.png", "x" * 300, "http://x.org/1.png", "C:\\1.png"])
def test_a_picture_that_is_not_there_is_named(tmp_path, name):
    (tmp_path / "captions.csv").write_text(f"image,caption,split\n{name},a,train\nb,b,test\n")
    refused("1 of 1 pictures cannot be read: .*/Images/.*: no such file. .*/captions.csv names "
            "them; looked in .* and .*/Images. .* out those .*: python -m experiments.tables ", both,
            tmp_path)


def test_where_no_table_is_the_converter_is_named():
    refused("no coca.csv, .* there; python -m experiments.tables .*tests makes", captions_table,
            Path(__file__).parent, "val")


def test_folders_that_are_not_there_are_named():
    for name in ("coco", "captions", "cifar10"):
        refused(f"{name} needs --data-dir", load, name)
        for folder in ("x" * 300, "a\0"):
            refused("no such folder", load, name, folder)


# COCO


def write_coco(root, split, count=3, year="2017", more=()):
    """`count` numbered images with two captions each, and more captions."""
    images = []
    annotations = list(more)
    for i in range(count):
        name = f"{'COCO_' * (year == '2014')}{i:012}.png"
        paint(root / f"{split}{year}" / name, i)
        images.append({"id": 7 * i, "file_name": name})
        annotations += [{"image_id": 7 * i, "caption": f"{text} of {i}"} for text in ("one", "two")]
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"captions_{split}{year}.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


def count_coco(root):
    """How many images the splits have, each with its captions."""
    return [len(check_captions(load("coco", root, split, size=4))) for split in ("train", "val")]


def test_coco_is_of_one_year_the_first_that_is_whole(tmp_path):
    write_coco(tmp_path, "train", 4, "2014")
    refused("not whole; .* annotations/captions_train2017.json", count_coco, tmp_path)
    write_coco(tmp_path, "val", 5, "2014")
    assert count_coco(tmp_path) == [4, 5]
    write_coco(tmp_path, "train", 6)
    write_coco(tmp_path, "val", 7)
    assert count_coco(tmp_path) == [6, 7] and len(load("coco", tmp_path, size=4, subset=2)) == 2
    for name in ("val2017", "train2017", "annotations/captions_val2017.json",
                 "annotations/captions_train2017.json"):
        (tmp_path / name).rename(tmp_path / "away")
        assert count_coco(tmp_path) == [4, 5]
        (tmp_path / "away").rename(tmp_path / name)


def test_captions_of_images_that_coco_does_not_list_are_skipped_and_counted(tmp_path, capsys):
    more = [{"image_id": 99, "caption": "x"}, {"image_id": "7", "caption": "x"}]
    more += [{"image_id": 0, "caption": text} for text in (None, "", "  ")]
    write_coco(tmp_path, "train", more=more)
    write_coco(tmp_path, "val")
    assert count_coco(tmp_path) == [3, 3]
    said = capsys.readouterr().err
    assert "5 captions skipped, empty or of images that it does not list" in said


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"images": 5}', '{"images": [], "annotations": []}', "[" * 9999,
    '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}',
    '{"images": [], "annotations": [{"image_id": [], "caption": "x"}]}',
    '{"images": [{"id": 1, "file_name": 5}], "annotations": []}',
    '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1, "caption": 7}]}'],
    ids=range(10))
def test_broken_annotations_of_coco_are_refused_by_name(tmp_path, text):
    write_coco(tmp_path, "train")
    write_coco(tmp_path, "val").write_text(text)
    refused("captions_val2017.json: ", count_coco, tmp_path)
