"""A random checkpoint that knows the words of scenes, and a look at what a task would learn."""
import functools
from collections import namedtuple
from dataclasses import asdict
from unittest import mock

import numpy as np
import torch
from helpers import CONTROL
from PIL import Image

import data as data_file
import train
from data import COLOURS, RADII, SHAPES, Tokenizer
from eval import FORMAT, Learner

SPECIAL = ["<pad>", "<begin>", "<end>", "<unk>"]
WORDS = [*SPECIAL, *COLOURS, *SHAPES, *RADII, *"a at the top bottom left right and".split()]
SMALL = dict(steps=2, batch_size=8, lr=1e-3, patch_size=8, width=32, heads=2, encoder_layers=1,
             encoder_mlp=32, n_uni=1, n_multi=1, decoder_mlp=32, n_query=4)
draw_scenes = functools.cache(data_file.shapes)
COLUMNS = ["step", "images", "loss_con", "loss_cap", "loss", "temperature"]


def few_scenes(patch):
    """Sixteen scenes a split, and a small model that sees them in two steps."""
    def few(split, size, seed, subset=0):
        return data_file.select(draw_scenes(split, size, seed, 16), range(16))

    patch.setattr(data_file, "shapes", few)
    patch.setitem(train.PRESETS, "shapes", SMALL)


def toy_checkpoint(words=WORDS, **changes):
    """-> model, tokenizer, settings of a run."""
    model = CONTROL.model(vocab_size=len(words), text_len=32, **changes)
    return model, Tokenizer(words), dict(data="shapes", data_dir=None, seed=0)


def save_checkpoint(path, model, tokenizer, settings, rows=()):
    metrics = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(COLUMNS))
    torch.save(dict(format=FORMAT, config=asdict(model.config), vocabulary=tokenizer.words,
                    settings=settings, model=model.state_dict(), optimizer={}, step=len(rows),
                    metrics_names=COLUMNS, metrics=metrics), path)


def same_tensors(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


Lesson = namedtuple("Lesson", "model read classifier train test recipe what")


def record_lessons(patch, module):
    """From now on the module's tasks learn nothing and score 0.125 -> a list of what they ask for."""
    lessons = []

    def transfer(*args):
        lessons.append(Lesson(*args))
        return Learner(*args[:3]), 0.125

    patch.setattr(module, "transfer", transfer)
    return lessons


def drawn_by(module, make, *args, **named):
    """The things of all pictures that make(...) draws, and what it returns; nothing is painted."""
    with mock.patch.object(module, "draw", return_value=np.zeros((3, 1, 1), np.uint8)) as draw:
        made = make(*args, **named)
    return [call.args[0] for call in draw.call_args_list], made


def write_clips(folder, **classes):
    """Clips of one grey each, arrays and folders of frames in turn; classes: how many of each."""
    for c, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            path = folder / name / f"clip{i}"
            if i % 2:
                np.save(path.with_suffix(".npy"), np.full((5, 12, 8, 3), 100 * c + i, np.uint8))
                continue
            path.mkdir()
            for frame in range(3):
                Image.new("L", (12, 8), 100 * c + i).save(path / f"{frame}.png")
    return folder
