"""The documentation site builds strictly, from the code as it is, and needs no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """Return the folder of the built site."""
    pytest.importorskip("mkdocs", reason="'mkdocs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=repository,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page: Path) -> str:
    return re.sub(r"<[^>]+>", " ", page.read_text())


class TestSite:
    def test_every_page_is_listed(self, repository, site):
        """What stands in docs/ is in the menu, design pages apart; no user sees more than 25."""
        listed = set(re.findall(r"[\w/-]+\.md", (repository / "mkdocs.yml").read_text()))
        pages = {
            p.relative_to(repository / "docs").as_posix() for p in repository.glob("docs/**/*.md")
        }
        assert {p for p in pages - listed if not p.startswith("design/")} == set()
        assert len(listed) <= 25
        index = (site / "design" / "index.html").read_text()
        assert [p for p in pages if p.startswith("design/") and Path(p).stem not in index] == []

    def test_command_line(self, site):
        """Every command and its options, from the application itself."""
        text = text_of(site / "reference" / "command-line" / "index.html")
        for part in ("bitquota plan", "bitquota check", "bitquota admin keys create", "--max-drop"):
            assert part in text

    def test_rest(self, site, tmp_path):
        """Every route of the service."""
        from bitquota.service.app import create_app
        from bitquota.service.settings import Settings

        text = text_of(site / "reference" / "rest" / "index.html")
        paths = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
        assert [
            p for p, methods in paths.items() for m in methods if f"{m.upper()} {p}" not in text
        ] == []

    def test_python(self, site):
        """Names and docstrings of the public modules."""
        text = (site / "reference" / "python" / "index.html").read_text()
        for name in (
            "bitquota.search.allocate.allocate",
            "bitquota.plan.Plan",
            "bitquota.client.Client",
        ):
            assert f'id="{name}"' in text, name

    def test_no_other_host(self, site):
        """Pages load nothing from elsewhere: no fonts, no scripts, no pictures."""
        loaded = (
            r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//'
            r'|<link[^>]+rel="(?:stylesheet|preload|icon)"[^>]+href="(?:https?:)?//'
        )
        pages = list(site.glob("**/*.html"))
        assert len(pages) > 30
        assert [p for p in pages if re.search(loaded, p.read_text())] == []
