"""CIFAR's official files, downloaded, checked and unpacked where train.py --data-dir reads them.

    python -m experiments.fetch cifar10 DIR
    python -m experiments.fetch cifar100 DIR
"""
import argparse
import hashlib
import tarfile
from pathlib import Path

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.fetch")

import torch

from data import CIFAR, UserError, run_program

ARCHIVES = {  # address and md5
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "c58f30108f718f92721af3b95e74349a"),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                 "eb9058c3a382ffc7106e4002c42a8d85"),
}


def fetch(url, md5, folder):
    """Downloads an archive, if it is not there, checks its md5 and unpacks it in the folder."""
    archive = folder / url.rsplit("/", 1)[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            torch.hub.download_url_to_file(url, str(archive))  # renamed when it is whole
        if hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() != md5:
            raise OSError(f"its md5 is not {md5}")
        with tarfile.open(archive) as tar:
            # No links, devices or paths that lead outside. (Before Python 3.10.12: a TypeError)
            tar.extractall(folder, filter="data")
    except Exception as e:  # of the network, the disk or the archive
        raise UserError(f"{url}: download failed ({e}); delete {archive}, if it is there, and run "
                        "again") from None


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                prog="python -m experiments.fetch", usage="%(prog)s NAME DIR")
    p.add_argument("name", choices=ARCHIVES, help="which data")
    p.add_argument("folder", type=Path, help="where to put them")
    args = p.parse_args(argv)
    fetch(*ARCHIVES[args.name], args.folder)
    print(f"{args.folder / CIFAR[args.name]['folder']} is there; next: python train.py --data "
          f"{args.name} --data-dir {args.folder}")


if __name__ == "__main__":
    run_program(main)
