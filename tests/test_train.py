"""Training: a resumed run equals one that never stopped, nothing is lost, bad input is one line."""
import argparse
import csv
import functools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TOY, fails
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data as data_file
import eval as evaluation
import train
from coca import CONFIGS, CoCa, CoCaConfig, resize_positions
from data import Batches, Tokenizer, UserError, load, select
from train import PARTS, METRICS, learning_rate, part_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = CoCaConfig(width=32, heads=2, encoder_layers=1, n_uni=1, n_multi=1, n_query=4)


def make_small(patch):
    """From now on the tiny model is smaller, and there are 16 validation images: a step takes 10 ms."""
    def few(name, data_dir, split, **how):
        data = load(name, data_dir, split, **how)
        return select(data, range(min(16, len(data)))) if split == "val" else data

    patch.setitem(CONFIGS, "tiny", SMALL)
    patch.setattr(train, "load", few)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


def run(out, *more):
    train.main([*TOY, "--out", str(out), *more])
    return checkpoint_of(out)


def resume(out, *more):
    train.main(["--resume", "--out", str(out), "--device", "cpu", *more])
    return checkpoint_of(out)


def end_of(arguments, program=train):
    """What ends a program, as text. (The exception itself would keep main's variables, and so the lock.)"""
    try:
        program.main([str(argument) for argument in arguments])
    except (UserError, SystemExit) as e:
        return str(e)


def refused(arguments, message, program=train):
    """The program ends in one line that says so."""
    text = end_of(arguments, program)
    assert re.search(message, text) and "\n" not in text, text


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def rows_of(out):
    """metrics.csv but for the columns that depend on time."""
    with open(out / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        for name in ("seconds", "val_con", "val_cap"):
            del row[name]
    return rows


def check_whole(out, steps):
    """The checkpoint loads, it is of that step, and metrics.csv has just its rows."""
    evaluation.load_checkpoint(out / "checkpoint.pt")
    assert checkpoint_of(out)["step"] == steps
    assert [int(row["step"]) for row in rows_of(out)] == list(range(1, steps + 1))
    for row, kept in zip(rows_of(out), checkpoint_of(out)["metrics"].tolist()):
        kept = dict(zip(METRICS, kept))
        assert all(float(value) == pytest.approx(kept[name], rel=1e-8) for name, value in row.items())


def check_same(a, b):
    """Two runs with the same losses and weights, bit for bit."""
    assert rows_of(a) == rows_of(b)
    for name, value in checkpoint_of(a)["model"].items():
        assert torch.equal(value, checkpoint_of(b)["model"][name]), name


def check_near(a, b, rel):
    assert len(rows_of(a)) == len(rows_of(b)) > 2
    for one, other in zip(rows_of(a), rows_of(b)):
        for name in one:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=rel, abs=1e-6), name


def interrupt(monkeypatch, at, how):
    """Calls how() when the batch of step `at` is asked for."""
    real = Batches.__call__

    def call(self, step):
        if step == at:
            how()
        return real(self, step)

    monkeypatch.setattr(Batches, "__call__", call)


def run_and_stop(monkeypatch, out, at, *more):
    """A run that gets SIGTERM in the step after the first `at`."""
    with monkeypatch.context() as patch:
        interrupt(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert end_of([*more, "--out", out]) == str(128 + signal.SIGTERM)


# Processes: a server that has imported torch already makes them in no time


def train_quietly(arguments, environment, broken):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.environ.update(environment)
    make_small(pytest.MonkeyPatch())
    train.evaluate, train.print_scores = lambda *args: {}, lambda scores: None
    if broken:
        train.add_up = lambda tensors, world: None
    train.main([str(argument) for argument in arguments])


def start(*arguments, broken=False, **environment):
    context = get_context("forkserver")
    context.set_forkserver_preload(["test_train", "torch._dynamo"])
    process = context.Process(target=train_quietly, args=(arguments, environment, broken))
    process.start()
    return process


def two_processes(*arguments, broken=False):
    """What torchrun --nproc_per_node=2 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    both = [start(*arguments, broken=broken, RANK=str(rank), **group) for rank in range(2)]
    for process in both:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in both] == [0, 0]


# ------------------------------------------------------------------------------------------------
# Stopped and resumed


def test_resume_gives_the_run_without_a_stop(tmp_path, no_evaluation, monkeypatch, capsys):
    whole, again, cut = tmp_path / "whole", tmp_path / "again", tmp_path / "cut"
    run(whole, "--steps", "7", "--seed", "3")
    run(again, "--steps", "7", "--seed", "3")
    check_same(whole, again)  # two runs with one seed on one machine
    run_and_stop(monkeypatch, cut, 3, *TOY, "--steps", "7", "--seed", "3")
    assert f"stopped by SIGTERM after step 3, saved; go on with: python train.py --out {cut} --resume" \
        in capsys.readouterr().out
    check_whole(cut, 3)
    resume(cut)
    check_same(whole, cut)
    check_whole(cut, 7)


def test_control_another_seed_is_another_run(tmp_path, no_evaluation):
    run(tmp_path / "a", "--steps", "3")
    run(tmp_path / "b", "--steps", "3", "--seed", "1")
    with fails:
        check_same(tmp_path / "a", tmp_path / "b")


def test_control_a_resume_that_forgets_the_optimizer_is_caught(tmp_path, no_evaluation, monkeypatch):
    def forgetful(*args):
        model, tokenizer, checkpoint = evaluation.load_checkpoint(*args)
        checkpoint["optimizer"] = train.make_optimizer(model).state_dict()
        return model, tokenizer, checkpoint

    run(tmp_path / "whole", "--steps", "6")
    run_and_stop(monkeypatch, tmp_path / "cut", 4, *TOY, "--steps", "6")
    monkeypatch.setattr(train, "load_checkpoint", forgetful)
    resume(tmp_path / "cut")
    with fails:
        check_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_run_killed_at_random_moments_loses_nothing(tmp_path):
    """Up to 20 SIGKILLs: weights and metrics are those of a run that nobody killed, bit for bit."""
    whole, killed, chance, kills = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0
    arguments = [*TOY, "--steps", "150", "--save-every", "2", "--out"]
    start(*TOY, "--steps", "1", "--out", tmp_path / "first").join()  # the server starts
    began, process = time.time(), start(*arguments, whole)
    process.join()
    assert process.exitcode == 0
    seconds = time.time() - began
    for attempt in range(21):
        more = ["--resume"] if (killed / "checkpoint.pt").exists() else []
        process = start(*arguments, killed, *more)
        process.join(chance.uniform(0.1, 0.6) * seconds if attempt < 20 else None)
        if process.exitcode is not None:  # it reached the end
            break
        process.kill()
        process.join()
        kills += 1
        if (killed / "checkpoint.pt").exists():
            evaluation.load_checkpoint(killed / "checkpoint.pt")
    assert process.exitcode == 0 and kills > 2
    check_same(whole, killed)
    check_whole(killed, 150)


def test_a_signal_after_the_last_step_is_obeyed(tmp_path, monkeypatch):
    def save(*args):
        real(*args)
        if len(args[-1]) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    real = train.save
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(train, "evaluate", lambda *args: pytest.fail("evaluated"))
    assert end_of([*TOY, "--steps", "2", "--out", tmp_path]) == str(128 + signal.SIGTERM)
    check_whole(tmp_path, 2)


@pytest.mark.parametrize("damage", ["emptied", "cut", "deleted", "a blank line", "no text"])
def test_a_damaged_metrics_csv_is_made_whole_on_resume(damage, tmp_path, no_evaluation, monkeypatch):
    run(tmp_path / "whole", "--steps", "5")
    run_and_stop(monkeypatch, tmp_path / "cut", 3, *TOY, "--steps", "5")
    file = tmp_path / "cut" / "metrics.csv"
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"emptied": b"", "cut": content[:-40], "a blank line": content + b"\n\n",
                          "no text": b"\xff\x00"}[damage])
    resume(tmp_path / "cut")
    check_same(tmp_path / "whole", tmp_path / "cut")
    check_whole(tmp_path / "cut", 5)


@pytest.mark.parametrize("failing", [3, 4])  # of the writes: the second checkpoint.pt, the second metrics.csv
def test_a_full_disk_leaves_files_to_go_on_from(failing, tmp_path, no_evaluation, monkeypatch):
    fsync, out, calls = os.fsync, tmp_path / "cut", []

    def full(file):
        calls.append(file)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused([*TOY, "--steps", "4", "--save-every", "2", "--out", out], "cannot be written .*No space left")
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.csv", "lock"}
    assert rows_of(out) == []  # the old file, whole
    if failing == 3:
        check_whole(out, 0)
    run(tmp_path / "whole", "--steps", "4")
    resume(out)
    check_same(tmp_path / "whole", out)


# ------------------------------------------------------------------------------------------------
# The last good one


def check_good(out):
    """The checkpoint's weights are finite, and so are its losses."""
    model, tokenizer, _ = evaluation.load_checkpoint(out / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(map(math.isfinite, train.validate(
        model, tokenizer, load("shapes", split="val"), 8, train.half_precision("cpu"), "cpu")))


@pytest.mark.parametrize("how", ["--lr 1e20 --save-every 1 --steps 9", "--lr 1e38 --steps 1"])
def test_a_run_that_explodes_leaves_a_good_checkpoint(how, tmp_path, no_evaluation):
    refused([*TOY, *how.split(), "--out", tmp_path], "is (nan|inf); .*checkpoint.pt is the last good one, .*--lr")
    check_good(tmp_path)


def test_control_weights_that_exploded_are_not_good(tmp_path, no_evaluation, monkeypatch):
    monkeypatch.setattr(train, "check_finite", lambda *args, **values: None)
    run(tmp_path, "--lr", "1e38", "--steps", "1")
    with fails:
        check_good(tmp_path)


@pytest.mark.parametrize("name", ["loss_con", "loss_cap", "gradient_norm"])
def test_a_non_finite_loss_or_gradient_stops_the_run(name, tmp_path, no_evaluation, monkeypatch):
    real, steps = CoCa.losses, []

    def poisoned(model, *args):
        loss = real(model, *args)
        if torch.is_grad_enabled():
            steps.append(loss)
        if len(steps) == 5:
            field = {"loss_con": "con", "loss_cap": "cap", "gradient_norm": "total"}[name]
            loss = loss._replace(**{field: math.nan * getattr(loss, field)})
        return loss

    monkeypatch.setattr(CoCa, "losses", poisoned)
    refused([*TOY, "--steps", "9", "--save-every", "3", "--out", tmp_path], f"step 5: {name} is nan; .*last good")
    check_whole(tmp_path, 3)
    check_good(tmp_path)


def saves_of(monkeypatch, out, cost, *more):
    """Seconds of work before each save of a run whose steps take 10 s and whose saves take `cost`."""
    now, work, last = [1e9], [], [1e9]

    def save(*args):
        work.append(now[0] - last[0])
        now[0] = last[0] = now[0] + cost

    def work_a_step(self, step):
        now[0] += 10
        return batch(self, step)

    batch = Batches.__call__
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", save)
        patch.setattr(train, "time", argparse.Namespace(time=lambda: now[0]))
        patch.setattr(Batches, "__call__", work_a_step)
        train.main([*TOY, "--steps", "60", "--out", str(out), *more])
    return work[1:-1]  # the first and the last are made anyway


def check_saves(work, cost):
    assert len(work) > 1 and max(work) <= max(30, 20 * cost) + 10
    assert min(work) >= 20 * cost  # 5 %


@pytest.mark.parametrize("cost", [0, 1, 4])
def test_saves_go_by_time_and_take_at_most_5_percent_of_it(cost, tmp_path, no_evaluation, monkeypatch):
    check_saves(saves_of(monkeypatch, tmp_path, cost), cost)


@pytest.mark.filterwarnings("ignore")
def test_control_a_save_every_step_costs_more(tmp_path, no_evaluation, monkeypatch):
    with fails:
        check_saves(saves_of(monkeypatch, tmp_path, 4, "--save-every", "1"), 4)


# ------------------------------------------------------------------------------------------------
# One folder, one run


def check_claims(claim):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim(None, "shapes"), range(8)))
    assert len(set(folders)) == 8 and folders[0].parent == Path("runs")


def test_runs_that_start_together_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_claims(train.claim)
    assert {path.name for path in Path("runs").iterdir()} == {"shapes", *(f"shapes-{n}" for n in range(2, 9))}


def test_control_looking_first_and_making_then_is_caught(tmp_path, monkeypatch):
    def look_then_make(out, data):
        names = [f"runs/{data}", *(f"runs/{data}-{n}" for n in range(2, 99))]
        folder = next(Path(name) for name in names if not Path(name).exists())
        time.sleep(0.05)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.chdir(tmp_path)
    with fails:
        check_claims(look_then_make)


def test_a_run_that_is_still_going_is_left_alone_until_it_is_killed(tmp_path, no_evaluation):
    out = tmp_path / "run"
    process = start(*TOY, "--steps", "100000", "--out", out)
    while not (out / "metrics.csv").exists():
        time.sleep(0.01)
    refused(["--resume", "--out", out], "is in use by a run that is still going")
    (out / "checkpoint.pt").rename(out / "moved")
    refused([*TOY, "--out", out], "is in use by a run that is still going")
    process.kill()
    process.join()
    train.lock(out).close()


def test_a_run_is_not_overwritten(tmp_path, no_evaluation, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*TOY, "--steps", "2"])
    train.main([*TOY, "--steps", "2"])  # no --out: a new folder
    assert sorted(path.name for path in Path("runs").iterdir()) == ["shapes", "shapes-2"]
    before = Path("runs/shapes/checkpoint.pt").read_bytes()
    refused([*TOY, "--out", "runs/shapes"], "runs/shapes holds a run already; add --resume")
    assert before == Path("runs/shapes/checkpoint.pt").read_bytes()
    Path("file").write_text("")
    refused([*TOY, "--out", "file"], "file is a file; give another --out")
    refused([*TOY, "--out", "file/run"], "file/run: cannot be made .*; give another --out")


# ------------------------------------------------------------------------------------------------
# What may change on --resume, and what --init brings


def own_images(folder, words):
    """A folder of 20 pictures with captions made of some words."""
    folder.mkdir()
    lines, rng = ["image,caption"], np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{' '.join(rng.permutation(words))}")
    (folder / "captions.txt").write_text("\n".join(lines))
    return ["--data", "captions", "--data-dir", str(folder), "--image-size", "32", "--batch-size", "4", "--device", "cpu"]


def test_only_what_changes_no_result_may_change_on_resume(tmp_path, no_evaluation, monkeypatch, capsys):
    own = own_images(tmp_path / "here", ["ein", "roter", "hund"])
    how = [*own, "--steps", "4", "--accum", "2", "--grad-checkpoint"]
    train.main([*how, "--out", str(tmp_path / "whole")])
    run_and_stop(monkeypatch, tmp_path / "cut", 2, *how)
    shutil.move(tmp_path / "here", tmp_path / "there")
    refused(["--resume", "--out", tmp_path / "cut"], "here: no such folder.*--data-dir")
    message = "was made with --steps 4; leave --steps out .*, or start a new run from it with --init .*checkpoint.pt"
    refused(["--resume", "--out", tmp_path / "cut", "--steps", "8"], message)
    refused(["--resume", "--out", tmp_path / "cut", "--lr", "1"], "was made with --lr 0.0015; leave --lr out")
    capsys.readouterr()
    resume(tmp_path / "cut", "--data-dir", str(tmp_path / "there"), "--steps", "4")
    assert "accum=2 grad_checkpoint=True" in capsys.readouterr().out
    check_same(tmp_path / "whole", tmp_path / "cut")  # accum 1 would round differently
    settings = resume(tmp_path / "cut", "--accum", "1")["settings"]
    assert settings["accum"] == 1 and settings["data_dir"] == str(tmp_path / "there")


@pytest.fixture
def first(tmp_path, no_evaluation):
    """A run of two steps, to start others from: its checkpoint, and a function that runs from it."""
    def go(*more, out="second"):
        return run(tmp_path / out, "--steps", "2", "--init", str(tmp_path / "first" / "checkpoint.pt"), *more)

    source = run(tmp_path / "first", "--steps", "2", "--pooler", "parallel", "--n-query", "3",
                 "--lambda-con", "0.5", "--lambda-cap", "3")
    return source, go


def test_init_keeps_the_sources_sizes_and_loss_weights_unless_given(first, capsys):
    source, go = first
    assert go()["config"] == source["config"]
    assert "lambda_con=0.5 lambda_cap=3.0 pooler=parallel n_query=3" in capsys.readouterr().out
    assert go("--lambda-con", "1", "--pooler", "cascade", out="third")["config"] == \
        {**source["config"], "lambda_con": 1.0, "pooler": "cascade"}
    assert "lambda_con=1.0 lambda_cap=3.0 pooler=cascade n_query=3" in capsys.readouterr().out


def test_a_fresh_decoder_learns_the_words_of_its_data_and_an_old_one_says_what_it_lacks(first, tmp_path, capsys):
    source, go = first
    assert go()["vocabulary"] == source["vocabulary"]
    assert "unknown" not in capsys.readouterr().err
    own = [*own_images(tmp_path / "own", ["ein", "roter", "hund"]), "--subset", "0"]
    assert go(*own, out="old")["vocabulary"] == source["vocabulary"]
    assert "100% of the captions' words are unknown" in capsys.readouterr().err
    assert set(go(*own, "--fresh", "decoder", out="new")["vocabulary"]) >= {"ein", "roter", "hund"}
    assert "unknown" not in capsys.readouterr().err


@settings(max_examples=4)
@given(learned=st.sets(st.sampled_from(list(PARTS)), min_size=1, max_size=2))
def test_frozen_parts_do_not_move_by_one_bit(tmp_path_factory, learned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args: {})
        patch.setattr(train, "print_scores", lambda scores: None)
        before, go = first.__wrapped__(tmp_path_factory.mktemp("runs"), None)
        before, after = before["model"], go("--train", *sorted(learned))["model"]
        moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == learned | {None}  # None: the temperature
        after = go(out="all")["model"]  # control: without --train everything moves
        moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == {*PARTS, None}


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_encoder_costs_no_backward(recompute):
    for parts in (["poolers"], ["encoder"]):
        model = CoCa(SMALL)
        train.prepare(model, argparse.Namespace(train=parts, grad_checkpoint=recompute, compile=False))
        assert model.encoder(torch.zeros(1, 3, 32, 32)).requires_grad == (parts == ["encoder"])


def test_fresh_parts_start_anew_and_the_others_from_the_checkpoint(first):
    source, go = first
    before, after = source["model"], go("--fresh", "poolers", "--train", "decoder")["model"]
    same = {part_of(name) for name in before if torch.equal(before[name], after[name])}
    assert same >= {"encoder"}
    assert not torch.equal(before["contrastive_pooler.query"], after["contrastive_pooler.query"])
    assert not torch.equal(before["generative_pooler.query"], after["generative_pooler.query"])


def test_a_run_goes_on_at_twice_the_resolution(first):
    source, go = first
    second = go("--image-size", "64", "--train", "decoder")
    finer = resize_positions(source["model"]["encoder.position"], 8)
    assert torch.equal(second["model"]["encoder.position"], finer) and second["config"]["image_size"] == 64


@pytest.mark.parametrize("more, message", [
    ("--n-query 5", "generative_pooler.query does not fit.*--fresh poolers"),
    ("--encoder-layers 2", "encoder.blocks.*does not fit"), ("--image-size 30", "30 is not a multiple"),
    ("--lambda-con 0 --lambda-cap 0", "are both 0")])
def test_sizes_that_do_not_fit_the_checkpoint_are_refused(more, message, first, tmp_path):
    refused([*TOY, "--init", tmp_path / "first" / "checkpoint.pt", "--out", tmp_path / "o", *more.split()], message)
    assert not (tmp_path / "o").exists()


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_positions_are_interpolated_in_two_dimensions(side, grid, seed):
    def transpose(position, side):
        return position.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)

    torch.manual_seed(seed)
    position = torch.randn(side * side, 3)
    constant = position[:1]
    torch.testing.assert_close(resize_positions(position, side), position)
    torch.testing.assert_close(resize_positions(constant.expand(side * side, 3), grid), constant.expand(grid * grid, 3))
    torch.testing.assert_close(resize_positions(transpose(position, side), grid),
                               transpose(resize_positions(position, grid), grid))


def test_positions_between_two_patches_lie_between_theirs():
    ramp = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    finer = resize_positions(ramp, 8).unflatten(0, (8, 8))[..., 0]
    assert (finer.diff(dim=1) > 0).all() and finer.diff(dim=0).abs().max() < 1e-5


def test_a_model_without_image_encoder_trains(tmp_path, no_evaluation):
    weights = run(tmp_path, "--encoder-layers", "0", "--n-query", "0", "--steps", "2")["model"]
    assert not any("encoder.blocks" in name or "generative_pooler" in name for name in weights)


# ------------------------------------------------------------------------------------------------
# Validation


def check_validation(model, tokenizer, val, batch, batches):
    """validate = the mean of the model's own losses over whole batches of images with their first captions."""
    con, cap = train.validate(model, tokenizer, val, batch, train.half_precision("cpu"), "cpu")
    losses = []
    for i in range(batches):
        images = torch.from_numpy(val.images[batch * i:batch * (i + 1)]) / 127.5 - 1
        texts = [captions[0] for captions in val.captions[batch * i:batch * (i + 1)]]
        losses.append(model.losses(images, tokenizer.encode(texts, 32)))
    assert con == pytest.approx(sum(loss.con.item() for loss in losses) / batches, rel=1e-4)
    assert cap == pytest.approx(sum(loss.cap.item() for loss in losses) / batches, rel=1e-4)


def test_validation_losses_are_the_models_losses_on_the_validation_images():
    val = select(load("shapes", split="val"), range(13))
    model, tokenizer = train.new_model(SMALL, argparse.Namespace(fresh=[], seed=0), val)
    for batch, batches in ((4, 3), (13, 1)):
        check_validation(model, tokenizer, val, batch, batches)
    check_validation(model, tokenizer, select(val, range(5)), 5, 1)
    with fails:  # control: one batch too few
        check_validation(model, tokenizer, val, 4, 2)


def test_val_from_train_keeps_training_images_apart(monkeypatch):
    """And --subset takes from the same images: what is validated on is never trained on."""
    def few(split, size, subset, seed):
        return all_shapes(split, size, subset or 40, seed)

    all_shapes = data_file.shapes
    monkeypatch.setattr(data_file, "shapes", few)
    monkeypatch.setattr(train, "load", load)
    training = {image.tobytes() for image in load("shapes", subset=40).images}
    for subset in (0, 32):
        settings = dict(data="shapes", data_dir=None, seed=0, subset=subset, val_from_train=12, dedup=False)
        data, val = train.load_data(argparse.Namespace(**settings), 32, False, 0, 1)
        used, kept = ({image.tobytes() for image in part.images} for part in (data, val))
        evaluated = evaluation.Context(None, None, settings) if False else None
        assert len(kept) == 12 and len(used) == (subset or 40) - 12
        assert kept < training and used < training and not used & kept
    assert evaluated is None


# ------------------------------------------------------------------------------------------------
# Several processes, half precision, compilation


COMBINATIONS = ["--lambda-cap 0", "--lambda-cap 0 --accum 2", "--pooler parallel --grad-checkpoint"]
UNEVEN = ["--subset", "40", "--batch-size", "9", "--steps", "3", "--device", "cpu"]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_two_processes_train_as_one_does(flags, tmp_path, no_evaluation):
    train.main([*UNEVEN, *flags.split(), "--out", str(tmp_path / "one")])
    two_processes(*UNEVEN, *flags.split(), "--out", tmp_path / "two")
    check_near(tmp_path / "one", tmp_path / "two", 1e-4)


def test_control_processes_that_keep_their_gradients_to_themselves_are_caught(tmp_path, no_evaluation):
    train.main([*UNEVEN, "--out", str(tmp_path / "one")])
    two_processes(*UNEVEN, "--out", tmp_path / "two", broken=True)
    with fails:
        check_near(tmp_path / "one", tmp_path / "two", 1e-4)


def test_torchrun_trains_as_one_process_does(tmp_path, no_evaluation, monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", CoCaConfig())
    train.main([*UNEVEN, "--out", str(tmp_path / "one")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    done = subprocess.run([*torchrun, *UNEVEN, "--accum", "2", "--out", tmp_path / "two"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("processes=2") == 1, done.stderr
    check_near(tmp_path / "one", tmp_path / "two", 1e-3)


@pytest.mark.parametrize("accum", ["1", "2"])
def test_half_precision_trains_nearly_as_float32_does(accum, tmp_path, no_evaluation, monkeypatch):
    run(tmp_path / "float", "--steps", "8", "--accum", accum)
    monkeypatch.setattr(train, "half_precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    run(tmp_path / "half", "--steps", "8", "--accum", accum)
    check_near(tmp_path / "float", tmp_path / "half", 0.03)
    with fails:  # control: it was not float32
        check_near(tmp_path / "float", tmp_path / "half", 1e-6)


def test_compile_makes_graphs_of_what_training_calls_and_changes_no_result(tmp_path, no_evaluation, monkeypatch):
    def graphs(out, *more):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run(tmp_path / out, "--steps", "3", *more)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for accum in ("1", "2"):
        assert graphs(f"plain{accum}", "--accum", accum) == 0
        assert graphs(f"compiled{accum}", "--accum", accum, "--compile") > 0
        check_near(tmp_path / f"plain{accum}", tmp_path / f"compiled{accum}", 1e-4)


# ------------------------------------------------------------------------------------------------
# Bad input: one line, non-zero, no traceback


def checkpoint_with_code(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "exploded"),)
    torch.save({"model": Bomb()}, path)


def cut_off(path):
    torch.save(dict(format=evaluation.FORMAT, vocabulary=[], model=torch.zeros(999)), path)
    path.write_bytes(path.read_bytes()[:1000])


def other_sizes(path):
    torch.save(dict(format=evaluation.FORMAT, vocabulary=[], config={"depth": 3}), path)


@pytest.mark.parametrize("make", [
    lambda path: None, checkpoint_with_code, cut_off, other_sizes, lambda path: path.write_text("hello"),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"config": {"depth": 3}}, path)])
def test_unfit_checkpoints_are_refused_and_left_alone(make, tmp_path):
    path = tmp_path / "checkpoint.pt"
    make(path)
    before = path.read_bytes() if path.exists() else None
    refused([path], re.escape(str(path)), evaluation)
    refused(["--resume", "--out", tmp_path], re.escape(str(path)))
    refused([*TOY, "--init", path, "--out", tmp_path / "new"], re.escape(str(path)))
    assert not (tmp_path / "exploded").exists()
    assert before == (path.read_bytes() if path.exists() else None)


def test_a_checkpoint_of_an_older_version_is_refused_by_its_format(tmp_path):
    old = dict(config={}, vocabulary=["<pad>"], settings={}, model={}, optimizer={}, step=3, random=0)
    torch.save(old, tmp_path / "checkpoint.pt")
    message = f"a checkpoint of format 1, and this version reads format {evaluation.FORMAT}; train again"
    refused(["--resume", "--out", tmp_path], message)
    refused([tmp_path / "checkpoint.pt"], message, evaluation)


@pytest.mark.parametrize("wrong", [
    "--steps 0", "--steps many", "--batch-size 1", "--lr nan", "--lr -1", "--lambda-con 0 --lambda-cap 0", "--data mnist",
    "--config huge", "--pooler both", "--subset -5", "--resume", "--accum 0", "--sted 3", "--image-size 30",
    "--fresh encoder", "--config tiny --init somewhere/checkpoint.pt"])
def test_bad_values_are_refused_before_anything_loads(wrong, monkeypatch, capsys):
    monkeypatch.setattr(train, "load", lambda *args, **how: pytest.fail("loaded data"))
    with pytest.raises(SystemExit) as e:
        train.main(wrong.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(error) == 2 and error[0] == "usage: python train.py [options]"


@pytest.mark.parametrize("wrong, message", [
    ("--device abacus", "--device abacus: cannot be used here"), ("--device meta", "--device meta: cannot be used here"),
    ("--accum 9", "--batch-size 8 cannot be cut into 9 parts"), ("--batch-size 33", "more than the 32 training images"),
    ("--val-from-train 32", "--val-from-train 32, but there are 32 training images"),
    ("--data cifar10", "needs --data-dir"), ("--data coco --data-dir nowhere", "nowhere: no such folder"),
    ("--data captions --data-dir tests", "captions.txt")])
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_no_folder(wrong, message, tmp_path):
    refused([*TOY, *wrong.split(), "--out", tmp_path / "o"], message)
    assert not (tmp_path / "o").exists()


def test_one_cpu_may_have_a_number(tmp_path, no_evaluation):
    run(tmp_path / "cpu", "--steps", "2")
    run(tmp_path / "cpu0", "--steps", "2", "--device", "cpu:0")
    check_same(tmp_path / "cpu", tmp_path / "cpu0")


@pytest.mark.parametrize("command", ["train.py --data cifar10", "eval.py nowhere.pt", "train.py --batch-size 99 --subset 9"])
def test_errors_of_the_programs_are_one_line_without_traceback(command, monkeypatch, tmp_path):
    program, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert re.fullmatch("error: .+", e.value.code)  # Python prints it and exits with 1


def test_an_error_as_the_shell_sees_it(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", "cifar10"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch("error: --data cifar10 needs --data-dir.*\n", done.stderr)


# ------------------------------------------------------------------------------------------------
# The README's commands, small


def test_train_then_eval_end_to_end(tmp_path, capsys):
    out, handlers = tmp_path / "run", [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    checkpoint = run(out, "--steps", "2")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]  # Ctrl-C works again
    printed = capsys.readouterr().out
    for part in ("zero-shot top-1", "chance", "image to text R@1 ", "text to image R@10", "generated:", "true:", "saved:",
                 f"next:  python eval.py {out}/checkpoint.pt --image", "losses to expect at step 0", "2 ln 8 = 4.16"):
        assert part in printed, part
    closing = printed[printed.index("2 steps, 16 images seen"):]
    assert len(closing.splitlines()) <= 15
    row = rows_of(out)[0]
    assert list(row) == ["step", "images", "loss_con", "loss_cap", "loss", "lr", "temperature"] and row["images"] == "8"
    assert float(row["loss_con"]) == pytest.approx(2 * math.log(8), rel=0.35)
    assert float(row["loss"]) == pytest.approx(float(row["loss_con"]) + 2 * float(row["loss_cap"]), rel=1e-6)
    assert set(checkpoint) == {"format", "config", "vocabulary", "model", "settings", "step", "optimizer",
                               "metrics", "metrics_names"}

    evaluation.main([str(out / "checkpoint.pt"), "--json", str(tmp_path / "scores.json"), "--device", "cpu"])
    assert "zero-shot top-1" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["zero-shot top-1"]["chance"] == pytest.approx(1 / 48)

    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / "a.png")
    evaluation.main([str(out / "checkpoint.pt"), "--image", str(tmp_path / "a.png"), "--device", "cpu"])
    assert "a.png: " in capsys.readouterr().out
    refused([out / "checkpoint.pt", "--image", tmp_path / "b.jpg"], "b.jpg: no such file", evaluation)


def test_a_dual_encoder_is_not_said_to_write_captions(tmp_path, no_evaluation, capsys):
    run(tmp_path, "--steps", "2", "--lambda-cap", "0")
    printed = capsys.readouterr().out
    assert "saved:" in printed and "--image" not in printed


@pytest.mark.skipif(not (ROOT.parent / "shared/data/coco").exists(), reason="no real data beside the project")
@pytest.mark.parametrize("data, folder", [("cifar10", ""), ("coco", "coco"), ("captions", "flickr8k")])
def test_real_data_trains(data, folder, tmp_path, no_evaluation):
    run(tmp_path, "--data", data, "--data-dir", str(ROOT.parent / "shared/data" / folder), "--steps", "2")
    check_whole(tmp_path, 2)


def test_every_command_of_the_readme_and_the_docstrings_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the files that --json and --report name are not there yet
    text = "\n".join(((ROOT / "README.md").read_text(encoding="utf-8"), train.__doc__, evaluation.__doc__))
    commands = re.findall(r"(?:python|torchrun \S+) (train|eval)\.py([^`\n]*)", text)
    for program, arguments in commands:
        parse = train.parse_args if program == "train" else evaluation.parse_args
        parse(re.split(r"\s{2,}|[;,#\[]", arguments + "  ")[0].split())
    assert len(commands) > 15
    with pytest.raises(SystemExit):  # control
        train.parse_args(["--no-such-flag"])


def test_the_recipe_of_section_4_1():
    assert CoCaConfig().lambda_cap == 2 and CoCaConfig().lambda_con == 1
    lr = [learning_rate(step, 8e-4, 1000) for step in range(1000)]
    assert max(lr) == pytest.approx(8e-4) and lr.index(max(lr)) in (19, 20) and lr[0] == pytest.approx(8e-4 / 20)
    assert all(a > b for a, b in zip(lr[20:], lr[21:])) and 0 < lr[-1] < 2e-6
    groups = train.make_optimizer(CoCa(SMALL)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0] and groups[0]["betas"] == (0.9, 0.999)
    assert min(p.dim() for p in groups[0]["params"]) == 2 and max(p.dim() for p in groups[1]["params"]) == 1


def test_the_vocabulary_travels_with_the_checkpoint(tmp_path, no_evaluation):
    run(tmp_path, "--steps", "1")
    _, tokenizer, checkpoint = evaluation.load_checkpoint(tmp_path / "checkpoint.pt")
    text = "a small red circle at the top left"
    assert isinstance(tokenizer, Tokenizer) and tokenizer.decode(tokenizer.encode([text], 32)[0]) == text
    assert len(tokenizer) == checkpoint["config"]["vocab_size"]
