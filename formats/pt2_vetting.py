"""Read a ``.pt2`` archive without running anything in it.

``torch.export.load`` is not safe on a stranger's file: pickled weights, sample inputs, opaque
constants and shape expressions (which reach ``sympify``, that is ``eval``) all run code. So the
file is taken apart here with ``zipfile`` and ``json`` alone: members outside a fixed set are
refused, only raw tensors and allowlisted operators remain, and nothing is ever evaluated. The
graph is then rebuilt by ``pt2_model``. This module imports no torch, so that a server can vet an
upload. It narrows what a file can do; a sandbox is still the boundary for strangers' models.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bitquota.errors import InvalidModel, UnsafeModel

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
    "or hand in a Hugging Face folder with safetensors"
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

PARAMETER_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""Names become attribute paths of modules, and nothing else may stand in them."""

VALUE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_ATEN = re.compile(r"torch\.ops\.aten\.([a-z_0-9A-Z]+)\.([A-Za-z_0-9]+)")
_PRIVATE_ATEN = frozenset(
    {
        "__and__", "__or__", "__xor__", "__lshift__", "__rshift__",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_scalar",
        "_assert_tensor_metadata", "_conv_depthwise2d", "_convolution", "_log_softmax",
        "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_to_copy",
        "_unsafe_index", "_unsafe_view", "_weight_norm_interface",
        "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d",
        "_local_scalar_dense",
    }
)  # fmt: skip
_REFUSED_ATEN = frozenset({"from_file", "save", "load", "warn", "set_", "set", "resize_"})
HIGHER_ORDER = frozenset(
    {
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "torch.ops.higher_order.wrap_with_autocast",
    }
)
"""Wrappers around a subgraph, which is vetted like the graph itself and inlined."""

PYTHON_OPERATORS = frozenset(
    {"_operator." + name for name in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "pos",
    )}
    | {"math." + name for name in ("ceil", "floor", "trunc", "sqrt")}
    | {"torch." + name for name in (
        "sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_sum", "sym_ite",
    )}
)  # fmt: skip
"""Scalar arithmetic on sizes."""

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
                raise InvalidModel(msg, models=models)
            name = PurePosixPath(models[0]).stem
            program = _read_json(archive, root + models[0], path)
            configs: dict[str, JsonObject] = {}
            for kind in ("weights", "constants"):
                member = f"data/{kind}/{name}_{kind}_config.json"
                if member not in members:
                    raise _foreign(path, f"the member {member} is missing")
                config = _read_json(archive, root + member, path).get("config")
                configs[kind] = _vet_payloads(config, kind, members, path)
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, NotImplementedError) as err:
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


def vet_operator(target: object) -> None:
    """Raise ``UnsafeModel`` unless ``target`` is an operator that a graph may call."""
    if not isinstance(target, str):
        msg = f"an operator must be named by a text; got {target!r}"
        raise UnsafeModel(msg)
    if target in PYTHON_OPERATORS or target in HIGHER_ORDER:
        return
    found = _ATEN.fullmatch(target)
    if found:
        name = found[1]
        private = name.startswith("_") and name not in _PRIVATE_ATEN
        if not private and name not in _REFUSED_ATEN:
            return
    msg = (
        f"a .pt2 may only call aten operators and arithmetic on sizes; got '{target}': export "
        "the model without custom operators, or hand in a Hugging Face folder"
    )
    raise UnsafeModel(msg, operator=target)


def _vet_directory(archive: zipfile.ZipFile, path: Path) -> tuple[str, dict[str, int]]:
    members: dict[str, int] = {}
    roots = set()
    total = 0
    for info in archive.infolist():
        root, _, inner = info.filename.partition("/")
        roots.add(root)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            msg = (
                f"members of a .pt2 must be stored as they are; '{info.filename}' in "
                f"'{path.name}' is compressed or encrypted: write it with torch.export.save"
            )
            raise UnsafeModel(msg, member=info.filename)
        if inner in members:
            msg = f"members of a .pt2 must be unique; '{info.filename}' appears twice"
            raise UnsafeModel(msg, member=info.filename)
        if not any(p.fullmatch(inner) for p in _ALLOWED_MEMBERS + _IGNORED_MEMBERS):
            msg = (
                f"a .pt2 must hold a graph and raw tensors only; '{path.name}' also holds "
                f"'{info.filename}', which could run code" + _SAFE_WAY
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
        if not PARAMETER_NAME.fullmatch(name):
            msg = (
                f"a tensor's name must be a dotted path of identifiers; got {name!r}: rename the "
                "submodule and export again"
            )
            raise UnsafeModel(msg, tensor=name)
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
            elif key == "nodes" and isinstance(member, list):
                for node in member:
                    vet_operator(node.get("target") if isinstance(node, dict) else node)
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
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise refusal from err
    if not _is_size_arithmetic(tree.body):
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


def _foreign(path: Path, what: str) -> InvalidModel:
    msg = f"a .pt2 model must be what torch.export.save writes; in '{path.name}', {what}"
    return InvalidModel(msg, path=str(path))
