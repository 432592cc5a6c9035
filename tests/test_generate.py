"""Generation: greedy is the argmax under teacher forcing, sampling keeps to its sets, captions end where they should."""
import pytest
import torch
from helpers import CONTROL, VOCAB, cases
from hypothesis import given
from hypothesis import strategies as st

from coca import BEGIN, END, PAD, choose

fails = pytest.raises(AssertionError)


def check_greedy(case, shift=0):
    model, images = case.model(), case.images()
    tokens = model.generate(images)
    logits = model(images, tokens).logits
    for row, logit in zip(tokens, logits):
        n = int((row != PAD).sum())
        assert row[0] == BEGIN and (row[n:] == PAD).all()
        for t in range(1, n):
            assert row[t] == logit[t - 1 + shift].argmax()
        assert END not in row[:n - 1]
        if n < len(row):  # it ended: by END, or because padding was the likeliest
            assert row[n - 1] == END or logit[n - 1].argmax() == PAD
    assert tokens.shape[1] <= model.config.text_len


@given(cases())
def test_greedy_generation_is_the_argmax_under_teacher_forcing_to_the_last_token(case):
    check_greedy(case)


def test_control_logits_shifted_by_one_are_caught():
    with fails:
        check_greedy(CONTROL, shift=-1)


@given(cases(), st.integers(2, 9))
def test_max_len_cuts_without_changing_what_comes_before(case, max_len):
    model, images = case.model(), case.images()
    whole, cut = model.generate(images), model.generate(images, max_len=max_len)
    assert torch.equal(cut, whole[:, :max_len])


@given(cases())
def test_a_caption_does_not_depend_on_the_rest_of_the_batch(case):
    model, images = case.model(), case.images()
    together = model.generate(images)
    for image, row in zip(images, together):
        alone = model.generate(image[None])[0]
        assert torch.equal(alone, row[:len(alone)]) and (row[len(alone):] == PAD).all()


def check_ends(model, images):
    tokens = model.generate(images)
    assert tokens.tolist() == [[BEGIN, END]] * len(images)


def test_generation_stops_at_end_of_text():
    model, images = CONTROL.model(), CONTROL.images()
    with torch.no_grad():
        model.multimodal.norm.weight.zero_()
        model.multimodal.norm.bias.fill_(1.0)
        model.multimodal.head.weight.zero_()
        model.multimodal.head.weight[5] = 1.0
        with fails:  # control: a model that never ends
            check_ends(model, images)
        model.multimodal.head.weight[END] = 2.0
    check_ends(model, images)


@given(st.integers(0, 10_000), st.integers(1, VOCAB), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
def test_sampling_keeps_to_top_k_and_top_p(seed, k, top_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, VOCAB, generator=generator)
    p = (logits / temperature).softmax(-1)
    for _ in range(5):
        drawn = choose(logits, temperature, k, top_p, generator)
        for row, token in zip(p, drawn):
            likelier = row[row > row[token]]
            assert len(likelier) < k
            assert likelier.sum() < top_p * row.topk(k).values.sum().clamp(max=1) + 1e-5 or likelier.sum() < top_p


def test_sampling_follows_the_distribution_and_repeats_with_its_generator():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(6000, 3)
    drawn = choose(logits, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, choose(logits, 0.5, generator=torch.Generator().manual_seed(0)))
    share = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(share, (logits[0] / 0.5).softmax(-1), atol=0.02, rtol=0)
    assert (choose(logits, 1e-4) == 2).all() and (choose(logits, 1.0, top_k=1) == 2).all() and (choose(logits, 1.0, top_p=0.01) == 2).all()


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(max_len=0)])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CONTROL.model().generate(CONTROL.images(), **wrong)
