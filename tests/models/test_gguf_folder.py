"""GGUF files as models: the same outputs and tokens as the model that was written, or a refusal."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch

from bitquota.candidates.targets import TARGETS
from bitquota.errors import BitquotaError, InvalidCalibration, InvalidModel
from bitquota.models.gguf_folder import unpacked_gguf
from bitquota.models.inspection import inspect_model
from bitquota.models.load import load_model, load_outline
from bitquota.models.text import load_text
from gguf_files import write_gguf, write_model

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder in which unpacked models are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bitquota" / "gguf"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A GGUF of a tiny Llama in float32."""
    path = tmp_path_factory.mktemp("llama")
    return write_gguf(write_model(path / "folder"), path / "out")


def rewrite(
    file, out, *, without=(), changed=None, entries=None, tensors=None, architecture="llama"
):
    """Write a GGUF again with other entries or tensors; return the new file."""
    reader = gguf.GGUFReader(str(file))
    writer = gguf.GGUFWriter(str(out), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in without:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, (changed or {}).get(name, field.contents()), kind, sub)
    for name, value in (entries or {}).items():
        kind = gguf.GGUFValueType.get_type(value)
        writer.add_key_value(name, value, kind)
    held = {t.name: t.data for t in reader.tensors} | (tensors or {})
    for name, values in held.items():
        if name not in without:
            writer.add_tensor(name, np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


class TestUnpackedGguf:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            *[("llama", {"rope_parameters": rope}) for rope in ROPES.values()],
            ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
            ("mistral", {"sliding_window": None}),
            ("qwen2", {"rope_parameters": ROPES["yarn"]}),
            ("qwen3", {"head_dim": 32}),
        ],
    )
    def test_computes_what_was_written(self, tmp_path, kind, config):
        """Positions, biases, ties, and the order of rows come back."""
        folder = write_model(tmp_path / "folder", kind, **config)
        file = write_gguf(folder, tmp_path / "out")
        whole, found = load_model(str(folder)), load_model(str(file))
        with torch.no_grad():
            torch.testing.assert_close(whole.module(TOKENS), found.module(TOKENS))
        assert (32, str(file)) == (found.weight_format_bits, found.source)

    def test_dequantizes(self, tmp_path):
        """Values are those that gguf itself gives for the file's blocks."""
        file = write_gguf(write_model(tmp_path / "folder"), tmp_path / "out", 4, 5, 8)
        found = dict(load_model(str(file)).module.named_parameters())
        stored = {t.name: t for t in gguf.GGUFReader(str(file)).tensors}
        for part, name in (("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
            held = stored[f"blk.1.{part}.weight"]
            assert held.tensor_type.name in ("Q4_0", "Q5_0", "Q8_0")
            values = gguf.quants.dequantize(held.data, held.tensor_type)
            torch.testing.assert_close(
                torch.from_numpy(values), found[f"model.layers.1.{name}.weight"].data,
                rtol=0, atol=0,
            )  # fmt: skip

    def test_keeps_half_precision(self, llama, tmp_path):
        """A file whose matrices are float16 takes two bytes per weight, and counts them so."""
        halves = {
            t.name: t.data.astype(np.float16)
            for t in gguf.GGUFReader(str(llama)).tensors
            if t.data.ndim > 1
        }
        file = rewrite(llama, tmp_path / "half.gguf", tensors=halves)
        found = load_model(str(file))
        assert 16 == found.weight_format_bits
        weight = found.module.get_parameter("model.embed_tokens.weight").detach().numpy()
        assert (weight == halves["token_embd.weight"].astype(np.float32)).all()

    def test_is_made_once(self, llama, tmp_path, cache):
        """Until the file changes; nothing else is left in the cache."""
        file = tmp_path / "model.gguf"
        shutil.copy(llama, file)
        first = unpacked_gguf(file)
        (first / "mark").touch()
        assert first == unpacked_gguf(file)
        assert (first / "mark").exists()
        rewrite(llama, file, entries={"general.description": "another"})
        assert first != unpacked_gguf(file)
        assert 2 == len(list(cache.iterdir()))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"entries": {"llama.attention.scale": 0.5}}, r"attention\.scale.* not understood"),
            ({"entries": {"llama.expert_count": 8}}, r"expert_count' \(8\) is not understood"),
            ({"without": ["llama.block_count"]}, r"lacks 'llama\.block_count'"),
            ({"without": ["blk.1.ffn_up.weight"]}, r"ffn_up\.weight' must be \[96, 64\]"),
            (
                {"tensors": {"blk.0.extra.weight": np.ones((2, 2), np.float32)}},
                r"'blk\.0\.extra\.weight' belongs to no such llama model",
            ),
            (
                {"tensors": {"rope_freqs.weight": np.array([1, 2, 1, 2] * 2, np.float32)}},
                "rotary positions",
            ),
            ({"architecture": "gemma9"}, "gemma9"),
            ({"changed": {"llama.attention.head_count": 0}}, "attention.head_count"),
        ],
    )
    def test_refusals(self, llama, tmp_path, changes, sentence):
        """What is not understood, or not there, is named; nothing is kept."""
        file = rewrite(llama, tmp_path / "changed.gguf", **changes)
        with pytest.raises(InvalidModel, match=sentence):
            load_model(str(file))
        assert not list((tmp_path / "cache").glob("bitquota/gguf/*"))

    def test_one_of_several_parts(self, llama, tmp_path):
        file = rewrite(llama, tmp_path / "part.gguf", entries={"split.count": 3})
        with pytest.raises(InvalidModel, match="llama-gguf-split --merge"):
            load_model(str(file))


class TestHostileFiles:
    def test_cut_short(self, llama, tmp_path):
        """Wherever it ends."""
        whole = llama.read_bytes()
        file = tmp_path / "cut.gguf"
        for size in (0, 3, 20, 200, 2000, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:size])
            with pytest.raises(InvalidModel, match=r"cut short|lie inside"):
                load_model(str(file))

    def test_altered(self, llama, tmp_path):
        """Any byte of the header may change: the model is loaded or refused in words."""
        whole = llama.read_bytes()
        file = tmp_path / "altered.gguf"
        header = whole.index(b"output_norm.weight") + 64
        for at in range(0, header, 41):
            changed = bytearray(whole)
            changed[at] ^= 0xFF
            file.write_bytes(changed)
            with suppress(BitquotaError):
                load_outline(str(file))

    @pytest.mark.parametrize("count", [2**32, 2**62])
    def test_announces_more_than_there_is(self, tmp_path, count):
        """Of entries, tensors, or strings in an array: no memory is taken for them."""
        start = b"GGUF" + (3).to_bytes(4, "little")
        many, one, none = (n.to_bytes(8, "little") for n in (count, 1, 0))
        array = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + many
        key = (3).to_bytes(8, "little") + b"key"
        for content in (none + many, many + none, none + one + key + array + b"\0" * 64):
            (tmp_path / "bomb.gguf").write_bytes(start + content)
            with pytest.raises(InvalidModel, match="cannot be read"):
                load_model(str(tmp_path / "bomb.gguf"))

    def test_overlapping_tensors(self, llama, tmp_path):
        """Many tensors may not be made of the same bytes."""
        whole = bytearray(llama.read_bytes())
        name = b"blk.0.attn_norm.weight"
        at = whole.index(name) + len(name) + 4 + 8 + 4
        whole[at : at + 8] = (0).to_bytes(8, "little")
        (tmp_path / "overlap.gguf").write_bytes(whole)
        with pytest.raises(InvalidModel, match="in no other tensor"):
            load_model(str(tmp_path / "overlap.gguf"))


class TestTokenizer:
    def test_of_the_file(self, tmp_path):
        """Texts become the tokens of the model's own tokenizer."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        folder = write_model(tmp_path / "folder", vocab_size=300)
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(
            ["the cat sat on the mat, and the hat sat on the cat"] * 9, trainer
        )
        made.save(str(folder / "tokenizer.json"))
        file = write_gguf(folder, tmp_path / "out")
        text = tmp_path / "text.txt"
        text.write_text("the cat sat on 1234 hats;\n\nand the mat sat? é" * 4)
        own = load_text(text, tokenizer=str(folder), length=8)
        assert torch.equal(own.inputs[0], load_text(text, tokenizer=str(file), length=8).inputs[0])
        held = Tokenizer.from_file(str(unpacked_gguf(file) / "tokenizer.json"))
        assert made.get_vocab().items() <= held.get_vocab().items()
        assert 300 == held.get_vocab_size()

    def test_file_without_one(self, llama, tmp_path):
        text = tmp_path / "text.txt"
        text.write_text("some words")
        with pytest.raises(InvalidCalibration, match="--tokenizer"):
            load_text(text, tokenizer=str(llama), length=2)


class TestOutline:
    def test_inspects_as_the_folder_does(self, tmp_path):
        folder = write_model(tmp_path / "folder")
        target = TARGETS["gguf-py"]
        file = write_gguf(folder, tmp_path / "out")
        whole = inspect_model(load_outline(str(folder)), target=target).to_json()
        found = inspect_model(load_outline(str(file)), target=target).to_json()
        assert json.dumps(whole | {"source": str(file)}) == json.dumps(found)
