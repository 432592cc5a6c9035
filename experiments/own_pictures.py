"""Your own texts for your own pictures: which label fits, or which picture fits best.

    python -m experiments.own_pictures CHECKPOINT --image a.jpg --labels "a ring" "a cross"
    python -m experiments.own_pictures CHECKPOINT --image *.jpg --find "a red ring"

(Captions: python eval.py CHECKPOINT --image a.jpg)
"""
import argparse
import json

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.own_pictures")

import torch

from data import UserError, note, note_lost, run_program, words
from eval import (
    add_common_flags,
    are_known,
    caption_files,
    embed_classes,
    embed_images,
    embed_texts,
    load_checkpoint,
    need_embeddings,
    pick_device,
    read_images,
    write_new,
)


def check_texts(texts, model, tokenizer):
    """UserError if a text has no known word or two have the same tokens. Notes unknown words."""
    need_embeddings(model)
    tokens = tokenizer.encode(texts, model.config.text_len)
    rows = tokens.tolist()
    for i, (text, is_known) in enumerate(zip(texts, are_known(texts, tokenizer, model))):
        first = rows.index(rows[i])
        if not is_known:
            raise UserError(f"{text!r}: the checkpoint knows none of its words; use words of the "
                            "captions that it learned from")
        if first < i:
            raise UserError(f"{texts[first]!r} and {text!r} are the same to the checkpoint; drop one")
    note_lost(texts, tokens, model.config.text_len)
    unknown = sorted(set(words(" ".join(texts))) - set(tokenizer.words))
    if unknown:
        note(f"words that the checkpoint does not know: {', '.join(unknown)}")


@torch.no_grad()
def compare(model, tokenizer, images, names, labels, find):
    """Your images (N, 3, S, S) uint8 beside your texts, the best match first.

    -> {"labels": {image: {label: probability}}, by the softmax of Eq. (2) over the labels,
    "find": {text: {image: cosine}}}.
    """
    embedding = embed_images(model, images)                             # (N, E)
    found = {}
    if labels:
        cosine = embedding @ embed_classes(model, tokenizer, labels).T  # (N, labels)
        found["labels"] = ranked(names, labels, (cosine / model.temperature).softmax(1))
    if find:
        cosine = embed_texts(model, tokenizer, find) @ embedding.T      # (texts, N)
        found["find"] = ranked(find, names, cosine)
    return found


def ranked(queries, answers, values):
    """values (queries, answers) -> {query: {answer: value}}, the largest first."""
    found = {}
    for query, row in zip(queries, values.tolist()):
        found[query] = dict(sorted(zip(answers, row), key=lambda pair: -pair[1]))
    return found


def look_at(args, model, tokenizer):
    """Prints what `compare` finds for args.labels and args.find, or else captions -> args.image
    (N, 3, S, S) uint8, what was found.
    """
    for texts in (args.labels, args.find):
        if texts:
            check_texts(texts, model, tokenizer)
    images = read_images(args.image, model.config.image_size)
    if not args.labels and not args.find:
        if not model.config.lambda_cap:
            note("no captions: the checkpoint was trained with --lambda-cap 0")
            return images, {}
        return images, caption_files(args.image, model, tokenizer)
    found = compare(model, tokenizer, images, args.image, args.labels, args.find)
    for task, answers_to in found.items():
        for query, answers in answers_to.items():
            print(f"{query}:")
            for answer, value in answers.items():
                print(f"{value:>9.2%}  {answer}" if task == "labels" else f"{value:9.3f}  {answer}")
    return images, found


def add_image_flags(p):
    """Flags that report.py and open_clip.py have, too."""
    p.add_argument("--image", nargs="+", metavar="FILE", help="look at these image files")
    p.add_argument("--labels", nargs="+", metavar="TEXT",
                   help="with --image: which of these texts fits each picture")
    p.add_argument("--find", nargs="+", metavar="TEXT",
                   help="with --image: the pictures by likeness to each text, the best first")


def check_image_flags(p, args):
    if (args.labels or args.find) and not args.image:
        p.error("--labels and --find need --image, the pictures to compare with")
    if args.labels and len(args.labels) < 2:
        p.error("--labels needs two texts or more to choose from")
    if args.image and (args.data or args.data_dir):
        p.error("--image looks at these pictures only; leave --data out")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                prog="python -m experiments.own_pictures",
                                usage="%(prog)s CHECKPOINT --image FILE ... [options]")
    add_common_flags(p)
    add_image_flags(p)
    args = p.parse_args(argv)
    check_image_flags(p, args)
    if not args.labels and not args.find:
        p.error("--image needs --labels or --find; for captions: python eval.py")
    return args


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, _ = load_checkpoint(args.checkpoint)
    model.to(pick_device(args.device))
    _, found = look_at(args, model, tokenizer)
    if args.json:
        write_new(args.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    run_program(main)
