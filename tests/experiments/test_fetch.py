"""CIFAR's archives: downloaded once, over https, and unpacked only if they are the right ones."""
import functools
import hashlib
import io
import tarfile
from unittest import mock

import pytest
from helpers import refused

from experiments import fetch


def serve(monkeypatch, folder, members):
    """Offers {name: content} as the archive of CIFAR-10 -> its file."""
    file = folder / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.ARCHIVES, "cifar10", (file.as_uri(), md5))
    return file


def call(folder):
    fetch.main(["cifar10", str(folder)])


unpacks = pytest.mark.skipif(not hasattr(tarfile, "data_filter"),
                             reason="this Python cannot unpack safely, and fetch says so")


@unpacks
def test_an_archive_is_fetched_once_and_again_if_the_connection_breaks(tmp_path, monkeypatch,
                                                                       capsys):
    assert all(url.startswith("https://") for url, _ in fetch.ARCHIVES.values())
    file = serve(monkeypatch, tmp_path, {"cifar-10-batches-py/data_batch_1": b"pixels"})
    new = tmp_path / "new" / "data"
    reply = mock.MagicMock()
    reply.__enter__.return_value.read.side_effect = [b"nine byte", ConnectionResetError("gone")]
    with mock.patch("torch.hub.urlopen", return_value=reply):
        refused("download failed .gone", call, new)
    assert not list(new.iterdir())
    for _ in range(2):
        call(new)
        assert (new / "cifar-10-batches-py" / "data_batch_1").read_bytes() == b"pixels"
        assert f"python train.py --data cifar10 --data-dir {new}" in capsys.readouterr().out
        file.unlink(missing_ok=True)  # once is enough


@unpacks
def test_an_archive_that_leads_outside_or_has_another_md5_is_refused(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, {"../evil": b"x"})
    refused("download failed .*outside", call, tmp_path / "data")
    assert not (tmp_path / "evil").exists()
    url, _ = fetch.ARCHIVES["cifar10"]
    monkeypatch.setitem(fetch.ARCHIVES, "cifar10", (url, "0" * 32))
    refused("its md5 is not 000", call, tmp_path / "data")


def test_a_python_that_cannot_unpack_safely_does_not_unpack(tmp_path, monkeypatch):
    serve(monkeypatch, tmp_path, {"a": b"x"})
    old = functools.partial(tarfile.TarFile.extractall)  # it knows no filter
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: old(self, path))
    refused("download failed .*filter", call, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-python.tar.gz"]
