"""Traces, where the operator wants them: OpenTelemetry spans of requests and of jobs.

Nothing is imported unless the standard variables ask for an exporter
(``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` or
``OTEL_TRACES_EXPORTER``) and the extra ``otel`` is installed. The context of the request that
submitted a job lies with the job's first event, so a driver continues that trace wherever and
whenever it runs; models and their evaluators know nothing of it.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import bitquota
from bitquota.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_HEADERS = ("traceparent", "tracestate")
_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
_FLUSH_MS = 2000


def wanted(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the standard variables ask for traces."""
    given = os.environ if environment is None else environment
    if given.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = given.get("OTEL_TRACES_EXPORTER", "")
    if exporter:
        return exporter != "none"
    return any(given.get(name) for name in _ENDPOINTS)


def described() -> tuple[bool, str]:
    """Return whether all is well, and a sentence about where traces go."""
    if not wanted():
        return True, "off: no OTEL_EXPORTER_OTLP_ENDPOINT"
    if not _installed():
        return False, "wanted, but not installed: pip install 'bitquota[otel]'"
    endpoint = next((os.environ[n] for n in _ENDPOINTS if os.environ.get(n)), "")
    shown = endpoint.rpartition("@")[2] or os.environ.get("OTEL_TRACES_EXPORTER", "")
    return True, f"traces go to {shown}"


def _installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.sdk.trace") is not None
    except ModuleNotFoundError:
        return False


class Tracing:
    """Makes spans, or nothing at all where no traces are wanted.

    Args:
        exporter: Takes finished spans; by default what the standard variables say.

    Raises:
        MissingDependency: Traces are wanted and the extra is not installed.
    """

    def __init__(self, exporter: Any = None) -> None:  # noqa: ANN401  # an SpanExporter
        self._tracer: Any = None
        self._provider: Any = None
        if exporter is None and not wanted():
            return
        if not _installed():
            msg = "traces are wanted (OTEL_…); install them with: pip install 'bitquota[otel]'"
            raise MissingDependency(msg, extra="otel")
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        name = os.environ.get("OTEL_SERVICE_NAME", "bitquota")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        if exporter is None:
            self._provider.add_span_processor(BatchSpanProcessor(_exporter()))
        else:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("bitquota", bitquota.__version__)

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        carrier: Mapping[str, str] | None = None,
        *,
        kind: str = "INTERNAL",
        attributes: Mapping[str, str | int | float] | None = None,
    ) -> Iterator[Any]:
        """Make a span around a block, below the one that ``carrier`` or the thread names."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation import tracecontext

        propagator = tracecontext.TraceContextTextMapPropagator()
        context = propagator.extract(dict(carrier)) if carrier else None
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=trace.SpanKind[kind],
            attributes=dict(attributes or {}),
        ) as span:
            yield span

    def carrier(self) -> dict[str, str]:
        """Return the headers that name the current span; empty where nothing is traced."""
        if self._tracer is None:
            return {}
        from opentelemetry.trace.propagation import tracecontext

        headers: dict[str, str] = {}
        tracecontext.TraceContextTextMapPropagator().inject(headers)
        return headers

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.force_flush(_FLUSH_MS)
            self._provider.shutdown()


def _exporter() -> Any:  # noqa: ANN401  # an SpanExporter
    if os.environ.get("OTEL_TRACES_EXPORTER") == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


class TracedRequests:
    """Pure ASGI: a server span around every request, named by route template."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self.app = app
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not self.tracing.on or scope["path"] in _UNTRACED:
            await self.app(scope, receive, send)
            return
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        carrier = {name: sent[name] for name in _HEADERS if name in sent}
        method = scope["method"]
        with self.tracing.span(
            method, carrier, kind="SERVER", attributes={"http.request.method": method}
        ) as span:

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # By template: a path could hold anything.
                    route = getattr(scope.get("route"), "path", "(none)")
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
                    span.set_attribute("http.response.status_code", message["status"])
                    span.set_attribute("bitquota.request_id", str(scope.get("request_id", "")))
                await send(message)

            await self.app(scope, receive, send_and_note)
