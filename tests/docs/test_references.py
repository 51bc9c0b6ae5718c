"""References between code and documentation lead somewhere, in both directions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

SOURCE = ("src/", "solver/", "quantizers/", "sensitivity/", "models/", "formats/", "exports/")
SOURCE += ("training/", "service/", "benchmarks/", "tests/", "docs/")


@pytest.fixture(scope="module")
def tracked(repository):
    """Return every tracked file of the repository that is there, as a relative path."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [p for p in listed if (repository / p).is_file() and not (repository / p).is_symlink()]


@pytest.fixture(scope="module")
def design(repository):
    """Return the text of each design page, by its name."""
    pages = (repository / "docs" / "design").glob("*.md")
    return {page.name: page.read_text() for page in pages if page.name != "index.md"}


def anchors(text: str) -> set[str]:
    """Return what a link may have behind its ``#``, as GitHub and mkdocs make it of headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}


class TestDesignPages:
    def test_code_and_page_name_each_other(self, repository, tracked, design):
        """The modules of a page's list are those whose text names the page."""
        naming: dict[str, set[str]] = {name: set() for name in design}
        for path in tracked:
            if path.endswith(".py") and not path.startswith(("tests/", "docs/")):
                for name in re.findall(
                    r"docs/design/([\w-]+\.md)", (repository / path).read_text()
                ):
                    assert name in naming, f"{path} names docs/design/{name}, which does not exist"
                    naming[name].add(path)
        for name, text in design.items():
            line = re.search(r"^Code: (.+?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
            assert line, f"docs/design/{name} has no line 'Code: ...'"
            listed = set(re.findall(r"`([^`]+\.py)`", line.group(1)))
            assert listed == naming[name], f"docs/design/{name}"
            assert listed

    def test_index_lists_every_page(self, repository, design):
        text = (repository / "docs" / "design" / "index.md").read_text()
        assert set(re.findall(r"\]\(([\w-]+\.md)\)", text)) == set(design)

    def test_paths_exist(self, repository, design):
        """Files and folders that a page names in backticks are there."""
        missing = [
            (name, path)
            for name, text in design.items()
            for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text)
            if path.startswith(SOURCE) and not (repository / path).exists()
        ]
        assert missing == []


class TestLinks:
    def test_relative_links(self, repository, tracked):
        """Each relative link of a Markdown file leads to a file, and its anchor to a heading."""
        generated = {"command-line.md", "rest.md"}
        wrong = []
        for path in (p for p in tracked if p.endswith(".md")):
            text = re.sub(r"(?ms)^```.*?^```", "", (repository / path).read_text())
            for link in re.findall(r"\]\((?!https?:|mailto:)([^) ]+)\)", text):
                target, _, anchor = link.partition("#")
                file = (repository / path).parent / target if target else repository / path
                if Path(target).name in generated or "reference/python" in target:
                    continue
                if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                    wrong.append((path, link))
        assert wrong == []

    def test_named_documents_exist(self, repository, tracked):
        """A Markdown file that code or configuration names by its folder is there."""
        wrong = []
        for path in (p for p in tracked if p.endswith((".py", ".toml", ".yml", "Makefile"))):
            text = (repository / path).read_text()
            named = re.findall(r"\b(?:docs|research)/(?!reference/)[\w/-]+\.md\b", text)
            wrong += [(path, name) for name in named if not (repository / name).exists()]
        assert wrong == []
