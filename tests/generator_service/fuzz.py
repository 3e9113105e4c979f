"""Requests that nobody thought of: schemathesis over the OpenAPI document, against a real service with a tiny model.

    python -m tests.generator_service.fuzz [--examples N] [--seed N]

Over HTTP, with a broker and a dataset, as an administrator. Every check that schemathesis has, on data that fit the
document and on data that do not; the closing lines tell the cases run and the failures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from protocol.broker import EmbeddedBroker
from tests.generator_service.tiny_dit import save_checkpoint
from tests.generator_service.tiny_service import make_service, served, started, write_dataset

ROOT = Path(__file__).parents[2]
KEY, ADMIN_KEY = "fuzz-user", "fuzz-admin"
# What fits the document may be refused, for it cannot say which classes there are; and a job that was deleted is there
# still, as cancelled.
LEFT_OUT = ("positive_data_acceptance", "use_after_free")


def fuzz(folder: Path, examples: int, seed: int, phases: str) -> subprocess.CompletedProcess[str]:
    """One run; its output says what was found, and its status is 0 when that is nothing."""
    with ExitStack() as stack:
        broker = stack.enter_context(EmbeddedBroker())
        service = make_service(
            folder,
            broker.url,
            dit={"checkpoint": str(save_checkpoint(folder / "checkpoint")), "device": "cpu"},
            dataset={"root": write_dataset(folder / "dataset")},
            threads=1,
            api_key=KEY,
            admin_key=ADMIN_KEY,
        )
        stack.enter_context(started(service))
        url = stack.enter_context(served(service))
        options = {
            "--header": f"Authorization: Bearer {ADMIN_KEY}",
            "--checks": "all",
            "--exclude-checks": ",".join(LEFT_OUT),
            "--exclude-path-regex": "/events$",  # endless for a job that runs
            "--max-examples": str(examples),
            "--seed": str(seed),
            "--phases": phases,
            "--suppress-health-check": "all",
        }
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--no-color"]
        command += ["--continue-on-failure", *(part for option in options.items() for part in option)]
        hooks = {"SCHEMATHESIS_HOOKS": "tests.generator_service.fuzz_hooks", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=folder, env={**os.environ, **hooks}, capture_output=True, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=200, help="for each operation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = fuzz(Path(folder), options.examples, options.seed, "examples,coverage,fuzzing,stateful")
    print(done.stdout + done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
