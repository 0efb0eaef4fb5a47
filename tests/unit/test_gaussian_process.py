from __future__ import annotations

import math

import gpytorch
import pytest
import torch
from torch import Tensor

from raybilevel._models.gaussian_process import (
    DerivativeRBFKernel,
    FittedGP,
    derivative_rows,
    fit,
    relative,
    spaced,
    value_rows,
)
from raybilevel.space import sobol_points
from tests.problems_for_tests import vector

LENGTHS = [0.3, 0.7, 1.1]


@pytest.mark.parametrize("dimension", [2, 3, 4, 8, 20, 30])
@pytest.mark.parametrize("most", [120, 250])
def test_spaced_rows_meet_every_coordinate(dimension: int, most: int):
    for values in range(5, 260, 7):
        for points in range(1, (500 - values) // dimension + 1, 3):
            derivatives = torch.cat([torch.zeros(values, dimension), torch.eye(dimension).repeat(points, 1)])
            chosen = spaced(derivatives, most)
            assert len(set(chosen.tolist())) == len(chosen) <= most
            assert chosen[0] == 0 and chosen[-1] == len(derivatives) - 1
            met = derivatives[chosen].sum(0)
            assert met.min() >= met.mean() // 3
            if len(derivatives) <= most:
                assert len(chosen) == len(derivatives)


def kernel(d: int) -> DerivativeRBFKernel:
    made = DerivativeRBFKernel(d).double()
    made.lengthscale = torch.tensor([LENGTHS[:d]], dtype=torch.double)
    return made


def all_rows(x: Tensor) -> Tensor:
    """Per point its value, then its derivatives: the order of gpytorch's RBFKernelGrad."""
    return torch.cat([torch.cat([value_rows(p.unsqueeze(0)), derivative_rows(p)]) for p in x])


def wave(x: Tensor) -> Tensor:
    """A smooth function of x, shape (n, d) -> (n,)."""
    frequency = torch.arange(1.0, x.shape[-1] + 1, dtype=torch.double)
    return torch.sin(2 * frequency * x).sum(-1) + x.prod(-1)


def wave_gradients(x: Tensor) -> Tensor:
    tracked = x.clone().requires_grad_(True)
    (gradients,) = torch.autograd.grad(wave(tracked).sum(), tracked)
    return gradients


def fitted(d: int, count: int, which: range | tuple[int, ...] = (), sign: float = 1.0) -> FittedGP:
    x = sobol_points(d, count, 1)
    gradients = wave_gradients(x)
    return fit(x, wave(x), {i: sign * gradients[i] for i in which})


# The kernel.


@pytest.mark.parametrize("d", [1, 3])
def test_the_kernel_is_gpytorchs_where_every_gradient_is_observed(d: int):
    theirs = gpytorch.kernels.RBFKernelGrad(ard_num_dims=d).double()
    theirs.lengthscale = torch.tensor([LENGTHS[:d]], dtype=torch.double)
    x1, x2 = sobol_points(d, 4, 0), sobol_points(d, 3, 1)
    expected = theirs(x1, x2).to_dense()
    # the distance is computed as |a|^2 - 2 a.b + |b|^2, whose rounding is some 1e-15 over the squared length 0.09
    assert torch.allclose(kernel(d).forward(all_rows(x1), all_rows(x2)), expected, rtol=0, atol=1e-12)


def test_the_kernel_against_autograd_of_the_plain_one():
    d, lengths = 2, vector(*LENGTHS[:2])

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-((a - b) / lengths).square().sum() / 2)

    a, b = vector(0.2, 0.9), vector(0.5, 0.4)
    second = torch.autograd.functional.hessian(lambda z: plain(z[:d], z[d:]), torch.cat([a, b]))
    first = torch.autograd.functional.jacobian(lambda z: plain(z[:d], z[d:]), torch.cat([a, b]))
    expected = torch.zeros(d + 1, d + 1, dtype=torch.double)
    expected[0, 0], expected[1:, 0], expected[0, 1:], expected[1:, 1:] = (
        plain(a, b),
        first[:d],
        first[d:],
        second[:d, d:],
    )
    found = kernel(d).forward(all_rows(a.unsqueeze(0)), all_rows(b.unsqueeze(0)))
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)  # rounding as above


# The posterior.


def dense_posterior(
    gp: FittedGP, x: Tensor, y: Tensor, gradients: dict[int, Tensor], at: Tensor
) -> tuple[float, float]:
    """Mean and standard deviation at a point, by dense algebra written out row by row."""
    model = gp.model
    lengths = model.covar_module.base_kernel.lengthscale.detach().squeeze(0)
    size = model.covar_module.outputscale.item()
    rows = torch.cat([value_rows(x), *(derivative_rows(x[i]) for i in gradients)])
    noise = model.likelihood.noise_covar(rows).diagonal(dim1=-1, dim2=-2).detach()
    weights = [1.0] * len(x) + [w for w in relative(gradients).values() for _ in range(x.shape[1])]
    noise = noise / vector(*weights).square()  # rows that are divided by a weight have its square of the noise
    observed: list[tuple[Tensor, int | None]] = [(p, None) for p in x]
    targets = [(value - gp.shift) / gp.scale - model.mean_constant for value in y]
    for i, gradient in gradients.items():
        observed += [(x[i], j) for j in range(x.shape[1])]
        targets += [entry / gp.scale for entry in gradient]

    def covariance(p: Tensor, i: int | None, q: Tensor, j: int | None) -> float:
        u = (p - q) / lengths**2
        k = size * torch.exp(-((p - q) / lengths).square().sum() / 2)
        if i is None:
            return (k if j is None else k * u[j]).item()
        if j is None:
            return (-k * u[i]).item()
        return (k * (float(i == j) / lengths[i] ** 2 - u[i] * u[j])).item()

    matrix = torch.tensor([[covariance(*a, *b) for b in observed] for a in observed], dtype=torch.double)
    matrix += torch.diag(noise)
    across = torch.tensor([covariance(at, None, *b) for b in observed], dtype=torch.double)
    solved = torch.linalg.solve(matrix, across)
    mean = model.mean_constant + solved @ torch.stack([torch.as_tensor(t) for t in targets])
    variance = size - solved @ across
    return gp.shift + gp.scale * mean.item(), gp.scale * math.sqrt(max(0.0, variance.item()))


@pytest.mark.parametrize("which", [(), (0,), (1, 4), (4, 1), range(7)])
def test_the_posterior_against_dense_algebra(which: tuple[int, ...]):
    x, at = sobol_points(2, 7, 1), vector(0.37, 0.61)
    gp = fitted(2, 7, which)
    gradients = wave_gradients(x)
    mean, deviation = dense_posterior(gp, x, wave(x), {i: gradients[i] for i in which}, at)
    # two ways to solve a system whose condition number is some 1e8
    assert gp.mean(at).item() == pytest.approx(mean, abs=1e-7)
    assert gp.deviation(at).item() == pytest.approx(deviation, abs=1e-6)


def test_all_rows_count_even_if_few_were_fitted():
    x, at = sobol_points(2, 9, 1), vector(0.37, 0.61)
    gradients = wave_gradients(x)
    gp = fit(x, wave(x), dict(enumerate(gradients)), max_rows=10)
    assert len(gp.model.train_inputs[0]) == 27
    mean, deviation = dense_posterior(gp, x, wave(x), dict(enumerate(gradients)), at)
    assert gp.mean(at).item() == pytest.approx(mean, abs=1e-7)
    assert gp.deviation(at).item() == pytest.approx(deviation, abs=1e-6)


def test_values_and_derivatives_have_noise_of_their_own():
    gp, x = fitted(2, 7, range(7)), vector(0.1, 0.2)
    noise = gp.model.likelihood.noise_covar
    found = noise(torch.cat([value_rows(x.unsqueeze(0)), derivative_rows(x)])).diagonal(dim1=-1, dim2=-2)
    value, derivative = noise.variance("value").item(), noise.variance("derivative").item()
    # and a nugget, of at most 1e-8 of the prior's variance, here about 20
    assert found.tolist() == pytest.approx([value, derivative, derivative], abs=1e-6)
    assert derivative > 1e-5 > value


def test_the_mean_is_differentiable():
    gp, at = fitted(2, 7, range(7)), vector(0.37, 0.61).requires_grad_(True)
    (gradient,) = torch.autograd.grad(gp.mean(at), at)
    for j, step in enumerate(1e-5 * torch.eye(2, dtype=torch.double)):
        difference = (gp.mean(at.detach() + step) - gp.mean(at.detach() - step)) / 2e-5
        assert gradient[j].item() == pytest.approx(difference.item(), abs=1e-5)  # rounding 1e-10 over 1e-5


def test_values_alone_are_interpolated():
    x = sobol_points(2, 12, 1)
    gp = fitted(2, 12)
    for p, value in zip(x, wave(x), strict=True):
        # the function is smooth: the fitted noise is some 1e-6 of the variance, its deviation 1e-3
        assert gp.mean(p).item() == pytest.approx(value.item(), abs=1e-3)
        assert gp.deviation(p).item() < 5e-3


def test_gradients_are_interpolated_too():
    x = sobol_points(2, 7, 1)
    gp = fitted(2, 7, range(7))
    for p, expected in zip(x, wave_gradients(x), strict=True):
        tracked = p.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(gp.mean(tracked), tracked)
        assert gradient.tolist() == pytest.approx(
            expected.tolist(), abs=0.02
        )  # gradients are up to 4, their noise is 1e-5


@pytest.mark.parametrize(("d", "count"), [(1, 4), (2, 6), (3, 8)])
def test_gradients_reduce_the_error(d: int, count: int):
    points = sobol_points(d, 50, 9)
    errors = []
    for which in (range(0), range(count)):
        gp = fitted(d, count, which)
        found = torch.stack([gp.mean(p) for p in points])
        errors.append((found - wave(points)).square().mean().sqrt().item())
    assert errors[1] < 0.5 * errors[0]


def test_shift_and_scale_of_the_values_do_not_matter():
    x, at = sobol_points(2, 7, 1), vector(0.37, 0.61)
    gradients = wave_gradients(x)
    plain = fit(x, wave(x), dict(enumerate(gradients)))
    scaled = fit(x, 1e4 * wave(x) - 3e5, dict(enumerate(1e4 * gradients)))
    # standardised, both are the same up to rounding, which the fit may amplify
    assert scaled.mean(at).item() == pytest.approx(1e4 * plain.mean(at).item() - 3e5, abs=1e4 * 1e-4)
    assert scaled.deviation(at).item() == pytest.approx(1e4 * plain.deviation(at).item(), rel=1e-2)


def test_equal_data_give_equal_models():
    torch.manual_seed(0)
    first = fitted(2, 7, range(7))
    torch.manual_seed(1)
    second = fitted(2, 7, range(7))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert first.mean(vector(0.1, 0.2)).item() == second.mean(vector(0.1, 0.2)).item()


@pytest.mark.parametrize(
    ("d", "count", "factor"), [(1, 8, -1.0), (1, 8, 0.8), (2, 12, 0.5), (2, 12, 0.8), (2, 25, -1.0)]
)
def test_where_derivatives_contradict_the_values_their_noise_grows(d: int, count: int, factor: float):
    true, false, none = (fitted(d, count, range(n), f) for n, f in ((count, 1.0), (count, factor), (0, 1.0)))
    noise = [gp.model.likelihood.noise_covar.variance("derivative").item() for gp in (true, false)]
    assert noise[0] < 1e-4 and noise[1] > 0.1  # a factor of 0.8 is an error of 0.5 in derivatives of up to 2.5
    errors = []
    for gp in (false, none):
        found = torch.stack([gp.mean(p) for p in sobol_points(d, 20, 9)])
        errors.append((found - wave(sobol_points(d, 20, 9))).square().mean().sqrt().item())
    assert errors[0] < 2 * errors[1]  # the model listens to the values: it is no worse than without derivatives


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0]])
def test_values_without_spread_make_no_division_by_zero(values: list[float]):
    x = sobol_points(2, len(values), 1)
    gp = fit(x, vector(*values), {})
    assert gp.mean(x[0]).item() == pytest.approx(2.0, abs=1e-6)
    assert math.isfinite(gp.deviation(vector(0.5, 0.5)).item())


def one_hot_distances(x: Tensor, lengths: Tensor, categories: int) -> Tensor:
    """Squared scaled distances where the last coordinate is one of some choices, by a one-hot code; (n, n)."""
    code = torch.nn.functional.one_hot((x[:, -1] * (categories - 1)).round().long(), categories) / math.sqrt(2)
    features = torch.cat([x[:, :-1] / lengths[:-1], code / lengths[-1]], 1)
    return torch.cdist(features, features).square()


def test_choices_are_as_far_apart_as_in_a_one_hot_code() -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.double)
    made = DerivativeRBFKernel(3, categorical=(2,)).double()
    made.lengthscale = lengths[None]
    x = sobol_points(3, 9, 2)
    x[:, 2] = (x[:, 2] * 3).floor() / 2
    found = made.forward(value_rows(x), value_rows(x))
    torch.testing.assert_close(found, torch.exp(-0.5 * one_hot_distances(x, lengths, 3)))
    torch.testing.assert_close(made.of_values(x, x), found)


def test_derivatives_beside_choices_are_those_of_the_kernel() -> None:
    made = DerivativeRBFKernel(3, categorical=(1,)).double()
    made.lengthscale = torch.tensor([LENGTHS], dtype=torch.double)
    one, other = vector(0.3, 0.0, 0.8), vector(0.5, 1.0, 0.4)
    tracked = one.clone().requires_grad_(True)
    value = made.forward(value_rows(tracked[None]), value_rows(other[None]))[0, 0]
    (expected,) = torch.autograd.grad(value, tracked)
    known = vector(1.0, math.nan, 1.0)
    found = made.forward(derivative_rows(one, known), value_rows(other[None]))[:, 0]
    torch.testing.assert_close(found, expected[[0, 2]])
    assert expected[1] == 0


def test_unknown_derivatives_are_left_out() -> None:
    x = sobol_points(3, 8, 4)
    gradients = wave_gradients(x)
    partial = gradients.clone()
    partial[:, 1] = math.nan
    values = wave(x)
    found = fit(x, values, {i: partial[i] for i in range(8)})
    assert len(found.model.train_inputs[0]) == 8 + 16
    none = fit(x, values, {i: torch.full_like(gradients[i], math.nan) for i in range(8)})
    bare = fit(x, values, {})
    assert none.mean(x[0] * 0.9).item() == bare.mean(x[0] * 0.9).item()
    there = sobol_points(3, 32, 9)
    error = lambda model: math.sqrt(sum((model.mean(p) - wave(p[None])[0]).square().item() for p in there))  # noqa: E731
    assert error(found) < 0.7 * error(bare)


def test_a_choice_is_learned_from_values() -> None:
    x = sobol_points(2, 18, 5)
    x[:, 1] = (x[:, 1] * 3).floor() / 2
    offset = torch.tensor([0.0, 2.0, -1.0], dtype=torch.double)

    def f(p: Tensor) -> Tensor:
        return torch.sin(3 * p[:, 0]) + offset[(p[:, 1] * 2).round().long()]

    model = fit(x, f(x), {}, categorical=(1,))
    for choice in (0.0, 0.5, 1.0):
        p = vector(0.37, choice)
        assert model.mean(p).item() == pytest.approx(f(p[None]).item(), abs=0.1)


def test_errors_of_gradients_are_relative():
    gradients = {0: vector(3.0, 4.0), 1: vector(0.0, 0.0), 2: vector(30.0, math.nan)}
    found = relative(gradients)
    assert found == {0: pytest.approx(2**-0.5), 1: 1.0, 2: pytest.approx(37**-0.5)}
    x = vector(0.1, 0.2, 0.5, 0.6, 0.9, 0.7).reshape(3, 2)
    model = fit(x, vector(1.0, 2.0, 4.0), gradients).model
    (rows,), targets = model.train_inputs, model.train_targets
    assert rows[3:, 3:].amax(1).tolist() == pytest.approx([2**-0.5] * 2 + [1.0] * 2 + [37**-0.5])
    assert (targets[3:] / rows[3:, 3:].amax(1) * vector(1.0, 2.0, 4.0).std()).tolist() == pytest.approx(
        [3, 4, 0, 0, 30]
    )
