"""Settings of the whole suite."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

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
BESIDE = ("test_command_line.py", "test_examples.py", "test_step_dispatch.py", "test_tune_changes_on_ray.py")
"""Modules that start a Ray of their own, and may beside another one. They make both processes end together."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Most tests that start Ray run one after the other, in one process. The others are distributed by module."""
    from xdist.scheduler import LoadScopeScheduling

    class OneForRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = PurePosixPath(nodeid.split("::")[0])
            return str(module) if module.parent.name in WITHOUT_RAY or module.name in BESIDE else "ray"

    return OneForRay(config, log)
