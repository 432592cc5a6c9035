"""CIFAR's files: what is read of a pickle, what is refused without running it."""
import copyreg
import faulthandler
import io
import pickle
import random
import resource
import signal
import struct
import sys
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from helpers import Bomb, refused
from own_pictures import exit_code, start

from data import CIFAR, UserError, load, read_cifar

# Tiny files in the official format

CLASSES = {"cifar10": [f"class_{i}" for i in range(10)],
           "cifar100": [f"class_{i}" for i in range(100)]}


def old_pickle(content):
    """An old protocol, and numpy's name before version 2."""
    return pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core")


def cifar_batch(name, file, count=4):
    rng = np.random.default_rng(list(file.encode()))
    labels = rng.integers(0, len(CLASSES[name]), count).tolist()
    pixels = rng.integers(0, 256, (count, 3072), np.uint8)
    return {CIFAR[name]["labels"]: labels, "coarse_labels": [0] * count, "data": pixels}


def write_cifar(root, name="cifar10", pickled=old_pickle):
    kind = CIFAR[name]
    folder = root / kind["folder"]
    folder.mkdir(parents=True)
    (folder / kind["meta"]).write_bytes(pickled({kind["names"]: CLASSES[name]}))
    for file in kind["train"] + kind["val"]:
        (folder / file).write_bytes(pickled(cifar_batch(name, file)))
    return folder


BATCH = cifar_batch("cifar10", "data_batch_1")


def read(path, content):
    """Labels and images of a batch with this content."""
    path.write_bytes(content)
    return read_cifar(path, "labels", CLASSES["cifar10"])


def check_read(path, content):
    labels, images = read(path, content)
    assert labels.tolist() == BATCH["labels"]
    assert np.array_equal(images, BATCH["data"].reshape(-1, 3, 32, 32))


# What is read


@pytest.mark.parametrize("pickled", [old_pickle, pickle.dumps])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_batches_are_read_in_order_in_the_folder_or_its_parent(tmp_path, name, pickled):
    folder = write_cifar(tmp_path, name, pickled)
    for split in ("train", "val"):
        batches = [cifar_batch(name, file) for file in CIFAR[name][split]]
        pixels = b"".join(batch["data"].tobytes() for batch in batches)
        labels = sum((batch[CIFAR[name]["labels"]] for batch in batches), [])
        for place in (folder, str(tmp_path)):
            found = load(name, place, split)
            assert found.images.tobytes() == pixels and found.labels.tolist() == labels
            for label, texts in zip(found.labels, found.captions, strict=True):
                assert all(f"class {label}" in text for text in texts)


@pytest.mark.parametrize("as_type", [list, np.array, lambda labels: list(np.array(labels)),
                                     lambda labels: np.array(labels, np.uint8)])
@pytest.mark.parametrize("protocol", range(6))
def test_batches_that_a_current_python_and_numpy_pickled_are_read(tmp_path, protocol, as_type):
    for pixels in (BATCH["data"], np.asfortranarray(BATCH["data"]),
                   np.repeat(BATCH["data"], 2, axis=1)[:, ::2]):
        batch = {"labels": as_type(BATCH["labels"]), "data": pixels}
        check_read(tmp_path / "batch", pickle.dumps(batch, protocol))


def text(words):
    return b"U" + bytes([len(words)]) + words.encode()


def array(shape, kind, content):
    return (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b")
            + b"\x87R(K\x01" + shape + kind + b"\x89" + content + b"tb")


def dtype(name, names=b"N", fields=b"N", size=b"J\xff\xff\xff\xff", flags=b"K\x00"):
    return (b"cnumpy\ndtype\n" + text(name) + b"K\x00K\x01\x87R(K\x03" + text("|") + b"N" + names
            + fields + size + b"J\xff\xff\xff\xff" + flags + b"tb")


SHAPE = b"K\x04M\x00\x0c\x86"  # (4, 3072)
PIXELS = b"T" + struct.pack("<i", 4 * 3072) + BATCH["data"].tobytes()


def of_python_2(shape=SHAPE, pixels=PIXELS):
    """The opcodes of the official files, whose strings are bytes."""
    labels = b"".join(b"K" + bytes([label]) for label in BATCH["labels"])
    return (b"\x80\x02}(" + text("labels") + b"](" + labels + b"e" + text("data")
            + array(shape, dtype("u1"), pixels) + b"u.")


def test_byte_strings_of_python_2_are_read(tmp_path):
    check_read(tmp_path / "batch", of_python_2())


def test_missing_files_are_named_and_some_of_the_batches_are_enough(tmp_path, capsys):
    refused("/train: no such file; .*python -m experiments.fetch cifar100 ", load, "cifar100", tmp_path)
    folder = write_cifar(tmp_path)
    for i in (2, 3, 5):
        (folder / f"data_batch_{i}").unlink()
    assert load("cifar10", tmp_path, size=48).images.shape == (8, 3, 48, 48)
    assert "2 of 5 train batches" in capsys.readouterr().err
    (folder / "batches.meta").unlink()
    refused("batches.meta: .*No such file", load, "cifar10", tmp_path)


def test_images_kept_apart_from_training_ones_need_no_others(tmp_path):
    (write_cifar(tmp_path) / "test_batch").unlink()
    assert len(load("cifar10", tmp_path, subset=7, val_from_train=5)) == 7
    val = load("cifar10", tmp_path, "val", subset=7, val_from_train=5).images
    whole = load("cifar10", tmp_path).images
    assert len(val) == 5
    assert {image.tobytes() for image in val} < {image.tobytes() for image in whole}
    refused("test_batch", load, "cifar10", tmp_path, "val")  # control: it is not there


# What is refused

BAD = {"data_batch_1": [b"", old_pickle(BATCH)[:9000], b"random" * 99, old_pickle([1, 2]),
                        pickle.dumps(BATCH, 5, buffer_callback=[].append)],
       "batches.meta": [b"", old_pickle({}), old_pickle({"label_names": [1] * 10})]}
for change in (
        # labels: too few, out of range, none, nested
        {"labels": [1, 2, 3]}, {"labels": [1, 2, 3, 10]}, {"labels": [1, 2, 3, -1]}, {"labels": 4},
        {"labels": [], "data": BATCH["data"][:0]}, {"labels": [[1], [2], [3], [4]]},
        {"labels": np.ones((4, 1), int)}, {"labels": np.int64(4)},
        # of other types
        {"labels": ["1", "2", "3", "4"]}, {"labels": [1.0, 2.0, 3.0, 4.0]},
        {"labels": np.ones(4)}, {"labels": np.ones(4, bool)},
        {"labels": np.ones(4, object)}, {"labels": np.ones(4, "M8[s]")},
        {"labels": np.ones(4, "i4,i4")}, {"labels": [np.float32(1)] * 4},
        # pixels: of other types and shapes
        {"data": "x"}, {"data": b"x" * 4 * 3072}, {"data": BATCH["data"].view(np.int8)},
        {"data": BATCH["data"].astype(np.float32)}, {"data": BATCH["data"][:, :-1]},
        {"data": BATCH["data"].reshape(4, 3, 32, 32)}, {"data": BATCH["data"].T}):
    BAD["data_batch_1"] += [old_pickle(BATCH | change), pickle.dumps(BATCH | change, 5)]


@pytest.mark.parametrize("file", BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, file):
    path = write_cifar(tmp_path) / file
    for content in BAD[file]:
        path.write_bytes(content)
        refused(f"{file}: not a CIFAR file", load, "cifar10", tmp_path)


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, protocol):
    content = pickle.dumps({"labels": Bomb()}, protocol)
    refused("batch: .* wants to run", read, tmp_path / "batch", content)
    with pytest.raises(pytest.fail.Exception):  # control: it does run where nothing refuses it
        pickle.loads(content)  # noqa: S301


def test_what_numpy_has_but_no_file_needs_is_not_run_either(tmp_path):
    for call in (b"cnumpy\nload\n(" + text("/x") + b"tR", b"c_codecs\ndecode\n(" + text("x") + b"tR",
                 b"cnumpy\nndarray.tofile\n(" + text(str(tmp_path / "new")) + b"tR"):
        check_read(tmp_path / "batch", b"\x80\x04" + call + b"0" + of_python_2()[2:])
    assert [*tmp_path.iterdir()] == [tmp_path / "batch"]
    for name in (b"load", b"ndarray"):  # arrays by other names are no arrays, or hold the numbers
        content = of_python_2().replace(b"_reconstruct", name)
        check_read(tmp_path / "batch", content)


BEGINNINGS = [  # opcodes before an otherwise good file: names, persistent ids, extensions, a buffer
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpyx\nndarray\n", b"\x8c\x03a\nb\x8c\x01c\x93",
    b"Pid\n", b"NQ", b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x82\x02", b"\x97"]
for name in ("numpy\ndtype", "numpy\nndarray", "numpy.core.multiarray\n_reconstruct",
             "numpy.core.numeric\n_frombuffer", "numpy.core.multiarray\nscalar", "_codecs\nencode"):
    for state in (b"}", b"}" + text("x") + b"Ns", b"N}" + text("__defaults__") + b"K\x01\x85s\x86"):
        BEGINNINGS.append(b"c" + name.encode() + b"\n" + state + b"b")  # changes a stand-in


@pytest.mark.parametrize("opcodes", BEGINNINGS, ids=range(len(BEGINNINGS)))
def test_nothing_but_plain_values_may_stand_in_a_pickle(tmp_path, opcodes):
    with mock.patch.dict(copyreg._inverted_registry, {1: ("os", "system")}):
        content = b"\x80\x04" + opcodes + b"0" + of_python_2()[2:]
        refused("batch: not a CIFAR file", read, tmp_path / "batch", content)
    check_read(tmp_path / "batch", b"\x80\x04N0" + of_python_2()[2:])  # control


def follow_pointers(content):
    faulthandler.disable()
    pickle.loads(content, encoding="latin1").tolist()  # noqa: S301


def test_no_pointer_of_a_files_choice_is_followed(tmp_path):
    """dtypes of objects by the pickle's own state: numpy would take the bytes for addresses."""
    objects = dtype("O8", size=b"K\x08", flags=b"K\x3f")
    fields = b"}" + text("a") + objects + b"K\x00\x86s"
    hidden = dtype("V8", text("a") + b"\x85", fields, b"K\x08")
    for kind, name in ((objects, "O8"), (hidden, "V8")):
        pointers = array(b"K\x01\x85", kind, b"C\x08AAAAAAAA")
        content = of_python_2().replace(b"e" + text("data"), b"e0" + pointers + text("data"), 1)
        refused(f"numbers of type .{name}", read, tmp_path / "batch", content)
        content = b"\x80\x02" + pointers + b"."
    assert exit_code(start(follow_pointers, content)) == -signal.SIGSEGV  # control


def test_sizes_that_a_file_only_claims_take_no_memory(tmp_path):
    huge = b"J\xff\xff\xff\x7f"
    tracemalloc.start()
    try:
        for claim in ({"shape": huge + b"M\x00\x0c\x86"}, {"shape": 3 * huge + b"\x87"},
                      {"pixels": huge}, {"pixels": b"M\x00\x30"}):  # bytes(12288) are zeros
            refused("batch: not a CIFAR file", read, tmp_path / "batch", of_python_2(**claim))
        assert tracemalloc.get_traced_memory()[1] < 2 ** 20
    finally:
        tracemalloc.stop()


OPCODES = [value for value in vars(pickle).values() if type(value) is bytes and len(value) == 1]


def mutation(content, structure, rng):
    """A file with one or two changes, most of them where no pixels are."""
    for _ in range(rng.randint(1, 2)):
        place = rng.choice(structure) if rng.random() < 0.8 else rng.randrange(len(content))
        new = rng.choice([rng.choice(OPCODES), rng.randbytes(rng.choice([0, 1, 8])),
                          content[rng.choice(structure):][:rng.choice([1, 8])]])
        content = content[:place] + new + content[place + rng.choice([0, 1, 1, 8]):]
    return content


def fuzz():
    """In its own process, with 64 MiB to spare: a pickle's memo is as large as it says."""
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + 2 ** 26
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    rng = random.Random(0)
    batch = BATCH | {"data": np.full((4, 3072), 255, np.uint8)}
    files = [pickle.dumps(batch, protocol) for protocol in (0, 2, 4, 5)]
    files.append(of_python_2(pixels=PIXELS[:5] + batch["data"].tobytes()))
    structure = []  # where no pixels are
    for file in files:
        structure.append([i for i, byte in enumerate(file) if byte not in b"\xff\xc3\xbf"])
    whole = 0
    for i in range(2000):
        content = mutation(files[i % 5], structure[i % 5], rng)
        try:
            with mock.patch("data.open", lambda *_: io.BytesIO(content), create=True):  # noqa: B023
                labels, images = read_cifar("batch", "labels", CLASSES["cifar10"])
            assert images.dtype == np.uint8 and images.shape == (len(labels), 3, 32, 32)
            assert labels.dtype == np.int64 and set(labels.tolist()) <= set(range(10))
            whole += 1
        except UserError as e:
            assert "\n" not in str(e) and str(e).startswith("batch: not a CIFAR file")
    assert 100 < whole < 1500


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
def test_any_damage_gives_data_of_the_right_kind_or_one_line():
    assert exit_code(start(fuzz)) == 0
