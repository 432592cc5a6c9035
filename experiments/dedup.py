"""Near-copies of evaluation images among the training images (Sec. 4.1), of photographs mirrored
copies, too.

    python -m experiments.dedup --data cifar10 --data-dir DIR --show pairs.png   which there are
    python -m experiments.dedup --data cifar10 --data-dir DIR --measure          planted copies:
                                           recall and precision, from which THRESHOLD is chosen
    python -m experiments.dedup train --data cifar10 --data-dir DIR              train.py without them
"""
import argparse
import io
import sys
import time

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.dedup")

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from data import NAMES, UserError, load, note, pillow, run_program, select
from eval import new_file

# ------------------------------------------------------------------------------------------------
# Near-copies: alike thumbnails

THRESHOLD = 0.955  # of two thumbnails' cosine; see --measure


def thumbnails(images):
    """images (N, 3, H, W) uint8 -> (N, 192): 8 x 8 pixels, brightness and contrast taken off."""
    parts = []
    for i in range(0, len(images), 2000):
        x = torch.from_numpy(np.array(images[i:i + 2000])).float()
        x = F.interpolate(x, size=(8, 8), mode="area").flatten(1)       # (n, 192)
        parts.append(F.normalize(x - x.mean(1, keepdim=True)))
    return torch.cat(parts)


def slight_crops(images, mirrored):
    """The images, then 13 crops of 95 and 90 % of their sides: cropped copies are near one."""
    S = images.shape[-1]
    for share, places in ((1, [0]), (0.95, [0, 1]), (0.9, [0, 0.5, 1])):
        side = round(share * S)
        for y in places:
            for x in places:
                top = round(y * (S - side))
                left = round(x * (S - side))
                crop = images[:, :, top:top + side, left:left + side]
                yield crop
                if mirrored:
                    yield crop[..., ::-1]


def near_duplicates(images, evaluation, threshold=THRESHOLD, mirrored=False):
    """Which images (N, 3, S, S) are near-copies of evaluation images (M, 3, S', S')?

    All are compared with all -> the evaluation image each is nearest to (N,), -1 = it is no copy;
    the cosine (N,), 0 = it is no copy; which of the evaluation images have a copy (M,).
    """
    own = thumbnails(images)                                            # (N, 192)
    nearest = torch.full((len(images),), -1)
    similarity = torch.zeros(len(images))
    copied = torch.zeros(len(evaluation), dtype=torch.bool)
    crops = slight_crops(evaluation, mirrored)
    for crop in tqdm(crops, "looking for duplicates", 14 * (1 + mirrored), leave=False):
        others = thumbnails(crop).T                                     # (192, M)
        for rows in torch.arange(len(images)).split(2000):
            cosine = own[rows] @ others                                 # (2000, M)
            for i in (cosine.amax(1) > threshold).nonzero()[:, 0]:  # few
                copied |= cosine[i] > threshold
                best, where = cosine[i].max(0)
                if best > similarity[rows[i]]:
                    nearest[rows[i]] = where
                    similarity[rows[i]] = best
    return nearest.numpy(), similarity.numpy(), copied.numpy()


def without_duplicates(data, evaluation):
    """data without the near-duplicates of the evaluation images; says how many."""
    nearest, _, copied = near_duplicates(data.images, evaluation.images, mirrored=data.augment)
    kept = np.flatnonzero(nearest < 0)
    note(f"{len(data) - len(kept):,} of {len(data):,} training images removed, "
         f"near-duplicates of {copied.sum():,} of {len(evaluation):,} evaluation images")
    if not len(kept):
        raise UserError("all training images are near-duplicates of evaluation images")
    return select(data, kept)


# ------------------------------------------------------------------------------------------------
# Which copies there are


def contact_sheet(left, right):
    """Images (n, 3, S, S), twice -> a Pillow image, four pairs a row, three times as large."""
    pairs = np.concatenate([left, right], 3).transpose(0, 2, 3, 1)      # (n, S, 2 S, 3)
    lacking = -len(pairs) % 4  # of the last row: white
    gap = (2, 2)
    pairs = np.pad(pairs, ((0, lacking), gap, gap, (0, 0)), constant_values=255)
    rows = [np.concatenate(list(pairs[i:i + 4]), 1) for i in range(0, len(pairs), 4)]
    sheet = pillow().fromarray(np.concatenate(rows))
    return sheet.resize((3 * sheet.width, 3 * sheet.height))


def find(data, evaluation, threshold, show=None):
    """Prints how many copies there are, and the 10 nearest; show: a file for the 24 nearest."""
    nearest, similarity, copied = near_duplicates(data.images, evaluation.images, threshold,
                                                  mirrored=data.augment)
    print(f"{(nearest >= 0).sum():,} of {len(data):,} training images are near-duplicates "
          f"of {copied.sum():,} of {len(evaluation):,} evaluation images")
    top = similarity.argsort(kind="stable")[::-1][:24]
    top = top[nearest[top] >= 0]
    for i in top[:10]:
        print(f"{similarity[i]:.3f}  train {i}: {data.captions[i][0]}"
              f"  |  evaluation {nearest[i]}: {evaluation.captions[nearest[i]][0]}")
    if show and not len(top):
        print(f"nothing to show: {show} is not made")
    elif show:
        sheet = contact_sheet(data.images[top], evaluation.images[nearest[top]])
        try:
            with open(show, "xb") as f:
                sheet.save(f, "PNG")
        except OSError as e:
            raise UserError(f"{show}: cannot be written ({e}); give another --show") from None


# ------------------------------------------------------------------------------------------------
# How well copies are found


def plant_copies(images, rng):
    """Images (N, 3, S, S) as their copies are found in the wild -> {kind: (N, 3, S, S)}."""
    Image = pillow()
    S = images.shape[-1]

    def encode_again(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return Image.open(file)

    def resize(image):
        return image.resize((S * 3 // 4, S * 3 // 4)).resize((S, S))

    def crop(image):
        side = round(S * rng.uniform(0.88, 1))
        left, top = rng.integers(0, S - side + 1, 2)
        box = (left, top, left + side, top + side)
        return image.crop(box).resize((S, S), Image.Resampling.BICUBIC)

    def brighten(image):
        contrast = rng.uniform(0.8, 1.2)
        shift = rng.uniform(-30, 30)
        return image.point(lambda value: contrast * value + shift)

    def mirror(image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    kinds = {"re-encoded": encode_again, "resized": resize, "cropped": crop, "brightness": brighten,
             "mirrored": mirror}
    copies = {}
    for kind, change in kinds.items():
        changed = []
        for pixels in images:
            image = change(Image.fromarray(pixels.transpose(1, 2, 0)))
            changed.append(np.asarray(image).transpose(2, 0, 1))
        copies[kind] = np.stack(changed)
    return copies


def measure(data, evaluation, most=1000):
    """Plants copies of at most that many evaluation images; prints recall, precision, seconds."""
    planted = plant_copies(evaluation.images[:most], np.random.default_rng(0))
    n = len(planted["mirrored"])
    images = np.concatenate([data.images, *planted.values()])
    began = time.perf_counter()
    nearest, similarity, _ = near_duplicates(images, evaluation.images, 0.9, mirrored=data.augment)
    seconds = time.perf_counter() - began
    right = nearest[len(data):].reshape(-1, n) == np.arange(n)          # (kinds, n)
    print("threshold  precision  recall: " + "  ".join(planted))
    for threshold in (0.9, 0.92, 0.94, 0.95, 0.955, 0.96, 0.97, 0.98, 0.99):
        found = similarity > threshold
        hits = right & found[len(data):].reshape(-1, n)                 # (kinds, n)
        precision = hits.sum() / max(1, found.sum())
        recalls = " ".join(f"{recall:10.1%}" for recall in hits.mean(1))
        print(f"{threshold:9} {precision:10.1%}          {recalls}")
    print("(precision: other training images found count as wrong, though some are real copies)")
    print(f"{len(images):,} images against {len(evaluation):,}: {seconds:.1f} s")


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                prog="python -m experiments.dedup", usage="%(prog)s [options]")
    p.add_argument("--data", choices=NAMES, default="shapes", help="which (default: shapes)")
    p.add_argument("--data-dir", help="folder of their files")
    p.add_argument("--size", type=int, default=32, help="pixels a side (default: 32)")
    p.add_argument("--threshold", type=float,
                   help=f"least cosine of thumbnails, between 0 and 1 (default: {THRESHOLD})")
    p.add_argument("--show", metavar="FILE.png", type=new_file,
                   help="draw the 24 nearest pairs there: training image, evaluation image")
    p.add_argument("--measure", action="store_true",
                   help="plant copies instead; print how many are found at several thresholds")
    args = p.parse_args(argv)
    if args.size < 1:
        p.error(f"--size must be at least 1, not {args.size}")
    if args.measure and (args.show or args.threshold is not None):
        p.error("--measure tries its own thresholds and draws nothing; leave --threshold and --show out")
    if args.threshold is None:
        args.threshold = THRESHOLD
    if not 0 < args.threshold < 1:
        p.error(f"--threshold must be between 0 and 1, not {args.threshold}")
    return args


def load_data(s, split):
    """As eval.load_data, but training images that are in the evaluation images, too, are left out.
    """
    data = train.load_data(s, split)
    if split == "train":
        data = without_duplicates(data, train.load_data(s, "val"))
    return data


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return train.main(argv[1:], load_data)
    args = parse_args(argv)
    data = load(args.data, args.data_dir, "train", args.size)
    evaluation = load(args.data, args.data_dir, "val", args.size)
    if args.measure:
        measure(data, evaluation)
    else:
        find(data, evaluation, args.threshold, args.show)


if __name__ == "__main__":
    run_program(main)
