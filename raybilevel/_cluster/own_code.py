"""Code of the user's own that workers need and have no file of."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from ray import cloudpickle

NEVER_SENT = ("raybilevel", "__main__")
"""Packages that each node has, and the script itself, which is sent anyway."""
INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
SITE_FOLDERS = {"site-packages", "dist-packages"}


def send_along(kind: type) -> None:
    """Have a class go to workers with its code. Installed packages are left out: every node has those.

    The modules beside it that it has imported go with it. Ray otherwise sends the name of the module only, which a
    worker cannot import unless its node has the file, on a path where it looks.
    """
    for module in own_modules(kind):
        cloudpickle.register_pickle_by_value(module)


def own_modules(kind: type) -> list[ModuleType]:
    """The module of a class, and the others that were imported from the same folder tree."""
    module = sys.modules.get(kind.__module__)
    file = file_of(module)
    if module is None or file is None or not sent(module.__name__, file):
        return []
    # The folder in which the outermost package lies, and not that of a subpackage.
    above = module.__name__.count(".") + (file.name == "__init__.py")
    root = file.parents[above]
    return [
        other
        # A copy: to ask a lazy module for its file may import others.
        for name, other in list(sys.modules.items())
        if (its := file_of(other)) is not None and root in its.parents and sent(name, its)
    ]


def file_of(module: ModuleType | None) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def sent(name: str, file: Path) -> bool:
    installed = any(folder in file.parents for folder in INSTALLED) or not SITE_FOLDERS.isdisjoint(file.parts)
    return name.partition(".")[0] not in NEVER_SENT and not installed
