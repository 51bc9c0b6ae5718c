"""Where a command measures on this machine: its samples, its ledger, its memory.

Design: docs/design/client.md
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.candidates.budget import parse_bytes
from bitquota.cli import output
from bitquota.cli.loading import check_sources, load_samples
from bitquota.context import DEFAULT_MEMORY_BYTES, Context
from bitquota.errors import InvalidInput
from bitquota.journal import Journal
from bitquota.models.sources import cache_folder
from bitquota.sensitivity.cache import SqliteLedger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

LEAST_MEMORY_BYTES = 2**26


def default_ledger() -> Path:
    """Return the ledger in the user's cache folder."""
    return cache_folder() / "ledger.sqlite"


def memory_limit(text: str | None) -> int:
    """Return what ``--memory`` says, in bytes; raises ``InvalidInput``."""
    limit = DEFAULT_MEMORY_BYTES if text is None else parse_bytes(text)
    if limit < LEAST_MEMORY_BYTES:
        msg = f"--memory must be at least 64 MiB; got '{text}'"
        raise InvalidInput(msg, memory=str(text))
    return limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """How and where a command measures on this machine.

    Attributes:
        tokenizer: For texts.
        length: For texts: tokens per sample.
        mix: Further calibration sets.
        shares: Of all sets among the samples, as text; ``None`` for equal ones.
        device: Where the model runs.
        ledger: Where measurements are kept, or ``None`` for the cache folder.
        imatrix: Importance matrix, or ``None``.
        memory: What a measurement may keep in memory, or ``None`` for 1 GiB.
        processes: How many share the batches of a language model.
        server: Where to run instead, or ``None``: then all of the above is the server's.
        api_key: For the server.
    """

    tokenizer: str | None
    length: int
    mix: list[str] | None
    shares: str | None
    device: str
    ledger: Path | None
    imatrix: Path | None
    memory: str | None
    processes: int
    server: str | None
    api_key: str | None

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        local: dict[str, object] = {
            "--imatrix": self.imatrix,
            "--tokenizer": self.tokenizer,
            "--mix": self.mix,
            "--ledger": self.ledger,
            "--device": None if self.device == "auto" else self.device,
            "--memory": self.memory,
            "--processes": self.processes > 1,
        }
        given = [name for name, value in local.items() if value]
        memory_limit(self.memory)
        if self.server is not None and given:
            named = " and ".join(given)
            msg = f"{named} is used on this machine only; leave --server out, or {named}"
            raise InvalidInput(msg)

    @property
    def parts(self) -> list[float]:
        """The share of each calibration set; raises ``InvalidInput``."""
        n = 1 + len(self.mix or ())
        if self.shares is None:
            return [1.0] * n
        try:
            found = [float(part) for part in self.shares.split(",")]
        except ValueError:
            found = []
        if len(found) != n or not all(0 < share < float("inf") for share in found):
            msg = (
                f"--shares must be a positive number for CALIBRATION and each --mix, here {n}, "
                f"separated by commas; got '{self.shares}'"
            )
            raise InvalidInput(msg, shares=self.shares)
        return found

    @property
    def memory_bytes(self) -> int:
        """What a measurement may keep in memory; raises ``InvalidInput`` if it cannot be read."""
        return memory_limit(self.memory)

    def check(self, model: str, calibration: str) -> None:
        """Raise what can be told of a model and its samples before anything is loaded."""
        _ = self.parts
        check_sources(
            model,
            calibration,
            *(self.mix or ()),
            tokenizer=self.tokenizer,
            imatrix=self.imatrix,
            server=self.server,
        )

    def load(self, model: str, calibration: str) -> tuple[LoadedModel, CalibrationSet]:
        """Load a model and its samples; a device that is not there is told before."""
        from bitquota.models.load import load_within
        from bitquota.models.mixing import mixed
        from bitquota.models.running import choose_device

        choose_device(self.device)
        loaded = replace(load_within(model, self.memory_bytes), imatrix=self.imatrix)
        sets = [
            load_samples(spec, model=model, tokenizer=self.tokenizer, length=self.length)
            for spec in (calibration, *(self.mix or ()))
        ]
        return loaded, mixed(sets, self.parts)

    @contextmanager
    def measuring(self) -> Iterator[Context]:
        """Open the ledger and show progress; yields the context of a measurement."""
        place = self.ledger or default_ledger()
        place.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(place.with_name(f"{place.name}.unfinished"), tell=output.say)
        journal.clear_abandoned()
        with (
            SqliteLedger(place) as kept,
            output.shown_progress() as on_progress,
        ):
            if kept.superseded:
                output.say(
                    f"{kept.superseded:,} measurements in {place} are of a release that told "
                    "models apart by their weights alone; they are not used again: delete the "
                    "file to free its space"
                )
            try:
                yield Context(
                    ledger=kept,
                    on_progress=on_progress,
                    device=self.device,
                    memory_bytes=self.memory_bytes,
                    processes=self.processes,
                    journal=journal,
                )
            except KeyboardInterrupt:
                output.say(f"what was measured is in {place}: the same command goes on from there")
                raise
        output.say_use()
