"""Jobs that measure leave the weights of large models in their files."""

from __future__ import annotations

from bitquota.context import MemoryLedger
from bitquota.service.jobs.work import Loaded, Work
from transformer_families import write_family


def work(folder, memory_bytes):
    """Return the work of a job on the model in a folder."""
    return Work(
        request={},
        inputs={"model": [str(folder)]},
        loaded=Loaded(),
        ledger=MemoryLedger(),
        send=lambda message: None,
        cancelled=lambda: False,
        device="cpu",
        scratch=folder,
        memory_bytes=memory_bytes,
    )


def test_what_may_be_kept_in_memory_says_where_weights_are(tmp_path):
    folder = write_family("llama", tmp_path)
    small, large = work(folder, 1), work(folder, 2**30)
    assert small.measured_model().pages is not None
    assert large.measured_model().pages is None
    assert small.context.memory_bytes == 1
    # What is evaluated or exported is loaded as a whole.
    assert work(folder, 1).model().pages is None
    assert small.measured_model().digest == large.measured_model().digest
