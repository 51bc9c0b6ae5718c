"""Learned bit-widths: the limit holds exactly, and they are worth having."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.budget import Budget
from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.packing import pack
from bitquota.training.bit_learners import (
    BitPruningLearner,
    BitSparsityLearner,
    EllipsoidLearner,
    PublishedLearner,
    StabilisedLearner,
)
from bitquota.training.finetune import finetune
from bitquota.training.learn import RECIPES, learn
from bitquota.training.objective import run_with
from bitquota.training.repair import repair
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, accuracy, digits, trained_digits_net
from layer_shapes import layer_of

SETTINGS = TrainingSettings(
    epochs=4, batch_size=64, learning_rate=3e-3, quantizer_learning_rate=2e-2
)
FINETUNING = replace(SETTINGS, epochs=2, quantizer_learning_rate=5e-3)
WIDTHS = (2, 3, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def data():
    """Labelled training samples."""
    x, y = digits()
    return CalibrationSet(inputs=(x[:N_TRAIN],), labels=y[:N_TRAIN])


def inventory_of(model):
    return discover(model, (torch.zeros(1, 1, 8, 8),))


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
        shipped = sum(8 * pack(w).n_bytes for w in learned.trained.stored.values())
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
        """The smallest plan is named."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(BudgetTooSmall, match="every layer at 2 bits"):
            learn(model, inventory, data, average_of(inventory, 1.9), WIDTHS)

    def test_refuses_unknown_recipes(self, data):
        """The known ones are listed."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match="ellipsoid, bitpruning, bsq, uhlich2020"):
            learn(model, inventory, data, average_of(inventory, 4), WIDTHS, recipe="magic")

    def test_refuses_budgets_of_other_resources(self, data):
        """Bit operations are for the solver."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        with pytest.raises(InvalidInput, match="size_bits or code_bits.*got 'bit_ops'"):
            learn(model, inventory, data, Budget.parse("1 GBitOps", inventory), WIDTHS)

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
        learner = EllipsoidLearner(
            model, inventory.layers, limit, least=2, most=8, per_channel=True
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            direction = learner.parts.get_parameter("direction")
            direction.data.copy_(torch.randn(direction.shape, generator=generator))
            size = float((learner.counts * learner.relaxed_bits().detach()).sum())
            assert limit == pytest.approx(size, rel=1e-6)

    def test_the_size_is_constant_along_training(self):
        """To 1e-6 after every step, whatever the loss asks for."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 2.7 * inventory.n_weights
        learner = EllipsoidLearner(
            model, inventory.layers, limit, least=2, most=8, per_channel=True
        )
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
            assert limit == pytest.approx(size, rel=1e-6)
        assert not torch.allclose(first, learner.relaxed_bits(), atol=0.05)


class TestPublishedLearner:
    def test_the_penalty_alone_reaches_the_limit(self):
        """Without data every layer falls to the floor within dozens of steps."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        limit = 2.5 * inventory.n_weights
        learner = PublishedLearner(
            model, inventory.layers, limit, least=2, most=8, per_channel=False
        )
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
        learner = PublishedLearner(
            model, inventory.layers, limit, least=2, most=8, per_channel=False
        )
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
            assert not _is_power_of_two(step)
            inside = learner.quantized(k).detach()
            inside = inside[inside.abs() < largest] / step.detach()
            assert torch.allclose(inside, inside.round(), atol=1e-3)

    def test_penalty_is_that_of_resnet20(self):
        """131.0 kB at 4 bits against 70.1 kB cost 0.1 (131.0 - 70.1)^2 = 371."""
        model = torch.nn.Sequential(torch.nn.Linear(1024, 262))
        layer = layer_of(LayerKind.LINEAR, (262, 1024), name="0")
        learner = PublishedLearner(
            model, [layer], 70.1 * 8 * 1024, least=2, most=8, per_channel=False
        )
        assert 0.1 * (131.0 - 70.1) ** 2 == pytest.approx(learner.penalty(0.0).item(), rel=1e-3)


def _is_power_of_two(step):
    exponent = float(torch.log2(step.detach()))
    return abs(exponent - round(exponent)) < 1e-6


class TestBitPruningLearner:
    def test_the_gradient_of_a_length_is_the_difference_of_the_two_grids(self):
        """Contracted with the loss's gradient."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = BitPruningLearner(
            model, inventory.layers, 9e9, least=2, most=8, per_channel=True,
            start_bits=[3.3] * 4,
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


class TestBitSparsityLearner:
    def test_dropping_a_last_bit_that_is_zero_changes_nothing(self):
        """The weights stay as they are on the coarser grid."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        learner = BitSparsityLearner(
            model, inventory.layers, 9e9, least=2, most=8, per_channel=False
        )
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
        learner = BitSparsityLearner(
            model, inventory.layers, limit, least=2, most=8, per_channel=True
        )
        sizes = []
        for progress in (0.0, 0.2, 0.4, 0.6, 0.71, 1.0):
            penalty = learner.penalty(progress).item()
            learner.after_step()
            sizes.append(float((learner.counts * learner.relaxed_bits()).sum()))
        assert sorted(sizes, reverse=True) == sizes
        assert sizes[0] == 8 * inventory.n_weights
        assert sizes[-2] == sizes[-1] <= limit
        assert 0.0 == penalty


class TestStabilisedLearner:
    def test_starts_at_four_bits_and_pays_for_the_excess(self):
        """The penalty is zero at the limit and grows with the run."""
        model = trained_digits_net()
        inventory = inventory_of(model)
        n = inventory.n_weights

        def learner(average):
            return StabilisedLearner(
                model, inventory.layers, average * n, least=2, most=8, per_channel=True
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
        chosen = repair(layers, relaxed, table, budget)
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
        chosen = repair(layers, [5.0, 2.0, 3.0], table, budget)
        assert [5, 2, 3] == [c.weight_bits for c in chosen]
