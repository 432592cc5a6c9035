"""Attention, the poolers and their wiring, sizes and initial values (Sec. 3.2, Tables 1 and 8f)."""
import dataclasses
import itertools
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

import coca
from coca import CONFIGS, TABLE_1, Attention, AttentionalPooler, Cache, CoCa, CoCaConfig

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
    out, weights = coca.attention(q, k, v, causal, valid)
    torch.testing.assert_close(weights @ v, out)
    for b, h in itertools.product(range(2), range(3)):
        slow = slow_attention(q[b, h], k[b, h], v[b, h], causal, valid[b])
        torch.testing.assert_close(out[b, h], slow)


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
def test_queries_ignore_the_order_of_tokens_and_each_other_and_ask_for_different_things(
        seed, B, n_query, P):
    torch.manual_seed(seed)
    many, one = AttentionalPooler(8, 2, n_query), AttentionalPooler(8, 2, 1)
    tokens = torch.randn(B, P, 8)
    pooled, weights = many(tokens, return_weights=True)
    assert pooled.shape == (B, n_query, 8) and weights.shape == (B, 2, n_query, P)
    torch.testing.assert_close(many(tokens[:, torch.randperm(P)]), pooled)
    for i in range(n_query):
        one.load_state_dict({**many.state_dict(), "query": many.query[i:i + 1]})
        torch.testing.assert_close(one(tokens), pooled[:, i:i + 1])
    with fails:
        torch.testing.assert_close(pooled[:, 0], pooled[:, 1])


def test_control_the_encoder_knows_the_order_of_patches_by_its_positions():
    model, images = CONTROL.model(), CONTROL.images()
    swapped = torch.cat([images[..., 4:], images[..., :4]], -1)  # the two columns of patches
    assert not torch.isclose(model.encode_image(images), model.encode_image(swapped)).all()
    with torch.no_grad():
        model.encoder.position.zero_()
    torch.testing.assert_close(model.encode_image(images), model.encode_image(swapped))


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


def test_the_base_model_runs_at_the_papers_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = CoCa(CONFIGS["base"])
        out = model(torch.empty(2, 3, 288, 288), torch.ones(2, 64, dtype=torch.long))
    assert out.logits.shape == (2, 64, 64_000)
    assert out.image_embedding.shape == out.text_embedding.shape == (2, 768)


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


SPREAD = {  # root mean square of parameters by the end of their names; matrices see below
    "bias": 0, "norm.weight": 1, "query": 1, "token.weight": 0.02, "unimodal.position": 0.02,
    "cls": 0.02, "encoder.position": 0.5 ** 0.5, "log_temperature": -math.log(0.07)}


def check_initialised(model):
    """Each parameter has the size that it should have: none is left as memory happened to be."""
    c = model.config
    for name, p in model.named_parameters():
        spread = p[0].numel() ** -0.5 if p.dim() else None  # sums over inputs keep their size
        if name.endswith(("_attention.out.weight", "mlp.2.weight")):
            layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
            spread /= math.sqrt(2 * layers)  # what adds to a residual stream
        for end, value in SPREAD.items():
            if name.endswith(end):
                spread = value
        assert p.square().mean().sqrt().item() == pytest.approx(spread, rel=0.2), name


def model_in_dirty_memory():
    """A model whose memory is full of NaN before values are put in."""
    empty = torch.empty
    torch.manual_seed(0)
    dirty = lambda *size, **how: empty(*size, **how).fill_(math.nan)  # noqa: E731
    with mock.patch.object(torch, "empty", dirty):
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
    check_temperature(CONTROL.model())


def test_control_a_bare_clamp_is_caught():
    def bare(self):
        return self.log_temperature.exp().clamp(0.01, 1)

    with mock.patch.object(CoCa, "temperature", property(bare)), fails:
        check_temperature(CONTROL.model())


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
        line = rf"{name} +encoder +([\d.]+) \({encoder}\).* decoder +([\d.]+) \({decoder}\)"
        assert numbers(line) == pytest.approx([encoder, decoder], rel=0.08)
