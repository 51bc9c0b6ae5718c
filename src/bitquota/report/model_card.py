"""The README of an exported folder: what the files are, how to run them, what they lose.

Its first lines are the metadata that model hubs read, so that the folder can be uploaded as it is
(``hf upload NAME FOLDER``).

Reference: https://huggingface.co/docs/hub/model-cards

Design: docs/design/targets.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.exports.names import HOW_TO_RUN
from bitquota.report import text
from bitquota.report.costs import timed_sentence

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.exports.export_report import ExportReport
    from bitquota.plan import Plan

CARD_FILE = "README.md"

_LIBRARIES = {
    "compressed-tensors": "transformers", "mlx": "mlx", "onnx-qdq": "onnx",
    "onnx-matmulnbits": "onnx", "onnx-genai": "onnxruntime-genai", "openvino": "openvino",
    "openvino-genai": "openvino", "gguf": "gguf",
}  # fmt: skip
"""How model hubs call what reads a format."""

_FILES_BESIDE = (
    "`plan.json` says what each layer became, `receipt.json` what was read back and compared. "
    "`bitquota show plan.json` prints the plan, and `bitquota evaluate MODEL DATA --exported .` "
    "measures these files on other samples."
)


def write_card(folder: Path, plan: Plan, made: ExportReport) -> None:
    """Write ``README.md`` into the folder of an export."""
    (folder / CARD_FILE).write_text(model_card(plan, made), encoding="utf-8")


def model_card(plan: Plan, made: ExportReport) -> str:
    """Return a model card as Markdown: metadata, use, verification, and the report of the plan."""
    bits = plan.model_bits / plan.inventory.n_numbers
    library = _LIBRARIES.get(made.exporter)
    head = [
        "---",
        *([f"library_name: {library}"] if library else []),
        *(["pipeline_tag: text-generation"] if made.text_run else []),
        "tags:",
        *(f"- {tag}" for tag in ("bitquota", "quantized", "mixed-precision", made.exporter)),
        "---",
    ]
    how = HOW_TO_RUN.get(made.exporter)
    use = [f"    {how.format(out='.')}", ""] if how else []
    files = [
        {"file": f"`{file.name}`", "size": text.format_size(8 * file.size_bytes)}
        for file in made.files
    ]
    return "\n".join(
        [
            *head,
            "",
            text.render_markdown([plan], title=f"Quantized to {bits:.2f} bits per parameter"),
            "## Files",
            "",
            *use,
            text.markdown_table(files),
            *(f"- {sentence}" for sentence in export_sentences(made)),
            "",
            _FILES_BESIDE,
            "",
        ]
    )


def export_sentences(made: ExportReport) -> list[str]:
    """Return what was read back, run and compared, a sentence each."""
    lines = []
    if made.tensors:
        lines.append(
            f"Quantized weights {text.format_size(made.payload_bits)} as planned; other "
            f"tensors {text.format_size(made.unquantized_bits)} (planned "
            f"{text.format_size(made.planned_unquantized_bits)}); headers and graph "
            f"{made.container_bytes:,} B ({100 * made.container_overhead:.1f} %)."
        )
    gap = made.difference
    if gap is not None:
        lines.append(
            f"Run by {made.runtime['name']} {made.runtime['version']} on {gap.n_samples} "
            f"samples: differs from fake-quantization by at most {gap.maximum:.2g} "
            f"({gap.relative:.2g} of the norm)."
        )
    if made.timed is not None:
        lines.append(timed_sentence(made.timed))
    if ran := made.text_run:
        tokens = f"; {ran.texts_alike} of {ran.texts} texts have the same tokens" * bool(ran.texts)
        lines.append(
            f"Run by {ran.runtime} ({ran.version}) on {ran.n_tokens:,} tokens: log-likelihood "
            f"{ran.log_likelihood:.4f} per token (planned {ran.planned_log_likelihood:.4f}), KL "
            f"{ran.kl:.2g}, logits {ran.relative:.2g} apart (8-bit activations explain "
            f"{ran.explained:.2g}){tokens}; {ran.prompt_tokens_per_second:,.0f} tokens/s read, "
            f"{ran.tokens_per_second:,.0f} written, on one thread."
        )
    if options := made.runtime.get("options"):
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        lines.append(f"Options that must be set when it is run: {given}.")
    return lines + [f"Note: {note}." for note in made.notes]
