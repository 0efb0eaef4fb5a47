"""What a search costs its driver, and how many slots it keeps busy: make bench-scale.

    python -m benchmarks.scale steps|latency|memory|slots|overhead|sharing|sharded|all
        [--simulated 1,4,...] [--slots 1,2,...] [--trials N] [--seconds S] [--once]

steps:    processor time of an upper-level step, in searches of 8 and of 64 weight decays.
latency:  of `suggest` and `on_trial_complete` with 1,000 observations in 20 dimensions, the searcher alone.
memory:   of the searcher at 10,000 observations.
slots:    idle slots at up to 256 slots, in simulated time: the real search, trainings and steps that only take time.
overhead: the driver's processor time per trial and the efficiency on a real Ray of simulated nodes, against random
          search there; trainings only sleep, upper-level steps answer at once.
sharing:  seconds a trial with a problem of 40 MB, against one of none.
sharded:  several searches with a part of the space each against one, at the same number of slots, in simulated time.

Ends with status 1 if a figure misses its bar.
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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune

from benchmarks.made_up import DIMENSION, Answers, Quadratic, space
from benchmarks.overhead import SEARCHES, met, overhead
from benchmarks.sharded import sharded
from benchmarks.step_time import step_times
from raybilevel._cluster.sent_state import SentState
from raybilevel._cluster.step_call import StepCall
from raybilevel._command.cluster import cluster
from raybilevel.methods._base import UpperStep
from raybilevel.methods._default import Default
from raybilevel.search._optimizer import BilevelOptimizer, Observation
from raybilevel.tune._domains import split_param_space
from raybilevel.tune._searcher import BilevelSearch
from raybilevel.tune._trainable import lower_level_trainable

PARTS = ("steps", "latency", "memory", "slots", "overhead", "sharing", "sharded")


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
    search._checkpoints.paths = {
        index: f"/storage/experiment/trial_{index}/checkpoint_000000" for index in range(number)
    }
    busy: list[str] = []
    # Blocks are pickled, as `ray.put` would.
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


def steps() -> None:
    print("processor time of a step, hypergradients apart:")
    step_times()


def latency(observations: int = 1000) -> bool:
    times: dict[str, list[float]] = {}
    search = drive(observations, lambda name, seconds: times.setdefault(name, []).append(seconds))
    print(f"{observations} observations, {DIMENSION} dimensions, processor time of the driver:")
    kept = True
    for name, values in times.items():
        ordered = sorted(values)
        median, tail = statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]
        print(
            f"  {name:18} median {1e3 * median:6.2f} ms   99th percentile {1e3 * tail:6.2f} ms   ({len(values)} calls)"
        )
        if name == "suggest":
            kept = met("median in ms", 1e3 * median, 20) & met("99th percentile in ms", 1e3 * tail, 100)
    whole = sum(map(sum, times.values())) / len(times["on_trial_complete"])
    print(f"  a training         {1e3 * whole:.1f} ms in all, on average")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state")
        begun = time.process_time()
        search.save(str(path))
        print(f"  save               {1e3 * (time.process_time() - begun):.0f} ms, {path.stat().st_size / 1e6:.2f} MB")
    return kept


def memory(observations: int = 10_000) -> bool:
    before = peak()
    search = drive(observations)
    assert len(search.state.done) == observations
    with tempfile.TemporaryDirectory() as folder:
        search.save(str(Path(folder, "state")))
    more = peak() - before
    print(f"{len(search.state.done)} observations, saved once: {more:.0f} MB more than before the search")
    return met("MB", more, 300)


def peak() -> float:
    """The process's largest resident memory so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in bytes on macOS, and in kilobytes on Linux.
    return used / (1e6 if sys.platform == "darwin" else 1024)


def slots(counts: list[int], share: float = 0.2, trainings_a_slot: int = 6) -> bool:
    """Idle slots, in simulated time: trainings take about 1 (lognormal, sigma 0.3), steps `share` of that."""
    print(f"simulated time; a training takes 1 on average, a step {share}:")
    kept = True
    for count in counts:
        idle, training = simulate(count, share, trainings_a_slot * count)
        print(f"  {count:4d} slots: idle {100 * idle:5.2f} %, training {100 * training:5.1f} %, steps the rest")
        kept &= met("idle in %", 100 * idle, 10)
    return kept


def simulate(count: int, share: float, trainings: int) -> tuple[float, float]:
    """The shares of slots x time that were idle and that trained, once the start design had been asked."""
    box, _ = split_param_space(space())
    optimizer, answers, chance = BilevelOptimizer(box, Default(), 0, count), Answers(), random.Random(1)
    events: list[tuple[float, int, str, Any]] = []
    now, asked, idle, busy, begun, order = 0.0, 0, 0.0, 0.0, math.inf, 0
    running = {"training": 0, "step": 0}
    while asked < trainings or events:
        # Something for each free slot.
        while asked < trainings and running["training"] + running["step"] < count:
            trial = str(asked)
            kind: str
            what: Any
            if optimizer.ask(trial) is not None:
                asked += 1
                # A mean of exp(-0.045 + 0.3^2 / 2) = 1.
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
        # The next that ends.
        then, _, kind, what = heapq.heappop(events)
        # Not while the last trainings end: then slots are free for want of more.
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


def sharing(trials: int = 30, megabytes: float = 40.0) -> None:
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
    parser.add_argument("what", choices=(*PARTS, "all"))
    parser.add_argument("--trials", type=int, default=1000, help="of overhead")
    parser.add_argument("--seconds", type=float, default=0.1, help="for which a training of overhead sleeps, a slot")
    parser.add_argument("--slots", default="1,2,4", help="of overhead: each is a process of 100 MB")
    parser.add_argument("--once", action="store_true", help="each search of overhead, and not twice")
    parser.add_argument("--simulated", default="1,4,16,64,256", help="slots of the simulation")
    given = parser.parse_args()
    counts = [int(count) for count in given.slots.split(",")]
    parts: dict[str, Callable[[], bool | None]] = {
        "steps": steps,
        "latency": latency,
        "memory": memory,
        "slots": lambda: slots([int(count) for count in given.simulated.split(",")]),
        "overhead": lambda: overhead(given.trials, counts, given.seconds, SEARCHES[: 2 if given.once else 4]),
        "sharing": sharing,
        "sharded": sharded,
    }
    missed = []
    for name, part in parts.items():
        if given.what in (name, "all"):
            print(f"{name}:")
            if part() is False:
                missed.append(name)
    if missed:
        sys.exit(f"bars missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
