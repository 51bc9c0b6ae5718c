from __future__ import annotations

import io

import pytest
from rich.console import Console

from bitquota.cli import drawing
from seeded_jobs import inventory_of, matrix_of, plan_of

INVENTORY = inventory_of(6)


@pytest.fixture(scope="module")
def matrix():
    return matrix_of(INVENTORY, widths=(2, 4, 8))


@pytest.fixture(scope="module")
def plan(matrix):
    return plan_of(INVENTORY, matrix, "3 bits")


@pytest.fixture
def files(tmp_path, plan, matrix):
    plan.save(tmp_path / "plan.json")
    matrix.save(tmp_path / "matrix.npz")
    return tmp_path


class TestReport:
    def test_plan_and_matrix_become_one_file(self, bitquota, files):
        code, _, said = bitquota(
            "report", files / "plan.json", "--matrix", files / "matrix.npz", "--points", 4,
            "--out", "out/r.html",
        )  # fmt: skip
        assert code == 0, said
        text = (files / "out" / "r.html").read_text()
        assert "Plan for 3 bits" in text
        assert '"at":"plan"' in text

    def test_a_matrix_alone_is_enough(self, bitquota, files):
        code, _, said = bitquota("report", files / "matrix.npz", "--points", 3)
        assert code == 0, said
        assert "wrote report.html" in said

    def test_picture(self, bitquota, files):
        code, _, said = bitquota("report", files / "plan.json", "--image", "r.svg")
        assert code == 0, said
        assert not (files / "report.html").exists()
        assert "plan, measured" in (files / "r.svg").read_text()

    def test_rows_of_the_frontier_command(self, bitquota, files):
        code, printed, _ = bitquota("frontier", files / "matrix.npz", "--points", 3, "--json")
        assert code == 0
        (files / "frontier.json").write_text(printed)
        assert 0 == bitquota("report", files / "frontier.json", "--out", "f.html")[0]
        assert "group 1" in (files / "f.html").read_text()

    @pytest.mark.parametrize("text", ["{", "[1]", '{"schema": "other"}'])
    def test_another_file_is_refused_with_what_it_must_be(self, bitquota, files, text):
        (files / "x.json").write_text(text)
        code, _, said = bitquota("report", files / "x.json")
        assert code == 2
        assert "x.json" in said

    def test_plans_of_different_layers_are_refused(self, bitquota, files, matrix):
        other = inventory_of(3)
        plan_of(other, matrix_of(other, widths=(2, 4, 8)), "4 bits").save(files / "other.json")
        code, _, said = bitquota("report", files / "plan.json", files / "other.json")
        assert code == 2
        assert "same layers" in said


def drawn(plan, frontier=(), **options):
    file = io.StringIO()
    drawing.draw_plan(Console(file=file, force_terminal=True, width=100, **options), plan, frontier)
    return file.getvalue()


class TestDrawPlan:
    def test_every_layer_has_a_bar_as_long_as_its_bits(self, plan):
        lines = drawn(plan, no_color=True).splitlines()
        for a in plan.assignments:
            (line,) = [text for text in lines if a.layer.name in text]
            assert line.count("█") == 20 * a.candidate.weight_bits // max(plan.weight_bits)

    def test_colours_only_where_they_are_wanted(self, plan):
        assert "\x1b[3" in drawn(plan, color_system="standard")
        assert "\x1b[3" not in drawn(plan, no_color=True)

    def test_plan_baselines_and_frontier_are_marked(self, plan):
        curve = [
            {"size_bits": plan.size_bits // 2, "predicted": 1.0},
            {"size_bits": plan.size_bits * 2, "predicted": 1e-3},
        ]
        text = drawn(plan, curve, no_color=True)
        assert {"◆", "○", "·"} <= set(text)
        assert "best possible" in text

    def test_one_point_alone_is_not_drawn(self):
        mark = drawing.Mark(size_bits=8, loss=1.0, sign="◆", style="")
        assert not drawing.scatter([mark], 80, "nats")


class TestPlacesThatCannotBeWritten:
    @pytest.mark.parametrize("option", ["--out", "--image"])
    def test_a_file_in_the_way_of_a_folder(self, bitquota, files, option):
        """One sentence with the path, exit 2, and no traceback."""
        (files / "taken.png").write_text("")
        code, _, said = bitquota("report", files / "plan.json", option, "taken.png/r.png")
        assert code == 2
        assert f"{option} must lie in a folder that may be written to" in said
        assert "taken.png' is no folder" in said
        assert said.count("\n") == 1

    def test_a_folder_in_place_of_a_file(self, bitquota, files):
        """Nothing is written into a folder's name."""
        (files / "folder").mkdir()
        code, _, said = bitquota("report", files / "plan.json", "--out", "folder")
        assert code == 2
        assert "--out must name a file; 'folder' is a folder: name a file in it" in said
        assert not list((files / "folder").iterdir())


class TestShow:
    def test_is_plain_where_nobody_looks(self, bitquota, files):
        """A pipe gets tables without bars and without colours."""
        code, text, _ = bitquota("show", files / "plan.json", "--matrix", files / "matrix.npz")
        assert code == 0
        assert "█" not in text
        assert "\x1b" not in text
        assert INVENTORY.layers[0].name in text
