"""A plan is as good as it is, whoever asks: every kind of plan, through every door, one number."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Rounding, Scheme
from bitquota.candidates.targets import TARGETS
from bitquota.ci.lock import Limits, make_lock
from bitquota.cli import main
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import REWRITTEN, Correction
from bitquota.evaluate.scoring import evaluate_plans, score_plans
from bitquota.measurement_setup import build_setup
from bitquota.models.load import load_model
from bitquota.models.samples import load_calibration
from bitquota.plan import PlanTarget
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.compare import compare
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.jobs.messages import Piece
from bitquota.service.jobs.work import Loaded, Work
from bitquota.training.qat import finetune_plan
from bitquota.training.settings import TrainingSettings
from format_networks import plan_with

pytestmark = pytest.mark.slow  # whole chains
FEEDBACK = Scheme(rounding=Rounding.ERROR_FEEDBACK)
# How weights were changed before is in the file of quantized weights only: test_shipped_weights.py.
ALL = tuple(c for c in Correction if c not in REWRITTEN)
CPU = Context(device="cpu")
# A target family each: the rest of them offer the same schemes, or none to layers this small.
FAMILIES = ("ref-int", "ort-cpu", "openvino-cpu", "mcu", "coreml")

REQUESTS = {
    "weights": {},
    "activations": {"activation_bits": 8},
    "channel ranges": {"activation_bits": 4, "activation_fit": "chan"},
    "error feedback": {"scheme": FEEDBACK},
    "fold": {"corrections": (Correction.FOLD_BATCH_NORM,)},
    "statistics": {"corrections": (Correction.BATCH_NORM_STATISTICS,)},
    "bias": {"corrections": (Correction.BIAS_CORRECTION,)},
    "all together": {"activation_bits": 8, "scheme": FEEDBACK, "corrections": ALL},
} | {name: {"target": name} for name in FAMILIES}


@pytest.fixture(scope="module")
def files(tiny_pt2, tmp_path_factory):
    """A model, labelled data, and correction data."""
    folder = tmp_path_factory.mktemp("one")
    rng = np.random.default_rng(5)
    for name, n in (("data", 40), ("correction", 48)):
        x = rng.normal(size=(n, 3, 8, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=rng.integers(0, 10, n))
    return tiny_pt2, folder / "data.npz", folder / "correction.npz"


@pytest.fixture(scope="module")
def loaded(files):
    model, data, correction = files
    return load_model(str(model)), load_calibration(str(data)), load_calibration(str(correction))


def plan_of(model, data, kind):
    """A plan of random widths as a request of this kind would have made it."""
    given = REQUESTS[kind]
    target = given.get("target")
    scheme = given.get("scheme", Scheme())
    if target is not None:
        plan = plan_with(model, data.inputs, target=target, seed=1)
        return replace(plan, target=PlanTarget.of(TARGETS[target]))
    plan = plan_with(model, data.inputs, bits=(3, 4, 6), scheme=scheme, seed=1)
    bits = given.get("activation_bits")
    if bits is not None:
        assignments = tuple(
            replace(
                a, candidate=type(a.candidate).of(a.layer, a.candidate.weight_bits, scheme, bits)
            )
            for a in plan.assignments
        )
        plan = replace(plan, assignments=assignments)
    request = PlanRequest(budgets=("4 bits",), **given).to_json()
    return replace(plan, corrections=given.get("corrections", ()), provenance={"request": request})


def by_hand(model, plan, data, correction):
    """The mean KL divergence, written out."""
    module = quantized_module(model, plan, correction_data=correction)
    with torch.no_grad():
        q = module(*data.inputs).double().log_softmax(-1)
        p = model.module(*data.inputs).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def bitquota(monkeypatch, capsys):
    """Run a command and return the JSON it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitquota", "--sandbox", "off", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return json.loads(printed.out)

    return run


@pytest.mark.parametrize("kind", REQUESTS)
class TestPlanFiles:
    def test_one_number(self, kind, files, loaded, bitquota, tmp_path):
        """``evaluate``, ``check`` (and so the demonstration) and the service's ``evaluate``."""
        paths, (model, data, correction) = files, loaded
        plan = plan_of(model, data, kind)
        plan.save(tmp_path / "plan.json")
        make_lock(plan, limits=Limits(max_kl=1e9)).save(tmp_path / "lock.json")
        expected = by_hand(model, plan, data, correction)
        assert expected > 1e-6

        printed = bitquota(
            "evaluate", paths[0], paths[1], "--plan", tmp_path / "plan.json",
            "--correction-data", paths[2], "--device", "cpu", "--json",
        )  # fmt: skip
        (mine,) = [score for score in printed if score["kind"] == "plan"]
        assert mine["metrics"]["kl"]["mean"] == pytest.approx(expected, rel=1e-6)

        report = bitquota(
            "check", tmp_path / "lock.json", "--model", paths[0], "--data", paths[1],
            "--correction-data", paths[2], "--device", "cpu", "--json",
        )  # fmt: skip
        (outcomes,) = report.values()
        (said,) = [o for o in outcomes["outcomes"] if o["check"] == "loss increase"]
        assert float(said["message"].split()[0]) == pytest.approx(expected, rel=1e-5)

        full, measured = evaluate_plans(model, data, [plan], correction_data=correction)
        assert 0 == full.measured.mean
        assert measured.measured.mean == pytest.approx(expected, rel=1e-6)
        assert measured.measured.accuracy == mine["metrics"]["top1"]["mean"]

        sent = []
        work = Work(
            request=kind_by_name("evaluate").request().model_dump(),
            inputs={
                "model": [str(paths[0])],
                "dataset": [str(paths[1])],
                "correction_data": [str(paths[2])],
                "plans": [str(tmp_path / "plan.json")],
            },
            loaded=Loaded(),
            ledger=MemoryLedger(),
            send=sent.append,
            cancelled=lambda: False,
            device="cpu",
            scratch=tmp_path,
        )
        kind_by_name("evaluate").run(work)
        scores = json.loads(b"".join(m.data for m in sent if isinstance(m, Piece)))["scores"]
        (theirs,) = [score for score in scores if score["kind"] == "plan"]
        assert theirs["metrics"] == mine["metrics"]


@pytest.mark.parametrize("kind", REQUESTS)
class TestSearched:
    def test_one_number(self, kind, loaded):
        """What ``allocate`` and ``compare`` measured on the hold-out, measured again."""
        model, data, _ = loaded
        everything = data.take(range(40))
        request = PlanRequest(
            budgets=("6 bits",), samples=24, holdout_samples=16, correction_samples=40,
            refine=False, **REQUESTS[kind],
        )  # fmt: skip
        made = allocate(model, everything, request, context=CPU)
        (plan,), model = made.plans, made.with_weights(model)
        setup = build_setup(model, everything, request, context=CPU)
        found = score_plans(
            model,
            setup.holdout,
            plans={"p": plan},
            fit_data=setup.fit,
            correction_data=setup.correcting,
            with_uniform=False,
            with_baselines=True,
        )
        again = {score.name: score.metrics["kl"].mean for score in found}
        assert again["p"] == pytest.approx(plan.measured.mean, rel=1e-4, abs=1e-9)
        for baseline in plan.baselines:
            expected = pytest.approx(baseline.measured.mean, rel=1e-4, abs=1e-9)
            assert again[f"{baseline.name} of p"] == expected

        # What ``compare`` leaves out by default is how a plan settled on its rounding.
        rounding = "nearest" if plan.weights is None else plan.weights.rounding
        request = replace(request, rounding=rounding)
        compared = compare(model, everything, request, ["diagonal"], plans=0, context=CPU)
        (size_only,) = [e for e in compared.entries if e.name == "size only"]
        (mine,) = [b for b in plan.baselines if b.name == "size only"]
        assert size_only.plans[0].loss.mean == pytest.approx(mine.measured.mean, rel=1e-9)


@pytest.mark.parametrize("kind", [k for k in REQUESTS if k not in FAMILIES])
class TestTrained:
    def test_one_number(self, kind, loaded):
        """What fine-tuning says of the plan before training is what evaluating it says."""
        model, data, _ = loaded
        plan = plan_of(model, data, kind)
        settings = TrainingSettings(epochs=1, batch_size=16, learning_rate=1e-3)
        trained = finetune_plan(model, plan, data, settings, context=CPU)
        (before,) = trained.plan.baselines
        fit, holdout = data.split(settings.holdout_fraction, settings.seed)
        _, found = score_plans(
            model, holdout, plans={"p": plan}, correction_data=fit, with_uniform=False
        )
        assert before.measured.mean == pytest.approx(found.metrics["kl"].mean, rel=1e-6)
        assert before.measured.accuracy == pytest.approx(found.metrics["top1"].mean)
