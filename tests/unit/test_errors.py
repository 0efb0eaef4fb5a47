from __future__ import annotations

import pytest

from raybilevel import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("SpaceError", ValueError),
        ("ProblemError", ValueError),
        ("DataError", OSError),
        ("StateError", ValueError),
        ("CheckpointError", ValueError),
        ("NotFiniteError", ArithmeticError),
    ],
)
def test_each_error_is_ours_and_its_builtin(name: str, builtin: type[Exception]):
    assert issubclass(getattr(errors, name), errors.RaybilevelError)
    assert issubclass(getattr(errors, name), builtin)


def test_the_tree_in_the_docstring_names_every_error():
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in defined)
