"""Models without their weights: the same layers as of the loaded model, and nothing read."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquota.candidates.targets import TARGETS
from bitquota.errors import InvalidModel
from bitquota.models.discovery import discover
from bitquota.models.inspection import inspect_model
from bitquota.models.load import load_model, load_outline
from bitquota.models.outlines import DecidedByValues, has_values, outline, run_outline
from format_networks import tiny_net
from transformer_families import FAMILIES, write_family


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the Llama folder that a test may damage."""
    return shutil.copytree(llama_folder, tmp_path / "llama")


def change(folder, **tensors) -> None:
    """Replace tensors of a folder, or remove those that are ``None``."""
    file = folder / "model.safetensors"
    held = load_file(file) | tensors
    save_file({k: v for k, v in held.items() if v is not None}, file, metadata={"format": "pt"})


class TestLoadOutline:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", FAMILIES)
    def test_inspects_as_the_model_does(self, family, tmp_path):
        """Layers, ties, sizes and operations are those of the model with its weights."""
        path = write_family(family, tmp_path)
        target = TARGETS["ref-int"]
        whole = inspect_model(load_model(str(path)), target=target).to_json()
        found = load_outline(str(path))
        assert whole | {"model_digest": None} == inspect_model(found, target=target).to_json()
        assert not any(map(has_values, found.module.parameters()))

    def test_reads_no_weight(self, folder):
        """A weight that is NaN is found when it is read, and only then."""
        name = "model.layers.0.mlp.up_proj.weight"
        change(folder, **{name: torch.full((96, 64), torch.nan)})
        assert load_outline(str(folder)).digest == ""
        with pytest.raises(InvalidModel) as caught:
            load_model(str(folder))
        assert name == caught.value.details["tensor"]

    def test_missing_weight(self, folder):
        change(folder, **{"model.norm.weight": None})
        with pytest.raises(InvalidModel) as caught:
            load_outline(str(folder))
        assert ["model.norm.weight"] == caught.value.details["missing"]

    def test_wrong_shape(self, folder):
        change(folder, **{"model.norm.weight": torch.ones(63)})
        for load in (load_model, load_outline):
            with pytest.raises(InvalidModel, match=r"must be \[64\] and is \[63\]"):
                load(str(folder))

    def test_needs_values(self, llama_folder, monkeypatch):
        """A network that looks at values is loaded with them."""
        from transformers import LlamaForCausalLM

        plain = LlamaForCausalLM.forward

        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            assert bool((output.logits == output.logits).all())
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
        found = load_outline(str(llama_folder))
        assert load_model(str(llama_folder)).digest == found.digest

    def test_other_sources(self):
        """Anything but a folder is loaded as ever."""
        assert load_outline("format_networks:tiny_net").digest.startswith("sha256:")


_LEAN = """
import sys
from bitquota.models.lean_transformers import lean_transformers
from bitquota.models.load import load_outline
with lean_transformers():
    load_outline(sys.argv[1])
held = {"sympy", "scipy", "torch._dynamo", "torch.distributed.tensor"} & set(sys.modules)
import scipy, torch
assert torch.distributed.is_available() and torch._dynamo.optimize
sys.exit(f"imported {held}" if held else 0)
"""


class TestLeanTransformers:
    @pytest.mark.slow
    def test_imports_what_it_needs(self, llama_folder):
        """Neither compiler nor sympy, for import and forward pass; both can be imported later."""
        subprocess.run([sys.executable, "-c", _LEAN, str(llama_folder)], check=True)


class TestOutline:
    def test_of_convolutions(self):
        inputs = (torch.randn(2, 3, 8, 8),)
        whole = discover(tiny_net(), inputs, model_digest="")
        assert whole == discover(outline(tiny_net()), inputs, model_digest="")

    def test_keeps_ties(self):
        first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        second.weight = first.weight
        module = outline(torch.nn.Sequential(first, second))
        assert module[0].weight is module[1].weight
        assert module[0].bias is not module[1].bias

    def test_runs(self):
        module = outline(torch.nn.Linear(4, 3))
        with torch.no_grad(), run_outline(module):
            output = module(torch.randn(2, 4))
        assert (2, 3) == tuple(output.shape)
        assert not has_values(output)

    def test_decides_nothing(self):
        """Whoever asks for a value that depends on weights is told, and not that it is zero."""
        module = outline(torch.nn.Linear(4, 3))
        with torch.no_grad(), run_outline(module), pytest.raises(DecidedByValues):
            bool(module(torch.randn(2, 4)).sum() > 0)

    def test_leaves_other_modules_alone(self):
        module = torch.nn.Linear(4, 3)
        with run_outline(module):
            assert has_values(module(torch.randn(2, 4)))
