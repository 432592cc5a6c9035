"""Attention, the poolers and their wiring, sizes and initial values (Sec. 3.2, Tables 1 and 8f)."""
import dataclasses
import math
from unittest import mock

import pytest
import torch
from helpers import CONTROL, cases, fails, wrong_mask
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import CONFIGS, TABLE_1, Attention, AttentionalPooler, Cache, CoCa, CoCaConfig

seeds, sides = st.integers(0, 10_000), st.integers(1, 7)


def check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal):
    torch.manual_seed(seed)
    layer, x, context = Attention(4 * heads, heads), torch.randn(B, Lq, 4 * heads), None
    if not causal:
        context = torch.randn(B, Lk, 4 * heads)
    written, weights = layer(x, context, causal, return_weights=True)
    torch.testing.assert_close(layer(x, context, causal), written)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@given(seeds, sides, st.integers(1, 3), sides, sides, st.booleans())
def test_the_fused_kernel_equals_attention_written_out(seed, B, heads, Lq, Lk, causal):
    check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal)


@pytest.mark.parametrize("diagonal", [99, 1, -1])
def test_control_a_wrong_fused_mask_is_caught(diagonal):
    with wrong_mask(diagonal), fails:
        check_fused_equals_written_out(0, 2, 2, 5, 5, True)


def check_cache(case):
    """Token by token, with the cache of those before, gives the logits of a run over the whole."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    image_context, _ = model.pool_image(images)
    cache, states = Cache(), []
    for t in range(tokens.shape[1]):
        state = model.unimodal.extend(tokens[:, t:t + 1], t, cache)
        states.append(model.multimodal(state, image_context, cache))
    logits, real = model.multimodal.head(torch.cat(states, 1)), tokens > 0
    torch.testing.assert_close(logits[real], model(images, tokens).logits[real])


@given(cases())
def test_the_cache_equals_the_full_run(case):
    check_cache(case)


def test_control_a_forgetful_cache_is_caught():
    def forget(self, layer, source, grows):
        return layer.keys_values(source)

    with mock.patch.object(Cache, "keys_values", forget), fails:
        check_cache(CONTROL)


@given(seeds, sides, st.integers(2, 5), st.integers(2, 9))
def test_queries_ignore_the_order_of_tokens_and_ask_for_different_things(seed, B, n_query, P):
    torch.manual_seed(seed)
    pooler = AttentionalPooler(8, 2, n_query)
    tokens = torch.randn(B, P, 8)
    pooled, weights = pooler(tokens, return_weights=True)
    assert pooled.shape == (B, n_query, 8)
    assert weights.shape == (B, 2, n_query, P)
    torch.testing.assert_close(pooler(tokens[:, torch.randperm(P)]), pooled)
    with fails:
        torch.testing.assert_close(pooled[:, 0], pooled[:, 1])


def test_image_positions_start_nearest_to_those_of_neighbours():
    position = CoCa(CoCaConfig()).encoder.position                      # (64, D), a grid of 8 x 8
    nearest = torch.cdist(position[9:10], position).topk(5, largest=False).indices[0]
    assert set(nearest.tolist()) == {9, 9 - 1, 9 + 1, 9 - 8, 9 + 8}


def moves(case, part):
    """Whether the tokens for the decoder, and the image embedding, change when a part does."""
    model, images = case.model(), case.images()
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
    dict(width=10, heads=3), dict(image_size=30, patch_size=4), dict(pooler="both"), dict(heads=0),
    dict(n_query=-1), dict(lambda_con=0, lambda_cap=0), dict(lambda_cap=math.nan), dict(n_uni=0),
    dict(lambda_con=math.inf), dict(encoder_layers=-1), dict(vocab_size=4), dict(text_len=2)])
def test_a_config_that_cannot_work_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as e:
        CoCaConfig(**wrong)
    assert "\n" not in str(e.value) and next(iter(wrong)) in str(e.value)


def test_texts_too_long_and_images_of_another_size_are_refused_in_one_line():
    model = CONTROL.model()
    with pytest.raises(ValueError, match="a text of 10 tokens is longer than text_len 9"):
        model.encode_text(torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(12, 12\) pixels, but the model is made for 4 patches"):
        model.encode_image(torch.zeros(1, 3, 12, 12))


def check_initialised(model):
    """No value is left as memory happened to be; what adds to a residual stream starts smaller."""
    c = model.config
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if name.endswith(("_attention.out.weight", "mlp.2.weight")):
            layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
            spread = (2 * layers * p.shape[1]) ** -0.5
            assert p.std().item() == pytest.approx(spread, rel=0.2), name


def model_in_dirty_memory():
    """A model whose memory is full of NaN before values are put in."""
    empty = torch.empty
    torch.manual_seed(0)
    dirty = lambda *size, **how: empty(*size, **how).fill_(math.nan)  # noqa: E731
    with mock.patch.object(torch, "empty", dirty):
        return CoCa(CoCaConfig(width=64, vocab_size=64, n_multi=3))


def test_every_parameter_is_initialised():
    check_initialised(model_in_dirty_memory())
    with mock.patch.object(CoCa, "init_parameters", lambda self: None), fails:  # control
        check_initialised(model_in_dirty_memory())


def check_temperature(model):
    """It starts at 0.07; far outside the bounds it is at the bound, with a gradient."""
    assert model.temperature.item() == pytest.approx(0.07)
    for log_temperature, bound in ((-100.0, 0.01), (100.0, 1.0)):
        with torch.no_grad():
            model.log_temperature.fill_(log_temperature)
        model.log_temperature.grad = None
        model.temperature.backward()
        assert model.temperature.item() == pytest.approx(bound, rel=1e-5)
        assert model.log_temperature.grad > 0
        assert model.log_temperature == log_temperature  # reading changed nothing


def test_temperature_starts_at_007_and_is_bounded_without_losing_its_gradient():
    def bare(self):
        return self.log_temperature.exp().clamp(0.01, 1)

    check_temperature(CONTROL.model())
    with mock.patch.object(CoCa, "temperature", property(bare)), fails:  # control
        check_temperature(CONTROL.model())


def test_the_tour_prints_the_mask(capsys):
    coca.tour()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = ["<begin>", "a", "red", "square", "<end>", "[CLS]", "<pad>"]
    start = lines.index(words) + 1
    for i, (word, *weights) in enumerate(lines[start:start + len(words)]):
        assert word == words[i]
        assert "." not in weights[:i + 1] and set(weights[i + 1:]) <= {"."}


# Standardised and whitened patches


def embedded(images, whitening):
    """Patch embeddings (n, D, rows, columns) by an encoder that starts from these images.

    None: it starts as CoCa.init_parameters leaves it.
    """
    torch.manual_seed(0)
    encoder = CoCa(CoCaConfig(image_size=8, patch_size=4, width=64, vocab_size=5)).encoder
    if whitening is not None:
        encoder.standardise(images, whitening)
    return encoder.patches(images)


def check_colours_do_not_matter(whitening):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = embedded(images, whitening)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(64), rtol=0, atol=1e-4)
    assert found.std().item() == pytest.approx(1, abs=0.1)
    darker = embedded(images * 0.3 - 0.6, whitening)
    torch.testing.assert_close(darker, found, rtol=0, atol=0.01)


def test_patches_start_centred_and_at_one_scale_however_dark_or_pale_the_images_are():
    check_colours_do_not_matter(0)
    check_colours_do_not_matter(0.5)
    with fails:  # control
        check_colours_do_not_matter(None)


def test_whitening_is_to_what_power_brightness_no_longer_outweighs_detail():
    noise = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    brightness = torch.randn(400, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    images = 0.01 * noise + brightness  # spread of a patch's mean: 1, of what is left: 0.01
    ratios = []
    for whitening in (None, 0, 0.5):
        found = embedded(images, whitening)
        found = found - found.mean((0, 2, 3), keepdim=True)
        loud = found.mean((2, 3), keepdim=True)  # all patches of an image are equally bright
        ratios.append((loud.std() / (found - loud).std()).item())
    plain, standardised, half = (ratio * 47**0.5 for ratio in ratios)  # one direction against 47
    assert standardised == pytest.approx(plain, rel=0.01), ratios
    assert half == pytest.approx(plain**0.5, rel=0.2), ratios
    assert torch.isfinite(embedded(torch.ones(4, 3, 8, 8), 0.5)).all()
