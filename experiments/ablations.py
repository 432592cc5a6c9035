"""The ablations of Table 8 at small scale: same data, same effort, several seeds a row.

    python -m experiments.ablations                     all rows on generated scenes, seeds 0, 1, 2
    python -m experiments.ablations --jobs 2            two runs at a time, one thread each
    python -m experiments.ablations --rows b f          those rows only
    python -m experiments.ablations --rows b f --data cifar10 --data-dir DIR
    python -m experiments.ablations --table             what is there already, as Markdown; no run

A variant is flags of train.py, or other data, or a change of the model: VARIANTS. A finished run is
a line of --out (experiments/ablations.csv), and what has its line there is not run again: after a
stop the same command goes on.

The last column of the table holds our difference from the first line of the row against the
paper's, by `verdict`: with s the standard deviation of a score over the seeds, pooled over both
variants,

    within the spread    the two means lie at most 2 s apart, or one of them has a single seed:
                         luck may be all there is, and where both are at 100 % it is this, too
    shows                they lie further apart, in the paper's direction
    does not show        they lie further apart in the other direction, or the paper has them equal

Where the paper has two variants equal, or calls them on par (8a), "within the spread" is all that
can be asked for.
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from coca import CoCa, Losses, UnimodalDecoder, text_mask
from data import Batches, UserError, load, note, run_program
from eval import Classifier, caption, evaluate
from experiments.understanding import UNDERSTANDING, questions, understand

LINES = Path(__file__).with_name("ablations.csv")
# Seen in training, for each row of Table 8; chosen on its first line alone, so that it is not at 100 %
IMAGES = {"a": 4_800, "b": 24_000, "c": 24_000, "d": 24_000, "e": 24_000, "f": 24_000}
QUESTIONS = 4000  # of which 3,400 are learned from
# Of Sec. 4.2, but all is frozen save the new pooler over the decoder's states: what a loss did not
# teach the model must show. (With L_Con alone the upper half of the decoder is untrained.)
FROZEN_QUESTIONS = dataclasses.replace(UNDERSTANDING, encoder_lr=0.0, steps=1000)

# ------------------------------------------------------------------------------------------------
# Models and data that no flag of train.py gives


def one_word(name):
    return name.replace(" ", "_")


def labelled(s, write):
    """Table 8a: training and validation Dataset of images whose only caption is write(class)."""
    found = []
    for split in ("labelled", "labelled-val"):
        data = load(s.data, s.data_dir, split, s.image_size, seed=s.seed)
        captions = [[write(data.classes[label])] for label in data.labels]
        found.append(dataclasses.replace(data, captions=captions))
    return found


class LabelClassifier(CoCa):
    """Table 8a: the encoder with a Classifier on its tokens. train.py trains it like any CoCa.

    Captions are BEGIN word END, where the word names the class: tokens[:, 1] is the label.
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
        """Eq. (1) in the place of Eq. (4)."""
        loss = F.cross_entropy(self.classify(images), tokens[:, 1])
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


# ------------------------------------------------------------------------------------------------
# Table 8

ZERO_SHOT = "zero-shot top-1"  # the paper's is ImageNet's
RIGHT = "captions exactly right"
BOTH_WAYS = "mean R@1"
QUESTION = "questions"  # the paper's are VQA's, finetuned with all of the model
ACCURACY = "accuracy"
COST = "cost of a step"
SCORES = [ACCURACY, ZERO_SHOT, RIGHT, "image to text R@1", BOTH_WAYS, QUESTION, COST, "val_con",
          "val_cap"]
NO_SHARES = (COST, "val_con", "val_cap")  # all others are printed in per cent


class Variant(NamedTuple):
    what: str
    flags: str  # of train.py
    paper: dict  # its scores in Table 8
    write: Callable = None  # name of a class -> caption: train on labelled images instead
    change: Callable = None  # the new model -> the one that is trained instead


VARIANTS = {
    "default": Variant("default", "",
                       {ZERO_SHOT: 71.6, QUESTION: 69.0, BOTH_WAYS: 41.4, COST: 1.18}),
    "classifier": Variant("classifier, Eq. (1)", "--lambda-con 0", {ACCURACY: 85.1}, one_word,
                          LabelClassifier),
    "encoder-decoder": Variant("encoder-decoder, labels read off its captions", "--lambda-con 0",
                               {ACCURACY: 84.9}, "a {}".format),
    "contrastive only": Variant("L_Con only", "--lambda-cap 0",
                                {ZERO_SHOT: 70.7, QUESTION: 59.2, COST: 1.0}),
    "captioning only": Variant("L_Cap only", "--lambda-con 0", {QUESTION: 68.9, COST: 1.17}),
    "weights 1:1": Variant("cap : con = 1 : 1", "--lambda-cap 1 --lambda-con 1",
                           {ZERO_SHOT: 71.5, QUESTION: 68.6}),
    "weights 1:2": Variant("cap : con = 1 : 2", "--lambda-cap 1 --lambda-con 2",
                           {ZERO_SHOT: 71.0, QUESTION: 68.1}),
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
}
TABLE_8 = {  # the first of a row is what the others are compared with
    "a": ("labels as classes or as text", ["classifier", "encoder-decoder"]),
    "b": ("training objectives, default both", ["default", "contrastive only", "captioning only"]),
    "c": ("lambda_cap : lambda_con, default 2 : 1", ["default", "weights 1:1", "weights 1:2"]),
    "d": ("n_uni, default 2 of 4 (paper: 6 of 12)", ["default", "n_uni 1", "n_uni 3"]),
    "e": ("text embedding, default one [CLS]", ["default", "mean text"]),
    "f": ("poolers, default cascade, n_query 16 (paper: 256)",
          ["default", "parallel", "n_query 0", "n_query 1", "n_query 4"]),
}
ROWS = {"shapes": list(TABLE_8), "cifar10": ["b", "f"]}

# ------------------------------------------------------------------------------------------------
# One run


class Job(NamedTuple):
    """A run, by what its result depends on: its line in the CSV starts with this."""

    variant: str
    data: str
    images: str
    seed: str
    flags: str  # of train.py but for --data-dir, with what it would choose by itself


COLUMNS = [*Job._fields, *SCORES, "training_seconds", "seconds", "commit"]


def make_job(variant, data, images, seed):
    size = train.PRESETS[data]["batch_size"]
    flags = (f"--data {data} --steps {max(1, images // size)} --batch-size {size} "
             f"--lr {train.PRESETS[data]['lr']} --seed {seed} --device cpu {VARIANTS[variant].flags}")
    return Job(variant, data, str(images), str(seed), flags.strip())


def compose(flags, variant=VARIANTS["default"], data_dir=None):
    """What train.main is made of, for these flags -> settings, model, tokenizer, validation Dataset,
    train.train: next() is a step. Nothing is saved.
    """
    folder = ["--data-dir", data_dir] if data_dir else []
    s, _ = train.parse_args([*flags.split(), *folder])
    data, val = labelled(s, variant.write) if variant.write else train.load_data(s, rank=0)
    model, tokenizer = train.new_model(s, data)
    if variant.change:
        model = variant.change(model)
    train.prepare(model, s)
    optimizer = train.make_optimizer(model)
    batches = Batches(data, tokenizer, s.text_len, s.batch_size, s.seed)
    return s, model, tokenizer, val, train.train(model, optimizer, batches, s)


def perform(job, data_dir):
    """Trains and evaluates, on one thread and in silence -> {column: text}."""
    torch.set_num_threads(1)
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        s, model, tokenizer, val, steps = compose(job.flags, VARIANTS[job.variant], data_dir)
        composed = time.time()
        for _ in steps:
            pass
        trained = time.time()
        scores = measure(job.variant, s, model, tokenizer, val)
        if COST in VARIANTS[job.variant].paper:
            scores[COST] = relative_cost(job, data_dir)
    texts = {name: f"{value:.6g}" for name, value in scores.items()}
    return {**job._asdict(), **texts, "training_seconds": f"{trained - composed:.1f}",
            "seconds": f"{time.time() - began:.1f}"}


def measure(variant, s, model, tokenizer, val):
    """-> {score: value} of the trained model."""
    con, cap = train.validate(s, model, tokenizer, val)
    scores = {}
    if s.lambda_con:
        scores["val_con"] = con
    if s.lambda_cap and variant != "classifier":  # its loss is Eq. (1)
        scores["val_cap"] = cap
    if variant in ("classifier", "encoder-decoder"):
        captions = caption(model, tokenizer, val.images)  # greedy
        right = sum([text] == true for text, true in zip(captions, val.captions))
        return {**scores, ACCURACY: right / len(val)}
    found = evaluate(model, tokenizer, vars(s))
    for name in SCORES:
        if name in found:
            scores[name] = found[name]["score"]
    if "image to text R@1" in found:
        both = found["image to text R@1"]["score"] + found["text to image R@1"]["score"]
        scores[BOTH_WAYS] = both / 2
    if s.data == "shapes":
        asked = questions(s.image_size, QUESTIONS, s.seed)
        scores[QUESTION], _ = understand(model, tokenizer, vars(s), asked, recipe=FROZEN_QUESTIONS,
                                         learned=QUESTIONS * 85 // 100)
    return scores


def relative_cost(job, data_dir, turns=8, steps=2):
    """Table 8b: seconds of a step, with L_Con alone being 1 (for which 1.00 shows the error).

    Median seconds of the processor, which change less with what else runs on the machine; a few
    steps of each in turn.
    """
    least = make_job("contrastive only", job.data, int(job.images), job.seed)
    runs = []
    for flags in (job.flags, least.flags):
        *_, run = compose(f"{flags} --subset 1000 --steps 1000", data_dir=data_dir)
        runs.append(run)
    seconds = [[], []]
    for _ in range(turns + 1):
        for run, found in zip(runs, seconds):
            began = time.process_time()
            for _ in range(steps):
                next(run)
            found.append(time.process_time() - began)
    own, of_least = [statistics.median(found[1:]) for found in seconds]  # the first turn warms up
    return own / of_least


# ------------------------------------------------------------------------------------------------
# All runs


def jobs_of(rows, args):
    """Each run once, in however many rows it is; seed by seed, so that rows fill evenly."""
    found = {}
    for seed in args.seeds:
        for row in rows:
            for variant in TABLE_8[row][1]:
                images = args.images or IMAGES[row]
                found[make_job(variant, args.data, images, seed)] = True
    return list(found)


def read_lines(path):
    """The CSV -> {Job: its line}; {} if there is none."""
    if not os.path.isfile(path):
        return {}
    lines = {}
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames and reader.fieldnames != COLUMNS:
            raise UserError(f"{path}: not the columns of this version; give another --out")
        for line in reader:
            if None in line or None in line.values():
                raise UserError(f"{path}: line {reader.line_num} is not whole; delete it")
            lines[Job(*(line[name] for name in Job._fields))] = line
    return lines


def append_line(path, line):
    """One write, as the file is closed: a line is there or it is not."""
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, restval="", lineterminator="\n")
        if not f.tell():
            writer.writeheader()
        writer.writerow(line)


def commit():
    """Short name of the commit, with + if the programs are not as they are there; "" if there is
    no git, or this is no clone.
    """
    def git(*arguments):
        command = ["git", "-C", Path(__file__).parent.parent, *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "*.py", ":!tests")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except OSError:
        return ""


def results(jobs, args):
    """Jobs -> the results of perform as they come, from several processes if --jobs says so."""
    if args.jobs == 1:
        for job in jobs:
            yield perform(job, args.data_dir)
        return
    waiting = iter(jobs)
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        running = set()
        for job in islice(waiting, args.jobs):  # no more at a time: a stop finds none in the queue
            running.add(pool.submit(perform, job, args.data_dir))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for job in islice(waiting, len(done)):
                running.add(pool.submit(perform, job, args.data_dir))
            for future in done:
                yield future.result()


def run_all(jobs, args):
    """Runs what has no line in the CSV yet, and adds its line."""
    lines = read_lines(args.out)
    left = [job for job in jobs if job not in lines]
    at = commit()
    try:
        open(args.out, "a").close()
    except OSError as e:
        raise UserError(f"{args.out}: cannot be written ({e.strerror}); give another --out") from None
    done = len(jobs) - len(left)
    note(f"{done} of {len(jobs)} runs are there")
    for line in tqdm(results(left, args), "runs", len(jobs), initial=done):
        append_line(args.out, {**line, "commit": at})
        note(f"{line['variant']}, seed {line['seed']}: {line['seconds']} s")


# ------------------------------------------------------------------------------------------------
# The table


def verdict(values, reference, paper_difference):
    """One of three words on mean(values) - mean(reference): see the top of this file."""
    n = len(values)
    m = len(reference)
    if min(n, m) < 2:
        return "within the spread"
    difference = statistics.fmean(values) - statistics.fmean(reference)
    squares = (n - 1) * statistics.variance(values) + (m - 1) * statistics.variance(reference)
    spread = math.sqrt(squares / (n + m - 2))
    if abs(difference) <= 2 * spread:
        return "within the spread"
    if difference * paper_difference > 0:
        return "shows"
    return "does not show"


def values_of(lines, variant, score):
    """A score of a variant, one number a seed."""
    return [float(line[score]) for line in lines if line["variant"] == variant and line[score]]


def as_text(score, values):
    """Mean and standard deviation; shares in per cent."""
    if not values:
        return ""
    scale, digits = (1, 2) if score in NO_SHARES else (100, 1)
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def compare(lines, variant, reference):
    """-> the paper's differences from the reference, and what is seen of them here, as texts."""
    theirs = []
    here = []
    for score, value in VARIANTS[variant].paper.items():
        if score in VARIANTS[reference].paper:
            difference = round(value - VARIANTS[reference].paper[score], 2)
            theirs.append(f"{score} {difference:+g}")
            found = values_of(lines, variant, score)
            base = values_of(lines, reference, score)
            if found and base:
                here.append(f"{score} *{verdict(found, base, difference)}*")
    return ", ".join(theirs), ", ".join(here)


def markdown(row, lines):
    """A row of Table 8 as a Markdown table."""
    title, variants = TABLE_8[row]
    shown = []
    for score in SCORES:
        there = any(values_of(lines, variant, score) for variant in variants)
        if there and (score != COST or row == "b"):
            shown.append(score)
    table = [[f"({row}) {title}", *shown, "paper's difference", "here"]]
    table.append(["---"] * len(table[0]))
    for variant in variants:
        numbers = [as_text(score, values_of(lines, variant, score)) for score in shown]
        compared = ("", "")
        if variant != variants[0]:
            compared = compare(lines, variant, variants[0])
        table.append([VARIANTS[variant].what, *numbers, *compared])
    widths = [max(map(len, column)) for column in zip(*table)]
    text = ""
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        text += f"| {' | '.join(padded)} |\n"
    return text


def print_table(rows, jobs, args):
    found = read_lines(args.out)
    lines = [found[job] for job in jobs if job in found]
    commits = sorted({line["commit"] for line in lines})
    seeds = ", ".join(map(str, args.seeds))
    images = ", ".join(f"({row}) {args.images or IMAGES[row]:,}" for row in rows)
    print(f"{args.data}; images seen a run: {images}; {len(lines)} of {len(jobs)} runs; mean ± "
          f"s.d. of seeds {seeds}; shares in per cent; commit {', '.join(commits) or 'none'}\n")
    for row in rows:
        print(markdown(row, lines))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.ablations [options]")
    p.add_argument("--images", type=train.at_least(1), help="seen in training, in each run (default: "
                   f"{max(IMAGES.values())}, row a {IMAGES['a']})")
    p.add_argument("--seeds", nargs="+", type=train.at_least(0), default=[0, 1, 2])
    p.add_argument("--rows", nargs="+", choices=TABLE_8, help="of Table 8 (default: all there are)")
    p.add_argument("--data", choices=ROWS, default="shapes")
    p.add_argument("--data-dir", help="folder of the data")
    p.add_argument("--jobs", type=train.at_least(1), default=1,
                   help="runs side by side, one thread each (default: 1)")
    p.add_argument("--out", default=LINES,
                   help="a line a run (default: experiments/ablations.csv)")
    p.add_argument("--table", action="store_true", help="print the table only, and run nothing")
    args = p.parse_args(argv)
    rows = args.rows or ROWS[args.data]
    for row in rows:
        if row not in ROWS[args.data]:
            p.error(f"{args.data} has rows {' '.join(ROWS[args.data])} only")
    jobs = jobs_of(rows, args)
    if not args.table:
        run_all(jobs, args)
    print_table(rows, jobs, args)


if __name__ == "__main__":
    run_program(main)
