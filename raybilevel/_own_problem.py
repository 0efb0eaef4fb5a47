"""Problems of the user's own, named by where they are: `package.module:Class` or `folder/file.py:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

from raybilevel.errors import ConfigError, ProblemError
from raybilevel.problem import BilevelProblem

SUFFIX = ".py"


def is_own(name: str) -> bool:
    """Whether a problem's name says where it is. The problems that ship have plain names."""
    return ":" in name


def located(name: str, folder: Path) -> str:
    """The name with an absolute path, if it has a path. A relative one is relative to `folder`."""
    where, colon, kind = name.rpartition(":")
    if not where.endswith(SUFFIX):
        return name
    return f"{(folder / Path(where).expanduser()).resolve()}{colon}{kind}"


def file_of(name: str) -> str:
    """The name without the folders of its path: what stays the same on another machine."""
    where, colon, kind = name.rpartition(":")
    return f"{Path(where).name}{colon}{kind}" if where.endswith(SUFFIX) else name


def problem_class(name: str) -> type[BilevelProblem]:
    """The class that a name such as `package.module:Class` stands for.

    Raises:
        ConfigError: there is no such file, module or class, or it is no class of a problem.
        ProblemError: the code fails while it is imported.
    """
    where, _, kind = name.rpartition(":")
    found = classes_in(where)
    if kind in found:
        return found[kind]
    there = f"it has {', '.join(found)}" if found else "it has none; derive one from raybilevel.BilevelProblem"
    raise ConfigError(f"problem {name!r}: no class {kind!r} of a BilevelProblem in {where}; {there}")


def classes_in(where: str) -> dict[str, type[BilevelProblem]]:
    """The problems that a module or a file defines or imports, by the names of their classes.

    Raises:
        ConfigError: there is no such file or module.
        ProblemError: the code fails while it is imported.
    """
    if not where:
        raise ConfigError("problem: expected package.module:Class or folder/file.py:Class before the colon")
    module = load_file(Path(where)) if where.endswith(SUFFIX) else load_module(where)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, BilevelProblem) and not inspect.isabstract(value)
    }


def load_module(name: str) -> ModuleType:
    """Import a module. As with `python -m`, the current directory is looked into first."""
    look_into(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Else the module is there, and one that it imports is missing.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"problem: there is no module {name!r} on Python's path or in {Path.cwd()}; install its package, or "
                "give the path of a file, e.g. folder/file.py:Class"
            ) from error
        raise failed(name, error) from error
    except Exception as error:
        raise failed(name, error) from error


def load_file(path: Path) -> ModuleType:
    """Import a file. As with `python FILE`, its folder is looked into first."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"problem: there is no file {path}; in a config a path is relative to the config's folder")
    # The digest keeps two files of one name apart, and a file called random.py from the module of the library.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    look_into(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as `import` does: dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise failed(str(path), error) from error
    return module


def look_into(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def failed(where: str, error: Exception) -> ProblemError:
    """The error of code that could not be imported, with the line of it that failed."""
    if isinstance(error, SyntaxError):
        return ProblemError(f"problem: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}")
    # The first frame is the one above that imports. Those of importlib say nothing of the user's code.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames[1:] else where
    return ProblemError(f"problem: importing {where} failed at {place}: {type(error).__name__}: {error}")
