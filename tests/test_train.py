"""Training: a stop changes no result, nothing is lost, all processes count, errors are one line."""
import copy
import csv
import dataclasses
import functools
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Bomb, fails, processes, refused
from PIL import Image

import data as data_file
import eval as evaluation
import train
from coca import CONFIGS, CoCa, CoCaConfig, resize_positions
from data import Batches, Tokenizer, UserError, load, shapes, to_model
from train import METRICS, PARTS, part_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = CoCaConfig(width=32, heads=2, encoder_layers=1, n_uni=1, n_multi=1, n_query=4)
TOY = "--subset 32 --batch-size 8 --device cpu"  # a training run of a second


def make_small(patch):
    """From now on a run ends without evaluation, and a step takes 10 ms."""
    def few(name, data_dir, split, size, seed, **how):
        if name == "shapes" and split == "val" and not how["val_from_train"]:
            return shapes("train", size, 16, seed + 1)
        return load(name, data_dir, split, size=size, seed=seed, **how)

    patch.setitem(CONFIGS, "tiny", SMALL)
    patch.setattr(train, "load", few)
    patch.setattr(train, "evaluate", lambda *args: {})
    patch.setattr(train, "print_scores", lambda scores: None)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def flags(*parts):
    """Texts are split at spaces, paths are not."""
    found = []
    for part in parts:
        found += part.split() if isinstance(part, str) else [str(part)]
    return found


def run(out, *parts, toy=TOY):
    train.main(flags(toy, "--out", out, *parts))
    return checkpoint_of(out)


def resume(out, *parts):
    return run(out, "--resume --device cpu", *parts, toy="")


def end_of(*parts, program=train):
    """What ends a program, as text. (The exception would keep main's variables: the lock.)"""
    try:
        program.main(flags(*parts))
    except (UserError, SystemExit) as e:
        return str(e)


def exits_saying(message, *parts, program=train):
    """The program ends in one line that says so."""
    text = end_of(*parts, program=program)
    assert re.search(message, text) and "\n" not in text, text


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows_of(out, without=("seconds", "val_con", "val_cap")):
    """metrics.csv, but for what depends on time."""
    with open(out / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return [{name: row[name] for name in row if name not in without} for row in rows]


def check_whole(out, steps):
    """The checkpoint loads, it is of that step, and metrics.csv has just its rows."""
    checkpoint, rows = checkpoint_of(out), rows_of(out)
    assert checkpoint["step"] == len(rows) == steps
    assert (checkpoint["metrics"][:, METRICS.index("seconds")].diff() > 0).all()
    for i, (row, kept) in enumerate(zip(rows, checkpoint["metrics"].tolist(), strict=True)):
        assert int(row["step"]) == i + 1
        assert [float(row[name]) for name in row] == pytest.approx(kept[:len(row)], rel=1e-8)


def check_same(a, b):
    """Two runs with the same losses and weights, bit for bit."""
    assert rows_of(a) == rows_of(b)
    weights = checkpoint_of(b)["model"]
    for name, value in checkpoint_of(a)["model"].items():
        assert torch.equal(value, weights[name]), name


def check_near(a, b, rel):
    for one, other in zip(rows_of(a), rows_of(b), strict=True):
        for name in one:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=rel, abs=1e-6), name


def before_each_batch(patch, act):
    """Calls act(step) whenever training asks for a batch."""
    def call(self, step):
        act(step)
        return real(self, step)

    real = Batches.__call__
    patch.setattr(Batches, "__call__", call)


def run_and_stop(monkeypatch, out, at, *parts):
    """A run that gets SIGTERM in the step after the first `at`."""
    def kill(step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        before_each_batch(patch, kill)
        assert end_of("--out", out, *parts) == str(128 + signal.SIGTERM)


def train_quietly(arguments):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    make_small(pytest.MonkeyPatch())
    train.main(arguments)


def start(*parts):
    """A run in a process of its own."""
    process = processes.Process(target=train_quietly, args=(flags(*parts),), daemon=True)
    process.start()
    return process


# Stopped and resumed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of 5 steps, and the same run stopped after 3."""
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        run(whole, "--steps 5 --seed 3")
        run_and_stop(patch, cut, 3, TOY, "--steps 5 --seed 3")
    return whole, cut


@pytest.fixture
def cut(runs, tmp_path):
    """A copy of the stopped run."""
    return Path(shutil.copytree(runs[1], tmp_path / "cut"))


@pytest.mark.parametrize("kept", [0, -40, None])
def test_resume_gives_the_run_without_a_stop(kept, runs, cut):
    check_whole(cut, 3)
    text = (cut / "metrics.csv").read_bytes()
    (cut / "metrics.csv").write_bytes(text[:kept])  # damaged: it is made again
    resume(cut)
    check_same(runs[0], cut)
    check_whole(cut, 5)


def test_control_a_resume_that_forgets_the_optimizer_is_caught(runs, cut, monkeypatch):
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *args: None)
    resume(cut)
    with fails:
        check_same(runs[0], cut)


def test_a_run_killed_at_random_moments_loses_nothing(tmp_path):
    """SIGKILL, four times: all is as in a run that nobody killed, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    checkpoint = killed / "checkpoint.pt"
    settings = "--steps 100 --save-every 4 --out"
    chance = random.Random(0)
    for number in range(4):
        before = checkpoint.stat().st_mtime_ns if number else 0
        process = start(TOY, settings, killed, "--resume" if number else "")
        while process.is_alive():
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                break
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for process in start("--resume --device cpu --out", killed), start(TOY, settings, whole):
        process.join()
        assert process.exitcode == 0
    check_same(whole, killed)
    check_whole(killed, 100)


@pytest.mark.parametrize("failing", [3, 4])  # of the writes: checkpoint.pt or metrics.csv
def test_a_full_disk_leaves_whole_files_to_go_on_from(failing, runs, cut, monkeypatch):
    def full(file):
        calls.append(file)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")

    calls, files = [], set(cut.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        exits_saying("cannot be written", "--device cpu --resume --save-every 1 --out", cut)
    assert set(cut.iterdir()) == files and len(rows_of(cut)) == 3
    if failing == 3:
        check_whole(cut, 3)
    resume(cut)
    check_same(runs[0], cut)


def test_a_signal_after_the_last_step_is_obeyed(cut, monkeypatch):
    def save(run):
        real(run)
        if len(run.rows) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    real = train.Run.save
    monkeypatch.setattr(train.Run, "save", save)
    assert end_of("--resume --out", cut) == str(128 + signal.SIGTERM)



@pytest.mark.parametrize("checked", [True, False])  # False: the control
def test_weights_without_finite_losses_are_not_saved(checked, tmp_path, monkeypatch):
    explodes = "--lr 1e38 --steps 1 --out"
    if checked:
        exits_saying("is (nan|inf); .*last good one", TOY, explodes, tmp_path)
    else:
        monkeypatch.setattr(train.Run, "check_finite", lambda *args, **values: None)
        train.main(flags(TOY, explodes, tmp_path))
    assert (checkpoint_of(tmp_path)["step"] == 0) == checked


@pytest.mark.parametrize("name, field", [("loss_con", "con"), ("loss_cap", "cap"),
                                         ("gradient_norm", "total")])
def test_what_is_not_finite_stops_the_run(name, field, tmp_path, monkeypatch):
    def poisoned(model, *args):
        loss = real(model, *args)
        if torch.is_grad_enabled():
            steps.append(loss)
        if len(steps) == 5:
            loss = loss._replace(**{field: math.nan * getattr(loss, field)})
        return loss

    real, steps = CoCa.losses, []
    monkeypatch.setattr(CoCa, "losses", poisoned)
    exits_saying(f"step 5: {name} is nan", TOY, "--steps 9 --save-every 3 --out", tmp_path)
    check_whole(tmp_path, 3)


@pytest.mark.parametrize("cost, every, fine", [
    (0, 500, True), (1, 500, True), (4, 500, True), (4, 5, False)])  # the last is the control: 8 %
def test_saves_take_at_most_5_percent_of_the_time(cost, every, fine, tmp_path, monkeypatch):
    """Each step takes 10 s, and each save `cost` seconds."""
    def save_checkpoint(*args, **more):
        work.append(now[0] - last[0])
        now[0] = last[0] = now[0] + cost

    def work_a_step(step):
        now[0] += 10

    now, last, work = [1e9], [1e9], []
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: now[0]))
    before_each_batch(monkeypatch, work_a_step)
    train.main(flags(TOY, f"--steps 40 --save-every {every} --out", tmp_path))
    between = work[1:-1]  # the first and the last are made anyway
    assert max(between) <= max(30, 20 * cost) + 10
    assert (min(between) >= 20 * cost) == fine  # 5 %


# One folder, one run


def check_claims(claim):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: claim(None, "shapes"), range(8)))) == 8


def test_runs_that_start_together_get_different_folders(tmp_path, monkeypatch):
    def look_then_make(out, data):
        number = 1
        while Path(f"runs/{data}-{number}").exists():
            number += 1
        time.sleep(0.05)
        Path(f"runs/{data}-{number}").mkdir(parents=True, exist_ok=True)
        return Path(f"runs/{data}-{number}")

    monkeypatch.chdir(tmp_path)
    check_claims(train.claim)
    with fails:  # control
        check_claims(look_then_make)


def test_a_run_that_is_still_going_is_left_alone_until_it_is_killed(tmp_path, monkeypatch):
    process = start(TOY, "--steps 100000 --out", tmp_path)
    try:
        while not (tmp_path / "metrics.csv").exists():
            time.sleep(0.01)
        with monkeypatch.context() as patch:  # what is read before could be old when it is free
            patch.setattr(train, "load_checkpoint", lambda *args: pytest.fail("read all the same"))
            exits_saying("in use by another run", "--resume --device cpu --out", tmp_path)
        (tmp_path / "checkpoint.pt").rename(tmp_path / "moved")
        exits_saying("in use by another run", TOY, "--out", tmp_path)
    finally:
        process.kill()
        process.join()
    train.lock(tmp_path).close()


def test_a_run_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # no --out: a new folder
        train.main(flags(TOY, "--steps 2"))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["shapes", "shapes-2"]
    before = Path("runs/shapes/checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_data", lambda *args: pytest.fail("too late"))
        exits_saying("holds a run already", TOY, "--out runs/shapes")
    assert before == Path("runs/shapes/checkpoint.pt").read_bytes()
    exits_saying("cannot be made", TOY, "--out runs/shapes/metrics.csv")


# What may change on --resume, what --init brings, what --train leaves alone


def own_images(folder):
    """Makes a folder of 20 pictures with captions of 1 to 3 words -> the flags to train on it."""
    folder.mkdir()
    lines, rng = ["image,caption"], np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        words = rng.permutation(["ein", "roter", "hund"])
        lines.append(f"{i}.png,{' '.join(words[:1 + i % 3])}")
    (folder / "captions.txt").write_text("\n".join(lines))
    how = "--image-size 32 --subset 0 --batch-size 9 --device cpu --data captions --data-dir"
    return flags(how, folder)


def test_only_what_changes_no_result_may_change(tmp_path, monkeypatch):
    whole, cut, moved = tmp_path / "whole", tmp_path / "cut", tmp_path / "moved"
    own = [*own_images(tmp_path / "here"), "--steps 4 --accum 2 --grad-checkpoint"]
    train.main(flags(*own, "--out", whole))
    run_and_stop(monkeypatch, cut, 2, *own)
    shutil.move(tmp_path / "here", moved)
    monkeypatch.chdir(tmp_path)
    exits_saying("here: no such folder", "--resume --out", cut)
    exits_saying("made with --lr 0.0015", "--lr 1 --resume --out", cut)
    exits_saying("made with --steps 4", "--steps 8 --resume --out", cut)
    kept = resume(cut, "--steps 4 --data-dir moved")["settings"]
    assert kept["accum"] == 2 and kept["grad_checkpoint"] and kept["data_dir"] == str(moved)
    check_same(whole, cut)  # with --accum 1 the last digits would differ
    assert resume(cut, "--accum 1")["settings"]["accum"] == 1


@pytest.fixture
def go(tmp_path):
    """Runs two steps from a first run of two steps, whose checkpoint is go.source."""
    def go(out, *parts):
        return run(tmp_path / out, "--steps 2 --init", tmp_path / "first" / "checkpoint.pt", *parts)

    sizes = "--pooler parallel --n-query 3 --lambda-con 0.5 --lambda-cap 3"
    go.source = run(tmp_path / "first", "--steps 2", sizes)
    return go


def test_init_keeps_the_sources_sizes_and_loss_weights_unless_given(go):
    assert go("kept")["config"] == go.source["config"]
    given = go("given", "--lambda-con 1 --pooler cascade")["config"]
    assert given == {**go.source["config"], "lambda_con": 1.0, "pooler": "cascade"}
    finer = resize_positions(go.source["model"]["encoder.position"], 8)
    second = go("second", "--image-size 64 --train decoder")  # twice the resolution
    assert torch.equal(second["model"]["encoder.position"], finer)


def test_a_fresh_decoder_learns_new_words_and_an_old_one_says_what_it_lacks(go, tmp_path, capsys):
    own = own_images(tmp_path / "own")
    assert go("old", *own)["vocabulary"] == go.source["vocabulary"]
    assert "100% of the captions' words are unknown" in capsys.readouterr().err
    new = go("new", *own, "--fresh decoder")["vocabulary"][4:]
    assert sorted(new) == ["ein", "hund", "roter"]
    assert "unknown" not in capsys.readouterr().err


def moved(before, after):
    """Parts with a weight that is another one."""
    before, after = before["model"], after["model"]
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def test_frozen_parts_do_not_move_by_one_bit_and_fresh_parts_start_anew(go):
    for learned in (["encoder"], ["poolers"], ["decoder", "encoder"]):
        after = go("-".join(learned), "--train", *learned)
        assert moved(go.source, after) == {*learned, None}  # None: the temperature
    assert moved(go.source, go("all")) == {*PARTS, None}  # control
    assert moved(go.source, go("new", "--fresh poolers --lr 0")) == {"poolers"}
    assert moved(go.source, go("old", "--lr 0")) == set()  # control


def test_sizes_that_do_not_fit_the_checkpoint_are_refused(go, tmp_path):
    init = flags(TOY, "--init", tmp_path / "first" / "checkpoint.pt", "--out", tmp_path / "o")
    exits_saying("generative_pooler.query does not fit.*--fresh poolers", "--n-query 5", *init)
    exits_saying("encoder.blocks.*does not fit.*--fresh encoder", "--encoder-layers 2", *init)
    exits_saying("not a multiple", "--image-size 30", *init)
    assert not (tmp_path / "o").exists()


def test_positions_are_interpolated_in_two_dimensions():
    ramp = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    torch.testing.assert_close(resize_positions(ramp, 4), ramp)
    finer = resize_positions(ramp, 8).unflatten(0, (8, 8))[..., 0]
    assert (finer.diff(dim=1) > 0).all() and finer.diff(dim=0).abs().max() < 1e-5



def check_validation(batch, batches):
    """The mean of the model's losses over whole batches, each image with its first caption."""
    val = shapes("train", 32, 13, 0)
    model, tokenizer = train.new_model(SMALL, SimpleNamespace(fresh=[], seed=0), val)
    run = train.Run(None, dict(batch_size=batch), model, tokenizer, None, val, "cpu", [])
    expected = torch.zeros(2)
    for i in range(0, batch * batches, batch):
        tokens = tokenizer.encode([captions[0] for captions in val.captions[i:i + batch]], 32)
        losses = model.losses(to_model(torch.from_numpy(val.images[i:i + batch])), tokens)
        expected += torch.stack(losses[1:]).detach() / batches
    torch.testing.assert_close(torch.tensor(run.validate()), expected)


def test_validation_losses_are_the_models_losses_on_the_validation_images():
    check_validation(4, 3)
    check_validation(100, 1)
    with fails:  # control: one batch too few
        check_validation(4, 2)


def test_val_from_train_keeps_training_images_apart(tmp_path, monkeypatch):
    def few(split, size, subset, seed):
        return shapes(split, size, subset or 40, seed)

    monkeypatch.setattr(data_file, "shapes", few)
    settings = run(tmp_path, "--val-from-train 12 --steps 5 --save-every 2 --subset 20")["settings"]
    data, val = train.load_data(SimpleNamespace(**settings), 32, False, 0, 1)
    assert len(data) == 20 and len(val) == 12
    both = np.concatenate([data.images, val.images])
    assert len({image.tobytes() for image in both}) == 32
    evaluated = evaluation.Context(CoCa(SMALL), None, settings).val
    assert np.array_equal(evaluated.images, val.images)
    validated = [row["step"] for row in rows_of(tmp_path, without=()) if row["val_con"]]
    assert validated == ["2", "4", "5"]  # where it was saved


def test_torchrun_trains_as_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", CoCaConfig())
    how = "--steps 3 --encoder-layers 1 --pooler parallel --grad-checkpoint --accum 2"
    own = [*own_images(tmp_path / "own"), *flags(how)]
    train.main([*own, "--out", str(tmp_path / "one")])
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py --out"
    command = [sys.executable, *flags(torchrun, tmp_path / "two"), *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("processes=2") == 1, done.stderr
    check_near(tmp_path / "one", tmp_path / "two", 1e-4)
    train.main([*own, "--seed", "1", "--out", str(tmp_path / "other")])
    with fails:  # control
        check_near(tmp_path / "other", tmp_path / "two", 1e-4)


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    started = []
    for name, value in dict(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2").items():
        monkeypatch.setenv(name, value)  # as torchrun does
    monkeypatch.setattr(train, "pick_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train.dist, "init_process_group", started.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("no GPU is left for process 2 .* start 2 at most", train.join_processes, "cuda")
    for shared in ("cpu", "cuda:0"):
        assert train.join_processes(shared) == (2, 3, shared) and started.pop() == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert train.join_processes("cuda") == (2, 3, "cuda:2") and started == ["nccl"]


@pytest.mark.parametrize("accum", ["--accum 1", "--accum 2"])
def test_half_precision_trains_nearly_as_float32(accum, tmp_path, monkeypatch):
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    run(tmp_path / "float", "--steps 8", accum)
    monkeypatch.setattr(train, "half_precision", lambda device: bfloat16)
    run(tmp_path / "half", "--steps 8", accum)
    check_near(tmp_path / "float", tmp_path / "half", 0.03)
    for name in ("loss_con", "loss_cap"):  # control: it was not float32
        assert rows_of(tmp_path / "float")[0][name] != rows_of(tmp_path / "half")[0][name]


@pytest.mark.parametrize("compiled", [True, False])  # False: the control
def test_compile_makes_graphs_of_what_training_calls_and_changes_no_result(compiled, monkeypatch):
    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images, tokens = torch.rand(6, 3, 32, 32), torch.randint(4, 20, (6, 9))
    plain = CoCa(dataclasses.replace(SMALL, encoder_layers=0, n_query=0))
    model, autocast = copy.deepcopy(plain), train.half_precision("cpu")
    train.prepare(model, SimpleNamespace(train=PARTS, grad_checkpoint=False, compile=compiled))
    found = model.losses(images, tokens)[1:]
    before = graphs()
    found += train.large_batch_backward(model, images, tokens, 1, [6], 0, autocast)
    assert (before > 0) == (graphs() > before) == compiled
    torch.testing.assert_close(found, 2 * plain.losses(images, tokens)[1:])


# Bad input: one line, non-zero, no traceback


NEW = dict(format=evaluation.FORMAT, vocabulary=[], config={})
OLD = dict(vocabulary=["<pad>"], config={}, step=3)


@pytest.mark.parametrize("content, size, message", [
    (NEW, 0, "not a checkpoint"), (NEW, 1000, "not a checkpoint"), (NEW, None, "not a checkpoint"),
    ({**NEW, "config": {"depth": 3}}, None, "not a checkpoint"),
    ({**NEW, "model": Bomb()}, None, "not a checkpoint"), ([1, 2], None, "not a checkpoint"),
    (OLD, None, "its format is 1")])
def test_unfit_checkpoints_are_refused_and_left_alone(content, size, message, tmp_path):
    file = tmp_path / "checkpoint.pt"
    torch.save(content, file)
    file.write_bytes(file.read_bytes()[:size])
    before = file.read_bytes()
    exits_saying(message, file, program=evaluation)
    exits_saying(message, "--resume --out", tmp_path)
    exits_saying(message, "--init", file, "--out", tmp_path / "new")
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint.pt", "lock"}
    exits_saying("no such checkpoint", "--resume --out", tmp_path / "new")


@pytest.mark.parametrize("wrong", [
    "--steps 0", "--steps many", "--batch-size 1", "--lr nan", "--accum 0", "--sted 3",
    "--data mnist", "--subset -5", "--resume", "--image-size 30", "--lambda-con 0 --lambda-cap 0",
    "--fresh encoder", "--config tiny --init checkpoint.pt"])
def test_bad_values_are_refused_before_anything_loads(wrong, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda *args, **how: pytest.fail("loaded data"))
    assert end_of(wrong) == "2"
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 2 and error[0] == "usage: python train.py [options]"


@pytest.mark.parametrize("wrong, message", [
    ("--device abacus", "cannot be used here"), ("--device meta", "cannot be used here"),
    ("--accum 9", "cannot be cut into 9 parts"), ("--batch-size 33", "more than the 32"),
    ("--data cifar10", "needs --data-dir"), ("--data captions --data-dir .", "captions.txt"),
    ("--data coco --data-dir nowhere", "no such folder")])
def test_what_cannot_be_done_is_said_and_leaves_no_folder(wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exits_saying(message, TOY, wrong, "--out o")
    assert not Path("o").exists()


@pytest.mark.parametrize("command", [
    "train.py --data cifar10", "eval.py nowhere.pt", "data.py dedup --data cifar10"])
def test_errors_of_the_programs_are_one_line_without_traceback(command, monkeypatch):
    program, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert re.fullmatch("error: .+", end.value.code)


def test_train_then_eval_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", evaluation.evaluate)
    monkeypatch.setattr(train, "print_scores", evaluation.print_scores)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    checkpoint = run(tmp_path, "--subset 200 --steps 2")
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    out = capsys.readouterr().out
    for part in ("zero-shot top-1", "image to text R@1 ", "generated:", "true:"):
        assert part in out, part
    row = {name: float(value) for name, value in rows_of(tmp_path)[0].items()}
    excess = row["loss_con"] - 2 * math.log(8)  # similarities start with a spread of their own
    assert row["images"] == 8 and -0.3 < excess < 2.5  # (one direction or half of both: below)
    assert row["loss"] == pytest.approx(row["loss_con"] + 2 * row["loss_cap"], rel=1e-6)
    words = Tokenizer(checkpoint["vocabulary"])  # it travels along
    assert words.decode(words.encode(["a small red ring"], 32)[0]) == "a small red ring"
    evaluation.main(flags(tmp_path / "checkpoint.pt", "--device cpu"))
    assert "zero-shot top-1" in capsys.readouterr().out


def test_every_command_of_the_readme_and_the_docstrings_parses(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = "\n".join([readme, train.__doc__, evaluation.__doc__])
    monkeypatch.chdir(tmp_path)  # where the files of --json and --report are not there yet
    commands = re.findall(r"(?:python|torchrun \S+) (train|eval)\.py([^`\n]*)", text)
    assert len(commands) > 15
    for program, arguments in commands:
        parse = train.parse_args if program == "train" else evaluation.parse_args
        parse(re.split(r"\s{2,}|[;,#\[]", arguments + "  ")[0].split())


def start_of_patches(augment, source=None, fresh=()):
    """Patch weights (D, 3 * patch^2) of new_model; mean and spread of the embeddings they give."""
    data = dataclasses.replace(load("shapes", subset=32), augment=augment)
    settings = SimpleNamespace(fresh=fresh, seed=0)
    model, _ = train.new_model(SMALL, settings, data, source, vocabulary=Tokenizer("abcde"))
    with torch.no_grad():
        found = model.encoder.patches(to_model(torch.tensor(data.images)))
    return model.encoder.patches.weight.flatten(1), found.mean().item(), found.std().item()


def test_a_new_encoder_starts_from_the_data_whitened_if_they_are_photographs():
    torch.manual_seed(1)
    source = CoCa(dataclasses.replace(SMALL, vocab_size=5))
    started = pytest.approx((0, 1), abs=0.1)
    plain, *spread = start_of_patches(augment=False)
    assert spread == started
    whitened, *spread = start_of_patches(augment=True)
    assert spread == started and whitened.std() > 2 * plain.std()  # faint directions are louder
    assert start_of_patches(False, source, fresh=["encoder"])[1:] == started
    kept, *spread = start_of_patches(False, source)  # control: an encoder that is not new stays
    assert torch.equal(kept, source.encoder.patches.weight.flatten(1)) and spread != started


def test_the_recipe_of_section_4_1():
    assert CoCaConfig().lambda_cap == 2 and CoCaConfig().lambda_con == 1
    lr = [train.learning_rate(step, 8e-4, 1000) for step in range(1000)]
    assert max(lr) == pytest.approx(8e-4) and lr.index(max(lr)) in (19, 20)
    assert lr[0] == pytest.approx(8e-4 / 20) and 0 < lr[-1] < 2e-6
    assert all(a > b for a, b in zip(lr[20:], lr[21:]))
    matrices, vectors = train.make_optimizer(CoCa(SMALL)).param_groups
    assert matrices["betas"] == (0.9, 0.999)
    assert matrices["weight_decay"] == 0.01 and vectors["weight_decay"] == 0
    assert min(p.dim() for p in matrices["params"]) == 2
    assert max(p.dim() for p in vectors["params"]) == 1


def test_gradients_longer_than_1_are_cut_to_1(tmp_path, monkeypatch):
    def step(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    norms = []
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tmp_path, "--steps 3 --lambda-cap 100")
    assert norms == pytest.approx([1, 1, 1], rel=1e-3)
