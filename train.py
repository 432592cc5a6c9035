"""Train a CoCa (Sec. 3.2, Eq. (4)) with the paper's recipe (Sec. 4.1) scaled down.

    python train.py                                                    generated scenes, on a CPU
    python train.py --data cifar10 --data-dir DIR [--download]         CIFAR-10 in DIR
    python train.py --data coco --data-dir DIR --subset 1000           COCO captions
    python train.py --data captions --data-dir DIR                     your images and captions
    python train.py --lambda-cap 0                                     a dual encoder (CLIP)
    python train.py --lambda-con 0                                     a captioner
    python train.py --init runs/shapes/checkpoint.pt --image-size 64   a second phase (Sec. 4.1)
    python train.py --init CHECKPOINT --fresh poolers --train poolers  as LLaVA's first stage
    python train.py --out runs/shapes --resume                         go on after a stop
    python train.py --batch-size 1024 --accum 16                       1,024 in the memory of 64
    torchrun --nproc_per_node=2 train.py                               a batch over two processes
"""
import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from coca import (
    CONFIGS,
    END,
    PAD,
    UNKNOWN,
    CoCa,
    contrast,
    count_parameters,
    number_captions,
    resize_positions,
)
from data import (
    NAMES,
    Batches,
    Dataset,
    Tokenizer,
    UserError,
    load,
    note,
    to_model,
    without_duplicates,
)
from eval import evaluate, load_checkpoint, pick_device, print_scores, replace_file, save_checkpoint

# ------------------------------------------------------------------------------------------------
# Settings

# What the data change; sizes: of the tiny model. The paper's learning rate is 8e-4 (Sec. 4.1), for
# models a hundred times as large and 500,000 steps; these were chosen on images kept apart
_CIFAR = dict(steps=6250, batch_size=32, lr=2.5e-4, sizes=dict(encoder_layers=6))
_CAPTIONS = dict(steps=1600, batch_size=128, lr=1.5e-3, sizes=dict(image_size=64, patch_size=8))
PRESETS = {
    "shapes": dict(steps=624, batch_size=96, lr=1.5e-3, sizes=dict(patch_size=8)),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "coco": _CAPTIONS,
    "captions": _CAPTIONS,
}
PARTS = {  # what --train and --fresh name
    "encoder": ["encoder"],
    "poolers": ["generative_pooler", "contrastive_pooler"],
    "decoder": ["unimodal", "multimodal"],
}
# Flags that are fields of CoCaConfig
SIZES = ["lambda_con", "lambda_cap", "pooler", "n_query", "encoder_layers", "image_size"]
DEFAULTS = dict(data="shapes", data_dir=None, subset=0, val_from_train=0, dedup=False,
                config="tiny", init=None, fresh=[], train=list(PARTS), seed=0,
                accum=1, grad_checkpoint=False, compile=False)
MAY_CHANGE = ["data_dir", "accum", "grad_checkpoint", "compile"]  # on --resume: the result is the same


def at_least(low, kind):
    """For argparse: a number that is not below `low`."""
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def parse_args(argv):
    """What is not given is None: choose_settings fills it in."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                usage="python train.py [options]")
    count = at_least(0, int)
    amount = at_least(0, float)
    p.add_argument("--data", choices=NAMES, help="what to train on (default: shapes)")
    p.add_argument("--data-dir", help="folder of the data")
    p.add_argument("--subset", type=count, help="that many training images, 0 = all (default)")
    p.add_argument("--val-from-train", type=count, metavar="N",
                   help="tuning: evaluate on N training images, kept apart (default: 0)")
    p.add_argument("--dedup", action="store_true", default=None,
                   help="leave out near-duplicates of evaluation images, Sec. 4.1")
    p.add_argument("--config", choices=CONFIGS, help="size, Table 1 (default: tiny)")
    p.add_argument("--steps", type=at_least(1, int), help="training steps (default: see PRESETS)")
    p.add_argument("--batch-size", type=at_least(2, int),
                   help="images a step: N of Eq. (2) (default: see PRESETS)")
    p.add_argument("--lr", type=amount, help="peak learning rate (default: see PRESETS)")
    p.add_argument("--lambda-con", type=amount,
                   help="weight of the contrastive loss in Eq. (4) (default: 1, or --init's)")
    p.add_argument("--lambda-cap", type=amount,
                   help="weight of the captioning loss in Eq. (4) (default: 2, or --init's)")
    p.add_argument("--pooler", choices=["cascade", "parallel"],
                   help="Table 8f (default: cascade, or --init's)")
    p.add_argument("--n-query", type=count,
                   help="queries of the generative pooler, 0 = the decoder reads all image tokens")
    p.add_argument("--encoder-layers", type=count, help="0 = no encoder, patches go straight on")
    p.add_argument("--image-size", type=at_least(1, int), help="pixels a side")
    p.add_argument("--init", help="start from this checkpoint's sizes, vocabulary and weights; "
                                  "positions are interpolated to --image-size")
    p.add_argument("--fresh", nargs="+", choices=PARTS,
                   help="parts not from --init; a fresh decoder learns a new vocabulary too")
    p.add_argument("--train", nargs="+", choices=PARTS,
                   help="parts that learn (default: all), beside the temperature")
    p.add_argument("--seed", type=count, help="of weights, order and scenes (default: 0)")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first of them)")
    p.add_argument("--out", help="folder for checkpoint and metrics (default: a new runs/DATA)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--download", action="store_true", help="fetch CIFAR into --data-dir first")
    p.add_argument("--save-every", type=at_least(1, int), default=500,
                   help="steps between checkpoints at most (default: 500)")
    p.add_argument("--accum", type=at_least(1, int),
                   help="compute each batch in that many parts, same gradients (default: 1)")
    p.add_argument("--grad-checkpoint", action="store_true", default=None,
                   help="recompute activations in backward: less memory, same gradients")
    p.add_argument("--compile", action="store_true", default=None,
                   help="torch.compile: worth its minute for large models on a GPU")
    args = p.parse_args(argv)
    if args.resume and not args.out:
        p.error("--resume needs --out, the folder of the run to go on with")
    if args.fresh and not args.init:
        p.error("--fresh needs --init, the checkpoint that gives the other parts")
    if args.config and args.init:
        p.error("--init brings its own sizes; leave --config out")
    if not args.init and not args.resume:
        try:
            make_config(choose_settings(args))
        except ValueError as e:
            p.error(str(e))
    return args


def choose_settings(args, saved=None):
    """What makes a run: flags over PRESETS over DEFAULTS; on --resume what was saved, and flags
    for MAY_CHANGE only. Sizes that no flag gives are settled in make_config.
    """
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("data_dir", "init"):
        if name in given:
            given[name] = str(Path(given[name]).resolve())
    if saved is None:
        settings = {**DEFAULTS, **PRESETS[args.data or DEFAULTS["data"]], **dict.fromkeys(SIZES)}
        settings.pop("sizes")
    else:
        settings = dict(saved)
    for name in settings.keys() & given.keys():
        if saved and settings[name] != given[name] and name not in MAY_CHANGE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{args.out}/checkpoint.pt was made with {flag} {settings[name]}; "
                            f"leave {flag} out, or start anew from it: --init {args.out}/checkpoint.pt")
        settings[name] = given[name]
    return settings


def make_config(settings, source=None):
    """Sizes of the model: those of the source, else of --config, but for what is given."""
    config = source.config if source else CONFIGS[settings["config"]]
    if not source and settings["config"] == "tiny":
        config = dataclasses.replace(config, **PRESETS[settings["data"]]["sizes"])
    given = {name: settings[name] for name in SIZES if settings[name] is not None}
    return dataclasses.replace(config, **given)


# ------------------------------------------------------------------------------------------------
# What a run is made of


def join_processes(device):
    """-> rank, number of processes (torchrun sets both), device of this one."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device)
    backend = "gloo"  # CPUs, or one GPU that all share: --device cuda:0
    if world > 1 and device == "cuda":
        backend = "nccl"
        number = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if number >= count:
            raise UserError(f"no GPU is left for process {number} of this machine; start {count} "
                            "at most, or add --device cuda:0 to share one")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(backend)
    return rank, world, device


def load_data(s, size, download, rank, world):
    """-> training and validation Dataset."""
    if rank > 0:
        dist.barrier()  # the first process decodes images, the others then read what it has kept
    common = dict(size=size, seed=s.seed, val_from_train=s.val_from_train)
    fetch = download and rank == 0
    data = load(s.data, s.data_dir, "train", subset=s.subset, download=fetch, **common)
    val = load(s.data, s.data_dir, "val", **common)
    if s.dedup:  # training shows mirror images too
        data = without_duplicates(data, val, mirrored=data.augment)
    if rank == 0 and world > 1:
        dist.barrier()
    return data, val


def part_of(name):
    """Name of a parameter -> its part, None for the temperature, which always learns."""
    for part, modules in PARTS.items():
        if name.split(".")[0] in modules:
            return part
    return None


def new_model(config, s, data, source=None, vocabulary=None):
    """-> model and tokenizer, with the source's weights and vocabulary but for --fresh."""
    tokenizer = vocabulary
    if vocabulary is None or "decoder" in s.fresh:
        texts = [text for captions in data.captions for text in captions]
        tokenizer = Tokenizer.learn(texts, max(config.vocab_size, CONFIGS["tiny"].vocab_size))
    torch.manual_seed(s.seed)
    model = CoCa(dataclasses.replace(config, vocab_size=len(tokenizer)))
    if source is None or "encoder" in s.fresh:
        some = to_model(torch.tensor(data.images[:256]))
        model.encoder.standardise(some, whitening=0.5 if data.augment else 0)  # 0.5: photographs
    if source is None:
        return model, tokenizer
    weights = {name: p for name, p in source.state_dict().items() if part_of(name) not in s.fresh}
    wanted = model.state_dict()
    if "encoder.position" in weights:
        grid = math.isqrt(len(wanted["encoder.position"]))
        weights["encoder.position"] = resize_positions(weights["encoder.position"], grid)
    for name in {**wanted, **weights}:
        fits = name in wanted and name in weights and wanted[name].shape == weights[name].shape
        if part_of(name) not in s.fresh and not fits:
            raise UserError(f"--init: its {name} does not fit the sizes asked for; "
                            f"leave the sizes out, or add --fresh {part_of(name)}")
    model.load_state_dict(weights, strict=False)
    return model, tokenizer


def prepare(model, s):
    """What --train, --grad-checkpoint and --compile ask for."""
    for name, p in model.named_parameters():
        p.requires_grad_(part_of(name) in [*s.train, None])
    if s.grad_checkpoint:
        model.recompute_activations()
    if s.compile:
        for name in ("losses", "embed_and_caption", "encode_image", "encode_text"):
            setattr(model, name, torch.compile(getattr(model, name)))


def make_optimizer(model):
    """AdamW with the paper's betas and weight decay (its Adafactor only keeps less per weight)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() <= 1]  # biases, norms, temperature: nothing to decay
    groups = [dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def learning_rate(step, peak, steps):
    """Linear warm-up over the first 2 % of the steps, then linear decay (to what is not stated)."""
    warm_up = max(1, round(0.02 * steps))
    return peak * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def half_precision(device):
    """Where the GPU has it, matrix products are in bfloat16; losses stay in float32."""
    kind = torch.device(device).type
    has_it = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=has_it)


# ------------------------------------------------------------------------------------------------
# One batch in several parts, on one or many processes: the paper's N is 65,536

BLOCK = 2**25  # similarities in one tensor at most: 128 MiB of float32


def gather(rows, first, N):
    """rows (n, ...) of this process, from number `first` of N on -> of all processes (N, ...)."""
    whole = rows.new_zeros(N, *rows.shape[1:])
    whole[first:first + len(rows)] = rows
    if len(rows) < N:
        dist.all_reduce(whole)
    return whole


def contrastive_backward(model, x, y, ids, local):
    """Eq. (2) for the rows `local`: their images against all texts, their texts against all images.

    Adds its weighted gradient to x and y (N, E) and the temperature -> these rows' share of the
    loss. By blocks of rows, each of whose graphs is gone before the next: no tensor holds more
    than BLOCK similarities, and a process's work goes with N x N / processes.
    """
    N = len(x)
    loss = torch.zeros((), device=x.device)
    for rows in torch.arange(N, device=x.device)[local].split(max(1, BLOCK // N)):
        positives = ids[rows, None] == ids                              # (rows, N)
        image_to_text = contrast(x[rows], y, model.temperature, positives)
        text_to_image = contrast(y[rows], x, model.temperature, positives)
        share = (image_to_text + text_to_image) * len(rows) / N  # contrast is a mean over rows
        (model.config.lambda_con * share).backward()
        loss = loss + share.detach()
    return loss


def large_batch_backward(model, images, tokens, accum, shares, rank, autocast):
    """Leaves the gradient of Eq. (4) for the batch of *all* processes in the parameters.

    images, tokens: this process's rows; shares: how many rows each process has; accum: parts to
    compute its rows in -> loss_con, loss_cap. The contrastive loss compares every image with every
    text of the batch, so it is no mean over parts of it, and adding up the parts' own losses would
    be wrong. Instead (gradient caching, Gao et al. 2021):

      1. embed all parts without keeping graphs, and gather the embeddings of all processes;
      2. each process takes Eq. (2) for its own rows, which gives the temperature's gradient and,
         added up over processes, the gradient g of each embedding;
      3. run each part again, with its graph, and go backward from sum(embedding * g): the chain
         rule; a part's captioning loss counts by its share of all target tokens;
      4. add up the gradients of all processes.

    This is exact as long as a part's second run gives what its first gave: nothing in the model is
    random. With dropout it would not be.
    """
    config = model.config
    N = sum(shares)
    first = sum(shares[:rank])
    rows = math.ceil(len(images) / accum)
    parts = list(zip(images.split(rows), tokens.split(rows)))

    # 1. Embeddings
    with torch.no_grad(), autocast:
        x = torch.cat([model.encode_image(image) for image, _ in parts])  # (n, E)
        y = torch.cat([model.encode_text(text) for _, text in parts])   # (n, E)
    x = gather(x, first, N)                                             # (N, E)
    y = gather(y, first, N)                                             # (N, E)
    padded = F.pad(tokens, (0, config.text_len - tokens.shape[1]))      # (n, text_len)
    ids = number_captions(gather(padded, first, N))                     # (N,)

    # 2. Their gradients
    local = slice(first, first + len(images))
    con = contrastive_backward(model, x.requires_grad_(), y.requires_grad_(), ids, local)
    targets = (tokens[:, 1:] != PAD).sum()
    add_up([x.grad, y.grad, con, targets], len(shares))
    dx = x.grad[local].split(rows)
    dy = y.grad[local].split(rows)

    # 3. Into the model
    cap = torch.zeros_like(con)
    for (image, text), dx_part, dy_part in zip(parts, dx, dy):
        with autocast:
            image_embedding, text_embedding, share = model.embed_and_caption(image, text)
        share = share * (text[:, 1:] != PAD).sum() / targets
        sent = (image_embedding * dx_part).sum() + (text_embedding * dy_part).sum()
        (sent + config.lambda_cap * share).backward()
        cap += share.detach()

    # 4. Over all processes
    add_up([cap, *(p.grad for p in model.parameters() if p.grad is not None)], len(shares))
    return con, cap


def add_up(tensors, world):
    """Each tensor becomes its sum over all processes."""
    if world > 1:
        for t in tensors:
            dist.all_reduce(t)


# ------------------------------------------------------------------------------------------------
# Nothing lost

METRICS = ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature", "seconds",
           "val_con", "val_cap"]


def claim(out, data):
    """Makes the folder of a new run: --out, or the first free of runs/DATA, runs/DATA-2, ..."""
    number = 1
    while True:
        folder = Path(out or f"runs/{data}" + f"-{number}" * (number > 1))
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))  # only one of two runs can make it
            return folder
        except OSError as e:
            if out or not isinstance(e, FileExistsError):
                raise UserError(f"{folder}: cannot be made ({e}); give another --out") from None
            number += 1


def lock(folder):
    """A file that one process can hold; the system frees it when that process ends, however."""
    try:
        file = open(folder / "lock", "w")
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise UserError(f"{folder}: in use by another run, or not writable ({e}); "
                        "wait, or give another --out") from None
    return file


def check_free(out):
    if os.path.exists(Path(out) / "checkpoint.pt"):
        raise UserError(f"{out} holds a run already; add --resume to go on with it, "
                        "or give another --out")


@dataclasses.dataclass
class Run:
    """A run, and what is kept of it in the folder `out`."""

    out: Path
    settings: dict
    model: CoCa
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    val: Dataset
    device: str
    rows: list  # one of METRICS a step
    saved: float = -math.inf  # when
    saving: float = 0.0  # how long it took

    @torch.no_grad()
    def validate(self):
        """Both losses on at most 500 validation images and their first captions, in batches."""
        n = min(500, len(self.val))
        size = min(self.settings["batch_size"], n)
        con = 0.0
        cap = 0.0
        batches = n // size
        for i in range(0, batches * size, size):
            images = to_model(torch.tensor(self.val.images[i:i + size]).to(self.device))
            texts = [captions[0] for captions in self.val.captions[i:i + size]]
            tokens = self.tokenizer.encode(texts, self.model.config.text_len).to(self.device)
            with half_precision(self.device):
                loss = self.model.losses(images, tokens)
            con += loss.con.item() / batches
            cap += loss.cap.item() / batches
        return con, cap

    def save(self):
        """Validates, then writes checkpoint.pt, and metrics.csv anew from the rows in it.

        Losses that are not finite: UserError, and nothing is written. If a stop falls between the
        two files, --resume makes metrics.csv again.
        """
        began = time.time()
        if self.rows:
            val_con, val_cap = self.validate()
            self.check_finite("validation", val_con=val_con, val_cap=val_cap)
            self.rows[-1][-2:] = val_con, val_cap
        metrics = torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(METRICS))
        save_checkpoint(self.out / "checkpoint.pt", self.model, self.tokenizer,
                        settings=self.settings, step=len(self.rows), metrics_names=METRICS,
                        metrics=metrics, optimizer=self.optimizer.state_dict())
        lines = [",".join(METRICS)]
        for row in self.rows:
            lines.append(",".join("" if math.isnan(value) else f"{value:.9g}" for value in row))
        text = "\n".join([*lines, ""])
        replace_file(self.out / "metrics.csv", lambda f: f.write(text.encode()))
        self.saved = time.time()
        self.saving = self.saved - began

    def overdue(self):
        """Some 30 seconds after the last time, but at most 5 % of the time goes into saving."""
        return time.time() - self.saved > max(30, 20 * self.saving)

    def check_finite(self, when, **values):
        for name, value in values.items():
            if not math.isfinite(value):
                last = ""
                if self.rows and self.out:  # only the first process knows the folder
                    last = f"; {self.out}/checkpoint.pt is the last good one"
                raise UserError(f"{when}: {name} is {value}{last}, try a smaller --lr")


class Stop:
    """Ctrl-C and SIGTERM let the step in hand finish; a second one ends at once."""

    def __init__(self):
        self.signal = 0
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, world, device):
        """The signal that any process got, 0 = none: all stop after the same step."""
        if world == 1:
            return self.signal
        number = torch.tensor(self.signal, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# ------------------------------------------------------------------------------------------------
# The run


def train(run, batches, save_every, shares, rank):
    """Trains from step len(run.rows) to the last."""
    s = argparse.Namespace(**run.settings)
    model = run.model
    optimizer = run.optimizer
    world = len(shares)
    autocast = half_precision(run.device)
    start = len(run.rows)
    validated = {}  # what the bar shows of the last validation
    stop = Stop()
    began = time.time() - (run.rows[-1][METRICS.index("seconds")] if start else 0)
    bar = tqdm(range(start, s.steps), "training", s.steps, initial=start, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step, s.lr, s.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, tokens = batches(step)
        optimizer.zero_grad()
        if world == 1 and s.accum == 1:
            with autocast:
                loss = model.losses(images, tokens)
            loss.total.backward()
            con = loss.con
            cap = loss.cap
        else:
            con, cap = large_batch_backward(model, images, tokens, s.accum, shares, rank, autocast)
        norm = clip_grad_norm_(model.parameters(), 1.0)  # Tables 9, 10; not stated for pretraining
        con, cap, norm, temperature = torch.stack([con, cap, norm, model.temperature]).tolist()
        run.check_finite(f"step {step + 1}", loss_con=con, loss_cap=cap, gradient_norm=norm)
        stopped = stop.asked(world, run.device)
        if rank == 0 and (stopped or step % save_every == 0 or run.overdue()):
            run.save()  # here, where these weights have just given finite losses
            if run.rows:
                val_con, val_cap = run.rows[-1][-2:]
                validated = dict(val_con=f"{val_con:.3f}", val_cap=f"{val_cap:.3f}")
        if stopped:
            end(run, stopped, f"step {step}", rank)
        optimizer.step()
        total = s.lambda_con * con + s.lambda_cap * cap
        run.rows.append([step + 1, (step + 1) * s.batch_size, con, cap, total, lr, temperature,
                         time.time() - began, math.nan, math.nan])
        bar.set_postfix(con=f"{con:.3f}", cap=f"{cap:.3f}", **validated, refresh=False)
    if rank == 0:
        run.save()
    stop.release()
    if stop.signal:
        end(run, stop.signal, "the last step", rank)


def end(run, number, when, rank):
    if rank == 0:
        print(f"\nstopped by {signal.Signals(number).name} after {when}, saved; "
              f"go on with: python train.py --out {run.out} --resume")
    sys.exit(128 + number)


def describe(run, data, world):
    """What is trained, and what to expect of it."""
    facts = {**run.settings, "device": run.device, "out": run.out, "processes": world}
    print(" ".join(f"{name}={value}" for name, value in facts.items()))
    model = run.model
    N = run.settings["batch_size"]
    V = len(run.tokenizer)
    encoder = count_parameters(model.encoder)
    decoder = count_parameters(model.unimodal, model.multimodal)
    poolers = count_parameters(model.generative_pooler, model.contrastive_pooler)
    print(f"{len(data):,} images, {V:,} words; millions of parameters: encoder {encoder:.2f}, "
          f"poolers {poolers:.2f}, decoder {decoder:.2f}")
    print(f"losses to expect at step 0: contrastive about 2 ln {N} = {2 * math.log(N):.2f} (less if "
          f"captions repeat), captioning about ln {V} + 1/2 = {math.log(V) + 0.5:.2f}")


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = join_processes(args.device)
    source = vocabulary = None
    if args.resume:
        out = Path(args.out)
        if rank == 0 and os.path.isdir(out):  # before anything is read: it could still change
            held = lock(out)
        model, tokenizer, checkpoint = load_checkpoint(out / "checkpoint.pt", device)
        settings = choose_settings(args, checkpoint["settings"])
        config = model.config
    else:
        if args.out:
            check_free(args.out)
        settings = choose_settings(args)
        if settings["init"]:
            source, vocabulary, _ = load_checkpoint(settings["init"], device)
        try:
            config = make_config(settings, source)
        except ValueError as e:
            raise UserError(str(e)) from None
        settings.update({name: getattr(config, name) for name in SIZES})  # what applies in the end
    s = argparse.Namespace(**settings)
    if s.batch_size < s.accum * world:
        raise UserError(f"--batch-size {s.batch_size} cannot be cut into {s.accum} parts for each "
                        f"of {world} processes; make it larger")
    data, val = load_data(s, config.image_size, args.download, rank, world)
    if not args.resume:
        model, tokenizer = new_model(config, s, data, source, vocabulary)
    prepare(model.to(device), s)
    optimizer = make_optimizer(model)
    rows = []
    shares = [s.batch_size // world + (r < s.batch_size % world) for r in range(world)]
    own = slice(sum(shares[:rank]), sum(shares[:rank + 1]))  # of every batch
    batches = Batches(data, tokenizer, config.text_len, s.batch_size, s.seed, own, device)
    unknown = (batches.tokens == UNKNOWN).sum() / (batches.tokens > END).sum()
    if unknown > 0.1:
        note(f"{unknown:.0%} of the captions' words are unknown; --fresh decoder learns new ones")
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        rows = checkpoint["metrics"].tolist()
    elif rank == 0:
        out = claim(args.out, s.data)
        held = lock(out)  # noqa: F841 - held until this process ends
        check_free(out)
    else:
        out = args.out
    run = Run(out, settings, model, tokenizer, optimizer, val, device, rows)
    if rank == 0:
        describe(run, data, world)
    train(run, batches, args.save_every, shares, rank)
    if rank == 0:
        seconds = rows[-1][METRICS.index("seconds")]
        print(f"\n{s.steps:,} steps, {s.steps * s.batch_size:,} images seen, "
              f"{seconds:.0f} s of training on {device}")
        print_scores(evaluate(model, tokenizer, settings))
        print(f"saved: {out}/checkpoint.pt, {out}/metrics.csv")
        if config.lambda_cap:
            print(f"next:  python eval.py {out}/checkpoint.pt --image YOUR.jpg")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
