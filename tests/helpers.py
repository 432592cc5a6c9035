"""What the tests share: random cases, ways to look into a model, and ways to break it on purpose.

hypothesis draws the structure of a case, torch fills in values from its seed.
"""
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from coca import BEGIN, END, PAD, CoCa, CoCaConfig
from data import UserError

VOCAB = 13
TEXT_LEN = 9

# Processes from a server that has imported the slow modules already
processes = get_context("forkserver")
processes.set_forkserver_preload(["helpers", "train", "torch._dynamo"])


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("exploded",)


def refused(match, function, *args, **named):
    """The call must end in a UserError of one line that says `match`."""
    with pytest.raises(UserError, match=match) as error:
        function(*args, **named)
    assert "\n" not in str(error.value)


# Random cases


@dataclass
class Case:
    seed: int
    lengths: list  # real tokens of each caption, BEGIN and END included
    pooler: str
    n_query: int

    def config(self, **changes):
        sizes = dict(image_size=8, patch_size=4, width=16, heads=2, encoder_layers=1, n_uni=2,
                     n_multi=2, encoder_mlp=64, decoder_mlp=64, n_query=self.n_query,
                     pooler=self.pooler, vocab_size=VOCAB, text_len=TEXT_LEN)
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
            row[0] = BEGIN
            row[n - 1] = END
        return tokens

    def example(self, extra=0, dtype=torch.float32, **changes):
        """-> model, images, tokens."""
        return self.model(dtype, **changes), self.images(dtype), self.tokens(extra)

    def cut(self):
        """A place in every text, behind BEGIN, at END at the latest."""
        return 1 + self.seed % (min(self.lengths) - 1)


def cases(shortest=3, longest=TEXT_LEN, rows=3):
    lengths = st.lists(st.integers(shortest, longest), min_size=2, max_size=rows)
    return st.builds(Case, seed=st.integers(0, 10_000), lengths=lengths,
                     pooler=st.sampled_from(["cascade", "parallel"]),
                     n_query=st.sampled_from([0, 1, 3]))


# On which a broken model must be caught
CONTROL = Case(seed=1, lengths=[6, 9, 4], pooler="cascade", n_query=3)

# To break a model on purpose

fails = pytest.raises(AssertionError)  # for controls: with fails: check_...(a broken model)


def holds_unless(**broken):
    """Makes a check of a case a test: it must pass on all, and fail with each of these patches."""
    def decorate(check):
        def test(patch):
            if patch is None:
                check(CONTROL)
                given(cases())(check)()
            else:
                with patch, fails:
                    check(CONTROL)

        names = ["holds"] + [f"unless {name}" for name in broken]
        return pytest.mark.parametrize("patch", [None, *broken.values()], ids=names)(test)

    return decorate


# To look into a model


def words_of(tokens):
    """Where a token is neither END nor padding."""
    return (tokens != PAD) & (tokens != END)


def logits_of(model, images, tokens):
    """(B, L, V); logits[:, t] predicts tokens[:, t + 1]."""
    return model.multimodal.head(model.decode(images, tokens))


@contextmanager
def recorded_weights():
    """Yields a list that gets (mask, weights) of every attention from now on, in order.

    Attention to values that are an identity matrix gives the weights themselves, and those are the
    fused kernel's.
    """
    record = []
    kernel = F.scaled_dot_product_attention

    def attend(q, k, v, mask=None):
        identity = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1)
        record.append((mask, kernel(q, k, identity, mask)))
        return kernel(q, k, v, mask)

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


@contextmanager
def counting(*functions):
    """Yields doubles of functions (owner, name), which do the same and have a call_count."""
    with ExitStack() as stack:
        doubles = []
        for owner, name in functions:
            double = mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))
            doubles.append(stack.enter_context(double))
        yield doubles
