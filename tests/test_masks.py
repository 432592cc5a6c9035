"""Who sees whom: the causal masks, padding and [CLS] of the two decoder halves (Sec. 3.2).

Each property is a check_ function; hypothesis tries to break it on the model, and a control breaks
the model on purpose and must see the check fail.
"""
import helpers
import pytest
import torch
from helpers import CONTROL, VOCAB, cases, fails, other_mask, wrong_mask
from hypothesis import given
from hypothesis import strategies as st

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


def check_drawn_mask():
    """The caption "a", in a batch whose longest has one word more, is read as the picture says."""
    model = CONTROL.model()
    tokens = torch.tensor([[BEGIN, 5, END, PAD],
                           [BEGIN, 6, 7, END]])
    with helpers.recorded_weights() as record:
        model.unimodal(tokens)
    assert len(record) == model.config.n_uni  # every layer
    for _, weights in record:
        assert ((weights[0] > 0) == drawn(MASK)).all()  # (H, 5, 5)


def test_the_mask_of_every_unimodal_layer_is_the_one_drawn_above():
    check_drawn_mask()
    assert torch.equal(causal_mask(5), drawn(MASK))


@pytest.mark.parametrize("diagonal", [99, -1, 1])
def test_control_another_mask_is_not_the_one_drawn(diagonal):
    with wrong_mask(diagonal), fails:
        check_drawn_mask()


def other_words(tokens):
    """Another token at every place but the pads."""
    return torch.where(tokens == PAD, PAD, 4 + (tokens + 1) % (VOCAB - 4))


def other_future(tokens, cut):
    return torch.cat([tokens[:, :cut], other_words(tokens[:, cut:])], 1)


def check_future(case, cut):
    """Other tokens from `cut` on: nothing before changes by a bit, and what is at `cut` does."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    changed = other_future(tokens, cut)
    assert torch.equal(model.unimodal(tokens)[0][:, :cut], model.unimodal(changed)[0][:, :cut])
    before, after = model(images, tokens).logits, model(images, changed).logits
    assert torch.equal(before[:, :cut], after[:, :cut])
    real = tokens[:, cut] != PAD
    assert not torch.isclose(before[real, cut], after[real, cut]).all()


def check_future_gradient(case, cut):
    """d(logits, unimodal states before cut) / d(token embeddings) is 0 from cut on, not before."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    embedded = helpers.record_embedding(model)
    states, logits = model.unimodal(tokens)[0], model(images, tokens).logits
    for out, source in zip((states, logits), embedded):
        grad, = torch.autograd.grad(out[:, :cut].square().sum(), source)
        assert (grad[:, cut:] == 0).all()
        assert (grad[:, :cut].abs().sum(-1) > 0).all()


@given(cases(), st.data())
def test_future_tokens_change_no_earlier_state_or_logit_and_get_no_gradient_from_them(case, data):
    check_future(case, data.draw(st.integers(1, max(case.lengths) - 1)))
    check_future_gradient(case, data.draw(st.integers(1, min(case.lengths) - 1)))


@pytest.mark.parametrize("diagonal", [99, 1, 2])
def test_control_a_mask_that_shows_the_future_is_caught(diagonal):
    for check in (check_future, check_future_gradient):
        with wrong_mask(diagonal), fails:
            check(CONTROL, 3)


def check_earlier_tokens_matter(case):
    """Another first word: every later logit of the caption changes."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    changed = tokens.clone()
    changed[:, 1] = other_words(tokens[:, 1])
    before, after = model(images, tokens), model(images, changed)
    for row, n in enumerate(case.lengths):
        assert not torch.isclose(before.logits[row, 1:n], after.logits[row, 1:n]).all(-1).any()


@given(cases())
def test_earlier_tokens_do_change_later_logits(case):
    check_earlier_tokens_matter(case)


def test_control_tokens_that_see_only_themselves_are_caught():
    with other_mask(lambda L: torch.eye(L).bool()), fails:
        check_earlier_tokens_matter(CONTROL)


def check_padding(case, extra):
    """Neither more padding nor another pad embedding moves embedding, real logits or losses."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    before, losses = model(images, tokens), model.losses(images, tokens)
    with torch.no_grad():
        model.unimodal.token.weight[PAD].mul_(-3)  # (a LayerNorm would hide an added constant)
    padded = case.tokens(extra)
    after, losses_after = model(images, padded), model.losses(images, padded)
    torch.testing.assert_close(after.text_embedding, before.text_embedding)
    real = tokens != PAD
    torch.testing.assert_close(after.logits[:, :tokens.shape[1]][real], before.logits[real])
    torch.testing.assert_close(tuple(losses_after), tuple(losses))


@given(cases(), st.integers(0, 4))
def test_padding_and_padded_length_move_neither_embedding_nor_losses(case, extra):
    check_padding(case, extra)


@pytest.mark.parametrize("broken", [helpers.cls_behind_the_padding, lambda: wrong_mask(99)])
def test_control_padding_seen_by_cls_or_by_all_is_caught(broken):
    with broken(), fails:
        check_padding(CONTROL, 2)


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


def check_cls_by_hand(case):
    """One layer written by hand, where [CLS] attends to real tokens and itself: the same state."""
    model, tokens = case.model(n_uni=1), case.tokens(extra=1)
    unimodal, block = model.unimodal, model.unimodal.blocks[0]
    q, kv, out = block.self_attention.q, block.self_attention.kv, block.self_attention.out
    got = unimodal(tokens)[1]
    for row, n in enumerate(case.lengths):
        x = torch.cat([unimodal.token(tokens[row, :n]) + unimodal.position[:n], unimodal.cls[None]])
        normed = block.self_norm(x)                                     # (n + 1, D): no padding
        query, keys, values = q(normed[-1]), *kv(normed).chunk(2, -1)
        heads = []
        for d in (slice(0, 8), slice(8, 16)):
            weights = torch.softmax(keys[:, d] @ query[d] / 8 ** 0.5, 0)  # (n + 1,)
            heads.append(weights @ values[:, d])
        state = x[-1] + out(torch.cat(heads))
        state = state + block.mlp(block.mlp_norm(state))
        torch.testing.assert_close(got[row], unimodal.norm(state))


CLS_CHECKS = [check_cls_weights, check_cls_gradient, check_cls_by_hand]


@given(cases())
def test_cls_sees_every_real_token_and_itself_and_nothing_else(case):
    for check in CLS_CHECKS:
        check(case)


@pytest.mark.parametrize("diagonal", [99, -1, 1])
def test_control_a_cls_that_sees_too_little_or_too_much_is_caught(diagonal):
    for check in (check_cls_weights, check_cls_by_hand):
        with wrong_mask(diagonal), fails:
            check(CONTROL)


@pytest.mark.parametrize("check", CLS_CHECKS)
def test_control_the_public_cls_bug_is_caught(check):
    """Behind the padding, with a shifted key mask: open_clip #549, the same in torchmultimodal."""
    with helpers.cls_behind_the_padding(), fails:
        check(CONTROL)


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


def check_cls_taken_out(case, leave_in=False):
    """What goes on to the multimodal half is the last layer without the row of [CLS]."""
    model, tokens, last = case.model(), case.tokens(extra=1), []
    model.unimodal.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out))
    states = model.unimodal(tokens)[0]
    if leave_in:
        states = last[0][:, :-1]
    for row, n in enumerate(case.lengths):
        assert torch.equal(states[row], torch.cat([last[0][row, :n], last[0][row, n + 1:]]))


@given(cases())
def test_nothing_sees_cls_and_the_multimodal_half_does_not_get_it(case):
    check_nothing_sees_cls(case)
    check_cls_taken_out(case)


@pytest.mark.parametrize("diagonal", [99, 1, 2])
def test_control_tokens_that_see_cls_are_caught(diagonal):
    with wrong_mask(diagonal), fails:
        check_nothing_sees_cls(CONTROL)


def test_control_a_cls_left_in_is_caught():
    with fails:
        check_cls_taken_out(CONTROL, leave_in=True)


def check_weights(case):
    """Masked weights are 0 and not just small, all others are not, and rows sum to 1."""
    with helpers.recorded_weights() as record:
        case.model()(case.images(), case.tokens())
    assert sum(causal for causal, _ in record) == 4  # every self-attention of both halves
    for causal, weights in record:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        allowed = causal_mask(weights.shape[-1]) if causal else torch.tensor(True)
        assert ((weights > 0) == allowed).all()


def check_large_activations(case, scale):
    model, images, tokens, cut = case.model(), case.images(), case.tokens(), 2
    with torch.no_grad():
        for block in (*model.unimodal.blocks, *model.multimodal.blocks):
            block.self_attention.q.weight.mul_(scale)
    before, after = model(images, tokens).logits, model(images, other_future(tokens, cut)).logits
    assert before.isfinite().all()
    assert torch.equal(before[:, :cut], after[:, :cut])


@given(cases(), st.sampled_from([1e2, 1e4]))
def test_masked_weights_are_exactly_0_also_where_activations_are_large(case, scale):
    check_weights(case)
    check_large_activations(case, scale)


def test_control_a_number_in_place_of_infinity_is_caught():
    with other_mask(lambda L: -20.0 * ~causal_mask(L)), fails:
        check_weights(CONTROL)
    with other_mask(lambda L: -1e3 * ~causal_mask(L)):
        check_large_activations(CONTROL, 1.0)  # enough here
        with fails:
            check_large_activations(CONTROL, 1e4)


def check_who_sees_the_image(model):
    """Another image: the text embedding stays, every real logit and image embedding moves."""
    images, tokens = CONTROL.images(), CONTROL.tokens()
    before, after = model(images, tokens), model(-images, tokens)
    assert torch.equal(before.text_embedding, after.text_embedding)
    real = tokens != PAD
    assert not torch.isclose(before.logits[real], after.logits[real]).all(-1).any()
    assert not torch.isclose(before.image_embedding, after.image_embedding).all(-1).any()


@given(cases())
def test_unimodal_states_ignore_the_image_and_multimodal_logits_do_not(case):
    check_who_sees_the_image(case.model())


def test_control_a_unimodal_half_that_sees_and_a_multimodal_half_that_does_not_are_caught():
    sees, seen = CONTROL.model(), []
    sees.encoder.register_forward_hook(lambda module, args, out: seen.append(out.mean(1)))
    sees.unimodal.register_forward_hook(lambda module, args, out: (out[0], out[1] + seen[-1]))
    blind = CONTROL.model()
    with torch.no_grad():
        for block in blind.multimodal.blocks:
            block.cross_attention.out.weight.zero_()
    for broken in (sees, blind):
        with fails:
            check_who_sees_the_image(broken)
