from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raybilevel.errors import DataError
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._datasets import Published

DATA = os.environ.get("RAYBILEVEL_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="RAYBILEVEL_TEST_DATA does not name a folder with the data sets")


def published(name: str, content: bytes) -> Published:
    """What stands in the module's tables, for a file of a test."""
    return Published(name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", "get it again")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def digits(n: int) -> np.ndarray:
    return (np.arange(n) * 3 % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an MNIST of five training and three test images, gzipped, that passes for the published one."""
    (tmp_path / "mnist").mkdir()
    for table, n in (("MNIST_TRAIN", 5), ("MNIST_TEST", 3)):
        contents = idx(pixels(n, 28, 28)), idx(digits(n))
        files = [published(file.name, c) for file, c in zip(getattr(datasets, table), contents, strict=True)]
        monkeypatch.setattr(datasets, table, tuple(files))
        for file, content in zip(files, contents, strict=True):
            (tmp_path / "mnist" / f"{file.name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


def gunzip(path: Path) -> Path:
    plain = path.with_suffix("")
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return plain


def test_mnist_reads_gzipped_and_plain_files(mnist: Path) -> None:
    gunzip(mnist / "mnist" / "train-images-idx3-ubyte.gz")
    train, test = datasets.mnist(mnist)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert np.array_equal(train.images.numpy(), pixels(5, 28, 28))
    assert train.labels.tolist() == digits(5).tolist()
    assert test.images.shape == (3, 28, 28) and test.labels.tolist() == digits(3).tolist()
    assert np.array_equal(datasets.mnist_test(str(mnist)).images.numpy(), pixels(3, 28, 28))


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_mnist_file_is_named_with_its_place_and_remedy(mnist: Path, name: str) -> None:
    (mnist / "mnist" / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"{name}.gz or {name}: expected in {mnist / 'mnist'};.*get it again"):
        datasets.mnist(mnist)


def test_whether_there_are_mnist_test_files(mnist: Path, tmp_path: Path) -> None:
    assert datasets.has_mnist_test(mnist)
    (mnist / "mnist" / "t10k-images-idx3-ubyte.gz").unlink()
    assert datasets.has_mnist_test(mnist), "half of them must not pass for none: reading them then says what is missing"
    assert not datasets.has_mnist_test(tmp_path / "elsewhere")


def test_a_truncated_or_damaged_gzip_file_is_refused(mnist: Path) -> None:
    path = mnist / "mnist" / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100] + bytes(64) + whole[164:], b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: .*get it again"):
            datasets.mnist(mnist)


def test_damage_is_reported_with_what_was_expected_and_found(mnist: Path) -> None:
    path = gunzip(mnist / "mnist" / "train-images-idx3-ubyte.gz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: expected 3,936 bytes, found 3,935"):
        datasets.mnist(mnist)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(DataError, match="expected 3,936 bytes, found more"):
        datasets.mnist(mnist)
    path.write_bytes(whole[:-1] + bytes((whole[-1] ^ 1,)))
    with pytest.raises(DataError, match=r"expected sha256:\w{64}, found sha256:\w{64}: damaged"):
        datasets.mnist(mnist)
    path.write_bytes(idx(digits(5)))
    with pytest.raises(DataError, match="expected IDX images, which begin with 00000803, found 00000801"):
        datasets.mnist(mnist)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="found nothing"):
        datasets.mnist(mnist)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        datasets.mnist(mnist)


def test_a_gzip_file_is_not_unpacked_further_than_needed(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mnist / "mnist" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + bytes(10_000_000)))
    assert len(datasets.MNIST_TRAIN[1].read(path)) == datasets.MNIST_TRAIN[1].size + 1
    with pytest.raises(DataError, match="found more"):
        datasets.mnist(mnist)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def test_mnist_1k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [npz(x=pixels(n, 28, 28).astype(np.float32), y=digits(n).astype(np.float32)) for n in (4, 2)]
    files = [published(file.name, c) for file, c in zip(datasets.MNIST_1K, contents, strict=True)]
    monkeypatch.setattr(datasets, "MNIST_1K", tuple(files))
    with pytest.raises(DataError, match=r"no data file train_dataset_1k_60\.npz"):
        datasets.mnist_1k(tmp_path)
    (tmp_path / "mnist_1k").mkdir()
    for file, content in zip(files, contents, strict=True):
        (tmp_path / "mnist_1k" / file.name).write_bytes(content)
    train, validation = datasets.mnist_1k(tmp_path)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert np.array_equal(train.images.numpy(), pixels(4, 28, 28)) and train.labels.tolist() == digits(4).tolist()
    assert validation.images.shape == (2, 28, 28)
    (tmp_path / "mnist_1k" / files[1].name).write_bytes(contents[1][:-1])
    with pytest.raises(DataError, match=r"validation_dataset_1k_40\.npz: expected .* bytes, found"):
        datasets.mnist_1k(tmp_path)


# CIFAR-10: the official batches


PurePythonPickler: Any = pickle._Pickler  # the only one that can be taught other opcodes; typeshed leaves them out


class Python2Pickler(PurePythonPickler):  # type: ignore[misc]
    """Pickles bytes as Python 2 did its strings, and dtypes as the NumPy of that time, like the official files."""

    dispatch = dict(PurePythonPickler.dispatch)  # noqa: RUF012

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string

    def reducer_override(self, value: object) -> object:
        if isinstance(value, np.dtype):
            return np.dtype, (b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0)
        if isinstance(value, np.ndarray):
            build = (1, value.shape, value.dtype, False, value.tobytes())
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), build
        return NotImplemented


def python2(batch: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file).dump(batch)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(start: int, n: int) -> dict[bytes, object]:
    return {
        b"batch_label": b"a batch",
        b"labels": digits(start + n)[start:].tolist(),
        b"data": pixels(start + n, 3072)[start:],
        b"filenames": [b"a.png"] * n,
    }


def write_batches(folder: Path, contents: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches that pass for the published ones."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    tables = (*datasets.CIFAR10_TRAIN_BATCHES, datasets.CIFAR10_TEST_BATCH)
    files = [published(file.name, content) for file, content in zip(tables, contents, strict=True)]
    monkeypatch.setattr(datasets, "CIFAR10_TRAIN_BATCHES", tuple(files[:5]))
    monkeypatch.setattr(datasets, "CIFAR10_TEST_BATCH", files[5])
    for file, content in zip(files, contents, strict=True):
        (folder / file.name).write_bytes(content)
    return folder


@pytest.mark.parametrize("write", [python2, lambda value: pickle.dumps(value, protocol=3)])
@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar10_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object, place: str) -> None:
    contents = [write(batch(4 * i, 4)) for i in range(6)]  # type: ignore[operator]
    assert b"cnumpy" in contents[0], "the test must rebuild arrays through their module's functions"
    folder = write_batches(tmp_path / place, contents, monkeypatch)
    train, test = datasets.cifar10(tmp_path)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert np.array_equal(train.images.numpy(), pixels(20, 3072).reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == digits(20).tolist()
    assert np.array_equal(test.images.numpy(), pixels(24, 3072)[20:].reshape(-1, 3, 32, 32))

    (folder / "data_batch_3").write_bytes(b"")  # beyond the first six images, so not read
    first, few = datasets.cifar10(tmp_path, train=6, test=3)
    assert torch.equal(first.images, train.images[:6]) and torch.equal(first.labels, train.labels[:6])
    assert torch.equal(few.images, test.images[:3]) and torch.equal(few.labels, test.labels[:3])
    with pytest.raises(DataError, match=r"data_batch_3: expected .* bytes, found 0"):
        datasets.cifar10(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match=f"no data file data_batch_3: expected in {folder}"):
        datasets.cifar10(tmp_path, train=6)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    command = b"cos\nsystem\n(S'touch " + str(victim).encode() + b"'\ntR."
    write_batches(tmp_path, [command, *(python2(batch(0, 1)) for _ in range(5))], monkeypatch)
    with pytest.raises(DataError, match=r"data_batch_1: refused.*it wants to call os\.system"):
        datasets.cifar10(tmp_path)
    assert not victim.exists()
    pickle.loads(command)
    assert victim.exists(), "the pickle must be one that does harm, or this test shows nothing"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({b"labels": [1]}, "found dict"),
        ([1, 2], "found list"),
        ({b"labels": [1, 2], b"data": pixels(1, 3072)}, "expected a dict"),
        ({b"labels": [10], b"data": pixels(1, 3072)}, "numbers from 0 to 9"),
        ({b"labels": [1], b"data": pixels(1, 3072).astype(object)}, "array of 'O8'"),
        ({b"labels": [1], b"data": pixels(1, 3072).view("u4")}, "array of 'u4'"),
        ({b"labels": [1], b"data": bytearray(b"abc")}, "it wants to call"),
    ],
)
def test_a_pickle_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, message: str
) -> None:
    write_batches(tmp_path, [pickle.dumps(value, protocol=3)] * 6, monkeypatch)
    with pytest.raises(DataError, match=f"data_batch_1: .*{message}"):
        datasets.cifar10(tmp_path)


def test_a_truncated_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_batches(tmp_path, [python2(batch(0, 1))[:-100]] * 6, monkeypatch)
    with pytest.raises(DataError, match="data_batch_1: refused"):
        datasets.cifar10(tmp_path)


# CIFAR-10: the JPEG and the lossless archives


def jpeg_archive(images: np.ndarray, labels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image", reason="pillow, which writes and reads JPEG, is not installed")
    files = []
    for pixel in images:
        buffer = io.BytesIO()
        image.fromarray(pixel).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return npz(data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)


@pytest.fixture
def jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four training and two test images of one colour each, which JPEG keeps to within a few levels."""
    colours = np.broadcast_to(pixels(6, 1, 1, 3), (6, 32, 32, 3))
    contents = jpeg_archive(colours[:4], digits(4)), jpeg_archive(colours[4:], digits(2))
    files = [published(file.name, c) for file, c in zip(datasets.CIFAR10_JPEG, contents, strict=True)]
    monkeypatch.setattr(datasets, "CIFAR10_JPEG", tuple(files))
    (tmp_path / "cifar10").mkdir()
    for file, content in zip(files, contents, strict=True):
        (tmp_path / "cifar10" / file.name).write_bytes(content)
    return tmp_path


def write_lossless(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = npz(x=pixels(8, 32, 32, 3), y=digits(8))
    monkeypatch.setattr(datasets, "CIFAR10_LOSSLESS", published(datasets.CIFAR10_LOSSLESS.name, content))
    (folder / "cifar10").mkdir(exist_ok=True)
    (folder / "cifar10" / datasets.CIFAR10_LOSSLESS.name).write_bytes(content)


def test_cifar10_jpeg(jpeg: Path) -> None:
    train, test = datasets.cifar10(jpeg)
    assert train.images.dtype == torch.uint8 and train.labels.tolist() == digits(4).tolist()
    colours = torch.from_numpy(pixels(6, 1, 1, 3).transpose(0, 3, 1, 2)).int()
    assert (train.images.int() - colours[:4]).abs().max() <= 4  # conversion to YCbCr and back rounds twice
    assert (test.images.int() - colours[4:]).abs().max() <= 4
    first, few = datasets.cifar10(jpeg, train=3, test=1)
    assert torch.equal(first.images, train.images[:3]) and few.images.shape == (1, 3, 32, 32)


def test_jpeg_images_need_pillow(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"cifar10_train_jpeg\.npz .*pip install 'raybilevel\[images\]'"):
        datasets.cifar10(jpeg)


def test_cifar10_lossless_holds_out_its_last_quarter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lossless(tmp_path, monkeypatch)
    train, test = datasets.cifar10(tmp_path)
    expected = pixels(8, 32, 32, 3).transpose(0, 3, 1, 2)
    assert np.array_equal(train.images.numpy(), expected[:6]) and train.labels.tolist() == digits(8)[:6].tolist()
    assert np.array_equal(test.images.numpy(), expected[6:]) and test.labels.tolist() == digits(8)[6:].tolist()
    first, few = datasets.cifar10(tmp_path, train=4, test=1)
    assert torch.equal(first.images, train.images[:4]) and torch.equal(few.images, test.images[:1])


def test_the_forms_of_cifar10_are_tried_in_order_and_not_mixed(jpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lossless(jpeg, monkeypatch)
    assert len(datasets.cifar10(jpeg)[0].labels) == 4
    (jpeg / "cifar10" / "cifar10_test_jpeg.npz").unlink()
    with pytest.raises(DataError, match=r"no data file cifar10_test_jpeg\.npz"):
        datasets.cifar10(jpeg)
    write_batches(jpeg, [python2(batch(0, 1))] * 6, monkeypatch)
    assert len(datasets.cifar10(jpeg)[0].labels) == 5


def test_no_cifar10_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10: expected in .*cifar10 the folder cifar-10-batches-py .* unpack"):
        datasets.cifar10(tmp_path)


# The published files themselves


@needs_data
def test_the_official_mnist() -> None:
    train, test = datasets.mnist(DATA or "")
    assert train.images.shape == (60_000, 28, 28) and test.images.shape == (10_000, 28, 28)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_data
def test_the_published_mnist_1k() -> None:
    train, validation = datasets.mnist_1k(DATA or "")
    assert train.images.shape == (600, 28, 28) and validation.images.shape == (400, 28, 28)
    assert torch.equal(train.images[99], train.images[440]) and torch.equal(
        validation.images[2], validation.images[265]
    )


@needs_data
def test_the_jpeg_and_the_lossless_images_are_the_same_pictures(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="pillow, which reads the JPEG images, is not installed")
    source = Path(DATA or "") / "cifar10"
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / datasets.CIFAR10_LOSSLESS.name).symlink_to(
        source.absolute() / datasets.CIFAR10_LOSSLESS.name
    )
    lossy, _ = datasets.cifar10(source.parent, 50, 10)
    train, test = datasets.cifar10(tmp_path)
    assert train.images.shape == (3000, 3, 32, 32) and test.images.shape == (1000, 3, 32, 32)
    assert torch.equal(lossy.labels, train.labels[:50])
    error = (lossy.images.double() - train.images[:50].double()).square().mean((1, 2, 3))
    assert (10 * (255**2 / error).log10()).min() > 20  # dB; the least over 4,000 images is 23.1
