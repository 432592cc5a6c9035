"""Table 8 at small scale, and more tables: several seeds a line.

    python -m experiments.ablations                     all on generated scenes, three or six seeds
    python -m experiments.ablations --jobs 2            two runs at a time, one thread each
    python -m experiments.ablations --rows b f          those tables only
    python -m experiments.ablations --rows b f --data cifar10 --data-dir DIR
    python -m experiments.ablations --table             what is there already, as Markdown; no run

experiments/variants.py says what is run. A finished run is a line of --out
(experiments/ablations.csv), and what has its line there is not run again: after a stop the same
command goes on. Lines count if they are of the present commit or of one in EQUAL, and of these
very data.

Lines of a table see the same data and as many images, unless a line says otherwise. They are
compared with the first (or what Variant.reference says), seed by seed, as a seed fixes scenes, order
and most initial values for all: `67.7 (-17.0 ± 4.7, 6/6)` is the mean, the mean difference with its
standard error, and how many seeds have a difference of that sign (a tie has not). It is printed in
bold, and called more than luck, only if all of six seeds or more agree *and* the mean is over four
standard errors from 0: by luck some 1 % of comparisons are. In Table 8 the last column says
whether it then goes the paper's way.
"""
import argparse
import contextlib
import copy
import csv
import functools
import io
import math
import os
import statistics
import subprocess
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.ablations")

import torch
from tqdm import tqdm

import train
from data import Batches, UserError, note, one_error, run_program
from eval import evaluate, load_data
from experiments.variants import (
    BOTH_WAYS,
    COST,
    IMAGES,
    IN_NO_TABLE,
    NO_SHARES,
    ONLY_IN,
    SCORES,
    SEEDS,
    TABLES,
    VARIANTS,
    LabelClassifier,
)

LINES = Path(__file__).with_name("ablations.csv")
EQUAL = {"41df62f", "a9eda62"}  # commits whose results were proved equal to those of today's programs
ROWS = {"shapes": list(TABLES), "cifar10": ["b", "f"]}

# ------------------------------------------------------------------------------------------------
# One run


class Job(NamedTuple):
    """A run, by what its result depends on: its line in the CSV starts with this."""

    variant: str
    data: str
    images: str
    seed: str
    flags: str  # of train.py but for --data-dir, with what it would choose by itself
    fingerprint: str  # of the data


NUMBERS = [*SCORES, "training_seconds", "seconds"]  # or nothing, where there is no such score
COLUMNS = [*Job._fields, *NUMBERS, "commit"]


def make_job(variant, data, images, seed, fingerprint=""):
    size = VARIANTS[variant].batch or train.PRESETS[data]["batch_size"]
    images = int(images * VARIANTS[variant].share)
    flags = (f"--data {data} --steps {max(1, images // size)} --batch-size {size} "
             f"--lr {train.PRESETS[data]['lr']} --seed {seed} --device cpu {VARIANTS[variant].flags}")
    return Job(variant, data, str(images), str(seed), flags.strip(), fingerprint)


@functools.cache
def fingerprint_of(data, seed, data_dir):
    """Of the names and captions of the training and validation images."""
    s = SimpleNamespace(data=data, data_dir=data_dir, seed=seed, image_size=1, fingerprint=None)
    parts = [load_data(vars(s), split) for split in ("train", "val")]  # (pixels do not count here)
    train.check_data(s, *parts)
    return s.fingerprint[:16]


def compose(flags, variant=VARIANTS["default"], data_dir=None):
    """What train.main is made of, for these flags -> settings, model, tokenizer, validation Dataset,
    train.train: next() is a step. Nothing is saved.
    """
    folder = [f"--data-dir={data_dir}"] if data_dir else []
    s, _ = train.parse_args([*flags.split(), *folder])
    vars(s).update(variant.sizes)
    if variant.data:
        data, val = variant.data(s)
    else:
        data = load_data(vars(s), "train")
        val = load_data(vars(s), "val")
    model, tokenizer = train.new_model(s, data)
    if variant.change:
        model = variant.change(model)
    train.prepare(model, s)
    return s, model, tokenizer, val, in_stages(model, tokenizer, variant.stages(data), s)


def in_stages(model, tokenizer, parts, s):
    """Learns Datasets one after another, as several-stage pretraining does: each for an equal share
    of the steps, with a learning rate schedule and an optimizer of its own. As train.train.
    """
    of_one = copy.copy(s)
    of_one.steps = s.steps // len(parts)
    for part in parts:
        batches = Batches(part, tokenizer, s.text_len, s.batch_size, s.seed)
        yield from train.train(model, train.make_optimizer(model), batches, of_one)


def perform(job, data_dir):
    """Trains and evaluates, on one thread and without eval.py's tables -> {column: text}."""
    torch.set_num_threads(1)
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
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
    if s.lambda_cap and not isinstance(model, LabelClassifier):  # whose loss is Eq. (1)
        scores["val_cap"] = cap
    found = evaluate(model, tokenizer, vars(s), VARIANTS[variant].tasks, notes=False)
    for name in SCORES:
        if name in found:
            scores[name] = found[name]["score"]
    if "image to text R@1" in found:
        both = found["image to text R@1"]["score"] + found["text to image R@1"]["score"]
        scores[BOTH_WAYS] = both / 2
    return scores


def relative_cost(job, data_dir, turns=8, steps=2):
    """Table 8b: seconds of a step beside those of L_Con alone (whose own value should be 1.00).

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
    for seed in args.seeds or range(6):
        for row in rows:
            if seed not in seeds_of(row, args):
                continue
            fingerprint = fingerprint_of(args.data, seed, args.data_dir)
            for variant in TABLES[row][1]:
                images = args.images or IMAGES[row]
                found[make_job(variant, args.data, images, seed, fingerprint)] = True
    return list(found)


def seeds_of(row, args):
    return args.seeds or range(SEEDS.get(row, 6))


def read_csv(path, columns, numbers):
    """A table of these columns, of which some hold numbers -> its lines; [] if there is none."""
    if not os.path.isfile(path):
        return []
    lines = []
    with one_error(path), open(path, newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames and reader.fieldnames != columns:
            raise UserError(f"{path}: not the columns of this version; move it away")
        for line in reader:
            if None in line or None in line.values():
                raise UserError(f"{path}: line {reader.line_num} is not whole; delete it")
            for name in numbers:
                float(line[name] or 0)
            lines.append(line)
    return lines


def read_lines(path):
    """The CSV -> {Job: its line} of the commits that count, {commit: how many lines} of others."""
    counting = {*EQUAL, commit()}
    lines = {}
    others = Counter()
    for line in read_csv(path, COLUMNS, NUMBERS):
        if line["commit"] in counting:
            lines[Job(*(line[name] for name in Job._fields))] = line
        else:
            others[line["commit"]] += 1
    return lines, others


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
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come, whose bars would mix
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
    lines, _ = read_lines(args.out)
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


class Difference(NamedTuple):
    """From what a variant is compared with."""

    mean: float
    error: float  # standard error of the mean
    agreeing: int  # seeds whose difference has the sign of the mean
    seeds: int

    def is_sure(self):
        """No luck: see the top of this file."""
        return self.seeds >= 6 and self.agreeing == self.seeds and abs(self.mean) > 4 * self.error


def paired_difference(values, reference):
    """{seed: score} of two variants -> Difference over the seeds that both have."""
    found = [value - reference[seed] for seed, value in values.items() if seed in reference]
    mean = statistics.fmean(found)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    return Difference(mean, error, sum(one * mean > 0 for one in found), len(found))


def values_of(lines, variant, score):
    """A score of a variant -> {seed: value}."""
    found = {}
    for line in lines:
        if line["variant"] == variant and line.get(score):
            found[line["seed"]] = float(line[score])
    return found


def as_text(score, values, reference):
    """{seed: value} of a variant and of what it is compared with, or of the same -> mean and
    standard deviation, or mean and Difference; shares in per cent; a dash for no values.
    """
    if not values:
        return "–"
    scale, digits = (1, 2) if score in NO_SHARES else (100, 1)
    mean = f"{scale * statistics.fmean(values.values()):.{digits}f}"
    if len(values) == 1:
        return mean
    if values == reference or not reference:
        return f"{mean}\u00a0±\u00a0{scale * statistics.stdev(values.values()):.{digits}f}"
    found = paired_difference(values, reference)
    text = (f"{mean} ({scale * found.mean:+.{digits}f}\u00a0±\u00a0{scale * found.error:.{digits}f}, "
            f"{found.agreeing}/{found.seeds})")
    return f"**{text}**" if found.is_sure() else text


def compare(lines, variant, reference):
    """-> the paper's differences from the reference, and what is seen of them here, as text."""
    found = []
    if variant == reference:
        return ""
    for score, value in VARIANTS[variant].paper.items():
        if score in VARIANTS[reference].paper:
            of_paper = round(value - VARIANTS[reference].paper[score], 2)
            found.append(f"{score} {of_paper:+g}")
            own = values_of(lines, variant, score)
            base = values_of(lines, reference, score)
            if own and base:
                found[-1] += f": *{verdict(paired_difference(own, base), of_paper)}*"
    return ", ".join(found)


def verdict(found, of_paper):
    """A Difference and the paper's -> what ours says of it. (Where the paper has two variants equal
    "undecided" is all that can be asked for.)
    """
    if not found.is_sure():
        return "undecided"
    return "as in the paper" if found.mean * of_paper > 0 else "not as in the paper"


def markdown(row, lines):
    """One of TABLES as Markdown; those of Table 8 (a to f) are compared with the paper's."""
    title, variants = TABLES[row]
    of_paper = len(row) == 1
    shown = []
    for score in SCORES:
        there = any(values_of(lines, variant, score) for variant in variants)
        if there and score not in IN_NO_TABLE and row in ONLY_IN.get(score, TABLES):
            shown.append(score)
    table = [[title, *shown] + ["the paper's difference: here"] * of_paper]
    table.append(["---"] * len(table[0]))
    for variant in variants:
        reference = VARIANTS[variant].reference or variants[0]
        cells = [VARIANTS[variant].what]
        for score in shown:
            values = values_of(lines, variant, score)
            cells.append(as_text(score, values, values_of(lines, reference, score)))
        if of_paper:
            cells.append(compare(lines, variant, reference))
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table)]
    text = ""
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        text += f"| {' | '.join(padded)} |\n"
    return text


def print_tables(rows, args):
    found, others = read_lines(args.out)
    for name, count in others.items():
        note(f"{count} lines of commit {name or 'none'} left out: no proof that today's programs give "
             "the same (EQUAL in experiments/ablations.py)")
    for row in rows:
        jobs = jobs_of([row], args)
        lines = [found[job] for job in jobs if job in found]
        commits = sorted({line["commit"] for line in lines})
        print(f"({row}) {args.data}, {args.images or IMAGES[row]:,} images seen a run; {len(lines)} of "
              f"{len(jobs)} runs, seeds {', '.join(map(str, seeds_of(row, args)))}; shares in per "
              f"cent; commit {', '.join(commits) or 'none'}\n")
        print(markdown(row, lines))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.ablations [options]")
    p.add_argument("--images", type=train.at_least(1), help="seen in training, in each run (default: "
                   "those of each row in experiments/variants.py)")
    p.add_argument("--seeds", nargs="+", type=train.at_least(0, high=2**32),
                   help="of weights, order and scenes, a run each (default: 0 to 5, or 0 to 2)")
    p.add_argument("--rows", nargs="+", choices=TABLES,
                   help="a to f are of Table 8 (default: all there are)")
    p.add_argument("--data", choices=ROWS, default="shapes", help="default: shapes")
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
    if not args.table:
        run_all(jobs_of(rows, args), args)
    print_tables(rows, args)


if __name__ == "__main__":
    run_program(main)
