"""Pages that mkdocs makes from the code itself: the command line and the REST API."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those in the folder."""
    for path, text in (
        ("reference/command-line.md", command_line()),
        ("reference/rest.md", rest_api()),
    ):
        files.append(File.generated(config, path, content=text))
    return files


def command_line() -> str:
    """Return every command with its arguments and options, from the application itself."""
    from typer.main import get_command

    from bitquota.cli.app import app

    lines = ["# Command line", "", "`bitquota COMMAND --help` shows the same in a terminal.", ""]
    for name, command in _commands(get_command(app), "bitquota"):
        lines += [f"## {name}", "", _escaped(command.help or ""), ""]
        rows = [_parameter(p) for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            lines += ["| argument | meaning | default |", "| --- | --- | --- |", *rows, ""]
        example = (command.epilog or "").partition(": ")[2]
        lines += ["```sh", example, "```", ""]
    return "\n".join(lines)


def _commands(command: Any, name: str) -> Iterator[tuple[str, click.Command]]:  # noqa: ANN401
    for key, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from _commands(sub, f"{name} {key}")
        else:
            yield f"{name} {key}", sub


def _parameter(parameter: Any) -> str:  # noqa: ANN401  # of either kind
    names = ", ".join(f"`{o}`" for o in parameter.opts) or f"`{parameter.name}`"
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) else f"`{default}`"
    if not isinstance(default, (str, int, float, Path)):
        shown = ""
    return f"| {names} | {_escaped(getattr(parameter, 'help', '') or '')} | {shown} |"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>\[\]*_])", r"\\\1", " ".join(text.split()))


def rest_api() -> str:
    """Return every route of the service with its parameters, body and answers."""
    from bitquota.service.app import create_app
    from bitquota.service.settings import Settings

    with TemporaryDirectory() as folder:
        schema = create_app(Settings(data_dir=Path(folder))).openapi()
    lines = [
        "# REST API",
        "",
        f"{schema['info'].get('description', '')}",
        "",
        "A running server describes itself at `/v1/openapi.json`, and with forms at `/docs`.",
        "",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            lines += [f"## {method.upper()} {path}", "", operation.get("summary", ""), ""]
            lines += [operation.get("description", ""), ""]
            if operation.get("parameters"):
                lines += ["| parameter | in | meaning |", "| --- | --- | --- |"]
                lines += [
                    f"| `{p['name']}` | {p['in']} | {_escaped(p.get('description', ''))} |"
                    for p in operation["parameters"]
                ]
                lines.append("")
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                lines += [f"Body: `{kind}`", ""]
                for example in _examples(body):
                    lines += ["```json", json.dumps(example, indent=2), "```", ""]
            lines += ["| status | answer |", "| --- | --- |"]
            lines += [
                f"| {status} | {_escaped(answer.get('description', ''))} |"
                for status, answer in operation["responses"].items()
            ]
            lines.append("")
    return "\n".join(lines)


def _examples(body: dict[str, Any]) -> list[Any]:
    if "example" in body:
        return [body["example"]]
    return [e["value"] for e in body.get("examples", {}).values() if "value" in e]
