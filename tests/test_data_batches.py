"""From data to batches: which images a split has, words as numbers, and batches by number."""
import pickle
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import refused
from hypothesis import given
from hypothesis import strategies as st
from own_pictures import write_captions

import data
from coca import BEGIN, END, PAD, UNKNOWN
from data import Batches, Dataset, Tokenizer, load, pick, select, words

# Which images


def test_a_subset_and_what_is_kept_apart_are_random_images_and_the_same_every_time():
    val = pick(200, "val", 0, 50).tolist()
    train = pick(200, "train", 0, 50).tolist()
    few = pick(200, "train", 60, 50).tolist()
    for rows, count in ((val, 50), (few, 60), (pick(200, "train", 60, 0).tolist(), 60)):
        assert len(rows) == count and rows == sorted(rows)
        assert sum(row < 100 for row in rows) == pytest.approx(count / 2, abs=10)  # not the first
    assert sorted(train + val) == list(range(200)) and set(few) < set(train)
    assert pick(200, "labelled", 60, 50).tolist() == train  # a subset is one of "train" alone
    for split in ("val", "zeroshot", "labelled-val"):
        assert pick(200, split, 60, 50).tolist() == val
    refused("--subset 151, but there are 150 images; ask for fewer", pick, 200, "train", 151, 50)
    refused("200 of 200 training images cannot be kept apart", pick, 200, "val", 0, 200)


def test_selected_images_keep_their_captions_labels_and_names():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    texts = [[f"text {i}"] for i in range(6)]
    names = [f"{i}.png" for i in range(6)]
    whole = Dataset(images, texts, np.arange(6), ["a"], ["{}"], names, augment=True)
    few = select(whole, np.array([1, 4]))
    assert few.images.ravel().tolist() == few.labels.tolist() == [1, 4]
    assert few.captions == [["text 1"], ["text 4"]] and few.names == ["1.png", "4.png"]
    assert few.classes == ["a"] and few.templates == ["{}"] and few.augment
    bare = select(Dataset(images, texts), [5])
    assert bare.labels is None and bare.names == [] and bare.captions == [["text 5"]]


def test_scenes_kept_apart_are_training_scenes(monkeypatch):
    def numbered(split, size, seed, subset=0):
        captions = [[f"{split} {i} of seed {seed}"] for i in range(40)]
        return Dataset(np.zeros((40, 3, 1, 1)), captions)

    monkeypatch.setattr(data, "shapes", numbered)
    train = load("shapes", split="train", seed=3, val_from_train=10).captions
    val = load("shapes", split="val", seed=3, val_from_train=10).captions
    assert len(val) == 10 and sorted(train + val) == sorted(numbered("train", 0, 3).captions)
    for split in ("zeroshot", "labelled", "labelled-val"):  # these have scenes of their own
        scenes = load("shapes", split=split, val_from_train=10)
        assert scenes.captions == numbered(split, 0, 0).captions


def test_a_label_becomes_the_eight_prompts_of_zero_shot_and_photographs_are_augmented(tmp_path):
    batch = {"labels": [0, 1, 1], "data": np.zeros((3, 3072), np.uint8)}
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "sea_lion"]}))
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch))
    found = load("cifar10", tmp_path)
    for name, texts in zip(("cat", "sea lion", "sea lion"), found.captions, strict=True):
        assert texts == [template.format(name) for template in found.templates]
        assert len({text for text in texts if name in text}) == 8
    write_captions(tmp_path, 20)
    assert found.augment and load("captions", tmp_path, size=8).augment
    assert not load("shapes", subset=1).augment  # in scenes places count


# Text


@pytest.mark.parametrize("text", [
    "the dog's ball, and a cat.", "wait! what? 50%; yes: no", "the man's t-shirt",
    "a 3.5 l jug for 1,000 men, or 2.", "un café crème", "एक हिन्दी कैप्शन", "女の子が走る。", "개가 달린다."])
def test_text_comes_back_readable(text):
    for spelled in (text.upper(), unicodedata.normalize("NFD", text)):
        tokenizer = Tokenizer.learn([spelled], 100)
        assert tokenizer.decode(tokenizer.encode([spelled], 99)[0]) == text


@pytest.mark.parametrize("one, other", [
    ("the man’s feet", "the man's feet"), ("a sky\u00adscraper", "a skyscraper"),
    ("two\u200b dogs", "two dogs"), ("\ufeffa dog", "a dog"), ("CAF\u00c9", "cafe\u0301"),
    ("क\u093c", "\u0958")])
def test_what_looks_the_same_is_the_same_words(one, other):
    assert words(one) == words(other) and "" not in words(one)
    assert words(one) != words(f"{other}s")  # control


def test_accents_belong_to_their_word():
    assert len(words("x\u0301y z\u0327\u0301")) == 2  # letters that NFC has no sign for


@pytest.mark.parametrize("text, count", [
    ("a t-shirt (a) 'quoted' word", 8), ("a man's [red] dog", 7), ("'tis 'a' dog", 4),
    # Han and kana: each sign; hangul has blanks; Thai's words are not told apart
    ("一只狗，很大！", 7), ("「犬」が走る", 6), ("개가 달린다", 2), ("หมาวิ่ง", 1)])
def test_words_come_out_as_they_went_in_and_chinese_and_japanese_signs_are_words(text, count):
    tokenizer = Tokenizer.learn([text], 100)
    tokens = tokenizer.encode([text], 99)[0]
    assert tokenizer.decode(tokens) == text and len(tokens) == count + 2


WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), max_size=9)


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(2, 12))
def test_tokens_are_begin_words_end_and_pads_and_no_longer_than_text_len(texts, text_len):
    tokenizer = Tokenizer.learn(map(" ".join, texts), 1000)
    tokens = tokenizer.encode(map(" ".join, texts), text_len)
    assert tokens.shape[1] == min(max(map(len, texts)) + 2, text_len)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = [BEGIN, *map(tokenizer.words.index, text[:text_len - 2]), END]
        assert row == ids + [PAD] * (len(row) - len(ids))


@given(WORDS, st.integers(5, 12), st.randoms(use_true_random=False))
def test_the_vocabulary_holds_the_commonest_whatever_the_order_of_texts(texts, size, random):
    tokenizer = Tokenizer.learn(texts, size)
    counts = Counter(texts)
    known = tokenizer.words[4:]
    assert len(tokenizer) == min(size, 4 + len(counts))
    assert all(counts[a] >= counts[b] for a in known for b in set(texts) - set(known))
    assert Tokenizer.learn(random.sample(texts, len(texts)), size).words == tokenizer.words


def test_unknown_words_are_unknown_and_names_of_special_tokens_are_not_special():
    tokenizer = Tokenizer.learn(["a dog"], 100)
    expected = [[BEGIN, 4, UNKNOWN, END], [BEGIN, END, PAD, PAD]]
    assert tokenizer.encode(["a zebra", ""], 9).tolist() == expected
    special = tokenizer.encode(["<end> <pad> <begin>"], 20)[0, 1:-1]
    assert set(special.tolist()) == {UNKNOWN}


# Batches


def make_batches(count=24, batch_size=4, text="picture {}", images=None, text_len=8,
                 augment=False, **how):
    """Images of one grey each, or `images`, with two captions each."""
    if images is None:
        images = np.full((count, 3, 16, 16), np.arange(count)[:, None, None, None], np.uint8)
    captions = [[text.format(i), "again " + text.format(i)] for i in range(count)]
    tokenizer = Tokenizer.learn(sum(captions, []), 1000)
    dataset = Dataset(images, captions, augment=augment)
    batches = Batches(dataset, tokenizer, text_len, batch_size, **how)
    batches.tokenizer = tokenizer
    return batches


def to_bytes(images):
    return ((images + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("count", [24, 27])
def test_an_epoch_holds_every_image_once_but_for_a_last_short_batch_in_an_order_of_its_own(count):
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = make_batches(count, seed=seed)
        images = torch.stack([batches(step)[0] for step in range(6 * epoch, 6 * epoch + 6)])
        order = to_bytes(images)[..., 0, 0, 0].ravel().tolist()
        assert len(set(order)) == 24 and set(order) <= set(range(count)) and order != sorted(order)
        orders.add(tuple(order))
    assert len(orders) == 3


@pytest.mark.parametrize("augment", [False, True])
def test_a_step_gives_the_same_batch_whatever_came_before_and_processes_their_rows(augment):
    used = make_batches(batch_size=9, augment=augment)
    before = [used(step) for step in range(4)]
    images, tokens = make_batches(batch_size=9, augment=augment)(3)
    assert torch.equal(before[3][0], images) and torch.equal(before[3][1], tokens)
    assert not torch.equal(before[2][0], images)
    for own in (slice(0, 5), slice(5, 9)):
        own_images, own_tokens = make_batches(batch_size=9, augment=augment, own=own)(3)
        assert torch.equal(own_images, images[own])
        assert torch.equal(own_tokens, tokens[own, :own_tokens.shape[1]])
    assert {tensor.device.type for tensor in make_batches(device="meta")(0)} == {"meta"}


def test_a_batch_holds_captions_of_its_images_and_in_time_all_of_them():
    batches = make_batches()
    texts = set()
    for step in range(6 * 20):
        images, tokens = batches(step)
        assert (tokens[:, -1] != PAD).any()  # no longer than the longest
        for row, number in zip(tokens, to_bytes(images)[:, 0, 0, 0]):
            texts.add(batches.tokenizer.decode(row))
            assert batches.tokenizer.decode(row) in (f"picture {number}", f"again picture {number}")
    assert len(texts) == 48
    extremes = torch.tensor([0, 255], dtype=torch.uint8)
    assert data.to_model(extremes).tolist() == [-1, 1]


def test_equal_classes_get_equal_prompts_in_a_batch():
    dataset = Dataset(np.zeros((8, 3, 4, 4), np.uint8), [["a cat", "the cat", "one cat"]] * 8)
    batches = Batches(dataset, Tokenizer.learn(dataset.captions[0], 100), 8, 8)
    drawn = [torch.unique(batches(step)[1], dim=0).tolist() for step in range(40)]
    assert {len(texts) for texts in drawn} == {1} and len({str(texts) for texts in drawn}) == 3


@pytest.mark.parametrize("text, flips", [
    ("it is left", False), ("the Right side", False), ("a dog", True), ("leftover", True),
    ("a left-handed man", False), ("the right-most dog", False), ("the LEFTMOST one", False),
    ("rightmost.", False), ("upper-right", False), ("the 'left' side", False), ("brightly lit", True)])
def test_pictures_are_cropped_from_a_grey_border_and_mirrored_unless_it_says_left(text, flips):
    originals = np.random.default_rng(0).integers(0, 256, (30, 3, 16, 16), np.uint8)
    padded = np.pad(originals, ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=128)
    places = {}  # pixels of every possible crop -> where it is from
    for i, top, left in np.ndindex(30, 5, 5):
        crop = padded[i, :, top:top + 16, left:left + 16]
        places[crop.tobytes()] = i, top, left, False
        places[crop[..., ::-1].tobytes()] = i, top, left, True
    patterns = set()
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        images = make_batches(30, 30, text, images=originals, augment=True, seed=seed)(step)[0]
        which, top, left, mirrored = zip(*[places[image.tobytes()] for image in to_bytes(images)])
        assert len(set(which)) == 30 and set(top) == set(left) == set(range(5))
        assert 5 <= sum(mirrored) <= 25 if flips else not any(mirrored)
        patterns.add((top, left, mirrored))
    assert len(patterns) == 3


def test_long_captions_are_cut_with_a_note_and_a_batch_larger_than_the_data_is_refused(capsys):
    tokens = make_batches(text_len=4)(0)[1]
    assert tokens.shape[1] <= 4 and (tokens == END).any(1).all()
    said = capsys.readouterr().err  # of "again picture 1"
    assert "24 of 48 captions cut to 2 words (text_len is 4)" in said
    make_batches(text_len=5)
    assert capsys.readouterr().err == ""
    refused("--batch-size 25 .* 24", make_batches, batch_size=25)
