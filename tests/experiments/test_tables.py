"""Tables of captions as people have them: each becomes the right coca.csv, or one line."""
import json
import os
from pathlib import Path

import helpers
import pytest
from own_pictures import NAMES, TESTED, TEXTS, check_whole, parts

from experiments import tables

HALVES = [set(NAMES[:12]), set(NAMES[12:])]


def write(folder, name, content=""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_pictures(folder, names=NAMES):
    for name in names:
        write(folder, name)


def table(header="image,caption", row="{name},{quoted}", names=NAMES, splits=("",)):
    """A text with a row for each caption, or for {both} or a {list} of a picture."""
    lines = [header] if header else []
    for i, name in enumerate(names):
        cells = dict(name=name, stem=name[:-4], both='"{}","{}"'.format(*TEXTS[name]),
                     list=json.dumps(TEXTS[name]).replace('"', '""'), split=splits[i % len(splits)])
        lines += [row.format(k=k, text=text, quoted=f'"{text}"', **cells)
                  for k, text in enumerate(TEXTS[name])]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def objects(image="image", caption="caption", make=str, names=NAMES):
    """One for each caption."""
    return [{image: name, caption: make(text)} for name in names for text in TEXTS[name]]


def json_lines(names=NAMES):
    return "\n".join(map(json.dumps, objects("file_name", "text", names=names))) + "\n\n"


def karpathy(splits=("train", "test"), **where):
    images = [{"filename": name, "split": splits[i % len(splits)],
               "sentences": [{"raw": text, "tokens": ["x"]} for text in TEXTS[name]]} | where
              for i, name in enumerate(NAMES)]
    return json.dumps({"images": images, "dataset": "x"})


def coco(names=NAMES, unlisted=0):
    images = [{"id": int(name[:-4]), "file_name": name} for name in names]
    captions = [{"image_id": int(name[:-4]), "caption": text}
                for name in names for text in TEXTS[name]]
    captions += [{"image_id": 99, "caption": "x"}] * unlisted
    return json.dumps({"info": {}, "images": images, "annotations": captions})


def turns(text, who="from", says="value", answer="gpt"):
    return [{who: "human", says: "?"}, {who: answer, says: text}, {who: answer, says: "no"}]


def convert(source, out=None):
    """-> the folder of the new coca.csv."""
    tables.main([str(source), *(["--out", str(out)] if out else [])])
    return out or source


def splits_of(source, out):
    out.mkdir()
    return parts(convert(source, out))


def refused(said, source, out):
    """By one line of at most 300 characters, and nothing is made."""
    helpers.refused(f"(?=.*{said})^.{{,300}}$", convert, source, out)
    assert not (out / "coca.csv").exists()


HEAD = "image,caption\n"
ROW = "{name},{quoted}"
PYTHON = "{name},\"['one of {name}', 'two, of {name}']\""
TOKENS = table("", "{name}#{k}\t{text}")
COLUMNS = [  # of a .csv: its header, its rows
    ("image;caption", "{name};{text}"), ("image\tcaption", "{name}\t{text}"), ("file_name,text", ROW),
    (" IMAGE | Caption ", " {name} | {text} "), ("| image | caption |", "| {name} | {text} |"),
    ("title,filename", "{quoted},{name}"), ("filepath;sentence", "{name};{text}"), ("name,comment", ROW),
    ("image_path,caption_en", ROW), ("File Name,Descriptions", ROW), ("img,sentences", ROW),
    ("image,caption_0,caption_1", "{name},{both}"), ("image,Caption,caption", "{name},{both}"),
    (",image,caption,caption.1", "7,{name},{both}"), ("id,image,caption", "9,{stem},{quoted}"),
    ("id,text,image,caption,url,", "9,x,{name},{quoted},,"), ("filename,path,text", "{name},a/" + ROW),
    ("image_name,comment_number,comment", "{name},{k},{quoted}"), ("image,caption", "{stem},{quoted}"),
    ("id,image,caption,text", "7,{name},{k},{quoted}"), ("image,file,text", "http://x/7.png," + ROW),
    # lists in cells, as JSON, Label Studio, Python and numpy write them
    ("image,caption", '{name},"{list}"'), ("image,caption", '{name},"{{""text"": {list}}}"'),
    ("image,caption", PYTHON), ("image,caption", PYTHON.replace(", '", "\n '")),
    # names; empty rows; all in quotes, after a mark
    ("image,caption", "IMAGES/{stem}.PNG,{quoted}"), ("image,caption", "Images\\" + ROW),
    ("image,caption", "{name}#{k},{quoted}"), ("image,caption", "/kaggle/input/" + ROW),
    ("image,caption", "C:\\me\\" + ROW), ("\n\nimage;caption", "\n;\n{name};{text}\n;"),
    ('\ufeff"image";"caption"', '"{name}";{quoted}'),
]
READ = [("a.csv", table(header, row)) for header, row in COLUMNS] + [
    ("captions.csv", table()), ("captions.csv", '"sep=;"\n' + table("image;caption", "{name};{text}")),
    ("results.csv", table("image_name| comment_number| comment", "{name}| {k}| {text}")
     .replace("3.png| 1| ", "3.png| 1   ")), ("captions.txt", TOKENS), ("Flickr8k.token.txt", TOKENS),
    ("results_20130124.token", TOKENS), ("x.txt", table("", "{stem}#{k}\t{text}")),
    ("anything", table("", "{name}\t{text}")), ("a.csv", b"\xfe\xff" + table().encode("utf-16-be")),
    ("a.csv", table().replace("\n", "\r")), ("a.csv", table().replace("\n", "\r\n")),
    ("a.json", json.dumps(objects(), indent=1)), ("metadata.jsonl", json_lines()),
    ("a.json", json.dumps({"info": "x", "data": objects()})), ("a.json", json.dumps(TEXTS)),
    ("a.json", json.dumps({name: {"captions": TEXTS[name]} for name in NAMES})),
    ("a.json", json.dumps([{"images": [name], "id": "9", "text": TEXTS[name]} for name in NAMES])),
    ("pandas.json", json.dumps({key: {str(i): found[key] for i, found in enumerate(objects())}
                                for key in ("image", "caption")})),
    ("llava.json", json.dumps(objects(caption="conversations", make=turns))),
    ("messages.json", json.dumps(objects(caption="messages", make=lambda text: turns(
        text, "role", "content", "assistant")))), ("nocaps_val_4500_captions.json", coco()),
]


@pytest.mark.parametrize("file, content", READ, ids=range(len(READ)))
def test_a_table_of_any_common_form_gives_the_same_captions_and_split(tmp_path, file, content):
    make_pictures(tmp_path / "Images")
    write(tmp_path, file, content)
    (tmp_path / "new").mkdir()
    check_whole(convert(tmp_path, tmp_path / "new"))
    assert f"\n{tmp_path}/Images/1.png,one" in (tmp_path / "new/coca.csv").read_text()
    check_whole(convert(tmp_path))
    os.rename(tmp_path, f"{tmp_path}-moved")
    check_whole(f"{tmp_path}-moved")
    assert Path(f"{tmp_path}-moved/coca.csv").read_text().startswith("image,caption\n")


def test_line_breaks_and_quotes_come_out_as_one_line_and_empty_captions_not_at_all(tmp_path):
    texts = {"my dog.png": ['A "big" dog , runs', "'quoted'", "7", "two lines", "[loud] a", "{dog"]}
    rows = ('"A ""big"" dog , runs"', "'quoted'", "7", " ", '"two\nlines"', "[loud] a", "{dog")
    make_pictures(tmp_path, [*texts, "x.png"])
    write(tmp_path, "captions.txt", "image,caption\nx.png,x\n"
          + "".join(f"my dog.png,{row}\n" for row in rows))
    assert set.union(*parts(convert(tmp_path), {**texts, "x.png": ["x"]})) == {*texts, "x.png"}


def test_names_before_a_tab_may_be_odd_and_quotes_after_it_mean_nothing(tmp_path):
    write(tmp_path, "x.token.txt", 'image1\tdog\na.jpg.1#0\tdog\nb.jpg#0\t"dog\nc.1#0\tdog\n'
          "d#1.png#0\tdog\n")
    texts = dict.fromkeys(["a.jpg", "c.1", "d#1.png", "image1.png"], ["dog"]) | {"b.jpg": ['"dog']}
    make_pictures(tmp_path, texts)
    assert set.union(*parts(convert(tmp_path), texts)) == texts.keys()


@pytest.mark.parametrize("name", ["1.png", None])
def test_json_may_be_of_one_picture_or_of_none_and_names_in_captions_mean_nothing(tmp_path, name):
    for more in ({"caption": "a\n2.png"}, {"conversations": turns("a\n2.png")}):
        source = write(tmp_path, "a.jsonl", json.dumps({"image": name} | more))
        assert list(tables.read_table(source)) == [("entry 1", name or "", ["a\n2.png"], "")]


def test_a_name_is_looked_up_once_and_a_folder_listed_once(tmp_path, monkeypatch):
    make_pictures(tmp_path / "photos")
    write(tmp_path, "a.csv", table(row="{stem},{quoted}"))
    find, scandir = tables.Pictures.find, os.scandir
    names, folders = [], []
    monkeypatch.setattr(tables.Pictures, "find", lambda *args: names.append(args[1]) or find(*args))
    monkeypatch.setattr(os, "scandir", lambda path: folders.append(str(path)) or scandir(path))
    check_whole(convert(tmp_path))
    assert len(names) == len(NAMES) and folders.count(str(tmp_path / "photos")) < 3


@pytest.mark.parametrize("folder", [*tables.FOLDERS, "my photos"])
def test_pictures_are_in_the_usual_folders_or_the_only_one_that_holds_them(tmp_path, folder):
    source = write(tmp_path, "captions.txt", table())
    make_pictures(tmp_path / folder)
    make_pictures(tmp_path / "other", ["x.png"])
    make_pictures(tmp_path / ".thumbnails")
    check_whole(convert(tmp_path))
    found = str(tmp_path / folder / "1.png")
    assert tables.Pictures(source, tmp_path, "").find("1.png") == found
    make_pictures(tmp_path / "third")
    expected = None if folder == "my photos" else found
    assert tables.Pictures(source, tmp_path, "").find("1.png") == expected


def test_a_name_fits_without_ending_and_in_other_capitals_if_it_fits_one_picture(tmp_path):
    make_pictures(tmp_path / "Photos/Old", ["A.JPG", "a.txt", "b.png", "b.jpg", "c.x.png"])
    find = tables.Pictures(tmp_path / "x", tmp_path, "").find
    for name in ("photos/old/a", "Old/a.jpg", "Photos/Old/A"):
        assert find(name) == str(tmp_path / "Photos/Old/A.JPG")
    assert find("Old/C.X") == str(tmp_path / "Photos/Old/c.x.png")
    for name in ("Old/b", "Old/c", "Photos/Old", "Old/a.png", "b.png", "", "."):
        assert find(name) is None


def test_pictures_that_are_not_there_are_left_out_and_counted(tmp_path, capsys):
    rows = table("image,caption,caption", "{name},{both}") + "a.png,x,y\nb.png,x,\nc.png,,\nd.png,,\n"
    source = write(tmp_path / "x", "captions.txt", rows)
    refused("no captions of pictures that are there; nothing is made", source, tmp_path / "x")
    make_pictures(tmp_path / "x/images")
    capsys.readouterr()
    check_whole(convert(tmp_path / "x"))
    said = capsys.readouterr()
    assert "4 pictures missing, as a.png, b.png, c.png; 8 captions left out" in said.err
    assert "coca.csv: 40 captions, 17 pictures to learn from, 3 to evaluate on" in said.out
    for content, said in ((coco(unlisted=5), "(no name); 5 captions"), (table(), "")):
        (tmp_path / "x/coca.csv").unlink()
        write(tmp_path / "x", "captions.txt", content)
        check_whole(convert(tmp_path / "x"))
        error = capsys.readouterr().err
        assert said in error and bool(said) == bool(error)


def test_the_table_or_its_pictures_may_be_one_folder_down(tmp_path):
    make_pictures(tmp_path / "photos")
    source = write(tmp_path, "annotations/x.json", coco())
    write(tmp_path, ".ipynb_checkpoints/x.csv", table())
    tables.main([str(source)])  # beside it
    check_whole(source.parent)
    check_whole(convert(tmp_path))
    assert "\nphotos/1.png,one" in (tmp_path / "coca.csv").read_text()
    for folder, beside in (("a", "x.png"), ("b", "y/z")):  # control: these have their own
        write(tmp_path / folder, beside)
        refused("no captions of pict", write(tmp_path, f"{folder}/x", coco()), tmp_path / folder)
    make_pictures(tmp_path / "c/flickr30k/flickr30k")
    write(tmp_path, "c/flickr30k/results.csv", table(row=f"{tmp_path}/c/flickr30k/flickr30k/" + ROW))
    check_whole(convert(tmp_path / "c"))
    assert "\nflickr30k/flickr30k/1.png," in (tmp_path / "c/coca.csv").read_text()
    write(tmp_path, "d/a.csv", table(row=f"{tmp_path}/photos/" + ROW))  # control: not below it
    assert f"\n{tmp_path}/photos/1.png," in (convert(tmp_path / "d") / "coca.csv").read_text()


def test_the_only_table_is_read_several_are_listed_and_one_may_be_named(tmp_path):
    out = tmp_path / "out"
    make_pictures(tmp_path / "Images")
    for name in ("x.lemma.token.txt", ".a.csv", "~$a.csv", "a.csv.bak", "a.csv~", "coca.csv"):
        write(tmp_path, name, table())  # not for us
    for name, content in (("LICENSE", "(c)\tx\ty"), ("Expert.txt", "1.png\t2.png#2\t1\t1\n"),
                          ("x.json", '{"lr": 1}'), ("b.bin", "image,caption\n\0")):
        write(tmp_path, name, content)
    out.mkdir()
    refused("x.json: line 1 must name", tmp_path, out)
    (tmp_path / "x.json").unlink()
    refused("and 0 are among Expert.txt, LICENSE, b.bin .*name one FILE", tmp_path, out)
    for name, content in (("a.csv", table()), ("b.TSV", table()), ("any.json", karpathy()),
                          ("x.token.txt", TOKENS)):
        write(tmp_path, name, content)
    refused("and 4 are among a.csv, any.json, b.TSV, ... .*name one FILE", tmp_path, out)
    refused("coca.csv is of the new form", tmp_path / "coca.csv", out)
    check_whole(convert(tmp_path / "b.TSV", out))
    write(tmp_path, "captions.txt", table(names=NAMES[:10]))  # goes first
    assert set.union(*splits_of(tmp_path, tmp_path / "last")) == set(NAMES[:10])


def test_coca_csv_is_never_overwritten_nor_left_if_it_cannot_be_used(tmp_path):
    make_pictures(tmp_path)
    source = write(tmp_path, "a.csv", table("image,caption,split", "{name},{quoted},train"))
    refused("20 pictures to learn from and 0 to evaluate", tmp_path, tmp_path)
    write(tmp_path, "a.csv", table())
    write(tmp_path, "coca.csv", "mine")
    for argument in (tmp_path, source):
        helpers.refused("is there already; .*--out", convert, argument)
    with pytest.raises(FileExistsError):  # made by somebody in the meantime
        tables.write([["1.png", "a", ""]], tmp_path / "coca.csv")
    assert (tmp_path / "coca.csv").read_text() == "mine"
    for missing in ([str(tmp_path / "no")], [str(tmp_path), "--out", str(tmp_path / "no")]):
        with pytest.raises(SystemExit):
            tables.main(missing)


@pytest.mark.parametrize("first, second", [
    ("train.csv", "valid.csv"), ("Train.csv", "TEST.csv"), ("captions_train.csv", "captions_val.csv"),
    ("train-captions.tsv", "test-captions.tsv"), ("train.jsonl", "dev.jsonl"),
    ("ann/captions_train2017.json", "ann/captions_val2017.json"), ("x_train_gt.json", "x_val_gt.json"),
    ("train/metadata.jsonl", "validation/metadata.jsonl")])
def test_one_table_a_split_is_obeyed_if_the_names_differ_in_it_alone(tmp_path, first, second):
    kinds = {".csv": table, ".tsv": table, ".json": coco, ".jsonl": json_lines}
    for name, half in zip((first, second), HALVES):
        path = write(tmp_path, name, kinds[Path(name).suffix](names=sorted(half)))
        make_pictures(tmp_path / "images" if "meta" not in name else path.parent, half)
    assert splits_of(tmp_path, tmp_path / "new") == HALVES
    write(tmp_path, second, "no table")
    refused("line 1 must name", tmp_path, tmp_path)
    path.unlink()
    assert set.union(*splits_of(tmp_path, tmp_path / "newer")) == HALVES[0]  # control


def test_a_name_tells_a_split_by_one_whole_word_and_one_split_is_to_learn_from(tmp_path):
    assert tables.split_of("latest.csv") == tables.split_of("Flickr_8k.trainImages.txt") == ""
    assert tables.split_of("train_val.csv") == "" and tables.split_of("a_DEV2.csv") == "val"
    for name in ("val.csv", "test.csv"):
        write(tmp_path, name, table())
    refused("2 are among test.csv, val.csv", tmp_path, tmp_path)


def test_files_of_splits_find_pictures_of_one_name_in_their_own_folders(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"{split}2017", "1.png")
        write(tmp_path, f"annotations/x_{split}.json", json.dumps({"1.png": f"a {split}"}))
    assert (convert(tmp_path) / "coca.csv").read_text() == (
        "image,caption,split\ntrain2017/1.png,a train,train\nval2017/1.png,a val,val\n")


def test_of_three_tables_the_test_is_evaluated_on_and_no_picture_is_in_two(tmp_path):
    make_pictures(tmp_path)
    for name, names in (("train", NAMES[:12]), ("val", NAMES[12:15]), ("test", NAMES[15:])):
        write(tmp_path, f"{name}.csv", table(HEAD[:-1] + ",split", ROW + ",train", names))
    assert splits_of(tmp_path, tmp_path / "b") == [set(NAMES[:12]), set(NAMES[15:])]
    write(tmp_path, "test.csv", table(names=NAMES[11:]))
    refused("train.csv: line 24: 11.png is in train and in test", tmp_path, tmp_path)


@pytest.mark.parametrize("splits, learned, tested", [
    (("train", "dev", "test"), 0, 2), (("restval", "dev"), 0, 1), (("test", "train"), 1, 0),
    ((" Train", "Validation "), 0, 1), (("train", "valid"), 0, 1)])
def test_a_tables_own_splits_are_obeyed(tmp_path, splits, learned, tested):
    names = [set(NAMES[i::len(splits)]) for i in (learned, tested)]
    make_pictures(tmp_path / "val2014")
    column = table("image,caption,Split", "{name},{quoted},{split}", splits=splits)
    assert splits_of(write(tmp_path, "a.csv", column), tmp_path / "1") == names
    by_split = {split: objects(names=NAMES[i::len(splits)]) for i, split in enumerate(splits)}
    assert splits_of(write(tmp_path, "a.json", json.dumps(by_split)), tmp_path / "2") == names
    make_pictures(tmp_path / "train2014")  # of the same names
    source = write(tmp_path, "any.json", karpathy(splits, filepath="val2014"))
    assert splits_of(source, tmp_path / "3") == names
    assert "/train2014/" not in (tmp_path / "3/coca.csv").read_text()


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


REFUSED = [  # a table, what is said
    ("", "line 1 must name"), (HEAD + "1.png,\n2.png, \n", "no captions"), ("x" * 900, "must name"),
    ("1.png,a dog\n", "line 1 must name"), (HEAD + "1.png,1\n2.png,0.5\n", "holds numbers"),
    (table() + "1.png,a dog, and a cat\n", "line 42: 3 cells, not 2; quote"),
    (table() + "1.png,a dog\nthat runs\n", "line 43: 1 cells"),
    (HEAD + '1.png,"two\nlines"\n2.png\n', "line 4: 1 cells"), (HEAD + " ,a\n", "line 2: no picture"),
    (table() + '1.png,"a dog\n2.png,a\n', "line 42: .*a quote is not closed"),
    (HEAD + '1.png,"a dog" runs\n', "line 2: .*a quote is not closed, or not doubled"),
    (table() + '1.png,"a dog\n2.png,a\n3.png,a dog"\n', "line 42: a quote .* closed after 2.png"),
    (table() + '1.png,"a dog\nnew.png,a dog"\n', "line 42: a quote .* closed after new.png"),
    ('caption,image\n"a dog,1.png\na,2.png\na dog",3.png\n', "line 2: a quote .* after"),
    (HEAD + '1,"a\n2,b"\n2,x\n', "line 2: a quote .* after 2"), (HEAD + '"1\n2",a\n', "2: no picture"),
    ("image_name| comment_number| comment\n1.png| a dog\n", "line 2: 2 cells, not 3"),
    ("image_name|comment_number|comment\n1.png| 0 a| dog| x\n", "line 2: 4 cells"),
    ("image|number|comment\n1.png| 0   a dog\n", "line 2: 2 cells, not 3"),
    ("image_1,image_2,caption\n1.png,2.png,a\n", "line 2: two columns of pictures: 1.png, 2.png"),
    ("image,file,caption\n1.png,1.png,a\n1.png,2.png,a\n", "line 3: two columns of pictures"),
    ("image,image,caption\n1,2,a\n", "two columns of pictures: 1, 2"), ("a#0\tx\nb y", "line 2: 1 cells"),
    (table() + "https://x.org/1.png,a dog\n", "line 42: https://x.org/1.png is an address"),
    ("url,caption\nhttps://x.org/1,a dog\n", "line 2: .* is an address"),
    ("image,caption,split\n1.png,a,train\n2.png,b,exam\n", "line 3: the split is 'exam'"),
    (b"\xff\xfei", "cannot be read as text"), (HEAD.encode() + b"1.png,caf\xe9\n", "as UTF-8"),
    (b"PK\x03\x04" + bytes(range(256)), "is an Excel"), (b"\xd0\xcf\x11\xe0\xa1", "is an Excel"),
    (b"PAR1\0", "is a Parquet"), (HEAD.encode("utf-16-le"), "is no text"), ("<!DOCTYPE>", "must name"),
    (table("image;caption"), "1 cells"), (table('"image","caption"', '"7",' + ROW), "line 2: 3 cells"),
    (table(row='{name},"a \\"dog\\""'), "not doubled"), ("sep=;\nimage;caption\n1\n", "line 3: 1 cells"),
    (table("image\tlabel", "{name}\t{text}"), "must name"), (table("Bild,Beschreibung"), "must name"),
    (table() + "1.png," + "dog " * 40000, "line 42: field larger"), ("[" * 9999, "Recursion"),
    ("[]", "must name"), ("{}", "must name"), ('{"images": 5}', "must"), (karpathy(["exam"]), "'exam'"),
    ('[{"image": "1.png", "caption": "a"}, 5]', "entry 2 is not"), ('[{"a": 1\n,}]', "line 2 col"),
    ('{"image": "1.png", "caption": "a"}\n{"image": 5', "line 2: "),
    ('[{"image": ["1.png", "2.png"], "caption": "a"}]', "entry 1: no picture's name, or not one"),
    ('[{"image": "1.png", "caption": "a", "split": "test"}, {"image": "2.png", "caption": "a"}]',
     "entry 2: the split is 'none'"), ('[{"image": "1.png", "caption": "\\ud800 a"}]', "text"),
    ('{"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1}]}', "caption"),
]


@pytest.mark.parametrize("content, said", REFUSED, ids=range(len(REFUSED)))
def test_what_is_wrong_with_a_table_is_one_line_and_nothing_is_made(tmp_path, content, said):
    make_pictures(tmp_path, [*NAMES, "1", "2"])
    source = write(tmp_path, "captions.csv", content)
    refused(f"captions.csv: .*{said}", source, tmp_path)


def test_a_long_name_with_a_line_break_does_not_make_a_long_line(tmp_path):
    refused("captions.csv: .*get it again", write(tmp_path, f"\n/{250 * 'x'}/captions.csv"), tmp_path)
