"""Exact gradients of the whole batch however it is cut: into parts, over processes, with activations recomputed."""
import os
import random
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import CONTROL, Case, cases
from hypothesis import given
from hypothesis import strategies as st

import coca
from coca import PAD, Block, captioning_loss, contrastive_loss
from train import backward

fails = pytest.raises(AssertionError)
BATCH = Case(seed=3, lengths=[6, 9, 4, 3, 5, 9, 7], pooler="cascade", n_query=3)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(case, **changes):
    """Gradients and losses of Eq. (4), in one piece."""
    model = case.model(torch.float64, **changes)
    losses = model.losses(case.images(torch.float64), case.tokens())
    losses.total.backward()
    return gradients(model), losses.con.detach(), losses.cap.detach()


def naive(model, images, tokens, accum):
    """What is usually done: the mean of the parts' losses."""
    losses = [model.losses(x, t) for x, t in zip(images.chunk(accum), tokens.chunk(accum))]
    (sum(loss.total for loss in losses) / len(losses)).backward()
    return sum(loss.con for loss in losses) / len(losses), sum(loss.cap for loss in losses) / len(losses)


def check_parts(case, accum, how=backward):
    model = case.model(torch.float64)
    con, cap = how(model, case.images(torch.float64), case.tokens(), accum)
    expected, con_expected, cap_expected = plain(case)
    torch.testing.assert_close((con.detach(), cap.detach()), (con_expected, cap_expected))
    torch.testing.assert_close(gradients(model), expected)


@given(cases(rows=7), st.integers(1, 7))
def test_a_batch_in_parts_has_the_gradient_of_the_whole(case, accum):
    check_parts(case, accum)


def test_control_naive_accumulation_is_caught():
    check_parts(BATCH, 1, naive)
    with fails:
        check_parts(BATCH, 3, naive)


@given(cases())
def test_identical_captions_in_different_parts_are_still_positives(case):
    repeated = case.tokens()[[0] * len(case.lengths)]
    with mock.patch.object(Case, "tokens", lambda self: repeated):
        check_parts(case, 2)


@given(cases())
def test_recomputed_activations_give_the_same_gradient(case):
    model = case.model(torch.float64)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True
    with mock.patch.object(Block, "run", autospec=True, side_effect=Block.run) as run:
        model.losses(case.images(torch.float64), case.tokens()).total.backward()
    assert run.call_count == 2 * 5  # every block twice
    torch.testing.assert_close(gradients(model), plain(case)[0])
    images = case.images(torch.float64)
    assert torch.equal(model.generate(images), case.model(torch.float64).generate(images))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 4))
def test_losses_in_row_blocks_equal_the_whole(seed, N, rows):
    torch.manual_seed(seed)
    x, y = torch.nn.functional.normalize(torch.randn(2, N, 4, dtype=torch.float64), dim=-1)
    ids, tokens, states = torch.randint(0, 3, (N,)), torch.randint(0, 3, (N, 5)), torch.randn(N, 5, 4, dtype=torch.float64)
    head = torch.nn.Linear(4, 11, bias=False, dtype=torch.float64)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, y, states)]
        losses = contrastive_loss(*leaves[:2], 0.1, ids), captioning_loss(leaves[2], tokens, head)
        return losses, torch.autograd.grad(sum(losses), (*leaves, head.weight))

    whole = run()
    blocks = mock.Mock(side_effect=coca.checkpoint)
    with mock.patch.object(coca, "BLOCK", rows * 11), mock.patch.object(coca, "checkpoint", blocks):
        torch.testing.assert_close(run(), whole)
    assert blocks.call_count > 0 or N <= rows and (tokens[:, 1:] != PAD).sum() <= rows


def test_captioning_never_holds_all_logits():
    """The largest tensor of a training step at vocabulary 64,000 is a block of logits."""
    model, largest = CONTROL.model(vocab_size=64_000), []
    real = torch.nn.functional.cross_entropy

    def spy(logits, *args, **how):
        largest.append(logits.numel())
        return real(logits, *args, **how)

    with mock.patch.object(torch.nn.functional, "cross_entropy", spy), mock.patch.object(coca, "BLOCK", 2 * 64_000):
        model.losses(CONTROL.images(), CONTROL.tokens()).total.backward()
    assert max(largest) <= 2 * 64_000 and len(largest) > 10


# Several processes


def worker(rank, world, port, accum, path):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sizes = [len(BATCH.lengths) // world + (r < len(BATCH.lengths) % world) for r in range(world)]
    own = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
    model = BATCH.model(torch.float64)
    tokens = BATCH.tokens()[own]
    tokens = tokens[:, :int((tokens != PAD).sum(1).max())]  # each process pads to its own longest
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    losses = backward(ddp, BATCH.images(torch.float64)[own], tokens, accum, sizes)
    torch.save((gradients(model), *losses), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world, accum", [(2, 1), (3, 1), (2, 2)])
def test_processes_have_the_gradient_of_one_on_the_whole_batch(world, accum, tmp_path):
    mp.spawn(worker, (world, random.randint(20_000, 60_000), accum, str(tmp_path)), world)
    for rank in range(world):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), plain(BATCH))
