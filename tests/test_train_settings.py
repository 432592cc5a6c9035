"""Training: settings, what is refused, models from data and from others, the recipe, processes."""
import copy
import gc
import math
import re
import runpy
import shlex
import socket
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import quick
import torch
from helpers import Bomb, fails, refused
from quick import SMALL, run
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data as data_file
import eval as evaluation
import train
from coca import CoCa, CoCaConfig
from data import Batches, Dataset, Tokenizer, drawn, load, to_model
from train import PARTS, PRESETS, large_batch_backward, part_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def small(monkeypatch):
    quick.make_small(monkeypatch)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder: a run of two steps with sizes and loss weights of its own; and what is no run."""
    shelf = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        quick.make_small(patch)
        own = "--pooler parallel --n-query 3 --lambda-con 0.5 --lambda-cap 3"
        first = run(shelf / "first", f"--steps 2 --seed 3 {own}")
    unfit = dict(code={**first, "model": Bomb()}, sizes={**first, "config": {"depth": 3}},
                 list=[1, 2], old=dict(vocabulary=[], config={}))
    for name, content in unfit.items():
        (shelf / name).mkdir()
        torch.save(content, shelf / name / "checkpoint.pt")
    (shelf / "short").mkdir()
    whole = (shelf / "first" / "checkpoint.pt").read_bytes()
    (shelf / "short" / "checkpoint.pt").write_bytes(whole[:-1000])
    for name, file in dict(table="metrics.csv", notes="notes.txt").items():
        (shelf / name).mkdir()
        (shelf / name / file).write_text("mine")
    return shelf


@pytest.fixture
def go(shelf, tmp_path):
    """Trains two steps from the run on the shelf, go.source -> the new checkpoint."""
    def go(command=""):
        go.runs += 1
        go.last = tmp_path / f"run{go.runs}"
        return run(go.last, f"--steps 2 --init {go.init} {command}")

    go.runs = 0
    go.init = str(shelf / "first" / "checkpoint.pt")
    go.source = quick.checkpoint_of(shelf / "first")
    return go


def settings(command):
    return train.parse_args(shlex.split(command))[0]


# Settings


def check_settings(command, **expected):
    found = vars(settings(command))
    assert {name: found[name] for name in expected} == expected


def test_of_defaults_data_config_checkpoint_and_flags_the_later_wins(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    check_settings("", lr=1.5e-3, patch_size=8, encoder_layers=1, width=32)
    check_settings("--data cifar10", lr=2.5e-4, patch_size=4, steps=5625, width=32)
    base = "--data cifar10 --config base"
    check_settings(base, lr=2.5e-4, patch_size=18, encoder_layers=12, width=768)
    check_settings(f"{base} --encoder-layers 3 --lr 1", lr=1, patch_size=18, encoder_layers=3)
    own = dict(pooler="parallel", n_query=3, lambda_con=0.5, lambda_cap=3)
    init = "--data cifar10 --init first/checkpoint.pt"
    check_settings(init, lr=2.5e-4, steps=5625, patch_size=8, encoder_layers=1, **own)
    given = dict(encoder_layers=3, lambda_con=1, pooler="cascade")
    check_settings(f"{init} --encoder-layers 3 --lambda-con 1 --pooler cascade", **{**own, **given})
    resumed = "--resume --out first"
    check_settings(resumed, lr=1.5e-3, steps=2, batch_size=8, subset=32, seed=3, **own)


def test_what_changes_no_result_may_change_on_resume(tmp_path, monkeypatch):
    recompute = mock.Mock()
    compile = mock.Mock(side_effect=lambda function: function)
    monkeypatch.setattr(CoCa, "recompute_activations", recompute)
    monkeypatch.setattr(torch, "compile", compile)
    run(tmp_path, "--steps 1 --accum 2 --grad-checkpoint --compile")
    assert recompute.call_count == 1 and compile.call_count == 3
    kept = f"--resume --out {tmp_path}"
    check_settings(kept, accum=2, grad_checkpoint=True, compile=True, data_dir=None)
    other = "--accum 1 --no-grad-checkpoint --no-compile"
    check_settings(f"{kept} {other} --steps 1 --data-dir /d", accum=1, grad_checkpoint=False,
                   compile=False, data_dir="/d")
    run(tmp_path, f"--resume {other}")
    assert recompute.call_count == 1 and compile.call_count == 3


def test_what_the_data_change():
    """Chosen on training images kept apart: see RESULTS.md."""
    cifar = dict(steps=5625, batch_size=32, lr=2.5e-4)
    captions = dict(steps=1600, batch_size=128, lr=1.5e-3, image_size=64, patch_size=8)
    scenes = dict(steps=624, batch_size=96, lr=1.5e-3, patch_size=8)
    assert PRESETS == dict(shapes=scenes, cifar10=cifar, cifar100=cifar, coco=captions,
                           captions=captions)


@pytest.mark.parametrize("command, rate", [
    ("--help", "0.0015"), ("--data cifar10 --help", "0.00025"), ("-h --resume", "0.0015"),
    ("--data cifar10 --init nowhere.pt --help", "0.00025")])
def test_help_has_the_defaults_that_apply_and_reads_no_file(command, rate, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_checkpoint", lambda *args: pytest.fail("read a file"))
    with pytest.raises(SystemExit, match="^$"):
        train.main(command.split())
    text = " ".join(capsys.readouterr().out.split())
    assert f"--lr LR peak learning rate (default: {rate})" in text
    assert "--n-uni N_UNI unimodal decoder layers, Table 8d (default: 1)" in text


# What is refused


@pytest.mark.parametrize("wrong", [
    "--steps 0", "--steps many", "--batch-size 1", "--lr nan", "--lr -1", "--lr inf", "--accum 0",
    "--step 3", "--data mnist", "--subset -5", "--seed -1", "--seed 4294967296", "--n-uni 0",
    "--n-multi 0", "--encoder-layers -1", "--n-query -1", "--image-size 30",
    "--lambda-con 0 --lambda-cap 0", "--lambda-cap -1", "--train nothing", "--pooler both",
    "--resume", "--fresh encoder", "--config tiny --init first/checkpoint.pt"])
def test_wrong_flags_are_refused_before_anything_loads(wrong, monkeypatch, capsys):
    for name in ("load_data", "load_checkpoint"):
        monkeypatch.setattr(train, name, lambda *args, **how: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="2"):
        train.main(wrong.split())
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and error[0] == "usage: python train.py [options]"


FIRST = "--init first/checkpoint.pt"
REFUSED = [
    ("--out new --device abacus", "cannot be used here"),
    ("--out new --device meta", "cannot be used here"),
    ("--out new --accum 9", "cannot be cut into 1 equal shares of --accum 9 parts"),
    ("--out new --batch-size 33", "more than the 32"),
    ("--out new --data captions --data-dir .", "no coca.csv, .* there; python -m experiments.tables"),
    ("--out new --data coco --data-dir nowhere", "no such folder"),
    ("--out new --init nowhere.pt", "no such checkpoint"),
    (f"--out new {FIRST} --n-query 5", "generative_pooler.query does not fit.*--fresh poolers"),
    (f"--out new {FIRST} --encoder-layers 2", "encoder.blocks.* does not fit.*--fresh encoder"),
    (f"--out new {FIRST} --encoder-layers 0", "encoder.blocks.* does not fit.*--fresh encoder"),
    ("--out new --resume", "no such checkpoint"),
    ("--out old --resume", "not a checkpoint of this version.*format"),
    ("--out new --lr 0", "no weight would move"), ("--out new --data-dir .", "scenes are generated"),
    ("--out new --train poolers --n-query 0 --lambda-con 0", "no weight would move"),
    ("--out new --data cifar10", "cifar10 needs --data-dir"),
    ("--out new --data cifar10 --data-dir=", "cifar10 needs --data-dir"),
    ("--out table", "^table: no place for a new run .*another --out, or --resume"),
    ("--out table/metrics.csv", "no place for a new run"),
    ("--out notes", "no place for a new run"),
    ("--out first", "no place for a new run"),
]
for name in ("code", "sizes", "list", "short"):
    REFUSED.append((f"--out new --init {name}/checkpoint.pt", "not a checkpoint"))
    REFUSED.append((f"--out {name} --resume", "not a checkpoint"))
for flag in ("--lr 1", "--steps 8", "--seed 1", "--batch-size 4", "--subset 3",
             "--val-from-train 3", "--config base", "--init x", "--fresh encoder",
             "--train encoder",
             "--lambda-con 3", "--lambda-cap 2", "--pooler cascade", "--n-query 2", "--n-uni 2",
             "--n-multi 2", "--encoder-layers 2", "--image-size 64"):
    name = flag.split()[0]
    REFUSED.append((f"--out first --resume {flag}",
                    f"started with {name} .*; leave {name} out, or start anew from it: --init"))


@pytest.mark.parametrize("command, message", REFUSED)
def test_what_cannot_be_done_is_one_line_and_changes_no_file(command, message, shelf, monkeypatch):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in shelf.rglob("*")}

    monkeypatch.chdir(shelf)
    if "--out new" in command:
        command = f"--steps 2 --subset 32 --batch-size 8 {command}"
    else:  # the folder is tried before the data are read
        monkeypatch.setattr(evaluation, "load", lambda *args, **how: pytest.fail("too late"))
    before = files()
    refused(message, train.main, command.split())
    assert files() == before


def end_of_program(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    return end.value.code


def test_what_ends_the_programs_is_one_line_without_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("train.py --data cifar10", "eval.py nowhere.pt"):
        assert re.fullmatch("error: .+", end_of_program(monkeypatch, command))
    monkeypatch.setattr(data_file, "shapes", mock.Mock(side_effect=KeyboardInterrupt))
    assert end_of_program(monkeypatch, "train.py") == 130
    assert capsys.readouterr().err == "\nstopped\n" and not [*tmp_path.iterdir()]


def test_every_command_of_the_readme_and_the_docstrings_parses(tmp_path, monkeypatch):
    """Those of train.py and eval.py; of experiments/ the modules must be there."""
    def load_checkpoint(path):
        return None, None, dict(config=asdict(SMALL), settings={})

    monkeypatch.chdir(tmp_path)  # where the files of --json are not there yet
    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")):
        text += path.read_text(encoding="utf-8").split('"""')[1]
    commands = re.findall(r"(?:python|torchrun \S+) (train|eval)\.py([^`\n]*)", text)
    assert len(commands) > 15
    for program, arguments in commands:
        parse = train.parse_args if program == "train" else evaluation.parse_args
        try:
            parse(re.split(r"\s{2,}|[;,#\[]", arguments + "  ")[0].split())
        except SystemExit as end:
            assert not end.code, arguments  # (--help)
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name


# Models from data and from other models


def data_of(command):
    return [train.load_data(vars(settings(command)), split) for split in ("train", "val")]


def test_the_seed_is_that_of_scenes_weights_and_the_order_of_batches(go, tmp_path):
    own = quick.own_images(tmp_path / "own")  # the same for every seed
    found = []
    for seed in (7, 7, 8):
        data, val = data_of(f"--subset 20 --seed {seed}")
        new, _ = train.new_model(settings(f"--subset 20 --seed {seed}"), data)
        losses = go(f"{own} --lr 1e-30 --seed {seed}")["metrics"][:, 2]  # of the same weights
        found.append([torch.tensor(data.images), torch.tensor(val.images), new.unimodal.cls, losses])
    for one, again, other in zip(*found):
        assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_subset_and_what_is_kept_apart_are_different_images_and_those_are_evaluated(tmp_path,
                                                                                     monkeypatch):
    def evaluate(model, tokenizer, s, **how):
        evaluated.append(evaluation.load_split(model, s, "val").names)

    command = f"{quick.own_images(tmp_path / 'own')} --val-from-train 5 --subset 9"
    data, val = data_of(command)
    assert len({*data.names}) == 9 and len({*val.names} - {*data.names}) == 5
    evaluated = [evaluation.load_split(CoCa(SMALL), vars(settings(command)), "val").names]
    quick.make_small(monkeypatch)
    monkeypatch.setattr(train, "evaluate", evaluate)
    run(tmp_path / "out", f"{command} --steps 1")  # its final evaluation
    assert evaluated == [val.names] * 2
    assert len({*data_of(f"{command} --subset 0")[0].names}) > 9  # controls
    assert data_of(command.replace("--val-from-train 5", ""))[1].names != val.names


def moved(before, after):
    """Parts with a weight that is another one."""
    before = before["model"]
    after = after["model"]
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def test_frozen_parts_do_not_move_by_one_bit_and_fresh_parts_start_anew(go):
    for learned in ("encoder", "poolers", "decoder encoder"):
        assert moved(go.source, go(f"--train {learned}")) == {*learned.split(), None}  # temperature
    assert moved(go.source, go()) == {*PARTS, None}  # control
    for fresh in ("", "poolers encoder"):
        s, source = train.parse_args(["--init", go.init, *["--fresh", *fresh.split()] * bool(fresh)])
        model, _ = train.new_model(s, load("shapes", subset=8), source)
        assert moved(go.source, {"model": model.state_dict()}) == set(fresh.split())


def alike(a, b):
    """Cosine of two tensors: near 0 if both are random, 1 if they start the same."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def test_fresh_parts_are_not_those_that_the_old_ones_grew_up_beside(go, monkeypatch):
    def fresh_query(seed, init=None):
        s, source = train.parse_args(["--init", init or go.init, "--fresh", "poolers", "--seed", seed])
        model, _ = train.new_model(s, load("shapes", subset=8), source)
        return model.generative_pooler.query

    old = go.source["model"]["generative_pooler.query"]  # after two steps from seed 3
    assert alike(fresh_query("3"), old) < 0.5
    assert torch.equal(fresh_query("3"), fresh_query("3"))
    others = [fresh_query("4"), fresh_query("3", go("--seed 3") and f"{go.last}/checkpoint.pt")]
    for other in others:  # of another seed, and beside other weights
        assert alike(fresh_query("3"), other) < 0.5
    monkeypatch.setattr(train, "fresh_seed", lambda seed, model: seed)
    with fails:  # control: the seed alone
        assert alike(fresh_query("3"), old) < 0.5


def test_a_second_phase_interpolates_positions(go):
    ramp = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    torch.testing.assert_close(train.resize_positions(ramp, ramp), ramp)
    finer = train.resize_positions(ramp, torch.zeros(64, 1)).unflatten(0, (8, 8))[..., 0]
    assert (finer.diff(dim=1) > 0).all() and finer.diff(dim=0).abs().max() < 1e-5
    before = go.source["model"]["encoder.position"]
    after = go("--image-size 64 --train decoder")["model"]["encoder.position"]
    assert torch.equal(after, train.resize_positions(before, torch.zeros(64, 1)))


def test_a_fresh_decoder_learns_new_words_and_an_old_one_says_what_it_lacks(go, tmp_path, capsys):
    own = quick.own_images(tmp_path / "own")
    assert go(own)["vocabulary"] == go.source["vocabulary"]
    assert "100.0% of the captions' words are unknown" in capsys.readouterr().err
    assert sorted(go(f"{own} --fresh decoder")["vocabulary"][4:]) == ["ein", "hund", "roter"]
    assert "unknown" not in capsys.readouterr().err


@pytest.mark.parametrize("kept", [False, True])  # True: the control
def test_the_checkpoint_of_init_is_gone_when_training_starts(kept, go, monkeypatch):
    def load_checkpoint(path):
        source = evaluation.load_checkpoint(path)
        state = source[2]["optimizer"]["state"][0]["exp_avg"]
        references.extend([weakref.ref(source[0]), weakref.ref(state)])
        held.extend(source if kept else ())
        return source

    def look(number):
        gc.collect()
        alive.append([reference() is not None for reference in references])

    references = []
    held = []
    alive = []
    monkeypatch.setattr(train, "load_checkpoint", load_checkpoint)
    quick.before_each(monkeypatch, Batches, "__call__", look)
    go()
    assert alive == 2 * [[kept, kept]]


def test_checkpoints_are_read_on_the_cpu_and_no_float64_leaves_it(go, tmp_path, monkeypatch):
    """As on Apple's GPUs, which have no float64: "cpu:0" stands for such a device."""
    def read(*args, map_location=None, **how):
        assert map_location == "cpu"
        return torch_load(*args, map_location=map_location, **how)

    def to(tensor, *args, **how):
        if "cpu:0" in map(str, [*args, *how.values()]):
            assert tensor.dtype != torch.float64
            arrived.append(tensor)
        return tensor_to(tensor, *args, **how)

    arrived = []
    torch_load = torch.load
    tensor_to = torch.Tensor.to
    monkeypatch.setattr(torch, "load", read)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(train, "pick_device", lambda name: "cpu:0")
    go()
    train.main(f"--resume --out {tmp_path}/run1".split())
    parameters = [tensor for tensor in arrived if isinstance(tensor, torch.nn.Parameter)]
    assert len(parameters) == 2 * len([*CoCa(SMALL).parameters()])
    kinds = [tensor.dtype for tensor in arrived]  # 2 batches to learn from, 2 x 2 to validate
    assert kinds.count(torch.uint8) == kinds.count(torch.int64) == 6
    with fails:  # control
        torch.zeros(1, dtype=torch.float64).to("cpu:0")


def embedded(images, whitening):
    """Patch embeddings (n, D, rows, columns) of a layer that starts from these images.

    None: it starts as CoCa.init_parameters leaves it.
    """
    torch.manual_seed(0)
    layer = CoCa(CoCaConfig(image_size=8, patch_size=4, width=64, vocab_size=5)).encoder.patches
    if whitening is not None:
        train.whiten_patches(layer, images, whitening)
    return layer(images)


def check_colours_do_not_matter(whitening):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = embedded(images, whitening)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(64), rtol=0, atol=1e-4)
    assert found.std().item() == pytest.approx(1, abs=0.1)
    darker = embedded(images * 0.3 - 0.6, whitening)
    torch.testing.assert_close(darker, found, rtol=0, atol=0.01)


def test_patches_start_centred_and_at_one_scale_however_dark_or_pale_the_images_are():
    check_colours_do_not_matter(0)
    check_colours_do_not_matter(0.5)
    with fails:  # control
        check_colours_do_not_matter(None)


def test_whitening_is_to_what_power_brightness_no_longer_outweighs_detail():
    noise = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    brightness = torch.randn(400, 1, 1, 1, generator=torch.Generator().manual_seed(2))
    images = 0.01 * noise + brightness  # spread of a patch's mean: 1, of what is left: 0.01
    ratios = []
    for whitening in (None, 0, 0.5):
        found = embedded(images, whitening)
        found = found - found.mean((0, 2, 3), keepdim=True)
        loud = found.mean((2, 3), keepdim=True)  # all patches of an image are equally bright
        ratios.append((loud.std() / (found - loud).std()).item() * 47**0.5)  # one direction to 47
    plain, standardised, half = ratios
    assert standardised == pytest.approx(plain, rel=0.01), ratios
    assert half == pytest.approx(plain**0.5, rel=0.2), ratios
    assert torch.isfinite(embedded(torch.ones(4, 3, 8, 8), 0.5)).all()


def test_a_new_encoder_starts_from_the_data_whitened_if_they_are_photographs(monkeypatch):
    def whiten(layer, images, whitening):
        torch.testing.assert_close(images, to_model(torch.tensor(data.images[:256])))
        found.append((layer, whitening))

    scenes = load("shapes", subset=257)
    source = CoCa(replace(SMALL, patch_size=8, vocab_size=5)), Tokenizer("abcde"), None
    monkeypatch.setattr(train, "whiten_patches", whiten)
    s = settings("--image-size 32")
    for data in (scenes, replace(scenes, augment=True)):  # that only photographs are
        found = []
        model, _ = train.new_model(s, data)
        assert found == [(model.encoder.patches, 0.5 if data.augment else 0)]
    s.fresh = ["encoder"]
    train.new_model(s, data, source)
    assert len(found) == 2
    s.fresh = []
    train.new_model(s, data, source)
    assert len(found) == 2  # an old encoder stays as it is


# The recipe of Sec. 4.1


def test_learning_rate_optimizer_and_loss_weights_are_those_of_section_4_1():
    assert CoCaConfig().lambda_cap == 2 and CoCaConfig().lambda_con == 1
    lr = [train.learning_rate(step, 8e-4, 1000) for step in range(1000)]
    assert max(lr) == pytest.approx(8e-4) and lr.index(max(lr)) in (19, 20)
    assert lr[0] == pytest.approx(8e-4 / 20) and 0 < lr[-1] < 2e-6
    assert all(a > b for a, b in zip(lr[20:], lr[21:]))
    model = CoCa(SMALL)
    model.encoder.norm.requires_grad_(False)
    optimizer = train.make_optimizer(model)
    matrices, vectors = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and matrices["betas"] == (0.9, 0.999)
    assert matrices["weight_decay"] == 0.01 and vectors["weight_decay"] == 0
    assert min(p.dim() for p in matrices["params"]) == 2
    assert max(p.dim() for p in vectors["params"]) == 1
    assert len(matrices["params"] + vectors["params"]) == len([*model.parameters()]) - 2


def noise(step):
    """Random images and tokens; two texts are equal."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(4, 20, (6, 9), generator=generator)
    tokens[1] = tokens[0]
    return torch.rand(6, 3, 32, 32, generator=generator), tokens


def new_loop(steps=3, accum=1):
    """-> a small model, its optimizer, and the loop that trains it on noise."""
    torch.manual_seed(0)
    model = CoCa(SMALL)
    optimizer = train.make_optimizer(model)
    s = SimpleNamespace(device="cpu", steps=steps, lr=1e-3, accum=accum)
    return model, optimizer, train.train(model, optimizer, noise, s)


@pytest.mark.parametrize("accum", [1, 2])
def test_between_backward_and_the_optimizers_step_the_loop_yields_gradients_cut_to_norm_1(accum):
    @torch.no_grad()
    def step():
        rates.append([group["lr"] for group in optimizer.param_groups])
        model.unimodal.cls.add_(1)

    rates = []
    model, optimizer, loop = new_loop(accum=accum)
    optimizer.step = step
    for number, con, cap in loop:
        plain = copy.deepcopy(model)
        plain.zero_grad()
        loss = plain.losses(*noise(number))
        loss.total.backward()
        assert clip_grad_norm_(plain.parameters(), 1.0) > 1.01  # it was longer
        assert [con, cap] == pytest.approx([loss.con.item(), loss.cap.item()], rel=1e-5)
        for p, right in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, right.grad, rtol=1e-3, atol=1e-5)
        assert len(rates) == number
    assert rates == [2 * [train.learning_rate(number, 1e-3, 3)] for number in range(3)]


def check_temperature(there, bound):
    @torch.no_grad()
    def leave():
        model.log_temperature.fill_(there)

    model, optimizer, loop = new_loop()
    optimizer.step = leave
    assert len([*loop]) == 3
    assert model.temperature.item() == pytest.approx(bound)


def test_the_temperature_stays_within_its_bounds():
    check_temperature(-9, 0.01)
    check_temperature(9, 1)
    check_temperature(-1, math.exp(-1))
    with fails, mock.patch.object(torch.Tensor, "clamp_"):  # control
        check_temperature(-9, 0.01)


@pytest.mark.parametrize("accum", [1, 2])
def test_half_precision_trains_nearly_as_float32(accum, monkeypatch):
    floats = np.array([*new_loop(8, accum)[2]])
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(train, "half_precision", lambda device: bfloat16)
    halves = np.array([*new_loop(8, accum)[2]])
    assert halves == pytest.approx(floats, rel=0.03)
    assert (halves != floats)[:, 1:].all()  # control: they were not float32


def test_metrics_are_those_of_the_step_and_validated_is_what_is_saved(tmp_path, monkeypatch):
    def step(optimizer):
        matrices, vectors = optimizer.param_groups
        temperature = next(p for p in vectors["params"] if not p.dim())
        used.append([matrices["lr"], temperature.exp().item()])
        return real(optimizer)

    used = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    quick.slow_steps(monkeypatch, 20)
    run(tmp_path, "--steps 5 --lambda-con 0.5 --lambda-cap 3")
    rows = quick.rows_of(tmp_path)
    for i, row in enumerate(rows):
        row = {name: float(value) for name, value in row.items()}
        assert [row["lr"], row["temperature"]] == pytest.approx(used[i], rel=1e-6)
        assert row["images"] == 8 * (i + 1)
        assert row["loss"] == pytest.approx(0.5 * row["loss_con"] + 3 * row["loss_cap"], rel=1e-6)
    assert [row["step"] for row in rows if row["val_con"] != "nan"] == ["2", "4", "5"]


def check_validation(count, batch, batches, rows=None):
    """The mean of the model's losses over whole batches, each image with its first caption."""
    images = np.random.default_rng(0).integers(0, 255, (count, 3, 8, 8), np.uint8)
    val = Dataset(images, [[f"{'x' * (i % 7)} y", "z"] for i in range(count)])
    tokenizer = Tokenizer.learn(["x y z", *("x" * i for i in range(7))], 50)
    torch.manual_seed(0)
    model = CoCa(replace(SMALL, image_size=8, patch_size=8, vocab_size=len(tokenizer)))
    expected = torch.zeros(2)
    rows = np.arange(count) if rows is None else rows
    for i in range(0, batch * batches, batch):
        own = rows[i:i + batch]
        tokens = tokenizer.encode([val.captions[j][0] for j in own], 32)
        losses = model.losses(to_model(torch.tensor(images[own])), tokens)
        expected += torch.stack(losses[1:]).detach() / batches
    s = SimpleNamespace(batch_size=batch, text_len=32, device="cpu")
    torch.testing.assert_close(torch.tensor(train.validate(s, model, tokenizer, val)), expected)


def test_validation_losses_are_a_mean_over_whole_batches_of_at_most_500_drawn_images():
    check_validation(13, 4, 3)
    check_validation(500, 120, 4)  # all, in their order
    some = drawn(600, 500)
    check_validation(600, 120, 4, some)
    check_validation(600, 500, 1, some)
    with fails:  # control: one batch too few
        check_validation(600, 120, 3, some)
    with fails:  # control: the first by name
        check_validation(600, 500, 1)
    bfloat16 = torch.autocast("cpu", torch.bfloat16)
    with fails, mock.patch.object(train, "half_precision", lambda device: bfloat16):
        check_validation(13, 4, 3)  # it is as training is


# Processes, compilation


@pytest.mark.parametrize("rank, order", [
    (0, ["load", "load", "barrier"]), (1, ["barrier", "load", "load"])])
def test_the_first_process_reads_the_data_before_the_others(rank, order, monkeypatch):
    def load_data(s, split):
        done.append("load")
        return load("shapes", subset=8)

    done = []
    s = settings("--data cifar10 --data-dir .")
    monkeypatch.setattr(train, "parse_args", lambda argv: (s, None))
    monkeypatch.setattr(train, "join_processes", lambda s: (rank, 2))
    monkeypatch.setattr(train.dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(train, "check_data", mock.Mock(side_effect=ZeroDivisionError))  # far enough
    with pytest.raises(ZeroDivisionError):
        train.main([], load_data)
    assert done == order


def test_two_processes_train_as_one_does(tmp_path):
    """torchrun only starts the processes, each with these variables. The second writes nothing."""
    own = f"{quick.own_images(tmp_path / 'own')} --steps 3 --pooler parallel"
    parts = f"{own} --accum 2 --grad-checkpoint"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    variables = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = []
    for rank, out in enumerate(["two", "own"]):
        processes.append(quick.start(tmp_path / out, parts, tmp_path / f"said{rank}",
                                     RANK=str(rank), **variables))
    one = run(tmp_path / "one", own)
    other = run(tmp_path / "other", f"{own} --seed 1")
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    assert (tmp_path / "said0").read_text() and not (tmp_path / "said1").read_text()
    quick.check_whole(tmp_path / "two", 3)
    assert not (tmp_path / "own" / "checkpoint.pt").exists()
    losses = quick.checkpoint_of(tmp_path / "two")["metrics"][:, :5]
    torch.testing.assert_close(losses, one["metrics"][:, :5], rtol=1e-4, atol=0)
    with fails:  # control
        torch.testing.assert_close(losses, other["metrics"][:, :5], rtol=1e-4, atol=0)


def test_processes_that_cannot_share_the_batch_or_the_gpus_are_refused(monkeypatch):
    def join(device, batch_size=6, accum=1):
        s = SimpleNamespace(device=device, batch_size=batch_size, accum=accum)
        return *train.join_processes(s), s.device

    started = []
    set_by_torchrun = dict(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2", LOCAL_WORLD_SIZE="3")
    for name, value in set_by_torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "pick_device", lambda name: name)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train.dist, "init_process_group", started.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("2 GPUs for more processes; start fewer", join, "cuda")
    refused("--batch-size 7 cannot be cut into 3 equal shares", join, "cpu", 7)
    refused("cannot be cut into 3 equal shares of --accum 3 parts", join, "cpu", 6, 3)
    assert started == []
    for shared in ("cpu", "cuda:0"):
        assert join(shared, 6, 2) == (2, 3, shared) and started.pop() == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert join("cuda") == (2, 3, "cuda:2") and started == ["nccl"]


def test_compile_makes_graphs_of_what_training_calls_and_changes_no_result(monkeypatch):
    def compile(function):
        def make_graph(graph, inputs):
            compiled.add(function.__name__)
            return graph.forward

        return real(function, backend=make_graph)

    compiled = set()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    plain = CoCa(replace(SMALL, encoder_layers=0, n_query=0))
    model = copy.deepcopy(plain)
    train.prepare(model, SimpleNamespace(train=PARTS, grad_checkpoint=False, compile=True))
    images, tokens = noise(0)
    right = plain.losses(images[:3], tokens[:3])[1:]
    torch.testing.assert_close(model.losses(images[:3], tokens[:3])[1:], right)
    assert compiled == {"forward"}
    found = large_batch_backward(model, images, tokens, 2, 0, 1, train.half_precision("cpu"))
    torch.testing.assert_close(found, plain.losses(images, tokens)[1:])
    assert compiled == {"forward", "encode_image", "encode_text"}


# What it says


@pytest.mark.parametrize("command, con, cap", [
    ("--n-query 0", True, True), ("--lambda-con 0", False, True), ("--lambda-cap 0", True, False)])
def test_losses_to_expect_are_those_of_a_new_model_that_are_trained(command, con, cap, tmp_path,
                                                                   capsys):
    run(tmp_path / "new", f"--steps 1 {command}")
    said = capsys.readouterr().out
    size = int(re.search(r"generated scenes: 32 images, (\d+) tokens", said)[1])
    assert ("contrastive loss of 2 ln 8 = 4.16" in said) == con
    assert (f"captioning loss of ln {size} + 1/2 = {math.log(size) + 0.5:.2f}" in said) == cap
    assert said.count("at step 0 expect") == con + cap
    run(tmp_path / "new", "--resume")
    run(tmp_path / "next", f"--steps 1 --init {tmp_path}/new/checkpoint.pt")
    assert "at step 0 expect" not in capsys.readouterr().out


def test_settings_that_are_unusual_for_the_data_are_told_and_no_others(tmp_path, capsys):
    run(tmp_path, "--steps 1 --pooler parallel")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert told == ["  subset 32, not 0", "  steps 1, not 624", "  batch_size 8, not 96",
                    "  pooler parallel, not cascade"]


@pytest.mark.parametrize("part", ["", "encoder", "poolers", "decoder"])
def test_what_learns_is_counted(part, tmp_path, capsys):
    checkpoint = run(tmp_path, f"--steps 1 --train {part}" if part else "--steps 1")
    said = re.search(r"([\d.]+) million parameters, --train ([\d.]+) million", capsys.readouterr().out)
    counts = {name: weights.numel() for name, weights in checkpoint["model"].items()}
    learned = sum(count for name, count in counts.items()
                  if not part or train.part_of(name) in (part, None))
    assert said.groups() == (f"{sum(counts.values()) / 1e6:.2f}", f"{learned / 1e6:.2f}")


def test_what_was_saved_and_what_scores_it_is_said_before_the_scores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: print("SCORES"))
    for i, (own, next_step) in enumerate([
            ("", "-m experiments.report {out} {out}.html"),
            (quick.own_images(tmp_path / "own"), "eval.py {out} --image YOUR.jpg")]):
        out = tmp_path / str(i)
        run(out, f"--steps 1 {own}")
        end = capsys.readouterr().out.splitlines()[-4:]
        assert end == [f"saved: checkpoint.pt and metrics.csv in {out}", f"score: python eval.py {out}",
                       "SCORES", f"next:  python {next_step.format(out=out)}"]


def test_the_rate_of_a_model_that_goes_on_from_another_is_noted_unless_it_is_given(go, capsys):
    for command, noted in (("", True), ("--lr 1e-4", False)):
        go(command)
        said = capsys.readouterr().err
        assert ("as for a new model" in said) == noted and ("--lr is 0.0015" in said) == noted


def test_the_bar_fits_80_columns(tmp_path, monkeypatch):
    def meter(*args, **how):
        lines.append(tqdm.format_meter(**{**bar[0].format_dict, "ncols": 80, "elapsed": 7261}))
        return lines[-1]

    lines = []
    bar = []
    real = train.tqdm
    monkeypatch.setattr(train, "tqdm", lambda **how: bar.append(real(**how)) or bar[0])
    monkeypatch.setattr(train, "evaluate", meter)
    quick.slow_steps(monkeypatch)
    run(tmp_path, "--steps 3")
    assert len(lines[0]) <= 80 and "con " in lines[0] and re.search(r" val \S+ \S+\]$", lines[0])
    assert lines[0].count("█") >= 5


def test_train_then_eval_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", evaluation.evaluate)
    checkpoint = run(tmp_path, "--steps 2")
    out = capsys.readouterr().out
    for part in ("zero-shot top-1", "image to text R@1 ", "generated:", "true:"):
        assert part in out, part
    row = {name: float(value or "nan") for name, value in quick.rows_of(tmp_path)[0].items()}
    excess = row["loss_con"] - 2 * math.log(8)  # similarities start with a spread of their own
    assert -0.3 < excess < 2.5  # (one direction or half of both: below)
    words = Tokenizer(checkpoint["vocabulary"])  # it travels along
    assert words.decode(words.encode(["a small red ring"], 32)[0]) == "a small red ring"
    evaluation.main(f"{tmp_path}/checkpoint.pt --device cpu --task retrieval".split())
    assert "image to text R@1 " in capsys.readouterr().out
