"""A seeded mutator of valid ``.pt2``, ONNX, safetensors and ``.npz`` files.

``mutate(data, suffix, seed)`` takes a whole file and returns it with one to four changes: at any
text, number, list or key of its JSON, protobuf or array headers, in the directory of its zip, or in
its bytes (cut short, doubled, flipped). Equal arguments give equal bytes.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import struct
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SUFFIXES = (".pt2", ".onnx", ".safetensors", ".npz")

TEXTS = (
    "", "x", "\x00", "ü", "a" * 10_000, "../../../../etc/passwd", "/proc/self/environ", "a.b.c",
    "__class__", "__globals__", "forward", "_parameters", "training", "__import__('os').getpid()",
    "().__class__.__mro__[-1].__subclasses__()", "s0", "Symbol('s0')", "9**9**9", "s0 ** s0",
    "torch.ops.aten.relu6.__getattribute__", "torch.ops.aten.relu.default", "torch.load",
    "torch.ops.aten.from_file.default", "torch.ops.aten.set_.source_Tensor", "_operator.pow",
    "torch.ops.aten.full.default", "torch.ops.aten.empty.memory_format", "_operator.attrgetter",
    "torch.ops.higher_order.wrap_with_set_grad_enabled", "torch.ops.prim.device.default",
    "os.system", "builtins.eval", "weight_0", "tensor_0", "model.pt", "opaque_obj_0", "Infinity",
    "NaN", "-1", "1e999", "|O", "<f4", "<U4000000000", "O", "F32", "F8_E4M3", "Loop", "If",
    "location", "*/_ORT_MEM_ADDR_/*", "com.microsoft", "{" * 200, "[" * 5000, "%s%n", "\ud800",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 7, 255, 65_536, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63,
    -(2**63), -(2**63) - 1, 2**64, 10**30, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
)  # fmt: skip

_KEYS = (
    "as_none", "as_tensor", "as_tensors", "as_int", "as_ints", "as_float", "as_floats", "as_string",
    "as_sym_int", "as_bool", "as_graph", "as_operator", "as_custom_obj", "as_optional_tensors",
    "as_string_to_argument", "as_scalar_type", "as_complex", "expr_str", "nodes", "graph", "name",
    "target", "use_pickle", "path_name", "data_offsets", "shape", "dtype", "__metadata__",
)  # fmt: skip


def mutate(data: bytes, suffix: str, seed: int) -> bytes:
    """Return ``data``, a valid file of kind ``suffix``, with one to four changes.

    Raises:
        KeyError: The suffix is none of ``SUFFIXES``.
    """
    rng = random.Random(f"{suffix} {seed}")  # noqa: S311  # reproducible, not secret
    structured = _MUTATORS[suffix]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        change = structured if rng.random() < 0.8 else _mutate_bytes
        try:
            data = change(data, rng)
        except Exception:  # noqa: BLE001  # zipfile, zlib, json, protobuf, each has its own
            data = _mutate_bytes(data, rng)  # an earlier change left nothing to take apart
    return data


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, double, drop, insert or flip; mostly near the ends, where formats keep structure."""
    if not data:
        return bytes(rng.randrange(256) for _ in range(8))

    def position() -> int:
        near = min(len(data), 2048)
        first = rng.randrange(near)
        return rng.choice((first, len(data) - 1 - first, rng.randrange(len(data))))

    a, b = sorted((position(), position()))
    b = min(b, a + rng.choice((1, 4, 64, 10**9)))
    match rng.randrange(7):
        case 0:
            return data[:a]
        case 1:
            return data[a:]
        case 2:
            return data[:b] + data[a:b] + data[b:]
        case 3:
            return data[:a] + data[b:]
        case 4:
            return data[:a] + rng.randbytes(rng.choice((1, 4, 32))) + data[a:]
        case 5:
            number = struct.pack("<q", rng.choice((0, -1, 2**31, 2**63 - 1, len(data))))
            return data[:a] + number[: rng.choice((2, 4, 8))] + data[a + 8 :]
        case _:
            flipped = bytearray(data)
            for _ in range(rng.choice((1, 1, 8))):
                flipped[position()] ^= 1 << rng.randrange(8)
            return bytes(flipped)


def mutate_json(value: Any, rng: random.Random) -> Any:  # any JSON value
    """Return a copy of ``value`` with one change somewhere inside it."""
    root = [copy.deepcopy(value)]
    places = list(_places(root))
    if rng.random() < 0.5:  # every place alike
        holder, key = rng.choice(places)
    else:  # or every branch alike, so that a thousand tensors do not hide the graph
        holder, key = root, 0
        while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.9:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    other = rng.choice(places)
    match rng.randrange(8):
        case 0:  # another value of the same file
            holder[key] = copy.deepcopy(other[0][other[1]])
        case 1:
            del holder[key]
        case 2 if isinstance(holder, dict):
            holder[rng.choice((*_KEYS, *TEXTS))] = holder.pop(key)
        case 3 if isinstance(holder, dict):
            holder[rng.choice(_KEYS)] = copy.deepcopy(other[0][other[1]])
        case 4 if isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * rng.choice((1, 3, 1000))
        case 5:
            for _ in range(rng.choice((1, 3, 70))):
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"as_graph": holder[key]}
        case _:
            holder[key] = _mutate_scalar(holder[key], rng)
    return root[0] if root else None


def _places(holder: Any) -> Any:  # pairs of a container and a key
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from _places(holder[key])


def _mutate_scalar(value: Any, rng: random.Random) -> Any:  # any JSON value
    if rng.random() < 0.2:
        return rng.choice((None, True, False, [], {}, [[]], rng.choice(NUMBERS), rng.choice(TEXTS)))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((rng.choice(TEXTS), value[:cut], value + value, value[:cut] + "_" * 3))
    if isinstance(value, (int, float)):
        near = (value + 1, value - 1, -value, value * 1000, str(value), [value])
        return rng.choice((*near, *rng.choices(NUMBERS, k=6)))
    return rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS)))


def _mutate_zip(
    data: bytes, rng: random.Random, change: Callable[[str, bytes, random.Random], bytes]
) -> bytes:
    """Change a member, its name, or which members there are, and write a whole zip again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(i.filename, archive.read(i)) for i in archive.infolist()]
    k = rng.randrange(len(members))
    name, content = members[k]
    match rng.randrange(12):
        case 0:
            del members[k]
        case 1:
            root, _, inner = name.partition("/")
            new = rng.choice((*TEXTS[:12], f"{root}/{rng.choice(TEXTS)}", inner, f"b/{inner}"))
            members[k] = (new.replace("\ud800", "?"), content)
        case 2:
            members[k] = (name, rng.choice(members)[1])
        case 3:
            members[k] = (name, _mutate_bytes(content, rng))
        case _:
            # Mostly the members that are structure, not numbers of a weight.
            small = [m for m in members if m[0].endswith((".json", ".npy"))] or members
            name, content = rng.choice(small)
            k = next(i for i, m in enumerate(members) if m[0] == name)
            members[k] = (name, change(name, content, rng))
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for member, content in {n.partition("\x00")[0] or "x": c for n, c in members}.items():
            info = zipfile.ZipInfo(member)  # not the time of day
            info.compress_type = kind
            archive.writestr(info, content)
    return buffer.getvalue()


def _mutate_pt2(data: bytes, rng: random.Random) -> bytes:
    def change(name: str, content: bytes, rng: random.Random) -> bytes:
        if not name.endswith(".json"):
            return _mutate_bytes(content, rng)
        return _as_json(mutate_json(json.loads(content), rng))

    return _mutate_zip(data, rng, change)


def _mutate_npz(data: bytes, rng: random.Random) -> bytes:
    return _mutate_zip(data, rng, lambda _, content, rng: _mutate_npy(content, rng))


def _mutate_npy(data: bytes, rng: random.Random) -> bytes:
    """Change the header of an array, which is a literal of Python."""
    length = int.from_bytes(data[8:10], "little")
    header, rest = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    spots = [m.span() for m in re.finditer(r"'[^']*'|\d+|True|False|\(.*?\)", header)]
    start, end = rng.choice(spots) if spots else (0, len(header))
    old = header[start:end]
    number, text = rng.choice(NUMBERS), rng.choice(TEXTS)
    new = rng.choice(
        (
            repr(number), repr(text), text, "None", "lambda: 0", "(1,) * 9", f"({number},)",
            "[('a', '|O')]", "'|O'", "'<f8'", "'>f4'", "'<U7'", "'V8'", "'<M8[ns]'", "(", old + old,
            "(" * 300, "__import__('os').getpid()",
        )
    )  # fmt: skip
    changed = (header[:start] + new + header[end:]).encode("utf-8", "surrogatepass")[:65_000]
    size = rng.choice((len(changed), len(changed), len(changed), 0, 65_535))
    magic = data[:8] if rng.random() < 0.95 else rng.randbytes(8)
    return magic + struct.pack("<H", size) + changed + rest


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _as_json(mutate_json(json.loads(data[8 : 8 + length]), rng))
    size = len(header) if rng.random() < 0.95 else rng.choice((0, length, 2**40, 2**63))
    return struct.pack("<Q", size) + header + data[8 + length :]


def _mutate_onnx(data: bytes, rng: random.Random) -> bytes:
    """Change one field of one message of the protobuf, by its declared type."""
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as err:
        raise ValueError(err) from err
    message: Any = model
    while True:  # every branch alike
        inner = [
            (field, value)
            for field, value in message.ListFields()
            if field.message_type is not None and value
        ]
        if not inner or (message is not model and rng.random() < 0.3):
            break
        field, value = rng.choice(inner)
        message = rng.choice(list(value)) if field.is_repeated else value
    _mutate_message(message, rng)
    return bytes(model.SerializeToString())


def _mutate_message(message: Any, rng: random.Random) -> None:  # protobuf
    fields = [f for f, _ in message.ListFields()]
    if rng.random() < 0.2 or not fields:
        fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    name = field.name
    if field.message_type is not None:
        if not field.is_repeated:
            message.ClearField(name)
        elif (items := list(getattr(message, name))) and rng.random() < 0.5:
            items.insert(rng.randrange(len(items)), copy.deepcopy(rng.choice(items)))
            _replace(message, name, items)
        elif items:
            _replace(message, name, rng.sample(items, len(items) - 1))
        else:
            getattr(message, name).add()
        return
    if field.is_repeated:
        items = list(getattr(message, name))
        spot = rng.randrange(len(items) + 1)
        items[spot : spot + rng.randrange(2)] = [_protobuf_value(field, None, rng)]
        _replace(message, name, items)
    else:
        setattr(message, name, _protobuf_value(field, getattr(message, name), rng))


def _replace(message: Any, name: str, items: list[Any]) -> None:  # protobuf
    items = [copy.deepcopy(item) for item in items]
    message.ClearField(name)
    getattr(message, name).extend(items)


def _protobuf_value(field: Any, old: Any, rng: random.Random) -> Any:  # protobuf
    if field.cpp_type == field.CPPTYPE_STRING:
        text = rng.choice((*TEXTS, str(old), "1", "0")).replace("\ud800", "?")
        if field.type != field.TYPE_BYTES:
            return text
        return _mutate_bytes(old, rng) if old and rng.random() < 0.7 else text.encode()
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.choice([v.number for v in field.enum_type.values])
    if field.cpp_type == field.CPPTYPE_BOOL:
        return not old
    wide = field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64)
    low = 0 if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64) else None
    high = 2 ** (64 if low == 0 else 63) - 1 if wide else 2 ** (32 if low == 0 else 31) - 1
    near = [] if old is None else [old + 1, old - 1, old * 1000]
    fitting = [
        n
        for n in (*NUMBERS, *near)
        if isinstance(n, int) and (-high - 1 if low is None else 0) <= n <= high
    ]
    return rng.choice(fitting)


def _as_json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


_MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".pt2": _mutate_pt2,
    ".onnx": _mutate_onnx,
    ".safetensors": _mutate_safetensors,
    ".npz": _mutate_npz,
}
