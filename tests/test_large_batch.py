"""A batch in parts, over processes or with activations recomputed has the gradient of the whole."""
import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from helpers import Case, cases, fails, processes
from hypothesis import given
from hypothesis import strategies as st

import train
from coca import PAD
from train import PARTS, large_batch_backward, prepare

NO_AUTOCAST = contextlib.nullcontext()  # no half precision
BATCH = Case(seed=3, lengths=[6, 9, 4, 3, 5, 9, 7], pooler="cascade", n_query=3)


def gradients(model):
    """All that are not 0."""
    parameters = dict(model.named_parameters())
    return {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.any()}


def whole(case, tokens=None, **changes):
    """Gradients and losses of Eq. (4), in one piece."""
    model = case.model(torch.float64, **changes)
    loss = model.losses(case.images(torch.float64), case.tokens() if tokens is None else tokens)
    return after_backward(model, loss)


def after_backward(model, loss):
    loss.total.backward()
    return gradients(model), loss.con.detach(), loss.cap.detach()


def in_parts(model, images, tokens, accum):
    return large_batch_backward(model, images, tokens, accum, [len(images)], 0, NO_AUTOCAST)


def naive(model, images, tokens, accum):
    """What is usually done: the mean of the parts' losses."""
    losses = [model.losses(*part) for part in zip(images.chunk(accum), tokens.chunk(accum))]
    con = sum(loss.con for loss in losses) / len(losses)
    cap = sum(loss.cap for loss in losses) / len(losses)
    (con + 2 * cap).backward()
    return con.detach(), cap.detach()


def check_parts(case, accum, how=in_parts, repeat=False):
    model, tokens = case.model(torch.float64), case.tokens()
    if repeat:
        tokens = tokens[:1].expand(len(tokens), -1)
    losses = how(model, case.images(torch.float64), tokens, accum)
    torch.testing.assert_close((gradients(model), *losses), whole(case, tokens))


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
    def held():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return kept, model.losses(case.images(torch.float64), case.tokens())

    model = case.model(torch.float64)
    usual, _ = held()
    prepare(model, SimpleNamespace(train=PARTS, grad_checkpoint=True, compile=False))
    kept, loss = held()
    assert len(kept) < 0.6 * len(usual)
    torch.testing.assert_close(after_backward(model, loss), whole(case))


# Several processes

TOKENS = BATCH.tokens()[[0, 1, 2, 3, 4, 2, 6]]  # two captions are the same, of different processes
VARIANTS = [dict(), dict(lambda_cap=0), dict(lambda_con=0), dict(pooler="parallel"),
            dict(n_query=0)]
WAYS = [(accum, changes) for accum in (1, 2) for changes in VARIANTS]


def worker(rank, path):
    """One of 2 processes, then one of 3: its part of the batch in every variant, into a file."""
    torch.set_num_threads(1)
    for world in range(max(2, rank + 1), 4):
        dist.init_process_group("gloo", f"file://{path}/store{world}", rank=rank, world_size=world)
        sizes = [len(TOKENS) // world + (r < len(TOKENS) % world) for r in range(world)]
        own = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))
        images, tokens = BATCH.images(torch.float64)[own], TOKENS[own]
        tokens = tokens[:, :int((tokens != PAD).sum(1).max())]  # each pads to its own longest
        results = []
        for accum, changes in WAYS:
            model, work, contrast = BATCH.model(torch.float64, **changes), [], train.contrast
            if "pooler" in changes:
                model.recompute_activations()

            def record(anchors, candidates, *args, work=work, contrast=contrast):
                work.append(len(anchors) * len(candidates))
                return contrast(anchors, candidates, *args)

            with mock.patch.object(train, "contrast", record):
                con, cap = large_batch_backward(
                    model, images, tokens, accum, sizes, rank, NO_AUTOCAST)
            results.append((gradients(model), con, cap, sum(work)))
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
    for world, rows in ((2, [4, 3]), (3, [3, 2, 2])):
        for rank in range(world):
            results = torch.load(tmp_path / f"{world}-{rank}.pt")
            for (*got, work), right in zip(results, expected):
                torch.testing.assert_close(tuple(got), right, check_dtype=False)
                assert work == 2 * rows[rank] * 7  # of 2 N N similarities, those of its own rows
    model = BATCH.model(torch.float64)
    naive(model, BATCH.images(torch.float64), TOKENS, 3)
    with fails:  # control: each process with a loss of its own
        torch.testing.assert_close(gradients(model), expected[0][0])
