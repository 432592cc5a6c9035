"""Attention, the attentional poolers and their wiring, parameter counts and initialisation (Sec. 3.2, Tables 1 and 8f)."""
import dataclasses
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, wrong_mask
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import CONFIGS, Attention, AttentionalPooler, Cache, CoCa, CoCaConfig, attention

fails = pytest.raises(AssertionError)
seeds, sides = st.integers(0, 10_000), st.integers(1, 7)


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


@given(seeds, sides, sides)
def test_attention_equals_a_slow_loop(seed, Lq, Lk):
    torch.manual_seed(seed)
    q, k, v = torch.randn(Lq, 3), torch.randn(Lk, 3), torch.randn(Lk, 3)
    out, weights = attention(q[None, None], k[None, None], v[None, None])
    for i in range(Lq):
        e = [math.exp(float(q[i] @ k[j]) / math.sqrt(3)) for j in range(Lk)]
        torch.testing.assert_close(out[0, 0, i], sum(x * v[j] for j, x in enumerate(e)) / sum(e))
        torch.testing.assert_close(weights[0, 0, i], torch.tensor(e) / sum(e))


def check_cache(case, cut, broken=False):
    """States of the second part, given the cache of the first, are those of a run over the whole."""
    model, images, tokens = case.model(), case.images(), case.tokens()
    caption_tokens = model.pool_image(images)[0]
    whole = model.multimodal(model.unimodal.extend(tokens, Cache(tokens.shape[1])), caption_tokens)
    cache, parts = Cache(tokens.shape[1]), []
    for start, part in ((0, tokens[:, :cut]), (cut, tokens[:, cut:])):
        cache.start = 0 if broken else start
        parts.append(model.multimodal(model.unimodal.extend(part, cache), caption_tokens, cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@given(cases(), st.data())
def test_the_key_value_cache_equals_the_full_run_for_any_cut(case, data):
    check_cache(case, data.draw(st.integers(1, max(case.lengths) - 1)))


def test_control_a_forgotten_cache_is_caught():
    with fails:
        check_cache(CONTROL, 3, broken=True)


# Poolers


@given(seeds, sides, st.integers(1, 5), st.integers(1, 9))
def test_pooler_gives_n_query_tokens_whatever_their_order(seed, B, n_query, P):
    torch.manual_seed(seed)
    pooler, tokens = AttentionalPooler(8, 2, n_query), torch.randn(B, P, 8)
    pooled, weights = pooler(tokens, return_weights=True)
    assert pooled.shape == (B, n_query, 8) and weights.shape == (B, 2, n_query, P)
    torch.testing.assert_close(pooler(tokens[:, torch.randperm(P)]), pooled)
    torch.testing.assert_close(pooler(tokens), pooled)


@given(seeds, st.integers(2, 5))
def test_each_query_pools_by_itself(seed, n_query):
    """One query of many gives what it gives alone: queries do not see each other."""
    torch.manual_seed(seed)
    many, one, tokens = AttentionalPooler(8, 2, n_query), AttentionalPooler(8, 2, 1), torch.randn(2, 6, 8)
    with torch.no_grad():
        many.query.normal_()
    for i in range(n_query):
        one.load_state_dict({**many.state_dict(), "query": many.query[i:i + 1]})
        torch.testing.assert_close(one(tokens), many(tokens)[:, i:i + 1])
    assert not torch.isclose(many(tokens)[:, 0], many(tokens)[:, 1]).all()  # the queries do matter


def test_control_an_encoder_without_positions_is_what_ignores_order():
    """The pooler ignores the order of its tokens; the model must not ignore the order of patches."""
    model, images = CONTROL.model(), CONTROL.images()
    mirrored = torch.cat([images[..., 4:], images[..., :4]], -1)        # the two columns of patches change places
    assert not torch.isclose(model.encode_image(images), model.encode_image(mirrored)).all()
    with torch.no_grad():
        model.encoder.position.zero_()
    torch.testing.assert_close(model.encode_image(images), model.encode_image(mirrored))


def moved_by(model, images, part):
    """Whether the image embedding and the tokens for the decoder move when a part's parameters do."""
    tokens, embedding = model.pool_image(images)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn_like(p))
    tokens_after, embedding_after = model.pool_image(images)
    return not torch.equal(embedding, embedding_after), not torch.equal(tokens, tokens_after)


@given(cases())
def test_cascade_pools_the_pooled_tokens_and_parallel_the_encoders(case):
    if case.n_query:
        model = case.model()
        assert moved_by(model, case.images(), model.generative_pooler) == (case.pooler == "cascade", True)
    model = case.model()
    assert moved_by(model, case.images(), model.contrastive_pooler) == (True, False)  # two separate poolers
    model = case.model()
    assert moved_by(model, case.images(), model.encoder) == (True, True)


@given(cases())
def test_all_queries_reach_the_decoder_and_none_means_all_patches(case):
    model, images = case.model(), case.images()
    seen, embedding = model.pool_image(images)
    assert seen.shape == (len(images), case.n_query or 4, 16)
    assert embedding.shape == (len(images), 16)  # no query axis left over
    torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(len(images)))
    if not case.n_query:
        assert torch.equal(seen, model.encoder(images))


# Sizes and initialisation


@pytest.mark.parametrize("name, encoder, decoder", [("base", 86.0, 296.8), ("large", 303.6, 483.8), ("giant", 1011.7, 1180.2)])
def test_parameter_counts_are_those_of_table_1(name, encoder, decoder):
    with torch.device("meta"):
        model = CoCa(CONFIGS[name])
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6  # noqa: E731
    assert count(model.encoder) == pytest.approx(encoder, rel=0.005)
    assert count(model.unimodal, model.multimodal) == pytest.approx(decoder, rel=0.005)
    with torch.device("meta"):  # control: a tied or second FFN would not fit
        smaller = CoCa(dataclasses.replace(CONFIGS[name], vocab_size=32_000))
    assert count(smaller.unimodal, smaller.multimodal) != pytest.approx(decoder, rel=0.005)


def check_initialised(model):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.unique().numel() > 1 for name, p in model.named_parameters()
               if p.dim() and "norm" not in name and "bias" not in name)
    for name, p in model.named_parameters():
        assert p.abs().max() < 6, name


@given(cases())
def test_every_parameter_is_initialised(case):
    check_initialised(case.model())


def test_control_a_parameter_left_out_of_initialisation_is_caught():
    model = CONTROL.model()
    model.init_parameters = lambda: None
    with fails:
        check_initialised(model)


def test_temperature_starts_at_007_and_is_bounded_without_losing_its_gradient():
    model = CoCa(CoCaConfig())
    assert model.temperature.item() == pytest.approx(0.07)
    for log_temperature, bound in ((-100.0, 0.01), (100.0, 1.0)):
        with torch.no_grad():
            model.log_temperature.fill_(log_temperature)
        assert model.temperature.item() == pytest.approx(bound)
        model.log_temperature.grad = None
        model.temperature.backward()
        assert model.log_temperature.grad != 0


@pytest.mark.parametrize("wrong", [dict(width=10, heads=3), dict(image_size=30, patch_size=4), dict(pooler="both"), dict(heads=0),
                                   dict(n_query=-1), dict(lambda_con=0, lambda_cap=0), dict(lambda_cap=math.nan), dict(n_uni=0)])
def test_a_config_that_cannot_work_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as e:
        CoCaConfig(**wrong)
    assert "\n" not in str(e.value) and next(iter(wrong)) in str(e.value)


def test_every_config_field_is_read():
    source = open(coca.__file__).read().split("# Attention\n")[1]
    for f in dataclasses.fields(CoCaConfig):
        assert f"c.{f.name}" in source or f"config.{f.name}" in source, f.name


def test_the_base_model_runs_at_the_papers_sizes_on_the_meta_device():
    with torch.device("meta"):
        model = CoCa(CONFIGS["base"])
        out = model(torch.empty(2, 3, 288, 288), torch.ones(2, 64, dtype=torch.long))
    assert out.logits.shape == (2, 64, 64_000) and out.image_embedding.shape == out.text_embedding.shape == (2, 768)


def test_fused_attention_is_the_default():
    model = CONTROL.model()
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as fused, \
            mock.patch.object(coca, "attention", side_effect=AssertionError("written-out attention on the fast path")):
        model.losses(CONTROL.images(), CONTROL.tokens())
    assert fused.call_count == 1 + 2 + 2 + 2 * 2 and not any("attn_mask" in call.kwargs for call in fused.call_args_list)


def test_texts_too_long_and_images_of_another_size_are_refused_in_one_line():
    model = CONTROL.model()
    with pytest.raises(ValueError, match="a text of 10 tokens is longer than text_len 9"):
        model.encode_text(torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"images of \(12, 12\) pixels, but the model is made for 4 patches"):
        model.encode_image(torch.zeros(1, 3, 12, 12))
