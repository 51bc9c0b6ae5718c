"""Checkpoints on their way out of a sandbox and into the next: whole and known, or not at all."""

from __future__ import annotations

import resource

import pytest
import torch

from bitquota.context import MemoryLedger
from bitquota.errors import MeasurementFailed, TooLarge
from bitquota.progress import Progress
from bitquota.service.jobs.messages import Piece, Progressed, Whole
from bitquota.service.jobs.training_checkpoints import SentCheckpoints, sent_checkpoints
from bitquota.service.jobs.work import CHECKPOINT, PIECE_BYTES, Loaded, Work
from bitquota.service.store.blobs import BlobStore
from bitquota.service.worker.checkpoints import KeptCheckpoints

NAMES = ("learn.safetensors", "finetune.safetensors")


@pytest.fixture
def kept(tmp_path):
    """The driver's side of one job."""
    blobs = BlobStore(tmp_path / "blobs")
    made = KeptCheckpoints(
        tmp_path / "checkpoints" / "job", NAMES, blobs, limit=3 * PIECE_BYTES, total=4 * PIECE_BYTES
    )
    yield made
    made.close()


@pytest.fixture
def journalled(tmp_path):
    """The driver's side of a job whose kind names no checkpoints."""
    blobs = BlobStore(tmp_path / "blobs")
    made = KeptCheckpoints(
        tmp_path / "checkpoints" / "walk", (), blobs, limit=3 * PIECE_BYTES, total=4 * PIECE_BYTES
    )
    yield made
    made.close()


def work_of(scratch, send, inputs=None):
    return Work(
        request={},
        inputs=inputs or {},
        loaded=Loaded(),
        ledger=MemoryLedger(),
        send=send,
        cancelled=lambda: False,
        device="auto",
        scratch=scratch,
    )


class TestKeptCheckpoints:
    def test_the_next_attempt_gets_the_last_whole_one(self, kept):
        """What was on its way when the evaluator died is forgotten."""
        kept.piece([b"first"])
        kept.keep(NAMES[0])
        kept.piece([b"sec"])
        kept.close()
        (input_file,) = kept.input_files()
        assert input_file.path.read_bytes() == b"first"
        assert input_file.name.endswith(NAMES[0])
        kept.remove()
        assert kept.input_files() == ()

    @pytest.mark.parametrize("name", ["other.safetensors", "../../ledger.sqlite", ""])
    def test_only_known_names_are_kept(self, kept, tmp_path, name):
        """The evaluator ran a stranger's model: it cannot choose where bytes go."""
        kept.piece([b"anything"])
        with pytest.raises(MeasurementFailed, match=r"learn\.safetensors, finetune\.safetensors"):
            kept.keep(name)
        assert not list(tmp_path.rglob("incoming/*"))
        assert not (tmp_path / "checkpoints").exists()

    def test_is_limited(self, kept):
        """As a file of the evaluator itself is."""
        kept.piece([bytes(2 * PIECE_BYTES)])
        with pytest.raises(TooLarge):
            kept.piece([bytes(2 * PIECE_BYTES)])

    def test_all_together_are_limited(self, kept):
        """As the scratch folder is; a newer one takes the place of its elder."""
        for _ in range(3):
            kept.piece([bytes(PIECE_BYTES)] * 3)
            kept.keep(NAMES[0])
        kept.piece([bytes(PIECE_BYTES)] * 2)
        with pytest.raises(TooLarge, match="max_scratch_bytes"):
            kept.keep(NAMES[1])
        assert [file.path.name for file in kept.input_files()] == [NAMES[0]]

    @pytest.mark.parametrize(
        "name", [NAMES[0], f"{'a' * 32}-../../x", f"{'a' * 32}-", f"../{'a' * 32}-errors-1"]
    )
    def test_a_walk_keeps_files_of_a_journal(self, journalled, name):
        """Told from others by their form: how many there are is up to the model."""
        journalled.piece([b"anything"])
        with pytest.raises(MeasurementFailed, match="those of a journal"):
            journalled.keep(name)


class TestJournal:
    def test_the_next_attempt_reads_what_the_last_one_wrote(self, journalled, tmp_path):
        def send(message):
            match message:
                case Piece(data=data, checkpoint=True):
                    journalled.piece([data])
                case Whole(name=name, checkpoint=True):
                    journalled.keep(name)

        about = {"model": "sha256:1", "windows": 3}
        codes = bytes(PIECE_BYTES) + b"codes"
        (tmp_path / "first").mkdir()
        first = work_of(tmp_path / "first", send).context.journal.of(about)
        first.write("errors-1", lambda: b"early")
        first.write("rounded-0123456789abcdef-12", lambda: codes)
        first.write("errors-1", lambda: b"late")

        (tmp_path / "inbox").mkdir()
        given = [tmp_path / "inbox" / file.name for file in journalled.input_files()]
        for file, place in zip(journalled.input_files(), given, strict=True):
            place.write_bytes(file.path.read_bytes())
        (tmp_path / "second").mkdir()
        again = work_of(tmp_path / "second", send, {CHECKPOINT: list(map(str, given))})
        for _ in range(2):  # the context of each is asked for more than once
            second = again.context.journal.of(about)
            assert second.read("errors-1") == b"late"
            assert second.read("rounded-0123456789abcdef-12") == codes
        assert second.of({"model": "another"}).read("errors-1") is None


class TestSentCheckpoints:
    def test_what_was_written_arrives_once(self, kept, tmp_path):
        """After a step, in pieces; what an earlier attempt left is there and is not sent again."""
        sent = []

        def send(message):
            sent.append(type(message))
            match message:
                case Piece(data=data, checkpoint=True):
                    kept.piece([data])
                case Whole(name=name, checkpoint=True):
                    kept.keep(name)

        kept.piece([b"learned"])
        kept.keep(NAMES[0])
        (input_file,) = kept.input_files()
        given = tmp_path / input_file.name
        given.write_bytes(input_file.path.read_bytes())
        scratch = tmp_path / "work"
        scratch.mkdir()
        work = work_of(scratch, send, {input_file.role: [str(given)]})
        with sent_checkpoints(work, torch.nn.Linear(2, 2)) as checkpoints:
            assert checkpoints.path(NAMES[0]).read_bytes() == b"learned"
            step = Progress(stage="finetune", done=1, total=9)
            checkpoints.context.on_progress(step)
            assert sent == [Progressed]
            tuned = bytes(PIECE_BYTES) + b"tuned"
            checkpoints.path(NAMES[1]).write_bytes(tuned)
            for _ in range(2):
                checkpoints.context.on_progress(step)
            assert sent[1:] == [Piece] * 2 + [Whole] + [Progressed] * 2
            checkpoints.path(NAMES[1]).write_bytes(b"stopped")
        assert sent[-1] is Whole
        assert {b"learned", b"stopped"} == {p.path.read_bytes() for p in kept.input_files()}

    def test_a_model_too_large_for_one_is_trained_without(self, tmp_path, monkeypatch):
        """A file of an evaluator has a limit; the training must not fail at it."""
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
        work = work_of(tmp_path, lambda message: None)
        assert SentCheckpoints(work, torch.nn.Linear(4, 4)).path(NAMES[0]) is not None
        assert SentCheckpoints(work, torch.nn.Linear(40, 40)).path(NAMES[0]) is None
