"""One hypergradient by other packages and by this one: the same problem, the same weights, as many products.

    python -m benchmarks.hypergradient_peers --data DIR --out DIR

The problem is that of configs/noisy_labels.yaml: a network of 129 weights weights MNIST examples. All take the
hypergradient at the same x and the same weights y of the lower level, solved to 1e-3, and may take `--products`
products with second derivatives (steps, where they unroll). The table has the relative error, against a solve to 1e-10,
the time in gradients of f (the median of several), and the most bytes of tensors made on the way that were alive at
once; then the test accuracy after descents of `--steps` steps. DIR gets hypergradient_peers.json.

Packages that are not installed are left out; `make bench-peers` installs them in a virtual environment of their own, as
boat-torch asks for an older numpy than the rest and betty-ml for an older Python, without which it works.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.families import arguments_parser, descent_method, table, wide_console, write_json
from raybilevel._config.experiment import read_config
from raybilevel._lower.functions import BothLevels
from raybilevel._lower.variables import set_weights
from raybilevel.hypergradient import (
    ConjugateGradients,
    Implicit,
    MinimalResidual,
    NeumannSeries,
    Unrolled,
    solve_lower,
)
from raybilevel.hypergradient._descent import BilevelDescent
from raybilevel.problems import make_problem

HypergradientOf = Callable[[BothLevels, Tensor, Tensor], Tensor]
"""dF/dx at x and y."""


@dataclass(frozen=True)
class Measured:
    """error: relative; gradients: time, in gradients of f; peak_bytes: of tensors; accuracy: on test data, after a
    descent."""

    name: str
    error: float
    gradients: float
    peak_bytes: int
    accuracy: float


# A dispatch mode lies below autograd, so that it sees the operations of backward passes as well.
class PeakBytes(TorchDispatchMode):
    """The most bytes, alive at once, of tensors that operations inside the block made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                # Weak, so that counting keeps nothing alive.
                reference = StorageWeakRef(tensor.untyped_storage())
                self.alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


class Vector(nn.Module):
    """A flat vector as the parameters of a module."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.detach().clone())


def ours(products: int, rate: float) -> dict[str, HypergradientOf]:
    estimators = {
        "raybilevel MINRES": Implicit(MinimalResidual(1e-12, limit=products)),
        "raybilevel CG": Implicit(ConjugateGradients(1e-12, limit=products)),
        "raybilevel Neumann": Implicit(NeumannSeries(products, rate)),
        "raybilevel unrolled": Unrolled(products, rate),
    }
    return {name: lambda f, x, y, e=e: e(f, x, y).gradient for name, e in estimators.items()}  # type: ignore[misc]


def torchopt_cg(products: int) -> HypergradientOf:
    import torchopt

    def gradient(functions: BothLevels, x: Tensor, y: Tensor) -> Tensor:
        def stationary(weights: Tensor, x: Tensor) -> Tensor:
            found: Tensor = torch.func.grad(lambda w: functions.loss_at("lower", x, w))(weights)
            return found

        solve = torchopt.linear_solve.solve_cg(maxiter=products, rtol=1e-12)
        solved = torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=solve)(lambda weights, x: weights)
        x = x.detach().requires_grad_(True)
        weights = solved(y.detach().clone().requires_grad_(True), x)
        return torch.autograd.grad(functions.loss_at("upper", x, weights), x)[0]

    return gradient


def higher_unrolled(products: int, rate: float) -> HypergradientOf:
    import higher

    def gradient(functions: BothLevels, x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        model = Vector(y)
        sgd = torch.optim.SGD(model.parameters(), lr=rate)
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=True) as (unrolled, optimizer):
            for _ in range(products):
                optimizer.step(functions.loss_at("lower", x, unrolled.values))
            return torch.autograd.grad(functions.loss_at("upper", x, unrolled.values), x)[0]

    return gradient


def boat_lower(levels: dict[str, Any], upper_model: Any, lower_model: Any, params: Any = None) -> Tensor:
    """f as boat-torch calls it."""
    weights = lower_model.values if params is None else params[0]
    found: Tensor = levels["functions"].loss_at("lower", upper_model.values, weights)
    return found


def boat_upper(levels: dict[str, Any], upper_model: Any, lower_model: Any, params: Any = None) -> Tensor:
    """F as boat-torch calls it."""
    weights = lower_model.values if params is None else params[0]
    found: Tensor = levels["functions"].loss_at("upper", upper_model.values, weights)
    return found


def boat_cg(products: int, rate: float, folder: Path) -> HypergradientOf:
    """One lower-level step, which its loop cannot go without, and then CG."""
    import boat_torch

    def gradient(functions: BothLevels, x: Tensor, y: Tensor) -> Tensor:
        upper, lower = Vector(x), Vector(y)
        config = {
            "fo_op": None, "gm_op": ["NGD"], "na_op": ["CG"], "device": "cpu", "lower_iters": 1,
            "lower_level_model": lower, "upper_level_model": upper,
            "lower_level_var": list(lower.parameters()), "upper_level_var": list(upper.parameters()),
            "lower_level_opt": torch.optim.SGD(lower.parameters(), lr=rate),
            "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
            "CG": {"tolerance": 1e-12, "k": products}, "RGT": {"truncate_iter": 0},
            "GDA": {"alpha_init": 0.0, "alpha_decay": 0.5}, "DI": {"lr": 0.1},
            "accumulate_grad": False, "copy_last_param": False, "return_grad": True, "fo_ol_batch_input": False,
            "loss_log_path": str(folder / "boat.json"),
        }  # fmt: skip
        losses = {
            f"{level}_level_loss": {"function": f"{__name__}.boat_{level}", "params": {}}
            for level in ("lower", "upper")
        }
        problem = boat_torch.Problem(config, losses).build_ll_solver().build_ul_solver()
        gradients, _ = problem.run_iter({"functions": functions}, {"functions": functions}, 0)
        found: Tensor = gradients[0]
        return found.detach()

    return gradient


def betty_neumann(products: int, rate: float) -> HypergradientOf:
    """Not its CG: 0.2.1 makes the next direction from the residual before, and does not converge."""
    from betty.configs import Config
    from betty.problems import ImplicitProblem

    class LowerLevel(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: tuple[BothLevels, Tensor]) -> Tensor:
            functions, x = batch
            found: Tensor = functions.loss_at("lower", x, self.module.values)
            return found

    def gradient(functions: BothLevels, x: Tensor, y: Tensor) -> Tensor:
        above, below = Vector(x), Vector(y)
        upper = ImplicitProblem("upper", Config(), above)
        lower = LowerLevel("lower", Config(type="neumann", neumann_iterations=products, neumann_alpha=rate), below)
        lower.cur_batch = functions, above.values
        loss = functions.loss_at("upper", above.values, below.values)
        upper.backward(loss, upper.trainable_parameters(), [[upper, lower, upper]])
        found = above.values.grad
        assert found is not None
        return found

    return gradient


def all_ways(products: int, rate: float, folder: Path) -> dict[str, HypergradientOf]:
    """Ours, and those of the packages that are installed."""
    found = ours(products, rate)
    peers: dict[str, tuple[str, Callable[[], HypergradientOf]]] = {
        "torchopt CG": ("torchopt", lambda: torchopt_cg(products)),
        "betty Neumann": ("betty", lambda: betty_neumann(products, rate)),
        "boat-torch CG": ("boat_torch", lambda: boat_cg(products, rate, folder)),
        "higher unrolled": ("higher", lambda: higher_unrolled(products, rate)),
    }
    for name, (module, make) in peers.items():
        if importlib.util.find_spec(module) is not None:
            found[name] = make()
    return found


def curvature(functions: BothLevels, x: Tensor, y: Tensor) -> float:
    """The largest eigenvalue of d2f/dy2, by power iterations."""
    linear = functions.linearise(x, y)
    vector = torch.randn(len(y), generator=torch.Generator().manual_seed(0)).to(y)
    for _ in range(30):
        vector = linear.hessian(vector / vector.norm())
    return float(vector.norm())


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)


def accuracy_after(descent: BilevelDescent, gradient: HypergradientOf, steps: int, rate: float) -> float:
    """Test accuracy after Adam on x with these hypergradients, y solved to 1e-3 in each step."""
    x = nn.Parameter(descent.x.detach().clone())
    adam = torch.optim.Adam([x], lr=rate)
    y = torch.zeros(sum(part.numel() for part in descent.model.parameters()), dtype=x.dtype)
    for _ in range(steps):
        y = solve_lower(descent.levels, x.detach(), y, 1e-3).y
        x.grad = gradient(descent.levels, x.detach(), y)
        adam.step()
    set_weights(descent.model, solve_lower(descent.levels, x.detach(), y, 1e-3).y)
    found = descent.problem.evaluate(descent.model, descent.levels.hyperparameters(x.detach()))
    return float(found["test_accuracy"])


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = arguments_parser("hypergradient_peers", __doc__.splitlines()[0], "configs/noisy_labels.yaml", 1)
    parser.add_argument("--products", type=int, default=20, help="with second derivatives, by default %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="of a descent, by default %(default)s")
    given = parser.parse_args(arguments)
    config, console = read_config(given.config, given.set), wide_console()
    method = descent_method(config)
    problem = make_problem(config.problem, config.options, given.data)
    problem.dtype = torch.float64
    descent = BilevelDescent(problem, {"start": 0.0}, method)
    functions, x = descent.levels, descent.x.detach().clone()
    y = torch.zeros(sum(part.numel() for part in descent.model.parameters()), dtype=x.dtype)
    y = solve_lower(functions, x, y, 1e-3).y
    truth = Implicit(MinimalResidual(1e-10, limit=5000))(functions, x, y).gradient
    # Half of the 2 / |H| below which a Neumann series converges.
    rate = 1 / curvature(functions, x, y)
    # Times are in this unit, which depends less on the machine.
    unit = seconds(lambda: functions.lower(x, y))
    measured = []
    with TemporaryDirectory() as folder:
        for name, gradient in all_ways(given.products, rate, Path(folder)).items():
            with PeakBytes() as memory:
                found = gradient(functions, x, y)
            error = float((found - truth).norm() / truth.norm())
            cost = seconds(lambda gradient=gradient: gradient(functions, x, y)) / unit  # type: ignore[misc]
            accuracy = accuracy_after(descent, gradient, given.steps, method.rate)
            measured.append(Measured(name, error, cost, memory.peak, accuracy))
            console.print(f"{name}: error {error:.2g}", style="dim")
    rows = [
        (m.name, f"{m.error:.1e}", f"{m.gradients:.1f}", f"{m.peak_bytes / 2**20:.1f}", f"{m.accuracy:.4f}")
        for m in measured
    ]
    columns = ("hypergradient", "relative error", "time / gradient of f", "MiB at most", "test accuracy")
    console.print(table(columns, rows), highlight=False)
    write_json(
        given.out / "hypergradient_peers.json", {"products": given.products, "rows": [asdict(m) for m in measured]}
    )
    console.print(f"written to {given.out / 'hypergradient_peers.json'}", highlight=False)


if __name__ == "__main__":
    main()
