"""Vetting and rebuilding of .pt2 archives."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.export import export, save

from bitquota.errors import InvalidCalibration, InvalidModel, UnsafeModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.inspection import inspect_model
from bitquota.models.load import load_model
from bitquota.models.pt2.build import build_pt2
from bitquota.models.pt2.module import dynamic_axes
from bitquota.models.pt2.vetting import vet_expression, vet_pt2
from format_networks import tiny_net, write_pt2
from refusals import refused

if TYPE_CHECKING:
    from pathlib import Path


class Boom:
    """Writes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def rewrite(source: Path, target: Path, change) -> Path:
    """Copy an archive with ``change(members)`` applied to its members."""
    with zipfile.ZipFile(source) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def edit_json(members: dict[str, bytes], suffix: str, edit) -> None:
    """Edit the JSON member that ends in ``suffix``."""
    (name,) = [n for n in members if n.endswith(suffix)]
    value = json.loads(members[name])
    edit(value)
    members[name] = json.dumps(value).encode()


def root_of(members: dict[str, bytes]) -> str:
    return next(iter(members)).partition("/")[0]


class TestBuildPt2:
    def test_same_outputs_and_layers(self, tiny_pt2):
        """The rebuilt module has the original layers and gives the same bits at another batch."""
        net, x = tiny_net(), torch.randn(5, 3, 8, 8)
        built = build_pt2(vet_pt2(tiny_pt2))
        kinds = {n: type(m) for n, m in built.module.named_modules()}
        assert nn.Conv2d is kinds["conv"]
        assert nn.BatchNorm2d is kinds["norm"]
        assert nn.Linear is kinds["head"]
        assert built.module.depthwise.groups == 8
        assert set(dict(net.named_parameters())) == set(dict(built.module.named_parameters()))
        with torch.no_grad():
            assert torch.equal(net(x), built.module(x))

    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 12)),
            (nn.Conv1d(4, 4, 3, padding="same"), (3, 4, 12)),
            (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (3, 4, 9, 9)),
            (nn.Conv3d(2, 3, 2), (3, 2, 5, 5, 5)),
            (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (3, 4, 5)),
            (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), (3, 4, 5, 5)),
            (nn.ConvTranspose3d(2, 4, 2), (3, 2, 3, 3, 3)),
            (nn.Linear(7, 5, bias=False), (3, 2, 7)),
            (nn.BatchNorm1d(4), (3, 4)),
            (nn.BatchNorm1d(4, affine=False), (3, 4, 6)),
            (nn.BatchNorm3d(2), (3, 2, 3, 3, 3)),
        ],
    )
    def test_every_layer_kind_returns(self, tmp_path, layer, shape):
        """Each layer kind comes back as itself with all its settings."""
        net = nn.Sequential(layer, nn.ReLU()).eval()
        x = torch.randn(*shape)
        built = build_pt2(vet_pt2(write_pt2(net, (x,), tmp_path / "m.pt2")))
        found = built.module.get_submodule("0")
        assert type(layer) is type(found)
        with torch.no_grad():
            assert torch.equal(net(x), built.module(x))

    def test_attention_projection_is_a_layer(self, tmp_path):
        """A packed in_proj_weight, which belongs to no nn.Linear, is found too."""

        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0]

        net, x = Attend().eval(), torch.randn(3, 5, 8)
        built = build_pt2(vet_pt2(write_pt2(net, (x,), tmp_path / "m.pt2")))
        linear = [n for n, m in built.module.named_modules() if isinstance(m, nn.Linear)]
        assert sorted(linear) == ["attention.in_proj", "attention.out_proj"]
        with torch.no_grad():
            assert torch.allclose(net(x), built.module(x), atol=1e-6)

    def test_tied_weights_stay_one_parameter(self, tmp_path):
        """An embedding and the head tied to it share one parameter."""

        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(11, 6)
                self.head = nn.Linear(6, 11, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, ids):
                return self.head(self.embed(ids))

        net, ids = Tied().eval(), torch.randint(0, 11, (3, 4))
        built = build_pt2(vet_pt2(write_pt2(net, (ids,), tmp_path / "m.pt2")))
        assert sum(p.numel() for p in built.module.parameters()) == 66
        with torch.no_grad():
            assert torch.equal(net(ids), built.module(ids))

    def test_transformer_with_subgraph(self, tmp_path, llama_folder):
        """A Llama, whose rotary embedding is exported as a subgraph, gives the same logits."""
        from bitquota.models.huggingface import load_folder_module

        model = load_folder_module(llama_folder)
        ids = torch.randint(0, 64, (2, 9))
        built = build_pt2(vet_pt2(write_pt2(model, (ids,), tmp_path / "m.pt2")))
        with torch.no_grad():
            assert torch.allclose(model(ids), built.module(ids), atol=1e-5)

    def test_two_inputs_and_one_shared_layer(self, tmp_path):
        """A layer called twice on two inputs stays one layer."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.shared = nn.Linear(4, 3)

            def forward(self, a, b):
                return self.shared(a) - 2 * self.shared(b)

        net, a, b = Two().eval(), torch.randn(3, 4), torch.randn(3, 4)
        built = build_pt2(vet_pt2(write_pt2(net, (a, b), tmp_path / "m.pt2")))
        assert [entry.name for entry in built.module.declared] == ["a", "b"]
        assert [n for n, m in built.module.named_modules() if type(m) is nn.Linear] == ["shared"]
        with torch.no_grad():
            assert torch.equal(net(a, b), built.module(a, b))

    def test_fixed_batch_is_said(self, tmp_path):
        """A program that was exported for three samples at a time cannot take two."""

        class Three(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 6)

            def forward(self, x):
                return self.layer(x).reshape(len(x), 3, 2)

        save(export(Three().eval(), (torch.randn(3, 4),)), tmp_path / "m.pt2")
        model = load_model(str(tmp_path / "m.pt2"))
        with pytest.raises(InvalidCalibration, match="exported for 3 at a time"):
            inspect_model(model, samples=CalibrationSet(inputs=(torch.randn(6, 4),)))

    def test_several_outputs(self, tmp_path):
        """They come back as a tuple, in order."""

        class Pair(nn.Module):
            def forward(self, x):
                return x + 1, x + 2

        x = torch.randn(3, 4)
        first, second = build_pt2(vet_pt2(write_pt2(Pair(), (x,), tmp_path / "m.pt2"))).module(x)
        assert torch.equal(first, x + 1)
        assert torch.equal(second, x + 2)

    def test_training_mode_is_refused(self, tmp_path):
        """A batch norm that updates its statistics was exported in training mode."""
        net = nn.Sequential(nn.BatchNorm1d(4)).train()
        save(export(net, (torch.randn(3, 4),)), tmp_path / "m.pt2")
        with pytest.raises(InvalidModel, match=r"training mode .*: call model\.eval\(\)"):
            build_pt2(vet_pt2(tmp_path / "m.pt2"))

    def test_half_precision_becomes_float32(self, tmp_path):
        """Weights stored in bfloat16 are measured in float32, and what was stored is known."""
        net = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16).eval()
        path = write_pt2(net, (torch.randn(3, 4).bfloat16(),), tmp_path / "m.pt2")
        built = build_pt2(vet_pt2(path))
        assert built.parameter_formats == {"0.weight": "bfloat16", "0.bias": "bfloat16"}
        assert built.module(torch.randn(2, 4)).dtype == torch.float32

    def test_altered_shape_is_named(self, tiny_pt2, tmp_path):
        """A shape larger than the stored bytes is refused before anything is allocated."""

        def grow(config):
            config["config"]["conv.weight"]["tensor_meta"]["sizes"][0]["as_int"] = 10**9

        path = rewrite(
            tiny_pt2,
            tmp_path / "m.pt2",
            lambda m: edit_json(m, "weights_config.json", grow),
        )
        with pytest.raises(InvalidModel, match=r"'conv\.weight' of shape .* cut short or altered"):
            build_pt2(vet_pt2(path))

    def test_broken_graph_is_named(self, tiny_pt2, tmp_path):
        """A graph that uses a value nobody computes is an InvalidModel, not a KeyError."""

        def drop(program):
            program["graph_module"]["graph"]["nodes"].pop(2)

        path = rewrite(
            tiny_pt2, tmp_path / "m.pt2", lambda m: edit_json(m, "models/model.json", drop)
        )
        with pytest.raises(InvalidModel, match="must be consistent"):
            build_pt2(vet_pt2(path))


class TestVetPt2:
    def test_pickled_weight(self, tiny_pt2, tmp_path):
        """use_pickle is refused and nothing is unpickled."""
        marker = tmp_path / "ran"

        def plant(members):
            edit_json(
                members,
                "weights_config.json",
                lambda c: c["config"]["conv.weight"].update(use_pickle=True),
            )
            members[root_of(members) + "/data/weights/weight_0"] = pickle.dumps(Boom(marker))

        path = rewrite(tiny_pt2, tmp_path / "m.pt2", plant)
        with pytest.raises(UnsafeModel, match="reading a pickle runs code"):
            vet_pt2(path)
        assert not marker.exists()

    def test_hostile_sample_inputs_are_never_read(self, tiny_pt2, tmp_path):
        """Sample inputs that would run code in torch.export.load do nothing here."""
        marker = tmp_path / "ran"

        def plant(members):
            name = root_of(members) + "/data/sample_inputs/model.pt"
            members[name] = pickle.dumps(Boom(marker))

        path = rewrite(tiny_pt2, tmp_path / "m.pt2", plant)
        x = torch.randn(2, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(tiny_net()(x), build_pt2(vet_pt2(path)).module(x))
        assert not marker.exists()

    @pytest.mark.parametrize(
        "member",
        [
            "data/aotinductor/model/kernel.so",
            "data/constants/opaque_obj_0",
            "data/constants/custom_obj_0",
            "data/weights/model.pt",
            "../escape",
            "models/../../x.json",
        ],
    )
    def test_foreign_members(self, tiny_pt2, tmp_path, member):
        """Native code, opaque objects and paths that climb are refused."""
        path = rewrite(
            tiny_pt2,
            tmp_path / "m.pt2",
            lambda m: m.update({root_of(m) + "/" + member: b"x"}),
        )
        with pytest.raises(UnsafeModel, match="graph and raw tensors only"):
            vet_pt2(path)

    @pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
    def test_legacy_pickles(self, tiny_pt2, tmp_path, member):
        """A checkpoint of torch.save and TorchScript are named as what they are."""
        path = rewrite(
            tiny_pt2,
            tmp_path / "m.pt2",
            lambda m: m.update({root_of(m) + "/" + member: b"x"}),
        )
        with pytest.raises(UnsafeModel, match="TorchScript or a pickled checkpoint"):
            vet_pt2(path)

    def test_opaque_constant(self, tiny_pt2, tmp_path):
        """A constant whose payload is not a raw tensor is refused."""

        def plant(members):
            payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}
            edit_json(members, "constants_config.json", lambda c: c["config"].update(evil=payload))

        path = rewrite(tiny_pt2, tmp_path / "m.pt2", plant)
        with pytest.raises(UnsafeModel, match="pickled"):
            vet_pt2(path)

    def test_compressed_member(self, tiny_pt2, tmp_path):
        """Compressed members, which could be bombs, are refused."""
        target = tmp_path / "m.pt2"
        with (
            zipfile.ZipFile(tiny_pt2) as source,
            zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for info in source.infolist():
                archive.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
        with pytest.raises(UnsafeModel, match="compressed or encrypted"):
            vet_pt2(target)

    def test_expression_that_would_be_evaluated(self, tiny_pt2, tmp_path):
        """A shape expression with a call of anything but arithmetic is refused."""
        evil = "__import__('os').system('true')"

        def plant(program):
            text = json.dumps(program)
            first = text.index('"expr_str": "') + len('"expr_str": "')
            end = text.index('"', first)
            program.clear()
            program.update(json.loads(text[:first] + evil + text[end:]))

        path = rewrite(
            tiny_pt2, tmp_path / "m.pt2", lambda m: edit_json(m, "models/model.json", plant)
        )
        with refused(UnsafeModel, expression="__import__('os').system('true')"):
            vet_pt2(path)

    @pytest.mark.parametrize(
        "target",
        ["torch.os.system", "torch.ops.aten.from_file.default", "torch.ops.prim.device.default"],
    )
    def test_foreign_operator_in_graph(self, tiny_pt2, tmp_path, target):
        """An operator outside the allowlist is refused, wherever it stands."""

        def plant(program):
            program["graph_module"]["graph"]["nodes"][2]["target"] = target

        path = rewrite(
            tiny_pt2, tmp_path / "m.pt2", lambda m: edit_json(m, "models/model.json", plant)
        )
        with pytest.raises(UnsafeModel, match="aten operators"):
            vet_pt2(path)

    def test_parameter_name_that_is_code(self, tiny_pt2, tmp_path):
        """Names reach generated code, so a name that is no path of identifiers is refused."""

        def plant(config):
            config["config"]['conv"); boom(); ("'] = config["config"].pop("conv.weight")

        path = rewrite(
            tiny_pt2, tmp_path / "m.pt2", lambda m: edit_json(m, "weights_config.json", plant)
        )
        with refused(UnsafeModel, tensor='conv"); boom(); ("'):
            vet_pt2(path)

    def test_truncated(self, tiny_pt2, tmp_path):
        """Half a file is one clear sentence."""
        data = tiny_pt2.read_bytes()
        (tmp_path / "m.pt2").write_bytes(data[: len(data) // 2])
        with pytest.raises(InvalidModel, match="cannot be read"):
            vet_pt2(tmp_path / "m.pt2")

    def test_duplicate_member(self, tiny_pt2, tmp_path):
        """Two members of one name, of which readers pick different ones, are refused."""
        target = tmp_path / "m.pt2"
        target.write_bytes(tiny_pt2.read_bytes())
        with zipfile.ZipFile(target, "a") as archive:
            name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr(name, b"{}")
        with pytest.raises(UnsafeModel, match="must be unique"):
            vet_pt2(target)

    def test_deep_nesting(self, tiny_pt2, tmp_path):
        """A graph nested without end does not exhaust the stack."""
        deep = b'{"schema_version": {"major": 8}, "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"

        def plant(members):
            (name,) = [n for n in members if n.endswith("models/model.json")]
            members[name] = deep

        with pytest.raises((UnsafeModel, InvalidModel)):
            vet_pt2(rewrite(tiny_pt2, tmp_path / "m.pt2", plant))

    def test_loads_no_torch(self, tiny_pt2):
        """A server without torch can vet an upload."""
        code = (
            "import sys; from pathlib import Path; "
            "from bitquota.models.pt2.vetting import vet_pt2; "
            f"vet_pt2(Path({str(tiny_pt2)!r})); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestVetExpression:
    @pytest.mark.parametrize(
        "text",
        [
            "s0", "2*s0 + 1", "FloorDiv(s0, 2)", "Max(1, s77 - 3)",
            "Symbol('s77', positive=True, integer=True)",
            "Add(Mul(Integer(2), Symbol('u0', integer=True)), Integer(-1))",
            "Pow(Symbol('s1'), Integer(-1))",
        ],
    )  # fmt: skip
    def test_sizes(self, text):
        """What torch writes passes."""
        vet_expression(text)

    @pytest.mark.parametrize(
        "text",
        [
            "().__class__", "open('x')", "s0.__init__", "[s0]", "lambda: 0", "9**9**9",
            "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "exec('1')", "Symbol('__x__')",
            "Symbol(open('x'))", "f'{s0}'", "s0 if s0 else s1", "", "x" * 2000, 3, "(" * 500,
        ],
    )  # fmt: skip
    def test_anything_else(self, text):
        """Attributes, calls, powers and syntax errors are refused."""
        with pytest.raises(UnsafeModel, match="arithmetic on sizes"):
            vet_expression(text)


def test_archive_reads_are_bounded(tiny_pt2):
    """Every payload file is read once, although two tensors may share it."""
    names = [name for name, _ in vet_pt2(tiny_pt2).read_payloads()]
    assert len(names) == len(set(names))


class TestDynamicAxes:
    def test_a_rebuilt_graph_is_exported_with_any_batch_again(self, tmp_path):
        """The module of a .pt2 takes ``*inputs``: it can be exported once more, and runs alike."""
        net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.randn(2, 4)
        built = build_pt2(vet_pt2(write_pt2(net, (x,), tmp_path / "m.pt2"))).module
        axes = dynamic_axes(built, 1, {0: torch.export.Dim.DYNAMIC})
        program = torch.export.export(built, (x,), dynamic_shapes=axes)
        torch.export.save(program, tmp_path / "again.pt2")

        again = build_pt2(vet_pt2(tmp_path / "again.pt2")).module
        wider = torch.randn(7, 4)
        with torch.no_grad():
            assert torch.equal(net(wider), again(wider))

    def test_a_module_with_named_inputs_is_not_nested(self):
        """One dictionary for each input."""
        axes = dynamic_axes(nn.Bilinear(2, 2, 2), 2, {0: torch.export.Dim.DYNAMIC})
        assert len(axes) == 2
        assert all(isinstance(one, dict) for one in axes)
