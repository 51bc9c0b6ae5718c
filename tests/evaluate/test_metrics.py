"""Comparing models on one set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.evaluate.metrics import compare_models
from bitquota.evaluate.scores import Estimate
from bitquota.models.calibration import CalibrationSet

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
OTHER = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 1.0]])
DATA = CalibrationSet(inputs=(LOGITS,), labels=torch.tensor([0, 1, 1]))


def scores(**settings):
    """Full precision returns its input, the other a fixed table."""
    models = {"full precision": lambda x: x, "plan": lambda x: OTHER[: len(x)]}
    return compare_models(models, DATA, **settings)


class TestCompareModels:
    def test_metrics_by_hand(self):
        """KL, agreement, top-1 and cross entropy of three samples."""
        full, plan = scores()
        assert full.metrics["kl"].mean == pytest.approx(0.0, abs=1e-12)
        assert full.metrics["top1"].mean == pytest.approx(2 / 3)
        p = torch.softmax(LOGITS.double(), 1)
        q = torch.softmax(OTHER.double(), 1)
        kl = (p * (p / q).log()).sum(1)
        assert plan.metrics["kl"].mean == pytest.approx(float(kl.mean()), rel=1e-12)
        assert plan.kl_tail == pytest.approx(float(kl.quantile(0.999)), rel=1e-9)
        assert plan.metrics["same_top"].mean == pytest.approx(2 / 3)
        assert plan.metrics["top1"].mean == pytest.approx(1 / 3)
        entropy = -q.log()[torch.arange(3), DATA.labels].mean()
        assert plan.perplexity == pytest.approx(math.exp(float(entropy)))

    def test_paired_differences(self):
        """The difference of a metric is taken sample by sample."""
        full, plan = scores()
        paired = plan.differences["full precision"]["top1"]
        assert paired.mean == pytest.approx(-1 / 3)
        assert paired.standard_error == pytest.approx(np.std([0, -1, 0], ddof=1) / math.sqrt(3))
        assert full.differences["plan"]["top1"].mean == -paired.mean

    def test_batches_change_nothing(self):
        """Any batch size gives the same numbers."""
        models = {"a": lambda x: x, "b": lambda x: x * 0.5}
        whole, parts = (compare_models(models, DATA, batch_size=n) for n in (3, 1))
        assert whole[1].metrics["kl"] == parts[1].metrics["kl"]

    def test_text_is_its_own_label(self):
        """Next tokens are the labels of a text without any; the last position has none."""
        ids = torch.tensor([[0, 1, 0, 1]])
        output = torch.zeros(1, 4, 2)
        output[0, torch.arange(3), ids[0, 1:]] = 50.0
        (found,) = compare_models({"m": lambda _: output}, CalibrationSet(inputs=(ids,)))
        assert found.metrics["top1"].mean == 1.0
        assert found.perplexity == pytest.approx(1.0)

    def test_embeddings(self):
        """Cosine and squared error against full precision."""
        models = {"full": lambda x: x, "plan": lambda x: 2 * x}
        _, plan = compare_models(models, DATA, kind="embedding")
        assert plan.metrics["embedding_cosine"].mean == pytest.approx(1.0)
        assert plan.metrics["mse"].mean == pytest.approx(float(LOGITS.square().mean()))

    def test_own_metric(self):
        """A callable of the user's stands beside the others."""
        _, plan = scores(custom={"margin": lambda out, _: (out[:, 0] - out[:, 1]).abs()})
        assert plan.metrics["margin"].mean == pytest.approx(4 / 3)

    def test_shapes_that_differ(self):
        """Named with both shapes."""
        models = {"a": lambda x: x, "b": lambda x: x[:, :1]}
        with pytest.raises(MeasurementFailed, match=r"'b' gave \[3, 1\], 'a' gave \[3, 2\]"):
            compare_models(models, DATA)

    def test_not_finite(self):
        """NaN is named, not averaged."""
        with pytest.raises(MeasurementFailed, match="finite"):
            compare_models({"a": lambda x: x / 0 * 0}, DATA)

    def test_nothing_to_compare(self):
        """No model or an unknown kind."""
        with pytest.raises(InvalidInput, match="needs models and one of the kinds"):
            compare_models({}, DATA)

    def test_one_sample_has_no_error(self):
        """A single value has no standard error to speak of."""
        assert Estimate.of(np.array([3.0])).standard_error == 0.0
