"""Learned bit-widths: the limit holds exactly, and they are worth having."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.budget import Budget
from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.identity import model_fingerprint
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.packing import pack, packed_tensors
from bitquota.training.bit_learners import (
    BitPruningLearner,
    EllipsoidLearner,
    StabilisedLearner,
)
from bitquota.training.bit_sparsity import BitPlaneLearner, LastBitLearner
from bitquota.training.finetune import finetune
from bitquota.training.input_quantizers import LearnedInputBits, calibrated_inputs
from bitquota.training.learn import RECIPES, default_settings, learn
from bitquota.training.objective import run_with
from bitquota.training.prices import Prices
from bitquota.training.published_learners import PublishedLearner, PublishedPowersLearner
from bitquota.training.repair import repair
from bitquota.training.settings import TrainingSettings
from bitquota.training.smooth import off_grid, off_widths
from digits_network import N_TRAIN, accuracy, digits, inventory_of, trained_digits_net
from layer_shapes import layer_of

SETTINGS = TrainingSettings(
    epochs=4, batch_size=64, learning_rate=3e-3, quantizer_learning_rate=2e-2
)
FINETUNING = replace(SETTINGS, epochs=2, quantizer_learning_rate=5e-3)
WIDTHS = (2, 3, 4, 5, 6, 8)


def limited(layers, code_bits):
    """Return the prices of layers whose codes may take so many bits together."""
    budget = Budget(resource="code_bits", limit=int(code_bits))
    return prices_of(layers, [budget])


def prices_of(layers, budgets, input_widths=(None,)):
    return Prices.of(
        layers, budgets, WIDTHS, input_widths,
        lambda layer, width, inputs: Candidate.of(layer, width, Scheme(), inputs),
    )  # fmt: skip


def average_of(inventory, average):
    """Return the budget of that many bits per weight."""
    return Budget.parse(f"{average} bits", inventory)


class TestLearn:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_meets_the_limit_exactly_and_repairs_the_network(self, recipe, data):
        """2.5 bits on average: bytes of the shipped model, accuracy on other images."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = Budget.parse("2.8 bpw", inventory)
        learned = learn(
            model, inventory, data, limit, WIDTHS,
            recipe=recipe, settings=SETTINGS, finetuning=FINETUNING,
        )  # fmt: skip
        stored = learned.trained.stored.items()
        shipped = sum(8 * len(part) for n, w in stored for part in packed_tensors(n, w).values())
        assert shipped == learned.plan.size_bits == learned.trained.size_bits
        assert learned.plan.size_bits <= limit.limit
        x, y = digits()
        x, y = x[N_TRAIN:], y[N_TRAIN:]
        full = accuracy(model, x, y)
        plain = accuracy(apply_plan(model, inventory, learned.candidates), x, y)
        assert accuracy(learned.trained.module, x, y) > max(plain, full - 0.02)

    def test_gives_small_sensitive_layers_more_bits(self, data):
        """The first convolution, 2 % of the weights, ends above the average."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learned = learn(
            model, inventory, data, average_of(inventory, 2.5), WIDTHS,
            settings=SETTINGS, finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        bits = {c.layer: c.weight_bits for c in learned.candidates}
        assert bits["conv1"] > 2.5
        assert bits["conv1"] >= bits["conv3"]

    def test_limits_inputs_exactly(self, data):
        """Total and largest, beside the weights; every input gets a width of its own."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        budgets = [
            average_of(inventory, 3),
            Budget.parse("act total 700 B", inventory),
            Budget.parse("act 400 B", inventory),
        ]
        learned = learn(
            model, inventory, data, budgets, WIDTHS,
            settings=SETTINGS, finetuning=FINETUNING,
        )  # fmt: skip
        sizes = [c.activation_size_bits for c in learned.candidates]
        assert sum(sizes) <= 700 * 8
        assert max(sizes) <= 400 * 8
        assert sum(sizes) > 0.8 * 700 * 8
        bits = [c.activation_bits for c in learned.candidates]
        assert bits == [learned.trained.inputs[la.name].bits for la in inventory.layers]
        assert learned.plan.measured.accuracy > 0.85

    def test_starts_from_a_plan(self, data):
        """With rates of zero its bit-widths come out again."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        start = [
            Candidate.of(la, b, Scheme())
            for la, b in zip(inventory.layers, (6, 4, 2, 5), strict=True)
        ]
        still = replace(SETTINGS, epochs=1, learning_rate=0.0, quantizer_learning_rate=0.0)
        size = sum(c.size.codes for c in start)
        learned = learn(
            model, inventory, data, Budget(resource="code_bits", limit=size), WIDTHS,
            start=start, settings=still, finetuning=still,
        )  # fmt: skip
        assert [6, 4, 2, 5] == [c.weight_bits for c in learned.candidates]

    def test_layers_of_a_group_share_a_width(self, data):
        """As in every plan."""
        model = trained_digits_net()
        inventory = inventory_of(model).tie([["conv1", "conv2"]])
        learned = learn(
            model, inventory, data, average_of(inventory, 3), WIDTHS,
            settings=replace(SETTINGS, epochs=1), finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        bits = {c.layer: c.weight_bits for c in learned.candidates}
        assert bits["conv1"] == bits["conv2"]

    def test_works_with_one_step_per_tensor(self, data):
        """As published; its scales are counted, too."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        scheme = Scheme(granularity=Granularity.TENSOR)
        limit = average_of(inventory, 3.0)
        learned = learn(
            model, inventory, data, limit, WIDTHS, scheme=scheme,
            settings=replace(SETTINGS, epochs=1), finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        assert learned.plan.average_bits <= 3.0
        assert {1} == {w.scales.numel() for w in learned.trained.stored.values()}

    def test_a_limit_below_the_smallest_plan_is_refused_before_training(self, data):
        """Its size is named."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(BudgetTooSmall, match="below the smallest plan"):
            learn(model, inventory, data, average_of(inventory, 1.9), WIDTHS)

    def test_refuses_unknown_recipes(self, data):
        """The known ones are listed."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match=", ".join(RECIPES)):
            learn(model, inventory, data, average_of(inventory, 4), WIDTHS, recipe="magic")

    def test_limits_bit_operations_and_times(self, data):
        """With inputs learned as well: products of both; times by what each pair takes."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        layers = [
            LayerCost(layer=la.name, candidate=f"W{w}A{a}", cost=la.n_macs * (4 + (w > 4) + a // 4))
            for la in inventory.layers
            for w in WIDTHS
            for a in (4, 8)
        ]
        macs = sum(la.n_macs for la in inventory.layers)
        table = CostTable(
            resource="latency_ns", model_digest=inventory.model_digest, constant=1000,
            layers=tuple(layers),
        )  # fmt: skip
        budgets = [
            Budget.parse(f"{12 * macs} BitOps", inventory),
            Budget.parse(f"{macs * 5.5 + 1000} ns", inventory, [table]),
        ]
        learned = learn(
            model, inventory, data, budgets, WIDTHS, activation_bits=(4, 8),
            settings=replace(SETTINGS, epochs=1), finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        spent = [b.spent(learned.candidates) for b in budgets]
        assert all(s <= b.limit for s, b in zip(spent, budgets, strict=True))
        assert spent[0] > 0.8 * budgets[0].limit
        assert learned.plan.model_digest == learned.plan.budgets[1].prices.model_digest

    def test_needs_a_budget_on_weights(self, data):
        """A limit on inputs alone says nothing about them."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match="at least one limit on weights.*'act 400 B'"):
            learn(model, inventory, data, Budget.parse("act 400 B", inventory), WIDTHS)

    @pytest.mark.parametrize("recipe", ["ellipsoid", "uhlich2020"])
    def test_recipes_say_which_budgets_they_hold(self, recipe, data):
        """Products of two learned bit-widths are not linear, and no size."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match="recipe 'stabilised'"):
            learn(
                model, inventory, data, Budget.parse("100 MBitOps", inventory), WIDTHS,
                recipe=recipe, activation_bits=(4, 8),
            )  # fmt: skip

    def test_the_plan_fits_the_trained_model(self, data):
        """Applying it to the trained weights changes nothing: they lie on their grids."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learned = learn(
            model, inventory, data, average_of(inventory, 3), WIDTHS,
            settings=replace(SETTINGS, epochs=1), finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        trained = learned.trained.module
        assert model_fingerprint(trained) == learned.plan.model_digest
        again = apply_plan(trained, inventory_of(trained), learned.candidates)
        x = digits()[0][N_TRAIN:]
        assert torch.allclose(trained(x), again(x), atol=1e-4)
        assert learned.plan.measured.accuracy > 0.8

    def test_refuses_a_single_width(self, data):
        """There would be nothing to learn."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match="at least two bit-widths"):
            learn(model, inventory, data, average_of(inventory, 4), [4])


@pytest.mark.slow
class TestLearnedAgainstHomogeneous:
    def test_learned_bits_beat_two_bits_everywhere_and_match_full_precision(self):
        """A network of 1.6 k weights and 600 images, where 2 bits hurt; three seeds.

        At 2.5 bits, two points above homogeneous 2 bits, within one of full precision, and not
        below "first and last layer at 4", all trained equally long.
        """
        x, y = digits()
        n_train, scheme = 600, Scheme(granularity=Granularity.TENSOR)
        data = CalibrationSet(inputs=(x[:n_train],), labels=y[:n_train])
        phase = replace(SETTINGS, epochs=8, distillation=0.0)
        sums = dict.fromkeys(("full", "two", "ends", "learned"), 0.0)
        for seed in range(3):
            model = trained_digits_net(seed, 30, first=6, rest=10, n_train=n_train)
            inventory = inventory_of(model)
            one = replace(phase, seed=seed)
            two = replace(one, epochs=16, quantizer_learning_rate=5e-3)

            def trained(ends, model=model, inventory=inventory, settings=two):
                plan = [
                    Candidate.of(la, ends if la.name in ("conv1", "head") else 2, scheme)
                    for la in inventory.layers
                ]
                return finetune(model, inventory, plan, data, settings).module

            learned = learn(
                model, inventory, data, average_of(inventory, 2.5), WIDTHS, scheme=scheme,
                settings=one, finetuning=replace(one, quantizer_learning_rate=5e-3),
            )  # fmt: skip
            assert learned.plan.average_bits <= 2.5
            stored = learned.trained.stored.values()
            assert sum(8 * pack(w).n_bytes for w in stored) == learned.plan.size_bits
            modules = {
                "full": model,
                "two": trained(2),
                "ends": trained(4),
                "learned": learned.trained.module,
            }
            for name, module in modules.items():
                sums[name] += 100 * accuracy(module, x[n_train:], y[n_train:]) / 3
        assert sums["learned"] >= sums["two"] + 2
        assert sums["learned"] >= sums["full"] - 1
        assert sums["learned"] >= sums["ends"] - 0.5


class TestEllipsoidLearner:
    def test_the_size_is_constant_whatever_is_learned(self):
        """To 1e-6, for any direction."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 2.7 * inventory.n_weights
        learner = EllipsoidLearner(model, limited(inventory.layers, limit), per_channel=True)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            direction = learner.parts.get_parameter("direction")
            direction.data.copy_(torch.randn(direction.shape, generator=generator))
            size = float((learner.counts * learner.relaxed_bits().detach()).sum())
            assert int(limit) == pytest.approx(size, rel=1e-6)

    def test_the_size_is_constant_along_training(self):
        """To 1e-6 after every step, whatever the loss asks for."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 2.7 * inventory.n_weights
        learner = EllipsoidLearner(model, limited(inventory.layers, limit), per_channel=True)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=0.05)
        x, y = digits()
        first = learner.relaxed_bits().detach().clone()
        for k in range(15):
            batch = slice(60 * k, 60 * k + 60)
            output = run_with(learner, (x[batch],))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(output, y[batch]).backward()
            optimizer.step()
            size = float((learner.counts * learner.relaxed_bits().detach()).sum())
            assert int(limit) == pytest.approx(size, rel=1e-6)
        assert not torch.allclose(first, learner.relaxed_bits(), atol=0.05)

    def test_inputs_are_held_together_as_well(self, data):
        """All of them take their budget exactly, whatever direction is learned."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        total = 4 * sum(la.n_inputs for la in inventory.layers)
        budgets = [
            average_of(inventory, 3), Budget(resource="activation_bits_total", limit=total),
        ]  # fmt: skip
        starts = calibrated_inputs(
            model, inventory, data, dict.fromkeys([la.name for la in inventory.layers], 8)
        )
        inputs = LearnedInputBits(
            inventory.layers, [starts[la.name] for la in inventory.layers], least=2, most=8
        )
        learner = EllipsoidLearner(
            model, prices_of(inventory.layers, budgets, WIDTHS), per_channel=True, inputs=inputs
        )
        assert {0, 1} == learner.held
        generator = torch.Generator().manual_seed(0)
        counts = torch.tensor([float(la.n_inputs) for la in inventory.layers])
        for _ in range(5):
            inputs.direction.data.copy_(0.9 + 0.2 * torch.rand(4, generator=generator))
            bits = inputs.relaxed_bits().detach()
            assert float(bits.max()) < 8
            assert total == pytest.approx(float((counts * bits).sum()), rel=1e-6)
        largest = 2.0 ** inputs.log_range[0]
        levels = inputs.quantize(0, torch.linspace(-3, 3, 4001)).unique()
        assert 0 <= 2 ** float(bits[0]) - len(levels) < 2
        assert float(levels.max().detach()) <= float(largest.detach()) + 1e-5


class TestSmoothRegularisers:
    def test_zero_on_the_grid_and_without_steps(self):
        """``sin^2`` between codes, a parabola outside; slopes agree at the ends."""
        step, highest = torch.tensor(0.5), torch.tensor(3.0)
        on = 0.5 * torch.arange(-3.0, 4.0)
        assert 0.0 == pytest.approx(float(off_grid(on, step, highest)), abs=1e-10)
        assert 1.0 == pytest.approx(float(off_grid(torch.tensor([0.25]), step, highest)))
        assert torch.pi**2 == pytest.approx(float(off_grid(torch.tensor([2.0]), step, highest)))
        ends = torch.tensor([1.5 - 1e-3, 1.5 + 1e-3], requires_grad=True)
        (2 * off_grid(ends, step, highest)).backward()
        assert ends.grad[0].item() == pytest.approx(-ends.grad[1].item(), rel=1e-2)

    def test_bit_widths_on_offer(self):
        """Halfway between 6 and 8 is 7."""
        assert 0.0 == pytest.approx(float(off_widths(torch.tensor([2.0, 8.0]), WIDTHS)), abs=1e-9)
        assert 1.0 == pytest.approx(float(off_widths(torch.tensor([7.0]), WIDTHS)))

    def test_they_pull_bit_widths_to_the_offer(self):
        """Without data, all directions end closer to whole widths; the size holds."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = EllipsoidLearner(
            model, limited(inventory.layers, 3.3 * inventory.n_weights), per_channel=True
        )
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
        first = float(learner.penalty(1.0).detach())
        assert 0.0 == learner.penalty(0.0).item()
        for _ in range(60):
            optimizer.zero_grad()
            learner.penalty(1.0).backward()
            optimizer.step()
        assert float(learner.penalty(1.0).detach()) < 0.5 * first


class TestPublishedLearner:
    def test_the_penalty_alone_reaches_the_limit(self):
        """Without data every layer falls to the floor within dozens of steps."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 2.5 * inventory.n_weights
        learner = PublishedLearner(model, limited(inventory.layers, limit), per_channel=False)
        assert not learner.is_eligible()
        optimizer = torch.optim.SGD(learner.parts.parameters(), lr=0.03)
        for _ in range(100):
            optimizer.zero_grad()
            learner.penalty(0.0).backward()
            learner.before_step()
            optimizer.step()
            learner.after_step()
        assert learner.is_eligible()

    def test_steps_are_real_valued(self):
        """They leave the powers of two that they start at, and weights lie on their multiples.

        With the penalty and the data together the limit is met, and the loss stays finite.
        """
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 3.5 * inventory.n_weights
        learner = PublishedLearner(model, limited(inventory.layers, limit), per_channel=False)
        assert all(_is_power_of_two(learner.parts[k].quantizer.grid()[0]) for k in range(4))
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.03, momentum=0.9)
        x, y = digits()
        fitting = []
        for k in range(60):
            batch = slice(25 * k % 1000, 25 * k % 1000 + 25)
            loss = torch.nn.functional.cross_entropy(run_with(learner, (x[batch],)), y[batch])
            assert bool(torch.isfinite(loss))
            optimizer.zero_grad()
            (loss + learner.penalty(0.0)).backward()
            learner.before_step()
            optimizer.step()
            learner.after_step()
            fitting.append(learner.is_eligible())
        assert any(fitting)
        for k in range(4):
            step, largest = learner.parts[k].quantizer.grid()
            at_end = float(step.detach()) == 2.0**-8  # of its box
            assert at_end or not _is_power_of_two(step)
            inside = learner.quantized(k).detach()
            inside = inside[inside.abs() < largest] / step.detach()
            assert torch.allclose(inside, inside.round(), atol=1e-3)

    def test_penalty_is_that_of_resnet20(self):
        """131.0 kB at 4 bits and .1 of biases, against 70.1 kB: 0.1 (131.1 - 70.1)^2 = 372."""
        model = torch.nn.Sequential(torch.nn.Linear(1024, 262))
        layer = layer_of(LayerKind.LINEAR, (262, 1024), name="0")
        learner = PublishedLearner(model, limited([layer], 70.1 * 8 * 1024), per_channel=False)
        size = 131.0 + 262 * 4 / 8 / 1024
        assert 0.1 * (size - 70.1) ** 2 == pytest.approx(learner.penalty(0.0).item(), rel=1e-5)


def _is_power_of_two(step):
    exponent = float(torch.log2(step.detach()))
    return abs(exponent - round(exponent)) < 1e-6


class TestBitPruningLearner:
    def test_the_gradient_of_a_length_is_the_difference_of_the_two_grids(self):
        """Contracted with the loss's gradient."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = BitPruningLearner(
                model, limited(inventory.layers, 9e9), per_channel=True, start_bits=[3.3] * 4,
        )  # fmt: skip
        ahead = torch.randn_like(learner.quantized(1).detach())
        (learner.quantized(1) * ahead).sum().backward()
        lengths = learner.parts.get_parameter("lengths")
        found = float(lengths.grad[1])
        with torch.no_grad():
            whole = []
            for length in (3.0, 4.0):
                lengths.fill_(length)
                whole.append(learner.quantized(1))
        assert float(((whole[1] - whole[0]) * ahead).sum()) == pytest.approx(found, rel=1e-4)


class TestLastBitLearner:
    def test_dropping_a_last_bit_that_is_zero_changes_nothing(self):
        """The weights stay as they are on the coarser grid."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = LastBitLearner(model, limited(inventory.layers, 9e9), per_channel=False)
        with torch.no_grad():
            step = learner._step(1)
            latent = learner.latent(inventory.layers[1])
            # The topmost code is odd: nothing may be clipped to it.
            latent.copy_(2 * step * (latent / (2 * step)).round().clamp(-64, 63))
            assert float(learner.last_bits(1).sum()) < 1e-3
            before = learner.quantized(1)
            learner.bits[1] -= 1
            assert torch.allclose(before, learner.quantized(1), atol=1e-6)

    def test_the_size_comes_down_to_the_limit_by_the_last_event(self):
        """In steps; afterwards bit-widths stay and nothing is paid."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 3.0 * inventory.n_weights
        learner = LastBitLearner(model, limited(inventory.layers, limit), per_channel=True)
        sizes = []
        for progress in (0.0, 0.2, 0.4, 0.6, 0.71, 1.0):
            penalty = learner.penalty(progress).item()
            learner.after_step()
            sizes.append(float((learner.counts * learner.relaxed_bits()).sum()))
        assert sorted(sizes, reverse=True) == sizes
        assert sizes[0] == 8 * inventory.n_weights
        assert sizes[-2] == sizes[-1] <= limit
        assert 0.0 == penalty

    def test_layers_that_hardly_matter_lose_two_bits(self):
        """By squares of gradients and what dropping changes."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = LastBitLearner(
            model, limited(inventory.layers, 2 * inventory.n_weights), per_channel=True
        )
        for k, layer in enumerate(inventory.layers):
            latent = learner.latent(layer)
            latent.grad = torch.full_like(latent, 1e-3 if k in (0, 3) else 1.0)
        learner.before_step()
        learner.penalty(0.06)
        learner.after_step()
        assert 1.0 == float((8 - learner.bits).max())
        assert [2.0, 1.0, 1.0, 1.0] == learner.by.tolist()
        # Halfway between codes of which both last bits are zero lies a code with one of them set.
        with torch.no_grad():
            latent, step = learner.latent(inventory.layers[0]), learner._step(0)
            latent.copy_(2 * step * learner.parts[0].ratios.reshape(-1, 1, 1, 1))
        assert torch.allclose(torch.tensor(1.0), learner.last_bits(0), atol=1e-4)


class TestBitPlaneLearner:
    def learner(self, average=3.0):
        model = trained_digits_net()
        inventory = inventory_of(model)
        return BitPlaneLearner(
            model, limited(inventory.layers, average * inventory.n_weights), per_channel=True
        )

    def test_starts_at_eight_bits_and_requantizing_changes_nothing(self):
        """Planes hold the codes; a layer whose planes are whole keeps its weights."""
        learner = self.learner()
        assert [8.0] * 4 == learner.relaxed_bits().tolist()
        before = [learner.quantized(k).detach().clone() for k in range(4)]
        learner.weight_penalty(1.0)
        learner.after_step()
        assert 12 == int(learner.events)
        for k in range(4):
            assert torch.allclose(before[k], learner.quantized(k), atol=1e-6)

    def test_empty_planes_are_dropped_at_both_ends(self):
        """Codes 0, 4 and -12 need two planes and the sign, at four times the step."""
        learner = self.learner()
        codes = torch.zeros_like(learner.codes(1))
        codes[0, :3] = torch.tensor([4.0, -12.0, 8.0])
        step = float(learner.steps[1])
        learner._decompose(1, codes)
        assert 3.0 == float(learner.bits[1])
        assert 4 * step == pytest.approx(float(learner.steps[1]))
        assert torch.allclose(step * codes, learner.quantized(1))

    def test_the_group_lasso(self):
        """Weighed by weights and bits; nothing once every budget holds."""
        learner = self.learner()
        expected = 0.0
        for k in range(4):
            part = learner.parts[k]
            both = torch.cat([part.positive.flatten(1), part.negative.flatten(1)], dim=1)
            share = float(learner.counts[k] / learner.counts.sum())
            expected += share * 8 * float(both.norm(dim=1).sum().detach())
        assert 5e-3 * expected == pytest.approx(learner.penalty(0.0).item(), rel=1e-4)
        assert 0.0 == self.learner(8.0).penalty(0.0).item()


class TestStabilisedLearner:
    def test_starts_at_four_bits_and_pays_for_the_excess(self):
        """The penalty is zero at the limit and grows with the run."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        n = inventory.n_weights

        def learner(average):
            return StabilisedLearner(
                model, limited(inventory.layers, average * n), per_channel=True
            )

        assert torch.allclose(torch.full((4,), 4.0), learner(2.5).relaxed_bits(), atol=1e-4)
        assert 0.0 == learner(4.1).penalty(0.5).item()
        assert 0.5 * (4 / 2.5 - 1) == pytest.approx(learner(2.5).penalty(0.0).item(), rel=1e-4)
        assert 2.5 * (4 / 2.5 - 1) == pytest.approx(learner(2.5).penalty(1.0).item(), rel=1e-4)


class TestRepair:
    @given(
        relaxed=st.lists(st.floats(2, 8), min_size=3, max_size=3),
        average=st.floats(2.0, 8.5),
    )
    def test_fits_and_leaves_no_room_for_another_step(self, relaxed, average):
        """For any relaxed bit-widths and limit."""
        layers = [
            layer_of(LayerKind.LINEAR, shape, name=name)
            for name, shape in (("a", (3, 10)), ("b", (20, 20)), ("c", (5, 40)))
        ]
        table = {la.name: {b: Candidate.of(la, b, Scheme()) for b in WIDTHS} for la in layers}
        smallest = sum(table[la.name][2].size_bits for la in layers)
        limit = smallest + int((average - 2) * sum(la.n_weights for la in layers))
        budget = Budget(resource="size_bits", limit=limit + 7, constant=7)
        chosen = repair(prices_of(layers, [budget]), relaxed)
        size = sum(c.size_bits for c in chosen)
        assert size <= limit
        for layer, candidate in zip(layers, chosen, strict=True):
            if candidate.weight_bits < 8:
                up = WIDTHS[WIDTHS.index(candidate.weight_bits) + 1]
                more = table[layer.name][up].size_bits - candidate.size_bits
                assert size + more > limit

    def test_follows_the_relaxed_widths(self):
        """With room for exactly them, whole numbers stay as they are."""
        layers = [layer_of(LayerKind.LINEAR, (8, 8), name=name) for name in "abc"]
        table = {la.name: {b: Candidate.of(la, b, Scheme()) for b in WIDTHS} for la in layers}
        limit = sum(table[n][b].size_bits for n, b in (("a", 5), ("b", 2), ("c", 3)))
        budget = Budget(resource="size_bits", limit=limit)
        chosen = repair(prices_of(layers, [budget]), [5.0, 2.0, 3.0])
        assert [5, 2, 3] == [c.weight_bits for c in chosen]

    @given(
        relaxed=st.lists(st.floats(2, 8), min_size=6, max_size=6),
        size=st.floats(2.1, 8.5),
        products=st.floats(9.0, 40.0),
    )
    def test_several_budgets(self, relaxed, size, products):
        """Sizes, products and the largest input hold together; no step up fits them all."""
        layers = [
            replace(
                layer_of(LayerKind.LINEAR, shape, name=name),
                n_macs=shape[0] * shape[1],
                n_inputs=shape[1],
            )
            for name, shape in (("a", (3, 10)), ("b", (20, 20)), ("c", (5, 40)))
        ]
        macs = sum(la.n_macs for la in layers)
        budgets = [
            Budget(resource="code_bits", limit=int(size * sum(la.n_weights for la in layers))),
            Budget(resource="bit_ops", limit=int(products * macs)),
            Budget(resource="activation_bits_max", limit=5 * max(la.n_inputs for la in layers)),
        ]
        offered = (3, 4, 6)
        prices = prices_of(layers, budgets, offered)
        chosen = repair(prices, relaxed[:3], dict(enumerate(relaxed[3:])))
        assert all(b.spent(chosen) <= b.limit for b in budgets)
        for k, c in enumerate(chosen):
            for widths, at in ((WIDTHS, 0), (offered, 1)):
                pair = [c.weight_bits, c.activation_bits]
                if pair[at] == widths[-1]:
                    continue
                pair[at] = widths[widths.index(pair[at]) + 1]
                other = [*chosen]
                other[k] = Candidate.of(layers[k], pair[0], Scheme(), pair[1])
                assert any(b.spent(other) > b.limit for b in budgets)

    def test_a_cost_that_falls_with_bits(self):
        """A runtime may be slower at 3 bits than at 4: what is lowered must save something."""
        layer = layer_of(LayerKind.LINEAR, (8, 8), name="a")
        costs = {2: 10, 3: 90, 4: 50, 5: 60, 6: 70, 8: 80}
        table = CostTable(
            resource="latency_ns", model_digest="",
            layers=tuple(LayerCost(layer="a", candidate=f"W{w}", cost=c) for w, c in costs.items()),
        )  # fmt: skip
        budget = Budget(resource="latency_ns", limit=55, prices=table)
        (chosen,) = repair(prices_of([layer], [budget]), [6.5])
        assert 4 == chosen.weight_bits


class TestPublishedPowersLearner:
    def test_weights_are_powers_of_two_and_the_penalty_reaches_the_limit(self):
        """Magnitudes between smallest and largest, no zero; widths follow from their ratio."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = PublishedPowersLearner(
            model, limited(inventory.layers, 2.5 * inventory.n_weights), per_channel=False
        )
        assert [4.0] * 4 == learner.relaxed_bits().tolist()
        exponents = torch.log2(learner.quantized(1).detach().abs())
        assert torch.equal(exponents, exponents.round())
        assert exponents.unique().numel() <= 8
        excess = 1.5 * inventory.n_weights + 10 * 4
        assert 0.1 * (excess / 8192) ** 2 == pytest.approx(learner.penalty(0.0).item(), rel=1e-4)

    def test_a_scalar_multiplies_the_logits_and_ends_in_the_last_layer(self):
        """With the scalar at 3 the logits are three times as large, also once it is folded."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = limited(inventory.layers, 3 * inventory.n_weights)
        learner = PublishedPowersLearner(model, limit, per_channel=False)
        learner.model.eval()
        x = digits()[0][:5]
        before = run_with(learner, (x,)).detach()
        with torch.no_grad():
            learner.parts.log_scalar.fill_(math.log(3.0))
        assert torch.allclose(3 * before, run_with(learner, (x,)).detach(), atol=1e-4)
        weight = learner.weights()["head.weight"].detach()
        learner.finish()
        folded = learner.model.head.weight.detach() / 3
        assert torch.allclose(weight, 3 * learner.parts[3].quantizer(folded).detach(), rtol=1e-5)

    @pytest.mark.parametrize("recipe", ["uhlich2020", "uhlich2020_p3"])
    def test_biases_end_on_their_grids(self, recipe, data):
        """Multiples of one step, or powers of two times one scalar, also after the second phase."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        short = {"epochs": 1, "batch_size": 64}
        learned = learn(
            model, inventory, data, average_of(inventory, 3), WIDTHS, recipe=recipe,
            settings=replace(default_settings(recipe), **short),
            finetuning=replace(FINETUNING, epochs=1),
        )  # fmt: skip
        sizes = learned.trained.module.head.bias.detach().abs().double()
        assert not torch.equal(sizes, model.head.bias.detach().abs().double())
        if recipe == "uhlich2020":
            assert sizes.unique().numel() <= 8
        else:
            exponents = torch.log2(sizes) - torch.log2(sizes[0])
            assert torch.allclose(exponents, exponents.round(), atol=1e-5)

    def test_learns_under_a_limit_on_the_largest_input(self, data):
        """The paper's (8a) and (8c) together; what is stored is the scheme of powers of two."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        budgets = [average_of(inventory, 3), Budget.parse("act 400 B", inventory)]
        learned = learn(
            model, inventory, data, budgets, WIDTHS, recipe="uhlich2020_p3",
            settings=replace(default_settings("uhlich2020_p3"), epochs=2, batch_size=64),
            finetuning=FINETUNING,
        )  # fmt: skip
        assert all(b.spent(learned.candidates) <= b.limit for b in budgets)
        assert {"power_of_two"} == {str(c.scheme.grid) for c in learned.candidates}
        assert learned.plan.measured.accuracy > 0.8
