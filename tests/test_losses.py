"""Eqs. (2), (3) and (4) against slow loops written from the equations, their symmetries and reference points."""
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, VOCAB, cases
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import PAD, captioning_loss, contrastive_loss

fails = pytest.raises(AssertionError)
seeds, temperatures = st.integers(0, 10_000), st.floats(0.01, 1.0)


def embeddings(seed, N, E=5):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, N, E, generator=generator, dtype=torch.float64), dim=-1)


def slow_contrastive(x, y, s):
    """Eq. (2), term by term."""
    N, total = len(x), 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(N):
            total += math.log(math.exp(a[i] @ b[i] / s) / sum(math.exp(a[i] @ b[j] / s) for j in range(N)))
    return -total / N


def check_contrastive(seed, N, s, loss=contrastive_loss):
    x, y = embeddings(seed, N)
    assert loss(x, y, s).item() == pytest.approx(slow_contrastive(x, y, s))


@given(seeds, st.integers(1, 7), temperatures)
def test_contrastive_loss_equals_equation_2(seed, N, s):
    check_contrastive(seed, N, s)


@pytest.mark.parametrize("wrong", [
    lambda x, y, s: F.cross_entropy(x @ y.T / s, torch.arange(len(x))),  # one direction only
    lambda x, y, s: contrastive_loss(x, y, s) / 2,  # averaged as in CLIP
    lambda x, y, s: contrastive_loss(x, y, 1 / s),  # multiplied by the temperature
    lambda x, y, s: contrastive_loss(x, y.roll(1, 0), s),  # labels shifted
])
def test_control_wrong_contrastive_losses_are_caught(wrong):
    with fails:
        check_contrastive(0, 5, 0.3, wrong)


@given(seeds, st.integers(1, 7), temperatures, st.randoms())
def test_contrastive_loss_is_unchanged_by_swapping_towers_or_permuting_pairs(seed, N, s, random):
    x, y = embeddings(seed, N)
    order = random.sample(range(N), N)
    ids = torch.tensor([random.randrange(3) for _ in range(N)])
    loss = contrastive_loss(x, y, s, ids)
    torch.testing.assert_close(contrastive_loss(y, x, s, ids), loss)
    torch.testing.assert_close(contrastive_loss(x[order], y[order], s, ids[order]), loss)
    if N > 2:  # control: moving one side alone does matter
        assert not torch.isclose(contrastive_loss(x.roll(1, 0), y, s), contrastive_loss(x, y, s))


@given(st.integers(1, 9), temperatures)
def test_contrastive_loss_of_identical_embeddings_is_2_log_n(N, s):
    same = F.normalize(torch.ones(N, 4), dim=-1)
    assert contrastive_loss(same, same, s).item() == pytest.approx(2 * math.log(N), abs=1e-5)


@given(seeds, st.integers(2, 6))
def test_contrastive_loss_stays_finite_at_extreme_temperatures(seed, N):
    x, y = embeddings(seed, N).float()
    for s in (1e-6, 0.01, 1.0, 1e6):
        x.requires_grad_().grad = None
        loss = contrastive_loss(x, y, s)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(N)))


def slow_duplicates(x, y, s, ids):
    """Cross-entropy to a target uniform over the identical captions, less the target's entropy."""
    N, total = len(x), 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(N):
            positives = [j for j in range(N) if ids[j] == ids[i]]
            z = sum(math.exp(a[i] @ b[j] / s) for j in range(N))
            for j in positives:
                total -= math.log(math.exp(a[i] @ b[j] / s) / z) / len(positives)
            total -= math.log(len(positives))
    return total / N


@given(seeds, st.lists(st.integers(0, 3), min_size=2, max_size=7), temperatures)
def test_identical_captions_are_each_others_positives(seed, ids, s):
    x, y = embeddings(seed, len(ids))
    assert contrastive_loss(x, y, s, torch.tensor(ids)).item() == pytest.approx(slow_duplicates(x, y, s, ids))
    if len(set(ids)) < len(ids):  # control
        assert contrastive_loss(x, y, s).item() != pytest.approx(slow_duplicates(x, y, s, ids))


def test_class_names_can_reach_zero_with_duplicates_as_positives_and_1_9_a_direction_without():
    """64 images of 10 classes, embedded perfectly."""
    labels = torch.arange(64) % 10
    perfect = torch.eye(10)[labels]
    assert contrastive_loss(perfect, perfect, 0.01, labels).item() == pytest.approx(0, abs=1e-4)
    assert contrastive_loss(perfect, perfect, 0.01).item() / 2 == pytest.approx(1.86, abs=0.01)


@given(cases())
def test_the_model_marks_identical_captions(case):
    """Two images with one caption: the loss is that with ids, and not Eq. (2) with one-hot targets."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    tokens[1] = tokens[0]
    out = model(images, tokens)
    ids = torch.tensor([0, 0, *range(1, len(tokens) - 1)])
    con = model.losses(images, tokens).con
    torch.testing.assert_close(con, contrastive_loss(out.image_embedding, out.text_embedding, model.temperature, ids))
    assert not torch.isclose(con, contrastive_loss(out.image_embedding, out.text_embedding, model.temperature))


# Eq. (3)


def slow_captioning(logits, tokens):
    """Eq. (3): every real token but the first, predicted from those before it."""
    terms = []
    for row, logit in zip(tokens.tolist(), logits.tolist()):
        for t in range(1, len(row)):
            if row[t] != PAD:
                z = sum(math.exp(v) for v in logit[t - 1])
                terms.append(-math.log(math.exp(logit[t - 1][row[t]]) / z))
    return sum(terms) / len(terms)


def check_captioning(case, loss=captioning_loss):
    tokens = case.tokens(extra=1)
    logits = torch.randn(*tokens.shape, VOCAB, generator=torch.Generator().manual_seed(case.seed))
    assert loss(logits, tokens).item() == pytest.approx(slow_captioning(logits, tokens), rel=1e-5)


@given(cases())
def test_captioning_loss_equals_equation_3(case):
    check_captioning(case)


@pytest.mark.parametrize("wrong", [
    lambda logits, tokens: F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD),  # labels not shifted
    lambda logits, tokens: F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),  # padding counted
    lambda logits, tokens: F.cross_entropy(logits[:, 1:].flatten(0, 1), tokens[:, :-1].flatten(), ignore_index=PAD),  # backwards
    lambda logits, tokens: captioning_loss(logits, tokens) * (tokens[:, 1:] != PAD).sum() / tokens[:, 1:].numel(),  # mean over pads
    lambda logits, tokens: captioning_loss(logits[:, :-2], tokens[:, :-2]),  # the last token left out
])
def test_control_wrong_captioning_losses_are_caught(wrong):
    with fails:
        check_captioning(CONTROL, wrong)


@given(cases())
def test_captioning_loss_of_flat_logits_is_log_v_and_pads_count_for_nothing(case):
    tokens = case.tokens(extra=2)
    flat = torch.zeros(*tokens.shape, VOCAB)
    assert captioning_loss(flat, tokens).item() == pytest.approx(math.log(VOCAB), rel=1e-5)
    logits = torch.randn(flat.shape, requires_grad=True)
    loss = captioning_loss(logits, tokens)
    grad, = torch.autograd.grad(loss, logits)
    has_target = F.pad(tokens[:, 1:] != PAD, (0, 1))
    assert ((grad.abs().sum(-1) > 0) == has_target).all()
    garbage = torch.where(has_target[..., None], logits, 1e4)
    assert torch.equal(captioning_loss(garbage, tokens), loss)
    assert captioning_loss(logits, torch.zeros_like(tokens)).item() == 0  # no target at all: 0, not NaN


# Eq. (4) and one forward for both


@given(cases(), st.floats(0, 4), st.floats(0.1, 4))
def test_the_total_is_linear_in_the_lambdas(case, lambda_con, lambda_cap):
    model = case.model(lambda_con=lambda_con, lambda_cap=lambda_cap)
    loss = model.losses(case.images(), case.tokens())
    torch.testing.assert_close(loss.total, lambda_con * loss.con + lambda_cap * loss.cap)
    default = case.model().losses(case.images(), case.tokens())
    torch.testing.assert_close(default.total, default.con + 2 * default.cap)  # the paper's weights
    torch.testing.assert_close((loss.con, loss.cap), (default.con, default.cap))


@given(cases())
def test_losses_are_those_of_the_forward_pass(case):
    model, images, tokens = case.model(), case.images(), case.tokens()
    out, loss = model(images, tokens), model.losses(images, tokens)
    assert out.logits.shape == (*tokens.shape, VOCAB)
    torch.testing.assert_close(loss.cap, captioning_loss(out.logits, tokens))
    torch.testing.assert_close(out.image_embedding, model.encode_image(images))
    torch.testing.assert_close(out.text_embedding, model.encode_text(tokens))


@given(cases())
def test_one_encoder_pass_serves_both_losses(case):
    model = case.model()
    with mock.patch.object(coca.ImageEncoder, "forward", autospec=True, side_effect=coca.ImageEncoder.forward) as encoder, \
            mock.patch.object(coca.UnimodalDecoder, "forward", autospec=True, side_effect=coca.UnimodalDecoder.forward) as text:
        model.losses(case.images(), case.tokens())
    assert encoder.call_count == text.call_count == 1


def gradients(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {name for (name, _), grad in zip(model.named_parameters(), grads) if grad is not None and grad.abs().max() > 1e-12}


@given(cases(shortest=4))
def test_each_loss_trains_its_parts_and_both_train_the_image_encoder(case):
    """lambda_cap = 0 is a dual encoder, lambda_con = 0 an image captioner (Sec. 1); every parameter has a use."""
    model, images, tokens = case.model(torch.float64), case.images(torch.float64), case.tokens()
    losses = model.losses(images, tokens)
    con, cap = (gradients(model, loss) for loss in (losses.con, losses.cap))
    idle = set()
    if case.n_query == 1:  # a single pooled token leaves attention to it no choice, so who asks does not matter
        idle = {name for name, _ in model.named_parameters() if "norm2" in name} | {"contrastive_pooler.query"}
    assert con | cap | idle == {name for name, _ in model.named_parameters()}
    parts = lambda names: {name.split(".")[0] for name in names}  # noqa: E731
    shared = {"encoder", "unimodal"} | ({"generative_pooler"} if case.n_query and case.pooler == "cascade" else set())
    assert parts(con) == shared | {"contrastive_pooler", "log_temperature"}
    assert parts(cap) == {"encoder", "unimodal", "multimodal"} | ({"generative_pooler"} if case.n_query else set())
    assert {name for name in con if name.startswith("encoder")} == {name for name in cap if name.startswith("encoder")}
    assert "unimodal.cls" in con and "unimodal.cls" not in cap


@pytest.mark.parametrize("off, dead", [("lambda_cap", "multimodal"), ("lambda_con", "contrastive_pooler")])
def test_a_lambda_of_zero_leaves_the_other_paradigm(off, dead):
    model = CONTROL.model(**{off: 0.0})
    model.losses(CONTROL.images(), CONTROL.tokens()).total.backward()
    grads = [p.grad for p in getattr(model, dead).parameters()]
    assert all(g is None or not g.any() for g in grads)
    assert model.encoder.patches.weight.grad.any()


def test_the_last_token_of_a_full_caption_reaches_the_text_embedding_and_the_loss():
    """Two public implementations drop it in training."""
    model, images, tokens = CONTROL.model(), CONTROL.images(), CONTROL.tokens()
    full = tokens.clone()
    assert (full[1] != PAD).all()
    full[1, -1] = 5
    before, after = model.losses(images, tokens), model.losses(images, full)
    assert before.con != after.con and before.cap != after.cap
