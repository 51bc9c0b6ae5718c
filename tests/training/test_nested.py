"""Nested codes: one payload, several plans, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.models.loaded import LoadedModel
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.packing import pack
from bitquota.training.nested import SCHEME, top_bits
from bitquota.training.nested_plans import finetune_nested, load_nested
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, accuracy, digits, trained_digits_net

SETTINGS = TrainingSettings(epochs=3, batch_size=64, learning_rate=3e-3)


def plan_of(model, bits, activation_bits=None):
    inventory = discover(model.module, (torch.zeros(2, 1, 8, 8),), model_digest=model.digest)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, b, SCHEME, activation_bits))
            for la, b in zip(inventory.layers, bits, strict=True)
        ),
        unquantized=inventory.unquantized,
    )


@pytest.fixture(scope="module")
def model():
    """The trained network."""
    module = trained_digits_net()
    return LoadedModel(
        module=module, digest=model_fingerprint(module), source="digits", architecture="DigitsNet"
    )


@pytest.fixture(scope="module")
def nested(model, data):
    """Trained at 2, 3, 4 and 8 bits, and at a mixed plan."""
    return finetune_nested(model, plan_of(model, (8, 4, 2, 3)), data, (2, 3, 4, 8), SETTINGS)


class TestTopBits:
    def test_every_code(self):
        """The nearest multiple of the coarser step, halves upwards, within the range."""
        codes = torch.arange(-128, 128, dtype=torch.int32)
        for bits in (2, 3, 4, 7):
            span = 2 ** (8 - bits)
            expected = torch.floor(codes / span + 0.5).clamp(max=2 ** (bits - 1) - 1)
            assert torch.equal(expected.int(), top_bits(codes, bits))
            assert -(2 ** (bits - 1)) == int(top_bits(codes, bits).min())
        assert torch.equal(codes, top_bits(codes, 8))


class TestFinetuneNested:
    def test_every_plan_works(self, nested):
        """Four uniform widths and the mixed plan; statistics differ, all other tensors do not."""
        x, y = digits()
        x, y = x[N_TRAIN:], y[N_TRAIN:]
        assert ["W2", "W3", "W4", "W8", "plan"] == list(nested.trained)
        found = {name: accuracy(t.model.module, x, y) for name, t in nested.trained.items()}
        assert min(found.values()) > 0.9
        assert found["W8"] > 0.95
        states = [nested.trained[name].model.module.state_dict() for name in ("W2", "W8")]
        for name in states[0]:
            alike = torch.equal(states[0][name], states[1][name])
            quantized = name.startswith(("conv", "head.weight"))
            assert alike != (quantized or "running_" in name)

    def test_one_file_serves_all_plans_to_the_byte(self, nested, tmp_path):
        """Packed codes and scales, and whole state dictionaries, are those that were trained."""
        nested.save(tmp_path / "nested.safetensors")
        saved = load_nested(tmp_path / "nested.safetensors")
        for name, trained in nested.trained.items():
            assert trained.plan == saved.plans[name]
            for layer, weight in saved.weights(name).items():
                ours, theirs = pack(weight), pack(trained.model.stored[layer])
                assert ours.codes.tobytes() == theirs.codes.tobytes()
                assert ours.scales.tobytes() == theirs.scales.tobytes()
            other = trained_digits_net(seed=0)
            other.load_state_dict(saved.state(name))
            assert trained.plan.model_digest == model_fingerprint(other)

    def test_the_payload_is_hardly_more_than_the_codes(self, nested):
        """Codes of 8 bits and one step a row are what the plan W8 takes; factors come on top."""
        assert nested.payload_bits == nested.trained["W8"].plan.size_bits + 32 * 4 * 4

    def test_inputs_are_quantized_in_all_plans(self, model, data, tmp_path):
        """At the plan's bit-width, by steps that were trained, of which the file has one set."""
        settings = replace(SETTINGS, epochs=1)
        found = finetune_nested(model, plan_of(model, (2, 3, 3, 2), 4), data, (2, 3), settings)
        x, y = digits()
        x, y = x[N_TRAIN:], y[N_TRAIN:]
        for trained in found.trained.values():
            assert {a.candidate.activation_bits for a in trained.plan.assignments} == {4}
            with trained.model.running(), torch.no_grad():
                quantized = trained.model.module(x)
            assert float((quantized.argmax(1) == y).float().mean()) > 0.8
            assert not torch.equal(quantized, trained.model.module(x))
        found.save(tmp_path / "nested.safetensors")
        inputs = load_nested(tmp_path / "nested.safetensors").inputs
        assert inputs == found.trained["plan"].model.inputs
        assert float(found.model.inputs.log_factor.detach().abs().max()) > 0

    def test_continues_from_a_checkpoint(self, model, data, tmp_path):
        """A finished run is read back: the same codes, the same statistics."""
        plan, settings = plan_of(model, (2, 2, 2, 2)), replace(SETTINGS, epochs=1)
        path = tmp_path / "run.safetensors"
        first, second = (
            finetune_nested(model, plan, data, (2, 8), settings, checkpoint=path) for _ in range(2)
        )
        for name in first.trained:
            digests = [f.trained[name].plan.model_digest for f in (first, second)]
            assert digests[0] == digests[1]

    def test_refuses_what_has_no_top_bits(self, model, data):
        """Widths above 8."""
        with pytest.raises(InvalidInput, match=r"from 2 to 8; got \[2, 16\]"):
            finetune_nested(model, plan_of(model, (2,) * 4), data, (2, 16), SETTINGS)

    def test_other_files_are_refused(self, tmp_path):
        """In one sentence."""
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"x")
        with pytest.raises(InvalidInput, match="finetune --widths"):
            load_nested(path)
