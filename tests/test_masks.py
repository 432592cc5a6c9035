"""Who sees whom: the causal masks, padding and [CLS] of the two decoder halves (Sec. 3.2).

Each property is a check_ function; hypothesis tries to break it on the model, and a control breaks the
model on purpose and must see the check fail.
"""
import pytest
import torch
from helpers import CONTROL, VOCAB, cases, cls_behind_the_padding, recorded_weights, wrong_mask
from hypothesis import given
from hypothesis import strategies as st

from coca import END, PAD

fails = pytest.raises(AssertionError)


def check_future(case, cut):
    """Other tokens from position `cut` on: nothing before it changes by a bit, and what comes after does."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    changed = tokens.clone()
    changed[:, cut:][tokens[:, cut:] != PAD] = 4 + (tokens[:, cut:][tokens[:, cut:] != PAD] + 1) % (VOCAB - 4)
    assert torch.equal(model.unimodal(tokens)[0][:, :cut], model.unimodal(changed)[0][:, :cut])
    before, after = model(images, tokens).logits, model(images, changed).logits
    assert torch.equal(before[:, :cut], after[:, :cut])
    real = tokens[:, cut] != PAD
    assert not torch.isclose(before[real, cut], after[real, cut]).all()


def check_future_gradient(case, cut):
    """d(logits and unimodal states before cut) / d(token embeddings from cut on) is exactly 0, and not 0 before."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    embedded = []
    handle = model.unimodal.token.register_forward_hook(lambda m, i, out: embedded.append(out.detach().requires_grad_()) or embedded[-1])
    states, logits = model.unimodal(tokens)[0], model(images, tokens).logits
    handle.remove()
    for out, source in zip((states, logits), embedded):
        grad, = torch.autograd.grad(out[:, :cut].square().sum(), source)
        assert (grad[:, cut:] == 0).all()
        assert (grad[:, :cut].abs().sum(-1) > 0).all()


def check_earlier_tokens_matter(case):
    model, images, tokens = case.model(), case.images(), case.tokens()
    changed = tokens.clone()
    changed[:, 1] = 4 + (tokens[:, 1] + 1) % (VOCAB - 4)
    before, after = model(images, tokens), model(images, changed)
    for row, n in enumerate(case.lengths):
        assert not torch.isclose(before.logits[row, 1:n], after.logits[row, 1:n]).all(-1).any()


def check_padding(case, extra):
    """Neither more padding nor another pad embedding moves embedding, real logits or losses."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    before, losses = model(images, tokens), model.losses(images, tokens)
    padded = case.tokens(extra)[:, :model.config.text_len]
    with torch.no_grad():
        model.unimodal.token.weight[PAD].mul_(-3)  # (a constant added would be invisible behind a LayerNorm)
    after, losses_after = model(images, padded), model.losses(images, padded)
    torch.testing.assert_close(after.text_embedding, before.text_embedding)
    real = tokens != PAD
    torch.testing.assert_close(after.logits[:, :tokens.shape[1]][real], before.logits[real])
    torch.testing.assert_close(tuple(losses_after), tuple(losses))


def check_cls_sees(case):
    """In every unimodal layer [CLS] gives weight to each real token and itself, and none to anything else."""
    model, tokens = case.model(), case.tokens(extra=2)[:, :9]
    with recorded_weights() as record:
        model.unimodal(tokens)
    assert len(record) == model.config.n_uni
    for _, weights in record:
        for row, n in enumerate(case.lengths):
            cls = weights[row, :, n]                                    # (H, L + 1)
            assert (cls[:, :n + 1] > 0).all() and (cls[:, n + 1:] == 0).all()


def check_cls_gradient(case):
    """The text embedding depends on every real token, on [CLS], and on no padding."""
    model, tokens = case.model(torch.float64), case.tokens(extra=2)[:, :9]
    embedded = []
    model.unimodal.token.register_forward_hook(lambda m, i, out: embedded.append(out.detach().requires_grad_()) or embedded[-1])
    text = model.encode_text(tokens)
    weight = torch.randn(text.shape, generator=torch.Generator().manual_seed(case.seed), dtype=text.dtype)  # (not the norm, which is 1)
    grad, cls = torch.autograd.grad((text * weight).sum(), (embedded[0], model.unimodal.cls))
    assert ((grad.abs().sum(-1) > 0) == (tokens != PAD)).all()
    assert cls.abs().sum() > 0


def check_cls_sees_itself_by_value(case):
    """One layer: attention of [CLS] written by hand, over the real tokens and itself, gives its new state."""
    model, tokens = case.model(n_uni=1), case.tokens(extra=1)[:, :9]
    block, unimodal = model.unimodal.blocks[0], model.unimodal
    got = unimodal(tokens)[1]
    for row, n in enumerate(case.lengths):
        x = torch.cat([unimodal.token(tokens[row, :n]) + unimodal.position[:n], unimodal.cls[None]])[None]
        W, b = block.self_attention.qkv.weight.chunk(3), block.self_attention.qkv.bias.chunk(3)
        q, k, v = ((block.norm1(x) @ w.T + c).unflatten(-1, (2, 8)).transpose(1, 2) for w, c in zip(W, b))
        out = torch.softmax(q[:, :, -1:] @ k.transpose(-2, -1) / 8 ** 0.5, -1) @ v
        state = x[:, -1] + block.self_attention.out(out.transpose(1, 2).flatten(2))[:, 0]
        torch.testing.assert_close(unimodal.norm(state + block.mlp(block.norm3(state)))[0], got[row])


def check_nothing_sees_cls(case):
    model, images, tokens = case.model(), case.images(), case.tokens(extra=1)[:, :9]
    real = tokens != PAD
    states, before = model.unimodal(tokens)[0][real], model(images, tokens)
    with torch.no_grad():
        model.unimodal.cls.mul_(-1)
    after = model(images, tokens)
    assert torch.equal(model.unimodal(tokens)[0][real], states)
    assert torch.equal(after.logits[real], before.logits[real])
    assert not torch.isclose(after.text_embedding, before.text_embedding).all(1).any()


@given(cases(), st.data())
def test_future_tokens_do_not_change_past_logits_or_unimodal_states(case, data):
    check_future(case, data.draw(st.integers(1, max(case.lengths) - 1)))


@given(cases(), st.data())
def test_no_gradient_flows_from_the_past_to_future_tokens(case, data):
    check_future_gradient(case, data.draw(st.integers(1, min(case.lengths) - 1)))


@given(cases())
def test_earlier_tokens_do_change_later_logits(case):
    check_earlier_tokens_matter(case)


@given(cases(), st.integers(0, 4))
def test_padding_and_padded_length_move_neither_embedding_nor_losses(case, extra):
    check_padding(case, extra)


@given(cases())
def test_cls_sees_every_real_token_and_itself_and_nothing_else(case):
    check_cls_sees(case)
    check_cls_gradient(case)


@given(cases())
def test_nothing_sees_cls(case):
    check_nothing_sees_cls(case)


@pytest.mark.parametrize("diagonal", [None, 1, 2])
def test_control_an_absent_or_shifted_mask_is_caught(diagonal):
    with wrong_mask(diagonal):
        with fails:
            check_future(CONTROL, 3)
        with fails:
            check_future_gradient(CONTROL, 3)
        with fails:
            check_nothing_sees_cls(CONTROL)


@pytest.mark.parametrize("diagonal", [None, -1, 1])
def test_control_a_cls_that_sees_too_little_or_too_much_is_caught(diagonal):
    with wrong_mask(diagonal), fails:
        check_cls_sees_itself_by_value(CONTROL)


@given(cases())
def test_the_state_of_cls_is_its_attention_written_by_hand(case):
    check_cls_sees_itself_by_value(case)


def test_control_the_public_cls_bug_is_caught():
    """Behind the padding, with a key mask shifted by one: open_clip #549, and the same in torchmultimodal."""
    for check in (check_cls_gradient, check_cls_sees_itself_by_value):
        with cls_behind_the_padding(), fails:
            check(CONTROL)
    with cls_behind_the_padding(), fails:
        check_padding(CONTROL, 2)


@given(cases())
def test_masked_weights_are_exactly_zero_and_rows_sum_to_one(case):
    with recorded_weights() as record:
        case.model()(case.images(), case.tokens())
    assert sum(causal for causal, _ in record) == 4  # every self-attention of both halves
    for causal, weights in record:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        if causal:
            assert (weights.triu(1) == 0).all() and (weights.tril() > 0).any()


@given(cases(), st.sampled_from([1e2, 1e4]))
def test_large_activations_do_not_break_the_mask(case, scale):
    model = case.model()
    with torch.no_grad():
        for block in (*model.unimodal.blocks, *model.multimodal.blocks):
            block.self_attention.qkv.weight.mul_(scale)
    tokens, images, cut = case.tokens(), case.images(), 2
    changed = tokens.clone()
    changed[:, cut] = END
    before, after = model(images, tokens).logits, model(images, changed).logits
    assert before.isfinite().all()
    assert torch.equal(before[:, :cut], after[:, :cut])


@given(cases())
def test_unimodal_states_ignore_the_image_and_multimodal_logits_do_not(case):
    model, images, tokens = case.model(), case.images(), case.tokens()
    before, after = model(images, tokens), model(-images, tokens)
    assert torch.equal(before.text_embedding, after.text_embedding)
    real = tokens != PAD
    assert not torch.isclose(before.logits[real], after.logits[real]).all(-1).any()
    assert not torch.isclose(before.image_embedding, after.image_embedding).all(-1).any()
