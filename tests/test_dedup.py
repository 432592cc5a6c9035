"""De-duplication: copies as found in the wild are found, unlike images are not, and the work does not grow with all pairs."""
import dataclasses
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data as data_file
import train
from data import DataError, Dataset, main, near_duplicates, plant_copies, shapes, thumbnails, without_duplicates

fails = pytest.raises(AssertionError)


def pictures(seed, n, size=32):
    """Random smooth colour pictures: waves of low frequency, so that each looks like a picture and like no other."""
    rng = np.random.default_rng(seed)
    at = np.arange(size) / size
    x = np.zeros((n, 3, size, size))
    for _ in range(6):
        a, b = rng.uniform(-12, 12, (2, n, 1, 1, 1))
        x += rng.normal(0, 30, (n, 3, 1, 1)) * np.sin(a * at + b * at[:, None] + rng.uniform(0, 7, (n, 1, 1, 1)))
    return (128 + x).clip(0, 255).astype(np.uint8)


def found(kind, seed=0, n=20, others=100, **how):
    """Share of planted copies that are found, each as the copy of its own image."""
    evaluation = pictures(seed, n)
    copies = plant_copies(evaluation, np.random.default_rng(seed))[kind]
    which, similarity, copied = near_duplicates(np.concatenate([pictures(seed + 1, others), copies]), evaluation, **how)
    assert (which[:others] == -1).all() and (similarity[:others] == 0).all()
    assert copied.sum() == len(set(which[which >= 0]))
    return (which[others:] == np.arange(n)).mean()


@settings(max_examples=5)
@given(st.sampled_from(["re-encoded", "resized", "cropped", "brightness"]), st.integers(0, 1000))
def test_copies_are_found_and_nothing_else(kind, seed):
    assert found(kind, seed) >= 0.9


def test_control_without_its_parts_copies_are_missed():
    with fails, mock.patch.object(data_file, "slight_crops", lambda images, mirrored: [images]):
        assert found("cropped") >= 0.9
    with fails:
        assert found("re-encoded", threshold=1.01) >= 0.9

    def raw(images):
        x = np.stack([image[:, ::4, ::4] for image in images]).reshape(len(images), -1).astype(np.float32)
        return x / 255 / 16  # neither mean nor contrast taken off

    with fails, mock.patch.object(data_file, "thumbnails", raw):
        assert found("brightness") >= 0.9


def test_mirror_images_count_only_if_asked():
    assert found("mirrored", mirrored=True) == 1.0
    assert found("mirrored") == 0.0


@given(st.integers(0, 1000), st.floats(0.3, 0.6), st.integers(0, 20))
def test_thumbnails_forget_brightness_and_contrast(seed, contrast, shift):
    images = pictures(seed, 3)
    shifted = (images * contrast + shift).astype(np.uint8)
    assert (thumbnails(images) * thumbnails(shifted)).sum(1).min() > 0.999
    assert np.allclose(np.linalg.norm(thumbnails(images), axis=1), 1, atol=1e-5)


def compared(images, evaluation):
    """How many pairs are compared; and what is found."""
    with mock.patch.object(np, "einsum", side_effect=np.einsum) as spy:
        found = near_duplicates(images, evaluation)
    return sum(len(call.args[1]) for call in spy.call_args_list), found


def test_grey_pictures_are_no_copies_and_many_copies_of_one_image_all_go():
    flat, one = np.full((300, 3, 32, 32), 7, np.uint8), pictures(0, 1)
    images = np.concatenate([flat, np.repeat(one, 500, 0), pictures(1, 20)])
    pairs, (which, _, copied) = compared(images, np.concatenate([flat, one, np.repeat(one, 300, 0), pictures(2, 20)]))
    assert (which[:300] == -1).all() and (which[300:800] >= 300).all() and (which[800:] == -1).all()
    assert not copied[:300].any() and pairs <= 16 * 200 * len(images)


def test_the_work_grows_about_linearly():
    few, many = (compared(pictures(0, n), pictures(1, n // 4))[0] for n in (500, 4000))
    assert many < 20 * few  # 8 times the images; all pairs would be 64 times as many
    assert many < 0.2 * 4000 * 14 * 1000


def test_duplicates_are_removed_with_their_captions_and_labels(capsys):
    evaluation = Dataset(pictures(0, 10), [["eval"]] * 10)
    images = np.concatenate([pictures(1, 4), evaluation.images[:3], pictures(2, 4)])
    data = Dataset(images, [[str(i)] for i in range(11)], np.arange(11), ["x"], ["{}"], augment=True)
    left = without_duplicates(data, evaluation)
    assert left.labels.tolist() == [0, 1, 2, 3, 7, 8, 9, 10] == [int(text) for text, in left.captions]
    assert left.augment and left.classes == ["x"] and (left.images == np.delete(images, [4, 5, 6], 0)).all()
    assert "3 of 11 training images removed, near-duplicates of 3 of 10" in capsys.readouterr().err
    with pytest.raises(DataError, match="every training image"):
        without_duplicates(dataclasses.replace(data, images=images[4:7], captions=data.captions[4:7], labels=None), evaluation)


def test_training_leaves_duplicates_out(tmp_path, monkeypatch, capsys):
    real = train.load

    def planted(name, where, split, *more, **named):
        data = real(name, where, split, *more, **named)
        if split == "train":
            data.images[:5] = shapes("val", 32, 0, 0).images[:5]
        return data

    monkeypatch.setattr(train, "load", planted)
    monkeypatch.setattr(train, "evaluate", lambda *a: {})
    monkeypatch.setattr(train, "report", lambda scores: None)
    run = ["--subset", "40", "--batch-size", "8", "--steps", "2", "--device", "cpu"]
    train.main([*run, "--dedup", "--out", str(tmp_path / "with")])
    captured = capsys.readouterr()
    removed = int(captured.err.split("note: ")[1].split()[0])
    assert removed >= 5 and f"{40 - removed} images," in captured.out
    train.main([*run, "--out", str(tmp_path / "without")])
    assert "40 images," in capsys.readouterr().out


def test_the_command_shows_pairs_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    evaluation = Dataset(pictures(0, 10), [["a copy"]] * 10)
    data = Dataset(np.concatenate([pictures(1, 20), evaluation.images[:7]]), [["original"]] * 27)
    monkeypatch.setattr(data_file, "load", lambda name, where, split, size: data if split == "train" else evaluation)
    main(["dedup", "--show", str(tmp_path / "pairs.png")])
    assert "7 of 27 training images are near-duplicates of 7 of 10 evaluation images" in capsys.readouterr().out
    before = (tmp_path / "pairs.png").read_bytes()
    assert before[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="is there already"):
        main(["dedup", "--show", str(tmp_path / "pairs.png")])
    assert before == (tmp_path / "pairs.png").read_bytes()
    main(["dedup", "--curve"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("threshold") and sum("%" in line for line in lines) == 9
