"""BLEU and CIDEr-D against hand-computed cases, slow versions written from the definitions, and the public COCO code's numbers."""
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Tokenizer
from eval import bleu, cider_d, n_grams, tokenised


def exact(*numbers):
    return pytest.approx([float(x) for x in numbers], abs=1e-7)


# Slow versions, with switches that make them wrong


def grams(text, k):
    words = text.split()
    return [" ".join(words[i:i + k]) for i in range(len(words) - k + 1)]


def slow_bleu(candidates, references, clip=True, brevity=True, average=False, add=(1e-15, 1e-9)):
    logs, total, wanted = [], 0, 0
    for k in (1, 2, 3, 4):
        right = count = 0
        for text, mine in zip(candidates, references):
            found = grams(text, k)
            for i, gram in enumerate(found):  # the j-th time an n-gram comes, some reference must have it j times
                j = found[:i + 1].count(gram) if clip else 1
                right += any(grams(other, k).count(gram) >= j for other in mine)
            count += len(found)
        logs.append(math.log((right + add[0]) / (count + add[1])))
    for text, mine in zip(candidates, references):
        c, lengths = len(text.split()), sorted(len(other.split()) for other in mine)
        total += c
        wanted += np.mean(lengths) if average else lengths[np.argmin([abs(c - r) for r in lengths])]
    short = 1 - wanted / total if total and brevity else 0.0 if total else -math.inf
    return [math.exp(min(0.0, short) + sum(logs[:k]) / k) for k in (1, 2, 3, 4)]


def slow_cider_d(candidates, references, clip=True, sigma=6.0, idf=True):
    """Dense vectors over all n-grams there are, one axis for each."""
    total = 0.0
    for k in (1, 2, 3, 4):
        axis = sorted({g for text in [*candidates, *sum(references, [])] for g in grams(text, k)})
        in_images = np.array([sum(any(g in grams(text, k) for text in mine) for mine in references) for g in axis])
        weight = np.log(len(references)) - np.log(np.maximum(in_images, 1)) if idf else np.ones(len(axis))

        def vector(text, k=k, axis=axis, weight=weight):
            return np.array([grams(text, k).count(g) for g in axis]) * weight

        for text, mine in zip(candidates, references):
            for other in mine:
                x, y = vector(text), vector(other)
                norms = np.linalg.norm(x) * np.linalg.norm(y)
                gap = len(text.split()) - len(other.split())
                if norms > 0:
                    total += (np.minimum(x, y) if clip else x) @ y / norms * math.exp(-gap**2 / 2 / sigma**2) / len(mine)
    return 10 * total / 4 / len(candidates)


# By hand

PAPER = ["it is a guide to action that ensures that the military will forever heed party commands",                      # 16 words
         "it is the guiding principle which guarantees the military forces always being under the command of the party",  # 18
         "it is the practical guide for the army always to heed the directions of the party"]                             # 16


def test_the_precisions_printed_in_the_bleu_paper():
    """Examples 1 and 2 of Papineni et al. 2002, Sec. 2.1: 17/18 and 8/14 of the words, 10/17 and 1/13 of the bigrams, 2/7."""
    good = bleu(["it is a guide to action which ensures that the military always obeys the commands of the party"], [PAPER])
    assert [good[0], good[1]**2] == exact(Fraction(17, 18), Fraction(17, 18) * Fraction(10, 17))  # 18 words: no penalty
    bad = bleu(["it is to insure the troops forever hearing the activity guidebook that party direct"], [PAPER])
    penalty = math.exp(1 - 16 / 14)  # 14 words, the closest reference has 16
    assert [bad[0], bad[1]**2] == exact(penalty * Fraction(8, 14), penalty**2 * Fraction(8, 14) * Fraction(1, 13))
    the = bleu(["the the the the the the the"], [["the cat is on the mat", "there is a cat on the mat"]])
    assert the[:1] == exact(Fraction(2, 7))


def test_bleu_by_hand():
    # Two images, counts summed before dividing. "a b c d x" has of its two references 4 of 5 words, 3 of 4 bigrams, 2 of 3
    # trigrams, 1 of 2 4-grams; "a a b" has a (once: neither has it twice) and b, of 3; "a b" of 2; 0 of 1; none of 0.
    # Lengths: 5 is as far from 4 as from 6, the shorter counts; 3 from 3. 8 words where 7 are wanted: no penalty.
    found = bleu(["a b c d x", "a a b"], [["a b c d", "q r s t u v"], ["a b q", "b a r s t u v"]])
    precisions = [Fraction(6, 8), Fraction(4, 6), Fraction(2, 4), Fraction(1, 2)]
    assert [x**n for n, x in enumerate(found, 1)] == exact(*(math.prod(precisions[:n]) for n in (1, 2, 3, 4)))


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
    assert bleu(candidates, references) == pytest.approx([0.942873143744, 0.872930908008, 0.770381989104, 0.634089736904], abs=1e-9)
    assert cider_d(candidates, references) == pytest.approx(2.20811190806, abs=1e-9)
    small = bleu(["a b", "c"], [["a b"], ["d"]])  # no trigram, no 4-gram
    assert small == pytest.approx([0.666666666222, 0.816496580111, 0.00873580464057, 0.000903602003007], rel=1e-6)


# Properties

texts = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)
long_texts = st.lists(st.sampled_from("abcd"), min_size=4, max_size=8).map(" ".join)
sets = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5).map(lambda s: [list(x) for x in zip(*s)])
own_words = st.lists(st.lists(st.sampled_from("abcd"), min_size=4, max_size=8), min_size=2, max_size=4).map(
    lambda s: [" ".join(f"{word}{i}" for word in words) for i, words in enumerate(s)])  # no two images share a word


@given(sets)
def test_both_equal_the_slow_versions_and_keep_their_bounds(case):
    scores, score = bleu(*case), cider_d(*case)
    assert scores == pytest.approx(slow_bleu(*case), abs=1e-6)
    assert score == pytest.approx(slow_cider_d(*case), abs=1e-9)
    assert all(0 <= x <= 1 for x in scores) and 0 <= score <= 10 + 1e-9


@pytest.mark.parametrize("wrong", [dict(clip=False), dict(brevity=False), dict(average=True)])
def test_control_a_wrong_bleu_differs(wrong):
    case = ["a a b c d", "a b c d"], [["a b c d e", "a b c d e f g"], ["a b c d e f", "a b c d e f g h i"]]
    assert bleu(*case) == pytest.approx(slow_bleu(*case))
    assert all(abs(x - y) > 0.01 for x, y in zip(bleu(*case)[:1], slow_bleu(*case, **wrong)))


@pytest.mark.parametrize("wrong", [dict(clip=False), dict(sigma=math.inf), dict(idf=False)])
def test_control_a_wrong_cider_d_differs(wrong):
    case = ["c c b a d", "a b"], [["a b c d", "c a d"], ["a b e f g h", "e"]]
    assert cider_d(*case) == pytest.approx(slow_cider_d(*case))
    assert abs(cider_d(*case) - slow_cider_d(*case, **wrong)) > 0.01


@given(st.lists(st.lists(long_texts, min_size=1, max_size=3), min_size=1, max_size=4), st.randoms())
def test_a_candidate_that_is_one_of_its_references_has_bleu_1(references, pick):
    assert bleu([pick.choice(mine) for mine in references], references) == exact(1, 1, 1, 1)


def test_control_below_four_words_there_is_no_4_gram_to_be_right():
    assert bleu(["a b c"], [["a b c"]])[2:] == pytest.approx([1, 1e-6**0.25], rel=1e-6)


@given(own_words, st.integers(1, 3))
def test_the_only_reference_itself_has_cider_d_10_if_images_share_no_words(own, times):
    assert cider_d(own, [[text] * times for text in own]) == pytest.approx(10)


def test_control_cider_d_below_10():
    assert cider_d(["a b c d", "b a d c"], [["a b c d"], ["b a d c"]]) == pytest.approx(7.5)  # words that all images have weigh 0
    assert cider_d(["a b c", "p q r"], [["a b c"], ["p q r"]]) == pytest.approx(7.5)          # no 4-grams
    assert cider_d(["a b c d", "p q r s"], [["a b c d", "x"], ["p q r s", "y"]]) == pytest.approx(5)
    assert cider_d(["a b c d"], [["a b c d"]]) == 0                                           # one image


@given(sets, st.integers(0, 10_000))
def test_the_order_of_images_and_of_references_does_not_matter(case, seed):
    pick = random.Random(seed)
    order = pick.sample(range(len(case[0])), len(case[0]))
    other = [case[0][i] for i in order], [pick.sample(case[1][i], len(case[1][i])) for i in order]
    assert bleu(*other) == pytest.approx(bleu(*case))
    assert cider_d(*other) == pytest.approx(cider_d(*case))


def test_control_the_pairing_matters():
    good, bad = (["a b c d", "p q r s"], [["a b c d"], ["p q r s"]]), (["p q r s", "a b c d"], [["a b c d"], ["p q r s"]])
    assert bleu(*good)[0] > 0.99 and bleu(*bad)[0] < 0.01 and cider_d(*bad) == 0
    for metric in (bleu, cider_d):
        with pytest.raises(ValueError):
            metric(["a", "b"], [["a"]])


@given(own_words, st.data())
def test_a_worse_candidate_scores_lower(own, data):
    """A wrong word, a missing one, all said twice."""
    words, references = own[0].split(), [[text] for text in own]
    i = data.draw(st.integers(0, len(words) - 1))
    for worse in (words[:i] + ["wrong"] + words[i + 1:], words[:-1], words * 2):
        case = [" ".join(worse), *own[1:]], references
        assert all(x < 1 - 1e-3 for x in bleu(*case)) and cider_d(*case) < 10 - 1e-3


def test_control_without_penalty_or_clipping_a_worse_candidate_is_not_lower():
    assert slow_bleu(["a b c d"], [["a b c d e"]], brevity=False) == exact(1, 1, 1, 1)
    assert slow_bleu(["a b c d a b c d"], [["a b c d"]], clip=False)[0] == pytest.approx(1)


def test_texts_without_words_score_nothing_and_break_nothing():
    for case in ([[""], [["a b"]]], [["", ""], [[""], ["", "a"]]], [["a", ""], [[""], ["a"]]]):
        assert bleu(*case) == exact(0, 0, 0, 0) and cider_d(*case) == 0


def test_n_grams_are_counted_by_length():
    assert n_grams("a b a b") == [{("a",): 2, ("b",): 2}, {("a", "b"): 2, ("b", "a"): 1},
                                  {("a", "b", "a"): 1, ("b", "a", "b"): 1}, {("a", "b", "a", "b"): 1}]


def test_tokenised_by_hand():
    assert tokenised("A man's T-shirt, RUNNING ... (2 dogs)! _ & \"so\"") == "a man 's t shirt running 2 dogs so"
    assert tokenised(" .") == ""


@given(st.text("aB3'’.,-_ ", max_size=20))
def test_what_a_model_writes_is_tokenised_as_what_it_read(text):
    tokenizer = Tokenizer.learn([text], 99)
    assert tokenised(tokenizer.decode(tokenizer.encode([text], 99)[0])) == tokenised(text) == tokenised(tokenised(text))
