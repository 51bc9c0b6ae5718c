"""Gates on output channels: what they cost, which channels they drop, and what ships."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import Granularity, Grid, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.exports.export import export_plan
from bitquota.exports.ref_int import same_weight
from bitquota.models.calibration import CalibrationSet
from bitquota.models.identity import model_fingerprint
from bitquota.models.loaded import LoadedModel
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.packing import from_packed_tensors, packed_tensors
from bitquota.quantizers.weights import quantize
from bitquota.training.finetune import finetune
from bitquota.training.gates import (
    INFORMATION,
    RATE,
    START,
    GatedLearner,
    candidate_with,
    gated_prices,
)
from bitquota.training.learn import learn
from bitquota.training.objective import run_with
from bitquota.training.prices import Prices
from bitquota.training.qat import learn_plan
from bitquota.training.saved import load_trained, save_trained
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, accuracy, digits, inventory_of, trained_digits_net
from refusals import refused

SETTINGS = TrainingSettings(
    epochs=4, batch_size=64, learning_rate=3e-3, quantizer_learning_rate=2e-2
)
WIDTHS = (2, 3, 4, 5, 6, 8)


def pricing(inventory, budget, scheme=None):
    scheme = scheme or Scheme()

    def price(kept):
        return Prices.of(
            inventory.layers, [budget], WIDTHS, (None,),
            lambda layer, width, inputs: candidate_with(layer, width, scheme, inputs, kept),
            (lambda layer: Candidate.of(layer, 0, scheme)) if not kept else None,
        )  # fmt: skip

    return price


def learner_at(average):
    model = trained_digits_net()
    inventory = inventory_of(model)
    budget = Budget.parse(f"{average} bits", inventory)
    price = pricing(inventory, budget)
    return GatedLearner(model, price({}), per_channel=True), price


class TestGatedLearner:
    def test_noise_is_drawn_for_each_sample_and_channel_in_steps_alone(self):
        """The same image twice in a batch differs by one factor for each channel."""
        learner, _ = learner_at(3)
        x = digits()[0][:1].repeat(2, 1, 1, 1)
        seen = []
        hook = learner.model.conv1.register_forward_hook(lambda _m, _i, out: seen.append(out))
        learner.model.train()
        run_with(learner, (x,))
        learner.model.eval()
        first, second = run_with(learner, (x,)).detach()
        hook.remove()
        assert torch.equal(first, second)
        noisy = seen[0].detach()
        ratios = (noisy[0] / noisy[1]).flatten(1)
        assert torch.allclose(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-3)
        assert len({round(float(r), 4) for r in ratios[:, 0]}) == noisy.shape[1]
        clean = seen[1].detach()
        factors = (noisy / clean).flatten(2).mean(dim=2)
        assert math.exp(START / 2) == pytest.approx(float((factors - 1).std()), rel=0.5)

    def test_what_passes_the_gates_is_the_penalty_at_the_limit(self):
        """Half of log(1 + 1/alpha), and nothing for size where the budget holds."""
        learner, _ = learner_at(8)
        passes = 0.5 * math.log(1 + math.exp(-START))
        assert INFORMATION * passes == pytest.approx(float(learner.penalty(0.5).detach()), rel=1e-5)

    def test_noisy_channels_count_less_and_are_zero_outside_of_steps(self):
        """Shares fall with noise; dropped rows are zero where the model is looked at."""
        learner, _ = learner_at(3)
        with torch.no_grad():
            learner.parts[2].noise[:12] = 2.5 / RATE
        stays, goes = (1 / (1 + math.exp(v)) for v in (START, 2.5))
        assert (stays + goes) / 2 == pytest.approx(float(learner.shares()[2].detach()), rel=1e-5)
        learner.model.eval()
        weight = learner.weights()["conv3.weight"]
        assert 0.0 == float(weight[:12].detach().abs().max())
        assert bool((weight[12:].detach().abs().amax(dim=(1, 2, 3)) > 0).all())
        learner.model.train()
        assert float(learner.weights()["conv3.weight"][:12].detach().abs().max()) > 0


class TestGatedPrices:
    def test_drops_what_is_noise_and_then_as_few_as_fit(self):
        """At 1.6 bits and 2 bits a weight a fifth must go; one row fewer is too much."""
        learner, price = learner_at(1.6)
        with torch.no_grad():
            learner.parts[2].noise[:3] = 1.0 / RATE
            learner.parts[2].noise[3:] = torch.linspace(-0.1, -2.0, 21) / RATE
        prices = gated_prices(learner, price, Scheme())
        kept = {la.name: prices.candidate(la, 2, None).row_bits.count(0) for la in prices.layers}
        n = kept["conv3"]
        assert {"conv1": 0, "conv2": 0, "conv3": n, "head": 0} == kept
        assert n > 3
        assert int(prices.costs[0, :, 0, 0].sum()) <= prices.budgets[0].available
        fewer = {"conv3": tuple(row >= n - 1 for row in range(24))}
        with pytest.raises(BudgetTooSmall):
            price(fewer)

    def test_layers_keep_channels_whose_bytes_would_not_fall(self):
        """A row of conv1 takes 18 bits and a scale; the order of 12 rows 96 bits."""
        learner, price = learner_at(3)
        with torch.no_grad():
            learner.parts[0].noise[:1] = 1.0 / RATE
        prices = gated_prices(learner, price, Scheme())
        assert () == prices.candidate(prices.layers[0], 2, None).row_bits
        with torch.no_grad():
            learner.parts[0].noise[:4] = 1.0 / RATE
        prices = gated_prices(learner, price, Scheme())
        assert 4 == prices.candidate(prices.layers[0], 2, None).row_bits.count(0)

    def test_a_layer_without_channels_is_a_layer_of_zeros(self):
        """It stores nothing, not even an order."""
        learner, price = learner_at(3)
        with torch.no_grad():
            learner.parts[2].noise[:] = 1.0 / RATE
        chosen = gated_prices(learner, price, Scheme()).candidate(learner.layers[2], 4, None)
        assert (0, 0, 0) == (chosen.weight_bits, chosen.size_bits, chosen.bit_ops)


class TestLearn:
    def test_a_budget_below_the_smallest_bit_width(self, data, tmp_path):
        """1.6 bits where 2 is the smallest width: bytes in the files are those of the plan."""
        module = trained_digits_net()
        digest = model_fingerprint(module)
        model = LoadedModel(module=module, digest=digest, source="digits", architecture="Net")
        found = learn_plan(model, data, ["1.6 bits"], (2, 4, 8), recipe="djpq", settings=SETTINGS)
        (budget,) = found.plan.budgets
        candidates = [a.candidate for a in found.plan.assignments]
        assert budget.spent(candidates) <= budget.limit
        assert any(0 in c.row_bits or c.pruned for c in candidates)
        for c, layer in zip(candidates, found.plan.inventory.layers, strict=True):
            # Rows of zeros have no products; every other row has those of its own bit-width.
            widths = c.row_bits or (c.weight_bits,) * layer.rows
            assert c.bit_ops == layer.n_macs // layer.rows * sum(widths) * 32
        save_trained(found.model, tmp_path / "trained.safetensors")
        back = load_trained(tmp_path / "trained.safetensors").weights
        assert all(same_weight(w, back[name]) for name, w in found.model.stored.items())
        x, y = digits()
        assert accuracy(found.model.module, x[N_TRAIN:], y[N_TRAIN:]) > 0.8

        # Both exporters hold rows of zeros, and compute what was trained.
        digest = model_fingerprint(found.model.module)
        trained = replace(model, module=found.model.module, digest=digest)
        samples = CalibrationSet(inputs=(x[N_TRAIN:],))
        for name in ("ref-int", "onnx-qdq"):
            report = export_plan(
                trained, found.plan, tmp_path / name, format_name=name, samples=samples
            )
            assert report.difference.relative < 1e-5
            if name == "ref-int":
                assert report.payload_bits == found.plan.size_bits

    def test_rows_need_scales_of_their_own(self, data):
        """One scale for the tensor leaves no parts."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with refused(InvalidInput, granularity="tensor"):
            learn(
                model, inventory, data, Budget.parse("3 bits", inventory), WIDTHS, recipe="djpq",
                scheme=Scheme(granularity=Granularity.TENSOR),
            )  # fmt: skip


class TestRowsOfZeros:
    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    def test_are_neither_stored_nor_trained(self, grid, data):
        """Codes, order and scales of the others to the bit; training keeps zeros and widths."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        conv2, conv3 = inventory.layers[1:3]
        rows = tuple((0, 3, 2)[k % 3] for k in range(conv2.rows))
        scheme = Scheme(grid=grid, row_bits=rows)
        weight = quantize(model.conv2.weight.detach().flatten(1), 3, scheme)
        parts = packed_tensors("w", weight)
        assert not [name for name in parts if ".w0." in name]
        shape = (conv2.rows, conv2.columns)
        assert same_weight(weight, from_packed_tensors("w", parts, shape, 3, scheme))
        candidates = [Candidate.of(conv2, 3, scheme), Candidate.of(conv3, 0, Scheme())]
        trained = finetune(model, inventory, candidates, data, replace(SETTINGS, epochs=1))
        assert [c.size_bits for c in candidates] == [c.size_bits for c in trained.candidates]
        moved = trained.module.conv2.weight.detach().flatten(1)
        assert [b == 0 for b in rows] == (moved.abs().amax(dim=1) == 0).tolist()
        assert 0.0 == float(trained.module.conv3.weight.detach().abs().max())
        again = apply_plan(trained.module, inventory, trained.candidates)
        assert torch.allclose(moved, again.conv2.weight.detach().flatten(1), atol=1e-6)
        codes = trained.stored["conv2"].codes.numpy()
        for width in (2, 3):
            own = codes[np.array(rows) == width]
            assert int(own.max() - own.min()) < 2**width
