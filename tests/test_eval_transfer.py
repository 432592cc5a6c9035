"""What learns a classifier, the tasks as a whole, and eval.py's command line."""
import json
import math
import os
import pickle
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import CONTROL, Bomb, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toys import record_lessons, same_tensors, save_checkpoint, toy_checkpoint

import eval as evaluation
from coca import AttentionalPooler
from data import Dataset, DoesNotApply, UserError, load, to_model
from eval import (
    FINETUNED,
    FROZEN,
    TASKS,
    Classifier,
    Learner,
    Recipe,
    accuracy,
    evaluate,
    image_tokens,
    load_checkpoint,
    transfer,
    write_new,
)

# The classifier


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_a_classifier_pools_by_one_query_that_sees_no_pads_or_reads_the_mean(seed, real, pads):
    torch.manual_seed(seed)
    tokens = torch.randn(2, real + pads, 8, dtype=torch.float64)
    mask = (torch.arange(real + pads) < real).expand(2, 1, 1, -1)
    pooled = Classifier(8, 2, 5).double()
    assert pooled.pooler.query.shape == (1, 8)
    expected = pooled.linear(pooled.pooler(tokens[:, :real])[:, 0])
    torch.testing.assert_close(pooled(tokens[:, :real]), expected)
    torch.testing.assert_close(pooled(tokens, mask), expected)
    with fails:  # control: pads that are not masked
        torch.testing.assert_close(pooled(tokens), expected)
    probe = Classifier(8, 2, 5, pooled=False).double()
    assert [name for name, _ in probe.named_parameters()] == ["linear.weight", "linear.bias"]
    torch.testing.assert_close(probe(tokens), probe.linear(tokens.mean(1)))


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
    """Two logits whatever it reads. It notes which rows it read, and its first logit then."""

    trained = []  # of the class: copies write there, too
    scored = []

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.trained.clear()
        self.scored.clear()

    def forward(self, rows):
        record = self.trained if torch.is_grad_enabled() else self.scored
        record.append((rows.tolist(), self.logits[0].item()))
        return 10 * self.logits.expand(len(rows), -1)  # steep enough to be clipped


def run_probe(**how):
    """Learns rows 0 to 39, all of class 0; tested on rows 100 to 109, three of class 1."""
    train = (torch.arange(40),), torch.zeros(40, dtype=torch.long)
    test = (torch.arange(100, 110),), torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 0, 0])
    recipe = Recipe(**{"steps": 40, "batch": 8, **how})
    model = CONTROL.model()
    probe = Probe()
    torch.seed()  # another each time, without effect
    learner, score = transfer(model, lambda model, rows: (rows,), probe, train, test, recipe,
                              "probe")
    return probe, learner, score


def test_what_is_learned_from_is_the_training_set_and_what_is_scored_the_test_set():
    probe, _, score = run_probe()
    assert score == pytest.approx(0.7)
    batches = [rows for rows, _ in probe.trained]
    assert len(batches) == 40 and {len(rows) for rows in batches} == {8}
    assert set(sum(batches, [])) == set(range(40))
    assert [rows for rows, _ in probe.scored] == [list(range(100, 110))]
    run_probe()
    assert [rows for rows, _ in probe.trained] == batches  # the same every time


def test_many_inputs_are_scored_each_by_its_own_label():
    rows = torch.arange(600)
    likely = torch.eye(3).repeat(200, 1)
    learner = Learner(CONTROL.model(), lambda model, rows: (rows,), lambda rows: likely[rows])
    assert accuracy(learner, ((rows,), rows % 3)) == 1
    assert accuracy(learner, ((rows,), rows // 256 % 3)) == pytest.approx(200 / 600, abs=0.01)


def test_scored_is_the_average_of_the_last_weights():
    for encoder_lr in (0.0, 1e-3):
        probe, learner, _ = run_probe(lr=1e-3, encoder_lr=encoder_lr)
        logits = [logit for _, logit in probe.trained]
        assert logits[-10] < probe.scored[0][1] < logits[-1]  # the last weights are beyond
        assert learner.classifier.logits[0] == probe.scored[0][1]


@pytest.mark.parametrize("smoothing", [0.2, 0.5])
def test_targets_are_smoothed(smoothing):
    probe, _, _ = run_probe(lr=0.1, steps=300, smoothing=smoothing)
    learned = (10 * probe.logits).softmax(0)[0].item()
    assert learned == pytest.approx(1 - smoothing / 2, abs=0.01)  # of two classes


def test_the_rate_warms_up_and_falls_to_zero_by_a_cosine_and_gradients_are_clipped_to_norm_1():
    steps = []

    def record(optimizer, args, named):
        group, = optimizer.param_groups
        steps.append((group["lr"], group["weight_decay"], group["params"][0].grad.norm().item()))

    handle = register_optimizer_step_pre_hook(record)
    run_probe(lr=1e-3, warm_up=10, weight_decay=0.5)
    handle.remove()
    expected = []
    for t in range(40):
        rate = 1e-3 * min(1, (t + 1) / 10) * (1 + math.cos(math.pi * t / 40)) / 2
        expected.append((pytest.approx(rate), 0.5, pytest.approx(1)))
    assert steps == expected


@pytest.mark.parametrize("lr, encoder_lr, moved", [
    (1e-2, 1e-2, ["encoder", "generative_pooler"]), (0.0, 1e-2, ["encoder"]),
    (1e-2, 1e-30, ["generative_pooler"]), (1e-2, 0.0, []), (0.0, 0.0, [])])
def test_the_encoder_learns_at_its_own_rate_and_the_model_given_stays(lr, encoder_lr, moved):
    """Learned is to tell dark from bright images. A frozen model is read, not copied."""
    read_from = []

    def read(model, images):
        read_from.append(model)
        return (model.generative_pooler(model.encoder(to_model(images))),)

    labels = torch.arange(40) % 2
    noise = torch.randint(0, 60, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pairs = ((noise + 150 * labels[:, None, None, None]).to(torch.uint8),), labels
    torch.manual_seed(0)
    model = CONTROL.model()
    classifier = Classifier(16, 2, 2)
    weight = classifier.linear.weight.detach().clone()
    recipe = Recipe(lr=lr, encoder_lr=encoder_lr, steps=40, batch=8)
    learner, score = transfer(model, read, classifier, pairs, pairs, recipe, "toy")
    before = CONTROL.model().state_dict()
    changed = {name.split(".")[0] for name, p in read_from[0].state_dict().items()
               if not torch.equal(p, before[name])}
    assert sorted(changed) == moved
    assert torch.equal(classifier.linear.weight, weight) == (lr == 0)
    assert (score == 1.0) == (lr + encoder_lr > 0)
    assert accuracy(learner, pairs) == score
    assert accuracy(learner, (pairs[0], 1 - labels)) == pytest.approx(1 - score)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert (learner.model is model) == (not encoder_lr)
    assert same_tensors(learner.model, model) == (not moved)


# Tasks


def test_the_recipes_are_those_of_table_9_but_for_steps_and_batch():
    table = Recipe(lr=5e-4, warm_up=0, weight_decay=0.01, steps=0, batch=0)
    assert replace(FROZEN, steps=0, batch=0) == replace(table, encoder_lr=0.0, smoothing=0.2)
    assert replace(FINETUNED, steps=0, batch=0) == replace(table, encoder_lr=5e-4, smoothing=0.5)


def test_frozen_and_finetuned_learn_labelled_images_and_are_scored_on_others(monkeypatch):
    model, tokenizer, settings = toy_checkpoint()
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), np.uint8)
    parts = {"labelled": Dataset(images[:3], [], np.array([0, 1, 1]), ["a", "b"]),
             "labelled-val": Dataset(images[3:], [], np.array([0, 0, 1, 0]), ["a", "b"])}
    monkeypatch.setattr(evaluation, "load_split", lambda model, s, split: parts[split])
    lessons = record_lessons(monkeypatch, evaluation)
    scores = TASKS["frozen"](model, tokenizer, settings)
    scores.update(TASKS["finetuned"](model, tokenizer, settings))
    assert list(scores) == ["frozen, linear probe", "frozen, new pooler", "finetuned"]
    assert set(scores.values()) == {(0.125, 0.75)}  # chance is of the test set's labels
    assert [lesson.recipe for lesson in lessons] == [FROZEN, FROZEN, FINETUNED]
    for lesson in lessons:
        assert lesson.model is model and lesson.read is image_tokens
        for split, used in (("labelled", lesson.train), ("labelled-val", lesson.test)):
            (images,), labels = used
            assert np.array_equal(images, parts[split].images)
            assert labels.tolist() == parts[split].labels.tolist()
    probe, frozen, finetuned = [lesson.classifier for lesson in lessons]
    assert probe.pooler is None
    for pooler in (frozen.pooler, finetuned.pooler):
        assert isinstance(pooler, AttentionalPooler) and pooler is not model.contrastive_pooler
    assert torch.equal(finetuned.linear.weight, frozen.linear.weight)  # of the same seed
    TASKS["finetuned"](model, tokenizer, {**settings, "seed": 1})
    assert not torch.equal(finetuned.linear.weight, lessons[-1].classifier.linear.weight)


def test_data_are_of_the_checkpoints_seed_and_the_models_size():
    model, _, settings = toy_checkpoint()
    for seed in (0, 5):
        found = evaluation.load_split(model, {**settings, "seed": seed}, "val")
        assert np.array_equal(found.images, load("shapes", split="val", size=8, seed=seed).images)


def test_a_run_with_data_of_its_own_is_scored_on_them():
    def own(s, split):
        return s["seed"], s["image_size"], split

    model, _, settings = toy_checkpoint()
    settings.update(load_data=own, image_size=64)  # the model's is 8
    assert evaluation.load_split(model, settings, "zeroshot") == (0, 8, "zeroshot")


def fixed(model, tokenizer, settings):
    assert not model.training and not torch.is_grad_enabled()
    return {"toy R@1": (0.5, 0.25), "toy R@5": (np.float64(0.875), 0.75), "CIDEr-D": (1.5, 0)}


def elsewhere(model, tokenizer, settings):
    raise DoesNotApply("it is for something else")


def broken(model, tokenizer, settings):
    raise UserError("a.png: no such file")


def test_scores_are_printed_with_chance_and_seconds(capsys):
    model, tokenizer, settings = toy_checkpoint()
    scores = evaluate(model, tokenizer, {**settings, "val_from_train": 500}, {"fixed": fixed})
    assert json.loads(json.dumps(scores)) == {"toy R@1": {"score": 0.5, "chance": 0.25},
                                              "toy R@5": {"score": 0.875, "chance": 0.75},
                                              "CIDEr-D": {"score": 1.5, "chance": 0.0}}
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("shapes, 500 training images kept apart ")
    assert head.split()[-3:] == ["score", "chance", "seconds"]
    assert first.split()[:-1] == ["toy", "R@1", "50.00%", "25.00%"]
    assert 0 <= float(first.split()[-1]) < 9
    assert second.split() == ["CIDEr-D", "1.500", "0.000"]
    evaluate(model, tokenizer, settings, {})
    assert capsys.readouterr().out.split() == ["shapes", "score", "chance", "seconds"]


def test_a_task_that_does_not_apply_is_left_out_and_refused_only_where_it_was_asked_for(capsys):
    tasks = {"elsewhere": elsewhere, "fixed": fixed}
    for how, noted in ((dict(), "note: elsewhere left out: it is for something else\n"),
                       (dict(notes=False), "")):
        assert len(evaluate(*toy_checkpoint(), tasks, **how)) == 3  # the other one's
        assert capsys.readouterr().err == noted
    with pytest.raises(UserError, match="^elsewhere: it is for something else$") as error:
        evaluate(*toy_checkpoint(), tasks, strict=True)
    assert error.type is UserError
    for strict in (False, True):  # control: what is wrong is never left out
        refused("^a.png: no such file$", evaluate, *toy_checkpoint(), {"x": broken}, strict=strict)


@pytest.mark.parametrize("task, changes, data, message", [
    ("zero-shot", dict(lambda_con=0.0), "shapes", "--lambda-con 0"),
    ("retrieval", dict(lambda_con=0.0), "shapes", "--lambda-con 0"),
    ("captioning", dict(lambda_cap=0.0), "shapes", "--lambda-cap 0"),
    ("zero-shot", {}, "coco", "coco has no classes"), ("frozen", {}, "captions", "no classes"),
    ("finetuned", {}, "coco", "no classes")])
def test_a_task_that_a_checkpoint_or_its_data_do_not_fit_does_not_apply(
        task, changes, data, message):
    model, tokenizer, settings = toy_checkpoint(**changes)
    with pytest.raises(DoesNotApply, match=message):
        TASKS[task](model, tokenizer, {**settings, "data": data})


def test_images_without_classes_cannot_be_classified(monkeypatch):
    model, tokenizer, settings = toy_checkpoint()
    data = Dataset(np.zeros((2, 3, 8, 8), np.uint8), [["a ring"]] * 2)
    monkeypatch.setattr(evaluation, "load_split", lambda model, s, split: data)
    for task in ("zero-shot", "frozen", "finetuned"):
        with pytest.raises(DoesNotApply, match="no classes"):
            TASKS[task](model, tokenizer, settings)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py on a toy checkpoint in a folder with cifar-a and cifar-b -> its exit status."""
    monkeypatch.chdir(tmp_path)
    for folder, labels in (("cifar-a", [0, 0, 0, 1]), ("cifar-b", [0, 1])):
        batch = {"labels": labels, "data": np.zeros((len(labels), 3072), np.uint8)}
        Path(folder).mkdir()
        for name, content in (("batches.meta", {"label_names": ["ring", "bar"]}),
                              ("data_batch_1", batch), ("test_batch", batch)):
            Path(folder, name).write_bytes(pickle.dumps(content))

    def call(*flags, settings=()):
        model, tokenizer, defaults = toy_checkpoint()
        save_checkpoint("checkpoint.pt", model, tokenizer, {**defaults, **dict(settings)})
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
    for file, count in (("cifar.json", 1 + 2 + 1), ("shapes.json", 1 + 6 + 7)):
        scores = json.loads(Path(file).read_text())
        assert len(scores) == count
        for values in scores.values():
            assert list(values) == ["score", "chance"]
            assert 0 <= values["score"] <= 1 and 0 <= values["chance"] <= 1


def test_data_and_their_folder_are_the_checkpoints_or_those_of_the_flags(command, capsys):
    trained_on_a = dict(data="cifar10", data_dir="cifar-a")
    for flags, settings, chance in (
            ("", trained_on_a, "75.00%"), ("--data-dir cifar-b", trained_on_a, "50.00%"),
            ("--data cifar10", trained_on_a, "75.00%"),
            ("--data cifar10 --data-dir cifar-b", {}, "50.00%"),
            ("--data-dir cifar-a", {**trained_on_a, "val_from_train": 1}, "100.00%"),
            ("--data cifar10", {**trained_on_a, "val_from_train": 1}, "100.00%"),
            ("--data cifar10 --data-dir cifar-a", {"val_from_train": 1}, "75.00%")):
        assert not command("--task", "zero-shot", *flags.split(), settings=settings)
        assert capsys.readouterr().out.splitlines()[1].split()[-2] == chance
    args = evaluation.parse_args(["checkpoint.pt", "--data", "cifar100"])
    checkpoint = dict(settings={**trained_on_a, "val_from_train": 1, "seed": 5})
    other = dict(data="cifar100", data_dir=None, val_from_train=0, seed=5)  # not in cifar-a
    assert evaluation.settings_of(args, checkpoint) == {**other, "trained_on": "cifar10"}
    assert checkpoint["settings"]["data"] == "cifar10"  # as it was


@pytest.mark.parametrize("settings, flags, name", [
    (dict(data="cifar10", data_dir="cifar-a"), "", "top-1 by prompts, supervised"),
    (dict(data="cifar10", data_dir="cifar-a"), "--data-dir cifar-b", "top-1 by prompts, supervised"),
    ({}, "--data cifar10 --data-dir cifar-a", "zero-shot top-1"),  # learned from something else
    (dict(data="coco", data_dir="x"), "--data cifar10 --data-dir cifar-a", "zero-shot top-1"),
])
def test_classes_that_were_learned_are_not_called_zero_shot(settings, flags, name, command, capsys):
    assert not command("--task", "zero-shot", *flags.split(), settings=settings)
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{name}  ")


@pytest.mark.parametrize("task", ["", "--task zero-shot"])
def test_data_that_are_gone_or_broken_end_eval_py_with_one_line(task, command, monkeypatch, capsys):
    command("--task", "nonsense")  # makes the checkpoint
    Path("broken").mkdir()
    for file in Path("cifar-a").iterdir():
        Path("broken", file.name).write_bytes(file.read_bytes())
    Path("broken/test_batch").write_bytes(file.read_bytes()[:100])

    def run(data, folder):
        flags = f"--data {data} --data-dir {folder} {task}"
        monkeypatch.setattr(sys, "argv", ["eval.py", "checkpoint.pt", *flags.split()])
        runpy.run_path(evaluation.__file__, run_name="__main__")

    for data, folder, message in (
            ("cifar10", "gone", "error: --data-dir gone: no such folder"),
            ("cifar10", "broken", "error: broken/test_batch: not a CIFAR file, or damaged"),
            ("cifar100", "cifar-a", "error: cifar-a/test: no such file")):
        with pytest.raises(SystemExit) as end:
            run(data, folder)
        assert end.value.code.startswith(message) and "\n" not in end.value.code  # so status 1
    capsys.readouterr()
    run("cifar10", "cifar-a")  # control
    assert "zero-shot top-1" in capsys.readouterr().out


def test_tasks_and_device_are_those_asked_for(command, monkeypatch):
    with pytest.raises(UserError, match="^--device abacus: cannot be used here .*; leave it out$"):
        command("--device", "abacus")
    run = []

    def record(model, tokenizer, settings, tasks, strict=False):
        run.append((evaluation.device_of(model).type, list(tasks), strict))

    monkeypatch.setattr(evaluation, "evaluate", record)
    monkeypatch.setattr(evaluation, "pick_device", {"auto": "cpu", "far": "meta"}.get)
    assert not command() and not command("--device", "far", "--task", "finetuned", "retrieval")
    assert run == [("cpu", ["zero-shot", "retrieval", "captioning"], False),
                   ("meta", ["finetuned", "retrieval"], True)]
    assert command("--task", "nonsense") == 2


def test_the_accelerator_that_can_be_used_is_taken_or_the_cpu(monkeypatch):
    cuda, mps = torch.device("cuda"), torch.device("mps")
    for found, name in ((cuda, "cuda"), (mps, "mps"), (None, "cpu")):
        def current(check_available=False, found=found):
            return found if check_available else cuda

        monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
        assert evaluation.pick_device("auto") == name
    assert evaluation.pick_device("cpu") == "cpu"


def test_json_goes_over_no_file_and_not_nowhere_as_is_said_first(command, monkeypatch, capsys):
    assert not command("--task", "retrieval", "--json", "scores.json")
    before = Path("scores.json").read_text()
    Path("link.json").symlink_to("nothing")
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda path: pytest.fail("work"))
    for name, why in (("scores.json", "is there already"), ("link.json", "is there already"),
                      ("none/x.json", "cannot be made"), ("scores.json/x.json", "cannot be made")):
        assert command("--json", name) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    refused("^scores.json is there already and stays as it is", write_new, "scores.json", "{}")
    refused("^link.json is there already", write_new, "link.json", "{}")
    assert Path("scores.json").read_text() == before and not Path("nothing").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    write_new(tmp_path / "a.json", "{\udcff}")  # control
    assert (tmp_path / "a.json").read_text() == "{?}"
    monkeypatch.setattr(os, "fsync", full)
    refused("b.json: cannot be written .No space left", write_new, tmp_path / "b.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# Checkpoints


def test_a_checkpoint_that_lacks_something_is_one_line_with_its_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    model, tokenizer, settings = toy_checkpoint()
    save_checkpoint(path, model, tokenizer, settings)
    whole = torch.load(path, weights_only=True)
    said = "checkpoint.pt: not a checkpoint of this version"
    assert same_tensors(load_checkpoint(path)[0], model)  # control
    for name in whole:
        torch.save({entry: whole[entry] for entry in whole if entry != name}, path)
        refused(f"{said}.*'{name}'", load_checkpoint, path)
    for name in ("log_temperature", max(whole["model"], key=len)):
        tensors = {entry: whole["model"][entry] for entry in whole["model"] if entry != name}
        torch.save({**whole, "model": tensors}, path)
        refused(f"{said}.*{name}", load_checkpoint, path)
    for changes, message in ((dict(format=2), "format 2, and this version reads 3"),
                             (dict(model=Bomb()), "UnpicklingError")):  # loading runs no code
        torch.save({**whole, **changes}, path)
        refused(f"{said}.*{message}", load_checkpoint, path)
    path.write_bytes(path.read_bytes()[:1000])
    refused(said, load_checkpoint, path)


def test_the_folder_of_a_run_means_its_checkpoint(tmp_path):
    model, tokenizer, settings = toy_checkpoint()
    refused(f"^{tmp_path}/checkpoint.pt: no such checkpoint", load_checkpoint, str(tmp_path))
    refused("^none: no such checkpoint", load_checkpoint, "none")
    save_checkpoint(tmp_path / "checkpoint.pt", model, tokenizer, settings)
    for path in (str(tmp_path), tmp_path / "checkpoint.pt"):
        loaded, its_tokenizer, checkpoint = load_checkpoint(path)
        assert same_tensors(loaded, model) and its_tokenizer.words == tokenizer.words
        assert checkpoint["settings"] == settings
