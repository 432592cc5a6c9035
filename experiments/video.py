"""Videos (Sec. 3.3 "CoCa for Video Action Recognition"): the model of images, on sampled frames.

    python -m experiments CHECKPOINT --task video-retrieval video    generated clips
    python -m experiments CHECKPOINT --task video --clips DIR        your own

DIR holds a folder for each class. In it a clip is a folder of frames, or a .npy array of
(count, height, width, 3) uint8.
"""
import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from coca import CoCa
from data import (
    COLOURS,
    CORNERS,
    PAIRS,
    RADII,
    SHAPES,
    Dataset,
    DoesNotApply,
    UserError,
    captions_of,
    draw,
    held_out,
    one_error,
    read_image,
    resize,
    scene,
    select,
    to_model,
    words,
)
from eval import (
    Classifier,
    Recipe,
    constant_answer,
    device_of,
    embed_images,
    need_embeddings,
    retrieval,
    run_in_parts,
    tensors,
    transfer,
)
from train import whiten_patches

RETRIEVAL_FRAMES = 16  # of a clip, Sec. 3.3
FRAMES = 8  # of a clip to classify; the paper does not say how many
# Kinetics in Table 9, but for steps and batch. Both see the same number of clips
VIDEO_FROZEN = Recipe(smoothing=0.1, warm_up=10, steps=300, batch=16)
VIDEO_FINETUNED = Recipe(encoder_lr=5e-4, smoothing=0.1, warm_up=10, steps=300, batch=16)

# ------------------------------------------------------------------------------------------------
# Generated clips


def moving_shapes(split, size, count, seed=0, frames=FRAMES):
    """Clips of one thing that moves to the right or to the left within its corner.

    -> two Datasets of the same images (count, frames, 3, size, size): labelled by colour and shape,
    which any frame shows, and by direction, which no set of frames shows without their order.
    """
    clips = []
    captions = []
    pairs = []
    directions = []
    for i in tqdm(range(count), "drawing clips", leave=False):
        (thing,), rng = scene(seed, split, i)
        to_the_right = rng.integers(2)
        path = np.linspace(-0.12, 0.12, frames)                         # in image sides
        if not to_the_right:
            path = -path
        clips.append([draw([thing._replace(x=thing.x + dx)], rng, size) for dx in path])
        captions.append(captions_of([thing]))
        pairs.append(PAIRS.index((thing.colour, thing.shape)))
        directions.append(to_the_right)
    clips = np.array(clips)                                             # (count, frames, 3, S, S)
    classes = [f"{colour} {shape}" for colour, shape in PAIRS]
    what = Dataset(clips, captions, np.array(pairs), classes)
    where = Dataset(clips, captions, np.array(directions), ["to the left", "to the right"])
    return what, where


def sample_frames(count, frames):
    """Indices of that many of `count` frames, evenly from first to last; fewer are repeated."""
    return np.linspace(0, count - 1, frames).round().astype(int)


def need_scene_words(tokenizer):
    needed = {*COLOURS, *SHAPES, *RADII, *words(" ".join(CORNERS))}
    if not needed <= set(tokenizer.words):
        raise DoesNotApply("the checkpoint lacks words of generated scenes; train on --data shapes")


# ------------------------------------------------------------------------------------------------
# Your own clips


def visible(folder):
    """What is in a folder, but for hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def by_number(path):
    """Sort key: frame2 comes before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def read_clip(path, size, frames):
    """A folder of frames or a .npy of (count, height, width, 3) uint8 -> (frames, 3, size, size)."""
    if path.is_dir():
        files = sorted(visible(path), key=by_number)
        if not files:
            raise UserError(f"{path}: a clip without frames; put images into it or remove it")
        return np.stack([read_image(files[i], size) for i in sample_frames(len(files), frames)])
    if path.suffix != ".npy":
        raise UserError(f"{path}: a clip is a folder of frames or a .npy array; "
                        "take a video apart first, for example with ffmpeg")
    with one_error(path):
        clip = np.lib.format.open_memmap(path, mode="r")
        if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or not clip.size:
            raise ValueError(f"{clip.dtype} of shape {clip.shape}; a clip is uint8 (count, height, "
                             "width, 3), as numpy.save writes it")
    images = clip[sample_frames(len(clip), frames)].transpose(0, 3, 1, 2)  # (frames, 3, H, W)
    return resize(middle_square(images), size)


def middle_square(images):
    """(N, 3, H, W) -> (N, 3, S, S)."""
    H, W = images.shape[2:]
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    return images[:, :, top:top + side, left:left + side]


def own_clips(folder, size, frames=FRAMES):
    """Clips in a folder per class -> training and test Dataset, images (N, frames, 3, size, size).

    About one clip in ten is for the test (data.held_out). A class without clips is none.
    """
    root = Path(folder)
    paths = []
    labels = []
    classes = []
    for place in visible(root) if root.is_dir() else []:
        found = visible(place) if place.is_dir() else []
        if found:
            paths += found
            labels += [len(classes)] * len(found)
            classes.append(place.name)
    if len(classes) < 2:
        raise UserError(f"{folder}: {len(classes)} classes with clips; "
                        "give a folder that holds a folder of clips for each class")
    names = [path.relative_to(root).as_posix() for path in paths]
    unseen = held_out(names)
    is_test = np.array([name in unseen for name in names])
    if is_test.all():
        raise UserError(f"{folder}: no clips left to learn from; give more")
    clips = [read_clip(path, size, frames) for path in tqdm(paths, "reading clips", leave=False)]
    data = Dataset(np.stack(clips), [[]] * len(paths), np.array(labels), classes, names=names)
    return select(data, np.flatnonzero(~is_test)), select(data, np.flatnonzero(is_test))


# ------------------------------------------------------------------------------------------------
# Zero-shot retrieval (Sec. 3.3, Table 5)


def embed_clips(model, clips, frames=RETRIEVAL_FRAMES):
    """clips (N, T, 3, S, S) uint8 -> (N, E) unit norm: mean of 16 evenly spread frames, Sec. 3.3."""
    sampled = clips[:, sample_frames(clips.shape[1], frames)]           # (N, 16, 3, S, S)
    embedding = embed_images(model, sampled.reshape(-1, *clips.shape[2:]))  # (N * 16, E)
    mean = embedding.unflatten(0, (-1, frames)).mean(1)                 # (N, E)
    return F.normalize(mean, dim=-1)


def video_retrieval_task(model, tokenizer, s):
    """By cosine, among 200 generated clips of 24 frames and their captions."""
    need_embeddings(model)
    need_scene_words(tokenizer)
    size = model.config.image_size
    data, _ = moving_shapes("labelled-val", size, 200, s["seed"], frames=24)
    embedding = embed_clips(model, data.images)
    return retrieval(embedding, model, tokenizer, data.captions, "video")


# ------------------------------------------------------------------------------------------------
# Classification (Sec. 3.3, Table 2)


class VideoClassifier(Classifier):
    """A new one-query pooler over the tokens of all frames at once, and a linear layer.

    frames: that many learned temporal embeddings, which the paper's late fusion does without.
    """

    def __init__(self, width, heads, classes, frames=0):
        super().__init__(width, heads, classes)
        self.time = nn.Parameter(torch.randn(frames, 1, width)) if frames else None

    def forward(self, tokens):
        """tokens (B, frames, P, D) -> logits (B, classes)."""
        if self.time is not None:
            tokens = tokens + self.time
        return super().forward(tokens.flatten(1, 2))


def clip_tokens(model, clips):
    """What a VideoClassifier reads: clips (B, frames, 3, S, S) uint8 -> (tokens (B, frames, P, D),).

    Each frame goes through the encoder alone.
    """
    tokens = model.encoder(to_model(clips.flatten(0, 1)))               # (B * frames, P, D)
    return (tokens.unflatten(0, clips.shape[:2]),)


def untrained(model, seed, clips, whitening):
    """A model of the same sizes that starts as train.new_model's do, clips (N, frames, 3, S, S)."""
    torch.manual_seed(seed)
    new = CoCa(model.config)
    frames = clips.reshape(-1, *clips.shape[2:])                        # (N * frames, 3, S, S)
    some = frames[::math.ceil(len(frames) / 256)]  # of all classes: clips may come class by class
    whiten_patches(new.encoder.patches, to_model(torch.tensor(some)), whitening)
    return new.to(device_of(model))


def encoded(model, data):
    """The same data with tokens (N, frames, P, D) in the place of images."""
    encode = functools.partial(clip_tokens, model)
    tokens, = run_in_parts(encode, tensors(data)[0], device_of(model))
    return dataclasses.replace(data, images=tokens.cpu().numpy())


def as_encoded(model, tokens):
    """What a VideoClassifier reads of encoded data."""
    return (tokens,)


def learn_clips(model, s, data, test, recipe, frames=0, read=clip_tokens):
    """Learns the clips of data with a new classifier -> accuracy on those of test, and chance."""
    torch.manual_seed(s["seed"])
    c = model.config
    classifier = VideoClassifier(c.width, c.heads, len(data.classes), frames)
    _, score = transfer(model, read, classifier, tensors(data), tensors(test), recipe, "video")
    return score, constant_answer(test.labels)


def generated_clips(model, s):
    """-> 300 clips to learn from and 1,000 others to be tested on, labelled by what moves; the same
    clips labelled by where it moves to.
    """
    size = model.config.image_size
    data, moves = moving_shapes("labelled", size, 300, s["seed"])
    test, test_moves = moving_shapes("labelled-val", size, 1000, s["seed"])
    return data, test, moves, test_moves


def video_task(model, tokenizer, s, clips=None):
    """Frozen, finetuned, and without pretraining. clips: what own_clips gives, if not generated."""
    if clips:
        data, test = clips
        whitening = 0.5  # as train.py for photographs
    else:
        data, test, moves, test_moves = generated_clips(model, s)
        whitening = 0.0  # as train.py for scenes
    new = untrained(model, s["seed"], data.images, whitening)
    found = {
        "video, frozen": learn_clips(model, s, data, test, VIDEO_FROZEN),
        "video, finetuned": learn_clips(model, s, data, test, VIDEO_FINETUNED),
        "video, from scratch": learn_clips(new, s, data, test, VIDEO_FINETUNED),
    }
    if not clips:
        found.update(order_of_frames(model, s, moves, test_moves))
    return found


def order_of_frames(model, s, moves, test):
    """Does the classifier see the direction? It is tested on each clip forwards and backwards."""
    moves = encoded(model, moves)
    test = encoded(model, test)
    both_ways = dataclasses.replace(
        test, images=np.concatenate([test.images, test.images[:, ::-1]]),
        labels=np.concatenate([test.labels, 1 - test.labels]))
    return {
        "video order, frozen":
            learn_clips(model, s, moves, both_ways, VIDEO_FROZEN, read=as_encoded),
        "video order, frozen, temporal embedding":
            learn_clips(model, s, moves, both_ways, VIDEO_FROZEN, FRAMES, as_encoded),
    }


if __name__ == "__main__":
    raise SystemExit("no command here; run: python -m experiments CHECKPOINT --task video")
