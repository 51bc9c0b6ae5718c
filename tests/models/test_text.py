"""Texts as calibration sets, and what is suggested for an architecture."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from bitquota.candidates.architectures import suggest
from bitquota.errors import InvalidCalibration
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.samples import load_calibration

TEXT = "to be or not to be that is the question " * 20


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted(set(TEXT.split()))
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


class TestLoadText:
    def test_words(self, tokenizer):
        """Windows of the model's own tokens; the rest is dropped."""
        (tokenizer / "t.txt").write_text(TEXT)
        data = load_calibration(str(tokenizer / "t.txt"), tokenizer=str(tokenizer), length=16)
        assert tuple(data.inputs[0].shape) == (200 // 16, 16)
        assert data.inputs[0][0, 0] == data.inputs[0][0, 4]  # "to … to"
        assert data.labels is None

    def test_bytes(self, tmp_path):
        """Byte-level models take the bytes of the text."""
        (tmp_path / "t.txt").write_text("ab é" * 10)
        data = load_calibration(str(tmp_path / "t.txt"), tokenizer="bytes", length=5)
        assert data.inputs[0][0].tolist() == list("ab é".encode())

    def test_jsonl(self, tmp_path):
        """Documents are joined by an empty line."""
        lines = [json.dumps({"text": "abc"}), "", json.dumps({"text": "de", "id": 1})]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        data = load_calibration(str(tmp_path / "t.jsonl"), tokenizer="bytes", length=7)
        assert data.inputs[0][0].tolist() == list(b"abc\n\nde")

    def test_parquet(self, tmp_path):
        """Documents of a column; missing ones are passed over."""
        table = pa.table({"id": [1, 2, 3], "text": ["abc", None, "de"]})
        parquet.write_table(table, tmp_path / "t.parquet")
        data = load_calibration(str(tmp_path / "t.parquet"), tokenizer="bytes", length=7)
        assert data.inputs[0][0].tolist() == list(b"abc\n\nde")

    def test_draw(self, tmp_path):
        """Windows are drawn as samples are."""
        (tmp_path / "t.txt").write_text(TEXT)
        data = load_calibration(str(tmp_path / "t.txt"), tokenizer="bytes", length=8, n=3, seed=1)
        assert len(data) == 3
        assert data.indices == tuple(sorted(data.indices))

    @pytest.mark.parametrize(
        ("name", "text", "settings", "sentence"),
        [
            ("t.txt", TEXT, {}, "needs a tokenizer"),
            ("t.txt", TEXT, {"tokenizer": "nowhere"}, r"folder with tokenizer\.json"),
            ("t.txt", "abc", {"tokenizer": "bytes"}, "at least 128 tokens; it has 3"),
            ("t.txt", TEXT, {"tokenizer": "bytes", "length": 1}, "at least 2 tokens"),
            ("t.jsonl", '{"text": "x"}', {}, "needs a tokenizer"),
            ("t.jsonl", '{"body": "x"}', {"tokenizer": "bytes"}, "or be 'text' and hold documents"),
        ],
    )
    def test_failures(self, tmp_path, name, text, settings, sentence):
        """Each is one sentence."""
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidCalibration, match=sentence):
            load_calibration(str(tmp_path / name), **settings)

    def test_not_utf8(self, tmp_path):
        """Binary data is no text."""
        (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xfa" * 100)
        with pytest.raises(InvalidCalibration, match="must be UTF-8"):
            load_calibration(str(tmp_path / "t.txt"), tokenizer="bytes")

    def test_broken_tokenizer(self, tmp_path):
        """A tokenizer file that cannot be read is named."""
        (tmp_path / "tokenizer.json").write_text("{}")
        (tmp_path / "t.txt").write_text(TEXT)
        with pytest.raises(InvalidCalibration, match="tokenizers package reads"):
            load_calibration(str(tmp_path / "t.txt"), tokenizer=str(tmp_path))


class TestSuggest:
    def test_llama(self, llama_folder):
        """Fused projections are suggested as ties."""
        loaded = load_model(str(llama_folder))
        found = suggest(discover(loaded.module, loaded.example_inputs))
        assert found.ties == (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        assert found.exclude == ()
        assert len(found.reasons) == 2

    def test_position_table(self, tmp_path):
        """Learned positions are suggested for exclusion."""
        import transformers

        config = transformers.GPT2Config(
            vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        found = suggest(discover(loaded.module, loaded.example_inputs))
        assert found.exclude == ("transformer.wpe",)

    def test_router(self, tmp_path):
        """A router beside experts is suggested for exclusion; an ordinary gate is not."""
        import transformers

        config = transformers.Qwen3MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=24,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
            num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        inventory = discover(loaded.module, loaded.example_inputs)
        kinds = {str(layer.kind) for layer in inventory.layers}
        assert "experts" in kinds
        found = suggest(inventory)
        assert all(name.endswith("mlp.gate") for name in found.exclude)


class TestConversations:
    TALKS = [  # noqa: RUF012  # read only
        [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not"}],
        [{"role": "user", "content": "that is the question"}],
    ]

    @pytest.fixture
    def chat(self, tokenizer):
        """The folder, with a chat template."""
        template = (
            "{% for m in messages %}{{ m['role'] == 'user' and 'to' or 'be' }} {{ m['content'] }} "
            "{% endfor %}that "
        )
        (tokenizer / "chat_template.jinja").write_text(template)
        settings = {"tokenizer_class": "TokenizersBackend"}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
        return tokenizer

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_as_the_template_writes_them(self, chat, suffix):
        """One behind the other, whatever else a line holds."""
        rows = [{"messages": talk, "id": k} for k, talk in enumerate(self.TALKS)]
        file = chat / f"chat{suffix}"
        if suffix == ".jsonl":
            file.write_text("\n".join(map(json.dumps, rows)))
        else:
            parquet.write_table(pa.Table.from_pylist(rows), file)
        (chat / "same.txt").write_text("to to be be or not that to that is the question that ")
        same = load_calibration(str(chat / "same.txt"), tokenizer=str(chat), length=4)
        found = load_calibration(str(file), tokenizer=str(chat), length=4)
        assert 12 // 4 == len(found)
        assert same.digest == found.digest

    def test_without_a_template(self, tokenizer):
        """The message says what to do, also of bytes."""
        (tokenizer / "chat.jsonl").write_text(json.dumps({"messages": self.TALKS[0]}))
        for named in (str(tokenizer), "bytes"):
            with pytest.raises(InvalidCalibration, match="chat template.*column 'text'"):
                load_calibration(str(tokenizer / "chat.jsonl"), tokenizer=named, length=2)

    def test_template_that_fails(self, chat):
        """A template's own refusal is passed on."""
        (chat / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
        (chat / "chat.jsonl").write_text(json.dumps({"messages": self.TALKS[0]}))
        with pytest.raises(InvalidCalibration, match="roles must alternate"):
            load_calibration(str(chat / "chat.jsonl"), tokenizer=str(chat), length=2)
