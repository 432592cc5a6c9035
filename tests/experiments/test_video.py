"""Videos: which clips there are, which of their frames count, who learns from what."""
import pickle
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, Bomb, counting, fails, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toys import (
    SPECIAL,
    WORDS,
    drawn_by,
    record_lessons,
    same_tensors,
    toy_checkpoint,
    write_clips,
)

from data import Dataset, held_out, to_model
from experiments import video
from experiments.video import VideoClassifier, moving_shapes, own_clips, read_clip
from train import new_model

# Frames


@given(st.integers(1, 40), st.integers(2, 20))
def test_frames_are_sampled_uniformly_from_first_to_last(count, frames):
    chosen = video.sample_frames(count, frames)
    assert len(chosen) == frames
    assert np.abs(chosen - np.arange(frames) * (count - 1) / (frames - 1)).max() <= 0.5


def mean_of_frames(model, clips):
    """clips (N, T, 3, S, S) -> (N, E), from the definition."""
    frames = [model.encode_image(to_model(torch.from_numpy(clip))) for clip in clips]
    return F.normalize(torch.stack(frames).mean(1), dim=-1)


@torch.no_grad()
def test_videos_are_retrieved_by_the_mean_of_16_of_their_24_frames(monkeypatch):
    asked = []
    monkeypatch.setattr(video, "retrieval", lambda *args: asked.append(args))
    video.video_retrieval_task(*toy_checkpoint())
    (embedding, model, _, captions, what), = asked
    assert len(embedding) == 200 and what == "video"
    data, _ = moving_shapes("labelled-val", 8, 200, 0, 24)
    assert captions == data.captions
    chosen = data.images[:5, np.linspace(0, 23, 16).round().astype(int)]
    torch.testing.assert_close(embedding[:5], mean_of_frames(model, chosen))
    with fails:  # control: of other frames
        torch.testing.assert_close(embedding[:5], mean_of_frames(model, chosen[:, ::2]))


@torch.no_grad()
def test_each_frame_goes_alone_through_the_encoder_and_through_no_pretrained_pooler():
    model = CONTROL.model()
    clips = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    tokens, = video.clip_tokens(model, clips)
    frames = torch.stack([model.encoder(to_model(clip)) for clip in clips])
    torch.testing.assert_close(tokens, frames)
    with fails:  # control
        torch.testing.assert_close(tokens, frames.flip(1))


def check_order(seed, frames, embedded):
    torch.manual_seed(seed)
    classifier = VideoClassifier(8, 2, 5, embedded).double()
    clips = torch.randn(3, frames, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(classifier(clips), classifier(clips.roll(1, dims=1)))


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_without_a_temporal_embedding_the_order_of_frames_changes_nothing(seed, frames):
    check_order(seed, frames, embedded=0)
    with fails:  # control
        check_order(seed, frames, embedded=frames)


# Clips


def test_generated_clips_show_their_label_and_its_direction_only_in_order():
    pictures, (what, where) = drawn_by(video, moving_shapes, "labelled", 1, 30, frames=4)
    x = np.array([things[0].x for things in pictures]).reshape(30, 4)
    assert (np.sign(np.diff(x)) == np.where(where.labels, 1, -1)[:, None]).all()
    assert set(where.labels) == {0, 1}
    from_middle = x - x.mean(1, keepdims=True)
    np.testing.assert_allclose(from_middle, -from_middle[:, ::-1])  # as far on both sides
    assert ((x < 0.5) == (x[:, :1] < 0.5)).all()  # the caption's corner stays true
    for text, label in zip(what.captions, what.labels):
        assert what.classes[label] in text[0]


def test_own_clips_are_read_from_folders_and_arrays_but_not_hidden_files_or_empty_classes(tmp_path):
    write_clips(tmp_path, run=12, walk=12)
    for place in (".git", "jump"):
        (tmp_path / place).mkdir()
    for place in (".DS_Store", "notes.txt", "jump/.DS_Store", "run/.DS_Store", "run/clip0/.DS_Store"):
        (tmp_path / place).write_text("?")
    train, test = own_clips(tmp_path, 8, 4)
    assert set(test.names) == held_out(train.names + test.names)
    assert len(train) + len(test) == 24 and len(test) > 0
    for part in (train, test):
        assert part.classes == ["run", "walk"]
        assert part.images.shape[1:] == (4, 3, 8, 8)
        for clip, label, name in zip(part.images, part.labels, part.names):
            assert clip.min() == clip.max() and (clip[0, 0, 0, 0] >= 100) == label
            assert name.startswith(part.classes[label])


def test_the_middle_of_a_wide_clip_is_kept(tmp_path):
    clip = np.zeros((2, 8, 24, 3), np.uint8)
    clip[:, :, 8:16] = 255
    np.save(tmp_path / "x.npy", clip)
    assert (read_clip(tmp_path / "x.npy", 8, 3) == 255).all()


def test_frame_2_comes_before_frame_10(tmp_path):
    for i in range(1, 13):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"frame{i}.png")
    assert read_clip(tmp_path, 8, 12)[:, 0, 0, 0].tolist() == list(range(10, 130, 10))


@pytest.mark.parametrize("break_it, message", [
    (lambda run: (run / "empty").mkdir(), "a clip without frames"),
    (lambda run: (run / "x.mp4").write_bytes(b"film"), "x.mp4.*folder of frames"),
    (lambda run: np.save(run / "x.npy", np.zeros((3, 8, 8), np.uint8)), r"\(3, 8, 8\)"),
    (lambda run: np.save(run / "x.npy", np.array([{}], object)), "x.npy: .*Python objects"),
    (lambda run: (run / "x.npy").write_bytes(b"\x93NUMPY"), "x.npy: EOF"),
    (lambda run: (run / "x.npy").write_bytes(pickle.dumps(Bomb())), "x.npy: "),
    (lambda run: (run / "clip0" / "0.png").write_bytes(b"no"), "not a readable image"),
    (lambda run: (run / "clip0.npy").mkdir() or run.rename(run.parent / ".run"), "1 classes with"),
    (lambda run: run.parent.rename(run.parent.with_name("gone")), "0 classes with clips")],
    ids=["empty", "mp4", "flat", "objects", "cut off", "bomb", "bad frame", "one class", "nowhere"])
def test_bad_clips_are_one_clear_line(tmp_path, break_it, message):
    break_it(write_clips(tmp_path / "clips", run=3, walk=3) / "run")
    refused(message, own_clips, tmp_path / "clips", 8, 4)


# The task


def lessons_of(patch, clips=None):
    """-> the pretrained model, {what: its lesson}, {what: (score, chance)}."""
    model, tokenizer, settings = toy_checkpoint()
    lessons = record_lessons(patch, video)
    with torch.no_grad():
        found = video.video_task(model, tokenizer, settings, clips)
    return model, dict(zip(found, lessons, strict=True)), found


def mine(folder):
    return own_clips(write_clips(folder, jump=4, run=24, walk=9), 8)


def test_frozen_is_frozen_finetuned_is_finetuned_and_all_see_as_many_clips(monkeypatch):
    model, lessons, _ = lessons_of(monkeypatch)
    for what, lesson in lessons.items():
        assert lesson.recipe.lr > 0
        assert (lesson.recipe.encoder_lr > 0) == (what in ("video, finetuned", "video, from scratch"))
        assert (lesson.model is model) == (what != "video, from scratch")
        assert lesson.recipe.steps * lesson.recipe.batch == 4800
    having = [what for what, lesson in lessons.items() if lesson.classifier.time is not None]
    assert having == ["video order, frozen, temporal embedding"]
    assert lessons[having[0]].classifier.time.shape == (8, 1, 16)


@pytest.mark.parametrize("own", [False, True])
def test_from_scratch_starts_as_train_py_starts(monkeypatch, tmp_path, own):
    model, lessons, _ = lessons_of(monkeypatch, mine(tmp_path) if own else None)
    lesson = lessons["video, from scratch"]
    frames = lesson.train[0][0].flatten(0, 1).numpy()
    some = frames[::-(-len(frames) // 256)]
    settings = SimpleNamespace(**asdict(model.config), seed=0, fresh=[])
    started = []
    for photographs in (False, True):
        # With as many words: they are drawn, too
        data = Dataset(some, [[" ".join(WORDS[4:])]], augment=photographs)
        started.append(new_model(settings, data)[0].encoder)
    assert same_tensors(lesson.model.encoder, started[own])
    for other in (started[not own], model.encoder):
        assert not same_tensors(lesson.model.encoder, other)


@torch.no_grad()
def check_lesson(lesson, data, test):
    """It learns data and is scored on test, by their pixels or by their tokens."""
    for ((clips,), labels), expected in ((lesson.train, data), (lesson.test, test)):
        images = torch.from_numpy(expected.images)
        if lesson.read is video.clip_tokens:
            assert torch.equal(clips, images)
        else:
            tokens = video.clip_tokens(lesson.model, images)
            torch.testing.assert_close(lesson.read(lesson.model, clips), tokens)
            assert not lesson.recipe.encoder_lr  # (else the encoder would not learn)
        assert np.array_equal(labels, expected.labels)
    assert lesson.classifier.linear.out_features == len(data.classes)


def test_the_frozen_encoder_sees_each_clip_once_for_both_tasks_of_order(monkeypatch):
    with counting((video, "clip_tokens")) as (encode,):
        _, lessons, _ = lessons_of(monkeypatch)
    seen = sum(len(call.args[1]) for call in encode.call_args_list)
    assert seen == 300 + 1000  # to learn from and to be tested on, the latter in both directions
    for what, lesson in lessons.items():
        assert (lesson.read is video.as_encoded) == what.startswith("video order")


def test_generated_clips_are_learned_from_and_others_tested(monkeypatch):
    _, lessons, found = lessons_of(monkeypatch)
    learned = moving_shapes("labelled", 8, 300, 0, 8)
    tested = moving_shapes("labelled-val", 8, 1000, 0, 8)
    assert not np.array_equal(learned[0].images[0], tested[0].images[0])
    most = np.bincount(tested[0].labels).max() / 1000
    for what in ("video, frozen", "video, finetuned", "video, from scratch"):
        check_lesson(lessons[what], learned[0], tested[0])
        assert found[what] == (0.125, most)
    both_ways = Dataset(np.concatenate([tested[1].images, tested[1].images[:, ::-1]]), [],
                        np.concatenate([tested[1].labels, 1 - tested[1].labels]))
    for what in ("video order, frozen", "video order, frozen, temporal embedding"):
        check_lesson(lessons[what], learned[1], both_ways)
        assert found[what] == (0.125, 0.5)


def test_own_clips_are_learned_and_chance_is_the_commonest_class_of_the_tested(monkeypatch, tmp_path):
    data, test = mine(tmp_path)
    _, lessons, found = lessons_of(monkeypatch, (data, test))
    assert list(lessons) == ["video, frozen", "video, finetuned", "video, from scratch"]
    commonest = max(test.labels.tolist().count(label) for label in range(3)) / len(test)
    assert commonest not in (1 / 2, 1 / 3) and data.images.shape[1] == 8
    for what, lesson in lessons.items():
        check_lesson(lesson, data, test)
        assert found[what] == (0.125, commonest)


@pytest.mark.parametrize("changes, message", [
    (dict(lambda_con=0.0), "-con 0"), (dict(words=[*SPECIAL, "red", "ring"]), "lacks words")])
def test_retrieval_needs_embeddings_and_the_words_of_scenes(changes, message):
    refused(message, video.video_retrieval_task, *toy_checkpoint(**changes))
