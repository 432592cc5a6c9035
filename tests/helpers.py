"""What the tests share: random cases, ways to look into a model, and ways to break it on purpose.

hypothesis draws the structure of a case, torch fills in values from its seed.
"""
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import coca
from coca import BEGIN, END, PAD, CoCa, CoCaConfig
from data import UserError

VOCAB, TEXT_LEN = 13, 9


# Processes from a server that has imported the slow modules already
processes = get_context("forkserver")
processes.set_forkserver_preload(["helpers", "train", "torch._dynamo"])

fails = pytest.raises(AssertionError)  # for controls: with fails: check_...(a broken model)


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("exploded",)


def refused(match, function, *args, **named):
    """The call must end in a UserError of one line that says `match`."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **named)
    assert "\n" not in str(error.value)


@dataclass
class Case:
    seed: int
    lengths: list  # real tokens of each caption, BEGIN and END included
    pooler: str
    n_query: int

    def config(self, **changes):
        sizes = dict(image_size=8, patch_size=4, width=16, heads=2, encoder_layers=1, n_uni=2,
                     n_multi=2, n_query=self.n_query, pooler=self.pooler, vocab_size=VOCAB,
                     text_len=TEXT_LEN)
        return CoCaConfig(**{**sizes, **changes})

    def model(self, dtype=torch.float32, **changes):
        """No parameter is at a special value (a zero bias would hide what it multiplies)."""
        torch.manual_seed(self.seed)
        model = CoCa(self.config(**changes)).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim():
                    p.add_(0.3 * torch.randn_like(p))
        return model

    def images(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(len(self.lengths), 3, 8, 8, generator=generator, dtype=dtype) * 2 - 1

    def tokens(self, extra=0):
        """Right-padded captions; up to `extra` more columns of padding than the longest needs."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        columns = min(TEXT_LEN, max(self.lengths) + extra)
        tokens = torch.full((len(self.lengths), columns), PAD)
        for row, n in zip(tokens, self.lengths):
            row[:n] = torch.randint(4, VOCAB, (n,), generator=generator)
            row[0], row[n - 1] = BEGIN, END
        return tokens


def cases(shortest=3, longest=TEXT_LEN, rows=3):
    lengths = st.lists(st.integers(shortest, longest), min_size=2, max_size=rows)
    return st.builds(Case, seed=st.integers(0, 10_000), lengths=lengths,
                     pooler=st.sampled_from(["cascade", "parallel"]),
                     n_query=st.sampled_from([0, 1, 3]))


# On which a broken model must be caught
CONTROL = Case(seed=1, lengths=[6, 9, 4], pooler="cascade", n_query=3)


@contextmanager
def recorded_weights():
    """Yields a list that gets (causal, weights) of every attention from now on, in order.

    Attention to values that are an identity matrix gives the weights themselves, and those are the
    fused kernel's.
    """
    record, kernel = [], F.scaled_dot_product_attention

    def attend(q, k, v, **how):
        identity = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1)
        record.append((how.get("is_causal", False), kernel(q, k, identity, **how)))
        return kernel(q, k, v, **how)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield record


def record_embedding(model):
    """A list that gets the token embeddings (B, L, D) of every text, as leaves for gradients."""
    record = []

    def hook(module, args, out):
        record.append(out.detach().requires_grad_())
        return record[-1]

    model.unimodal.token.register_forward_hook(hook)
    return record


def other_mask(mask):
    """Fused attention with another mask than the causal: mask(L), True = may look, or numbers."""
    kernel = F.scaled_dot_product_attention

    def attend(q, k, v, is_causal=False):
        return kernel(q, k, v, attn_mask=mask(len(q[0, 0])) if is_causal else None)

    return mock.patch.object(F, "scaled_dot_product_attention", attend)


def wrong_mask(diagonal):
    """Token i may look up to i + diagonal (0 would be right, 99 is no mask), and at the first."""
    def mask(L):
        allowed = torch.ones(L, L, dtype=torch.bool).tril(diagonal)
        allowed[:, 0] = True  # a row without any key would be NaN, and caught too cheaply
        return allowed

    return other_mask(mask)


def cls_behind_the_padding():
    """[CLS] after the padding, the key mask shifted by one."""
    def forward(self, tokens):
        B, L = tokens.shape
        kernel = F.scaled_dot_product_attention
        x = torch.cat([self.token(tokens) + self.position[:L], self.cls.expand(B, 1, -1)], 1)
        may = F.pad(tokens != PAD, (1, 0), value=True)  # the shift: hides what comes after padding
        mask = may[:, None, None] & torch.ones(L + 1, L + 1, dtype=torch.bool).tril()

        def attend(q, k, v, is_causal):
            return kernel(q, k, v, attn_mask=mask)

        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            for block in self.blocks:
                x = block(x, causal=True)
        return x[:, :L], self.norm(x[:, L])

    return mock.patch.object(coca.UnimodalDecoder, "forward", forward)


def cls_left_in():
    """The row of [CLS] goes on to the multimodal half."""
    def forward(self, tokens):
        length = (tokens != PAD).sum(1)
        x = self.insert_cls(self.embed(tokens), length)
        for block in self.blocks:
            x = block(x, causal=True)
        return x[:, :-1], self.norm(x[torch.arange(len(x)), length])

    return mock.patch.object(coca.UnimodalDecoder, "forward", forward)


def seen_with(change):
    """What CoCa gives for images and tokens, changed."""
    features = coca.CoCa.features

    def forward(self, images, tokens):
        return change(*features(self, images, tokens), features(self, 0 * images, tokens)[2])

    return mock.patch.object(coca.CoCa, "features", forward)
