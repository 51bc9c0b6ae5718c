"""What people see: nothing inaccessible, three widths, light and dark, foreign text as text."""

from __future__ import annotations

import time
from contextlib import contextmanager

import httpx
import pytest

from bitquota.errors import MeasurementFailed
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.security.keys import KeyStore
from bitquota.service.store.database import Database
from bitquota.service.worker.supervisor import COMPILING
from live_server import LiveServer
from seeded_jobs import inventory_of, matrix_of, plan_of, repeat_job, seed_job, seed_model
from waiting import wait_for

WIDTHS = (360, 1280, 2560)
HOSTILE = "<img src=x onerror=window.hurt=1><script>window.hurt=1</script>\"'{{7*7}}"


def pages(server, job):
    with httpx.Client(base_url=server.url) as http:
        listed = http.get("/v1/jobs", params={"kind": "plan", "status": "succeeded"}).json()["data"]
    compared = "&".join(f"job={one['id']}" for one in listed[:2])
    return {
        "jobs": "/", "job": f"/jobs/{job}", "model": f"/jobs/{job}/model",
        "compare": f"/compare?{compared}", "plans": "/plans",
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
class TestEveryPage:
    def test_axe_and_screenshots(self, seeded, open_window, screenshots, scheme):
        """axe-core finds nothing serious, nothing is wider than the window; looks are kept."""
        server, job = seeded
        window = open_window(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        for name, path in pages(server, job).items():
            window.page.set_viewport_size({"width": 1280, "height": 900})
            window.page.goto(server.url + path)
            if name == "model":
                window.settle()
                window.page.wait_for_selector("[data-graph]")
                for details in window.page.locator("summary").all():
                    details.click()
            elif name == "compare":
                window.page.wait_for_selector("#overlay[data-ready]")
            elif name == "plans":
                window.page.wait_for_selector("#plans[data-ready]")
            for width in WIDTHS:
                window.page.set_viewport_size({"width": width, "height": 900})
                window.page.evaluate(
                    "new Promise((d) => requestAnimationFrame(() => requestAnimationFrame(d)))"
                )
                wide = window.page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, name
                assert window.violations() == [], (name, width)
                window.page.screenshot(
                    path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True
                )


@pytest.mark.parametrize("keyboard", [False, True], ids=["mouse", "keyboard"])
def test_two_jobs_are_compared(seeded, open_window, keyboard):
    """Two ticks in the list lead to a table of all their plans, which can be filtered."""
    server, _ = seeded
    window = open_window()
    page = window.page
    page.goto(server.url)
    assert page.is_disabled("#compare-go")
    for name in ("twenty layers", "twelve layers"):
        tick = page.get_by_role("checkbox", name=f"Compare {name}")
        if keyboard:
            tick.focus()
            page.keyboard.press("Space")
        else:
            tick.click()
    if keyboard:
        page.locator("#compare-go").focus()
        page.keyboard.press("Enter")
    else:
        page.click("#compare-go")
    page.wait_for_selector("#overlay[data-ready]")
    assert page.is_hidden("#compare-problem")
    assert "twenty layers, twelve layers" in page.get_attribute("#overlay .chart", "aria-label")
    rows = page.locator("#plans tbody tr")
    assert rows.count() == 4
    page.fill("#plans input", "twelve")
    page.wait_for_function("document.querySelectorAll('#plans tbody tr').length === 2")
    assert all("twelve layers" in text and "bits" in text for text in rows.all_inner_texts())


def test_older_jobs_are_loaded(open_window, tmp_path):
    """The newest come with the page and its stream, all others when they are asked for."""
    data_dir = tmp_path / "data"
    repeat_job(data_dir, seed_model(data_dir, 6), 180)
    rows = "[...document.getElementById('rows').children]"
    with LiveServer(data_dir, slots=0) as server:
        window = open_window()
        page = window.page
        page.goto(server.url)
        for count in (50, 150, 180):
            wait_for(lambda n=count: page.evaluate(f"{rows}.length") == n, f"{count} rows")
            assert page.is_visible("#older") == (count < 180)
            if count < 180:
                page.click("#older")
        shown = page.evaluate(f"{rows}.map((row) => row.dataset.job)")
        assert shown == sorted(set(shown), reverse=True)
        assert window.complaints == []
        window.context.close()  # a page that listens complains when its server ends


def test_branches_of_the_model_are_drawn(seeded, open_window):
    """As its file says; a branch has a lane of its own until the last layer that reads it."""
    server, job = seeded
    page = open_window(viewport={"width": 1280, "height": 900}).page
    with httpx.Client(base_url=server.url) as http:
        found = http.get(f"/jobs/{job}/graph.json").json()
    assert found["edges"] is None
    chain = [[k, k + 1] for k in range(3, len(found["order"]) - 1)]
    found["edges"] = [[0, 1], [0, 2], [1, 3], [2, 3], *chain]
    page.route("**/graph.json", lambda route: route.fulfill(json=found))
    page.goto(f"{server.url}/jobs/{job}/model")
    page.wait_for_selector("[data-graph]")
    told = page.get_attribute(".graph canvas", "aria-label")
    assert told.startswith(f"{len(found['order'])} layers in order, 1 of which are read by several")
    lanes = "[...Bitquota.arranged(5, [[0, 1], [0, 2], [1, 3], [2, 3], [3, 4]]).lanes]"
    assert page.evaluate(lanes) == [0, 1, 0, 0, 0]
    colours = page.evaluate("""() => {
      const canvas = document.querySelector(".graph canvas");
      const { width, height } = canvas;
      const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
      return new Set(new Uint32Array(data.buffer)).size;
    }""")
    assert colours > 5


def test_plans_of_all_jobs_are_filtered(seeded, open_window):
    """By what a plan is of and for, and by any word."""
    server, _ = seeded
    page = open_window().page
    page.goto(server.url)
    page.click("nav >> text=Plans")
    page.wait_for_selector("#plans[data-ready]")
    rows = page.locator("#plans tbody tr")
    assert rows.count() == 4
    assert page.is_hidden("#plans-more")
    budgets = page.get_by_label("Budget")
    budgets.select_option("3 bits")
    assert "2 of 4 plans of 2 jobs" in page.inner_text("#plans-said")
    page.fill("#plans input", "twelve")
    page.wait_for_function("document.querySelectorAll('#plans tbody tr').length === 1")
    assert "twelve layers" in rows.first.inner_text()
    budgets.select_option("all")
    assert rows.count() == 4


def test_cancel_shows_at_once(seeded, open_window):
    """Before the server has answered; if it cannot, the page says so and the button works again."""
    server, job = seeded
    with httpx.Client(base_url=server.url) as http:
        done = http.get(f"/v1/jobs/{job}").json()
        order = {"model": done["model"], "dataset": done["dataset"]}
        request = {"budgets": ["3 bits"], "target": "ref-int", "corrections": ["smoothing"]}
        body = {"kind": "plan", "request": request, **order}
        waiting = http.post("/v1/jobs", json=body).json()["id"]
        window = open_window()
        page = window.page
        page.goto(f"{server.url}/jobs/{waiting}")
        facts = page.inner_text("[aria-labelledby=order-title] dl")
        assert all(word in facts for word in ("ref-int", "smoothing", "512", "normal"))
        held = []
        page.route("**/cancel", lambda route: held.append(route))  # noqa: PLW0108  # no builtin
        page.click("#cancel")
        assert ("stopping", True) == (page.inner_text("#state"), page.is_disabled("#cancel"))
        assert window.violations() == []
        wait_for(lambda: page.evaluate("1") and held, "the request")
        held[0].abort()
        page.wait_for_selector("#problem:visible")
        assert ("queued", True) == (page.inner_text("#state"), page.is_enabled("#cancel"))
        page.unroute("**/cancel")
        page.click("#cancel")
        page.wait_for_selector("#state.cancelled")
        window.complaints.clear()  # the browser logs the request that failed


def test_waiting_job_says_what_for(seeded, open_window):
    """Kernels that are compiled once hold the first job of a machine up."""
    server, job = seeded
    with httpx.Client(base_url=server.url) as http, open_store(server.data_dir) as store:
        done = http.get(f"/v1/jobs/{job}").json()
        order = {"model": done["model"], "dataset": done["dataset"]}
        body = {"kind": "plan", "request": {"budgets": ["3 bits"]}, **order}
        waiting = http.post("/v1/jobs", json=body).json()["id"]
        page = open_window().page
        page.goto(f"{server.url}/jobs/{waiting}")
        assert page.inner_text("#pace") == "waits for its turn"
        store.tell_queued(COMPILING)
        page.wait_for_selector("#pace:has-text('compiling kernels')")
        page.wait_for_selector("#log li:has-text('compiling kernels')")
        store.tell_queued(None)
        page.wait_for_selector("#pace:has-text('waits for its turn')")
        http.post(f"/v1/jobs/{waiting}/cancel")
        page.wait_for_selector("#state.cancelled")


@contextmanager
def open_store(data_dir):
    """The jobs of a server's data folder, as a supervisor of another host sees them."""
    database = Database(f"sqlite:///{data_dir / 'bitquota.db'}")
    yield JobStore(database, time.time)
    database.close()


def test_sign_in_page(seeded, open_window, screenshots, tmp_path_factory):
    """A server with keys asks for one; the session then works, and ends."""
    with LiveServer(tmp_path_factory.mktemp("keys") / "data", slots=0) as server:
        database = Database(f"sqlite:///{server.data_dir / 'bitquota.db'}")
        _, key = KeyStore(database, time.time).create("acme")
        database.close()
        window = open_window()
        page = window.page

        def is_asked_for_one():  # the server looks every few seconds whether there are keys
            page.goto(server.url)
            return "/sign-in" in page.url

        wait_for(is_asked_for_one, "the page to sign in")
        assert window.violations() == []
        page.screenshot(path=screenshots / "sign-in.png")
        page.fill("#key", "bq_wrong")
        page.click("main button")
        assert "not a valid API key" in page.inner_text("[role=alert]")
        window.complaints.clear()  # the browser logs the 401
        page.fill("#key", key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#order")
        assert page.inner_text(".who span") == "acme"
        cookies = {c["name"]: c for c in window.context.cookies()}
        assert cookies["bitquota_session"]["httpOnly"]
        assert cookies["bitquota_session"]["sameSite"] == "Lax"
        page.click("text=Sign out")
        page.wait_for_url("**/sign-in*")
        page.goto(server.url)
        assert "/sign-in" in page.url


def test_late_answer_counts_for_what_was_asked(seeded, open_window):
    """The slider moves on while its answer is under way: the answer is for the place before."""
    server, job = seeded
    window = open_window()
    page = window.page
    page.goto(f"{server.url}/jobs/{job}/model")
    window.settle()
    solved = page.evaluate(
        """
        ([asked, on]) => new Promise((resolve) => {
          const input = document.querySelector("input.budget");
          const before = document.querySelector(".slider output").textContent;
          new MutationObserver((_, observer) => {
            const text = document.querySelector(".slider output").textContent;
            if (text === before) return;
            observer.disconnect();
            resolve([input.dataset.solved, Number(text.match(/[0-9.]+/)[0])]);
          }).observe(input, { attributes: true });
          input.value = asked;
          input.dispatchEvent(new Event("input", { bubbles: true }));
          input.value = on;
        })
        """,
        ["3.5", "6"],
    )
    assert solved == ["3.5", pytest.approx(3.5, abs=0.25)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A server whose jobs have hostile names in every place that a stranger can write."""
    data_dir = tmp_path_factory.mktemp("hostile") / "data"
    inventory = inventory_of(6, prefix=HOSTILE)
    matrix = matrix_of(inventory)
    plans = (plan_of(inventory, matrix, "3 bits"),)
    labels = {"name": HOSTILE, HOSTILE: HOSTILE}
    good = seed_job(data_dir, matrix, plans, inventory, name=HOSTILE, labels=labels)
    bad = seed_job(
        data_dir, matrix, (), inventory, name=HOSTILE, labels=labels,
        failure=MeasurementFailed(f"the model raised ValueError: {HOSTILE}"),
    )  # fmt: skip
    with LiveServer(data_dir, slots=0) as server:
        yield server, good, bad


class TestForeignText:
    def test_is_shown_as_text(self, hostile, open_window):
        """Model name, layer names, labels and the log, on every page, and nothing runs."""
        server, good, bad = hostile
        window = open_window(viewport={"width": 1280, "height": 900})
        page = window.page
        for path in ("/", f"/jobs/{good}", f"/jobs/{bad}"):
            page.goto(server.url + path)
            page.wait_for_load_state()
            assert HOSTILE in page.inner_text("main"), path
        assert f"failed: the model raised ValueError: {HOSTILE}" in page.inner_text("#log")

        page.goto(f"{server.url}/jobs/{good}/model")
        window.settle()
        for details in page.locator("summary").all():
            details.click()
        assert HOSTILE in page.inner_text("h1")
        assert f"{HOSTILE}.0.attn.q" in page.inner_text(".dense tbody")
        page.locator("canvas").first.hover()
        for place in page.locator(".chart").all():
            place.hover()
        page.locator(".heat canvas").first.hover()
        assert HOSTILE in page.inner_text(".heat .readout >> nth=0")
        assert page.evaluate("window.hurt") is None
        assert page.locator("main img, main script:not([type])").count() == 0


def test_policy_forbids_what_is_inline(seeded, open_window):
    """Even if markup got in, the browser would not run it."""
    server, job = seeded
    window = open_window()
    window.page.goto(f"{server.url}/jobs/{job}")
    window.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'window.hurt = 1'}))"
    )
    assert window.page.evaluate("window.hurt") is None
    assert any("Content Security Policy" in text for text in window.complaints)
    window.complaints.clear()
