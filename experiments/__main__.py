"""Every task of Sec. 3.3 and 4.2 on a checkpoint, in one table.

    python -m experiments runs/shapes/checkpoint.pt                       all: 7 minutes on 2 cores
    python -m experiments runs/shapes/checkpoint.pt --task understanding  some
    python -m experiments runs/shapes/checkpoint.pt --task video --clips DIR   on your own videos
    python -m experiments runs/shapes/checkpoint.pt --json scores.json    scores for machines
"""
import argparse
import functools
import json
import sys

import eval as evaluation
from data import run_program
from eval import add_common_flags, evaluate_checkpoint, load_checkpoint, pick_device, write_new
from experiments.classify import likelihood_task, robustness_task
from experiments.grounding import pointing_task, unseen_task
from experiments.understanding import understanding_task
from experiments.video import own_clips, video_retrieval_task, video_task

TASKS = {**evaluation.TASKS, "likelihood": likelihood_task, "robustness": robustness_task,
         "unseen": unseen_task, "pointing": pointing_task, "video-retrieval": video_retrieval_task,
         "video": video_task, "understanding": understanding_task}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                prog="python -m experiments", usage="%(prog)s CHECKPOINT [options]")
    add_common_flags(p)
    p.add_argument("--task", nargs="+", choices=TASKS, help="these tasks only (default: all)")
    p.add_argument("--clips", metavar="DIR", help="task video on your clips: a folder for each class, "
                   "of folders of frames or .npy arrays")
    args = p.parse_args(argv)
    if args.clips is not None and args.task and "video" not in args.task:
        p.error("--clips is for the task video; add it to --task, or leave --clips out")
    return args


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer, checkpoint = load_checkpoint(args.checkpoint)
    model.to(pick_device(args.device))
    tasks = dict(TASKS)
    if args.clips is not None:
        clips = own_clips(args.clips, model.config.image_size)
        tasks["video"] = functools.partial(video_task, clips=clips)
    names = list(dict.fromkeys(args.task or tasks))

    def announce_and_run(name, *given):
        print(f"task {names.index(name) + 1} of {len(names)}: {name}", file=sys.stderr)
        return tasks[name](*given)

    announced = {name: functools.partial(announce_and_run, name) for name in names}
    scores = evaluate_checkpoint(args, announced, model, tokenizer, checkpoint)
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_program(main)
