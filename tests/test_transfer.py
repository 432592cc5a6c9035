"""Heads, transfer and what is trained: late fusion forgets the order of frames, frozen is frozen, answers are right."""
import dataclasses
import re
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import CONTROL, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data as data_file
import eval as evaluation
import train
from coca import BEGIN, END, PAD, CoCa, CoCaConfig, Head, resize_positions
from data import ANSWERS, COLOURS, SHAPES, DataError, Tokenizer, describe, entailment, moving_shapes, own_clips, questions, sample_frames
from eval import TASKS, Recipe, Unfit, clip_tokens, decoder_states, embed_clips, evaluate, image_tokens, transfer
from train import PARTS, main, part_of

fails = pytest.raises(AssertionError)


def filled_head(seed, classes=5, **how):
    torch.manual_seed(seed)
    return Head(8, 2, classes, **how).double()


# ------------------------------------------------------------------------------------------------
# The head


def check_order(seed, frames, head):
    torch.manual_seed(seed)
    clips = torch.randn(3, frames, 4, 8, dtype=torch.float64)
    order = torch.cat([torch.arange(1, frames), torch.tensor([0])])
    torch.testing.assert_close(head(clips), head(clips[:, order]))
    assert (head(clips).argmax(1) == head(clips[:, order]).argmax(1)).all()


@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_without_a_temporal_embedding_the_order_of_frames_changes_nothing(seed, frames, pooled):
    check_order(seed, frames, filled_head(seed, pooled=pooled))


def test_control_a_temporal_embedding_sees_the_order():
    with fails:
        check_order(0, 4, filled_head(0, frames=4))


def check_pads(seed, real, pads, valid=True):
    torch.manual_seed(seed)
    tokens, head = torch.randn(2, real + pads, 8, dtype=torch.float64), filled_head(seed)
    mask = (torch.arange(real + pads) < real).expand(2, -1)
    torch.testing.assert_close(head(tokens, mask if valid else None), head(tokens[:, :real]))


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4))
def test_pads_do_not_reach_the_head(seed, real, pads):
    check_pads(seed, real, pads)


def test_control_pads_that_are_not_masked_are_caught():
    with fails:
        check_pads(0, 3, 2, valid=False)


def test_a_linear_probe_is_linear_in_the_mean_token():
    head, tokens = filled_head(0, pooled=False), torch.randn(3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(head(tokens), tokens.mean(1) @ head.classifier.weight.T + head.classifier.bias)
    assert not any("pooler" in name for name, _ in head.named_parameters())


# ------------------------------------------------------------------------------------------------
# One loop for all


def toy(case=CONTROL, n=40):
    """Images of one colour, dark or bright, and their label."""
    labels = torch.arange(n) % 2
    noise = torch.randint(0, 60, (n, 3, 8, 8), generator=torch.Generator().manual_seed(case.seed))
    return (((noise + 150 * labels[:, None, None, None]).to(torch.uint8),), labels)


def run_toy(model, recipe, read=image_tokens, inputs=lambda x: x, classes=2, **how):
    (images,), labels = toy()
    torch.manual_seed(0)
    head = Head(16, 2, classes, **how)
    return transfer(model, read, head, (inputs((images,)), labels), (inputs((images,)), labels), recipe, "toy")


@pytest.mark.parametrize("recipe", [Recipe(lr=1e-2, steps=40, batch=8, smoothing=0.1), Recipe(lr=1e-2, encoder_lr=1e-2, steps=20, batch=8)])
def test_transfer_learns_and_leaves_the_model_as_it_was(recipe):
    model = CONTROL.model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert run_toy(model, recipe) == 1.0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with fails:  # control: nothing learned
        assert run_toy(model, dataclasses.replace(recipe, lr=0.0, encoder_lr=recipe.encoder_lr and 1e-12)) == 1.0


def test_frozen_runs_the_model_once_and_finetuning_in_every_step():
    for recipe, calls in ((Recipe(steps=7, batch=8), 2), (Recipe(encoder_lr=1e-3, steps=7, batch=8), 7 + 1)):
        with mock.patch.object(evaluation, "to_model", side_effect=evaluation.to_model) as spy:
            run_toy(CONTROL.model(), recipe)
        assert spy.call_count == calls


def test_clips_and_questions_go_through_the_same_loop():
    recipe = Recipe(lr=1e-2, encoder_lr=1e-3, steps=20, batch=8)
    assert run_toy(CONTROL.model(), recipe, clip_tokens, lambda x: (x[0][:, None].expand(-1, 3, -1, -1, -1),)) == 1.0
    text = torch.tensor([[BEGIN, 5, END, PAD]])
    assert run_toy(CONTROL.model(), recipe, decoder_states, lambda x: (x[0], text.expand(len(x[0]), -1))) == 1.0


@given(cases())
def test_what_the_decoder_gives_a_head_sees_text_and_image_and_no_pads(case):
    model, images, tokens = case.model(), case.images(), case.tokens()
    states = model.decode(images, tokens)
    out = model(images, tokens)
    torch.testing.assert_close(model.multimodal.head(states), out.logits)
    assert not torch.allclose(states, model.decode(images.flip(0) * 0.5, tokens))
    assert evaluation.decoder_states(model, (images * 127.5 + 127.5).to(torch.uint8), tokens)[1].sum(1).tolist() == case.lengths


# ------------------------------------------------------------------------------------------------
# Video


@given(st.integers(1, 40), st.integers(1, 20))
def test_frames_are_sampled_uniformly_from_first_to_last(count, frames):
    chosen = sample_frames(count, frames)
    assert len(chosen) == frames and chosen[0] == 0 and (np.diff(chosen) >= 0).all()
    assert frames == 1 or chosen[-1] == count - 1
    if frames > 1:
        assert np.abs(chosen - np.arange(frames) * (count - 1) / (frames - 1)).max() <= 0.5


@torch.no_grad()
def test_a_video_embedding_is_the_mean_of_its_frames_and_that_of_a_still_is_its_images():
    model = CONTROL.model()
    clips = np.random.default_rng(0).integers(0, 256, (2, 16, 3, 8, 8)).astype(np.uint8)
    frames = torch.stack([model.encode_image(evaluation.to_model(torch.from_numpy(clip))) for clip in clips])
    mean = frames.mean(1)
    torch.testing.assert_close(embed_clips(model, clips), mean / mean.norm(dim=1, keepdim=True))
    still = np.repeat(clips[:, :1], 5, 1)
    torch.testing.assert_close(embed_clips(model, still), frames[:, 0])
    with fails:  # control: the first frame alone is not the mean
        torch.testing.assert_close(embed_clips(model, clips), frames[:, 0])


def test_generated_clips_show_their_label_and_its_direction_only_in_order():
    with mock.patch.object(data_file, "draw", side_effect=data_file.draw) as draw:
        what, direction = moving_shapes("labelled", 16, 6, frames=4)
    paths = np.array([call.args[0][0].x for call in draw.call_args_list]).reshape(6, 4)
    assert (np.sign(np.diff(paths)) == np.where(direction.labels, 1, -1)[:, None]).all() and len(set(direction.labels)) == 2
    for text, label in zip(what.captions, what.labels):
        assert what.classes[label] in text[0]
    assert ((paths < 0.5) == (paths[:, :1] < 0.5)).all()  # the caption's corner stays true


def clip_folder(folder, classes=("run", "walk"), clips=12):
    for c, name in enumerate(classes):
        for i in range(clips):
            path = folder / name / f"clip{i}"
            if i % 2:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix(".npy"), np.full((5, 12, 8, 3), 100 * c + i, np.uint8))
            else:
                path.mkdir(parents=True)
                for frame in range(3):
                    Image.fromarray(np.full((8, 12, 3), 100 * c + i, np.uint8)).save(path / f"{frame}.png")
    return folder


def test_own_clips_are_read_from_folders_and_arrays(tmp_path):
    train_set, test_set = own_clips(clip_folder(tmp_path), 8, 4)
    assert train_set.classes == ["run", "walk"] and len(train_set) + len(test_set) == 24 and len(test_set) > 0
    for part in (train_set, test_set):
        assert part.images.shape[1:] == (4, 3, 8, 8)
        for clip, label in zip(part.images, part.labels):
            assert clip.min() == clip.max() and (clip[0, 0, 0, 0] >= 100) == label


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: [(folder / "run" / "empty").mkdir()], "a clip without frames"),
    (lambda folder: np.save(folder / "run" / "x.npy", np.zeros((3, 8, 8), np.uint8)), r"of shape \(3, 8, 8\)"),
    (lambda folder: np.save(folder / "run" / "x.npy", np.array([{}], object)), "not a readable array"),
    (lambda folder: (folder / "run" / "x.npy").write_bytes(b"\x93NUMPY"), "not a readable array"),
    (lambda folder: (folder / "run" / "clip0" / "0.png").write_bytes(b"no"), "not a readable image")])
def test_bad_clips_are_one_clear_line(tmp_path, break_it, message):
    break_it(clip_folder(tmp_path))
    with pytest.raises(DataError, match=message) as e:
        own_clips(tmp_path, 8, 4)
    assert "\n" not in str(e.value)


def test_a_folder_without_classes_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="0 classes and 0 clips"):
            own_clips(folder, 8, 4)


# ------------------------------------------------------------------------------------------------
# Questions and entailment


def scenes_of(make, count, seed=0):
    """What `make` drew, things instead of pictures, with texts and labels."""
    with mock.patch.object(data_file, "draw", side_effect=lambda things, rng, size: np.zeros((3, 1, 1), np.uint8)) as draw:
        data = make(1, count, seed)
    return [call.args[0] for call in draw.call_args_list], [text for text, in data.captions], data.labels


def true_answer(things, text):
    left, right = sorted(things, key=lambda thing: thing.x)
    if match := re.fullmatch(r"what colour is the shape (left|right) of the (\w+)", text):
        side, shape = match.groups()
        asked, beside = (left, right) if side == "left" else (right, left)
        assert beside.shape == shape
        return asked.colour
    if match := re.fullmatch(r"is there a (\w+) (\w+)", text):
        return "yes" if any((thing.colour, thing.shape) == match.groups() for thing in things) else "no"
    shape, = re.fullmatch(r"how many (\w+)", text).groups()
    return str(sum(thing.shape == shape for thing in things))


def test_answers_are_right_and_balanced_and_half_of_a_question_is_not_enough():
    things, texts, labels = scenes_of(questions, 3000)
    answers = [ANSWERS[label] for label in labels]
    assert answers == [true_answer(*pair) for pair in zip(things, texts)]
    with fails:  # control: the answers to other scenes
        assert answers == [true_answer(*pair) for pair in zip(things[3:] + things[:3], texts)]
    for kind, possible in enumerate((list(COLOURS), ["no", "yes"], ["0", "1", "2"])):
        mine, asked = answers[kind::3], texts[kind::3]
        for answer in possible:
            assert abs(mine.count(answer) / len(mine) - 1 / len(possible)) < 0.06
        best = sum(max(list(np.array(mine)[np.array(asked) == text]).count(a) for a in possible) for text in set(asked)) / len(mine)
        assert best < 1 / len(possible) + 0.2  # the best answer to each text, fitted to these very questions
    same = [len({thing.shape for thing in pair}) for pair in things]
    for kind in range(3):  # scenes do not tell which kind of question comes
        assert abs(np.mean(same[kind::3]) - 1.5) < 0.06


def test_captions_hold_or_do_not_as_labelled():
    things, texts, labels = scenes_of(entailment, 400)
    holds = [text in describe(pair) for pair, text in zip(things, texts)]
    assert holds == list(labels.astype(bool)) and 0.4 < np.mean(holds) < 0.6
    for pair, text, label in zip(things, texts, labels):  # wrong captions are wrong by one property
        words = [sum(a != b for a, b in zip(text.split(), true.split())) for true in describe(pair)]
        assert min(words) == 0 if label else 1 <= min(words) <= 2


# ------------------------------------------------------------------------------------------------
# Tasks


def toy_checkpoint(**changes):
    words = ["<pad>", "<begin>", "<end>", "<unk>", *COLOURS, *SHAPES, "a", "small", "large", "at", "the", "top", "bottom", "left", "right"]
    config = CoCaConfig(image_size=8, patch_size=4, width=16, heads=2, encoder_layers=1, n_uni=1, n_multi=1, n_query=2,
                        vocab_size=len(words), **changes)
    torch.manual_seed(0)
    return CoCa(config), Tokenizer(words), dict(data="shapes", data_dir=None, seed=0)


@pytest.fixture
def quick(monkeypatch):
    for name in ("FROZEN", "FINETUNED", "VIDEO_FROZEN", "VIDEO_FINETUNED", "UNDERSTANDING"):
        monkeypatch.setattr(evaluation, name, dataclasses.replace(getattr(evaluation, name), steps=2))


def test_every_task_runs_and_names_its_chance(quick, capsys):
    scores = evaluate(*toy_checkpoint(), TASKS)
    evaluation.report(scores)
    out = capsys.readouterr().out
    rows = {name: value for name, value in scores.items() if isinstance(value, dict)}
    assert sum("seconds" in value for value in rows.values()) == len(TASKS)
    for name, value in rows.items():
        assert 0 <= value["chance"] <= 1 and name in out
    assert rows["video order, frozen"]["score"] == 0.5  # every clip is there in both directions
    assert rows["frozen, linear probe"]["chance"] == 1 / 48


@pytest.mark.parametrize("task, changes, message", [
    ("zero-shot", dict(lambda_con=0.0), "--lambda-con 0"), ("retrieval", dict(lambda_con=0.0), "--lambda-con 0"),
    ("video-retrieval", dict(lambda_con=0.0), "--lambda-con 0"), ("captioning", dict(lambda_cap=0.0), "--lambda-cap 0")])
def test_a_checkpoint_without_what_a_task_needs_is_one_clear_line(task, changes, message, capsys):
    model, tokenizer, settings = toy_checkpoint(**changes)
    with pytest.raises(Unfit, match=message):
        evaluate(model, tokenizer, settings, [task], strict=True)
    assert set(evaluate(model, tokenizer, settings, [task])) == {"data"}
    assert message in capsys.readouterr().err


def test_questions_need_the_words_of_the_scenes():
    model, _, settings = toy_checkpoint()
    with pytest.raises(Unfit, match="lacks the words"):
        evaluate(model, Tokenizer(["<pad>", "<begin>", "<end>", "<unk>"]), settings, ["understanding"], strict=True)


# ------------------------------------------------------------------------------------------------
# What to train, and at which resolution


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_positions_are_interpolated_in_two_dimensions(side, grid, seed):
    torch.manual_seed(seed)
    position = torch.randn(side * side, 3)
    assert resize_positions(position, grid).shape == (grid * grid, 3)
    torch.testing.assert_close(resize_positions(position, side), position)
    torch.testing.assert_close(resize_positions(position[:1].expand(side * side, 3), grid), position[:1].expand(grid * grid, 3))
    square = position.unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)  # rows for columns, before or after
    after = resize_positions(position, grid).unflatten(0, (grid, grid)).transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(resize_positions(square, grid), after)


def test_positions_between_two_patches_lie_between_theirs():
    ramp = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    finer = resize_positions(ramp, 8).unflatten(0, (8, 8))[..., 0]
    assert (finer.diff(dim=1) > 0).all() and finer.diff(dim=0).abs().max() < 1e-5


def checkpoint_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A folder with a run of two steps, and a function that makes another run from it."""
    monkeypatch.setattr(train, "evaluate", lambda *a: {})
    monkeypatch.setattr(train, "report", lambda scores: None)
    toy = ["--subset", "32", "--batch-size", "8", "--device", "cpu", "--steps", "2"]
    main([*toy, "--out", str(tmp_path / "first")])

    def go(*more, out="second", init=True):
        main([*toy, *(["--init", str(tmp_path / "first" / "checkpoint.pt")] if init else []), "--out", str(tmp_path / out), *more])
        return checkpoint_of(tmp_path / out)["model"]

    return checkpoint_of(tmp_path / "first")["model"], go


@settings(max_examples=4)
@given(learned=st.sets(st.sampled_from(list(PARTS)), min_size=1, max_size=2))
def test_frozen_parts_do_not_move_by_one_bit(tmp_path_factory, learned):
    with pytest.MonkeyPatch.context() as patch:
        before, go = start.__wrapped__(tmp_path_factory.mktemp("runs"), patch)
        after = go("--train", *sorted(learned))
        moved = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == learned | {None}  # None: the temperature
        before, after = after, go(out="all")  # control: without --train everything moves
        assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == {*PARTS, None}


def test_a_frozen_encoder_costs_no_backward(start):
    _, go = start
    with_graph = []
    for parts in (["poolers"], ["encoder"]):
        def look(module, inputs, output):
            with_graph.append(output.requires_grad)
        with mock.patch.object(train, "CoCa", side_effect=lambda config: watched(config, look)):
            go("--train", *parts, out=parts[0])
    assert not any(with_graph[:len(with_graph) // 2]) and all(with_graph[len(with_graph) // 2:])


def watched(config, look):
    model = CoCa(config)
    model.encoder.register_forward_hook(look)
    return model


def test_fresh_parts_start_anew_and_the_others_from_the_checkpoint(start):
    before, go = start
    after = go("--fresh", "poolers", "--train", "decoder")
    same = {part_of(name) for name in before if torch.equal(before[name], after[name])}
    assert same >= {"encoder"}
    assert not torch.equal(before["contrastive_pooler.query"], after["contrastive_pooler.query"])


def test_a_run_goes_on_at_twice_the_resolution(start, tmp_path):
    before, go = start
    after = go("--image-size", "64", "--train", "decoder")
    torch.testing.assert_close(after["encoder.position"], resize_positions(before["encoder.position"], 8), rtol=0, atol=0)
    assert checkpoint_of(tmp_path / "second")["config"]["image_size"] == 64


def test_a_model_without_image_encoder_trains(start):
    _, go = start
    after = go("--encoder-layers", "0", "--n-query", "0", init=False)
    assert not any("encoder.blocks" in name or "generative_pooler" in name for name in after)


@pytest.mark.parametrize("more, message", [
    (["--n-query", "3"], "generative_pooler.query does not fit.*--fresh poolers"), (["--image-size", "30"], "30 is not a multiple"),
    (["--encoder-layers", "1"], "encoder.blocks.*does not fit")])
def test_sizes_that_do_not_fit_the_checkpoint_are_one_clear_line(start, more, message):
    with pytest.raises(DataError, match=message):
        start[1](*more)


def test_fresh_without_init_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--fresh", "encoder"])
    assert "--fresh needs --init" in capsys.readouterr().err
