"""Who may look at whom in the text decoder (Sec. 3.2, Figure 2): ten theorems.

Each holds for random models, texts and images, and fails for each broken model that @holds_unless
names above it. A model is broken by putting another function in the place of one of coca.py's.
"""
from unittest import mock

import torch
import torch.nn.functional as F
from helpers import VOCAB, holds_unless, logits_of, record_embedding, recorded_weights, words_of

import coca
from coca import BEGIN, END, PAD, CoCa, MultimodalDecoder, UnimodalDecoder, causal_mask

# "a ring", in a batch whose longest caption has one word more. A row may look where it has an x
TEXT = torch.tensor([[BEGIN, 4, 5, END, PAD],
                     [BEGIN, 4, 6, 5, END]])
MASK = """
              <begin>    a    ring   <end>  <pad>  [CLS]
    <begin>      x       .      .      .      .      .
    a            x       x      .      .      .      .
    ring         x       x      x      .      .      .
    <end>        x       x      x      .      .      .
    <pad>        x       x      x      .      .      .
    [CLS]        x       x      x      .      .      x
"""
# A public bug (open_clip's issue 549, also in torchmultimodal): the column of [CLS] is added in
# front of the padding mask, while [CLS] stands behind the text. That shifts the mask by one: [CLS]
# looks at one token too many, and never at itself
SHIFTED = """
              <begin>    a    ring   <end>  <pad>  [CLS]
    [CLS]        x       x      x      x      .      .
"""


def drawn(picture):
    """The rows of a picture without their names: True where it has an x."""
    lines = picture.strip().splitlines()[1:]
    return torch.tensor([[sign == "x" for sign in line.split()[1:]] for line in lines])


def padding(hidden=(PAD, END), sides=(0, 1), cls=True):
    """Breaks text_mask: which tokens it hides, the sides of F.pad, whether [CLS] sees itself."""
    def wrong(tokens):
        visible = F.pad(~torch.isin(tokens, torch.tensor(hidden)), sides, value=cls)
        return causal_mask(visible.shape[1]) & visible[:, None, None]

    return mock.patch.object(coca, "text_mask", wrong)


def future(last, first=-99):
    """Breaks causal_mask: token i sees i + first to i + last. (Right: future(0); 99 is no mask.)"""
    def wrong(L, device=None):
        return torch.ones(L, L, dtype=torch.bool).triu(first).tril(last)

    return mock.patch.object(coca, "causal_mask", wrong)


def masked_by(number, kernel=F.scaled_dot_product_attention):
    """Breaks attention: a number in place of minus infinity. 0 is no mask at all."""
    def wrong(q, k, v, mask=None):
        return kernel(q, k, v, None if mask is None else number * ~mask)

    return mock.patch.object(F, "scaled_dot_product_attention", wrong)


@holds_unless(shifted=padding(sides=(1, 0)), no_mask=future(99), next_seen=future(1),
              itself_not_seen=future(-1), only_itself=future(0, 0), unused=masked_by(0.0))
def test_the_mask_is_the_one_drawn_above_and_every_layer_follows_it(case):
    assert torch.equal(coca.text_mask(TEXT)[0, 0], drawn(MASK))
    model = case.model()
    with recorded_weights() as record:
        model.unimodal(TEXT)
    assert len(record) == model.config.n_uni
    for _, weights in record:
        assert ((weights[0] > 0) == drawn(MASK)).all()  # (H, 6, 6)
    with padding(sides=(1, 0)):
        assert torch.equal(coca.text_mask(TEXT)[0, 0, -1:], drawn(SHIFTED))


@holds_unless(no_mask=future(99), next_seen=future(1), soft=masked_by(-20.0),
              itself_not_seen=future(-1), only_itself=future(0, 0), unused=masked_by(0.0))
def test_masked_weights_are_exactly_0_all_others_are_not_and_rows_sum_to_1(case):
    model, images, tokens = case.example(extra=1)
    with recorded_weights() as record:
        model.decode(images, tokens)
    shown = torch.cat([words_of(tokens), torch.ones(len(tokens), 1) > 0], 1)  # (B, L + 1)
    earlier = torch.ones(shown.shape[1], shown.shape[1]).tril() > 0
    unimodal = earlier & shown[:, None, None]
    multimodal = earlier[:-1, :-1]  # no [CLS], and padding comes last
    masked = [weights for mask, weights in record if mask is not None]
    assert len(masked) == 4  # every self-attention of both halves, and no other
    for weights, allowed in zip(masked, (unimodal, unimodal, multimodal, multimodal)):
        assert torch.equal(weights > 0, allowed.expand(weights.shape))
    for mask, weights in record:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert mask is not None or (weights > 0).all()


def without_mask(self, states, image_context, forward=MultimodalDecoder.forward):
    return forward(self, states, image_context, cache={})  # as in generation, where none is needed


UPPER_HALF = mock.patch.object(MultimodalDecoder, "forward", without_mask)


@holds_unless(no_mask=future(99), next_seen=future(1), soft=masked_by(-1000.0), upper=UPPER_HALF)
def test_future_tokens_do_not_change_past_logits(case):
    """Not by a bit, in neither half, and not where scores are so large that -1000 hides nothing."""
    for scale in (1.0, 1e4):
        model, images, tokens = case.example()
        with torch.no_grad():
            for block in (*model.unimodal.blocks, *model.multimodal.blocks):
                block.self_attention.q.weight.mul_(scale)
        cut = case.cut()
        changed = tokens.clone()
        changed[:, cut:] = 4 + (tokens[:, cut:] + 1) % (VOCAB - 4)
        changed[tokens == PAD] = PAD
        states = model.unimodal(tokens)[0][:, :cut]
        assert torch.equal(model.unimodal(changed)[0][:, :cut], states)
        logits = logits_of(model, images, tokens)
        after = logits_of(model, images, changed)
        assert logits.isfinite().all()
        assert torch.equal(after[:, :cut], logits[:, :cut])
        assert not torch.isclose(after[:, cut], logits[:, cut]).all()


@holds_unless(no_mask=future(99), next_seen=future(1), upper=UPPER_HALF)
def test_past_logits_have_no_gradient_to_future_tokens(case):
    model, images, tokens = case.example()
    cut = case.cut()
    embedded = record_embedding(model)
    states = model.unimodal(tokens)[0]
    logits = logits_of(model, images, tokens)
    for out, source in zip((states, logits), embedded):
        grad, = torch.autograd.grad(out[:, :cut].square().sum(), source)
        assert (grad[:, cut:] == 0).all()
        assert (grad[:, :cut].abs().sum(-1) > 0).all()


def read(model, images, tokens, rows):
    """What is read of a text: its embedding, the logits of rows (B, L), the losses."""
    logits = logits_of(model, images, tokens)[:, :rows.shape[1]]
    return model.encode_text(tokens), logits[rows], *model.losses(images, tokens)


@holds_unless(pad_seen=padding([END]), no_mask=future(99), end_seen=padding([PAD]),
              shifted=padding(sides=(1, 0)))
def test_neither_padding_nor_the_end_token_is_an_input(case):
    """Text embedding, logits and losses are the same, whatever the embeddings of these two are."""
    model, images, tokens = case.example()
    padded = case.tokens(extra=2)
    embedding = model.unimodal.token.weight
    before = read(model, images, tokens, tokens != PAD)
    with torch.no_grad():
        embedding[PAD].mul_(-3)  # (a LayerNorm would hide an added constant)
    torch.testing.assert_close(read(model, images, padded, tokens != PAD), before)

    words = words_of(padded)
    before = read(model, images, padded, words)
    states = model.unimodal(padded)[0]
    with torch.no_grad():
        embedding[END].mul_(-3)
    assert all(map(torch.equal, read(model, images, padded, words), before))
    moved = (model.unimodal(padded)[0] != states).any(-1)
    assert torch.equal(moved, padded == END)  # its own row, and nothing is read from that

    model.losses(images, padded).total.backward()
    assert not embedding.grad[[PAD, END]].any()
    assert model.multimodal.head.weight.grad[END].any()  # but <end> is a target


@holds_unless(shifted=padding(sides=(1, 0)), pad_seen=padding([END]), end_seen=padding([PAD]),
              only_itself=future(0, 0), itself_not_seen=padding(cls=False))
def test_cls_sees_every_word_and_itself_and_nothing_else(case):
    """By the gradient of the text embedding, and by the weights of every unimodal layer."""
    model, _, tokens = case.example(extra=2, dtype=torch.float64)
    words = words_of(tokens)
    embedded = record_embedding(model)
    with recorded_weights() as record:
        text = model.encode_text(tokens)
    (text * torch.randn_like(text)).sum().backward()  # (not the norm, which is 1)
    assert torch.equal(embedded[0].grad.abs().sum(-1) > 0, words)
    assert model.unimodal.cls.grad.any()
    for _, weights in record:
        from_cls = weights[:, :, -1] > 0                                # (B, H, L + 1)
        assert torch.equal(from_cls[..., :-1], words[:, None].expand_as(from_cls[..., :-1]))
        assert from_cls[..., -1].all()


@holds_unless(no_mask=future(99), next_seen=future(1))
def test_nothing_sees_cls(case):
    """Another [CLS] changes the text embedding, and no state and no logit by a bit."""
    model, images, tokens = case.example(extra=1)
    states, text = model.unimodal(tokens)
    logits = logits_of(model, images, tokens)
    with torch.no_grad():
        model.unimodal.cls.mul_(-1)
    states_after, text_after = model.unimodal(tokens)
    assert torch.equal(states_after, states)
    assert torch.equal(logits_of(model, images, tokens), logits)
    assert not torch.isclose(text_after, text).all(1).any()


def cls_left_in(self, tokens):
    x = self.embed(tokens)
    for block in self.blocks:
        x = block(x, mask=coca.text_mask(tokens))
    return x, F.normalize(self.norm(x[:, -1]), dim=-1)


@holds_unless(left_in=mock.patch.object(UnimodalDecoder, "forward", cls_left_in))
def test_cls_stands_behind_the_text_and_is_taken_out_before_the_multimodal_half(case):
    model, _, tokens = case.example(extra=1)
    assert (model.unimodal.embed(tokens)[:, -1] == model.unimodal.cls).all()  # without a position
    last = []
    model.unimodal.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out))
    states = model.unimodal(tokens)[0]
    assert torch.equal(states, last[0][:, :-1])


def text_sees_image(self, images, tokens, forward=CoCa.forward):
    x, y, cap = forward(self, images, tokens)
    return x, y + x, cap


def captions_see_none(self, states, image_context, forward=MultimodalDecoder.forward):
    return forward(self, states, 0 * image_context)


@holds_unless(text_sees=mock.patch.object(CoCa, "forward", text_sees_image),
              captions_do_not=mock.patch.object(MultimodalDecoder, "forward", captions_see_none))
def test_captions_see_the_image_and_the_text_embedding_does_not(case):
    """Another image moves every logit, the image embedding and Eq. (3), and no text embedding."""
    model, images, tokens = case.example()
    x, y, cap = model(images, tokens)
    x_after, y_after, cap_after = model(-images, tokens)
    assert torch.equal(y_after, y)
    assert not torch.isclose(x_after, x).all(-1).any()
    assert cap_after != cap
    logits = logits_of(model, images, tokens)
    assert not torch.isclose(logits_of(model, -images, tokens), logits).all(-1).any()


def unguarded(q, k, v, mask):
    return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@holds_unless(kernel=mock.patch.object(F, "scaled_dot_product_attention", unguarded),
              attention=mock.patch.object(torch.Tensor, "nan_to_num", torch.Tensor.clone))
def test_a_row_that_may_look_at_nothing_gives_0_and_finite_gradients(case):
    """As the first row of a text that begins with <end>, which hides all that the row could see."""
    model, images, tokens = case.example()
    mask = torch.rand(2, 1, 4, 5) > 0.3
    mask[0, 0, 1] = False
    qkv = [torch.randn(2, 3, L, 8, requires_grad=True) for L in (4, 5, 5)]
    for out in (coca.attention(*qkv, mask)[0], F.scaled_dot_product_attention(*qkv, mask)):
        assert (out[0, :, 1] == 0).all()
        grads = torch.autograd.grad(out.square().sum(), qkv)
        assert all(t.isfinite().all() for t in (out, *grads))
    tokens[0, 0] = END
    model.losses(images, tokens).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
