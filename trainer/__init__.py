"""The trainer. `from trainer import OnTheFly` puts it into a training loop of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.onthefly import OnTheFly

__all__ = ["OnTheFly"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: settings are read without torch."""
    if name == "OnTheFly":
        from trainer.onthefly import OnTheFly

        return OnTheFly
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
