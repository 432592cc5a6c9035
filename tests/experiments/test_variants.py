"""What is compared: other data, other models, and what they are asked for."""
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, fails, refused
from toys import WORDS, draw_scenes, few_scenes, record_lessons, toy_checkpoint

import data as data_file
import train
from coca import PAD
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


def test_a_classifier_learns_the_first_word():
    coca, images, tokens = CONTROL.example()
    model = LabelClassifier(coca)
    assert torch.equal(model.encoder(images), coca.encoder(images))
    p = model.classify(images).softmax(-1)
    right = p[torch.arange(len(p)), tokens[:, 1]]
    torch.testing.assert_close(model.losses(images, tokens).total, -right.log().mean())
    assert torch.equal(model.generate(images)[:, 0], p.argmax(-1))
    with fails:  # control: another label
        torch.testing.assert_close(model.losses(images, tokens.roll(1, 0)).total, -right.log().mean())


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
