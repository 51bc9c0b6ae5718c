"""GGUF files in llama.cpp: tokens, logits, and files that it must not take for right."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from tokenizers.pre_tokenizers import ByteLevel

from bitquota.errors import ExportFailed
from bitquota.exports.export import export_plan
from bitquota.exports.gguf_tokenizer import SPLITS
from bitquota.exports.llama_cpp import LlamaCpp
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from format_networks import plan_with
from language_folders import LINEAR, LLAMA3, YARN, folder, sentence_piece, tokenizer

pytest.importorskip("xllamacpp", reason="the extra 'llama-cpp' is not installed")

WINDOWS = CalibrationSet(
    inputs=(torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0)),)
)
WIDE = {"hidden_size": 256, "intermediate_size": 256}


def exported(path, kind="llama", *, target="gguf-py", bits=(8,), made=None, **config):
    """Export a random model whose logits tell tokens apart; return the report."""
    source = folder(path / "m", kind, **({"initializer_range": 0.2} | config))
    if made is not None:
        made.save(str(source / "tokenizer.json"))
    model = load_model(str(source))
    plan = plan_with(model, WINDOWS.inputs, target=target, bits=bits)
    return export_plan(model, plan, path / "o", target=target, samples=WINDOWS)


class TestRunText:
    @pytest.mark.parametrize(
        ("kind", "target", "bits", "config"),
        [
            ("llama", "gguf-py", (4,), {"attention_bias": True, "mlp_bias": True}),
            ("llama", "gguf-py", (5,), {"rope_parameters": LLAMA3}),
            ("mistral", "gguf-py", (8,), {"head_dim": 32, "rope_parameters": LINEAR}),
            ("qwen2", "gguf-py", (8,), {"rope_parameters": YARN}),
            ("qwen3", "gguf-py", (4, 8), {"head_dim": 32, "tie_word_embeddings": True}),
            *(("llama", "gguf-k", (bits,), WIDE) for bits in (2, 3, 4, 5, 6)),
        ],
    )  # fmt: skip
    def test_logits_are_those_of_rounded_inputs(self, tmp_path, kind, target, bits, config):
        """Each family and each type of block: rounding of activations explains the difference."""
        ran = exported(tmp_path, kind, target=target, bits=bits, **config).text_run
        assert (3, 120) == (ran.n_windows, ran.n_tokens)
        assert 0.7 * ran.explained < ran.relative < 1.3 * ran.explained < 0.2
        assert ran.log_likelihood == pytest.approx(ran.planned_log_likelihood, rel=0.01)

    def test_full_precision_is_exact(self, tmp_path):
        """Nothing is rounded but the cache of keys and values, to fp16."""
        ran = exported(tmp_path, bits=(32,)).text_run
        assert 0.0 == ran.explained
        assert ran.relative < 0.003
        assert ran.kl < 1e-4

    def test_rows_in_another_order_are_found(self, tmp_path, monkeypatch):
        """A file that loads and computes something else is no export."""
        monkeypatch.setattr("bitquota.exports.gguf_file.row_order", lambda *_: None)
        with pytest.raises(ExportFailed, match=r"llama\.cpp on 120 tokens .* reads the file wrong"):
            exported(tmp_path)
        assert not (tmp_path / "o").exists()

    def test_masked_windows_are_not_compared(self, tmp_path):
        """llama.cpp has no masks; where every window has one, the file is loaded alone."""
        model = load_model(str(folder(tmp_path / "m")))
        ids, mask = WINDOWS.inputs[0], torch.ones(3, 40, dtype=torch.int64)
        mask[0, -4:] = 0
        samples = CalibrationSet(inputs=(ids, mask), names=("input_ids", "attention_mask"))
        plan = plan_with(model, WINDOWS.inputs, target="gguf-py", bits=(8,))
        report = export_plan(model, plan, tmp_path / "o", target="gguf-py", samples=samples)
        assert 2 == report.text_run.n_windows

    def test_splits_texts_like_the_source(self, tmp_path):
        """All of our texts have the same tokens, and the command line says so."""
        ran = exported(tmp_path, vocab_size=320, made=tokenizer()).text_run
        assert ran.texts == ran.texts_alike > 5

    @pytest.mark.parametrize("newer", [False, True])
    def test_splits_like_sentence_piece(self, tmp_path, newer):
        """Merges become scores, unknown letters bytes, and a space comes first.

        Newer ones put none before a text that begins with one; llama.cpp does, which is noted.
        """
        made = sentence_piece(newer=newer)
        report = exported(tmp_path, vocab_size=360, made=made)
        assert report.text_run.texts - report.text_run.texts_alike == newer
        assert newer == any("such as '  two spaces" in note for note in report.notes)
        with LlamaCpp(tmp_path / "o" / "model.gguf") as runtime:
            tokens = runtime.tokenize("the cat sat é")
        assert made.encode("the cat sat é").ids == tokens
        assert len(tokens) < 9

    def test_splits_bytes(self, tmp_path):
        """A tokenizer of bytes has no merges, and llama.cpp loads no file without one."""
        alphabet = {c: k for k, c in enumerate(sorted(ByteLevel.alphabet()))}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
        made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        ran = exported(tmp_path, vocab_size=300, made=made).text_run
        assert ran.texts == ran.texts_alike > 5
        with LlamaCpp(tmp_path / "o" / "model.gguf") as runtime:
            assert made.encode("~ ~~ ~~~").ids == runtime.tokenize("~ ~~ ~~~")

    def test_other_tokens_are_noted(self, tmp_path, monkeypatch):
        """A rule by the wrong name gives other tokens without an error."""
        monkeypatch.setitem(SPLITS, "byte level", "qwen2")
        report = exported(tmp_path, vocab_size=320, made=tokenizer())
        assert report.text_run.texts_alike < report.text_run.texts
        assert any("otherwise than tokenizer.json" in note for note in report.notes)


class TestLlamaCpp:
    def test_writes_text(self, tmp_path):
        """Tokens there and back, and a text that goes on with the most probable tokens."""
        made = tokenizer()
        exported(tmp_path, vocab_size=320, made=made)
        with LlamaCpp(tmp_path / "o" / "model.gguf") as runtime:
            tokens = runtime.tokenize("the cat sat")
            assert made.encode("the cat sat").ids == tokens
            assert "the cat sat" == runtime.text(tokens)
            found, _ = runtime.continue_greedily(tokens, 3)
            logits, _ = runtime.logits([*tokens, *found[:2]])
        assert logits[-3:].argmax(-1).tolist() == found

    def test_broken_file(self, tmp_path):
        """What llama.cpp says of it is in the message."""
        (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(ExportFailed, match=r"llama.cpp must load 'model.gguf'; it says: .*"):
            LlamaCpp(tmp_path / "model.gguf")

    def test_absent_runtime_is_noted(self, tmp_path, monkeypatch):
        """The file is written and read back all the same."""
        monkeypatch.setattr("bitquota.exports.gguf_file.installed", lambda: False)
        report = exported(tmp_path)
        assert report.text_run is None
        assert any("pip install bitquota[llama-cpp]" in note for note in report.notes)
        assert "text_run" not in json.loads((tmp_path / "o" / "receipt.json").read_text())
