"""Recall, zero-shot, retrieval, BLEU and CIDEr-D against hand-computed cases and slow versions."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, fails
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from data import Dataset, Tokenizer
from eval import bleu, cider_d, embed_images, n_grams, recall, retrieval, tokenised, zero_shot

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
    found = recall(torch.full((5, 30), value), [[i] for i in range(5)])
    assert {score for score, _ in found.values()} == {0}
    rest = torch.full((1, 30), value)
    rest[0, 3] = 1.0  # control: one good score
    assert recall(rest, [[3]])[1][0] == (value == 0)
    assert recall(torch.full((2, 4), value), [[0], [1]])[5] == (value == 0, 1.0)  # of 4 items all are among 5


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
    """Chosen so that the nearest single prompt would answer otherwise."""
    look_up = embed({"a x": [1, 0, 0], "the x": [-0.5, 0.8, 0], "a y": [0.8, 0, 0.6], "the y": [0.8, 0, 0.6]})
    data = Dataset(np.zeros((2, 3, 4, 4)), [], None, ["x", "y"], ["a {}", "the {}"])
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


def grams(text, k):
    found = text.split()
    return [" ".join(found[i:i + k]) for i in range(len(found) - k + 1)]


def slow_bleu(candidates, references, clip=True, brevity=True, average=False):
    logs, total, wanted = [], 0, 0
    for k in (1, 2, 3, 4):
        right = count = 0
        for text, mine in zip(candidates, references):
            found = grams(text, k)
            count += len(found)
            for i, gram in enumerate(found):  # the j-th time it comes, some reference must have it j times
                j = found[:i + 1].count(gram) if clip else 1
                right += any(grams(other, k).count(gram) >= j for other in mine)
        logs.append(math.log((right + 1e-15) / (count + 1e-9)))
    for text, mine in zip(candidates, references):
        c, lengths = len(text.split()), sorted(len(other.split()) for other in mine)
        total += c
        wanted += np.mean(lengths) if average else lengths[np.argmin([abs(c - r) for r in lengths])]
    if not total:
        return [0.0] * 4
    penalty = min(0.0, 1 - wanted / total) if brevity else 0.0
    return [math.exp(penalty + sum(logs[:k]) / k) for k in (1, 2, 3, 4)]


def slow_cider_d(candidates, references, clip=True, sigma=6.0, idf=True):
    """Dense vectors over all n-grams there are, one axis for each."""
    total = 0.0
    for k in (1, 2, 3, 4):
        images = [{gram for text in texts for gram in grams(text, k)} for texts in references]
        axis = sorted(set().union(*images, *(grams(text, k) for text in candidates)))
        weight = np.ones(len(axis))
        if idf:
            having = [max(1, sum(gram in own for own in images)) for gram in axis]
            weight = np.log(len(images) / np.array(having))
        for text, mine in zip(candidates, references):
            x = np.array([grams(text, k).count(gram) for gram in axis]) * weight
            for other in mine:
                y = np.array([grams(other, k).count(gram) for gram in axis]) * weight
                gap = len(text.split()) - len(other.split())
                dot = (np.minimum(x, y) if clip else x) @ y * math.exp(-gap**2 / 2 / sigma**2)
                total += dot / (np.linalg.norm(x) * np.linalg.norm(y) or 1) / len(mine)
    return 10 * total / 4 / len(candidates)


texts = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)
pairs = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


@given(pairs)
def test_both_equal_the_slow_versions_and_keep_their_bounds(pairs):
    case = [candidate for candidate, _ in pairs], [references for _, references in pairs]
    scores, score = bleu(*case), cider_d(*case)
    assert scores == pytest.approx(slow_bleu(*case), abs=1e-6) and all(0 <= x <= 1 for x in scores)
    assert score == pytest.approx(slow_cider_d(*case), abs=1e-9) and 0 <= score <= 10 + 1e-9


@pytest.mark.parametrize("metric, slow, wrong", [
    (bleu, slow_bleu, dict(clip=False)), (bleu, slow_bleu, dict(brevity=False)),
    (bleu, slow_bleu, dict(average=True)), (cider_d, slow_cider_d, dict(clip=False)),
    (cider_d, slow_cider_d, dict(sigma=99)), (cider_d, slow_cider_d, dict(idf=False))])
def test_control_a_wrong_version_differs(metric, slow, wrong):
    candidates = ["c c b a d", "a b x"]
    references = [["a b c d e", "c a d e e e e"], ["a b e f g h", "p q r s t u v"]]
    right = metric(candidates, references)
    assert right == pytest.approx(slow(candidates, references))
    assert np.abs(np.subtract(right, slow(candidates, references, **wrong))).max() > 0.01


def test_the_numbers_of_the_public_coco_code():
    """Obtained once from pycocoevalcap 1.2 (Bleu(4), Cider()) on these texts; not computed here."""
    candidates = ["a brown dog runs on the grass", "two men are sitting on a bench", "a a dog", ""]
    references = [
        ["a brown dog is running on the grass", "the dog runs through the green grass", "a dog runs"],
        ["two men sit on a bench", "two men are sitting on a wooden bench in a park"],
        ["a dog jumps over a log", "a black dog leaps", "a dog"],
        ["a child plays", "the child is playing in the sand"]]
    numbers = [0.942873143744, 0.872930908008, 0.770381989104, 0.634089736904]
    assert bleu(candidates, references) == pytest.approx(numbers, abs=1e-9)
    assert cider_d(candidates, references) == pytest.approx(2.20811190806, abs=1e-9)
    small = bleu(["a b", "c"], [["a b"], ["d"]])  # no trigram, no 4-gram
    assert small == pytest.approx([0.666666666222, 0.816496580111, 0.00873580464057, 0.000903602003007])


def test_the_best_and_the_worst():
    own, other = ["a b c d", "p q r s"], ["p q r s", "a b c d"]
    references = [[text, text] for text in own]
    assert bleu(own, references) == pytest.approx([1, 1, 1, 1])
    assert cider_d(own, references) == pytest.approx(10)
    assert bleu(other, references)[0] < 0.01 and cider_d(other, references) == 0
    assert cider_d(["a b", "b a"], [["a b"], ["b a"]]) == pytest.approx(2.5)  # words that all have weigh 0
    assert cider_d(own[:1], references[:1]) == 0  # one image
    for case in ([[""], [["a b"]]], [["", ""], [[""], ["", "a"]]], [["a", ""], [[""], ["a"]]]):  # no words
        assert max(bleu(*case)) < 1e-7 and cider_d(*case) == 0
    for metric in (bleu, cider_d):
        with pytest.raises(ValueError):
            metric(["a", "b"], [["a"]])


def test_n_grams_and_tokenised_by_hand():
    assert n_grams("a b a b") == [{("a",): 2, ("b",): 2}, {("a", "b"): 2, ("b", "a"): 1},
                                  {("a", "b", "a"): 1, ("b", "a", "b"): 1}, {("a", "b", "a", "b"): 1}]
    text = "A man's T-shirt, RUNNING ... (2.5 dogs)! _ & \"so\""
    assert tokenised(text) == "a man 's t shirt running 2.5 dogs so" and tokenised(" .") == ""


@given(st.text("aB3'’.,-_ ", max_size=20))
def test_what_a_model_writes_is_tokenised_as_what_it_read(text):
    tokenizer = Tokenizer.learn([text], 99)
    written = tokenizer.decode(tokenizer.encode([text], 99)[0])
    assert tokenised(written) == tokenised(text) == tokenised(tokenised(text))
