"""The pages in a real browser: first paint, the slider, and a model of 5,000 layers.

``python benchmarks/pages.py``; ``--small`` only shows that it runs. Loopback, headless Chromium on
the CPU, sensitivities made up, plans by our solver. Each figure is the median of ``--repeat``
visits by a fresh browser profile to a server that has seen the job (``warm``), and the first visit
after a start of the server (``cold``).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from playwright.sync_api import sync_playwright

from live_server import LiveServer
from seeded_jobs import inventory_of, matrix_of, plan_of, seed_job

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PAINT = """
new Promise((resolve) => new PerformanceObserver((list) => {
  for (const e of list.getEntries()) if (e.name === "first-contentful-paint") resolve(e.startTime);
}).observe({ type: "paint", buffered: true }))
"""
SLIDE = """
([value]) => new Promise((resolve) => {
  const input = document.querySelector("input.budget");
  const began = performance.now();
  input.value = value;
  const wanted = input.value;
  delete input.dataset.solved;
  new MutationObserver((_, observer) => {
    if (input.dataset.solved !== wanted) return;
    observer.disconnect();
    // Two frames on, what was drawn is on the screen.
    requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - began)));
  }).observe(input, { attributes: true });
  input.dispatchEvent(new Event("input", { bubbles: true }));
})
"""


def seed(data_dir: Path, n_layers: int, *, cross: bool) -> str:
    """Put a finished job into the data folder; plans come from the diagonal, which is quick."""
    inventory = inventory_of(n_layers)
    alone = matrix_of(inventory, cross=False)
    plans = tuple(plan_of(inventory, alone, budget) for budget in ("3 bits", "4 bits"))
    matrix = matrix_of(inventory) if cross else alone
    return seed_job(data_dir, matrix, plans, inventory, name=f"{n_layers} layers")


def visit(browser: object, url: str) -> tuple[float, float]:
    """Return milliseconds until the first contentful paint and until the charts are drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    page = context.new_page()
    began = time.perf_counter()
    page.goto(url)
    page.wait_for_selector("#charts[data-ready]", timeout=60_000)
    page.evaluate("new Promise((d) => requestAnimationFrame(() => requestAnimationFrame(d)))")
    drawn = 1000 * (time.perf_counter() - began)
    paint = page.evaluate(PAINT)
    context.close()
    return float(paint), drawn


def slide(browser: object, url: str, moves: int) -> list[float]:
    """Return milliseconds from each move of the slider until its plan is on the screen."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#charts[data-frontier]", timeout=120_000)
    page.wait_for_selector("input.budget[data-solved]")
    taken = []
    for k in range(moves):
        # Somewhere else each time: what was solved before would be no measurement.
        value = round(2.3 + 5.0 * ((k * 0.618) % 1.0), 2)
        taken.append(float(page.evaluate(SLIDE, [value])))
        time.sleep(0.05)
    context.close()
    return taken


def main() -> None:
    """Seed, start, visit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument("--only", choices=("visits", "slider"), help="leave the other part out")
    parser.add_argument("--small", action="store_true", help="small models, one visit")
    given = parser.parse_args()
    sizes = (12, 8, 40) if given.small else (224, 53, 5000)
    repeat, moves = (1, 3) if given.small else (given.repeat, given.moves)
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        print("needs Debian's chromium: apt-get install chromium")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        data_dir = Path(folder) / "data"
        parts = {None: sizes, "slider": sizes[1:2], "visits": sizes[::2]}
        jobs = {n: seed(data_dir, n, cross=n != sizes[2]) for n in parts[given.only]}
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        bars = {sizes[0]: "first paint < 1,000 ms", sizes[2]: "drawn < 3,000 ms"}
        if given.only != "slider":
            print("| page | cold: first paint / drawn | warm: first paint / drawn | bar |")
            print("| --- | --- | --- | --- |")
        for n, bar in bars.items() if given.only != "slider" else ():
            with LiveServer(data_dir, slots=0) as server:
                url = f"{server.url}/jobs/{jobs[n]}/model"
                cold = visit(browser, url)
                warm = [visit(browser, url) for _ in range(repeat)]
                middle = [statistics.median(v[k] for v in warm) for k in range(2)]
                print(
                    f"| {n:,} layers | {cold[0]:,.0f} / {cold[1]:,.0f} ms "
                    f"| {middle[0]:,.0f} / {middle[1]:,.0f} ms | {bar} |"
                )
        if given.only != "visits":
            with LiveServer(data_dir, slots=0) as server:
                taken = sorted(slide(browser, f"{server.url}/jobs/{jobs[sizes[1]]}/model", moves))
            p90 = taken[min(len(taken) - 1, int(0.9 * len(taken)))]
            print(
                f"\nslider at {sizes[1]} layers, {moves} moves: median "
                f"{statistics.median(taken):.0f} ms, p90 {p90:.0f} ms, worst {taken[-1]:.0f} ms "
                "(bar: 150 ms)"
            )
        browser.close()


if __name__ == "__main__":
    main()
