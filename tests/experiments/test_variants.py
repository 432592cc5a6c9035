"""What is compared: other data, other models, and what they are asked for."""
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, fails, refused
from toys import WORDS, draw_scenes, few_scenes, record_lessons, toy_checkpoint

import data as data_file
import train
from coca import BEGIN, END, PAD
from data import Tokenizer, scene
from experiments import ablations, understanding, variants, video
from experiments.variants import TABLES, VARIANTS, LabelClassifier, halves

IMAGES = 16  # two steps


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few scenes, and a small model."""
    few_scenes(monkeypatch)


def settings(*flags):
    return train.parse_args(["--device", "cpu", *flags])[0]


# Data


def test_half_the_scenes_have_their_labels_as_texts():
    s = settings("--seed", "4")
    plain, val = [train.load_data(vars(s), split) for split in ("train", "val")]
    both, both_val = halves(s)
    assert (both.images == plain.images).all() and both_val.captions == val.captions
    assert both.captions[8:] == plain.captions[8:]
    counts = set()
    for i in range(8):
        things, _ = scene(4, "train", i)
        counts.add(len(things))
        names = [f"{thing.colour} {thing.shape}" for thing in things]
        texts = {f"a photo of a {', '.join(names)}", f"a photo of a {', '.join(names[::-1])}"}
        assert set(both.captions[i]) == texts  # in either order
    assert counts == {1, 2}
    with fails:  # control: captions say more
        assert both.captions[:8] == plain.captions[:8]


def test_half_the_images_seen_are_as_many_epochs():
    for half in ("labels", "captions"):
        whole = len(VARIANTS["one stage"].data(settings())[0])
        for name, epochs in ((half, 2), (f"{half}, epochs", 1)):
            job = ablations.make_job(name, "shapes", IMAGES, 0)
            size = len(VARIANTS[name].data(settings())[0])
            assert int(job.images) / size == epochs * IMAGES / whole


def test_one_half_alone_is_the_same_half():
    s = settings()
    both, _ = halves(s)
    for rows, found in ((range(8), VARIANTS["labels"].data(s)[0]),
                        (range(8, 16), VARIANTS["captions"].data(s)[0])):
        assert (found.images == both.images[rows]).all()
        assert found.captions == [both.captions[i] for i in rows]


@pytest.mark.parametrize("split, given", [(0, "train"), (1, "val")])
def test_the_single_encoder_learns_all_pairs_of_the_images_that_others_see(split, given):
    s = settings("--seed", "4")
    found = variants.labelled_things(s)[split]
    plain = train.load_data(vars(s), given)
    assert (found.images == plain.images).all()
    for i, (text,) in enumerate(found.captions):
        things, _ = scene(4, given, i)
        assert data_file.words(text) == [f"{thing.colour}_{thing.shape}" for thing in things]


def test_the_captions_of_half_the_training_images_are_exchanged_and_no_others():
    s = settings("--seed", "4")
    plain = [train.load_data(vars(s), split) for split in ("train", "val")]
    noisy, val = variants.exchanged(s)
    assert val.captions == plain[1].captions  # evaluation is untouched
    assert (noisy.images == plain[0].images).all()
    assert sorted(noisy.captions) == sorted(plain[0].captions)  # none is lost
    moved = [a != b for a, b in zip(noisy.captions, plain[0].captions, strict=True)]
    assert sum(moved) == len(moved) // 2
    with fails:  # control: at another seed other images
        others = variants.exchanged(settings("--seed", "5"))[0].captions
        alone = train.load_data(vars(settings("--seed", "5")), "train").captions
        assert moved == [a != b for a, b in zip(others, alone, strict=True)]


@pytest.mark.parametrize("name, order", [("labels first", (0, 1)), ("captions first", (1, 0)),
                                         ("one stage", None)])
def test_stages_are_learned_in_their_order_with_one_vocabulary(name, order, monkeypatch):
    halves_of = [*halves(settings())[0].captions[:8]], [*halves(settings())[0].captions[8:]]
    stages = []

    def learn(model, optimizer, batches, s):
        stages.append((batches.data.captions, s.steps, optimizer, model))
        yield from range(s.steps)

    monkeypatch.setattr(train, "train", learn)
    job = ablations.make_job(name, "shapes", 32, 0)
    s, model, tokenizer, _, steps = ablations.compose(job.flags, VARIANTS[name])
    assert [*steps] == ([0, 1] * 2 if order else [0, 1, 2, 3])  # as many images, schedules anew
    assert {"photo", "small"} <= set(tokenizer.words)
    assert all(stage[3] is model for stage in stages)
    if order:
        assert [stage[0] for stage in stages] == [halves_of[k] for k in order]
        assert stages[0][2] is not stages[1][2]
    else:
        assert len(stages) == 1 and stages[0][0] == halves_of[0] + halves_of[1]


@pytest.mark.parametrize("variant, written", [("classifier", "{}_{}"), ("encoder-decoder", "a {} {}")])
def test_labels_are_read_off_as_captions(variant, written, monkeypatch):
    def all_but_one(model, tokenizer, images):
        assert isinstance(model, LabelClassifier) == (variant == "classifier")
        real(model, tokenizer, images)
        val = draw_scenes("labelled-val", 32, 0, 16)
        names = [val.classes[label].split() for label in val.labels[:16]]
        return [written.format(*name) for name in names[:15]] + ["a grey cloud"]

    real = variants.caption
    monkeypatch.setattr(variants, "caption", all_but_one)
    only = {"labels": VARIANTS[variant].tasks["labels"]}  # the others learn for long
    monkeypatch.setitem(VARIANTS, variant, VARIANTS[variant]._replace(tasks=only))
    line = ablations.perform(ablations.make_job(variant, "shapes", IMAGES, 0), None)
    assert float(line["accuracy"]) == 15 / 16
    assert set(line) <= set(ablations.COLUMNS)
    assert ("val_cap" in line) == (variant == "encoder-decoder")  # the classifier's is Eq. (1)


def test_a_classifier_learns_each_of_its_k_words_with_1_over_k():
    coca, images, _ = CONTROL.example()
    tokens = torch.tensor([[BEGIN, 5, END, PAD, PAD], [BEGIN, 6, 4, END, PAD], [BEGIN, 7, 7, 5, END]])
    images = images[:3]
    model = LabelClassifier(coca)
    assert torch.equal(model.encoder(images), coca.encoder(images))
    p = model.classify(images).softmax(-1)
    log_p = p.log()
    wanted = log_p[0, 5] + (log_p[1, 6] + log_p[1, 4]) / 2 + (2 * log_p[2, 7] + log_p[2, 5]) / 3
    torch.testing.assert_close(model.losses(images, tokens).total, -wanted / 3)
    assert torch.equal(model.generate(images)[:, 0], p.argmax(-1))
    with fails:  # control: the first word alone
        first = log_p[0, 5] + log_p[1, 6] + log_p[2, 7]
        torch.testing.assert_close(model.losses(images, tokens).total, -first / 3)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_eq_2_compares_the_pairs_of_a_group_only(size):
    coca, images, tokens = CONTROL.example()
    images = torch.cat([images, images.flip(-1)])
    tokens = torch.cat([tokens, tokens.roll(1, 0)])
    n = len(tokens)
    groups = [range(i, min(i + size, n)) for i in range(0, n, size)]
    each = [coca.losses(images[[*rows]], tokens[[*rows]]).con for rows in groups]
    whole = coca.losses(images, tokens)
    found = variants.in_groups(coca, size).losses(images, tokens)
    torch.testing.assert_close(found.con, torch.stack(each).mean())
    torch.testing.assert_close(found.cap, whole.cap)
    c = coca.config
    torch.testing.assert_close(found.total, c.lambda_con * found.con + c.lambda_cap * found.cap)
    if size < n:
        with fails:  # control: the whole batch
            torch.testing.assert_close(found.con, whole.con)


def test_only_the_pairs_compared_differ_and_only_the_width():
    for N in (24, 96, 384):
        job = ablations.make_job(f"N {N}", "shapes", 59_904, 0)
        assert "--steps 156 --batch-size 384" in job.flags
        assert job._replace(variant="") == ablations.make_job(
            "N 24", "shapes", 59_904, 0)._replace(variant="")
    sizes = {}
    for name in ("default", "width 64", "width 192"):
        job = ablations.make_job(name, "shapes", IMAGES, 0)
        model = ablations.compose(job.flags, VARIANTS[name])[1]
        sizes[name] = model.config.width, model.config.width // model.config.heads
    assert sizes["width 64"] == (64, 32) and sizes["width 192"] == (192, 32)
    assert sizes["default"][0] == 32  # of few_scenes


def test_a_class_is_one_word():
    _, val = variants.labelled(train.parse_args([])[0], variants.one_word)
    words = [data_file.words(text) for text, in val.captions]
    assert {len(found) for found in words} == {1}
    assert len({word for word, in words}) == len(set(val.labels))


def test_the_mean_text_embedding_reads_what_cls_may_see():
    one_cls = CONTROL.model().unimodal
    mean = variants.with_mean_text(CONTROL.model()).unimodal
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


def test_a_variants_data_are_what_it_learns():
    seen = {}
    for name in ("default", "classifier", "one stage", "captions"):
        job = ablations.make_job(name, "shapes", IMAGES, 0)
        _, _, tokenizer, val, _ = ablations.compose(job.flags, VARIANTS[name])
        seen[name] = "photo" in tokenizer.words, len(data_file.words(val.captions[0][0])) == 1
    assert seen == {"default": (False, False), "classifier": (False, True),
                    "one stage": (True, False), "captions": (False, False)}


# Tasks


def test_a_table_asks_its_lines_for_what_it_shows():
    """The scores that only some tables show are measured in all lines that can have them."""
    for row in ("families", "one-stage"):
        for variant in TABLES[row][1]:
            tasks = VARIANTS[variant].tasks
            if row == "one-stage":
                assert tasks is variants.STAGE
            else:
                assert {"frozen", "video"} <= set(tasks)
                assert ("likelihood" in tasks) == (variant in ("default", "captioning only"))


def test_questions_and_videos_are_learned_with_a_frozen_model_and_asked_of_others(monkeypatch):
    model, tokenizer, s = toy_checkpoint()
    asked = record_lessons(monkeypatch, understanding)
    shown = record_lessons(monkeypatch, video)
    with torch.no_grad():
        (score, chance), = variants.frozen_questions_task(model, tokenizer, s).values()
        variants.frozen_video_task(model, tokenizer, s)
    (lesson,), (clips,) = asked, shown
    assert score == 0.125 and 0.3 < chance < 0.45  # of the three kinds of questions
    for found, learned, tested in ((lesson, 3400, 600), (clips, 300, 1000)):
        assert found.model is model and found.recipe.encoder_lr == 0
        assert (len(found.train[1]), len(found.test[1])) == (learned, tested)
        assert not torch.equal(found.train[0][0][:300], found.test[0][0][:300])
    assert clips.classifier.time is None
    refused("lacks words", variants.frozen_questions_task, model, Tokenizer(WORDS[:9]), s)
    with pytest.raises(data_file.DoesNotApply):  # half of the decoder has learned nothing
        variants.frozen_questions_task(*toy_checkpoint(lambda_cap=0.0))


@torch.no_grad()
def test_labels_are_asked_as_they_are_written(monkeypatch):
    model, tokenizer, s = toy_checkpoint()
    asked = []
    real = variants.embed_classes

    def noted(model, tokenizer, classes, templates):
        asked.append((classes, templates))
        return real(model, tokenizer, classes, templates)

    monkeypatch.setattr(variants, "embed_classes", noted)
    variants.label_prompt_task(model, tokenizer, s)
    (classes, templates), = asked
    assert templates == ["a photo of a {}"] and len(classes) == 48  # not the six that are shown only


def test_captions_in_the_style_of_labels_are_counted(monkeypatch):
    texts = ["a photo of a red ring", "a small red ring", "a photo of a bar, ring", "a photo"]
    monkeypatch.setattr(variants, "caption", lambda model, tokenizer, images: texts)
    assert variants.label_style_task(*toy_checkpoint()) == {"written as labels": (0.5, 0)}


def test_the_untrained_model_does_not_learn():
    job = ablations.make_job("untrained", "shapes", IMAGES, 0)
    s, model, _, _, steps = ablations.compose(job.flags, VARIANTS["untrained"])
    before = [p.clone() for p in model.parameters()]
    assert len(list(steps)) == 1 and job.images == "0"
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    job = ablations.make_job("default", "shapes", IMAGES, 0)  # control
    s, model, _, _, steps = ablations.compose(job.flags)
    before = [p.clone() for p in model.parameters()]
    assert len(list(steps)) == 2
    assert not all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
