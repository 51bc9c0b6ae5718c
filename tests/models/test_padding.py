"""Padded positions count in nothing that is measured."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bitquota.evaluate.metrics import compare_models
from bitquota.models.calibration import CalibrationSet
from bitquota.models.calls import LayerCall
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.models.padding import (
    inputs_that_count,
    padding_mask,
    positions_that_count,
    without_padding,
)
from bitquota.quantizers.input_moments import call_settings, input_grams
from bitquota.quantizers.walk import walk_layers
from bitquota.sensitivity.curvature import curvature_factor, curvature_products
from bitquota.sensitivity.losses import loss_by_name

LENGTHS = (12, 5, 9)


@pytest.fixture(scope="module")
def model(llama_folder):
    return load_model(str(llama_folder))


@pytest.fixture(scope="module")
def padded():
    """Three sequences, filled up to twelve tokens at the right."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 64, (3, 12), generator=generator)
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    return CalibrationSet(
        inputs=(tokens.where(mask, 0), mask.long()), names=("input_ids", "attention_mask")
    )


@pytest.fixture(scope="module")
def sequences(padded):
    """The same, each by itself and not padded."""
    return [
        CalibrationSet(inputs=(padded.inputs[0][k : k + 1, :n],)) for k, n in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def other(model):
    """The model with changed weights."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


class TestMask:
    def test_of_a_padded_batch(self, model, padded):
        mask = padding_mask(model.module, padded.inputs)
        assert LENGTHS == tuple(mask.sum(1).tolist())
        logits = model.module(*padded.inputs)
        assert torch.equal(mask, positions_that_count(logits))

    def test_nothing_is_padded(self, model, padded):
        tokens, mask = padded.inputs
        assert padding_mask(model.module, (tokens,)) is None
        assert padding_mask(model.module, (tokens, torch.ones_like(mask))) is None
        assert padding_mask(torch.nn.Linear(2, 2), (tokens, mask)) is None

    def test_values_of_another_shape_stay(self, padded):
        """Classes of a sequence, inputs of an expert or of a convolution."""
        mask = padded.inputs[1].bool()
        for values in (torch.ones(3, 12), torch.ones(30, 4), torch.ones(3, 13, 4)):
            assert values is without_padding(values, mask)
        for shape, operator in (((30, 4), "linear"), ((3, 12, 9), "conv1d")):
            call = LayerCall(
                operator=operator, weight=torch.ones(2, 4), bias=None, inputs=torch.ones(shape),
                channel_axis=-1,
            )  # fmt: skip
            assert call.inputs is inputs_that_count(call, mask)

    def test_no_gradient_passes(self, model, padded):
        """What stands at a padded position changes no weight's gradient."""
        module = copy.deepcopy(model.module)
        gradients = []
        for filler in (0, 7):
            tokens, mask = padded.inputs
            module.zero_grad()
            module(tokens.where(mask.bool(), filler), mask).square().sum().backward()
            gradients.append(module.lm_head.weight.grad.clone())
        # Tokens are read by the embedding, which is the head.
        torch.testing.assert_close(*gradients)


class TestLosses:
    def test_kl_is_that_of_the_sequences(self, model, other, padded, sequences):
        loss = loss_by_name("kl")
        found = loss.per_sample(other(*padded.inputs), model.module(*padded.inputs), None)
        alone = [
            loss.per_sample(other(*one.inputs), model.module(*one.inputs), None)
            for one in sequences
        ]
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-9)

    def test_curvature_is_that_of_the_sequences(self, model, other, padded, sequences):
        """Both the products with the Hessian and its factor."""
        loss = loss_by_name("kl")

        def both(data):
            with torch.no_grad():
                output = model.module(*data.inputs)
                differences = (other(*data.inputs) - output).double()[None]
            products = curvature_products(loss, output, output, None, differences)
            factor = curvature_factor(loss, output, torch.ones_like(differences))
            return (products * differences).sum((0, 2, 3)), (factor * differences).sum((0, 2, 3))

        for found, alone in zip(both(padded), zip(*map(both, sequences), strict=True), strict=True):
            torch.testing.assert_close(found, torch.cat(alone), rtol=1e-3, atol=1e-8)


class TestEvaluation:
    def test_counts_tokens_alike(self, model, other, padded, sequences):
        """Means are over all tokens; perplexity is that of the text, whatever the padding."""
        models = {"full": model.module, "other": other}
        _, found = compare_models(models, padded)
        scores = [compare_models(models, one)[1] for one in sequences]
        for metric, less in (("kl", 0), ("same_top", 0), ("cross_entropy", 1), ("top1", 1)):
            counts = [n - less for n in LENGTHS]
            means = [score.metrics[metric].mean for score in scores]
            expected = sum(n * m for n, m in zip(counts, means, strict=True)) / sum(counts)
            assert found.metrics[metric].mean == pytest.approx(expected, rel=1e-4)
        assert found.metrics["kl"].standard_error > 0
        assert found.perplexity == pytest.approx(math.exp(found.metrics["cross_entropy"].mean))

    def test_batches_with_and_without_padding(self, model, other, padded):
        """Batches may be padded or not."""
        models = {"full": model.module, "other": other}
        whole, single = (compare_models(models, padded, batch_size=n)[1] for n in (3, 1))
        for metric, estimate in whole.metrics.items():
            assert single.metrics[metric].mean == pytest.approx(estimate.mean, rel=1e-4)


class TestInputMoments:
    def test_grams_are_those_of_the_sequences(self, model, padded, sequences):
        inventory = inventory_of(model.module, model, padded)
        found = input_grams(model.module, inventory, [padded.inputs])
        alone = input_grams(model.module, inventory, [one.inputs for one in sequences])
        assert set(found) == set(alone)
        for name, gram in found.items():
            torch.testing.assert_close(gram, alone[name], rtol=1e-3, atol=1e-4)

    def test_rounding_in_order_sees_tokens_alone(self, model, padded):
        inventory = inventory_of(model.module, model, padded)
        layers = {la.name: la for la in inventory.layers if "mlp" in la.name}
        twin = copy.deepcopy(model.module)
        meetings = list(walk_layers(model.module, [twin], layers, [padded.inputs], call_settings))
        assert len(layers) == len(meetings)
        for meeting in meetings:
            for values in meeting.inputs[0]:
                assert sum(LENGTHS) == len(values)
