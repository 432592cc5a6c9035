"""Who sees whom: the causal masks, padding and [CLS] of the two decoder halves (Sec. 3.2).

Each property is a check_ function. hypothesis tries to break it on the model, and below stand
models broken on purpose, which it must catch.
"""
import helpers
import pytest
import torch
from helpers import CONTROL, VOCAB, cases, fails, other_mask, seen_with, wrong_mask
from hypothesis import given

from coca import BEGIN, END, PAD, causal_mask

MASK = """
             <begin>    a     <end>   [CLS]   <pad>
    <begin>     x       .       .       .       .
    a           x       x       .       .       .
    <end>       x       x       x       .       .
    [CLS]       x       x       x       x       .
    <pad>       x       x       x       x       x
"""


def drawn(picture):
    """The rows of a picture without their names: True where it has an x."""
    lines = picture.strip().splitlines()[1:]
    return torch.tensor([[sign == "x" for sign in line.split()[1:]] for line in lines])


def check_drawn_mask(case=CONTROL):
    """The caption "a", in a batch whose longest has one word more, is read as the picture says."""
    model = case.model()
    tokens = torch.tensor([[BEGIN, 5, END, PAD],
                           [BEGIN, 6, 7, END]])
    with helpers.recorded_weights() as record:
        model.unimodal(tokens)
    assert len(record) == model.config.n_uni  # every layer
    for _, weights in record:
        assert ((weights[0] > 0) == drawn(MASK)).all()  # (H, 5, 5)


def check_weights(case):
    """Masked weights are 0 and not just small, all others are not, and rows sum to 1."""
    with helpers.recorded_weights() as record:
        case.model()(case.images(), case.tokens())
    assert sum(causal for causal, _ in record) == 4  # every self-attention of both halves
    for causal, weights in record:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        allowed = causal_mask(weights.shape[-1]) if causal else torch.tensor(True)
        assert ((weights > 0) == allowed).all()


def cut_of(case):
    return 1 + case.seed % (min(case.lengths) - 1)


def check_future(case, scale=1.0):
    """Other tokens from a cut on: nothing before changes by a bit, and what is at the cut does."""
    model, images, tokens, cut = case.model(), case.images(), case.tokens(), cut_of(case)
    with torch.no_grad():
        for block in (*model.unimodal.blocks, *model.multimodal.blocks):
            block.self_attention.q.weight.mul_(scale)
    changed = tokens.clone()
    changed[:, cut:] = 4 + (tokens[:, cut:] + 1) % (VOCAB - 4)
    changed[tokens == PAD] = PAD
    assert torch.equal(model.unimodal(tokens)[0][:, :cut], model.unimodal(changed)[0][:, :cut])
    before, after = model(images, tokens).logits, model(images, changed).logits
    assert before.isfinite().all()
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.isclose(before[:, cut], after[:, cut]).all()


def check_future_at_large_activations(case):
    check_future(case, 1e4)


def check_future_gradient(case):
    """d(logits, unimodal states before a cut) / d(token embeddings) is 0 from there on."""
    model, images, tokens, cut = case.model(), case.images(), case.tokens(), cut_of(case)
    embedded = helpers.record_embedding(model)
    states, logits = model.unimodal(tokens)[0], model(images, tokens).logits
    for out, source in zip((states, logits), embedded):
        grad, = torch.autograd.grad(out[:, :cut].square().sum(), source)
        assert (grad[:, cut:] == 0).all()
        assert (grad[:, :cut].abs().sum(-1) > 0).all()


def check_padding(case):
    """Neither more padding nor another pad embedding moves embedding, real logits or losses."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    before, losses = model(images, tokens), model.losses(images, tokens)
    with torch.no_grad():
        model.unimodal.token.weight[PAD].mul_(-3)  # (a LayerNorm would hide an added constant)
    padded = case.tokens(extra=2)
    after, losses_after = model(images, padded), model.losses(images, padded)
    torch.testing.assert_close(after.text_embedding, before.text_embedding)
    real = tokens != PAD
    torch.testing.assert_close(after.logits[:, :tokens.shape[1]][real], before.logits[real])
    torch.testing.assert_close(tuple(losses_after), tuple(losses))


def check_cls_weights(case):
    """In every unimodal layer [CLS] gives weight to each real token and itself, and to no other."""
    model, tokens, inputs = case.model(), case.tokens(extra=2), []
    model.unimodal.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with helpers.recorded_weights() as record:
        model.unimodal(tokens)
    is_cls = (inputs[0] == model.unimodal.cls).all(-1)                  # (B, L + 1)
    assert (is_cls.sum(1) == 1).all()
    for _, weights in record:
        for row, n in enumerate(case.lengths):
            seen = is_cls[row].clone()
            seen[:n] = True
            assert ((weights[row][:, is_cls[row]] > 0) == seen).all()


def check_cls_gradient(case):
    """The text embedding depends on every real token, on [CLS], and on no padding."""
    model, tokens = case.model(torch.float64), case.tokens(extra=2)
    embedded = helpers.record_embedding(model)
    text = model.encode_text(tokens)
    weight = torch.randn(text.shape, dtype=text.dtype)  # (not the norm, which is 1)
    grad, cls = torch.autograd.grad((text * weight).sum(), (embedded[0], model.unimodal.cls))
    assert ((grad.abs().sum(-1) > 0) == (tokens != PAD)).all()
    assert cls.abs().sum() > 0


def check_nothing_sees_cls(case):
    """Another [CLS] changes the text embedding, and no state or logit of a real token by a bit."""
    model, images, tokens = case.model(), case.images(), case.tokens(extra=1)
    real = tokens != PAD
    states, before = model.unimodal(tokens)[0][real], model(images, tokens)
    with torch.no_grad():
        model.unimodal.cls.mul_(-1)
    after = model(images, tokens)
    assert torch.equal(model.unimodal(tokens)[0][real], states)
    assert torch.equal(after.logits[real], before.logits[real])
    assert not torch.isclose(after.text_embedding, before.text_embedding).all(1).any()


def check_cls_taken_out(case):
    """What goes on to the multimodal half is the last layer without the row of [CLS]."""
    model, tokens, last = case.model(), case.tokens(extra=1), []
    model.unimodal.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out))
    states = model.unimodal(tokens)[0]
    for row, n in enumerate(case.lengths):
        assert torch.equal(states[row], torch.cat([last[0][row, :n], last[0][row, n + 1:]]))


def check_who_sees_the_image(case):
    """Another image: the text embedding stays, every real logit and image embedding moves."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    before, after = model(images, tokens), model(-images, tokens)
    assert torch.equal(before.text_embedding, after.text_embedding)
    real = tokens != PAD
    assert not torch.isclose(before.logits[real], after.logits[real]).all(-1).any()
    assert not torch.isclose(before.image_embedding, after.image_embedding).all(-1).any()


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]


def test_the_mask_is_the_one_drawn_above():
    assert torch.equal(causal_mask(5), drawn(MASK))


@pytest.mark.parametrize("check", CHECKS)
@given(cases())
def test_who_sees_whom(check, case):
    check(case)


BROKEN = {  # and what must notice it
    "no mask": (lambda: wrong_mask(99), [
        check_drawn_mask, check_weights, check_future, check_future_gradient, check_padding,
        check_cls_weights, check_nothing_sees_cls]),
    "one token of the future": (lambda: wrong_mask(1), [
        check_drawn_mask, check_weights, check_future, check_future_gradient, check_cls_weights,
        check_nothing_sees_cls]),
    "tokens do not see themselves": (lambda: wrong_mask(-1), [
        check_drawn_mask, check_weights, check_cls_weights]),
    "tokens see only themselves": (lambda: other_mask(lambda L: torch.eye(L).bool()), [
        check_drawn_mask, check_weights, check_cls_gradient]),
    "-20 in place of infinity": (lambda: other_mask(lambda L: -20.0 * ~causal_mask(L)), [
        check_weights]),
    "-1000": (lambda: other_mask(lambda L: -1e3 * ~causal_mask(L)), [
        check_future_at_large_activations]),
    # Two public implementations: open_clip #549, and the same in torchmultimodal
    "[CLS] behind the padding": (helpers.cls_behind_the_padding, [
        check_padding, check_cls_weights, check_cls_gradient]),
    "[CLS] left in": (helpers.cls_left_in, [check_cls_taken_out]),
    "text sees the image": (lambda: seen_with(lambda x, y, states, blind: (x, y + x, states)), [
        check_who_sees_the_image]),
    "captions do not": (lambda: seen_with(lambda x, y, states, blind: (x, y, blind)), [
        check_who_sees_the_image]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_control_a_broken_model_is_caught(name):
    broken, checks = BROKEN[name]
    for check in checks:
        with broken(), fails:
            check(CONTROL)
