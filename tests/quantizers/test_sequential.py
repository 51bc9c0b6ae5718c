"""Rounding layer after layer: the walk, what it rounds to, and what it leaves alone."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.corrections import Correction
from bitquota.errors import Cancelled
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.apply import apply_plan, apply_plans
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.quantizers.fitted import fit_quantizers
from bitquota.quantizers.input_moments import call_settings, input_grams, moment, patches
from bitquota.quantizers.qep import propagated
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.rounders import Rounder, output_errors
from bitquota.quantizers.sequential import round_in_sequence
from bitquota.quantizers.shrinkage import shrink
from bitquota.quantizers.walk import walk_layers
from bitquota.quantizers.weights import quantize
from refusals import refused


class Net(nn.Module):
    """Convolutions with groups and a residual sum, and a linear layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = functional.relu(self.first(x))
        x = x + functional.relu(self.second(x))
        x = self.up(x).mean(dim=(2, 3))
        return self.head(self.twice(functional.relu(self.twice(x))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    module = Net().eval()
    mix = torch.randn(3, 3)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(48, 3, 6, 6), mix)
    return module, discover(module, (x[:2],)), x


def loss(module, other, x):
    with torch.no_grad():
        return float((module(x) - other(x)).square().mean())


def rounded(net, rounding, *, batch=16, bits=3):
    module, inventory, x = net
    copied = copy.deepcopy(module)
    candidates = {la.name: Candidate.of(la, bits, Scheme()) for la in inventory.layers}
    grams = partial(input_grams, module, inventory, [(x,)], shrunk=True)
    weights = QuantizedWeights(module, inventory, grams, rounding=Rounder.GPTQ)
    batches = [(part,) for part in x.split(batch)]
    (found,) = round_in_sequence(
        module, [copied], [candidates], batches, weights, rounding=rounding
    )
    return copied, found


@pytest.mark.parametrize("stored_first", [False, True])
def test_an_estimate_is_the_same_whatever_was_asked_for_before(net, stored_first):
    """It is less than what ships, which is polished in either case."""
    module, inventory, x = net
    grams = partial(input_grams, module, inventory, [(x,)], shrunk=True)
    layer = inventory.layers[1]
    candidate, *_ = offered = [Candidate.of(layer, bits, Scheme()) for bits in (2, 3, 8)]

    def weights(**how):
        return QuantizedWeights(module, inventory, grams, rounding=Rounder.GPTQ, **how)

    estimating = weights(estimates=offered)
    first = estimating.stored(candidate) if stored_first else None
    estimate = estimating(candidate)
    stored = (first or estimating.stored(candidate)).dequantize()
    assert torch.equal(stored, to_matrix(weights()(candidate), layer))
    alone = weights(estimates=[candidate])(candidate)
    assert torch.equal(estimate, alone)
    gram = grams()[layer.name].double()
    changes = [(m - to_matrix(weights().original(layer.name).detach(), layer)).double()
               for m in (stored, to_matrix(estimate, layer))]  # fmt: skip
    polished, plain = (float(output_errors(change, gram).sum()) for change in changes)
    assert polished < plain


class TestWalk:
    def test_stops_at_every_layer_once_with_the_inputs_of_both_models(self, net):
        module, inventory, x = net
        changed = copy.deepcopy(module)
        layers = {la.name: la for la in inventory.layers}
        seen = []
        for meeting in walk_layers(module, [changed], layers, [(x[:8],), (x[8:],)], call_settings):
            seen.append(meeting.layer)
            same = [torch.equal(full, other) for full, other in meeting.inputs]
            assert len(same) == 2
            assert all(same) == (meeting.layer == "first")
            if meeting.layer == "first":
                with torch.no_grad():
                    changed.first.weight.mul_(0.5)
        assert seen == ["first", "second", "up", "twice", "head"]

    def test_threads_end_when_it_is_given_up(self, net):
        module, inventory, x = net
        layers = {la.name: la for la in inventory.layers}
        walk = walk_layers(module, [copy.deepcopy(module)], layers, [(x,)], call_settings)
        next(walk)
        walk.close()
        assert not [t for t in threading.enumerate() if t.name == "rounding lane"]

    def test_errors_of_the_model_come_out(self, net):
        module, inventory, x = net
        layers = {la.name: la for la in inventory.layers}
        wrong = [(x[:, :2],)]
        with pytest.raises(RuntimeError, match="channels"):
            list(walk_layers(module, [copy.deepcopy(module)], layers, wrong, call_settings))


class TestRoundInSequence:
    def test_each_step_improves_on_the_one_before(self, net):
        module, inventory, x = net
        nearest = copy.deepcopy(module)
        weights = QuantizedWeights(module, inventory)
        with torch.no_grad():
            for la in inventory.layers:
                place = nearest.get_parameter(la.weight_name)
                place.copy_(weights(Candidate.of(la, 3, Scheme())))
        by_gptq, by_qep = (loss(module, rounded(net, r)[0], x) for r in ("gptq", "qep"))
        assert by_qep < by_gptq < 0.7 * loss(module, nearest, x)

    def test_batches_only_order_the_sums(self, net):
        module, _, x = net
        one, several = (rounded(net, "qep", batch=n)[0] for n in (48, 16))
        assert loss(module, one, x) == pytest.approx(loss(module, several, x), rel=0.05)

    def test_equal_runs_give_equal_codes(self, net):
        first, second = (rounded(net, "qep")[1] for _ in range(2))
        assert all(torch.equal(first[k].codes, second[k].codes) for k in first)

    def test_the_second_layer_by_hand(self, net):
        module, inventory, x = net
        copied, found = rounded(net, "qep", batch=48)
        layers = {la.name: la for la in inventory.layers}
        layer = layers["second"]
        half = copy.deepcopy(module)
        half.first.load_state_dict(copied.first.state_dict())
        with torch.no_grad():
            inputs = [functional.relu(m.first(x)) for m in (module, half)]
        full, changed = (patches(t, layer, {"padding": 1, "groups": 2}) for t in inputs)
        gram = moment(changed, changed, layer).double()
        cross = moment(full, changed, layer).double()
        shrink(gram, full.shape[1], cross)
        matrix = to_matrix(module.second.weight.detach(), layer).double()
        expected = quantize(
            propagated(matrix, gram, cross), 3, Scheme(), inputs_gram=gram, rounding="gptq"
        )
        assert torch.equal(found["second"].codes, expected.codes)
        read_back = from_matrix(expected.dequantize(), layer)
        assert torch.equal(copied.second.weight.detach(), read_back)

    def test_tells_of_layers_and_stops_between_two(self, net):
        module, inventory, x = net
        copied = copy.deepcopy(module)
        answers, told = iter([False, True]), []
        with refused(Cancelled, stage="rounding"):
            round_in_sequence(
                module,
                [copied],
                [{la.name: Candidate.of(la, 3, Scheme()) for la in inventory.layers[:3]}],
                [(x,)],
                QuantizedWeights(module, inventory),
                rounding="gptq",
                context=Context(
                    cancelled=lambda: next(answers),
                    on_progress=lambda p: told.append((p.stage, p.done, p.total)),
                ),
            )
        assert told == [("rounding", 0, 3)]
        changed = [n for n, p in copied.named_parameters() if not p.equal(module.get_parameter(n))]
        assert changed == ["first.weight"]

    def test_a_layer_that_runs_twice_is_rounded_by_itself(self, net):
        module, inventory, x = net
        _, found = rounded(net, "gptq")
        weights = QuantizedWeights(
            module,
            inventory,
            partial(input_grams, module, inventory, [(x,)], shrunk=True),
            rounding=Rounder.GPTQ,
        )
        layers = {la.name: la for la in inventory.layers}
        alone = weights.stored(Candidate.of(layers["twice"], 3, Scheme()))
        assert torch.equal(alone.codes, found["twice"].codes)
        assert set(found) == set(layers)


class Routed(nn.Module):
    """A layer whose outputs decide which rows an expert gets."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        x = self.router(x)
        of = (x[:, 0] > 0).nonzero()[:, 0]
        return x.index_add(0, of, self.expert(x[of]))


class TestExperts:
    def test_other_tokens_in_each_model(self):
        """Several choices are rounded as each alone: to its own tokens, as ``gptq`` would."""
        torch.manual_seed(0)
        module, x = Routed().eval(), torch.randn(600, 8)
        inventory = discover(module, (x,))
        layers = {la.name: la for la in inventory.layers}
        choices = [
            {"router": Candidate.of(layers["router"], bits, Scheme()),
             "expert": Candidate.of(layers["expert"], 3, Scheme())}
            for bits in (2, 3, 32)
        ]  # fmt: skip

        def codes(*chosen, rounding="qep"):
            copies = [copy.deepcopy(module) for _ in chosen]
            weights = QuantizedWeights(module, inventory)
            found = round_in_sequence(module, copies, chosen, [(x,)], weights, rounding=rounding)
            sent = [int((each.router(x)[:, 0] > 0).sum()) for each in copies]
            return sent, [each["expert"].codes for each in found]

        sent, together = codes(*choices)
        assert len(set(sent)) == 3
        for choice, own in zip(choices, together, strict=True):
            assert torch.equal(codes(choice)[1][0], own)
        assert torch.equal(codes(choices[0], rounding="gptq")[1][0], together[0])


class TestSampledPositions:
    @pytest.mark.parametrize("name", ["first", "second", "up"])
    def test_are_rows_of_all_patches(self, net, name):
        module, inventory, _ = net
        layer = {la.name: la for la in inventory.layers}[name]
        part = getattr(module, name)
        keys = ("stride", "padding", "dilation", "groups", "output_padding")
        settings = {k: getattr(part, k) for k in keys}
        inputs = torch.randn(4, part.in_channels, 6, 6)
        every = patches(inputs, layer, settings)
        some = patches(inputs, layer, settings, 40)
        assert some.shape == (len(every), 40, layer.columns)
        rows = {tuple(row) for row in every[0].tolist()}
        assert all(tuple(row) in rows for row in some[0].tolist())
        # Groups are drawn at the same positions, in the order of all.
        at = [[tuple(r) for r in every[0].tolist()].index(tuple(row)) for row in some[0].tolist()]
        assert at == sorted(at)
        assert torch.equal(every[-1][at], some[-1])


class Normed(nn.Module):
    """Convolutions with batch norms that were trained on other inputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.second(functional.relu(self.norm(self.first(x)))))


def trained_elsewhere():
    torch.manual_seed(3)
    module = Normed()
    module(3 * torch.randn(200, 3, 6, 6))
    return module.eval()


class TestMovedStatistics:
    def test_choices_that_are_rounded_together_come_out_as_alone(self, net):
        """One of them leaves a layer in full precision."""
        _, _, x = net
        module = trained_elsewhere()
        inventory = discover(module, (x[:2],))
        first, second = inventory.layers
        choices = [
            [Candidate.of(first, 2, Scheme()), Candidate.of(second, 3, Scheme())],
            [Candidate.of(first, 32, Scheme()), Candidate.of(second, 2, Scheme())],
            [Candidate.of(first, 4, Scheme()), Candidate.of(second, 32, Scheme())],
        ]
        samples = CalibrationSet(inputs=(x,))
        offered = [candidate for choice in choices for candidate in choice]
        fitted = fit_quantizers(module, inventory, offered, samples, rounding="qep")
        how = {"corrections": [Correction.BATCH_NORM_STATISTICS], "correction_data": samples}

        def made(together):
            stored = [{} for _ in together]
            found = apply_plans(module, inventory, together, fitted=fitted, stored=stored, **how)
            return list(zip(found, stored, strict=True))

        apart = [made([choice])[0] for choice in choices]
        for (one, codes), (other, alone) in zip(made(choices), apart, strict=True):
            assert codes.keys() == alone.keys()
            assert all(torch.equal(codes[k].codes, alone[k].codes) for k in codes)
            expected = other.state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in one.state_dict().items())

    def test_layers_are_rounded_to_what_they_get_with_them(self, net):
        _, _, x = net
        module = trained_elsewhere()
        inventory = discover(module, (x[:2],))
        chosen = [Candidate.of(layer, 2, Scheme()) for layer in inventory.layers]
        samples = CalibrationSet(inputs=(x,))
        fitted = fit_quantizers(module, inventory, chosen, samples, rounding="qep")
        stored = {}
        shipped = apply_plan(
            module,
            inventory,
            chosen,
            corrections=[Correction.BATCH_NORM_STATISTICS],
            correction_data=samples.first(3),
            fitted=fitted,
            stored=stored,
        )

        # The statistics are those that the weights call for, by a pass of their own.
        again = copy.deepcopy(shipped)
        for name in ("norm", "last"):
            getattr(again, name).load_state_dict(getattr(module, name).state_dict())
        reestimate_batch_norm(again, [(x,)], reference=module)
        for name in ("norm", "last"):
            theirs = getattr(again, name)
            for kind in ("running_mean", "running_var"):
                torch.testing.assert_close(
                    getattr(getattr(shipped, name), kind), getattr(theirs, kind)
                )
                assert not torch.equal(getattr(theirs, kind), getattr(getattr(module, name), kind))

        # The second layer by hand, behind the norm that has them.
        layer = inventory.layers[1]
        with torch.no_grad():
            full = functional.relu(module.norm(module.first(x)))
            now = functional.relu(shipped.norm(shipped.first(x)))
        own, other = (patches(part, layer, {"padding": 1}) for part in (full, now))
        gram, cross = moment(other, other, layer).double(), moment(own, other, layer).double()
        shrink(gram, own.shape[1], cross)
        matrix = to_matrix(module.second.weight.detach(), layer).double()
        by_hand = quantize(
            propagated(matrix, gram, cross), 2, Scheme(), inputs_gram=gram, rounding=Rounder.GPTQ
        )
        assert torch.equal(stored["second"].codes, by_hand.codes)
