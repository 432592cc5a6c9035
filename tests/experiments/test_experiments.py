"""python -m experiments: every task in one table, and your own clips where they are asked for."""
import argparse
import importlib
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import fails
from toys import record_lessons, save_checkpoint, toy_checkpoint, write_clips

import data
import eval as evaluation
from data import UserError
from experiments import understanding, video
from experiments.__main__ import TASKS, main
from experiments.video import own_clips


@pytest.fixture
def command(tmp_path, monkeypatch):
    """python -m experiments on a toy checkpoint, in its folder -> what ends it, or None."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("checkpoint.pt", *toy_checkpoint())

    def call(*flags):
        try:
            main(["checkpoint.pt", "--device", "cpu", *flags])
        except (SystemExit, UserError) as e:
            return str(e)
    return call


def test_every_task_runs_and_stands_in_the_table_with_its_chance(command, monkeypatch, capsys):
    transfer = evaluation.transfer

    def few(inputs, labels):
        return [t[:8] for t in inputs], labels[:8]

    def two_steps(model, read, classifier, train, test, recipe, what):
        recipe = replace(recipe, steps=2)
        return transfer(model, read, classifier, few(*train), few(*test), recipe, what)

    grey = np.full((3, 8, 8), 128, np.uint8)
    for module in (evaluation, video, understanding):
        monkeypatch.setattr(module, "transfer", two_steps)
    for module in (data, video, understanding):
        monkeypatch.setattr(module, "draw", lambda *args: grey)
    assert command("--json", "scores.json") is None
    captured = capsys.readouterr()
    assert "left out" not in captured.err
    said = re.findall(r"task (\d+) of (\d+): (.*)", captured.err)
    assert said == [(str(k), str(len(TASKS)), name) for k, name in enumerate(TASKS, 1)]
    scores = json.loads(Path("scores.json").read_text())
    for what in ("zero-shot top-1", "image to text R@1", "BLEU-4", "frozen, new pooler", "finetuned",
                 "video to text R@1", "video, frozen", "video order, frozen", "questions",
                 "entailment, text hidden"):
        assert what in scores
    for what, row in scores.items():
        assert 0 <= row["chance"] <= 1 and 0 <= row["score"] <= 10
        assert what in captured.out or what.endswith(("R@5", "BLEU-1", "BLEU-2", "BLEU-3"))
    seconds = [line for line in captured.out.split("\n") if line.count(".") == 3]
    assert len(seconds) == len(TASKS)


def test_clips_are_what_the_video_task_learns(command, monkeypatch, tmp_path, capsys):
    lessons = record_lessons(monkeypatch, video)
    folder = write_clips(tmp_path / "clips", run=12, walk=12)
    assert command("--task", "video", "--clips", str(folder)) is None
    out, err = capsys.readouterr()
    assert "video, from scratch" in out and len(lessons) == 3 and "task 1 of 1: video" in err
    finetuned = lessons[1].train[0][0]
    assert np.array_equal(finetuned, own_clips(folder, 8)[0].images)
    lessons.clear()
    assert command("--task", "video") is None  # control: without
    assert lessons[1].train[0][0].shape == (300, 8, 3, 8, 8)


def test_clips_that_nothing_learns_or_that_are_not_there_are_refused_before_the_work(
        command, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: pytest.fail("work"))
    assert command("--task", "frozen", "video-retrieval", "--clips", "clips") == "2"
    assert "--clips is for the task video" in capsys.readouterr().err.splitlines()[-1]
    for flags in ((), ("--task", "video")):
        assert "clips: 0 classes with clips" in command("--clips", "clips", *flags)
    assert command("--clip", "clips") == "2"  # flags are not abbreviated


def test_a_json_file_is_not_overwritten(command, capsys):
    Path("scores.json").write_text("mine")
    assert command("--json", "scores.json") == "2"
    assert "is there already" in capsys.readouterr().err.splitlines()[-1]
    assert Path("scores.json").read_text() == "mine"


# Commands

def modules(with_command):
    """Names of the modules of experiments/ that have a command, or have none."""
    found = []
    for path in sorted(Path(video.__file__).parent.glob("[a-z]*.py")):
        if ("run_program(main)" in path.read_text()) == with_command:
            found.append(path.stem)
    return found


HELPFUL = {"__main__", *modules(with_command=True)}  # two of its flags have no help yet


@pytest.fixture(params=sorted(HELPFUL))
def parser(request, monkeypatch):
    """The parser of a module's command."""
    class Found(Exception):
        pass

    def parse_args(self, argv):
        raise Found(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Found) as found:
        importlib.import_module(f"experiments.{request.param}").main([])
    return found.value.args[0]


def check_help(parser):
    assert all(action.help for action in parser._actions)
    text = " ".join(parser.format_help().split())
    for nothing in ("None", "False", "[]"):
        assert f"default: {nothing}" not in text


def test_every_flag_has_a_help_and_no_default_that_says_nothing(parser):
    check_help(parser)
    for wrong in (None, "text (default: None)"):
        parser.add_argument("--wrong", help=wrong)
        with fails:  # control
            check_help(parser)
        parser._remove_action(parser._actions[-1])
        parser._option_string_actions.pop("--wrong")


@pytest.mark.parametrize("module", modules(with_command=True))
def test_a_command_that_is_run_as_a_file_says_how_to_run_it(module):
    with pytest.raises(SystemExit, match=f"^run it as a module: python -m experiments.{module}$"):
        runpy.run_path(str(Path(video.__file__).with_name(f"{module}.py")), run_name="__main__")


@pytest.mark.parametrize("module", modules(with_command=False))
def test_a_module_without_a_command_points_to_one(module):
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(video.__file__).with_name(f"{module}.py")), run_name="__main__")
    assert "run: python -m experiments" in end.value.code and "\n" not in end.value.code
