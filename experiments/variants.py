"""What experiments/ablations.py runs: CoCa and its variants, each with the scores it is asked for.

A variant is flags of train.py, or other data, or a change of the model. TABLES says which variants
stand side by side:

    a to f        Table 8
    families      a single encoder, a dual encoder, an encoder-decoder and CoCa (Sec. 1, Figure 1)
    one-stage     labels and captions in one training, as text (Sec. 3.2, 4.1), in two stages one
                  after the other, or one of them alone
    noise         half of the training captions belong to other images (the idea of ALIGN's data)
    pairs         how many pairs Eq. (2) compares (Sec. 4.1: N = 65,536)
    sizes         wider and narrower models (the idea of Figure 5)
"""
import dataclasses
import functools
from collections.abc import Callable
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from coca import END, CoCa, Losses, UnimodalDecoder, caption_ids, contrastive_loss, text_mask
from data import DoesNotApply, load, scene, select
from eval import (
    DEFAULT_TASKS,
    SUPERVISED,
    ZERO_SHOT,
    Classifier,
    caption,
    constant_answer,
    embed_classes,
    frozen_task,
    load_data,
    load_split,
    need_embeddings,
    zero_shot_score,
)
from experiments.classify import likelihood_task
from experiments.understanding import KINDS, UNDERSTANDING, questions, understand
from experiments.video import VIDEO_FROZEN, generated_clips, learn_clips, need_scene_words

# ------------------------------------------------------------------------------------------------
# Data: a function of train.py's settings -> training and validation Dataset


def names_of(things):
    """The class of each thing of a scene."""
    return [f"{thing.colour} {thing.shape}" for thing in things]


def one_word(name):
    return name.replace(" ", "_")


def labelled(s, write):
    """Table 8a: images whose only caption is write(class)."""
    found = []
    for split in ("labelled", "labelled-val"):
        data = load(s.data, s.data_dir, split, s.image_size, seed=s.seed)
        captions = [[write(data.classes[label])] for label in data.labels]
        found.append(dataclasses.replace(data, captions=captions))
    return found


def labelled_things(s):
    """Scenes whose only caption is a word for each thing, its class. The images are those that all
    other families learn.
    """
    found = []
    for split in ("train", "val"):
        data = load_data(vars(s), split)
        for i in range(len(data)):
            things, _ = scene(s.seed, split, i)
            data.captions[i] = [" ".join(map(one_word, names_of(things)))]
        found.append(data)
    return found


LABEL_PROMPT = "a photo of a {}"


def label_texts(things):
    """The labels of a scene as text, as JFT's in Sec. 4.1: joined in any order, behind a prompt."""
    return [LABEL_PROMPT.format(", ".join(order)) for order in permutations(names_of(things))]


def halves(s, labels=True, captions=True):
    """Training scenes: the first half have their labels as texts, the second their captions. One
    half may be left out. Validation scenes have captions.
    """
    data = load_data(vars(s), "train")
    half = len(data) // 2
    for i in range(half):
        things, _ = scene(s.seed, "train", i)
        data.captions[i] = label_texts(things)
    rows = [*range(half)] * labels + [*range(half, len(data))] * captions
    return select(data, rows), load_data(vars(s), "val")


def one_stage(data):
    return [data]


def labels_first(data):
    """The two halves of `halves`, one after the other."""
    half = len(data) // 2
    return [select(data, range(half)), select(data, range(half, len(data)))]


def captions_first(data):
    return labels_first(data)[::-1]


def exchanged(s):
    """Half of the training images, drawn at random, pass their captions on to another of them."""
    data = load_data(vars(s), "train")
    rows = np.random.default_rng([s.seed, 200]).permutation(len(data))[:len(data) // 2]
    theirs = [data.captions[i] for i in np.roll(rows, 1)]
    for i, captions in zip(rows, theirs):
        data.captions[i] = captions
    return data, load_data(vars(s), "val")


# ------------------------------------------------------------------------------------------------
# Models


class LabelClassifier(CoCa):
    """Table 8a: the encoder with a Classifier on its tokens. train.py trains it like any CoCa.

    Captions are BEGIN words END, where each word names a class.
    """

    def __init__(self, model):
        super().__init__(model.config)
        self.load_state_dict(model.state_dict())
        c = model.config
        self.classifier = Classifier(c.width, c.heads, c.vocab_size)

    def classify(self, images):
        """images (B, 3, S, S) -> logits (B, V), a class for each word."""
        return self.classifier(self.encoder(images))

    def losses(self, images, tokens):
        """Eq. (1) in the place of Eq. (4): p(y) = 1 / k for each of the k classes of an image."""
        logits = self.classify(images)                                  # (B, V)
        is_class = (tokens > END).to(logits.dtype)                      # (B, L)
        p = torch.zeros_like(logits).scatter_add(1, tokens, is_class)   # (B, V), how often
        loss = F.cross_entropy(logits, p / p.sum(1, keepdim=True))
        return Losses(loss, torch.zeros_like(loss), loss)

    @torch.no_grad()
    def generate(self, images):
        """The likeliest class as a caption: images (B, 3, S, S) -> tokens (B, 1)."""
        return self.classify(images).argmax(-1, keepdim=True)


class MeanText(UnimodalDecoder):
    """Table 8e, "1 CLS + text tokens": the text embedding is the mean of the states of [CLS] and of
    all that it may look at. (The paper does not state how it puts them together.)
    """

    def forward(self, tokens):
        """tokens (B, L) -> states (B, L, D), text embedding (B, E) of unit norm."""
        x = self.embed(tokens)                                          # (B, L + 1, D)
        mask = text_mask(tokens)                                        # (B, 1, L + 1, L + 1)
        for block in self.blocks:
            x = block(x, mask=mask)                                     # (B, L + 1, D)
        seen = mask[:, 0, -1, :, None]                                  # (B, L + 1, 1)
        mean = (self.norm(x) * seen).sum(1) / seen.sum(1)               # (B, D)
        return x[:, :-1], F.normalize(mean, dim=-1)


def with_mean_text(model):
    unimodal = MeanText(model.config)
    unimodal.load_state_dict(model.unimodal.state_dict())
    model.unimodal = unimodal
    return model


def in_groups(model, size):
    """A CoCa whose Eq. (2) compares only the pairs of a group of `size`, not those of a batch."""
    def losses(images, tokens):
        ids = caption_ids(tokens)                                       # (B,)
        x, y, cap = model(images, tokens)
        of_groups = []
        for own_x, own_y, own_ids in zip(x.split(size), y.split(size), ids.split(size)):
            of_groups.append(contrastive_loss(own_x, own_y, model.temperature, own_ids))
        con = torch.stack(of_groups).mean()
        c = model.config
        return Losses(c.lambda_con * con + c.lambda_cap * cap, con, cap)

    model.losses = losses
    return model


# ------------------------------------------------------------------------------------------------
# Tasks, as in eval.py: (model, tokenizer, settings) -> {what: (score, chance)}

ASKED = 4000  # of which 3,400 are learned from
# Of Sec. 4.2, but all is frozen save the new pooler over the decoder's states: what a loss did not
# teach the model must show. (With L_Con alone the decoder's upper half is untrained: not asked.)
FROZEN_QUESTIONS = dataclasses.replace(UNDERSTANDING, encoder_lr=0.0, steps=1000)


def frozen_questions_task(model, tokenizer, s):
    need_scene_words(tokenizer)
    if not model.config.lambda_cap:
        raise DoesNotApply("trained with --lambda-cap 0, its decoder's upper half learned nothing")
    asked = questions(model.config.image_size, ASKED, s["seed"])
    found = understand(model, tokenizer, s, asked, len(KINDS), FROZEN_QUESTIONS, ASKED * 85 // 100)
    return {"questions": found}


def frozen_video_task(model, tokenizer, s):
    data, test, _, _ = generated_clips(model, s)
    return {"video, frozen": learn_clips(model, s, data, test, VIDEO_FROZEN)}


def trained_labels_task(model, tokenizer, s, write):
    """Share of images whose greedy caption is write(class), the text that was learned."""
    data = load_split(model, s, "labelled-val")
    wanted = [write(data.classes[label]) for label in data.labels]
    written = caption(model, tokenizer, data.images)
    right = sum(text == true for text, true in zip(written, wanted))
    return {"accuracy": (right / len(data), constant_answer(data.labels))}


def label_prompt_task(model, tokenizer, s):
    """Zero-shot as in eval.py, but asked as the labels are written."""
    need_embeddings(model)
    data = load_split(model, s, "zeroshot")
    classes = embed_classes(model, tokenizer, data.classes, [LABEL_PROMPT])
    return {"zero-shot, label prompt": zero_shot_score(model, data, classes)}


def label_style_task(model, tokenizer, s):
    """Share of captions that are written as the labels are. (No chance: nothing is right here.)"""
    written = caption(model, tokenizer, load_split(model, s, "val").images)
    as_labels = [text.startswith(LABEL_PROMPT.format("")) for text in written]
    return {"written as labels": (sum(as_labels) / len(written), 0)}


# ------------------------------------------------------------------------------------------------
# Tables. The paper's zero-shot score is ImageNet's

RIGHT = "captions exactly right"
BOTH_WAYS = "mean R@1"
QUESTION = "questions"  # the paper's are VQA's, finetuned with all of the model
LINEAR = "frozen, linear probe"  # (the paper's linear evaluation is on other images: ImageNet)
COST = "cost of a step"
SCORES = ["accuracy", LINEAR, "frozen, new pooler", ZERO_SHOT, SUPERVISED, "zero-shot by likelihood",
          "zero-shot, label prompt", RIGHT, "written as labels", "image to text R@1", BOTH_WAYS,
          QUESTION, "video, frozen", COST, "val_con", "val_cap"]
IN_NO_TABLE = ["frozen, new pooler", "image to text R@1", "val_con", "val_cap"]
NO_SHARES = (COST, "val_con", "val_cap")  # all others are printed in per cent

BASICS = {**DEFAULT_TASKS, "questions": frozen_questions_task}
FAMILY = {"frozen": frozen_task, "video": frozen_video_task}
STAGE = {**DEFAULT_TASKS, "label prompt": label_prompt_task, "label style": label_style_task}


class Variant(NamedTuple):
    what: str
    flags: str = ""  # of train.py
    paper: dict = {}  # its scores in Table 8
    data: Callable = None  # settings -> training and validation Dataset, in place of train.py's
    change: Callable = None  # the new model -> the one that is trained instead
    tasks: dict = BASICS  # those that the model lacks something for are left out
    share: float = 1.0  # of the images that its table sees
    stages: Callable = one_stage  # the training Dataset -> those that are learned one by one
    sizes: dict = {}  # of CoCaConfig, for which train.py has no flag
    batch: int = None  # images a step, if not the preset's
    reference: str = None  # the variant to compare with, if not the first of the table


def reads_labels(write):
    """What train.py and eval.py are given instead of scenes and their captions."""
    task = functools.partial(trained_labels_task, write=write)
    return dict(data=functools.partial(labelled, write=write), tasks={"labels": task, **FAMILY})


VARIANTS = {
    "default": Variant(
        "CoCa, both losses", "", {ZERO_SHOT: 71.6, QUESTION: 69.0, BOTH_WAYS: 41.4, COST: 1.18},
        tasks={**BASICS, "likelihood": likelihood_task, **FAMILY}),
    "classifier": Variant(
        "single encoder, Eq. (1) on labels", "--lambda-con 0", {"linear evaluation": 81.0, "finetuned": 85.1},
        change=LabelClassifier, **reads_labels(one_word)),
    "encoder-decoder": Variant(
        "encoder-decoder, labels read off its captions", "--lambda-con 0",
        {"linear evaluation": 82.1, "finetuned": 84.9}, **reads_labels("a {}".format)),
    "contrastive only": Variant(
        "dual encoder, L_Con only", "--lambda-cap 0",
        {ZERO_SHOT: 70.7, QUESTION: 59.2, COST: 1.0}, tasks={**BASICS, **FAMILY}),
    "captioning only": Variant(
        "encoder-decoder, L_Cap only", "--lambda-con 0", {QUESTION: 68.9, COST: 1.17},
        tasks={**BASICS, "likelihood": likelihood_task, **FAMILY}),
    "weights 1:1": Variant("cap : con = 1 : 1", "--lambda-cap 1 --lambda-con 1",
                           {ZERO_SHOT: 71.5, QUESTION: 68.6}),
    "weights 1:2": Variant("cap : con = 1 : 2", "--lambda-cap 1 --lambda-con 2",
                           {ZERO_SHOT: 71.0, QUESTION: 68.1}),
    # The paper's 2 : 1, if its L_Con is the mean of both directions, as the authors' later code has
    "weights 4:1": Variant("cap : con = 2 : 0.5", "--lambda-con 0.5"),
    "n_uni 1": Variant("n_uni 1 of 4 (paper: 3 of 12)", "--n-uni 1 --n-multi 3",
                       {ZERO_SHOT: 70.2, QUESTION: 69.0}),
    "n_uni 3": Variant("n_uni 3 of 4 (paper: 9 of 12)", "--n-uni 3 --n-multi 1",
                       {ZERO_SHOT: 71.4, QUESTION: 68.8}),
    "mean text": Variant("mean of [CLS] and the text's states", "", {BOTH_WAYS: 40.2},
                         change=with_mean_text),
    "parallel": Variant("parallel", "--pooler parallel", {ZERO_SHOT: 71.2, QUESTION: 68.7}),
    "n_query 0": Variant("n_query 0", "--n-query 0", {ZERO_SHOT: 71.5, QUESTION: 69.0}),
    "n_query 1": Variant("n_query 1", "--n-query 1", {ZERO_SHOT: 69.3, QUESTION: 64.4}),
    "n_query 4": Variant("n_query 4 (paper: 32)", "--n-query 4", {ZERO_SHOT: 71.2, QUESTION: 68.2}),
    "untrained": Variant("untrained, for comparison", "--lr 0", tasks=FAMILY, share=0.0),
    "one stage": Variant("half labels, half captions", data=halves, tasks=STAGE),
    "labels": Variant("labels alone, as many images seen", tasks=STAGE,
                      data=functools.partial(halves, captions=False)),
    "captions": Variant("captions alone, as many images seen", tasks=STAGE,
                        data=functools.partial(halves, labels=False)),
    "labels, epochs": Variant("labels alone, as many epochs", tasks=STAGE, share=0.5,
                              data=functools.partial(halves, captions=False)),
    "captions, epochs": Variant("captions alone, as many epochs", tasks=STAGE, share=0.5,
                                data=functools.partial(halves, labels=False)),
    "labels first": Variant("two stages, labels first", tasks=STAGE, data=halves,
                            stages=labels_first),
    "captions first": Variant("two stages, captions first", tasks=STAGE, data=halves,
                              stages=captions_first),
    "single encoder": Variant("single encoder, Eq. (1) on pairs", "--lambda-con 0", data=labelled_things,
                              change=LabelClassifier, tasks=FAMILY),
    "noisy": Variant("both losses, half of the captions exchanged", data=exchanged,
                     tasks=DEFAULT_TASKS),
    "noisy, contrastive only": Variant(
        "L_Con only, half exchanged", "--lambda-cap 0", data=exchanged, tasks=DEFAULT_TASKS,
        reference="contrastive only"),
    "noisy, captioning only": Variant(
        "L_Cap only, half exchanged", "--lambda-con 0", data=exchanged, tasks=DEFAULT_TASKS,
        reference="captioning only"),
    "width 64": Variant("width 64, 2 heads", tasks=DEFAULT_TASKS, sizes=dict(
        width=64, heads=2, encoder_mlp=256, decoder_mlp=256)),
    "width 192": Variant("width 192, 6 heads", tasks=DEFAULT_TASKS, sizes=dict(
        width=192, heads=6, encoder_mlp=768, decoder_mlp=768)),
}
for N in (384, 96, 24):
    VARIANTS[f"N {N}"] = Variant(f"Eq. (2) among {N}", batch=384, tasks=DEFAULT_TASKS,
                                 change=functools.partial(in_groups, size=N))

TABLES = {  # the first of a table is what the others are compared with
    "a": ("labels as classes or as text", ["classifier", "encoder-decoder"]),
    "b": ("training objectives, default both", ["default", "contrastive only", "captioning only"]),
    "c": ("lambda_cap : lambda_con, default 2 : 1",
          ["default", "weights 1:1", "weights 1:2", "weights 4:1"]),
    "d": ("n_uni, default 2 of 4 (paper: 6 of 12)", ["default", "n_uni 1", "n_uni 3"]),
    "e": ("text embedding, default one [CLS]", ["default", "mean text"]),
    "f": ("poolers, default cascade, n_query 16 (paper: 256)",
          ["default", "parallel", "n_query 0", "n_query 1", "n_query 4"]),
    "families": ("what each can do",
                 ["default", "single encoder", "contrastive only", "captioning only", "untrained"]),
    "one-stage": ("labels and captions as text",
                  ["one stage", "labels first", "captions first", "labels", "captions",
                   "labels, epochs", "captions, epochs"]),
    "noise": ("captions of other images",
              ["default", "noisy", "contrastive only", "noisy, contrastive only", "captioning only",
               "noisy, captioning only"]),
    "pairs": ("batches of 384", ["N 384", "N 96", "N 24"]),
    "sizes": ("width, default 128 with 4 heads", ["default", "width 64", "width 192"]),
}
# Seen in training; chosen on a table's first line alone, so that it is not at 100 %
IMAGES = {"a": 4_800, "b": 24_000, "c": 24_000, "d": 24_000, "e": 24_000, "f": 24_000,
          "families": 24_000, "one-stage": 24_000, "noise": 24_000, "pairs": 59_904,
          "sizes": 24_000}
SEEDS = {"pairs": 3, "sizes": 3}  # all others: 6
# Where a score is shown, if not in all tables: the variants of others are not all asked for it
ONLY_IN = {"accuracy": ["a"], LINEAR: ["a", "families"], COST: ["b"],
           "zero-shot by likelihood": ["families"], "video, frozen": ["families"],
           QUESTION: ["b", "c", "d", "e", "f"]}


if __name__ == "__main__":
    raise SystemExit("no command here; run: python -m experiments.ablations")
