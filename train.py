"""Train a CoCa (Sec. 3.2, Eq. (4)) with the paper's recipe (Sec. 4.1) scaled down.

    python train.py                                                    generated scenes, some minutes on a CPU
    python train.py --data cifar10 --data-dir DIR [--download]         CIFAR-10 in DIR
    python train.py --data coco --data-dir DIR --subset 1000           COCO captions
    python train.py --data captions --data-dir DIR                     your images, and a CSV image,caption
    python train.py --lambda-cap 0                                     a dual encoder (CLIP); --lambda-con 0: a captioner
    python train.py --init runs/shapes/checkpoint.pt --image-size 64   a second phase at another resolution (Sec. 4.1)
    python train.py --init CHECKPOINT --fresh poolers --train poolers  learn only what lies between, as LLaVA's first stage
    python train.py --out runs/shapes --resume                         go on with a run that was stopped
    python train.py --batch-size 1024 --accum 16                       a large batch in the memory of a small one
    torchrun --nproc_per_node=2 train.py                               the same batch over two processes
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from coca import CONFIGS, PAD, Block, CoCa, captioning_loss, contrastive_loss, number_captions, resize_positions
from data import NAMES, Batches, DataError, Tokenizer, load, without_duplicates
from eval import evaluate, load_checkpoint, pick_device, report

PARTS = {"encoder": ["encoder"], "poolers": ["generative_pooler", "contrastive_pooler"], "decoder": ["unimodal", "multimodal"]}
DEFAULTS = dict(data="shapes", data_dir=None, subset=0, config="tiny", steps=1600, batch_size=128, lr=1.5e-3,
                lambda_con=1.0, lambda_cap=2.0, pooler="cascade", encoder_layers=None, n_query=None, image_size=None,
                init=None, fresh=[], train=list(PARTS), dedup=False, seed=0)  # what makes a run; the checkpoint keeps it
CIFAR_RECIPE = dict(steps=6250, batch_size=32, lr=7e-4)  # 200,000 images seen
RECIPE = {"cifar10": CIFAR_RECIPE, "cifar100": CIFAR_RECIPE}  # other defaults where the data want them
SIZES = {  # what the data change in "tiny"
    "shapes": dict(patch_size=8), "cifar10": dict(encoder_layers=6), "cifar100": dict(encoder_layers=6),
    "coco": dict(image_size=64, patch_size=8), "captions": dict(image_size=64, patch_size=8)}

# ------------------------------------------------------------------------------------------------
# Command line


def number(kind, low):
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="python train.py [options]")

    def flag(name, text, **how):  # its default is filled in later, so that --resume sees what was really given
        key = name[2:].replace("-", "_")
        default = f"{DEFAULTS[key]}; cifar: {CIFAR_RECIPE[key]}" if key in CIFAR_RECIPE else DEFAULTS[key]
        default = " ".join(default) or "none" if isinstance(default, list) else "not given" if default is None else default
        p.add_argument(name, default=argparse.SUPPRESS, help=f"{text} (default: {default})", **how)

    flag("--data", "what to train on", choices=NAMES)
    flag("--data-dir", "folder of the data")
    flag("--subset", "use that many training images, the same every time, 0 = all", type=number(int, 0))
    flag("--config", "size of the model, Table 1", choices=CONFIGS)
    flag("--steps", "training steps", type=number(int, 1))
    flag("--batch-size", "images a step: N of Eq. (2)", type=number(int, 2))
    flag("--lr", "peak learning rate", type=number(float, 0))
    flag("--lambda-con", "weight of the contrastive loss in Eq. (4)", type=number(float, 0))
    flag("--lambda-cap", "weight of the captioning loss in Eq. (4)", type=number(float, 0))
    flag("--pooler", "Table 8f", choices=["cascade", "parallel"])
    flag("--n-query", "queries of the generative pooler, Table 8f; 0 = the decoder reads all image tokens", type=number(int, 0))
    flag("--encoder-layers", "0 = no image encoder, patches go straight on", type=number(int, 0))
    flag("--image-size", "pixels a side", type=number(int, 1))
    flag("--init", "start from this checkpoint's sizes, vocabulary and weights; learned positions are interpolated to --image-size")
    flag("--fresh", "parts that do not take their weights from --init", nargs="+", choices=PARTS)
    flag("--train", "parts that learn, the others stay as they are", nargs="+", choices=PARTS)
    flag("--dedup", "remove near-duplicates of the evaluation images from the training images, Sec. 4.1", action="store_true")
    flag("--seed", "of weights, order and generated scenes", type=number(int, 0))
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--out", help="folder for checkpoint.pt and metrics.csv (default: a new runs/DATA)")
    p.add_argument("--resume", action="store_true", help="go on from --out's checkpoint.pt, with its settings")
    p.add_argument("--download", action="store_true", help="fetch CIFAR into --data-dir first")
    p.add_argument("--save-every", type=number(int, 1), default=500, help="steps between checkpoints (default: 500)")
    p.add_argument("--accum", type=number(int, 1), default=1, help="compute each batch in that many parts, same gradients (default: 1)")
    p.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in backward: less memory, same gradients")
    p.add_argument("--compile", action="store_true", help="torch.compile the model (worth it on GPUs)")
    args = p.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    for name in {"data_dir", "init"} & {name for name in given if given[name]}:
        given[name] = str(Path(given[name]).resolve())
    if args.resume and not args.out:
        p.error("--resume needs --out, the folder of the run to go on with")
    if given.get("fresh") and not given.get("init"):
        p.error("--fresh needs --init, the checkpoint that gives the other parts")
    if not given.get("init"):  # else its sizes count too, in main
        try:
            make_config({**DEFAULTS, **given})
        except ValueError as e:
            p.error(str(e))
    return args, given


def make_config(settings, base=None):
    """Sizes of a new model; base: those of the checkpoint it starts from."""
    if base is None:
        base = dataclasses.replace(CONFIGS[settings["config"]], **(SIZES[settings["data"]] if settings["config"] == "tiny" else {}))
    names = ("lambda_con", "lambda_cap", "pooler", "encoder_layers", "n_query", "image_size")
    return dataclasses.replace(base, **{name: settings[name] for name in names if settings[name] is not None})


def part_of(name):
    """Name of a parameter -> the part it belongs to, None for the temperature, which always learns."""
    return next((part for part, modules in PARTS.items() if name.split(".")[0] in modules), None)


def start_from(source, model, fresh):
    """Copies source's weights into model, but for the fresh parts. DataError if a size differs other than the image's."""
    state = {name: p for name, p in source.state_dict().items() if part_of(name) not in fresh}
    own = model.state_dict()
    if "encoder.position" in state and len(state["encoder.position"]) != len(own["encoder.position"]):
        state["encoder.position"] = resize_positions(state["encoder.position"], math.isqrt(len(own["encoder.position"])))
    wrong = [name for name, p in state.items() if name not in own or p.shape != own[name].shape]
    wrong += [name for name in own if part_of(name) not in fresh and name not in state]
    if wrong:
        raise DataError(f"--init: its {wrong[0]} does not fit the sizes asked for; leave the sizes out, or add --fresh {part_of(wrong[0])}")
    model.load_state_dict(state, strict=False)


def new_folder(out, data):
    """The folder asked for, or the first free of runs/DATA, runs/DATA-2, ... : no run is ever written over."""
    if out is None:
        names = (f"runs/{data}" + f"-{n}" * (n > 1) for n in range(1, sys.maxsize))
        return Path(next(name for name in names if not Path(name).exists()))
    if (Path(out) / "checkpoint.pt").exists():
        raise DataError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
    return Path(out)


# ------------------------------------------------------------------------------------------------
# Recipe (Sec. 4.1)


def learning_rate(step, peak, steps):
    """Linear warm-up over the first 2 % of the steps, then linear decay (to 0: where it ends is not stated)."""
    warm_up = max(1, round(0.02 * steps))
    return peak * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def make_optimizer(model):
    """AdamW with the paper's betas and decoupled weight decay (the paper: Adafactor, which keeps less per weight)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() <= 1]  # biases, norms, temperature: nothing to decay
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)],
                             betas=(0.9, 0.999), fused=True)


def half_precision(device):
    """Where the GPU has it: matrix products in bfloat16, while LayerNorm, softmax and losses stay in float32."""
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return functools.partial(torch.autocast, "cuda", torch.bfloat16)
    return contextlib.nullcontext


# ------------------------------------------------------------------------------------------------
# One batch in several parts, on one or many processes: the paper's N is 65,536


def gather(rows, sizes):
    """Rows of all processes, in their order; sizes: how many each has."""
    if len(sizes) == 1:
        return rows
    padded = F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, max(sizes) - len(rows)])  # collectives want equal shapes
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def backward(model, images, tokens, accum=1, sizes=None, autocast=contextlib.nullcontext):
    """Leaves the gradient of Eq. (4) for the *global* batch in model's parameters -> loss_con, loss_cap.

    images, tokens: this process's rows. The contrastive loss compares every pair of the batch, so it is
    no mean over parts of it: adding up the parts' own losses would be wrong. Instead (gradient caching):
    embed every part without a graph; take the loss of all embeddings, and its gradient with respect to
    them; then run each part again with a graph and send that gradient in. The captioning loss is a sum
    over target tokens: each part counts by its own number of them.
    """
    core = model.module if isinstance(model, DistributedDataParallel) else model
    sizes = sizes or [len(images)]
    rank = dist.get_rank() if len(sizes) > 1 else 0
    config, world, rows = core.config, len(sizes), math.ceil(len(images) / accum)
    if images.device.type == "cpu":
        # what fits a core's cache is quicker (1.5 MB an activation), and short captions apart from long ones need fewer pads
        rows = max(1, min(rows, 400_000 // core.encoder.position.numel()))
    parts = [(x, t[:, :int((t != PAD).sum(1).max())]) for x, t in zip(images.split(rows), tokens.split(rows))]

    def run(part):
        with autocast():
            return model(*part, with_logits=False)

    if accum == 1:  # graphs are kept: nothing runs twice
        outputs = [run(part) for part in parts]
        own = [out[:2] for out in outputs]
    else:
        with torch.no_grad(), autocast():
            own = [(core.encode_image(x), core.encode_text(t)) for x, t in parts]
    x, y = (torch.cat(e).detach().to(core.log_temperature.dtype) for e in zip(*own))
    ids = number_captions(gather(F.pad(tokens, (0, config.text_len - tokens.shape[1])), sizes))
    x_all, y_all = (gather(e, sizes).requires_grad_() for e in (x, y))
    con = contrastive_loss(x_all, y_all, core.temperature, ids)
    *gradients, of_temperature = torch.autograd.grad(config.lambda_con * con, (x_all, y_all, core.log_temperature))
    first = sum(sizes[:rank])
    dx, dy = (g[first:first + len(x)].split([len(part[0]) for part in parts]) for g in gradients)
    targets = (tokens[:, 1:] != PAD).sum()
    if world > 1:
        dist.all_reduce(targets)

    total = cap = 0.0  # total: a scalar whose gradient is that of Eq. (4)
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last or accum == 1 or world == 1 else model.no_sync():  # processes talk once a step
            out = outputs[i] if accum == 1 else run(part)
            share = (out.image_embedding * dx[i]).sum() + (out.text_embedding * dy[i]).sum()
            if config.lambda_cap:
                with autocast():
                    loss = captioning_loss(out.states, part[1], core.multimodal.head)
                loss = loss * (part[1][:, 1:] != PAD).sum() / targets
                share, cap = share + config.lambda_cap * loss, cap + loss.detach()
            total = total + world * share  # DDP takes the mean over processes
            if last:  # (in the part after which DDP adds up)
                total = total + core.log_temperature * of_temperature
            if accum > 1 or last:
                total.backward()
                total = 0.0
    cap = torch.as_tensor(cap, device=con.device)
    if world > 1:
        dist.all_reduce(cap)
    return con.detach(), cap


# ------------------------------------------------------------------------------------------------
# Nothing lost


def save(path, checkpoint):
    """Writes beside the old checkpoint, then renames: at no moment is there none that loads."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({str(e).splitlines()[0]}); the one before, if any, is untouched") from None


FIELDS = ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature", "seconds"]


def open_metrics(path, step):
    """-> metrics.csv, its writer, and seconds so far. Rows that a stopped run wrote past its checkpoint are cut off."""
    f = open(path, "r+" if step else "w", newline="")
    seconds, end = 0.0, None
    if step:
        end = len(f.readline())
        for line in iter(f.readline, ""):
            if int(line.split(",")[0]) > step:
                break
            end, seconds = end + len(line), float(line.rsplit(",", 1)[1])
        f.truncate(end)
        f.seek(end)
    writer = csv.DictWriter(f, FIELDS)
    if not step:
        writer.writeheader()
    return f, writer, seconds


class Stop:
    """Ctrl-C and SIGTERM let the step in hand finish; a second one, or one after the last step, ends at once."""

    def __init__(self):
        self.signal = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------


def main(argv=None):
    args, given = parse_args(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # set by torchrun
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    say = print if rank == 0 else lambda *a: None
    checkpoint, start = None, 0
    if args.resume:
        out = Path(args.out)
        model, tokenizer, checkpoint = load_checkpoint(out / "checkpoint.pt", device)
        settings, config, start = {**DEFAULTS, **checkpoint["settings"]}, model.config, checkpoint["step"]
        for name, value in given.items():
            if value != settings[name]:
                flag = "--" + name.replace("_", "-")
                raise DataError(f"{out}/checkpoint.pt was made with {flag} {settings[name]}; leave {flag} out to go on with it")
    else:
        name = given.get("data", DEFAULTS["data"])
        out, settings = new_folder(args.out, name), {**DEFAULTS, **RECIPE.get(name, {}), **given}
        source, words = load_checkpoint(settings["init"], device)[:2] if settings["init"] else (None, None)
        try:
            config = make_config(settings, source and source.config)
        except ValueError as e:
            raise DataError(str(e)) from None
    s = argparse.Namespace(**settings)
    if s.batch_size < args.accum * world:
        raise DataError(f"--batch-size {s.batch_size} cannot be cut into {args.accum} parts for each of {world} processes; make it larger")

    torch.manual_seed(s.seed)
    for turn in range(min(world, 2)):  # the first process decodes images, the others read what it has kept
        if turn == min(rank, 1):
            data = load(s.data, s.data_dir, "train", config.image_size, s.subset, s.seed, args.download and rank == 0)
            if rank == 0 or s.dedup:
                unseen = load(s.data, s.data_dir, "val", config.image_size, seed=s.seed)  # its faults should show now, not at the end
            if s.dedup:
                data = without_duplicates(data, unseen, mirrored=data.augment)  # training shows mirror images too
        if world > 1:
            dist.barrier()
    if not checkpoint:
        tokenizer = words or Tokenizer.learn((text for mine in data.captions for text in mine), config.vocab_size)
        model = CoCa(dataclasses.replace(config, vocab_size=len(tokenizer))).to(device)
        if source:
            start_from(source, model, s.fresh)
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in [*s.train, None])
    sizes = [s.batch_size // world + (r < s.batch_size % world) for r in range(world)]
    own = slice(sum(sizes[:rank]), sum(sizes[:rank + 1]))  # of every batch: the order is one, whatever the number of processes
    batches = Batches(data, tokenizer, model.config.text_len, s.batch_size, s.seed, own, device)
    optimizer = make_optimizer(model)
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"].cpu())
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = args.grad_checkpoint
    autocast = half_precision(device)

    def keep(step):
        save(out / "checkpoint.pt", dict(config=dataclasses.asdict(model.config), vocabulary=tokenizer.words, settings=settings,
                                         model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                         random=torch.get_rng_state()))

    metrics, before = None, 0.0
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not checkpoint:
                keep(0)
            metrics, writer, before = open_metrics(out / "metrics.csv", start)
        except OSError as e:
            raise DataError(f"{out}: cannot be written ({e}); give another --out") from None

    count = lambda *parts: sum(p.numel() for part in parts if part is not None for p in part.parameters()) / 1e6  # noqa: E731
    say(" ".join(f"{name}={value}" for name, value in {**settings, "device": device, "out": out, "processes": world}.items()))
    say(f"{len(data):,} images, {len(tokenizer):,} words; parameters: encoder {count(model.encoder):.2f}M, "
        f"poolers {count(model.generative_pooler, model.contrastive_pooler):.2f}M, decoder {count(model.unimodal, model.multimodal):.2f}M")
    say(f"losses to expect at step 0: contrastive about 2 ln {s.batch_size} = {2 * math.log(s.batch_size):.2f} (less if captions "
        f"repeat), captioning about ln {len(tokenizer)} = {math.log(len(tokenizer)):.2f}")

    if args.compile:
        model.compile()
    runner = model
    if world > 1:
        runner = DistributedDataParallel(model, find_unused_parameters=not s.lambda_cap)
    stop, began = Stop(), time.time()
    bar = tqdm(range(start, s.steps), "training", s.steps, initial=start, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step, s.lr, s.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, tokens = batches(step)
        optimizer.zero_grad()
        con, cap = backward(runner, images, tokens, args.accum, sizes, autocast)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as in Tables 9 and 10; not stated for pretraining
        temperature = model.temperature.detach()
        values = torch.stack([con, cap, norm, temperature, torch.tensor(float(stop.signal), device=device)])
        if world > 1:
            dist.all_reduce(values[4:], dist.ReduceOp.MAX)  # all stop after the same step
        con, cap, norm, temperature, signalled = values.tolist()  # the only wait for the device in a step
        for name, value in (("loss_con", con), ("loss_cap", cap), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                raise DataError(f"step {step + 1}: {name} is {value}; {out}/checkpoint.pt is the last good one, try a smaller --lr")
        optimizer.step()
        if rank == 0:
            writer.writerow(dict(step=step + 1, images=(step + 1) * s.batch_size, loss_con=con, loss_cap=cap,
                                 loss=s.lambda_con * con + s.lambda_cap * cap, lr=lr, temperature=temperature,
                                 seconds=round(before + time.time() - began, 3)))
            if step % 10 == 0:
                bar.set_postfix(con=f"{con:.3f}", cap=f"{cap:.3f}", refresh=False)
            if (step + 1) % args.save_every == 0 or step + 1 == s.steps or signalled:
                metrics.flush()  # first, so that no checkpoint is ahead of its metrics
                keep(step + 1)
        if signalled:
            bar.close()
            say(f"stopped by {signal.Signals(int(signalled)).name} after step {step + 1}, saved; "
                f"go on with: python train.py --out {out} --resume")
            sys.exit(128 + int(signalled))
    stop.release()
    seconds = before + time.time() - began
    if rank == 0:
        metrics.close()
        say(f"\n{s.steps:,} steps, {s.steps * s.batch_size:,} images seen, {seconds:.0f} s of training on {device}")
        report(evaluate(model, tokenizer, settings))
        say(f"saved: {out}/checkpoint.pt, {out}/metrics.csv\nnext:  python eval.py {out}/checkpoint.pt --image YOUR.jpg")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
