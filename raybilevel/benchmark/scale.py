"""What a search costs its driver, and how many slots it keeps busy: make bench-scale.

    python -m raybilevel.benchmark.scale latency|memory|slots|overhead|sharing|sharded|all [--trials N] [--slots 1,2,4]

latency:  of `suggest` and `on_trial_complete` with 1,000 observations in 20 dimensions, the searcher alone.
memory:   of the searcher at 10,000 observations.
slots:    idle slots at up to 256 slots, in simulated time: the real search, trainings and steps that only take time.
overhead: the driver's processor time per trial and the efficiency on a real local Ray, against random search there,
          each twice; trainings only sleep, upper-level steps answer at once.
sharing:  seconds a trial with a problem of 40 MB, against one of none.
sharded:  several searches with a part of the space each against one, at the same number of slots, in simulated time.
"""

from __future__ import annotations

import argparse
import heapq
import math
import pickle
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import cloudpickle
from torch import Tensor, nn

from raybilevel import BilevelProblem, BilevelSearch, lower_level_trainable
from raybilevel.benchmark.sharded import sharded
from raybilevel.environment import waiting_trials
from raybilevel.experiment import cluster
from raybilevel.methods.base import LoadCheckpoint, UpperResult, UpperStep
from raybilevel.methods.default import Default
from raybilevel.optimizer import BilevelOptimizer
from raybilevel.problem import Hyperparameters, Level
from raybilevel.search_state import Proposal, SearchState, StepRecord, Training
from raybilevel.sent_state import SentState
from raybilevel.space import Space
from raybilevel.step_dispatch import StepCall

DIMENSION = 20


class Quadratic(BilevelProblem):
    """f = |y - x|^2 / 2, solved by one step; `megabytes` of data travel along."""

    epochs = 1
    dtype = torch.double

    def __init__(self, dimension: int = DIMENSION, megabytes: float = 0.0) -> None:
        self.dimension = dimension
        self.data = [torch.zeros(1000, dtype=torch.double) for _ in range(int(megabytes * 125))]

    def model(self) -> nn.Module:
        return nn.Linear(self.dimension, 1, bias=False)

    def lower_loss(self, model: nn.Module, hyperparameters: Hyperparameters, batch: Any) -> Tensor:
        x = torch.stack([hyperparameters[f"x{i}"] for i in range(self.dimension)])
        return (model.get_parameter("weight")[0] - x).square().sum() / 2

    def upper_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model.get_parameter("weight") - 0.3).square().sum()

    def batches(self, level: Level, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield torch.zeros(1, dtype=torch.double)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)


def space(dimension: int = DIMENSION) -> dict[str, Any]:
    from ray import tune

    return {f"x{i}": tune.uniform(-1.0, 1.0) for i in range(dimension)}


class Answers:
    """Made-up results of trainings and steps: what they hold costs the driver the same as real ones."""

    def __init__(self, dimension: int = DIMENSION, seed: int = 0) -> None:
        self.dimension, self.random = dimension, random.Random(seed)

    def point(self) -> tuple[float, ...]:
        return tuple(self.random.random() for _ in range(self.dimension))

    def training(self) -> dict[str, Any]:
        return {
            "upper_loss": self.random.random(),
            "lower_loss": self.random.random(),
            "lower_passes": 3.0,
            "lower_level_finished": True,
            "trial_path": "/storage/experiment/trial",
            "checkpoint_dir_name": "checkpoint_000000",
            **{f"lower_gradient/x{i}": value for i, value in enumerate(self.point())},
        }

    def history(self, count: int) -> SearchState:
        """A search that has run: regions of ten trainings each, a step before every training."""
        trainings = []
        for index in range(count):
            region = index - index % 10 if index % 10 else None
            proposal = Proposal(self.point(), "region", region, 0.5, 0.5, 0.1)
            value, upper = self.random.random(), self.random.random()
            found = Training(index, proposal, "done", index, value, upper, self.point(), 3.0, self.point())
            trainings.append(found)
        steps = [
            StepRecord(index, index, 1.0, multiplier=1.0, violation=0.0, decrease=0.05, first=10.0, finished=index)
            for index in range(count)
        ]
        return SearchState(tuple(trainings), tuple(steps))

    def step(self, step: UpperStep) -> UpperResult:
        proposal = Proposal(self.point(), step.origin, step.region, 0.5, 0.5, 0.1)
        record = StepRecord(step.number, step.centre, 1.0, multiplier=1.0, decrease=0.05, first=10.0)
        return UpperResult(record, proposal, {index: self.point() for index in step.targets})


def drive(observations: int, watch: Callable[[str, float], None] | None = None, slots: int = 16) -> BilevelSearch:
    """A search that reaches so many observations, the last hundred now; `watch` hears how long each call took."""
    search = BilevelSearch(
        Quadratic(), space=space(), metric="upper_loss", mode="min", max_concurrent=slots, upper_resources={"cpu": 0}
    )
    optimizer, answers = search._ready(), Answers()
    optimizer.queue.clear()
    optimizer.state = answers.history(max(0, observations - 100))
    number = len(optimizer.state.trainings)
    optimizer.trials = {str(index): index for index in range(number)}
    search._checkpoints = {index: f"/storage/experiment/trial_{index}/checkpoint_000000" for index in range(number)}
    busy: list[str] = []
    sent = SentState(cloudpickle.dumps)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begun = time.process_time()
        answer = call()
        if watch is not None:
            watch(name, time.process_time() - begun)
        return answer

    def suggest() -> tuple[Any, UpperStep | None]:
        """What `BilevelSearch.suggest` does in the driver, where a step is pickled and goes to the cluster."""
        config = optimizer.ask(str(number))
        step = optimizer.plan() if config is None else None
        if step is not None:
            newest, _ = sent.parts(step.state)
            pickle.dumps(StepCall(replace(step, state=newest), {}, None, None), pickle.HIGHEST_PROTOCOL)
        return config, step

    while len(optimizer.state.told) < observations:
        config, step = timed("suggest", suggest)
        if config is not None:
            busy.append(str(number))
            number += 1
        elif step is not None:
            timed("step's result", partial(optimizer.tell_step, step.number, answers.step(step)))
        else:
            timed("on_trial_complete", partial(search._tell, busy.pop(0), answers.training()))
    return search


def latency(observations: int = 1000) -> None:
    times: dict[str, list[float]] = {}
    search = drive(observations, lambda name, seconds: times.setdefault(name, []).append(seconds))
    print(f"{observations} observations, {DIMENSION} dimensions, processor time of the driver:")
    for name, values in times.items():
        ordered = sorted(values)
        median, tail = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
        print(
            f"  {name:18} median {1e3 * median:6.2f} ms   99th percentile {1e3 * tail:6.2f} ms   ({len(values)} calls)"
        )
    whole = sum(map(sum, times.values())) / len(times["on_trial_complete"])
    print(f"  a training         {1e3 * whole:.1f} ms in all, on average")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        begun = time.process_time()
        search.save(str(path))
        print(f"  save               {1e3 * (time.process_time() - begun):.0f} ms, {path.stat().st_size / 1e6:.2f} MB")


def memory(observations: int = 10_000) -> None:
    before = peak()
    search = drive(observations)
    assert len(search.state.done) == observations
    with tempfile.TemporaryDirectory() as folder:
        search.save(str(Path(folder, "state")))
    print(f"{len(search.state.done)} observations, saved once: {peak() - before:.0f} MB more than before the search")


def peak() -> float:
    """The process's largest resident memory so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e6 if sys.platform == "darwin" else 1024)


def slots(counts: list[int], share: float = 0.2, trainings_a_slot: int = 6) -> None:
    """Idle slots, in simulated time: trainings take about 1 (lognormal, sigma 0.3), steps `share` of that."""
    print(f"simulated time; a training takes 1 on average, a step {share}:")
    for count in counts:
        idle, training = simulate(count, share, trainings_a_slot * count)
        print(f"  {count:4d} slots: idle {100 * idle:5.2f} %, training {100 * training:5.1f} %, steps the rest")


def simulate(count: int, share: float, trainings: int) -> tuple[float, float]:
    """The shares of slots x time that were idle and that trained, once the start design had been asked."""
    from raybilevel.domains import split_param_space
    from raybilevel.optimizer import Observation

    box, _ = split_param_space(space())
    optimizer, answers, chance = BilevelOptimizer(box, Default(), 0, count), Answers(), random.Random(1)
    events: list[tuple[float, int, str, Any]] = []
    now, asked, idle, busy, begun, order = 0.0, 0, 0.0, 0.0, math.inf, 0
    running = {"training": 0, "step": 0}
    while asked < trainings or events:
        while asked < trainings and running["training"] + running["step"] < count:
            trial = str(asked)
            kind: str
            what: Any
            if optimizer.ask(trial) is not None:
                asked += 1
                kind, what, seconds = "training", trial, math.exp(chance.gauss(-0.045, 0.3))
            elif (step := optimizer.plan()) is not None:
                kind, what, seconds = "step", step, share
            else:
                break
            running[kind] += 1
            order += 1
            heapq.heappush(events, (now + seconds, order, kind, what))
        if begun == math.inf and asked >= max(count, 5):
            begun = now
        then, _, kind, what = heapq.heappop(events)
        if begun < math.inf and asked < trainings:
            idle += (then - now) * (count - running["training"] - running["step"])
            busy += (then - now) * running["training"]
        now = then
        running[kind] -= 1
        if kind == "step":
            optimizer.tell_step(what.number, answers.step(what))
        else:
            result = answers.training()
            gradient = tuple(result[f"lower_gradient/x{i}"] for i in range(DIMENSION))
            optimizer.tell(what, Observation(result["upper_loss"], result["lower_loss"], gradient, 3.0))
        if asked < trainings:
            end = now
    whole = count * (end - begun)
    return idle / whole, busy / whole


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


def sleeping(seconds: float) -> Callable[[dict[str, Any]], None]:
    """A trainable that only sleeps, and reports made-up results; its process imports neither torch nor raybilevel."""
    from ray import tune

    made_up = Answers().training()

    def train(config: dict[str, Any]) -> None:  # pickled by value, as it is no name of a module
        began = time.time()
        time.sleep(seconds)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "lower_level.pt").touch()
            checkpoint = tune.Checkpoint.from_directory(folder)
            path = tune.get_context().get_storage().trial_fs_path
            upper = sum((value - 0.3) ** 2 for value in config.values())
            changed = {"upper_loss": upper, "trial_path": path, "began": began, "ended": time.time()}
            tune.report({**made_up, **changed}, checkpoint=checkpoint)

    return train


def overhead(trials: int, counts: list[int], seconds: float) -> None:
    print(
        f"{trials} trials that sleep {seconds} s, on a local Ray; efficiency is sleeping / (slots x time), in all and "
        "between: from the moment when every slot has had a trial until the last one begins"
    )
    for count in counts:
        with cluster(None, cpus=count):
            used: dict[str, float] = {"random": 0.0, "raybilevel": 0.0}
            for name in ("random", "raybilevel", "raybilevel", "random"):  # the machine's speed may drift
                used[name] += driven(name, trials, count, seconds)
        print(
            f"  {count:3d} slots: the driver works {used['raybilevel'] / used['random']:.2f} times as long", flush=True
        )


def driven(name: str, trials: int, count: int, seconds: float) -> float:
    """The driver's processor time for an experiment of so many trials on so many slots."""
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    aim: dict[str, Any] = {"metric": "upper_loss", "mode": "min"}
    ours = name == "raybilevel"
    search: Any = (
        BilevelSearch(Quadratic(), max_concurrent=count, method=AtOnce(), **aim)
        if ours
        else BasicVariantGenerator(max_concurrent=count)
    )
    with tempfile.TemporaryDirectory() as folder:
        begun, used = time.monotonic(), time.process_time()
        with waiting_trials(count):
            analysis = tune.run(
                tune.with_resources(sleeping(seconds), {"cpu": 1}), config=space(), search_alg=search,
                num_samples=trials, reuse_actors=True, storage_path=folder, verbose=0, **({} if ours else aim),
            )  # fmt: skip
        wall, used = time.monotonic() - begun, time.process_time() - used
    times = [(trial.last_result["began"], trial.last_result["ended"]) for trial in analysis.trials]
    print(
        f"  {count:3d} slots, {name:10}: driver {1e3 * used / trials:6.1f} ms a trial; {wall:6.1f} s in all, "
        f"efficiency {100 * trials * seconds / (count * wall):5.1f} %, between {100 * busy_share(times, count):5.1f} %",
        flush=True,
    )
    return used


def busy_share(times: list[tuple[float, float]], count: int) -> float:
    """The share of slots x time in which they sleep, from the moment when all have had a trial until the last trial
    begins; nan where there is no such time.

    times: when each trial began and ended.
    """
    begins = sorted(began for began, _ in times)
    if len(begins) <= count:
        return math.nan
    first, last = begins[count - 1], begins[-1]
    busy = sum(max(0.0, min(ended, last) - max(began, first)) for began, ended in times)
    return busy / (count * (last - first))


def sharing(trials: int = 30, megabytes: float = 40.0) -> None:
    from ray import tune

    with cluster(None, cpus=1):
        for size in (0.0, megabytes):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                tune.run(
                    lower_level_trainable(Quadratic(1, megabytes=size)), config=space(1), num_samples=trials,
                    reuse_actors=True, storage_path=folder, verbose=0,
                )  # fmt: skip
                seconds = (time.monotonic() - begun) / trials
                print(f"  problem of {size:.0f} MB: {seconds:.3f} s a trial ({trials} trials)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench-scale", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("latency", "memory", "slots", "overhead", "sharing", "sharded", "all"))
    parser.add_argument("--trials", type=int, default=1000, help="of overhead")
    parser.add_argument("--seconds", type=float, default=0.1, help="a training of overhead sleeps")
    parser.add_argument("--slots", default="1,2,4", help="of overhead: each is a process")
    parser.add_argument("--simulated", default="1,4,16,64,256", help="slots of the simulation")
    given = parser.parse_args()
    counts = [int(count) for count in given.slots.split(",")]
    parts: dict[str, Callable[[], None]] = {
        "latency": latency,
        "memory": memory,
        "slots": lambda: slots([int(count) for count in given.simulated.split(",")]),
        "overhead": lambda: overhead(given.trials, counts, given.seconds),
        "sharing": sharing,
        "sharded": sharded,
    }
    for name, part in parts.items():
        if given.what in (name, "all"):
            print(f"{name}:")
            part()


if __name__ == "__main__":
    main()
