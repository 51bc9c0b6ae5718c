"""Discovery: every tensor once, every layer's numbers right."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidModel
from bitquota.models.discovery import discover
from refusals import refused
from sensitivity_networks import Attention, Residual, build, samples


class Zoo(nn.Module):
    """One of every convolution, grouped and transposed ones included."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Conv1d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose1d(6, 4, 4, stride=2, groups=2)
        self.square = nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.up2 = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.cube = nn.Conv3d(1, 3, 2)
        self.up3 = nn.ConvTranspose3d(3, 1, 2)

    def forward(self, x):
        a = self.up(self.flat(x))
        b = self.up2(self.depthwise(self.square(x.reshape(-1, 2, 4, 6))))
        c = self.up3(self.cube(x.reshape(-1, 1, 4, 3, 4)))
        return a.mean((1, 2)) + b.mean((1, 2, 3)) + c.mean((1, 2, 3, 4))


class Experts(nn.Module):
    """Expert matrices as bare three-dimensional parameters, as in transformers 5."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for k in range(chosen.shape[1]):
            for e in range(4):
                rows = chosen[:, k] == e
                gate, up = (x[rows] @ self.gate_up_proj[e].T).chunk(2, dim=-1)
                out[rows] += weights[rows, k, None] * ((gate * up) @ self.down_proj[e].T)
        return out


class Mixture(nn.Module):
    """A router and its experts."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.experts = Experts()
        self.positions = nn.Parameter(torch.zeros(1, 3, 6))

    def forward(self, x):
        flat = (x + self.positions).reshape(-1, 6)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        return self.experts(flat, chosen, weights).reshape(x.shape)


class TestDiscover:
    def test_counts_every_stored_bit_once(self):
        """Layers and the rest together are the state dictionary, counters left out."""
        module = build(Residual)
        inventory = discover(module, samples(Residual).inputs)
        stored = sum(
            t.numel() * t.element_size() * 8
            for name, t in module.state_dict().items()
            if not name.endswith("num_batches_tracked")
        )
        assert stored == inventory.full_precision_bits
        assert ["stem", "inner", "side", "head"] == [la.name for la in inventory.layers]

    def test_says_why_a_tensor_ships_as_it_is(self):
        """Biases, norms and buffers are told apart."""
        inventory = discover(build(Residual), samples(Residual).inputs)
        reasons = {t.name: t.reason for t in inventory.unquantized}
        assert "bias" == reasons["head.bias"]
        assert "scale of a normalisation" == reasons["norm.weight"]
        assert "buffer" == reasons["norm.running_var"]

    def test_multiply_accumulates_are_those_of_torch(self):
        """Against torch's own flop counter, per sample, for every kind of convolution."""
        module = Zoo().eval()
        x = torch.randn(3, 4, 12)
        inventory = discover(module, (x,))
        with FlopCounterMode(display=False) as counter:
            module(x)
        flops = counter.get_flop_counts()
        for layer in inventory.layers:
            assert sum(flops[f"Zoo.{layer.name}"].values()) // 2 // 3 == layer.n_macs, layer.name

    def test_rows_are_output_channels(self):
        """Also where the framework stores the output second, or in groups."""
        rows = {
            la.name: (la.rows, la.columns)
            for la in discover(Zoo(), (torch.randn(1, 4, 12),)).layers
        }
        assert (6, 6) == rows["flat"]
        assert (4, 12) == rows["up"]
        assert (4, 9) == rows["depthwise"]
        assert (2, 16) == rows["up2"]
        assert (1, 24) == rows["up3"]

    def test_counts_inputs_of_one_sample(self):
        """However many samples the example has."""
        for n in (1, 5):
            layers = discover(build(Residual), (torch.randn(n, 3, 8, 8),)).layers
            assert [3 * 64, 6 * 64, 6 * 64, 6] == [la.n_inputs for la in layers]

    def test_tied_weights_count_once(self):
        """The output layer of a language model is an alias of its embedding."""
        module = build(Attention)
        inventory = discover(module, samples(Attention).inputs)
        embed = inventory.layer("embed")
        assert ("out.weight",) == embed.aliases
        assert "out" not in [la.name for la in inventory.layers]
        assert 11 * 8 + 4 * 64 == inventory.n_weights
        assert 6 * 11 * 8 == embed.n_macs  # looking up costs nothing, the output layer does
        assert 6 * 8 == embed.n_inputs  # of the output layer; token ids are no activations
        assert LayerKind.EMBEDDING is embed.kind

    def test_finds_expert_parameters(self):
        """Walkers over Linear would miss nearly all weights of a mixture of experts."""
        module = Mixture().eval()
        inventory = discover(module, (torch.randn(2, 3, 6),))
        layers = {la.name: la for la in inventory.layers}
        assert {"router", "experts.gate_up_proj", "experts.down_proj"} == set(layers)
        assert LayerKind.EXPERTS is layers["experts.down_proj"].kind
        assert (40, 6) == (
            layers["experts.gate_up_proj"].rows,
            layers["experts.gate_up_proj"].columns,
        )
        # Three tokens a sample, two experts a token.
        assert 3 * 2 * 60 == layers["experts.gate_up_proj"].n_macs
        assert "positions" in [t.name for t in inventory.unquantized]

    def test_finds_transformers_conv1d_by_its_looks(self):
        """GPT-2 stores its linear layers the other way round."""

        class Conv1D(nn.Module):
            def __init__(self, nf, nx):
                super().__init__()
                self.nf = nf
                self.weight = nn.Parameter(torch.randn(nx, nf))
                self.bias = nn.Parameter(torch.zeros(nf))

            def forward(self, x):
                flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
                return flat.view(*x.shape[:-1], self.nf)

        layer = discover(nn.Sequential(Conv1D(7, 5)), (torch.randn(2, 3, 5),)).layers[0]
        assert LayerKind.LINEAR_TRANSPOSED is layer.kind
        assert (7, 5) == (layer.rows, layer.columns)
        assert 3 * 35 == layer.n_macs

    def test_finds_the_projections_of_multi_head_attention(self):
        """They are bare parameters of the module."""

        class Self(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x):
                return self.attention(x, x, x, need_weights=False)[0]

        layers = discover(Self(), (torch.randn(2, 5, 8),)).layers
        names = {la.name: la for la in layers}
        assert {"attention.in_proj_weight", "attention.out_proj"} == set(names)
        assert 5 * 3 * 64 == names["attention.in_proj_weight"].n_macs

    def test_half_precision_is_counted_as_stored(self):
        """A bfloat16 checkpoint has 16 bits a weight."""
        module = nn.Sequential(nn.Linear(4, 3)).bfloat16()
        inventory = discover(module, (torch.randn(1, 4).bfloat16(),))
        assert 16 * 15 == inventory.full_precision_bits
        assert "bf16" == inventory.unquantized[0].format

    def test_non_persistent_buffers_take_no_storage(self):
        """They are rebuilt when the model is loaded."""
        module = nn.Sequential(nn.Linear(4, 3))
        module.register_buffer("mask", torch.ones(100), persistent=False)
        assert 32 * 15 == discover(module, (torch.randn(1, 4),)).full_precision_bits

    def test_a_layer_that_does_not_run_has_no_multiply_accumulates(self):
        """It is stored all the same."""
        module = build(Residual)
        module.spare = nn.Linear(3, 3)
        layer = discover(module, samples(Residual).inputs).layer("spare")
        assert (0, 9) == (layer.n_macs, layer.n_weights)

    def test_leaves_the_module_as_it_was(self):
        """Mode, statistics and hooks."""
        module = build(Residual).train()
        before = copy.deepcopy(module.state_dict())
        discover(module, samples(Residual).inputs)
        assert module.training
        assert module.norm.training
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        assert not module.stem._forward_hooks

    def test_names_the_tensor_that_is_not_finite(self):
        """NaN weights are found before anything runs."""
        module = build(Residual)
        with torch.no_grad():
            module.inner.weight[0, 0, 0, 0] = math.nan
        with refused(InvalidModel, tensor="inner.weight", n_bad=1):
            discover(module, samples(Residual).inputs)

    def test_refuses_a_model_without_layers(self):
        """There is nothing to allocate."""
        with pytest.raises(InvalidModel, match="at least one quantizable layer"):
            discover(nn.Sequential(nn.ReLU()), (torch.randn(1, 3),))


class TestDiscoverExported:
    @pytest.mark.parametrize("kind", [Residual, Attention])
    def test_agrees_with_the_modules(self, kind):
        """An exported graph has no modules, but the same layers."""
        module = build(kind)
        data = samples(kind)
        exported = torch.export.export(module, data.inputs).module(check_guards=False)
        plain, graph = discover(module, data.inputs), discover(exported, data.inputs)
        fields = ("name", "kind", "weight_name", "rows", "columns", "n_macs", "n_inputs")
        for ours, theirs in zip(plain.layers, graph.layers, strict=True):
            for field in fields:
                assert getattr(ours, field) == getattr(theirs, field)
        assert plain.full_precision_bits == graph.full_precision_bits

    def test_finds_every_convolution(self):
        """Groups and transposition are read off the call."""
        module = Zoo().eval()
        x = torch.randn(3, 4, 12)
        exported = torch.export.export(module, (x,)).module(check_guards=False)
        plain = {la.name: la for la in discover(module, (x,)).layers}
        graph = {la.name: la for la in discover(exported, (x,)).layers}
        assert plain == graph

    @pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch warns about itself
    def test_finds_layers_after_decomposition(self):
        """Core operators: convolution, addmm with a transposed parameter."""
        module = build(Residual)
        data = samples(Residual)
        program = torch.export.export(module, data.inputs).run_decompositions()
        graph = discover(program.module(check_guards=False), data.inputs)
        plain = discover(module, data.inputs)
        assert [(la.name, la.kind, la.rows) for la in plain.layers] == [
            (la.name, la.kind, la.rows) for la in graph.layers
        ]
