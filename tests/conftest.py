"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The problems are tiny: more threads cost more than they give, and one gives the same sums everywhere.
torch.set_num_threads(1)

# linear_operator builds sparse matrices, at which torch warns once a process unless told whether to check them: the
# first test to do so would fail, whichever it is.
torch.sparse.check_sparse_tensor_invariants.disable()

# No deadline: the machine is shared, so times say nothing. Derandomised: a run is repeatable.
settings.register_profile("raybilevel", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("raybilevel")

WITHOUT_RAY = ("unit", "property", "contract", "convergence")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray run one after the other, beside the others, which are distributed by module."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(item.path.stem if folder in WITHOUT_RAY else "ray"))
