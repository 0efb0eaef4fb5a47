"""Readers of data sets from a folder of the user. Nothing is downloaded.

    folder/mnist/      train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-...: the four files, gzipped or not
    folder/mnist_1k/   train_dataset_1k_60.npz, validation_dataset_1k_40.npz
    folder/cifar10/    one of three forms, see `cifar10`
    folder/bsds_crops.npz    24 crops of photographs of BSDS300, see `bsds_crops`
    folder/planetoid/  cora.npz, citeseer.npz, see `planetoid`

Every file is compared with its published size and hash before its content is used.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raybilevel.errors import DataError

MNIST_ORIGIN = "take the official MNIST files, for instance from https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_1K_ORIGIN = "take it from https://github.com/SGunwal/Bilevel_Hyperparameter_Optimization, folder 1HP/Datasets_1K"
CIFAR10_ORIGIN = "unpack cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html there"
CIFAR10_NPZ_ORIGIN = f"copy it again, or {CIFAR10_ORIGIN}"


@dataclass(frozen=True)
class Published:
    """A published data file.

    size:   bytes. Size and digest of a gzipped file are those of its content.
    digest: "sha256:..." or "md5:...".
    origin: advice for messages: what to do if the file is missing or damaged.
    """

    name: str
    size: int
    digest: str
    origin: str

    def path(self, folder: Path, *suffixes: str) -> Path:
        """The path of the file in the folder, with the first of the suffixes that exists."""
        candidates = [folder / (self.name + suffix) for suffix in suffixes or ("",)]
        for candidate in candidates:
            if candidate.exists():
                return candidate
        names = " or ".join(candidate.name for candidate in candidates)
        raise DataError(f"no data file {names}: expected in {folder}; nothing is downloaded, so {self.origin}")

    def read(self, path: Path) -> bytes:
        """The uncompressed content, up to one byte more than expected. That shows whether it is too long."""
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                return file.read(self.size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot be read: {error}; {self.origin}") from error

    def check(self, path: Path, content: bytes) -> None:
        if len(content) != self.size:
            found = f"{len(content):,}" if len(content) < self.size else "more"
            raise DataError(f"{path}: expected {self.size:,} bytes, found {found}; {self.origin}")
        algorithm = self.digest.partition(":")[0]
        # usedforsecurity=False: Pythons with FIPS refuse MD5 otherwise.
        found = f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"
        if found != self.digest:
            raise DataError(f"{path}: expected {self.digest}, found {found}: damaged or another version; {self.origin}")


# The gzipped files are those with the published MD5 f68b3c2dcbeaaa9fbdd348bbdeb94873, d53e105ee54ea40749a09fcbcd1e9432,
# 9fb629c4189551a2d022fa330f9573f3 and ec29112dd5afa0611ce80d1b7f02629c; hashes of the content also fit plain files.
MNIST_TRAIN = (
    Published(
        "train-images-idx3-ubyte",
        47_040_016,
        "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        MNIST_ORIGIN,
    ),
    Published(
        "train-labels-idx1-ubyte",
        60_008,
        "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        MNIST_ORIGIN,
    ),
)
MNIST_TEST = (
    Published(
        "t10k-images-idx3-ubyte",
        7_840_016,
        "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        MNIST_ORIGIN,
    ),
    Published(
        "t10k-labels-idx1-ubyte",
        10_008,
        "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        MNIST_ORIGIN,
    ),
)
MNIST_1K = (
    Published(
        "train_dataset_1k_60.npz",
        1_884_490,
        "sha256:47bed1ac922f04cd4ba7ef03b6657daa15be978ce6937da753fd48d06d9c54d6",
        MNIST_1K_ORIGIN,
    ),
    Published(
        "validation_dataset_1k_40.npz",
        1_256_490,
        "sha256:8f15101f5c0a02d20af4d61a1fff35148b7f904624c29003a2dd80e43449015e",
        MNIST_1K_ORIGIN,
    ),
)
CIFAR10_TRAIN_BATCHES = (
    Published("data_batch_1", 31_035_704, "md5:c99cafc152244af753f735de768cd75f", CIFAR10_ORIGIN),
    Published("data_batch_2", 31_035_320, "md5:d4bba439e000b95fd0a9bffe97cbabec", CIFAR10_ORIGIN),
    Published("data_batch_3", 31_035_999, "md5:54ebc095f3ab1f0389bbae665268c751", CIFAR10_ORIGIN),
    Published("data_batch_4", 31_035_696, "md5:634d18415352ddfa80567beed471001a", CIFAR10_ORIGIN),
    Published("data_batch_5", 31_035_623, "md5:482c414d41f54cd18b22e5b47cb7c3cb", CIFAR10_ORIGIN),
)
CIFAR10_TEST_BATCH = Published("test_batch", 31_035_526, "md5:40351d587109b95175f43aff81a1287e", CIFAR10_ORIGIN)
CIFAR10_JPEG = (
    Published(
        "cifar10_train_jpeg.npz",
        15_345_107,
        "sha256:99f22e3bc531edd0c38c2e63fc38231c54eafa27e9f64778a1186420c98b6779",
        CIFAR10_NPZ_ORIGIN,
    ),
    Published(
        "cifar10_test_jpeg.npz",
        3_066_727,
        "sha256:4b4ffff2a33f65a329bcf576d0347fa62e9f86a564f36cdf7e8a8b4e0c125122",
        CIFAR10_NPZ_ORIGIN,
    ),
)
CIFAR10_LOSSLESS = Published(
    "cifar10_train_first4000_lossless.npz",
    11_335_244,
    "sha256:5a3a42d44290a419b420982b8bebee85690907a7a4ec2535b9ce037d0c54d8cb",
    CIFAR10_NPZ_ORIGIN,
)


BSDS_CROPS = Published(
    "bsds_crops.npz",
    502_243,
    "sha256:0bc03c45610c7a90559cc08fdffb4e1f90c3b4871d77a2d901e02e9bcdb6e7d0",
    "make it from https://github.com/s-j-scott/bilevel-recycling, folder data/BSDS300-images: central 160x160 crops of "
    "16 train and 8 test images in grey",
)
PLANETOID_ORIGIN = "make it from https://github.com/kimiyoung/planetoid, folder data"
PLANETOID = {
    "cora": Published(
        "cora.npz",
        101_991,
        "sha256:36c7a7d6c048110dae1a44877213a3ca85524d7fff3b1e59f8eda486cc77c8c3",
        PLANETOID_ORIGIN,
    ),
    "citeseer": Published(
        "citeseer.npz",
        203_394,
        "sha256:7dfe87763994b24e44afe962845f37817227af7dc091c50b7c439cd48fc2142d",
        PLANETOID_ORIGIN,
    ),
}


class Images(NamedTuple):
    """images: uint8, (n, 28, 28) or (n, 3, 32, 32); labels: int64, (n,), the class numbers 0 to 9."""

    images: Tensor
    labels: Tensor


def mnist(folder: str | Path) -> tuple[Images, Images]:
    """MNIST in the official order: 60,000 training and 10,000 test images.

    Raises:
        DataError: a file is missing or is not the official one.
    """
    return _mnist_part(folder, MNIST_TRAIN), mnist_test(folder)


def mnist_test(folder: str | Path) -> Images:
    """The 10,000 test images of MNIST."""
    return _mnist_part(folder, MNIST_TEST)


def has_mnist_test(folder: str | Path) -> bool:
    """Whether any test file of MNIST exists. If some are missing, `mnist_test` raises an error that names them."""
    return any((_folder(folder, "mnist") / (file.name + end)).exists() for file in MNIST_TEST for end in (".gz", ""))


def mnist_1k(folder: str | Path) -> tuple[Images, Images]:
    """The 600 training and 400 validation images of Sinha, Gunwal & Kumar, arXiv:2208.12118, in their order.

    They were drawn with replacement from training and test images of MNIST together: 142 of the 1,000 (141 different
    images) are official test images, and five validation images are training images too.

    Raises:
        DataError: a file is missing or is not the published one.
    """

    def part(file: Published) -> Images:
        arrays = _npz(file.path(_folder(folder, "mnist_1k")), file)
        return Images(torch.from_numpy(arrays["x"].astype(np.uint8)), torch.from_numpy(arrays["y"].astype(np.int64)))

    train, validation = MNIST_1K
    return part(train), part(validation)


def cifar10(folder: str | Path, train: int | None = None, test: int | None = None) -> tuple[Images, Images]:
    """The training and test images of CIFAR-10; only the first `train` and `test` of them if these are given.

    It reads the first of these forms of which any file exists. That form must then be complete. Training and test
    images always have the same form, since the JPEG files are lossy.

    1. cifar-10-batches-py/data_batch_1 to 5 and test_batch, in folder/cifar10/ or folder/: the official files, 50,000 +
       10,000. They are pickles. No code in them is run.
    2. cifar10/cifar10_train_jpeg.npz and cifar10_test_jpeg.npz: the same images after JPEG compression, the test images
       in another order. Needs pillow.
    3. cifar10/cifar10_train_first4000_lossless.npz: the first 4,000 training images. It has no test images, so the last
       quarter takes their place: 3,000 + 1,000.

    Raises:
        DataError: there is none of these, a file is missing or is not the published one, or pillow is missing.
    """
    own = _folder(folder, "cifar10")
    for batches in (own / "cifar-10-batches-py", own.parent / "cifar-10-batches-py"):
        if batches.is_dir():
            paths = [file.path(batches) for file in (*CIFAR10_TRAIN_BATCHES, CIFAR10_TEST_BATCH)]
            return (
                _cifar_batches(CIFAR10_TRAIN_BATCHES, paths[:-1], train),
                _cifar_batches((CIFAR10_TEST_BATCH,), paths[-1:], test),
            )
    if any((own / file.name).exists() for file in CIFAR10_JPEG):
        paths = [file.path(own) for file in CIFAR10_JPEG]
        return _cifar_jpeg(paths[0], CIFAR10_JPEG[0], train), _cifar_jpeg(paths[1], CIFAR10_JPEG[1], test)
    if (own / CIFAR10_LOSSLESS.name).exists():
        arrays = _npz(own / CIFAR10_LOSSLESS.name, CIFAR10_LOSSLESS)
        x, y = arrays["x"], arrays["y"]
        cut = len(x) * 3 // 4
        return _from_rgb(x[:cut][:train], y[:cut][:train]), _from_rgb(x[cut:][:test], y[cut:][:test])
    raise DataError(
        f"no CIFAR-10: expected in {own} the folder cifar-10-batches-py with data_batch_1 to data_batch_5 and "
        f"test_batch, or {CIFAR10_JPEG[0].name} and {CIFAR10_JPEG[1].name}, or {CIFAR10_LOSSLESS.name}; nothing is "
        f"downloaded, so {CIFAR10_ORIGIN}"
    )


def bsds_crops(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Grey crops of photographs of the Berkeley Segmentation Dataset (Martin, Fowlkes, Tal & Malik 2001): 16 of its
    training and 8 of its test images, uint8, (16, 160, 160) and (8, 160, 160).

    Raises:
        DataError: the file is missing or is not the expected one.
    """
    arrays = _npz(BSDS_CROPS.path(Path(folder).expanduser()), BSDS_CROPS)
    return torch.from_numpy(arrays["train"].copy()), torch.from_numpy(arrays["test"].copy())


class Graph(NamedTuple):
    """A citation graph of n papers with c topics.

    features: float32, (n, f), bags of words.
    edges:    int64, (m, 2), undirected, each once.
    labels:   int64, (n,), -1 if unknown.
    train, validation, test: int64, the nodes of the public split.
    """

    features: Tensor
    edges: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def planetoid(folder: str | Path, name: str) -> Graph:
    """Cora or Citeseer with the public split of Yang, Cohen & Salakhutdinov 2016.

    Raises:
        DataError: the file is missing or is not the expected one, or there is no graph of this name.
    """
    if name not in PLANETOID:
        raise DataError(f"unknown graph {name!r}; choose one of {', '.join(PLANETOID)}")
    arrays = _npz(PLANETOID[name].path(_folder(folder, "planetoid")), PLANETOID[name])
    rows, columns = arrays["x_shape"].tolist()
    features = np.zeros((rows, columns), np.float32)
    # Compressed sparse rows: row i has x_indptr[i + 1] - x_indptr[i] entries.
    row = np.repeat(np.arange(rows), np.diff(arrays["x_indptr"]))
    features[row, arrays["x_indices"]] = arrays["x_data"]
    names = ("edges", "labels", "train_idx", "val_idx", "test_idx")
    return Graph(torch.from_numpy(features), *(torch.from_numpy(arrays[key].astype(np.int64)) for key in names))


def _folder(folder: str | Path, name: str) -> Path:
    return Path(folder).expanduser() / name


def _mnist_part(folder: str | Path, files: tuple[Published, Published]) -> Images:
    images, labels = (_idx(file, _folder(folder, "mnist"), dims) for file, dims in zip(files, (3, 1), strict=True))
    return Images(images, labels.long())


def _idx(file: Published, folder: Path, dims: int) -> Tensor:
    """An IDX file of unsigned bytes: 0, 0, 8, dims; the shape as big-endian 32-bit numbers; the entries."""
    path = file.path(folder, ".gz", "")
    content, magic = file.read(path), bytes((0, 0, 8, dims))
    # Before the hash, as this says what kind of file it is instead.
    if content[:4] != magic:
        kind, found = "images" if dims == 3 else "labels", content[:4].hex() or "nothing"
        raise DataError(f"{path}: expected IDX {kind}, which begin with {magic.hex()}, found {found}; {file.origin}")
    file.check(path, content)
    shape = np.frombuffer(content, ">u4", count=dims, offset=4).tolist()
    # A copy: an array over bytes is read-only, which tensors cannot be.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def _npz(path: Path, file: Published) -> dict[str, Any]:
    content = file.read(path)
    file.check(path, content)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def _from_rgb(images: Any, labels: Any) -> Images:
    """From shape (n, 32, 32, 3)."""
    return Images(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels.astype(np.int64))
    )


def _cifar_jpeg(path: Path, file: Published, limit: int | None) -> Images:
    """Image i is the JPEG file data[offsets[i] : offsets[i + 1]]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{path} holds JPEG images, which pillow reads: pip install 'raybilevel[images]'") from error
    arrays = _npz(path, file)
    data, offsets, labels = arrays["data"], arrays["offsets"], arrays["labels"][:limit]
    images = np.empty((len(labels), 32, 32, 3), np.uint8)
    for i in range(len(labels)):
        images[i] = np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())))
    return _from_rgb(images, labels)


def _cifar_batches(files: tuple[Published, ...], paths: list[Path], limit: int | None) -> Images:
    images, labels, count = [], [], 0
    for file, path in zip(files, paths, strict=True):
        if limit is not None and count >= limit:
            break
        content = file.read(path)
        file.check(path, content)
        data, classes = _unpickle_batch(path, content)
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(classes)
        count += len(classes)
    # Copies, as a slice would keep the memory of whole batches.
    return Images(
        torch.from_numpy(np.concatenate(images)[:limit].copy()), torch.from_numpy(np.concatenate(labels)[:limit])
    )


def _pickled_dtype(spec: bytes | str, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """The only dtype of the batches. Python 2 pickled align and copy as numbers, which NumPy now deprecates."""
    if spec not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it holds an array of {spec!r}, expected one of bytes")
    return np.dtype(np.uint8)


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # how NumPy pickles an empty array, under the module name of any version
_PICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _pickled_dtype,
}


class _BatchUnpickler(pickle.Unpickler):
    """Imports and calls only what rebuilds an array of bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return _PICKLED[module, name]


def _unpickle_batch(path: Path, content: bytes) -> tuple[Any, Any]:
    """Pixels, (n, 3072), and labels, (n,), of an official batch.

    Its hash has been checked, but that is an MD5, which can be forged. So the content is not trusted.
    """
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything: EOFError, KeyError, TypeError, ...
        raise DataError(f"{path}: refused, not a plain CIFAR-10 batch: {error}; {CIFAR10_ORIGIN}") from error
    data, labels = (batch.get(key) if isinstance(batch, dict) else None for key in (b"data", b"labels"))
    if not (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and isinstance(labels, list)
        and data.shape == (len(labels), 3072)
        and all(isinstance(label, int) and 0 <= label <= 9 for label in labels)
    ):
        raise DataError(
            f"{path}: expected a dict with data, bytes of shape (n, 3072), and labels, n numbers from 0 to 9; "
            f"found {type(batch).__name__}; {CIFAR10_ORIGIN}"
        )
    return data, np.array(labels, np.int64)
