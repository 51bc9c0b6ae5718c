"""Trainable weights: what trains is what is stored."""

import pytest
import torch

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.layout import from_matrix
from bitquota.quantizers.packing import pack, unpack
from bitquota.quantizers.weights import fake_quantize
from bitquota.training.weight_quantizers import trainable_weight, trained_candidate
from layer_shapes import LAYERS

SCHEMES = {
    "channel": Scheme(),
    "tensor": Scheme(granularity=Granularity.TENSOR),
    "group": Scheme(granularity=Granularity.GROUP, group_size=4, scale_format=ScaleFormat.FP16),
    "asymmetric": Scheme(grid=Grid.ASYMMETRIC, scale_format=ScaleFormat.BF16),
}


def weight_of(layer, seed=0):
    return torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(seed))


class TestLearnedSteps:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("kind", [LayerKind.CONV_TRANSPOSE1D, LayerKind.LINEAR_TRANSPOSED])
    def test_starts_at_the_candidate_itself(self, kind, bits, scheme):
        """Before the first step the model is the post-training quantized one."""
        layer = LAYERS[kind]
        latent = weight_of(layer)
        candidate = Candidate.of(layer, bits, SCHEMES[scheme])
        trainable = trainable_weight("lsq", latent, layer, candidate)
        expected = fake_quantize(latent, layer, bits, SCHEMES[scheme])
        assert torch.allclose(expected, trainable.fake(latent), atol=1e-6)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("bits", [1, 3])
    def test_stores_what_it_trained_with(self, bits, scheme):
        """After any steps, through bytes and back, in the candidate's exact size."""
        layer = LAYERS[LayerKind.CONV2D]
        latent = weight_of(layer)
        candidate = Candidate.of(layer, bits, SCHEMES[scheme])
        trainable = trainable_weight("lsq", latent, layer, candidate)
        with torch.no_grad():
            trainable.log_factor += 0.1 * weight_like(trainable.log_factor)
            latent += 0.1 * weight_of(layer, seed=1)
        packed = pack(trainable.stored(latent))
        assert candidate.size_bits == 8 * packed.n_bytes
        back = from_matrix(unpack(packed).dequantize(), layer)
        assert torch.allclose(trainable.fake(latent).detach(), back, atol=1e-6)

    def test_gradients_reach_latents_and_steps(self):
        """Both are trained."""
        layer = LAYERS[LayerKind.LINEAR]
        latent = weight_of(layer).requires_grad_()
        trainable = trainable_weight("lsq", latent, layer, Candidate.of(layer, 3, Scheme()))
        trainable.fake(latent).square().sum().backward()
        assert float(latent.grad.abs().sum()) > 0
        assert bool((trainable.log_factor.grad != 0).all())

    def test_a_row_of_zeros_can_still_learn(self):
        """Its step is small, not zero."""
        layer = LAYERS[LayerKind.LINEAR]
        latent = weight_of(layer)
        latent[2] = 0
        trainable = trainable_weight("lsq", latent, layer, Candidate.of(layer, 3, Scheme()))
        assert bool(torch.isfinite(trainable.fake(latent)).all())
        assert bool((trainable.steps() != 0).all())

    @pytest.mark.parametrize("rule", ScaleRule)
    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    def test_quantizing_again_changes_nothing(self, grid, rule):
        """Whatever the plan fitted scales with: exporters quantize the trained weights."""
        layer = LAYERS[LayerKind.CONV2D]
        latent = weight_of(layer)
        candidate = Candidate.of(layer, 3, Scheme(grid=grid, scale_rule=rule))
        candidate = trained_candidate("lsq", layer, candidate)
        trainable = trainable_weight("lsq", latent, layer, candidate)
        with torch.no_grad():
            trainable.log_factor += 0.12
        shipped = from_matrix(trainable.stored(latent).dequantize(), layer)
        again = fake_quantize(shipped, layer, 3, candidate.scheme)
        assert torch.allclose(shipped, again, atol=1e-6)

    def test_needs_no_gram_for_error_feedback(self):
        """Training moves the weights itself, and rounds to nearest."""
        layer = LAYERS[LayerKind.LINEAR]
        candidate = Candidate.of(layer, 3, Scheme(rounding=Rounding.ERROR_FEEDBACK))
        trainable = trainable_weight("lsq", weight_of(layer), layer, candidate)
        assert Rounding.NEAREST is trainable.stored(weight_of(layer)).scheme.rounding


def weight_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(5))


class TestTrainableWeight:
    def test_direct_keeps_two_to_the_bits_levels(self):
        """One codebook per tensor."""
        layer = LAYERS[LayerKind.CONV2D]
        latent = weight_of(layer)
        trainable = trainable_weight("direct", latent, layer, Candidate.of(layer, 3, Scheme()))
        assert 8 == len(trainable.fake(latent).unique())
        stored = from_matrix(trainable.stored(latent).dequantize(), layer)
        assert torch.equal(trainable.fake(latent), stored)

    @pytest.mark.parametrize("kind", [LayerKind.CONV_TRANSPOSE1D, LayerKind.LINEAR_TRANSPOSED])
    def test_a_codebook_carries_latents_of_any_layout(self, kind):
        """A level-only step changes no assignment, also where the matrix is not a view."""
        layer = LAYERS[kind]
        latent = weight_of(layer)
        candidate = Candidate.of(layer, 2, Scheme(grid=Grid.CODEBOOK))
        trainable = trainable_weight("direct", latent, layer, candidate)
        before = trainable.stored(latent).codes
        with torch.no_grad():
            trainable.codebook.levels += 0.05 * weight_like(trainable.codebook.levels)
        trainable.after_step(latent)
        assert torch.equal(before, trainable.stored(latent).codes)

    def test_powers_of_two_learn_their_scale(self):
        """Starts at the candidate itself; both parts have gradients."""
        layer = LAYERS[LayerKind.LINEAR]
        latent = weight_of(layer).requires_grad_()
        scheme = Scheme(grid=Grid.POWER_OF_TWO)
        trainable = trainable_weight("lsq", latent, layer, Candidate.of(layer, 3, scheme))
        expected = fake_quantize(latent, layer, 3, scheme)
        assert torch.allclose(expected, trainable.fake(latent), atol=1e-6)
        (trainable.fake(latent) * weight_of(layer, seed=3)).sum().backward()
        assert bool((trainable.log_factor.grad != 0).all())
        assert float(latent.grad.abs().sum()) > 0

    def test_learned_steps_do_not_train_codebooks(self):
        """The message names the method that does."""
        layer = LAYERS[LayerKind.LINEAR]
        candidate = Candidate.of(layer, 2, Scheme(grid=Grid.CODEBOOK))
        with pytest.raises(InvalidInput, match="take method 'direct'"):
            trainable_weight("lsq", weight_of(layer), layer, candidate)

    def test_refuses_unknown_methods(self):
        """The known ones are listed."""
        layer = LAYERS[LayerKind.LINEAR]
        with pytest.raises(InvalidInput, match="must be one of lsq, tqt, direct; got 'magic'"):
            trainable_weight("magic", weight_of(layer), layer, Candidate.of(layer, 3, Scheme()))

    def test_refuses_full_precision(self):
        """There is nothing to train."""
        layer = LAYERS[LayerKind.LINEAR]
        with pytest.raises(InvalidInput, match="stays in full precision"):
            trainable_weight("lsq", weight_of(layer), layer, Candidate.of(layer, 32, Scheme()))
