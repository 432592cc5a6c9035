"""Pictures in files: decoded as a viewer shows them, kept in the cache, skipped if unreadable."""
import io
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import counting, refused
from own_pictures import check_captions, exit_code, paint, start, write_captions
from PIL import Image

import data
from data import fingerprint, load, near_duplicates, read_image

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
    for name, said in (("x.heic", "HEIC is not read; convert it, .*magick"), ("x.HEIF", "HEIC"),
                       ("x.jpg", "not a readable image")):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        refused(f"{name}: {said}", read_image, tmp_path / name, 8)
    paint(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    refused("cut.png: not a readable image", read_image, tmp_path / "cut.png", 8)
    refused("none.png: no such file", read_image, tmp_path / "none.png", 8)


# The cache


def test_the_cache_is_one_file_for_all_subsets_and_each_picture_is_decoded_once(tmp_path):
    write_captions(tmp_path, 30)
    with counting((data, "read_image")) as (read,):
        for subset, fewest, most in ((3, 3, 3), (3, 3, 3), (10, 10, 13), (0, 27, 27), (0, 27, 27)):
            found = load("captions", tmp_path, size=8, subset=subset)
            assert len(set(check_captions(found))) == (subset or 27)
            assert fewest <= read.call_count <= most
        assert len(list((tmp_path / "cache").iterdir())) == 1
        load("captions", tmp_path, size=4)  # control: another size is not in the cache
        assert read.call_count == 2 * 27


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
    (data, "read_image", 1), (data, "read_image", 9), (data, "read_image", 20), (os, "fsync", 1)])
def test_a_run_killed_while_it_decodes_leaves_no_wrong_pixels(tmp_path, owner, name, call):
    write_captions(tmp_path, 30)
    load("captions", tmp_path, size=64, subset=5)
    assert exit_code(start(killed, tmp_path, owner, name, call)) == -signal.SIGKILL
    with counting((data, "read_image")) as (read,):
        check_captions(load("captions", tmp_path, size=64))
    assert read.call_count == 27 - 5  # those of before are still there
    assert len(list((tmp_path / "cache").iterdir())) == 1


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
        refused("cannot keep .*No space left .*set COCA_CACHE", load, "captions", tmp_path, size=8)
        full.setitem(sys.modules, "PIL", None)
        refused("pip install pillow", load, "captions", tmp_path, size=8)
    check_captions(load("captions", tmp_path, size=8))  # control: with both
    monkeypatch.setenv("COCA_CACHE", str(tmp_path / "captions.txt"))
    refused("captions.txt: cannot keep .*set COCA_CACHE", load, "captions", tmp_path, size=8)


# Missing and unreadable pictures


def spoil(path, how):
    path.unlink()
    if how == "broken":
        path.write_bytes(b"\x89PNG" + bytes(50))


@pytest.mark.parametrize("count, allowed", [(30, 1), (120, 1), (240, 2)])
@pytest.mark.parametrize("how", [["missing"], ["broken"], ["missing", "broken"]])
def test_one_picture_in_a_hundred_may_lack_and_is_counted_at_every_load(
        tmp_path, capsys, count, allowed, how):
    write_captions(tmp_path, count)
    whole = load("captions", tmp_path, size=4)
    lacking = whole.names[1:1 + allowed]
    for i, name in enumerate(lacking):
        spoil(tmp_path / "Images" / name, how[i % len(how)])
    for _ in range(2):
        with counting((data, "read_image")) as (read,):
            found = load("captions", tmp_path, size=4)
        check_captions(found)
        assert found.names == [name for name in whole.names if name not in lacking]
        said = capsys.readouterr().err
        assert f"{allowed} of {len(whole)} pictures cannot be read" in said
        assert all(f"/{name}: " in said for name in lacking)
    assert read.call_count == allowed  # tried once more, for the reason
    assert fingerprint(found) != fingerprint(whole)
    spoil(tmp_path / "Images" / whole.names[0], how[-1])
    refused(f"{allowed + 1} of {len(whole)} pictures .*put them back, or take them out", load,
            "captions", tmp_path, size=4)


def test_of_many_the_first_three_are_named_and_a_split_is_never_empty(tmp_path):
    write_captions(tmp_path, 20)
    names = load("captions", tmp_path, size=4).names
    for name in names[1:]:
        spoil(tmp_path / "Images" / name, "broken")
    refused(f"16 of 17 .*/{names[1]}: .*/{names[2]}: .*/{names[3]}: [^;]*Too many", load,
            "captions", tmp_path, size=4)
    spoil(tmp_path / "Images" / names[0], "missing")
    refused("1 of 1 pictures", load, "captions", tmp_path, "val", size=4, val_from_train=1)


def test_duplicates_among_read_only_pictures_are_found_without_a_warning(tmp_path):
    write_captions(tmp_path, 12)
    images = load("captions", tmp_path, size=8).images
    assert isinstance(images, np.memmap) and not images.flags.writeable
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            near_duplicates(images, images)
            with pytest.raises(UserWarning, match="not writable"):  # control
                torch.from_numpy(images)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("rank, said", [("0", "note: words\n"), ("1", "")])
def test_of_several_processes_only_the_first_says_a_note(rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)  # as torchrun does
    data.note("words")
    assert capsys.readouterr().err == said
