"""Greedy generation is the argmax under teacher forcing, sampling keeps to its sets."""
import math

import pytest
import torch
from helpers import CONTROL, VOCAB, cases, fails, logits_of
from hypothesis import given
from hypothesis import strategies as st

from coca import BEGIN, END, PAD, sample


def check_greedy(case, shift=0):
    """Every token is the likeliest after those before it, up to the first END or PAD."""
    model, images, _ = case.example()
    tokens = model.generate(images)
    assert tokens.shape[1] <= model.config.text_len
    for row, logits in zip(tokens, logits_of(model, images, tokens)):
        n = int((row != PAD).sum())
        assert row[0] == BEGIN and END not in row[:n - 1] and (row[n:] == PAD).all()
        for t in range(1, n):
            assert row[t] == logits[t - 1 + shift].argmax()
        if n < len(row):  # it ended: by END, or because padding was the likeliest
            assert row[n - 1] == END or logits[n - 1].argmax() == PAD


@given(cases())
def test_greedy_generation_is_the_argmax_under_teacher_forcing_to_the_last_token(case):
    check_greedy(case)


@given(cases(), st.integers(2, 12))
def test_a_caption_depends_neither_on_max_len_nor_on_the_rest_of_the_batch(case, max_len):
    model, images, _ = case.example()
    together = model.generate(images)
    assert torch.equal(model.generate(images, max_len), together[:, :max_len])
    for image, row in zip(images, together):
        alone = model.generate(image[None])[0]
        assert torch.equal(alone, row[:len(alone)]) and (row[len(alone):] == PAD).all()
    for temperature in (0.0, 1.0):
        assert len(model.generate(images[:0], max_len, temperature)) == 0


@torch.no_grad()
def test_generation_stops_at_end_of_text():
    model = CONTROL.model()
    model.multimodal.norm.weight.zero_()
    model.multimodal.norm.bias.fill_(1.0)
    model.multimodal.head.weight.zero_()
    model.multimodal.head.weight[5] = 1.0
    assert model.generate(CONTROL.images()).shape == (3, 9)  # control: a model that never ends
    model.multimodal.head.weight[END] = 2.0
    assert model.generate(CONTROL.images()).tolist() == [[BEGIN, END]] * 3


def check_sampling(seed, k, temperature, allowed):
    """No token is drawn that has `allowed` likelier ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, VOCAB, generator=generator)
    for _ in range(5):
        for row, token in zip(logits, sample(logits, temperature, k, generator=generator)):
            assert (row > row[token]).sum() < allowed


@given(st.integers(0, 999), st.integers(1, VOCAB), st.floats(0.1, 3.0))
def test_sampling_keeps_to_top_k(seed, k, temperature):
    check_sampling(seed, k, temperature, k)


def test_control_logits_shifted_by_one_and_tokens_outside_top_k_are_caught():
    with fails:
        check_greedy(CONTROL, shift=-1)
    for k in (0, 3):
        with fails:
            check_sampling(0, k, 1.0, 2)


def test_sampling_follows_the_distribution_of_what_it_keeps_and_repeats_with_its_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(6000, 3)
    p = (logits[0] / 0.5).softmax(-1)                                   # 0.02, 0.12, 0.87
    for settings, kept in ((dict(), 3), (dict(top_k=2), 2)):
        drawn = sample(logits, 0.5, generator=torch.Generator().manual_seed(0), **settings)
        again = sample(logits, 0.5, generator=torch.Generator().manual_seed(0), **settings)
        assert torch.equal(drawn, again)
        share = torch.bincount(drawn, minlength=3)[-kept:] / 6000
        torch.testing.assert_close(share, p[-kept:] / p[-kept:].sum(), atol=0.02, rtol=0)
    for temperature, top_k in ((0.0, 0), (1e-4, 0), (1.0, 1)):
        assert (sample(logits, temperature, top_k) == 2).all()


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=-1), dict(max_len=0)])
def test_senseless_settings_are_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*, not .*{value}"):
        CONTROL.model().generate(CONTROL.images(), **wrong)
