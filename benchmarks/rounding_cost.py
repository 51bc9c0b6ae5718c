"""What rounding costs: microseconds of one thread per weight, by shape and step.

    python benchmarks/rounding_cost.py            # a block of SmolLM2-135M
    python benchmarks/rounding_cost.py --large    # 4096 x 4096 too
    python benchmarks/rounding_cost.py --small    # as CI runs it

Weights and inputs are random, inputs with common factors and columns of unequal power. The last
line is what all linear layers of SmolLM2-135M take: scales and codes at 3 bits in groups of 64.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.quantizers.weights import quantize

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 30
BLOCK = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}
"""Linear layers of one of SmolLM2-135M's blocks, (rows, columns): how many."""

SCHEME = Scheme(granularity=Granularity.GROUP, group_size=64, scale_format=ScaleFormat.FP16)


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return weights f32[rows, columns] and the Gram of 4,096 inputs."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4096, 64, generator=generator) @ torch.randn(
        64, columns, generator=generator
    )
    power = torch.exp(0.7 * torch.randn(columns, generator=generator))
    inputs = (common + 4 * torch.randn(4096, columns, generator=generator)) * power
    weights = 0.02 * torch.randn(rows, columns, generator=generator)
    return weights, (inputs.T @ inputs).double()


def seconds(matrix: Tensor, bits: int, gram: Tensor, rounding: str) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    quantize(matrix, bits, SCHEME, importance=gram.diagonal(), inputs_gram=gram, rounding=rounding)
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="two shapes of 64 columns")
    parser.add_argument("--large", action="store_true", help="4096 x 4096 too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = (
        [(32, 64), (64, 64)] if args.small else [*BLOCK, *([(4096, 4096)] if args.large else [])]
    )
    per_block = 0.0
    print("rows x columns, bits: microseconds per weight for nearest, gptq, gpfq")
    for rows, columns in shapes:
        matrix, gram = problem(rows, columns)
        for bits in (2, 3, 4, 6, 8) if rows * columns < 1 << 22 else (3,):
            spent = {r: seconds(matrix, bits, gram, r) for r in ("nearest", "gptq", "gpfq")}
            cells = "  ".join(f"{1e6 * s / matrix.numel():6.2f}" for s in spent.values())
            print(f"{rows:5} x {columns:5}, {bits}: {cells}", flush=True)
            if bits == 3:
                per_block += BLOCK.get((rows, columns), 0) * spent["gptq"]
    if not args.small:
        print(f"SmolLM2-135M, 3 bits in groups of 64: {BLOCKS * per_block:.0f} CPU seconds")


if __name__ == "__main__":
    main()
