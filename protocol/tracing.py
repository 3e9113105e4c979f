"""Traces: spans of what this process does, joined to those of other processes by W3C `traceparent` texts.

Off, and next to free, unless one of OpenTelemetry's variables names a collector (OTEL_EXPORTER_OTLP_ENDPOINT) and the
extra `otel` is installed; OpenTelemetry's other variables hold too. A span carries the fields that log lines within it
have. Knows nothing of what is traced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from protocol import logs
from protocol.config import mask

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_tracer: Any = None  # None: tracing is off


def setup(process: str) -> None:
    """Trace this process if the environment asks for it, and it is not traced already. `process` names it where the
    environment does not."""
    if _tracer is not None or not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning('no traces: %s is set, but OpenTelemetry is missing: pip install "onthefly[otel]"', ENDPOINTS[0])
        return
    own = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": f"onthefly-{process}"}
    provider = TracerProvider(resource=Resource.create(own))  # flushed when the process ends
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def use(provider: Any) -> None:
    """Trace to this TracerProvider of OpenTelemetry's; None: not at all."""
    global _tracer
    _tracer = None if provider is None else provider.get_tracer("onthefly")


@contextmanager
def span(name: str, *, parent: str | None = None, kind: str = "internal", **attributes: Any) -> Iterator[None]:
    """A span around the block.

    Args:
        parent: traceparent of the span that led to this one; None, or not one: the span around it, if any.
        kind: "internal", "client", "server", "producer" or "consumer".
    """
    if _tracer is None:
        yield
        return
    from opentelemetry import trace

    began = _tracer.start_span(
        name, _context(parent), trace.SpanKind[kind.upper()], attributes=_attributes({**logs.current(), **attributes})
    )
    with trace.use_span(began, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except Exception as error:
            began.set_status(trace.Status(trace.StatusCode.ERROR, mask(str(error))))
            raise


def record(name: str, start: float, end: float, *, links: Sequence[str | None] = (), **attributes: Any) -> None:
    """A span that has ended, within the span around this call.

    Args:
        start, end: unix seconds.
        links: traceparents of other spans that it worked for.
    """
    if _tracer is None:
        return
    from opentelemetry import trace

    others = [trace.Link(trace.get_current_span(_context(link)).get_span_context()) for link in links if link]
    done = _tracer.start_span(
        name,
        attributes=_attributes({**logs.current(), **attributes}),
        links=others,
        start_time=int(start * 1e9),
    )
    done.end(int(end * 1e9))


def describe(name: str | None = None, **attributes: Any) -> None:
    """Say more of the span around this call, and rename it."""
    if _tracer is None:
        return
    from opentelemetry import trace

    around = trace.get_current_span()
    around.set_attributes(_attributes(attributes))
    if name is not None:
        around.update_name(name)


def traceparent() -> str | None:
    """What makes a span elsewhere a child of the span around this call; None: there is none, or tracing is off."""
    return headers().get("traceparent")


def headers() -> dict[str, str]:
    """`traceparent` as HTTP headers of a request that is about to be sent."""
    carrier: dict[str, str] = {}
    if _tracer is not None:
        _propagator().inject(carrier)
    return carrier


def _context(parent: str | None) -> Any:
    return None if parent is None else _propagator().extract({"traceparent": parent})


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenTelemetry takes: numbers and texts, in which nothing looks like a credential."""
    said = {name: value for name, value in values.items() if value is not None}
    return {name: value if isinstance(value, bool | int | float) else mask(str(value)) for name, value in said.items()}
