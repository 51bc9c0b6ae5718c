"""The training loop that fine-tuning and learning share: seeded, resumable, early stopping.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitquota.canonical import digest_json
from bitquota.context import Context, cancelled_during
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.models.image_layout import laid_out
from bitquota.models.running import cut, primary_output, put_in_eval_mode
from bitquota.quantizers.corrections import DEFAULT_BATCH, reestimate_batch_norm
from bitquota.sensitivity.losses import KullbackLeibler, key_of
from bitquota.training.checkpoint import load_checkpoint, save_checkpoint
from bitquota.training.distributed import present_group
from bitquota.training.objective import (
    Objective,
    Pass,
    Scores,
    reduced_precision,
    run_with,
    shift_flip,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.distributed import Group
    from bitquota.training.objective import Trainee
    from bitquota.training.settings import TrainingSettings

STATISTICS_SAMPLES = 1024
"""Training samples that batch-norm statistics are re-estimated on."""

TAUGHT_BYTES = 2**28
"""Full-precision outputs of the hold-out that are kept between epochs; the rest run again."""


@dataclass(slots=True, kw_only=True)
class TrainingRecord:
    """What a run did.

    Attributes:
        epochs: For each epoch: training loss, hold-out loss, accuracy and PSNR, eligibility.
        best_epoch: The epoch whose state was kept; -1 for the state before, or for the last of all
            where none was eligible.
        start_loss: Hold-out loss before the first step, where that state may be kept.
        steps: Optimizer steps.
        full_precision: Accuracy and PSNR of the full-precision model on the hold-out.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    start_loss: float | None = None
    steps: int = 0
    full_precision: dict[str, float | None] = field(default_factory=dict)


def train(
    trainee: nn.Module,
    teacher: nn.Module,
    data: CalibrationSet,
    settings: TrainingSettings,
    *,
    identity: object = None,
    checkpoint: Path | None = None,
    stage: str = "training",
    keep_last: bool = False,
    from_start: bool = False,
    loss: Loss | None = None,
    context: Context | None = None,
) -> TrainingRecord:
    """Train ``trainee`` in place and leave it in its best eligible state.

    The order of samples and every random number follow from the seed, the epoch and the step, so
    a run that continues from a checkpoint ends with the same bits as an undisturbed one. If no
    state was ever eligible, the last one is left.

    Args:
        trainee: A ``Trainee`` that is a module; everything it trains is in its state dictionary.
        teacher: The full-precision model.
        data: Samples; without labels, the full-precision output is all that is followed.
        settings: How to train.
        identity: JSON that names model and plan; part of what a checkpoint must agree with.
        checkpoint: File for resuming; continued from if it exists.
        stage: Name in progress reports.
        keep_last: Leave the last state, whatever the hold-out says.
        from_start: Leave the state before the first step where no later one is better.
        loss: Distance to the full-precision output, by default the divergence (``Objective``).
        context: Whom to tell, and when to stop.

    Raises:
        InvalidCalibration: Labels are needed and missing, or fit no output.
        InvalidInput: The checkpoint is of another run, the step cannot be compiled, or labels are
            images and would have to be augmented.
        MeasurementFailed: The loss is not finite.
        Cancelled: The context said so.

    Cost: about three forward passes a sample and epoch, one more with distillation. Under
    ``torch.distributed`` every process takes its share of each batch.
    """
    context = context or Context()
    objective = Objective(loss=loss or KullbackLeibler(), distillation=settings.distillation)
    objective.check_labels(data.labels)
    run = _Run(trainee, teacher, data, settings, present_group(), objective)
    digest = run.digest(identity)
    optimizer = optimizer_of(run.subject.parameter_groups(settings), settings)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    record, best, best_loss = TrainingRecord(), None, math.inf
    total = settings.epochs * run.steps_per_epoch

    # Go on where a checkpoint ends.
    start, running = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        progress, restored = load_checkpoint(checkpoint, trainee, optimizer, digest)
        start, running = progress["step"], progress["running"]
        record = TrainingRecord(**progress["record"])
        best, best_loss = restored or None, progress["best_loss"]
        if best_loss is None:
            best_loss = math.inf

    def save(step: int) -> None:
        if checkpoint is not None and run.group.is_first:
            progress = {
                "settings": digest,
                "step": step,
                "running": running,
                "record": asdict(record),
                "best_loss": None if math.isinf(best_loss) else best_loss,
            }
            save_checkpoint(checkpoint, trainee, optimizer, progress, best=best)
        run.group.wait()

    # The state before the first step is measured as those after it are, and trained from as it was.
    if from_start and start == 0:
        before = {k: v.detach().clone() for k, v in trainee.state_dict().items()}
        entry = run.look()
        if entry["eligible"]:
            best_loss = record.start_loss = entry["holdout_loss"]
            best = {k: v.detach().clone() for k, v in trainee.state_dict().items()}
        trainee.load_state_dict(before)

    # Step by step; after each epoch the hold-out part decides what is kept.
    for step in range(start, total):
        if run.agreed(context):
            save(step)
            raise cancelled_during(stage)
        epoch, within = divmod(step, run.steps_per_epoch)
        if _stopped(record, settings):
            break
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * rate_factor(settings.schedule, step / total)
        running += run.step(optimizer, step, epoch, within, total)
        record.steps = step + 1
        if within == run.steps_per_epoch - 1:
            entry = run.look()
            record.epochs.append({"training_loss": running / run.steps_per_epoch, **entry})
            running = 0.0
            if not keep_last and entry["eligible"] and entry["holdout_loss"] < best_loss:
                best_loss, record.best_epoch = entry["holdout_loss"], epoch
                best = {k: v.detach().clone() for k, v in trainee.state_dict().items()}
            save(step + 1)
        elif (step + 1) % settings.checkpoint_steps == 0:
            save(step + 1)
        context.report(stage, step + 1, total)
    record.full_precision = run.full_precision()
    if best is not None:
        trainee.load_state_dict(best)
    run.subject.model.eval()
    return record


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        trainee: nn.Module,
        teacher: nn.Module,
        data: CalibrationSet,
        settings: TrainingSettings,
        group: Group,
        objective: Objective,
    ) -> None:
        moved = data.labels is not None and data.labels.ndim > 2 and settings.distillation < 1
        if moved and settings.augmentation != "none":
            msg = (
                "augmentation moves inputs but not labels, so labels must not be images; these "
                "are: train without augmentation, or with distillation 1"
            )
            raise InvalidInput(msg, augmentation=settings.augmentation)
        self.subject: Trainee = trainee  # type: ignore[assignment]
        self.teacher = _resting(teacher, data.inputs[0].device)
        self.data, self.settings, self.group = data, settings, group
        self.objective = objective
        # What is trained at several bit-widths at once says so (``nested``).
        self.modes: tuple[str, ...] = getattr(trainee, "modes", ("",))
        # Weights whose gradients shall be small, and what these count for (``robust``).
        self.gradient_weight: float = getattr(trainee, "gradient_weight", 0.0)
        self.fit, self.holdout = data.split(settings.holdout_fraction, settings.seed)
        self.steps_per_epoch = max(1, len(self.fit) // settings.batch_size)
        self.device_type = data.inputs[0].device.type
        trainee.to(data.inputs[0].device)
        forward = Pass(
            trainee, mixed_precision=settings.mixed_precision, device_type=self.device_type
        )
        if settings.compiled:
            forward.compile()
        self.forward = group.wrap(forward)
        self._known: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def digest(self, identity: object) -> str:
        """Return what a checkpoint must agree with."""
        named = {
            "settings": asdict(self.settings),
            "data": self.data.to_json(),
            "identity": identity,
            "loss": key_of(self.objective.loss),
        }
        # Several processes add their gradients up in another order.
        return digest_json(named | ({"size": self.group.size} if self.group.size > 1 else {}))

    def agreed(self, context: Context) -> bool:
        """Return whether any process was asked to stop."""
        asked = context.cancelled is not None and context.cancelled()
        if self.group.size == 1:
            return asked
        where = self.data.inputs[0].device
        return float(self.group.mean(torch.tensor(float(asked), device=where))) > 0

    def _augmented(self, inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
        if self.settings.augmentation == "none":
            return inputs
        generator = torch.Generator().manual_seed(seed)
        return shift_flip(inputs[0], generator), *inputs[1:]

    def step(
        self, optimizer: torch.optim.Optimizer, step: int, epoch: int, within: int, total: int
    ) -> float:
        """Take one optimizer step; return the loss without the penalty."""
        settings = self.settings
        batch = self.fit.take(_rows(len(self.fit), epoch, within, settings))
        seen = self._augmented(batch.inputs, settings.seed * 1_000_003 + step)
        inputs = tuple(self._laid_out(self.group.share(x)) for x in seen)
        labels = None if batch.labels is None else self.group.share(batch.labels)
        self.subject.model.train()
        optimizer.zero_grad(set_to_none=True)
        shown = torch.zeros((), device=inputs[0].device)
        # Dropout draws from the global generator: give every step its own numbers, and put it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                (settings.seed * 1_000_003 + step) * self.group.size + self.group.rank
            )
            parts = cut(len(inputs[0]), settings.micro_batch or len(inputs[0]))
            for mode, rows in itertools.product(self.modes, parts):
                self._select(mode)
                part = tuple(x[rows.start : rows.stop] for x in inputs)
                own = None if labels is None else labels[rows.start : rows.stop]
                share = len(rows) / len(inputs[0]) / len(self.modes)
                shown += share * self._backward(step / total, part, own, share)
        loss = float(self.group.mean(shown))
        if not math.isfinite(loss):
            msg = (
                f"the training loss must stay finite; it is not at step {step}: lower the learning "
                "rate, or check the data"
            )
            raise MeasurementFailed(msg, step=step)
        self.subject.before_step()
        optimizer.step()
        self.subject.after_step()
        return loss

    def _backward(
        self, progress: float, inputs: tuple[Tensor, ...], labels: Tensor | None, share: float
    ) -> Tensor:
        """Add the gradients of some samples, ``share`` of a batch; return their loss."""
        reference = None
        if self.objective.needs_reference(labels):
            wanted = self.settings.mixed_precision
            with torch.no_grad(), reduced_precision(self.device_type, wanted=wanted):
                reference = primary_output(self.teacher(*inputs)).float()
        output, penalty = self._output(progress, inputs)
        loss = self.objective(output, reference, labels)
        if self.gradient_weight:
            watched = self.subject.watched()  # type: ignore[attr-defined]
            norms = torch.autograd.grad(loss, watched, create_graph=True, materialize_grads=True)
            penalty = penalty + self.gradient_weight * sum(g.abs().sum() for g in norms)
        (share * (loss + penalty)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _laid_out(self, values: Tensor) -> Tensor:
        return laid_out(values) if self.settings.channels_last else values

    def _output(self, progress: float, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if not self.settings.compiled:
            output, penalty = self.forward(progress, *inputs)
            return output, penalty
        from torch._dynamo.exc import TorchDynamoException

        try:
            # A number would be compiled into the step, anew for each; a tensor is not.
            output, penalty = self.forward(torch.tensor(progress), *inputs)
        except (TorchDynamoException, OSError) as err:
            msg = (
                "a compiled step needs a model that torch.compile can translate, and a C++ "
                f"compiler; it failed with {type(err).__name__}: {str(err).splitlines()[0]}; "
                "train without compiling"
            )
            raise InvalidInput(msg) from err
        return output, penalty

    def _select(self, mode: str) -> None:
        if mode:
            self.subject.select(mode)  # type: ignore[attr-defined]

    def look(self) -> dict[str, Any]:
        """Measure the hold-out, in each mode of a model that has several; means over these."""
        entries = {}
        for mode in self.modes:
            self._select(mode)
            entries[mode] = self._look()
        found = dict(entries[self.modes[-1]])
        for key in ("holdout_loss", "holdout_accuracy", "holdout_psnr"):
            if found[key] is not None:
                found[key] = sum(entry[key] for entry in entries.values()) / len(entries)
        return found | ({"modes": entries} if len(entries) > 1 else {})

    def _look(self) -> dict[str, Any]:
        """Measure the hold-out in full precision arithmetic, batch norms re-estimated first."""
        self.subject.model.eval()
        with torch.no_grad():
            if self.settings.final_statistics:
                parts = self.fit.first(STATISTICS_SAMPLES).batches(DEFAULT_BATCH)
                # Of what was trained on: plain images have other statistics, and cost accuracy.
                seen = [self._augmented(b.inputs, self.settings.seed) for b in parts]
                reestimate_batch_norm(_Bound(self.subject), seen)
            losses, counted = 0.0, 0
            scores = Scores(self.objective.loss)
            for k, batch in enumerate(self.holdout.batches(self.settings.micro_batch or 256)):
                inputs = tuple(self._laid_out(x) for x in batch.inputs)
                output = run_with(self.subject, inputs).float()
                loss = self.objective(output, self._taught(k, batch), batch.labels)
                losses += len(batch) * float(loss)
                scores.add(output, batch.labels)
                counted += len(batch)
        return {
            "holdout_loss": losses / counted,
            "holdout_accuracy": scores.accuracy(),
            "holdout_psnr": scores.psnr(),
            "eligible": bool(self.subject.is_eligible()),
        }

    def _taught(self, k: int, batch: CalibrationSet) -> Tensor:
        """Return the full-precision output of batch ``k`` of the hold-out, kept if it is small."""
        if k in self._known:
            return self._known[k]
        output = primary_output(self.teacher(*batch.inputs))
        self._kept_bytes += output.nbytes
        if self._kept_bytes <= TAUGHT_BYTES:
            self._known[k] = output
        return output

    def full_precision(self) -> dict[str, float | None]:
        """Return what the full-precision model reaches on the hold-out."""
        scores = Scores(self.objective.loss)
        with torch.no_grad():
            for k, batch in enumerate(self.holdout.batches(self.settings.micro_batch or 256)):
                scores.add(self._taught(k, batch), batch.labels)
        return {"holdout_accuracy": scores.accuracy(), "holdout_psnr": scores.psnr()}


class _Bound(torch.nn.Module):
    """A trainee as a plain model, for the correction of batch norms."""

    def __init__(self, subject: Trainee) -> None:
        super().__init__()
        self.inner, self.subject = subject.model, subject

    def forward(self, *inputs: Tensor) -> Tensor:
        return run_with(self.subject, inputs)


def _resting(teacher: nn.Module, device: torch.device) -> nn.Module:
    """Return ``teacher`` on the device in eval mode: itself if it is so, or a copy."""
    tensors = (*teacher.parameters(), *teacher.buffers())
    training = any(module.training for module in teacher.modules())
    if not training and all(t.device == device for t in tensors):
        return teacher
    return put_in_eval_mode(copy.deepcopy(teacher)).to(device)


def optimizer_of(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def rate_factor(schedule: str, progress: float) -> float:
    """Return the share of the learning rate at ``progress`` (0 to 1) of a run."""
    if schedule == "steps":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 0.5 * (1 + math.cos(math.pi * progress))


def _rows(n: int, epoch: int, within: int, settings: TrainingSettings) -> list[int]:
    generator = torch.Generator().manual_seed(settings.seed * 7_919 + epoch)
    order = torch.randperm(n, generator=generator)
    size = min(settings.batch_size, n)
    rows: list[int] = order[within * size : (within + 1) * size].tolist()
    return rows


def _stopped(record: TrainingRecord, settings: TrainingSettings) -> bool:
    none_eligible = record.best_epoch < 0 and record.start_loss is None
    if settings.patience is None or none_eligible:
        return False
    return len(record.epochs) - 1 - record.best_epoch >= settings.patience
