"""A driver of its own, to be killed: killed_driver.py FOLDER SAMPLES."""

import os
import sys
import time

os.environ.update(RAY_AUTH_MODE="disabled", TUNE_GLOBAL_CHECKPOINT_S="0", OMP_NUM_THREADS="1")

import ray
from ray import tune

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._cluster.local_files import local_filesystem
from raybilevel.tune._snapshot import ResumableGenerator
from tests.tiny_problems import Parabola


class Slow(tune.Callback):
    def on_trial_complete(self, iteration, trials, trial, **info):
        time.sleep(0.3)  # time to be killed in


if __name__ == "__main__":
    folder, samples = sys.argv[1], int(sys.argv[2])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    problem = Parabola()
    search = BilevelSearch(problem, metric="upper_loss", mode="min", max_concurrent=1)
    tune.Tuner(
        lower_level_trainable(problem),
        param_space={"x": {"a": tune.loguniform(1e-4, 1e2)}},
        tune_config=tune.TuneConfig(
            search_alg=ResumableGenerator(search), metric="upper_loss", mode="min", num_samples=samples,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="run", storage_path=folder, storage_filesystem=local_filesystem(), verbose=0, callbacks=[Slow()]
        ),
    ).fit()  # fmt: skip
