"""`python -m trainer.report RUN_FOLDER [--baseline RUN_FOLDER ...] --out report.html`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ConfigError, OnTheFlyError
from trainer.durable import write_durably
from trainer.record import Record
from trainer.report.page import page


def write(run: Path, baselines: Sequence[Path], out: Path) -> None:
    """Write the report of a run's folder, compared with those of its baselines.

    Raises:
        ConfigError: a folder holds no run, or `out` is in a folder that does not exist.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder: make it first, or choose another --out", param="out")
    text = page(Record.open(run), [Record.open(baseline) for baseline in baselines])
    write_durably(out, text.encode())


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a folder or argument is wrong, 1 any other failure."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="A run as one HTML page.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--baseline", type=Path, action="append", default=[], help="folder of a run to compare with")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)")
    options = parser.parse_args(arguments)
    try:
        write(options.run, options.baseline, options.out)
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
