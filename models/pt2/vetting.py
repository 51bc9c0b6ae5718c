"""Read a ``.pt2`` archive without running anything in it.

``torch.export.load`` is not safe on a stranger's file: pickled weights, sample inputs, opaque
constants and shape expressions (which reach ``sympify``, that is ``eval``) all run code. So the
file is taken apart here with ``zipfile`` and ``json`` alone: members outside a fixed set are
refused, only raw tensors and allowlisted operators remain, and nothing is ever evaluated. The
graph is then rebuilt by ``pt2_model``. This module imports no torch, so that a server can vet an
upload. It narrows what a file can do; a sandbox is still the boundary for strangers' models.

Design: docs/design/models.md
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError, InvalidModel, UnsafeModel
from bitquota.models.pt2.operators import HIGHER_ORDER, vet_call
from bitquota.models.sources import MODEL_WAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitquota.canonical import JsonObject

MAX_JSON_BYTES = 64 * 2**20
"""A graph of a thousand layers takes a few MB; more than this is no graph."""

MAX_DEPTH = 64
"""Nesting of JSON values in a graph; real ones stay below 20."""

SCHEMA_MAJOR = 8
"""Major version of torch.export's graph schema that ``pt2_model`` reads."""

_SAFE_WAY = (
    "; export it with torch.export.save(torch.export.export(model, (example,)), 'model.pt2'), "
    "or provide a Hugging Face folder with safetensors"
)

_ALLOWED_MEMBERS = tuple(
    re.compile(pattern)
    for pattern in (
        r"archive_format",
        r"archive_version",
        r"byteorder",
        r"\.data/(version|serialization_id|module_info)",
        r"models/[A-Za-z0-9_]+\.json",
        r"data/weights/weight_\d+",
        r"data/weights/[A-Za-z0-9_]+_weights_config\.json",
        r"data/constants/tensor_\d+",
        r"data/constants/[A-Za-z0-9_]+_constants_config\.json",
        r"extra/[A-Za-z0-9_.]+",  # never read
    )
)
_IGNORED_MEMBERS = (re.compile(r"data/sample_inputs/[A-Za-z0-9_]+\.pt"),)
"""Pickles that torch always writes. They are never opened."""

PARAMETER_NAME = re.compile(r"(?!__)[A-Za-z0-9_]+(\.(?!__)[A-Za-z0-9_]+)*")
"""Names become paths of modules: plain words without dunders, and nothing else."""

MAX_NODES = 100_000
"""Calls of a graph with its subgraphs; a transformer of a hundred layers has about 5,000."""

MAX_NAME = 500
"""Characters of a tensor's name."""

_EXPRESSION_FUNCTIONS = frozenset(
    {"Add", "Mul", "Integer", "Float", "Rational", "Equality", "Unequality", "GreaterThan",
     "LessThan", "StrictGreaterThan", "StrictLessThan", "Not", "And", "Or", "Piecewise",
     "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "Mod", "PythonMod", "Max", "Min",
     "ToFloat", "TruncToInt", "FloorToInt", "CeilToInt", "IntTrueDiv", "FloatTrueDiv",
     "Eq", "Ne", "PowByNatural", "Identity"}
)  # fmt: skip
_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,9}")
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv,
    ast.Mod, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.Load,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pt2Archive:
    """A vetted archive: the graph as JSON, and where the raw tensors lie.

    Attributes:
        path: The file.
        root: Folder inside the archive that holds everything.
        program: ``models/NAME.json``: graph, signature, schema version.
        weights: ``config`` of the weights: parameter name to payload description.
        constants: ``config`` of the constants, likewise.
    """

    path: Path
    root: str
    program: JsonObject
    weights: JsonObject
    constants: JsonObject

    def read_payloads(self) -> Iterator[tuple[str, bytes]]:
        """Yield ``(path_name, raw bytes)`` of every payload file, each once."""
        with zipfile.ZipFile(self.path) as archive:
            for folder, config in (("weights", self.weights), ("constants", self.constants)):
                for name in dict.fromkeys(payload["path_name"] for payload in config.values()):
                    yield name, archive.read(f"{self.root}data/{folder}/{name}")


def vet_pt2(path: Path) -> Pt2Archive:
    """Open a ``.pt2`` and refuse everything that is not raw tensors and a plain graph.

    Raises:
        UnsafeModel: A member, payload, operator or expression outside the allowlists.
        InvalidModel: Not such an archive, truncated, or of another schema version.

    Cost: reads the JSON members and the directory, no tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root, members = _vet_directory(archive, path)
            models = [m for m in members if m.startswith("models/")]
            if len(models) != 1:
                msg = f"'{path.name}' must hold exactly one model; it holds {len(models)}"
                raise InvalidModel(msg, models=models)  # noqa: TRY301
            name = PurePosixPath(models[0]).stem
            program = _read_json(archive, root + models[0], path)
            configs: dict[str, JsonObject] = {}
            for kind in ("weights", "constants"):
                member = f"data/{kind}/{name}_{kind}_config.json"
                if member not in members:
                    raise _foreign(path, f"the member {member} is missing")  # noqa: TRY301
                config = _read_json(archive, root + member, path).get("config")
                configs[kind] = _vet_payloads(config, kind, members, path)
    except BitquotaError:
        raise
    except Exception as err:  # zipfile has no error of its own for many a broken directory
        msg = (
            f"a .pt2 model must be the whole archive that torch.export.save writes; "
            f"'{path.name}' cannot be read: {err}"
        )
        raise InvalidModel(msg, path=str(path)) from err
    _vet_program(program, path)
    return Pt2Archive(
        path=path,
        root=root,
        program=program,
        weights=configs["weights"],
        constants=configs["constants"],
    )


def _vet_directory(archive: zipfile.ZipFile, path: Path) -> tuple[str, dict[str, int]]:
    members: dict[str, int] = {}
    roots = set()
    total = 0
    if any(name.endswith(("/constants.pkl", "/data.pkl")) for name in archive.namelist()):
        msg = (
            f"'{path.name}' is TorchScript or a pickled checkpoint, which run code when they are "
            f"read; provide {MODEL_WAYS}"
        )
        raise UnsafeModel(msg, source=str(path))
    for info in archive.infolist():
        root, _, inner = info.filename.partition("/")
        roots.add(root)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            msg = (
                f"members of a .pt2 must be stored as they are; '{info.filename:.120}' in "
                f"'{path.name}' is compressed or encrypted: write it with torch.export.save"
            )
            raise UnsafeModel(msg, member=info.filename)
        if inner in members:
            msg = f"members of a .pt2 must be unique; '{info.filename:.120}' appears twice"
            raise UnsafeModel(msg, member=info.filename)
        if not any(p.fullmatch(inner) for p in _ALLOWED_MEMBERS + _IGNORED_MEMBERS):
            msg = (
                f"a .pt2 must hold a graph and raw tensors only; '{path.name}' also holds "
                f"'{info.filename:.120}', which could run code" + _SAFE_WAY
            )
            raise UnsafeModel(msg, member=info.filename)
        members[inner] = info.file_size
        total += info.file_size
    if len(roots) != 1:
        raise _foreign(path, f"it has {len(roots)} top folders instead of one")
    if total > path.stat().st_size:
        msg = f"'{path.name}' claims {total:,} bytes of members, more than the file has"
        raise UnsafeModel(msg)
    root = roots.pop() + "/"
    if members.get("byteorder", 0) > 16 or (
        "byteorder" in members and archive.read(root + "byteorder") != b"little"
    ):
        raise _foreign(path, "the byte order is not little endian")
    return root, members


def _read_json(archive: zipfile.ZipFile, member: str, path: Path) -> JsonObject:
    if archive.getinfo(member).file_size > MAX_JSON_BYTES:
        msg = f"'{member}' of '{path.name}' must be at most {MAX_JSON_BYTES:,} bytes"
        raise UnsafeModel(msg, member=member)
    try:
        value = json.loads(archive.read(member))
    except (ValueError, RecursionError) as err:
        raise _foreign(path, f"'{member}' is not JSON ({err})") from err
    if not isinstance(value, dict):
        raise _foreign(path, f"'{member}' is not a JSON object")
    return value


def _vet_payloads(config: object, kind: str, members: dict[str, int], path: Path) -> JsonObject:
    if not isinstance(config, dict):
        raise _foreign(path, f"its {kind} config is not an object")
    file_name = re.compile(r"weight_\d+" if kind == "weights" else r"tensor_\d+")
    for name, payload in config.items():
        vet_parameter_name(name)
        if not isinstance(payload, dict) or not isinstance(payload.get("path_name"), str):
            raise _foreign(path, f"tensor '{name}' has no payload")
        file = payload["path_name"]
        if payload.get("use_pickle") is not False or not file_name.fullmatch(file):
            msg = (
                f"tensors of a .pt2 must be raw bytes; '{name}' of '{path.name}' is pickled "
                f"('{file}'), and reading a pickle runs code" + _SAFE_WAY
            )
            raise UnsafeModel(msg, tensor=name)
        if f"data/{kind}/{file}" not in members or not isinstance(payload.get("tensor_meta"), dict):
            raise _foreign(path, f"tensor '{name}' has no bytes or no description")
    return config


def _vet_program(program: JsonObject, path: Path) -> None:
    version = program.get("schema_version")
    if not isinstance(version, dict) or version.get("major") != SCHEMA_MAJOR:
        got = version.get("major") if isinstance(version, dict) else version
        msg = (
            f"a .pt2 must be of graph schema {SCHEMA_MAJOR}; '{path.name}' is of {got}: export it "
            "again with torch 2.9 or later"
        )
        raise InvalidModel(msg, schema=got)
    _walk(program, 0, path)
    module = program.get("graph_module")
    graph = module.get("graph") if isinstance(module, dict) else None
    if not isinstance(graph, dict):
        raise _foreign(path, "there is no graph")
    if _vet_graph(graph, path) > MAX_NODES:
        msg = f"the graph of '{path.name}' must have at most {MAX_NODES:,} calls"
        raise UnsafeModel(msg, limit=MAX_NODES)


def _vet_graph(graph: JsonObject, path: Path) -> int:
    """Vet every call of ``graph`` and of its subgraphs; return their number."""
    nodes = graph.get("nodes")
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise _foreign(path, "a graph has no list of calls")
    count = len(nodes)
    for node in nodes:
        vet_call(node)
        if node["target"] not in HIGHER_ORDER:
            continue
        bodies = [g for i in node["inputs"] if (g := i["arg"].get("as_graph")) is not None]
        body = bodies[0].get("graph") if len(bodies) == 1 and isinstance(bodies[0], dict) else None
        if not isinstance(body, dict):
            raise _foreign(path, f"a call of '{node['target']}' needs exactly one subgraph")
        count += _vet_graph(body, path)
    return count


def _walk(value: object, depth: int, path: Path) -> None:
    if depth > MAX_DEPTH:
        msg = f"the graph of '{path.name}' is nested deeper than {MAX_DEPTH} levels"
        raise UnsafeModel(msg)
    if isinstance(value, dict):
        for key, member in value.items():
            if key == "expr_str":
                vet_expression(member)
            elif key in ("as_custom_obj", "custom_obj", "as_operator") and member is not None:
                msg = f"a .pt2 must not hold custom objects or operators as values; got '{key}'"
                raise UnsafeModel(msg, member=key)
            _walk(member, depth + 1, path)
    elif isinstance(value, list):
        for member in value:
            _walk(member, depth + 1, path)


def vet_expression(text: object) -> None:
    """Raise ``UnsafeModel`` unless ``text`` is arithmetic on size symbols.

    Nothing here evaluates it; other readers of the same file would.
    """
    refusal = UnsafeModel(
        f"a shape expression must be arithmetic on sizes such as '2*s0 + 1'; got {text!r:.80}",
        expression=str(text)[:200],
    )
    if not isinstance(text, str) or len(text) > 1000:
        raise refusal
    try:
        holds = _is_size_arithmetic(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise refusal from err
    if not holds:
        raise refusal


def _is_size_arithmetic(node: ast.AST) -> bool:
    """Whether ``node`` is a number, a size symbol, or known functions and operators of such."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.Name):
        return _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name):
            return False
        if node.func.id == "Symbol":
            name = node.args[0] if len(node.args) == 1 else None
            return (
                isinstance(name, ast.Constant)
                and isinstance(name.value, str)
                and _SYMBOL.fullmatch(name.value) is not None
                and all(isinstance(k.value, ast.Constant) for k in node.keywords)
            )
        if node.func.id == "Pow":
            exponent = ast.unparse(node.args[-1]) if len(node.args) == 2 else ""
            return exponent in {"Integer(-1)", "Integer(2)"} and _is_size_arithmetic(node.args[0])
        known = node.func.id in _EXPRESSION_FUNCTIONS and not node.keywords
        return known and all(_is_size_arithmetic(arg) for arg in node.args)
    return isinstance(node, _ARITHMETIC) and all(
        _is_size_arithmetic(child) for child in ast.iter_child_nodes(node)
    )


def vet_parameter_name(name: object) -> None:
    """Raise ``UnsafeModel`` unless ``name`` is the dotted path of a tensor."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not PARAMETER_NAME.fullmatch(name):
        msg = (
            f"a tensor's name must be a dotted path of identifiers; got {name!r:.80}: rename the "
            "submodule and export again"
        )
        raise UnsafeModel(msg, tensor=str(name)[:MAX_NAME])


def _foreign(path: Path, what: str) -> InvalidModel:
    msg = f"a .pt2 model must be what torch.export.save writes; in '{path.name}', {what}"
    return InvalidModel(msg, path=str(path))
