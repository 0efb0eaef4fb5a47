"""The search of quickstart.py on a cluster: a storage that every node reaches, lost nodes, resuming.

    ray job submit --working-dir examples -- python cluster.py s3://bucket/runs/one

The same line goes on with a run that was stopped, for instance with the driver's machine. Without a cluster, and with a
folder in the place of the URI, it runs on this machine: python examples/cluster.py FOLDER
"""

import sys

import ray
from quickstart import Tumours
from ray import tune

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel.storage import check_access, locate
from raybilevel.tune import ResumableGenerator, prepare_resume

RESOURCES = {"cpu": 1}  # of a training; on GPUs {"cpu": 4, "gpu": 1}, and problem.device = "cuda"


def main(uri, trainings=15):
    problem, storage = Tumours(), locate(uri)
    check_access(storage)  # an error names the nodes that cannot use it
    prepare_resume(storage.filesystem, f"{storage.path}/run")  # where a driver died while it wrote
    search = BilevelSearch(
        problem, metric="upper_loss", mode="min", lower_resources=RESOURCES, storage_filesystem=storage.filesystem
    )
    return tune.run(
        tune.with_resources(lower_level_trainable(problem), RESOURCES),
        config={"weight_decay": {"first": tune.loguniform(1e-5, 1e0), "last": tune.loguniform(1e-5, 1e0)}},
        search_alg=ResumableGenerator(search),
        metric="upper_loss",
        mode="min",
        num_samples=trainings,
        name="run",
        storage_path=storage.path,
        storage_filesystem=storage.filesystem,
        resume="AUTO",  # begins where there is nothing to go on with
        max_failures=3,  # of a training, its node's loss for instance
        verbose=0,
    ).best_trial


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python cluster.py FOLDER_OR_URI")
    ray.init()  # the cluster that a job runs on, else this machine
    best = main(sys.argv[1])
    print("best hyperparameters:", best.config)
    print(f"validation loss {best.last_result['upper_loss']:.4f}, test loss {best.last_result['test_loss']:.4f}")
