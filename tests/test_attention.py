"""Attention, the poolers and their wiring, sizes and initial values (Sec. 3.2, Tables 1 and 8f)."""
import dataclasses
import math
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails, holds_unless, logits_of, words_of
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import CONFIGS, TABLE_1, Attention, AttentionalPooler, CoCa, CoCaConfig, causal_mask

seeds = st.integers(0, 10_000)
sides = st.integers(1, 7)


def check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal):
    """Causal to itself, or to a context under a random mask, which may leave a row nothing."""
    torch.manual_seed(seed)
    layer = Attention(4 * heads, heads)
    x = torch.randn(B, Lq, 4 * heads)
    context = None
    mask = causal_mask(Lq)
    if not causal:
        context = torch.randn(B, Lk, 4 * heads)
        mask = torch.rand(B, 1, Lq, Lk) < 0.7
    k, v = layer.kv(x if context is None else context).chunk(2, -1)
    qkv = [torch.stack(t.split(4, -1), 1) for t in (layer.q(x), k, v)]  # (B, H, L, 4) each
    out, weights = coca.attention(*qkv, mask)
    torch.testing.assert_close(layer(x, context, mask), layer.out(torch.cat(out.unbind(1), -1)))
    torch.testing.assert_close(layer.weights(x, context, mask), weights)
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).expand(weights.shape[:-1]).float())


@given(seeds, sides, st.integers(1, 3), sides, sides, st.booleans())
def test_the_fused_kernel_equals_attention_written_out(seed, B, heads, Lq, Lk, causal):
    check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal)


@pytest.mark.parametrize("diagonal", [99, 1, -1])
def test_control_a_wrong_fused_mask_is_caught(diagonal):
    kernel = F.scaled_dot_product_attention

    def wrong(q, k, v, mask):
        return kernel(q, k, v, torch.ones_like(mask).tril(diagonal))

    check_fused_equals_written_out(0, 2, 2, 5, 5, True)
    with mock.patch.object(F, "scaled_dot_product_attention", wrong), fails:
        check_fused_equals_written_out(0, 2, 2, 5, 5, True)


def forgetful(self, x, context=None, cache=None, right=Attention.keys_values):
    return right(self, x, context)


def wasteful(self, x, context=None, cache=None, right=Attention.keys_values):
    self.kv(x if context is None else context)
    return right(self, x, context, cache)


@holds_unless(forgotten=mock.patch.object(Attention, "keys_values", forgetful),
              computed_again=mock.patch.object(Attention, "keys_values", wasteful))
def test_the_cache_equals_the_full_run_and_no_key_is_computed_twice(case):
    """Token by token, with the cache of those before, gives the logits of a run over the whole."""
    model, images, tokens = case.example(dtype=torch.float64)
    image_context, _ = model.pool_image(images)
    computed = Counter()

    def count(module, args, out):
        computed[module] += out.shape[1]

    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.kv.register_forward_hook(count)
    cache = {}
    states = []
    for t in range(tokens.shape[1]):
        state = model.unimodal.extend(tokens[:, t:t + 1], t, cache)
        states.append(model.multimodal(state, image_context, cache))
    for block in (*model.unimodal.blocks, *model.multimodal.blocks):
        assert computed[block.self_attention.kv] == tokens.shape[1]
    for block in model.multimodal.blocks:
        assert computed[block.cross_attention.kv] == image_context.shape[1]
    words = words_of(tokens)
    logits = model.multimodal.head(torch.cat(states, 1))
    torch.testing.assert_close(logits[words], logits_of(model, images, tokens)[words])


@given(seeds, sides, st.integers(2, 5), st.integers(2, 9))
def test_queries_ignore_the_order_of_tokens_and_ask_for_different_things(seed, B, n_query, P):
    torch.manual_seed(seed)
    pooler = AttentionalPooler(8, 2, n_query)
    tokens = torch.randn(B, P, 8)
    pooled = pooler(tokens)
    assert pooled.shape == (B, n_query, 8)
    torch.testing.assert_close(pooled.mean(-1), torch.zeros(B, n_query), atol=1e-5, rtol=0)
    assert pooler.weights(tokens).shape == (B, 2, n_query, P)
    torch.testing.assert_close(pooler(tokens[:, torch.randperm(P)]), pooled)
    with fails:
        torch.testing.assert_close(pooled[:, 0], pooled[:, 1])
    mask = torch.arange(P)[None] < P - 1  # the last is hidden
    torch.testing.assert_close(pooler(tokens, mask), pooler(tokens[:, :-1]))


def check_sinusoids(grid, width, frequency=lambda i, n: 10000 ** -(i / n)):
    """Row and column, each by sines, then cosines, of its number times width / 4 frequencies."""
    frequencies = [frequency(i, width // 4) for i in range(width // 4)]
    expected = torch.zeros(grid, grid, width)
    for row in range(grid):
        for column in range(grid):
            place = [turn(p * f) for p in (row, column) for turn in (math.sin, math.cos)
                     for f in frequencies]
            expected[row, column, :len(place)] = torch.tensor(place)
    found = coca.sinusoids_2d(grid, width).reshape(grid, grid, width)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@given(sides, st.integers(4, 40))
def test_image_positions_are_sinusoids_of_row_and_column(grid, width):
    check_sinusoids(grid, width)


@pytest.mark.parametrize("wrong", [
    lambda i, n: 10000 * -(i / n), lambda i, n: 10000 ** (i / n), lambda i, n: 100 ** -(i / n)])
def test_control_other_frequencies_are_caught(wrong):
    with fails:
        check_sinusoids(4, 16, wrong)


def test_image_positions_start_nearest_to_those_of_neighbours():
    position = CoCa(CoCaConfig()).encoder.position                      # (64, D), a grid of 8 x 8
    nearest = torch.cdist(position[9:10], position).topk(5, largest=False).indices[0]
    assert set(nearest.tolist()) == {9, 9 - 1, 9 + 1, 9 - 8, 9 + 8}


def moves(case, part):
    """Whether the tokens for the decoder, and the image embedding, change when a part does."""
    model, images, _ = case.example()
    tokens, embedding = model.pool_image(images)
    with torch.no_grad():
        for p in getattr(model, part).parameters():
            p.add_(torch.randn_like(p))
    tokens_after, embedding_after = model.pool_image(images)
    return not torch.equal(tokens, tokens_after), not torch.equal(embedding, embedding_after)


@given(cases())
def test_cascade_pools_the_pooled_tokens_and_parallel_the_encoders(case):
    tokens, embedding = case.model().pool_image(case.images())
    assert tokens.shape[1:] == (case.n_query or 4, 16)  # 0 queries: the decoder gets all patches
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(tokens)))
    assert moves(case, "encoder") == (True, True)
    assert moves(case, "contrastive_pooler") == (False, True)  # two separate poolers
    if case.n_query:
        assert moves(case, "generative_pooler") == (True, case.pooler == "cascade")


@pytest.mark.parametrize("name, encoder, decoder", [
    ("base", 86, 297), ("large", 303, 484), ("giant", 1012, 1180)])
def test_parameter_counts_are_those_of_table_1(name, encoder, decoder):
    """In millions. Giant: those that its layers add up to; the paper prints 1B and 1.1B."""
    with torch.device("meta"):
        model = CoCa(CONFIGS[name])
        smaller = CoCa(dataclasses.replace(CONFIGS[name], vocab_size=32_000))
    assert TABLE_1[name] == pytest.approx((encoder, decoder), rel=0.08)
    assert coca.count_parameters(model.encoder) == pytest.approx(encoder, rel=0.005)
    right = pytest.approx(decoder, rel=0.005)
    assert coca.count_parameters(model.unimodal, model.multimodal) == right
    assert coca.count_parameters(smaller.unimodal, smaller.multimodal) != right  # control


@pytest.mark.parametrize("wrong", [
    dict(width=10, heads=3), dict(image_size=30, patch_size=4), dict(pooler="both"),
    dict(lambda_con=0, lambda_cap=0)])
def test_a_config_that_cannot_work_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as e:
        CoCaConfig(**wrong)
    assert "\n" not in str(e.value) and next(iter(wrong)) in str(e.value)


def test_texts_too_long_and_images_of_another_size_are_refused_in_one_line():
    model = CONTROL.model()
    with pytest.raises(ValueError, match="a text of 10 tokens is longer than text_len 9$"):
        model.encode_text(torch.ones(1, 10, dtype=torch.long))
    for rows, columns in ((12, 12), (4, 16), (9, 9)):  # the last two have the right 4 patches
        wrong = rf"\({rows}, {columns}\) pixels, but the model is made for 8 x 8$"
        with pytest.raises(ValueError, match=wrong):
            model.encode_image(torch.zeros(1, 3, rows, columns))


def check_initialised(case):
    """No value is left as memory happened to be; what adds to a residual stream starts smaller."""
    empty = torch.empty

    def dirty(*size, **how):
        return empty(*size, **how).fill_(math.nan)

    torch.manual_seed(0)
    with mock.patch.object(torch, "empty", dirty):
        model = CoCa(case.config(width=64, vocab_size=64, n_multi=3))
    c = model.config
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not name.endswith("bias") or not p.any(), name
        if name.endswith(("_attention.out.weight", "mlp.2.weight")):
            layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
            spread = (2 * layers * p.shape[1]) ** -0.5
            assert p.std().item() == pytest.approx(spread, rel=0.2), name
    assert model.temperature.item() == pytest.approx(0.07)


def test_every_parameter_is_initialised_and_the_temperature_at_007():
    check_initialised(CONTROL)
    with mock.patch.object(CoCa, "init_parameters"), fails:  # control
        check_initialised(CONTROL)
