"""What measures rather than serves: speed, memory and growth, and how well copies are found.

    python tests/bench.py step --config bench-tiny bench-small   a training step, memory, captioning
    python tests/bench.py step --config base --batch-size 256 --compile         the same on a GPU
    python tests/bench.py grow --config bench-tiny               a step of half and twice the sizes
    python tests/bench.py contrastive --pairs 4096 16384 --processes 1 2 4      Eq. (2), shared
    python tests/bench.py dedup --data cifar10 --data-dir DIR    planted copies: recall, precision
    python tests/bench.py entropy --seeds 0 1 2                  the poolers' attention, as it learns

pytest does not collect this file. Seconds depend on the machine; what is compared is timed in
turn. Processes have one thread each. Linux and macOS only.
"""
import argparse
import dataclasses
import io
import math
import os
import random
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from ablations import make_run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from coca import BEGIN, CONFIGS, END, PAD, CoCa
from data import NAMES, UserError, load, near_duplicates, pillow, to_model
from eval import pick_device
from train import PARTS, add_up, contrastive_backward, half_precision, make_optimizer, prepare

BATCH = {"bench-tiny": 64, "bench-small": 32, "tiny": 128}


def timed(function, repeats=5):
    """Median seconds of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def synthetic(config, batch, device):
    """Random images, and captions of random words with lengths uniform in [L/4, L]."""
    generator = torch.Generator().manual_seed(0)
    L, V = config.text_len, config.vocab_size
    lengths = torch.randint(L // 4, L + 1, (batch, 1), generator=generator)
    tokens = torch.randint(4, V, (batch, L), generator=generator)
    tokens[:, 0] = BEGIN
    places = torch.arange(L)
    tokens = torch.where(places == lengths - 1, END, tokens).where(places < lengths, PAD)
    images = torch.rand(batch, 3, config.image_size, config.image_size, generator=generator) * 2 - 1
    return images.to(device), tokens[:, :lengths.max()].to(device)


def training_step(config, batch, device, grad_checkpoint=False, compiled=False):
    """-> a model, and a function that trains it one step."""
    model = CoCa(config).to(device)
    prepare(model, argparse.Namespace(train=list(PARTS), grad_checkpoint=grad_checkpoint,
                                      compile=compiled))
    optimizer, autocast = make_optimizer(model), half_precision(device)
    images, tokens = synthetic(config, batch, device)

    def step():
        optimizer.zero_grad()
        with autocast:
            loss = model.losses(images, tokens)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


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

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.losses(*synthetic(config, batch, device))
    return sum(size for address, size in kept.items() if address not in weights)


def flops_an_image(config, device):
    """Matrix products of a training step, attention written out: not all fused kernels are counted."""
    _, step = training_step(config, 8, device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops() / 8


def bench_step(name, device, batch, grad_checkpoint, compiled):
    config, batch = CONFIGS[name], batch or BATCH.get(name, 64)
    kind = torch.bfloat16 if half_precision(device)._enabled else torch.float32
    a, b = torch.randn(2, 4096, 4096, device=device, dtype=kind)
    product = torch.empty_like(a)
    peak = 2 * 4096**3 / timed(lambda: torch.mm(a, b, out=product), 20)
    flops = batch * flops_an_image(config, device)
    model, step = training_step(config, batch, device, grad_checkpoint, compiled)
    step()  # makes the optimizer's state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step)
    print(f"{name}: batch {batch}, {device}, {torch.get_num_threads()} threads, "
          f"matmul peak {peak / 1e9:,.0f} GFLOP/s ({kind})")
    print(f"  training {batch / seconds:,.1f} images/s, {seconds * 1e3:,.0f} ms a step, "
          f"{flops / 1e9:,.1f} GFLOP of matrix products, {flops / seconds / peak:.0%} of peak")
    if device == "cuda":
        print(f"  memory at the most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    else:
        plain, less = (bytes_kept(config, batch, device, recompute) / 2**20
                       for recompute in (False, True))
        print(f"  kept for backward {plain:,.0f} MiB, with --grad-checkpoint {less:,.0f} MiB")
    with torch.no_grad():
        model.multimodal.head.weight[[PAD, END]] = 0.0  # captions of full length
    for count in (1, 16, 64):
        images, _ = synthetic(config, count, device)
        seconds = timed(lambda: model.generate(images), 3)  # noqa: B023 - called at once
        speed = count * (config.text_len - 1) / seconds
        print(f"  captioning {count} images: {speed:,.0f} tokens/s, greedy")


def bench_growth(name, device):
    """Milliseconds of a step at half, once and twice each size, timed in turn."""
    config, batch = CONFIGS[name], BATCH.get(name, 64)
    for what in ("batch", "image_size", "text_len", "vocab_size"):
        base = batch if what == "batch" else getattr(config, what)
        sizes, steps = [base // 2, base, base * 2], []
        for size in sizes:
            changed = config if what == "batch" else dataclasses.replace(config, **{what: size})
            steps.append(training_step(changed, size if what == "batch" else batch, device)[1])
        times = [[timed(step, 1) for step in steps] for _ in range(3)]
        medians = [statistics.median(column) for column in zip(*times)]
        power = math.log2(medians[2] / medians[1])
        if what == "image_size":  # twice the side: four times the tokens
            power, what = power / 2, "image tokens"
            sizes = [(size // config.patch_size) ** 2 for size in sizes]
        row = ", ".join(f"{size}: {seconds * 1e3:,.0f} ms" for size, seconds in zip(sizes, medians))
        print(f"  {what:12} {row}; grows with the power {power:.2f}")


def contrastive_worker(rank, world, port, N, E):
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = CoCa(CONFIGS["tiny"])  # for its temperature and weights
    x, y = F.normalize(torch.randn(2, N, E), dim=-1)
    x.requires_grad_()
    y.requires_grad_()
    rows = slice(N * rank // world, N * (rank + 1) // world)
    began, cpu = time.perf_counter(), time.process_time()
    loss = contrastive_backward(model, x, y, torch.arange(N), rows)
    cpu = time.process_time() - cpu  # of the loss itself: the additions below wait for each other
    add_up([x.grad, y.grad, loss], world)
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
# De-duplication


def plant_copies(images, rng):
    """Images (N, 3, S, S) as their copies are found in the wild -> {kind: (N, 3, S, S)}."""
    Image, S = pillow(), images.shape[-1]

    def encode_again(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return Image.open(file)

    def resize(image):
        return image.resize((S * 3 // 4, S * 3 // 4)).resize((S, S))

    def crop(image):
        side = round(S * rng.uniform(0.88, 1))
        left, top = rng.integers(0, S - side + 1, 2)
        box = (left, top, left + side, top + side)
        return image.crop(box).resize((S, S), Image.Resampling.BICUBIC)

    def brighten(image):
        contrast, shift = rng.uniform(0.8, 1.2), rng.uniform(-30, 30)
        return image.point(lambda value: contrast * value + shift)

    def mirror(image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    kinds = {"re-encoded": encode_again, "resized": resize, "cropped": crop, "brightness": brighten,
             "mirrored": mirror}
    copies = {}
    for kind, change in kinds.items():
        changed = [np.asarray(change(Image.fromarray(x.transpose(1, 2, 0)))).transpose(2, 0, 1)
                   for x in images]
        copies[kind] = np.stack(changed)
    return copies


def bench_dedup(name, data_dir, size, mirrored):
    """Prints recall of planted copies, precision, and seconds."""
    data, evaluation = load(name, data_dir, "train", size), load(name, data_dir, "val", size)
    planted = plant_copies(evaluation.images[:1000], np.random.default_rng(0))
    n = len(planted["mirrored"])
    images = np.concatenate([data.images, *planted.values()])
    began = time.perf_counter()
    nearest, similarity, _ = near_duplicates(images, evaluation.images, 0.9, mirrored)
    seconds = time.perf_counter() - began
    right = nearest[len(data):].reshape(-1, n) == np.arange(n)
    print("threshold  precision  recall: " + "  ".join(planted))
    for threshold in (0.9, 0.92, 0.94, 0.95, 0.955, 0.96, 0.97, 0.98, 0.99):
        found = similarity > threshold
        hits = right & found[len(data):].reshape(-1, n)
        shares = " ".join(f"{recall:10.1%}" for recall in hits.mean(1))
        print(f"{threshold:9} {hits.sum() / found.sum():10.1%}          {shares}")
    print("(precision: other training images found count as wrong, though some are real copies)")
    print(f"{len(images):,} images against {len(evaluation):,}: {seconds:.1f} s")


# ------------------------------------------------------------------------------------------------
# Where the generative pooler looks while the default job trains

ENTROPY = Path(__file__).with_name("entropy.csv")
ENTROPY_COLUMNS = ["start", "seed", "images", "entropy", "val_con", "val_cap"]
STARTS = ["default", "faint positions"]  # initial values


class Watched(train.Run):
    """A run that writes no checkpoint: at each save it adds a line to ENTROPY instead."""

    def overdue(self):
        return False

    @torch.no_grad()
    def save(self):
        images = to_model(torch.tensor(self.val.images[:128]))
        pooler = self.model.generative_pooler
        _, weights = pooler(self.model.encoder(images), return_weights=True)  # (B, H, Q, P)
        entropy = torch.special.entr(weights).sum(-1).mean().item()
        seen = len(self.rows) * self.settings["batch_size"]
        row = [*self.start, seen, entropy, *self.validate()]
        with open(ENTROPY, "a") as f:
            print(*row, sep=",", file=f)


def bench_entropy(seeds):
    """Entropy of the generative pooler's attention, in nats, over images seen: the mean over heads,
    queries and images. "faint positions" differs in one thing: the image's positions start at 0.2
    of the sinusoids, as faint against the patches' content as in many a ViT.
    """
    kept = [",".join(ENTROPY_COLUMNS)]
    if ENTROPY.exists():  # a seed that is measured again is there once
        lines = ENTROPY.read_text().splitlines()[1:]
        kept += [line for line in lines if int(line.split(",")[1]) not in seeds]
    ENTROPY.write_text("\n".join(kept) + "\n")
    for seed in seeds:
        for start in STARTS:
            run, batches = make_run(Watched, ["--seed", str(seed)])
            run.start = [start, seed]
            model = run.model
            if start == "faint positions":
                with torch.no_grad():
                    model.encoder.position.mul_(0.2)
            train.train(run, batches, 50, [run.settings["batch_size"]], 0)
    print(f"saved: {ENTROPY}")


def main():
    p = argparse.ArgumentParser(usage="python tests/bench.py WHAT [options]",
                                description=__doc__.split("\n")[0])
    p.add_argument("what", choices=["step", "grow", "contrastive", "dedup", "entropy"])
    p.add_argument("--config", nargs="+", choices=CONFIGS, default=["bench-tiny"])
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, help="of step (default: see BATCH)")
    p.add_argument("--grad-checkpoint", action="store_true", help="step as with train.py's flag")
    p.add_argument("--compile", action="store_true", help="step as with train.py's flag")
    p.add_argument("--pairs", nargs="+", type=int, default=[4096])
    p.add_argument("--processes", nargs="+", type=int, default=[1])
    p.add_argument("--data", choices=NAMES, default="shapes")
    p.add_argument("--data-dir")
    p.add_argument("--size", type=int, default=32, help="pixels a side of images to compare")
    p.add_argument("--mirrored", action="store_true", help="mirror images count as copies")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = p.parse_args()
    if args.what == "contrastive":
        bench_contrastive(args.pairs, args.processes)
    elif args.what == "dedup":
        bench_dedup(args.data, args.data_dir, args.size, args.mirrored)
    elif args.what == "entropy":
        bench_entropy(args.seeds)
    else:
        device = pick_device(args.device)
        for name in args.config:
            if args.what == "step":
                bench_step(name, device, args.batch_size, args.grad_checkpoint, args.compile)
            else:
                bench_growth(name, device)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
