"""What a choice changes in the outputs: noted while it is measured, and kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import bitquota.evaluate.choice as choice_module
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.corrections import Correction
from bitquota.evaluate.choice import measure_choice
from bitquota.evaluate.effects import effect_sums, with_effects
from bitquota.plan import PlanOutput
from bitquota.quantizers.apply import apply_plan
from bitquota.sensitivity.losses import loss_by_name
from sensitivity_networks import Residual, build, inventory_of, samples

OUTPUT = PlanOutput(name="output", kind="logits", loss="kl", shape=(5,))


class Passes:
    """A network that counts how often it, or a copy of it, is run."""

    def __init__(self):
        self.module = build(Residual)
        self.count = 0
        self.module.register_forward_hook(self._note)

    def _note(self, *_):
        self.count += 1


@pytest.fixture
def passes():
    return Passes()


def measured(passes, context, **options):
    """Measure all layers at 2 bits, corrected, on 80 samples: two chunks."""
    inventory = inventory_of(passes.module)
    return measure_choice(
        passes.module,
        inventory,
        [Candidate.of(layer, 2, Scheme()) for layer in inventory.layers],
        samples(Residual, n=80),
        loss_by_name("kl"),
        corrections=(Correction.BATCH_NORM_STATISTICS,),
        correction_data=samples(Residual, n=20, seed=5),
        context=context,
        outputs=(OUTPUT,),
        **options,
    )


class TestOutputsOfAChoice:
    def test_are_those_of_the_two_models(self, passes):
        """Against the same numbers from all outputs at once."""
        (found,) = measured(passes, Context(), with_outputs=True).outputs

        inventory, data = inventory_of(passes.module), samples(Residual, n=80)
        quantized = apply_plan(
            passes.module,
            inventory,
            [Candidate.of(layer, 2, Scheme()) for layer in inventory.layers],
            corrections=(Correction.BATCH_NORM_STATISTICS,),
            correction_data=samples(Residual, n=20, seed=5),
        )
        with torch.no_grad():
            mine, other = quantized(*data.inputs).double(), passes.module(*data.inputs).double()
        changed = (mine.argmax(1) != other.argmax(1)).double().mean()
        mine, other = (z - z.mean(1, keepdim=True) for z in (mine, other))
        assert found.changed == pytest.approx(float(changed))
        assert found.relative_error == pytest.approx(
            float((mine - other).norm() / other.norm()), rel=1e-4
        )
        both = torch.stack([mine.reshape(-1), other.reshape(-1)])
        assert found.correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]), rel=1e-6)

    def test_an_embedding_has_an_error_that_fits_its_cosine(self):
        """Of unit vectors the squared relative error is twice the mean cosine distance."""
        torch.manual_seed(0)
        one, other = (functional.normalize(torch.rand(6, 9), dim=1) for _ in range(2))
        output = PlanOutput(name="voice", kind="embedding", loss="cosine", shape=(9,))
        loss = loss_by_name("cosine")
        (found,) = with_effects([output], effect_sums(loss, one, other))
        distance = float(1 - (one * other).sum(1).double().mean())
        assert found.changed is None
        assert found.relative_error**2 == pytest.approx(2 * distance, rel=1e-5)
        assert loss.per_sample(one, other, None).mean() == pytest.approx(distance, rel=1e-5)

    def test_cost_nothing_once_the_choice_was_measured(self, passes):
        """Neither a pass nor the corrections are repeated."""
        context = Context()
        assert measured(passes, context).outputs is None
        before = passes.count
        (found,) = measured(passes, context, with_outputs=True).outputs
        assert found.correlation is not None
        assert before == passes.count

    def test_of_large_outputs_are_made_when_they_are_asked_for(self, passes, monkeypatch):
        """Then once: what was found is kept."""
        monkeypatch.setattr(choice_module, "SMALL_OUTPUT", 0)
        context = Context()
        measured(passes, context)
        before = passes.count
        first = measured(passes, context, with_outputs=True)
        between = passes.count
        again = measured(passes, context, with_outputs=True)
        assert before < between == passes.count
        assert first.outputs == again.outputs
