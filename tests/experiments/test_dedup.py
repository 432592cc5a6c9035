"""De-duplication: copies as found in the wild are found, and nothing else."""
import itertools
import warnings
from unittest import mock

import numpy as np
import pytest
import quick
import torch
from helpers import fails, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from own_pictures import write_captions

import eval as evaluation
import train
from data import Dataset, load, pillow, resize, select, shapes
from experiments import dedup
from experiments.dedup import near_duplicates, plant_copies, without_duplicates


def pictures(seed, n, size=32):
    """Random smooth colour pictures: waves of low frequency, each like no other."""
    rng = np.random.default_rng(seed)
    places = np.arange(size) / size
    x = np.zeros((n, 3, size, size))
    for _ in range(6):
        a, b = rng.uniform(-12, 12, (2, n, 1, 1, 1))
        wave = np.sin(a * places + b * places[:, None] + rng.uniform(0, 7, (n, 1, 1, 1)))
        x += rng.normal(0, 30, (n, 3, 1, 1)) * wave
    return (128 + x).clip(0, 255).astype(np.uint8)


def share_found(kind, seed=0, n=20, others=100, **how):
    """Share of planted copies that are found, each as the copy of its own image."""
    evaluation = pictures(seed, n)
    copies = plant_copies(evaluation, np.random.default_rng(seed))[kind]
    images = np.concatenate([pictures(seed + 1, others), copies])
    which, similarity, copied = near_duplicates(images, evaluation, **how)
    assert (which[:others] == -1).all() and (similarity[:others] == 0).all()
    assert copied.sum() == len(set(which[which >= 0]))
    return (which[others:] == np.arange(n)).mean()


def check_crops():
    """Crops of 95 and 90 % of the sides are found in corners, at edges and in the middle."""
    image = pictures(0, 1)
    images = [image]
    for side, places in ((30, (0, 2)), (29, (0, 2, 3))):
        for top, left in itertools.product(places, places):
            images.append(resize(image[:, :, top:top + side, left:left + side], 32))
    similarity = near_duplicates(np.concatenate(images), image)[1]
    assert similarity[0] == pytest.approx(1) and similarity.min() > 0.999


@settings(max_examples=5)
@given(st.sampled_from(["re-encoded", "resized", "cropped", "brightness"]), st.integers(0, 1000))
def test_copies_are_found_and_nothing_else(kind, seed):
    assert share_found(kind, seed) >= 0.9


def test_cropped_copies_are_found_and_without_crops_missed():
    check_crops()
    with fails, mock.patch.object(dedup, "slight_crops", lambda images, mirrored: [images]):
        check_crops()  # control


def test_mirror_images_count_only_if_asked():
    assert share_found("mirrored", mirrored=True) == 1.0
    assert share_found("mirrored") == 0.0


def test_grey_pictures_are_no_copies_and_many_copies_of_one_image_all_go():
    flat = np.full((30, 3, 32, 32), 7, np.uint8)
    one = pictures(0, 1)
    images = np.concatenate([flat, np.repeat(one, 2500, 0), pictures(1, 20)])  # several blocks
    which, _, copied = near_duplicates(images, np.concatenate([flat, one, pictures(2, 20)]))
    assert np.flatnonzero(which >= 0).tolist() == list(range(30, 2530))
    assert copied.nonzero()[0].tolist() == [30]


def test_duplicates_are_removed_with_their_captions_and_labels():
    evaluation = Dataset(pictures(0, 10), [["eval"]] * 10)
    images = np.concatenate([pictures(1, 4), evaluation.images[:3], pictures(2, 4)])
    data = Dataset(images, [[str(i)] for i in range(11)], np.arange(11), augment=True)
    left = without_duplicates(data, evaluation)
    assert left.labels.tolist() == [0, 1, 2, 3, 7, 8, 9, 10]
    assert left.captions == [[str(i)] for i in left.labels]
    assert left.augment and (left.images == np.delete(images, [4, 5, 6], 0)).all()
    copies = select(data, [4, 5, 6])
    refused("all training images", without_duplicates, copies, evaluation)


def test_training_leaves_duplicates_out_and_goes_on_without_them_only(tmp_path, monkeypatch):
    def planted(name, where, split, **named):
        data = select(shapes(split, 32, 0, 32), np.arange(32))
        if split == "train":
            data.images[:5] = shapes("val", 32, 0).images[:5]
        return data

    quick.make_small(monkeypatch)
    monkeypatch.setattr(evaluation, "load", planted)
    train_flags = ["--steps", "1", "--batch-size", "8", "--device", "cpu", "--out", str(tmp_path)]
    dedup.main(["train", *train_flags])
    with mock.patch.object(train, "check_data", lambda s, data, val: sizes.append(len(data))):
        sizes = []
        dedup.main(["train", "--resume", "--out", str(tmp_path)])
        train.main(["--resume", "--out", str(tmp_path)])  # control
        assert sizes[0] <= 27 and sizes[1] == 32
    refused("the data are not those", train.main, ["--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize("augment", [True, False])
def test_training_counts_mirror_images_where_it_shows_them(augment, monkeypatch):
    def mirrored(name, where, split, **named):
        images = pictures(0, 5)[:4] if split == "val" else pictures(0, 5)[..., ::-1].copy()
        return Dataset(images, [["a"]] * len(images), augment=augment)

    monkeypatch.setattr(evaluation, "load", mirrored)
    s, _ = train.parse_args([])
    assert (len(dedup.load_data(vars(s), "train")) < 5) == augment
    assert len(dedup.load_data(vars(s), "val")) == 4


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """python -m experiments.dedup on 20 images of their own and that many copies, in its folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, copies=7, augment=False):
        evaluation = Dataset(pictures(0, 10), [["a copy"]] * 10)
        images = np.concatenate([pictures(1, 20), evaluation.images[:copies]])
        if augment:
            images = np.concatenate([images, evaluation.images[7:, :, :, ::-1]])
        captions = [["original"]] * len(images)
        parts = {"train": Dataset(images, captions, augment=augment), "val": evaluation}
        monkeypatch.setattr(dedup, "load", lambda name, where, split, size: parts[split])
        dedup.main(list(flags))
    return call


def test_the_command_shows_the_pairs(command, tmp_path, capsys):
    command("--show", "pairs.png")
    out = capsys.readouterr().out
    assert "7 of 27 training images are near-duplicates of 7 of 10 evaluation images" in out
    assert "1.000  train 20: original  |  evaluation 0: a copy" in out
    with pillow().open(tmp_path / "pairs.png") as sheet:
        pixels = np.asarray(sheet)[1::3, 1::3]  # it is three times as large
    assert pixels.shape == (2 * 36, 4 * 68, 3)  # seven pairs, four a row
    for i in range(8):
        pair = pixels[36 * (i // 4):][2:34, 68 * (i % 4):][:, 2:66]
        assert np.array_equal(pair[:, :32], pair[:, 32:]) and (pair == 255).all() == (i == 7)


def test_of_photographs_mirrored_copies_are_found_as_training_leaves_them_out(command, capsys):
    command(augment=True)
    assert "10 of 30 training images are near-duplicates of 10 of" in capsys.readouterr().out


def test_without_a_pair_nothing_is_shown_and_this_is_said(command, tmp_path, capsys):
    command("--show", "pairs.png", copies=0)
    found, last = capsys.readouterr().out.splitlines()
    assert found.startswith("0 of 20") and last == "nothing to show: pairs.png is not made"
    assert not any(tmp_path.iterdir())


def test_the_threshold_is_that_of_the_flag(command, capsys):
    found = []
    for threshold in ("0.2", "0.955", "0.99999999"):
        command("--threshold", threshold)
        found.append(int(capsys.readouterr().out.split()[0]))
    assert found[0] > 7 and found[1] == 7 and found[2] < 7


@pytest.mark.parametrize("flags, message", [
    ("--threshold 0", "between 0 and 1"), ("--threshold 1", "between 0 and 1"),
    ("--threshold nan", "between 0 and 1"), ("--size 0", "at least 1"),
    ("--measure --show x.png", "leave --threshold"), ("--thresh 0.9", "unrecognized")])
def test_flags_that_make_no_sense_are_refused(command, flags, message, capsys):
    with pytest.raises(SystemExit):
        command(*flags.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_measuring_prints_recall_of_each_kind_and_precision(command, capsys):
    command("--measure", augment=True)
    head, *lines, _, _ = capsys.readouterr().out.splitlines()
    assert head.split()[3:] == ["re-encoded", "resized", "cropped", "brightness", "mirrored"]
    rows = np.array([line.replace("%", "").split() for line in lines], float)
    assert rows[4, 0] == 0.955 and (np.diff(rows[:, 0]) > 0).all()
    assert (np.diff(rows[:, 2:], axis=0) <= 0).all()  # recall falls as the threshold rises
    assert rows[4, [2, 3, 6]].tolist() == [100, 100, 100]
    planted = rows[4, 2:].sum() / 100 * 10  # and 10 training images are copies that were not planted
    assert rows[4, 1] == pytest.approx(100 * planted / (planted + 10), abs=0.1)
    command("--measure")  # control: without mirror images
    assert float(capsys.readouterr().out.splitlines()[5].split()[-1].rstrip("%")) < 50


def test_measuring_counts_only_finds_of_the_image_that_was_copied(command, capsys, monkeypatch):
    def plant(images, rng):
        copies = plant_copies(images, rng)
        copies["resized"] = copies["resized"][::-1]  # each is found, as a copy of another image
        return copies

    monkeypatch.setattr(dedup, "plant_copies", plant)
    command("--measure", copies=0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-2]]
    assert rows[4][2:4] == ["100.0%", "0.0%"] and float(rows[4][1].rstrip("%")) < 80


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
