"""`onthefly dead ...`: dead letters as an operator sees and treats them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from protocol.client import GeneratorClient
from protocol.errors import OnTheFlyError, Retryable
from protocol.operations import DeadLetterInfo, DeadLetterOutcome

PAGE = 100  # letters asked for at a time


def show(client: GeneratorClient, limit: int) -> None:
    """Print the newest dead letters."""
    listed = client.dead_letters(limit)
    table = Table(box=None)
    for column in ("id", "when", "unit"):
        table.add_column(column, no_wrap=True)
    table.add_column("deliveries", justify="right")
    table.add_column("why")
    for info in listed.data:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.letter.time))
        unit = info.unit_id or f"unreadable entry of {info.letter.stream}"
        table.add_row(info.id, when, unit, str(info.letter.deliveries), str(info.letter.problem.get("detail", "")))
    if listed.data:
        Console(width=None if sys.stdout.isatty() else 240).print(table)
    print(f"{listed.total} dead letters" + (f", the newest {limit} shown" if listed.total > limit else ""))


def treat(client: GeneratorClient, letters: Sequence[str], act: Callable[[str], DeadLetterOutcome]) -> int:
    """Retry or drop each of these, or without any all that there are now; returns the exit status: 1 when some could
    not be.

    Raises:
        Retryable: and nor can the rest, for now.
    """
    refused = 0
    for letter in letters or [info.id for info in _all(client)]:
        try:
            outcome = act(letter)
        except Retryable:
            raise
        except OnTheFlyError as error:
            print(f"{letter}: {error}", file=sys.stderr)
            refused += 1
        else:
            print(f"{outcome.id} {outcome.done}  {outcome.details.get('unit_id') or ''}".rstrip())
    return 1 if refused else 0


def _all(client: GeneratorClient) -> Iterator[DeadLetterInfo]:
    """Newest first; what is added meanwhile is left out."""
    before = None
    while page := client.dead_letters(PAGE, before).data:
        yield from page
        before = page[-1].id
