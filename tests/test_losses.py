"""Eqs. (2), (3) and (4) against slow loops written from them, symmetries and reference points."""
import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, VOCAB, cases, fails
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import PAD, captioning_loss, contrastive_loss

seeds, temperatures = st.integers(0, 10_000), st.floats(0.01, 1.0)

# Eq. (2)


def slow_contrastive(x, y, s, ids):
    """Eq. (2) term by term. Identical captions share the target, and its entropy is taken off."""
    N, total = len(x), 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(N):
            positives = [j for j in range(N) if ids[j] == ids[i]]
            z = sum(math.exp(a[i] @ b[j] / s) for j in range(N))
            for j in positives:
                total -= math.log(math.exp(a[i] @ b[j] / s) / z) / len(positives)
            total -= math.log(len(positives))
    return total / N


def embeddings(seed, N):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, N, 5, generator=generator, dtype=torch.float64), dim=-1)


def check_contrastive(seed, ids, s, loss=contrastive_loss):
    x, y = embeddings(seed, len(ids))
    got = loss(x, y, s, torch.tensor(ids))
    assert got.dtype == torch.float64  # that of the embeddings
    assert got.item() == pytest.approx(slow_contrastive(x, y, s, ids), abs=1e-12)


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=7), temperatures)
def test_contrastive_loss_equals_equation_2(seed, ids, s):
    check_contrastive(seed, ids, s)
    check_contrastive(seed, list(range(7)), s, lambda x, y, s, ids: contrastive_loss(x, y, s))


@pytest.mark.parametrize("wrong", [
    lambda x, y, s, ids: F.cross_entropy(x @ y.T / s, torch.arange(len(x))),  # one direction only
    lambda x, y, s, ids: contrastive_loss(x, y, s, ids) / 2,  # averaged as in CLIP
    lambda x, y, s, ids: contrastive_loss(x, y, 1 / s, ids),  # multiplied by the temperature
    lambda x, y, s, ids: contrastive_loss(x, y.roll(1, 0), s, ids),  # other pairs
    lambda x, y, s, ids: contrastive_loss(x, y, s),  # identical captions as each other's negatives
    lambda x, y, s, ids: contrastive_loss(x.float(), y.float(), s, ids),
])
def test_control_wrong_contrastive_losses_are_caught(wrong):
    with fails:
        check_contrastive(0, [0, 1, 2, 1, 3], 0.3, wrong)


@pytest.mark.parametrize("s", [1e-6, 0.01, 1.0, 1e6])
def test_contrastive_loss_is_finite_at_every_temperature(s):
    x, y = embeddings(0, 4).float()
    loss = contrastive_loss(x.requires_grad_(), y, s)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


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


def plain(logits, tokens, **how):
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), **how)


@pytest.mark.parametrize("wrong", [
    lambda logits, tokens: plain(logits, tokens, ignore_index=PAD),  # labels not shifted
    lambda logits, tokens: plain(logits[:, :-1], tokens[:, 1:]),  # padding counted
    lambda logits, tokens: plain(logits[:, 1:], tokens[:, :-1], ignore_index=PAD),  # backwards
    lambda logits, tokens: captioning_loss(logits, tokens) * (tokens[:, 1:] != PAD).float().mean(),
    lambda logits, tokens: captioning_loss(logits[:, :-2], tokens[:, :-2]),  # the end left out
])
def test_control_wrong_captioning_losses_are_caught(wrong):
    with fails:
        check_captioning(CONTROL, wrong)


def test_captioning_loss_of_no_target_is_0_and_not_nan():
    assert captioning_loss(torch.zeros(2, 4, VOCAB), torch.zeros(2, 4, dtype=torch.long)) == 0


# Eq. (4), and one forward pass for both


def check_total(model, case, lambda_con, lambda_cap):
    """The total is that of the two losses of one forward pass, weighted."""
    images, tokens = case.images(), case.tokens()
    tokens[1] = tokens[0]  # two images with one caption
    captions = tokens.tolist()
    ids = torch.tensor([captions.index(caption) for caption in captions])
    out, loss = model(images, tokens), model.losses(images, tokens)
    assert out.logits.shape == (*tokens.shape, VOCAB)
    cap = captioning_loss(out.logits, tokens)
    con = contrastive_loss(out.image_embedding, out.text_embedding, model.temperature, ids)
    torch.testing.assert_close(tuple(loss), (lambda_con * con + lambda_cap * cap, con, cap))
    torch.testing.assert_close(model.embed_and_caption(images, tokens), (*out[:2], cap))
    torch.testing.assert_close((model.encode_image(images), model.encode_text(tokens)), out[:2])


@given(cases(), st.floats(0, 4), st.floats(0.1, 4))
def test_the_total_weighs_the_losses_of_one_forward_pass(case, lambda_con, lambda_cap):
    model = case.model(lambda_con=lambda_con, lambda_cap=lambda_cap)
    check_total(model, case, lambda_con, lambda_cap)


def test_control_other_weights_are_caught():
    check_total(CONTROL.model(), CONTROL, 1, 2)  # the paper's
    for wrong in ((2, 2), (1, 1)):
        with fails:
            check_total(CONTROL.model(), CONTROL, *wrong)


def trained_by(model, loss):
    """Names of the parameters that the loss moves."""
    names, parameters = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return {name for name, grad in zip(names, grads) if grad.abs().max() > 1e-12}


def check_every_parameter_has_a_use(model, case):
    """The contrastive loss trains both towers, the captioning loss all but [CLS] and one pooler."""
    losses = model.losses(case.images(torch.float64), case.tokens())
    con = trained_by(model, losses.con)
    cap = trained_by(model, losses.cap)
    assert con | cap == {name for name, _ in model.named_parameters()}
    con_parts = {"encoder", "unimodal", "contrastive_pooler", "log_temperature"}
    cap_parts = {"encoder", "unimodal", "multimodal"}
    if case.n_query:
        cap_parts.add("generative_pooler")
    if case.n_query and case.pooler == "cascade":
        con_parts.add("generative_pooler")
    assert {name.split(".")[0] for name in con} == con_parts
    assert {name.split(".")[0] for name in cap} == cap_parts
    assert "unimodal.cls" in con - cap


@pytest.mark.parametrize("n_query", [0, 3])
@pytest.mark.parametrize("pooler", ["cascade", "parallel"])
def test_each_loss_trains_its_parts_and_every_parameter_has_a_use(pooler, n_query):
    case = dataclasses.replace(CONTROL, pooler=pooler, n_query=n_query)
    model = case.model(torch.float64)
    check_every_parameter_has_a_use(model, case)
    model.unimodal.unused = torch.nn.Parameter(torch.ones(3))
    with fails:  # control
        check_every_parameter_has_a_use(model, case)


# Half precision


def check_half_precision():
    """Products in bfloat16; norms, embeddings, similarities, temperature, losses in float32."""
    model, images, tokens = CONTROL.model(), CONTROL.images(), CONTROL.tokens()
    dtypes, products, cross_entropy = [], [], F.cross_entropy

    def record(logits, *args, **how):
        dtypes.append(logits.dtype)
        return cross_entropy(logits, *args, **how)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: products.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(F, "cross_entropy", record):
        image_embedding, text_embedding, _ = model.embed_and_caption(images, tokens)
        losses = model.losses(images, tokens)
        dtypes += [t.dtype for t in (image_embedding, text_embedding, model.temperature, *losses)]
    assert set(products) == {torch.bfloat16}
    assert set(dtypes) == {torch.float32}


def test_half_precision_leaves_norms_similarities_and_losses_in_float32():
    check_half_precision()
    normalize = F.normalize  # controls: embeddings or losses in half precision
    with mock.patch.object(F, "normalize", lambda x, dim: normalize(x, dim=dim).bfloat16()), fails:
        check_half_precision()
    bare = lambda logits, targets: F.cross_entropy(logits, targets)  # noqa: E731
    with mock.patch.object(coca, "next_token_loss", bare), fails:
        check_half_precision()
