"""The pages in a real browser: first paint, the slider, 2,000 and 5,000 layers, 10,000 jobs.

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
from seeded_jobs import inventory_of, matrix_of, plan_of, repeat_job, seed_job

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PAINT = """
new Promise((resolve) => new PerformanceObserver((list) => {
  for (const e of list.getEntries()) if (e.name === "first-contentful-paint") resolve(e.startTime);
}).observe({ type: "paint", buffered: true }))
"""
DRAWN = """
(() => {
  // Two frames after the element is there, it is on the screen.
  const look = (_, observer) => {
    if (!document.querySelector("SELECTOR")) return;
    observer.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => { window.drawn = performance.now(); }));
  };
  const all = { subtree: true, childList: true, attributes: true };
  new MutationObserver(look).observe(document, all);
})()
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


def visit(browser: object, url: str, ready: str = "#charts[data-ready]") -> tuple[float, float]:
    """Return milliseconds until the first contentful paint and until ``ready`` is on the screen.

    Both are counted by the page's own clock from the start of the navigation: what the driver asks
    the browser between takes .2 to .4 s of a processor, which nobody else has.
    """
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    page = context.new_page()
    page.add_init_script(DRAWN.replace("SELECTOR", ready))
    page.goto(url)
    while (drawn := page.evaluate("window.drawn")) is None:
        page.wait_for_timeout(50)
    paint = page.evaluate(PAINT)
    context.close()
    return float(paint), float(drawn)


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


def compare_visits(
    browser: object, data_dir: Path, path: str, what: str, bar: str, repeat: int,
    ready: str = "#charts[data-ready]",
) -> None:  # fmt: skip
    """Print a row for a page: the first visit after a start, and the median of others."""
    with LiveServer(data_dir, slots=0) as server:
        cold = visit(browser, server.url + path, ready)
        warm = [visit(browser, server.url + path, ready) for _ in range(repeat)]
    paint, drawn = (statistics.median(v[k] for v in warm) for k in range(2))
    print(
        f"| {what} | {cold[0]:,.0f} / {cold[1]:,.0f} ms | {paint:,.0f} / {drawn:,.0f} ms | {bar} |"
    )


def main() -> None:
    """Seed, start, visit, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--moves", type=int, default=30)
    parser.add_argument(
        "--only", choices=("visits", "slider", "list"), help="leave the other parts out"
    )
    parser.add_argument("--small", action="store_true", help="small models, one visit")
    given = parser.parse_args()
    sizes = (12, 8, 30, 40) if given.small else (224, 53, 2000, 5000)
    copies = 200 if given.small else 10_000
    repeat, moves = (1, 3) if given.small else (given.repeat, given.moves)
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        print("needs Debian's chromium: apt-get install chromium")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        data_dir = Path(folder) / "data"
        visited, slid = (sizes[0], *sizes[2:]), sizes[1:3]
        parts = {None: sizes, "slider": slid, "visits": visited, "list": sizes[1:2]}
        jobs = {n: seed(data_dir, n, cross=n not in sizes[2:]) for n in parts[given.only]}
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        if given.only in {None, "visits"}:
            print("| page | cold: first paint / drawn | warm: first paint / drawn | bar |")
            print("| --- | --- | --- | --- |")
            for n in visited:
                bar = "first paint < 1,000 ms" if n == sizes[0] else "drawn < 3,000 ms"
                compare_visits(
                    browser, data_dir, f"/jobs/{jobs[n]}/model", f"{n:,} layers", bar, repeat
                )
        for n in slid if given.only in {None, "slider"} else ():
            with LiveServer(data_dir, slots=0) as server:
                taken = sorted(slide(browser, f"{server.url}/jobs/{jobs[n]}/model", moves))
            p90 = taken[min(len(taken) - 1, int(0.9 * len(taken)))]
            print(
                f"\nslider at {n:,} layers, {moves} moves: median "
                f"{statistics.median(taken):.0f} ms, p90 {p90:.0f} ms, worst {taken[-1]:.0f} ms "
                "(bar: 150 ms)"
            )
        if given.only in {None, "list"}:
            repeat_job(data_dir, jobs[sizes[1]], copies)
            print("\n| page | cold: first paint / rows | warm: first paint / rows | bar |")
            print("| --- | --- | --- | --- |")
            what = f"list of {copies:,} jobs"
            compare_visits(browser, data_dir, "/", what, "rows < 500 ms", repeat, "#rows tr")
        browser.close()


if __name__ == "__main__":
    main()
