"""What a model is known by: its weights, and what it computes with them."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bitquota.errors import StalePlan
from bitquota.models.identity import (
    NOT_TRACED,
    computation_of,
    model_fingerprint,
    weights_fingerprint,
)
from bitquota.models.load import load_model
from bitquota.models.loaded import Recognised, check_model, finish, recognise
from bitquota.models.onnx.identity import graph_digest
from bitquota.plan import ONLY_WEIGHTS
from format_networks import plan_with, tiny_net, write_pt2
from onnx_graphs import image_graph, token_graph


class Scaled(nn.Module):
    """A layer, something done to its output, and a number."""

    def __init__(self, act: object, factor: float = 1.0) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        nn.init.constant_(self.inner.weight, 0.5)
        nn.init.constant_(self.inner.bias, 0.25)
        self.act, self.factor = act, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.inner(x)) * self.factor


class Branching(Scaled):
    """Cannot be traced: it looks at values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Noisy(Scaled):
    """Draws a constant on every call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand(4)


class Counting(Scaled):
    """Computes something else on every call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.factor += 1
        return super().forward(x)


NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, branches):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.branches, self.names = nn.Linear(4, 4), branches, {"a", "b", "c"}

    def forward(self, x):
        return torch.tanh(self.inner(x)) if not self.branches or x.sum() > 0 else x


def traced():
    return Net(False)


def branching():
    return Net(True)
"""


class TestModelFingerprint:
    def test_sees_a_single_changed_weight(self):
        """Any byte counts, buffers included."""
        module = tiny_net()
        before = model_fingerprint(module)
        assert before == model_fingerprint(copy.deepcopy(module))
        module.norm.running_mean[0] += 1e-6
        assert before != model_fingerprint(module)

    def test_does_not_depend_on_the_mode_or_memory_layout(self):
        """Only on values and computation."""
        module = tiny_net()
        before = model_fingerprint(module)
        module.train()
        module.conv.weight.data = module.conv.weight.data.to(memory_format=torch.channels_last)
        assert before == model_fingerprint(module)

    @pytest.mark.parametrize("kind", [Scaled, Branching])
    @pytest.mark.parametrize(
        "other",
        [
            lambda kind: kind(nn.Tanh()),
            lambda kind: kind(nn.LeakyReLU()),
            lambda kind: kind(torch.sin),
            lambda kind: kind(functools.partial(torch.clamp, min=0.5)),
            lambda kind: kind(nn.ReLU(), 2.0),
            lambda kind: kind(lambda x: x * 2),
        ],
    )
    def test_sees_what_is_computed_with_the_same_weights(self, kind, other):
        """Activations, their settings, functions, numbers: traced or described."""
        one, two = kind(nn.ReLU()).eval(), other(kind).eval()
        assert weights_fingerprint(one) == weights_fingerprint(two)
        assert model_fingerprint(one) != model_fingerprint(two)
        assert model_fingerprint(one) == model_fingerprint(kind(nn.ReLU()).eval())

    def test_sees_which_input_has_which_name(self):
        """Samples go to inputs by their names."""

        class Left(Scaled):
            def forward(self, left, right):
                return self.inner(left) - right

        class Right(Scaled):
            def forward(self, right, left):
                return self.inner(right) - left

        act = nn.Identity()
        assert model_fingerprint(Left(act)) != model_fingerprint(Right(act))

    def test_sees_a_hook(self):
        """It changes what a layer returns."""
        net = tiny_net()
        before = model_fingerprint(net)
        net.head.register_forward_hook(lambda module, args, output: output * 2)
        assert before != model_fingerprint(net)

    def test_sees_a_buffer_that_is_rebuilt_on_loading(self):
        """Such as the frequencies of rotary positions: no file stores it."""
        nets = []
        for value in (1.0, 2.0):
            net = Branching(nn.ReLU())
            net.register_buffer("table", torch.tensor(value), persistent=False)
            nets.append(net.eval())
        assert len({model_fingerprint(net) for net in nets}) == 2

    @pytest.mark.parametrize("kind", [Noisy, Branching, Counting])
    def test_leaves_the_module_as_it_was(self, kind):
        """The tracer keeps constants in the module, and must not."""
        net = kind(nn.ReLU()).eval()
        names = set(vars(net))
        assert model_fingerprint(net) == model_fingerprint(kind(nn.ReLU()).eval())
        assert names == set(vars(net))

    def test_untraced_modules_say_so(self):
        """What looks at values cannot be traced; what is traced needs no note."""
        assert not computation_of(Branching(nn.ReLU()).eval()).traced
        note = finish(Branching(nn.ReLU()), source="b", architecture="B").identity_note
        assert note == NOT_TRACED
        assert finish(tiny_net(), source="t", architecture="T").identity_note == ""

    @pytest.mark.slow
    def test_is_equal_in_every_process(self, tmp_path):
        """Hash seeds and addresses do not count."""
        token_graph(tmp_path / "t.onnx")
        (tmp_path / "nets.py").write_text(NETS)
        program = (
            "from bitquota.models.load import load_model\n"
            "for spec in ('nets:traced', 'nets:branching', 't.onnx'):"
            " print(load_model(spec).digest)"
        )
        found = {
            subprocess.run(
                [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True
            ).stdout
            for _ in range(2)
        }
        assert len(found) == 1
        assert len(found.pop().split()) == 3


class TestWeightsFingerprint:
    def test_is_the_documented_hash(self):
        """sha256 over name, dtype, shape and bytes, sorted by name; earlier plans have it."""
        module = nn.Linear(2, 1)
        state = hashlib.sha256()
        for name in ("bias", "weight"):
            tensor = getattr(module, name).detach()
            shape = "x".join(map(str, tensor.shape))
            state.update(f"{name}|float32|{shape}|".encode() + tensor.numpy().tobytes())
        assert f"sha256:{state.hexdigest()}" == weights_fingerprint(module)


class TestLoaded:
    def test_config_counts(self, llama_folder, tmp_path):
        """The same weights with another base of the rotations are another model."""
        digests = {}
        for name, changes in (
            ("same", {}),
            ("theta", {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}),
            ("label", {"id2label": {"0": "x"}, "transformers_version": "1.2", "dtype": "float16"}),
        ):
            folder = tmp_path / name
            folder.mkdir()
            for file in Path(llama_folder).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            config = json.loads((folder / "config.json").read_text()) | changes
            (folder / "config.json").write_text(json.dumps(config))
            digests[name] = load_model(str(folder)).digest
        assert digests["same"] == digests["label"] == load_model(str(llama_folder)).digest
        assert digests["same"] != digests["theta"]

    def test_exported_graph_counts(self, tmp_path):
        """Two programs over the same parameters."""
        x = (torch.randn(2, 4),)
        found = [
            load_model(str(write_pt2(Scaled(act).eval(), x, tmp_path / f"{k}.pt2")))
            for k, act in enumerate((nn.ReLU(), nn.Tanh(), nn.ReLU()))
        ]
        assert len({weights_fingerprint(m.module) for m in found}) == 1
        assert found[0].digest == found[2].digest != found[1].digest

    def test_plans_of_earlier_releases_are_recognised(self):
        """By the digest of the weights; the note says what that does not cover."""
        net = load_model("format_networks:tiny_net")
        plan = plan_with(net, (torch.randn(2, 3, 8, 8),))
        assert check_model(plan, net) == ""
        import dataclasses

        old = dataclasses.replace(plan, model_digest=weights_fingerprint(net.module))
        assert check_model(old, net) == ONLY_WEIGHTS
        other = finish(tiny_net(seed=1), source="other", architecture="TinyNet")
        assert recognise(old.model_digest, other) is Recognised.OTHER
        with pytest.raises(StalePlan):
            check_model(old, other)


def relu_graph(op: str = "Relu", **attributes: object) -> onnx.ModelProto:
    """Return MatMul, ``op``, MatMul."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(6, 6)).astype(np.float32), name)
        for name in ("w", "v")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node(op, ["h"], ["r"], "act", **attributes),
        helper.make_node("MatMul", ["r", "v"], ["y"], "second"),
    ]
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["n", 6])], [value("y", TensorProto.FLOAT, ["n", 6])]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph with other names of nodes, values and initializers."""
    for node in model.graph.node:
        node.name = f"n/{node.name}"
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = name if name in ("x", "y") else f"v/{name}"
    for tensor in model.graph.initializer:
        tensor.name = f"v/{tensor.name}"
    return model


def reordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it with its initializers in reverse."""
    tensors = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    return model


def documented(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it with documentation and metadata of all kinds."""
    model.producer_name, model.doc_string, model.model_version = "someone", "text", 7
    model.graph.name = model.graph.doc_string = "other"
    model.ir_version = 9
    for node in model.graph.node:
        node.doc_string = "text"
        entry = node.metadata_props.add()
        entry.key, entry.value = "a", "b"
    helper.set_model_props(model, {"a": "b"})
    return model


def floats_in_place_of_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it with tensors written as numbers."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).reshape(-1).tolist()
        tensor.ClearField("raw_data")
        tensor.float_data.extend(values)
    return model


def opset_22(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it under another version of the operators."""
    model.opset_import[0].version = 22
    return model


def other_weight(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it with its two weights exchanged."""
    first, second = model.graph.initializer
    first.name, second.name = second.name, first.name
    return model


def unused_weight(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return it with a tensor more, which takes bytes."""
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "unused"))
    return model


def branching_graph(then: str, otherwise: str) -> onnx.ModelProto:
    """Return an If whose bodies see a value outside."""
    value = helper.make_tensor_value_info
    bodies = {
        name: helper.make_graph(
            [helper.make_node(op, ["x"], [f"{name}_y"])],
            name,
            [],
            [value(f"{name}_y", TensorProto.FLOAT, None)],
        )
        for name, op in (("then_branch", then), ("else_branch", otherwise))
    }
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], **bodies)],
        "g",
        [value("c", TensorProto.BOOL, []), value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, ["n"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class TestGraphDigest:
    @pytest.mark.parametrize("change", [renamed, reordered, documented, floats_in_place_of_bytes])
    def test_what_does_not_count(self, change):
        """Names, order, documentation, producer, how bytes are written."""
        assert graph_digest(relu_graph()) == graph_digest(change(relu_graph()))

    @pytest.mark.parametrize("change", [opset_22, other_weight, unused_weight])
    def test_what_counts(self, change):
        """Versions of operators, weights and where they are used, all stored bytes."""
        assert graph_digest(relu_graph()) != graph_digest(change(relu_graph()))

    def test_operators_and_attributes_count(self):
        """Each of these computes something else."""
        graphs = [
            relu_graph(), relu_graph("Sin"), relu_graph("Elu"), relu_graph("Elu", alpha=0.5),
            relu_graph("LeakyRelu", alpha=0.5),
        ]  # fmt: skip
        assert len({graph_digest(graph) for graph in graphs}) == len(graphs)

    def test_bodies_count(self):
        """Of If: which operators, and in which of the two."""
        pairs = [("Relu", "Sin"), ("Sin", "Relu"), ("Relu", "Relu")]
        assert len({graph_digest(branching_graph(*pair)) for pair in pairs}) == 3
        assert graph_digest(branching_graph(*pairs[0])) == graph_digest(branching_graph(*pairs[0]))

    def test_external_data_do_not_count(self, tmp_path):
        """The same bytes beside the file; the file loads under the same digest."""
        image_graph(tmp_path / "one.onnx")
        model = onnx.load(tmp_path / "one.onnx")
        onnx.save(
            model, tmp_path / "two.onnx", save_as_external_data=True, location="two.bin",
            size_threshold=0,
        )  # fmt: skip
        one, two = (load_model(str(tmp_path / f"{name}.onnx")) for name in ("one", "two"))
        assert one.digest == two.digest
