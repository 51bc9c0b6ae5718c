from __future__ import annotations

import pytest

from live_server import LiveServer, train_and_export


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory):
    """A trained network as .pt2 and its calibration set as .npz."""
    return train_and_export(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests of a module that leave it running."""
    with LiveServer(tmp_path_factory.mktemp("server") / "data") as running:
        yield running
