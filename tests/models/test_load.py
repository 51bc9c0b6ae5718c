"""Loading models: factories, folders, files, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from bitquota.errors import InvalidInput, InvalidModel, UnsafeModel
from bitquota.models.load import load_model
from format_networks import tiny_net, write_pt2
from refusals import refused


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the Llama folder that a test may damage."""
    return shutil.copytree(llama_folder, tmp_path / "llama")


def edit_config(folder, **changes) -> None:
    """Change members of ``config.json``; ``None`` removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


class TestFactory:
    def test_loads(self):
        """A factory's module comes back in eval mode, float32, with its class name."""
        loaded = load_model("format_networks:tiny_net")
        assert not loaded.module.training
        assert loaded.architecture == "TinyNet"
        assert loaded.source == "format_networks:tiny_net"
        assert loaded.digest.startswith("sha256:")

    def test_nested_name(self):
        """The function may be an attribute of an attribute."""
        assert load_model("format_networks:no_value.net").architecture == "TinyNet"

    def test_current_folder(self, tmp_path, monkeypatch):
        """Modules of the current folder are found, and the path is as before afterwards."""
        import sys

        (tmp_path / "my_own_net.py").write_text(
            "import torch\ndef net(): return torch.nn.Linear(2, 2).half()\n"
        )
        monkeypatch.chdir(tmp_path)
        before = list(sys.path)
        loaded = load_model("my_own_net:net")
        assert sys.path == before
        assert next(loaded.module.parameters()).dtype == torch.float32
        assert loaded.weight_format_bits == 16

    def test_refused_where_not_allowed(self):
        """A service does not run factories."""
        with pytest.raises(InvalidInput, match="local use only"):
            load_model("format_networks:tiny_net", allow_factory=False)

    @pytest.mark.parametrize(
        ("spec", "sentence"),
        [
            ("no_such_module_x:net", "importable"),
            ("format_networks:nothing", "importable"),
            ("format_networks:not_a_module", r"must return an nn\.Module; it returned int"),
            ("format_networks:fails", r"it failed: OSError\('no such file'\)"),
        ],
    )
    def test_failures(self, spec, sentence):
        """Each failure is one sentence that names the factory."""
        with pytest.raises(InvalidModel, match=sentence):
            load_model(spec)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript(self):
        """A scripted module is refused."""
        with refused(UnsafeModel, source="format_networks:scripted"):
            load_model("format_networks:scripted")


class TestFolder:
    def test_keeps_names_and_returns_logits(self, llama_folder):
        """Names are those of the checkpoint, the output is the logits tensor."""
        import transformers

        loaded = load_model(str(llama_folder))
        names = dict(loaded.module.named_parameters())
        assert "model.layers.0.self_attn.q_proj.weight" in names
        assert loaded.architecture == "LlamaForCausalLM"
        original = transformers.LlamaForCausalLM.from_pretrained(llama_folder).eval()
        ids = loaded.example_inputs[0]
        with torch.no_grad():
            assert torch.equal(original(ids).logits, loaded.module(ids))

    def test_mask_is_second_input(self, llama_folder):
        """An attention mask changes what is attended to."""
        loaded = load_model(str(llama_folder))
        ids = loaded.example_inputs[0]
        mask = torch.ones_like(ids)
        mask[:, :3] = 0
        with torch.no_grad():
            assert not torch.equal(loaded.module(ids), loaded.module(ids, mask))

    def test_encoder_returns_masked_mean(self, tmp_path):
        """A model without a head gives one embedding per sample that ignores padding."""
        import transformers

        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        transformers.BertModel(config).save_pretrained(tmp_path)
        module = load_model(str(tmp_path)).module
        ids = torch.randint(0, 32, (2, 6))
        padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.int64)], dim=1)
        mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 2)], dim=1).long()
        with torch.no_grad():
            assert torch.allclose(module(ids), module(padded, mask), atol=1e-5)
        assert module(ids).shape == (2, 16)

    def test_half_precision_checkpoint(self, tmp_path):
        """Weights are float32 in memory; that the checkpoint stores 16 bits is known."""
        import transformers

        config = transformers.GPT2Config(
            vocab_size=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
        loaded = load_model(str(tmp_path))
        assert loaded.weight_format_bits == 16
        assert next(loaded.module.parameters()).dtype == torch.float32

    @pytest.mark.parametrize(
        "asks",
        [
            {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
            {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
            {"_attn_implementation": "evil/kernels"},
        ],
    )
    def test_remote_code(self, folder, asks):
        """What names code is refused before anything is imported, also inside a config's parts."""
        (folder / "evil.py").write_text("raise SystemExit('ran')")
        edit_config(folder, **asks)
        with pytest.raises(UnsafeModel, match=r"asks for code of its own \((auto_map|_attn)"):
            load_model(str(folder))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"model_type": "made_up"}, r"got 'made_up': export .* to \.pt2 or \.onnx"),
            ({"architectures": None}, "'architectures'"),
            ({"architectures": ["BertModel"]}, "for model type 'bert'"),
            ({"architectures": ["Trainer"]}, "must have the class 'Trainer'"),
            ({"quantization_config": {"bits": 4}}, "already quantized"),
            ({"text_config": {"quantization_config": {"bits": 4}}}, "already quantized"),
            ({"num_hidden_layers": 3}, "every weight that its config describes"),
        ],
    )
    def test_config_that_does_not_hold(self, folder, changes, sentence):
        """Each is one sentence."""
        edit_config(folder, **changes)
        with pytest.raises(InvalidModel, match=sentence):
            load_model(str(folder))

    def test_no_config(self, tmp_path):
        """A folder without config.json is named."""
        with pytest.raises(InvalidModel, match=r"has no config\.json"):
            load_model(str(tmp_path))

    def test_truncated_safetensors(self, folder):
        """A file that was cut short says so."""
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(InvalidModel, match="cut short or altered"):
            load_model(str(folder))

    def test_garbage_safetensors(self, folder):
        """A file that never was one, likewise."""
        (folder / "model.safetensors").write_bytes(b"\xff" * 64)
        with pytest.raises(InvalidModel, match="whole safetensors file"):
            load_model(str(folder))

    def test_pickled_weights_only(self, folder):
        """The safe alternative is named."""
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"x")
        with refused(UnsafeModel, files=["pytorch_model.bin"]):
            load_model(str(folder))

    def test_missing_shard(self, folder):
        """An index that names a file elsewhere is refused."""
        index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with refused(InvalidModel, missing=["../../elsewhere.safetensors"]):
            load_model(str(folder))

    def test_nan_weights(self, folder):
        """The tensor is named."""
        from safetensors.torch import load_file, save_file

        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        with refused(InvalidModel, tensor="model.layers.1.mlp.up_proj.weight", values=1):
            load_model(str(folder))


class TestFile:
    def test_pt2(self, tiny_pt2):
        """An exported graph loads with the digest of the module it was made from."""
        loaded = load_model(str(tiny_pt2))
        assert loaded.architecture == "exported graph"
        x = torch.randn(4, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(tiny_net()(x), loaded.module(x))

    def test_pt2_refused_where_not_allowed(self, tiny_pt2):
        """A server without a sandbox says what it takes instead."""
        with pytest.raises(InvalidInput, match="without a sandbox"):
            load_model(str(tiny_pt2), allow_pt2=False)

    def test_nan_in_pt2(self, tmp_path):
        """NaN weights are named whatever the source."""
        net = tiny_net()
        with torch.no_grad():
            net.head.weight[0, 0] = float("inf")
        path = write_pt2(net, (torch.randn(2, 3, 8, 8),), tmp_path / "m.pt2")
        with refused(InvalidModel, tensor="head.weight", values=1):
            load_model(str(path))

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".joblib"])
    def test_pickles(self, tmp_path, suffix):
        """Never opened; the safe ways are named."""
        file = tmp_path / f"model{suffix}"
        torch.save(nn.Linear(2, 2).state_dict(), file)
        with pytest.raises(UnsafeModel, match="Hugging Face folder"):
            load_model(str(file))

    def test_pickle_named_pt2(self, tmp_path):
        """A checkpoint renamed to .pt2 is recognised."""
        file = tmp_path / "model.pt2"
        torch.save(nn.Linear(2, 2).state_dict(), file)
        with pytest.raises(UnsafeModel, match="TorchScript or a pickled checkpoint"):
            load_model(str(file))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_named_pt2(self, tmp_path):
        """TorchScript renamed to .pt2 is recognised."""
        file = tmp_path / "model.pt2"
        torch.jit.save(torch.jit.trace(tiny_net(), torch.zeros(2, 3, 8, 8)), file)
        with pytest.raises(UnsafeModel, match="TorchScript"):
            load_model(str(file))

    def test_loose_safetensors(self, tmp_path):
        """Weights without a config belong into a folder."""
        file = tmp_path / "w.safetensors"
        file.write_bytes(b"")
        with pytest.raises(InvalidModel, match="the folder that holds it"):
            load_model(str(file))

    def test_other_file(self, tmp_path):
        """What is accepted is listed once."""
        (tmp_path / "model.h5").write_bytes(b"x")
        with pytest.raises(InvalidModel, match=r"got the file 'model\.h5'$") as caught:
            load_model(str(tmp_path / "model.h5"))
        assert str(caught.value).count("Hugging Face folder") == 1

    def test_missing(self, tmp_path):
        """A path that does not exist."""
        with pytest.raises(InvalidModel, match="does not exist"):
            load_model(str(tmp_path / "nothing.pt2"))

    def test_not_an_archive(self, tmp_path):
        """Some other file called .pt2."""
        np.save(tmp_path / "x.npy", np.zeros(3))
        (tmp_path / "x.npy").rename(tmp_path / "x.pt2")
        with pytest.raises(InvalidModel, match="whole archive"):
            load_model(str(tmp_path / "x.pt2"))
