"""The ablations of Table 8 at small scale: same data, same effort, several seeds a row.

    python tests/ablations.py                        all rows on generated scenes, seeds 0, 1, 2
    python tests/ablations.py --jobs 2               two runs at a time, one thread each
    python tests/ablations.py --rows b f             those rows only
    python tests/ablations.py --rows b f --data cifar10 --data-dir DIR
    python tests/ablations.py --table                what is there already, as Markdown; no run

Every run is a call of train.main; what no flag of train.py changes is changed in VARIANTS, for that
run alone. A finished run is a line of --out (tests/ablations.csv), and what has its line there is
not run again: after a stop the same command goes on. pytest does not collect this file.

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
import functools
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - these imports follow the path to the four files
import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval as evaluation
import train
from coca import CONFIGS, PAD, Classifier, CoCa, Losses, UnimodalDecoder
from data import Batches, UserError, load, note, questions

# Seen in training, for each row of Table 8; chosen on its first line alone, so that it is not at 100 %
IMAGES = dict.fromkeys("bcdef", 24_000) | {"a": 4_800}
QUESTIONS = 4000  # of which 3,400 are learned from
FROZEN_QUESTIONS = dataclasses.replace(evaluation.UNDERSTANDING, encoder_lr=0.0, steps=1000)

# ------------------------------------------------------------------------------------------------
# Variants that no flag gives

one_cls = UnimodalDecoder.forward


def mean_with_text(self, tokens):
    """Table 8e, "1 CLS + text tokens": the text embedding is the mean of all their states.

    The paper does not state how it puts them together.
    """
    states, cls = one_cls(self, tokens)                                 # (B, L, D), (B, D)
    real = (tokens != PAD)[..., None]                                   # (B, L, 1)
    total = cls + (self.norm(states) * real).sum(1)                     # (B, D)
    return states, total / (1 + real.sum(1))


def labelled(name, data_dir, split, size, seed, write, **unused):
    """train.load for Table 8a: labelled images, whose only caption is write(name of the class)."""
    splits = {"train": "labelled", "val": "labelled-val"}
    data = load(name, data_dir, splits[split], size, seed=seed)
    captions = [[write(data.classes[label])] for label in data.labels]
    return dataclasses.replace(data, captions=captions)


def one_word(name):
    return name.replace(" ", "_")


labels_as_text = functools.partial(labelled, write="a {}".format)
labels_as_classes = functools.partial(labelled, write=one_word)


class LabelClassifier(CoCa):
    """Table 8a: the encoder with a Classifier on its tokens. train.py trains it like any CoCa.

    Captions are BEGIN word END, where the word names the class: tokens[:, 1] is the label.
    """

    def __init__(self, config):
        super().__init__(config)
        self.classifier = Classifier(config.width, config.heads, config.vocab_size)

    def classify(self, images):
        """images (B, 3, S, S) -> logits (B, V), a class for each word."""
        return self.classifier(self.encoder(images))

    def losses(self, images, tokens):
        """Eq. (1) in the place of Eq. (4)."""
        loss = F.cross_entropy(self.classify(images), tokens[:, 1])
        return Losses(loss, torch.zeros_like(loss), loss)


class Variant(NamedTuple):
    flags: str = ""  # of train.py
    sizes: dict = {}  # fields of CoCaConfig that have no flag
    swaps: tuple = ()  # (where, name, what stands there instead)


VARIANTS = {
    "default": Variant(),
    "contrastive only": Variant("--lambda-cap 0"),
    "captioning only": Variant("--lambda-con 0"),
    "weights 1:1": Variant("--lambda-cap 1 --lambda-con 1"),
    "weights 1:2": Variant("--lambda-cap 1 --lambda-con 2"),
    "n_uni 1": Variant(sizes=dict(n_uni=1, n_multi=3)),
    "n_uni 3": Variant(sizes=dict(n_uni=3, n_multi=1)),
    "mean text": Variant(swaps=[(UnimodalDecoder, "forward", mean_with_text)]),
    "parallel": Variant("--pooler parallel"),
    "n_query 0": Variant("--n-query 0"),
    "n_query 1": Variant("--n-query 1"),
    "n_query 4": Variant("--n-query 4"),
    "classifier": Variant("--lambda-con 0", swaps=[(train, "load", labels_as_classes),
                                                   (train, "CoCa", LabelClassifier)]),
    "encoder-decoder": Variant("--lambda-con 0", swaps=[(train, "load", labels_as_text)]),
}


@contextlib.contextmanager
def applied(variant):
    """Sizes and swaps of a variant hold inside this only."""
    with contextlib.ExitStack() as stack:
        tiny = dataclasses.replace(CONFIGS["tiny"], **variant.sizes)
        stack.enter_context(mock.patch.dict(CONFIGS, tiny=tiny))
        for where, name, instead in variant.swaps:
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


# ------------------------------------------------------------------------------------------------
# Table 8: for each row its lines, as (what it says, variant, the paper's scores). The paper's
# zero-shot is ImageNet's, its questions are VQA's, finetuned with all of the model

ZERO_SHOT, QUESTION, BOTH_WAYS = "zero-shot top-1", "questions", "mean R@1"
ACCURACY, COST = "accuracy", "cost of a step"
SCORES = [ACCURACY, ZERO_SHOT, "captions exactly right", "image to text R@1", BOTH_WAYS, QUESTION,
          COST, "val_con", "val_cap"]
NO_SHARES = (COST, "val_con", "val_cap")  # all others are printed in per cent

TABLE_8 = {
    "a": ("labels as classes or as text", [
        ("classifier, Eq. (1)", "classifier", {ACCURACY: 85.1}),
        ("encoder-decoder, labels read off its captions", "encoder-decoder", {ACCURACY: 84.9})]),
    "b": ("training objectives", [
        ("both", "default", {ZERO_SHOT: 71.6, QUESTION: 69.0, COST: 1.18}),
        ("L_Con only", "contrastive only", {ZERO_SHOT: 70.7, QUESTION: 59.2, COST: 1.0}),
        ("L_Cap only", "captioning only", {QUESTION: 68.9, COST: 1.17})]),
    "c": ("lambda_cap : lambda_con", [
        ("cap : con = 2 : 1", "default", {ZERO_SHOT: 71.6, QUESTION: 69.0}),
        ("cap : con = 1 : 1", "weights 1:1", {ZERO_SHOT: 71.5, QUESTION: 68.6}),
        ("cap : con = 1 : 2", "weights 1:2", {ZERO_SHOT: 71.0, QUESTION: 68.1})]),
    "d": ("n_uni of all decoder layers", [
        ("n_uni 2 of 4 (paper: 6 of 12)", "default", {ZERO_SHOT: 71.6, QUESTION: 69.0}),
        ("n_uni 1 of 4 (3 of 12)", "n_uni 1", {ZERO_SHOT: 70.2, QUESTION: 69.0}),
        ("n_uni 3 of 4 (9 of 12)", "n_uni 3", {ZERO_SHOT: 71.4, QUESTION: 68.8})]),
    "e": ("text embedding", [
        ("one [CLS]", "default", {BOTH_WAYS: 41.4}),
        ("mean of [CLS] and the text's states", "mean text", {BOTH_WAYS: 40.2})]),
    "f": ("poolers", [
        ("cascade, n_query 16 (paper: 256)", "default", {ZERO_SHOT: 71.6, QUESTION: 69.0}),
        ("parallel", "parallel", {ZERO_SHOT: 71.2, QUESTION: 68.7}),
        ("n_query 0", "n_query 0", {ZERO_SHOT: 71.5, QUESTION: 69.0}),
        ("n_query 1", "n_query 1", {ZERO_SHOT: 69.3, QUESTION: 64.4}),
        ("n_query 4 (paper: 32)", "n_query 4", {ZERO_SHOT: 71.2, QUESTION: 68.2})]),
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
    flags: str  # of train.py but for folders, with what it would choose by itself

    @property
    def steps(self):
        return train.parse_args(self.flags.split()).steps


def make_job(variant, data, images, seed):
    preset = train.PRESETS[data]
    size = preset["batch_size"]
    flags = (f"--data {data} --steps {max(1, images // size)} --batch-size {size} "
             f"--lr {preset['lr']} --seed {seed} --device cpu {VARIANTS[variant].flags}")
    return Job(variant, data, str(images), str(seed), flags.strip())


COLUMNS = [*Job._fields, *SCORES, "training_seconds", "seconds", "commit"]


def perform(job, data_dir, out):
    """Trains in the folder out, on one thread and in silence -> {column: text}."""
    torch.set_num_threads(1)
    began = time.time()
    scores = {}
    folders = ["--out", str(out)] + ["--data-dir", str(data_dir)] * bool(data_dir)
    try:
        with silence(), applied(VARIANTS[job.variant]):
            with (mock.patch.object(train, "evaluate", functools.partial(measure, job)),
                  mock.patch.object(train, "print_scores", scores.update)):
                train.main(job.flags.split() + folders)
            if any(job.variant == variant for _, variant, _ in TABLE_8["b"][1]):
                scores[COST] = relative_cost(job, data_dir)
    except SystemExit:  # train.py was asked to stop
        raise UserError("stopped within a run; the same command starts it again") from None
    with open(out / "metrics.csv") as f:
        *_, last = csv.DictReader(f)
    for name, flag in (("val_con", "--lambda-con 0"), ("val_cap", "--lambda-cap 0")):
        if flag not in job.flags and job.variant != "classifier":  # its loss is Eq. (1)
            scores[name] = float(last[name])
    texts = {name: f"{value:.6g}" for name, value in scores.items()}
    seconds = {"training_seconds": f"{float(last['seconds']):.1f}",
               "seconds": f"{time.time() - began:.1f}"}
    return {**job._asdict(), **texts, **seconds}


@contextlib.contextmanager
def silence():
    """Runs side by side would write over each other."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def measure(job, model, tokenizer, settings):
    """-> {score: value}. Stands in the place of train.evaluate, at the end of train.main."""
    if job.variant in ("classifier", "encoder-decoder"):
        return {ACCURACY: label_accuracy(model, tokenizer, settings)}
    found = evaluation.evaluate(model, tokenizer, settings)
    scores = {name: found[name]["score"] for name in SCORES if name in found}
    if "image to text R@1" in found:
        both = found["image to text R@1"]["score"] + found["text to image R@1"]["score"]
        scores[BOTH_WAYS] = both / 2
    if job.data == "shapes":
        scores[QUESTION] = frozen_questions(model, tokenizer, settings)
    return scores


@torch.no_grad()
def label_accuracy(model, tokenizer, settings):
    """Share of the labelled validation images whose class is read off rightly."""
    size = model.config.image_size
    val = train.load("shapes", None, "val", size=size, seed=settings["seed"])  # of this variant
    if isinstance(model, LabelClassifier):
        logits = [model.classify(x) for x in evaluation.in_batches(model, val.images, "classes")]
        predicted = [tokenizer.words[i] for i in torch.cat(logits).argmax(-1).tolist()]
    else:
        predicted = evaluation.caption(model, tokenizer, val.images)  # greedy
    right = sum(text == true for text, (true,) in zip(predicted, val.captions))
    return right / len(val)


def frozen_questions(model, tokenizer, settings):
    """Sec. 4.2, but all is frozen save the new pooler over the decoder's outputs: what a loss did
    not teach the model must show. (With L_Con alone the upper half of the decoder is untrained.)
    """
    context = evaluation.Context(model, tokenizer, settings)
    asked = questions(context.size, QUESTIONS, context.seed)
    learned = QUESTIONS * 85 // 100
    return evaluation.understand(context, asked, FROZEN_QUESTIONS, 0, learned)["score"]


# ------------------------------------------------------------------------------------------------
# Seconds


class Timed(train.Run):
    """A run that keeps nothing."""

    def save(self):
        pass


def make_run(kind, flags, data_dir=None):
    """-> a train.Run of that kind, on the CPU, as train.main makes it of its flags; its batches."""
    settings = train.choose_settings(train.parse_args(flags))
    settings["data_dir"] = data_dir
    config = train.make_config(settings)
    settings.update({name: getattr(config, name) for name in train.SIZES})
    s = argparse.Namespace(**settings)
    data, val = train.load_data(s, config.image_size, False, 0, 1)
    model, tokenizer = train.new_model(config, s, data)
    train.prepare(model, s)
    optimizer = train.make_optimizer(model)
    batches = Batches(data, tokenizer, config.text_len, s.batch_size, s.seed)
    return kind(None, settings, model, tokenizer, optimizer, val, "cpu", []), batches


def step_seconds(jobs, data_dir, clock=time.perf_counter, turns=8, steps=2):
    """Median seconds of a step of each job by train.train, a few steps of each in turn."""
    torch.set_num_threads(1)
    runs = []
    for job in jobs:
        runs.append(make_run(Timed, [*job.flags.split(), "--subset", "1000"], data_dir))
    times = [[] for _ in jobs]
    for _ in range(turns + 1):
        for (run, batches), seconds in zip(runs, times):
            began = clock()
            run.settings["steps"] = len(run.rows) + steps
            train.train(run, batches, steps, [run.settings["batch_size"]], 0)
            seconds.append((clock() - began) / steps)
    return [statistics.median(seconds[1:]) for seconds in times]  # the first turn warms up


def relative_cost(job, data_dir):
    """Table 8b: a step's seconds, with L_Con alone being 1 (for which 1.00 shows the error).

    Seconds of the processor: they change less with what else runs on the machine.
    """
    least = make_job("contrastive only", job.data, int(job.images), int(job.seed))
    seconds, of_least = step_seconds([job, least], data_dir, time.process_time)
    return seconds / of_least


def expectation(left, lines, args):
    """How long the runs that are left will take, as text."""
    if lines:
        seen = sum(int(line["images"]) for line in lines)
        pace = sum(float(line["seconds"]) for line in lines) / seen
        source = "by the runs that are done"
    else:
        with silence():
            step, = step_seconds(left[:1], args.data_dir)
        pace = step * left[0].steps / int(left[0].images)
        source = "evaluation not counted"
    minutes = pace * sum(int(job.images) for job in left) / args.jobs / 60
    return f"{minutes:.0f} minutes at {pace * 1e3:.1f} ms an image ({source})"


# ------------------------------------------------------------------------------------------------
# All runs


def jobs_of(rows, args):
    """Each run once, in however many rows it is; seed by seed, so that rows fill evenly."""
    found = {}
    for seed in args.seeds:
        for row in rows:
            for _, variant, _ in TABLE_8[row][1]:
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
    """One write and a sync: a line is there or it is not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if not os.path.exists(path) or not os.path.getsize(path):
        writer.writeheader()
    writer.writerow(line)
    with open(path, "a", newline="") as f:
        f.write(text.getvalue())
        f.flush()
        os.fsync(f.fileno())


def git(*arguments):
    """What git says, "" if it is not there or this is no clone."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def commit():
    """Short name of the commit, with + if the four files are not as they are there."""
    changed = git("status", "--porcelain", "coca.py", "data.py", "eval.py", "train.py")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def results(runs, jobs):
    """Arguments of perform -> its results as they come; several processes if jobs > 1."""
    if jobs == 1:
        for arguments in runs:
            yield perform(*arguments)
        return
    waiting = list(reversed(runs))
    running = set()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        while waiting or running:
            while waiting and len(running) < jobs:  # no more, so that a stop has none in the queue
                running.add(pool.submit(perform, *waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def run_all(jobs, args):
    """Runs what has no line in the CSV yet, and adds its line."""
    lines = read_lines(args.out)
    left = [job for job in jobs if job not in lines]
    done = [lines[job] for job in jobs if job in lines]
    at = commit()
    try:
        open(args.out, "a").close()
    except OSError as e:
        raise UserError(f"{args.out}: cannot be written ({e.strerror}); give another --out") from None
    how_long = expectation(left, done, args) if left else "nothing to run"
    note(f"{len(jobs)} runs, {len(done)} done, {len(left)} left: {how_long}")
    with tempfile.TemporaryDirectory() as folder:
        runs = [(job, args.data_dir, Path(folder) / str(i)) for i, job in enumerate(left)]
        bar = tqdm(results(runs, args.jobs), "runs", len(jobs), initial=len(done))
        for line in bar:
            append_line(args.out, {**line, "commit": at})
            scores = [f"{name} {line[name]}" for name in SCORES if name in line]
            bar.write(f"{line['variant']}, seed {line['seed']}, {line['seconds']} s: "
                      f"{', '.join(scores)}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# The table


def verdict(values, reference, paper_difference):
    """One of three words on mean(values) - mean(reference): see the top of this file."""
    n, m = len(values), len(reference)
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


def compare(lines, variant, paper, reference, reference_paper):
    """-> the paper's differences from the reference, and what is seen of them here, as texts."""
    theirs = []
    here = []
    for score, value in paper.items():
        if score in reference_paper and score in SCORES:
            difference = round(value - reference_paper[score], 2)
            theirs.append(f"{score} {difference:+g}")
            found = values_of(lines, variant, score)
            base = values_of(lines, reference, score)
            if found and base:
                here.append(f"{score} *{verdict(found, base, difference)}*")
    return ", ".join(theirs), ", ".join(here)


def markdown(row, lines):
    """A row of Table 8 as a Markdown table."""
    title, entries = TABLE_8[row]
    _, reference, reference_paper = entries[0]
    variants = [variant for _, variant, _ in entries]
    shown = []
    for score in SCORES:
        there = any(values_of(lines, variant, score) for variant in variants)
        if there and (score != COST or row == "b"):
            shown.append(score)
    table = [[f"({row}) {title}", *shown, "paper's difference", "here"]]
    table.append(["---"] * len(table[0]))
    for what, variant, paper in entries:
        numbers = [as_text(score, values_of(lines, variant, score)) for score in shown]
        compared = ("", "")
        if variant != reference:
            compared = compare(lines, variant, paper, reference, reference_paper)
        table.append([what, *numbers, *compared])
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
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                usage="python tests/ablations.py [options]")
    p.add_argument("--images", type=train.at_least(1, int),
                   help=f"seen in training, in each run (default: {max(IMAGES.values())}, row a "
                        f"{IMAGES['a']})")
    p.add_argument("--seeds", nargs="+", type=train.at_least(0, int), default=[0, 1, 2])
    p.add_argument("--rows", nargs="+", choices=TABLE_8, help="of Table 8 (default: all there are)")
    p.add_argument("--data", choices=ROWS, default="shapes")
    p.add_argument("--data-dir", help="folder of the data")
    p.add_argument("--jobs", type=train.at_least(1, int), default=1,
                   help="runs side by side, one thread each (default: 1)")
    p.add_argument("--out", default=str(ROOT / "tests" / "ablations.csv"),
                   help="a line a run (default: tests/ablations.csv)")
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
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
