"""A batch in parts, over processes or with activations recomputed has the gradient of the whole."""
import contextlib
import itertools
from unittest import mock

import torch
import torch.distributed as dist
from helpers import Case, cases, counting, fails, processes
from hypothesis import given
from hypothesis import strategies as st

import coca
import train
from coca import PAD, CoCa, ImageEncoder
from train import large_batch_backward

NO_AUTOCAST = contextlib.nullcontext()  # no half precision
BATCH = Case(seed=3, lengths=[6, 9, 4, 3, 5, 7], pooler="cascade", n_query=3)


def gradients(model):
    """All that are not 0."""
    parameters = dict(model.named_parameters())
    return {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.any()}


def whole(case, tokens=None, **changes):
    """Gradients and losses of Eq. (4), in one piece."""
    model = case.model(torch.float64, **changes)
    loss = model.losses(case.images(torch.float64), case.tokens() if tokens is None else tokens)
    loss.total.backward()
    return gradients(model), loss.con.detach(), loss.cap.detach()


def in_parts(model, images, tokens, accum):
    return large_batch_backward(model, images, tokens, accum, 0, 1, NO_AUTOCAST)


def naive(model, images, tokens, accum):
    """What is usually done: the mean of the parts' losses."""
    losses = [model.losses(*part) for part in zip(images.chunk(accum), tokens.chunk(accum))]
    con = sum(loss.con for loss in losses) / len(losses)
    cap = sum(loss.cap for loss in losses) / len(losses)
    (con + 2 * cap).backward()
    return con.detach(), cap.detach()


def check_parts(case, accum, how=in_parts, repeat=False):
    model, images, tokens = case.example(dtype=torch.float64)
    if repeat:
        tokens = tokens[:1].expand(len(tokens), -1)
    losses = how(model, images, tokens, accum)
    torch.testing.assert_close((gradients(model), *losses), whole(case, tokens), check_dtype=False)


@given(cases(rows=7), st.integers(1, 7), st.booleans(), st.sampled_from([1, 8, 15, 2**25]))
def test_a_batch_in_parts_has_the_gradient_of_the_whole(case, accum, repeat, block):
    """Also where parts hold the same caption, and where similarities are in blocks of rows."""
    with mock.patch.object(train, "BLOCK", block):
        check_parts(case, accum, repeat=repeat)


def test_control_naive_accumulation_is_caught():
    check_parts(BATCH, 1, naive)
    for repeat in (False, True):
        with fails:
            check_parts(BATCH, 3, naive, repeat)


@given(cases())
def test_recomputed_activations_take_less_memory_and_give_the_same_gradient(case):
    model, images, tokens = case.example(dtype=torch.float64)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.detach):
        model.losses(images, tokens)
        usual = len(kept)
        model.recompute_activations()
        model.losses(images, tokens)
    assert len(kept) - usual < 0.6 * usual
    loss = model.losses(images, tokens)
    loss.total.backward()
    torch.testing.assert_close((gradients(model), *loss[1:]), whole(case))


# Several processes

TOKENS = BATCH.tokens()[[0, 1, 2, 3, 4, 1]]  # two captions are equal, of different processes
VARIANTS = [dict(), dict(lambda_cap=0), dict(lambda_con=0), dict(pooler="parallel"),
            dict(n_query=0)]
WAYS = list(itertools.product((1, 2), VARIANTS))  # accum, changes


def worker(rank, path):
    """One of 3 processes, or of 2, or alone: its part of the batch in every way, into a file."""
    torch.set_num_threads(1)
    for world in range(rank + 1, 4):
        dist.init_process_group("gloo", f"file://{path}/store{world}", rank=rank, world_size=world)
        images = BATCH.images(torch.float64).chunk(world)[rank]
        tokens = TOKENS.chunk(world)[rank]
        tokens = tokens[:, :int((tokens != PAD).sum(1).max())]  # each pads to its own longest
        results = []
        for accum, changes in WAYS:
            model = BATCH.model(torch.float64, **changes)
            if "pooler" in changes:
                model.recompute_activations()
            with counting((ImageEncoder, "forward"), (CoCa, "forward"), (coca, "captioning_loss"),
                          (train, "contrastive_loss")) as (encoder, forward, captioning, contrast):
                losses = large_batch_backward(
                    model, images, tokens, accum, rank, world, NO_AUTOCAST)
            rows = torch.cat([call.args[4] for call in contrast.call_args_list])
            calls = [f.call_count for f in (encoder, forward, captioning)]
            results.append((gradients(model), *losses, calls, rows))
        torch.save(results, f"{path}/{world}-{rank}.pt")
        dist.destroy_process_group()


def test_processes_have_the_gradient_of_one_on_the_whole_batch_and_share_its_work(tmp_path):
    workers = []
    for rank in range(3):
        workers.append(processes.Process(target=worker, args=(rank, tmp_path), daemon=True))
        workers[-1].start()
    for process in workers:
        process.join()
        assert process.exitcode == 0
    expected = [whole(BATCH, TOKENS, **changes) for _, changes in WAYS]
    for file in tmp_path.glob("*.pt"):
        world, rank = map(int, file.stem.split("-"))
        own = torch.arange(6).chunk(world)[rank]
        for (accum, changes), right, result in zip(WAYS, expected, torch.load(file)):
            torch.testing.assert_close(result[:3], right, check_dtype=False)
            towers = 1 if accum == 1 else 2 * accum  # several parts are first embedded
            captions = accum if changes != dict(lambda_cap=0) else 0
            assert result[3] == [towers, accum, captions]
            assert torch.equal(result[4], own)  # of Eq. (2) each process takes its own rows
    model = BATCH.model(torch.float64)
    naive(model, BATCH.images(torch.float64), TOKENS, 3)
    with fails:  # control: each process with a loss of its own
        torch.testing.assert_close(gradients(model), expected[0][0])
