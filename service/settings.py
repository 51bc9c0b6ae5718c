"""Settings of the service: one frozen value, from ``BITQUOTA_*`` variables or from code."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bitquota.context import DEFAULT_MEMORY_BYTES
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "BITQUOTA_"
RENAMED = {"BITQUOTA_ALLOW_UNSANDBOXED_PT2": "BITQUOTA_DANGEROUSLY_RUN_CODE_OF_STRANGERS"}
"""Variables that are refused, with the name that each has now."""


def _setting(default: object, text: str, *, below: float | None = None) -> Any:  # noqa: ANN401
    """Return a dataclass field with its documentation and the smallest permitted value."""
    return field(default=default, metadata={"text": text, "below": below})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything an operator can set; the documentation is generated from the texts below."""

    host: str = _setting("127.0.0.1", "Address to listen on; others than loopback need API keys.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.", below=0)
    trusted_proxies: str = _setting(
        "",
        "Addresses or networks of reverse proxies, with commas, whose `X-Forwarded-For` and "
        "`X-Forwarded-Proto` are believed; empty believes nobody.",
    )
    oidc_issuer: str = _setting(
        "",
        "URL of an OpenID Connect issuer whose bearer tokens are accepted beside API keys, as its "
        "tokens write it; empty accepts none.",
    )
    oidc_audience: str = _setting("", "Audience that such a token must name.")
    oidc_tenant_claim: str = _setting("tenant", "Claim of such a token that names the tenant.")
    data_dir: Path = _setting(  # noqa: RUF009  # as in the lines around it
        Path("bitquota-data"), "Folder of the database, uploads, ledgers and results."
    )
    log_level: str = _setting("INFO", "`DEBUG`, `INFO`, `WARNING` or `ERROR`.")
    database_url: str = _setting(
        "", "SQLAlchemy URL; empty means the SQLite file `bitquota.db` in the data folder."
    )
    slots: int = _setting(1, "Jobs that run at the same time on this host.", below=0)
    reserve: bool = _setting(
        default=True,
        text="Keep a driver and an evaluator (some 500 MB) ready for the next job, so that it "
        "starts seconds earlier.",
    )
    database_password_file: str = _setting(
        "", "File with the password of `BITQUOTA_DATABASE_URL`, so that the URL need not hold it."
    )
    blob_url: str = _setting(
        "", "Where files lie for good, such as `s3://bucket/prefix`; empty is the data folder."
    )
    blob_cache_bytes: int = _setting(
        20 * 2**30, "Copies of such files that are kept in the data folder.", below=0
    )
    engine: str = _setting("local", "Where models run: `local`, or `ray` on a Ray cluster.")
    workers: int = _setting(
        1, "Processes (with `ray`, actors) that measure one job at the same time.", below=1
    )
    threads: int = _setting(
        0, "Threads of one worker; 0 shares the processor among slots and workers.", below=0
    )
    ray_address: str = _setting(
        "auto", "`host:port` of the cluster's head; `auto` is the cluster this host belongs to."
    )
    ray_token_file: str = _setting(
        "", "File with the cluster's token; empty leaves it to `RAY_AUTH_TOKEN_PATH`."
    )
    ray_gpus: float = _setting(
        0.0, "GPUs of one actor; half a one lets two actors share it.", below=0
    )
    ray_scratch: str = _setting(
        "", "Folder on every node for models and scratch space; empty is one in `/tmp`."
    )
    sandbox: str = _setting(
        "auto",
        "`auto` runs models under bubblewrap where it works, `require` fails without, `off` never.",
    )
    dangerously_run_code_of_strangers: bool = _setting(
        default=False,
        text="Run `.pt2` uploads of others without a sandbox: whoever finds a gap in the vetting "
        "of such files then owns this server and the data of every tenant.",
    )
    max_memory_bytes: int = _setting(
        0,
        "Memory of one job, all its processes together; 0 shares 80 % of the machine among slots.",
        below=0,
    )
    measuring_memory_bytes: int = _setting(
        DEFAULT_MEMORY_BYTES,
        "What the measurement of a job may keep in memory: activations beyond half of it go to "
        "files, and weights that would take more stay in theirs.",
        below=64 * 2**20,
    )
    max_processes: int = _setting(1024, "Processes and threads of one job.", below=16)
    max_tmp_bytes: int = _setting(
        2**30,
        "Bytes in `/tmp` and `/dev/shm` of one job's sandbox, each; part of its memory.",
        below=2**20,
    )
    max_scratch_bytes: int = _setting(
        32 * 2**30, "Bytes on disk that one job may write to its work folder.", below=2**20
    )
    max_scratch_files: int = _setting(
        100_000, "Files and folders in the work folder of one job.", below=1000
    )
    cgroup: str = _setting(
        "", "Folder of a delegated control group (v2); each job gets one below, with limits."
    )
    nice: int = _setting(5, "Niceness of drivers and evaluators, so that the API stays quick.")
    lease_s: float = _setting(
        15.0, "Seconds without a heartbeat after which a job is given to another driver.", below=1
    )
    heartbeat_s: float = _setting(0.5, "Seconds between two heartbeats of a driver.", below=0.05)
    grace_s: float = _setting(10.0, "Seconds a driver gets to stop by itself on shutdown.", below=0)
    max_job_s: float = _setting(
        86400.0, "Worker seconds after which a job is ended; 0 sets no limit.", below=0
    )
    max_stage_s: float = _setting(
        3600.0,
        "Seconds that one stage of a job may take without any progress; 0 sets no limit.",
        below=0,
    )
    max_attempts: int = _setting(
        5, "Attempts in a row without a new measurement before a job fails.", below=1
    )
    max_running: int = _setting(
        4, "Jobs of one tenant that run at the same time, unless its own quota says otherwise."
    )
    max_queued: int = _setting(
        1000, "Jobs of one tenant that wait, unless its own quota says otherwise."
    )
    max_stored_bytes: int = _setting(
        100 * 2**30, "Uploaded bytes of one tenant, unless its own quota says otherwise."
    )
    max_worker_s: float = _setting(
        7 * 86400.0,
        "Worker seconds of one tenant in 24 hours, unless its own quota says otherwise.",
    )
    webhook_allow_private: bool = _setting(
        default=False, text="Let webhooks go to addresses that are not public, and by plain http."
    )
    webhook_attempts: int = _setting(8, "Attempts to deliver one webhook.", below=1)
    webhook_retry_s: float = _setting(
        5.0, "Seconds until the second attempt; each further one waits twice as long.", below=0
    )
    webhook_deadline_s: float = _setting(
        10.0,
        "Seconds for one delivery, from looking up the name to the head of the answer.",
        below=0.1,
    )
    webhook_in_flight: int = _setting(
        4,
        "Deliveries of one tenant at the same time; twice as many go to one host, and 16 times as "
        "many in all.",
        below=1,
    )
    job_retention_s: float = _setting(
        90 * 86400.0, "Seconds after its end that a job is kept.", below=0
    )
    upload_retention_s: float = _setting(
        30 * 86400.0, "Seconds after its last use that an upload is kept.", below=0
    )
    collect_every_s: float = _setting(
        3600.0, "Seconds between two removals of what is no longer needed.", below=1
    )
    header_timeout_s: float = _setting(
        10.0, "Seconds within which the head of a request must have arrived.", below=0.1
    )
    min_body_rate: float = _setting(
        1024.0, "Bytes a second at which a body must arrive, over each 30 s.", below=0
    )
    max_connections: int = _setting(
        8192, "Connections at the same time, fewer where the system grants fewer files.", below=1
    )
    max_connections_per_address: int = _setting(
        512,
        "Of these, from one address (from one /64 of IPv6); 0, as behind a proxy, sets no limit.",
        below=0,
    )
    max_event_streams: int = _setting(
        64, "Event streams that one key may have open on one server.", below=1
    )
    max_upload_bytes: int = _setting(8 * 2**30, "Largest model or dataset.", below=1)
    max_body_bytes: int = _setting(
        2**20, "Largest request body, except uploads and `POST /v1/solve`.", below=1
    )
    max_solve_bytes: int = _setting(
        32 * 2**20, "Largest body of `POST /v1/solve`, which may hold a matrix.", below=1
    )
    max_unpacked_ratio: int = _setting(
        100, "Largest ratio of unpacked to stored size of an uploaded archive.", below=1
    )
    max_calibration_bytes: int = _setting(8 * 2**30, "Largest unpacked calibration set.", below=1)
    readers: int = _setting(
        2, "Processes that read uploads and draw charts, apart from the API's own.", below=1
    )
    solvers: int = _setting(2, "Processes that answer `POST /v1/solve`.", below=1)
    reader_memory_bytes: int = _setting(
        2 * 2**30, "Private memory of each of these processes.", below=256 * 2**20
    )
    reader_limit_s: float = _setting(60.0, "Seconds in which an upload must be read.", below=1)
    solver_limit_s: float = _setting(
        300.0, "Seconds in which one `POST /v1/solve` must be answered.", below=1
    )
    min_free_bytes: int = _setting(
        64 * 2**20, "Bytes of the data folder's disk that uploads must leave free.", below=0
    )

    def __post_init__(self) -> None:
        """Check every lower bound."""
        for entry in fields(self):
            below = entry.metadata["below"]
            value = getattr(self, entry.name)
            if below is not None and value < below:
                msg = f"{PREFIX}{entry.name.upper()} must be at least {below}; got {value}"
                raise InvalidInput(msg, setting=entry.name)
        _ = self.proxies
        if self.heartbeat_s * 3 > self.lease_s:
            msg = (
                "a lease must last at least three heartbeats; got lease_s="
                f"{self.lease_s}, heartbeat_s={self.heartbeat_s}"
            )
            raise InvalidInput(msg)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Return the settings that ``BITQUOTA_*`` variables give, defaults elsewhere.

        Raises:
            InvalidInput: A value cannot be read as its type, or is out of range; or a variable
                has another name now.
        """
        variables = os.environ if environment is None else environment
        for old, new in RENAMED.items():
            if old in variables:
                msg = f"{old} is not read any more: its name is {new} now, which says what it does"
                raise InvalidInput(msg, setting=old)
        values: dict[str, Any] = {}
        for entry in fields(cls):
            name = PREFIX + entry.name.upper()
            if name not in variables:
                continue
            text = variables[name]
            kind: type[Any] = type(entry.default)
            try:
                values[entry.name] = _BOOLEAN[text.lower()] if kind is bool else kind(text)
            except (ValueError, KeyError) as err:
                msg = f"{name} must be of type {kind.__name__}; got {text!r}"
                raise InvalidInput(msg, setting=entry.name) from err
        return cls(**values)

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which ``from_environment`` rebuilds this value."""
        return {PREFIX + e.name.upper(): str(getattr(self, e.name)) for e in fields(self)}

    @property
    def url(self) -> str:
        """The database URL in force."""
        if not self.database_url:
            return f"sqlite:///{self.data_dir.absolute() / 'bitquota.db'}"
        if not self.database_password_file:
            return self.database_url
        from sqlalchemy import make_url

        try:
            password = Path(self.database_password_file).read_text(encoding="utf-8").strip()
        except OSError as err:
            msg = (
                "BITQUOTA_DATABASE_PASSWORD_FILE must be a file that can be read; "
                f"'{self.database_password_file}': {err.strerror}"
            )
            raise InvalidInput(msg) from err
        return (
            make_url(self.database_url).set(password=password).render_as_string(hide_password=False)
        )

    @property
    def has_database(self) -> bool:
        """Whether there is a database: PostgreSQL, or the file of one that was made."""
        return bool(self.database_url) or (self.data_dir / "bitquota.db").is_file()

    @property
    def proxies(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        """The networks of ``trusted_proxies``; raises ``InvalidInput`` if they are none."""
        try:
            texts = [text.strip() for text in self.trusted_proxies.split(",")]
            return tuple(ipaddress.ip_network(text) for text in texts if text)
        except ValueError as err:
            msg = (
                "BITQUOTA_TRUSTED_PROXIES must be addresses or networks with commas between them, "
                f"such as 127.0.0.1,10.1.0.0/16; got '{self.trusted_proxies}' ({err})"
            )
            raise InvalidInput(msg, setting="trusted_proxies") from err

    @property
    def loopback(self) -> bool:
        """Whether this machine is all that is asked for: no proxy, and no tokens either."""
        if self.proxies or self.oidc_issuer:
            return False
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


_BOOLEAN = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def documentation() -> str:
    """Return the table of all settings as Markdown."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for entry in fields(Settings):
        default = f"`{entry.default}`" if entry.default != "" else "(empty)"
        lines.append(f"| `{PREFIX}{entry.name.upper()}` | {default} | {entry.metadata['text']} |")
    return "\n".join(lines) + "\n"
