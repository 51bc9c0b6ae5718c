"""A plan of a language model that is killed at any block goes on from there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from bitquota.journal import KEPT_DAYS, Journal
from transformer_families import write_family

PLAN = """
import os, signal, sys
from pathlib import Path

import torch

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.context import Context
from bitquota.journal import Journal
from bitquota.models.samples import load_calibration
from bitquota.models.load import load_model
from bitquota.quantizers.stacked import StackedWeights
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.sensitivity.metrics import stack_backwards

folder, samples, whole, killed = sys.argv[1:5]
torch.set_num_threads(1)
place, last, done = Path(), 0, 0


def watched(name, function):
    def run(*args):
        global done
        done += 1
        if done == -last:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a block
        found = function(*args)
        with (place / "log").open("a") as log:
            log.write(f"{name} {args[1]} {args[-1] if name == 'gradients' else ''}\\n")
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)  # between two
        return found

    return run


StackedWeights._write_down = watched("errors", StackedWeights._write_down)
StackedWeights.write_down_rounded = watched("rounded", StackedWeights.write_down_rounded)
stack_backwards._write_down = watched("gradients", stack_backwards._write_down)
request = PlanRequest(
    budgets=("3 bits",),
    kv_bits=(4, 8),
    context=16,
    weight_bits=(2, 3, 4),
    scheme=Scheme(granularity=Granularity.GROUP, group_size=16, scale_format=ScaleFormat.FP16),
    samples=16,
    holdout_samples=16,
    effort="quick",
)
for place, last in ((whole, 0), *((killed, int(last)) for last in sys.argv[5:])):
    place = Path(place)
    place.mkdir(exist_ok=True)
    # Forks of a process that has imported and compiled everything.
    process = os.fork() if done else 0
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code == (-signal.SIGKILL if last else 0), (place, last, code)
        continue
    done = 0
    with SqliteLedger(place / "ledger") as ledger:
        def tell(progress):
            with (place / "progress").open("a") as log:
                log.write(f"{progress.stage} {progress.fraction}\\n")

        journal = Journal(place / "unfinished")
        context = Context(
            ledger=ledger, journal=journal, on_progress=tell, processes=2 if last else 1
        )
        found = allocate(load_model(folder), load_calibration(samples), request, context=context)
    found.plans[0].save(place / "plan.json")
    if place != Path(whole):
        os._exit(0)
"""


@pytest.mark.slow
def test_goes_on_where_it_was_killed(tmp_path):
    """Killed five times at different blocks: the same plan, and nothing was done twice.

    The two processes that share the batches until then make no difference.
    """
    folder = write_family("llama", tmp_path / "model")
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 96, (32, 12), generator=generator)
    save_file({"input_ids": tokens}, tmp_path / "samples.safetensors")

    killed = tmp_path / "killed"
    command = [sys.executable, "-c", PLAN, folder, tmp_path / "samples.safetensors"]
    places = [tmp_path / "whole", killed, 2, -2, 3, -4, 6, 0]
    subprocess.run([*map(str, command), *map(str, places)], check=True)
    logs = [(place / "log").read_text().splitlines() for place in (tmp_path / "whole", killed)]
    assert sorted(logs[0]) == sorted(logs[1])
    plans = [json.loads((p / "plan.json").read_text()) for p in (tmp_path / "whole", killed)]
    assert plans[0] == plans[1]
    assert not list((killed / "unfinished").iterdir())

    # The bar moves while layers are looked at, scored and rounded, part after part.
    lines = (tmp_path / "whole" / "progress").read_text().splitlines()
    told = [line.rsplit(" ", 1) for line in lines]
    fractions = [float(fraction) for _, fraction in told]
    assert fractions == sorted(fractions)
    of = {s: [float(f) for stage, f in told if stage == s] for s, _ in told}
    for before, stage in itertools.pairwise(("candidates", "gram_weighted", "rounding")):
        assert of[before][-1] < of[stage][-1]
        assert len(set(of[stage][:4])) > 2


class TestJournal:
    def test_keeps_what_was_written_last(self, tmp_path):
        journal = Journal(tmp_path).of({"model": 1})
        assert journal.read("a") is None
        journal.write("a", lambda: b"first")
        journal.write("a", lambda: b"second")
        assert journal.read("a") == b"second"
        assert Journal(tmp_path).of({"model": 2}).read("a") is None
        journal.finish()
        assert not list(tmp_path.iterdir())

    def test_without_a_folder_nothing_is_kept(self):
        journal = Journal().of({"model": 1})
        journal.write("a", lambda: b"1")
        journal.finish()
        assert journal.read("a") is None

    def test_abandoned_ones_are_deleted(self, tmp_path):
        """But not those that somebody may go on with."""
        old, new = (Journal(tmp_path).of({"model": k}) for k in (1, 2))
        for journal in (old, new):
            journal.write("a", lambda: b"1")
        long_ago = old.folder.stat().st_mtime - (KEPT_DAYS + 1) * 86400
        os.utime(old.folder, (long_ago, long_ago))
        Journal(tmp_path).clear_abandoned()
        assert old.read("a") is None
        assert new.read("a") == b"1"

    def test_a_full_disk_is_told_once_and_ends_nothing(self, tmp_path):
        """What was written before stays, and no half of anything."""
        told = []
        journal = Journal(tmp_path, tell=told.append).of({"model": 1})
        journal.write("a", lambda: b"1")
        (journal.folder / f"b.{os.getpid()}.part").symlink_to("/dev/full")
        journal.write("b", lambda: b"2")
        journal.write("c", lambda: b"3")
        assert len(told) == 1
        assert "No space left on device" in told[0]
        assert [file.name for file in journal.folder.iterdir()] == ["a"]

    def test_a_folder_deleted_by_another_process_ends_nothing(self, tmp_path, monkeypatch):
        """As by one with the same request that ends while this one writes."""
        told = []
        journal = Journal(tmp_path, tell=told.append).of({"model": 1})

        def and_then_it_goes(descriptor):
            fsync(descriptor)
            shutil.rmtree(journal.folder)

        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", and_then_it_goes)
        journal.write("a", lambda: b"1")
        assert len(told) == 1
        assert journal.read("a") is None

    def test_the_library_warns(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.warns(UserWarning, match="Not a directory"):
            Journal(tmp_path / "file" / "journal").write("a", lambda: b"1")

    def test_abandoned_ones_that_go_meanwhile_are_passed_over(self, tmp_path):
        """A link to nothing fails as a folder does that was just deleted."""
        (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
        old = Journal(tmp_path).of({"model": 1})
        old.write("a", lambda: b"1")
        long_ago = old.folder.stat().st_mtime - (KEPT_DAYS + 1) * 86400
        os.utime(old.folder, (long_ago, long_ago))
        Journal(tmp_path).clear_abandoned()
        assert old.read("a") is None
        Journal(tmp_path / "nowhere").clear_abandoned()
