"""How the tests of this folder run a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune

from raybilevel import BilevelSearch
from raybilevel._cluster.local_files import local_filesystem

SPACE = {"x": {"a": tune.loguniform(1e-4, 1e2)}}


def fit(trainable: Any, search: BilevelSearch, folder: Path, samples: int, **run: Any) -> tune.ResultGrid:
    """Idle processes are kept but where trials are tried again: Tune gives up those whose process died idle."""
    return tune.Tuner(
        trainable,
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            search_alg=search,
            metric="upper_loss",
            mode="min",
            num_samples=samples,
            reuse_actors="failure_config" not in run,
        ),
        run_config=tune.RunConfig(
            name="run", storage_path=str(folder / "runs"), storage_filesystem=local_filesystem(), verbose=0, **run
        ),
    ).fit()
