"""Models whose weights stay in files are exported and evaluated as the loaded ones are."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.context import Context
from bitquota.evaluate.scoring import score_plans
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model, load_within
from bitquota.models.loaded import in_memory
from bitquota.models.on_demand import on_demand
from bitquota.models.tensor_files import write_tensors
from bitquota.quantizers.planned import runs_from_files
from bitquota.quantizers.quantized_model import QuantizedModel, named
from bitquota.quantizers.quantized_weights import QuantizedWeights
from export_cases import TOKENS
from format_networks import plan_with
from transformer_families import FAMILIES, write_family

CPU = Context(device="cpu")
TARGETS = ["gguf-py", "ct-vllm-humming", "ct-vllm-nvfp4", "mlx"]


def with_weights(model, plan, folder):
    """Return a plan with its codes in a file, and the file."""
    stored = QuantizedWeights(model.module, plan.inventory).stored
    content = QuantizedModel(
        model_digest=model.digest,
        rounding="qep",
        weights={
            a.layer.name: stored(a.candidate)
            for a in plan.assignments
            if a.candidate.weight_bits != FULL_PRECISION_BITS
        },
    ).to_bytes()
    path = folder / "plan.weights.safetensors"
    path.write_bytes(content)
    return replace(plan, weights=named(content, "qep")), path


@pytest.fixture(scope="module")
def half_folder(llama_folder, tmp_path_factory):
    """The tiny Llama as most checkpoints are, in bfloat16."""
    import transformers

    folder = tmp_path_factory.mktemp("half") / "llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


def both(folder, target, place):
    """Return a model in memory and in files, with the codes of a plan, and the plan."""
    whole = load_model(folder)
    plan, path = with_weights(whole, plan_with(whole, TOKENS.inputs, target=target, seed=3), place)
    return (*(replace(m, weights=(path,)) for m in (whole, load_within(folder, 1))), plan)


class TestExport:
    @pytest.mark.parametrize("target", TARGETS)
    def test_files_are_those_of_the_loaded_model(self, half_folder, target, tmp_path):
        """To the last bit; they are read back layer by layer and compute what the plan does."""
        whole, paged, plan = both(half_folder, target, tmp_path)
        assert runs_from_files(plan, paged)
        reports = {
            name: export_plan(model, plan, tmp_path / name, target=target, samples=TOKENS)
            for name, model in (("whole", whole), ("paged", paged))
        }
        assert reports["paged"].files == reports["whole"].files
        assert reports["paged"].tensors == reports["whole"].tensors
        if target != "mlx" or importlib.util.find_spec("mlx_lm"):
            assert reports["paged"].difference.relative < 1e-3
            assert reports["paged"].difference.n_samples == len(TOKENS)

    def test_a_wrong_file_is_found(self, half_folder, tmp_path, monkeypatch):
        """What is compared was read from the file, not taken from the plan."""
        from bitquota.errors import ExportFailed
        from bitquota.exports import gguf_file

        _, paged, plan = both(half_folder, "gguf-py", tmp_path)
        blocks = gguf_file.blocks_of
        monkeypatch.setattr(gguf_file, "blocks_of", lambda w, order: blocks(w, order)[::-1].copy())
        with pytest.raises(ExportFailed, match="what fake-quantization computes"):
            export_plan(paged, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)

    def test_other_formats_load_the_model(self, half_folder, tmp_path):
        whole, paged, plan = both(half_folder, "ref-int", tmp_path)
        for name, model in (("whole", whole), ("paged", paged)):
            export_plan(model, plan, tmp_path / name, target="ref-int", samples=TOKENS)
        first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "paged"))
        assert first.read_bytes() == second.read_bytes()


class TestEvaluate:
    def test_scores_are_those_of_the_loaded_model(self, half_folder, tmp_path):
        """Of full precision, the plan and the exported file."""
        whole, paged, plan = both(half_folder, "gguf-py", tmp_path)
        export_plan(whole, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        given = {"plans": {"plan": plan}, "exported": (tmp_path / "o",)}
        found = [
            [score.to_json() for score in score_plans(model, TOKENS, context=CPU, **given)]
            for model in (whole, paged)
        ]
        assert found[0] == found[1]
        assert len(found[0]) == 3
        assert paged.pages.bytes_read > 0

    @pytest.mark.parametrize(("memory", "n_samples"), [(2**14, 6), (2**24, 70)])
    def test_blocks_are_read_once_for_all_batches(
        self, half_folder, tmp_path, monkeypatch, memory, n_samples
    ):
        """Of all that is compared, whether the last parts fit into the memory or not."""
        whole, paged, plan = both(half_folder, "gguf-py", tmp_path)
        export_plan(whole, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        tokens = torch.randint(0, 32, (n_samples, 9), generator=torch.Generator().manual_seed(4))
        read, told = [], []
        release = paged.pages.release_tensor

        def note(tensor, read_bytes=None):
            # Before anything is told, a few samples show what the outputs are.
            read.extend([tensor.data_ptr()] if told else [])
            release(tensor, read_bytes)

        monkeypatch.setattr(paged.pages, "release_tensor", note)
        found = []
        for model in (whole, paged):
            told.clear()
            context = Context(device="cpu", memory_bytes=memory, on_progress=told.append)
            found.append(
                score_plans(
                    model,
                    CalibrationSet(inputs=(tokens,)),
                    plans={"plan": plan},
                    exported=(tmp_path / "o",),
                    context=context,
                )
            )
        assert found[0] == found[1]
        blocks = [t.data_ptr() for n, t in paged.pages.tensors.items() if "layers" in n]
        assert blocks
        assert {read.count(place) for place in blocks} == {1}
        # Parts and batches are the steps of one comparison.
        assert told[-1].total > 3
        assert [step.done for step in told] == list(range(1, told[-1].total + 1))


class TestOnDemand:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
    def test_computes_what_the_loaded_model_does(self, family, tmp_path):
        """In every family to the last bit, and holds nothing between two calls."""
        path = str(write_family(family, tmp_path))
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, 96, (2, 12), generator=generator)
        paged = load_within(path, 1)
        module = on_demand(paged)
        with torch.no_grad():
            assert torch.equal(module(tokens), load_model(path).module(tokens))
            assert torch.equal(in_memory(paged).module(tokens), module(tokens))
        own = {name: p.data_ptr() for name, p in paged.module.named_parameters()}
        assert {name: p.data_ptr() for name, p in module.named_parameters()} == own

    def test_other_values_are_read_when_they_are_needed(self, half_folder):
        paged = load_within(half_folder, 1)
        read = []

        name, own = next((n, p) for n, p in paged.module.named_parameters() if p.ndim == 1)

        def zeros():
            read.append(1)
            return torch.zeros(own.shape)

        module = on_demand(paged, {name: zeros})
        with torch.no_grad():
            before, after = on_demand(paged)(TOKENS.inputs[0]), module(TOKENS.inputs[0])
        assert len(read) == 1
        assert not torch.equal(before, after)


class TestWriteTensors:
    def test_bytes_are_those_of_safetensors(self, tmp_path):
        """Types in its order, and a header of any length."""
        dtypes = (
            torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn,
            torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
            torch.float64, torch.int64,
        )  # fmt: skip
        tensors = {
            f"{k % 5}.ä{'x' * k}": torch.arange(2 * k + 1).to(torch.int32).to(dtype).reshape(1, -1)
            for k, dtype in enumerate(dtypes)
        } | {"none": torch.zeros(0, 3), "one": torch.tensor(1.5)}
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        with (tmp_path / "ours").open("wb") as file:
            write_tensors(file, iter(tensors.items()), metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
