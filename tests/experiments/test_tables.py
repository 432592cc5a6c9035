"""Tables of captions as people have them: each becomes the right captions.csv, or one line."""
import json
import os

import pytest
from helpers import refused
from own_pictures import NAMES, TESTED, TEXTS, check_whole, parts

from experiments import tables


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


def convert(source, out=None):
    """-> the folder of the new captions.csv."""
    tables.main([str(source), *(["--out", str(out)] if out else [])])
    return out or source


def splits_of(source, out):
    out.mkdir()
    return parts(convert(source, out))


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
    (tmp_path / "new").mkdir()
    check_whole(convert(tmp_path, tmp_path / "new"))
    if READ[kind][0] != "captions.csv":
        check_whole(convert(tmp_path))
        os.rename(tmp_path, f"{tmp_path}-moved")
        check_whole(f"{tmp_path}-moved")


def test_line_breaks_and_quotes_come_out_as_one_line_and_empty_captions_not_at_all(tmp_path):
    texts = {"my dog.png": ['A "big" dog , runs', "'quoted'", "7", "two lines", "dog " * 9 + "!"]}
    rows = 'my dog.png,"A ""big"" dog , runs"\nmy dog.png,\'quoted\'\nmy dog.png,7\nmy dog.png,\n'
    make_pictures(tmp_path, [*texts, "x.png"])
    write(tmp_path, "captions.txt", f'image,caption\n{rows}my dog.png,"two\nlines"\n'
          f"my dog.png,{'dog ' * 9}!\nx.png,x\n")
    assert set.union(*parts(convert(tmp_path), {**texts, "x.png": ["x"]})) == {*texts, "x.png"}


def test_the_one_odd_name_of_flickr8k_is_read_and_no_other_is_cut(tmp_path):
    write(tmp_path, "x.token.txt", "a.jpg.1#0\tdog\nb.jpg#0\tdog\nc.1#0\tdog\n")
    texts = dict.fromkeys(["a.jpg", "b.jpg", "c.1"], ["dog"])
    make_pictures(tmp_path, texts)
    assert set.union(*parts(convert(tmp_path), texts)) == texts.keys()


# Where the pictures are


@pytest.mark.parametrize("folder", [*tables.FOLDERS, "my photos"])
def test_pictures_are_in_the_usual_folders_or_the_only_one_that_holds_them(tmp_path, folder):
    write(tmp_path, "captions.txt", table())
    make_pictures(tmp_path / folder)
    make_pictures(tmp_path / "other", ["x.png"])
    check_whole(convert(tmp_path))
    pictures = tables.Pictures(tmp_path)
    assert pictures.find(".\\1.png") == str(tmp_path / folder / "1.png")
    make_pictures(tmp_path / "third")
    found = tables.Pictures(tmp_path).find("1.png")
    assert found == (None if folder == "my photos" else pictures.find("1.png"))


def test_pictures_that_are_not_there_are_left_out_and_counted(tmp_path, capsys):
    write(tmp_path, "captions.txt", table() + "no.png,x\nhttp://x.org/1.png,y\n")
    refused("no captions of pictures that are there; nothing is made", convert, tmp_path)
    assert not (tmp_path / "captions.csv").exists()
    make_pictures(tmp_path)
    check_whole(convert(tmp_path))
    said = capsys.readouterr()
    assert "2 pictures are not there, as these: no.png, http://x.org/1.png; left" in said.err
    assert "captions.csv: 40 captions, 17 pictures to learn from, 3 to evaluate on" in said.out
    refused("is there already; .*--out", convert, tmp_path)


# Which table, which split


def test_the_only_table_is_read_several_are_listed_and_one_may_be_named(tmp_path):
    make_pictures(tmp_path)
    for name in ("Flickr8k.lemma.token.txt", "ExpertAnnotations.txt", "x.json", ".a.csv",
                 "._x.token.txt", ".~lock.a.csv#", "a.csv.bak"):
        write(tmp_path, name, "no table")
    refused("one table of captions is needed, there is none", convert, tmp_path)
    kinds = {"a.csv": table(), "b.TSV": table(), "dataset_x.json": karpathy(),
             "x.token.txt": TOKENS}
    for i, name in enumerate(kinds):
        write(tmp_path, name, kinds[name])
        assert set.union(*splits_of(tmp_path, tmp_path / f"out{i}")) == set(NAMES)
        (tmp_path / name).unlink()
    for name in kinds:
        write(tmp_path, name, kinds[name])
    refused(f"there is {', '.join(kinds)}; name it: ", convert, tmp_path)
    (tmp_path / "named").mkdir()
    check_whole(convert(tmp_path / "b.TSV", tmp_path / "named"))


def test_files_for_each_split_are_obeyed_and_test_goes_before_val(tmp_path):
    make_pictures(tmp_path)
    write(tmp_path, "Train.csv", table(names=NAMES[:12]))
    write(tmp_path, "val.csv", table(names=NAMES[12:15]))
    assert splits_of(tmp_path, tmp_path / "a") == [set(NAMES[:12]), set(NAMES[12:15])]
    write(tmp_path, "test.csv", table(names=NAMES[15:]))
    assert splits_of(tmp_path, tmp_path / "b") == [set(NAMES[:12]), set(NAMES[15:])]
    write(tmp_path, "test.csv", table(names=NAMES[11:]))
    refused("11.png is in two splits", convert, tmp_path)


@pytest.mark.parametrize("splits, learned, tested", [
    (("train", "val", "test"), 0, 2), (("restval", "dev"), 0, 1), (("test", "train"), 1, 0),
    ((" Train", "Validation "), 0, 1), (("train", "valid"), 0, 1)])
def test_a_tables_own_splits_are_obeyed(tmp_path, splits, learned, tested):
    names = [set(NAMES[i::len(splits)]) for i in (learned, tested)]
    make_pictures(tmp_path / "val2014")
    column = table("image,caption,Split", "{name},{quoted},{split}", splits=splits)
    assert splits_of(write(tmp_path, "a.csv", column), tmp_path / "1") == names
    make_pictures(tmp_path / "train2014")  # of the same names
    plain = [split.strip().lower() for split in splits]
    source = write(tmp_path, "dataset_x.json", karpathy(plain, filepath="val2014"))
    assert splits_of(source, tmp_path / "2") == names


def test_the_lists_of_flickr8k_are_obeyed_if_both_are_there(tmp_path):
    make_pictures(tmp_path / "Flicker8k_Dataset")
    write(tmp_path, "captions.txt", TOKENS)
    write(tmp_path, "Flickr_8k.trainImages.txt", "\r\n".join(NAMES[:14]))
    write(tmp_path, "Flickr_8k.devImages.txt", "\n".join(NAMES[14:16]))
    assert splits_of(tmp_path, tmp_path / "a")[1] == TESTED  # control: only one of them
    write(tmp_path, "Flickr_8k.testImages.txt", "\n".join(NAMES[16:]) + "\n")
    for i, table_of in enumerate((TOKENS, table(row="Flicker8k_Dataset/{name},{quoted}"))):
        write(tmp_path, "captions.txt", table_of)
        assert splits_of(tmp_path, tmp_path / f"b{i}") == [set(NAMES[:14]), set(NAMES[16:])]


# What is refused

HEAD = "image,caption\n"
SPLIT = "image,caption,split\n1.png,a,train\n"
REFUSED = [  # a table, what is said
    ("", "line 1: must name the columns"), (HEAD, "no captions of pictures"),
    (HEAD + "1.png,\n2.png, \n", "no captions of pictures"), ("1.png,a dog\n", "must name"),
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
    # kinds of text
    (b"\xff\xfei", "cannot be read as text"), (HEAD.encode() + b"1.png,caf\xe9\n", "as UTF-8"),
    (b"PK\x03\x04" + bytes(range(256)), "cannot be read as text"), ("<!DOCTYPE>\n", "must name"),
    (table().encode("utf-16-le"), "1: must name"), ("a.png#0\tx\nb.png\ty", "line 2 is not name#"),
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
def test_what_is_wrong_with_a_table_is_one_line_and_nothing_is_made(tmp_path, content, said):
    make_pictures(tmp_path, [*NAMES, "1", "2", "a", "b"])
    refused(f"captions.txt: (.*{said}|{said})", convert, write(tmp_path, "captions.txt", content))
    assert not (tmp_path / "captions.csv").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"images": 5}', '{"images": [{"filename": "1.png"}]}',
                                  "[" * 9999, karpathy(["exam"]), '{"images": []}'], ids=range(7))
def test_a_broken_file_of_karpathys_is_one_line(tmp_path, text):
    refused("dataset_x.json: ", convert, write(tmp_path, "dataset_x.json", text))
