"""Commands that train: ``learn`` finds bit-widths by gradient, ``finetune`` trains under a plan."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.candidates.budget import check_budgets
from bitquota.candidates.cost_table import CostTable
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import check_sources
from bitquota.cli.training_options import Training, with_training
from bitquota.cli.written import Written, former_plan, require_folder
from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.plan import Plan, weights_near
from bitquota.report import text as report
from bitquota.request import (
    ACTIVATION_FITS,
    AUTO_LOSS,
    DEFAULT_WEIGHT_BITS,
    ROBUST,
    check_training,
)
from bitquota.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import MeasuredLoss
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.loop import TrainingRecord
    from bitquota.training.qat import Trained

_BITS = ",".join(map(str, DEFAULT_WEIGHT_BITS))

_TRAIN = (
    "Training set, read like CALIBRATION, with labels or without; part of it is held out. Never "
    "test data."
)
Train = Annotated[str, typer.Argument(help=_TRAIN)]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", help="Folder for plan.json, trained.safetensors and trained.pt2."),
]


@with_training
def finetune(
    model: opt.Model,
    plan: Annotated[
        Path,
        typer.Argument(
            help="Plan written by 'bitquota plan' for MODEL; with --robust left out, TRAIN in its "
            "place."
        ),
    ],
    train: Annotated[str | None, typer.Argument(help=_TRAIN, show_default=False)] = None,
    *,
    symmetric: Annotated[
        bool,
        typer.Option("--symmetric", help="With direct: keep the levels symmetric around zero."),
    ] = False,
    input_fit: Annotated[
        str | None,
        typer.Option(
            "--input-fit",
            help="With quantized inputs: fit first grids by joint, chan or irls (each tensor's "
            "own error).",
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="Train one set of nested codes for these bit-widths of all layers, such as "
            "2,3,4,8, and for PLAN if it has no others. With --robust dropbits: bits to draw from.",
        ),
    ] = None,
    robust: Annotated[
        str | None,
        typer.Option(
            "--robust",
            help="Without PLAN: train MODEL in full precision so that a plan for it loses less, by "
            "gradient (small gradients) or dropbits (bit-widths drawn at random).",
        ),
    ] = None,
    gradient_weight: Annotated[
        float | None,
        typer.Option(
            "--gradient-weight",
            help="With --robust gradient: what the l1 norm of the gradient counts for (0.05).",
        ),
    ] = None,
    training: Training,
    out: Out = Path("trained"),
) -> None:
    """Train MODEL under PLAN on TRAIN and write the trained weights and their plan.

    Started with torchrun, every process takes its share of each batch. With --robust there is no
    plan yet, and OUT gets robust.pt2 for 'bitquota plan'.
    """
    if robust is not None:
        _check_robust(robust, training, symmetric=symmetric, input_fit=input_fit, train=train)
        _make_robust(model, str(plan), robust, widths, gradient_weight, training, out)
        return
    if train is None or gradient_weight is not None:
        msg = (
            "fine-tuning needs MODEL, PLAN and TRAIN, and only --robust, which has no PLAN, takes "
            "--gradient-weight"
        )
        raise InvalidInput(msg)
    rules = ACTIVATION_FITS[1:]
    if input_fit is not None and input_fit not in rules:
        msg = f"--input-fit must be one of {', '.join(rules)}; got '{input_fit}'"
        raise InvalidInput(msg, input_fit=input_fit)
    check_training(method=training.method)
    nested = _nested_widths(widths, training, symmetric=symmetric, input_fit=input_fit)
    settings, loss = training.settings(TrainingSettings()), training.own_loss()
    made = Plan.load(plan)
    file = _plan_file(out, plan)
    check_sources(model, train, tokenizer=training.tokenizer)
    from bitquota.quantizers.channel_fit import ChannelRule
    from bitquota.training.qat import finetune_plan

    loaded, samples = training.load(model, train)
    loaded = replace(loaded, weights=weights_near([plan]))
    folder = training.checkpoints or out / "checkpoints"
    with _run(folder, training.device) as (context, is_first):
        if nested:
            _finetune_nested(
                loaded, made, samples, nested, settings, loss, file, folder, context,
                writes=is_first,
            )  # fmt: skip
            return
        found = finetune_plan(
            loaded,
            made,
            samples,
            settings,
            method=training.method,
            symmetric=symmetric,
            input_rule=None if input_fit is None else ChannelRule(input_fit),
            loss=loss,
            checkpoint=folder / "finetune.safetensors",
            context=context,
        )
        found = _resolved(loaded, found, samples, training, settings, folder, context)
        if is_first:
            _finish(found, samples, file)


@with_training
def learn(
    model: opt.Model,
    train: Train,
    *,
    budgets: opt.Budgets = None,
    bits: opt.Bits = _BITS,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="stabilised, ellipsoid (size by construction), bitpruning, bsq (bit planes), msq "
            "(last bits), djpq (channels too), uhlich2020 (as published), uhlich2020_p3 (its "
            "powers of two).",
        ),
    ] = "stabilised",
    from_plan: Annotated[
        Path | None, typer.Option("--from-plan", help="Start from a solved plan's bit-widths.")
    ] = None,
    activation_bits: Annotated[
        str | None,
        typer.Option(
            "--activation-bits",
            help="Permitted bit-widths of inputs (2,3,4,5,6,8 with a budget 'act …', else none).",
        ),
    ] = None,
    tie: opt.Tie = None,
    exclude: opt.Exclude = None,
    outputs: opt.Outputs = None,
    tables: opt.Tables = None,
    granularity: opt.GranularityName = Granularity.CHANNEL,
    group_size: opt.GroupSize = None,
    scale_format: opt.ScaleFormatName = ScaleFormat.FP32,
    training: Training,
    out: Out = Path("learned"),
) -> None:
    """Learn the bit-widths of MODEL on TRAIN within budgets, and fine-tune under them.

    Two phases of EPOCHS each: bit-widths and weights together, then weights under the bit-widths
    found, which keep every budget exactly. Budgets hold together: on weights ('2.5 bits'), on bit
    operations, time or energy ('5 ms' with --table), and inputs ('act 8 KiB' for the largest,
    'act total 92 KiB').
    """
    if not budgets:
        msg = "learning needs a budget, such as --budget '2.5 bits'; got none"
        raise InvalidInput(msg)
    costs = tuple(CostTable.load(path) for path in tables or ())
    check_budgets(budgets, costs)
    check_training(method=training.method, recipe=recipe)
    loss = training.own_loss()
    start = None if from_plan is None else Plan.load(from_plan)
    file = _plan_file(out, from_plan)
    check_sources(model, train, tokenizer=training.tokenizer)
    from bitquota.training.learn import default_settings, following_settings
    from bitquota.training.qat import learn_plan

    settings = training.settings(default_settings(recipe))
    loaded, samples = training.load(model, train)
    folder = training.checkpoints or out / "checkpoints"
    with _run(folder, training.device) as (context, is_first):
        found = learn_plan(
            loaded,
            samples,
            budgets,
            opt.parse_bits(bits),
            scheme=Scheme(
                grid=Grid.SYMMETRIC,
                granularity=granularity,
                group_size=group_size,
                scale_format=scale_format,
            ),
            recipe=recipe,
            method=training.method,
            activation_bits=() if activation_bits is None else opt.parse_bits(activation_bits),
            start=start,
            ties=opt.parse_ties(tie),
            exclude=exclude or [],
            loss=loss or AUTO_LOSS,
            outputs=outputs or [],
            tables=costs,
            settings=settings,
            checkpoint_folder=folder,
            context=context,
        )
        following = following_settings(settings)
        found = _resolved(loaded, found, samples, training, following, folder, context)
        if is_first:
            _finish(found, samples, file)


def _nested_widths(
    widths: str | None, training: Training, *, symmetric: bool, input_fit: str | None
) -> tuple[int, ...]:
    """Return the widths of nested codes, which no other way of training can be combined with."""
    if widths is None:
        return ()
    if training.method != "lsq" or symmetric or input_fit is not None or training.resolve:
        msg = (
            "--widths trains nested codes with learned steps: leave out --method, --symmetric, "
            "--input-fit and --resolve, or --widths"
        )
        raise InvalidInput(msg)
    return opt.parse_bits(widths)


def _check_robust(
    robust: str, training: Training, *, symmetric: bool, input_fit: str | None, train: str | None
) -> None:
    """Refuse what belongs to a plan."""
    if robust not in ROBUST:
        msg = f"--robust must be one of {', '.join(ROBUST)}; got '{robust}'"
        raise InvalidInput(msg, robust=robust)
    if train is not None:
        msg = (
            "--robust trains before there is a plan: give MODEL and TRAIN, and plan for the "
            f"robust.pt2 that it writes; got '{train}' besides"
        )
        raise InvalidInput(msg, train=train)
    if training.method != "lsq" or symmetric or input_fit is not None or training.resolve:
        msg = (
            "--robust trains in full precision: leave out --method, --symmetric, --input-fit and "
            "--resolve"
        )
        raise InvalidInput(msg)


def _make_robust(
    model: str,
    train: str,
    way: str,
    widths: str | None,
    gradient_weight: float | None,
    training: Training,
    out: Path,
) -> None:
    """Train before there is a plan; write the model, and show what uniform bit-widths gain."""
    require_folder(out, "--out")
    file = Written.at(out / "robust.pt2", "--out", former=lambda _: "an earlier model")
    settings, loss = training.settings(TrainingSettings()), training.own_loss()
    check_sources(model, train, tokenizer=training.tokenizer)
    from bitquota.training.qat import write_module
    from bitquota.training.robust import GRADIENT_WEIGHT, make_robust

    loaded, samples = training.load(model, train)
    folder = training.checkpoints or out / "checkpoints"
    with _run(folder, training.device) as (context, is_first):
        found = make_robust(
            loaded,
            samples,
            settings,
            way=way,
            weight_bits=DEFAULT_WEIGHT_BITS if widths is None else opt.parse_bits(widths),
            gradient_weight=GRADIENT_WEIGHT if gradient_weight is None else gradient_weight,
            loss=loss,
            checkpoint=folder / "robust.safetensors",
            context=context,
        )
        if not is_first:
            return
    file.save(lambda path: write_module(found.module, samples, path))
    rows = [("full precision", "", found.full_precision)]
    for bits, (before, after) in found.uniform.items():
        rows += [(f"uniform {bits} bits", "before", before), ("", "after", after)]
    output.print_rows(
        [
            {"weights": name, "training": when} | _measured_columns(measured)
            for name, when, measured in rows
        ],
        title=f"Distance to the model before, on {found.full_precision.n_samples} held-out samples",
    )


def _finetune_nested(
    loaded: LoadedModel,
    plan: Plan,
    samples: CalibrationSet,
    widths: tuple[int, ...],
    settings: TrainingSettings,
    loss: str | Loss | None,
    file: Written,
    folder: Path,
    context: Context,
    *,
    writes: bool,
) -> None:
    """Train nested codes; write them as one file, and a folder with plan and model for each."""
    from bitquota.training.nested_plans import PLANNED, finetune_nested

    found = finetune_nested(
        loaded, plan, samples, widths, settings,
        loss=loss, checkpoint=folder / "nested.safetensors", context=context,
    )  # fmt: skip
    if not writes:
        return
    out = file.path.parent
    for name, trained in found.trained.items():
        if name != PLANNED:
            written, _ = _with_pt2(trained, samples, out / name)
            written.save(out / name)
    shown = found.trained.get(PLANNED) or next(iter(found.trained.values()))
    _finish(shown, samples, file)
    found.save(out / "nested.safetensors")
    measured = [(name, t.plan, t.plan.measured) for name, t in found.trained.items()]
    output.print_rows(
        [
            {"plan": name, "bits/weight": f"{made.average_bits:.2f}"} | _measured_columns(increase)
            for name, made, increase in measured
            if increase is not None
        ],
        title=f"Plans of one payload of {report.format_size(found.payload_bits)}",
    )
    output.say(f"wrote {out / 'nested.safetensors'}, and a folder for each width beside it")


def _measured_columns(measured: MeasuredLoss) -> dict[str, str]:
    return {
        "loss increase": report.format_loss(measured),
        "top-1": "" if measured.accuracy is None else f"{100 * measured.accuracy:.2f} %",
    }


def _plan_file(out: Path, source: Path | None) -> Written:
    """Return the plan that will be written into ``out``; never the one that is trained under."""
    path = out / "plan.json"
    if source is not None and path.resolve() == source.resolve():
        msg = f"--out must be another folder than that of the plan to train under, '{source}'"
        raise InvalidInput(msg, path=str(out))
    require_folder(out, "--out")
    return Written.at(path, "--out", former=former_plan)


@contextmanager
def _run(checkpoints: Path, device: str) -> Iterator[tuple[Context, bool]]:
    """Join the group of processes, if there is one; only the first shows progress."""
    from bitquota.training.distributed import joined_group

    with joined_group() as group:
        if not group.is_first:
            yield Context(device=device), False
            return
        with output.shown_progress() as on_progress:
            try:
                yield Context(device=device, on_progress=on_progress), True
            except KeyboardInterrupt:
                if any(checkpoints.glob("*.safetensors")):
                    output.say(f"the same command goes on from the last epoch in {checkpoints}")
                raise


def _resolved(
    model: LoadedModel,
    found: Trained,
    data: CalibrationSet,
    training: Training,
    settings: TrainingSettings,
    folder: Path,
    context: Context,
) -> Trained:
    from bitquota.training.qat import solve_around

    loss = training.own_loss()
    for k in range(training.resolve):
        again = solve_around(
            model,
            found,
            data,
            settings,
            method=training.method,
            loss=None if isinstance(loss, str) else loss,
            checkpoint=folder / f"resolve-{k + 1}.safetensors",
            context=context,
        )
        if again is found:
            break
        found = again
    return found


def _with_pt2(found: Trained, data: CalibrationSet, out: Path) -> tuple[Trained, list[str]]:
    """Write ``trained.pt2``; return what names it, and the files that there are then."""
    from bitquota.training.qat import write_pt2

    # The .pt2 is a courtesy: what cannot be exported is still complete without it.
    try:
        out.mkdir(parents=True, exist_ok=True)
        return write_pt2(found, data, out / "trained.pt2"), ["trained.safetensors", "trained.pt2"]
    except Exception as err:  # noqa: BLE001  # torch.export raises what it likes
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        output.messages.print(f"no trained.pt2: {reason}", highlight=False, markup=False)
    return found, ["trained.safetensors"]


def _finish(found: Trained, data: CalibrationSet, file: Written) -> None:
    out = file.path.parent
    found, written = _with_pt2(found, data, out)
    file.save(lambda path: found.save(path.parent))
    if found.learning is not None:
        output.print_rows(
            _epoch_rows(found.learning), title="Learning bit-widths (* kept, else the last)"
        )
    output.print_rows(_epoch_rows(found.model.record), title="Fine-tuning (* kept)")
    output.print_rows(
        [{k: v for k, v in row.items() if k != "kind"} for row in report.layer_rows(found.plan)],
        title="Plan of the trained weights",
    )
    plan = found.plan
    rows = [(b.name, b.size_bits, b.measured) for b in plan.baselines]
    assert plan.measured is not None  # noqa: S101  # training measures
    rows.append(("trained", plan.size_bits, plan.measured))
    output.print_rows(
        [
            {"choice": name, "size": report.format_size(size)} | _measured_columns(measured)
            for name, size, measured in rows
        ],
        title=f"On {plan.measured.n_samples} held-out samples",
    )
    output.say(f"wrote {', '.join(str(out / name) for name in written)}")


def _epoch_rows(record: TrainingRecord) -> list[dict[str, str]]:
    """Return a row for each epoch, below one of the full-precision model."""
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "holdout_accuracy": ("hold-out top-1", lambda v: f"{100 * v:.2f} %"),
        "holdout_psnr": ("hold-out PSNR", lambda v: f"{v:.2f} dB"),
    }
    entries: list[tuple[str, Mapping[str, float | None]]] = [
        (f"{k + 1}{' *' if k == record.best_epoch else ''}", epoch)
        for k, epoch in enumerate(record.epochs)
    ]
    if record.start_loss is not None:
        kept = " *" if record.best_epoch < 0 else ""
        entries.insert(0, (f"before{kept}", {"holdout_loss": record.start_loss}))
    if any(v is not None for v in record.full_precision.values()):
        entries.insert(0, ("full precision", record.full_precision))
    columns = [key for key in shown if any(e.get(key) is not None for _, e in entries)]
    rows = []
    for name, entry in entries:
        row = {"epoch": name}
        for key, title in (("training_loss", "training loss"), ("holdout_loss", "hold-out loss")):
            row[title] = "" if (value := entry.get(key)) is None else f"{value:.4f}"
        for key in columns:
            title, text = shown[key]
            row[title] = "" if (value := entry.get(key)) is None else text(value)
        rows.append(row)
    return rows
