"""The JSON Schema of a document, from the annotations and docstrings that its reader goes by.

Design: docs/design/bytes.md

References:
    JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from inspect import cleandoc
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from bitquota.codec import Document, Form

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def json_schema(kind: type[Document], *, title: str) -> JsonObject:
    """Return the schema of ``kind``, with a definition for each document inside it.

    What invariants demand beyond types is in the descriptions: the reader checks it, the schema
    does not. Types that no document has so far raise ``TypeError``.
    """
    definitions: JsonObject = {}
    body = _object(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **body,
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: JsonObject) -> JsonObject:
    form: Form = getattr(kind, "FORM", Form())
    hints = get_type_hints(kind)
    said = _members(kind.__doc__ or "")
    properties: JsonObject = {}
    required: list[str] = []
    if form.schema:
        properties[form.schema_key] = {"const": form.schema}
        required.append(form.schema_key)
    for member in fields(kind):
        name = form.names.get(member.name, member.name)
        properties[name] = _schema(hints[member.name], definitions)
        if text := said.get(member.name):
            properties[name] |= {"description": text}
        if member.default is MISSING and member.default_factory is MISSING:
            required.append(name)
    summary = cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return {
        "description": summary.replace("``", "`"),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _schema(hint: Any, definitions: JsonObject) -> JsonObject:  # noqa: ANN401  # an annotation
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        items = [_schema(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if arguments and set(arguments) <= set(_PLAIN):
        return {"type": [_PLAIN[argument] for argument in arguments]}
    if isinstance(hint, type) and issubclass(hint, Document):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # a document inside itself refers to it
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    msg = f"no JSON Schema is known for {hint!r}"
    raise TypeError(msg)


def _members(doc: str) -> dict[str, str]:
    """Return what the section ``Attributes:`` says of each member, several before one colon too."""
    _, _, section = cleandoc(doc).partition("Attributes:\n")
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        said = re.sub(r"\s+", " ", text).replace("``", "`")
        found |= {name.strip(): said for name in names.split(",")}
    return found
