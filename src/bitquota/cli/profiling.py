"""Costs in: ``profile``.

Design: docs/design/latency.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.candidates.cost_table import ENERGY, CostTable, format_cost
from bitquota.candidates.targets import target_by_name
from bitquota.canonical import canonical_json
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import check_sources, load_samples
from bitquota.cli.written import Written
from bitquota.errors import InvalidInput
from bitquota.exports.names import check_folder

if TYPE_CHECKING:
    from bitquota.models.calibration import CalibrationSet


def profile(
    model: opt.Model,
    calibration: opt.Calibration,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help="Deployment target to time: ort-cpu, openvino-cpu.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Cost table to write.")] = Path(
        "table.json"
    ),
    bits: opt.Bits = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of one run.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=4, help="How often each file runs.")] = 40,
    files: Annotated[
        Path | None,
        typer.Option(
            "--files",
            help="Write the files to time, and a script that times them without bitquota, into "
            "this folder, and stop: for another machine.",
        ),
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option("--times", help="Make the table of such a folder, timed elsewhere."),
    ] = None,
    energy: Annotated[
        bool,
        typer.Option(
            "--energy",
            help="Time nothing: count operations and bytes, at published energies for each.",
        ),
    ] = False,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    seed: opt.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Measure what each layer of MODEL takes at each bit-width, and write a table of costs.

    'bitquota plan --table' then takes budgets of time ('5 ms', '120 tok/s') or energy ('2 mJ').
    Whole models that differ in their bit-widths are timed in the target's runtime, with the first
    samples of CALIBRATION as input. For example:
    bitquota profile net.onnx samples.npz --target ort-cpu, then
    bitquota plan net.onnx samples.npz --target ort-cpu --table table.json --budget '5 ms + 1 MiB'.
    """
    chosen = target_by_name(target)
    if sum([files is not None, times is not None, energy]) > 1:
        msg = "--files, --times and --energy each make something else; give one of them"
        raise InvalidInput(msg)
    check_sources(model, calibration, tokenizer=tokenizer)
    file = Written.at(out, "--out")
    if times is not None:
        from bitquota.exports.profile_fit import Times, fitted_table
        from bitquota.exports.profile_order import TIMES, Order

        made = fitted_table(Order.load(times), Times.load(times / TIMES))
    else:
        samples = load_samples(calibration, model=model, tokenizer=tokenizer, length=length)
        widths = opt.parse_bits(bits)
        if files is not None:
            check_folder(files)
        made_here = _measured(
            model, chosen.name, samples, files,
            widths=widths, batch=batch, threads=threads, rounds=rounds, seed=seed, energy=energy,
        )  # fmt: skip
        if made_here is None:
            output.say(
                f"wrote {files}: copy it to the device, run 'python time_files.py .' there, copy "
                f"times.json back into it, and give the folder to 'bitquota profile --times'"
            )
            return
        made = made_here
    file.save(lambda path: path.write_text(canonical_json(made.to_json()) + "\n"))
    if as_json:
        output.print_json(made.to_json())
        return
    print_table(made)


def _measured(
    model: str,
    target: str,
    samples: CalibrationSet,
    files: Path | None,
    *,
    widths: tuple[int, ...],
    batch: int,
    threads: int,
    rounds: int,
    seed: int,
    energy: bool,
) -> CostTable | None:
    """Return the table of this machine; ``None`` where only files were to be written."""
    from bitquota.exports.energy import energy_table
    from bitquota.exports.profile import profile as measured
    from bitquota.exports.profile_files import require_timed, write_files
    from bitquota.models.load import load_model

    chosen = target_by_name(target)
    if not energy:
        require_timed(chosen)
    loaded = load_model(model)
    if energy:
        return energy_table(loaded, chosen, samples, weight_bits=widths, batch=batch)
    if files is None:
        return measured(
            loaded, chosen, samples,
            weight_bits=widths, batch=batch, threads=threads, rounds=rounds, seed=seed,
        )  # fmt: skip
    files.mkdir(parents=True, exist_ok=True)
    write_files(
        loaded, chosen, samples, files,
        weight_bits=widths, batch=batch, threads=threads, seed=seed,
    )  # fmt: skip
    return None


def print_table(made: CostTable) -> None:
    """Print a table, a row for each layer, and what is known of how well it predicts."""
    labels = list(dict.fromkeys(c.candidate for c in made.layers))
    costs = {(c.layer, c.candidate): c for c in made.layers}
    output.print_rows(
        [
            {"layer": name}
            | {
                label: format_cost(costs[name, label].cost, made.resource)
                if (name, label) in costs
                else ""
                for label in labels
            }
            for name in dict.fromkeys(c.layer for c in made.layers)
        ],
        title="What each layer adds",
    )
    constant = format_cost(made.constant, made.resource)
    what = "operations in floating point, tensors as they are" if made.resource == ENERGY else (
        "and every layer at its cheapest"
    )  # fmt: skip
    where = f" on {made.device}" if made.device else ""
    output.console.print(f"Constant: {constant} ({what}){where}.", markup=False, highlight=False)
    if made.checked:
        worst = max(abs(c.predicted / c.measured - 1) for c in made.checked)
        output.console.print(
            f"{len(made.checked)} random plans that were timed and not fitted: predicted within "
            f"{100 * worst:.1f} %.",
            markup=False,
            highlight=False,
        )
