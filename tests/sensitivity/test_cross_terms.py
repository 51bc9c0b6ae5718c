"""What cross-layer terms are: the loss's Hessian in the weights, joint candidates, whole groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate, CandidateTable, Row
from bitquota.errors import InvalidInput
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.measures.tangent import TangentMeasure
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import (
    Attention,
    Branches,
    Residual,
    build,
    inventory_of,
    samples,
    table_of,
)

KL = loss_by_name("kl")


def hessian_products(module, x, loss, deltas):
    """Return ``f64[k, k]``: ``Δ_iᵀ H Δ_j`` with the Hessian of the mean loss in all weights."""
    module = module.double()
    x = x.double()
    names = [name for name, _ in deltas]
    weights = {n: module.get_parameter(n).detach().clone() for n in dict.fromkeys(names)}
    with torch.no_grad():
        reference = module(x)

    def total(*values):
        moved = dict(zip(weights, values, strict=True))
        output = torch.func.functional_call(module, moved, (x,))
        return loss.per_sample(output, reference, None).mean()

    point = tuple(weights.values())
    found = np.empty((len(deltas), len(deltas)))
    for j, (name, delta) in enumerate(deltas):
        direction = tuple(delta if n == name else torch.zeros_like(w) for n, w in weights.items())
        _, product = torch.autograd.functional.hvp(total, point, direction)
        by_name = dict(zip(weights, product, strict=True))
        for i, (other, own) in enumerate(deltas):
            found[i, j] = float((by_name[other] * own).sum())
    return found


class TestLossHessian:
    @pytest.mark.parametrize("kind", [Residual, Branches])
    def test_tangents_give_the_hessian_in_the_weights(self, kind):
        """For KL at full precision, where the Hessian is the Gauss-Newton matrix, exactly.

        The network is piecewise linear in its weights and the loss has no slope there, so that
        second derivatives of the network itself contribute nothing.
        """
        module, data = build(kind), samples(kind)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, data, chunk_size=5, engine="graph")
        table = table_of(inventory, (3, 5))
        matrix = TangentMeasure().measure(runner, table, KL)
        deltas = []
        for row in table.rows:
            (candidate,) = row.candidates
            original = runner.weights.original(candidate.layer)
            change = (runner.weights(candidate) - original).detach().double()
            deltas.append((f"{candidate.layer}.weight", change))

        expected = hessian_products(build(kind), data.inputs[0], KL, deltas)

        other = table.group_of_row[:, None] != table.group_of_row[None, :]
        scale = np.abs(expected[other]).max()
        np.testing.assert_allclose(
            matrix.cross[other], expected[other], atol=2e-3 * scale, rtol=2e-3
        )
        half = np.diag(expected) / 2
        np.testing.assert_allclose(matrix.diagonal, half, atol=2e-3 * half.max(), rtol=2e-3)

    def test_measured_terms_approach_it_as_changes_shrink(self):
        """Exact pairs and Gram terms of ever smaller changes end at the same numbers."""
        module, data = build(Branches), samples(Branches)
        inventory = inventory_of(module)
        table = table_of(inventory, (6, 8))
        matrices = []
        for measure in (measure_pairs, measure_gram, TangentMeasure().measure):
            runner = make_runner(module, inventory, data, chunk_size=5, engine="graph")
            matrices.append(measure(runner, table, KL).cross)
        scale = np.abs(matrices[2]).max()
        assert scale > 1e-7
        np.testing.assert_allclose(matrices[0], matrices[2], atol=0.1 * scale)
        np.testing.assert_allclose(matrices[1], matrices[2], atol=0.1 * scale)


def grid(layer, bits):
    """Return a quantizer of inputs that differs from layer to layer and from width to width."""
    step = {"left": 1.0, "right": 1.5}.get(layer, 0.8) * 2.0 ** (1 - bits)
    return lambda x: (x / step).round() * step


def joint_table(inventory):
    """Return weights and inputs as joint candidates, one row for each combination."""
    rows = []
    for layer in inventory.layers:
        for bits, input_bits in ((2, 4), (2, 8), (4, 4), (8, None)):
            candidate = Candidate.of(layer, bits, Scheme(), activation_bits=input_bits)
            rows.append(Row(group=layer.group, candidates=(candidate,)))
    return CandidateTable(rows=tuple(rows))


class TestJointCandidates:
    @pytest.mark.parametrize("engine", ["graph", "eager"])
    @pytest.mark.parametrize("measure", [measure_pairs, measure_gram, measure_singles])
    def test_weights_and_inputs_change_together(self, engine, measure):
        """Every entry is that of a network whose weights and inputs were quantized by hand."""
        module, data = build(Branches), samples(Branches)
        inventory, mse = inventory_of(module), loss_by_name("mse")
        table = joint_table(inventory)
        runner = make_runner(module, inventory, data, chunk_size=5, engine=engine, activations=grid)
        matrix = measure(runner, table, mse)
        x = data.inputs[0]

        def by_hand(*rows):
            output = 0
            chosen = {c.layer: c for r in rows for c in table.rows[r].candidates}
            for name in ("left", "right"):
                part, given = module.get_submodule(name), x
                weight = part.weight
                if name in chosen:
                    weight = runner.weights(chosen[name])
                    if chosen[name].activation_bits is not None:
                        given = grid(name, chosen[name].activation_bits)(x)
                output = output + torch.nn.functional.linear(given, weight, part.bias)
            return float(mse.per_sample(output, module(x), None).mean())

        with torch.no_grad():
            for r in range(len(table.rows)):
                assert matrix.diagonal[r] == pytest.approx(by_hand(r), rel=1e-3)
            if matrix.cross is not None:
                for i, j in itertools.product(range(4), range(4, 8)):
                    expected = by_hand(i, j) - by_hand(i) - by_hand(j)
                    assert matrix.cross[i, j] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        # The same weights with coarser inputs cost more: inputs really are in the score.
        assert matrix.diagonal[0] > matrix.diagonal[1]

    def test_tangents_see_inputs_too(self):
        """On a linear network with squared error first order is exact, for inputs as well."""
        module, data = build(Branches), samples(Branches)
        inventory, mse = inventory_of(module), loss_by_name("mse")
        table = joint_table(inventory)
        matrices = []
        for measure in (TangentMeasure().measure, measure_pairs):
            runner = make_runner(
                module, inventory, data, chunk_size=5, engine="graph", activations=grid
            )
            matrices.append(measure(runner, table, mse))
        np.testing.assert_allclose(matrices[0].diagonal, matrices[1].diagonal, rtol=1e-4)
        np.testing.assert_allclose(matrices[0].cross, matrices[1].cross, rtol=1e-3, atol=1e-6)
        with pytest.raises(InvalidInput, match="without quantized inputs"):
            TangentMeasure().measure(runner, table, mse, base_point=(0, 0))


class TestGroups:
    @pytest.mark.parametrize("measure", [measure_pairs, measure_gram, measure_singles])
    def test_members_are_perturbed_together(self, measure):
        """The row of a group is the loss of all its members changed at once, not their sum."""
        ties = [["q", "k", "v"]]
        module, data = build(Attention), samples(Attention)
        inventory = inventory_of(module, ties)
        runner = make_runner(module, inventory, data, chunk_size=5, engine="graph")
        table = table_of(inventory, (2, 4))
        matrix = measure(runner, table, KL)
        (group,) = [k for k, row in enumerate(table.rows) if len(row.candidates) == 3][:1]
        change = {c.layer: c for c in table.rows[group].candidates}
        assert set(change) == {"q", "k", "v"}

        def mean_loss(*parts):
            both = {name: c for part in parts for name, c in part.items()}
            losses = [
                KL.per_sample(runner.start(k, both).output, runner.reference(k), runner.labels(k))
                for k in range(len(runner.chunks))
            ]
            return float(torch.cat(losses).mean())

        together = mean_loss(change)
        apart = sum(mean_loss({name: c}) for name, c in change.items())
        assert matrix.diagonal[group] == pytest.approx(together, abs=1e-9)
        assert abs(together - apart) > 1e-4 * together
        if measure is measure_pairs:
            (head,) = [k for k, row in enumerate(table.rows) if row.candidates[0].layer == "o"][:1]
            other = {c.layer: c for c in table.rows[head].candidates}
            expected = mean_loss(change, other) - together - mean_loss(other)
            assert matrix.cross[group, head] == pytest.approx(expected, abs=1e-9)

    def test_tangents_of_a_group_are_the_sum_of_its_members(self):
        """First order is linear: the terms of a group are sums over its members' terms."""
        module, data, mse = build(Attention), samples(Attention), loss_by_name("mse")
        matrices = []
        for ties in ([], [["q", "v"]]):
            inventory = inventory_of(module, ties)
            runner = make_runner(module, inventory, data, chunk_size=5, engine="graph")
            matrices.append(
                TangentMeasure(directions=20).measure(runner, table_of(inventory, (4,)), mse)
            )
        apart, tied = matrices
        names = [[row.candidates[0].layer for row in m.table.rows] for m in matrices]
        q, v, o = (names[0].index(n) for n in ("q", "v", "o"))
        group, head = names[1].index("q"), names[1].index("o")
        expected = apart.cross[q, o] + apart.cross[v, o]
        assert tied.cross[group, head] == pytest.approx(expected, rel=1e-4)
        both = apart.diagonal[q] + apart.diagonal[v] + apart.cross[q, v]
        assert tied.diagonal[group] == pytest.approx(both, rel=1e-4)
