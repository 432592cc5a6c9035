"""Eqs. (2), (3) and (4) against slow loops written from them, and what one step runs and trains."""
import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, VOCAB, cases, counting, fails, logits_of
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import PAD, UNKNOWN, CoCa, caption_ids, captioning_loss, contrastive_loss

seeds = st.integers(0, 10_000)
captions = st.lists(st.integers(0, 5), min_size=1, max_size=7)
temperatures = st.floats(0.01, 1.0)

# Eq. (2)


def slow_contrastive(x, y, s, ids, rows):
    """Eq. (2) term by term. Equal captions share the target, and its entropy is taken off."""
    total = 0.0
    for a, b in ((x, y), (y, x)):
        for i in rows:
            exponentials = [math.exp(a[i] @ b[j] / s) for j in range(len(b))]
            positives = [j for j in range(len(b)) if ids[j] == ids[i]]
            for j in positives:
                total -= math.log(exponentials[j] / sum(exponentials)) / len(positives)
            total -= math.log(len(positives))
    return total / len(rows)


def embeddings(seed, N):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, N, 5, generator=generator, dtype=torch.float64), dim=-1)


def check_contrastive(loss, x, y, s, ids, rows):
    assert loss.dtype == torch.float64  # that of the embeddings
    assert loss.item() == pytest.approx(slow_contrastive(x, y, s, ids, rows), abs=1e-12)


@given(seeds, captions, temperatures, st.integers(1, 7))
def test_contrastive_loss_equals_equation_2_and_its_shares_add_up(seed, ids, s, size):
    x, y = embeddings(seed, len(ids))
    ids = torch.tensor(ids)
    whole = contrastive_loss(x, y, s, ids)
    check_contrastive(whole, x, y, s, ids, range(len(ids)))
    total = 0
    for rows in torch.arange(len(ids)).split(size):
        share = contrastive_loss(x, y, s, ids, rows)
        check_contrastive(share, x, y, s, ids, rows)
        total += share * len(rows) / len(ids)
    torch.testing.assert_close(total, whole)


def test_control_wrong_contrastive_losses_are_caught():
    s = 0.3
    x, y = embeddings(0, 5)
    ids = torch.tensor([0, 1, 2, 1, 3])
    right = contrastive_loss(x, y, s, ids)
    for wrong in (
        F.cross_entropy(x @ y.T / s, torch.arange(5)),  # one direction only
        right / 2,  # averaged as in CLIP
        contrastive_loss(x, y, 1 / s, ids),  # multiplied by the temperature
        contrastive_loss(x, y.roll(1, 0), s, ids),  # other pairs
        contrastive_loss(x, y, s, torch.arange(5)),  # equal captions as each other's negatives
        right + 2 * 2 / 5 * math.log(2),  # the entropy of the target left in
        contrastive_loss(x, y, s, ids, [0, 1, 2]),  # some rows only
        contrastive_loss(x.float(), y.float(), s, ids),
    ):
        with fails:
            check_contrastive(wrong, x, y, s, ids, range(5))


@pytest.mark.parametrize("s", [1e-6, 0.01, 1.0, 1e6])
def test_contrastive_loss_is_finite_at_every_temperature(s):
    x, y = embeddings(0, 4).float()
    loss = contrastive_loss(x.requires_grad_(), y, s, torch.arange(4))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def check_ids(ids_of, seed, L):
    """A caption and those that differ from it in one word, at every place; each of them twice."""
    torch.manual_seed(seed)
    tokens = torch.randint(UNKNOWN + 1, VOCAB, (L,)).repeat(L + 1, 1)
    tokens[:L].fill_diagonal_(UNKNOWN)
    tokens = tokens.repeat(2, 1)[torch.randperm(2 * L + 2)]
    ids = ids_of(tokens)
    assert torch.equal(ids[:, None] == ids, (tokens[:, None] == tokens).all(-1))


@given(seeds, st.integers(1, 20))
def test_captions_have_equal_ids_if_no_word_differs_wherever_it_stands(seed, L):
    check_ids(caption_ids, seed, L)


def test_control_ids_of_the_first_words_of_the_last_or_of_any_order_are_caught():
    for wrong in (lambda tokens: caption_ids(tokens[:, :8]), lambda tokens: tokens[:, -1],
                  lambda tokens: caption_ids(tokens.sort(1)[0]), lambda tokens: tokens[:, 0] * 0,
                  lambda tokens: torch.arange(len(tokens))):
        with fails:
            check_ids(wrong, 0, 20)


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


def check_captioning(loss, logits, tokens):
    assert loss.item() == pytest.approx(slow_captioning(logits, tokens), rel=1e-5)


@given(cases())
def test_the_captioning_loss_of_a_model_equals_equation_3(case):
    model, images, tokens = case.example(extra=1)
    check_captioning(model(images, tokens)[2], logits_of(model, images, tokens), tokens)


def test_control_wrong_captioning_losses_are_caught():
    model, images, tokens = CONTROL.example(extra=1)
    logits = logits_of(model, images, tokens)
    now = tokens != PAD
    follows = tokens[:, 1:] != PAD
    cut = tokens[:, 1:-2] != PAD
    share = follows.float().mean()
    for wrong in (
        captioning_loss(logits[now], tokens[now]),  # targets not shifted
        captioning_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),  # padding counted
        captioning_loss(logits[:, 1:][now[:, :-1]], tokens[:, :-1][now[:, :-1]]),  # backwards
        captioning_loss(logits[:, :-3][cut], tokens[:, 1:-2][cut]),  # the end left out
        model(images, tokens)[2] * share,  # a mean over all places
    ):
        with fails:
            check_captioning(wrong, logits, tokens)


def check_mean(loss, T):
    """Of T targets each counts 1 / T, be it one alone or many."""
    torch.manual_seed(T)
    logits = torch.randn(T, VOCAB)
    targets = torch.randint(VOCAB, (T,))
    alone = [-row.softmax(-1)[target].log() for row, target in zip(logits, targets)]
    torch.testing.assert_close(loss(logits, targets), sum(alone) / T)


@pytest.mark.parametrize("T", [1, 2, 7])
def test_every_target_counts_the_same_even_a_single_one(T):
    check_mean(captioning_loss, T)


def test_control_a_single_target_halved_is_caught():
    def halved(logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum") / max(2, len(targets))

    check_mean(halved, 2)
    with fails:
        check_mean(halved, 1)


def test_captioning_loss_of_no_target_is_0_and_not_nan():
    assert captioning_loss(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.long)) == 0


# Eq. (4), and one forward pass for both


def check_total(model, case, lambda_con, lambda_cap):
    """The total is that of the two losses of one forward pass, weighted."""
    images = case.images()
    tokens = case.tokens()
    tokens[1] = tokens[0]  # two images with one caption
    texts = tokens.tolist()
    ids = torch.tensor([texts.index(text) for text in texts])
    x, y, cap = model(images, tokens)
    con = contrastive_loss(x, y, model.temperature, ids)
    total = lambda_con * con + lambda_cap * cap
    torch.testing.assert_close(tuple(model.losses(images, tokens)), (total, con, cap))
    torch.testing.assert_close((model.encode_image(images), model.encode_text(tokens)), (x, y))


@given(cases(), st.floats(0, 4), st.floats(0.1, 4))
def test_the_total_weighs_the_losses_of_one_forward_pass(case, lambda_con, lambda_cap):
    model = case.model(lambda_con=lambda_con, lambda_cap=lambda_cap)
    check_total(model, case, lambda_con, lambda_cap)


def test_control_other_weights_and_equal_captions_taken_for_different_are_caught():
    model = CONTROL.model()
    check_total(model, CONTROL, 1, 2)  # the paper's
    for wrong in ((2, 2), (1, 1), (2, 1)):
        with fails:
            check_total(model, CONTROL, *wrong)
    with mock.patch.object(coca, "caption_ids", return_value=torch.arange(3)), fails:
        check_total(model, CONTROL, 1, 2)


def calls_of_one_step(**lambdas):
    model, images, tokens = CONTROL.example(**lambdas)
    with counting((CoCa, "forward"), (coca, "captioning_loss"), (coca, "contrastive_loss"),
                  (coca, "text_mask"), (coca, "causal_mask")) as functions:
        model.losses(images, tokens)
    return [function.call_count for function in functions]


def test_a_step_runs_forward_both_losses_and_both_masks():
    assert calls_of_one_step() == [1, 1, 1, 1, 2]  # each half of the decoder has a causal mask
    assert calls_of_one_step(lambda_cap=0) == [1, 0, 1, 1, 1]  # a dual encoder has one half


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
    model, images, tokens = CONTROL.example()
    outs = {torch.nn.LayerNorm: set(), torch.nn.Linear: set()}

    def record(module, args, out):
        outs[type(module)].add(out.dtype)

    for module in model.modules():
        if type(module) in outs:
            module.register_forward_hook(record)
    with torch.autocast("cpu", torch.bfloat16), counting((F, "cross_entropy")) as (entropy,):
        results = [*model(images, tokens), *model.losses(images, tokens), model.temperature]
    assert outs == {torch.nn.LayerNorm: {torch.float32}, torch.nn.Linear: {torch.bfloat16}}
    for t in results + [call.args[0] for call in entropy.call_args_list]:
        assert t.dtype == torch.float32


def test_half_precision_leaves_norms_similarities_and_losses_in_float32():
    check_half_precision()
    normalize = F.normalize

    def halved(x, dim):
        return normalize(x, dim=dim).bfloat16()

    def bare(logits, targets):
        return F.cross_entropy(logits, targets)

    for patch in (mock.patch.object(F, "normalize", halved),
                  mock.patch.object(coca, "captioning_loss", bare)):
        with patch, fails:  # controls: embeddings or losses in half precision
            check_half_precision()
