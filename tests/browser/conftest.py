"""A real Chromium in front of a real server.

``BITQUOTA_SCREENSHOTS`` names a folder for the screenshots (by default pytest's temporary one).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from live_server import LiveServer
from seeded_jobs import seed_model
from waiting import PATIENCE_S

AXE = Path(__file__).parent / "axe" / "axe.min.js"
# No background traffic; no namespaces of its own inside containers; one renderer draws on the CPU.
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--disable-default-apps", "--no-first-run",
    "--disable-dev-shm-usage",
]  # fmt: skip


# Playwright keeps an event loop running in this thread: no other file may meet it.
@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, or a reason to skip."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (dev extra)")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    """Where screenshots are kept."""
    named = os.environ.get("BITQUOTA_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A server that starts no jobs, over a job of 20 layers: ``(server, job id)``."""
    data_dir = tmp_path_factory.mktemp("seeded") / "data"
    seed_model(data_dir, 12, labels={"name": "twelve layers"})
    job = seed_model(data_dir, 20, labels={"name": "twenty layers"})
    with LiveServer(data_dir, slots=0) as server:
        yield server, job


class Window:
    """One browser window; it must not have complained when it is closed."""

    def __init__(self, browser, **options):
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(1000 * PATIENCE_S)
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, message):
        if message.type in {"error", "warning"}:
            self.complaints.append(message.text)

    def violations(self):
        """Return what axe-core finds serious or critical on the page as it stands."""
        # By the debugger's way, which the content security policy does not concern.
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            (v["id"], v["impact"], [n["html"][:120] for n in v["nodes"][:3]])
            for v in found["violations"]
            if v["impact"] in {"serious", "critical"}
        ]

    def settle(self):
        """Wait until the charts are drawn and the frontier is solved."""
        self.page.wait_for_selector("#charts[data-frontier]")
        self.page.wait_for_selector("input.budget[data-solved]")
        self.page.evaluate("new Promise(requestAnimationFrame)")


@pytest.fixture
def open_window(chromium):
    """Open windows; at the end none may have complained on its console."""
    opened = []

    def make(**options):
        opened.append(Window(chromium, **options))
        return opened[-1]

    yield make
    for window in opened:
        window.context.close()
    assert [window.complaints for window in opened] == [[] for _ in opened]
