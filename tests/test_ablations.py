"""What measures and draws: a run leaves its line and is not run again; words are well chosen."""
import csv
import functools
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from xml.dom import minidom

import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, fails, refused

import data as data_file
import train
from coca import BEGIN, END, PAD, causal_mask, contrastive_loss, text_mask
from experiments import ablations, bench, pictures
from experiments.ablations import VARIANTS, verdict

IMAGES = 16  # two steps
SMALL = dict(steps=2, batch_size=8, lr=1e-3, patch_size=8, width=32, heads=2, encoder_layers=1,
             encoder_mlp=32, n_uni=1, n_multi=1, decoder_mlp=32, n_query=4)
draw_scenes = functools.cache(data_file.shapes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scenes and questions, and a small model."""
    def few(split, size, seed, subset=0):
        return data_file.select(draw_scenes(split, size, 0, 16), range(16))

    monkeypatch.setattr(data_file, "shapes", few)
    monkeypatch.setitem(train.PRESETS, "shapes", SMALL)
    monkeypatch.setattr(ablations, "QUESTIONS", 40)
    monkeypatch.setattr(ablations.FROZEN_QUESTIONS, "steps", 2)


def run(out, *flags):
    ablations.main(["--images", str(IMAGES), "--seeds", "0", "--out", str(out), *flags])


def lines_of(out):
    with open(out, newline="") as f:
        return list(csv.DictReader(f))


# Runs


def test_a_run_leaves_its_line_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "ablations.csv"
    run(out, "--rows", "e")
    first, second = lines_of(out)
    assert (first["variant"], second["variant"]) == ("default", "mean text")
    for name in ("zero-shot top-1", "image to text R@1", "mean R@1", "questions"):
        assert 0 <= float(first[name]) <= 1
    assert float(first["val_con"]) > 0 < float(first["val_cap"])
    assert float(first["cost of a step"]) > 0
    assert first["val_con"] != second["val_con"]  # the change was there
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


def test_several_processes_do_each_run_once(tmp_path, monkeypatch):
    out = tmp_path / "ablations.csv"
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(ablations, "perform", lambda job, data_dir: {**job._asdict(), "seconds": 1})
    run(out, "--rows", "b", "c", "--jobs", "2")
    found = [line["variant"] for line in lines_of(out)]
    assert sorted(found) == ["captioning only", "contrastive only", "default", "weights 1:1",
                             "weights 1:2"]


def test_rows_share_the_default_run():
    args = type("Args", (), dict(seeds=[0, 1, 2], data="shapes", images=IMAGES))
    jobs = ablations.jobs_of("abcdef", args)
    assert len(jobs) == len(set(jobs)) == 3 * len(VARIANTS)
    assert {job.variant for job in jobs} == set(VARIANTS)


def test_the_runs_in_the_repository_are_found(monkeypatch, capsys):
    monkeypatch.undo()  # the real settings: another learning rate would be another run
    ablations.main(["--table"])
    assert "42 of 42 runs" in capsys.readouterr().out


def test_a_broken_csv_is_named(tmp_path):
    out = tmp_path / "ablations.csv"
    out.write_text("a,b\n1,2\n")
    refused("not the columns", run, out, "--table")
    out.write_text(",".join(ablations.COLUMNS) + "\ndefault,shapes\n")
    refused("line 2 is not whole", run, out, "--table")
    refused("cannot be written", run, tmp_path)  # said before hours of work


def test_cifar_has_two_rows(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--data", "cifar10", "--rows", "a", "--table"])
    assert "cifar10 has rows b f only" in capsys.readouterr().err


# Variants


@pytest.mark.parametrize("variant, written", [("classifier", "{}_{}"), ("encoder-decoder", "a {} {}")])
def test_labels_are_read_off_as_captions(variant, written, monkeypatch):
    def all_but_one(model, tokenizer, images):
        assert isinstance(model, ablations.LabelClassifier) == (variant == "classifier")
        real(model, tokenizer, images)
        val = draw_scenes("labelled-val", 32, 0, 16)
        names = [val.classes[label].split() for label in val.labels[:16]]
        return [written.format(*name) for name in names[:15]] + ["a grey cloud"]

    real = ablations.caption
    monkeypatch.setattr(ablations, "caption", all_but_one)
    line = ablations.perform(ablations.make_job(variant, "shapes", IMAGES, 0), None)
    assert float(line["accuracy"]) == 15 / 16
    assert set(line) <= set(ablations.COLUMNS)
    assert ("val_cap" in line) == (variant == "encoder-decoder")  # the classifier's is Eq. (1)


def test_a_classifier_learns_the_first_word():
    coca, images, tokens = CONTROL.example()
    model = ablations.LabelClassifier(coca)
    assert torch.equal(model.encoder(images), coca.encoder(images))
    p = model.classify(images).softmax(-1)
    right = p[torch.arange(len(p)), tokens[:, 1]]
    torch.testing.assert_close(model.losses(images, tokens).total, -right.log().mean())
    assert torch.equal(model.generate(images)[:, 0], p.argmax(-1))
    with fails:  # control: another label
        torch.testing.assert_close(model.losses(images, tokens.roll(1, 0)).total, -right.log().mean())


def test_a_class_is_one_word():
    _, val = ablations.labelled(train.parse_args([])[0], ablations.one_word)
    words = [data_file.words(text) for text, in val.captions]
    assert {len(found) for found in words} == {1}
    assert len({word for word, in words}) == len(set(val.labels))


def test_the_mean_text_embedding_reads_what_cls_may_see():
    one_cls = CONTROL.model().unimodal
    mean = ablations.with_mean_text(CONTROL.model()).unimodal
    tokens = CONTROL.tokens()
    assert (tokens[0] == PAD).any()
    cls = []
    hook = one_cls.norm.register_forward_hook(lambda norm, given, out: cls.append(out))
    states, _ = one_cls(tokens)
    hook.remove()

    def of_first(n):  # the mean of [CLS] and n tokens
        rows = torch.cat([cls[0][:1], one_cls.norm(states[0, :n])])
        return F.normalize(rows.mean(0), dim=-1)

    n = CONTROL.lengths[0]
    torch.testing.assert_close(mean(tokens)[1][0], of_first(n - 1))
    torch.testing.assert_close(mean(tokens)[0], states)
    for more in (n, tokens.shape[1]):  # controls: <end> counted too, and padding
        with fails:
            torch.testing.assert_close(mean(tokens)[1][0], of_first(more))


# Costs and verdicts


def test_a_cost_is_a_steps_share_of_l_con_alone(monkeypatch):
    now = [0.0]  # seconds

    def compose(flags, data_dir):
        def steps():
            now[0] += 100  # the first step warms up
            while True:
                now[0] += 1.0 if "--lambda-cap 0" in flags else 1.5
                yield
        return None, steps()

    monkeypatch.setattr(ablations, "compose", compose)
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    for variant, cost in (("default", 1.5), ("contrastive only", 1.0)):
        job = ablations.make_job(variant, "shapes", IMAGES, 0)
        assert ablations.relative_cost(job, None) == cost


@pytest.mark.parametrize("values, reference, paper, word", [
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], -1, "shows"),
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], +1, "does not show"),  # control: the other direction
    ([0.70, 0.71, 0.72], [0.80, 0.81, 0.82], 0, "does not show"),  # the paper has them equal
    ([0.60, 0.71, 0.90], [0.70, 0.81, 0.92], -1, "within the spread"),
    ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], -1, "within the spread"),  # all at 100 % proves nothing
    ([0.1], [0.9], -1, "within the spread"),  # nor does one seed
    # Two pooled standard deviations, here 1, are the border
    ([1.99, 2.99, 0.99], [-1.0, 0.0, 1.0], 1, "within the spread"),
    ([2.01, 3.01, 1.01], [-1.0, 0.0, 1.0], 1, "shows"),
])
def test_verdict(values, reference, paper, word):
    assert verdict(values, reference, paper) == word


# bench.py


def test_a_step_is_measured(monkeypatch, capsys):
    config = CONTROL.config()
    monkeypatch.setitem(bench.CONFIGS, "small", config)
    monkeypatch.setattr(bench, "peak_flops", functools.partial(bench.peak_flops, size=64))
    bench.main(["step", "--config", "small", "--device", "cpu", "--batch-size", "2"])
    kept = re.search(r"kept for backward (\S+) MiB, with --grad-checkpoint", capsys.readouterr().out)
    assert kept
    bench.main(["grow", "--config", "small", "--device", "cpu"])
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["batch", "image_size", "text_len",
                                                              "vocab_size"]
    assert "image_size   4: " in out and ", 16: " in out
    assert bench.bytes_kept(config, 2, "cpu", True) < bench.bytes_kept(config, 2, "cpu", False)
    model, step = bench.training(config, 2, "cpu")
    before = model.unimodal.cls.clone()
    assert step()[0] == 0
    assert step()[0] == 1
    assert not torch.equal(model.unimodal.cls, before)


def test_blocks_of_rows_add_up_to_the_contrastive_loss(monkeypatch, capsys):
    N = 12
    torch.manual_seed(0)
    x = F.normalize(torch.randn(N, 4), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(N, 4), dim=-1)
    loss = contrastive_loss(x, y, 0.07, torch.arange(N))
    loss.backward()
    shown = f"loss {loss:.4f}, gradient norm {x.grad.norm():.6f}"
    monkeypatch.setattr(train, "BLOCK", 5 * N)  # blocks of 5, 5 and 2 rows
    bench.contrastive_worker(0, 1, None, N, 4)
    assert shown in capsys.readouterr().out
    monkeypatch.setattr(bench, "contrastive_loss", lambda *given: 2 * contrastive_loss(*given))
    bench.contrastive_worker(0, 1, None, N, 4)
    with fails:  # control
        assert shown in capsys.readouterr().out


def test_the_entropy_is_watched_from_the_start_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ENTROPY", tmp_path / "entropy.csv")
    watched = functools.partial(bench.watched, every=2, flags="--steps 3")
    monkeypatch.setattr(bench, "watched", watched)
    bench.bench_entropy([0, 1])
    bench.bench_entropy([1])  # a seed that is measured again is there once
    lines = lines_of(bench.ENTROPY)
    assert [line["seed"] for line in lines] == 6 * ["0"] + 6 * ["1"]
    assert [line["images"] for line in lines] == 4 * ["0", "16", "24"]
    assert all(0 < float(line["entropy"]) < math.log(16) for line in lines)  # 16 patches
    assert lines[0]["entropy"] != lines[3]["entropy"]  # the other start was there


# pictures.py


def test_weights_are_zero_where_the_mask_says_so():
    tokens = CONTROL.tokens()
    weights = pictures.attention_weights(CONTROL.model(), tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert torch.equal(weights > 0, text_mask(tokens)[:, 0])
    with fails:  # control: <end> and padding seen
        assert torch.equal(weights > 0, causal_mask(10).expand(3, -1, -1))


def test_pictures_are_drawn(tmp_path):
    out = str(tmp_path / "run")
    train.main(["--out", out, "--device", "cpu"])
    pictures.main([out + "/checkpoint.pt", "--out", str(tmp_path)])
    count = {}
    for path in tmp_path.glob("*.svg"):
        page = minidom.parseString(path.read_bytes())
        assert page.getElementsByTagName("title")[0].firstChild.data
        for kind in ("image", "circle", "polyline", "rect"):
            count[path.stem, kind] = len(page.getElementsByTagName(kind))
    assert count["scenes", "image"] == 8
    assert count["attention", "image"] > 2
    tokens = torch.tensor([[BEGIN, 4, 4, 4, 4, 4, 4, 4, 4, END, PAD, PAD]])
    forbidden = (~text_mask(tokens)).sum()
    assert (tmp_path / "mask.svg").read_text().count("#e4e4e4") == forbidden
    assert count["mask", "rect"] == 1 + 13**2  # and the card below
    assert count["losses", "polyline"] == 2
    assert count["entropy", "polyline"] == 4
    lines = [line for line in lines_of(ablations.LINES)
             if line["data"] == "shapes" and line["images"] == "24000"]
    dots = [line[name] for line in lines for name in
            ("zero-shot top-1", "mean R@1", "captions exactly right", "questions") if line[name]]
    assert count["ablations", "circle"] == len(dots)
    checkpoint = torch.load(out + "/checkpoint.pt", weights_only=True)
    checkpoint["settings"]["data"] = "coco"
    torch.save(checkpoint, out + "/coco.pt")
    refused("photographs of other people", pictures.main, [out + "/coco.pt", "--out", out])
