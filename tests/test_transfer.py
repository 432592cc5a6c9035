"""What a task learns, videos, questions, the tasks: frozen is frozen, answers are right."""
import dataclasses
import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, cases, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data as data_file
import eval as evaluation
from coca import BEGIN, END, Classifier, CoCa
from data import ANSWERS, COLOURS, SHAPES, Dataset, Tokenizer, own_clips, to_model
from eval import TASKS, Recipe, decoder_states, evaluate, image_tokens, print_scores, transfer

# The classifier


def filled_classifier(seed, **how):
    torch.manual_seed(seed)
    return Classifier(8, 2, 5, **how).double()


def check_order(frames, classifier):
    clips = torch.randn(3, frames, 4, 8, dtype=torch.float64)  # (classifier has seeded torch)
    torch.testing.assert_close(classifier(clips), classifier(clips.roll(1, dims=1)))


@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_without_a_temporal_embedding_the_order_of_frames_changes_nothing(seed, frames, pooled):
    check_order(frames, filled_classifier(seed, pooled=pooled))
    with fails:  # control
        check_order(frames, filled_classifier(seed, frames=frames))


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_pads_do_not_reach_the_classifier(seed, real, pads):
    classifier = filled_classifier(seed)
    tokens = torch.randn(2, real + pads, 8, dtype=torch.float64)
    valid = (torch.arange(real + pads) < real).expand(2, -1)
    expected = classifier(tokens[:, :real])
    torch.testing.assert_close(classifier(tokens, valid), expected)
    with fails:  # control: pads that are not masked
        torch.testing.assert_close(classifier(tokens), expected)


@torch.no_grad()
def check_image_tokens(read):
    model = CONTROL.model()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(read(model, images)[0], model.encoder(to_model(images)))


def test_frozen_and_finetuned_classifiers_read_the_encoder_and_no_pretrained_pooler():
    check_image_tokens(image_tokens)
    with fails:  # control: the pooler that was trained with the encoder
        check_image_tokens(lambda model, images: (model.generative_pooler(
            model.encoder(to_model(images))),))


# One loop for all that is learned


def learn(model, recipe):
    """Accuracy of telling dark from bright images."""
    labels = torch.arange(40) % 2
    noise = torch.randint(0, 60, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pairs = ((noise + 150 * labels[:, None, None, None]).to(torch.uint8),), labels
    torch.manual_seed(0)
    return transfer(model, image_tokens, Classifier(16, 2, 2), pairs, pairs, recipe, "toy")


@pytest.mark.parametrize("lr, encoder_lr, learns", [
    (1e-2, 0.0, True), (0.0, 1e-2, True), (0.0, 0.0, False), (0.0, 1e-12, False)])
def test_transfer_learns_at_the_rates_given_and_leaves_the_model_as_it_was(lr, encoder_lr, learns):
    model = CONTROL.model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    recipe = Recipe(lr=lr, encoder_lr=encoder_lr, steps=40, batch=8, smoothing=0.1)
    assert (learn(model, recipe) == 1.0) == learns
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@torch.no_grad()
@given(cases())
def test_what_the_decoder_gives_a_classifier_is_seen_with_the_image_and_says_which_are_pads(case):
    model, tokens = case.model(), case.tokens()
    images = (case.images() * 127.5 + 127.5).to(torch.uint8)
    states, valid = decoder_states(model, images, tokens)
    logits = model(to_model(images), tokens).logits
    torch.testing.assert_close(model.multimodal.head(states), logits)
    assert not torch.allclose(states, decoder_states(model, 255 - images, tokens)[0])
    assert valid.sum(1).tolist() == case.lengths and valid[:, 0].all()


# Video


@given(st.integers(1, 40), st.integers(2, 20))
def test_frames_are_sampled_uniformly_from_first_to_last(count, frames):
    chosen = data_file.sample_frames(count, frames)
    assert len(chosen) == frames
    assert np.abs(chosen - np.arange(frames) * (count - 1) / (frames - 1)).max() <= 0.5


@torch.no_grad()
def test_a_video_embedding_is_the_mean_of_its_frames():
    model = CONTROL.model()
    clips = np.random.default_rng(0).integers(0, 256, (2, 16, 3, 8, 8), np.uint8)
    frames = [model.encode_image(to_model(torch.from_numpy(clip))) for clip in clips]
    mean = F.normalize(torch.stack(frames).mean(1), dim=-1)
    torch.testing.assert_close(evaluation.embed_clips(model, clips), mean)
    with fails:  # control: of other frames
        torch.testing.assert_close(evaluation.embed_clips(model, clips[:, :8]), mean)


def drawn_by(make, *args, **named):
    """The things of all pictures that `make` draws, and what it returns; nothing is painted."""
    pictures = []

    def draw(things, rng, size):
        pictures.append(things)
        return np.zeros((3, 1, 1), np.uint8)

    with mock.patch.object(data_file, "draw", draw):
        made = make(*args, **named)
    return pictures, made


def test_generated_clips_show_their_label_and_its_direction_only_in_order():
    pictures, (what, direction) = drawn_by(data_file.moving_shapes, "labelled", 16, 6, frames=4)
    x = np.array([things[0].x for things in pictures]).reshape(6, 4)
    assert (np.sign(np.diff(x)) == np.where(direction.labels, 1, -1)[:, None]).all()
    assert len(set(direction.labels)) == 2
    assert ((x < 0.5) == (x[:, :1] < 0.5)).all()  # the caption's corner stays true
    for text, label in zip(what.captions, what.labels):
        assert what.classes[label] in text[0]


def write_clips(folder, classes=("run", "walk"), clips=12):
    """Clips of one grey each, arrays and folders of frames in turn."""
    for c, name in enumerate(classes):
        for i in range(clips):
            path = folder / name / f"clip{i}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i % 2:
                np.save(path.with_suffix(".npy"), np.full((5, 12, 8, 3), 100 * c + i, np.uint8))
                continue
            path.mkdir()
            for frame in range(3):
                Image.new("L", (12, 8), 100 * c + i).save(path / f"{frame}.png")
    return folder


def test_own_clips_are_read_from_folders_and_arrays_and_hidden_files_are_ignored(tmp_path):
    write_clips(tmp_path)
    (tmp_path / ".git").mkdir()
    for place in (".DS_Store", "run/.DS_Store", "run/clip0/.DS_Store"):
        (tmp_path / place).write_text("?")
    train, test = own_clips(tmp_path, 8, 4)
    assert train.classes == ["run", "walk"] and len(train) + len(test) == 24 and len(test) > 0
    for part in (train, test):
        assert part.images.shape[1:] == (4, 3, 8, 8)
        for clip, label in zip(part.images, part.labels):
            assert clip.min() == clip.max() and (clip[0, 0, 0, 0] >= 100) == label


def test_the_middle_of_a_wide_clip_is_kept(tmp_path):
    clip = np.zeros((2, 8, 24, 3), np.uint8)
    clip[:, :, 8:16] = 255
    np.save(tmp_path / "x.npy", clip)
    assert (data_file.read_clip(tmp_path / "x.npy", 8, 3) == 255).all()


def test_frame_2_comes_before_frame_10(tmp_path):
    for i in range(1, 13):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"frame{i}.png")
    assert data_file.read_clip(tmp_path, 8, 12)[:, 0, 0, 0].tolist() == list(range(10, 130, 10))


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: (folder / "empty").mkdir(), "a clip without frames"),
    (lambda folder: (folder / "x.mp4").write_bytes(b"film"), "x.mp4.*folder of frames"),
    (lambda folder: np.save(folder / "x.npy", np.zeros((3, 8, 8), np.uint8)), r"\(3, 8, 8\)"),
    (lambda folder: np.save(folder / "x.npy", np.array([{}], object)), "not a readable array"),
    (lambda folder: (folder / "x.npy").write_bytes(b"\x93NUMPY"), "not a readable array"),
    (lambda folder: (folder / "clip0" / "0.png").write_bytes(b"no"), "not a readable image")],
    ids=["empty", "mp4", "flat", "objects", "cut off", "bad frame"])
def test_bad_clips_are_one_clear_line(tmp_path, break_it, message):
    break_it(write_clips(tmp_path) / "run")
    refused(message, own_clips, tmp_path, 8, 4)
    refused("0 classes and 0 clips", own_clips, tmp_path / "nowhere", 8, 4)


# Questions and entailment


def true_answer(things, text):
    left, right = sorted(things, key=lambda thing: thing.x)
    if match := re.fullmatch(r"what colour is the shape (left|right) of the (\w+)", text):
        asked, beside = (left, right) if match[1] == "left" else (right, left)
        assert beside.shape == match[2]
        return asked.colour
    if match := re.fullmatch(r"is there a (\w+) (\w+)", text):
        pairs = [(thing.colour, thing.shape) for thing in things]
        return "yes" if match.groups() in pairs else "no"
    shape = re.fullmatch(r"how many (\w+)", text)[1]
    return str(sum(thing.shape == shape for thing in things))


def test_answers_are_right_and_balanced_and_half_of_a_question_is_not_enough():
    scenes, made = drawn_by(data_file.questions, 1, 3000)
    texts = [text for text, in made.captions]
    answers = np.array([ANSWERS[label] for label in made.labels])
    right = [true_answer(things, text) for things, text in zip(scenes, texts)]
    assert right == answers.tolist()
    assert right != np.roll(answers, 3).tolist()  # control: the answers to other scenes
    for kind, possible in enumerate((list(COLOURS), ["no", "yes"], ["0", "1", "2"])):
        mine, asked = answers[kind::3], np.array(texts[kind::3])
        for answer in possible:
            assert abs((mine == answer).mean() - 1 / len(possible)) < 0.06
        best = 0  # right if each text gets the answer that is best for it on these very questions
        for text in set(asked):
            best += np.unique(mine[asked == text], return_counts=True)[1].max()
        assert best / len(mine) < 1 / len(possible) + 0.2


def test_captions_hold_or_do_not_as_labelled():
    scenes, made = drawn_by(data_file.entailment, 1, 400)
    holds = [text in data_file.describe(things) for things, (text,) in zip(scenes, made.captions)]
    assert holds == list(made.labels.astype(bool)) and 0.4 < np.mean(holds) < 0.6
    for things, (text,), label in zip(scenes, made.captions, made.labels):
        differ = []
        for true in data_file.describe(things):
            differ.append(sum(a != b for a, b in zip(text.split(), true.split())))
        assert min(differ) == 0 if label else 1 <= min(differ) <= 2  # wrong by one property


# Tasks

SPECIAL = ["<pad>", "<begin>", "<end>", "<unk>"]
WORDS = [*SPECIAL, *COLOURS, *SHAPES, *"a small large at the top bottom left right and".split()]


def toy_checkpoint(words=WORDS, **changes):
    torch.manual_seed(0)
    model = CoCa(CONTROL.config(vocab_size=len(words), text_len=32, **changes))
    return model, Tokenizer(words), dict(data="shapes", data_dir=None, seed=0)


@pytest.fixture
def tested(monkeypatch):
    """Tasks learn for two steps only -> the inputs and labels of every test, in order."""
    for name in ("FROZEN", "FINETUNED", "VIDEO_FROZEN", "VIDEO_FINETUNED", "UNDERSTANDING"):
        short = dataclasses.replace(getattr(evaluation, name), steps=2)
        monkeypatch.setattr(evaluation, name, short)
    record = []

    def record_and_transfer(model, read, classifier, train, test, recipe, what):
        record.append(test)
        return transfer(model, read, classifier, train, test, recipe, what)

    monkeypatch.setattr(evaluation, "transfer", record_and_transfer)
    return record


def test_an_example_stands_beside_the_true_caption_that_it_matches(capsys):
    examples = [{"generated": text, "true": ["a and b", "b and a"]} for text in ("b and a", "c")]
    print_scores({"data": "shapes", "captions": examples}, examples=2)
    lines = capsys.readouterr().out.split("\n")[1:]
    assert [line.split(": ")[1] for line in lines if line] == ["b and a", "b and a", "c", "a and b"]


def test_every_task_runs_and_names_its_chance(tested, capsys, tmp_path):
    checkpoint = toy_checkpoint()
    scores = evaluate(*checkpoint, TASKS)
    print_scores(scores)
    out = capsys.readouterr().out
    rows = {name: value for name, value in scores.items() if isinstance(value, dict)}
    assert sum("seconds" in value for value in rows.values()) == len(TASKS)
    for name, value in rows.items():
        assert 0 <= value["chance"] <= 1
        assert name in out or name.endswith(("R@5", "BLEU-1", "BLEU-2", "BLEU-3"))
    order, asked, hidden, silent, _ = tested[-5:]
    (clips,), labels = order  # every clip is there in both directions
    assert torch.equal(clips[:400], clips[400:].flip(1))
    assert torch.equal(labels[:400], 1 - labels[400:])
    assert len(hidden[0][0].unique()) == 1 and torch.equal(hidden[0][1], asked[0][1])
    assert silent[0][1].unique().tolist() == [BEGIN, END]
    assert torch.equal(silent[0][0], asked[0][0])
    own = evaluate(*checkpoint, ["video"], clips=write_clips(tmp_path))
    assert list(own) == ["data", "video, frozen", "video, finetuned", "video, from scratch"]


@pytest.mark.parametrize("task, changes, message", [
    ("zero-shot", dict(lambda_con=0.0), "-con 0"), ("retrieval", dict(lambda_con=0.0), "-con 0"),
    ("video-retrieval", dict(lambda_con=0.0), "-con 0"),
    ("captioning", dict(lambda_cap=0.0), "-cap 0"),
    ("understanding", dict(words=[*SPECIAL, "a"]), "lacks the words"),
    ("zero-shot", dict(), "no classes"), ("frozen", dict(), "no classes")])
def test_a_checkpoint_without_what_a_task_needs_is_one_clear_line(task, changes, message, capsys):
    model, tokenizer, settings = toy_checkpoint(**changes)
    settings["data"] = "shapes" if changes else "coco"
    refused(message, evaluate, model, tokenizer, settings, [task], strict=True)
    assert set(evaluate(model, tokenizer, settings, [task])) == {"data"}
    assert message in capsys.readouterr().err


def test_captions_with_unknown_words_are_never_exactly_right_and_their_share_is_told(monkeypatch):
    texts = [["a zebra runs", "a zebra"], ["a a"]]
    data = Dataset(np.zeros((2, 3, 8, 8), np.uint8), texts)
    monkeypatch.setattr(evaluation, "load", lambda *args, **named: data)
    for words, written, unknown in ((["a"], ["a <unk> <unk>", "a a"], 3 / 7),
                                    (["a", "zebra", "runs"], ["a zebra", "b"], 0)):
        monkeypatch.setattr(evaluation, "caption", lambda *args, written=written: written)
        scores = evaluate(*toy_checkpoint(SPECIAL + words), ["captioning"])
        assert scores["captions exactly right"]["score"] == 0.5  # control: the other is right
        assert scores["unknown words"] == pytest.approx(unknown)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """eval.py on a toy checkpoint in an empty folder -> its exit status."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("x.png")

    def call(*flags, **changes):
        model, tokenizer, settings = toy_checkpoint(**changes)
        file = tmp_path / "checkpoint.pt"
        evaluation.save_checkpoint(file, model, tokenizer, settings=settings, step=0)
        try:
            evaluation.main(["checkpoint.pt", "--device", "cpu", *flags])
        except SystemExit as e:
            return e.code
    return call


def test_json_never_goes_over_a_file_or_nowhere_and_this_is_said_first(
        command, monkeypatch, capsys):
    assert not command("--task", "retrieval", "--json", "scores.json")
    before = Path("scores.json").read_text()
    assert json.loads(before)["image to text R@1"]["chance"] > 0
    monkeypatch.setattr(evaluation, "run_tasks", lambda *args, **named: pytest.fail("work"))
    for name, why in (("scores.json", "is there already"), ("none/x.json", "cannot be made")):
        assert command("--json", name) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert Path("scores.json").read_text() == before


def test_images_are_captioned_unless_the_model_never_learned_to_write(command, capsys):
    assert not command("--image", "x.png")
    assert capsys.readouterr().out.startswith("x.png: ")
    assert not command("--image", "x.png", lambda_cap=0.0)
    captured = capsys.readouterr()
    assert captured.out == "" and "--lambda-cap 0" in captured.err
