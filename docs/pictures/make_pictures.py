"""Draw the pictures of the documentation from measurements of ResNet-20 on CIFAR-10.

    python docs/pictures/make_pictures.py

reads the network of ``BITQUOTA_DATA`` (or ``../shared/data``), takes some minutes of one core, and
writes the SVG files beside this one. The measurements are kept in ``--ledger`` and reused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from bitquota.context import Context  # noqa: E402
from bitquota.evaluate.choice import measure_choice  # noqa: E402
from bitquota.models.load import load_model  # noqa: E402
from bitquota.models.loaded import inventory_of  # noqa: E402
from bitquota.models.samples import load_calibration  # noqa: E402
from bitquota.request import PlanRequest  # noqa: E402
from bitquota.search.allocate import allocate, measure_matrix  # noqa: E402  # benchmarks first
from bitquota.sensitivity.cache import SqliteLedger  # noqa: E402
from bitquota.sensitivity.losses import loss_by_name  # noqa: E402

mpl.use("svg")
from matplotlib import pyplot as plt  # noqa: E402

if TYPE_CHECKING:
    from bitquota.matrix import SensitivityMatrix
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

BITS = (2, 3, 4, 5, 6, 8)
MODEL, DATA = "resnet_cifar:resnet20", "resnet_cifar:calibration"
BLUE, ORANGE, GREEN, GREY = "#1f6feb", "#d9730d", "#2da44e", "#8b949e"


def main() -> None:
    """Measure, and write every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", type=Path, default=HERE / "pictures.ledger.sqlite")
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    # Reproducible files: no date, no random identifiers, text as text.
    plt.rcParams |= {"svg.hashsalt": "bitquota", "svg.fonttype": "none", "font.size": 11}
    model, data = load_model(MODEL), load_calibration(DATA)
    with SqliteLedger(arguments.ledger) as ledger:
        request = PlanRequest(weight_bits=BITS, samples=arguments.samples, holdout_samples=1)
        matrix = measure_matrix(model, data, request, context=Context(ledger=ledger))
        layers(matrix)
        pairs(matrix)
        trust(model, data.first(arguments.samples), matrix)
        asked = PlanRequest(
            weight_bits=BITS,
            budgets=("2.25 bits", "2.5 bits", "3 bits", "4 bits"),
            samples=arguments.samples,
            holdout_samples=512,
        )
        frontier(
            [
                (p.average_bits, p)
                for p in allocate(model, data, asked, context=Context(ledger=ledger)).plans
            ]
        )


def save(name: str) -> None:
    """Write the current figure as ``name.svg``."""
    plt.tight_layout()
    plt.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close()


def layers(matrix: SensitivityMatrix) -> None:
    """Draw the loss increase of each layer alone at each bit-width."""
    names = list(dict.fromkeys(row.group for row in matrix.table.rows))
    grid = matrix.diagonal.reshape(len(names), len(BITS))
    _, axis = plt.subplots(figsize=(8, 6.2))
    image = axis.imshow(np.log10(np.maximum(grid, 1e-6)), aspect="auto", cmap="YlOrRd")
    axis.set_xticks(range(len(BITS)), [f"{b} bit" for b in BITS])
    axis.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(grid):
        shade = "white" if np.log10(max(value, 1e-6)) > -2.3 else "black"
        axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=8, color=shade)
    plt.colorbar(image, label="loss increase, log10 nats")
    axis.set_title("One layer quantized, the rest in full precision")
    save("layers-differ")


def pairs(matrix: SensitivityMatrix) -> None:
    """Draw how much pairs of layers at 2 bits lose together beyond the sum of both alone."""
    assert matrix.cross is not None
    width = len(BITS)
    at = np.arange(len(matrix.table.rows) // width) * width
    alone = np.sqrt(np.outer(matrix.diagonal[at], matrix.diagonal[at]))
    together = matrix.cross[np.ix_(at, at)] / (2 * alone)
    names = [matrix.table.rows[k].group for k in at]
    _, axis = plt.subplots(figsize=(8, 6.6))
    image = axis.imshow(together, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    plt.colorbar(image, label="cross term / (2 √(alone · alone))")
    axis.set_title("Pairs of layers at 2 bits: errors add up (red) or cancel (blue)")
    save("errors-interact")


def trust(model: LoadedModel, samples: CalibrationSet, matrix: SensitivityMatrix) -> None:
    """Draw predicted against measured loss of random plans at several average bit-widths."""
    inventory = inventory_of(model.module, model, samples)
    loss = loss_by_name("kl")
    rng = np.random.default_rng(0)
    _, axis = plt.subplots(figsize=(7, 5.4))
    for choices, colour in (((2, 3), ORANGE), ((3, 4), BLUE), ((4, 5, 6), GREEN)):
        found = []
        for _ in range(12):
            choice = [BITS.index(int(b)) for b in rng.choice(choices, len(inventory.layers))]
            picked = [
                matrix.table.rows[k * len(BITS) + row].candidates[0] for k, row in enumerate(choice)
            ]
            predicted = matrix.predict(choice)
            measured = measure_choice(model.module, inventory, picked, samples, loss).measured.mean
            found.append((predicted, measured))
        predicted, measured = np.array(found).T
        label = "layers at " + " or ".join(map(str, choices)) + " bits"
        axis.loglog(predicted, measured, "o", color=colour, label=label)
    low, high = axis.get_xlim()[0], axis.get_ylim()[1]
    axis.plot([low, high], [low, high], color=GREY, linewidth=1, label="predicted = measured")
    axis.set(xlabel="predicted around full precision, nats", ylabel="measured, nats")
    axis.legend()
    axis.set_title("Good enough at many bits, far off at few")
    save("predicted-measured")


def frontier(plans: list) -> None:
    """Draw loss on the hold-out against average bits: our plans and their baselines."""
    _, axis = plt.subplots(figsize=(7.6, 5))
    styles = (("uniform", GREY, "s"), ("weight MSE", ORANGE, "^"), ("diagonal", GREEN, "v"))
    for prefix, colour, mark in styles:
        points = sorted({
            (average, baseline.measured.mean)
            for average, plan in plans
            for baseline in plan.baselines
            if baseline.name.startswith(prefix)
            and (prefix != "uniform" or abs(float(baseline.weight_bits[0]) - average) < 0.1)
        })  # fmt: skip
        if points:
            axis.semilogy(*zip(*points, strict=True), mark, color=colour, label=prefix)
    points = sorted((average, plan.measured.mean) for average, plan in plans)
    axis.semilogy(*zip(*points, strict=True), "o-", color=BLUE, label="Bitquota, refined")
    axis.set(xlabel="average bits per weight", ylabel="loss increase on the hold-out, nats")
    axis.legend()
    axis.set_title("ResNet-20 on CIFAR-10, images that no plan was chosen on")
    save("frontier")


if __name__ == "__main__":
    main()
