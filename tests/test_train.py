"""Training: resume equals no stop, nothing is lost, bad input is refused in one line, the commands of the README at toy size."""
import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from coca import CONFIGS, CoCa
from data import Batches, DataError, Tokenizer
from train import learning_rate

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--subset", "32", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture
def no_evaluation(monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: {})
    monkeypatch.setattr(train, "report", lambda scores: None)


@pytest.fixture(autouse=True)
def keep_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def rows(out, *without):
    with open(out / "metrics.csv", newline="") as f:
        return [{name: value for name, value in row.items() if name not in ("seconds", *without)} for row in csv.DictReader(f)]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def same_run(a, b):
    assert rows(a) == rows(b)
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


def interrupted(monkeypatch, at, how):
    """Calls how() when the batch of step `at` is asked for."""
    real = Batches.__call__

    def call(self, step):
        if step == at:
            how()
        return real(self, step)

    monkeypatch.setattr(Batches, "__call__", call)


def test_resume_gives_the_run_without_a_stop(tmp_path, no_evaluation, monkeypatch, capsys):
    run = [*TOY, "--steps", "7", "--seed", "3"]
    train.main([*run, "--out", str(tmp_path / "whole")])
    train.main([*run, "--out", str(tmp_path / "again")])
    same_run(tmp_path / "whole", tmp_path / "again")  # two runs with one seed on one machine
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        interrupted(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train.main([*run, "--out", str(tmp_path / "cut")])
    assert e.value.code == 128 + signal.SIGTERM and "after step 4, saved" in capsys.readouterr().out
    assert len(rows(tmp_path / "cut")) == 4
    train.main(["--out", str(tmp_path / "cut"), "--resume", "--device", "cpu"])
    same_run(tmp_path / "whole", tmp_path / "cut")
    with pytest.raises(AssertionError):  # control: another seed is another run
        train.main([*TOY, "--steps", "7", "--seed", "4", "--out", str(tmp_path / "other")])
        same_run(tmp_path / "whole", tmp_path / "other")


def test_control_a_resume_that_forgets_the_optimizer_is_caught(tmp_path, no_evaluation, monkeypatch):
    run = [*TOY, "--steps", "6"]
    train.main([*run, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        def crash():
            raise RuntimeError("crash")
        interrupted(patch, 4, crash)
        train.main([*run, "--out", str(tmp_path / "cut"), "--save-every", "3"])
    assert len(rows(tmp_path / "cut")) in (3, 4)
    real = train.load_checkpoint
    with monkeypatch.context() as patch:
        def forgetful(*args):
            model, tokenizer, checkpoint = real(*args)
            checkpoint["optimizer"] = train.make_optimizer(model).state_dict()
            return model, tokenizer, checkpoint
        patch.setattr(train, "load_checkpoint", forgetful)
        train.main(["--out", str(tmp_path / "cut"), "--resume", "--device", "cpu"])
    with pytest.raises(AssertionError):
        same_run(tmp_path / "whole", tmp_path / "cut")


def run_quietly(arguments):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train.evaluate, train.report = lambda *a: {}, lambda scores: None
    train.main(arguments)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_at_random_moments_loses_nothing(tmp_path):
    """20 SIGKILLs at random moments: weights and metrics are those of a run that nobody killed, bit for bit."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    run, killed = [*TOY, "--steps", "80", "--save-every", "2"], tmp_path / "killed"

    def start(out):
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        process = context.Process(target=run_quietly, args=([*run, "--out", str(out), *resume],))
        process.start()
        return process

    process, began = start(tmp_path / "whole"), time.time()
    process.join()
    assert process.exitcode == 0
    seconds, kills, chance = time.time() - began, 0, random.Random(0)
    for _ in range(20):
        process = start(killed)
        process.join(chance.uniform(0.02, 0.4) * seconds)
        if process.exitcode is not None:
            assert process.exitcode == 0  # it reached the end
            break
        process.kill()
        process.join()
        kills += 1
        if (killed / "checkpoint.pt").exists():
            evaluation.load_checkpoint(killed / "checkpoint.pt")
    process = start(killed)
    process.join()
    assert process.exitcode == 0 and kills > 2
    same_run(tmp_path / "whole", killed)
    assert [int(row["step"]) for row in rows(killed)] == list(range(1, 81))


@pytest.mark.parametrize("name", ["loss_con", "loss_cap", "the gradient's norm"])
def test_a_non_finite_loss_or_gradient_stops_and_leaves_the_last_good_checkpoint(name, tmp_path, no_evaluation, monkeypatch):
    real, calls = train.backward, []

    def poisoned(model, *args):
        con, cap = real(model, *args)
        calls.append(1)
        if len(calls) == 5:
            if name == "loss_con":
                con = con * math.nan
            elif name == "loss_cap":
                cap = cap * math.inf
            else:
                model.unimodal.cls.grad[0] = math.nan
        return con, cap

    monkeypatch.setattr(train, "backward", poisoned)
    with pytest.raises(DataError, match=f"step 5: {name} is .*checkpoint.pt is the last good one") as e:
        train.main([*TOY, "--steps", "9", "--save-every", "2", "--out", str(tmp_path)])
    assert "\n" not in str(e.value)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 4 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.save(path, {"step": 1})

    def full(checkpoint, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="checkpoint.pt: cannot be written .*No space left"):
        train.save(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_the_recipe_of_section_4_1():
    assert CONFIGS["tiny"].lambda_cap == 2 and CONFIGS["tiny"].lambda_con == 1
    lr = [learning_rate(step, 8e-4, 1000) for step in range(1000)]
    assert max(lr) == pytest.approx(8e-4) and lr.index(max(lr)) in (19, 20) and lr[0] == pytest.approx(8e-4 / 20)
    assert all(a > b for a, b in zip(lr[20:], lr[21:])) and 0 < lr[-1] < 2e-6
    groups = train.make_optimizer(CoCa(CONFIGS["tiny"])).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0] and groups[0]["betas"] == (0.9, 0.999)
    assert min(p.dim() for p in groups[0]["params"]) == 2 and max(p.dim() for p in groups[1]["params"]) == 1


# Bad input: one line, non-zero, no traceback


def checkpoint_with_code(path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "exploded"),))
    torch.save({"model": Bomb()}, path)


def cut_off(path):
    train.save(path, dict(config=dict(width=8), model=dict(w=torch.zeros(999))))
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("make", [lambda path: None, checkpoint_with_code, cut_off, lambda path: path.write_text("hello"),
                                  lambda path: torch.save([1, 2], path), lambda path: torch.save({"config": {"depth": 3}}, path),
                                  lambda path: torch.save({"config": {}, "model": {}, "vocabulary": []}, path)])
def test_unfit_checkpoints_are_refused_in_one_line(make, tmp_path):
    path = tmp_path / "checkpoint.pt"
    make(path)
    before = path.read_bytes() if path.exists() else None
    for call in (lambda: evaluation.main([str(path)]), lambda: train.main(["--resume", "--out", str(tmp_path)])):
        with pytest.raises(DataError, match=re.escape(str(path))) as e:
            call()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "exploded").exists()
    assert before == (path.read_bytes() if path.exists() else None)


@pytest.mark.parametrize("wrong", ["--steps 0", "--steps many", "--batch-size 1", "--lr nan", "--lr -1", "--lambda-con 0 --lambda-cap 0",
                                   "--data mnist", "--config huge", "--pooler both", "--subset -5", "--resume", "--accum 0", "--sted 3"])
def test_bad_values_are_refused_before_anything_loads(wrong, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda *a, **k: pytest.fail("loaded data"))
    with pytest.raises(SystemExit) as e:
        train.main(wrong.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(error) == 2 and error[0] == "usage: python train.py [options]"


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path, no_evaluation, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TOY, "--steps", "2"])
    train.main([*TOY, "--steps", "2"])  # no --out: a new folder
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["shapes", "shapes-2"]
    before = (tmp_path / "runs/shapes/checkpoint.pt").read_bytes()
    with pytest.raises(DataError, match="runs/shapes.* holds a run already; add --resume"):
        train.main([*TOY, "--steps", "2", "--out", "runs/shapes"])
    with pytest.raises(DataError, match="was made with --lr 0.0015; leave --lr out"):
        train.main(["--lr", "0.5", "--resume", "--out", "runs/shapes"])
    with pytest.raises(DataError, match="--device abacus: cannot be used here"):
        train.main([*TOY[:4], "--device", "abacus"])
    with pytest.raises(DataError, match="--batch-size 8 cannot be cut into 9 parts"):
        train.main([*TOY, "--accum", "9"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file.*: cannot be written"):
        train.main([*TOY, "--steps", "2", "--out", "file/run"])
    assert before == (tmp_path / "runs/shapes/checkpoint.pt").read_bytes()


@pytest.mark.parametrize("command", ["train.py --data cifar10", "train.py --data coco --data-dir nowhere", "eval.py nowhere.pt",
                                     "train.py --data captions --data-dir tests", "train.py --batch-size 99 --subset 9"])
def test_errors_of_the_programs_are_one_line_without_traceback(command, tmp_path):
    done = subprocess.run([sys.executable, *command.split(), *(["--out", str(tmp_path / "o")] if "train" in command else [])],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stderr.splitlines() if line.strip() and "scenes" not in line]
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert not (tmp_path / "o").exists()


# The README's commands, small


def test_train_then_eval_end_to_end(tmp_path, capsys, monkeypatch):
    out, handlers = tmp_path / "run", [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train.main([*TOY, "--steps", "2", "--out", str(out)])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]  # Ctrl-C works again
    printed = capsys.readouterr().out
    for part in ("zero-shot top-1", "chance", "image to text R@1 ", "text to image R@10", "generated:", "true:", "saved:", "next:",
                 "losses to expect at step 0", "2 ln 8 = 4.16", "2 steps, 16 images seen"):
        assert part in printed, part
    first = rows(out)[0]
    assert list(first) == ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature"] and first["images"] == "8"
    assert float(first["loss_con"]) == pytest.approx(2 * math.log(8), rel=0.35)
    assert float(first["loss"]) == pytest.approx(float(first["loss_con"]) + 2 * float(first["loss_cap"]), rel=1e-4)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert set(checkpoint) == {"config", "vocabulary", "settings", "model", "optimizer", "step", "random"}

    evaluation.main([str(out / "checkpoint.pt"), "--json", str(tmp_path / "scores.json"), "--device", "cpu"])
    assert "zero-shot top-1" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["zero-shot top-1"]["chance"] == pytest.approx(1 / 48)

    image = pytest.importorskip("PIL.Image", reason="Pillow")
    image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / "a.png")
    evaluation.main([str(out / "checkpoint.pt"), "--image", str(tmp_path / "a.png"), "--device", "cpu"])
    assert "a.png: " in capsys.readouterr().out
    with pytest.raises(DataError, match="b.jpg: no such file"):
        evaluation.main([str(out / "checkpoint.pt"), "--image", str(tmp_path / "b.jpg")])


def test_torchrun_trains_as_one_process_does(tmp_path):
    """Two processes, an uneven batch, in parts: the same losses and weights up to rounding."""
    run = ["train.py", "--subset", "40", "--batch-size", "9", "--steps", "3", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = [sys.executable, *run, "--out", str(tmp_path / "one")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two = [*torchrun, *run, "--accum", "2", "--out", str(tmp_path / "two")]
    for command in (one, two):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3), name


@pytest.mark.skipif(not (ROOT.parent / "shared/data/coco").exists(), reason="no real data beside the project")
@pytest.mark.parametrize("data, folder", [("cifar10", ""), ("coco", "coco"), ("captions", "flickr8k")])
def test_real_data_trains(data, folder, tmp_path, no_evaluation):
    train.main(["--data", data, "--data-dir", str(ROOT.parent / "shared/data" / folder), *TOY, "--steps", "2", "--out", str(tmp_path)])
    assert len(rows(tmp_path)) == 2


def test_every_command_of_the_readme_and_the_docstrings_parses():
    text = "\n".join(((ROOT / "README.md").read_text(encoding="utf-8"), train.__doc__, evaluation.__doc__))
    commands = re.findall(r"(?:python|torchrun \S+) (train|eval)\.py([^`\n]*)", text)
    for program, arguments in commands:
        parse = train.parse_args if program == "train" else evaluation.parse_args
        parse(re.split(r"\s{2,}|[;,#\[]", arguments + "  ")[0].split())
    assert len(commands) > 15
    with pytest.raises(SystemExit):  # control
        train.parse_args(["--no-such-flag"])


def test_the_vocabulary_travels_with_the_checkpoint(tmp_path, no_evaluation):
    train.main([*TOY, "--steps", "1", "--out", str(tmp_path)])
    _, tokenizer, checkpoint = evaluation.load_checkpoint(tmp_path / "checkpoint.pt")
    text = "a small red circle at the top left"
    assert isinstance(tokenizer, Tokenizer) and tokenizer.decode(tokenizer.encode([text], 32)[0]) == text
    assert len(tokenizer) == checkpoint["config"]["vocab_size"]
