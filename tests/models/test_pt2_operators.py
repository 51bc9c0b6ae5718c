"""The operators a .pt2 may call, and the vetting of calls."""

from __future__ import annotations

import json
import math
import zipfile

import pytest
import torch
from torch import nn

import aten_operators
from bitquota.errors import InvalidModel, UnsafeModel
from bitquota.models.pt2.build import build_pt2
from bitquota.models.pt2.operators import (
    SIZE_OPERATORS,
    parameters_of,
    split_arguments,
    vet_call,
    vet_operator,
)
from bitquota.models.pt2.size_arithmetic import size_function
from bitquota.models.pt2.vetting import vet_pt2
from format_networks import write_pt2

X = {"as_tensor": {"name": "x"}}


def call(target: str, **arguments: object) -> dict[str, object]:
    """Return a node of a graph."""
    inputs = [{"name": name, "arg": arg, "kind": 1} for name, arg in arguments.items()]
    return {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": "y"}}]}


def targets() -> list[str]:
    """Return every listed operator as a graph names it."""
    lines = aten_operators.FILE.read_text("utf-8").splitlines()
    names = [line[: line.index("(")].removeprefix("aten::").partition(".") for line in lines]
    return [f"torch.ops.aten.{name}.{overload or 'default'}" for name, _, overload in names]


class TestTable:
    def test_is_what_this_torch_declares(self):
        """After an update of torch: run ``python tests/aten_operators.py``, read, commit."""
        stored = aten_operators.FILE.read_text("utf-8").splitlines()
        assert stored == aten_operators.forward_operators()

    def test_every_schema_is_understood(self):
        """The vetter reads the same arguments from the text as torch does."""
        for target in targets():
            vet_operator(target)
            _, _, _, name, overload = target.split(".")
            declared = torch._C._get_schema(
                f"aten::{name}", "" if overload == "default" else overload
            ).arguments
            parsed = parameters_of(target)
            assert [a.name for a in declared] == list(parsed)
            for argument in declared:
                parameter = parsed[argument.name]
                assert parameter.keyword_only == argument.kwarg_only, target
                assert parameter.required == (not argument.has_default_value()), target
                assert ("as_none" in parameter.kinds) == isinstance(
                    argument.type, torch.OptionalType
                ), target

    @pytest.mark.parametrize(
        "name",
        [
            "from_file", "set_", "set_data", "resize_", "resize_as_", "rand", "randn_like",
            "normal", "bernoulli", "multinomial", "randperm", "requires_grad_", "record_stream",
            "save", "manual_seed", "set_num_threads", "to_sparse", "embedding_renorm_",
        ],
    )  # fmt: skip
    def test_side_effects_are_not_listed(self, name):
        """No files, storage, threads, global state or random numbers."""
        assert not [t for t in targets() if t.startswith(f"torch.ops.aten.{name}.")]

    def test_nothing_writes_into_outputs(self):
        """``out=`` variants would resize tensors."""
        assert not [t for t in targets() if "out" in parameters_of(t)]


class TestVetOperator:
    @pytest.mark.parametrize(
        "target",
        [
            "torch.ops.aten.relu6.__getattribute__", "torch.ops.aten.relu6.__setattr__",
            "torch.ops.aten.relu6.__call__", "torch.ops.aten.relu6.overloads",
            "torch.ops.aten.relu6._op", "torch.ops.aten.relu6.op", "torch.ops.aten.name.format",
            "torch.ops.aten.__class__.default", "torch.ops.aten.relu", "torch.ops.aten.relu.",
            "torch.ops.aten.relu.default.default", "torch.ops.prim.device.default",
            "torch.os.system", "torch.load", "torch.hub.load", "_operator.attrgetter",
            "_operator.methodcaller", "_operator.getitem", "_operator.lshift", "_operator.call",
            "math.__loader__", "math.factorial", "torch.ops.higher_order.cond",
            "torch.ops.aten.relu.default ", "", None, 3, ["torch.ops.aten.relu.default"],
        ],
    )  # fmt: skip
    def test_refused(self, target):
        """Attributes of operators, callables of modules, and whatever is not listed."""
        with pytest.raises(UnsafeModel):
            vet_operator(target)


class TestVetCall:
    @pytest.mark.parametrize(
        "node",
        [
            call("torch.ops.aten.relu.default", self=X),
            call("torch.ops.aten.mul.Tensor", self=X, other={"as_float": 2.0}),
            call("torch.ops.aten.masked_fill.Scalar", self=X, mask=X, value={"as_float": "NaN"}),
            call(
                "torch.ops.aten.slice.Tensor",
                self=X, dim={"as_int": 0}, start={"as_none": True}, end={"as_int": 2**63 - 1},
            ),
            call("torch.ops.aten.expand.default", self=X, size={"as_ints": [2, -1, 4]}),
            call(
                "torch.ops.aten.view.default",
                self=X, size={"as_sym_ints": [{"as_name": "s0"}, {"as_int": 4}]},
            ),
            call("torch.ops.aten.pad.default", self=X, pad={"as_ints": [1000] * 8}),
            call("_operator.mul", a={"as_sym_int": {"as_name": "s0"}}, b={"as_int": 2}),
        ],
    )  # fmt: skip
    def test_honest(self, node):
        """What torch.export writes passes."""
        vet_call(node)

    @pytest.mark.parametrize(
        ("node", "sentence"),
        [
            (call("torch.ops.aten.relu.default"), "needs self"),
            (call("torch.ops.aten.relu.default", self=X, x=X), "no argument 'x'"),
            (call("torch.ops.aten.relu.default", self={"as_string": "x"}), "cannot be"),
            (call("torch.ops.aten.relu.default", self={"as_tensor": {"name": "a.b"}}), "plain"),
            (call("torch.ops.aten.relu.default", self={"as_none": True}), "cannot be"),
            (call("torch.ops.aten.relu.default", self=None), "exactly one kind"),
            (call("torch.ops.aten.relu.default", self={**X, "as_int": 1}), "exactly one kind"),
            (call("torch.ops.aten.relu.default", self={"as_graph": {}}), "plain"),
            (call("torch.ops.aten.relu.default", self={"as_operator": "x"}), "plain"),
            (call("torch.ops.aten.expand.default", self=X, size={"as_string": "3"}), "cannot"),
            (call("torch.ops.aten.expand.default", self=X, size={"as_ints": ["3"]}), "plain"),
            (call("torch.ops.aten.expand.default", self=X, size={"as_ints": [True]}), "plain"),
            (call("torch.ops.aten.expand.default", self=X, size={"as_ints": [2**63]}), "plain"),
            (
                call("torch.ops.aten.expand.default", self=X, size={"as_ints": [1] * 10**5}),
                "plain",
            ),
            (
                call(
                    "torch.ops.aten.full.default",
                    size={"as_ints": [10**6, 10**7]}, fill_value={"as_int": 0},
                ),
                "at most 2",
            ),
            (call("torch.ops.aten.arange.default", end={"as_int": 10**15}), "at most 2"),
            (
                call(
                    "torch.ops.aten.zeros.default",
                    size={"as_sym_ints": [{"as_name": "s0"}, {"as_int": 10**15}]},
                ),
                "at most 2",
            ),
            (
                call("torch.ops.aten.einsum.default", equation={"as_string": "i" * 2000}),
                "plain",
            ),
            (call("_operator.add", a={"as_int": 1}), "takes 2 numbers"),
            (call("_operator.add", a={"as_int": 1}, b={"as_string": "a"}), "takes 2 numbers"),
            (call("_operator.add", a={"as_int": 1}, b=X), "takes 2 numbers"),
            ({"target": "torch.ops.aten.relu.default", "inputs": {"self": X}}, "list of named"),
            ({"target": "torch.ops.aten.relu.default"}, "list of named"),
        ],
    )  # fmt: skip
    def test_refused(self, node, sentence):
        """Missing, unknown, mistyped, unbounded and callable arguments."""
        with pytest.raises(UnsafeModel, match=sentence):
            vet_call(node)

    def test_an_argument_given_twice(self):
        """Readers would pick different ones."""
        node = call("torch.ops.aten.relu.default", self=X)
        node["inputs"] = [*node["inputs"], *node["inputs"]]
        with pytest.raises(UnsafeModel, match="twice"):
            vet_call(node)


class TestSplitArguments:
    def test_positions_end_at_the_first_gap(self):
        """What comes after a default that was left out is given by name."""
        names = ["self", "end", "dim"]
        split = split_arguments("torch.ops.aten.slice.Tensor", names)
        assert split == (["self", "dim"], ["end"])


class TestSizeFunction:
    def test_every_operator_has_one(self):
        """The vetter's list and the functions agree, with the numbers of their arguments."""
        for target, count in SIZE_OPERATORS.items():
            operands = {"torch.sym_sum": ([1, 2],), "torch.sym_ite": (True, 2, 3)}
            assert size_function(target)(*operands.get(target, (1,) * count)) is not None

    @pytest.mark.parametrize(
        ("name", "operands"),
        [
            ("pow", (9, 10**9)), ("pow", (2**62, 64)), ("pow", (0, -1)), ("mul", (2**40, 2**40)),
            ("floordiv", (1, 0)), ("pow", (9.0, 10**9)), ("add", (2**63 - 1, 1)),
        ],
    )  # fmt: skip
    def test_results_stay_within_64_bits(self, name, operands):
        """Nothing explodes."""
        with pytest.raises(InvalidModel, match="within 64 bits"):
            size_function("_operator." + name)(*operands)

    @pytest.mark.parametrize("operand", ["a", [1], None, torch.zeros(2), print])
    def test_numbers_only(self, operand):
        """Texts, lists, tensors and functions are refused."""
        with pytest.raises(InvalidModel, match="from numbers"):
            size_function("_operator.mul")(operand, 3)


class Masked(nn.Module):
    """Causal attention by hand: masks with minus infinity, sizes from shapes, in-place steps."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[batch, length, 8]``."""
        q, k, v = self.qkv(x).chunk(3, -1)
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(1, 2) * self.scale / math.sqrt(8)).masked_fill_(mask, -math.inf)
        y = scores.softmax(-1) @ v
        y = torch.cat([y, torch.full((x.shape[0], 1, 8), 2.0)], 1)
        return y[:, :length].reshape(x.shape[0], length * 4, 2).flatten(1).add_(1)


class TestBuild:
    def test_honest_calls(self, tmp_path):
        """A graph with masks, factories, slices and sizes gives the same bits at any batch."""
        net, x = Masked().eval(), torch.randn(3, 5, 8)
        built = build_pt2(vet_pt2(write_pt2(net, (x,), tmp_path / "m.pt2")))
        wider = torch.randn(7, 5, 8)
        with torch.no_grad():
            assert torch.equal(net(wider), built.module(wider))

    @pytest.mark.parametrize("name", ["forward", "__class__", "_parameters", "training"])
    def test_a_graph_reads_tensors_only(self, tiny_pt2, tmp_path, name):
        """The name of a parameter never becomes an attribute of the module."""
        target = tmp_path / "m.pt2"
        with (
            zipfile.ZipFile(tiny_pt2) as source,
            zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive,
        ):
            for info in source.infolist():
                data = source.read(info)
                if info.filename.endswith("models/model.json"):
                    program = json.loads(data)
                    specs = program["graph_module"]["signature"]["input_specs"]
                    specs[0]["parameter"]["parameter_name"] = name
                    data = json.dumps(program).encode()
                archive.writestr(info.filename, data)
        with pytest.raises((InvalidModel, UnsafeModel), match=r"lacks|dotted path"):
            build_pt2(vet_pt2(target))
