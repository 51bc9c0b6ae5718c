"""What the README shows, runs; what the command line offers, the README or its help names."""

from __future__ import annotations

import re

import pytest

from markdown_pages import blocks


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text()


class TestReadme:
    def test_commands(self, readme, run_command, tmp_path):
        """The commands of the first shell block run one after another and leave their files."""
        commands = blocks(readme, "sh")[0].splitlines()

        assert len(commands) >= 5
        for command in commands:
            run_command(command)
        written = {path.name for path in tmp_path.iterdir()}
        assert {"plan.json", "report.md", "sensitivity.npz"} <= written

    def test_python(self, readme, repository, monkeypatch, capsys):
        """The last Python block runs as it stands and prints one line per budget."""
        monkeypatch.syspath_prepend(str(repository))
        code = blocks(readme, "python")[-1]
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # our own documentation

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
