"""Numbers as TensorBoard's event records, as bytes: who writes them to a file decides what a full disk means.

Knows nothing of files.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def header() -> bytes:
    """What an events file begins with."""
    return _record(Event(wall_time=time.time(), file_version="brain.Event:2"))


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """One point of each of the curves named."""
    points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    return _record(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))


def _record(event: Event) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
