"""Tables of captions as people have them -> captions.csv, as data.py reads it.

    python -m experiments.tables DIR               the table in DIR -> DIR/captions.csv
    python -m experiments.tables FILE              that table, where DIR holds several
    python -m experiments.tables DIR --out FOLDER  -> FOLDER/captions.csv, where DIR is read-only

Which table: train.csv beside test.csv or val.csv, which are the two splits; captions.txt; else the
only .csv, .tsv, .token.txt or dataset_*.json there is.
Kinds of tables: a header line with a column of pictures, one or more of captions, maybe one of
splits, between them , ; | or tab (Flickr30k's results.csv, Hugging Face's metadata.csv, ...);
Flickr8k.token.txt; Karpathy's JSON.
Pictures: below DIR, its Images/, images/, Flicker8k_Dataset/, flickr30k_images/, or its only folder
that holds them. Those that are not there are left out and counted.
Splits: the table's, or Flickr8k's lists of names. Without any, data.py chooses.
"""
import argparse
import csv
import io
import json
import os
import posixpath
import re
from pathlib import Path
from typing import NamedTuple

from data import UserError, captions_table, new_file, note, one_error, read_text, run_program

PICTURE_COLUMNS = ["image", "image_name", "file_name", "filename", "filepath", "name"]  # columns
CAPTION_COLUMNS = ["caption", "comment", "text", "title", "sentence"]  # the first that is there
FOLDERS = ["", "Images", "images", "Flicker8k_Dataset", "flickr30k_images"]  # of pictures
SPLITS = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "test": "test"}


class Row(NamedTuple):
    """Of a table: a picture's name, its captions, its split, "" = not said."""

    picture: str
    captions: list
    split: str


# ------------------------------------------------------------------------------------------------
# Which table


def find_tables(source):
    """-> {table: the split it holds, "" = the table says itself}."""
    if source.is_file():
        return {source: ""}
    files = {path.name.lower(): path for path in sorted(source.iterdir()) if path.name[0] != "."}
    for name in ("test.csv", "val.csv"):
        if "train.csv" in files and name in files:
            return {files["train.csv"]: "train", files[name]: "test"}
    if "captions.txt" in files:
        return {files["captions.txt"]: ""}
    kinds = r".*\.(csv|tsv)|.*(?<!lemma)\.token\.txt|dataset_.*\.json"
    found = [path for name, path in files.items() if re.fullmatch(kinds, name)]
    if len(found) == 1:
        return {found[0]: ""}
    names = ", ".join(path.name for path in found) or "none"
    raise UserError(f"{source}: one table of captions is needed, there is {names}; name it: python "
                    f"-m experiments.tables {source / 'TABLE'}")


def flickr8k_lists(folder):
    """Flickr_8k.trainImages.txt and .testImages.txt -> {picture: split}, {} if one is missing."""
    lists = {split: Path(folder, f"Flickr_8k.{split}Images.txt") for split in ("train", "test")}
    splits = {}
    if all(path.is_file() for path in lists.values()):
        for split, path in lists.items():
            with one_error(path):
                splits.update(dict.fromkeys(read_text(path).split(), split))
    return splits


# ------------------------------------------------------------------------------------------------
# Kinds of tables


def read_table(path):
    """A table of any kind -> its Rows."""
    with one_error(path):
        text = read_text(path)
        if path.suffix.lower() == ".json":
            yield from karpathy_rows(text)
        elif re.match(r"[^\t\n]+#\d+\t", text):
            yield from token_rows(text)
        else:
            yield from column_rows(text)


def karpathy_rows(text):
    """Karpathy's dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json."""
    for image in json.loads(text)["images"]:
        name = posixpath.join(image.get("filepath", ""), image["filename"])
        captions = [sentence["raw"] + "" for sentence in image["sentences"]]
        yield Row(name, captions, SPLITS[image["split"]])


def token_rows(text):
    """Flickr8k.token.txt: lines of name.jpg#0<TAB>caption. One of its names ends in .jpg.1."""
    for number, line in enumerate(text.split("\n"), 1):
        match = re.fullmatch(r"(.+?)((?<=\.jpg)\.1)?#\d+\t(.*)", line)
        if match:
            yield Row(match[1], [match[3]], "")
        elif line.strip():
            raise ValueError(f"line {number} is not name#number<TAB>caption")


def csv_rows(text, delimiter):
    """-> the line that each row starts at, its cells; without empty rows."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if "".join(cells).strip():
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"line {line}: {e}: a quote is not closed, or not doubled within a "
                         "caption") from None


def column_rows(text):
    """A table with a header line: a column of pictures, one or more of captions, maybe a split."""
    delimiter = max(",|;\t", key=text.lstrip("\n").split("\n")[0].count)
    rows = csv_rows(text, delimiter)
    _, header = next(rows, (1, []))
    header = [re.sub(r"[ _.]?\d+$", "", name.strip().lower()) for name in header]
    pictures = [header.index(name) for name in PICTURE_COLUMNS if name in header]
    kind = next((name for name in CAPTION_COLUMNS if name in header), None)
    if not pictures or not kind:
        raise ValueError("line 1: must name the columns, such as image,caption, not "
                         f"{header!s:.80}")
    names = set()
    broken = []  # cells with a line break
    for line, cells in rows:
        if len(cells) == 2 and delimiter == "|" and header[1:] == ["comment_number", "comment"]:
            # Flickr30k has one row that lacks its second bar
            cells[1:] = re.sub(r"^(\s*\d+)\s", r"\1|", cells[1]).split("|")
        if len(cells) != len(header):
            raise ValueError(f"line {line}: {len(cells)} cells, but {len(header)} columns; quote "
                             f"captions that hold {delimiter!r} or a line break")
        picture = cells[pictures[0]].strip()
        if not picture or "\n" in picture:
            raise ValueError(f"line {line}: no picture's name, or one of two lines")
        names.add(picture)
        broken += [(line, cell) for cell in cells if "\n" in cell]
        split = ""
        if "split" in header:
            split = cells[header.index("split")].strip().lower()
            if split not in SPLITS:
                raise ValueError(f"line {line}: the split is {split!r}; write train, val or test")
        captions = [cell.strip() for name, cell in zip(header, cells) if name == kind]
        if captions[0].startswith(("['", '["')):
            raise ValueError(f"line {line}: a list of captions; give each a row of its own")
        yield Row(picture, captions, SPLITS.get(split, ""))
    # A quote that is closed too late swallows rows: names of pictures then stand inside a cell
    endings = tuple({posixpath.splitext(name)[1] for name in names} - {""})
    for line, cell in broken:
        for name in cell.partition("\n")[2].replace("\n", delimiter).split(delimiter):
            if name.strip() in names or name.strip().endswith(endings):
                raise ValueError(f"line {line}: a quote is opened here and closed behind "
                                 f"{name.strip()}")


# ------------------------------------------------------------------------------------------------
# The pictures, and the new table


class Pictures:
    """Where the pictures of a folder are: `find` gives the path of a name, None if it has none."""

    def __init__(self, folder):
        self.known = [os.path.join(folder, name) for name in FOLDERS]
        self.others = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
        self.paths = {}

    def find(self, name):
        name = posixpath.normpath(name.strip().replace("\\", "/"))
        if name not in self.paths:
            self.paths[name] = self.look(name)
        return self.paths[name]

    def look(self, name):
        for folder in self.known:
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        holders = [folder for folder in self.others if os.path.isfile(os.path.join(folder, name))]
        return os.path.join(holders[0], name) if len(holders) == 1 else None


def convert(source, folder):
    """The table of source -> the lines of folder/captions.csv, names of pictures not found."""
    place = os.path.abspath(source if source.is_dir() else source.parent)
    pictures = Pictures(place)
    listed = flickr8k_lists(place)
    lines = []
    missing = {}
    for table, of_table in find_tables(source).items():
        for row in read_table(table):
            path = pictures.find(row.picture)
            if path is None:
                missing[row.picture] = True
                continue
            split = of_table or row.split or listed.get(os.path.basename(path), "")
            if os.path.samefile(folder, place):
                path = os.path.relpath(path, place)  # so that the folder may be moved
            for caption in row.captions:
                if caption.strip():
                    lines.append([path, " ".join(caption.split()), split])
    if listed:  # a picture in neither list is for neither
        lines = [[path, caption, split or "val"] for path, caption, split in lines]
    return lines, list(missing)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.tables DIR [--out FOLDER]")
    p.add_argument("source", type=Path, help="a table, or its folder")
    p.add_argument("--out", type=Path, help="folder for captions.csv (default: the table's)")
    args = p.parse_args(argv)
    if not args.source.exists():
        p.error(f"{args.source}: no such file or folder")
    folder = args.out or (args.source if args.source.is_dir() else args.source.parent)
    try:
        file = new_file(folder / "captions.csv")
    except argparse.ArgumentTypeError as e:
        raise UserError(f"{e}; give another folder: --out") from None
    lines, missing = convert(args.source, folder)
    if missing:
        note(f"{len(missing)} pictures are not there, as these: {', '.join(missing[:3])}; left out")
    if not lines:
        raise UserError(f"{args.source}: no captions of pictures that are there; nothing is made")
    columns = ["image", "caption", "split"]
    if not any(split for _, _, split in lines):
        columns = columns[:2]
    with open(file, "x", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerows([columns, *(line[:len(columns)] for line in lines)])
    counts = [len(captions_table(folder, part)[0]) for part in ("train", "val")]
    print(f"{file}: {len(lines):,} captions, {counts[0]:,} pictures to learn from, {counts[1]:,} to "
          "evaluate on")


if __name__ == "__main__":
    run_program(main)
