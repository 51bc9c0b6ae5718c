"""``bitquota admin``: API keys, quotas, jobs, garbage collection, backups and a health check.

It works on the database and the data folder that ``BITQUOTA_*`` variables name, beside running
servers.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquota.errors import InvalidInput
from bitquota.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitquota.service.store.database import Database

app = typer.Typer(help="Administer a server: keys, quotas, jobs, files.", no_args_is_help=True)
keys = typer.Typer(help="API keys.", no_args_is_help=True)
quotas = typer.Typer(help="Limits of tenants.", no_args_is_help=True)
jobs = typer.Typer(help="Jobs of all tenants.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(quotas, name="quotas")
app.add_typer(jobs, name="jobs")

_DAY_S = 86400.0
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="The server's folder; or BITQUOTA_DATA_DIR.")
]


def _settings(data_dir: Path | None) -> Settings:
    settings = Settings.from_environment()
    return settings if data_dir is None else replace(settings, data_dir=data_dir)


@contextlib.contextmanager
def _opened(
    data_dir: Path | None, *, make: bool = False, upgrade: bool = True
) -> Iterator[tuple[Settings, Database]]:
    """Yield settings and database of a server that has run, or with ``make`` will run, here.

    The database is brought to the form of this release, unless ``upgrade`` is off.

    Raises:
        InvalidInput: There is no database, and none should be made: a folder that was mistyped
            must not become an empty server.
    """
    from bitquota.service.store.database import Database

    settings = _settings(data_dir)
    if make:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    elif not settings.has_database:
        msg = (
            f"a server's data must exist to be administered; '{settings.data_dir}' holds none: "
            "name its folder with --data-dir or BITQUOTA_DATA_DIR"
        )
        raise InvalidInput(msg, path=str(settings.data_dir))
    database = Database(settings.url)
    try:
        if upgrade:
            database.create()
        yield settings, database
    finally:
        database.close()


def _say(value: Any) -> None:  # noqa: ANN401  # anything that JSON can hold
    typer.echo(json.dumps(value, ensure_ascii=False, default=sorted))


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Tenant the key is for.")],
    name: Annotated[
        str, typer.Option("--name", help="Name to distinguish it from other keys.")
    ] = "",
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="read or write (default: both). Repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option("--days", help="Days until it expires.")] = None,
    max_priority: Annotated[
        int, typer.Option("--max-priority", help="Highest priority of the jobs it submits.")
    ] = 0,
    if_none: Annotated[  # noqa: FBT002  # Typer makes an option of it
        bool, typer.Option("--if-none", help="Do nothing where there is a key, of any tenant.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Create a key and print it; it is shown only once and stored as a hash."""
    from bitquota.service.security.keys import KeyStore, Scope

    try:
        scopes = [Scope(s) for s in scope] if scope else list(Scope)
    except ValueError as err:
        msg = f"a scope must be one of {', '.join(Scope)}; got {scope}"
        raise InvalidInput(msg) from err
    with _opened(data_dir, make=True) as (_, database):
        store = KeyStore(database, time.time)
        if if_none and store.any():
            typer.echo("no key was made: there is one already", err=True)
            return
        lifetime_s = None if days is None else days * _DAY_S
        key, text = store.create(
            tenant, name=name, scopes=scopes, lifetime_s=lifetime_s, max_priority=max_priority
        )
    _say(
        {
            "id": key.id,
            "tenant": tenant,
            "scopes": key.scopes,
            "max_priority": key.max_priority,
            "key": text,
        }
    )


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Show only this tenant.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Print one line of JSON per key, without its secret."""
    from dataclasses import asdict

    from bitquota.service.security.keys import KeyStore

    whose = "" if tenant is None else f" of tenant '{tenant}'"
    settings = _settings(data_dir)
    if not settings.has_database:
        typer.echo(f"no keys{whose}: there is no server's data in {settings.data_dir}", err=True)
        return
    with _opened(data_dir) as (_, database):
        found = KeyStore(database, time.time).list(tenant)
    for key in found:
        _say(asdict(key))
    if not found:
        typer.echo(f"no keys{whose}: 'bitquota admin keys create TENANT' makes one", err=True)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Id of the key.")], data_dir: DataDir = None
) -> None:
    """Revoke a key now."""
    from bitquota.service.security.keys import KeyStore

    with _opened(data_dir) as (_, database):
        KeyStore(database, time.time).revoke(key_id)


@keys.command("rotate")
def rotate_key(
    key_id: Annotated[str, typer.Argument(help="Id of the key.")],
    overlap_days: Annotated[
        float, typer.Option("--overlap-days", help="Days during which the old key still works.")
    ] = 1.0,
    data_dir: DataDir = None,
) -> None:
    """Replace a key with a new one that has the same rights, and print it."""
    from bitquota.service.security.keys import KeyStore

    with _opened(data_dir) as (_, database):
        store = KeyStore(database, time.time)
        key, text = store.rotate(key_id, overlap_s=overlap_days * _DAY_S)
    _say({"id": key.id, "tenant": key.tenant, "scopes": key.scopes, "key": text})


@quotas.command("set")
def set_quota(
    tenant: Annotated[str, typer.Argument(help="Tenant whose limits to set.")],
    max_running: Annotated[int | None, typer.Option(help="Jobs that run at the same time.")] = None,
    max_queued: Annotated[int | None, typer.Option(help="Jobs that wait.")] = None,
    max_stored_bytes: Annotated[int | None, typer.Option(help="Bytes of all uploads.")] = None,
    max_worker_s: Annotated[float | None, typer.Option(help="Worker seconds in 24 hours.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Set a tenant's limits; those left out return to the server's defaults."""
    from dataclasses import asdict

    from bitquota.service.jobs.quotas import Quotas

    with _opened(data_dir, make=True) as (settings, database):
        quota = Quotas(database, settings, time.time).set(
            tenant,
            max_running=max_running,
            max_queued=max_queued,
            max_stored_bytes=max_stored_bytes,
            max_worker_s=max_worker_s,
        )
    _say(asdict(quota))


@quotas.command("show")
def show_quota(
    tenant: Annotated[str, typer.Argument(help="The tenant.")], data_dir: DataDir = None
) -> None:
    """Print a tenant's limits and usage, how long its files are kept, and which go next."""
    from dataclasses import asdict

    from bitquota.service.jobs.quotas import Quotas
    from bitquota.service.jobs.usage import retention_of

    with _opened(data_dir) as (settings, database):
        found = Quotas(database, settings, time.time)
        kept = asdict(retention_of(settings, database, tenant))
        _say(
            {
                "quota": asdict(found.of(tenant)),
                "usage": asdict(found.usage(tenant)),
                "retention": kept | {k: _date(v) for k, v in kept.items() if k.endswith("_at")},
            }
        )


def _date(at: float | None) -> str | None:
    """Return a time as a person and a program read it."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


@jobs.command("list")
def list_jobs(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    limit: Annotated[int, typer.Option("--limit", help="Number of jobs.")] = 50,
    data_dir: DataDir = None,
) -> None:
    """Print a tenant's latest jobs, one line of JSON each."""
    from bitquota.service.api.schemas import job_view
    from bitquota.service.jobs.job_store import JobStore

    with _opened(data_dir) as (_, database):
        for job in JobStore(database, time.time).page(tenant, limit=limit):
            typer.echo(job_view(job).model_dump_json())


@jobs.command("cancel")
def cancel_job(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    job_id: Annotated[str, typer.Argument(help="Id of the job.")],
    data_dir: DataDir = None,
) -> None:
    """Cancel a job on its owner's behalf."""
    from bitquota.service.api.schemas import job_view
    from bitquota.service.jobs.job_store import JobStore

    with _opened(data_dir) as (_, database):
        typer.echo(job_view(JobStore(database, time.time).cancel(tenant, job_id)).model_dump_json())


@app.command("webhook-secret")
def make_webhook_secret(
    tenant: Annotated[str, typer.Argument(help="Tenant whose webhooks are signed with it.")],
    data_dir: DataDir = None,
) -> None:
    """Create and print a new signing secret for a tenant's webhooks, replacing the old one."""
    from bitquota.service.jobs.webhooks import Webhooks

    with _opened(data_dir, make=True) as (settings, database):
        _say(
            {"tenant": tenant, "secret": Webhooks(settings, database, time.time).new_secret(tenant)}
        )


@app.command("audit")
def show_audit(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Show only this tenant.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="Number of lines.")] = 100,
    data_dir: DataDir = None,
) -> None:
    """Print who did what, newest first."""
    from bitquota.service.jobs.quotas import AuditLog

    with _opened(data_dir) as (_, database):
        for line in AuditLog(database, time.time).list(tenant, limit):
            _say(dict(line))


@app.command("usage")
def show_usage(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Show only this tenant.")] = None,
    days: Annotated[float, typer.Option("--days", min=0.0, help="Count so many days.")] = 30.0,
    data_dir: DataDir = None,
) -> None:
    """Print what each key has used: jobs, worker seconds and uploads, one line of JSON each."""
    from dataclasses import asdict

    from bitquota.service.jobs.usage import usage_by_key

    with _opened(data_dir) as (_, database):
        since = time.time() - days * _DAY_S
        for found in usage_by_key(database, since=since, tenant=tenant):
            _say(asdict(found) | {"worker_s": round(found.worker_s, 1)})


@app.command("downgrade")
def downgrade_database(
    yes: Annotated[  # noqa: FBT002  # a flag of the command line
        bool, typer.Option("--yes", help="Servers are stopped and a backup is made.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Bring the database one form back, for the release before this one; nothing is lost.

    Stop every server first: one of this release would bring it forward again.
    """
    from bitquota.service.store.migrate import downgrade

    if not yes:
        msg = (
            "a downgrade needs stopped servers and a backup ('bitquota admin backup', pg_dump): "
            "say --yes when both are done"
        )
        raise InvalidInput(msg)
    with _opened(data_dir, upgrade=False) as (_, database):
        before, after = database.write(downgrade)
    _say({"from": before, "to": after})


@app.command("gc")
def collect_garbage(data_dir: DataDir = None) -> None:
    """Remove old jobs, unused uploads and files that nothing refers to."""
    from bitquota.service.worker.maintenance import collect

    with _opened(data_dir) as (settings, database):
        _say(collect(settings, database, time.time()).to_json())


@app.command("backup")
def make_backup(
    target: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    data_dir: DataDir = None,
) -> None:
    """Copy everything into a folder that 'bitquota serve --data-dir' can start from.

    A PostgreSQL database and files at BITQUOTA_BLOB_URL are not in it; it says so.
    """
    from bitquota.service.worker.maintenance import backup

    with _opened(data_dir) as (settings, _):
        backup(settings, target)
        typer.echo(f"wrote {target}", err=True)
        for sentence in _left_out(settings):
            typer.echo(f"NOT in the backup: {sentence}", err=True)


def _left_out(settings: Settings) -> list[str]:
    """Return what a backup of the data folder does not hold, and what does."""
    found = []
    if settings.database_url:
        found.append("the database at BITQUOTA_DATABASE_URL: back it up first, with pg_dump")
    if settings.blob_url:
        found.append(
            f"uploads and results at {settings.blob_url}: keep them with that storage's own means, "
            "versions or replication; the jobs of this backup name them"
        )
    return found


@app.command("verify")
def verify_files(data_dir: DataDir = None) -> None:
    """Compare every stored file with its digest; exit 1 if one is missing or damaged."""
    from bitquota.service.worker.maintenance import verify

    with _opened(data_dir) as (settings, database):
        wrong = verify(settings, database)
    for sentence in wrong:
        typer.echo(sentence)
    raise typer.Exit(1 if wrong else 0)


@app.command("doctor")
def examine(data_dir: DataDir = None) -> None:
    """Check what a server needs, without changes; exit 1 if something is missing."""
    from bitquota.service.doctor import doctor

    findings = doctor(_settings(data_dir))
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'LOOK'}  {finding.what}: {finding.detail}")
    needed = {"database", "data folder", "blob store", "engine"}
    raise typer.Exit(1 if any(not f.good and f.what in needed for f in findings) else 0)


if __name__ == "__main__":
    app()
