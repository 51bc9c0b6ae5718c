"""Grams of experts, gates and contractions: they give the output error of any change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Scheme
from bitquota.models.discovery import discover
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.plain_weights import with_plain_weights
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.product_moments import indices_of
from bitquota.quantizers.weights import fake_quantize
from menu_modules import LastState


class Routed(nn.Module):
    """Three experts; every token goes to the one that its first number names, if it is theirs."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        shape = (3, 6, 4) if transposed else (3, 4, 6)
        self.is_transposed = transposed
        self.down = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        """Return ``[samples, 4]``."""
        out = x.new_zeros(len(x), 4)
        chosen = (x[:, 0] * 10).abs().long() % 3
        for e in range(3):
            rows = torch.nonzero(chosen == e)[:, 0]
            matrix = self.down[e] if self.is_transposed else self.down[e].t()
            out[rows] = x[rows] @ matrix
        return out


class Einsum(nn.Module):
    """A weight per head, read by one einsum."""

    def __init__(self, equation: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.equation = equation
        self.mix = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(4)))

    def forward(self, x):
        """Return its result."""
        return torch.einsum(self.equation, x, self.mix)


CASES = {
    "experts": (Routed(transposed=False), (90, 6)),
    "transposed experts": (Routed(transposed=True), (90, 6)),
    "heads of their own inputs": (Einsum("bhi,hio->bho", (2, 5, 3)), (9, 2, 5)),
    "one input, many heads": (Einsum("bi,hio->bho", (2, 5, 3)), (9, 5)),
    "two axes summed": (Einsum("bhi,oih->bo", (3, 5, 2)), (9, 2, 5)),
}


def prepared(name):
    module, shape = CASES[name]
    module = module.double().eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return module, x, discover(module, (x,))


class TestProductGrams:
    @pytest.mark.parametrize("name", CASES)
    def test_give_the_output_error_of_any_change(self, name):
        """Sum of e G e^T over output rows is the squared change of the output."""
        module, x, inventory = prepared(name)
        (layer,) = inventory.layers
        gram = input_grams(module, inventory, [(x[:4],), (x[4:],)])[layer.name]
        weight = module.get_parameter(layer.weight_name)
        change = torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        with torch.no_grad():
            before = module(x)
            weight += change
            moved = float((module(x) - before).square().sum())
            weight -= change
        rows = to_matrix(change, layer)
        grouped = rows.reshape(len(gram), -1, layer.columns)
        predicted = torch.einsum("grc,gcd,grd->", grouped, gram, grouped)
        assert moved == pytest.approx(float(predicted), rel=1e-9)

    def test_every_expert_has_its_own_tokens(self):
        """A Gram for each, and none is another's."""
        module, x, inventory = prepared("experts")
        (layer,) = inventory.layers
        assert layer.kind is LayerKind.EXPERTS
        gram = input_grams(module, inventory, [(x,)])[layer.name]
        chosen = (x[:, 0] * 10).abs().long() % 3
        for e in range(3):
            own = x[chosen == e]
            assert len(own) >= 6
            assert torch.allclose(own.T @ own, gram[e])

    def test_an_expert_that_saw_few_tokens_borrows_from_all(self):
        """Tokens that are missing up to the number of columns count as the mean of all tokens."""
        module, x, inventory = prepared("experts")
        (layer,) = inventory.layers
        chosen = (x[:, 0] * 10).abs().long() % 3
        few = torch.cat([x[chosen == 0][:20], x[chosen == 1][:2]])
        gram = input_grams(module, inventory, [(few,)])[layer.name]
        mean = few.T @ few / 22
        assert torch.allclose(few[20:].T @ few[20:] + 4 * mean, gram[1])
        assert torch.allclose(6 * mean, gram[2])

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_gates_see_the_inputs_and_states_of_all_steps(self, kind):
        """States are those that the module itself returns, one step late."""
        torch.manual_seed(0)
        plain = kind(5, 3, batch_first=True)
        module = with_plain_weights(LastState(plain)).eval()
        x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
        inventory = discover(module, (x,))
        grams = input_grams(module, inventory, [(x,)])
        states = module.recurrent(x)[0].detach().double()[:, :-1].reshape(-1, 3)
        flat = x.double().reshape(-1, 5)
        assert {layer.name for layer in inventory.layers} == set(grams)
        for layer in inventory.layers:
            expected = flat.T @ flat if "_ih_" in layer.name else states.T @ states
            assert torch.allclose(expected, grams[layer.name][0], rtol=1e-4, atol=1e-5)

    def test_feedback_lowers_the_error_of_experts(self):
        """The whole way: Grams of routed tokens, rounding, output."""
        module, x, _ = prepared("experts")
        common = torch.randn(90, 1, generator=torch.Generator().manual_seed(2)).double()
        x = x + 3 * common
        inventory = discover(module, (x,))
        (layer,) = inventory.layers
        gram = input_grams(module, inventory, [(x,)])[layer.name]
        weight = module.down.detach().clone()
        errors = []
        with torch.no_grad():
            exact = module(x)
            for rounding in ("nearest", "gptq"):
                module.down.copy_(
                    fake_quantize(weight, layer, 3, Scheme(), inputs_gram=gram, rounding=rounding)
                )
                errors.append(float((module(x) - exact).square().sum()))
            module.down.copy_(weight)
        assert errors[1] < 0.8 * errors[0]

    def test_matrix_and_stored_weight(self):
        """Rows and columns are those of the layout."""
        from bitquota.quantizers.product_moments import _places

        for name in CASES:
            _, _, inventory = prepared(name)
            (layer,) = inventory.layers
            flat = torch.arange(layer.n_weights)
            matrix = flat.reshape(layer.rows, layer.columns)
            rows, columns = _places(layer, flat)
            stored = from_matrix(matrix, layer).reshape(-1)
            assert torch.equal(stored, rows * layer.columns + columns)


class TestPositionsOf:
    @pytest.mark.parametrize("shape", [(7,), (3, 1, 5), (2, 3, 4, 5)])
    def test_are_those_of_torch(self, shape):
        flat = torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(1))
        for ours, theirs in zip(
            indices_of(flat, shape), torch.unravel_index(flat, shape), strict=True
        ):
            assert torch.equal(ours, theirs)
