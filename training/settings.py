"""How to train: one value that every learner and every fine-tuning shares."""

from __future__ import annotations

from dataclasses import dataclass

from bitquota.errors import InvalidInput

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "steps")
AUGMENTATIONS = ("none", "shift_flip")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training part of the data.
        batch_size: Samples per step, over all processes together.
        learning_rate: Of all ordinary weights.
        quantizer_learning_rate: Of steps, levels and bit-widths.
        weight_decay: Of ordinary weights with more than one dimension.
        quantizer_weight_decay: Of steps, levels and bit-widths; 0 but for ``uhlich2020``.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9.
        schedule: ``cosine`` falls to zero; ``steps`` takes a tenth at half and at three quarters.
        micro_batch: Samples that run at once, or ``None`` for the whole batch. Gradients of a batch
            add up, so that memory is that of so many samples; batch norms see only these.
        distillation: Share of the loss that is the distance to the full-precision model's output;
            the rest is the distance to labels. Without labels it is the whole loss.
        channel_weight: What is added for quantized inputs: so many times the mean relative error of
            a channel, which fits their grids to the majority of channels while training.
        holdout_fraction: Share of the data that selects the best epoch and is not trained on.
        patience: Stop after this many epochs without a better hold-out loss; ``None`` never.
        augmentation: ``none``, or ``shift_flip`` for images (shift by up to an eighth, mirror).
        final_statistics: Re-estimate batch-norm statistics on the training part, augmented as it
            is, before every look at the hold-out, so that what is selected is what ships.
        mixed_precision: Run the steps in bfloat16 where torch deems it safe; parameters and every
            look at the hold-out stay in float32. About twice as fast where the processor has
            bfloat16 products.
        channels_last: Lay out images with channels last: faster convolutions; models that call
            ``view`` on their activations cannot have it.
        compiled: Let ``torch.compile`` translate the step; needs a C++ compiler, and a minute.
        checkpoint_steps: Write a checkpoint after so many steps, and after every epoch.
        seed: Of the order of samples, the split, and augmentation.
    """

    epochs: int = 10
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    quantizer_learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    quantizer_weight_decay: float = 0.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    distillation: float = 0.5
    channel_weight: float = 0.0
    holdout_fraction: float = 0.1
    patience: int | None = None
    augmentation: str = "none"
    final_statistics: bool = True
    mixed_precision: bool = False
    channels_last: bool = False
    compiled: bool = False
    checkpoint_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges and names."""
        if self.epochs < 1 or self.batch_size < 2 or not 0 <= self.distillation <= 1:
            msg = (
                "training needs at least one epoch, batches of at least two samples, and a "
                f"distillation share in 0..1; got {self.epochs}, {self.batch_size}, "
                f"{self.distillation}"
            )
            raise InvalidInput(msg)
        if min(self.learning_rate, self.quantizer_learning_rate) < 0:
            msg = (
                "learning rates must not be negative; got "
                f"{self.learning_rate} and {self.quantizer_learning_rate}"
            )
            raise InvalidInput(msg)
        if self.channel_weight < 0:
            msg = f"the weight of channels must not be negative; got {self.channel_weight}"
            raise InvalidInput(msg, channel_weight=self.channel_weight)
        if not 0 < self.holdout_fraction < 1:
            msg = f"the hold-out must be a share between 0 and 1; got {self.holdout_fraction}"
            raise InvalidInput(msg, holdout_fraction=self.holdout_fraction)
        if self.micro_batch is not None and self.micro_batch < 1:
            msg = f"at least one sample must run at once; got a micro batch of {self.micro_batch}"
            raise InvalidInput(msg, micro_batch=self.micro_batch)
        if self.checkpoint_steps < 1 or (self.patience is not None and self.patience < 1):
            msg = (
                "patience and the steps between checkpoints must be at least 1; got "
                f"{self.patience} and {self.checkpoint_steps}"
            )
            raise InvalidInput(msg)
        for name, value, known in (
            ("an optimizer", self.optimizer, OPTIMIZERS),
            ("a schedule", self.schedule, SCHEDULES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
        ):
            if value not in known:
                allowed = " or ".join(f"'{k}'" for k in known)
                msg = f"{name} must be {allowed}; got '{value}'"
                raise InvalidInput(msg)
