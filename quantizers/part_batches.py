"""The batches that a part of a stack runs on, and what is seen of it on the way.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.models.calls import LayerWatcher, tensor_key
from bitquota.models.running import inputs_of, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bitquota.candidates.layers import Layer
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.kept import Series
    from bitquota.models.processes import Processes
    from bitquota.models.stack import Part, Stack


def spans_of(size: int, folds: Sequence[range]) -> list[range]:
    """Return the batches in which samples run: at most ``size`` each, none across two folds."""
    return [
        range(a, min(a + size, fold.stop))
        for fold in folds
        for a in range(fold.start, fold.stop, size)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizes:
    """How many samples run at once.

    Attributes:
        block: Through a block.
        end: Through the last part, whose output may be a row for each token of a vocabulary.
    """

    block: int
    end: int


def batch_sizes(
    stack: Stack, layers: Mapping[str, Layer], samples: CalibrationSet, limit_bytes: int
) -> BatchSizes:
    """Return how many samples may run at once within a limit, at least one.

    Input and output of each layer of a block are counted three times: as such, as what is made of
    them on the way, and as gradients; outputs of the model in float32 and in float64 beside.
    """
    positions = math.prod(samples.inputs[0].shape[1:])
    wide = max(
        sum(layers[name].rows + layers[name].columns for name in part)
        for part in stack.layers[1:-1]
    )
    block = limit_bytes // (12 * positions * max(1, wide))
    end = limit_bytes // (24 * math.prod(stack.output_shape))
    end = max(1, min(64, block, end))
    # A batch of a block is cut into whole batches of the end.
    return BatchSizes(block=max(1, min(64, block) // end) * end, end=end)


def pieces(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut a batch into smaller ones of at most ``size`` samples."""
    for a in range(0, len(values[0]), size):
        yield tuple(value[a : a + size] for value in values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batches(Sequence[tuple[Tensor, ...]]):
    """What a part is called with, batch after batch, none of which is kept.

    Attributes:
        spans: Samples of each batch.
        samples: Where the inputs of the model come from.
        given: What stands before them, batch after batch.
        size: Samples of a smaller batch, where batches are cut into such.
    """

    spans: Sequence[range]
    samples: CalibrationSet
    given: tuple[Series, ...] = ()
    size: int | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._places())

    def __getitem__(self, k: Any) -> Any:  # noqa: ANN401  # one batch for one number
        """Return a batch."""
        b, start = self._places()[k]
        span = self.spans[b]
        values = (*(series[b] for series in self.given), *inputs_of(self.samples, span))
        if self.size is None:
            return values
        return tuple(value[start : start + self.size] for value in values)

    def _places(self) -> list[tuple[int, int]]:
        size = self.size
        return [
            (b, start)
            for b, span in enumerate(self.spans)
            for start in range(0, len(span), len(span) if size is None else size)
        ]


class Remembering(nn.Module):
    """A part that keeps what it returns for the first ``count`` batches.

    Args:
        part: The part.
        outputs: Where that is kept, if anywhere.
        count: The number of batches.
        side: Where batches begin with what the part is given in full precision and with what it is
            given in the quantized model: which of the two it reads.
    """

    def __init__(
        self, part: Part, outputs: Series | None, count: int, side: int | None = None
    ) -> None:
        super().__init__()
        self.part, self._outputs, self._count, self._side = part, outputs, count, side
        self.takes_padding = part.takes_padding
        self.mask_at = part.mask_at + (0 if side is None else 1)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name in the model."""
        return self.part.get_submodule(target)

    def forward(self, *values: Tensor) -> Tensor:
        """Run the part."""
        output = self.run(*values)
        self.remember(output)
        return output

    def run(self, *values: Tensor) -> Tensor:
        """Run the part, and remember nothing."""
        own = values if self._side is None else (values[self._side], *values[2:])
        output: Tensor = self.part(*own)
        return output

    def remember(self, output: Tensor) -> None:
        """Keep what the part returned."""
        if self.remembers:
            assert self._outputs is not None  # noqa: S101  # looked at
            self._outputs.append(output)

    @property
    def remembers(self) -> bool:
        """Whether the next output is kept."""
        return self._outputs is not None and len(self._outputs) < self._count


def run_through(run: Remembering, batches: Batches, processes: Processes) -> None:
    """Run a part on all batches for what it remembers."""
    with torch.no_grad():
        for found in processes.map(lambda b: {"output": run.run(*batches[b])}, len(batches)):
            run.remember(found["output"])


class Lookups(LayerWatcher[str]):
    """Counts how often each row of embeddings is looked up.

    Args:
        part: The part that looks up.
        layers: Embeddings by name.
        counts: Takes f64[rows] by name.
    """

    def __init__(self, part: Part, layers: Mapping[str, Layer], counts: dict[str, Tensor]) -> None:
        super().__init__(
            {tensor_key(tensor_of(part, layer.weight_name)): name for name, layer in layers.items()}
        )
        self._counts = counts
        self.samples = 1

    def elsewhere(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Count the rows of a known embedding."""
        if operator == "embedding":
            ids, weight = (args + tuple(kwargs.values()))[:2]
            name = self.known.get(tensor_key(weight))
            if name is not None:
                count = torch.bincount(ids.reshape(-1), minlength=len(weight)).double()
                # Positions are looked up once for all samples of a batch.
                count *= self.samples if len(ids) == 1 else 1
                self._counts[name] = self._counts.get(name, torch.zeros_like(count)) + count
        return func(*args, **kwargs)
