"""Reference pages made from the code: config keys, the command line. Imported by the site's hooks and by tests."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from raybilevel._compare.config import CompareConfig
from raybilevel._config.experiment import ExperimentConfig
from raybilevel.cli import app
from raybilevel.problems import PROBLEMS, option_names

ROOT = Path(__file__).parents[2]

CONFIGS: dict[str, tuple[type[BaseModel], str]] = {
    "A run": (ExperimentConfig, "The config of `raybilevel run` and `raybilevel check`."),
    "A comparison": (CompareConfig, "The config of `raybilevel compare`."),
}
ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*): +(?P<text>\S.*)$")


def entries(docstring: str) -> dict[str, str]:
    """What a docstring says of each name, by lines such as "low, high: the bounds", with indented continuations."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring.splitlines():
        entry = ENTRY.match(line)
        if entry is not None:
            names = entry["names"].split(", ")
            found |= dict.fromkeys(names, entry["text"])
        elif line.startswith("    ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def summary_of(docstring: str) -> str:
    return " ".join(docstring.strip().split("\n\n")[0].split())


def config_page() -> str:
    """Every key of a config, as Markdown."""
    parts = [
        "# Config keys",
        "Configs are YAML. A key that is not listed here is an error. `--set key=value` changes one key, by its dotted "
        "name: `--set search.trainings=40`. This page is made from the code.",
    ]
    for title, (model, about) in CONFIGS.items():
        schema = model.model_json_schema()
        parts += [f"## {title}", about, table(schema, schema)]
        for name, definition in schema.get("$defs", {}).items():
            if not definition.get("properties"):
                continue
            # A definition that both configs use is described once.
            if f"### {heading(name)}" not in parts:
                parts += [f"### {heading(name)}", summary_of(definition.get("description", "")),
                          table(definition, schema)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def heading(definition: str) -> str:
    """SearchConfig -> Search."""
    return re.sub(r"(Config|Entry)$", "", definition)


def table(model: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    about = entries(model.get("description", ""))
    required = model.get("required", ())
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in model["properties"].items():
        default = "required" if key in required else written(field.get("default"), field)
        meaning = field.get("description") or about.get(key) or meaning_of_group(field, schema)
        rows.append(f"| `{key}` | {type_of(field)} | {default} | {cell(meaning)} |")
    return "\n".join(rows)


def written(default: Any, field: Mapping[str, Any]) -> str:
    if references(field) and default is not None:
        return "see there"
    return "none" if default is None else f"`{json.dumps(default)}`"


def cell(text: str) -> str:
    return (text[:1].upper() + text[1:]).replace("|", "\\|")


def references(field: Mapping[str, Any]) -> list[str]:
    """Names of the models that a key may hold."""
    return re.findall(r"#/\$defs/(\w+)", json.dumps(field))


def meaning_of_group(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    names = references(field)
    return summary_of(schema["$defs"][names[0]].get("description", "")) if names else ""


def type_of(field: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "$ref" in field:
        name = heading(field["$ref"].rpartition("/")[2])
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return " or ".join(type_of(choice) for choice in choices if choice.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {type_of(field['items'])}" if field.get("items") else "list"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"mapping to {type_of(values)}" if isinstance(values, Mapping) and values else "mapping"
    limits = [
        f"{sign} {field[name]:g}"
        for name, sign in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"))
        if name in field
    ]
    return ", ".join([str(field.get("type", "any value")), *limits])


def commands() -> Iterator[tuple[str, Any]]:
    """(name, click command) of every subcommand."""
    root = typer.main.get_command(app)
    yield from sorted(root.commands.items())  # type: ignore[attr-defined]


def command_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    parts = [
        "# Command line",
        "`pip install` puts the command `raybilevel` on the path. `make setup` puts it into `.venv/bin`. This page is "
        "made from the code.",
        "| exit status | meaning |\n| --- | --- |\n| 0 | success |\n| 1 | failure |\n"
        "| 2 | a wrong command line, config or data file |\n| 130 | interrupted by Ctrl-C |",
    ]
    for name, command in commands():
        parts += [f"## raybilevel {name}", (command.help or "").strip(), f"```text\n{usage(name, command)}\n```"]
        rows = [row for parameter in command.params if (row := parameter_row(parameter))]
        if rows:
            parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def usage(name: str, command: Any) -> str:
    words = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"]
    return " ".join(["raybilevel", name, *words, *(["[OPTIONS]"] if options else [])])


def parameter_row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar or parameter.name.upper()}` | {cell(parameter.help or '')} |"
    if parameter.hidden or parameter.name == "help":
        return ""
    value = "" if parameter.is_flag else f" {parameter.metavar or 'TEXT'}"
    more = " It may be given more than once." if parameter.multiple else ""
    return f"| `{', '.join(parameter.opts)}{value}` | {cell(parameter.help or '')}{more} |"


def problem_page() -> str:
    """The problems and the configs that ship, as Markdown."""
    parts = [
        "# Problems and configs",
        "The problems that ship. Each has the option `device` as well. `raybilevel problems` prints the same list. "
        "This page is made from the code.",
        "| problem | what it is | options |\n| --- | --- | --- |",
    ]
    for name, problem in sorted(PROBLEMS.items()):
        about = (problem.__doc__ or "").strip().splitlines()[0].rstrip(":.")
        parts[-1] += f"\n| `{name}` | {cell(about)} | {', '.join(f'`{option}`' for option in option_names(problem))} |"
    parts += ["Configs of `raybilevel run` in the repository:", "| config | what it tunes |\n| --- | --- |"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        parts[-1] += f"\n| [`configs/{path.name}`](../../configs/{path.name}) | {cell(comment_of(path))} |"
    return "\n\n".join(parts) + "\n"


def comment_of(path: Path) -> str:
    """The comment at the head of a config."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


PAGES = {
    "reference/config.md": config_page,
    "reference/command-line.md": command_page,
    "reference/problems.md": problem_page,
}
