"""Eqs. (2), (3) and (4) against slow loops written from them, symmetries and reference points."""
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


@given(seeds, st.integers(1, 7), temperatures)
def test_contrastive_loss_equals_equation_2(seed, N, s):
    check_contrastive(seed, list(range(N)), s)
    check_contrastive(seed, list(range(N)), s, lambda x, y, s, ids: contrastive_loss(x, y, s))


@given(seeds, st.lists(st.integers(0, 3), min_size=2, max_size=7), temperatures)
def test_identical_captions_are_each_others_positives(seed, ids, s):
    check_contrastive(seed, ids, s)


@given(seeds, st.integers(1, 7), st.integers(1, 4))
def test_captions_have_the_same_number_where_they_are_identical(seed, N, L):
    tokens = torch.randint(4, 6, (N, L), generator=torch.Generator().manual_seed(seed))
    ids = coca.number_captions(tokens)
    assert torch.equal(ids[:, None] == ids, (tokens[:, None] == tokens).all(-1))


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


@given(seeds, st.integers(3, 7), temperatures, st.randoms())
def test_contrastive_loss_is_unchanged_by_swapping_towers_or_permuting_pairs(seed, N, s, random):
    x, y = embeddings(seed, N)
    order = random.sample(range(N), N)
    ids = torch.tensor([random.randrange(3) for _ in range(N)])
    loss = contrastive_loss(x, y, s, ids)
    torch.testing.assert_close(contrastive_loss(y, x, s, ids), loss)
    torch.testing.assert_close(contrastive_loss(x[order], y[order], s, ids[order]), loss)
    with fails:  # control: one side alone
        torch.testing.assert_close(contrastive_loss(x.roll(1, 0), y, s), contrastive_loss(x, y, s))


@given(seeds, st.integers(2, 6))
def test_contrastive_loss_of_equal_embeddings_is_2_log_n_and_extreme_ones_are_finite(seed, N):
    x, y = embeddings(seed, N).float()
    equal = contrastive_loss(x[:1].expand(N, -1), y[:1].expand(N, -1), 0.07)
    assert equal.item() == pytest.approx(2 * math.log(N))
    for s in (1e-6, 0.01, 1.0, 1e6):
        x.requires_grad_().grad = None
        loss = contrastive_loss(x, y, s)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()


def test_class_names_can_reach_0_with_identical_captions_as_positives_and_1_9_a_direction_without():
    """64 images of 10 classes, embedded perfectly."""
    labels = torch.arange(64) % 10
    perfect = torch.eye(10)[labels]
    assert contrastive_loss(perfect, perfect, 0.01, labels).item() == pytest.approx(0, abs=1e-4)
    assert contrastive_loss(perfect, perfect, 0.01).item() / 2 == pytest.approx(1.86, abs=0.01)


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


@given(cases())
def test_captioning_loss_of_flat_logits_is_log_v_and_pads_count_for_nothing(case):
    tokens = case.tokens(extra=2)
    logits = torch.zeros(*tokens.shape, VOCAB, requires_grad=True)
    loss = captioning_loss(logits, tokens)
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=1e-5)
    grad, = torch.autograd.grad(loss, logits)
    has_target = F.pad(tokens[:, 1:] != PAD, (0, 1))
    assert ((grad.abs().sum(-1) > 0) == has_target).all()
    assert captioning_loss(logits, torch.zeros_like(tokens)).item() == 0  # no target: 0, not NaN


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
    check_total(case.model(), case, 1, 2)  # the paper's weights


def test_control_other_weights_are_caught():
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
    con, cap = trained_by(model, losses.con), trained_by(model, losses.cap)
    idle = []
    if case.n_query == 1:  # attention to a single token has no choice, so who asks does not matter
        idle += ["cross_norm", "cross_attention.q."]
        if case.pooler == "cascade":
            idle += ["contrastive_pooler.query", "contrastive_pooler.attention.q."]
    for name, _ in model.named_parameters():
        assert (name in con | cap) != any(part in name for part in idle), name
    con_parts = {"encoder", "unimodal", "contrastive_pooler", "log_temperature"}
    cap_parts = {"encoder", "unimodal", "multimodal"}
    if case.n_query:
        cap_parts.add("generative_pooler")
        if case.pooler == "cascade":
            con_parts.add("generative_pooler")
    assert {name.split(".")[0] for name in con} == con_parts
    assert {name.split(".")[0] for name in cap} == cap_parts
    assert not {name for name in con ^ cap if name.startswith("encoder")}
    assert "unimodal.cls" in con - cap


@given(cases(shortest=4))
def test_each_loss_trains_its_parts_and_every_parameter_has_a_use(case):
    check_every_parameter_has_a_use(case.model(torch.float64), case)


def test_control_a_parameter_without_use_is_caught():
    model = CONTROL.model(torch.float64)
    model.unimodal.unused = torch.nn.Parameter(torch.ones(3))
    with fails:
        check_every_parameter_has_a_use(model, CONTROL)


def test_a_lambda_of_0_leaves_a_dual_encoder_or_an_image_captioner():
    dual, captioner = CONTROL.model(lambda_cap=0.0), CONTROL.model(lambda_con=0.0)
    dual.multimodal = None  # it has no use for it
    for model in (dual, captioner):
        model.losses(CONTROL.images(), CONTROL.tokens()).total.backward()
        assert model.encoder.patches.weight.grad.any()
    assert not any(p.grad.any() for p in captioner.contrastive_pooler.parameters())


def test_the_last_token_of_a_full_caption_reaches_the_text_embedding_and_the_loss():
    """Two public implementations drop it in training."""
    model, images, tokens = CONTROL.model(), CONTROL.images(), CONTROL.tokens()
    full = tokens.clone()
    assert (full[1] != PAD).all()
    full[1, -1] = 5
    before, after = model.losses(images, tokens), model.losses(images, full)
    assert before.con != after.con and before.cap != after.cap


# Half precision


def check_half_precision():
    """Products in bfloat16; norms, embeddings, similarities, temperature, losses in float32."""
    model, images, tokens = CONTROL.model(), CONTROL.images(), CONTROL.tokens()
    model.losses(images, tokens).total.backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
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
    losses.total.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert set(products) == {torch.bfloat16} and set(dtypes) == {torch.float32}
    assert got.isfinite().all() and F.cosine_similarity(got, exact, dim=0) > 0.99
    assert not torch.equal(got, exact)


def test_half_precision_leaves_norms_similarities_and_losses_in_float32():
    check_half_precision()


def test_control_embeddings_or_losses_in_half_precision_are_caught():
    normalize = F.normalize
    with mock.patch.object(F, "normalize", lambda x, dim: normalize(x, dim=dim).bfloat16()), fails:
        check_half_precision()
    bare = lambda logits, targets: F.cross_entropy(logits, targets)  # noqa: E731
    with mock.patch.object(coca, "next_token_loss", bare), fails:
        check_half_precision()
