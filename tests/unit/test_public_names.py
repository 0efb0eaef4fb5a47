from __future__ import annotations

import subprocess
import sys

import raybilevel


def test_the_public_names_are_what_can_be_imported() -> None:
    import types

    importable = {
        name for name, value in vars(raybilevel).items()
        if not isinstance(value, types.ModuleType) and (not name.startswith("_") or name == "__version__")
    }  # fmt: skip
    assert set(raybilevel.__all__) == importable == {
        "BilevelProblem", "BilevelSearch", "__version__", "hypergradient_trainable", "lower_level_trainable",
    }  # fmt: skip


def test_the_core_knows_no_ray() -> None:
    """Everything below the searcher imports without Ray, once the package's public names are out of the way."""
    code = (
        "import sys, types, importlib.util\n"
        "package = types.ModuleType('raybilevel')\n"
        "package.__path__ = list(importlib.util.find_spec('raybilevel').submodule_search_locations)\n"
        "sys.modules['raybilevel'] = package\n"
        "import raybilevel.local, raybilevel.methods, raybilevel.state_file, raybilevel.problems\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
