"""One fine-tuning, as the engine steps it between batches. Knows nothing of what is learned, nor of jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from generator_service.backends.interface import Backend, Progress, WeightSet


@dataclass(eq=False)
class AdaptationRun:
    """The future gives (kind, metadata) of the new weight set."""

    base: WeightSet
    begin: Callable[[Backend], Iterator[Progress]]  # called on the compute thread
    on_progress: Callable[[Progress], None]  # called on the compute thread
    future: Future[tuple[str, dict[str, Any]]] = field(default_factory=Future)
    cancelled: bool = False
    steps: Iterator[Progress] | None = None  # None: not begun

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()
