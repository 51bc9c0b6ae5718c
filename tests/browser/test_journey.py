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


class Mouse:
    """What a person does with a mouse, and types into fields."""

    def __init__(self, page) -> None:
        self.page = page

    def give(self, files):
        """Drop them on the page."""
        said = [
            {"name": path.name, "data": base64.b64encode(path.read_bytes()).decode()}
            for path in files
        ]
        self.page.evaluate(DROP, [said])

    def press(self, selector):
        self.page.click(selector)

    def write(self, selector, text):
        self.page.fill(selector, text)

    def choose(self, selector, label):
        self.page.select_option(selector, label=label)

    def slide(self):
        box = self.page.locator("input.budget").bounding_box()
        middle = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] * 0.3, middle)
        self.page.mouse.down()
        self.page.mouse.move(box["x"] + box["width"] * 0.7, middle, steps=8)
        self.page.mouse.up()


class Keyboard:
    """The same with Tab, Enter, Space, arrows and letters alone."""

    def __init__(self, page) -> None:
        self.page = page

    def reach(self, selector):
        """Press Tab until the element has the focus."""
        target = self.page.locator(selector).first
        for _ in range(200):
            if target.evaluate("(e) => e === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        pytest.fail(f"Tab does not reach {selector}")

    def give(self, files):
        for role, path in zip(("model", "dataset"), files, strict=True):
            self.reach(f"#{role}")
            self._open(path)

    def _open(self, path):
        """Open the file chooser of the focused field by Enter and take a file.

        On a busy machine headless Chromium now and then opens none for a key that did arrive.
        """
        from playwright.sync_api import TimeoutError as NoChooser

        for _ in range(15):
            try:
                with self.page.expect_file_chooser(timeout=2000) as chooser:
                    self.page.keyboard.press("Enter")
            except NoChooser:
                continue
            chooser.value.set_files(path)
            return
        pytest.fail("Enter opens no file chooser")

    def press(self, selector):
        self.reach(selector)
        ticked = self.page.locator(selector).first.get_attribute("type") == "checkbox"
        self.page.keyboard.press("Space" if ticked else "Enter")

    def write(self, selector, text):
        self.reach(selector)
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)

    def choose(self, selector, label):
        self.reach(selector)
        self.page.keyboard.type(label)

    def slide(self):
        self.reach("input.budget")
        for _ in range(40):
            self.page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("hand", [Mouse, Keyboard])
def test_whole_journey(server, digits_files, open_window, hand):
    """Upload, estimate, two jobs, their comparison, the slider, plans, every export on offer."""
    window = open_window(viewport={"width": 1280, "height": 900})
    page = window.page
    page.add_init_script(WATCH)
    does = hand(page)
    first, second = (f"{hand.__name__} {k}" for k in (1, 2))

    # The files and the estimate; then a job, watched to its end.
    page.goto(server.url)
    does.give(digits_files)
    does.write("#budgets", "3 bits")
    does.choose("#effort", "quick")
    does.write("#name", first)
    does.press("#estimate")
    page.wait_for_selector("#estimated dl", timeout=JOB_MS)
    assert "at 3 bits" in page.inner_text("#estimated")
    does.press("#go")
    page.wait_for_url("**/jobs/job_*")
    page.wait_for_selector("#look:visible", timeout=JOB_MS)
    seen = page.evaluate("window.seen")
    assert any(text.startswith("running") and " of " in text for text in seen), seen
    assert "succeeded" in page.inner_text("#log")

    # A second one of the uploads that are there, for a target.
    page.goto(server.url)
    page.wait_for_selector("#dataset-known option >> nth=1", state="attached")
    for role, path in zip(("model", "dataset"), digits_files, strict=True):
        option = page.locator(f"#{role}-known option", has_text=path.name)
        does.choose(f"#{role}-known", option.inner_text())
    does.write("#budgets", "5 bits")
    does.choose("#target", "openvino-cpu")
    does.choose("#effort", "quick")
    does.write("#name", second)
    does.press("#go")
    page.wait_for_url("**/jobs/job_*")
    page.wait_for_selector("#look:visible", timeout=JOB_MS)

    # Both side by side.
    page.goto(server.url)
    for name in (first, second):
        does.press(f"input[aria-label='Compare {name}']")
    does.press("#compare-go")
    page.wait_for_selector("#overlay[data-ready]", timeout=JOB_MS)
    compared = page.locator("#plans tbody tr")
    assert compared.count() == 2
    assert f"{second}, {first}" in page.get_attribute("#overlay .chart", "aria-label")
    does.press(f"#plans a:has-text('{second}')")
    page.wait_for_url("**/model")

    # The slider solves anew; the plan is the one that was ordered.
    window.settle()
    before, told = page.input_value("input.budget"), page.inner_text(".slider output")
    does.slide()
    after = page.input_value("input.budget")
    assert float(after) > float(before)
    page.wait_for_selector(f"input.budget[data-solved='{after}']")
    assert page.inner_text(".slider output") != told
    with page.expect_download() as download:
        does.press("text=Download plan")
    assert plan_of(download.value).budgets[0].text == "5 bits"

    # Every target on offer is one that can be exported for; formats stand apart, and what cannot
    # hold the plan says why.
    address = page.url
    groups = page.locator("#export-target optgroup")
    assert groups.count() == 2
    offers = groups.nth(0).locator("option:enabled").all_inner_texts()
    assert "openvino-cpu (target)" in offers
    unfit = page.locator("#export-target option:disabled").all_inner_texts()
    assert unfit == page.locator("#refused dt").all_inner_texts()
    for offer in offers:
        page.goto(address)
        does.choose("#export-target", offer)
        assert page.locator("#export-target option:checked").inner_text() == offer
        does.press("#export button")
        page.wait_for_url(lambda url: not url.endswith("/model"))
        page.wait_for_selector("#state:is(.succeeded, .failed)", timeout=JOB_MS)
        assert page.is_hidden("#problem"), page.inner_text("#problem")
        with page.expect_download() as exported:
            does.press("#results a[href$='/archive']")
        with zipfile.ZipFile(exported.value.path()) as archive:
            assert archive.testzip() is None
            assert "receipt.json" in archive.namelist()


def test_every_entry_of_a_map_by_keyboard(seeded, open_window):
    """Arrows lead from entry to entry of a heat map, and each is read out."""
    server, job = seeded
    window = open_window(viewport={"width": 1280, "height": 900})
    page = window.page
    page.goto(f"{server.url}/jobs/{job}/model")
    window.settle()
    Keyboard(page).reach("canvas[aria-label='Sensitivity of every layer to every candidate']")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert " at W3: " in page.inner_text(".heat .readout >> nth=0")


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
