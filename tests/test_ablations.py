"""The ablations' script: a run leaves its line and is not run again; words are well chosen."""
import csv
import functools

import ablations
import pytest
import torch
from ablations import VARIANTS, applied, labelled, one_word, verdict
from helpers import CONTROL, fails

import data as data_file
import eval as evaluation
import train
from coca import CONFIGS, PAD, CoCaConfig, UnimodalDecoder
from data import UserError, load

IMAGES = 16  # two steps
SMALL = CoCaConfig(width=32, heads=2, encoder_layers=1, n_uni=1, n_multi=1, n_query=4, text_len=16)


@functools.cache
def drawn(split):
    return load("shapes", split=split, subset=16 * (split == "train"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scenes and questions, and a small model."""
    def few(name, data_dir, split, size, *args, **how):
        return data_file.select(drawn(split), range(16))

    preset = dict(train.PRESETS["shapes"], batch_size=8)
    monkeypatch.setitem(train.PRESETS, "shapes", preset)
    monkeypatch.setattr(train, "load", few)
    monkeypatch.setattr(evaluation, "load", few)
    monkeypatch.setattr(ablations, "load", few)
    monkeypatch.setattr(ablations, "QUESTIONS", 40)
    monkeypatch.setattr(ablations.FROZEN_QUESTIONS, "steps", 2)
    few_steps = functools.partial(ablations.step_seconds, turns=1, steps=1)
    monkeypatch.setattr(ablations, "step_seconds", few_steps)
    monkeypatch.setitem(CONFIGS, "tiny", SMALL)


def run(out, *flags):
    ablations.main(["--images", str(IMAGES), "--seeds", "0", "--out", str(out), *flags])


def lines_of(out):
    with open(out, newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_leaves_its_line_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "ablations.csv"
    run(out, "--rows", "e")
    first, second = lines_of(out)
    assert (first["variant"], second["variant"]) == ("default", "mean text")
    for name in ("zero-shot top-1", "image to text R@1", "mean R@1", "questions"):
        assert 0 <= float(first[name]) <= 1
    assert float(first["val_con"]) > 0 < float(first["val_cap"])
    assert first["val_con"] != second["val_con"]  # the swap was there
    assert "--steps 2 --batch-size 8" in first["flags"]
    assert str(tmp_path) not in out.read_text()  # no folder of this machine
    table = capsys.readouterr().out

    def again(*arguments):
        raise AssertionError("run again")

    monkeypatch.setattr(ablations, "perform", again)
    run(out, "--rows", "e")
    assert capsys.readouterr().out == table
    run(out, "--rows", "e", "--table")
    assert capsys.readouterr().out == table
    assert len(lines_of(out)) == 2
    with fails:  # control: other parameters are another run
        run(out, "--rows", "e", "--seeds", "1")


def test_rows_share_the_default_run():
    args = type("Args", (), dict(seeds=[0, 1, 2], data="shapes", images=IMAGES))
    jobs = ablations.jobs_of("abcdef", args)
    assert len(jobs) == len(set(jobs)) == 3 * len(VARIANTS)
    assert {job.variant for job in jobs} == set(VARIANTS)


@pytest.mark.parametrize("variant", ["classifier", "encoder-decoder"])
def test_labels_are_learned_as_classes_and_as_text(variant, tmp_path):
    job = ablations.make_job(variant, "shapes", IMAGES, 0)
    line = ablations.perform(job, None, tmp_path / "run")
    assert 0 <= float(line["accuracy"]) <= 1
    assert set(line) <= set(ablations.COLUMNS)


def test_a_class_is_one_word():
    data = labelled("shapes", None, "val", 32, 0, one_word)
    words = {data_file.words(text)[0] for text, in data.captions}
    assert all(len(data_file.words(text)) == 1 for text, in data.captions)
    assert len(words) == len(set(data.labels))


def test_the_mean_text_embedding_reads_the_words_and_no_padding():
    model = CONTROL.model()
    tokens = CONTROL.tokens()
    one_cls = model.encode_text(tokens)
    with applied(VARIANTS["mean text"]):
        mean = model.encode_text(tokens)
        alone = model.encode_text(tokens[:1, :CONTROL.lengths[0]])
        torch.testing.assert_close(mean[:1], alone)
        states, cls = ablations.one_cls(model.unimodal, tokens)
        n = CONTROL.lengths[0]
        rows = torch.cat([cls[:1], model.unimodal.norm(states[0, :n])])
        torch.testing.assert_close(model.unimodal(tokens)[1][0], rows.mean(0))
        with fails:  # control: pads counted too
            assert (tokens[0] == PAD).any()
            every = torch.cat([cls[:1], model.unimodal.norm(states[0])])
            torch.testing.assert_close(model.unimodal(tokens)[1][0], every.mean(0))
    assert UnimodalDecoder.forward is ablations.one_cls
    assert torch.equal(model.encode_text(tokens), one_cls)  # and all is as before


def test_sizes_hold_inside_a_variant_only():
    with applied(VARIANTS["n_uni 3"]):
        assert (CONFIGS["tiny"].n_uni, CONFIGS["tiny"].n_multi) == (3, 1)
    assert CONFIGS["tiny"] is SMALL


@pytest.mark.parametrize("values, reference, paper, word", [
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], -1, "shows"),
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], +1, "does not show"),  # control: the other direction
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], 0, "does not show"),  # the paper has them equal
    ([0.60, 0.71, 0.90], [0.70, 0.81, 0.92], -1, "within the spread"),
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], -1, "within the spread"),  # all at 100 % proves nothing
    ([0.1], [0.9], -1, "within the spread"),  # nor does one seed
])
def test_verdict(values, reference, paper, word):
    assert verdict(values, reference, paper) == word


def test_verdict_turns_at_two_pooled_standard_deviations():
    reference = [-1.0, 0.0, 1.0]  # of standard deviation 1
    assert verdict([1.01 + x for x in (0, 1, -1)], reference, 1) == "within the spread"
    assert verdict([1.99 + x for x in (0, 1, -1)], reference, 1) == "within the spread"
    assert verdict([2.01 + x for x in (0, 1, -1)], reference, 1) == "shows"


def test_a_broken_csv_is_named(tmp_path):
    out = tmp_path / "ablations.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not the columns"):
        run(out, "--table")
    out.write_text(",".join(ablations.COLUMNS) + "\ndefault,shapes\n")
    with pytest.raises(UserError, match="line 2 is not whole"):
        run(out, "--table")
    with pytest.raises(UserError, match="cannot be written"):  # said before hours of work
        run(tmp_path)


def test_cifar_has_two_rows(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--data", "cifar10", "--rows", "a", "--table"])
    assert "cifar10 has rows b f only" in capsys.readouterr().err
