"""Spans as a collector gets them, from a process of its own over OpenTelemetry's real exporter; and none by default."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from protocol import logs, tracing

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
SCRIPT = f"""
import sys
from protocol import logs, tracing
tracing.setup("trainer")
with logs.fields(run="r"), tracing.span("feedback", parent="{PARENT}", url="redis://u:hush@host", nothing=None):
    print(tracing.headers().get("traceparent"))
    tracing.describe(status=202)
    tracing.record("denoise", 10.0, 12.5, links=["{PARENT}", None])
print("opentelemetry" in sys.modules)
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", script], env=own | environment, capture_output=True, text=True, check=True
    )


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Its URL, and what was sent to it."""
    got: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


def test_the_environment_turns_it_on_and_the_last_spans_arrive_when_the_process_ends(
    collector: tuple[str, list[ExportTraceServiceRequest]],
):
    url, got = collector
    done = run(SCRIPT, OTEL_EXPORTER_OTLP_ENDPOINT=url, OTEL_EXPORTER_OTLP_COMPRESSION="none")
    (resource,) = [resource for request in got for resource in request.resource_spans]
    named = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert named["service.name"] == "onthefly-trainer"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    feedback, denoise = spans["feedback"], spans["denoise"]
    assert (feedback.trace_id.hex(), feedback.parent_span_id.hex()) == (TRACE, SPAN)
    assert done.stdout.splitlines() == [f"00-{TRACE}-{feedback.span_id.hex()}-01", "True"]
    told = {item.key: item.value.string_value or item.value.int_value for item in feedback.attributes}
    assert told == {"run": "r", "url": "redis://***@host", "status": 202}
    assert denoise.parent_span_id == feedback.span_id
    assert denoise.end_time_unix_nano - denoise.start_time_unix_nano == 2_500_000_000
    assert [link.span_id.hex() for link in denoise.links] == [SPAN]


def test_by_default_nothing_is_traced_nor_loaded():
    assert run(SCRIPT).stdout.splitlines() == ["None", "False"]


def test_who_asks_for_traces_without_the_extra_is_told():
    without = "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n" + SCRIPT
    done = run(without, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.splitlines()[0] == "None" and "onthefly[otel]" in done.stderr


def test_a_failure_is_the_spans_status_without_credentials():
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    try:
        with pytest.raises(ValueError), tracing.span("unit", parent="not one"):
            raise ValueError("no redis://u:hush@host")
        assert logs.current() == {} and tracing.traceparent() is None
    finally:
        tracing.use(None)
    (span,) = exporter.get_finished_spans()
    assert span.status.description == "no redis://***@host" and not span.status.is_ok
    assert span.parent is None and not span.events
