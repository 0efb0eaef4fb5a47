"""Inverse problems in imaging: the filters of a fields-of-experts regulariser, or a few regularisation parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from scipy.fft import idctn
from torch import Tensor, nn
from torch.nn.functional import conv2d

from raybilevel.errors import ConfigError
from raybilevel.hypergradient import BilevelFunctions, solve_lower
from raybilevel.problem import BilevelProblem, Hyperparameters, LargeUpperLevel, Level
from raybilevel.problems import _datasets as datasets
from raybilevel.problems._classification import check_positive, data_folder

Task = Literal["inpainting", "deblurring"]
Expert = Literal["smoothed_l1", "lorentzian"]

# f has a minimum even where no pixel is measured and the regulariser is flat.
STRONG_CONVEXITY = 1e-6


class Measured(NamedTuple):
    """clean: (n, 1, h, w), grey values in [0, 1]; measured: A clean + noise; mask: 1 where a pixel was measured."""

    clean: Tensor
    measured: Tensor
    mask: Tensor


class Reconstruction(nn.Module):
    """The lower-level variable: images, (n, 1, h, w). They start at zero."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.images = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        return self.images


class Experts(nn.Module):
    """The upper-level variable: K filters, (K, 1, s, s), and the logarithms of their weights, (K,)."""

    # Logarithms keep the weights, and so the regulariser, positive.

    def __init__(self, filters: Tensor, weights: float) -> None:
        super().__init__()
        self.filters = nn.Parameter(filters)
        self.log_weights = nn.Parameter(torch.full((len(filters),), math.log(weights)))


class Imaging(BilevelProblem):
    """Reconstruct images y from incomplete or blurred measurements b = A y + noise:

        f(x, y) = |A y - b|^2 / 2 + R(x, y) + 5e-7 |y|^2,    F(y) = |y - clean|^2 / 2,    means over images

    "inpainting": MNIST digits with a share of the pixels missing. "deblurring": crops of photographs (BSDS300), blurred
    by a Gaussian. Filters are applied with zeros outside the image. Test images are different ones.

    data:      the folder of the data files.
    images:    number of training images, beginning at number `first`.
    test:      number of test images.
    size:      of the deblurred crops, in pixels; at most that of the photographs, 160.
    noise:     standard deviation, in grey values.
    removed:   share of the pixels that are missing in inpainting.
    blur:      standard deviation of the Gaussian, in pixels.
    smoothing: grey value below which the regularisers are quadratic.
    """

    dtype = torch.float64
    epochs = 1

    def __init__(
        self,
        data: str | None = None,
        task: Task = "inpainting",
        images: int = 1,
        first: int = 0,
        test: int = 4,
        size: int = 64,
        noise: float = 0.1,
        removed: float = 0.7,
        blur: float = 1.5,
        smoothing: float = 0.1,
        data_seed: int = 0,
    ) -> None:
        if task not in get_args(Task):
            raise ConfigError(f"unknown task {task!r}; choose one of {', '.join(get_args(Task))}")
        check_positive(images=images, test=test, size=size, noise=noise, blur=blur, smoothing=smoothing)
        if not 0 <= removed < 1:
            raise ConfigError(f"removed must be from 0 to below 1, got {removed}")
        self.data = data_folder(self, data)
        self.task, self.images, self.first, self.test, self.size = task, images, first, test, size
        self.noise, self.removed, self.blur, self.data_seed = noise, removed, blur, data_seed
        self.smoothing = smoothing

    @cached_property
    def splits(self) -> dict[str, Measured]:
        if self.task == "inpainting":
            train, test = (part.images for part in datasets.mnist(self.data))
        else:
            parts = datasets.bsds_crops(self.data)
            if self.size > parts[0].shape[-1]:
                raise ConfigError(f"the photographs have {parts[0].shape[-1]} pixels a side; got size={self.size}")
            # The central crop. A larger size would make this negative, and count from the other end.
            start = (parts[0].shape[-1] - self.size) // 2
            train, test = (part[:, start : start + self.size, start : start + self.size] for part in parts)
        chosen = {"train": train[self.first : self.first + self.images], "test": test[: self.test]}
        if len(chosen["train"]) < self.images:
            raise ConfigError(f"there are {len(train)} training images; got first={self.first}, images={self.images}")
        return {name: self.measure(part[:, None].to(self.dtype) / 255, name) for name, part in chosen.items()}

    def measure(self, clean: Tensor, split: str) -> Measured:
        """Measure images. The noise and the missing pixels of an image depend on its number only, as shards need it."""
        masks, noises = [], []
        for number in range(len(clean)):
            # Seeds of training images, of test images and of another data_seed never meet.
            offset = self.first + number if split == "train" else 1_000_000 + number
            generator = torch.Generator().manual_seed(2_000_003 * self.data_seed + offset)
            removed = self.removed if self.task == "inpainting" else 0.0
            masks.append((torch.rand(clean.shape[1:], generator=generator) >= removed).to(self.dtype))
            noises.append(torch.randn(clean.shape[1:], generator=generator, dtype=self.dtype))
        mask = torch.stack(masks)
        return Measured(clean, mask * (self.forward(clean, mask) + self.noise * torch.stack(noises)), mask)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "splits"}

    def shard(self, index: int, count: int) -> Imaging:
        """A share of the training images, with the same measurements as in the whole, and all test images."""
        if count > self.images:
            raise ConfigError(f"{self.images} training images cannot be divided into {count} shards")
        other = copy.copy(self)  # without the splits
        start, end = (self.images * part // count for part in (index, index + 1))
        other.first, other.images = self.first + start, end - start
        return other

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """A, the measurement of images without noise."""
        if self.task == "inpainting":
            return mask * images
        # A Gaussian is separable: rows and columns are blurred one after the other. Beyond three deviations it is cut.
        radius = math.ceil(3 * self.blur)
        at = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
        kernel = torch.exp(-(at**2) / (2 * self.blur**2))
        kernel = kernel / kernel.sum()
        rows = conv2d(images, kernel.view(1, 1, -1, 1), padding=(radius, 0))
        return conv2d(rows, kernel.view(1, 1, 1, -1), padding=(0, radius))

    def regulariser(self, images: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        """R(x, y), the sum over images."""
        raise NotImplementedError

    def model(self) -> nn.Module:
        return Reconstruction(self.splits["train"].clean.shape)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Measured) -> Tensor:
        images = model()
        misfit = (self.forward(images, batch.mask) - batch.measured).square().sum() / 2
        convex = STRONG_CONVEXITY / 2 * images.square().sum()
        mean: Tensor = (misfit + self.regulariser(images, hyperparameters) + convex) / len(images)
        return mean

    def upper_loss(self, model: nn.Module, batch: Measured) -> Tensor:
        images = model()
        mean: Tensor = (images - batch.clean).square().sum() / (2 * len(images))
        return mean

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Measured]:
        yield self.splits["train"]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            model.parameters(), max_iter=500, history_size=20, tolerance_grad=1e-7, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

    def evaluate(self, model: nn.Module, hyperparameters: Hyperparameters) -> dict[str, float]:
        """Mean PSNR in dB of the training reconstructions and of the test images, which are reconstructed here.

        `test_loss` is F of the test images.
        """
        with torch.enable_grad():
            test = self.reconstruct(self.splits["test"], hyperparameters)
        clean = self.splits["test"].clean.to(test)
        train = model().detach()
        return {
            "train_psnr": psnr(train, self.splits["train"].clean.to(train)),
            "test_psnr": psnr(test, clean),
            "test_loss": (test - clean).square().sum().item() / (2 * len(clean)),
        }

    def reconstruct(self, measured: Measured, hyperparameters: Hyperparameters, tolerance: float = 1e-4) -> Tensor:
        """Solve the lower level for other measurements."""
        model = Reconstruction(measured.clean.shape).to(self.device, self.dtype)
        batch = Measured(*(part.to(self.device) for part in measured))

        def lower(x: Tensor, y: Tensor) -> Tensor:
            # Not in `Reconstruction`, whose images are a parameter: y must stay the tensor that is differentiated.
            given = _Given(y.view_as(model.images))
            return self.lower_loss(given, hyperparameters, batch)

        start = torch.zeros(model.images.numel(), dtype=self.dtype, device=self.device)
        solution = solve_lower(BilevelFunctions([], [lower]), start.new_zeros(0), start, tolerance)
        return solution.y.view_as(model.images)


class _Given(nn.Module):
    """A model of given images, without parameters of its own."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.given = images

    def forward(self) -> Tensor:
        return self.given


class FieldsOfExperts(LargeUpperLevel, Imaging):
    """Filters of a fields-of-experts regulariser (Roth & Black 2005) for inpainting digits or deblurring photographs:

        R(x, y) = sum_k w_k sum_pixels phi(c_k * y),   x = (c_1, ..., c_K, log w_1, ..., log w_K)

    after Ehrhardt, Gazzola & Scott, arXiv:2412.08264. The filters start as random ones with norm 1. If K = s^2 - 1 they
    start as those of the discrete cosine transform without the constant one.

    filters:      K.
    filter_size:  s.
    start_weight: initial w_k.
    expert:       phi(t), with the smoothing h = `smoothing`: "smoothed_l1" is sqrt(t^2 + h^2), which is convex, and
        "lorentzian" is h^2 log(1 + t^2 / h^2), which is not.
    """

    def __init__(
        self,
        data: str | None = None,
        filters: int = 3,
        filter_size: int = 5,
        expert: Expert = "smoothed_l1",
        start_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(data, **options)
        if expert not in get_args(Expert):
            raise ConfigError(f"unknown expert {expert!r}; choose one of {', '.join(get_args(Expert))}")
        check_positive(filters=filters, filter_size=filter_size, start_weight=start_weight)
        if filter_size % 2 == 0:
            raise ConfigError(f"filter_size must be odd, got {filter_size}")
        self.filters, self.filter_size, self.expert, self.start_weight = filters, filter_size, expert, start_weight

    def upper_variables(self) -> nn.Module:
        size, count = self.filter_size, self.filters
        if count == size**2 - 1:
            units = torch.eye(size**2, dtype=self.dtype).view(-1, size, size).numpy()
            filters = torch.stack([torch.from_numpy(idctn(unit, norm="ortho")) for unit in units[1:]])
        else:
            filters = torch.randn(count, size, size, dtype=self.dtype)
            filters = filters / filters.flatten(1).norm(dim=1)[:, None, None]
        return Experts(filters[:, None], self.start_weight)

    def regulariser(self, images: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        experts = hyperparameters["upper"]
        # (n, 1, h, w) -> (n, K, h, w)
        responses = conv2d(images, experts.filters, padding=self.filter_size // 2)
        if self.expert == "smoothed_l1":
            values = (responses.square() + self.smoothing**2).sqrt()
        else:
            values = torch.log1p(responses.square() / self.smoothing**2) * self.smoothing**2
        total: Tensor = (experts.log_weights.exp()[:, None, None] * values).sum()
        return total


class RegularisationParameters(Imaging):
    """Two regularisation parameters of an inverse problem.

    They are of smoothed total variation and Tikhonov,

        R(x, y) = tv sum_pixels sqrt(|grad y|^2 + s^2) + tikhonov |y|^2 / 2,

    with s = `smoothing`. They are few enough also for the methods that model the value function.
    """

    def regulariser(self, images: Tensor, hyperparameters: Hyperparameters) -> Tensor:
        # Forward differences, at pixels that have both neighbours.
        down = images[..., 1:, :-1] - images[..., :-1, :-1]
        right = images[..., :-1, 1:] - images[..., :-1, :-1]
        variation = (down.square() + right.square() + self.smoothing**2).sqrt().sum()
        total: Tensor = hyperparameters["tv"] * variation + hyperparameters["tikhonov"] / 2 * images.square().sum()
        return total


def psnr(images: Tensor, clean: Tensor) -> float:
    """Mean peak signal-to-noise ratio of images in dB, for grey values in [0, 1]."""
    errors = (images - clean).square().flatten(1).mean(1)
    return (-10 * errors.log10()).mean().item()
