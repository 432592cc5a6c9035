"""Train a CoCa (Sec. 3.2, Eq. (4)) on one machine, with the paper's recipe (Sec. 4.1) scaled down.

    python train.py                                                    generated scenes, some minutes on a CPU
    python train.py --data cifar10 --data-dir DIR [--download]         CIFAR-10 in DIR
    python train.py --data coco --data-dir DIR --subset 1000           COCO captions
    python train.py --data captions --data-dir DIR                     your images, and a CSV image,caption
    python train.py --lambda-cap 0                                     a dual encoder (CLIP); --lambda-con 0: a captioner
    python train.py --out runs/shapes --resume                         go on with a run that was stopped
"""
import argparse
import csv
import dataclasses
import math
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from coca import CONFIGS, CoCa
from data import Batches, DataError, Tokenizer, load
from eval import evaluate, load_checkpoint, pick_device, report

DEFAULTS = dict(data="shapes", data_dir=None, subset=0, config="tiny", steps=2000, batch_size=64, lr=1e-3,
                lambda_con=1.0, lambda_cap=2.0, pooler="cascade", seed=0)
PHOTOS = dict(image_size=64, patch_size=8)  # photographs need more pixels than 32; as many image tokens
DATA = {"shapes": {}, "cifar10": {}, "cifar100": {}, "coco": PHOTOS, "captions": PHOTOS}  # sizes the data change in "tiny"


def number(kind, low):
    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="python train.py [options]",
                                argument_default=argparse.SUPPRESS)  # so that --resume sees what was really given

    def flag(name, text, **how):
        p.add_argument(name, help=f"{text} (default: {DEFAULTS[name[2:].replace('-', '_')]})", **how)

    flag("--data", "what to train on", choices=DATA)
    flag("--data-dir", "folder of the data")
    flag("--subset", "use that many training images, the same every time, 0 = all", type=number(int, 0))
    flag("--config", "size of the model, Table 1", choices=CONFIGS)
    flag("--steps", "training steps", type=number(int, 1))
    flag("--batch-size", "images a step: N of Eq. (2)", type=number(int, 2))
    flag("--lr", "peak learning rate", type=number(float, 0))
    flag("--lambda-con", "weight of the contrastive loss in Eq. (4)", type=number(float, 0))
    flag("--lambda-cap", "weight of the captioning loss in Eq. (4)", type=number(float, 0))
    flag("--pooler", "Table 8f", choices=["cascade", "parallel"])
    flag("--seed", "of weights, order and generated scenes", type=number(int, 0))
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--out", help="folder for checkpoint.pt and metrics.csv (default: a new runs/DATA)")
    p.add_argument("--resume", action="store_true", default=False, help="go on from --out's checkpoint.pt, with its settings")
    p.add_argument("--download", action="store_true", default=False, help="fetch CIFAR into --data-dir first")
    args = p.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    if args.resume and "out" not in args:
        p.error("--resume needs --out, the folder of the run to go on with")
    try:
        if not args.resume:
            make_config({**DEFAULTS, **given})
    except ValueError as e:
        p.error(str(e))
    return args, given


def make_config(settings, vocab_size=None):
    config = CONFIGS[settings["config"]]
    sizes = DATA[settings["data"]] if settings["config"] == "tiny" else {}
    weights = {name: settings[name] for name in ("lambda_con", "lambda_cap", "pooler")}
    return dataclasses.replace(config, vocab_size=vocab_size or config.vocab_size, **sizes, **weights)


def new_folder(out, data):
    """The folder asked for, or the first free of runs/DATA, runs/DATA-2, ... : no run is ever written over."""
    if out is None:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"runs/{data}" + f"-{n}" * (n > 1)).exists())
        out = f"runs/{data}" + f"-{number}" * (number > 1)
    out = Path(out)
    if (out / "checkpoint.pt").exists() or (out / "metrics.csv").exists():
        raise DataError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
    return out


def learning_rate(step, peak, steps):
    """Linear warm-up over the first 2 % of the steps, then linear decay to 0 (Sec. 4.1)."""
    warm_up = max(1, round(0.02 * steps))
    return peak * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def make_optimizer(model):
    """AdamW with the paper's betas and decoupled weight decay (the paper: Adafactor, which keeps less per weight)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]  # biases, norms, temperature: nothing to decay
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.01), dict(params=vectors, weight_decay=0.0)],
                             betas=(0.9, 0.999), fused=True)


def save(path, checkpoint):
    """Writes beside the old checkpoint, then renames: at no moment is there none that loads."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


FIELDS = ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature", "seconds"]


def open_metrics(path, step):
    """metrics.csv, ready for the row after `step`; rows a stopped run wrote past its checkpoint go."""
    rows = []
    if step:
        with open(path, newline="") as f:
            rows = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
    f = open(path, "w", newline="")
    writer = csv.DictWriter(f, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return f, writer, float(rows[-1]["seconds"]) if rows else 0.0


def main(argv=None):
    args, given = parse_args(argv)
    device = pick_device(args.device)
    out = Path(args.out) if args.resume else new_folder(getattr(args, "out", None), given.get("data", "shapes"))
    if args.resume:
        model, tokenizer, checkpoint = load_checkpoint(out / "checkpoint.pt", device)
        settings = checkpoint["settings"]
        for name, value in given.items():
            if value != settings[name]:
                flag = "--" + name.replace("_", "-")
                raise DataError(f"{out}/checkpoint.pt was made with {flag} {settings[name]}; leave {flag} out to go on with it")
    else:
        checkpoint, settings = None, {**DEFAULTS, **given}
    s = argparse.Namespace(**settings)

    torch.manual_seed(s.seed)
    size = model.config.image_size if args.resume else make_config(settings).image_size
    data = load(s.data, s.data_dir, "train", size, s.subset, s.seed, args.download)
    if not args.resume:
        texts = (text for mine in data.captions for text in mine)
        tokenizer = Tokenizer.learn(texts, make_config(settings).vocab_size)
        model = CoCa(make_config(settings, len(tokenizer))).to(device)
    batches = Batches(data, tokenizer, model.config.text_len, s.batch_size, s.seed)
    optimizer, start = make_optimizer(model), 0
    if args.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"].cpu())
        start = checkpoint["step"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        metrics, writer, before = open_metrics(out / "metrics.csv", start)
    except OSError as e:
        raise DataError(f"{out}: cannot be written ({e}); give another --out") from None

    count = lambda *parts: sum(p.numel() for part in parts if part is not None for p in part.parameters()) / 1e6  # noqa: E731
    print(" ".join(f"{name}={value}" for name, value in {**settings, "device": device, "out": out}.items()))
    print(f"{len(data):,} images, {len(tokenizer):,} words; parameters: encoder {count(model.encoder):.2f}M, "
          f"poolers {count(model.generative_pooler, model.contrastive_pooler):.2f}M, "
          f"decoder {count(model.unimodal, model.multimodal):.2f}M")
    print(f"losses to expect at step 0: contrastive about 2 ln {s.batch_size} = {2 * math.log(s.batch_size):.2f} (less if captions "
          f"repeat), captioning about ln {len(tokenizer)} = {math.log(len(tokenizer)):.2f}")

    def checkpoint_now(step):
        save(out / "checkpoint.pt", dict(config=dataclasses.asdict(model.config), vocabulary=tokenizer.words, settings=settings,
                                         model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                                         random=torch.get_rng_state()))

    began = time.time()
    bar = tqdm(range(start, s.steps), "training", s.steps, initial=start)
    for step in bar:
        lr = learning_rate(step, s.lr, s.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, tokens = batches(step)
        losses = model.losses(images.to(device), tokens.to(device))
        values = dict(zip(("loss", "loss_con", "loss_cap"), torch.stack(losses).tolist()))
        bad = [name for name in ("loss_con", "loss_cap", "loss") if not math.isfinite(values[name])]
        if bad:
            raise DataError(f"step {step + 1}: {bad[0]} is {values[bad[0]]}; {out}/checkpoint.pt is the last good one, try a smaller --lr")
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        writer.writerow(dict(step=step + 1, images=(step + 1) * s.batch_size, **values, lr=lr,
                             temperature=model.temperature.item(), seconds=round(before + time.time() - began, 3)))
        bar.set_postfix(con=f"{values['loss_con']:.3f}", cap=f"{values['loss_cap']:.3f}")
        if (step + 1) % 500 == 0 or step + 1 == s.steps:
            metrics.flush()  # first, so that no checkpoint is ahead of its metrics
            checkpoint_now(step + 1)
    metrics.close()
    seconds = before + time.time() - began
    print(f"\n{s.steps:,} steps, {s.steps * s.batch_size:,} images seen, {seconds:.0f} s of training on {device}")
    report(evaluate(model, tokenizer, settings))
    print(f"saved: {out}/checkpoint.pt, {out}/metrics.csv\nnext:  python eval.py {out}/checkpoint.pt --image YOUR.jpg")


if __name__ == "__main__":
    try:
        main()
    except DataError as e:
        sys.exit(f"error: {e}")
