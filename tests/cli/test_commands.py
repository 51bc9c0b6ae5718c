"""The command line in process: files written, tables readable, errors one sentence, exit codes."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Plan
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from trained_digits import calibration, files, trained

FAST = ["--bits", "2,4,8", "--samples", "64", "--holdout", "64", "--no-refine"]
FACTORIES = ["trained_digits:model", "trained_digits:calibration"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Return the network as .pt2 and its samples as .npz."""
    return files(tmp_path_factory.mktemp("shipped"))


@pytest.fixture
def planned(tmp_path):
    """A plan in the folder of the test, made once for all of them."""
    _plan().save(tmp_path / "plan.json")


@functools.cache
def _plan():
    request = PlanRequest(
        budgets=("3 bits",), weight_bits=(2, 4, 8), samples=64, holdout_samples=64, refine=False
    )
    (plan,) = allocate(trained().model, trained().fit, request).plans
    return plan


class TestPlan:
    def test_from_factory(self, bitquota, tmp_path):
        """A factory needs no file; plan and report are written, the table is printed."""
        code, out, _ = bitquota("plan", *FACTORIES, "-b", "3 bits", *FAST, "--report", "r.md")

        plan = Plan.load(tmp_path / "plan.json")
        assert code == 0
        assert plan.average_bits <= 3
        assert "Measured beside it" in out
        assert all(a.layer.name in out for a in plan.assignments)
        assert plan.digest() in (tmp_path / "r.md").read_text()
        assert (tmp_path / "cache" / "bitquota" / "ledger.sqlite").exists()

    def test_certificate_beside_the_plan(self, bitquota, tmp_path):
        """The plan is verified by the files that were written with it, and by no others."""
        for budget, out in (("3 bits", "plan.json"), ("4 bits", "other.json")):
            written = ["-o", out, "--matrix", "m.npz"]
            assert bitquota("plan", *FACTORIES, "-b", budget, *FAST, *written)[0] == 0
        code, out, _ = bitquota("verify", "plan.json", "m.npz", "plan.certificate.npz", "--json")
        assert code == 0
        assert json.loads(out)["bound"] == Plan.load(tmp_path / "plan.json").proof.bound

        code, _, err = bitquota("verify", "plan.json", "m.npz", "other.certificate.npz")
        assert code == 1
        assert "problem" in err

    def test_from_files_at_two_budgets(self, bitquota, tmp_path, shipped):
        """A .pt2 and an .npz give one numbered plan per budget, and the matrix if asked for."""
        code, out, _ = bitquota(
            "plan", *shipped, "-b", "3 bits", "-b", "8 KiB", *FAST, "--matrix", "m.npz", "--json"
        )

        assert code == 0
        assert len(json.loads(out)) == 2
        assert Plan.load(tmp_path / "plan-2.json").model_bits <= 8 * 1024 * 8
        assert SensitivityMatrix.load(tmp_path / "m.npz").cross is not None

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["-b", "1 bits"], 5, "below the smallest plan"),
            (["-b", "lots"], 2, "a budget must read like"),
            (["-b", "3 bits", "--fix", "haed=8"], 2, "did you mean 'head'"),
            (["-b", "3 bits", "--fix", "head"], 2, "LAYER=BITS"),
            (["-b", "3 bits", "--bits", "2;4"], 2, "separated by commas"),
            ([], 2, "at least one budget"),
        ],
    )
    def test_errors(self, bitquota, tmp_path, arguments, code, text):
        """One sentence, the documented exit code, and no file left behind."""
        got, _, err = bitquota("plan", *FACTORIES, *FAST, *arguments)

        assert got == code
        assert text in err
        assert err.count("\n") == 1
        assert not (tmp_path / "plan.json").exists()

    def test_interrupted(self, bitquota, tmp_path, monkeypatch):
        """Ctrl-C says what is kept, where, and how to go on; 130, as shells expect."""

        def stop(_spec):
            raise KeyboardInterrupt

        monkeypatch.setattr("bitquota.models.load.load_model", stop, raising=False)
        code, _, err = bitquota("plan", *FACTORIES, "-b", "3 bits", "--ledger", "my/l.sqlite")

        assert code == 130
        assert "what was measured is in my/l.sqlite: the same command goes on" in err
        assert err.endswith("interrupted\n")

    def test_former_plan_is_named(self, bitquota, tmp_path):
        """A rerun changes nothing; another budget replaces the plan and says which it was."""
        rerun = ["plan", *FACTORIES, *FAST]
        said = [bitquota(*rerun, "-b", budget)[2] for budget in ("3 bits", "3 bits", "4 bits")]

        assert [line.splitlines()[-1] for line in said] == [
            "wrote plan.json",
            "wrote plan.json (as it was)",
            "wrote plan.json (replaced a plan for 3 bits)",
        ]

    def test_pickle_is_refused(self, bitquota, tmp_path):
        """A pickle is never opened; the safe alternatives are named."""
        torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
        code, _, err = bitquota("plan", "model.pth", FACTORIES[1], "-b", "3 bits")

        assert code == 2
        assert "pickle" in err
        assert "safetensors" in err

    def test_wrong_shape(self, bitquota, tmp_path):
        """Samples that the model cannot take are an input error that names the shape."""
        np.savez(tmp_path / "c.npz", x=np.zeros((64, 3, 5), dtype=np.float32))
        code, _, err = bitquota("plan", FACTORIES[0], "c.npz", "-b", "3 bits", *FAST)

        assert code == 2
        assert "got [3, 5] float32 per sample" in err

    def test_nan_weights(self, bitquota, tmp_path):
        """Weights that are not finite are refused before anything is measured."""
        (tmp_path / "broken.py").write_text(
            "import torch\nfrom trained_digits import model as good\nimport copy\n"
            "def model():\n    m = copy.deepcopy(good())\n"
            "    m.head.weight.data[0, 0] = float('nan')\n    return m\n"
        )
        code, _, err = bitquota("plan", "broken:model", FACTORIES[1], "-b", "3 bits", *FAST)

        assert code == 2
        assert "head.weight" in err


class TestMeasure:
    def test_matrix_solves(self, bitquota, tmp_path):
        """What 'measure' writes, 'solve' reads."""
        code, out, _ = bitquota(
            "measure", *FACTORIES, "--bits", "2,4,8", "--samples", "64", "--measure", "pairs"
        )
        assert code == 0
        assert "Each candidate alone" in out

        code, out, _ = bitquota("solve", "sensitivity.npz", "-b", "3 bits", "--json")
        solved = json.loads(out)
        assert code == 0
        assert solved["status"] == "optimal"
        assert solved["bound"] <= solved["objective"]
        assert solved["spent"]["code_bits"] <= solved["limits"]["code_bits"]

    def test_damaged_file(self, bitquota, tmp_path):
        """A truncated matrix is an input error."""
        (tmp_path / "m.npz").write_bytes(b"PK\x03\x04 and no more")
        code, _, err = bitquota("solve", "m.npz", "-b", "3 bits")

        assert code == 2
        assert err.startswith("error:")


class TestEvaluate:
    def test_plan_beside_full_precision(self, bitquota, tmp_path):
        """The table has full precision, the plan, and its baselines."""
        bitquota("plan", *FACTORIES, "-b", "4 bits", *FAST)
        x, y = calibration()
        np.savez(tmp_path / "t.npz", x=x[:100].numpy(), y=y[:100].numpy())
        np.savez(tmp_path / "c.npz", x=x[100:200].numpy())
        code, out, _ = bitquota(
            "evaluate", FACTORIES[0], "t.npz", "--plan", "plan.json", "--baselines", "--json",
            "--correction-data", "c.npz",
        )  # fmt: skip

        names = [e["name"] for e in json.loads(out)]
        assert code == 0
        assert names[:2] == ["full precision", "plan.json"]
        assert "uniform W4 of plan.json" in names

    def test_stale_plan(self, bitquota, tmp_path, planned):
        """A plan of other weights ends with exit code 4."""
        (tmp_path / "other.py").write_text(
            "import copy\nfrom trained_digits import model as good\n"
            "def model():\n    m = copy.deepcopy(good())\n    m.head.bias.data += 1\n    return m\n"
        )
        code, _, err = bitquota("evaluate", "other:model", FACTORIES[1], "--plan", "plan.json")

        assert code == 4
        assert "make a new plan" in err


class TestShow:
    def test_table_and_markdown(self, bitquota, planned):
        """A plan file can be read again by a person, in both ways."""
        _, table, _ = bitquota("show", "plan.json")
        _, markdown, _ = bitquota("show", "plan.json", "--markdown")

        assert "Plan for 3 bits" in table
        assert markdown.startswith("# plan.json")

    def test_edited_plan(self, bitquota, tmp_path, planned):
        """A plan that was edited by hand is refused."""
        text = (tmp_path / "plan.json").read_text()
        (tmp_path / "plan.json").write_text(text.replace('"selected":"', '"selected":"x'))
        code, _, err = bitquota("show", "plan.json")

        assert code == 2
        assert "was edited" in err


class TestVersion:
    def test_version(self, bitquota):
        """The version is printed alone."""
        assert bitquota("--version")[1].startswith("bitquota 0.")
