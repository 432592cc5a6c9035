"""Pictures in files: decoded as a viewer shows them, kept in the cache, skipped if unreadable."""
import io
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import counting, refused
from own_pictures import check_captions, exit_code, paint, start, write_captions
from PIL import Image

import data
from data import UserError, load, read_image

# Decoding

GREY = (90, 90, 90)
ORANGE = (250, 128, 3)
WHITE = (255, 255, 255)


def check_colour(path, colour):
    found = read_image(path, 8)
    assert found.shape == (3, 8, 8) and found.dtype == np.uint8
    assert abs(found.reshape(3, -1).T.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("mode, end, colour, wanted", [
    ("RGB", "jpg", ORANGE, ORANGE), ("L", "png", 90, GREY), ("1", "png", 1, WHITE),
    ("P", "png", 1, ORANGE), ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
    # what is transparent shows white, what is half transparent half
    ("RGBA", "png", (*ORANGE, 255), ORANGE), ("RGBA", "png", (*ORANGE, 0), WHITE),
    ("RGBA", "png", (*ORANGE, 128), (252, 191, 129)), ("LA", "png", (90, 255), GREY),
    ("LA", "png", (90, 0), WHITE), ("P transparent", "png", 1, WHITE)])
def test_an_image_of_any_mode_is_read_as_a_viewer_shows_it(tmp_path, mode, end, colour, wanted):
    image = Image.new(mode.split()[0], (20, 12), colour)
    if image.mode == "P":
        image.putpalette([0, 0, 0, *ORANGE])
    image.save(tmp_path / f"x.{end}", **({"transparency": 1} if "transparent" in mode else {}))
    check_colour(tmp_path / f"x.{end}", wanted)


@pytest.mark.parametrize("kind", [*data.FORMATS, "MPO"])
def test_every_format_is_read_whatever_the_name_says(tmp_path, kind):
    Image.new("RGB", (8, 8), GREY).save(tmp_path / "x.jpg", kind)
    check_colour(tmp_path / "x.jpg", GREY)


TURNED = {1: np.array, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
          6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_turned_as_its_exif_says_and_its_middle_is_kept(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 24), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    middle = TURNED[orientation](pixels[:, 8:16])
    assert np.array_equal(read_image(tmp_path / "x.png", 8), [middle] * 3)


def test_postscript_is_refused_and_starts_no_other_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: started.append(args) or 1 / 0)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    refused("photo.jpg: not a readable image of JPEG, PNG", read_image, path, 8)
    assert not started
    with pytest.raises(ZeroDivisionError), Image.open(path) as image:  # control: without formats=
        image.load()
    assert started


def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path):
    for name in ("x.heic", "x.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        refused(f"{name}: not a readable image of JPEG, PNG", read_image, tmp_path / name, 8)
    for mode in ("I;16", "F"):
        Image.new(mode, (8, 8)).save(tmp_path / "deep.tif")
        refused("deep.tif: .*more than 8 bits a channel", read_image, tmp_path / "deep.tif", 8)
    paint(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    refused("cut.png: not a readable image", read_image, tmp_path / "cut.png", 8)
    refused("none.png: no such file", read_image, tmp_path / "none.png", 8)


# The cache


def test_each_set_of_pictures_is_decoded_once(tmp_path):
    write_captions(tmp_path, 30)
    with counting((data, "read_image")) as (read,):
        for subset, size, decoded in ((3, 8, 3), (3, 8, 3), (0, 8, 30), (0, 8, 30), (0, 4, 57)):
            found = load("captions", tmp_path, size=size, subset=subset)
            assert len(set(check_captions(found))) == (subset or 27)
            assert read.call_count == decoded
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_changed_picture_is_decoded_anew_and_a_deleted_cache_made_again(tmp_path):
    write_captions(tmp_path, 10)
    first = load("captions", tmp_path, size=8)
    changed = tmp_path / "Images" / first.names[3]
    paint(changed, 100)
    os.utime(changed, (1, 1))
    assert load("captions", tmp_path, size=8).images[3, 0, 0, 0] == 100 != first.images[3, 0, 0, 0]
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert load("captions", tmp_path, size=8).images[3, 0, 0, 0] == 100


@pytest.mark.parametrize("share", [0, 0.3, 0.99, 2])
def test_a_cache_that_was_cut_off_is_made_whole(tmp_path, share):
    write_captions(tmp_path, 12)
    load("captions", tmp_path, size=8)
    file, = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.unlink()  # a new file, as the old one may still be mapped
    file.write_bytes((2 * content)[:int(share * len(content))])
    for _ in range(2):
        check_captions(load("captions", tmp_path, size=8))


def killed(root, owner, name, call):
    """Loads pictures until that call of the function, and is killed there."""
    function = getattr(owner, name)
    calls = []

    def double(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(owner, name, double)
    load("captions", root, size=64)


@pytest.mark.parametrize("owner, name, call", [
    (data, "read_image", 1), (data, "read_image", 20), (os, "fsync", 1), (os, "replace", 1)])
def test_a_run_killed_while_it_decodes_leaves_no_wrong_pixels(tmp_path, owner, name, call):
    write_captions(tmp_path, 30)
    assert exit_code(start(killed, tmp_path, owner, name, call)) == -signal.SIGKILL
    check_captions(load("captions", tmp_path, size=64))


def load_and_check(root):
    check_captions(load("captions", root, size=64))


def test_two_processes_that_decode_the_same_pictures_both_get_them(tmp_path):
    write_captions(tmp_path, 40)
    processes = [start(load_and_check, tmp_path) for _ in range(2)]
    assert [exit_code(process) for process in processes] == [0, 0]
    load_and_check(tmp_path)


class FullDisk(io.FileIO):
    def write(self, content):
        raise OSError(28, "No space left on device")


def test_a_full_disk_or_no_pillow_is_one_line_and_leaves_nothing_wrong(tmp_path, monkeypatch):
    write_captions(tmp_path, 20)
    with monkeypatch.context() as full:
        full.setattr(data, "open", FullDisk, raising=False)
        refused("/cache/.* cannot be written .No space left", load, "captions", tmp_path, size=8)
        full.setitem(sys.modules, "PIL", None)
        refused("pip install pillow", load, "captions", tmp_path, size=8)
    check_captions(load("captions", tmp_path, size=8))  # control: with both
    monkeypatch.setenv("COCA_CACHE", str(tmp_path / "captions.txt"))
    refused("captions.txt: cannot keep .*set COCA_CACHE", load, "captions", tmp_path, size=8)


# Missing and unreadable pictures


def test_pictures_that_cannot_be_read_are_all_found_before_ten_are_named_and_nothing_is_kept(
        tmp_path):
    write_captions(tmp_path, 30)
    found = load("captions", tmp_path, size=4)
    shutil.rmtree(tmp_path / "cache")
    bad = found.names[1::2]
    for i, name in enumerate(bad):
        (tmp_path / "Images" / name).unlink()
        if i % 2:
            (tmp_path / "Images" / name).write_bytes(b"\x89PNG" + bytes(50))
    first = f"/{bad[0]}: no such file; .*/{bad[1]}: not a readable image .*; .*/{bad[9]}: not a"
    for _ in range(2):
        refused(f"13 of 27 pictures cannot be read: .*{first}.*captions.txt names them; looked in .* "
                "and .*/Images. .*python -m experiments.tables ", load, "captions", tmp_path, size=4)
        assert not [*tmp_path.glob("cache/*")]
    with pytest.raises(UserError) as error:
        load("captions", tmp_path, size=4)
    assert bad[10] not in str(error.value)


def test_the_cache_is_in_the_home_folder_if_there_is_one(tmp_path, monkeypatch):
    write_captions(tmp_path, 10)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place, wanted in (("~/pixels", "home/pixels"), ("", "home/.cache/coca")):
        monkeypatch.setenv("COCA_CACHE", place)
        load("captions", tmp_path, size=8)
        assert len([*(tmp_path / wanted).iterdir()]) == 1
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where nobody has a home
    refused("~/.cache/coca: cannot keep the decoded .*set COCA_CACHE", load, "captions", tmp_path,
            size=8)


@pytest.mark.parametrize("rank, said", [("0", "note: words\n"), ("1", "")])
def test_of_several_processes_only_the_first_says_a_note(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)  # as torchrun does
    data.note("words")
    assert capsys.readouterr().err == said
