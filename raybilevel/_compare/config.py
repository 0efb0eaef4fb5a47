"""The config of a comparison: problems x methods x seeds, and the budget of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, model_validator

from raybilevel._compare.methods import check_settings, parse
from raybilevel._config.experiment import ExperimentConfig, SearchConfig, read_config
from raybilevel._config.files import Checked, apply_override, read_mapping, validated
from raybilevel._config.plan import Plan, resolve
from raybilevel._config.resources import ResourcesConfig
from raybilevel._config.space import write_space
from raybilevel._own_problem import located
from raybilevel._records.record import Settings, Unit
from raybilevel._records.store import path_of
from raybilevel.errors import ConfigError, RaybilevelError
from raybilevel.problems import make_problem


class Budget(Checked):
    """The budget of a run, in one of four units.

    trainings:   lower-level trainings. Epochs of unfinished trainings and upper-level steps count as fractions.
    epochs:      the same in epochs, over all trials.
    seconds:     wall-clock time from the start of the run, on a running cluster.
    gpu_seconds: GPUs held by trials and upper-level steps, times seconds.
    """

    trainings: float | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    gpu_seconds: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def one_unit(self) -> Budget:
        if sum(getattr(self, unit) is not None for unit in get_args(Unit)) != 1:
            raise ValueError("give exactly one of trainings, epochs, seconds, gpu_seconds")
        return self

    @property
    def unit(self) -> Unit:
        return next(unit for unit in get_args(Unit) if getattr(self, unit) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))


class ProblemEntry(Checked):
    """A problem as in a config of `raybilevel run`. The file may also give `config`, the path of such a config.

    problem: one of `raybilevel problems`, or one of your own, as there.
    options: arguments of its constructor, and `device`.
    space:   by default the problem's own box.
    budget, seeds, methods: for this problem, instead of the comparison's.
    """

    problem: str
    options: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any] | None = None
    budget: Budget | None = None
    seeds: int | None = Field(default=None, ge=1)
    methods: tuple[str, ...] | None = None


class MethodEntry(Checked):
    """A method, with the settings of its searcher and scheduler that differ from the defaults.

    method:    its name, e.g. "raybilevel", "optuna" or "optuna+asha".
    searcher:  settings of the searcher, or of raybilevel's method.
    scheduler: settings of the scheduler.
    """

    method: str
    searcher: dict[str, Any] = Field(default_factory=dict)
    scheduler: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def known(self) -> MethodEntry:
        try:
            check_settings(parse(self.method), self.searcher, self.scheduler)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class CompareConfig(Checked):
    """A comparison.

    seeds:     the number of runs of each method on each problem, with seeds 0, 1, and so on.
    methods:   names, or entries under names of your own.
    marks:     costs at which tables report, in the unit of the budget; by default half of it and all of it.
    resources: of a training and of an upper-level step, as in a config of `raybilevel run`.
    cpus:      of the local Ray, which is started if no cluster is given; by default all.
    only:      the problems to run; by default all.

    A file may also have `scales`: named sets of other values of the top-level keys, for `--scale`.
    """

    budget: Budget
    seeds: int = Field(default=3, ge=1)
    methods: dict[str, MethodEntry]
    problems: dict[str, ProblemEntry]
    marks: tuple[float, ...] = ()
    resources: ResourcesConfig = ResourcesConfig()
    cpus: int | None = Field(default=None, ge=1)
    only: tuple[str, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def named(cls, raw: Any) -> Any:
        """Expand a list of methods to entries that are named after their method."""
        given = raw.get("methods") if isinstance(raw, Mapping) else None
        if not isinstance(given, Sequence) or isinstance(given, str):
            return raw
        return {**raw, "methods": {str(name): {"method": name} for name in given}}

    @model_validator(mode="after")
    def consistent(self) -> CompareConfig:
        for name, entry in self.problems.items():
            for method in entry.methods or ():
                if method not in self.methods:
                    raise ValueError(f"problem {name!r} names the method {method!r}, which is not among `methods`")
        for name in self.only or ():
            if name not in self.problems:
                raise ValueError(f"`only` names the problem {name!r}, which is not among `problems`")
        return self

    def runs(self, data: str | None) -> list[Run]:
        """All runs. Seeds are the outer loop, so that the first runs already make a fair comparison.

        Raises:
            ConfigError: a problem, which is named, has a mistake.
        """
        experiments = {name: experiment_of(name, self.problems[name], self.resources) for name in self.chosen}
        found = []
        for seed in range(max(self.problems[name].seeds or self.seeds for name in self.chosen)):
            for name, experiment in experiments.items():
                entry = self.problems[name]
                if seed >= (entry.seeds or self.seeds):
                    continue
                for method in entry.methods or tuple(self.methods):
                    budget = entry.budget or self.budget
                    found.append(Run(name, experiment, method, self.methods[method], seed, budget, self.marks, data))
        return found

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.only or tuple(self.problems)


@dataclass(frozen=True)
class Run:
    """One problem, one method, one seed. `data` and `marks` do not influence the result, nor the name of the record."""

    problem_name: str
    experiment: ExperimentConfig
    method_name: str
    method: MethodEntry
    seed: int
    budget: Budget
    marks: tuple[float, ...]
    data: str | None

    @property
    def settings(self) -> Settings:
        """Everything that decides the result."""
        return Settings(
            problem=self.experiment.problem,
            options=self.experiment.options,
            space=self.experiment.space,
            resources=self.experiment.resources.model_dump(),
            method=self.method.method,
            method_settings={"searcher": self.method.searcher, "scheduler": self.method.scheduler},
            seed=self.seed,
            budget=self.budget.amount,
            budget_unit=self.budget.unit,
        )

    def plan(self) -> Plan:
        """The problem, space and resources, made and checked. They are the same for every method and seed.

        Raises:
            RaybilevelError: the problem, which is named, has a mistake.
        """
        try:
            return resolve(self.experiment, self.data)
        except RaybilevelError as error:
            raise of_problem(self.problem_name, error) from error

    @property
    def path(self) -> Path:
        """The path of the record in the output folder."""
        # A slash would make a folder.
        return path_of(self.problem_name, self.method_name.replace("/", "-"), self.settings)


def experiment_of(name: str, entry: ProblemEntry, resources: ResourcesConfig) -> ExperimentConfig:
    """A problem of a comparison as a config of `raybilevel run`.

    Raises:
        ConfigError: the problem, which is named, has a mistake, or has no space or a wrong one.
    """
    space = entry.space
    if space is None:
        try:
            # "." for the folder of data files, which some problems require. No file is read for a box.
            box = make_problem(entry.problem, entry.options, ".").space
            space = None if box is None else write_space(box)
        except RaybilevelError as error:
            raise of_problem(name, error) from error
        if space is None:
            raise ConfigError(f"problem {name!r}: {entry.problem} has no box of its own; give its `space`")
    raw = {
        "problem": entry.problem,
        "options": entry.options,
        "space": space,
        # Only to make it a whole config: budget and methods are the comparison's.
        "search": SearchConfig(trainings=1, method="default"),
        "resources": resources,
    }
    experiment = validated(ExperimentConfig, raw, f"problem {name!r}")
    if not experiment.parameters:
        raise ConfigError(f"problem {name!r}: its `space` has no hyperparameter to search")
    return experiment


def of_problem(name: str, error: RaybilevelError) -> RaybilevelError:
    """The same error, with the problem's name before each line."""
    return type(error)("\n".join(f"problem {name!r}: {line}" for line in str(error).splitlines()))


def read_comparison(path: str | Path, overrides: Sequence[str] = (), scale: str | None = None) -> CompareConfig:
    """Read a comparison's config file, at a scale, with overrides such as "budget.trainings=10".

    Raises:
        ConfigError: the file is missing or not YAML, or keys are unknown, missing or wrong. There is one line for each
            mistake, with file and key.
    """
    raw = read_mapping(path)
    if "problems" not in raw and {"problem", "search"} & raw.keys():
        raise ConfigError(f"{path}: a config of one run; use `raybilevel run {path}`")
    if scale is not None:
        scales = raw.get("scales") or {}
        if not isinstance(scales, dict) or not all(isinstance(keys, dict) for keys in scales.values()):
            raise ConfigError(
                f"{path}: scales: expected names with the keys that each replaces, e.g. {{small: {{seeds: 1}}}}"
            )
        if scale not in scales:
            raise ConfigError(f"{path}: no scale {scale!r}; it has {', '.join(map(str, scales)) or 'none'}")
        # Before the problems' own files are read, as a scale may have other problems.
        raw |= scales[scale]
    raw.pop("scales", None)
    inline_configs(raw, Path(path).parent)
    # Last, so that an override also reaches what came from another file.
    for override in overrides:
        apply_override(raw, override)
    for entry in entries(raw).values():
        if isinstance(entry, dict) and isinstance(entry.get("problem"), str):
            entry["problem"] = located(entry["problem"], Path(path).parent)
    return validated(CompareConfig, raw, path)


def entries(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The problems of a comparison; none where they are no mapping, which the check of the whole refuses."""
    problems = raw.get("problems")
    return problems if isinstance(problems, dict) else {}


def inline_configs(raw: dict[str, Any], folder: Path) -> None:
    """Replace each problem's `config`, a path relative to `folder`, by the problem, options and space in that file.

    The config that is kept with the records then needs no other file.
    """
    for name, entry in entries(raw).items():
        if not isinstance(entry, dict) or "config" not in entry:
            continue
        if "problem" in entry or "space" in entry:
            raise ConfigError(f"problems.{name}: give either `config`, or `problem` and `space`")
        given = read_config(folder / str(entry.pop("config")))
        entry |= {"problem": given.problem, "options": {**given.options, **entry.get("options", {})}}
        entry["space"] = given.space
