"""`raybilevel new`: a problem and its config to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from raybilevel.errors import ConfigError

KIND = "MyProblem"


def write_template(path: Path) -> Path:
    """Write a problem that runs as it is, and its config beside it. Returns the path of the config.

    Raises:
        ConfigError: a file is there already, the name is no name of a Python module, or the folder cannot be written.
    """
    config = path.with_suffix(".yaml")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise ConfigError(f"{path}: expected the name of a Python file, such as my_problem.py")
    # Both, before either is written.
    for file in (path, config):
        if file.exists():
            raise ConfigError(f"{file} is there already; choose another name")
    names = {"kind": KIND, "file": path.name, "config": config.name}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, template in ((path, "problem.py.txt"), (config, "config.yaml.txt")):
            text = resources.files("raybilevel._command").joinpath("template", template).read_text("utf-8")
            file.write_text(text.format(**names), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    return config
