"""Training runs of a second, and what the tests of train.py ask about them."""
import csv
import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import processes
from PIL import Image

import eval as evaluation
import train
from coca import CONFIGS, CoCaConfig
from data import Batches, UserError, load, shapes
from train import METRICS, SECONDS

SMALL = CoCaConfig(width=32, heads=2, encoder_layers=1, encoder_mlp=64, n_uni=1, n_multi=1,
                   decoder_mlp=64, n_query=4)


def make_small(patch):
    """From now on models are small, few scenes validate, and a run ends without evaluation."""
    def few(name, data_dir, split, size, seed, **how):
        if name == "shapes" and split == "val" and not how["val_from_train"]:
            return shapes("train", size, seed + 1, 16)
        return load(name, data_dir, split, size, seed=seed, **how)

    patch.setitem(CONFIGS, "tiny", SMALL)
    patch.setattr(evaluation, "load", few)
    patch.setattr(train, "evaluate", lambda *args, **how: None)


def main(out, command=""):
    """Trains in the folder `out`. A step takes 10 ms."""
    train.main(shlex.split(f"--subset 32 --batch-size 8 --device cpu --out {out} {command}"))


def run(out, command=""):
    """The same -> the checkpoint."""
    main(out, command)
    return checkpoint_of(out)


def end_of(out, command=""):
    """The same where it must end early -> the last words."""
    with pytest.raises((UserError, KeyboardInterrupt)) as end:
        main(out, command)
    return str(end.value)


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)


def rows_of(out):
    """metrics.csv."""
    with open(out / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def check_whole(out, steps):
    """The folder holds a checkpoint of that step, a metrics.csv of just its rows, and no more."""
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.csv"}
    checkpoint = checkpoint_of(out)
    rows = rows_of(out)
    assert checkpoint["step"] == len(rows) == steps
    assert (checkpoint["metrics"][:, SECONDS].diff() > 0).all()
    for i, (row, kept) in enumerate(zip(rows, checkpoint["metrics"].tolist(), strict=True)):
        assert int(row["step"]) == i + 1
        for name, value in zip(METRICS, kept, strict=True):
            assert float(row[name] or "nan") == pytest.approx(value, rel=1e-8, nan_ok=True), name


def check_same(a, b):
    """Two runs with the same weights, optimizer, losses and last validation, bit for bit."""
    results = []
    for out in (a, b):
        kept = checkpoint_of(out)
        metrics = kept["metrics"]
        results.append([kept["model"], kept["optimizer"]["state"], metrics[:, :SECONDS],
                        metrics[-1, -2:]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def before_each(patch, owner, name, act):
    """Calls act(number) before each call of the method."""
    real = getattr(owner, name)
    calls = []

    def call(*args):
        calls.append(args)
        act(len(calls))
        return real(*args)

    patch.setattr(owner, name, call)


def slow_steps(patch, seconds=100):
    """A clock for train.py that only steps move on: with 100 s each is saved. -> [its time]"""
    def tick(number):
        clock[0] += seconds

    clock = [1e9]
    patch.setattr(train, "time", SimpleNamespace(time=lambda: clock[0]))
    before_each(patch, Batches, "__call__", tick)
    return clock


def stop_at(patch, step):
    """Ctrl-C will come in the optimizer's step of that number; each step before it is saved."""
    def stop(current):
        if current == step:
            raise KeyboardInterrupt

    slow_steps(patch)
    before_each(patch, torch.optim.AdamW, "step", stop)


def own_images(folder):
    """Makes a folder of 20 pictures with captions of 1 to 3 words -> the flags to train on it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        words = rng.permutation(["ein", "roter", "hund"])
        lines.append(f"{i}.png,{' '.join(words[:1 + i % 3])}")
    (folder / "captions.txt").write_text("\n".join(lines))
    return f"--data captions --data-dir {folder} --subset 0 --image-size 32"


def main_elsewhere(out, command, environment, log):
    os.environ.update(environment)
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    make_small(patch)
    slow_steps(patch)
    with open(log, "w") as sys.stdout:
        sys.stderr = sys.stdout
        main(out, command)


def start(out, command, log=os.devnull, **environment):
    """main in a process of its own, where each step is saved. log: a file for what it says."""
    process = processes.Process(target=main_elsewhere, args=(out, command, environment, log))
    process.daemon = True
    process.start()
    return process
