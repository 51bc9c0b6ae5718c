"""Take the pictures of ``docs/tour.md``: the pages of a real server over real plans, in Chromium.

    python docs/pictures/make_tour.py

trains the network of ``examples/digits.py``, submits it to a server on loopback, and writes the
PNG files beside this one; about three minutes of one core. Needs Debian's chromium.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

from examples.digits import calibration, model  # noqa: E402

from bitquota.request import PlanRequest  # noqa: E402
from live_server import LiveServer  # noqa: E402

WIDTH, COLOURS, PATIENCE_MS = 1100, 48, 600_000
SECTIONS = {"frontier": 0, "graph": 2, "sensitivity": 3}
"""Places of the parts of a model page that are shown."""

SHARED = {"samples": 128, "holdout_samples": 128}


def main() -> None:
    """Plan twice, visit each page, and keep what a reader should see of it."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        files = write_files(Path(folder))
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
        page.set_default_timeout(PATIENCE_MS)
        with LiveServer(Path(folder) / "data") as server, server.client() as client:
            page.goto(server.url)
            order(page, files)
            keep(page, "tour-form", "#order")
            runtime = wait_for_plans(page)
            any_runtime = client.submit(
                model=files[0], calibration=files[1], labels={"name": "any runtime, no target"},
                request=PlanRequest(budgets=("2.5 bits", "3 bits"), effort="quick", **SHARED),
            )  # fmt: skip
            any_runtime.wait()

            look(page, f"{server.url}/jobs/{runtime}/model")
            keep(page, "tour-plans", ".cards >> nth=0")
            for name, place in SECTIONS.items():
                keep(page, f"tour-{name}", f"#charts > * >> nth={place}")
            page.goto(f"{server.url}/compare?job={runtime}&job={any_runtime.id}")
            page.wait_for_selector("#overlay[data-ready]")
            keep(page, "tour-compare", "main")
        browser.close()


def write_files(folder: Path) -> tuple[Path, Path]:
    """Export the network, and its samples, as an uploader has them."""
    images, labels = calibration()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model().eval(), (images[:2],), dynamic_shapes=(batch,))
    torch.export.save(program, folder / "digits.pt2")
    np.savez(folder / "calibration.npz", x=images.numpy(), y=labels.numpy())
    return folder / "digits.pt2", folder / "calibration.npz"


def order(page: Page, files: tuple[Path, Path]) -> None:
    """Fill in the form, and ask what a plan would take."""
    page.set_input_files("#model", files[0])
    page.set_input_files("#dataset", files[1])
    page.fill("#budgets", "3 bits, 4 bits")
    page.select_option("#target", "ort-cpu")
    page.fill("#name", "digits for ONNX Runtime")
    for name, count in (("samples", "samples"), ("holdout", "holdout_samples")):
        page.fill(f"#{name}", str(SHARED[count]))
    page.click("#estimate")
    page.wait_for_selector("#estimated dl")


def wait_for_plans(page: Page) -> str:
    """Submit the form, keep a picture of the job at work, and return the job when it is done."""
    page.click("#go")
    page.wait_for_url("**/jobs/job_*")
    while page.evaluate("document.getElementById('progress').value") < 0.3:
        page.wait_for_timeout(100)
    keep(page, "tour-job", "#job")
    page.wait_for_selector("#look:visible")
    return page.url.rpartition("/")[2]


def look(page: Page, url: str) -> None:
    """Open a model page and wait until everything is drawn and solved."""
    page.goto(url)
    page.wait_for_selector("#charts[data-frontier]")
    page.wait_for_selector("input.budget[data-solved]")
    page.wait_for_selector("[data-graph]")


def keep(page: Page, name: str, selector: str) -> None:
    """Write what an element looks like, in few colours: a picture of some 30 kB."""
    taken = page.locator(selector).first.screenshot(animations="disabled")
    picture = Image.open(io.BytesIO(taken)).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
