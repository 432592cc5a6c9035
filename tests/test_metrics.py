"""Recall, zero-shot, retrieval, BLEU and CIDEr-D by hand and as the COCO code has them."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL

import eval as evaluation
from data import Dataset, Tokenizer
from eval import bleu, cider_d, embed_images, recall, retrieval, tokenised, zero_shot

# Recall, retrieval, zero-shot classification


def test_recall_by_hand():
    row = torch.tensor([0.9, 0.1, 0.5, 0.2])  # ranks 1, 4, 2, 3
    found = recall(row.expand(4, 4), [[0], [2], [1, 3], [1]], ks=(1, 2, 3, 4))
    assert [found[k][0] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    # by chance: of one relevant item among 4, and of the better of two
    assert found[1][1] == pytest.approx((3 * 1 / 4 + 2 / 4) / 4)
    assert found[2][1] == pytest.approx((3 * 2 / 4 + (1 - 2 / 4 * 1 / 3)) / 4)
    assert found[4][1] == 1.0
    assert recall(torch.rand(3, 2), [[0], [1], [0]])[5] == (1.0, 1.0)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_scores_and_nan_are_never_right(value):
    found = recall(torch.full((5, 30), value), [[i] for i in range(5)])
    assert {score for score, _ in found.values()} == {0}
    rest = torch.full((1, 30), value)
    rest[0, 3] = 1.0  # control: one good score
    assert recall(rest, [[3]])[1][0] == (value == 0)
    few = torch.full((2, 4), value)  # of 4 items all are among 5
    assert recall(few, [[0], [1]])[5] == (value == 0, 1.0)


@pytest.fixture
def embed(monkeypatch):
    """Makes texts embed as a table says."""
    def use(table):
        def look_up(model, tokenizer, texts):
            rows = [table[text] for text in texts]
            return F.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)
        monkeypatch.setattr(evaluation, "embed_texts", look_up)
        return look_up
    return use


def test_retrieval_counts_several_captions_per_image_and_shared_captions(embed):
    embed({"a": [1, 0, 0], "b": [0.9, 0.1, 0], "c": [0, 1, 0], "d": [0, 0, 1]})
    images = F.normalize(torch.tensor([[1.0, 0.2, 0], [0.1, 1, 0.3], [0, 0.3, 1]]), dim=-1)
    texts = [["a", "b"], ["c", "b"], ["d", "d"]]
    found = retrieval(images, None, None, texts)
    assert found["image to text"][1][0] == 1.0  # each image's nearest text is one of its own
    # "b" is right for image 0 and image 1; "d" counts once
    assert found["text to image"][1][0] == 1.0
    assert found["image to text"][1][1] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert retrieval(images.roll(1, 0), None, None, texts)["image to text"][1][0] < 1  # control


def test_zero_shot_takes_the_mean_of_the_prompts_embeddings(embed):
    """Chosen so that the nearest single prompt would answer otherwise."""
    look_up = embed({"a x": [1, 0, 0], "the x": [-0.5, 0.8, 0],
                     "a y": [0.8, 0, 0.6], "the y": [0.8, 0, 0.6]})
    data = Dataset(np.zeros((2, 3, 4, 4)), [], None, ["x", "y"], ["a {}", "the {}"])
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert zero_shot(images, None, None, data).tolist() == [1, 0]
    assert (images @ look_up(None, None, ["a x", "a y"]).T).argmax(1).tolist() != [1, 0]


TOKENIZER = Tokenizer(["<pad>", "<begin>", "<end>", "<unk>", *"abcdefghi"])


def said(model, classes):
    """Share of 20 images of which the model says a class."""
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    data = Dataset(images, [], None, classes, ["a {}", "b {} a"])
    with torch.no_grad():
        predicted = zero_shot(embed_images(model, images), model, TOKENIZER, data)
    return (predicted >= 0).float().mean().item()


def test_a_model_of_nans_says_nothing():
    model = CONTROL.model()
    assert said(model, ["c", "d", "e"]) == 1  # control
    torch.nn.init.constant_(model.contrastive_pooler.norm.bias, math.nan)
    assert said(model, ["c", "d", "e"]) == 0


@pytest.mark.parametrize("count", [2, 10, 100])
def test_classes_with_the_same_prompts_are_never_told_apart(count):
    assert said(CONTROL.model(), [f"x{i}" for i in range(count)]) == 0  # to the model all are <unk>


# BLEU and CIDEr-D


def test_the_numbers_of_the_public_coco_code():
    """Obtained once from pycocoevalcap 1.2 (Bleu(4), Cider()) on these texts; not computed here."""
    candidates = ["a brown dog runs on the grass", "two men are sitting on a bench", "a a dog", ""]
    references = [
        ["a brown dog is running on the grass", "the dog runs through the green grass",
         "a dog runs"],
        ["two men sit on a bench", "two men are sitting on a wooden bench in a park"],
        ["a dog jumps over a log", "a black dog leaps", "a dog"],
        ["a child plays", "the child is playing in the sand"]]
    numbers = [0.942873143744, 0.872930908008, 0.770381989104, 0.634089736904]
    assert bleu(candidates, references) == pytest.approx(numbers, abs=1e-9)
    assert cider_d(candidates, references) == pytest.approx(2.20811190806, abs=1e-9)
    numbers = [0.666666666222, 0.816496580111, 0.00873580464057, 0.000903602003007]
    assert bleu(["a b", "c"], [["a b"], ["d"]]) == pytest.approx(numbers)  # no trigram, no 4-gram


def test_bleu_by_hand():
    def bleu_1(candidate, *references):
        return bleu([candidate], [references])[0]

    assert bleu_1("a a a b", "a b c d", "a c a d") == pytest.approx(3 / 4)  # a counts twice
    assert bleu_1("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2))  # too short
    assert bleu_1("a b c", "a b c d e f", "a b") == pytest.approx(1)  # of the nearest length
    assert bleu_1("a b c", "a b c d", "a b") == pytest.approx(1)  # as near: the shorter


def test_the_best_and_the_worst():
    own, other = ["a b c d", "p q r s"], ["p q r s", "a b c d"]
    references = [[text, text] for text in own]
    assert bleu(own, references) == pytest.approx([1, 1, 1, 1])
    assert cider_d(own, references) == pytest.approx(10)
    assert bleu(other, references)[0] < 0.01 and cider_d(other, references) == 0
    repeated = 10 / 4 * 0.5 * math.exp(-1 / 72) / 2  # saying it more often does not help
    assert cider_d(["b b", ""], [["b"], ["c"]]) == pytest.approx(repeated)
    # words that all images have weigh 0
    assert cider_d(["a b", "b a"], [["a b"], ["b a"]]) == pytest.approx(2.5)
    assert cider_d(own[:1], references[:1]) == 0  # one image
    for case in ([[""], [["a b"]]], [["", ""], [[""], ["", "a"]]], [["a", ""], [[""], ["a"]]]):
        assert max(bleu(*case)) < 1e-7 and cider_d(*case) == 0  # no words
    for metric in (bleu, cider_d):
        with pytest.raises(ValueError):
            metric(["a", "b"], [["a"]])


def test_tokenised_by_hand():
    text = "A man's T-shirt, RUNNING ... (2.5 dogs)! _ & \"so\""
    assert tokenised(text) == "a man 's t shirt running 2.5 dogs so"
    assert tokenised(" .") == ""
