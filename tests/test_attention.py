"""Attention, the attentional poolers and their wiring, sizes and initial values (Sec. 3.2, Tables 1 and 8f)."""
import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import CONTROL, cases, fails, wrong_mask
from hypothesis import given
from hypothesis import strategies as st

from coca import CONFIGS, TABLE_1, Attention, AttentionalPooler, Cache, CoCa, CoCaConfig, attention, count_parameters

seeds, sides = st.integers(0, 10_000), st.integers(1, 7)


def slow_attention(q, k, v, causal, valid):
    """One head of one text: for each query, a loop over the keys it may look at."""
    out = []
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if valid[j] and (j <= i or not causal)]
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(len(q[i]))) for j in keys]
        out.append(sum(weight * v[j] for weight, j in zip(weights, keys)) / sum(weights))
    return torch.stack(out)


@given(seeds, sides, sides, st.booleans())
def test_attention_equals_a_slow_loop(seed, Lq, Lk, causal):
    torch.manual_seed(seed)
    Lk = Lq if causal else Lk
    q, k, v = torch.randn(2, 3, Lq, 4), torch.randn(2, 3, Lk, 4), torch.randn(2, 3, Lk, 4)
    valid = torch.rand(2, Lk) < 0.5
    valid[:, 0] = True
    out, weights = attention(q, k, v, causal, valid)
    torch.testing.assert_close(weights @ v, out)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(out[b, h], slow_attention(q[b, h], k[b, h], v[b, h], causal, valid[b]))


def check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal):
    torch.manual_seed(seed)
    layer = Attention(4 * heads, heads)
    x, context = torch.randn(B, Lq, 4 * heads), None if causal else torch.randn(B, Lk, 4 * heads)
    written, weights = layer(x, context, causal, return_weights=True)
    torch.testing.assert_close(layer(x, context, causal), written)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@given(seeds, sides, st.integers(1, 3), sides, sides, st.booleans())
def test_the_fused_kernel_equals_attention_written_out(seed, B, heads, Lq, Lk, causal):
    check_fused_equals_written_out(seed, B, heads, Lq, Lk, causal)


@pytest.mark.parametrize("diagonal", [None, 1, -1])
def test_control_a_wrong_fused_mask_is_caught(diagonal):
    with wrong_mask(diagonal), fails:
        check_fused_equals_written_out(0, 2, 2, 5, 5, True)


def check_cache(case):
    """Token by token, each with the cache of those before it, gives the logits of a run over the whole."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    caption_tokens, _ = model.pool_image(images)
    cache, states = Cache(), []
    for t in range(tokens.shape[1]):
        state = model.unimodal.extend(tokens[:, t:t + 1], t, cache)
        states.append(model.multimodal(state, caption_tokens, cache))
    real = tokens > 0
    torch.testing.assert_close(model.multimodal.head(torch.cat(states, 1))[real], model(images, tokens).logits[real])


@given(cases())
def test_the_cache_equals_the_full_run(case):
    check_cache(case)


def test_control_a_forgetful_cache_is_caught():
    with mock.patch.object(Cache, "keys_values", lambda self, layer, source, grows: layer.keys_values(source)), fails:
        check_cache(CONTROL)


# Poolers


@given(seeds, sides, st.integers(1, 5), st.integers(1, 9))
def test_a_pooler_gives_n_query_tokens_whatever_the_order_of_the_others(seed, B, n_query, P):
    torch.manual_seed(seed)
    pooler, tokens = AttentionalPooler(8, 2, n_query), torch.randn(B, P, 8)
    pooled, weights = pooler(tokens, return_weights=True)
    assert pooled.shape == (B, n_query, 8) and weights.shape == (B, 2, n_query, P)
    torch.testing.assert_close(pooler(tokens[:, torch.randperm(P)]), pooled)


def test_control_the_encoder_does_not_ignore_the_order_of_patches_but_for_its_positions():
    model, images = CONTROL.model(), CONTROL.images()
    mirrored = torch.cat([images[..., 4:], images[..., :4]], -1)  # the two columns of patches change places
    assert not torch.isclose(model.encode_image(images), model.encode_image(mirrored)).all()
    with torch.no_grad():
        model.encoder.position.zero_()
    torch.testing.assert_close(model.encode_image(images), model.encode_image(mirrored))


@given(seeds, st.integers(2, 5))
def test_queries_do_not_see_each_other_and_ask_for_different_things(seed, n_query):
    torch.manual_seed(seed)
    many, one, tokens = AttentionalPooler(8, 2, n_query), AttentionalPooler(8, 2, 1), torch.randn(2, 6, 8)
    for i in range(n_query):
        one.load_state_dict({**many.state_dict(), "query": many.query[i:i + 1]})
        torch.testing.assert_close(one(tokens), many(tokens)[:, i:i + 1])
    assert not torch.isclose(many(tokens)[:, 0], many(tokens)[:, 1]).all()


def moves(model, images, part):
    """Whether the tokens for the decoder and the image embedding move when a part's parameters do."""
    tokens, embedding = model.pool_image(images)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn_like(p))
    tokens_after, embedding_after = model.pool_image(images)
    return not torch.equal(tokens, tokens_after), not torch.equal(embedding, embedding_after)


@given(cases())
def test_cascade_pools_the_pooled_tokens_and_parallel_the_encoders(case):
    if case.n_query:
        model = case.model()
        assert moves(model, case.images(), model.generative_pooler) == (True, case.pooler == "cascade")
    model = case.model()
    assert moves(model, case.images(), model.contrastive_pooler) == (False, True)  # two separate poolers
    model = case.model()
    assert moves(model, case.images(), model.encoder) == (True, True)


@given(cases())
def test_all_queries_reach_the_decoder_and_none_means_all_patches(case):
    model, images = case.model(), case.images()
    seen, embedding = model.pool_image(images)
    assert seen.shape == (len(images), case.n_query or 4, 16)
    assert embedding.shape == (len(images), 16)  # no query axis left over
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(images)))
    if not case.n_query:
        assert torch.equal(seen, model.encoder(images))


# Sizes


@pytest.mark.parametrize("name, encoder, decoder", [("base", 86, 297), ("large", 303, 484), ("giant", 1012, 1180)])
def test_parameter_counts_are_those_of_table_1(name, encoder, decoder):
    """In millions. Giant's do not follow from the layers the paper gives; ours are those of its layers."""
    with torch.device("meta"):
        model = CoCa(CONFIGS[name])
        smaller = CoCa(dataclasses.replace(CONFIGS[name], vocab_size=32_000))
    assert TABLE_1[name] == pytest.approx((encoder, decoder), rel=0.08)
    assert count_parameters(model.encoder) == pytest.approx(encoder, rel=0.005)
    assert count_parameters(model.unimodal, model.multimodal) == pytest.approx(decoder, rel=0.005)
    with fails:  # control
        assert count_parameters(smaller.unimodal, smaller.multimodal) == pytest.approx(decoder, rel=0.005)


def test_the_base_model_runs_at_the_papers_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = CoCa(CONFIGS["base"])
        out = model(torch.empty(2, 3, 288, 288), torch.ones(2, 64, dtype=torch.long))
    assert out.logits.shape == (2, 64, 64_000)
    assert out.image_embedding.shape == out.text_embedding.shape == (2, 768)


@pytest.mark.parametrize("wrong", [
    dict(width=10, heads=3), dict(image_size=30, patch_size=4), dict(pooler="both"), dict(heads=0), dict(n_query=-1),
    dict(lambda_con=0, lambda_cap=0), dict(lambda_cap=math.nan), dict(lambda_con=math.inf), dict(n_uni=0),
    dict(encoder_layers=-1), dict(vocab_size=4), dict(text_len=2)])
def test_a_config_that_cannot_work_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as e:
        CoCaConfig(**wrong)
    assert "\n" not in str(e.value) and next(iter(wrong)) in str(e.value)


def test_texts_too_long_and_images_of_another_size_are_refused_in_one_line():
    model = CONTROL.model()
    with pytest.raises(ValueError, match="a text of 10 tokens is longer than text_len 9"):
        model.encode_text(torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images of \(12, 12\) pixels, but the model is made for 4 patches"):
        model.encode_image(torch.zeros(1, 3, 12, 12))


# Initial values


def check_initialised(model):
    """Each parameter has the size that CoCa.init_parameters gives it: none is left as memory happened to be."""
    c = model.config
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            size = 0
        elif "norm" in name or name.endswith("query"):
            size = 1
        elif name in ("unimodal.token.weight", "unimodal.position", "unimodal.cls"):
            size = 0.02
        elif name == "encoder.position":
            size = 0.5 ** 0.5  # sinusoids
        elif name == "log_temperature":
            size = -math.log(0.07)
        else:
            size = p[0].numel() ** -0.5  # sums over inputs keep their size
            if name.endswith(("attention.out.weight", "mlp.2.weight")) and "pooler" not in name:
                layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
                size /= math.sqrt(2 * layers)  # what adds to a residual stream
        assert p.square().mean().sqrt().item() == pytest.approx(size, rel=0.2), name


def model_in_dirty_memory():
    """A model whose memory is full of NaN before values are put in."""
    empty = torch.empty
    torch.manual_seed(0)
    with mock.patch.object(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(math.nan)):
        return CoCa(CoCaConfig(width=64, vocab_size=64, n_multi=3))


def test_every_parameter_is_initialised():
    check_initialised(model_in_dirty_memory())


def test_control_parameters_left_out_of_initialisation_are_caught():
    with mock.patch.object(CoCa, "init_parameters", lambda self: None), fails:
        check_initialised(model_in_dirty_memory())
    model = model_in_dirty_memory()
    for p in model.parameters():
        right = p.data
        p.data = torch.full_like(p, 1.5)
        with fails:
            check_initialised(model)
        p.data = right


def check_temperature(model):
    """It starts at 0.07; far outside the bounds it is at the bound, with a gradient that leads back."""
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
    check_temperature(CONTROL.model())


def test_control_a_bare_clamp_and_a_clamp_of_the_parameter_are_caught():
    bare = property(lambda self: self.log_temperature.exp().clamp(0.01, 1))
    in_place = property(lambda self: self.log_temperature.data.clamp_(math.log(0.01), 0) * 0 + self.log_temperature.exp())
    for wrong in (bare, in_place):
        with mock.patch.object(CoCa, "temperature", wrong), fails:
            check_temperature(CONTROL.model())


# The tour


def test_the_tour_prints_the_mask_both_losses_and_table_1():
    coca = Path(__file__).resolve().parent.parent / "coca.py"
    done = subprocess.run([sys.executable, coca], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    words = ["<begin>", "a", "red", "square", "<end>", "[CLS]", "<pad>"]
    start = lines.index(words) + 1
    for i, (word, *weights) in enumerate(lines[start:start + len(words)]):
        assert word == words[i]
        assert "." not in weights[:i + 1] and set(weights[i + 1:]) <= {"."}
        assert sum(map(float, weights[:i + 1])) == pytest.approx(1, abs=0.04)

    def numbers(pattern):
        return [float(number) for number in re.search(pattern, done.stdout).groups()]

    con, guess_con = numbers(r"contrastive +([\d.]+) +2 ln N = ([\d.]+)")
    cap, guess_cap = numbers(r"captioning +([\d.]+) +ln V = ([\d.]+)")
    total, = numbers(r"both +([\d.]+)")
    assert [guess_con, guess_cap] == pytest.approx([2 * math.log(8), math.log(12)], abs=0.01)
    assert [con, cap] == pytest.approx([guess_con, guess_cap], rel=0.5)
    assert total == pytest.approx(con + 2 * cap, abs=0.03)
    for name, (encoder, decoder) in TABLE_1.items():
        ours = numbers(rf"{name} +encoder +([\d.]+) \({encoder}\).* decoder +([\d.]+) \({decoder}\)")
        assert ours == pytest.approx([encoder, decoder], rel=0.08)
