"""Models as chains of blocks: the same output part by part, also with weights in their files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model, load_within
from bitquota.models.loaded import finish, inventory_of
from bitquota.models.stack import stack_of
from transformer_families import FAMILIES, write_family

TEXT = sorted(set(FAMILIES) - {"vit"})


def tokens(n: int = 4, length: int = 12) -> CalibrationSet:
    """Return random tokens of the families' vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return CalibrationSet(inputs=(torch.randint(3, 96, (n, length), generator=generator),))


def chain(model, samples):
    """Return a loaded model as a stack."""
    inventory = inventory_of(model.module, model, samples)
    layers = {layer.name: layer for layer in inventory.layers}
    return stack_of(model, model.module, layers, samples.first(2).inputs), layers


def run(stack, inputs):
    """Run a stack from part to part."""
    with torch.no_grad():
        value = stack.part(0)(*inputs)
        for k in range(1, len(stack)):
            value = stack.part(k)(value, *inputs)
    return value


class Odd(nn.Module):
    """Blocks of which the second reads what the first was given, not what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 8)

    def forward(self, ids):
        """Run."""
        x = self.embed(ids)
        return self.head(sum(block(x) for block in self.blocks))


class TestStackOf:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", TEXT)
    def test_parts_run_as_the_model_does(self, family, tmp_path):
        """With weights in memory to the last bit, with weights in their files the same again."""
        path = str(write_family(family, tmp_path))
        samples = tokens()
        model = load_model(path)
        stack, layers = chain(model, samples)
        with torch.no_grad():
            expected = model.module(*samples.inputs)
        assert torch.equal(run(stack, samples.inputs), expected)
        assert {name for part in stack.layers for name in part} == set(layers)
        paged = load_within(path, 1)
        assert paged.pages is not None
        assert paged.digest == model.digest
        assert torch.equal(run(chain(paged, samples)[0], samples.inputs), expected)

    def test_padding(self, llama_folder):
        """Masks reach every block, and padded positions answer zero."""
        mask = torch.ones(4, 12, dtype=torch.int64)
        mask[1, 7:] = 0
        model = load_model(str(llama_folder))
        ids = tokens().inputs[0] % 32
        samples = CalibrationSet(inputs=(ids, mask), names=("input_ids", "attention_mask"))
        stack, _ = chain(model, samples)
        with torch.no_grad():
            expected = model.module(*samples.inputs)
        assert torch.equal(run(stack, samples.inputs), expected)
        assert not expected[1, 7:].any()

    def test_blocks_side_by_side_are_no_chain(self):
        model = finish(Odd(), source="odd", architecture="Odd")
        samples = CalibrationSet(inputs=(torch.arange(8).reshape(2, 4),))
        assert chain(model, samples)[0] is None

    def test_a_put_weight_counts_for_one_part_alone(self, llama_folder):
        model = load_model(str(llama_folder))
        samples = CalibrationSet(inputs=(tokens().inputs[0] % 32,))
        stack, layers = chain(model, samples)
        layer = layers[stack.layers[1][0]]
        with torch.no_grad():
            given = stack.part(0)(*samples.inputs)
            part = stack.part(1)
            before = part(given, *samples.inputs)
            part.put(layer.weight_name, torch.zeros(layer.weight_shape))
            assert not torch.equal(part(given, *samples.inputs), before)
            assert torch.equal(stack.part(1)(given, *samples.inputs), before)


class TestPages:
    def test_memory_is_let_go(self, llama_folder):
        """What was read is read again, with the same values."""
        model = load_within(str(llama_folder), 1)
        name, tensor = next(iter(model.pages.tensors.items()))
        value, before = tensor.clone(), model.pages.bytes_read
        model.pages.release_tensor(tensor)
        assert model.pages.bytes_read == before + tensor.numel() * tensor.element_size()
        assert torch.equal(model.pages.tensors[name], value)

    def test_the_next_block_is_read_ahead(self, llama_folder, monkeypatch):
        """In the direction of the walk; reading a part twice changes nothing."""
        model = load_within(str(llama_folder), 1)
        stack, _ = chain(model, CalibrationSet(inputs=(tokens().inputs[0] % 32,)))
        blocks = [model.module.get_submodule(name) for name in stack.blocks]
        assert len(blocks) > 1
        asked = []
        prefetch = model.pages.prefetch
        monkeypatch.setattr(
            model.pages, "prefetch", lambda block: (asked.append(block), prefetch(block))
        )
        walked = range(len(stack))
        for k in walked:
            stack.part(k), stack.part(k)
        assert asked == blocks[1:]
        asked.clear()
        for k in reversed(walked):
            stack.part(k)
        assert asked == blocks[-2::-1]

    def test_what_fits_is_loaded(self, llama_folder):
        assert load_within(str(llama_folder), 2**30).pages is None
