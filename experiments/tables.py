"""Tables of captions as people have them -> coca.csv, the one form that data.py reads.

    python -m experiments.tables DIR               the table in DIR, or FILE -> DIR/coca.csv
    python -m experiments.tables DIR --out FOLDER  -> FOLDER/coca.csv, where DIR is read-only

Tables: lines with , ; | or tab between the cells, of which the first names the columns; lines of
name<TAB>caption; JSON of Karpathy's, COCO's or LLaVA's form, or any list (or lines) of images and
captions. In DIR or a folder there: one a split (train.csv, test.csv), captions.txt, or the only.
Pictures: below the table's folder or DIR, a usual folder there (Images/, ...) or the only one that
has the name; missing ones are left out and counted. Splits: by files' names, the table, or lists.
"""
import argparse
import ast
import csv
import io
import json
import os
import posixpath
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.tables")

from data import UserError, captions_table, note, one_error, run_program

# Names of columns, as plain_name writes them. Of several kinds of captions the first is read
PICTURES = ("image imagename filename imagepath imagefile imagefilename filepath img imgname "
            "imgpath imgfile picture photo file path name imageid imgid id imageurl url").split()
CAPTIONS = ("caption captionen captiontext imagecaption comment raw text sentence description "
            "title conversation message").split()
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "test": "test"}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
FOLDERS = ["", "Images", "images", "Flicker8k_Dataset", "flickr30k_images", "flickr30k-images"]
ENDING = r"\.(jpe?g|png|gif|webp|bmp|tiff?|ppm)\s*\Z"
PICTURE = re.compile(rf"(?is)(?!.*://).*{ENDING}")
TABLE = re.compile(r"(?i).*\.(csv|tsv|json|jsonl|token|xlsx?|ods|parquet)\Z")
NO_TABLE = re.compile(rf"(?i)[.~]|coca\.csv\Z|.*(~\Z|\.(bak|tmp|lemma\.token\.txt)\Z|{ENDING})")
LETTER = re.compile(r"(?s).*[^\W\d_]")
NO_TEXT = {  # what it is, how it begins
    "an Excel or LibreOffice file, or a zip; save it as CSV (UTF-8)": (b"PK\3\4", b"\xd0\xcf\x11"),
    "a Parquet file; write it as CSV or JSON lines": b"PAR1"}


def read_text(path):
    """UTF-8 with or without a mark, or UTF-16 with one -> text, its lines ended by \\n."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def find_tables(source):
    """Which table: -> {table: the split it holds, "" = it may hold all}."""
    if source.name == "coca.csv":
        raise UserError(f"{source} is of the new form; name the table that it was made of")
    if source.is_file():
        return {source: ""}
    seen, found = [], []
    for folders in ([source], [path for path in sorted(source.glob("[!.]*")) if path.is_dir()]):
        files = [path for folder in folders for path in sorted(folder.iterdir())]
        files = [path for path in files if path.is_file() and not NO_TABLE.match(path.name)]
        best = [{path: ""} for path in files if path.name.lower() == "captions.txt"]
        for options in (split_groups(files, source), best, [{path: ""} for path in files]):
            found = found or [tables for tables in options if any(map(is_table, tables))]
        seen += files
    if len(found) == 1:
        return found[0]
    likely = [path for path in seen if TABLE.match(path.name)] or seen
    seen = [path for tables in found for path in tables] or likely
    if len(seen) == 1:
        return {seen[0]: ""}  # to say what is wrong with it
    names = ", ".join(path.name for path in seen[:3]) + ", ..." * (len(seen) > 3)
    raise UserError(f"{source}: one table of captions is needed, and {len(found)} are among "
                    f"{names or 'no files'} (Excel's and Parquet's are not read); name one FILE")


def split_of(name):
    """The split that a name tells: captions_dev.csv -> val. "" = none, or several."""
    found = {SPLITS[word] for word in SPLIT_WORD.findall(name.lower())}
    return found.pop() if len(found) == 1 else ""


def split_groups(files, source):
    """-> for files whose names differ in their split alone: {file: split, ...}."""
    groups = defaultdict(dict)
    for path in files:
        name = path.relative_to(source).as_posix().lower()
        if split_of(name):
            groups[SPLIT_WORD.sub("*", name)][path] = split_of(name)
    return [group for group in groups.values() if {"train"} < set(group.values())]


def is_table(path):
    try:
        return bool(open_table(path))
    except UserError:
        return False


def flickr8k_lists(folder):
    """Flickr_8k.trainImages.txt and .testImages.txt -> {picture: split}, {} if one is missing."""
    lists = {split: folder / f"Flickr_8k.{split}Images.txt" for split in ("train", "test")}
    whole = all(path.is_file() for path in lists.values())
    return {name: split for split in lists if whole for name in read_text(lists[split]).split()}


def open_table(path):
    """-> plain names of the columns; lines, each (where it stands, cells); is it JSON?"""
    with one_error(path):
        with open(path, "rb") as f:
            head = f.read(1000)
        for kind, start in NO_TEXT.items():
            if head.startswith(start):
                raise ValueError(f"is {kind}")
        if b"\0" in head and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("is no text; save it as UTF-8")
        text = read_text(path)
        is_json = text.lstrip()[:1] in ("[", "{")
        header, lines = json_table(text) if is_json else text_table(text)
        names = [plain_name(column) for column in header]
        if not set(names) & set(PICTURES) or not set(names) & set(CAPTIONS):
            raise ValueError(f"line 1 must name columns, as image,caption; is {list(header)!s:.80}")
        return names, lines, is_json


def plain_name(column):
    """Without capitals, signs, numbers or an s at the end: Image_Names -> imagename."""
    name = re.sub(r"[\W_]", "", str(column).lower())
    return re.sub(r"\d+$", "", name).removesuffix("s")


def text_table(text):
    first = text.lstrip("\n").split("\n")[0]
    delimiter = max(",|;\t", key=first.count)
    known = {plain_name(name) for name in first.split(delimiter) if not re.search(r"\d", name)}
    if known.isdisjoint(PICTURES + CAPTIONS) and re.fullmatch(r"[^\t]+(#\d+\t.*|\t[^\t]+)", first):
        return ["image", "caption"], csv_lines(text, "\t", csv.QUOTE_NONE)
    lines = csv_lines(text, delimiter)
    if first.startswith(("sep=", '"sep=')):  # Excel's, on a line before the header
        next(lines)
    return next(lines, ("", []))[1], lines  # the header


def csv_lines(text, delimiter, quoting=csv.QUOTE_MINIMAL):
    """All lines but empty ones."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    try:
        for cells in reader:
            if "".join(cells).strip():
                yield f"line {line}", cells
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {line}: {e}: a quote is not closed, or not doubled") from None


def json_table(text):
    """Its objects' keys are the columns."""
    try:
        content = json.loads(text)
        content = objects_in(content) if isinstance(content, dict) else content
        values = {f"entry {number}": value for number, value in enumerate(content, 1)}
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":
            raise
        values = {}  # JSON lines
        for number, line in enumerate(text.split("\n"), 1):
            try:
                if line.strip():
                    values[f"line {number}"] = json.loads(line)
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None
    header = {}
    for where, value in values.items():
        if not isinstance(value, dict):
            raise ValueError(f"{where} is not an object with an image and captions")
        header.update(value)
    return header, [(where, [value.get(key) for key in header]) for where, value in values.items()]


def objects_in(content):
    """A JSON object -> the objects in it, of an image and its captions each."""
    if content.get("images") and "annotations" in content:  # COCO's form
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [{"image": names.get(annotation["image_id"]), "caption": annotation["caption"]}
                for annotation in content["annotations"]]
    lists = {key: value for key, value in content.items()
             if isinstance(value, list) and value and isinstance(value[0], dict)}
    if any(map(PICTURE.match, content)):  # {image: captions}
        return [{"image": name} | (value if isinstance(value, dict) else {"caption": value})
                for name, value in content.items()]
    if not lists or any(plain_name(key) in PICTURES for key in content.keys() - lists.keys()):
        if all(isinstance(value, dict) for value in content.values()):  # columns, by pandas
            return [dict(zip(content, cells)) for cells in zip(*map(dict.values, content.values()))]
        return [content]
    for key, entries in lists.items():  # Karpathy's images, or a list for each split
        for entry in entries:
            if "filepath" in entry and "filename" in entry:
                entry["filename"] = posixpath.join(entry["filepath"], entry["filename"])
            if split_of(key):
                entry["split"] = split_of(key)
    return sum(lists.values(), [])


def read_table(path):
    """-> of each line: where it stands, a picture's name or "", captions, a split or ""."""
    names, lines, is_json = open_table(path)
    with one_error(path):
        lines = list(lines)
        for where, cells in lines:
            if len(cells) == 2 and names == ["imagename", "commentnumber", "comment"]:
                # Flickr30k has one row that lacks its second bar
                cells[1:] = re.sub(r"^(\s*\d+)\s", r"\1|", cells[1]).split("|")
            if len(cells) != len(names):
                raise ValueError(f"{where}: {len(cells)} cells, not {len(names)}; quote captions")
        captions = columns_with(LETTER, [[name] for name in CAPTIONS], names, lines)
        if not captions:
            raise ValueError("no captions: their column is empty, or holds numbers")
        pictures = (columns_with(PICTURE, [PICTURES], names, lines)
                    or columns_with(re.compile(""), [[name] for name in PICTURES], names, lines))
        if not is_json:
            check_quotes(lines, pictures[0])
        for where, cells in lines:
            found = [picture_name(cells[i], where) for i in pictures]
            if len({posixpath.basename(name) for name in found}) > 1:
                raise ValueError(f"{where}: two columns of pictures: {', '.join(found):.80}")
            split = str(cells[names.index("split")]).strip().lower() if "split" in names else "-"
            if split != "-" and split not in SPLITS:
                raise ValueError(f"{where}: the split is {split!r}; write train, val or test")
            texts = [text for i in captions for text in texts_of(cells[i])]
            yield where, found[0], texts, SPLITS.get(split, "")


def columns_with(pattern, kinds, names, lines):
    """-> the columns of the first of these kinds of names that have a cell of this pattern."""
    for kind in kinds:
        found = [i for i, name in enumerate(names) if name in kind]
        found = [i for i in found if any(pattern.match(str(cells[i] or "")) for _, cells in lines)]
        if found:
            return found
    return []


def check_quotes(lines, column):
    """A quote that is closed too late swallows rows: a cell then holds names of pictures."""
    names = {cells[column].strip() for _, cells in lines} - {""}
    endings = tuple({posixpath.splitext(name)[1] for name in names} - {""})
    for where, cells in lines:
        for cell in cells:
            for name in re.split(r"[\n,|;\t]", cell.partition("\n")[2]):
                if name.strip() in names or name.strip().endswith(endings):
                    raise ValueError(f"{where}: a quote is opened, and closed after {name:.60}")


def picture_name(cell, where):
    """A cell or JSON value -> the name in it with / between folders, "" = null."""
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if cell is None:
        return ""
    name = str(cell).strip()
    if not name or "\n" in name or not isinstance(cell, str | int):
        raise ValueError(f"{where}: no picture's name, or not one")
    if "://" in name:
        raise ValueError(f"{where}: {name:.60} is an address; download the pictures, name files")
    name = re.sub(r"((?<=\.jpg)\.1)?#\d+$", "", name)  # .jpg.1#0: one in Flickr8k is so
    return posixpath.normpath(name.replace("\\", "/"))


def texts_of(value):
    """A cell or JSON value -> the captions in it: a text, or a list of JSON, Python or numpy."""
    if isinstance(value, dict):
        value = value.get("text") or value.get("raw") or value.get("caption")
    if isinstance(value, list):
        for turn in value:  # LLaVA's: the first answer
            speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else ""
            if speaker in ("gpt", "assistant"):
                return texts_of(turn.get("value") or turn.get("content"))
        return [text for part in value for text in texts_of(part)]
    value = value.strip() if isinstance(value, str) else ""
    try:
        return texts_of(json.loads(value)) if value[:1] in ("[", "{") else [value]
    except ValueError:
        literal = r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\""""  # a text as Python prints it
        if re.fullmatch(r"\[[\s,]*\]", re.sub(literal, "", value)):
            return [ast.literal_eval(text) for text in re.findall(literal, value)]
    return [value]


class Pictures:
    """Where a table's pictures are."""

    def __init__(self, table, source, split):
        roots = [table.absolute().parent]
        beside = [path for path in roots[0].iterdir() if path.is_dir() or PICTURE.match(path.name)]
        if source.absolute() != roots[0] and not (source.is_file() and beside):
            roots.append(roots[0].parent)  # the table is in a folder of its own, as annotations/
        others = [path for root in roots for path in root.glob("[!.]*") if path.is_dir()]
        usual = [path for path in others if split and split_of(path.name) == split]
        usual += [root / name for root in roots for name in FOLDERS]
        self.places = [[folder] for folder in usual] + [others]
        self.listings = {}

    def find(self, name):
        """-> path in the first place where it fits one picture, but for capitals and an ending."""
        for folders in self.places:
            paths = [str(folder / name) for folder in folders if (folder / name).is_file()]
            if not paths:
                paths = folders
                for part in name.lower().split("/"):
                    paths = [path for folder in paths for path in self.listing(folder)[part]]
                paths = [path for path in paths if os.path.isfile(path)]
            if paths:
                return paths[0] if len(paths) == 1 else None
        return None

    def listing(self, folder):
        """{name: paths} of all that is in a folder; of pictures without their endings, too."""
        if folder not in self.listings:
            names = self.listings[folder] = defaultdict(list)
            for entry in os.scandir(folder) if os.path.isdir(folder) else []:
                names[entry.name.lower()].append(entry.path)
                if PICTURE.match(entry.name):
                    names[os.path.splitext(entry.name.lower())[0]].append(entry.path)
        return self.listings[folder]


def convert(source, folder):
    """The table of source -> the rows of folder/coca.csv. Notes what is left out."""
    inside = os.path.samefile(folder, source if source.is_dir() else source.parent)
    rows = []
    splits = {}  # of each path
    missing = Counter()
    for table, of_table in find_tables(source).items():
        find = cache(Pictures(table, source, of_table).find)
        listed = flickr8k_lists(table.parent)
        lines = list(read_table(table))
        absolute = [name for _, name, _, _ in lines if re.match("([A-Za-z]:)?/", name)]
        shared = posixpath.commonpath(map(posixpath.dirname, absolute)) if absolute else ""
        for where, name, captions, split in lines:
            path = find(name) or find(name.removeprefix(f"{shared}/"))  # below another one here
            if not path:
                missing[name] += len(captions)
                continue
            split = of_table or split
            if listed and not split:
                split = listed.get(os.path.basename(path), "val")  # in neither list: for neither
            if splits.setdefault(path, split) != split:
                raise UserError(f"{table}: {where}: {name} is in {split} and in {splits[path]}")
            image = os.path.relpath(path, folder) if inside else path
            if image.startswith(os.pardir) and os.path.isabs(name):
                image = path
            rows += [[image, " ".join(text.split()), split] for text in captions if text.strip()]
    if missing:
        names = ", ".join(name[:60] or "(no name)" for name in [*missing][:3])
        note(f"{len(missing)} pictures missing, as {names}; {missing.total()} captions left out")
    if not rows:
        raise UserError(f"{source}: no captions of pictures that are there; nothing is made")
    return rows


def write(rows, file):
    columns = ["image", "caption", "split"][:2 + any(split for _, _, split in rows)]
    f = open(file, "x", newline="", encoding="utf-8")
    try:
        with f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerows([columns, *(row[:len(columns)] for row in rows)])
        learn, test = (len(captions_table(file.parent, part)[0]) for part in ("train", "val"))
    except BaseException:  # Ctrl-C, too
        file.unlink()
        raise
    print(f"{file}: {len(rows)} captions, {learn} pictures to learn from, {test} to evaluate on")


def main(argv=None):
    p = argparse.ArgumentParser("python -m experiments.tables", description=__doc__.split("\n")[0])
    p.add_argument("source", type=Path, help="a table, or its folder")
    p.add_argument("--out", type=Path, help="folder for coca.csv (default: the table's)")
    args = p.parse_args(argv)
    folder = args.out or (args.source if args.source.is_dir() else args.source.parent)
    for path in (args.source, folder):
        if not path.exists():
            p.error(f"{path}: no such file or folder")
    try:
        with one_error(args.source):
            file = folder / "coca.csv"
            if os.path.lexists(file):
                raise UserError(f"{file} is there already; take it away, or give --out FOLDER")
            write(convert(args.source, folder), file)
    except UserError as e:
        text = " ".join(str(e).split())
        raise UserError(text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}") from None


if __name__ == "__main__":
    run_program(main)
