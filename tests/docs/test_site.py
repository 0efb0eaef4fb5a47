"""The site builds without a warning, and its pages load nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?(https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"(?:url\(|@import )[\"' ]*(?:https?:)?//", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs the dependency group docs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert LOADED.search(text) is None, page
        assert IN_STYLES.search(text) is None, page
    for style in site.rglob("*.css"):
        assert IN_STYLES.search(style.read_text(encoding="utf-8")) is None, style


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "texts"),
    [
        ("reference/config", ("points_to_evaluate", "gpu_seconds")),
        ("reference/command-line", ("--storage", "raybilevel problems")),
        ("reference/api/problem", ("LargeUpperLevel", "lower_map")),
        ("reference/api/tune", ("SearchScalars", "step_time_limit")),
        ("files/examples/quickstart.py", ("load_breast_cancer",)),
        ("files/examples/tour.ipynb", ("<h1", "share_wrong")),
    ],
)
def test_pages_made_from_the_code_show_it(site: Path, page: str, texts: tuple[str, ...]) -> None:
    text = (site / page / "index.html").read_text(encoding="utf-8")
    assert all(expected in text for expected in texts)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted((ROOT / "docs/reference/api").glob("*.md")), ids=lambda page: page.stem)
def test_pages_on_modules_have_every_public_name(site: Path, page: Path) -> None:
    module = importlib.import_module("raybilevel" if page.stem == "raybilevel" else f"raybilevel.{page.stem}")
    text = (site / "reference/api" / page.stem / "index.html").read_text(encoding="utf-8")
    shown = re.sub(r"<[^>]+>", " ", text)
    assert [name for name in module.__all__ if not re.search(rf"\b{name}\b", shown)] == []
