"""Corrections: folding is exact, statistics are those of the data, biases restore means."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.storage import Scheme
from bitquota.models.batch_norm import batch_statistics
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.quantizers.corrections import (
    bias_correction,
    fold_batch_norm,
    output_means,
    reestimate_batch_norm,
)
from bitquota.quantizers.weights import fake_quantize
from digits_network import N_TRAIN, accuracy, digits, trained_digits_net
from sensitivity_networks import Residual, build, samples


@pytest.fixture(scope="module")
def images():
    """Training images for corrections and the rest for accuracy."""
    x, y = digits()
    return CalibrationSet(inputs=(x[:N_TRAIN],)), x[N_TRAIN:], y[N_TRAIN:]


def quantized(module, bits, example):
    """Return a copy with all layers rounded to ``bits``, and the inventory."""
    inventory = discover(module, example)
    copied = copy.deepcopy(module)
    for layer in inventory.layers:
        weight = copied.get_parameter(layer.weight_name)
        weight.data = fake_quantize(weight.data, layer, bits, Scheme())
    return copied, inventory


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class PreActivation(nn.Module):
    """Batch norms that must not be folded, and one that may."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.before = nn.BatchNorm2d(4)  # its input is also read by the shortcut
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.after_relu = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(4, 4, 1)
        self.foldable = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.first(x)
        y = self.second(functional.relu(self.before(x)))
        x = x + self.after_relu(functional.relu(y))
        x = self.foldable(self.third(x))
        return self.shared(self.twice(self.shared(self.twice(x))))


class Sides(nn.Module):
    """Every kind of layer that a batch norm can follow."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.up_norm = nn.BatchNorm2d(4, affine=False)
        self.linear = nn.Linear(4, 5, bias=False)
        self.linear_norm = nn.BatchNorm1d(5)
        self.flat = nn.Conv1d(1, 2, 3)
        self.flat_norm = nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.up_norm(self.up(self.grouped_norm(self.grouped(x))))
        x = self.linear_norm(self.linear(x.mean((2, 3))))
        return self.flat_norm(self.flat(x[:, None]))


def randomise(module, seed=0):
    """Give batch norms statistics and weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(module):
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.2)
        if norm.affine:
            norm.weight.data.copy_(torch.randn(norm.num_features, generator=generator))
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator))
    return module.eval()


class TestFoldBatchNorm:
    def test_gives_the_same_outputs(self, images):
        """On a trained network whose batch norms stand apart in the module tree."""
        model = trained_digits_net()
        _, x, _ = images
        folded = fold_batch_norm(model, (x[:2],))
        assert [] == norms(folded)
        assert torch.allclose(model(x), folded(x), atol=1e-4)

    def test_folds_into_every_kind_of_layer(self):
        """Grouped, transposed with groups, linear, one-dimensional; with and without bias."""
        torch.manual_seed(0)
        model = randomise(Sides())
        x = torch.randn(3, 4, 6, 6)
        folded = fold_batch_norm(model, (x,))
        assert [] == norms(folded)
        assert torch.allclose(model(x), folded(x), atol=1e-5)

    def test_leaves_what_cannot_be_folded(self):
        """Shared inputs, inputs behind a ReLU, and layers that run twice stay."""
        torch.manual_seed(0)
        model = randomise(PreActivation())
        x = torch.randn(3, 3, 6, 6)
        folded = fold_batch_norm(model, (x,))
        kept = [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)]
        assert ["before", "after_relu", "shared"] == kept
        assert torch.allclose(model(x), folded(x), atol=1e-5)

    def test_does_not_change_the_model(self):
        """It works on a copy."""
        model = build(Residual)
        before = copy.deepcopy(model.state_dict())
        fold_batch_norm(model, samples(Residual).inputs)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_folds_an_exported_graph(self):
        """There the batch norm is a call, and a missing bias becomes an argument."""
        model = build(Residual)
        data = samples(Residual)
        exported = torch.export.export(model, data.inputs).module(check_guards=False)
        folded = fold_batch_norm(exported, data.inputs)
        assert torch.allclose(model(*data.inputs), folded(*data.inputs), atol=1e-5)
        assert not [name for name in folded.state_dict() if "norm" in name]
        assert "stem.bias" in folded.state_dict()

    def test_counts_the_new_biases_and_no_batch_norm(self):
        """The inventory of the folded model is what ships."""
        model = build(Residual)
        data = samples(Residual)
        folded = discover(fold_batch_norm(model, data.inputs), data.inputs)
        assert {"stem.bias", "inner.bias", "side.bias", "head.bias"} == {
            t.name for t in folded.unquantized
        }

    @pytest.mark.shared_data
    def test_folds_resnet20(self, resnet20):
        """Batch norm follows its convolution by execution, not by container."""
        model, x = resnet20
        folded = fold_batch_norm(model, (x[:2],))
        assert [] == norms(folded)
        assert torch.allclose(model(x), folded(x), atol=1e-4)


class TestReestimateBatchNorm:
    def test_one_batch_equals_one_norm_after_the_other(self):
        """The definition: every stored statistic is that of the inputs it will see."""
        model = build(Residual)
        data = samples(Residual)
        reestimate_batch_norm(model, data)
        seen = {}
        for name in ("norm", "inner_norm"):
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, n=name: seen.__setitem__(n, args[0].clone())
            )
        # In training mode batch norm normalises with the batch itself.
        model(*data.inputs)
        for name, values in seen.items():
            norm = model.get_submodule(name)
            flat = values.transpose(0, 1).flatten(1)
            assert torch.allclose(flat.mean(dim=1), norm.running_mean, atol=1e-3)
            assert torch.allclose(flat.var(dim=1), norm.running_var, rtol=1e-2)

    @pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 11), (4, 4, 4)])
    def test_the_first_norm_sees_exact_moments_for_any_batches(self, sizes):
        """Mean and variance over all samples, not a moving average over batches."""
        model = build(Residual)
        data = samples(Residual)
        parts = data.inputs[0].split(sizes)
        with torch.no_grad():
            values = model.stem(data.inputs[0]).transpose(0, 1).flatten(1)
        reestimate_batch_norm(model, [(part,) for part in parts])
        assert torch.allclose(values.mean(dim=1), model.norm.running_mean, atol=1e-6)
        assert torch.allclose(values.var(dim=1), model.norm.running_var, rtol=1e-5)

    def test_changes_nothing_but_statistics(self):
        """Weights, counters and mode stay."""
        model = build(Residual)
        before = copy.deepcopy(model.state_dict())
        reestimate_batch_norm(model, samples(Residual))
        for name, tensor in model.state_dict().items():
            if "running" not in name:
                assert torch.equal(before[name], tensor), name
        assert not model.training

    def test_repairs_a_quantized_network(self, images):
        """At 2 bits it recovers a large part of the accuracy."""
        data, x, y = images
        model = trained_digits_net()
        damaged, _ = quantized(model, 2, (x[:2],))
        before = accuracy(damaged, x, y)
        reestimate_batch_norm(damaged, data, reference=model)
        assert accuracy(damaged, x, y) > before + 0.05

    def test_does_nothing_without_batch_norm(self):
        """A model without statistics is left alone."""
        model = nn.Sequential(nn.Linear(3, 2))
        before = model[0].weight.clone()
        reestimate_batch_norm(model, [(torch.randn(4, 3),)])
        assert torch.equal(before, model[0].weight)


class TestMovedStatistics:
    def test_without_an_error_nothing_moves(self):
        """Whatever the samples are: what they say of full precision cancels."""
        model = build(Residual)
        same = copy.deepcopy(model)
        reestimate_batch_norm(same, samples(Residual, n=5), reference=model)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(same.state_dict()[name], tensor, msg=name)

    def test_undoes_a_scale(self):
        """Exactly, on samples that were not seen; eps is counted in."""
        model = build(Residual)
        damaged = copy.deepcopy(model)
        with torch.no_grad():
            factors = torch.linspace(0.5, 2, len(model.stem.weight))
            damaged.stem.weight.mul_(factors[:, None, None, None])
        reestimate_batch_norm(damaged, samples(Residual, n=32), reference=model)
        unseen = torch.randn(9, *samples(Residual).inputs[0].shape[1:])
        torch.testing.assert_close(damaged(unseen), model(unseen), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("sizes", [(12,), (5, 7), (1, 11), (4, 4, 4)])
    def test_moments_of_all_batches_together(self, sizes):
        """The first batch norm follows mean and variance over all samples, however cut."""
        model = build(Residual)
        damaged, _ = quantized(model, 2, samples(Residual).inputs)
        parts = [(part,) for part in samples(Residual).inputs[0].split(sizes)]
        with torch.no_grad():
            before, after = (
                m.stem(samples(Residual).inputs[0]).transpose(0, 1).flatten(1).double()
                for m in (model, damaged)
            )
        norm, eps = model.norm, model.norm.eps
        scale = ((after.var(1, correction=0) + eps) / (before.var(1, correction=0) + eps)).sqrt()
        reestimate_batch_norm(damaged, parts, reference=model)
        mean = after.mean(1) + scale * (norm.running_mean - before.mean(1))
        variance = scale**2 * (norm.running_var + eps) - eps
        torch.testing.assert_close(damaged.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            damaged.norm.running_var.double(), variance, rtol=1e-5, atol=1e-5
        )

    def test_closer_than_statistics_taken_anew(self, images):
        """A few samples say what quantization did better than what the statistics are."""
        data, x, _ = images
        model = trained_digits_net()
        exact = model(x).log_softmax(dim=1)

        def divergence(reference):
            damaged, _ = quantized(model, 4, (x[:2],))
            reestimate_batch_norm(damaged, data.first(32), reference=reference)
            found = damaged(x).log_softmax(dim=1)
            return float(functional.kl_div(found, exact, log_target=True, reduction="batchmean"))

        with torch.no_grad():
            assert divergence(model) < 0.7 * divergence(None)

    def test_the_reference_runs_once_for_many(self):
        """What was seen of it is kept, and gives the same statistics."""
        model = build(Residual)
        runs = []
        model.head.register_forward_hook(lambda *_: runs.append(1))
        known = {}
        made = []
        for kept in (known, known, None):
            damaged, _ = quantized(build(Residual), 2, samples(Residual).inputs)
            reestimate_batch_norm(
                damaged, samples(Residual), reference=model, known=kept, batch_size=5
            )
            made.append(damaged.state_dict())
        assert len(runs) == 3 + 0 + 3
        for other in made[1:]:
            assert all(torch.equal(made[0][name], tensor) for name, tensor in other.items())

    def test_ignores_what_has_no_statistics(self):
        """Batch norms without stored statistics, and one value per channel, run as they are."""
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
        reestimate_batch_norm(copy.deepcopy(model), [(torch.randn(5, 3),)], reference=model)
        stored = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        again = copy.deepcopy(stored)
        reestimate_batch_norm(again, [(torch.randn(1, 3),)], reference=stored)
        assert torch.equal(again[1].running_mean, stored[1].running_mean)


class TestBatchStatistics:
    def test_equals_training_mode_without_its_side_effects(self):
        """Batch norm as in training; nothing stored changes."""
        model = build(Residual)
        data = samples(Residual)
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad(), batch_statistics():
            ours = model(*data.inputs)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        model.train()
        assert torch.allclose(model(*data.inputs), ours, atol=1e-6)

    def test_ends_with_the_context(self):
        """Afterwards the stored statistics are used again."""
        model = build(Residual)
        data = samples(Residual)
        before = model(*data.inputs)
        with batch_statistics():
            assert not torch.allclose(before, model(*data.inputs), atol=1e-3)
        assert torch.equal(before, model(*data.inputs))

    def test_a_single_value_per_channel_keeps_the_stored_statistics(self):
        """It has no variance."""
        model = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        x = torch.randn(1, 3)
        with batch_statistics():
            assert torch.equal(model(x), model(x))

    def test_works_on_an_exported_graph(self):
        """Batch norm is a call there."""
        model = build(Residual)
        data = samples(Residual)
        exported = torch.export.export(model, data.inputs).module(check_guards=False)
        with torch.no_grad(), batch_statistics():
            graph = exported(*data.inputs)
        with torch.no_grad(), batch_statistics():
            assert torch.allclose(model(*data.inputs), graph, atol=1e-6)


class Routed(nn.Module):
    """Two layers, the second for inputs above a limit alone."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        of = (x[:, 0] > self.limit).nonzero()[:, 0]
        return self.first(x).index_add(0, of, self.second(x[of]))


class TestBiasCorrection:
    def test_an_expert_without_tokens_is_left_alone(self):
        """Its mean is not known: in either model, or in both."""
        inputs = torch.rand(32, 4)
        full, quantized = Routed(0.5), Routed(0.5)
        inventory = discover(full, (inputs,))
        for limits in ((2.0, 2.0), (0.5, 2.0), (2.0, 0.5)):
            full.limit, quantized.limit = limits
            bias_correction(full, quantized, inventory, CalibrationSet(inputs=(inputs,)))
            assert not quantized.second.bias.any()
            with output_means(full, inventory) as means:
                full(inputs)
            assert (full.limit == 0.5) == ("second.weight" in means.means)

    def test_every_layer_gets_its_mean_output_back(self):
        """Per channel, over samples and positions, with earlier layers corrected."""
        model = build(Residual)
        data = samples(Residual)
        damaged, inventory = quantized(model, 2, data.inputs)
        bias_correction(model, damaged, inventory, data)
        for name in ("stem", "inner", "side", "head"):
            means = []
            for module in (model, damaged):
                kept = []
                hook = module.get_submodule(name).register_forward_hook(
                    lambda _, args, out, k=kept: k.append(out.detach().clone())
                )
                module(*data.inputs)
                hook.remove()
                means.append(kept[0].transpose(0, 1).flatten(1).mean(dim=1))
            assert torch.allclose(means[0], means[1], atol=1e-5), name

    def test_without_an_error_nothing_moves(self):
        """The correction of an unquantized copy is zero."""
        model = build(Residual)
        data = samples(Residual)
        same = copy.deepcopy(model)
        bias_correction(model, same, discover(model, data.inputs), data)
        assert torch.allclose(model(*data.inputs), same(*data.inputs), atol=1e-6)
        assert float(same.stem.bias.detach().abs().max()) < 1e-6

    def test_leaves_the_full_precision_model_alone(self):
        """Only the quantized one changes."""
        model = build(Residual)
        data = samples(Residual)
        before = copy.deepcopy(model.state_dict())
        damaged, inventory = quantized(model, 2, data.inputs)
        bias_correction(model, damaged, inventory, data)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_corrects_an_exported_graph(self):
        """A convolution without bias gets one as an argument of its call."""
        model = build(Residual)
        data = samples(Residual)
        exported = torch.export.export(model, data.inputs).module(check_guards=False)
        inventory = discover(model, data.inputs)
        damaged, _ = quantized(model, 3, data.inputs)
        graph = torch.export.export(damaged, data.inputs).module(check_guards=False)
        bias_correction(model, damaged, inventory, data)
        bias_correction(exported, graph, discover(exported, data.inputs), data)
        assert torch.allclose(damaged(*data.inputs), graph(*data.inputs), atol=1e-5)

    def test_brings_the_folded_network_closer(self, images):
        """With batch norm folded it lowers the divergence at 3 bits."""
        data, x, _ = images
        model = fold_batch_norm(trained_digits_net(), (x[:2],))
        damaged, inventory = quantized(model, 3, (x[:2],))
        with torch.no_grad():
            exact = model(x).log_softmax(dim=1)
            before = functional.kl_div(
                damaged(x).log_softmax(dim=1), exact, log_target=True, reduction="batchmean"
            )
            bias_correction(model, damaged, inventory, data)
            after = functional.kl_div(
                damaged(x).log_softmax(dim=1), exact, log_target=True, reduction="batchmean"
            )
        assert float(after) < float(before)


@pytest.mark.shared_data
class TestOnResNet20:
    def test_batch_norm_statistics_repair_three_bits(self, resnet20, resnet_calibration):
        """Agreement with full precision on 500 test images; 512 images for the statistics."""
        model, x = resnet20
        damaged, _ = quantized(model, 3, (x[:2],))
        with torch.no_grad():
            exact = model(x).argmax(dim=1)
            before = float((damaged(x).argmax(dim=1) == exact).float().mean())
            reestimate_batch_norm(damaged, resnet_calibration, reference=model)
            after = float((damaged(x).argmax(dim=1) == exact).float().mean())
        assert after > 0.88
        assert after > before


@pytest.fixture(scope="module")
def resnet20(shared_data, repository):
    """The trained network and 500 test images."""
    module = resnet_module(repository)
    return module.load_resnet(20), module.images("test", 500)[0]


@pytest.fixture(scope="module")
def resnet_calibration(shared_data, repository):
    """512 calibration images."""
    return CalibrationSet(inputs=(resnet_module(repository).images("calibration", 512)[0],))


def resnet_module(repository):
    import importlib.util

    path = repository / "benchmarks" / "resnet_cifar.py"
    spec = importlib.util.spec_from_file_location("resnet_cifar", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
