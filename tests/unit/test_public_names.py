from __future__ import annotations

import subprocess
import sys

import pytest

import raybilevel


def test_the_public_names_are_what_can_be_imported() -> None:
    names = {
        "BilevelProblem",
        "BilevelSearch",
        "LargeUpperLevel",
        "__version__",
        "data_parallel_trainable",
        "hypergradient_trainable",
        "lower_level_trainable",
    }
    assert set(raybilevel.__all__) == set(dir(raybilevel)) == names
    assert all(getattr(raybilevel, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'BilevelSearcher'"):
        raybilevel.BilevelSearcher  # noqa: B018


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("raybilevel, raybilevel.cli", "torch, ray"),  # a usage error is said at once
        (
            "raybilevel.search, raybilevel.methods, raybilevel.problems",
            "ray",
        ),  # the core
        ("raybilevel.tune._trainable", "gpytorch, botorch"),  # a worker that only trains
    ],
)
def test_modules_import_no_more_than_they_need(modules: str, absent: str) -> None:
    code = f"import sys, {modules}\nassert not set({absent.split(', ')!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
