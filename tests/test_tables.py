"""Tables of captions as people have them, and COCO's: each gives the right data or one line."""
import csv
import hashlib
import io
import json
import os
from pathlib import Path

import pytest
from helpers import fails, refused
from own_pictures import both, check_captions, paint, write_captions

from data import captions_table, load

NAMES = [f"{i}.png" for i in range(20)]
TEXTS = {name: [f"one of {name}", f"two, of {name}"] for name in NAMES}
TESTED = {name for name in NAMES if hashlib.sha256(name.encode()).digest()[0] < 26}  # 3 of them


def make_pictures(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def table(header="image,caption", row="{name},{quoted}", names=NAMES, splits=("",)):
    """A text with a row for each caption, or for {both} of a picture."""
    lines = [header] if header else []
    for i, name in enumerate(names):
        pair = '"{}","{}"'.format(*TEXTS[name])
        for k, text in enumerate(TEXTS[name]):
            lines.append(row.format(name=name, k=k, text=text, quoted=f'"{text}"', both=pair,
                                    split=splits[i % len(splits)]))
    return "\n".join(dict.fromkeys(lines)) + "\n"


def karpathy(splits=("train", "test"), **where):
    images = []
    for i, name in enumerate(NAMES):
        sentences = [{"raw": text} for text in TEXTS[name]]
        split = splits[i % len(splits)]
        images.append({"filename": name, "split": split, "sentences": sentences} | where)
    return json.dumps({"images": images})


def parts(root, known=TEXTS):
    """Names of the pictures to learn from and to evaluate on, whose captions must be right."""
    found = []
    for part in ("train", "val"):
        captions, _ = captions_table(Path(root), part)
        for path, texts in captions.items():
            assert os.path.isfile(path) and known[os.path.basename(path)] == texts
        found.append({os.path.basename(path) for path in captions})
    return found


def check_whole(root):
    assert parts(root) == [TEXTS.keys() - TESTED, TESTED]


# What is read

TOKENS = table("", "{name}#{k}\t{text}")
READ = {  # file, content
    "comma": ("captions.txt", table()),
    "semicolon": ("captions.csv", table("image;caption", "{name};{text}")),
    "tab": ("my.tsv", table("image\tcaption", "{name}\t{text}")),
    "bar, any case, blanks": ("my.csv", table(" IMAGE | Caption ", " {name} | {text} ")),
    "Hugging Face": ("metadata.csv", table("file_name,text")),
    "title, filename": ("a.csv", table("title,filename", "{quoted},{name}")),
    "filepath, sentence": ("a.csv", table("filepath;sentence", "{name};{text}")),
    "name, comment": ("a.csv", table("name,comment")),
    "Flickr30k": ("results.csv", table("image_name| comment_number| comment", "{name}| {k}| {text}")
                  .replace("3.png| 1| ", "3.png| 1   ")),
    "Flickr30k, commas": ("captions.txt", table("image_name,comment_number,comment",
                                                "{name},{k},{quoted}")),
    "numbered columns": ("captions.txt", table("image,caption_0,caption_1", "{name},{both}")),
    "repeated columns": ("captions.txt", table("image,Caption,caption", "{name},{both}")),
    "pandas' repeated columns": ("a.csv", table(",image,caption,caption.1", "7,{name},{both}")),
    "other columns": ("a.csv", table("id,text,image,caption,url,", "9,x,{name},{quoted},,")),
    "Flickr8k": ("Flickr8k.token.txt", TOKENS),
    "tokens in captions.txt": ("captions.txt", TOKENS),
    "UTF-8 with a mark": ("captions.txt", table().encode("utf-8-sig")),
    "UTF-16": ("captions.txt", table().encode("utf-16")),
    "UTF-16, big end first": ("captions.txt", b"\xfe\xff" + table().encode("utf-16-be")),
    "CR": ("captions.txt", table().replace("\n", "\r")),
    "CRLF": ("captions.txt", table().replace("\n", "\r\n")),
    "empty rows": ("a.csv", "\n\n" + table("image;caption", "\n;\n{name};{text}\n;")),
    "all quoted": ("a.csv", "\ufeff" + table('"image";"caption"', '"{name}";{quoted}')),
    "folders": ("captions.txt", table(row="Images/{name},{quoted}")),
    "backslashes": ("captions.txt", table(row="Images\\{name},{quoted}")),
    "markdown": ("captions.txt", table("| image | caption |", "| {name} | {text} |")),
}


@pytest.mark.parametrize("kind", READ)
def test_a_table_of_any_common_form_gives_the_same_captions_and_split(tmp_path, kind):
    make_pictures(tmp_path / "Images")
    write(tmp_path, *READ[kind])
    check_whole(tmp_path)


def test_captions_come_out_as_they_are_written(tmp_path):
    texts = {"my dog.png": ['A "big" dog , runs', "'quoted'", "7", "NaN", "...", "\u00e9\u2028!"],
             "1.PNG": ["two\nlines", "dog " * 20000 + "!", "same", "same"]}
    rows = io.StringIO()
    csv.writer(rows).writerow(("image", "caption"))
    csv.writer(rows).writerows((name, text) for name in texts for text in texts[name])
    make_pictures(tmp_path, texts)
    write(tmp_path, "captions.txt", rows.getvalue())
    assert set.union(*parts(tmp_path, texts)) == texts.keys()


def test_the_one_odd_name_of_flickr8k_is_read_and_no_other_is_cut(tmp_path):
    write(tmp_path, "x.token.txt", "a.jpg.1#0\tdog\nb.jpg#0\tdog\nc.1#0\tdog\n")
    texts = dict.fromkeys(["a.jpg", "b.jpg", "c.1"], ["dog"])
    make_pictures(tmp_path, texts)
    assert set.union(*parts(tmp_path, texts)) == texts.keys()


def test_the_order_of_rows_changes_nothing(tmp_path):
    write_captions(tmp_path, 20)
    before = both(tmp_path)
    head, *rows = (tmp_path / "captions.txt").read_text().splitlines()
    write(tmp_path, "captions.txt", "\n".join([head, *rows[22::2], *rows[:22:2], *rows[1::2]]))
    for a, b in zip(before, both(tmp_path), strict=True):
        assert check_captions(a) == check_captions(b) and a.names == b.names


# Where the pictures are


@pytest.mark.parametrize("folder", ["", "Images", "images", "Flicker8k_Dataset", "flickr30k_images",
                                    "my photos"])
def test_pictures_are_in_the_usual_folders_or_the_only_one_that_holds_them(tmp_path, folder):
    write(tmp_path, "captions.txt", table())
    make_pictures(tmp_path / folder)
    make_pictures(tmp_path / "other", ["x.png"])
    check_whole(tmp_path)
    for found, more in ((folder, "third"), (folder.replace("my photos", ""), ""), ("", "")):
        captions, _ = captions_table(tmp_path, "train")
        assert {Path(path).parent for path in captions} == {tmp_path / found}
        make_pictures(tmp_path / more)  # controls: not the only one; the name as it is


def test_moving_pictures_or_naming_them_in_another_way_moves_none_across(tmp_path):
    for i, form in enumerate(["", "./", "a/b/", f"{tmp_path}/3/a/", f"{tmp_path}/4/x/../a/",
                              "../2/a/", ".\\a\\b\\"]):
        folder = tmp_path / str(i)
        make_pictures(folder / form.replace("\\", "/"))
        write(folder, "captions.txt", table(row=form + "{name},{quoted}"))
        check_whole(folder)
    more = {str(i): ["x"] for i in range(90)}
    make_pictures(tmp_path / "0", more)
    write(tmp_path / "0", "captions.txt", table() + "".join(f"{name},x\n" for name in more))
    train, val = parts(tmp_path / "0", TEXTS | more)
    assert TESTED < val and TEXTS.keys() - TESTED < train and 5 <= len(val) <= 20
    with fails:  # control: other names, another split
        assert {f"{name}.png" for name in val if int(name.split(".")[0]) < 20} == TESTED


def test_a_picture_spelled_in_several_ways_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "Images")
    forms = ["./", "Images/", "Images\\x\\..\\", f"{tmp_path}/Images/"]
    more = "".join(table("", form + "{name},again") for form in forms)
    write(tmp_path, "captions.txt", table() + more)
    train, val = parts(".", {name: [*TEXTS[name], *["again"] * 4] for name in NAMES})
    assert train | val == TEXTS.keys() and not train & val


# Which table, which split


def test_the_only_table_is_read_several_are_listed_and_one_may_be_named(tmp_path):
    make_pictures(tmp_path)
    for name in ("Flickr8k.lemma.token.txt", "ExpertAnnotations.txt", "x.json", ".a.csv",
                 "._x.token.txt", ".~lock.a.csv#", "a.csv.bak"):
        write(tmp_path, name, "no table")
    refused("one table of captions is needed, there is none", captions_table, tmp_path, "val")
    tables = {"a.csv": table(), "b.TSV": table(), "dataset_x.json": karpathy(),
              "x.token.txt": TOKENS}
    for name in tables:
        assert set.union(*parts(write(tmp_path, name, tables[name]).parent)) == set(NAMES)
        (tmp_path / name).unlink()
    for name in tables:
        write(tmp_path, name, tables[name])
    refused(f"there is {', '.join(tables)}; name it: --data-dir ", captions_table, tmp_path, "val")
    check_whole(tmp_path / "b.TSV")
    for name in ("captions.csv", "captions.txt"):
        write(tmp_path, name, table())
        assert captions_table(tmp_path, "val")[1].name == name


def test_files_for_each_split_are_obeyed_and_test_goes_before_val(tmp_path):
    make_pictures(tmp_path)
    write(tmp_path, "Train.csv", table(names=NAMES[:12]))
    write(tmp_path, "val.csv", table(names=NAMES[12:15]))
    assert parts(tmp_path) == [set(NAMES[:12]), set(NAMES[12:15])]
    write(tmp_path, "test.csv", table(names=NAMES[15:]))
    assert parts(tmp_path) == [set(NAMES[:12]), set(NAMES[15:])]
    write(tmp_path, "test.csv", table(names=NAMES[11:]))
    refused("test.csv: line 2: 11.png is in two splits", captions_table, tmp_path, "val")


@pytest.mark.parametrize("splits, learned, tested", [
    (("train", "val", "test"), 0, 2), (("restval", "dev"), 0, 1), (("test", "train"), 1, 0),
    ((" Train", "Validation "), 0, 1), (("train", "valid"), 0, 1)])
def test_a_tables_own_splits_are_obeyed(tmp_path, splits, learned, tested):
    names = [set(NAMES[i::len(splits)]) for i in (learned, tested)]
    make_pictures(tmp_path / "val2014")
    column = table("image,caption,Split", "{name},{quoted},{split}", splits=splits)
    assert parts(write(tmp_path, "a.csv", column)) == names
    make_pictures(tmp_path / "train2014")  # of the same names
    plain = [split.strip().lower() for split in splits]
    assert parts(write(tmp_path, "dataset_x.json", karpathy(plain, filepath="val2014"))) == names


def test_the_lists_of_flickr8k_are_obeyed_if_both_are_there(tmp_path):
    make_pictures(tmp_path / "Flicker8k_Dataset")
    write(tmp_path, "captions.txt", TOKENS)
    write(tmp_path, "Flickr_8k.trainImages.txt", "\r\n".join(NAMES[:14]))
    write(tmp_path, "Flickr_8k.devImages.txt", "\n".join(NAMES[14:16]))
    check_whole(tmp_path)  # control: only one of them
    write(tmp_path, "Flickr_8k.testImages.txt", "\n".join(NAMES[16:]) + "\n")
    for table_of in (TOKENS, table(row="Flicker8k_Dataset/{name},{quoted}")):
        write(tmp_path, "captions.txt", table_of)
        assert parts(tmp_path) == [set(NAMES[:14]), set(NAMES[16:])]


FLICKR8K = Path(__file__).parents[2] / "shared" / "data" / "flickr8k"


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="Flickr8k is not there")
def test_flickr8k_keeps_its_split():
    for part, count, wanted in (("train", 7006, "65ee151f0e9f"), ("val", 820, "c53ec9e114f9")):
        captions, _ = captions_table(FLICKR8K, part)
        names = "\n".join(sorted(map(os.path.basename, captions)))
        assert len(captions) == count and {len(texts) for texts in captions.values()} == {5}
        assert hashlib.sha256(names.encode()).hexdigest()[:12] == wanted


# What is refused

HEAD = "image,caption\n"
SPLIT = "image,caption,split\n1.png,a,train\n"
REFUSED = [  # a table, what is said
    ("", "line 1: must name the columns"), (HEAD, "0 pictures to learn from and 0 to"),
    (HEAD + "1.png,a\n", "0 pictures to learn from and 1 to evaluate on"),
    (HEAD + "1.png,\n2.png, \n", "no pictures with captions"), ("1.png,a dog\n", "must name"),
    # cells and quotes
    (table() + "1.png,a dog, and a cat\n", "line 42: 3 cells, but 2 columns; quote"),
    (table() + "1.png,a dog\nthat runs\n", "line 43: 1 cells"),
    (HEAD + '1.png,"two\nlines"\n2.png\n', "line 4: 1 cells"),
    (table() + '1.png,"a dog\n2.png,a\n', "line 42: .*a quote is not closed"),
    (HEAD + '1.png,"a dog" runs\n', "line 2: .*a quote is not closed, or not doubled"),
    (table() + '1.png,"a dog\n2.png,a\n3.png,a dog"\n', "line 42: a quote .* closed behind 2.png"),
    (table() + '1.png,"a dog\nnew.png,a dog"\n', "line 42: a quote .* closed behind new.png"),
    ('caption,image\n"a dog,1.png\na,2.png\na dog",3.png\n', "line 2: a quote .* behind"),
    (HEAD + '1,"a\n2,b"\n2,x\n', "line 2: a quote .* behind 2"),
    (HEAD + '"1\n.png",a dog\n', "line 2: no picture's name"), (HEAD + " ,a\n", "line 2: no pict"),
    # the exception for Flickr30k's row holds for nothing else
    ("image_name| comment_number| comment\n1.png| a dog\n", "line 2: 2 cells, but 3"),
    ("image_name|comment_number|comment\n1.png| 0 a| dog| x\n", "line 2: 4 cells"),
    ("image_name,comment_number,comment\n1.png, 0   a dog\n", "line 2: 2 cells, but 3"),
    ("image|number|comment\n1.png| 0   a dog\n", "line 2: 2 cells, but 3"),
    # splits
    (SPLIT + "2.png,b,exam\n", "line 3: the split is 'exam'"), (SPLIT + "2.png,b,\n", "is ''"),
    (SPLIT + "./1.png,b,test\n", "line 3: 1.png is in two splits"), (SPLIT, "1 pict.* and 0 to"),
    # kinds of text
    (b"\xff\xfei", "cannot be read as text"), (HEAD.encode() + b"1.png,caf\xe9\n", "as UTF-8"),
    (b"PK\x03\x04" + bytes(range(256)), "cannot be read as text"), ("<!DOCTYPE>\n", "must name"),
    (table().encode("utf-16-le"), "1: must name"), ("a.png#0\tx\nb.png\ty", "line 2 is not name#"),
    # pictures that are not there
    (table(row="no{name},{quoted}"), "1[0-9] of .*/no1.png: no such file.*Too many"),
    (HEAD + "a\0,x\nb,y\n", "1 of 1 pictures"), (table(row="x" * 300 + "{name},a"), "of .. pict"),
    (table(row="http://x.org/{name},{quoted}"), "x.org/1.png: no such file"),
    (table(row="C:\\Users\\{name},{quoted}"), "C:/Users/1.png: no such file"),
    # what spreadsheets and scripts write: Excel, R, pandas, JSON, C
    ("sep=;\nimage;caption\n1.png;a\n", r"not \['sep=', ''\]"), (table("image;caption"), "1 cells"),
    (table('"image","caption"', '"7","{name}",{quoted}'), "line 2: 3 cells"),
    (table(row='"{name},{text}"'), "1 cells"), (table(row="{name},{quoted},"), "line 2: 3 cells"),
    (table(row="{name},\"['a', 'b']\""), "a list"), (table(row='{name},"[""a"", ""b""]"'), "list"),
    (table(row='{name},"a \\"dog\\""'), "not doubled"), (table(row="{name}, {quoted}"), "3 cells"),
    (table("image\tcaption", '{name}\t"Hi" he says'), "line 2: .*quote"),
    (table("Image (jpg),Caption [en]"), "must name"), (table("image_id,caption"), "must name"),
    (table("image caption", "{name} {text}"), "must name"), (table("\u200bimage,caption"), "200b"),
    (table() + "1.png," + "dog " * 40000, "line 42: field larger"),
]


@pytest.mark.parametrize("content, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_with_a_table_is_one_line(tmp_path, content, said):
    for name in [*NAMES, "1", "2"]:
        paint(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    write(tmp_path, "captions.txt", content)
    refused(f"captions.txt: (.*{said}|{said})", both, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"images": 5}', '{"images": [{"filename": "1.png"}]}',
                                  "[" * 9999, karpathy(["exam"]), '{"images": []}'], ids=range(7))
def test_a_broken_file_of_karpathys_is_one_line(tmp_path, text):
    refused("dataset_x.json: ", both, write(tmp_path, "dataset_x.json", text).parent)


def test_pictures_and_empty_captions_of_a_table_are_skipped_and_counted(tmp_path, capsys):
    write_captions(tmp_path, 40)
    with open(tmp_path / "captions.txt", "a") as f:
        f.write("0.png,\n0.png,  \nimage,caption\n")  # the header again, as where files are joined
    assert sorted(sum(map(check_captions, both(tmp_path)), [])) == list(range(40))
    said = capsys.readouterr().err
    assert "captions.txt: 2 empty captions skipped" in said
    assert f"pictures cannot be read, as these: {tmp_path}/image: no such file; skipped" in said


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
    return write(root / "annotations", f"captions_{split}{year}.json",
                 json.dumps({"info": {}, "images": images, "annotations": annotations}))


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
    assert "2 captions of images that it does not list" in said and "3 empty captions" in said


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


def test_folders_that_are_not_there_are_named():
    for name in ("coco", "captions", "cifar10"):
        for folder in (None, "x" * 300, "a\0"):
            refused("no such folder", load, name, folder)
