"""Where the pooler looks is watched from the start to the end, and kept whole."""
import csv
import functools
import math
import os

import pytest
from helpers import refused
from toys import few_scenes

from experiments import entropy


@pytest.fixture
def file(tmp_path, monkeypatch):
    """What entropy.csv is from now on. A run has three steps."""
    few_scenes(monkeypatch)
    monkeypatch.setattr(entropy, "ENTROPY", tmp_path / "entropy.csv")
    watched = functools.partial(entropy.watched, every=2, flags="--steps 3")
    monkeypatch.setattr(entropy, "watched", watched)
    return entropy.ENTROPY


def test_the_entropy_is_watched_from_the_start_to_the_end(file, capsys):
    entropy.main(["--seeds", "0", "1"])
    out, err = capsys.readouterr()
    assert "faint positions, seed 1: " in err and out == f"saved: {file}\n"
    entropy.main(["--seeds", "1"])  # a seed that is measured again is there once
    with open(file, newline="") as f:
        lines = list(csv.DictReader(f))
    assert lines == entropy.read_entropy()
    assert [line["seed"] for line in lines] == 6 * ["0"] + 6 * ["1"]
    assert [line["images"] for line in lines] == 4 * ["0", "16", "24"]
    assert all(0 < float(line["entropy"]) < math.log(16) for line in lines)  # 16 patches
    assert lines[0]["entropy"] != lines[3]["entropy"]  # the other start was there


def test_the_file_is_whole_or_as_it_was(file, monkeypatch):
    entropy.main(["--seeds", "0"])
    before = file.read_text()

    def full(*args):
        raise OSError(28, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused("disk full", entropy.main, ["--seeds", "1"])
    assert file.read_text() == before and len(list(file.parent.iterdir())) == 1
    file.write_text(before.replace("default,0,", "default,zero,", 1))
    refused("zero", entropy.main, ["--seeds", "1"])
