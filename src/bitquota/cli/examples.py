"""One example for each command, which its help ends with.

Design: docs/design/client.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

EXAMPLES = {
    "quickstart": "model.onnx calibration.npz --yes",
    "inspect": "model.onnx --target ort-cpu",
    "targets": "--json",
    "plan": 'model.onnx calibration.npz --target ort-cpu --budget "4 bits" --out plan.json',
    "measure": "model.onnx calibration.npz --target ort-cpu --out sensitivity.npz",
    "profile": "model.onnx calibration.npz --target ort-cpu --out costs.json",
    "compare": 'model.onnx calibration.npz --budget "3 bits" --samples 128',
    "export": "model.onnx plan.json --samples calibration.npz --out quantized",
    "finetune": "my_package:model plan.json my_package:train --epochs 3 --out finetuned",
    "learn": 'my_package:model my_package:train --budget "2.5 bits" --out learned',
    "evaluate": "model.onnx test.npz --plan plan.json --exported quantized",
    "show": "plan.json",
    "report": "plan.json --matrix sensitivity.npz --out report.html",
    "solve": 'sensitivity.npz --budget "3 bits" --explain',
    "frontier": "sensitivity.npz --points 12",
    "verify": "plan.json sensitivity.npz plan.certificate.npz",
    "lock": "plan.json --target ort-cpu --max-drop 0.5",
    "check": "bitquota.lock.json --model model.onnx --data test.npz --junit bitquota.xml",
    "diff": "old-plan.json plan.json",
    "serve": "--port 8000 --data-dir bitquota-data",
    "demo": "--out demo",
    "ledger show": "",
    "ledger export": "measurements.zip",
    "ledger import": "measurements.zip",
    "admin keys create": "vision-team --name ci --scope write --days 90",
    "admin keys list": "--tenant vision-team",
    "admin keys revoke": "0123456789abcdef",
    "admin keys rotate": "0123456789abcdef --overlap-days 7",
    "admin quotas set": "vision-team --max-running 4 --max-worker-s 36000",
    "admin quotas show": "vision-team",
    "admin jobs list": "vision-team --limit 20",
    "admin jobs cancel": "vision-team 0123456789abcdef",
    "admin webhook-secret": "vision-team",
    "admin usage": "--tenant vision-team --days 30",
    "admin downgrade": "--yes --data-dir bitquota-data",
    "admin audit": "--tenant vision-team --limit 50",
    "admin gc": "--data-dir bitquota-data",
    "admin backup": "backups/monday --data-dir bitquota-data",
    "admin verify": "--data-dir backups/monday",
    "admin doctor": "--data-dir bitquota-data",
}
"""Arguments of each command, as a shell takes them."""


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """End the help of every command of ``app``, and of those below it, with its example.

    Raises:
        KeyError: A command has none.
    """
    for command in app.registered_commands:
        name = f"{prefix}{command.name}"
        command.epilog = f"Example: bitquota {name} {EXAMPLES[name]}".rstrip()
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_examples(group.typer_instance, f"{prefix}{group.name} ")
