"""The demonstration: a real network from training to a verified plan, through the service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from bitquota.canonical import write_whole
from bitquota.cli import output
from bitquota.client import Client
from bitquota.corrections import Correction
from bitquota.errors import MissingDependency, ServiceError
from bitquota.evaluate.scoring import evaluate_plans
from bitquota.models.load import load_model
from bitquota.models.samples import load_calibration
from bitquota.plan import WEIGHTS_SUFFIX
from bitquota.report import text as report
from bitquota.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

BUDGETS = ("2.5 bits", "3.5 bits")
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
EPOCHS = 30
N_CALIBRATION = 512
N_TEST = 600


class DigitsNet(nn.Module):
    """A small residual network for 8x8 images: convolutions, depthwise, batch norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(1, 16)
        self.depthwise = _block(16, 16, groups=16)
        self.residual = _block(16, 16)
        self.wide = _block(16, 32, stride=2)
        self.deep = _block(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits f32[N, 10] of images f32[N, 1, 8, 8]."""
        x = self.stem(x)
        x = x + self.residual(self.depthwise(x))
        x = self.wide(x)
        x = x + self.deep(x)
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def _block(n_in: int, n_out: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())


def digits(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scikit-learn's 1,797 handwritten digits, shuffled: f32[N, 1, 8, 8] and i64[N].

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        msg = "the digits data need scikit-learn; install it with: pip install 'bitquota[demo]'"
        raise MissingDependency(msg, extra="demo") from err
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x = (images[order].reshape(-1, 1, 8, 8) / 8.0 - 1.0).astype(np.float32)
    return x, labels[order].astype(np.int64)


def train_digits(
    x: NDArray[np.float32], y: NDArray[np.int64], *, seed: int = 0, epochs: int = EPOCHS
) -> DigitsNet:
    """Return a ``DigitsNet`` trained on ``x, y``, in eval mode: a few seconds on one core."""
    torch.manual_seed(seed)
    # Kernels this small spend longer waiting for a second thread than computing.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = DigitsNet()
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    batch = 64
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for start in range(0, len(labels), batch):
            rows = order[start : start + batch]
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own annotation
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def export(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write ``model`` as a ``.pt2`` that takes any batch size.

    Args:
        model: In eval mode; takes and returns one tensor.
        example: An input with a batch of at least 2, without which the exporter fixes it at 1.
        path: File to write.
    """
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (example,), dynamic_shapes=(batch,))
    torch.export.save(program, path)


@contextmanager
def running_server(data_dir: Path) -> Iterator[str]:
    """Start ``bitquota serve`` on a free port of this machine; yields its URL.

    Raises:
        ServiceError: The server did not say that it listens.
    """
    command = [sys.executable, "-m", "bitquota", "serve", "--port", "0"]
    log = data_dir / "server.log"
    data_dir.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        server = subprocess.Popen(  # noqa: S603  # our own command line
            [*command, "--data-dir", str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # The network is too small for a second thread.
            env=os.environ | {"BITQUOTA_THREADS": "1"},
        )
        try:
            assert server.stdout is not None  # noqa: S101  # stdout=PIPE above
            for line in server.stdout:
                if found := re.search(r"https?://[\w.:\[\]]+", line):
                    yield found[0]
                    break
            else:
                msg = f"'bitquota serve' must say where it listens; it ended first, see {log}"
                raise ServiceError(msg, log=str(log))
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def run(out: Path, *, seed: int = 0) -> None:
    """Run the whole demonstration and leave plans and report in ``out``."""
    say = output.console.print
    out.mkdir(parents=True, exist_ok=True)
    x, y = digits(seed)
    x_test, y_test, x_train, y_train = x[:N_TEST], y[:N_TEST], x[N_TEST:], y[N_TEST:]
    say("Training a small residual network on scikit-learn's digits …")
    model = train_digits(x_train, y_train, seed=seed)

    # What a user would provide: a model and two sets of images.
    model_file, calibration_file = out / "digits.pt2", out / "calibration.npz"
    test_file = out / "test.npz"
    export(model, torch.from_numpy(x_train[:2]), model_file)
    np.savez(calibration_file, x=x_train, y=y_train)
    np.savez(test_file, x=x_test, y=y_test)

    # One job for two budgets, through the REST API.
    request = PlanRequest(
        budgets=BUDGETS,
        weight_bits=WEIGHT_BITS,
        corrections=(Correction.BIAS_CORRECTION,),
        samples=N_CALIBRATION,
        holdout_samples=N_CALIBRATION,
        seed=seed,
    )
    say("Starting the service on this machine …")
    with running_server(out / "service") as url, Client(url) as client:
        say(f"Submitting the job to {url} …", highlight=False)
        job = client.submit(model=model_file, calibration=calibration_file, request=request)
        with output.shown_progress() as on_progress:
            job.wait(on_progress=on_progress)
        plans = job.plans()
        weights = [None if p.weights is None else job.quantized(k) for k, p in enumerate(plans)]
    for k, (plan, content) in enumerate(zip(plans, weights, strict=True)):
        path = out / f"plan-{k + 1}.json"
        if content is not None:
            write_whole(path.with_suffix(WEIGHTS_SUFFIX), content)
        plan.save(path)
    say(f"Evaluating every plan and baseline on {N_TEST} test images …")
    evaluations = evaluate_plans(
        replace(load_model(str(model_file)), weights=tuple(w for w in weights if w is not None)),
        load_calibration(str(test_file)),
        plans,
        correction_data=load_calibration(str(calibration_file)),
        with_baselines=True,
    )

    # What plans and baselines score on images that no step has seen.
    accuracies: list[dict[str, float]] = [{} for _ in plans]
    for e in evaluations:
        for k, known in enumerate(accuracies):
            if e.plan_index in (None, k) and e.measured.accuracy is not None:
                known[e.name] = e.measured.accuracy
    for plan, known in zip(plans, accuracies, strict=True):
        output.print_plan(plan, known)
    say(f"Full precision scores {100 * accuracies[0]['full precision']:.2f} % on test.")
    text = report.render_markdown(
        plans, title="Bit allocation of the digits network", accuracies=accuracies
    )
    (out / "report.md").write_text(text)
    say(f"Wrote {out}/plan-1.json, {out}/plan-2.json and {out}/report.md", highlight=False)
