"""`python -m tests.benchmarks [queue ...]`: all benchmarks or those named, one after the other, each in a process."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Exit status: how many benchmarks failed to run; a goal that is missed is printed, not an error."""
    every = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(every)}; all, when none is named")
    names = parser.parse_args().names
    if unknown := set(names) - set(every):
        parser.error(f"no benchmark {min(unknown)!r}: choose from {', '.join(every)}")
    failed = 0
    for name in names or every:
        print(f"== {name}", flush=True)
        failed += subprocess.run([sys.executable, "-m", f"tests.benchmarks.bench_{name}"]).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
