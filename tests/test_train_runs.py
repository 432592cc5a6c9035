"""Runs: a stop changes no result, what is saved is whole and finite, one folder holds one run."""
import functools
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import quick
import torch
from helpers import fails, refused
from quick import check_same, check_whole, end_of, run

import eval as evaluation
import train
from coca import CoCa
from data import Batches, Dataset, UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    quick.make_small(monkeypatch)


# Stopped and resumed


@pytest.fixture(scope="module")
def whole_and_cut(tmp_path_factory):
    """A folder of two runs: `whole` of 5 steps, and `cut`, the same run stopped after 3."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        quick.make_small(patch)
        run(folder / "whole", "--steps 5 --seed 3")
        quick.stop_at(patch, 4)
        end_of(folder / "cut", "--steps 5 --seed 3")
    return folder


@pytest.fixture
def cut(whole_and_cut, tmp_path):
    """A copy of the stopped run."""
    return Path(shutil.copytree(whole_and_cut / "cut", tmp_path / "cut"))


@pytest.fixture
def whole(whole_and_cut):
    return whole_and_cut / "whole"


@pytest.mark.parametrize("kept", [0, -40, None])
def test_resume_gives_the_run_without_a_stop(kept, whole, cut):
    check_whole(cut, 3)
    text = (cut / "metrics.csv").read_bytes()
    (cut / "metrics.csv").write_bytes(text[:kept])  # damaged: it is made again
    run(cut, "--resume")
    check_same(whole, cut)
    check_whole(cut, 5)


def test_control_a_resume_that_forgets_the_optimizer_is_caught(whole, cut, monkeypatch):
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *args: None)
    run(cut, "--resume")
    with fails:
        check_same(whole, cut)


def test_a_run_killed_at_random_moments_loses_nothing(tmp_path):
    """SIGKILL, four times, while each step is saved: all is as in a run that nobody killed."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    checkpoint = killed / "checkpoint.pt"
    chance = random.Random(0)
    for how in ("", "--resume", "--resume", "--resume"):
        before = checkpoint.stat().st_mtime_ns if how else 0
        process = quick.start(killed, f"--steps 60 {how}")
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(killed, "--resume")
    run(whole, "--steps 60")
    for path in killed.glob("*.tmp"):  # all that a kill can leave behind
        path.unlink()
    check_same(whole, killed)
    check_whole(killed, 60)


def test_ctrl_c_goes_back_to_the_last_save_and_the_first_lines_say_how_to_go_on(
        tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    typed = f"--subset 32 --batch-size 8 --steps 4 --out {shlex.quote(str(out))}"
    with monkeypatch.context() as patch:
        quick.stop_at(patch, 3)
        patch.setattr(sys, "orig_argv", ["python", "train.py", *shlex.split(typed)])
        end_of(shlex.quote(str(out)), "--steps 4")
    check_whole(out, 2)
    said = re.search("after a stop go on with: python train.py (.+)", capsys.readouterr().out)[1]
    assert said == f"{typed} --resume"
    train.main(shlex.split(said))
    check_whole(out, 4)


@pytest.mark.parametrize("typed, world, wanted", [
    ("python train.py", 1, "python train.py --out 'runs/a b' --resume"),
    ("python train.py --out=x", 1, "python train.py --out=x --resume"),
    ("python -m experiments.dedup train --data coco", 1,
     "python -m experiments.dedup train --data coco --out 'runs/a b' --resume"),
    ("/bin/python -u train.py --seed 1", 2,
     "torchrun --nproc_per_node=2 train.py --seed 1 --out 'runs/a b' --resume"),
    ("python train.py --resume --out x", 1, "python train.py --resume --out x")])
def test_the_command_to_go_on_is_the_one_that_was_typed(typed, world, wanted, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", typed.split())
    s = SimpleNamespace(out="runs/a b", resume="--resume" in typed)
    assert train.command_to_go_on(s, world) == wanted


def of_ones_own(s, split):
    """A data set of one's own, for train.main: 20 blue or 12 red pictures with classes."""
    blue = split == "train"
    images = np.zeros((20 if blue else 12, 3, 32, 32), np.uint8)
    images[:, 2 if blue else 0] = 250
    text = "blue" if blue else "red"
    return Dataset(images, [[text]] * len(images), np.zeros(len(images), int), ["blue", "red"],
                   ["{}"], source="my pictures")


def test_data_of_ones_own_are_learned_scored_at_the_end_and_needed_to_go_on(tmp_path, monkeypatch,
                                                                            capsys):
    def task(model, tokenizer, s):
        loaded.extend(evaluation.load_split(model, s, split) for split in ("val", "zeroshot"))
        return {}

    loaded = []
    evaluate = functools.partial(evaluation.evaluate, tasks={"zero-shot": task})
    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = f"--steps 2 --batch-size 8 --device cpu --out {tmp_path}".split()
    train.main(flags, of_ones_own)
    said = capsys.readouterr().out
    assert "my pictures: 20 images" in said and "score: python eval.py" not in said
    assert [data.images[0, 0, 0, 0] for data in loaded] == [250, 250]  # red: no generated scenes
    kept = quick.checkpoint_of(tmp_path)
    assert kept["vocabulary"][4:] == ["blue"] and kept["settings"]["data"] == "my pictures"
    refused("my pictures: not one of", evaluation.main, [str(tmp_path), "--device", "cpu"])
    train.main([*flags, "--resume"], of_ones_own)
    refused("my pictures: not one of", train.main, [*flags, "--resume"])
    train.main(["--data", "captions", *flags, "--resume"], of_ones_own)  # named for its settings
    with pytest.raises(UserError, match="the data are not those"):  # only evaluated on others
        train.main([*flags, "--resume"], lambda s, split: of_ones_own(s, "train"))


def test_a_run_goes_on_with_the_same_data_only_wherever_they_are(tmp_path, monkeypatch):
    here = tmp_path / "here"
    cut = tmp_path / "cut"
    command = f"{quick.own_images(here)} --steps 4 --accum 2"
    run(tmp_path / "whole", command)
    with monkeypatch.context() as patch:
        quick.stop_at(patch, 3)
        end_of(cut, command)
    before = (cut / "checkpoint.pt").read_bytes()
    text = (here / "captions.txt").read_text()
    shutil.copy(here / "15.png", here / "15b.png")  # (both names are chosen for training)
    for row in ("15.png,kater\n", "15.png,Hund\n", "15b.png,hund\n", ""):
        (here / "captions.txt").write_text(text.replace("15.png,hund\n", row))
        message = end_of(cut, f"{command} --resume")
        assert re.fullmatch("the data are not those .*--init", message)
        assert before == (cut / "checkpoint.pt").read_bytes()
    (here / "captions.txt").write_text(text)
    shutil.move(here, tmp_path / "moved")
    assert "here: no such folder" in end_of(cut, f"{command} --resume")
    monkeypatch.chdir(tmp_path)
    train.main(f"--resume --data-dir moved --out {cut}".split())
    assert quick.checkpoint_of(cut)["settings"]["data_dir"] == str(tmp_path / "moved")
    check_same(tmp_path / "whole", cut)  # with --accum 1 the last digits would differ


# What is saved, and when


def check_saves(patch, out, cost, every):
    """Steps take 10 s, and a save `cost` seconds: at most 5 % of the time goes into saving."""
    def steps(*args):
        for step in range(60):
            clock[0] += 10
            yield step, 1.0, 1.0

    def validate(*args):
        work.append(clock[0] - saved[-1])
        clock[0] += cost
        saved.append(clock[0])
        return [1.0, 1.0]

    work = []
    clock = quick.slow_steps(patch)
    saved = [clock[0]]
    patch.setattr(train, "train", steps)
    patch.setattr(train, "validate", validate)
    patch.setattr(train, "SAVE_EVERY", every)
    run(out, "--steps 60")
    check_whole(out, 60)
    least = max(every, 20 * cost)
    for seconds in work[1:-1]:
        assert least < seconds <= least + 10


@pytest.mark.parametrize("cost, every", [(0, 30), (1, 30), (4, 30), (1, 125)])
def test_saves_take_at_most_5_percent_of_the_time(cost, every, monkeypatch, tmp_path):
    check_saves(monkeypatch, tmp_path, cost, every)


def test_control_saves_that_are_thought_to_take_no_time_are_caught(monkeypatch, tmp_path):
    save = train.save
    monkeypatch.setattr(train, "save", lambda *args: 0 * save(*args))
    with fails:
        check_saves(monkeypatch, tmp_path, 4, 30)


@pytest.mark.parametrize("failing, name", [(3, "checkpoint.pt"), (4, "metrics.csv")])  # of the writes
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_leaves_whole_files_to_go_on_from(error, function, failing, name,
                                                               whole, cut, monkeypatch):
    def full(*args):
        calls.append(args)
        if len(calls) == failing:
            assert (cut / f"{name}.{os.getpid()}.tmp").exists()  # two runs have two numbers
            raise error
        return real(*args)

    calls = []
    real = getattr(os, function)
    with monkeypatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt)) as end:
        patch.setattr(os, function, full)
        run(cut, "--resume")
    assert re.fullmatch(f"|.*/{name}: cannot be written .full.; it is as before",
                        str(end.value))
    assert len(quick.rows_of(cut)) == 3 and len([*cut.iterdir()]) == 2
    assert quick.checkpoint_of(cut)["step"] == (3 if failing == 3 else 5)
    run(cut, "--resume")
    check_same(whole, cut)


@pytest.mark.parametrize("field, message, grad", [
    ("con", "loss_con is nan", True), ("cap", "loss_cap nan", True), ("total", "norm nan", True),
    ("cap", "validation losses .*nan", False)])
def test_losses_that_are_not_finite_end_the_run_and_are_not_saved(field, message, grad, tmp_path,
                                                                  monkeypatch):
    def losses(model, images, tokens):
        loss = real(model, images, tokens)
        if torch.is_grad_enabled() == grad:
            calls.append(loss)
        if len(calls) == 5:
            loss = loss._replace(**{field: math.nan * getattr(loss, field)})
        return loss

    calls = []
    real = CoCa.losses
    monkeypatch.setattr(CoCa, "losses", losses)
    quick.slow_steps(monkeypatch)
    said = f"step {5 if grad else 3}: .*{message}.* smaller --lr"
    assert re.fullmatch(said, end_of(tmp_path, "--steps 9"))
    check_whole(tmp_path, 3 if grad else 2)


@pytest.mark.parametrize("checked", [True, False])  # False: the control
def test_weights_that_explode_in_the_last_step_are_not_saved(checked, tmp_path, monkeypatch):
    if checked:
        said = end_of(tmp_path, "--lr 1e38 --steps 1")
        assert re.fullmatch("step 1: validation losses .*(nan|inf).* smaller --lr", said)
    else:
        monkeypatch.setattr(math, "isfinite", lambda value: True)
        run(tmp_path, "--lr 1e38 --steps 1")
    check_whole(tmp_path, 0 if checked else 1)


# One folder, one run


def test_of_runs_that_start_at_once_each_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(train.new_folder, [None] * 8, ["shapes"] * 8)]
    assert set(folders) == {"runs/shapes", *[f"runs/shapes-{i}" for i in range(2, 9)]}


def test_a_run_that_fails_before_its_first_save_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for error in (UserError("no data"), KeyboardInterrupt()):
        with monkeypatch.context() as patch, pytest.raises((UserError, KeyboardInterrupt)):
            patch.setattr(evaluation, "load", mock.Mock(side_effect=error))
            run(tmp_path / "out")
        assert not [*tmp_path.iterdir()]
    (tmp_path / "out").mkdir()
    run(tmp_path / "out", "--steps 1")  # an empty folder is free
    check_whole(tmp_path / "out", 1)


def test_runs_that_lead_nowhere_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")
    refused("runs/shapes: cannot be made", train.new_folder, None, "shapes")
    refused("runs: no place for a new run", train.check_free, "runs")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("a file")
    refused("runs/shapes: cannot be made", train.new_folder, None, "shapes")


def check_both_kept(tmp_path, monkeypatch, out):
    """While a run trains, another one goes on in its folder: the first saves nothing over it."""
    def other(number):
        if number == 3:  # step 2 is saved
            with monkeypatch.context() as patch:
                patch.setattr(train, "train", steps)
                train.main(["--resume", "--out", str(out)])
            others.append((out / "checkpoint.pt").read_bytes())

    others = []
    steps = train.train
    quick.slow_steps(monkeypatch)
    said = ""
    with monkeypatch.context() as patch:
        quick.before_each(patch, torch.optim.AdamW, "step", other)
        try:
            run(out, "--steps 4")
        except UserError as e:
            said = str(e)
    assert re.fullmatch(".*/checkpoint.pt is another run's now and stays as it is; what this run did "
                        "after its last save is lost. .*", said)
    assert (out / "checkpoint.pt").read_bytes() == others[0]
    check_whole(out, 4)


def test_two_runs_in_one_folder_do_not_write_over_each_other(tmp_path, monkeypatch):
    check_both_kept(tmp_path, monkeypatch, tmp_path / "out")
    monkeypatch.setattr(train, "stamp", lambda path: None)
    with fails:  # control
        check_both_kept(tmp_path, monkeypatch, tmp_path / "again")


def test_a_run_whose_checkpoint_was_taken_away_saves_again(tmp_path, monkeypatch):
    def take_away(number):
        if number == 3:
            (tmp_path / "checkpoint.pt").unlink()

    quick.slow_steps(monkeypatch)
    quick.before_each(monkeypatch, torch.optim.AdamW, "step", take_away)
    run(tmp_path, "--steps 4")
    check_whole(tmp_path, 4)


def test_a_new_run_saves_nothing_over_another_that_was_faster(tmp_path, monkeypatch):
    def faster(number):
        if number == 1:
            (tmp_path / "checkpoint.pt").write_bytes(b"of another run")

    quick.before_each(monkeypatch, Batches, "__call__", faster)
    assert "another run's now" in end_of(tmp_path, "--steps 2")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"of another run"


def test_the_parts_to_train_have_no_order_on_resume(tmp_path, monkeypatch):
    run(tmp_path, "--steps 1 --train poolers encoder")
    run(tmp_path, "--resume --train encoder poolers")
    assert "started with --train" in end_of(tmp_path, "--resume --train encoder")  # control
