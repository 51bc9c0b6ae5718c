"""Lock files, the check with its exit codes, and diffs of plans."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from bitquota.candidates.budget import Budget
from bitquota.candidates.cost_table import CostTable, LayerCost
from bitquota.candidates.table import Candidate
from bitquota.ci.check import (
    Quality,
    append_step_summary,
    check_lock,
    require_limits,
    to_junit,
    worst_exit_code,
)
from bitquota.ci.diff import diff_plans
from bitquota.ci.lock import Limits, Lock, make_lock
from bitquota.errors import GateFailed, InvalidInput, InvalidPlan, StalePlan
from bitquota.exports.export import export_plan
from bitquota.exports.export_report import ExportReport, Timed
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.plan import Baseline, MeasuredLoss, Plan
from format_networks import plan_with, samples
from refusals import refused


def loss(mean: float, accuracy: float | None = None) -> MeasuredLoss:
    return MeasuredLoss(mean=mean, standard_error=0.001, n_samples=100, accuracy=accuracy)


@pytest.fixture(scope="module")
def model():
    return load_model("format_networks:tiny_net")


@pytest.fixture(scope="module")
def plan(model) -> Plan:
    """A plan at mixed widths that measured better than its uniform baseline."""
    made = plan_with(model, images().inputs, target="ref-int", bits=(3, 4, 8), seed=1)
    baselines = (
        Baseline(name="uniform 3 bits", weight_bits=(3, 3, 3), size_bits=100, measured=loss(0.4)),
        Baseline(
            name="uniform 8 bits", weight_bits=(8, 8, 8), size_bits=10**6, measured=loss(0.001)
        ),
    )
    return replace(made, measured=loss(0.1, accuracy=0.8), baselines=baselines)


def images() -> CalibrationSet:
    """The samples of the tiny network."""
    import torch

    return CalibrationSet(inputs=(torch.from_numpy(samples()[0]),))


@pytest.fixture(scope="module")
def exported(model, plan, tmp_path_factory):
    """Folder and export report of an export."""
    folder = tmp_path_factory.mktemp("export") / "out"
    return folder, export_plan(model, plan, folder, target="ref-int", samples=images())


@pytest.fixture
def lock(plan, exported) -> Lock:
    """A lock with generous limits."""
    limits = Limits(max_kl=0.2, max_bytes=10_000, not_worse_than="uniform")
    return make_lock(plan, target="ref-int", limits=limits, reports=(exported[1],))


class TestLock:
    def test_round_trip(self, lock, tmp_path):
        """The same value and the same bytes come back."""
        lock.save(tmp_path / "bitquota.lock.json")
        back = Lock.load(tmp_path / "bitquota.lock.json")
        assert lock == back
        assert lock.dumps() == back.dumps()

    def test_volatile_changes_no_digest(self, lock):
        """Dates stand outside of what the digest covers."""
        later = replace(lock, volatile={"created": "2026-11-21", "wall_s": 3.5})
        assert lock.digest() == later.digest()
        assert lock.dumps() != later.dumps()

    def test_two_runs_are_byte_identical(self, plan, exported):
        """Nothing in a lock depends on when or where it was made."""
        first, second = (make_lock(plan, reports=(exported[1],)) for _ in range(2))
        assert first.dumps() == second.dumps()

    def test_edited_by_hand(self, lock, tmp_path):
        """A changed limit without a new digest is refused."""
        data = json.loads(lock.dumps())
        data["limits"]["max_kl"] = 99.0
        (tmp_path / "l.json").write_text(json.dumps(data))
        with pytest.raises(InvalidPlan, match="this one was edited"):
            Lock.load(tmp_path / "l.json")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "bitquota/lock/1"}'])
    def test_not_a_lock(self, tmp_path, text):
        """Each is one sentence."""
        (tmp_path / "l.json").write_text(text)
        with pytest.raises(InvalidPlan, match="a lock file must"):
            Lock.load(tmp_path / "l.json")

    def test_illegal_for_target(self, plan):
        """A lock cannot name a target that cannot store its plan."""
        with pytest.raises(InvalidPlan, match="ort-cpu"):
            make_lock(plan, target="ort-cpu")

    def test_export_report_of_another_plan(self, plan, exported):
        """Export reports must belong to the plan."""
        with pytest.raises(InvalidInput, match="of its plan"):
            make_lock(replace(plan, selected="uniform 3 bits"), reports=(exported[1],))

    def test_negative_limit(self):
        """Limits that nothing keeps are refused."""
        with refused(InvalidInput, max_kl=-1):
            Limits(max_kl=-1)


class TestCheckLock:
    """Scripted regressions and the exit code of each."""

    def test_everything_holds(self, lock, plan, exported):
        """Exit 0, and every check ran."""
        report = check_lock(
            lock,
            model_digest=plan.model_digest,
            plan=plan,
            folders=(exported[0],),
            quality=Quality(
                measured=loss(0.1, 0.80),
                full_precision=loss(0.0, 0.801),
                baselines={"uniform 3 bits": loss(0.4)},
            ),
            limits=Limits(max_drop=0.5, max_file_bytes=10**6),
            base=lock,
        )
        assert report.exit_code == 0
        assert {"passed"} == {str(o.status) for o in report.outcomes}
        report.require()

    def test_changed_weight(self, lock):
        """Another fingerprint: stale, 4."""
        report = check_lock(lock, model_digest="sha256:" + "0" * 64)
        assert report.exit_code == 4
        with refused(StalePlan, checks=["model fingerprint"]):
            report.require()

    def test_stale_lock(self, lock, plan):
        """A newer plan than the lock holds: stale, 4."""
        newer = replace(plan, measured=loss(0.05))
        assert check_lock(lock, plan=newer).exit_code == 4

    def test_larger_model_than_the_base(self, lock, plan):
        """More bytes than the branch it merges into: 1."""
        small = replace(lock, plan=bits_of(plan, 3), exports=())
        report = check_lock(lock, base=small)
        assert report.exit_code == 1
        with refused(GateFailed, checks=["bytes of the model"]):
            report.require()

    def test_larger_than_the_limit(self, lock):
        """More bytes than the limit: 1."""
        assert check_lock(lock, limits=Limits(max_bytes=10)).exit_code == 1

    def test_worse_kl(self, lock):
        """A fresh measurement above the limit: 1."""
        assert check_lock(lock, quality=Quality(measured=loss(0.3))).exit_code == 1

    def test_recorded_kl(self, lock):
        """Without a fresh measurement the plan's own record counts: 1."""
        assert check_lock(lock, limits=Limits(max_kl=0.05)).exit_code == 1

    def test_accuracy_drop(self, lock):
        """More points lost than allowed: 1; without labels it cannot pass either."""
        limits = Limits(max_drop=0.5)
        bad = Quality(measured=loss(0.1, 0.79), full_precision=loss(0.0, 0.80))
        assert check_lock(lock, quality=bad, limits=limits).exit_code == 1
        good = Quality(measured=loss(0.1, 0.799), full_precision=loss(0.0, 0.80))
        assert check_lock(lock, quality=good, limits=limits).exit_code == 0
        assert check_lock(lock, quality=Quality(measured=loss(0.1)), limits=limits).exit_code == 1

    def test_worse_than_uniform(self, lock):
        """A uniform plan of no more bytes that measures better: 1; a larger one does not count."""
        better = Quality(
            measured=loss(0.1),
            baselines={"uniform 3 bits": loss(0.05), "uniform 8 bits": loss(0.0)},
        )
        assert check_lock(lock, quality=better).exit_code == 1
        larger = Quality(
            measured=loss(0.1),
            baselines={"uniform 3 bits": loss(0.5), "uniform 8 bits": loss(0.0)},
        )
        assert check_lock(lock, quality=larger).exit_code == 0

    def test_illegal_type(self, lock, plan):
        """A layer whose format the target cannot store: 1, with the layer named."""
        wrong = replace(lock, plan=bits_of(plan, 1), exports=())
        report = check_lock(wrong)
        assert report.exit_code == 1
        (target,) = [o for o in report.outcomes if o.check == "target"]
        assert "conv" in target.message

    def test_damaged_file(self, lock, exported, tmp_path):
        """A file with one other byte: 1; a longer one: 1; a missing one: 1."""
        import shutil

        for k, damage in enumerate(("flip", "grow", "remove")):
            folder = shutil.copytree(exported[0], tmp_path / str(k))
            path = folder / "model.safetensors"
            data = bytearray(path.read_bytes())
            if damage == "remove":
                path.unlink()
            else:
                data[-1] ^= 1
                path.write_bytes(bytes(data) + (b"x" if damage == "grow" else b""))
            report = check_lock(lock, folders=(folder,))
            assert report.exit_code == 1, damage
            assert "model.safetensors" in report.to_markdown("a.lock.json")

    def test_larger_files(self, lock, exported):
        """Files above their limit: 1."""
        report = check_lock(lock, folders=(exported[0],), limits=Limits(max_file_bytes=100))
        assert report.exit_code == 1

    def test_files_without_a_report(self, plan, exported):
        """A lock that knows of no export cannot vouch for files: stale, 4."""
        assert check_lock(make_lock(plan), folders=(exported[0],)).exit_code == 4

    def test_stale_outranks_failed(self, lock):
        """Both: the lock must be renewed before limits mean anything."""
        report = check_lock(lock, model_digest="sha256:1", limits=Limits(max_bytes=1))
        assert report.exit_code == 4


def bits_of(plan: Plan, bits: int) -> Plan:
    """The plan with every layer at one width."""
    assignments = tuple(
        replace(a, candidate=Candidate.of(a.layer, bits, a.candidate.scheme))
        for a in plan.assignments
    )
    return replace(plan, assignments=assignments)


class TestReports:
    def test_junit(self, lock):
        """One case per check; failures carry their message."""
        report = check_lock(lock, model_digest="sha256:1", limits=Limits(max_bytes=1))
        suite = ET.fromstring(to_junit({"a": report})).find("testsuite")  # noqa: S314  # our own
        assert len(report.outcomes) == len(suite.findall("testcase"))
        assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
        assert "the limit is 1" in suite.find("testcase/failure").get("message")

    def test_several(self, lock):
        """A suite for each lock file; the worst exit code counts."""
        reports = {
            "a": check_lock(lock),
            "b": check_lock(lock, limits=Limits(max_bytes=1)),
            "c": check_lock(lock, model_digest="sha256:1"),
        }
        suites = ET.fromstring(to_junit(reports)).findall("testsuite")  # noqa: S314  # our own
        assert [s.get("name") for s in suites] == [f"bitquota check {k}" for k in "abc"]
        assert [r.exit_code for r in reports.values()] == [0, 1, 4]
        assert worst_exit_code(reports.values()) == 4
        assert worst_exit_code(list(reports.values())[:2]) == 1

    def test_markdown(self, lock):
        """A verdict and a row per check."""
        report = check_lock(lock)
        text = report.to_markdown("a.lock.json")
        assert text.startswith("### Bitquota check of a.lock.json passed\n")
        assert text.count("\n|") == len(report.outcomes) + 2

    def test_json(self, lock):
        """The exit code and every outcome."""
        data = json.loads(json.dumps(check_lock(lock).to_json()))
        assert data["exit_code"] == 0
        assert data["lock_digest"] == lock.digest()

    def test_step_summary(self, tmp_path):
        """Appended where GitHub names a file, nothing elsewhere, a clear error when it cannot."""
        file = tmp_path / "summary.md"
        file.write_text("before\n")
        assert append_step_summary("after\n", {"GITHUB_STEP_SUMMARY": str(file)})
        assert file.read_text() == "before\nafter\n"
        assert not append_step_summary("x", {})
        with pytest.raises(InvalidInput, match="GITHUB_STEP_SUMMARY"):
            append_step_summary("x", {"GITHUB_STEP_SUMMARY": str(tmp_path)})


class TestDiffPlans:
    def test_same_plan(self, plan):
        """Nothing to say."""
        same = diff_plans(plan, Plan.from_json(plan.to_json()))
        assert same.empty
        assert same.to_markdown() == ""

    def test_one_layer(self, plan):
        """The layer, both widths, and the bytes."""
        first = plan.assignments[0]
        other = 8 if first.candidate.weight_bits != 8 else 3
        candidate = Candidate.of(first.layer, other, first.candidate.scheme)
        new = replace(
            plan, assignments=(replace(first, candidate=candidate), *plan.assignments[1:])
        )
        found = diff_plans(plan, new)
        (change,) = found.changes
        assert change.layer == first.layer.name
        assert candidate.size_bits - first.candidate.size_bits == change.new_bits - change.old_bits
        text = found.to_markdown()
        assert f"| `{first.layer.name}` | W{first.candidate.weight_bits} " in text
        assert "size of the model" in text

    def test_layers_that_come_and_go(self, plan):
        """A layer that one plan lacks is shown as missing."""
        fewer = replace(plan, assignments=plan.assignments[1:])
        assert diff_plans(plan, fewer).changes[0].new is None
        assert diff_plans(fewer, plan).changes[0].old is None

    def test_measured_loss(self, plan):
        """Losses and accuracy are facts."""
        worse = replace(plan, measured=loss(0.2, accuracy=0.7))
        names = [fact.name for fact in diff_plans(plan, worse).facts]
        assert names == ["measured loss increase", "accuracy on the hold-out"]


class TestLatency:
    """Time as a limit: what is predicted, what was timed, and with which table."""

    @pytest.fixture
    def timed(self, plan, exported):
        """A lock whose plan takes 3 ms by its table, and whose export took 3.2 ms."""
        table = CostTable(
            resource="latency_ns",
            model_digest=plan.model_digest,
            constant=3_000_000,
            layers=tuple(
                LayerCost(layer=a.layer.name, candidate=a.candidate.label, cost=0)
                for a in plan.assignments
            ),
        )
        made = replace(plan, budgets=(Budget.parse("4 ms", plan.inventory, [table]),))
        report = replace(
            exported[1],
            plan_digest=made.digest(),
            timed=Timed(
                predicted_ns=3_000_000, measured_ns=3_200_000, clocked_ns=3_200_000, speed=1.0,
                limit_ns=4_000_000,
                table=table.digest(), device="", clock="processor", threads=1, batch=1,
            ),
        )  # fmt: skip
        return make_lock(made, reports=(report,)), table

    def test_predicted_and_timed_must_keep_it(self, timed):
        """A timed run may exceed the limit by the tolerance, a prediction may not."""
        lock, _ = timed
        for limits, code in (
            (Limits(max_latency_ns=3_000_000), 0),
            (Limits(max_latency_ns=3_000_000, latency_tolerance=0.05), 1),
            (Limits(max_latency_ns=2_999_999, latency_tolerance=1.0), 1),
        ):
            assert code == check_lock(lock, limits=limits).exit_code
            assert code == check_lock(Lock.from_json(lock.to_json()), limits=limits).exit_code
        assert 0 == check_lock(lock).exit_code

    def test_a_fresh_export_counts(self, timed, exported, tmp_path):
        """What lies in the folder was timed last."""
        lock, _ = timed
        report = ExportReport.from_json(lock.exports[0])
        slow = replace(report, timed=replace(report.timed, measured_ns=9_000_000))
        shutil.copytree(exported[0], tmp_path / "out")
        slow.save(tmp_path / "out")
        limits = Limits(max_latency_ns=3_000_000)
        assert 1 == check_lock(lock, limits=limits, folders=(tmp_path / "out",)).exit_code
        report.save(tmp_path / "out")
        assert 0 == check_lock(lock, limits=limits, folders=(tmp_path / "out",)).exit_code

    def test_another_table_makes_it_stale(self, timed, plan):
        """The lock holds the table by which it was planned."""
        lock, table = timed
        assert 0 == check_lock(lock, table=table).exit_code
        assert 4 == check_lock(lock, table=replace(table, constant=2_000_000)).exit_code
        assert 4 == check_lock(make_lock(plan), table=table).exit_code

    def test_needs_something_to_go_by(self, plan):
        """A plan without a table and without a timed export keeps no limit of time."""
        report = check_lock(make_lock(plan), limits=Limits(max_latency_ns=10**12))
        assert 1 == report.exit_code
        with refused(GateFailed):
            require_limits(make_lock(plan, limits=Limits(max_latency_ns=10**12)))

    def test_other_locks_keep_their_bytes(self, plan):
        """Limits that are not set are not written."""
        body = make_lock(plan, limits=Limits(max_kl=1.0)).to_json()
        assert "max_latency_ns" not in body["limits"]
