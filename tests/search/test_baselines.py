import pytest

from bitquota.candidates.table import enumerate_candidates
from bitquota.search.baselines import baseline_choices, size_only, uniform_mixes, weight_mse
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of


class TestBaselineChoices:
    def test_uniform_and_ends_high(self):
        """One uniform choice per width; first and last at the highest."""
        table = table_of(inventory_of(build(Residual)), (2, 4, 8))

        assert baseline_choices(table) == {
            "uniform W2": (0, 0, 0, 0),
            "uniform W4": (1, 1, 1, 1),
            "uniform W8": (2, 2, 2, 2),
            "first and last W8, rest W2": (2, 0, 0, 2),
            "first and last W8, rest W4": (2, 1, 1, 2),
        }

    def test_each_width_of_inputs(self):
        """Where inputs have several widths on offer, each stands beside every width of weights."""
        inventory = inventory_of(build(Residual))
        table = enumerate_candidates(inventory, (4, 8), activation_bits=(4, 8))
        choices = baseline_choices(table)

        assert choices["uniform W4A8"] == (1,) * 4  # rows are W4A4, W4A8, W8A4, W8A8
        assert choices["uniform W8A4"] == (2,) * 4
        assert choices["first and last W8, rest W4A4"] == (2, 0, 0, 2)
        size = sum(c.size_bits for c in table.decode((2, 0, 0, 2)))
        assert {name.split(",")[0] for name in uniform_mixes(table, size)} == {
            "uniform W4/W8A4 mix",
            "uniform W4/W8A8 mix",
        }

    def test_fixed_layers_keep_their_width(self):
        """A group with one row takes it everywhere, and equal choices appear once."""
        inventory = inventory_of(build(Residual))
        table = enumerate_candidates(inventory, (2, 4), fixed={"stem": 8, "head": 8})
        choices = baseline_choices(table)

        assert choices["uniform W2"] == (0, 0, 0, 0)
        assert len(set(choices.values())) == len(choices)
        assert "first and last W8, rest W4" not in choices


class TestUniformMixes:
    def test_uses_the_bytes_of_the_plan(self):
        """Two neighbouring widths; nothing more fits, nothing is exceeded."""
        table = table_of(inventory_of(build(Residual)), (2, 4, 8))
        sizes = [sum(c.size_bits for c in row.candidates) for row in table.rows]
        at = lambda choice: sum(  # noqa: E731
            sizes[table.offsets[g] + k] for g, k in enumerate(choice)
        )
        low, high = at((0,) * 4), at((1,) * 4)
        mixes = uniform_mixes(table, (low + high) // 2)
        assert mixes
        for name, choice in mixes.items():
            assert name.startswith("uniform W2/W4 mix, ")
            assert {0, 1} == set(choice)
            assert low < at(choice) <= (low + high) // 2
            for g in range(4):  # no further group could be wider
                wider = [1 if k == g else c for k, c in enumerate(choice)]
                assert choice[g] == 1 or at(wider) > (low + high) // 2
        assert len(set(mixes.values())) == len(mixes)

    def test_none_outside_of_the_uniform_plans(self):
        """Below the smallest, at the largest."""
        table = table_of(inventory_of(build(Residual)), (2, 4))
        assert uniform_mixes(table, 10) == {}
        assert uniform_mixes(table, 10**9) == {}


class TestSizeOnly:
    def test_counts_bits_only(self):
        """The score does not look at the network."""
        table = table_of(inventory_of(build(Residual)), (2, 8))

        assert size_only(table).diagonal.tolist() == [-2, -8] * 4


class TestWeightMse:
    def test_equals_the_squared_error(self):
        """Against the difference of the weights."""
        module = build(Residual)
        inventory = inventory_of(module)
        table = table_of(inventory)
        runner = make_runner(module, inventory, samples(Residual), engine="eager")

        matrix = weight_mse(module, inventory, table)

        for row, value in zip(table.rows, matrix.diagonal, strict=True):
            (candidate,) = row.candidates
            error = runner.weights(candidate) - runner.weights.original(candidate.layer)
            assert value == pytest.approx(float(error.detach().square().sum()), rel=1e-5)
        assert (matrix.diagonal[0::2] > matrix.diagonal[1::2]).all()
