"""How fast it is, how much memory it takes, and how both grow.

    python -m experiments.bench step --config bench-tiny bench-small   a step, memory, captioning
    python -m experiments.bench step --config base --batch-size 256 --compile     the same on a GPU
    python -m experiments.bench grow --config bench-tiny     a step of half and twice the sizes
    python -m experiments.bench contrastive --pairs 4096 16384 --processes 1 2 4   Eq. (2), shared
    python -m experiments.bench query --config tiny base     the one query of a video (Sec. 3.3)

Seconds depend on the machine; what is compared is timed in turn. Processes of contrastive have one
thread each. Linux and macOS only.
"""
import argparse
import dataclasses
import functools
import math
import os
import random
import resource
import statistics
import sys
import time

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.bench")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import coca
import train
from coca import BEGIN, END, PAD, AttentionalPooler, CoCa, CoCaConfig, contrastive_loss
from data import run_program
from eval import pick_device

CONFIGS = {
    **coca.CONFIGS,
    "bench-tiny": CoCaConfig(width=192, heads=3, encoder_layers=6, encoder_mlp=768, n_uni=3,
                             n_multi=3, decoder_mlp=768, n_query=64, vocab_size=1024),
    "bench-small": CoCaConfig(image_size=64, patch_size=8, width=384, heads=6, encoder_layers=12,
                              encoder_mlp=1536, n_uni=6, n_multi=6, decoder_mlp=1536, n_query=64),
}
BATCH = {"bench-tiny": 64, "bench-small": 32, "tiny": 128}

# ------------------------------------------------------------------------------------------------
# A training step


def timed(function, what, repeats=5):
    """Median seconds of a call, after one to warm up. what: for the bar."""
    times = []
    for _ in tqdm(range(repeats + 1), f"timing {what}", leave=False):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def synthetic(config, batch, device):
    """Random images, and captions of random words with lengths uniform in [L/4, L]."""
    generator = torch.Generator().manual_seed(0)
    L = config.text_len
    S = config.image_size
    lengths = torch.randint(L // 4, L + 1, (batch, 1), generator=generator)
    tokens = torch.randint(4, config.vocab_size, (batch, L), generator=generator)
    tokens[:, 0] = BEGIN
    place = torch.arange(L)
    tokens[place == lengths - 1] = END
    tokens[place >= lengths] = PAD
    images = torch.rand(batch, 3, S, S, generator=generator) * 2 - 1
    return images.to(device), tokens[:, :lengths.max()].to(device)


def training(config, batch, device, flags=()):
    """-> a model, and a function that trains it one step by train.train."""
    s, _ = train.parse_args(["--device", device, "--steps", "1000000", *flags])
    model = CoCa(config).to(device)
    train.prepare(model, s)
    images, tokens = synthetic(config, batch, device)

    def batches(step):
        return images, tokens

    steps = train.train(model, train.make_optimizer(model), batches, s)
    return model, functools.partial(next, steps)


def bytes_kept(config, batch, device, recompute):
    """Bytes that a forward pass keeps for backward, weights apart."""
    model = CoCa(config).to(device)
    if recompute:
        model.recompute_activations()
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def as_it_is(t):
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, as_it_is):
        model.losses(*synthetic(config, batch, device))
    return sum(size for address, size in kept.items() if address not in weights)


def flops_of(function):
    """Of its matrix products, attention written out: not all fused kernels are counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def flops_an_image(config, device):
    """Of a training step. (The model is gone before memory is measured.)"""
    _, step = training(config, 8, device)
    return flops_of(step) / 8


def peak_flops(device, size=4096):
    """-> floating point operations a second in a product of matrices, and their dtype."""
    with train.half_precision(device):
        a = torch.randn(size, size, device=device)
        dtype = (a @ a).dtype
    a = a.to(dtype)
    product = torch.empty_like(a)
    seconds = timed(functools.partial(torch.mm, a, a, out=product), "a product of matrices", 20)
    return 2 * size**3 / seconds, dtype


def bench_step(name, device, batch, flags):
    config = CONFIGS[name]
    batch = batch or BATCH.get(name, 64)
    peak, dtype = peak_flops(device)
    flops = batch * flops_an_image(config, device)
    model, step = training(config, batch, device, flags)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, f"{name}, a step of {batch} images")
    print(f"{name}: batch {batch}, {device}, {torch.get_num_threads()} threads, "
          f"matmul peak {peak / 1e9:,.0f} GFLOP/s ({dtype})")
    print(f"  training {batch / seconds:,.1f} images/s, {seconds * 1e3:,.0f} ms a step, "
          f"{flops / 1e9:,.1f} GFLOP of matrix products, {flops / seconds / peak:.0%} of peak")
    if device == "cuda":
        print(f"  memory at the most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    else:
        plain = bytes_kept(config, batch, device, recompute=False) / 2**20
        less = bytes_kept(config, batch, device, recompute=True) / 2**20
        print(f"  kept for backward {plain:,.0f} MiB, with --grad-checkpoint {less:,.0f} MiB")
    with torch.no_grad():
        model.multimodal.head.weight[[PAD, END]] = 0.0  # captions of full length
    for count in (1, 16, 64):
        images, _ = synthetic(config, count, device)
        generate = functools.partial(model.generate, images)
        seconds = timed(generate, f"{name}, captioning {count} images", 3)
        speed = count * (config.text_len - 1) / seconds
        print(f"  captioning {count} images: {speed:,.0f} tokens/s, greedy")


def bench_growth(name, device):
    """Milliseconds of a step at half, once and twice each size, timed in turn."""
    batch = BATCH.get(name, 64)
    sizes = {"batch": batch}
    for what in ("image_size", "text_len", "vocab_size"):
        sizes[what] = getattr(CONFIGS[name], what)
    for what, size in sizes.items():
        steps = {}
        for value in (size // 2, size, size * 2):
            if what == "batch":
                _, steps[value] = training(CONFIGS[name], value, device)
            else:
                config = dataclasses.replace(CONFIGS[name], **{what: value})
                _, steps[value] = training(config, batch, device)
        times = {value: [] for value in steps}
        for _ in range(3):
            for value, step in steps.items():
                times[value].append(timed(step, f"{name}, a step with {what} {value}", 1))
        medians = {value: statistics.median(found) for value, found in times.items()}
        power = math.log2(medians[size * 2] / medians[size])
        text = ", ".join(f"{value}: {t * 1e3:,.0f} ms" for value, t in medians.items())
        text += f"; grows with the power {power:.2f}"
        if what == "image_size":  # twice the side: four times the image tokens
            text += f", of the image tokens {power / 2:.2f}"
        print(f"  {what:12} {text}")


# ------------------------------------------------------------------------------------------------
# Eq. (2) of a large batch, as train.large_batch_backward takes it


def contrastive_worker(rank, world, port, N, E):
    """A process's share of the loss and its gradients; the first prints."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    x = F.normalize(torch.randn(N, E), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(N, E), dim=-1).requires_grad_()
    ids = torch.arange(N)  # no caption is there twice
    temperature = torch.tensor(0.07, requires_grad=True)
    loss = torch.zeros(())
    own = ids[N * rank // world:N * (rank + 1) // world]
    began = time.perf_counter()
    cpu = time.process_time()
    blocks = own.split(max(1, train.BLOCK // N))
    what = f"{N:,} pairs, {world} processes"
    for rows in tqdm(blocks, f"timing {what}", leave=False, disable=rank > 0):
        share = contrastive_loss(x, y, temperature, ids, rows) * len(rows) / N
        share.backward()
        loss += share.detach()
    cpu = time.process_time() - cpu  # of the loss itself: the additions below wait for each other
    train.add_up([x.grad, y.grad, loss], world)
    if rank == 0:
        seconds = time.perf_counter() - began
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        print(f"{N:6,} pairs of {E}, {world} processes: {cpu:7.1f} CPU seconds and {memory:.2f} GiB "
              f"in each, {seconds:6.1f} s; loss {loss:.4f}, gradient norm {x.grad.norm():.6f}",
              flush=True)
    if world > 1:
        dist.destroy_process_group()


def bench_contrastive(pairs, processes, E=512):
    for N in pairs:
        for world in processes:
            mp.spawn(contrastive_worker, (world, random.randint(20_000, 60_000), N, E), world)


# ------------------------------------------------------------------------------------------------
# A video's one query over all tokens of all frames (Sec. 3.3), beside the encoder's work on them


def bench_query(name, device, clips=4, frames=8):
    config = CONFIGS[name]
    images, _ = synthetic(config, clips * frames, device)
    encoder = CoCa(config).encoder.to(device)
    pooler = AttentionalPooler(config.width, config.heads, 1).to(device)
    tokens = encoder(images).detach().reshape(clips, -1, config.width)           # (clips, frames * P, D)
    encode = functools.partial(encoder, images)
    pool = functools.partial(pooler, tokens)
    flops = flops_of(pool) / flops_of(encode)
    seconds = timed(pool, f"{name}, the query") / timed(encode, f"{name}, the encoder")
    print(f"{name}: {clips} clips of {frames} frames; the query takes {flops:.1%} of the encoder's "
          f"matrix products and {seconds:.1%} of its time")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.bench WHAT [options]")
    p.add_argument("what", choices=["step", "grow", "contrastive", "query"],
                   help="a training step; how it grows; Eq. (2) of many pairs; a video's query")
    p.add_argument("--config", nargs="+", choices=CONFIGS, default=["bench-tiny"],
                   help="sizes, of all but contrastive (default: bench-tiny)")
    p.add_argument("--device", default="auto",
                   help="cuda, mps or cpu (default: the first there is; contrastive: cpu)")
    p.add_argument("--batch-size", type=train.at_least(2),
                   help="of step (default: 128 of tiny, 32 of bench-small, else 64)")
    p.add_argument("--grad-checkpoint", action="store_true", help="step as with train.py's flag")
    p.add_argument("--compile", action="store_true", help="step as with train.py's flag")
    p.add_argument("--pairs", nargs="+", type=train.at_least(1), default=[4096],
                   help="of contrastive (default: 4096)")
    p.add_argument("--processes", nargs="+", type=train.at_least(1), default=[1],
                   help="of contrastive, side by side (default: 1)")
    args = p.parse_args(argv)
    if min(args.pairs) < max(args.processes):
        p.error("each of --processes needs a pair; ask for more --pairs")
    if args.what == "contrastive":
        bench_contrastive(args.pairs, args.processes)
    else:
        device = pick_device(args.device)
        flags = ["--grad-checkpoint"] * args.grad_checkpoint + ["--compile"] * args.compile
        for name in args.config:
            if args.what == "step":
                bench_step(name, device, args.batch_size, flags)
            elif args.what == "query":
                bench_query(name, device)
            else:
                bench_growth(name, device)


if __name__ == "__main__":
    run_program(main)
