"""What compares and draws: a run leaves its line and is not run again; words are well chosen."""
import csv
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from xml.dom import minidom

import numpy as np
import pytest
import torch
from helpers import CONTROL, fails, refused
from toys import few_scenes, save_checkpoint, toy_checkpoint

import coca
import train
from coca import BEGIN, END, PAD, CoCa, CoCaConfig, causal_mask, text_mask
from data import Dataset, UserError, note
from experiments import ablations, pictures, variants
from experiments.ablations import Difference, as_text, paired_difference, verdict
from experiments.variants import TABLES, VARIANTS

IMAGES = 16  # two steps


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scenes and questions, and a small model."""
    few_scenes(monkeypatch)
    monkeypatch.setattr(variants, "ASKED", 40)
    monkeypatch.setattr(variants.FROZEN_QUESTIONS, "steps", 2)
    monkeypatch.setattr(variants, "need_scene_words", lambda tokenizer: None)
    monkeypatch.setitem(VARIANTS, "default", VARIANTS["default"]._replace(tasks=variants.BASICS))
    monkeypatch.setattr(ablations, "commit", lambda: "now")
    ablations.fingerprint_of.cache_clear()
    yield
    ablations.fingerprint_of.cache_clear()


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


def at_once(job, data_dir):
    return {**job._asdict(), "seconds": 1}


def test_what_a_run_says_reaches_the_screen_but_for_its_scores(tmp_path, monkeypatch, capsys):
    def halves_and_a_note(s):
        note("half of them")
        return variants.halves(s)

    variant = VARIANTS["default"]._replace(data=halves_and_a_note)
    monkeypatch.setitem(VARIANTS, "default", variant)
    monkeypatch.setitem(TABLES, "e", ("x", ["default"]))
    run(tmp_path / "ablations.csv", "--rows", "e")
    out, err = capsys.readouterr()
    assert "note: half of them" in err and "note: default, seed 0: " in err
    assert "chance" not in out and "generated:" not in out
    monkeypatch.setattr(train, "learning_rate", lambda *args: float("nan"))
    refused("try a smaller --lr", run, tmp_path / "other.csv", "--rows", "e")
    job = ablations.make_job("default", "shapes", IMAGES, 0)
    with pytest.raises(SystemExit):
        ablations.perform(job._replace(flags="--nonsense"), None)
    assert "error: unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_lines_count_of_the_present_commit_or_proved_equal(tmp_path, monkeypatch, capsys):
    out = tmp_path / "ablations.csv"
    performed = []
    monkeypatch.setattr(ablations, "EQUAL", {"equal"})

    def perform(*args):
        performed.append(args)
        return at_once(*args)

    def runs_at(commit):
        performed.clear()
        monkeypatch.setattr(ablations, "perform", perform)
        monkeypatch.setattr(ablations, "commit", lambda: commit)
        run(out, "--rows", "e")
        return len(performed)

    assert runs_at("old") == 2 and runs_at("old") == 0
    capsys.readouterr()
    assert runs_at("equal") == 2 and runs_at("new") == 0  # proved equal
    table, err = capsys.readouterr()
    assert "note: 2 lines of commit old left out" in err
    assert "2 of 2 runs" in table and "commit equal\n" in table
    monkeypatch.setattr(ablations, "EQUAL", set())
    assert runs_at("new+") == 2  # control
    assert [line["commit"] for line in lines_of(out)] == ["old"] * 2 + ["equal"] * 2 + ["new+"] * 2


def test_other_data_are_other_runs(tmp_path, monkeypatch, capsys):
    """The fingerprint is of names and captions, not of the folder."""
    out = tmp_path / "ablations.csv"
    images = np.zeros((2, 3, 1, 1), np.uint8)
    folders = {"here": "a b", "copy": "a b", "longer": "a bc", "validation": "a c", "names": "a b"}

    def load_data(s, split):
        words = folders[s["data_dir"]].split()
        words = words[:1] if split == "train" else words[1:]
        return Dataset(images, [words, ["x"]], names=[s["data_dir"]] * (s["data_dir"] == "names"))

    monkeypatch.setattr(ablations, "load_data", load_data)
    monkeypatch.setattr(ablations, "perform", at_once)
    for folder, runs in (("here", 3), ("copy", 3), ("longer", 6), ("validation", 9), ("names", 12)):
        run(out, "--rows", "b", "--data", "cifar10", "--data-dir", folder)
        assert len(lines_of(out)) == runs
        assert "3 of 3 runs" in capsys.readouterr().out
    folders["new"] = "d d"
    run(out, "--rows", "b", "--data", "cifar10", "--data-dir", "new", "--table")
    assert "0 of 3 runs" in capsys.readouterr().out
    monkeypatch.undo()
    refused("cifar10 needs --data-dir", run, out, "--rows", "b", "--data", "cifar10", "--table")


def test_several_processes_do_each_run_once(tmp_path, monkeypatch):
    out = tmp_path / "ablations.csv"
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(ablations, "perform", at_once)
    monkeypatch.setenv("TQDM_DISABLE", "")
    run(out, "--rows", "b", "c", "--jobs", "2")
    assert os.environ["TQDM_DISABLE"] == "1"  # for the processes: their bars would mix
    found = [line["variant"] for line in lines_of(out)]
    assert sorted(found) == sorted({*TABLES["b"][1], *TABLES["c"][1]})

    def broken(job, data_dir):
        raise UserError("one line")

    monkeypatch.setattr(ablations, "perform", broken)
    refused("one line", run, out, "--rows", "d", "--jobs", "2")


def test_tables_share_the_default_run():
    args = type("Args", (), dict(seeds=[0, 1, 2], data="shapes", data_dir=None, images=None))
    jobs = ablations.jobs_of(list(TABLES), args)
    assert len(jobs) == len(set(jobs)) == 3 * len(VARIANTS)
    assert {job.variant for job in jobs} == set(VARIANTS)
    for job in jobs:  # what is compared sees equally many images, unless it says otherwise
        steps = int(job.flags.split()[job.flags.split().index("--steps") + 1])
        assert steps == max(1, int(job.images) // (VARIANTS[job.variant].batch or 8))
        whole = {variants.IMAGES[row] for row, (_, line) in TABLES.items() if job.variant in line}
        assert int(job.images) in {VARIANTS[job.variant].share * images for images in whole}


def test_a_table_is_of_its_own_runs(tmp_path, monkeypatch, capsys):
    """A variant may stand in two tables, with two budgets."""
    out = tmp_path / "ablations.csv"
    monkeypatch.setitem(ablations.IMAGES, "e", 4_800)
    args = type("Args", (), dict(seeds=[0], data="shapes", data_dir=None, images=None))
    for job in ablations.jobs_of(["b", "e"], args):
        scores = {"mean R@1": int(job.images) / 100_000, "cost of a step": 2, "commit": "now"}
        ablations.append_line(out, {**job._asdict(), **scores})
    ablations.main(["--table", "--out", str(out), "--seeds", "0", "--rows", "b", "e"])
    of_b, of_e = capsys.readouterr().out.split("(e)")
    what = re.escape(VARIANTS["default"].what)
    assert re.search(rf"{what} +\| 24.0 +\|", of_b) and re.search(rf"{what} +\| 4.8 +\|", of_e)
    assert "cost of a step" in of_b and "cost of a step" not in of_e  # only in b


def test_some_tables_have_three_seeds():
    args = type("Args", (), dict(seeds=None, data="shapes", data_dir=None, images=None))
    for row in TABLES:
        seeds_there = {job.seed for job in ablations.jobs_of([row], args)}
        assert len(seeds_there) == (3 if row in ("pairs", "sizes") else 6)
    args.seeds = [4]
    assert {job.seed for job in ablations.jobs_of(["pairs"], args)} == {"4"}


def test_scores_are_those_of_the_tasks_and_both_ways_of_retrieval_count(monkeypatch):
    found = {"image to text R@1": 0.4, "text to image R@1": 0.8, "questions": 0.5, "BLEU-4": 0.1}
    found = {name: {"score": value, "chance": 0.0} for name, value in found.items()}
    asked = []
    monkeypatch.setattr(ablations, "evaluate", lambda *args, **how: asked.append(args) or found)
    monkeypatch.setattr(train, "validate", lambda *args: (1.0, 2.0))
    s = train.parse_args([])[0]
    scores = ablations.measure("default", s, "model", "tokenizer", None)
    assert scores == {"val_con": 1.0, "val_cap": 2.0, "image to text R@1": 0.4, "questions": 0.5,
                      "mean R@1": pytest.approx(0.6)}
    assert asked == [("model", "tokenizer", vars(s), VARIANTS["default"].tasks)]


def test_the_runs_in_the_repository_are_found(monkeypatch, capsys):
    monkeypatch.undo()  # the real settings: another learning rate would be another run
    monkeypatch.setattr(ablations, "commit", lambda: "")  # as without git
    ablations.main(["--table"])
    out = capsys.readouterr().out
    for row, (_, line) in TABLES.items():
        runs = len(line) * variants.SEEDS.get(row, 6)
        assert f"({row}) shapes" in out and f"{runs} of {runs} runs" in out


def test_a_broken_csv_is_named(tmp_path):
    out = tmp_path / "ablations.csv"
    out.write_text("a,b\n1,2\n")
    refused("not the columns", run, out, "--table")
    out.unlink()
    ablations.append_line(out, {})
    header, _ = out.read_text().split("\n", 1)
    out.write_text(header + "\ndefault,shapes\n")
    refused("line 2 is not whole", run, out, "--table")
    out.write_text(header + "\n" + "x," * (len(ablations.COLUMNS) - 1) + "now\n")
    refused("could not convert string to float", run, out, "--table")
    out.write_bytes(b"\xff\xfe\0")
    refused("cannot be read as text", run, out, "--table")
    refused("cannot be written", run, tmp_path)  # said before hours of work


def test_cifar_has_two_rows(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--data", "cifar10", "--rows", "a", "--table"])
    assert "cifar10 has rows b f only" in capsys.readouterr().err


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


def seeds(*values):
    return {str(seed): value for seed, value in enumerate(values)}


def test_a_difference_is_paired_by_seed():
    ours, theirs = seeds(0.9, 0.5, 0.7, 0.3), seeds(0.8, 0.3, 0.7)
    found = paired_difference(ours, theirs)
    assert found == pytest.approx((0.1, 0.1 / 3**0.5, 2, 3))  # of 0.1, 0.2, 0; the tie is against
    shuffled = {seed: ours[seed] for seed in "2031"}
    assert paired_difference(shuffled, theirs) == pytest.approx(found)
    assert as_text("questions", ours, theirs) == "60.0 (+10.0\u00a0±\u00a05.8, 2/3)"
    assert as_text("val_cap", ours, ours) == "0.60\u00a0±\u00a00.26"  # of the seeds; no share
    assert as_text("questions", {}, theirs) == "–"
    with fails:  # control: other pairs
        assert paired_difference(seeds(0.5, 0.9, 0.7), theirs) == pytest.approx(found)


@pytest.mark.parametrize("differences, paper, word", [
    ([-0.1, -0.11, -0.12, -0.1, -0.11, -0.12], -1, "as in the paper"),
    ([-0.1, -0.11, -0.12, -0.1, -0.11, -0.12], +1, "not as in the paper"),
    ([-0.1, -0.11, -0.12, -0.1, -0.11, -0.12], 0, "not as in the paper"),  # it has them equal
    ([-0.1, -0.11, -0.12, -0.1, -0.11], -1, "undecided"),  # five seeds
    ([-0.1, -0.11, -0.12, -0.1, -0.11, 0.0], -1, "undecided"),  # a tie
    ([0.1, 0.1, 0.1, 0.1, 0.1, 0.5], 1, "undecided"),  # all agree, but |t| is 2.5
    ([1, 1, 1, 1, 1, 0], 1, "undecided"),  # |t| is 5, but one does not agree
    ([0.0] * 6, 0, "undecided"),  # all at 100 % proves nothing
    ([0.9], 1, "undecided"),
])
def test_a_verdict_needs_six_seeds_that_agree_and_four_errors(differences, paper, word):
    found = paired_difference(seeds(*differences), seeds(*[0.0] * len(differences)))
    assert verdict(found, paper) == word
    bold = as_text("questions", seeds(*differences), seeds(*[0.0] * len(differences)))[:2] == "**"
    assert bold == (word != "undecided")


@pytest.mark.parametrize("error, word", [(0.249, "as in the paper"), (0.251, "undecided")])
def test_four_standard_errors_are_the_border(error, word):
    assert verdict(Difference(1.0, error, 6, 6), 1) == word


def test_a_cell_of_table_8_is_what_the_csv_gives_by_hand(capsys, monkeypatch):
    monkeypatch.undo()
    captions = {"default": {}, "weights 1:1": {}}
    for line in lines_of(ablations.LINES):
        if line["data"] == "shapes" and line["images"] == "24000" and line["variant"] in captions:
            captions[line["variant"]][line["seed"]] = 100 * float(line["captions exactly right"])
    both = [(captions["weights 1:1"][seed], captions["default"][seed]) for seed in "012345"]
    differences = [a - b for a, b in both]
    mean = sum(differences) / 6
    variance = sum((d - mean) ** 2 for d in differences) / 5
    error = (variance / 6) ** 0.5
    agree = sum((d > 0) == (mean > 0) and d != 0 for d in differences)
    cell = f"{sum(a for a, _ in both) / 6:.1f} ({mean:+.1f} ± {error:.1f}, {agree}/6)"
    ablations.main(["--table", "--rows", "c"])
    line, = [line for line in capsys.readouterr().out.split("\n") if "1 : 1" in line]
    assert cell in [text.strip(" *") for text in line.replace("\u00a0", " ").split("|")]


def test_the_tables_on_the_page_are_those_of_the_csv(capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ablations, "commit", lambda: "")
    ablations.main(["--table"])
    page = (ablations.LINES.parent.parent / "RESULTS.md").read_text()
    parts = capsys.readouterr().out.split("\n\n")
    tables = [part.strip() for part in parts if part.startswith("|")]
    assert len(tables) == len(TABLES)
    for table in tables:
        assert table in page
        assert max(line.count(" | ") for line in table.split("\n")) < 8  # at most eight columns


# pictures.py


@torch.no_grad()
def test_the_drawing_has_the_shapes_that_the_model_gives(tmp_path):
    c = CoCaConfig(patch_size=train.PRESETS["shapes"]["patch_size"])
    model = CoCa(c)
    images = torch.zeros(3, 3, c.image_size, c.image_size)
    tokens = torch.full((3, 7), 5)
    image_tokens = model.encoder(images)
    context, x = model.pool_image(images)
    states, y = model.unimodal(tokens)
    svg = pictures.draw_architecture()
    for there, shape in ((images, "(B, 3, 32, 32)<"), (image_tokens, "(B, 16, 128) image tokens"),
                         (context, "(B, 16, 128), 16 queries"), (x, "x (B, 128)"),
                         (y, "[CLS]: y (B, 128)"), (states, "(B, L, 128)"),
                         (model.contrastive_pooler(context), "(B, 1, 128), 1 query")):
        of_model = str(tuple(there.shape)).replace("(3, ", "(B, ", 1).replace("B, 7", "B, L")
        assert of_model in shape and shape in svg
    for name in ("encoder", "generative_pooler", "contrastive_pooler", "unimodal", "multimodal"):
        assert hasattr(model, name) and f">{name}<" in svg
    assert hasattr(coca, "contrastive_loss") and hasattr(coca, "captioning_loss")


def test_weights_are_zero_where_the_mask_says_so():
    tokens = CONTROL.tokens()
    weights = pictures.attention_weights(CONTROL.model(), tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert torch.equal(weights > 0, text_mask(tokens)[:, 0])
    with fails:  # control: <end> and padding seen
        assert torch.equal(weights > 0, causal_mask(10).expand(3, -1, -1))


def test_the_mask_with_the_bug_hides_cls_from_itself():
    tokens = torch.tensor([[BEGIN, 4, 5, 6, END, PAD]])
    right, shifted = text_mask(tokens)[0, 0], pictures.shifted_mask(tokens)[0, 0]
    assert right[-1].tolist() == [True] * 4 + [False, False, True]
    assert shifted[-1].tolist() == [True] * 5 + [False, False]


def test_each_picture_has_its_own_caption_and_wrong_ones_are_red():
    model, tokenizer, _ = toy_checkpoint()
    texts = ["a red ring", "a blue ring", "a white bar"]
    model.generate = lambda images: tokenizer.encode(texts, 32)
    val = Dataset(np.arange(3 * 192, dtype=np.uint8).reshape(3, 3, 8, 8), [[text] for text in texts])
    val.captions[1] = ["a red bar"]
    page = pictures.draw_captions("x", model, tokenizer, val, range(3), 190)
    found = re.findall(r'href="([^"]+)".*?<g fill="([^"]+)"><text[^>]*>([^<]+)<', page)
    shown = [pictures.picture(image) for image in val.images]
    assert found == [*zip(shown, ["#1a1a1a", "#c00000", "#1a1a1a"], texts)]


def test_the_first_dozen_test_images_of_cifar_are_drawn(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (20, 3, 8, 8), np.uint8)
    splits = {"val": Dataset(images, [["a red ring"]] * 20)}
    monkeypatch.setattr(pictures, "load_split", lambda model, s, split: splits[split])
    model, tokenizer, s = toy_checkpoint()
    save_checkpoint(tmp_path / "checkpoint.pt", model, tokenizer, {**s, "data": "cifar10"})
    pictures.main([str(tmp_path), "--out", str(tmp_path)])
    shown = re.findall('href="([^"]+)"', (tmp_path / "cifar.svg").read_text())
    assert shown == [pictures.picture(image) for image in images[:12]]
    assert not (tmp_path / "scenes.svg").exists()
    model, tokenizer, s = toy_checkpoint(lambda_cap=0.0)
    save_checkpoint(tmp_path / "checkpoint.pt", model, tokenizer, {**s, "data": "cifar10"})
    refused("writes no captions", pictures.main, [str(tmp_path), "--out", str(tmp_path)])


def test_noisy_captions_are_compared_with_the_same_loss_without_noise(tmp_path, capsys):
    out = tmp_path / "ablations.csv"
    args = type("Args", (), dict(seeds=[0, 1], data="shapes", data_dir=None, images=None))
    for k, job in enumerate(ablations.jobs_of(["noise"], args)):
        scores = {"mean R@1": k / 100, "val_con": 0.5, "commit": "now"}
        ablations.append_line(out, {**job._asdict(), **scores})
    ablations.main(["--table", "--out", str(out), "--seeds", "0", "1", "--rows", "noise"])
    table = capsys.readouterr().out
    cells = [line.split("|")[2] for line in table.split("\n") if line.startswith("| ")][2:]
    of_first, of_own = [re.search(r"\(([+-][\d.]+)", cells[k])[1] for k in (2, 3)]
    assert (of_first, of_own) == ("+2.0", "+1.0") and "val_con" not in table


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
    assert count["losses", "polyline"] == 3  # two losses and the temperature
    assert count["entropy", "polyline"] == 4
    assert count["masks", "rect"] == 1 + 2 * 7**2 + 2 * 4  # four cells differ
    shown = {variant for row in "bcdef" for variant in TABLES[row][1]}
    lines = [line for line in lines_of(ablations.LINES) if line["variant"] in shown
             and line["data"] == "shapes" and line["images"] == "24000"]
    dots = [line[name] for line in lines for name in
            ("zero-shot top-1", "mean R@1", "captions exactly right", "questions") if line[name]]
    assert count["ablations", "circle"] == len(dots)
    least = min(float(line["zero-shot top-1"]) for line in lines if line["zero-shot top-1"])
    assert f">{least:.0%}<" in (tmp_path / "ablations.svg").read_text()
    checkpoint = torch.load(out + "/checkpoint.pt", weights_only=True)
    checkpoint["settings"]["data"] = "coco"
    torch.save(checkpoint, out + "/coco.pt")
    refused("photographs of other people", pictures.main, [out + "/coco.pt", "--out", out])


LOSSES = [[1, 8, 4, 3, 10, 0.07], [2, 16, 0.3, 2, 4.3, 0.06]]
NO_CAPTIONING = [[1, 8, 4, 0, 4, 0.07], [2, 16, 0.3, 0, 0.3, 0.06]]


@pytest.mark.parametrize("changes, rows, curves, maps, left_out", [
    ({}, LOSSES, 3, True, []),
    ({}, [], 0, True, ["losses"]),
    (dict(lambda_cap=0.0), NO_CAPTIONING, 2, True, ["scenes"]),
    (dict(lambda_con=0.0), LOSSES, 3, False, []),
])
def test_what_a_checkpoint_has_not_learned_is_left_out_and_said(
        tmp_path, capsys, changes, rows, curves, maps, left_out):
    save_checkpoint(tmp_path / "checkpoint.pt", *toy_checkpoint(**changes), rows=rows)
    pictures.main([str(tmp_path), "--out", str(tmp_path)])
    names = {"coca", "masks", "scenes", "attention", "mask", "losses", "entropy", "ablations"}
    assert {path.stem for path in tmp_path.glob("*.svg")} == names - {*left_out}
    assert re.findall("note: (.*) left out", capsys.readouterr().err) == left_out
    if curves:
        assert (tmp_path / "losses.svg").read_text().count("<polyline") == curves
    attention = (tmp_path / "attention.svg").read_text()
    assert ("embedding x" in attention) == maps
    words = "scenes" not in left_out
    assert (attention.count("<image") > 3) == words  # the scene, again below each map, and the maps


def test_a_picture_is_whole_or_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "masks.svg").write_text("mine")
    refused("masks.svg: no folder", pictures.main, ["--out", str(tmp_path / "masks.svg")])

    def full(*args):
        raise OSError(28, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused("disk full", pictures.main, ["--out", str(tmp_path)])
    assert (tmp_path / "masks.svg").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    pictures.main(["--out", str(tmp_path)])  # control
    assert (tmp_path / "masks.svg").read_text() != "mine"
