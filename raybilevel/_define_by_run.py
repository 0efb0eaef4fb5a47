"""Search spaces as a function that asks a trial for its hyperparameters, as Optuna has them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from raybilevel._dependent import Dependent
from raybilevel._parameter import CHOICE, Condition, Parameter
from raybilevel._space_tree import SpaceReader
from raybilevel._tree import Path, flatten, look_up, named
from raybilevel.errors import SpaceError
from raybilevel.space import Fixed, Space

SpaceFunction = Callable[[Any], Mapping[str, Any] | None]
PROBES = 6
"""Random settings with which a part of a space is tried for whether it is always the same."""
MOST_CALLS = 5_000


class AskingTrial:
    """The `trial` of a define-by-run function: it has the `suggest_` methods of Optuna's, and notes what is asked.

    value:     of a hyperparameter that is asked for.
    constants: those asked for that have one value only.
    """

    def __init__(self, value: Callable[[Parameter], Any]) -> None:
        self._value = value
        self.asked: dict[Path, Parameter] = {}
        self.constants: dict[Path, Any] = {}

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        if low == high:
            return float(self._constant(name, float(low)))
        if step is not None:
            return float(self._ask_stepped(name, "quniform", low, high, step))
        return float(self._ask(name, "loguniform" if log else "uniform", (low, high)))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if low == high:
            return int(self._constant(name, int(low)))
        if step != 1:
            return int(self._ask_stepped(name, "qrandint", low, high, step))
        # Optuna's `high` belongs to the domain, that of Tune's randint does not.
        return int(self._ask(name, "lograndint" if log else "randint", (low, high + 1)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._ask(name, CHOICE, tuple(choices))

    def _ask_stepped(self, name: str, domain: str, low: float, high: float, step: float) -> Any:
        """Of low, low + step, ...; Tune's domains have multiples of the step only."""
        # 1e-9, since 0.3 / 0.1 is 2.9999999999999996.
        if abs(low / step - round(low / step)) < 1e-9:
            return self._ask(name, domain, (low, high, step))
        count = math.floor((high - low) / step + 1e-9) + 1
        return self._ask(name, CHOICE, tuple(low + place * step for place in range(count)))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        return self.suggest_float(name, low, high, step=q)

    def _constant(self, name: str, value: Any) -> Any:
        self.constants[path_of(name)] = value
        return value

    def _ask(self, name: str, domain: str, arguments: tuple[Any, ...]) -> Any:
        if domain == CHOICE and len(arguments) == 1:
            return self._constant(name, arguments[0])
        parameter = Parameter.of(path_of(name), domain, arguments)
        if self.asked.setdefault(parameter.path, parameter) != parameter:
            raise SpaceError(f"{name}: the define-by-run function asks for it twice, with different domains")
        return self._value(parameter)


def path_of(name: str) -> Path:
    return tuple(name.split("/"))


Setting = dict[Path, float]
"""Unit-cube coordinates of hyperparameters."""


@dataclass(frozen=True)
class Answer:
    """What a function asked for, in `constants` with one value only, and what it returned beside, flat."""

    asked: dict[Path, Parameter]
    constants: dict[Path, Any]
    returned: dict[Path, Any] = field(compare=False)


@dataclass
class Learner:
    """Calls a function with one setting after the other, to learn on which choices it depends what it asks for."""

    function: SpaceFunction
    calls: int = 0

    def ask(self, setting: Setting, otherwise: Callable[[Parameter], float]) -> Answer:
        """otherwise: the coordinates that the setting does not have; the setting gets them."""
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise SpaceError(
                f"space: {name_of(self.function)} asks for different hyperparameters after too many combinations of "
                "choices; let it depend on fewer, or give a bound for each instead"
            )

        def value(p: Parameter) -> Any:
            if p.path not in setting:
                setting[p.path] = otherwise(p)
            return p.to_value(setting[p.path])

        trial = AskingTrial(value)
        return Answer(trial.asked, trial.constants, returned_by(self.function, trial))

    def parts(self, chosen: Setting, generator: random.Random) -> Iterator[tuple[Setting, list[Answer]]]:
        """The parts of the space in which the function always asks for the same, by the choices that lead there, with
        its answers at several settings."""
        # `ask` completes it, so that all others begin from the setting of the first answer.
        base = dict(chosen)
        answers = [self.ask(base, lambda p: p.levels[0] if p.levels else 0.5)]
        branch = self._branch(chosen, base, answers, generator)
        if branch is None:
            answers.append(self.ask(dict(chosen), lambda p: p.levels[-1] if p.levels else 0.25))
            yield chosen, answers
            return
        for level in branch.levels:
            yield from self.parts({**chosen, branch.path: level}, generator)

    def _branch(
        self, chosen: Setting, base: Setting, answers: list[Answer], generator: random.Random
    ) -> Parameter | None:
        """A choice that changes what is asked for, None if there is none.

        answers: the one at `base`; those that ask for the same are added.

        Raises:
            SpaceError: a hyperparameter that is no choice does.
        """
        first = answers[0]
        open_choices = [p for p in first.asked.values() if p.levels and p.path not in chosen]
        flips: list[Setting] = [{p.path: level} for p in open_choices for level in p.levels[1:]]
        draws: list[Setting] = [
            {path: generator.choice(p.levels) if p.levels else generator.random()
             for path, p in first.asked.items() if path not in chosen}
            for _ in range(PROBES)
        ]  # fmt: skip
        # Each choice by itself, then all at once: what depends on several shows in no single flip.
        for changes in itertools.chain(flips, draws):
            setting = dict(base)
            for path, unit in changes.items():
                # One more at a time: the answers before were the first one, so the last change is what made another.
                setting[path] = unit
                # Of a copy, as `ask` writes into a setting what that lacks.
                answer = self.ask(dict(setting), lambda p: p.levels[0] if p.levels else 0.5)
                if answer == first:
                    answers.append(answer)
                    continue
                parameter = first.asked[path]
                if not parameter.levels:
                    raise SpaceError(
                        f"{parameter.name}: what {name_of(self.function)} asks for, or a bound of it, depends on this "
                        "value; it may depend on choices and on whole numbers of few values"
                    )
                return parameter
        return None


def read_define_by_run(function: SpaceFunction) -> Space:
    """The space of a define-by-run function, found by calling it with all choices that matter to what it asks for.

    What it returns is part of the config, as in Ray's `OptunaSearch`.

    Raises:
        SpaceError: what it asks for depends on more than choices, or an argument is wrong.
    """
    # A fixed seed: the coordinates must be the same in every process that reads the function.
    learner, generator, reader = Learner(function), random.Random(0), SpaceReader()
    returns: dict[tuple[Path, str], tuple[Any, list[Condition]]] = {}
    for chosen, answers in learner.parts({}, generator):
        condition: Condition = ()
        for path, parameter in answers[0].asked.items():
            coordinate = reader.add(parameter, condition)
            if path in chosen:
                condition = (*condition, (coordinate, parameter.levels.index(chosen[path])))
        for path, value in {**returned_in(answers, function), **answers[0].constants}.items():
            returns.setdefault((path, repr(value)), (value, []))[1].append(condition)
    for (path, _), (value, conditions) in returns.items():
        when = () if () in conditions else reader.shortest(tuple(conditions))
        reader.fixed.append(Fixed(path, value, when))
    return reader.space


def returned_in(answers: Sequence[Answer], function: SpaceFunction) -> dict[Path, Any]:
    """What a function returns in a part of the space, beside what it asks for: constants, and a `Dependent` where its
    answers differ.

    Raises:
        SpaceError: an entry is there in some answers only.
    """
    found: dict[Path, Any] = {}
    for path in dict.fromkeys(path for answer in answers for path in answer.returned if path not in answer.asked):
        if any(path not in answer.returned for answer in answers):
            raise SpaceError(
                f"{named(path)}: {name_of(function)} returns it at some values only; return it always, e.g. as None, "
                "or ask for a hyperparameter where it is there"
            )
        values = [answer.returned[path] for answer in answers]
        same = len(set(map(repr, values))) == 1
        found[path] = values[0] if same else Dependent(partial(returned, function, path))
    return found


def returned_by(function: SpaceFunction, trial: AskingTrial) -> dict[Path, Any]:
    found = function(trial)
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise SpaceError(f"space: {name_of(function)} must return a dict with texts as keys, or None, got {found!r}")
    return dict(flatten(found).items())


def returned(function: SpaceFunction, path: Path, config: Mapping[str, Any]) -> Any:
    """What a function returns at a path, if it is given the values of a config."""
    return returned_by(function, AskingTrial(lambda p: look_up(config, p.path)))[path]


def name_of(function: SpaceFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
