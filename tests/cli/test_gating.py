"""The gate from the command line: scripted regressions, their exit codes and their summaries."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch

from bitquota.candidates.table import Candidate
from bitquota.ci.lock import Lock, make_lock
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.identity import weights_fingerprint
from bitquota.models.load import load_model
from bitquota.plan import Baseline, MeasuredLoss, Plan
from format_networks import plan_with, samples

MODEL = "format_networks:tiny_net"
CHANGED = """
import torch
from format_networks import tiny_net


def changed():
    model = tiny_net()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.01
    return model
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a plan, its export and labelled samples."""
    folder = tmp_path_factory.mktemp("gate")
    model = load_model(MODEL)
    x, _ = samples()
    data = CalibrationSet(inputs=(torch.from_numpy(x),))
    plan = plan_with(model, data.inputs, target="ref-int", bits=(3, 4, 8), seed=5)
    uniform = Baseline(
        name="uniform W3",
        weight_bits=(3,) * len(plan.assignments),
        size_bits=sum(c.size_bits for c in plan.candidates_at((3,) * len(plan.assignments))),
        measured=loss(0.4),
    )
    plan = replace(plan, measured=loss(0.1), baselines=(uniform,))
    plan.save(folder / "plan.json")
    export_plan(model, plan, folder / "export", target="ref-int", samples=data)
    with torch.no_grad():
        labels = model.module(torch.from_numpy(x)).argmax(-1).numpy()
    np.savez(folder / "test.npz", x=x, y=labels)
    return folder


def loss(mean: float) -> MeasuredLoss:
    return MeasuredLoss(mean=mean, standard_error=0.001, n_samples=100)


@pytest.fixture
def gate(bitquota, made, tmp_path):
    """Return the command line in a folder with everything of ``made`` and its lock file."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    code, _, err = bitquota(
        "lock", "plan.json", "--target", "ref-int", "--exported", "export",
        "--max-kl", 0.2, "--max-size", "1 MiB", "--not-worse-than", "uniform",
    )  # fmt: skip
    assert code == 0, err
    return bitquota


def rewrite(path, **changes) -> None:
    """Write the lock file with another content and a digest that fits it."""
    replace(Lock.load(path), **changes).save(path)


def at(plan: Plan, bits: int, **changes) -> Plan:
    """Return the plan with every layer at one width."""
    assignments = tuple(
        replace(a, candidate=Candidate.of(a.layer, bits, a.candidate.scheme))
        for a in plan.assignments
    )
    return replace(plan, assignments=assignments, **changes)


class TestLock:
    def test_content(self, gate, tmp_path):
        """Plan, target, limits and export report are held; a date only under ``volatile``."""
        held = Lock.load(tmp_path / "bitquota.lock.json")
        assert held.plan == Plan.load(tmp_path / "plan.json")
        assert (held.target, held.limits.max_bytes) == ("ref-int", 1 << 20)
        assert [report["exporter"] for report in held.exports] == ["ref-int"]
        assert set(held.volatile) == {"bitquota", "written"}

    def test_renewed(self, gate, tmp_path):
        """Target and limits of the file that is replaced are kept, unless given anew."""
        former = Lock.load(tmp_path / "bitquota.lock.json").digest()
        code, _, err = gate("lock", "plan.json", "--max-kl", 0.3)
        held = Lock.load(tmp_path / "bitquota.lock.json")
        assert code == 0
        assert f"({held.digest()[:19]}…; replaced {former[:19]}…, whose target" in err
        assert ", as it was)" in gate("lock", "plan.json", "--max-kl", 0.3)[2]
        assert held.target == "ref-int"
        assert (held.limits.max_kl, held.limits.not_worse_than) == (0.3, "uniform")
        assert held.exports == ()

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--max-size", "100 B"], "bytes of the model"),
            (["--max-kl", "0.05"], "loss increase"),
            (["--exported", "export", "--max-file-size", "10 B"], "bytes of the files"),
        ],
    )
    def test_refuses_limits_that_the_plan_breaks(self, gate, tmp_path, arguments, text):
        """1, and the lock file stays as it was."""
        before = (tmp_path / "bitquota.lock.json").read_bytes()
        code, _, err = gate("lock", "plan.json", *arguments)
        assert code == 1
        assert text in err
        assert (tmp_path / "bitquota.lock.json").read_bytes() == before

    def test_twice_the_same(self, gate, tmp_path):
        """Two runs differ under ``volatile`` alone."""
        first = json.loads((tmp_path / "bitquota.lock.json").read_text())
        assert gate("lock", "plan.json", "--exported", "export", "-o", "b.json")[0] == 0
        gate("lock", "plan.json", "--exported", "export")
        second = json.loads((tmp_path / "bitquota.lock.json").read_text())
        assert first.pop("volatile").keys() == second.pop("volatile").keys()
        assert first == second

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["--max-size", "lots"], 2, "a size must read like"),
            (["--max-size", "3 bits"], 2, "a size must read like"),
            (["--target", "ort-gpu"], 2, "ort-cpu"),
            (["--target", "ort-cpu"], 2, "ort-cpu"),
            (["--exported", "."], 2, "receipt.json"),
            (["--max-kl", "-1"], 2, "at least 0"),
        ],
    )
    def test_errors(self, gate, tmp_path, arguments, code, text):
        """One sentence, and the lock file stays as it was."""
        before = (tmp_path / "bitquota.lock.json").read_bytes()
        got, _, err = gate("lock", "plan.json", *arguments)
        assert got == code
        assert text in err
        assert (tmp_path / "bitquota.lock.json").read_bytes() == before


class TestCheck:
    def test_everything_holds(self, gate, tmp_path):
        """Fingerprint, plan, target, bytes, files and a fresh measurement: exit 0."""
        code, out, _ = gate(
            "check", "--model", MODEL, "--data", "test.npz", "--plan", "plan.json",
            "--exported", "export", "--base", "bitquota.lock.json", "--max-kl", 5, "--max-drop",
            100, "--not-worse-than", "uniform", "--junit", "j.xml", "--summary", "s.md",
        )  # fmt: skip
        suite = ET.parse(tmp_path / "j.xml").getroot().find("testsuite")  # noqa: S314  # our own
        assert code == 0, out
        assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0",) * 3
        assert "skipped" not in out
        assert out.splitlines()[-1] == "bitquota.lock.json: passed"
        assert (tmp_path / "s.md").read_text().startswith("### Bitquota check of bitquota.lock")

    def test_files_that_the_lock_names_are_hashed(self, gate, tmp_path):
        """Without --exported: a changed byte is seen, a folder elsewhere is said to be."""
        assert Lock.load(tmp_path / "bitquota.lock.json").folders == ("export",)
        code, out, _ = gate("check")
        assert code == 0
        assert "files are those of the export report" in out
        (file,) = [f for f in (tmp_path / "export").iterdir() if f.suffix != ".json"]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        code, out, _ = gate("check")
        assert code == 1
        assert "has other content" in out
        shutil.rmtree(tmp_path / "export")
        code, out, _ = gate("check")
        assert code == 0
        assert "'export' is not here: name it with --exported" in out

    def test_a_lock_of_an_earlier_release(self, gate, tmp_path):
        """It names the model by its weights alone: they are compared, and that is said."""
        plan = Plan.load(tmp_path / "plan.json")
        old = replace(plan, model_digest=weights_fingerprint(load_model(MODEL).module))
        rewrite(tmp_path / "bitquota.lock.json", plan=old, exports=(), folders=None)
        code, out, _ = gate("check", "--model", MODEL)
        assert code == 0
        assert "named the model by its weights alone" in out

    def test_changed_weight(self, gate, tmp_path, monkeypatch):
        """1: one weight of the model changed: stale, 4; nothing is measured on it."""
        (tmp_path / "gate_networks.py").write_text(CHANGED)
        monkeypatch.syspath_prepend(str(tmp_path))
        code, out, _ = gate(
            "check", "--model", "gate_networks:changed", "--data", "test.npz", "--summary", "s"
        )
        assert code == 4
        assert "plan again and commit" in out
        assert "⏳ stale" in (tmp_path / "s").read_text()

    def test_stale_lock(self, gate, tmp_path):
        """2: a plan was made and the lock not renewed: 4."""
        replace(Plan.load(tmp_path / "plan.json"), measured=loss(0.05)).save(tmp_path / "new.json")
        code, out, _ = gate("check", "--plan", "new.json")
        assert code == 4
        assert "write the lock file anew" in out

    def test_larger_model(self, gate, tmp_path):
        """3: more bytes than the base branch: 1."""
        plan = Plan.load(tmp_path / "plan.json")
        make_lock(at(plan, 2)).save(tmp_path / "base.lock.json")
        code, out, _ = gate("check", "--base", "base.lock.json")
        assert code == 1
        assert "the base branch is" in out

    def test_limit_of_bytes(self, gate):
        """4: more bytes than allowed: 1."""
        code, out, _ = gate("check", "--max-size", "100 B")
        assert code == 1
        assert "the limit is 100: lower the budget" in out

    def test_worse_kl(self, gate):
        """5: a fresh measurement beyond the limit: 1."""
        code, out, _ = gate("check", "--model", MODEL, "--data", "test.npz", "--max-kl", "1e-9")
        assert code == 1
        assert "the limit is 1e-09" in out

    def test_accuracy_drop(self, gate, tmp_path):
        """6: points lost: 1. Every layer at 1 bit cannot keep all labels."""
        rewrite(tmp_path / "bitquota.lock.json", plan=at(Plan.load(tmp_path / "plan.json"), 2))
        code, out, _ = gate(
            "check", "--model", MODEL, "--data", "test.npz", "--max-drop", 0, "--max-kl", 99
        )
        assert code == 1
        assert "points, the limit is 0" in out

    def test_worse_than_uniform(self, gate, tmp_path):
        """7: a uniform baseline of no more bytes measured better: 1."""
        plan = Plan.load(tmp_path / "plan.json")
        better = replace(plan.baselines[0], measured=loss(0.01))
        rewrite(tmp_path / "bitquota.lock.json", plan=replace(plan, baselines=(better,)))
        code, out, _ = gate("check")
        assert code == 1
        assert "of uniform W3" in out

    def test_illegal_type(self, gate, tmp_path):
        """8: a width that the target cannot store: 1, with the layers named."""
        plan = Plan.load(tmp_path / "plan.json")
        rewrite(tmp_path / "bitquota.lock.json", plan=plan, target="ort-cpu")
        code, out, _ = gate("check")
        assert code == 1
        assert "ort-cpu cannot store" in out
        assert any(a.layer.name in out for a in plan.assignments)

    def test_damaged_export(self, gate, tmp_path):
        """9: another byte in an exported file: 1."""
        path = tmp_path / "export" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        code, out, _ = gate("check", "--exported", "export")
        assert code == 1
        assert "model.safetensors has other content: export again" in out

    def test_edited_by_hand(self, gate, tmp_path):
        """10: a raised limit without a new digest: refused, 2."""
        path = tmp_path / "bitquota.lock.json"
        path.write_text(path.read_text().replace('"max_kl": 0.2', '"max_kl": 20.0'))
        code, _, err = gate("check")
        assert code == 2
        assert "this one was edited" in err

    def test_several(self, gate, tmp_path):
        """Each lock file has its suite; the worst code counts; --base speaks of one only."""
        make_lock(Plan.load(tmp_path / "plan.json")).save(tmp_path / "b.lock.json")
        files = ["bitquota.lock.json", "b.lock.json"]
        code, out, _ = gate("check", *files, "--json", "--junit", "j.xml")
        assert code == 0
        assert list(json.loads(out)) == sorted(files)
        assert len(ET.parse(tmp_path / "j.xml").getroot()) == 2  # noqa: S314  # our own text
        code, _, err = gate("check", *files, "--base", "b.lock.json")
        assert code == 2
        assert "single lock file" in err

    def test_step_summary(self, gate, tmp_path, monkeypatch):
        """Appended to the file that GitHub names."""
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
        assert gate("check")[0] == 0
        assert (
            "### Bitquota check of bitquota.lock.json passed" in (tmp_path / "step.md").read_text()
        )

    def test_errors(self, gate):
        """Missing files and half a measurement are usage errors."""
        assert gate("check", "no.lock.json")[0] == 2
        code, _, err = gate("check", "--data", "test.npz")
        assert code == 2
        assert "--model" in err

    def test_without_torch(self, made, tmp_path):
        """What needs no model loads no torch: the check of a pull request takes a second."""
        import subprocess
        import sys

        make_lock(Plan.load(made / "plan.json")).save(tmp_path / "bitquota.lock.json")
        code = "import sys; sys.argv = ['bitquota', 'check']; import bitquota.cli as c; c.main();"
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "bitquota.lock.json: passed" in done.stdout
        assert "bitquota.ci.check" in done.stderr
        assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


class TestDiff:
    def test_same(self, gate):
        """A lock and its plan: nothing, 0."""
        assert gate("diff", "plan.json", "bitquota.lock.json", "--exit-code")[:2] == (0, "")

    def test_changed(self, gate, tmp_path):
        """Markdown with every layer, JSON, and 1 only if asked for."""
        plan = Plan.load(tmp_path / "plan.json")
        at(plan, 2).save(tmp_path / "new.json")
        code, out, _ = gate("diff", "plan.json", "new.json")
        assert code == 0
        assert "| layer | old | new | bytes |" in out
        changed = [a for a in plan.assignments if a.candidate.weight_bits != 2]
        assert all(f"`{a.layer.name}`" in out for a in changed)
        code, out, _ = gate("diff", "plan.json", "new.json", "--json", "--exit-code")
        assert code == 1
        assert len(json.loads(out)["changes"]) == len(changed)

    def test_errors(self, gate, tmp_path):
        """A file that is neither."""
        (tmp_path / "x.json").write_text("[]")
        code, _, err = gate("diff", "plan.json", "x.json")
        assert code == 2
        assert "bitquota/plan" in err
