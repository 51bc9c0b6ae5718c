"""How to train, as options: what ``finetune`` and ``learn`` have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from bitquota.cli import options as opt
from bitquota.cli.bundles import Bundle, with_bundles
from bitquota.cli.loading import load_samples
from bitquota.errors import InvalidInput
from bitquota.request import parse_losses

if TYPE_CHECKING:
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.settings import TrainingSettings

SETTINGS_OPTIONS: dict[str, tuple[Any, Any]] = {
    "epochs": (
        Annotated[
            int, typer.Option("--epochs", help="Number of passes over the data in each phase.")
        ],
        10,
    ),
    "batch_size": (Annotated[int, typer.Option("--batch-size", help="Samples per step.")], 128),
    "micro_batch": (
        Annotated[
            int | None,
            typer.Option(
                "--micro-batch",
                help="Samples that run at once (default: the batch); fewer take less memory.",
            ),
        ],
        None,
    ),
    "learning_rate": (
        Annotated[
            float | None,
            typer.Option(
                "--rate", help="Learning rate of the weights (default: set by the method)."
            ),
        ],
        None,
    ),
    "quantizer_learning_rate": (
        Annotated[
            float | None,
            typer.Option(
                "--quantizer-rate",
                help="Learning rate of steps, levels, bit-widths (default: set by the method).",
            ),
        ],
        None,
    ),
    "distillation": (
        Annotated[
            float | None,
            typer.Option(
                "--distill",
                help="Share of the loss that follows the full-precision model (0.5; 0 for "
                "uhlich2020; all of it where there are no labels).",
            ),
        ],
        None,
    ),
    "channel_weight": (
        Annotated[
            float,
            typer.Option(
                "--channel-weight",
                help="With quantized inputs: what the mean relative error of their channels counts "
                "for in the loss.",
            ),
        ],
        0.0,
    ),
    "holdout_fraction": (
        Annotated[
            float,
            typer.Option(
                "--holdout", help="Fraction of TRAIN that is held out to select the best epoch."
            ),
        ],
        0.1,
    ),
    "patience": (
        Annotated[
            int | None,
            typer.Option(
                "--patience", help="Stop after this many epochs without a better hold-out loss."
            ),
        ],
        None,
    ),
    "augmentation": (
        Annotated[
            str,
            typer.Option("--augment", help="none, or shift_flip for images that may be mirrored."),
        ],
        "none",
    ),
    "mixed_precision": (
        Annotated[
            bool,
            typer.Option(
                "--mixed-precision",
                help="Train in bfloat16: for GPUs and CPUs with AMX; others are ten times slower.",
            ),
        ],
        False,
    ),
    "channels_last": (
        Annotated[
            bool,
            typer.Option(
                "--channels-last",
                help="Use the channels-last memory layout, which is faster for images.",
            ),
        ],
        False,
    ),
    "compiled": (Annotated[bool, typer.Option("--compile", help="Use torch.compile.")], False),
    "seed": (
        Annotated[int, typer.Option("--seed", help="Seed for samples, order and augmentation.")],
        0,
    ),
}
"""Options that are members of ``TrainingSettings``; without a value, those of the method hold."""

TRAINING_OPTIONS: dict[str, tuple[Any, Any]] = {
    "method": (
        Annotated[
            str,
            typer.Option(
                "--method",
                help="lsq (learned steps), tqt (powers of two), direct (learned levels, a "
                "codebook).",
            ),
        ],
        "lsq",
    ),
    **SETTINGS_OPTIONS,
    "loss": (
        Annotated[
            str | None,
            typer.Option(
                "--loss",
                help="Distance to the full-precision output: a loss of 'bitquota plan', or "
                "'package.module:function' of (output, reference, labels), one number for each "
                "sample (default: the plan's, or what the output is).",
            ),
        ],
        None,
    ),
    "resolve": (
        Annotated[
            int,
            typer.Option(
                "--resolve",
                help="Afterwards measure around the trained weights, solve and train again, so "
                "many times; the best on the hold-out is kept.",
            ),
        ],
        0,
    ),
    "tokenizer": (opt.Tokenizer, None),
    "length": (opt.Length, opt.DEFAULT_LENGTH),
    "device": (opt.Device, "auto"),
    "checkpoints": (
        Annotated[
            Path | None,
            typer.Option(
                "--checkpoints",
                help="Folder from which an interrupted run continues (default: OUT/checkpoints).",
            ),
        ],
        None,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a command trains: what ``finetune`` and ``learn`` have in common.

    Attributes:
        method: How weights are trained under bit-widths.
        loss: A name or a function, or ``None`` for what fits.
        given: Members of ``TrainingSettings`` that hold whatever the method says.
        resolve: How often to solve and train again afterwards.
        tokenizer: For texts.
        length: For texts: tokens per sample.
        device: Where the model runs.
        checkpoints: Folder, or ``None`` for one below the output.
    """

    method: str
    loss: str | None
    given: dict[str, Any]
    resolve: int
    tokenizer: str | None
    length: int
    device: str
    checkpoints: Path | None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """Return what the options of ``TRAINING_OPTIONS`` say."""
        values = dict(options)
        settings = {name: values.pop(name) for name in SETTINGS_OPTIONS}
        return cls(given={k: v for k, v in settings.items() if v is not None}, **values)

    def settings(self, own: TrainingSettings) -> TrainingSettings:
        """Return a method's or recipe's own settings with every option that was given."""
        return replace(own, **self.given)

    def own_loss(self) -> str | Loss | None:
        """Return the loss: a name, or the user's function; ``None`` for what fits."""
        if self.loss is None or ":" not in self.loss:
            if self.loss is not None:
                parse_losses(self.loss)
            return self.loss
        from bitquota.models.factory import find_function
        from bitquota.sensitivity.losses import CustomLoss

        function = find_function(self.loss, InvalidInput)
        return CustomLoss(name=self.loss.partition(":")[2], function=function)

    def load(self, model: str, train: str) -> tuple[LoadedModel, CalibrationSet]:
        """Load a model and its training set; a device that is not there is told before."""
        from bitquota.models.load import load_model
        from bitquota.models.running import choose_device

        choose_device(self.device)
        samples = load_samples(train, model=model, tokenizer=self.tokenizer, length=self.length)
        return load_model(model), samples


with_training = with_bundles(training=Bundle(options=TRAINING_OPTIONS, make=Training.of))
"""Give a command the options that make its ``training``, a ``Training``."""
