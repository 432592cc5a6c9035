"""The metrics: recall, zero-shot, retrieval, BLEU and CIDEr-D against hand-computed cases and slow versions."""
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, VOCAB, fails
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from coca import UNKNOWN
from data import Dataset, Tokenizer
from eval import (
    bleu,
    captioning_task,
    cider_d,
    embed_images,
    n_grams,
    recall,
    retrieval,
    tokenised,
    zero_shot,
)

# ------------------------------------------------------------------------------------------------
# Recall, retrieval, zero-shot classification


def test_recall_by_hand():
    row = torch.tensor([0.9, 0.1, 0.5, 0.2])  # ranks 1, 4, 2, 3
    found = recall(row.expand(4, 4), [[0], [2], [1, 3], [1]], ks=(1, 2, 3, 4))
    assert [found[k][0] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    # by chance: of one relevant item among 4, and of the better of two
    assert found[1][1] == pytest.approx((3 * 1 / 4 + 2 / 4) / 4)
    assert found[2][1] == pytest.approx((3 * 2 / 4 + (1 - 2 / 4 * 1 / 3)) / 4)
    assert found[4][1] == 1.0


def check_recall(seed, queries, items, best=max):
    """Against sorting. best: of several relevant items which counts."""
    torch.manual_seed(seed)
    scores = torch.rand(queries, items)
    relevant = [torch.randperm(items)[:1 + i % 3].tolist() for i in range(queries)]
    for k, (score, _) in recall(scores, relevant).items():
        hits = []
        for row, right in zip(scores, relevant):
            nearest = row.argsort(descending=True)[:k].tolist()
            hits.append(best(item in nearest for item in right))
        assert score == pytest.approx(np.mean(hits))


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(3, 12))
def test_recall_equals_sorting(seed, queries, items):
    check_recall(seed, queries, items)


def test_control_recall_of_the_worst_relevant_item_differs():
    with fails:
        check_recall(0, 8, 12, best=min)


def test_chance_is_what_random_scores_give_and_more_than_all_items_are_no_error():
    torch.manual_seed(0)
    relevant = [[i % 20, (i + 7) % 20] for i in range(5000)]
    for score, chance in recall(torch.rand(5000, 20), relevant).values():
        assert score == pytest.approx(chance, abs=0.03)
    assert recall(torch.rand(3, 2), [[0], [1], [0]])[5] == (1.0, 1.0)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_scores_and_nan_are_never_right(value):
    assert all(score == 0 for score, _ in recall(torch.full((5, 30), value), [[i] for i in range(5)]).values())
    rest = torch.full((1, 30), value)
    rest[0, 3] = 1.0  # control: one good score
    assert recall(rest, [[3]])[1][0] == (value == 0)


@pytest.fixture
def embed(monkeypatch):
    """Makes texts embed as a table says."""
    def use(table):
        def look_up(model, tokenizer, texts):
            return F.normalize(torch.tensor([table[text] for text in texts], dtype=torch.float), dim=-1)
        monkeypatch.setattr(evaluation, "embed_texts", look_up)
        return look_up
    return use


def test_retrieval_counts_several_captions_per_image_and_shared_captions(embed):
    embed({"a": [1, 0, 0], "b": [0.9, 0.1, 0], "c": [0, 1, 0], "d": [0, 0, 1]})
    images = F.normalize(torch.tensor([[1.0, 0.2, 0], [0.1, 1, 0.3], [0, 0.3, 1]]), dim=-1)
    texts = [["a", "b"], ["c", "b"], ["d", "d"]]
    found = retrieval(images, None, None, texts)
    assert found["image to text"][1][0] == 1.0  # each image's nearest text is one of its own
    assert found["text to image"][1][0] == 1.0  # "b" is right for image 0 and image 1; "d" counts once
    assert found["image to text"][1][1] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert retrieval(images.roll(1, 0), None, None, texts)["image to text"][1][0] < 1  # control


def test_zero_shot_takes_the_mean_of_the_prompts_embeddings(embed):
    """Chosen so that the nearest single prompt would answer otherwise than the mean of a class's prompts."""
    look_up = embed({"a x": [1, 0, 0], "the x": [-0.5, 0.8, 0], "a y": [0.8, 0, 0.6], "the y": [0.8, 0, 0.6]})
    data = Dataset(np.zeros((2, 3, 4, 4), np.uint8), [[], []], np.array([1, 0]), ["x", "y"], ["a {}", "the {}"])
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert zero_shot(images, None, None, data).tolist() == [1, 0]
    assert (images @ look_up(None, None, ["a x", "a y"]).T).argmax(1).tolist() != [1, 0]


TOKENIZER = Tokenizer(["<pad>", "<begin>", "<end>", "<unk>", *"abcdefghi"])


def scores_of(model, classes):
    """Share of 20 images of which the model says a class, and retrieval of them."""
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    data = Dataset(images, [], None, classes, ["a {}", "b {} a"])
    captions = [[f"a {text}"] for text in "bcdefghia" * 2 + "yz"]
    with torch.no_grad():
        embedding = embed_images(model, images)
        said = zero_shot(embedding, model, TOKENIZER, data) >= 0
        found = retrieval(embedding, model, TOKENIZER, captions)
    return said.float().mean().item(), [score for rows in found.values() for score, _ in rows.values()]


def test_a_model_of_nans_scores_nothing():
    model = CONTROL.model()
    said, found = scores_of(model, ["c", "d", "e"])  # control
    assert said == 1 and max(found) > 0.5
    torch.nn.init.constant_(model.contrastive_pooler.norm.bias, math.nan)
    said, found = scores_of(model, ["c", "d", "e"])
    assert said == 0 and max(found) == 0


@pytest.mark.parametrize("count", [2, 10, 100])
def test_classes_with_the_same_prompts_are_never_told_apart(count):
    assert scores_of(CONTROL.model(), [f"x{i}" for i in range(count)])[0] == 0  # to the model all are <unk>


# ------------------------------------------------------------------------------------------------
# BLEU and CIDEr-D: slow versions, with switches that make them wrong


def exact(*numbers):
    return pytest.approx([float(x) for x in numbers], abs=1e-7)


def grams(text, k):
    found = text.split()
    return [" ".join(found[i:i + k]) for i in range(len(found) - k + 1)]


def slow_bleu(candidates, references, clip=True, brevity=True, average=False):
    logs, total, wanted = [], 0, 0
    for k in (1, 2, 3, 4):
        right = count = 0
        for text, mine in zip(candidates, references):
            found = grams(text, k)
            for i, gram in enumerate(found):  # the j-th time an n-gram comes, some reference must have it j times
                j = found[:i + 1].count(gram) if clip else 1
                right += any(grams(other, k).count(gram) >= j for other in mine)
            count += len(found)
        logs.append(math.log((right + 1e-15) / (count + 1e-9)))
    for text, mine in zip(candidates, references):
        c, lengths = len(text.split()), sorted(len(other.split()) for other in mine)
        total += c
        wanted += np.mean(lengths) if average else lengths[np.argmin([abs(c - r) for r in lengths])]
    short = 0.0
    if not total:
        short = -math.inf
    elif brevity:
        short = min(0.0, 1 - wanted / total)
    return [math.exp(short + sum(logs[:k]) / k) for k in (1, 2, 3, 4)]


def slow_cider_d(candidates, references, clip=True, sigma=6.0, idf=True):
    """Dense vectors over all n-grams there are, one axis for each."""
    total = 0.0
    for k in (1, 2, 3, 4):
        axis = sorted({gram for text in [*candidates, *sum(references, [])] for gram in grams(text, k)})
        in_images = np.array([sum(any(gram in grams(text, k) for text in mine) for mine in references) for gram in axis])
        weight = np.log(len(references)) - np.log(np.maximum(in_images, 1)) if idf else np.ones(len(axis))

        def vector(text, k=k, axis=axis, weight=weight):
            return np.array([grams(text, k).count(gram) for gram in axis]) * weight

        for text, mine in zip(candidates, references):
            for other in mine:
                x, y = vector(text), vector(other)
                norms = np.linalg.norm(x) * np.linalg.norm(y)
                gap = len(text.split()) - len(other.split())
                if norms > 0:
                    total += (np.minimum(x, y) if clip else x) @ y / norms * math.exp(-gap**2 / 2 / sigma**2) / len(mine)
    return 10 * total / 4 / len(candidates)


texts = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)
long_texts = st.lists(st.sampled_from("abcd"), min_size=4, max_size=8).map(" ".join)
sets = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5).map(
    lambda pairs: [list(part) for part in zip(*pairs)])
own_words = st.lists(st.lists(st.sampled_from("abcd"), min_size=4, max_size=8), min_size=2, max_size=4).map(
    lambda s: [" ".join(f"{word}{i}" for word in words) for i, words in enumerate(s)])  # no two images share a word


@given(sets)
def test_both_equal_the_slow_versions_and_keep_their_bounds(case):
    scores, score = bleu(*case), cider_d(*case)
    assert scores == pytest.approx(slow_bleu(*case), abs=1e-6) and all(0 <= x <= 1 for x in scores)
    assert score == pytest.approx(slow_cider_d(*case), abs=1e-9) and 0 <= score <= 10 + 1e-9


@pytest.mark.parametrize("metric, slow, wrong", [
    (bleu, slow_bleu, dict(clip=False)), (bleu, slow_bleu, dict(brevity=False)), (bleu, slow_bleu, dict(average=True)),
    (cider_d, slow_cider_d, dict(clip=False)), (cider_d, slow_cider_d, dict(sigma=99)), (cider_d, slow_cider_d, dict(idf=False))])
def test_control_a_wrong_version_differs(metric, slow, wrong):
    case = ["c c b a d", "a b x"], [["a b c d e", "c a d e e e e"], ["a b e f g h", "p q r s t u v"]]
    assert metric(*case) == pytest.approx(slow(*case))
    assert np.abs(np.subtract(metric(*case), slow(*case, **wrong))).max() > 0.01


def test_the_precisions_printed_in_the_bleu_paper():
    """Examples 1 and 2 of Papineni et al. 2002, Sec. 2.1: 17/18 and 8/14 of the words, 10/17 and 1/13 of the bigrams, 2/7."""
    references = ["it is a guide to action that ensures that the military will forever heed party commands",  # 16 words
                  "it is the guiding principle which guarantees the military forces always being under the command of the party",
                  "it is the practical guide for the army always to heed the directions of the party"]
    good = bleu(["it is a guide to action which ensures that the military always obeys the commands of the party"], [references])
    assert [good[0], good[1]**2] == exact(Fraction(17, 18), Fraction(17, 18) * Fraction(10, 17))  # 18 words: no penalty
    bad = bleu(["it is to insure the troops forever hearing the activity guidebook that party direct"], [references])
    penalty = math.exp(1 - 16 / 14)  # 14 words, the closest reference has 16
    assert [bad[0], bad[1]**2] == exact(penalty * Fraction(8, 14), penalty**2 * Fraction(8, 14) * Fraction(1, 13))
    the = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert the[:1] == exact(Fraction(2, 7))


def test_cider_d_by_hand():
    # Two images without a common word: every weight is log 2 and cancels. Of the 4, 3, 2, 1 n-grams of the first, all different,
    # 3, 2, 1, 0 are right; norms are equal: cosines 3/4, 2/3, 1/2, 0. The second has nothing.
    assert cider_d(["a b c d", "x"], [["a b c e"], ["p q"]]) == pytest.approx(10 * float(Fraction(23, 12) / 4 / 2))
    # Four images, "a" in two of them: it weighs log 2, the other words log 4, also the unseen d. Over log 2: candidate and
    # reference (1, 2, 2), norm 3, of which a and b are shared: (1 + 4) / 9. Of two bigrams one: 1/2. "b d", "a b d": wrong.
    found = cider_d(["a b d", "", "", ""], [["a b c"], ["x a"], ["y"], ["z"]])
    assert found == pytest.approx(10 * float((Fraction(5, 9) + Fraction(1, 2)) / 4 / 4))
    # Clipping and length: "a a a a" (4) against "a b" (1, 1): 1 * 1 / (4 * sqrt 2), 2 words too long.
    # Two references, of which the other has nothing in common: half of it.
    found = cider_d(["a a a a", "x"], [["a b", "c"], ["p"]])
    assert found == pytest.approx(10 * math.exp(-2**2 / 72) / (4 * math.sqrt(2)) / 4 / 2 / 2)


def test_the_numbers_of_the_public_coco_code():
    """Obtained once from pycocoevalcap 1.2 (Bleu(4), Cider()) on these texts; not computed here."""
    candidates = ["a brown dog runs on the grass", "two men are sitting on a bench", "a a dog", ""]
    references = [["a brown dog is running on the grass", "the dog runs through the green grass", "a dog runs"],
                  ["two men sit on a bench", "two men are sitting on a wooden bench in a park"],
                  ["a dog jumps over a log", "a black dog leaps", "a dog"],
                  ["a child plays", "the child is playing in the sand"]]
    numbers = [0.942873143744, 0.872930908008, 0.770381989104, 0.634089736904]
    assert bleu(candidates, references) == pytest.approx(numbers, abs=1e-9)
    assert cider_d(candidates, references) == pytest.approx(2.20811190806, abs=1e-9)
    small = bleu(["a b", "c"], [["a b"], ["d"]])  # no trigram, no 4-gram
    assert small == pytest.approx([0.666666666222, 0.816496580111, 0.00873580464057, 0.000903602003007], rel=1e-6)


@given(st.lists(st.lists(long_texts, min_size=1, max_size=3), min_size=1, max_size=4), own_words, st.randoms())
def test_a_candidate_that_is_one_of_its_references_is_perfect(references, own, pick):
    assert bleu([pick.choice(mine) for mine in references], references) == exact(1, 1, 1, 1)
    assert cider_d(own, [[text] * 2 for text in own]) == pytest.approx(10)


def test_control_what_is_not_quite_perfect():
    assert bleu(["a b c"], [["a b c"]])[2:] == pytest.approx([1, 1e-6**0.25], rel=1e-6)       # no 4-gram to be right
    assert cider_d(["a b c d", "b a d c"], [["a b c d"], ["b a d c"]]) == pytest.approx(7.5)  # words that all images have weigh 0
    assert cider_d(["a b c d", "p q r s"], [["a b c d", "x"], ["p q r s", "y"]]) == pytest.approx(5)
    assert cider_d(["a b c d"], [["a b c d"]]) == 0                                           # one image
    good, bad = ["a b c d", "p q r s"], ["p q r s", "a b c d"]
    assert bleu(bad, [[text] for text in good])[0] < 0.01 and cider_d(bad, [[text] for text in good]) == 0
    for metric in (bleu, cider_d):
        with pytest.raises(ValueError):
            metric(["a", "b"], [["a"]])


@given(sets, st.integers(0, 10_000))
def test_the_order_of_images_and_of_references_does_not_matter(case, seed):
    pick = random.Random(seed)
    order = pick.sample(range(len(case[0])), len(case[0]))
    other = [case[0][i] for i in order], [pick.sample(case[1][i], len(case[1][i])) for i in order]
    assert bleu(*other) == pytest.approx(bleu(*case)) and cider_d(*other) == pytest.approx(cider_d(*case))


@given(own_words, st.data())
def test_a_worse_candidate_scores_lower(own, data):
    """A wrong word, a missing one, all said twice."""
    words, references = own[0].split(), [[text] for text in own]
    i = data.draw(st.integers(0, len(words) - 1))
    for worse in (words[:i] + ["wrong"] + words[i + 1:], words[:-1], words * 2):
        case = [" ".join(worse), *own[1:]], references
        assert all(x < 1 - 1e-3 for x in bleu(*case)) and cider_d(*case) < 10 - 1e-3


def test_texts_without_words_score_nothing_and_break_nothing():
    for case in ([[""], [["a b"]]], [["", ""], [[""], ["", "a"]]], [["a", ""], [[""], ["a"]]]):
        assert bleu(*case) == exact(0, 0, 0, 0) and cider_d(*case) == 0


def test_n_grams_and_tokenised_by_hand():
    assert n_grams("a b a b") == [{("a",): 2, ("b",): 2}, {("a", "b"): 2, ("b", "a"): 1},
                                  {("a", "b", "a"): 1, ("b", "a", "b"): 1}, {("a", "b", "a", "b"): 1}]
    assert tokenised("A man's T-shirt, RUNNING ... (2.5 dogs)! _ & \"so\"") == "a man 's t shirt running 2.5 dogs so"
    assert tokenised(" .") == ""


@given(st.text("aB3'’.,-_ ", max_size=20))
def test_what_a_model_writes_is_tokenised_as_what_it_read(text):
    tokenizer = Tokenizer.learn([text], 99)
    assert tokenised(tokenizer.decode(tokenizer.encode([text], 99)[0])) == tokenised(text) == tokenised(tokenised(text))
