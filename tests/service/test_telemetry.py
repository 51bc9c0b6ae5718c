"""Traces arrive at a real OTLP receiver, and nothing is imported where nobody wants them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bitquota.errors import MissingDependency
from bitquota.request import PlanRequest
from bitquota.service import telemetry
from bitquota.service.telemetry import Tracing, described, wanted
from live_server import LiveServer
from waiting import PATIENTLY

installed = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry") is None
    or importlib.util.find_spec("opentelemetry.exporter.otlp") is None,
    reason="OpenTelemetry is not installed",
)


@pytest.fixture
def receiver():
    """An OTLP receiver on loopback; yields its address and the spans that came."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    thread.join()
    server.server_close()


def attributes(span):
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


@installed
class TestTracing:
    def test_job_is_in_the_trace_of_its_order(self, tmp_path, digits_files, receiver, monkeypatch):
        """Across two processes: the API's request and the driver's work."""
        url, spans = receiver
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        model, calibration = digits_files
        request = PlanRequest(
            samples=64, holdout_samples=64, weight_bits=(2, 8), measure="diagonal"
        )
        with LiveServer(tmp_path / "data") as server, server.client() as client:
            job = client.submit(
                model=model, calibration=calibration, request=request, kind="measure"
            )
            job.wait(**PATIENTLY)
        by_name = {span.name: span for span in spans}
        ordered, worked = by_name["POST /v1/jobs"], by_name["job measure"]
        assert ordered.trace_id == worked.trace_id
        assert ordered.span_id == worked.parent_span_id
        assert job.id == attributes(worked)["bitquota.job"]
        assert attributes(worked)["bitquota.status"] == "succeeded"
        assert attributes(ordered)["http.response.status_code"] == 202
        assert not any("healthz" in name for name in by_name)

    def test_callers_trace_goes_on(self):
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        exporter = InMemorySpanExporter()
        tracing = Tracing(exporter)
        carrier = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        with tracing.span("inside", carrier):
            assert tracing.carrier()["traceparent"].startswith(f"00-{'a' * 32}-")
        tracing.close()
        (span,) = exporter.get_finished_spans()
        assert int("b" * 16, 16) == span.parent.span_id


class TestOff:
    def test_nothing_is_imported(self):
        """Neither by the server nor by a driver."""
        code = (
            "import sys, bitquota.service.app, bitquota.service.worker.driver\n"
            "from bitquota.service.telemetry import Tracing\n"
            "tracing = Tracing()\n"
            "with tracing.span('x'): assert tracing.carrier() == {}\n"
            "tracing.close()\n"
            "loaded = {m for m in sys.modules if m.count('.') < 2}\n"
            # FastAPI imports the interface by itself where it is installed.
            "loaded &= {'opentelemetry.sdk', 'opentelemetry.exporter', 'ray', 'fsspec', 'torch'}\n"
            "assert not loaded, loaded\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, False),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
            ({"OTEL_TRACES_EXPORTER": "console"}, True),
            ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
            ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, False),
        ],
    )
    def test_standard_variables_decide(self, environment, expected):
        assert wanted(environment) is expected

    def test_wanted_and_missing_is_said(self, monkeypatch):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x")
        monkeypatch.setattr(telemetry, "_installed", lambda: False)
        assert not described()[0]
        with pytest.raises(MissingDependency, match=r"bitquota\[otel\]"):
            Tracing()
