"""Families of transformers: whatever ships and takes one input is measured, all else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from bitquota.errors import InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.inspection import inspect_model
from bitquota.models.load import load_model, load_outline
from bitquota.models.transformer_classes import answer_of, check_parts, model_class
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from transformer_families import FAMILIES, write_family

NEW = ("gpt_oss", "deepseek_v3", "exaone4", "lfm2", "mamba")
"""Of these no file of ours speaks: mixtures of experts, sliding windows, convolutions, a state."""

TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def named(model_type: str, architecture: str):
    """Return the class that a config names."""
    return model_class({"model_type": model_type, "architectures": [architecture]}, Path("folder"))


class TestModelClass:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_families(self, family):
        assert FAMILIES[family][0] == named(family, FAMILIES[family][0]).__name__

    @pytest.mark.parametrize(
        ("model_type", "architecture", "sentence"),
        [
            ("t5", "T5ForConditionalGeneration", "decoder_input_ids"),
            ("clip", "CLIPModel", "input_ids, pixel_values"),
            ("llava", "LlavaForConditionalGeneration", "pixel_values"),
            ("whisper", "WhisperForConditionalGeneration", "input_features"),
            ("wav2vec2", "Wav2Vec2ForCTC", "input_values"),
            ("layoutlm", "LayoutLMModel", "bbox"),
        ],
    )
    def test_more_than_one_input(self, model_type, architecture, sentence):
        """A part that no sample reaches would seem to cost nothing."""
        with pytest.raises(InvalidModel, match=f"alone; '{architecture}' does not.*{sentence}"):
            named(model_type, architecture)

    @pytest.mark.parametrize(
        ("model_type", "architecture"),
        [
            ("llama", "LlamaConfig"), ("llama", "os.system"), ("llama", "PreTrainedModel"),
            ("llama", "AutoModelForCausalLM"), ("llama", "pipeline"),
        ],
    )  # fmt: skip
    def test_what_is_no_model_of_transformers(self, model_type, architecture):
        with pytest.raises(InvalidModel, match="must have the class"):
            named(model_type, architecture)


class TestCheckParts:
    def test_decoder_of_two(self):
        """Its attention to the encoder would not run."""
        config = transformers.BartConfig(
            vocab_size=32, d_model=16, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        )  # fmt: skip
        model = transformers.BartForCausalLM(config)
        with pytest.raises(InvalidModel, match="encoder_attn.*attends to another network"):
            check_parts(model, "bart")

    def test_attention_of_its_own(self):
        config = transformers.BertConfig(**TINY, vocab_size=32, intermediate_size=16)
        check_parts(transformers.BertForMaskedLM(config), "bert")


class TestAnswers:
    def test_detector(self):
        """Boxes beside the classes would be measured by nothing."""
        config = transformers.YolosConfig(
            **TINY, intermediate_size=16, image_size=[32, 32], patch_size=8,
            num_detection_tokens=2,
        )  # fmt: skip
        output = transformers.YolosForObjectDetection(config)(torch.zeros(1, 3, 32, 32))
        with pytest.raises(InvalidModel, match="pred_boxes too"):
            answer_of(output)

    def test_neither_logits_nor_states(self):
        config = transformers.BertConfig(**TINY, vocab_size=32, intermediate_size=16)
        output = transformers.BertForQuestionAnswering(config)(torch.ones(1, 4, dtype=torch.long))
        with pytest.raises(InvalidModel, match="returns start_logits, end_logits"):
            answer_of(output)


class TestNewFamilies:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", NEW)
    def test_is_measured(self, family, tmp_path):
        """The same logits as transformers', and a plan within its budget whose loss is finite."""
        path = write_family(family, tmp_path)
        model = load_model(str(path))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 96, (16, 12), generator=generator)
        own = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        with torch.no_grad():
            expected = own.eval()(tokens).logits
            torch.testing.assert_close(expected, model.module(tokens))
        request = PlanRequest(
            budgets=("4 bits",), samples=8, holdout_samples=8, effort="quick", refine=False
        )
        (plan,) = allocate(model, CalibrationSet(inputs=(tokens,)), request).plans
        assert plan.average_bits <= 4
        assert plan.measured.mean >= 0


class TestUnreadWeights:
    @pytest.mark.parametrize("load", [load_model, load_outline])
    def test_stay_as_they_are(self, tmp_path, load):
        """Longformer's global attention does not run without global tokens; a plan leaves it."""
        torch.manual_seed(0)
        config = transformers.LongformerConfig(
            **TINY, vocab_size=32, intermediate_size=16, attention_window=[4],
            max_position_embeddings=64,
        )  # fmt: skip
        transformers.LongformerForMaskedLM(config).save_pretrained(tmp_path)
        found = inspect_model(load(str(tmp_path)))
        kept = {t.name: t.reason for t in found.inventory.unquantized if "_global" in t.name}
        name = "longformer.encoder.layer.0.attention.self.query_global.weight"
        assert "not used by the sample that was run" == kept[name]
        assert not [la.name for la in found.inventory.layers if "_global" in la.name]
        assert [la.name for la in found.inventory.layers if la.name.endswith("self.query")]
