"""A bilevel descent: Adam steps in x along hypergradients, while y continues from its last value. No Ray."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from raybilevel._linear.krylov import KrylovMemory
from raybilevel._linear.limited_memory import LimitedMemory, Pair
from raybilevel._linear.recycling import ErrorEstimator, RecycleSpace
from raybilevel._lower import checkpoint
from raybilevel._lower.functions import LevelGradient
from raybilevel._lower.hypergradient import Hypergradient
from raybilevel._lower.levels import Levels
from raybilevel._lower.linearisation import Differences, NoisyError
from raybilevel._lower.random_numbers import forked_random
from raybilevel._lower.training import train_epoch
from raybilevel._lower.variables import BoxVariables, ModuleVariables, UpperVariables, set_weights, weights_of
from raybilevel.errors import NotFiniteError, ProblemError
from raybilevel.hypergradient._fixed_point import AndersonAcceleration
from raybilevel.hypergradient._lower import solve_lower
from raybilevel.hypergradient._settings import DescentSettings
from raybilevel.problem import (
    BilevelProblem,
    LargeUpperLevel,
    SupportsLowerMap,
    SupportsShards,
    evaluate,
    make_batches,
    make_model,
    make_optimizer,
    move,
)
from raybilevel.space import Space, flatten, nest

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "bilevel.pt"
CHECKPOINT_FORMAT = 3
WRONG_PRODUCT = 0.1
"""A product farther from that of a difference, relatively, is wrong. Less may be the kinks of rectifiers."""
FAILED_SOLVE_RESIDUAL = 0.1
"""A linear solve with a larger relative residual has failed: at a condition of 1e8, one of 0.15 left half an error."""


class BilevelDescent:
    """One descent: its start, its state, its result.

    space:  the box; None if the problem has `upper_variables`.
    config: the start, which is a point of the space or {"start": number}, with the constants around it.

    The weights of the descent see training data only, except those that a penalty estimator keeps for itself. The
    result, `conclude`, is nevertheless evaluated at weights that are trained from scratch.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: Mapping[str, Any],
        settings: DescentSettings,
        space: Space | None = None,
        seed: int = 0,
    ) -> None:
        number = int(config.get("start", 0)) if space is None else 0
        self.whole, self.config, self.settings, self.space = problem, dict(config), settings, space
        if settings.shards > 1:
            assert isinstance(problem, SupportsShards)  # checked before anything runs
            problem = problem.shard(number % settings.shards, settings.shards)
        self.problem = problem
        # The parts of one start share its seed, and with it the first x.
        self.seed = seed + number // settings.shards
        self.estimator = settings.make_estimator()
        self.generator = torch.Generator().manual_seed(self.seed)
        with self._random(self.seed):
            self.model = make_model(problem, self.config)
            self.variables, x = self._start()
        # One leaf for the whole descent: Adam keeps its moments by this object.
        self.x = nn.Parameter(x)
        self.adam = torch.optim.Adam([self.x], lr=settings.rate)
        self.levels = Levels(problem, self.model, self.variables, self.config)
        if settings.lower == "fixed_point" and not isinstance(problem, SupportsLowerMap):
            raise ProblemError(f"{type(problem).__name__} has no lower_map(), which lower='fixed_point' needs")
        with self._random():
            self.optimizer = make_optimizer(problem, self.model, self.config)
        self.step = 0
        self.memory: Any = None
        self.iterations = self.products = 0
        self.best: tuple[float, Tensor] = (math.inf, x.clone())
        self.last: dict[str, float] = {}
        # Passes in the ledger of the shard, once the descent has gone on to all data.
        self.earlier = 0.0
        self.warned = False
        self.lower_residual: float | None = None

    def _start(self) -> tuple[UpperVariables, Tensor]:
        problem = self.problem
        if self.space is not None:
            names = {parameter.path for parameter in self.space.parameters}
            constants = nest({path: value for path, value in flatten(self.config).items() if path not in names})
            unit = self.space.encode(self.config).to(problem.device, problem.dtype)
            return BoxVariables(self.space, constants), unit
        assert isinstance(problem, LargeUpperLevel)  # checked before anything runs
        module = problem.upper_variables().to(problem.device, problem.dtype)
        constants = {key: value for key, value in self.config.items() if key != "start"}
        return ModuleVariables(module, constants), parameters_to_vector(module.parameters()).detach().clone()

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    @property
    def passes(self) -> float:
        """The cost so far, in gradients of f over all lower-level data."""
        passes = self.levels.passes
        # A pass over a shard is that share of one over all data.
        return self.earlier + (passes if self.problem is self.whole else passes / self.settings.shards)

    def run_step(self) -> dict[str, float]:
        """Solve or train the lower level, estimate the hypergradient there, and step in x. Returns the metrics.

        Raises:
            NotFiniteError: a loss or the hypergradient is NaN or infinite.
        """
        # A copy, as Adam changes self.x in place and `best` may keep this one.
        settings, x = self.settings, self.x.detach().clone()
        # The first step begins at initial weights and needs a whole training. The later ones begin at trained weights.
        epochs = settings.lower_epochs if self.step else self.problem.epochs
        y, lower = self._train(self.model, self.optimizer, x, epochs)
        if self.step == 0 and self.estimator.second_derivatives:
            self._compare_second_derivatives(x, y)
        # 0 in the first step, where no norm is known: the solver then goes by its own tolerance.
        target = settings.accuracy * self.last.get("hypergradient_norm", 0.0)
        found = self.estimator(self.levels, x, y, self.memory, target)
        upper = self.levels.value("upper", x, y)  # a penalty estimator's own weights have seen validation data
        if not math.isfinite(upper):
            raise NotFiniteError(f"the upper-level loss is {upper} in step {self.step + 1}")
        selection = self._selection(x)
        chosen_by = upper if selection is None else selection
        if chosen_by < self.best[0]:
            self.best = (chosen_by, x)
        self.memory = found.memory
        self.iterations += found.iterations
        self.products += found.products
        self._warn_of_failed_solve(found, target)
        # The rate falls along a cosine to a tenth, so that the last steps settle.
        for group in self.adam.param_groups:
            group["lr"] = settings.rate * (0.1 + 0.9 * (1 + math.cos(math.pi * self.step / settings.steps)) / 2)
        self.x.grad = found.gradient
        self.adam.step()
        with torch.no_grad():
            self.x.copy_(self.variables.project(self.x))
        self.step += 1
        self.last = {"upper_loss": upper, "hypergradient_norm": found.gradient.norm().item()}
        if selection is not None:
            self.last["selection_loss"] = selection
        lower = lower or self.levels.lower(x, y)
        residuals = {"solver_residual": found.residual, "lower_residual": self.lower_residual}
        return {
            **self.last,
            "lower_loss": lower.value,
            "lower_gradient_norm": lower.in_y.norm().item(),
            "solver_iterations": float(self.iterations),
            "second_order_products": float(self.products),
            **{name: residual for name, residual in residuals.items() if residual is not None},
        }

    def _compare_second_derivatives(self, x: Tensor, y: Tensor) -> None:
        """Warn unless a product with d2f/dy2 is that of a difference: autograd takes a function whose backward pass is
        detached for a constant, without a word."""
        chance = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        direction = chance.to(y)  # the same on each device
        product = self.levels.linearise(x, y).hessian(direction)
        self.products += 1
        try:
            compared = Differences(self.levels, x, y).hessian(direction)
        except NoisyError:  # nothing to compare with
            return
        apart = (product - compared).norm().item() / (compared.norm().item() or 1.0)
        if apart > WRONG_PRODUCT:
            logger.warning(
                "a product with second derivatives of the lower-level loss is %.0f %% off that of a difference of "
                "gradients. Does the model have a function whose backward pass is detached or once_differentiable? Use "
                "estimator 'first_order', which takes first derivatives only.", 100 * apart,
            )  # fmt: skip

    def _warn_of_failed_solve(self, found: Hypergradient, target: float) -> None:
        """Warn once per descent, unless the solve ended because the hypergradient is accurate enough."""
        if self.warned or found.residual is None or found.residual <= FAILED_SOLVE_RESIDUAL:
            return
        if found.error is not None and found.error <= target:
            return
        self.warned = True
        logger.warning(
            "step %d: the linear solve of the hypergradient ended at a relative residual of %.2g. Are there more "
            "weights than examples, or is the lower level not at a minimum? A decay in lower_loss, more iterations, or "
            "solver 'minres' may help; the metric solver_residual has every step's.", self.step + 1, found.residual,
        )  # fmt: skip

    def conclude(self) -> dict[str, Any]:
        """F, f and the problem's metrics at the best x, with weights trained from scratch, from the seed, on all data.

        The best x has the lowest F of all steps, or the lowest selection loss if the problem has one. If it is a point
        of a box, it is rounded to the steps of the box, and "hyperparameters" has it.
        """
        # First of all, so that F is that of the hyperparameters that are reported.
        x = self.variables.rounded(self.best[1])
        self._take_all_data()
        with self._random(self.seed):
            model = make_model(self.problem, self.config)
            optimizer = make_optimizer(self.problem, model, self.config)
        # The order of the batches must not depend on how much the descent has drawn.
        self.generator.manual_seed(self.seed)
        y, known = self._train(model, optimizer, x, self.problem.epochs)
        # Buffers as well, which y does not hold, e.g. the statistics of batch norm.
        self.model.load_state_dict(model.state_dict())
        self.x.data = x.clone()
        upper, lower = self.levels.value("upper", x, y), known or self.levels.lower(x, y)
        if not (math.isfinite(upper) and math.isfinite(lower.value)):
            raise NotFiniteError(f"after training anew the losses are {upper} and {lower.value}")
        norm = lower.in_y.norm().item()
        found: dict[str, Any] = {"upper_loss": upper, "lower_loss": lower.value, "lower_gradient_norm": norm}
        found |= self.metrics()
        if self.space is not None:
            found["hyperparameters"] = self.space.to_config(x.detach().cpu().double())
        return found

    def _take_all_data(self) -> None:
        """Switch a descent on a shard to all data."""
        if self.problem is self.whole:
            return
        # A new model, as the lower-level variable may depend on the data: `Imaging` has an image for each example.
        self.earlier, self.problem = self.passes, self.whole
        with self._random(self.seed):
            self.model = make_model(self.problem, self.config)
        self.levels = Levels(self.problem, self.model, self.variables, self.config)

    def _selection(self, x: Tensor) -> float | None:
        """The problem's selection loss at x and the weights in the model."""
        if not isinstance(self.problem, LargeUpperLevel):
            return None
        self.model.eval()
        with torch.no_grad():
            found = self.problem.selection_loss(self.model, self.levels.hyperparameters(x))
        if found is not None and not math.isfinite(found):
            raise NotFiniteError(f"the selection loss is {found} in step {self.step + 1}")
        return found

    def metrics(self) -> dict[str, float]:
        """The metrics of the problem's `evaluate` at the current x and y."""
        self.model.eval()
        with torch.no_grad():
            given = self.levels.hyperparameters(self.x.detach())
            return evaluate(self.problem, self.model, given)

    def _train(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, epochs: int
    ) -> tuple[Tensor, LevelGradient | None]:
        """Minimise f(x, .) from the model's weights. The result stays in the model, and is returned flat, shape (n,),
        with f and its gradients there if they are known."""
        if self.settings.lower == "tolerance":
            found = solve_lower(self.levels, x, weights_of(model), self.settings.lower_tolerance)
            set_weights(model, found.y)
            return found.y, found.here
        if self.settings.lower == "fixed_point":
            y = self._fixed_point(x, weights_of(model))
            set_weights(model, y)
            return y, None
        problem, given = self.problem, self.levels.hyperparameters(x)
        with self._random():
            for _ in range(epochs):
                train_epoch(
                    problem, model, optimizer, make_batches(problem, "lower", self.generator, self.config),
                    lambda batch: problem.lower_loss(model, given, batch), self.levels.ledger,
                    f"in step {self.step + 1}",
                )  # fmt: skip
        return weights_of(model), None

    def _fixed_point(self, x: Tensor, y: Tensor) -> Tensor:
        # Only g itself tells how y divides into rows.
        rows = len(self.levels.mapped(x, y))
        found = AndersonAcceleration(self.settings.lower_tolerance).solve(
            lambda z: self.levels.mapped(x, z.flatten()), y.view(rows, -1)
        )
        self.lower_residual = found.residual
        return found.y.flatten()

    @contextmanager
    def _random(self, seed: int | None = None) -> Iterator[None]:
        """Inside the block torch's global random numbers are this descent's own."""
        with forked_random(self.problem.device):
            # A seed drawn from the generator: its state, which checkpoints hold, then determines these numbers as well.
            torch.manual_seed(seed if seed is not None else int(torch.randint(2**31, (), generator=self.generator)))
            yield

    def state_dict(self) -> dict[str, Any]:
        """The state as named plain values and tensors, with what the next solve recycles."""
        memory = self.memory
        if isinstance(memory, KrylovMemory):
            space = memory.space
            seen, recent = space.estimator if space else None, memory.recent
            memory = {
                "solution": memory.solution,
                "vectors": space.vectors if space else None,
                # Else the first solve after a restart would end by the residual, and the descent at another x.
                "estimator": {"weighted": seen.weighted, "basis": seen.basis, "rest": seen.rest} if seen else None,
                "recent": {**vars(recent), "pairs": [list(pair) for pair in recent.pairs]} if recent else None,
            }
        return {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "finished": self.finished,
            "x": self.x.detach().clone(),
            "upper": self._module_state(),
            "model": self.model.state_dict(),
            "adam": self.adam.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "best": list(self.best),
            "last": dict(self.last),
            "memory": memory,
            "counts": [self.iterations, self.products, self.earlier],
            "charged": [self.levels.ledger.examples, self.levels.ledger.whole],
        }

    def _module_state(self) -> dict[str, Tensor] | None:
        """The parameters of the upper-level module at x, by name; None for a box."""
        if self.variables.module is None:
            return None
        # This sets the module to x. A step may have left it at an earlier one.
        self.levels.hyperparameters(self.x.detach())
        return dict(self.variables.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        place = {"device": self.problem.device, "dtype": self.problem.dtype}
        if state["finished"]:
            self._take_all_data()  # first, as the tensors below have the shapes of all data
        self.step, self.last = state["step"], dict(state["last"])
        # In place of the tensor, not of the parameter: Adam holds that.
        self.x.data = state["x"].to(**place)
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.best = (state["best"][0], state["best"][1].to(**place))
        self.iterations, self.products, self.earlier = state["counts"]
        self.levels.ledger.examples, self.levels.ledger.whole = state["charged"]
        # What estimators keep may be on the GPU, and a checkpoint is read onto the CPU.
        memory = move(state["memory"], self.problem.device, self.problem.dtype)
        if isinstance(memory, dict):
            known = memory["estimator"]
            estimator = ErrorEstimator(**known) if known is not None else None
            space = RecycleSpace(memory["vectors"], estimator) if memory["vectors"] is not None else None
            recent = memory["recent"]
            if recent is not None:
                recent = LimitedMemory(**{**recent, "pairs": tuple(Pair(*pair) for pair in recent["pairs"])})
            memory = KrylovMemory(memory["solution"], space, recent)
        self.memory = memory


def dump_checkpoint(descent: BilevelDescent) -> bytes:
    return checkpoint.dump(descent.state_dict())


def load_checkpoint(source: bytes | Path) -> dict[str, Any]:
    """A descent's state from its checkpoint, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or of another format version.
    """
    return checkpoint.load(source, "bilevel descent's", CHECKPOINT_FORMAT)
