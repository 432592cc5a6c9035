"""What learns a classifier, the tasks as a whole, and eval.py's command line."""
import inspect
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import CONTROL, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import eval as evaluation
from coca import AttentionalPooler, CoCa
from data import COLOURS, SHAPES, Dataset, Tokenizer, UserError, to_model
from eval import (
    FINETUNED,
    FROZEN,
    TASKS,
    ZERO_SHOT,
    Classifier,
    Recipe,
    evaluate,
    image_tokens,
    load_checkpoint,
    new_classifier,
    pick_device,
    transfer,
)

# The classifier


def filled_classifier(seed, **how):
    torch.manual_seed(seed)
    return Classifier(8, 2, 5, **how).double()


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_pads_do_not_reach_the_classifier(seed, real, pads):
    classifier = filled_classifier(seed)
    tokens = torch.randn(2, real + pads, 8, dtype=torch.float64)
    mask = (torch.arange(real + pads) < real).expand(2, 1, 1, -1)
    expected = classifier(tokens[:, :real])
    torch.testing.assert_close(classifier(tokens, mask), expected)
    with fails:  # control: pads that are not masked
        torch.testing.assert_close(classifier(tokens), expected)


def test_a_classifier_has_a_pooler_of_one_query_and_a_linear_probe_reads_the_mean():
    tokens = torch.randn(3, 4, 8, dtype=torch.float64)
    pooled = filled_classifier(0)
    assert pooled.pooler.query.shape == (1, 8)
    torch.testing.assert_close(pooled(tokens), pooled.linear(pooled.pooler(tokens)[:, 0]))
    probe = filled_classifier(0, pooled=False)
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    torch.testing.assert_close(probe(tokens), probe.linear(tokens.mean(1)))
    for classifier in (pooled, probe):  # where a token stands counts for nothing
        torch.testing.assert_close(classifier(tokens), classifier(tokens.flip(1)))


@torch.no_grad()
def test_frozen_and_finetuned_classifiers_read_the_encoder_and_no_pretrained_pooler():
    model = CONTROL.model()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    tokens, = image_tokens(model, images)
    torch.testing.assert_close(tokens, model.encoder(to_model(images)))
    with fails:  # control: the pooler that was trained with the encoder
        torch.testing.assert_close(tokens, model.generative_pooler(tokens))


# One loop for all that is learned


class Probe(nn.Module):
    """Two logits whatever it reads, and a record of how it is used."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(2))
        self.idle = nn.Parameter(torch.ones(1))  # without a gradient: only weight decay moves it
        self.scale = scale
        self.trained = []  # numbers of the rows of each batch
        self.logits = []  # before each step
        self.scored = []  # (rows, logit, idle) of each pass without gradients

    def __deepcopy__(self, memo):  # the average of the weights writes to the same record
        copied = Probe(self.scale)
        copied.load_state_dict(self.state_dict())
        copied.trained = self.trained
        copied.logits = self.logits
        copied.scored = self.scored
        return copied

    def forward(self, numbers):
        if torch.is_grad_enabled():
            self.trained.append(numbers.tolist())
            self.logits.append(self.logit[0].item())
        else:
            self.scored.append((numbers.tolist(), self.logit.tolist(), self.idle.item()))
        return (self.scale * self.logit + 0 * self.idle).expand(len(numbers), -1)


def read_numbers(model, numbers):
    return (numbers,)


def run_probe(probe, **how):
    """Learns on rows 0 to 39, all of class 0; tests on rows 100 to 109, three of class 1."""
    train = (torch.arange(40),), torch.zeros(40, dtype=torch.long)
    test = (torch.arange(100, 110),), torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 0, 0])
    recipe = Recipe(**{"steps": 40, "batch": 8, **how})
    return transfer(CONTROL.model(), read_numbers, probe, train, test, recipe, "probe")


@pytest.mark.parametrize("encoder_lr", [0.0, 1e-3])
def test_what_is_learned_from_is_the_training_set_and_what_is_scored_the_test_set(encoder_lr):
    probe = Probe()
    assert run_probe(probe, encoder_lr=encoder_lr) == pytest.approx(0.7)
    assert {len(rows) for rows in probe.trained} == {8} and len(probe.trained) == 40
    assert set(sum(probe.trained, [])) == set(range(40))
    assert [rows for rows, _, _ in probe.scored] == [list(range(100, 110))]
    again = Probe()
    run_probe(again, encoder_lr=encoder_lr)
    assert again.trained == probe.trained  # the same every time


def test_the_rate_warms_up_and_falls_to_zero_by_a_cosine_and_weights_decay():
    probe = Probe()
    run_probe(probe, lr=1e-3, warm_up=10, weight_decay=0.5)
    rates = []
    idle = 1.0
    for t in range(40):
        rates.append(1e-3 * min(1, (t + 1) / 10) * (1 + math.cos(math.pi * t / 40)) / 2)
        idle *= 1 - rates[-1] * 0.5
    # Adam's step is the rate, as long as the gradient stays the same
    np.testing.assert_allclose(np.diff(probe.logits), rates[:-1], rtol=0.02)
    assert 1 - probe.scored[0][2] == pytest.approx(1 - idle, rel=0.05)
    with fails:  # control: a rate that stays
        np.testing.assert_allclose(np.diff(probe.logits)[10:], 1e-3, rtol=0.02)


def test_scored_is_the_average_of_the_last_weights():
    probe = Probe()
    run_probe(probe, lr=1e-3)
    scored = probe.scored[0][1][0]
    assert probe.logits[-10] < scored < probe.logits[-1]  # the last weights are beyond


def test_targets_are_smoothed():
    for smoothing in (0.2, 0.5):
        probe = Probe()
        run_probe(probe, lr=0.1, steps=300, smoothing=smoothing)
        learned = torch.tensor(probe.scored[0][1]).softmax(0)[0]
        assert learned == pytest.approx(1 - smoothing / 2, abs=0.01)  # of two classes


def test_gradients_are_clipped_to_norm_1():
    norms = []

    def record(optimizer, args, named):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    handle = register_optimizer_step_pre_hook(record)
    run_probe(Probe(scale=1e-3))
    run_probe(Probe(scale=1e3))
    handle.remove()
    assert max(norms[:40]) < 1e-3 and norms[40] == pytest.approx(1)


@pytest.mark.parametrize("lr, encoder_lr, moved", [
    (1e-2, 1e-2, {"encoder", "generative_pooler"}), (0.0, 1e-2, {"encoder"}),
    (1e-2, 1e-30, {"generative_pooler"}), (1e-2, 0.0, set())])
def test_the_encoder_learns_at_its_own_rate_and_the_model_given_stays(lr, encoder_lr, moved):
    model = CONTROL.model()
    learning = []

    def read(given, images):
        learning.append(given)
        return (given.generative_pooler(given.encoder(to_model(images))),)

    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    pairs = (images,), torch.arange(40) % 2
    classifier = Classifier(16, 2, 2)
    weight = classifier.linear.weight.detach().clone()
    recipe = Recipe(lr=lr, encoder_lr=encoder_lr, steps=3)
    transfer(model, read, classifier, pairs, pairs, recipe, "toy")
    before = CONTROL.model().state_dict()
    changed = set()
    for name, p in learning[0].state_dict().items():
        if not torch.equal(p, before[name]):
            changed.add(name.split(".")[0])
    assert changed == moved
    assert torch.equal(classifier.linear.weight, weight) == (lr == 0)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("lr, encoder_lr, learns", [
    (1e-2, 0.0, True), (0.0, 1e-2, True), (0.0, 0.0, False), (0.0, 1e-12, False)])
def test_dark_and_bright_images_are_told_apart_by_what_learns(lr, encoder_lr, learns):
    labels = torch.arange(40) % 2
    noise = torch.randint(0, 60, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pairs = ((noise + 150 * labels[:, None, None, None]).to(torch.uint8),), labels
    recipe = Recipe(lr=lr, encoder_lr=encoder_lr, steps=40, batch=8, smoothing=0.1)
    torch.manual_seed(0)
    classifier = Classifier(16, 2, 2)
    accuracy = transfer(CONTROL.model(), image_tokens, classifier, pairs, pairs, recipe, "toy")
    assert (accuracy == 1.0) == learns


# Tasks

SPECIAL = ["<pad>", "<begin>", "<end>", "<unk>"]
WORDS = [*SPECIAL, *COLOURS, *SHAPES, *"a small large at the top bottom left right and".split()]


def toy_checkpoint(**changes):
    torch.manual_seed(0)
    model = CoCa(CONTROL.config(vocab_size=len(WORDS), text_len=32, **changes))
    return model, Tokenizer(WORDS), dict(data="shapes", data_dir=None, seed=0)


def test_the_recipes_are_those_of_table_9_but_for_steps_and_batch():
    table = dict(lr=5e-4, warm_up=0, weight_decay=0.01)
    common = dict(steps=0, batch=0)
    assert replace(FROZEN, **common) == Recipe(encoder_lr=0.0, smoothing=0.2, **table, **common)
    assert replace(FINETUNED, **common) == Recipe(encoder_lr=5e-4, smoothing=0.5, **table, **common)


def test_frozen_and_finetuned_learn_labelled_images_and_are_scored_on_others(monkeypatch):
    model, tokenizer, settings = toy_checkpoint()
    parts = {"labelled": Dataset(np.full((3, 3, 8, 8), 7, np.uint8), [], np.array([0, 1, 1])),
             "labelled-val": Dataset(np.full((4, 3, 8, 8), 9, np.uint8), [], np.array([0, 0, 1, 0]))}
    for part in parts.values():
        part.classes = ["a", "b"]
    calls = []

    def record(model, read, classifier, train, test, recipe, what):
        calls.append((classifier, recipe))
        assert read is image_tokens
        for ((images,), labels), split in ((train, "labelled"), (test, "labelled-val")):
            assert np.array_equal(images, parts[split].images)
            assert labels.tolist() == parts[split].labels.tolist()
        return len(calls) / 10

    monkeypatch.setattr(evaluation, "load_split", lambda model, s, split: parts[split])
    monkeypatch.setattr(evaluation, "transfer", record)
    assert TASKS["frozen"](model, tokenizer, settings) == {
        "frozen, linear probe": (0.1, 0.75), "frozen, new pooler": (0.2, 0.75)}
    assert TASKS["finetuned"](model, tokenizer, settings) == {"finetuned": (0.3, 0.75)}
    (probe, _), (frozen, _), (finetuned, _) = calls
    assert [recipe for _, recipe in calls] == [FROZEN, FROZEN, FINETUNED]
    assert probe.pooler is None
    for classifier in (frozen, finetuned):
        assert isinstance(classifier.pooler, AttentionalPooler)
        assert classifier.pooler is not model.contrastive_pooler


def test_a_new_classifier_is_the_same_in_every_run_of_a_seed():
    model, _, settings = toy_checkpoint()
    data = Dataset(None, [], None, ["a", "b"])
    weights = []
    for seed in (0, 0, 1):
        weights.append(new_classifier(model, {"seed": seed}, data).linear.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_data_are_loaded_by_the_checkpoints_settings_at_the_models_size():
    model, _, settings = toy_checkpoint()
    with mock.patch.object(evaluation, "load", autospec=True) as load:
        evaluation.load_split(model, settings, "val")
        evaluation.load_split(model, {**settings, "seed": 5, "val_from_train": 9}, "labelled")
    found = []
    for call in load.call_args_list:
        arguments = inspect.signature(load).bind(*call.args, **call.kwargs)
        arguments.apply_defaults()
        found.append(arguments.arguments)
    first = dict(name="shapes", data_dir=None, split="val", size=8, subset=0, seed=0,
                 download=False, val_from_train=0)
    assert found == [first, {**first, "split": "labelled", "seed": 5, "val_from_train": 9}]


def fixed_task(model, tokenizer, settings):
    assert not model.training and not torch.is_grad_enabled()
    return {"toy R@1": (0.5, 0.25), "toy R@5": (np.float64(0.875), 0.75), "CIDEr-D": (1.5, 0)}


def lacking_task(model, tokenizer, settings):
    raise UserError("there is nothing here; add some")


def test_scores_are_printed_with_chance_and_seconds_and_what_lacks_something_is_left_out(capsys):
    tasks = {"lacking": lacking_task, "fixed": fixed_task}
    scores = evaluate(*toy_checkpoint(), tasks)
    assert scores == {"toy R@1": {"score": 0.5, "chance": 0.25},
                      "toy R@5": {"score": 0.875, "chance": 0.75},
                      "CIDEr-D": {"score": 1.5, "chance": 0.0}}
    assert json.loads(json.dumps(scores)) == scores
    printed = capsys.readouterr()
    assert printed.err == "note: lacking left out: there is nothing here; add some\n"
    head, first, second = [line.split() for line in printed.out.splitlines()]
    assert head == ["shapes", "score", "chance", "seconds"]
    assert first[:-1] == ["toy", "R@1", "50.00%", "25.00%"] and 0 <= float(first[-1]) < 9
    assert second == ["CIDEr-D", "1.500", "0.000"]
    refused("^lacking: there is nothing here; add some$", evaluate, *toy_checkpoint(), tasks,
            strict=True)


@pytest.mark.parametrize("task, changes, data, message", [
    ("zero-shot", dict(lambda_con=0.0), "shapes", "--lambda-con 0"),
    ("retrieval", dict(lambda_con=0.0), "shapes", "--lambda-con 0"),
    ("captioning", dict(lambda_cap=0.0), "shapes", "--lambda-cap 0"),
    ("zero-shot", {}, "coco", "coco has no classes"), ("frozen", {}, "captions", "no classes"),
    ("finetuned", {}, "coco", "no classes")])
def test_a_checkpoint_without_what_a_task_needs_is_one_clear_line(task, changes, data, message):
    model, tokenizer, settings = toy_checkpoint(**changes)
    settings["data"] = data
    refused(f"{task}: .*{message}", evaluate, model, tokenizer, settings, {task: TASKS[task]},
            strict=True)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py on a toy checkpoint in a folder with x.png, cifar-a and cifar-b -> its exit status."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")
    for folder, labels in (("cifar-a", [0, 0, 0, 1]), ("cifar-b", [0, 1])):
        Path(folder).mkdir()
        images = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), np.uint8)
        batch = {"labels": labels, "data": images}
        for name, content in (("batches.meta", {"label_names": ["ring", "bar"]}),
                              ("data_batch_1", batch), ("test_batch", batch)):
            (Path(folder) / name).write_bytes(pickle.dumps(content))

    def call(*flags, settings=(), **changes):
        model, tokenizer, defaults = toy_checkpoint(**changes)
        torch.save(dict(format=evaluation.FORMAT, config=asdict(model.config),
                        vocabulary=tokenizer.words, settings={**defaults, **dict(settings)},
                        model=model.state_dict()), "checkpoint.pt")
        try:
            evaluation.main(["checkpoint.pt", *flags])
        except SystemExit as e:
            return e.code
    return call


def test_every_task_runs_and_its_scores_and_chances_are_shares(command, monkeypatch):
    for name in ("FROZEN", "FINETUNED"):
        monkeypatch.setattr(evaluation, name, replace(getattr(evaluation, name), steps=2))
    assert not command("--data", "cifar10", "--data-dir", "cifar-a", "--json", "cifar.json",
                       "--task", "zero-shot", "frozen", "finetuned")
    assert not command("--json", "shapes.json")
    cifar = json.loads(Path("cifar.json").read_text())
    shapes = json.loads(Path("shapes.json").read_text())
    assert list(cifar) == ["zero-shot top-1", "frozen, linear probe", "frozen, new pooler", "finetuned"]
    assert len(shapes) == 1 + 6 + 7  # zero-shot, retrieval, captioning
    for scores in (cifar, shapes):
        for values in scores.values():
            assert list(values) == ["score", "chance"]
            assert 0 <= values["score"] <= 1 and 0 <= values["chance"] <= 1


def test_data_and_its_folder_are_the_checkpoints_or_those_of_the_flags(command, capsys):
    trained_on_a = dict(data="cifar10", data_dir="cifar-a")
    for flags, settings, chance in (
            ("", trained_on_a, "75.00%"), ("--data-dir cifar-b", trained_on_a, "50.00%"),
            ("--data cifar10 --data-dir cifar-b", {}, "50.00%"),
            ("--data-dir cifar-a", {**trained_on_a, "val_from_train": 1}, "100.00%"),
            ("--data cifar10 --data-dir cifar-a", {"val_from_train": 1}, "75.00%")):
        assert not command("--task", "zero-shot", *flags.split(), settings=settings)
        assert capsys.readouterr().out.splitlines()[1].split()[-2] == chance


def test_the_device_is_the_one_asked_for_or_the_first_there_is(command, monkeypatch):
    with pytest.raises(UserError, match="^--device abacus: cannot be used here .*; leave it out$"):
        command("--device", "abacus")
    devices = []

    def record(model, tokenizer, settings, tasks, strict=False):
        devices.append(evaluation.device_of(model).type)
        return {}

    monkeypatch.setattr(evaluation, "evaluate", record)
    assert not command("--device", "cpu")
    monkeypatch.setattr(evaluation, "pick_device", {"auto": "cpu", "far": "meta"}.get)
    assert not command() and not command("--device", "far")
    assert devices == ["cpu", "cpu", "meta"]
    for cuda, mps, first in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device("auto") == first


def test_the_tasks_are_the_zero_shot_ones_or_those_asked_for(command, monkeypatch, capsys):
    run = []
    monkeypatch.setattr(evaluation, "evaluate", lambda model, tokenizer, settings, tasks,
                        strict=False: run.append((list(tasks), strict)))
    assert not command() and not command("--task", "finetuned", "retrieval")
    assert run == [(list(ZERO_SHOT), False), (["finetuned", "retrieval"], True)]
    assert list(ZERO_SHOT) == ["zero-shot", "retrieval", "captioning"]
    assert command("--task", "nonsense") == 2
    assert command("--image", "x.png", "--task", "retrieval") == 2
    assert command("--image", "x.png", "--data", "shapes") == 2
    assert "--image looks at these pictures only" in capsys.readouterr().err


def test_json_never_goes_over_a_file_or_nowhere_and_this_is_said_first(command, monkeypatch, capsys):
    assert not command("--task", "retrieval", "--json", "scores.json")
    before = Path("scores.json").read_text()
    assert json.loads(before)["image to text R@1"]["chance"] > 0
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: pytest.fail("work"))
    for name, why in (("scores.json", "is there already"), ("none/x.json", "cannot be made")):
        assert command("--json", name) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert Path("scores.json").read_text() == before
    refused("scores.json: cannot be written", evaluation.write_new, "scores.json", "{}")


def test_images_are_captioned_unless_the_model_never_learned_to_write(command, capsys):
    assert not command("--image", "x.png", "--json", "captions.json")
    text = json.loads(Path("captions.json").read_text())["x.png"]
    assert capsys.readouterr().out == f"x.png: {text}\n"
    model, tokenizer, _ = load_checkpoint("checkpoint.pt")
    assert text == evaluation.caption(model, tokenizer, np.zeros((1, 3, 8, 8), np.uint8))[0]
    assert not command("--image", "x.png", lambda_cap=0.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "--lambda-cap 0" in captured.err
