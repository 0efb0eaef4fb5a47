"""TF32 and its like are off where gradients are subtracted."""

from __future__ import annotations

import pytest
import torch

from raybilevel._lower.precision import Narrowest, full_precision


@pytest.fixture
def coarse() -> object:
    """Settings of torch that let float32 be multiplied in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("coarse")
def test_float32_is_multiplied_as_float32() -> None:
    def all_of_them() -> list[str]:
        return [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]

    before = all_of_them()
    assert before[0] == "tf32"
    with full_precision():
        assert all_of_them() == ["ieee", "ieee"]
    assert all_of_them() == before


@pytest.mark.usefixtures("coarse")
def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ArithmeticError), full_precision():
        raise ArithmeticError
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_the_coarsest_type_that_is_computed_in_is_seen() -> None:
    layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    with Narrowest(torch.float32) as plain:
        layer(x).sum().backward()
    with Narrowest(torch.float32) as mixed, torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum()
    with Narrowest(torch.double) as wider:
        layer(x).double().sum()
    assert (plain.dtype, mixed.dtype, wider.dtype) == (torch.float32, torch.bfloat16, torch.float32)
