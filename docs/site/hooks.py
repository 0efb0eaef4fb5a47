"""Hooks of MkDocs: pages made from the code, and pages that show files of the repository which documents link to."""

from __future__ import annotations

import json
import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import generate

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "sh", ".toml": "toml", ".txt": "text", ".svg": "xml"}
FILES = (
    "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "constraints.txt", "examples/*.py", "examples/*.ipynb",
    "examples/scripts/*.*", "configs/**/*.*",
)  # fmt: skip
"""What documents may link to beside the pages: shown under files/."""


def on_files(files: Files, config: Any) -> Files:
    for place, page in generate.PAGES.items():
        files.append(File.generated(config, place, content=page()))
    for path in sorted(found for pattern in FILES for found in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, page_of(name), content=shown(path, name)))
    listing = "\n".join(f"- [{name}]({posixpath.basename(name)}.md)" for name in cluster_files())
    files.append(File.generated(config, "files/configs/cluster/README.md", content=f"# configs/cluster\n\n{listing}\n"))
    return files


def cluster_files() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/cluster").iterdir())


def page_of(name: str) -> str:
    """The page of the site that shows a file of the repository."""
    return f"files/{name}" if name.endswith(".md") else f"files/{name}.md"


def shown(path: Path, name: str) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return notebook(json.loads(text))
    return f"# {name}\n\n```{LANGUAGES[path.suffix]}\n{text.rstrip()}\n```\n"


def notebook(content: Mapping[str, Any]) -> str:
    """The cells of a notebook as Markdown."""
    return "\n\n".join(
        source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for cell in content["cells"]
        for source in ["".join(cell["source"])]
    )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that leave docs/, which work in a checkout, lead to the pages that show those files."""
    place = page.file.src_uri
    origin = place.removeprefix("files/") if place.startswith("files/") else f"docs/{place}"

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        if "://" in target:
            return match[0]
        aim = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if aim.startswith("docs/"):
            new = aim.removeprefix("docs/")
        elif aim == "configs/cluster":
            new = "files/configs/cluster/README.md"
        elif aim == "README.md":
            new = "index.md"
        elif files.get_file_from_path(page_of(aim)) is not None:
            new = page_of(aim)
        else:
            return match[0]
        return f"{match[1]}{posixpath.relpath(new, posixpath.dirname(place))}{anchor}{match[4]}"

    return re.sub(LINK, replaced, markdown)
