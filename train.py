"""Train a CoCa (Sec. 3.2, Eq. (4)) with the paper's recipe (Sec. 4.1) scaled down.

First the loop, `train`, which is all that a first reading needs; then the recipe, batches in
several parts, models from other models, and each data set's settings. What is below the line may be
skipped.

    python train.py                                                    generated scenes, on a CPU
    python train.py --data cifar10 --data-dir DIR                      CIFAR-10 in DIR
    python train.py --data coco --data-dir DIR --subset 1000           COCO captions
    python train.py --data captions --data-dir DIR                     your images and captions
    python train.py --lambda-cap 0                                     a dual encoder (CLIP)
    python train.py --lambda-con 0                                     a captioner
    python train.py --init runs/shapes/checkpoint.pt --image-size 64   a second phase (Sec. 4.1)
    python train.py --init OLD --fresh poolers --train poolers --lambda-con 0   LLaVA's first stage
    python train.py --out runs/shapes --resume                         go on after a stop
    python train.py --batch-size 1024 --accum 16                       1,024 in the memory of 64
    torchrun --nproc_per_node=2 train.py                               a batch over two processes
    python train.py --data cifar10 --help                              all settings, for CIFAR-10
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from coca import CONFIGS, PAD, CoCa, CoCaConfig, caption_ids, contrastive_loss, count_parameters
from data import (
    NAMES,
    Batches,
    Tokenizer,
    UserError,
    drawn,
    note,
    replacing,
    run_program,
    to_model,
)
from eval import BLOCK, FORMAT, evaluate, load_checkpoint, load_data, pick_device

# ------------------------------------------------------------------------------------------------
# The loop


def train(model, optimizer, batches, s, start=0, rank=0, world=1):
    """Trains from step `start` to the last. Yields (step, L_Con, L_Cap) after backward and before
    the optimizer's step: the weights have just given finite losses, and may be saved.

    Eq. (2): CoCa.losses calls contrastive_loss. Eq. (3): CoCa.losses calls CoCa.forward, and that
    captioning_loss. With --accum or several processes large_batch_backward replaces CoCa.losses.
    """
    autocast = half_precision(s.device)
    for step in range(start, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s.lr, s.steps)
        images, tokens = batches(step)
        optimizer.zero_grad()
        if world == 1 and s.accum == 1:
            with autocast:
                loss, con, cap = model.losses(images, tokens)           # Eqs. (4), (2), (3)
            loss.backward()
        else:
            con, cap = large_batch_backward(model, images, tokens, s.accum, rank, world, autocast)
        norm = clip_grad_norm_(model.parameters(), 1.0)  # Tables 9, 10; not stated for pretraining
        con, cap, norm = torch.stack([con, cap, norm]).tolist()
        if not math.isfinite(con + cap + norm):
            raise UserError(f"step {step + 1}: loss_con is {con}, loss_cap {cap}, the gradient's "
                            f"norm {norm}; try a smaller --lr")
        yield step, con, cap
        optimizer.step()
        with torch.no_grad():
            model.log_temperature.clamp_(math.log(0.01), 0.0)  # CLIP's bound below; at most 1


# ------------------------------------------------------------------------------------------------
# The recipe of Sec. 4.1


def make_optimizer(model):
    """AdamW with the paper's betas and weight decay. Its Adafactor stores less for each weight, and
    scales steps in its own way; AdamW is what most readers know.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() <= 1]  # biases, norms, [CLS], temperature: no decay
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def learning_rate(step, peak, steps):
    """Linear warm-up over the first 2 % of the steps, then linear decay (to 0: not stated)."""
    warm_up = max(1, round(0.02 * steps))
    rising = (step + 1) / warm_up
    falling = (steps - step) / max(1, steps - warm_up)
    return peak * min(rising, falling)


def half_precision(device):
    """Where the GPU has it, matrix products are in bfloat16; losses stay in float32."""
    kind = torch.device(device).type
    has_it = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=has_it)


# ------------------------------------------------------------------------------------------------
# One batch in several parts, on one or many processes: the paper's N is 65,536


def large_batch_backward(model, images, tokens, accum, rank, world, autocast):
    """Leaves the gradient of Eq. (4) for the batch of *all* processes in the parameters.

    images, tokens: this process's n rows of N; accum: parts to compute them in -> loss_con,
    loss_cap. The contrastive loss compares every image with every text of the batch, so it is no
    mean over parts of it, and adding up the parts' own losses would be wrong. Instead (gradient
    caching, Gao et al. 2021):

      1. embed all parts without keeping graphs, and gather the embeddings of all processes;
      2. each process takes Eq. (2) for its own rows, which gives the temperature's gradient and,
         added up over processes, the gradient of each embedding;
      3. run each part again, with its graph, and go backward from sum(embedding * gradient): the
         chain rule; a part's captioning loss counts by its share of all target tokens;
      4. add up the gradients of all processes.

    This is exact as long as a part's second run gives what its first gave: nothing in the model is
    random. With dropout it would not be. It costs a second run of the encoder, the poolers and the
    lower half of the decoder; a process with one part keeps the graph of its first run instead.
    """
    config = model.config
    n = len(images)
    N = n * world
    size = math.ceil(n / accum)
    parts = list(zip(images.split(size), tokens.split(size)))
    keep = len(parts) == 1

    # 1. Embeddings
    with torch.set_grad_enabled(keep), autocast:
        if keep:
            first = [model(images, tokens)]
        else:
            first = [(model.encode_image(image), model.encode_text(text)) for image, text in parts]
    x = gather(torch.cat([part[0] for part in first]).detach(), world)  # (N, E)
    y = gather(torch.cat([part[1] for part in first]).detach(), world)  # (N, E)
    padded = F.pad(tokens, (0, config.text_len - tokens.shape[1]))      # (n, text_len)
    ids = caption_ids(gather(padded, world))                            # (N,)

    # 2. Their gradients, by blocks of rows; a block's graph is gone before the next
    x.requires_grad_()
    y.requires_grad_()
    con = torch.zeros((), device=x.device)
    own = torch.arange(n, device=x.device) + rank * n
    for rows in own.split(max(1, BLOCK // N)):
        share = contrastive_loss(x, y, model.temperature, ids, rows) * len(rows) / N
        (config.lambda_con * share).backward()
        con += share.detach()
    targets = (tokens[:, 1:] != PAD).sum()
    add_up([x.grad, y.grad, con, targets], world)
    dx = x.grad[own].split(size)
    dy = y.grad[own].split(size)

    # 3. Into the model
    cap = torch.zeros_like(con)
    for (image, text), dx_part, dy_part in zip(parts, dx, dy):
        with autocast:
            x_part, y_part, share = first[0] if keep else model(image, text)
        share = share * (text[:, 1:] != PAD).sum() / targets.clamp(min=1)
        sent = (x_part * dx_part).sum() + (y_part * dy_part).sum()
        (sent + config.lambda_cap * share).backward()
        cap += share.detach()

    # 4. Over all processes
    add_up([cap, *(p.grad for p in model.parameters() if p.grad is not None)], world)
    return con, cap


def gather(rows, world):
    """rows (n, ...) of this process -> of all processes (world * n, ...)."""
    if world == 1:
        return rows
    whole = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(whole, rows.contiguous())
    return torch.cat(whole)


def add_up(tensors, world):
    """Each tensor becomes its sum over all processes."""
    if world > 1:
        for t in tensors:
            dist.all_reduce(t)


# ------------------------------------------------------------------------------------------------
# Models from data and from other models; Sec. 4.1's second phase at more pixels


def part_of(name):
    """Name of a parameter -> its part, None for the temperature, which always learns."""
    for part, modules in PARTS.items():
        if name.split(".")[0] in modules:
            return part
    return None


def new_model(s, data, source=None):
    """-> model and tokenizer, with the source's weights and vocabulary, except --fresh's."""
    if source is None or "decoder" in s.fresh:
        size = max(s.vocab_size, CONFIGS["tiny"].vocab_size)  # (--init may have few words)
        tokenizer = Tokenizer.learn(itertools.chain(*data.captions), size)
    else:
        tokenizer = source[1]
    s.vocab_size = len(tokenizer)
    torch.manual_seed(fresh_seed(s.seed, source[0]) if s.fresh else s.seed)
    model = CoCa(config_of(s))
    if source is None or "encoder" in s.fresh:
        some = to_model(torch.tensor(data.images[:256]))
        whiten_patches(model.encoder.patches, some, 0.5 if data.augment else 0.0)
    if source is None:
        return model, tokenizer
    weights = source[0].state_dict()
    wanted = model.state_dict()
    weights["encoder.position"] = resize_positions(weights["encoder.position"],
                                                   wanted["encoder.position"])
    for name in {**wanted, **weights}:
        if part_of(name) in s.fresh:
            continue
        if name not in wanted or name not in weights or wanted[name].shape != weights[name].shape:
            raise UserError(f"--init: its {name} does not fit the sizes asked for; "
                            f"leave the sizes out, or add --fresh {part_of(name)}")
        wanted[name].copy_(weights[name])
    return model, tokenizer


def fresh_seed(seed, model):
    """A seed for new parts. (With the source's own seed they would start as its old parts did.)
    """
    digest = hashlib.sha256(str(seed).encode())
    for weight in model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return int.from_bytes(digest.digest()[:4], "big")


def resize_positions(position, wanted):
    """Learned positions (P, D), interpolated to the grid of the wanted (P', D)."""
    side = math.isqrt(len(position))
    grid = math.isqrt(len(wanted))
    square = position.T.unflatten(1, (side, side))                      # (D, side, side)
    finer = F.interpolate(square[None], size=(grid, grid), mode="bicubic")  # (1, D, grid, grid)
    return finer[0].flatten(1).T                                        # (P', D)


@torch.no_grad()
def whiten_patches(layer, images, whitening):
    """Sets a patch embedding so that its outputs on these images (n, 3, S, S) have mean 0 and
    spread 1.

    whitening 0 keeps the proportions of the picture. 1 scales all principal directions of the
    patches to the same spread, noise too (as ConvNets do that learn CIFAR in seconds: Jordan 2024,
    arXiv 2404.00498). 0.5 lies between. In photographs neighbouring pixels are nearly equal, so
    brightness outweighs edges and texture by far: half of whitening helps an encoder to see these.
    In scenes most directions are noise.
    """
    weight = layer.weight.flatten(1)                                    # (D, 3 * patch^2)
    patches = F.unfold(images, layer.stride, stride=layer.stride)       # (n, 3 * patch^2, P)
    patches = patches.transpose(1, 2).flatten(0, 1)                     # (n * P, 3 * patch^2)
    variance, directions = torch.linalg.eigh(patches.T.cov())
    variance = variance.clamp(min=0) + 1e-5  # (blank images: no division by 0)
    scale = variance ** (-whitening / 2)
    scale = scale / (variance * scale**2).mean().sqrt()  # embeddings of spread 1
    weight = weight @ (directions * scale) @ directions.T               # (D, 3 * patch^2)
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.bias.copy_(-weight @ patches.mean(0))


# ------------------------------------------------------------------------------------------------
# Settings that depend on the data, and the parts of a model

# The paper's learning rate is 8e-4 (Sec. 4.1), for models that are 200 to 1,000 times larger and
# 500,000 steps. Those of cifar10 and captions were chosen on training images kept apart
# (--val-from-train), shapes' on scenes of other seeds; cifar100 and coco take them over.
CIFARS = dict(steps=5625, batch_size=32, lr=2.5e-4)  # nine minutes on two cores
CAPTIONS = dict(steps=1600, batch_size=128, lr=1.5e-3, image_size=64, patch_size=8)
PRESETS = {
    "shapes": dict(steps=624, batch_size=96, lr=1.5e-3, patch_size=8),
    "cifar10": CIFARS,
    "cifar100": CIFARS,
    "coco": CAPTIONS,
    "captions": CAPTIONS,
}
PARTS = {  # what --train and --fresh name
    "encoder": ["encoder"],
    "poolers": ["generative_pooler", "contrastive_pooler"],
    "decoder": ["unimodal", "multimodal"],
}


# ------------------------------------------------------------------------------------------------
# Plumbing: nothing about CoCa below

# Settings

# On --resume: these change nothing but rounding
MAY_CHANGE = "data data_dir accum grad_checkpoint compile".split()  # (data: see check_data)
NOT_KEPT = "help out resume device last_file".split()
SAVE_EVERY = 30  # seconds; longer if saving would take over 5 % of the time
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # 80 columns


def parse_args(argv=None):
    """-> settings and, with --resume or --init, what load_checkpoint gives.

    A setting without a flag is taken from the checkpoint (--resume: all; --init: sizes and loss
    weights), else from --config, else from PRESETS, else from the tiny configuration and the
    defaults here.
    """
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], usage="python train.py [options]", add_help=False,
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = p.add_argument
    flag("--help", "-h", action="store_true", help="these lines, with the defaults that apply")
    flag("--data", choices=NAMES, default="shapes", help="what to train on")
    flag("--data-dir", help="folder of the data")
    flag("--subset", type=at_least(0), default=0, help="that many training images, 0 = all")
    flag("--val-from-train", type=at_least(0), default=0, metavar="N",
         help="tuning: evaluate on N training images, kept apart")
    flag("--config", choices=CONFIGS, help="sizes of Table 1 instead of the data's")
    flag("--init", type=os.path.abspath, help="start from this checkpoint's sizes, vocabulary and "
         "weights; positions are interpolated to --image-size")
    flag("--fresh", nargs="+", choices=PARTS, default=[],
         help="parts to start anew; a fresh decoder learns a new vocabulary, too")
    flag("--train", nargs="+", choices=PARTS, default=list(PARTS),
         help="parts that learn, beside the temperature")
    flag("--steps", type=at_least(1), help="training steps")
    flag("--batch-size", type=at_least(2), help="images a step: N of Eq. (2)")
    flag("--lr", type=at_least(0, float), help="peak learning rate")
    flag("--lambda-con", type=at_least(0, float), help="weight of Eq. (2) in Eq. (4)")
    flag("--lambda-cap", type=at_least(0, float), help="weight of Eq. (3) in Eq. (4)")
    flag("--pooler", choices=["cascade", "parallel"], help="Table 8f")
    flag("--n-query", type=at_least(0), help="of the generative pooler, 0 = it is left out")
    flag("--n-uni", type=at_least(1), help="unimodal decoder layers, Table 8d")
    flag("--n-multi", type=at_least(1), help="multimodal decoder layers, Table 8d")
    flag("--encoder-layers", type=at_least(0), help="0 = no encoder, patches go straight on")
    flag("--image-size", type=at_least(1), help="pixels a side")
    flag("--seed", type=at_least(0, high=2**32), default=0, help="of weights, order and scenes")
    flag("--device", default="auto", help="cuda, mps or cpu; auto = the first there is")
    flag("--out", help="folder for checkpoint and metrics, else a new runs/DATA")
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--accum", type=at_least(1), default=1, help="parts of each process's share of a batch")
    flag("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=False,
         help="recompute activations in backward: less memory, same gradients")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="torch.compile: worth its minute for large models on a GPU")

    given = p.parse_args(argv)
    p.set_defaults(**asdict(CONFIGS["tiny"]), fingerprint=None, last_file=None)
    p.set_defaults(**PRESETS[given.data])
    if given.config:
        p.set_defaults(**asdict(CONFIGS[given.config]))
    if given.help:
        nothing = r"\s+\(default:\s+(None|False|\[\])\)"
        print(re.sub(nothing, "", p.format_help()))
        sys.exit()
    check_flags(p, given)
    source = None
    if given.resume:
        path = Path(given.out) / "checkpoint.pt"
        p.set_defaults(last_file=stamp(path))
        source = load_checkpoint(path)
        p.set_defaults(**source[2]["config"])
        p.set_defaults(**source[2]["settings"])
    elif given.init:
        source = load_checkpoint(given.init)
        p.set_defaults(**source[2]["config"])
    s = p.parse_args(argv)
    s.data_dir = s.data_dir and os.path.abspath(s.data_dir)
    s.train = [part for part in PARTS if part in s.train]
    s.fresh = [part for part in PARTS if part in s.fresh]
    check_settings(p, s, source)
    if given.init and not given.lr and not given.resume:
        note(f"--lr is {s.lr}, as for a new model; a tenth of it spares what --init has learned")
    return s, source


# A run: what it is made of, and what it leaves behind


def main(argv=None, load_data=load_data):
    """load_data: for data of your own, a function like eval.load_data."""
    s, source = parse_args(argv)
    unused = s.train == ["poolers"] and not s.lambda_con and not s.n_query
    if not s.lr or unused:
        raise UserError("no weight would move; give --lr more than 0, or --train other parts")
    rank, world = join_processes(s)
    if rank == 0 and s.out and not s.resume:
        check_free(s.out)
    if rank > 0:  # the first process decodes pictures, the others then read what it has kept
        dist.barrier()
    data = load_data(vars(s), "train")
    val = load_data(vars(s), "val")
    if rank == 0 and world > 1:
        dist.barrier()
    check_data(s, data, val)
    if s.resume:
        model, tokenizer, checkpoint = source
    else:
        model, tokenizer = new_model(s, data, source)
    del source  # frees what --init loaded: its optimizer's state is twice the model
    prepare(model.to(s.device), s)
    optimizer = make_optimizer(model)
    rows = []  # of metrics, one a step
    if s.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        rows = checkpoint["metrics"].tolist()
    own = slice(rank, None, world)  # of each batch, this process's share
    batches = Batches(data, tokenizer, s.text_len, s.batch_size, s.seed, own, s.device)
    if rank == 0:
        if not s.resume:
            s.out = new_folder(s.out, s.data)
        if not s.data_dir and data.source != "generated scenes":
            s.data = data.source  # of another load_data
        describe(s, model, batches)
        print(f"after a stop go on with: {command_to_go_on(s, world)}")
    run_steps(s, model, tokenizer, optimizer, batches, val, rows, rank, world)
    if rank == 0:
        print(f"\n{s.steps:,} steps, {s.steps * s.batch_size:,} images seen, "
              f"{rows[-1][SECONDS]:.0f} s of training on {s.device}")
        out = shlex.quote(s.out)
        print(f"saved: checkpoint.pt and metrics.csv in {out}")
        if s.data in NAMES:
            print(f"score: python eval.py {out}")
        evaluate(model, tokenizer, {**vars(s), "load_data": load_data}, notes=False)
        if data.augment and s.lambda_cap:
            print(f"next:  python eval.py {out} --image YOUR.jpg")
        elif s.data in NAMES:
            print(f"next:  python -m experiments.report {out} {out}.html")
    if world > 1:
        dist.destroy_process_group()


def command_to_go_on(s, world):
    """The command that was typed, with --out and --resume."""
    typed = [*sys.orig_argv]
    if world > 1:  # torchrun started python -u ...
        typed[:2] = ["torchrun", f"--nproc_per_node={world}"]
    if "--out" not in " ".join(typed):
        typed += ["--out", s.out]
    if not s.resume:
        typed += ["--resume"]
    return shlex.join(typed)


def check_free(out):
    """UserError if a new run cannot have the folder `out`. It may be there, but empty."""
    try:
        if os.path.lexists(out) and os.listdir(out):
            raise FileExistsError(0, "it is not empty")
    except OSError as e:
        raise UserError(f"{out}: no place for a new run ({e.strerror}); give another --out, or "
                        "--resume the run that is there") from None


def new_folder(out, data):
    """Makes the folder of a new run -> out, else the first free of runs/DATA, runs/DATA-2, ..."""
    if out:
        check_free(out)
    try:
        if out:
            os.makedirs(out, exist_ok=True)
            return out
        for number in itertools.count(1):
            out = f"runs/{data}" + f"-{number}" * (number > 1)
            with contextlib.suppress(FileExistsError):
                os.makedirs(out)  # only one of two runs can make it
                return out
    except OSError as e:
        raise UserError(f"{out}: cannot be made ({e.strerror}); give another --out") from None


def run_steps(s, model, tokenizer, optimizer, batches, val, rows, rank, world):
    """Runs the loop, fills rows, shows and saves. (A stop, Ctrl-C too, goes back to the last save.)
    """
    began = time.time() - (rows[-1][SECONDS] if rows else 0)
    saved = -math.inf  # when
    saving = 0.0  # how long it took
    validated = ""  # what the bar shows of the last save
    with tqdm(total=s.steps, initial=len(rows), disable=rank > 0, bar_format=BAR) as bar:
        for step, con, cap in train(model, optimizer, batches, s, len(rows), rank, world):
            due = time.time() - saved > max(SAVE_EVERY, 20 * saving)
            if rank == 0 and due:
                saving = save(s, model, tokenizer, optimizer, val, rows)
                saved = time.time()
                if rows:
                    validated = " val {:.3f} {:.3f}".format(*rows[-1][-2:])
            total = s.lambda_con * con + s.lambda_cap * cap
            rows.append([step + 1, (step + 1) * s.batch_size, con, cap, total,
                         learning_rate(step, s.lr, s.steps), model.temperature.item(),
                         time.time() - began, math.nan, math.nan])
            bar.set_postfix_str(f"con {con:.3f} cap {cap:.3f}{validated}", refresh=False)
            bar.update()
    if rank == 0:
        save(s, model, tokenizer, optimizer, val, rows)


def check_flags(p, given):
    """What is wrong with the flags alone, before anything is read."""
    if given.resume and not given.out:
        p.error("--resume needs --out, the folder of the run to go on with")
    if given.fresh and not (given.init or given.resume):
        p.error("--fresh needs --init, the checkpoint that gives the other parts")
    if given.config and given.init:
        p.error("--init brings its own sizes; leave --config out")


def check_settings(p, s, source):
    """What is wrong with the settings as a whole, before the data are read."""
    if s.resume:
        for name, saved in source[2]["settings"].items():
            if getattr(s, name) != saved and name not in MAY_CHANGE:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"the run was started with {flag} {saved}; leave {flag} out, or "
                                "start anew from it: --init")
    try:
        config_of(s)
    except ValueError as e:
        p.error(str(e))


def at_least(low, kind=int, high=math.inf):
    """For argparse: a number from low to below high."""
    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"must be at least {low} and below {high}, not {text}")
        return value
    parse.__name__ = kind.__name__  # so argparse's own error says "invalid int value"
    return parse


def config_of(s):
    return CoCaConfig(**{field.name: getattr(s, field.name) for field in fields(CoCaConfig)})


def join_processes(s):
    """-> rank, number of processes (torchrun sets both); s.device becomes this one's."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if s.batch_size % world or s.batch_size // world < s.accum:
        raise UserError(f"--batch-size {s.batch_size} cannot be cut into {world} equal shares of "
                        f"--accum {s.accum} parts")
    s.device = pick_device(s.device)
    backend = "gloo"  # CPUs, or one GPU that all share: --device cuda:0
    if world > 1 and s.device == "cuda":
        backend = "nccl"
        count = torch.cuda.device_count()
        if int(os.environ["LOCAL_WORLD_SIZE"]) > count:
            raise UserError(f"{count} GPUs for more processes; start fewer, or add "
                            "--device cuda:0 to share one")
        s.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(s.device)
    if world > 1:
        dist.init_process_group(backend)
    return rank, world


def check_data(s, data, val):
    """UserError if a resumed run learned from other data, or was validated on others."""
    text = json.dumps([[part.names, part.captions] for part in (data, val)])
    found = hashlib.sha256(text.encode()).hexdigest()
    if s.fingerprint not in (None, found):
        raise UserError("the data are not those of the run so far (other images, names or "
                        "captions); put them back, or start anew from it: --init")
    s.fingerprint = found


def prepare(model, s):
    """What --train, --grad-checkpoint and --compile ask for."""
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in [*s.train, None])
    if s.grad_checkpoint:
        model.recompute_activations()
    if s.compile:
        for name in ("forward", "encode_image", "encode_text"):  # all that training calls
            setattr(model, name, torch.compile(getattr(model, name)))


def describe(s, model, batches):
    """What is trained, what is unusual and, of a new model, what to expect."""
    data = batches.data
    print(f"{data.source}: {len(data):,} images, {s.vocab_size:,} tokens")
    print(f"{s.steps:,} steps of {s.batch_size} images on {s.device}")
    learned = 0
    for p in model.parameters():
        if p.requires_grad:
            learned += p.numel()
    print(f"{count_parameters(model):.2f} million parameters, --train {learned / 1e6:.2f} million")
    usual, _ = parse_args(["--data", s.data] if s.data in NAMES else [])
    for name, value in vars(s).items():
        if name not in [*NOT_KEPT, "vocab_size", "fingerprint"] and value != getattr(usual, name):
            print(f"  {name} {value}, not {getattr(usual, name)}")
    if s.resume or s.init:
        return
    if s.lambda_con:
        expected = 2 * math.log(s.batch_size)
        print(f"at step 0 expect a contrastive loss of 2 ln {s.batch_size} = {expected:.2f}")
    if s.lambda_cap:
        expected = math.log(s.vocab_size) + 0.5
        print(f"at step 0 expect a captioning loss of ln {s.vocab_size} + 1/2 = {expected:.2f}")


METRICS = ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature", "seconds",
           "val_con", "val_cap"]
SECONDS = METRICS.index("seconds")


def stamp(path):
    """What tells a file from another one in its place, None if there is none."""
    try:
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns
    except OSError:
        return None


def save(s, model, tokenizer, optimizer, val, rows):
    """Validates, then writes checkpoint.pt, and metrics.csv from the rows in it -> seconds it took.
    eval.load_checkpoint reads it: for eval.py, experiments/, --resume and --init.

    If a stop falls between the two files, the next save makes metrics.csv again. UserError, and
    nothing is written, if the validation losses are not finite, or if there is another file than
    this run read or wrote.
    """
    began = time.time()
    if rows:
        rows[-1][-2:] = validate(s, model, tokenizer, val)
        if not all(map(math.isfinite, rows[-1])):
            raise UserError(f"step {len(rows)}: validation losses {rows[-1][-2:]}; try a smaller "
                            "--lr")
    path = Path(s.out) / "checkpoint.pt"
    if stamp(path) not in (None, s.last_file):
        raise UserError(f"{path} is another run's now and stays as it is; what this run did after "
                        "its last save is lost. Give each run an --out of its own")
    settings = {name: value for name, value in vars(s).items() if name not in NOT_KEPT}
    metrics = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(METRICS))
    checkpoint = dict(format=FORMAT, config=asdict(model.config), vocabulary=tokenizer.words,
                      settings=settings, model=model.state_dict(),
                      optimizer=optimizer.state_dict(), step=len(rows), metrics_names=METRICS,
                      metrics=metrics)
    content = io.BytesIO()  # in memory first: torch's own error of a full disk is hard to read
    torch.save(checkpoint, content)
    with replacing(path) as f:
        f.write(content.getbuffer())
    s.last_file = stamp(path)
    with replacing(Path(s.out) / "metrics.csv") as f:
        np.savetxt(f, rows, "%.9g", ",", header=",".join(METRICS), comments="")
    return time.time() - began


@torch.no_grad()
def validate(s, model, tokenizer, val):
    """Both losses on at most 500 validation images and their first captions, in batches (a last,
    short one is left out: Eq. (2) depends on the size).
    """
    rows = drawn(len(val), 500)
    size = min(s.batch_size, len(rows))
    batches = len(rows) // size
    total = torch.zeros(2)
    for own in rows[:batches * size].reshape(batches, size):
        images = to_model(torch.tensor(val.images[own]).to(s.device))
        tokens = tokenizer.encode([val.captions[i][0] for i in own], s.text_len).to(s.device)
        with half_precision(s.device):
            loss = model.losses(images, tokens)
        total += torch.stack([loss.con, loss.cap]).cpu() / batches
    return total.tolist()


if __name__ == "__main__":
    run_program(main)
