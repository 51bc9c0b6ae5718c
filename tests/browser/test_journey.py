"""From a model file to a downloaded plan, in a real browser, by mouse and by keyboard alone."""

from __future__ import annotations

import base64
import json
import zipfile

import pytest

from bitquota.plan import Plan
from live_server import LiveServer
from waiting import PATIENCE_S

JOB_MS = 1000 * PATIENCE_S

WATCH = """
window.seen = [];
addEventListener("DOMContentLoaded", () => {
  const look = () => {
    const text = ["state", "stage", "pace"].map((id) => document.getElementById(id)?.textContent);
    window.seen.push(text.join(" | "));
  };
  const job = document.getElementById("job");
  if (!job) return;
  look();
  new MutationObserver(look).observe(job, { subtree: true, childList: true, characterData: true });
});
"""
DROP = """
async ([files]) => {
  const list = new DataTransfer();
  for (const { name, data } of files) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    list.items.add(new File([bytes], name));
  }
  const drop = document.getElementById("drop");
  for (const type of ["dragenter", "dragover", "drop"]) {
    const options = { dataTransfer: list, bubbles: true, cancelable: true };
    drop.dispatchEvent(new DragEvent(type, options));
  }
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LiveServer(tmp_path_factory.mktemp("journey") / "data") as running:
        yield running


def plan_of(download) -> Plan:
    with open(download.path()) as file:  # noqa: PTH123  # a path of playwright's
        return Plan.from_json(json.load(file))


class TestJourney:
    def test_by_mouse(self, server, digits_files, open_window):
        """Drop both files, watch the job, move the slider, download the plan."""
        window = open_window(viewport={"width": 1280, "height": 900})
        page = window.page
        page.add_init_script(WATCH)
        page.goto(server.url)
        files = [
            {"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
            for path in digits_files
        ]
        page.evaluate(DROP, [files])
        page.fill("#budgets", "3 bits")
        page.fill("#name", "by mouse")
        page.click("#go")

        page.wait_for_url("**/jobs/job_*")
        page.wait_for_selector("#look:visible", timeout=JOB_MS)
        seen = page.evaluate("window.seen")
        assert page.inner_text("#state") == "succeeded"
        assert any(text.startswith("running") and " of " in text for text in seen), seen
        assert "succeeded" in page.inner_text("#log")
        assert page.locator("#results a").count() >= 3

        page.click("#look")
        window.settle()
        assert page.inner_text(".headline")
        before = page.input_value("input.budget")
        told = page.inner_text(".slider output")
        box = page.locator("input.budget").bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.3, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.7, middle, steps=8)
        page.mouse.up()
        after = page.input_value("input.budget")
        assert float(after) > float(before)
        page.wait_for_selector(f"input.budget[data-solved='{after}']")
        assert page.inner_text(".slider output") != told
        assert float(after) == pytest.approx(
            float(page.inner_text(".slider output").split()[0]), abs=0.5
        )
        with page.expect_download() as download:
            page.click("text=Download plan")
        assert plan_of(download.value).budgets[0].text == "3 bits"

        page.select_option("#export-target", label="ref-int")
        page.click("#export button")
        page.wait_for_url("**/jobs/job_*")
        with page.expect_download(timeout=JOB_MS) as exported:
            page.click("#results a[href$='/archive']", timeout=JOB_MS)
        with zipfile.ZipFile(exported.value.path()) as archive:
            assert archive.testzip() is None
            assert archive.namelist()

    def test_by_keyboard_alone(self, server, digits_files, open_window):
        """Every step with Tab, Enter, Space and arrows; no mouse."""
        window = open_window(viewport={"width": 1280, "height": 900})
        page = window.page
        page.goto(server.url)
        for role, path in zip(("model", "dataset"), digits_files, strict=True):
            self.tab_to(page, f"#{role}")
            self.choose(page, path)
        self.tab_to(page, "#budgets")
        page.keyboard.press("Control+A")
        page.keyboard.type("4 bits")
        self.tab_to(page, "#name")
        page.keyboard.type("by keyboard")
        self.tab_to(page, "#effort")
        page.keyboard.type("quick")
        self.tab_to(page, "#go")
        page.keyboard.press("Enter")

        page.wait_for_url("**/jobs/job_*")
        page.wait_for_selector("#look:visible", timeout=JOB_MS)
        self.tab_to(page, "#look")
        page.keyboard.press("Enter")
        page.wait_for_url("**/model")
        window.settle()

        self.tab_to(page, "input.budget")
        before = page.input_value("input.budget")
        told = page.get_attribute("input.budget", "aria-valuetext")
        for _ in range(40):
            page.keyboard.press("ArrowRight")
        after = page.input_value("input.budget")
        assert float(after) > float(before)
        page.wait_for_selector(f"input.budget[data-solved='{after}']")
        assert page.get_attribute("input.budget", "aria-valuetext") != told

        canvas = "canvas[aria-label='Sensitivity of every layer to every candidate']"
        self.tab_to(page, canvas)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        assert " at W3: " in page.inner_text(".heat .readout >> nth=0")

        page.goto(page.url)
        window.settle()
        self.tab_to(page, "text=Download plan")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        assert plan_of(download.value).budgets[0].text == "4 bits"

    @staticmethod
    def choose(page, path):
        """Open the file chooser of the focused field by Enter and take a file.

        On a busy machine headless Chromium now and then opens none for a key that did arrive.
        """
        from playwright.sync_api import TimeoutError as NoChooser

        for _ in range(15):
            try:
                with page.expect_file_chooser(timeout=2000) as chooser:
                    page.keyboard.press("Enter")
            except NoChooser:
                continue
            chooser.value.set_files(path)
            return
        pytest.fail("Enter opens no file chooser")

    @staticmethod
    def tab_to(page, selector):
        """Press Tab until the element has the focus."""
        target = page.locator(selector).first
        for _ in range(120):
            if target.evaluate("(e) => e === document.activeElement"):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {selector}")


def test_wrong_file_is_explained(server, open_window, tmp_path):
    """What the server refuses is said beside the form."""
    window = open_window()
    wrong = tmp_path / "model.onnx"
    wrong.write_bytes(b"no model at all")
    data = tmp_path / "data.npz"
    data.write_bytes(b"no data either")
    window.page.goto(server.url)
    window.page.set_input_files("#model", wrong)
    window.page.set_input_files("#dataset", data)
    window.page.click("#go")
    window.page.wait_for_selector("#order-problem:visible")
    assert "model" in window.page.inner_text("#order-problem")
    # The browser itself logs refused requests; nothing else may be there.
    assert all("422" in text for text in window.complaints), window.complaints
    window.complaints.clear()


def test_estimate_before_submitting(server, digits_files, open_window, screenshots):
    """The form says what a plan would take, in words; the estimate's own page says the same."""
    window = open_window(viewport={"width": 1280, "height": 900})
    page = window.page
    page.goto(server.url)
    for role, path in zip(("model", "dataset"), digits_files, strict=True):
        page.set_input_files(f"#{role}", path)
    page.fill("#budgets", "3 bits")
    page.fill("#samples", "32")
    page.select_option("#target", "ort-cpu")
    assert page.is_disabled("#widths input >> nth=0")
    assert page.is_hidden("#iterations")
    page.select_option("#rounding", "learned")
    page.fill("#iterations", "20")
    page.fill("#holdout", "48")
    page.check("#corrections input[value=bias_correction]")
    with page.expect_request(
        lambda sent: sent.method == "POST" and sent.url.endswith("/v1/jobs")
    ) as submitted:
        page.click("#estimate")
    asked = submitted.value.post_data_json["request"]["plan"]
    assert (asked["rounding"], asked["iterations"]) == ("learned", 20)
    assert (asked["holdout_samples"], asked["corrections"]) == (48, ["bias_correction"])

    page.wait_for_selector("#estimated dl", timeout=JOB_MS)
    said = page.inner_text("#estimated")
    assert "about" in said
    assert "at 3 bits" in said
    page.click("#estimated summary")
    for width in (1280, 360):
        look_at(window, width, screenshots / f"estimate-{width}.png")
    assert page.is_enabled("#go")

    page.click("#rows a >> nth=0")
    page.wait_for_selector("#estimate dl")
    assert "scoring by weighted output error" in page.text_content("#estimate")
    for width in (1280, 360):
        look_at(window, width, screenshots / f"estimate-job-{width}.png")


def look_at(window, width, screenshot):
    """Nothing sticks out at this width, axe finds nothing, and a picture stays to be looked at."""
    window.page.set_viewport_size({"width": width, "height": 900})
    window.page.screenshot(path=screenshot, full_page=True)
    assert window.page.evaluate("document.documentElement.scrollWidth") <= width
    assert [] == window.violations()
