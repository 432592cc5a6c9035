"""Where the generative pooler looks while the default job trains: the entropy of its attention.

    python -m experiments.entropy --seeds 0 1 2

A seed's lines in experiments/entropy.csv are measured anew; experiments/pictures.py draws them.
"""
import argparse
import csv
import io
import itertools
from pathlib import Path

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.entropy")

import torch
from tqdm import tqdm

import train
from data import replacing, run_program, to_model
from experiments.ablations import compose, read_csv

ENTROPY = Path(__file__).with_name("entropy.csv")
COLUMNS = ["start", "seed", "images", "entropy", "val_con", "val_cap"]
STARTS = ["default", "faint positions"]  # initial values


def read_entropy():
    return read_csv(ENTROPY, COLUMNS, COLUMNS[1:])


def measure(seeds):
    """Entropy of the generative pooler's attention, in nats, over images seen: the mean over heads,
    queries and images. "faint positions" differs in one thing: the image's positions start at 0.2
    of the sinusoids, as faint against the patches' content as in many a ViT.
    """
    lines = [line for line in read_entropy() if int(line["seed"]) not in seeds]
    for seed in seeds:
        for start in STARTS:
            lines += watched(start, seed)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    with replacing(ENTROPY) as f:
        f.write(text.getvalue().encode())
    print(f"saved: {ENTROPY}")


def watched(start, seed, flags="", every=50):
    """Trains the default job -> {column: value} after each `every` steps, and at the end."""
    s, model, tokenizer, val, steps = compose(f"--seed {seed} --device cpu {flags}")
    if start == "faint positions":
        model.encoder.position.data *= 0.2
    steps = tqdm(steps, f"{start}, seed {seed}", s.steps, leave=False)
    lines = []
    for step, *_ in itertools.chain(steps, [(s.steps,)]):
        if step % every == 0 or step == s.steps:
            con, cap = train.validate(s, model, tokenizer, val)
            values = [start, seed, step * s.batch_size, pooler_entropy(model, val), con, cap]
            lines.append(dict(zip(COLUMNS, values)))
    return lines


@torch.no_grad()
def pooler_entropy(model, val):
    tokens = model.encoder(to_model(torch.tensor(val.images[:128])))
    weights = model.generative_pooler.weights(tokens)                   # (B, H, Q, P)
    return torch.special.entr(weights).sum(-1).mean().item()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="python -m experiments.entropy [options]")
    p.add_argument("--seeds", nargs="+", type=train.at_least(0, high=2**32), default=[0],
                   help="of the default job, one run each for two starts (default: 0)")
    args = p.parse_args(argv)
    measure(args.seeds)


if __name__ == "__main__":
    run_program(main)
