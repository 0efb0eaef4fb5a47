"""Runs of a benchmark in processes of their own, whose records are resumed.

A module of its own: a worker cannot import what the `__main__` of a package defines.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.suite import Run, execute
from raybilevel._records import store as records
from raybilevel.errors import DataError


def run_all(runs: Sequence[Run], out: Path, workers: int, redo: Sequence[str] = ()) -> None:
    """Every run that has no good record yet; each record is written as soon as it is there."""
    missing = [run for run in runs if not settled(out / run.path, run.method_name in redo)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them have a record", flush=True)
    if not missing:
        return
    began = time.monotonic()
    # Before the workers start: each is one thread, and they are started afresh, not forked from a threaded process.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), context, end_with_parent) as pool:
        waiting = {pool.submit(execute, run): run for run in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            run, record = waiting[future], future.result()
            records.write(out / run.path, record)
            lowest = math.nan if record.lowest is None else record.lowest
            told = f"lowest F {lowest:.5g}" if record.status == "done" else f"FAILED: {record.error}"
            print(
                f"[{number}/{len(missing)}, {time.monotonic() - began:.0f} s] {run.problem_name} {run.method_name} "
                f"seed {run.seed}: {told} ({record.seconds:.0f} s)",
                flush=True,
            )


def end_with_parent() -> None:
    """End this worker when the process that started it has been killed, which it would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def settled(path: Path, redo: bool) -> bool:
    """Whether a run has a good record; what is half-written or failed is named and done again."""
    if not path.exists() or redo:
        return False
    try:
        record = records.read(path)
    except DataError as error:
        print(f"{error}; it is done again", flush=True)
        return False
    if record.status != "done":
        print(f"{path}: failed ({record.error}); it is done again", flush=True)
        return False
    return True
