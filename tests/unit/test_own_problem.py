"""Problems of the user's own, by the place of their class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import cloudpickle

from raybilevel._cluster.own_code import own_modules, send_along
from raybilevel._command.new import write_template
from raybilevel._compare.config import read_comparison
from raybilevel._config.experiment import read_config, resume_differences
from raybilevel._config.plan import resolve
from raybilevel._own_problem import problem_class
from raybilevel.cli import about_problem, check
from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problems import make_problem
from raybilevel.problems.ridge import Ridge

SMALL = """
import beside_{n}
from beside_{n} import half
from raybilevel.problems.ridge import Ridge


class Mine(Ridge):
    "Ridge of my own"

    def __init__(self, scale=1.0, groups=1):
        super().__init__(groups)
        self.scale = scale + 0 / scale

    def upper_loss(self, model, batch):
        return 2 * half(self.scale * super().upper_loss(model, batch)) * beside_{n}.ONE
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a problem, a module beside it and a config. What is imported is forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    number = tmp_path.name.replace("-", "_")
    (tmp_path / "problems").mkdir()
    (tmp_path / "problems" / "mine.py").write_text(SMALL.format(n=number))
    (tmp_path / "problems" / f"beside_{number}.py").write_text("ONE = 1.0\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "config.yaml").write_text(
        "problem: problems/mine.py:Mine\noptions: {scale: 3.0}\n"
        "space: {decay: {g0: {loguniform: [1e-4, 1.0]}}}\nsearch: {trainings: 3}\n"
    )
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_path_is_relative_to_the_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    plan = resolve(read_config(folder / "config.yaml"))
    assert type(plan.problem).__name__ == "Mine"
    assert plan.problem.scale == 3.0  # type: ignore[attr-defined]
    assert plan.config.problem == f"{folder.resolve()}/problems/mine.py:Mine"


def test_a_check_names_what_cannot_be_sent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "config.yaml"
    check(config)
    assert "all right" in capsys.readouterr().out
    mine = folder / "problems" / "mine.py"
    mine.write_text(mine.read_text().replace("0 / scale", "0 / scale; self.lock = __import__('threading').Lock()"))
    del sys.modules[problem_class(read_config(config).problem).__module__]
    with pytest.raises(ProblemError, match=r"Mine\.lock: a lock cannot be pickled"):
        check(config)


def test_a_run_goes_on_where_its_files_lie_in_another_folder(folder: Path, tmp_path: Path) -> None:
    other = folder.with_name(f"{folder.name}-copy")
    folder.rename(other)
    there = read_config(other / "config.yaml")
    other.rename(folder)
    here = read_config(folder / "config.yaml")
    assert here.problem != there.problem
    assert resume_differences(there, here) == []


def test_a_comparison_knows_such_problems(folder: Path) -> None:
    (folder / "compare.yaml").write_text(
        "budget: {trainings: 2}\nmethods: [random]\nproblems:\n"
        "  a: {problem: 'problems/mine.py:Mine', space: {decay: {g0: {loguniform: [1e-4, 1.0]}}}}\n"
        "  b: {config: config.yaml}\n"
    )
    comparison = read_comparison(folder / "compare.yaml")
    plans = {run.problem_name: run.plan() for run in comparison.runs(None)}
    assert {name: type(plan.problem).__name__ for name, plan in plans.items()} == {"a": "Mine", "b": "Mine"}
    assert plans["b"].problem.scale == 3.0  # type: ignore[attr-defined]


def test_a_module_in_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder / "problems"))
    assert problem_class("problems.mine:Mine").__module__ == "problems.mine"


def test_a_worker_without_the_files_gets_the_code(folder: Path, tmp_path: Path) -> None:
    problem = make_problem(f"{folder}/problems/mine.py:Mine")
    send_along(type(problem))
    (tmp_path / "pickled").write_bytes(cloudpickle.dumps(problem))
    (folder / "problems").rename(folder / "gone")
    code = "import pickle, sys; p = pickle.load(open(sys.argv[1], 'rb')); print(type(p).__doc__, p.upper_loss.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickled")], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.stdout == "Ridge of my own upper_loss\n", done.stderr


def test_installed_code_stays_where_it_is() -> None:
    assert own_modules(Ridge) == []
    assert own_modules(pytest.Item) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("problems/nine.py:Mine", "there is no file"),
        ("problems/mine.py:Yours", "no class 'Yours' of a BilevelProblem in"),
        ("problems/mine.py:half", "it has Ridge, Mine"),
        ("no_such_package.module:Mine", "there is no module 'no_such_package.module'"),
        (":Mine", "before the colon"),
    ],
)
def test_what_is_not_there(folder: Path, name: str, words: str) -> None:
    (folder / "config.yaml").write_text(f"problem: '{name}'\nsearch: {{trainings: 1}}\n")
    with pytest.raises(ConfigError, match=words):
        resolve(read_config(folder / "config.yaml"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\nraise OSError('no data')", r"mine.py, line 2: OSError: no data"),
        ("def (", r"mine.py, line 1: SyntaxError"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_code_that_fails_is_named_with_its_line(folder: Path, code: str, words: str) -> None:
    (folder / "problems" / "mine.py").write_text(code)
    with pytest.raises(ProblemError, match=words):
        problem_class(f"{folder}/problems/mine.py:Mine")


def test_options_of_a_problem_of_ones_own(folder: Path) -> None:
    name = f"{folder}/problems/mine.py:Mine"
    with pytest.raises(ConfigError, match="no option 'scales'; it has scale, groups"):
        make_problem(name, {"scales": 1})
    with pytest.raises(ProblemError, match="its constructor fails: ZeroDivisionError"):
        make_problem(name, {"scale": 0.0})
    assert about_problem("Mine", problem_class(name)) == "Mine: Ridge of my own (scale=1.0, groups=1)"


def test_the_template_is_a_problem_that_the_checks_accept(tmp_path: Path) -> None:
    config = write_template(tmp_path / "my_problem.py")
    plan = resolve(read_config(config))
    assert plan.space.names == ("weight_decay/first", "weight_decay/last")
    with pytest.raises(ConfigError, match="is there already"):
        write_template(tmp_path / "my_problem.py")
    with pytest.raises(ConfigError, match="expected the name of a Python file"):
        write_template(tmp_path / "my-problem.py")
