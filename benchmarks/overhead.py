"""What a search costs its driver, and how busy it keeps many slots, on a real Ray of simulated nodes."""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.cluster_utils import Cluster
from ray.tune.search.basic_variant import BasicVariantGenerator

from benchmarks.made_up import Answers, Quadratic, space
from raybilevel._cluster import step_dispatch
from raybilevel._cluster.environment import environment, waiting_trials
from raybilevel._command.cluster import cluster
from raybilevel.methods._base import LoadCheckpoint, UpperResult, UpperStep
from raybilevel.methods._default import Default
from raybilevel.problem import BilevelProblem
from raybilevel.space import Space
from raybilevel.tune._scheduler import WORKER_START_S, PatientFIFO
from raybilevel.tune._searcher import BilevelSearch

SLOTS_OF_A_NODE = 64
BYTES_OF_A_STORE = 100_000_000
PATIENCE_FOR_PROCESSES = 900
MANY_SLOTS = 256
"""From which on slots are to be busy; on a few, trainings here are too short for that."""
SEARCHES = ("random", "raybilevel", "raybilevel", "random")


@dataclass(frozen=True)
class AtOnce(Default):
    """Upper-level steps with made-up answers: for the driver they are as real ones."""

    def run(
        self,
        problem: BilevelProblem,
        space: Space,
        constants: Mapping[str, Any],
        step: UpperStep,
        load: LoadCheckpoint,
        memory: bytes | None = None,
    ) -> UpperResult:
        return Answers(space.dimension, step.number).step(step)


def sleeping(seconds: float, count: int, processes: Path) -> Callable[[dict[str, Any]], None]:
    """A trainable that only sleeps, for so long on average (lognormal, sigma 0.3), and reports made-up results; its
    process imports neither torch nor raybilevel.

    The first trials begin when there are `count` processes, which leave their numbers in a folder: machines that hold
    so many have the cores to start them together, this one may take minutes.
    """
    made_up = Answers().training()

    def train(config: dict[str, Any]) -> None:  # pickled by value, as it is no name of a module
        (processes / str(os.getpid())).touch()
        while len(os.listdir(processes)) < count:
            time.sleep(1.0)
        # Wall time, since these are compared between processes.
        began = time.time()
        # The same config sleeps as long in every search.
        chance = random.Random(repr(sorted(config.items())))
        # The mean of this lognormal is exp(-0.045 + 0.3^2 / 2) = 1.
        time.sleep(seconds * math.exp(chance.gauss(-0.045, 0.3)))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "lower_level.pt").touch()
            checkpoint = tune.Checkpoint.from_directory(folder)
            path = tune.get_context().get_storage().trial_fs_path
            upper = sum((value - 0.3) ** 2 for value in config.values())
            changed = {"upper_loss": upper, "trial_path": path, "began": began, "ended": time.time()}
            tune.report({**made_up, **changed}, checkpoint=checkpoint)

    return train


@contextmanager
def simulated_nodes(slots: int) -> Iterator[None]:
    """Ray nodes on this machine, with so many CPUs in all in Ray's books, beside a head that has none.

    Ray starts a process for each of them as soon as it is joined, here far more than there are cores, and is told to be
    patient with them.
    """
    with ExitStack() as stack:
        stack.enter_context(environment("RAY_worker_register_timeout_seconds", str(PATIENCE_FOR_PROCESSES)))
        # Full nodes, and one with the rest.
        sizes = [min(SLOTS_OF_A_NODE, slots - first) for first in range(0, slots, SLOTS_OF_A_NODE)]
        store = {"object_store_memory": BYTES_OF_A_STORE}
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
        stack.callback(nodes.shutdown)
        for size in sizes:
            nodes.add_node(num_cpus=size, **store)
        stack.enter_context(cluster(nodes.address))
        yield


def met(what: str, value: float, most: float) -> bool:
    """Print a bar, and say whether a figure keeps it."""
    print(f"  bar: {what} {value:.3g}, {most:g} at most: {'met' if value <= most else 'MISSED'}", flush=True)
    return value <= most


@dataclass(frozen=True)
class Driven:
    """An experiment.

    seconds:  the driver's processor time.
    idle:     share of slots x time, in percent; see `busy_share`.
    suggests: how long each `suggest` of ours took, in ms: of the driver's thread, and by the clock.
    """

    seconds: float
    idle: float
    suggests: Sequence[tuple[float, float]] = ()


class TimedSearch(BilevelSearch):
    """Notes how long its `suggest` takes."""

    def __init__(self, problem: BilevelProblem, **options: Any) -> None:
        super().__init__(problem, **options)
        self.times: list[tuple[float, float]] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        worked, began = time.thread_time(), time.monotonic()
        answer = super().suggest(trial_id)
        self.times.append((1e3 * (time.thread_time() - worked), 1e3 * (time.monotonic() - began)))
        return answer


def overhead(trials: int, counts: Sequence[int], seconds: float, order: Sequence[str] = SEARCHES) -> bool:
    """Whether all bars are kept. order: of the searches; each may come twice, as the machine's speed drifts."""
    print(
        f"{trials} trials; each sleeps for {seconds} s times the slots, on average, so that together they end one in "
        f"{seconds} s. Efficiency is sleeping / (slots x time), in all, from the moment when each slot has a process, "
        "and between: from the moment when as many have ended as there are slots until the last one begins"
    )
    kept = True
    for count in counts:
        found: dict[str, list[Driven]] = {name: [] for name in order}
        with simulated_nodes(count):
            for name in order:
                found[name].append(driven(name, trials, count, seconds * count))
        used = {name: statistics.mean(one.seconds for one in runs) for name, runs in found.items()}
        ours = found["raybilevel"]
        kept &= met(f"{count} slots, driver's time in that of random search", used["raybilevel"] / used["random"], 1.2)
        if count >= MANY_SLOTS:
            kept &= met(f"{count} slots, idle in %", statistics.mean(one.idle for one in ours), 10)
        for clock, name in enumerate(("processor time of its thread", "by the clock, waiting for steps included")):
            centiles = statistics.quantiles([times[clock] for one in ours for times in one.suggests], n=100)
            print(f"  suggest, {name}: median {centiles[49]:.2f} ms, 99th percentile {centiles[98]:.2f} ms", flush=True)
    return kept


def driven(name: str, trials: int, count: int, seconds: float) -> Driven:
    """An experiment of so many trials on so many slots."""
    aim: dict[str, Any] = {"metric": "upper_loss", "mode": "min"}
    # A search starts a process for steps beside the first trainings, which here begin minutes later.
    step_dispatch.WORKER_IDLE_TIMEOUT_S = PATIENCE_FOR_PROCESSES
    ours = name == "raybilevel"
    search: Any = (
        TimedSearch(Quadratic(), max_concurrent=count, method=AtOnce(), **aim)
        if ours
        else BasicVariantGenerator(max_concurrent=count)
    )
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as processes, waiting_trials(count):
        used = time.process_time()
        trainable = tune.with_resources(sleeping(seconds, count, Path(processes)), {"cpu": 1})
        analysis = tune.run(
            # `aim` has metric and mode, which our search knows already.
            trainable, config=space(), search_alg=search, num_samples=trials, reuse_actors=True, storage_path=folder,
            verbose=0, **({"scheduler": PatientFIFO(idle_timeout_s=WORKER_START_S)} if ours else aim),
        )  # fmt: skip
        used = time.process_time() - used
        started = len(os.listdir(processes))
    times = [(trial.last_result["began"], trial.last_result["ended"]) for trial in analysis.trials]
    wall = max(ended for _, ended in times) - min(began for began, _ in times)
    slept = sum(ended - began for began, ended in times)
    between = 100 * busy_share(times, count)
    print(
        f"  {count:3d} slots, {name:10}: driver {1e3 * used / trials:6.1f} ms a trial; {wall:6.1f} s, "
        f"efficiency {100 * slept / (count * wall):5.1f} % in all, between {between:5.1f} %; {started} processes",
        flush=True,
    )
    return Driven(used, 100 - between, search.times if ours else ())


def busy_share(times: Sequence[tuple[float, float]], count: int) -> float:
    """The share of slots x time in which they sleep, from the moment when as many trials have ended as there are slots
    until the last trial begins; nan where there is no such time.

    times: when each trial began and ended.
    """
    if len(times) < count:
        return math.nan
    # When as many have ended as there are slots, and when the last one begins.
    first, last = sorted(ended for _, ended in times)[count - 1], max(began for began, _ in times)
    if first >= last:
        return math.nan
    busy = sum(max(0.0, min(ended, last) - max(began, first)) for began, ended in times)
    return busy / (count * (last - first))
