"""``profile`` on the command line, and what ``plan`` says of tables that do not fit."""

from __future__ import annotations

import json

import pytest

from bitquota.candidates.cost_table import CostTable

MODEL, SAMPLES = "format_networks:tiny_net", "format_networks:samples"


@pytest.fixture
def energy(bitquota, tmp_path):
    """A table of energies, computed."""
    args = ("--target", "ort-cpu", "--energy", "--out", "e.json")
    code, out, _ = bitquota("profile", MODEL, SAMPLES, *args)
    assert code == 0
    assert "Constant: " in out
    return CostTable.load(tmp_path / "e.json")


class TestProfile:
    def test_energy(self, energy):
        """Every layer at every width of the target."""
        found = {(c.layer, c.candidate) for c in energy.layers}
        layers = ("conv", "depthwise", "head")
        assert found == {(la, f"W{b}") for la in layers for b in (2, 4, 8, 32)}

    def test_what_does_not_go_together(self, bitquota):
        """Each of these makes something else; and nothing times a microcontroller here."""
        args = ("profile", MODEL, SAMPLES, "--energy", "--files", "f", "--target", "ort-cpu")
        assert bitquota(*args)[0] == 2
        code, _, err = bitquota("profile", MODEL, SAMPLES, "--target", "mcu")
        assert (code, "ort-cpu" in err) == (2, True)


class TestPlan:
    def test_tables_that_do_not_fit(self, bitquota, energy, tmp_path):
        """None, of another resource, of another model, below the cheapest plan: one sentence."""
        plan = ("plan", MODEL, SAMPLES, "--target", "ort-cpu", "--budget")
        for budget, *tables in (
            ("5 ms",),
            ("5 ms", "--table", "e.json"),
            ("1 mJ", "--table", "e.json", "--table", "e.json"),
            ("1 tok/s", "--table", "e.json"),
        ):
            code, _, err = bitquota(*plan, budget, *tables)
            assert code == 2
            assert "--table" in err
        body = energy.to_json() | {"model_digest": "sha256:other"}
        (tmp_path / "other.json").write_text(json.dumps(body))
        code, _, err = bitquota(*plan, "1 mJ", "--table", "other.json")
        assert (code, "profile this model" in err) == (2, True)
        code, _, err = bitquota(*plan, "1 pJ", "--table", "e.json")
        assert code == 2  # no such unit: nanojoules are the smallest
        code, _, err = bitquota(*plan, "0.001 nJ", "--table", "e.json")
        assert (code, "raise the budget to that" in err) == (5, True)
