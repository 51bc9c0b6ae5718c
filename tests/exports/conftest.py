"""Models that are exported, each loaded once."""

from __future__ import annotations

import pytest

from bitquota.models.load import load_model
from onnx_graphs import image_graph, token_graph


@pytest.fixture(scope="session")
def net():
    """The tiny convolutional network."""
    return load_model("format_networks:tiny_net")


@pytest.fixture(scope="session")
def llama(llama_folder):
    """The tiny Llama."""
    return load_model(str(llama_folder))


@pytest.fixture(scope="session")
def onnx_images(tmp_path_factory):
    """An ONNX file that torch never saw."""
    return load_model(str(image_graph(tmp_path_factory.mktemp("onnx") / "m.onnx")))


@pytest.fixture(scope="session")
def onnx_tokens(tmp_path_factory):
    """Another one, with a tied embedding."""
    return load_model(str(token_graph(tmp_path_factory.mktemp("onnx") / "m.onnx")))


@pytest.fixture(scope="session")
def tied():
    """A torch model with a tied head whose products have and have not a bias."""
    return load_model("format_networks:tied_tokens")


@pytest.fixture(scope="session", autouse=True)
def _many_exports(operators_read_once):
    """Every file here exports torch models."""
