"""An experiment whose driver is killed again and again at random moments, beside one that is left alone.

    python -m tests.cluster.killed_often FOLDER KILLS SAMPLES

Each life resumes the experiment in another way: `Tuner.restore`, `tune.run(resume="AUTO")`, or what `raybilevel run
--resume` does. Prints one line of JSON: how often it was killed, and whether both experiments observed the same.
Stopped by Ctrl-C or SIGTERM and called again with the same folder, it goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", OMP_NUM_THREADS="1", RAY_AIR_NEW_OUTPUT="0", RAY_USAGE_STATS_ENABLED="0")
os.environ.update(TUNE_GLOBAL_CHECKPOINT_S="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")

import ray
from ray import tune
from rich.console import Console

from raybilevel import BilevelSearch, lower_level_trainable
from raybilevel._cluster.local_files import local_filesystem
from raybilevel._command import experiment
from raybilevel._config.experiment import ExperimentConfig, resolved
from raybilevel._config.plan import resolve
from raybilevel._records.names import CONFIG_FILE, TUNE_FOLDER
from raybilevel.search import _state_file as state_file
from raybilevel.search_state import SearchState
from raybilevel.tune._domains import to_param_space
from raybilevel.tune._snapshot import ResumableGenerator, prepare_resume, read_trials

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""In a process of its own: this one is forked, so it must not hold connections."""
RESUMES = ("Tuner.restore", "tune.run", "--resume")


def config(samples: int) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "problem": "several_optima",
            "space": {"x0": {"uniform": [-1.0, 1.0]}, "x1": {"uniform": [-1.0, 1.0]}},
            "search": {"trainings": samples, "max_concurrent": 1},
        }
    )


def live(address: str, folder: Path, samples: int, how: str | None) -> None:
    """One driver's life, up to the end of the experiment if nobody kills it."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    settings = config(samples)
    plan, filesystem = resolve(settings), local_filesystem()
    run = folder / TUNE_FOLDER
    trainable = tune.with_resources(lower_level_trainable(plan.problem), {"cpu": 1})
    if how == "--resume":
        with open(os.devnull, "w") as nowhere:
            experiment.run(settings, folder, resume=True, console=Console(file=nowhere))
        return
    if how is not None:
        prepare_resume(filesystem, str(run))
    if how == "Tuner.restore":
        # No space, no searcher: all of it comes back from the storage.
        tune.Tuner.restore(str(run), trainable, storage_filesystem=filesystem).fit()
        return
    search = ResumableGenerator(BilevelSearch(plan.problem, metric="upper_loss", mode="min", max_concurrent=1))
    space = to_param_space(plan.space, plan.constants)
    if how == "tune.run":
        tune.run(
            trainable, config=space, search_alg=search, metric="upper_loss", mode="min", num_samples=samples,
            reuse_actors=True, name=TUNE_FOLDER, storage_path=str(folder), storage_filesystem=filesystem,
            resume="AUTO", verbose=0,
        )  # fmt: skip
        return
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(resolved(plan.config))
    tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search, metric="upper_loss", mode="min", num_samples=samples, reuse_actors=True
        ),
        run_config=tune.RunConfig(name=TUNE_FOLDER, storage_path=str(folder), storage_filesystem=filesystem, verbose=0),
    ).fit()


def fork(address: str, folder: Path, samples: int, how: str | None) -> int:
    """A driver in a process of its own; forked, so that it need not import everything again."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            live(address, folder, samples, how)
            status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(child: int, folder: Path, chance: random.Random) -> int | None:
    """None when it was killed at a random moment, after up to two new files; its exit status if it ended before."""
    before, wanted = progress(folder), chance.randrange(3)
    while progress(folder) - before < wanted:
        if (status := ended(child)) is not None:
            return status
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1.5))
    if (status := ended(child)) is not None:
        return status
    os.kill(child, signal.SIGKILL)
    wait(child)
    return None


def progress(folder: Path) -> int:
    """What a driver has written so far: trials and checkpoints."""
    return len(list((folder / TUNE_FOLDER).glob("lower_level_*"))) + len(
        list((folder / TUNE_FOLDER).glob("lower_level_*/checkpoint_*"))
    )


def observed(folder: Path) -> SearchState:
    newest = max((folder / TUNE_FOLDER).glob("searcher-state-*.pkl"))
    return state_file.read(newest).state


def values(state: SearchState) -> list[tuple[Any, ...]]:
    return [
        (t.status, t.finished, t.unit, t.upper_loss, t.lower_loss, t.lower_gradient, t.hypergradient)
        for t in state.trainings
    ]


def main(root: Path, kills: int, samples: int) -> dict[str, Any]:
    folder, ledger = root / "killed", root / "kills"
    ledger.touch()
    lives = ledger.read_text().splitlines()
    chance = random.Random(len(lives))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    command = [sys.executable, "-c", CLUSTER]
    cluster = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert cluster.stdin is not None and cluster.stdout is not None
    address = next(line for line in cluster.stdout if line.startswith("address")).split()[1]
    child = 0
    try:
        if not (root / "undisturbed is done").exists():
            shutil.rmtree(root / "undisturbed", ignore_errors=True)
            child = fork(address, root / "undisturbed", samples, None)
            assert wait(child) == 0, (root / "undisturbed.log").read_text()[-3000:]
            (root / "undisturbed is done").touch()
            child = 0
        status: int | None = None
        while status is None:
            begun = (folder / TUNE_FOLDER / "tuner.pkl").exists()
            how = RESUMES[len(lives) % len(RESUMES)] if begun else "begun"
            if not begun:
                shutil.rmtree(folder, ignore_errors=True)
            child = fork(address, folder, samples, None if how == "begun" else how)
            status = wait(child) if len(lives) == kills else killed(child, folder, chance)
            child = 0
            if status is None:
                lives.append(how)
                ledger.write_text("\n".join(lives))
                print(f"killed {len(lives)} times ({how}), {progress(folder)} files", file=sys.stderr, flush=True)
        assert status == 0, folder.with_suffix(".log").read_text()[-3000:]
    finally:
        if child:  # stopped in between
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        cluster.stdin.close()
        cluster.wait(60)
    one, other = observed(root / "undisturbed"), observed(folder)
    trials = read_trials(folder / TUNE_FOLDER) or []
    return {
        "killed": len(lives),
        "kills_by_how_it_had_gone_on": Counter(lives),
        "samples": samples,
        "trials": len(trials),
        "observed": len(other.done),
        "points_trained_twice": len(other.done) - len({t.unit for t in other.done}),
        "same_observations": sorted((t.unit, t.upper_loss) for t in one.done)
        == sorted((t.unit, t.upper_loss) for t in other.done),
        "same_search": repr(values(one)) == repr(values(other)) and len(one.steps) == len(other.steps),
        "log": str(folder.with_suffix(".log")),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
