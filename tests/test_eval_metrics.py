"""Zero-shot, retrieval, captioning, BLEU and CIDEr-D: by hand and as COCO's code has them."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CONTROL, counting, fails
from torch.utils._python_dispatch import TorchDispatchMode
from toys import SPECIAL

import eval as evaluation
from coca import PAD
from data import Dataset, DoesNotApply, Tokenizer, to_model
from eval import bleu, cider_d, embed_classes, embed_images, ranks, recall, tokenised, zero_shot

TOKENIZER = Tokenizer([*SPECIAL, *"abcdefghi"])
SETTINGS = dict(data="toy", data_dir=None, seed=0)
IMAGES = np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), np.uint8)


@torch.no_grad()
def test_many_images_and_texts_are_embedded_and_captioned_in_order():
    model = CONTROL.model()
    images = to_model(torch.from_numpy(IMAGES))
    torch.testing.assert_close(embed_images(model, IMAGES), model.encode_image(images))
    texts = ["a b", "c", "d e f g", "h i"]
    alone = torch.cat([model.encode_text(TOKENIZER.encode([text], 9)) for text in texts])
    torch.testing.assert_close(evaluation.embed_texts(model, TOKENIZER, texts, batch=3), alone)
    expected = [TOKENIZER.decode(tokens) for tokens in model.generate(images)]
    assert evaluation.caption(model, TOKENIZER, IMAGES) == expected


@torch.no_grad()
def test_one_pass_of_the_encoder_gives_an_embedding_and_a_caption():
    model = CONTROL.model()
    images = CONTROL.images()
    with counting((model.encoder, "forward")) as (encode,):
        image_context, x = model.pool_image(images)
        captions = model.generate(images, image_context=image_context)
        assert encode.call_count == 1
        assert torch.equal(captions, model.generate(images))
        assert torch.equal(x, model.encode_image(images))
        assert encode.call_count == 3  # control: each by itself
    with fails:  # control: what the decoder reads is what it is given
        assert torch.equal(captions, model.generate(images, image_context=0 * image_context))


def embed_by_hand(patch, table, images):
    """Makes texts embed as a table says, and images as the rows given."""
    def look_up(model, tokenizer, texts):
        return F.normalize(torch.tensor([table[text] for text in texts]).float(), dim=-1)

    patch.setattr(evaluation, "embed_texts", look_up)
    patch.setattr(evaluation, "embed_images", lambda model, given: images)


def scores_on(patch, task, split, dataset, tokenizer=TOKENIZER):
    """Runs a task where this Dataset is the only one there is."""
    patch.setattr(evaluation, "load_split", lambda model, s, asked: {split: dataset}[asked])
    with torch.no_grad():
        return task(CONTROL.model(), tokenizer, SETTINGS)


# Zero-shot classification


def test_zero_shot_takes_the_mean_of_a_classs_prompts_and_its_direction_only(monkeypatch):
    """Chosen so that the nearest single prompt, or a mean of any length, would answer otherwise."""
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.7, 0.7, 0]])
    table = {"a c": [1, 0, 0], "the c": [-0.5, 0.8, 0],
             "a d": [0.8, 0, 0.6], "the d": [0.8, 0, 0.6]}
    embed_by_hand(monkeypatch, table, images)
    classes = embed_classes(None, None, ["c", "d"], ["a {}", "the {}"])
    assert zero_shot(images, classes).tolist() == [1, 0, 0]
    single = embed_classes(None, None, ["c", "d"], ["a {}"])  # controls
    assert zero_shot(images, single).tolist() == [0, -1, 0]
    mean = torch.tensor([[0.235, 0.424, 0], [0.8, 0, 0.6]])
    assert zero_shot(images, mean).tolist() == [1, 0, 1]
    for labels, score in (([1, 0, 1], 2 / 3), ([1, 0, 0], 1)):
        data = Dataset(np.arange(3), [[]] * 3, np.array(labels), ["c", "d"], ["a {}", "the {}"])
        found = scores_on(monkeypatch, evaluation.zero_shot_task, "zeroshot", data)
        assert found == {"zero-shot top-1": (pytest.approx(score), pytest.approx(2 / 3))}


@torch.no_grad()
def test_a_model_of_nans_says_nothing_and_the_same_prompts_are_never_told_apart():
    model = CONTROL.model()

    def said(classes):
        prompts = embed_classes(model, TOKENIZER, classes, ["a {}", "b {} a"])
        return (zero_shot(embed_images(model, IMAGES[:20]), prompts) >= 0).float().mean()

    assert said(["c", "d", "e"]) == 1  # control
    for count in (2, 10, 100):
        assert said([f"x{i}" for i in range(count)]) == 0  # to the model all are <unk>
    torch.nn.init.constant_(model.contrastive_pooler.norm.bias, math.nan)
    assert said(["c", "d", "e"]) == 0


def test_cosines_that_differ_by_rounding_only_are_ties(monkeypatch):
    """Five equal classes, or texts, whatever rounding makes of their cosines: all wrong."""
    cosines = 0.5 + 1e-7 * torch.rand(100, 5, generator=torch.Generator().manual_seed(0))
    relevant = [[i % 5] for i in range(100)]
    assert zero_shot(cosines, torch.eye(5)).tolist() == [-1] * 100
    assert ranks(cosines, torch.eye(5), relevant) == [4] * 100
    nearest = cosines + 1e-5 * torch.eye(5).repeat(20, 1)  # control: more than rounding
    assert zero_shot(nearest, torch.eye(5)).tolist() == [i % 5 for i in range(100)]
    assert ranks(nearest, torch.eye(5), relevant) == [0] * 100
    monkeypatch.setattr(evaluation, "TIE", 0)  # control
    assert (zero_shot(cosines, torch.eye(5)) >= 0).any()
    assert 0 in ranks(cosines, torch.eye(5), relevant)


def zero_shot_of(patch, names, labels, answers, templates=("a {}",)):
    """What the task finds where the model's answers are these classes, asked of these images."""
    def answer(model, images):
        asked.extend(images.tolist())
        return torch.eye(len(names))[[answers[i] for i in images]]

    def embed(model, tokenizer, classes, templates):
        return torch.eye(len(names))[[names.index(name) for name in classes]]

    asked = []
    patch.setattr(evaluation, "embed_images", answer)
    patch.setattr(evaluation, "embed_classes", embed)
    data = Dataset(np.arange(len(labels)), [[]] * len(labels), np.array(labels), names, templates)
    return scores_on(patch, evaluation.zero_shot_task, "zeroshot", data)["zero-shot top-1"], asked


def test_classes_with_no_word_that_the_model_knows_are_not_asked_for(monkeypatch, capsys):
    labels = [0, 3, 1, 2, 3, 3, 2, 3]
    answers = [0, 3, 0, 2, 2, 3, 0, 3]
    names = ["zebra", "c", "lion", "big d"]  # of the last, one word is known
    score, asked = zero_shot_of(monkeypatch, names, labels, answers)
    assert asked == [1, 2, 4, 5, 7]  # the images of c and d
    assert score == (3 / 5, 4 / 5)  # chance is of these, too
    assert capsys.readouterr().err.splitlines()[-1] == (
        "note: 2 of 4 classes left out, the checkpoint knows no word of them: zebra, lion")
    names = ["b", "c", "e", "big d"]  # control
    assert zero_shot_of(monkeypatch, names, labels, answers) == ((5 / 8, 4 / 8), [*range(8)])
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("names, labels", [
    (["zebra", "?!"], [0, 1, 1]), (["zebra", "c", "?!"], [0, 2, 2])], ids=["of all", "of images"])
def test_classes_of_unknown_words_only_are_refused_though_their_prompts_words_are_known(
        monkeypatch, names, labels):
    with pytest.raises(DoesNotApply, match=r"knows no word of the classes zebra, \?!$"):
        zero_shot_of(monkeypatch, names, labels, labels, ["a {} b", "c {}"])


# Retrieval


def test_recall_by_hand():
    row = torch.tensor([0.9, 0.1, 0.5, 0.2])  # ranks 1, 4, 2, 3
    relevant = [[0], [2], [1, 3], [1]]
    found = recall(row.expand(4, 4), torch.eye(4), relevant, ks=(1, 2, 3, 4))
    assert [found[k][0] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    # by chance: of one relevant item among 4, and of the better of two
    assert found[1][1] == pytest.approx((3 * 1 / 4 + 2 / 4) / 4)
    assert found[2][1] == pytest.approx((3 * 2 / 4 + (1 - 2 / 4 * 1 / 3)) / 4)
    assert found[4][1] == 1.0
    assert recall(torch.rand(3, 2), torch.eye(2), [[0], [1], [0]])[5] == (1.0, 1.0)
    assert ranks(torch.ones(1, 3), torch.eye(3), [[0, 1]]) == [1]  # right ones are no rivals


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_equal_cosines_and_nan_are_never_right(value):
    found = recall(torch.full((5, 30), value), torch.eye(30), [[i] for i in range(5)])
    assert {score for score, _ in found.values()} == {0}
    rest = torch.full((1, 30), value)
    rest[0, 3] = 1.0  # control: one good cosine
    assert recall(rest, torch.eye(30), [[3]])[1][0] == (value == 0)
    few = torch.full((2, 4), value)  # of 4 items all are among 5
    assert recall(few, torch.eye(4), [[0], [1]])[5] == (value == 0, 1.0)
    one = torch.tensor([[1.0, 0], [value, 0]])  # of two items, the second
    assert ranks(torch.eye(2)[:1], one, [[0]]) == [0 if value == 0 else math.inf]


class Largest(TorchDispatchMode):
    """Inside `with`, how many elements the largest tensor has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_retrieval_never_holds_all_cosines_and_gives_what_all_would(monkeypatch):
    torch.manual_seed(0)
    queries = torch.randn(2000, 8, dtype=torch.float64)
    items = torch.randn(3000, 8, dtype=torch.float64)
    relevant = [[i, i + 1000] for i in range(2000)]
    plain = []
    for row, right in zip((queries @ items.T).numpy(), relevant):
        plain.append((np.delete(row, right) >= row[right].max()).sum())
    for block, largest in ((100_000, 99_000), (2**25, 6_000_000)):  # the second is the control
        monkeypatch.setattr(evaluation, "BLOCK", block)
        with Largest() as made:
            assert ranks(queries, items, relevant) == plain
        assert made.elements == largest
    monkeypatch.setattr(evaluation, "BLOCK", 10)  # less than one query's
    assert ranks(queries[:5], items, relevant) == plain[:5]


def test_retrieval_counts_several_captions_per_image_and_shared_captions(monkeypatch):
    """Every image finds a text of its own, and of five texts one does not find its image."""
    texts = [["a", "b"], ["c", "b"], ["d", "e", "d"]]  # "b" is right for two, "d" counts once
    images = F.normalize(torch.tensor([[1.0, 0.2, 0], [0.1, 1, 0.3], [0, 0.3, 1]]), dim=-1)
    table = {"a": [1, 0, 0], "b": [0.9, 0.1, 0], "c": [0, 1, 0], "d": [0, 0, 1], "e": [0, 1, 0.9]}
    embed_by_hand(monkeypatch, table, images)
    found = scores_on(monkeypatch, evaluation.retrieval_task, "val", Dataset(None, texts))
    assert found["image to text R@1"] == (1, pytest.approx(2 / 5))
    assert found["text to image R@1"] == (4 / 5, pytest.approx((4 * 1 / 3 + 2 / 3) / 5))
    assert found["image to text R@5"] == found["text to image R@10"] == (1, 1) and len(found) == 6
    embed_by_hand(monkeypatch, table, images.roll(1, 0))  # control
    found = scores_on(monkeypatch, evaluation.retrieval_task, "val", Dataset(None, texts))
    assert found["image to text R@1"][0] < 1 and found["text to image R@1"][0] < 4 / 5


@pytest.mark.parametrize("one, other, score, chance", [
    ("a b c", "A  b C", 1, 1 / 2), ("b's", "B’s", 1, 1 / 2),
    ("a b c d e f g h", "a b c d e f g i", 1, 1 / 2),  # of text_len 9 the model sees seven words
    ("a b c d e f g", "a b c d e f h", 1, 1 / 3),  # controls: two items
    ("a", "a.", 1, 1 / 3), ("a zebra", "a lion", 1 / 3, 1 / 3)],
    ids=["case", "apostrophe", "cut", "not cut", "mark", "unknown words"])
def test_captions_that_are_equal_as_far_as_a_model_sees_them_are_one_item(
        monkeypatch, one, other, score, chance):
    """Of a perfect model: texts differ where their tokens do, images lie on their captions."""
    def embed(model, tokenizer, texts):
        rows = []
        for tokens in tokenizer.encode(texts, 9):
            rows.append(number.setdefault(tuple(tokens[tokens != PAD].tolist()), len(number)))
        return torch.eye(3)[rows]

    number = {}
    images = embed(None, TOKENIZER, [one, other, "d"])
    monkeypatch.setattr(evaluation, "embed_texts", embed)
    monkeypatch.setattr(evaluation, "embed_images", lambda model, given: images)
    data = Dataset(None, [[one], [other], ["d"]])
    found = scores_on(monkeypatch, evaluation.retrieval_task, "val", data)
    assert found["image to text R@1"] == (score, pytest.approx(chance))
    assert found["text to image R@1"][0] == score
    assert evaluation.distinct([[one, other]], 9)[1] == [[0] if chance == 1 / 2 else [0, 1]]


def test_class_prompts_are_not_retrieved(monkeypatch):
    data = Dataset(IMAGES[:2], [["a c"], ["a d"]], np.array([0, 1]), ["c", "d"], ["a {}"])
    with pytest.raises(DoesNotApply, match="of toy are class names, shared by many images; see"):
        scores_on(monkeypatch, evaluation.retrieval_task, "val", data)
    data.classes = []  # control
    assert len(scores_on(monkeypatch, evaluation.retrieval_task, "val", data)) == 6


# Captioning


def captioned(patch, written, true, words="abc", looked_at=None):
    """Scores of the captions written where those are true. looked_at: a list for the images."""
    def caption(model, tokenizer, images):
        if looked_at is not None:
            looked_at.extend(images.tolist())
        return [written[i] for i in images]

    patch.setattr(evaluation, "caption", caption)
    data = Dataset(np.arange(len(true)), true)
    return scores_on(patch, evaluation.captioning_task, "val", data, Tokenizer([*SPECIAL, *words]))


def test_chance_is_what_captions_score_on_an_image_half_the_set_away(monkeypatch):
    written = ["a a", "a a", "b b", "a a", "b b", "b b"]
    true = [["a a"], ["a a"], ["b b"], ["a a"], ["b b"], ["c", "b c b"]]
    away = ["a a", "b b", "b b", "a a", "a a", "b b"]
    found = captioned(monkeypatch, written, true)
    assert found["captions exactly right"] == (5 / 6, 3 / 6)
    for n in range(4):
        assert found[f"BLEU-{n + 1}"] == (bleu(written, true)[n], bleu(away, true)[n])
    assert found["CIDEr-D"] == (cider_d(written, true), cider_d(away, true))
    assert found["distinct captions"] == (2 / 6, 1 / 6)
    with fails:  # control: an image away
        assert found["CIDEr-D"][1] == cider_d(written[1:] + written[:1], true)


def test_of_one_image_the_table_says_that_cider_is_0_and_chance_is_an_empty_caption(monkeypatch):
    found = captioned(monkeypatch, ["a b"], [["a b"]])
    assert found["CIDEr-D (of one image always 0)"] == (0, 0)
    assert found["captions exactly right"] == (1, 0)
    assert "CIDEr-D" in captioned(monkeypatch, ["a", "b"], [["a"], ["b"]])  # control: of two


def test_of_many_images_a_thousand_drawn_from_all_are_captioned(monkeypatch, capsys):
    """A thousand of one kind come first. They alone would score 100 %."""
    def score(of_others):
        looked_at = []
        true = [["a"]] * 1000 + [["b"]] * of_others
        found = captioned(monkeypatch, ["a"] * len(true), true, looked_at=looked_at)
        told = "captions of 1,000 of the 1,100 images, drawn at random" in capsys.readouterr().err
        return looked_at, found["captions exactly right"][0], told

    looked_at, right, told = score(of_others=100)
    others = sum(i >= 1000 for i in looked_at)
    assert len(set(looked_at)) == 1000 and 50 < others < 100
    assert right == pytest.approx(1 - others / 1000) and told
    assert score(of_others=100)[0] == looked_at == sorted(looked_at)  # the same every time
    assert score(of_others=0) == ([*range(1000)], 1, False)  # control: all, in order


def test_an_example_stands_beside_the_true_caption_that_it_matches(monkeypatch, capsys):
    captioned(monkeypatch, ["b a", "c", "a"], [["a b", "b a"], ["a b", "b a"], ["a"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["b a", "b a", "c", "a b"]


LONG = "a b c d e f g h i"


@pytest.mark.parametrize("written, true, right", [
    ("a b", "A,  b!", True), ("a’s b", "A's b", True),
    ("a b c d e f g", LONG, True),  # of text_len 9 the model has seen seven words
    (LONG, LONG, False), ("a b c d e f", LONG, False), ("a b c d e f h", LONG, False),
    ("a unk", "a unk", True), ("a <unk>", "a unk", False), ("a <unk>", "a zebra", False)])
def test_captions_are_exactly_right_as_far_as_a_model_sees_them(monkeypatch, written, true, right):
    found = captioned(monkeypatch, [written], [["b", true]], LONG)
    assert found["captions exactly right"] == (right, 0)
    whole = [tokenised("b"), tokenised(true)]
    assert found["BLEU-1"][0] == bleu([tokenised(written)], [whole])[0]
    cut = [tokenised("b"), tokenised(true, 7)]  # control: whole references, here too
    assert (found["BLEU-1"][0] == bleu([tokenised(written)], [cut])[0]) == (true != LONG)


def test_true_captions_that_are_cut_or_have_unknown_words_are_noted(monkeypatch, capsys):
    for zebra, notes in (("a zebra runs", ["1 of 2 captions cut to 7 words (text_len is 9)",
                                           "20.0% of the captions' words are unknown"]),
                         ("a a a", ["1 of 2 captions cut to 7 words (text_len is 9)"])):
        captioned(monkeypatch, ["a"], [[LONG, zebra]], LONG)
        noted = capsys.readouterr().err.splitlines()
        assert noted == [f"note: {text}" for text in notes]
    captioned(monkeypatch, ["a"], [["a b"]])  # control
    assert capsys.readouterr().err == ""


# BLEU and CIDEr-D


def test_the_numbers_of_the_public_coco_code():
    """Obtained once from pycocoevalcap 1.2 (Bleu(4), Cider()) on these texts; not computed here."""
    candidates = ["a brown dog runs on the grass", "two men are sitting on a bench", "a a dog", ""]
    references = [
        ["a brown dog is running on the grass", "the dog runs through the green grass",
         "a dog runs"],
        ["two men sit on a bench", "two men are sitting on a wooden bench in a park"],
        ["a dog jumps over a log", "a black dog leaps", "a dog"],
        ["a child plays", "the child is playing in the sand"]]
    numbers = [0.942873143744, 0.872930908008, 0.770381989104, 0.634089736904]
    assert bleu(candidates, references) == pytest.approx(numbers, abs=1e-9)
    assert cider_d(candidates, references) == pytest.approx(2.20811190806, abs=1e-9)
    numbers = [0.666666666222, 0.816496580111, 0.00873580464057, 0.000903602003007]
    assert bleu(["a b", "c"], [["a b"], ["d"]]) == pytest.approx(numbers)  # no trigram, no 4-gram


def test_bleu_by_hand():
    def bleu_1(candidate, *references):
        return bleu([candidate], [references])[0]

    assert bleu_1("a a a b", "a b c d", "a c a d") == pytest.approx(3 / 4)  # a counts twice
    assert bleu_1("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2))  # too short
    assert bleu_1("a b c", "a b c d e f", "a b") == pytest.approx(1)  # of the nearest length
    assert bleu_1("a b c", "a b c d", "a b") == pytest.approx(1)  # as near: the shorter


def test_the_best_and_the_worst():
    own = ["a b c d", "p q r s"]
    other = ["p q r s", "a b c d"]
    references = [[text, text] for text in own]
    assert bleu(own, references) == pytest.approx([1, 1, 1, 1])
    assert cider_d(own, references) == pytest.approx(10)
    assert bleu(other, references)[0] < 0.01 and cider_d(other, references) == 0
    repeated = 10 / 4 * 0.5 * math.exp(-1 / 72) / 2  # saying it more often does not help
    assert cider_d(["b b", ""], [["b"], ["c"]]) == pytest.approx(repeated)
    # words that all images have weigh 0
    assert cider_d(["a b", "b a"], [["a b"], ["b a"]]) == pytest.approx(2.5)
    assert cider_d(own[:1], references[:1]) == 0  # one image
    for case in ([[""], [["a b"]]], [["", ""], [[""], ["", "a"]]], [["a", ""], [[""], ["a"]]]):
        assert max(bleu(*case)) < 1e-7 and cider_d(*case) == 0  # no words
    for metric in (bleu, cider_d):
        with pytest.raises(ValueError):
            metric(["a", "b"], [["a"]])


def test_tokenised_by_hand():
    text = "A man's T-shirt, RUNNING ... (2.5 dogs)! _ & \"so\""
    assert tokenised(text) == "a man 's t-shirt running 2.5 dogs so"
    assert tokenised(text, 6) == "a man 's t-shirt running"  # of these and a comma
    assert tokenised(" .") == ""
