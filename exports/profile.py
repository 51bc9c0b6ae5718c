"""A table of what a model takes, layer by layer, measured in a target's runtime on this machine.

Design: docs/design/latency.md
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.exports.profile_files import write_files
from bitquota.exports.profile_fit import fitted_table
from bitquota.exports.time_files import ROUNDS
from bitquota.exports.timed import time_here

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.candidates.cost_table import CostTable
    from bitquota.candidates.targets import Target
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel


def profile(
    model: LoadedModel,
    target: Target,
    samples: CalibrationSet,
    *,
    weight_bits: Sequence[int] = (),
    batch: int = 1,
    threads: int = 1,
    rounds: int = ROUNDS,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda _done, _total: None,
) -> CostTable:
    """Time plans of ``model`` here and return the costs that explain their times.

    Args:
        model: Of which.
        target: Whose formats and runtime.
        samples: The first ``batch`` of them are run.
        weight_bits: Bit-widths to time; all of the target's if empty.
        batch: Samples of one run.
        threads: For the runtime.
        rounds: How often each file is timed.
        seed: Of the plans that are timed.
        tell: Called with the number of written files and of all.

    Raises:
        InvalidInput: The target has no runtime to time, or there are too few samples.
        ExportFailed: A file cannot be written, or the runtime does not run it.

    Cost: that of ``write_files``, and five runs of each file for each round.
    """
    with tempfile.TemporaryDirectory(prefix="bitquota-profile-") as place:
        folder = Path(place)
        order = write_files(
            model, target, samples, folder,
            weight_bits=weight_bits, batch=batch, threads=threads, seed=seed, tell=tell,
        )  # fmt: skip
        return fitted_table(order, time_here(folder, rounds))
