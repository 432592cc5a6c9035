"""The metrics against hand-computed cases and slow versions, and zero-shot classification end to end on a made-up model."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from data import Dataset, Tokenizer
from eval import recall, retrieval, zero_shot


class Oracle:
    """Stands in for a model: texts embed as given, by their words."""

    def __init__(self, table):
        self.table = table

    def embed(self, model, tokenizer, texts, batch=0):
        return F.normalize(torch.tensor([self.table[text] for text in texts], dtype=torch.float), dim=-1)


@pytest.fixture
def oracle(monkeypatch):
    def use(table):
        monkeypatch.setattr(evaluation, "embed_texts", Oracle(table).embed)
    return use


def test_recall_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.2],  # relevant 0: rank 1
                           [0.9, 0.1, 0.5, 0.2],  # relevant 2: rank 2
                           [0.9, 0.1, 0.5, 0.2],  # relevant 1 and 3: the better has rank 3
                           [0.9, 0.1, 0.5, 0.2]])  # relevant 1: rank 4
    found = recall(scores, [[0], [2], [1, 3], [1]], ks=(1, 2, 3, 4))
    assert [found[k][0] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    # chance of the best of two relevant among 4 items in the first K, and of one
    assert found[1][1] == pytest.approx((3 * 1 / 4 + 2 / 4) / 4)
    assert found[2][1] == pytest.approx((3 * 2 / 4 + (1 - 2 / 4 * 1 / 3)) / 4)
    assert found[4][1] == 1.0


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(3, 12))
def test_recall_equals_sorting(seed, queries, items):
    torch.manual_seed(seed)
    scores = torch.rand(queries, items)
    relevant = [torch.randperm(items)[:1 + i % 3].tolist() for i in range(queries)]
    for k, (score, _) in recall(scores, relevant).items():
        hits = [bool(set(row.argsort(descending=True)[:k].tolist()) & set(mine)) for row, mine in zip(scores, relevant)]
        assert score == pytest.approx(np.mean(hits))


def test_chance_is_what_random_scores_give():
    torch.manual_seed(0)
    relevant = [[i % 20, (i + 7) % 20] for i in range(5000)]
    for score, chance in recall(torch.rand(5000, 20), relevant).values():
        assert score == pytest.approx(chance, abs=0.03)


def test_equal_embeddings_for_everything_score_nothing():
    found = recall(torch.zeros(5, 30), [[i] for i in range(5)])
    assert all(score == 0 for score, _ in found.values())


def test_retrieval_counts_several_captions_per_image_and_shared_captions(oracle):
    oracle({"a": [1, 0, 0], "b": [0.9, 0.1, 0], "c": [0, 1, 0], "d": [0, 0, 1]})
    images = F.normalize(torch.tensor([[1.0, 0.2, 0], [0.1, 1, 0.3], [0, 0.3, 1]]), dim=-1)
    found = retrieval(images, None, None, [["a", "b"], ["c", "b"], ["d", "d"]])
    assert found["image to text"][1][0] == 1.0  # each image's nearest text is one of its own
    assert found["text to image"][1][0] == 1.0  # "b" is right for image 0 and image 1; "d" counts once
    assert found["image to text"][1][1] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    wrong = retrieval(images.roll(1, 0), None, None, [["a", "b"], ["c", "b"], ["d", "d"]])  # control
    assert wrong["image to text"][1][0] < 1


def test_zero_shot_takes_the_mean_of_the_prompts_embeddings(oracle):
    """Chosen so that the nearest single prompt would answer otherwise than the mean of a class's prompts."""
    oracle({"a x": [1, 0, 0], "the x": [-0.5, 0.8, 0], "a y": [0.8, 0, 0.6], "the y": [0.8, 0, 0.6]})
    data = Dataset(np.zeros((2, 3, 4, 4), np.uint8), [[], []], np.array([1, 0]), ["x", "y"], ["a {}", "the {}"])
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert zero_shot(images, None, None, data).tolist() == [1, 0]
    single = (images @ Oracle({"a x": [1, 0, 0], "a y": [0.8, 0, 0.6]}).embed(0, 0, ["a x", "a y"]).T).argmax(1)
    assert single.tolist() != [1, 0]


def test_recall_never_exceeds_its_number_of_items():
    found = recall(torch.rand(3, 2), [[0], [1], [0]])
    assert found[5] == (1.0, 1.0) and math.isclose(found[1][1], 0.5)


def test_the_tokenizers_plain_form_is_what_exact_captions_are_compared_in():
    tokenizer = Tokenizer.learn(["A man's dog, running."], 20)
    assert tokenizer.decode(tokenizer.encode(["A  man's dog, RUNNING."], 20)[0]) == "a man's dog, running."
