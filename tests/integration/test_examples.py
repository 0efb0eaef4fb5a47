"""Every example runs as it stands, and does what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from raybilevel.tune._snapshot import read_trials

ROOT = Path(__file__).parents[2]
FAMILIES = {
    "architecture": r"trained anew: ([\d.]+)",
    "few_shot": r"test accuracy on new digits: ([\d.]+)\nfrom random weights: +([\d.]+)",
    "graph_structure": r"learned: ([\d.]+)",
    "image_regulariser": r"learned filters: ([\d.]+) dB",
    "treatment_effects": r"means: ([\d.]+)\n.*\n.* learned: ([\d.]+)",
}
"""What they print that can be judged."""
NEED_DATA = {"few_shot", "graph_structure", "image_regulariser"}
ELSEWHERE = {"cluster", "data_parallel", *FAMILIES}  # tests/cluster runs the second
NEEDS = {"from_lightning": "lightning", "from_net": "skorch", "from_trainer": "transformers"}
LONG = {"large_upper_level", "own_loop_problem", "own_loop_tune", *NEEDS}
"""`test_hypergradient_on_ray`, `test_own_loops_on_ray` and `test_adapters_on_ray` have shorter ones of their kind."""
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in ELSEWHERE)


def started(example: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / f"{example}.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(folder)},
    )  # fmt: skip


def printed(example: str, folder: Path, *arguments: str) -> str:
    with started(example, folder, *arguments) as process:
        try:
            out, err = process.communicate(timeout=400)
        finally:
            process.kill()
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize(
    "example", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in EXAMPLES]
)
def test_example(example: str, tmp_path: Path) -> None:
    if example in NEEDS:
        pytest.importorskip(NEEDS[example], reason=f"{NEEDS[example]} is not installed")
    losses = [
        float(number) for number in re.findall(r"(?:validation loss|best F) ([\d.]+)", printed(example, tmp_path))
    ]
    assert losses
    assert min(losses) < 0.15


@pytest.mark.slow
def test_the_example_for_a_cluster_goes_on_with_a_run_that_was_killed(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    with started("cluster", tmp_path, str(storage)) as process:
        deadline = time.monotonic() + 200
        while len(list(storage.glob("run/*/checkpoint_*"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    before = set(storage.glob("run/*/checkpoint_*"))
    assert 4 <= len(before) < 15
    found = re.search(r"validation loss ([\d.]+)", printed("cluster", tmp_path, str(storage)))
    assert found is not None
    assert float(found[1]) < 0.15
    trials = {record.trial: record for record in read_trials(storage / "run") or []}
    assert len(trials) == 15
    assert {record.status for record in trials.values()} == {"TERMINATED"}
    assert before <= set(storage.glob("run/*/checkpoint_*"))


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(FAMILIES))
def test_example_of_a_family(example: str, tmp_path: Path) -> None:
    data = os.environ.get("RAYBILEVEL_TEST_DATA")
    if example in NEED_DATA and not data:
        pytest.skip("RAYBILEVEL_TEST_DATA does not name a folder with the data sets")
    found = re.search(FAMILIES[example], printed(example, tmp_path, *([data] if data and example in NEED_DATA else [])))
    assert found is not None
    figures = [float(figure) for figure in found.groups()]
    if example == "treatment_effects":
        assert figures[1] < figures[0] / 3  # errors: of the difference of the means, and learned
    elif example == "image_regulariser":
        assert figures[0] > 15  # 11 dB with random filters
    elif example == "few_shot":
        assert figures[0] > figures[1] + 0.05
    else:
        assert figures[0] > 0.72  # the graph as it is left has 0.69; chance on digits is 0.1


@pytest.mark.slow
def test_the_tour_shows_a_gain_over_one_shared_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    # Outputs would be out of date with the next change of the search.
    assert not any(cell.get("outputs") for cell in notebook.cells)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Tune keeps trials
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", raising=False)  # the summary reads what trials reported
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    losses = {
        name: float(loss)
        for name, loss in re.findall(r"^(one shared weight|a weight for each person) +(\S+)", text, re.M)
    }
    assert losses["a weight for each person"] < 0.6 * losses["one shared weight"]
    assert re.search(r"Helped: yes.* over 1047 test examples, beyond two standard errors", text)


def test_the_example_in_the_readme_is_the_one_that_is_tested() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert f"```python\n{source}```" in readme
