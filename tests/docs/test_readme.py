"""What the README shows, runs; what the command line offers, the README or its help names."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bitquota.cli import quickstart
from bitquota.exports.export_report import ExportReport
from markdown_pages import blocks
from onnx_graphs import image_graph


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text()


@pytest.fixture
def beginners_files(repository, tmp_path, monkeypatch):
    """What the reader of the first hour brings: an ONNX file, a folder, samples."""
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.chdir(tmp_path)
    from examples import tiny_llama

    tiny_llama.main(["--steps", "1"])
    text = (tmp_path / "calibration.txt").read_text()
    (tmp_path / "calibration.txt").write_text(text[:3000])
    image_graph(tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "calibration.npz", x=images)


class TestFirstHour:
    @pytest.mark.slow
    @pytest.mark.usefixtures("beginners_files")
    def test_three_paths(self, readme, run_command, tmp_path, monkeypatch, capsys):
        """Each ends in a file that was run; the least work that quickstart proposes is enough.

        Of the language model the proposal is enough: tests/docs/test_quickstarts.py runs one.
        """
        monkeypatch.setattr(quickstart, "LONG_S", 0.0)
        hour = readme.partition("## The first hour")[2].partition("\n## ")[0]
        for command in "".join(blocks(hour, "sh")).splitlines():
            run_command(command.replace(" --yes", "") if "llama" in command else command)
        ran = {
            folder.name: ExportReport.load(folder).difference is not None
            for folder in tmp_path.glob("small-*")
            if folder.is_dir()
        }
        assert {"small-onnx": True, "small-digits": True} == ran
        assert "bitquota plan tiny-llama calibration.txt --target gguf-k" in capsys.readouterr().err
        (code,) = blocks(hour, "python")
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # our own documentation
        assert "[['n', 10]]" == capsys.readouterr().out.strip()


class TestReadme:
    def test_commands(self, readme, run_command, tmp_path):
        """The commands below run one after another and leave their files."""
        commands = blocks(readme.partition("## Command line")[2], "sh")[0].splitlines()

        assert len(commands) >= 5
        for command in commands:
            run_command(command)
        written = {path.name for path in tmp_path.iterdir()}
        assert {"plan.json", "report.md", "sensitivity.npz"} <= written

    def test_python(self, readme, repository, monkeypatch, capsys, tmp_path):
        """The last two blocks run as they stand: one writes a folder, one prints two budgets."""
        monkeypatch.syspath_prepend(str(repository))
        monkeypatch.chdir(tmp_path)
        for code in blocks(readme, "python")[-2:]:
            exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # our own documentation

        assert {"model.onnx", "plan.json", "receipt.json", "README.md"} == {
            path.name for path in (tmp_path / "small-digits").iterdir()
        }
        assert len(capsys.readouterr().out.splitlines()) == 2

    def test_two_commands_come_first(self, readme):
        """A new user sees the two commands before anything else."""
        assert blocks(readme, "")[0].split("\n")[:2] == ["make demo", "make test"]

    def test_exit_codes(self, readme):
        """The table of exit codes is that of the error tree."""
        from bitquota import errors

        used = {
            kind.exit_code
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, errors.BitquotaError)
        }
        table = {int(code) for code in re.findall(r"^\| (\d) \|", readme, flags=re.MULTILINE)}
        assert table == used | {0}

    def test_links(self, readme, repository):
        """Links inside the repository lead somewhere."""
        targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)

        assert targets
        assert [t for t in targets if not (repository / t).exists()] == []
