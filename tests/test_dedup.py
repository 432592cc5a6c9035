"""De-duplication: copies as found in the wild are found and nothing else, and the search misses no pair."""
import itertools
from unittest import mock

import numpy as np
import pytest
from bench import plant_copies
from helpers import TOY, fails
from hypothesis import given, settings
from hypothesis import strategies as st

import data as data_file
import train
from data import (
    Dataset,
    UserError,
    main,
    near_duplicates,
    resize,
    shapes,
    thumbnails,
    without_duplicates,
)


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


@settings(max_examples=5)
@given(st.sampled_from(["re-encoded", "resized", "cropped", "brightness"]), st.integers(0, 1000))
def test_copies_are_found_and_nothing_else(kind, seed):
    assert share_found(kind, seed) >= 0.9


def test_control_without_its_parts_copies_are_missed():
    with fails, mock.patch.object(data_file, "slight_crops", lambda images, mirrored: [images]):
        assert share_found("cropped") >= 0.9
    with fails:
        assert share_found("re-encoded", threshold=1.01) >= 0.9

    def raw(images):  # neither mean nor contrast taken off
        x = data_file.torch.from_numpy(images[:, :, ::4, ::4].copy()).flatten(1)
        return x / 255 / 16

    with fails, mock.patch.object(data_file, "thumbnails", raw):
        assert share_found("brightness") >= 0.9


def test_mirror_images_count_only_if_asked():
    assert share_found("mirrored", mirrored=True) == 1.0
    assert share_found("mirrored") == 0.0


@given(st.integers(0, 1000), st.floats(0.3, 0.6), st.integers(0, 20))
def test_thumbnails_forget_brightness_and_contrast(seed, contrast, shift):
    images = pictures(seed, 3)
    changed = (images * contrast + shift).astype(np.uint8)
    assert (thumbnails(images) * thumbnails(changed)).sum(1).min() > 0.999
    assert np.allclose(thumbnails(images).norm(dim=1), 1, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Against a plain loop over all pairs


def parts_of(image):
    """The image (3, 32, 32), then 13 crops of 95 and 90 % of its sides."""
    parts = [image]
    for side, places in ((30, (0, 2)), (29, (0, 2, 3))):
        for top, left in itertools.product(places, places):
            parts.append(image[:, top:top + side, left:left + side])
    return parts


def check_loop(seed, n, threshold, mirrored, parts=14):
    evaluation = pictures(seed, 2)
    crops = [resize(part[None], 32) for part in parts_of(evaluation[0])]
    images = np.concatenate([pictures(seed + 1, n), *crops])
    which, similarity = np.full(len(images), -1), np.zeros(len(images))
    copied = np.zeros(2, bool)
    for j, image in enumerate(evaluation):
        probes = parts_of(image)[:parts]
        if mirrored:
            probes += [part[..., ::-1] for part in probes]
        for probe, (i, own) in itertools.product(probes, enumerate(images)):
            cosine = float(thumbnails(own[None])[0] @ thumbnails(probe[None])[0])
            copied[j] |= cosine > threshold
            if cosine > max(threshold, similarity[i]):
                which[i], similarity[i] = j, cosine
    found = near_duplicates(images, evaluation, threshold, mirrored)
    assert (found[0] == which).all() and (found[2] == copied).all()
    assert np.allclose(found[1], similarity, atol=1e-5)


@settings(max_examples=5)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([0.3, 0.9, 0.99]), st.booleans())
def test_the_search_finds_what_a_loop_over_all_pairs_finds(seed, n, threshold, mirrored):
    check_loop(seed, n, threshold, mirrored)


def test_control_a_loop_without_the_crops_finds_less():
    with fails:
        check_loop(0, 4, 0.99, False, parts=1)


# ------------------------------------------------------------------------------------------------
# In use


def test_grey_pictures_are_no_copies_and_many_copies_of_one_image_all_go():
    flat, one = np.full((30, 3, 32, 32), 7, np.uint8), pictures(0, 1)
    images = np.concatenate([flat, np.repeat(one, 2500, 0), pictures(1, 20)])  # more than one block
    which, _, copied = near_duplicates(images, np.concatenate([flat, one, pictures(2, 20)]))
    assert (which[:30] == -1).all() and (which[30:2530] == 30).all() and (which[2530:] == -1).all()
    assert copied.nonzero()[0].tolist() == [30]


def test_duplicates_are_removed_with_their_captions_and_labels(capsys):
    evaluation = Dataset(pictures(0, 10), [["eval"]] * 10)
    images = np.concatenate([pictures(1, 4), evaluation.images[:3], pictures(2, 4)])
    data = Dataset(images, [[str(i)] for i in range(11)], np.arange(11), ["x"], ["{}"], augment=True)
    left = without_duplicates(data, evaluation)
    assert left.labels.tolist() == [0, 1, 2, 3, 7, 8, 9, 10] == [int(text) for text, in left.captions]
    assert left.augment and left.classes == ["x"] and (left.images == np.delete(images, [4, 5, 6], 0)).all()
    assert "3 of 11 training images removed, near-duplicates of 3 of 10" in capsys.readouterr().err
    with pytest.raises(UserError, match="training images?"):
        without_duplicates(data_file.select(data, [4, 5, 6]), evaluation)


def test_training_leaves_duplicates_out(tmp_path, monkeypatch, capsys, no_evaluation):
    def planted(name, where, split, *more, **named):
        data = data_file.select(shapes(split, 32, 32, 0), np.arange(32))
        if split == "train":
            data.images[:5] = shapes("val", 32, 0, 0).images[:5]
        return data

    monkeypatch.setattr(train, "load", planted)
    train.main([*TOY, "--steps", "1", "--dedup", "--out", str(tmp_path / "with")])
    captured = capsys.readouterr()
    removed = int(captured.err.split("note: ")[1].split()[0])
    assert removed >= 5 and f"{32 - removed} images," in captured.out
    train.main([*TOY, "--steps", "1", "--out", str(tmp_path / "without")])
    assert "32 images," in capsys.readouterr().out


def test_the_command_shows_the_pairs(tmp_path, monkeypatch, capsys):
    evaluation = Dataset(pictures(0, 10), [["a copy"]] * 10)
    data = Dataset(np.concatenate([pictures(1, 20), evaluation.images[:7]]), [["original"]] * 27)
    parts = {"train": data, "val": evaluation}
    monkeypatch.setattr(data_file, "load", lambda name, where, split, size: parts[split])
    main(["dedup", "--show", str(tmp_path / "pairs.png")])
    out = capsys.readouterr().out
    assert "7 of 27 training images are near-duplicates of 7 of 10 evaluation images" in out
    assert "train 20: original  |  evaluation 0: a copy" in out
    with data_file.pillow().open(tmp_path / "pairs.png") as sheet:
        pixels = np.asarray(sheet)[1::3, 1::3].transpose(2, 0, 1)  # it is three times as large
    assert pixels.shape == (3, 7 * 32, 2 * 32) and np.array_equal(pixels[:, :, :32], pixels[:, :, 32:])
    assert any(np.array_equal(pixels[:, :32, :32], image) for image in evaluation.images[:7])


@pytest.mark.parametrize("flags, why", [
    (["--show", "none/x.png"], "none/x.png cannot be made"), (["--size", "0"], "at least 1"),
    (["--show", "taken.png"], "taken.png is there already")])
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, monkeypatch, capsys, flags, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").write_text("mine")
    monkeypatch.setattr(data_file, "load", lambda *args: pytest.fail("work"))
    with pytest.raises(SystemExit):
        main(["dedup", *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error" in last and why in last and (tmp_path / "taken.png").read_text() == "mine"
