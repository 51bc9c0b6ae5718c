import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.errors import InvalidCalibration, InvalidInput, MeasurementFailed
from bitquota.models.running import primary_output
from bitquota.sensitivity.curvature import curvature_products
from bitquota.sensitivity.losses import LOSSES, CustomLoss, loss_by_name, n_correct
from refusals import refused


def pair(seed=0, shape=(4, 3, 7)):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3, torch.randn(shape, generator=generator))


class TestKullbackLeibler:
    def test_equals_scipy(self):
        """Against scipy's rel_entr, mean over positions."""
        q, p = pair()
        expected = scipy.special.rel_entr(
            scipy.special.softmax(p.double().numpy(), axis=-1),
            scipy.special.softmax(q.double().numpy(), axis=-1),
        ).sum(axis=-1)

        values = loss_by_name("kl").per_sample(q, p, None)

        assert values.dtype == torch.float64
        np.testing.assert_allclose(values.numpy(), expected.mean(axis=1), rtol=1e-12)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6), st.floats(1e-6, 50))
    def test_is_never_negative_and_zero_for_the_same(self, seed, scale):
        """KL is a divergence, also where a probability underflows in float32."""
        q, p = pair(seed, (5, 4))

        assert (loss_by_name("kl").per_sample(q * scale, p * scale, None) >= -1e-12).all()
        assert (loss_by_name("kl").per_sample(p * scale, p * scale, None) == 0).all()


class TestCrossEntropy:
    def test_equals_torch_and_ignores_marked_positions(self):
        """Positions labelled -1 do not count."""
        q, _ = pair()
        labels = torch.tensor([[1, -1, 2], [0, 0, 0], [-1, -1, 6], [-1, -1, -1]])
        expected = [
            torch.nn.functional.cross_entropy(row.double(), y, ignore_index=-1)
            for row, y in zip(q[:3], labels[:3], strict=True)
        ]

        values = loss_by_name("cross_entropy").per_sample(q, q, labels)

        torch.testing.assert_close(values[:3], torch.stack(expected))
        assert values[3] == 0

    @pytest.mark.parametrize("labels", [None, torch.zeros(4)])
    def test_missing_or_misshapen_labels(self, labels):
        """There must be one label per position."""
        q, p = pair()
        with pytest.raises(InvalidCalibration, match="labels"):
            loss_by_name("cross_entropy").per_sample(q, p, labels)


class TestCosineDistance:
    def test_equals_definition(self):
        """1 - a·b / (|a||b|)."""
        a, b = pair(shape=(6, 5))
        expected = 1 - torch.nn.functional.cosine_similarity(a.double(), b.double())

        values = loss_by_name("cosine").per_sample(a, b, None)

        torch.testing.assert_close(values, expected)

    def test_zero_vectors(self):
        """Two zero vectors agree; one zero vector is at distance one."""
        a = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        b = torch.tensor([[0.0, 0.0], [1.0, 0.0]])

        assert loss_by_name("cosine").per_sample(a, b, None).tolist() == [0.0, 1.0]

    def test_small_distances_survive(self):
        """The distance of nearly equal vectors is half the squared angle, not rounding noise."""
        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0**-20]])

        value = float(loss_by_name("cosine").per_sample(a, b, None))

        assert value == pytest.approx(2.0**-41, rel=1e-6)


class TestCustomLoss:
    def test_wrong_shape_is_refused(self):
        """One value per sample."""
        loss = CustomLoss(name="sum", function=lambda o, r, y: (o - r).sum())
        with refused(MeasurementFailed, loss="sum"):
            loss.per_sample(*pair(), None)


class TestLossByName:
    def test_unknown(self):
        """The message lists what there is."""
        with refused(InvalidInput, loss="hinge"):
            loss_by_name("hinge")


class TestPrimaryOutput:
    def test_finds_the_tensor(self):
        """Tensors, mappings with logits, tuples."""
        t = torch.ones(2, 3)

        assert primary_output(t) is t
        assert primary_output({"cache": torch.zeros(1), "logits": t}) is t
        assert primary_output((None, [t])) is t

    def test_nothing(self):
        """No tensor anywhere."""
        with pytest.raises(MeasurementFailed, match="must return a tensor"):
            primary_output({"a": 3})


class TestNCorrect:
    def test_counts_positions(self):
        """Share of right positions of each sample."""
        output = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [2, 2, 2]]), 3).float()
        labels = torch.tensor([[0, 1, 0], [2, -1, -1]])

        torch.testing.assert_close(
            n_correct(output, labels), torch.tensor([2 / 3, 1.0], dtype=torch.float64)
        )


class TestCurvatureProducts:
    @pytest.mark.parametrize("name", [*LOSSES, "own"])
    def test_equals_autograd_hessian(self, name):
        """Closed forms and the autograd route against torch's dense Hessian."""
        own = CustomLoss(
            name="own", function=lambda o, r, y: (o - r).pow(4).reshape(len(o), -1).sum(1)
        )
        loss = own if name == "own" else loss_by_name(name)
        output, reference = (t.double() for t in pair(3, (2, 3, 4)))
        labels = torch.tensor([[0, 3, -1], [1, 1, 2]])
        differences = torch.randn(3, 2, 3, 4, dtype=torch.float64)

        products = curvature_products(loss, output, reference, labels, differences)

        for n in range(2):

            def one(z, n=n):
                at = z.reshape(1, 3, 4)
                return loss.per_sample(at, reference[n : n + 1], labels[n : n + 1]).sum()

            hessian = torch.autograd.functional.hessian(one, output[n].reshape(-1))
            expected = differences[:, n].reshape(3, -1) @ hessian
            torch.testing.assert_close(products[:, n].reshape(3, -1), expected)
