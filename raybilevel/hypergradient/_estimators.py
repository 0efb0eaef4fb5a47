"""Estimators of the hypergradient dF(x, y*(x))/dx with one interface: implicit, unrolled, and by a penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from raybilevel._linear.krylov import KrylovMemory, LinearSolver, LinearSystem, MinimalResidual
from raybilevel._lower.functions import BothLevels
from raybilevel._lower.hypergradient import Hypergradient, checked, implicit
from raybilevel.errors import ConfigError, NotFiniteError
from raybilevel.hypergradient._fixed_point import AndersonAcceleration

MOST_GROWTH = 1000.0
"""Of a derivative along unrolled steps, times 1 - momentum. Steps towards a minimum shorten it."""


class Estimator(Protocol):
    """A frozen dataclass of settings.

    second_derivatives: whether it takes products with the second derivatives of f.
    """

    @property
    def second_derivatives(self) -> bool: ...

    def __call__(
        self, functions: BothLevels, x: Tensor, y: Tensor, memory: Any = None, target: float = 0.0
    ) -> Hypergradient:
        """The hypergradient at x, shape (p,), from an approximate minimiser y of f(x, .), shape (n,).

        memory: of the previous estimate, or None.
        target: tolerance on the norm of the hypergradient's error; 0 for the estimator's own tolerance.
        """


@dataclass(frozen=True)
class Implicit:
    """The implicit function theorem: dF/dx - (d2f/dxdy) q with (d2f/dy2) q = dF/dy."""

    second_derivatives: ClassVar[bool] = True

    solver: LinearSolver = field(default_factory=MinimalResidual)

    def __call__(
        self, functions: BothLevels, x: Tensor, y: Tensor, memory: KrylovMemory | None = None, target: float = 0.0
    ) -> Hypergradient:
        upper, products = functions.upper(x, y), functions.linearise(x, y)
        system = LinearSystem(products.hessian, upper.in_y, products.mixed, target)
        return implicit(upper, products, *self.solver.solve(system, memory))


@dataclass(frozen=True)
class Equilibrium:
    """The implicit function theorem where the lower level is a fixed point y = g(x, y) (Bai, Kolter & Koltun 2019,
    Theorem 1):

        dF/dx + (dg/dx)^T u,    u = (dg/dy)^T u + dF/dy,

    where u is found by the same acceleration as y. Only one evaluation of g is differentiated, however many y needed.
    """

    second_derivatives: ClassVar[bool] = False

    tolerance: float = 1e-4
    limit: int = 100
    history: int = 5

    def __post_init__(self) -> None:
        self._acceleration()  # checks the settings

    def _acceleration(self) -> AndersonAcceleration:
        return AndersonAcceleration(self.tolerance, self.limit, self.history)

    def __call__(
        self, functions: BothLevels, x: Tensor, y: Tensor, memory: Tensor | None = None, target: float = 0.0
    ) -> Hypergradient:
        upper = functions.upper(x, y)
        x, y = x.detach().requires_grad_(True), y.detach().requires_grad_(True)
        with torch.enable_grad():
            image = functions.mapped(x, y)
        right = upper.in_y.view_as(image)

        def step(u: Tensor) -> Tensor:
            # A backward pass without a forward one is half of a gradient. An evaluation of g is the other half.
            functions.ledger.charge(0.5 * functions.ledger.whole)
            # (dg/dy)^T u, through the one graph of g that all iterations share.
            (part,) = torch.autograd.grad(image, y, u, retain_graph=True, allow_unused=True, materialize_grads=True)
            return part.view_as(image) + right

        found = self._acceleration().solve(step, right if memory is None else memory.view_as(image))
        # (dg/dx)^T u
        (in_x,) = torch.autograd.grad(image, x, found.y, allow_unused=True, materialize_grads=True)
        gradient, products, kept = upper.in_x + in_x, found.iterations + 1, found.y.flatten()
        return checked(Hypergradient(gradient, upper.value, None, found.iterations, products, kept, found.residual))


@dataclass(frozen=True)
class Unrolled:
    """The derivative of F(x, y_K), where y_K is the result of K steps of heavy-ball gradient descent from y:

        m_{k+1} = momentum m_k + df/dy(x, y_k),    y_{k+1} = y_k - rate m_{k+1}

    mode:     "reverse" makes one pass back over the K iterates. It stores the iterates but not their graphs (Franceschi
        et al. 2017, section 3.1). "forward" propagates the derivative of y_k in each upper-level variable, shape
        (n, p), and is for small p only.
    truncate: number of last steps that reverse mode goes back over (Shaban et al. 2019); None for all.

    Raises:
        NotFiniteError: derivatives explode along the steps (Metz et al. 2021, arXiv:2111.05803), so that theirs is not
            that of y*. The rate may be above 2 / |H|, or f may not be convex where the steps lead.
    """

    second_derivatives: ClassVar[bool] = True

    steps: int = 100
    rate: float = 0.1
    momentum: float = 0.0
    mode: Literal["reverse", "forward"] = "reverse"
    truncate: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0 or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"unrolling needs steps >= 1, a positive rate and momentum in [0, 1), got {self.steps}, {self.rate} "
                f"and {self.momentum}"
            )
        if self.truncate is not None and (self.truncate < 1 or self.mode == "forward"):
            raise ConfigError(f"truncate={self.truncate}: at least 1, and with mode='reverse' only")
        if self.mode not in ("reverse", "forward"):
            raise ConfigError(f"mode must be 'reverse' or 'forward', got {self.mode!r}")

    def __call__(
        self, functions: BothLevels, x: Tensor, y: Tensor, memory: Any = None, target: float = 0.0
    ) -> Hypergradient:
        return checked(self._forward(functions, x, y) if self.mode == "forward" else self._reverse(functions, x, y))

    def _reverse(self, functions: BothLevels, x: Tensor, y: Tensor) -> Hypergradient:
        kept = self.steps if self.truncate is None else min(self.truncate, self.steps)
        iterates, velocity = [], torch.zeros_like(y)
        for step in range(self.steps):
            # Truncation saves memory as well: earlier iterates are not stored.
            if step >= self.steps - kept:
                iterates.append(y)
            velocity = self.momentum * velocity + functions.lower(x, y).in_y
            y = y - self.rate * velocity
        upper = functions.upper(x, y)
        gradient, in_y, in_velocity = upper.in_x, upper.in_y, torch.zeros_like(y)
        most = MOST_GROWTH / (1 - self.momentum) * in_y.norm()
        # The adjoint of one step: `in_y` and `in_velocity` are dF/dy_k and dF/dm_k.
        for earlier in reversed(iterates):
            in_velocity = in_velocity - self.rate * in_y
            linear = functions.linearise(x, earlier)
            gradient = gradient + linear.mixed(in_velocity)
            in_y = in_y + linear.hessian(in_velocity)
            in_velocity = self.momentum * in_velocity
            if in_y.norm() > most:
                raise exploded(self)
        return Hypergradient(gradient, upper.value, iterations=self.steps, products=2 * kept)

    def _forward(self, functions: BothLevels, x: Tensor, y: Tensor) -> Hypergradient:
        velocity = torch.zeros_like(y)
        # dy_k/dx and dm_k/dx, shape (n, p).
        dy, dv = y.new_zeros(len(y), len(x)), y.new_zeros(len(y), len(x))
        unit = torch.eye(len(x), dtype=x.dtype, device=x.device)
        # The sum of |d2f/dydx| over the steps so far, by which dy/dx grows at most where each shortens it.
        added = x.new_zeros(())
        for _ in range(self.steps):
            linear = functions.linearise(x, y)
            # The derivative of df/dy(x, y_k(x)) along each x_j: H dy/dx_j + d2f/dydx_j.
            mixed = torch.stack([linear.mixed_transposed(one) for one in unit], 1)
            dv = self.momentum * dv + torch.stack([linear.hessian(column) for column in dy.T], 1) + mixed
            added = added + mixed.norm()
            if (dy - self.rate * dv).norm() > MOST_GROWTH / (1 - self.momentum) * self.rate * added:
                raise exploded(self)
            velocity = self.momentum * velocity + functions.lower(x, y).in_y
            y, dy = y - self.rate * velocity, dy - self.rate * dv
        upper = functions.upper(x, y)
        products = 2 * self.steps * len(x)
        return Hypergradient(upper.in_x + dy.T @ upper.in_y, upper.value, iterations=self.steps, products=products)


def exploded(unrolled: Unrolled) -> NotFiniteError:
    return NotFiniteError(
        f"derivatives explode along the {unrolled.steps} unrolled steps: the rate {unrolled.rate:g} is above 2 / |H|, "
        "or the lower-level loss is not convex where they lead; give a lower rate, fewer steps or truncate, or take "
        "estimator 'implicit'"
    )


@dataclass(frozen=True)
class FirstOrder:
    """F2SA, the fully first-order estimate (Kwon et al. 2023, arXiv:2301.10945, equation (4)):

        dF/dx(x, y_m) + m [df/dx(x, y_m) - df/dx(x, z)],   y_m = argmin F + m f,   z = argmin f,

    Its error is of order 1/m, and it needs no second derivatives. y_m and z are approached by gradient steps from those
    of the previous estimate. The steps of y_m have the rate `rate` / m, as F + m f is m times as steep as f.

    growth: factor of m after each estimate, up to `most`.
    """

    second_derivatives: ClassVar[bool] = False

    multiplier: float = 10.0
    growth: float = 1.0
    most: float = 1e6
    steps: int = 10
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0 or not self.multiplier > 0 or self.growth < 1:
            raise ConfigError(
                "the first-order estimate needs steps >= 1, positive rate and multiplier, growth >= 1, got "
                f"{self.steps}, {self.rate}, {self.multiplier} and {self.growth}"
            )

    def __call__(
        self,
        functions: BothLevels,
        x: Tensor,
        y: Tensor,
        memory: tuple[Tensor, Tensor, float] | None = None,
        target: float = 0.0,
    ) -> Hypergradient:
        penalised, plain, m = memory if memory is not None else (y, y, self.multiplier)
        for _ in range(self.steps):
            plain = plain - self.rate * functions.lower(x, plain).in_y
            # The gradient of F + m f, divided by m.
            step = functions.lower(x, penalised).in_y + functions.upper(x, penalised).in_y / m
            penalised = penalised - self.rate * step
        upper, lower = functions.upper(x, penalised), functions.lower(x, penalised)
        # Equation (4): f at z stands for the value function.
        gradient = upper.in_x + m * (lower.in_x - functions.lower(x, plain).in_x)
        memory = (penalised, plain, min(self.most, m * self.growth))
        return checked(Hypergradient(gradient, upper.value, iterations=2 * self.steps, memory=memory))


@dataclass(frozen=True)
class DynamicBarrier:
    """BOME (Liu et al. 2022, arXiv:2209.08709, Algorithm 1) with several of its steps in y for one in x.

    q(x, y) = f(x, y) - f(x, y_T) measures how far y is from the minimum. y_T is the result of T gradient steps from y
    and is held constant. The direction is grad F + lambda grad q in (x, y). lambda is the smallest value with which q
    falls at the rate `barrier` |grad q|^2:

        lambda = max(0, (barrier |grad q|^2 - <grad F, grad q>) / |grad q|^2)

    Each estimate starts at the last y of the previous one.
    """

    second_derivatives: ClassVar[bool] = False

    barrier: float = 0.5
    steps: int = 1
    inner_steps: int = 10
    rate: float = 0.1
    inner_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.inner_steps < 1 or not min(self.barrier, self.rate, self.inner_rate) > 0:
            raise ConfigError("BOME needs steps and inner_steps of at least 1, and a positive barrier and rates")

    def __call__(
        self, functions: BothLevels, x: Tensor, y: Tensor, memory: Tensor | None = None, target: float = 0.0
    ) -> Hypergradient:
        y = memory if memory is not None else y
        for _ in range(self.steps):
            inner = y
            for _ in range(self.inner_steps):
                inner = inner - self.inner_rate * functions.lower(x, inner).in_y
            upper, lower, least = functions.upper(x, y), functions.lower(x, y), functions.lower(x, inner)
            q_x, q_y = lower.in_x - least.in_x, lower.in_y
            squared = (q_x.dot(q_x) + q_y.dot(q_y)).item()
            product = (upper.in_x.dot(q_x) + upper.in_y.dot(q_y)).item()
            # Where grad q = 0, y is stationary and there is nothing to hold back.
            multiplier = max(0.0, self.barrier - product / squared) if squared > 0 else 0.0
            gradient = upper.in_x + multiplier * q_x
            # A large multiplier makes the direction steeper by that factor, so the step is divided by it.
            y = y - self.rate * (upper.in_y + multiplier * q_y) / max(1.0, multiplier)
        return checked(Hypergradient(gradient, upper.value, iterations=self.steps, memory=y))
