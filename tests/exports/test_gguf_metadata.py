"""GGUF metadata: llama.cpp must compute the positions and sizes of the model that was measured."""

from __future__ import annotations

import json
import math
from typing import Any

import gguf
import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.exports.export import export_plan
from bitquota.exports.export_report import ExportReport
from bitquota.exports.gguf_tokenizer import SPLITS
from bitquota.models.load import load_model
from format_networks import plan_with
from language_folders import LINEAR, LLAMA3, YARN, folder, tokenizer


def export(model, path) -> Any:
    """Export a plan of 8 bits; return the reader of the file."""
    plan = plan_with(model, model.example_inputs, target="gguf-py", bits=(8,))
    export_plan(model, plan, path, target="gguf-py")
    return gguf.GGUFReader(str(path / "model.gguf"))


def entries(reader: Any) -> dict[str, Any]:
    """Return what the file says, by the part of the name behind the architecture's."""
    return {name.partition(".")[2]: f.contents() for name, f in reader.fields.items()}


def frequencies(reader: Any) -> tuple[np.ndarray, float]:
    """Return what llama.cpp turns by, and multiplies with: ``rope_yarn`` of ggml-cpu's ops.cpp."""
    said = entries(reader)
    d, base = said["rope.dimension_count"], said["rope.freq_base"]
    usual = base ** (-np.arange(0, d, 2) / d)
    table = {t.name: t.data for t in reader.tensors}.get("rope_freqs.weight")
    if table is not None:
        usual = usual / table
    scaling, factor = said.get("rope.scaling.type"), said.get("rope.scaling.factor", 1.0)
    if scaling != "yarn":
        return usual / factor, 1.0
    bounds = [
        d * math.log(said["rope.scaling.original_context_length"] / (beta * 2 * math.pi))
        / (2 * math.log(base))
        for beta in (32.0, 1.0)
    ]  # fmt: skip
    low, high = max(0, math.floor(bounds[0])), min(d - 1, math.ceil(bounds[1]))
    ramp = (np.arange(d // 2) - low) / max(0.001, high - low)
    mix = 1 - ramp.clip(0, 1)
    return usual / factor * (1 - mix) + usual * mix, 1 + 0.1 * math.log(factor)


class TestPositions:
    @pytest.mark.parametrize(
        ("kind", "rope"),
        [
            ("llama", None), ("llama", LLAMA3), ("llama", LINEAR), ("llama", YARN),
            ("llama", YARN | {"beta_fast": 32.0, "beta_slow": 1.0}), ("qwen2", YARN),
            ("mistral", LINEAR),
        ],
    )  # fmt: skip
    def test_file_turns_as_the_model_does(self, tmp_path, kind, rope):
        """Frequencies that llama.cpp computes from the file are transformers' own."""
        config = {} if rope is None else {"rope_parameters": rope}
        model = load_model(str(folder(tmp_path / "m", kind, **config)))
        turned, scale = frequencies(export(model, tmp_path / "o"))
        rotary = model.module.model.rotary_emb
        assert turned == pytest.approx(rotary.inv_freq.numpy(), rel=1e-5)
        assert scale == pytest.approx(rotary.attention_scaling)

    @pytest.mark.parametrize(
        ("kind", "rope"),
        [
            ("llama", YARN | {"attention_factor": 1.5}), ("llama", YARN | {"truncate": False}),
            ("llama", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
            ("qwen2", LLAMA3), ("llama", YARN | {"beta_slow": 2.0}),
        ],
    )  # fmt: skip
    def test_what_llama_cpp_cannot_compute_is_refused(self, tmp_path, kind, rope):
        """The message names it; nothing is written."""
        model = load_model(str(folder(tmp_path / "m", kind, rope_parameters=rope)))
        with pytest.raises(InvalidInput, match="llama.cpp"):
            export(model, tmp_path / "o")
        assert not (tmp_path / "o").exists()


class TestTokenizer:
    @pytest.mark.parametrize(
        ("split", "rule"), [(None, "gpt-2"), (next(iter(SPLITS)), "llama-bpe")]
    )
    def test_tokens_and_merges_are_the_folders(self, tmp_path, split, rule):
        """All tokens in order, filled up to the embedding, and the merges by rank."""
        path, made = folder(tmp_path / "m", vocab_size=320, bos_token_id=0), tokenizer(split)
        made.save(str(path / "tokenizer.json"))
        said = entries(export(load_model(str(path)), tmp_path / "o"))
        n = made.get_vocab_size()
        assert [made.id_to_token(k) for k in range(n)] == said["ggml.tokens"][:n]
        assert len(said["ggml.tokens"]) == len(said["ggml.token_type"]) == 320
        assert ("gpt2", rule, 0, False) == tuple(
            said[f"ggml.{k}"] for k in ("model", "pre", "bos_token_id", "add_bos_token")
        )
        merges = json.loads(made.to_str())["model"]["merges"]
        assert [" ".join(pair) for pair in merges] == said["ggml.merges"]
        assert [3, 3, 1] == said["ggml.token_type"][:3]

    def test_another_rule_is_left_out_and_said(self, tmp_path):
        """llama.cpp would split otherwise without an error."""
        path = folder(tmp_path / "m", vocab_size=320)
        tokenizer("[a-z]+").save(str(path / "tokenizer.json"))
        said = entries(export(load_model(str(path)), tmp_path / "o"))
        assert "no_vocab" == said["ggml.model"]
        notes = ExportReport.load(tmp_path / "o").notes
        assert any("no rule that splits" in note for note in notes)


class TestSizes:
    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
    def test_heads_of_any_size(self, tmp_path, kind):
        """Keys and values of 32 numbers where hidden / heads is 16."""
        model = load_model(str(folder(tmp_path / "m", kind, head_dim=32)))
        said = entries(export(model, tmp_path / "o"))
        names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        assert [32, 32, 32] == [said[name] for name in names]

    def test_another_activation_is_refused(self, tmp_path):
        """llama.cpp has SiLU built in."""
        model = load_model(str(folder(tmp_path / "m", hidden_act="gelu")))
        with pytest.raises(InvalidInput, match="SiLU"):
            export(model, tmp_path / "o")
