"""From SIGKILL of a replica to its unit being worked on again by another one. Goal: the lease and 2 s.

    python -m tests.benchmarks.bench_recovery

Two real replicas under the supervisor share a queue; each round one unit is published that takes long, and whoever
has it is killed. Beside it: how long the supervisor takes to have the killed one ready again.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis
import tomli_w

from agent.supervisor import Supervisor, service_is_over
from protocol import keys
from protocol.broker import URL_VARIABLE, EmbeddedBroker, connect
from protocol.bus import Bus, BusConfig
from protocol.client import GeneratorClient
from protocol.entries import WorkRow, WorkUnit
from protocol.messages import FeedbackAccepted, WeightsRef
from tests.benchmarks.bench_service import save_checkpoint
from tests.ports import free_port

POLL_S = 0.005


def bench(rounds: int, lease_s: float) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _keep_quiet(stack, folder / "replicas.log")
        checkpoint = save_checkpoint(folder / "checkpoint", width=192, layers=6, size=16)
        broker = stack.enter_context(EmbeddedBroker())
        raw = stack.enter_context(connect(broker.url))
        bus = Bus(broker.url, BusConfig(lease_idle_s=lease_s))
        stack.callback(bus.close)
        supervisor = stack.enter_context(Supervisor())
        clients = [
            stack.enter_context(_replica(supervisor, folder / str(number), broker.url, checkpoint, lease_s))
            for number in range(2)
        ]
        taken_over, ready = zip(*(_round(raw, bus, clients, number) for number in range(rounds)), strict=True)
    print(
        f"taken over {statistics.median(taken_over):.2f} s after the kill (worst of {rounds}: {max(taken_over):.2f} s; "
        f"lease {lease_s:.0f} s, goal {lease_s + 2:.0f} s)"
    )
    print(f"the killed replica ready again after {statistics.median(ready):.2f} s (worst: {max(ready):.2f} s)")


def _keep_quiet(stack: ExitStack, log: Path) -> None:
    """The replicas inherit standard error."""
    ours = os.dup(2)
    stack.callback(os.dup2, ours, 2)
    os.dup2(stack.enter_context(log.open("w")).fileno(), 2)


def _replica(
    supervisor: Supervisor, folder: Path, broker_url: str, checkpoint: Path, lease_s: float
) -> GeneratorClient:
    port = free_port()
    folder.mkdir()
    own = {"port": port, "threads": 1, "dit": {"checkpoint": str(checkpoint)}}
    own |= {"weights_dir": str(folder / "weights"), "samples_dir": str(folder / "samples")}
    (folder / "settings.toml").write_text(tomli_w.dumps({"generator": own, "broker": {"lease_idle_s": lease_s}}))
    environment = {URL_VARIABLE: broker_url, "OMP_NUM_THREADS": "1"}
    arguments = ["--config", str(folder / "settings.toml")]
    child = supervisor.start(f"replica {folder.name}", "generator_service", arguments, environment)
    client = GeneratorClient(f"http://127.0.0.1:{port}")
    client.wait_ready(120.0)
    child.keep(service_is_over)
    return client


def _round(raw: redis.Redis, bus: Bus, clients: list[GeneratorClient], number: int) -> tuple[float, float]:
    """Seconds from the kill until the unit is in other hands, and until both replicas are ready."""
    weights = clients[0].weights().active
    run = f"bench{number}"
    reply = FeedbackAccepted(run=run, feedback=0, units=1, samples=1, weights=weights)
    bus.publish_plan(run, 0, "x", [_unit(run, weights)], {}, reply)
    victim = _wait(lambda: _holder(raw))
    time.sleep(0.37 * (number + 1) % 1.0)  # anywhere between two renewals
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _wait(lambda: _holder(raw) not in (None, victim))
    taken_over = time.monotonic() - killed
    bus.forget_run(run)
    for client in clients:
        client.wait_ready(120.0)
    return taken_over, time.monotonic() - killed


def _holder(raw: redis.Redis) -> int | None:
    """Process id of the replica that has the unit in hand; consumers are named {host}-{pid}-{token}-{thread}."""
    if not raw.exists(keys.WORK):
        return None
    pending = raw.xpending_range(keys.WORK, keys.WORK_GROUP, "-", "+", 1)
    return int(pending[0]["consumer"].decode().rsplit("-", 3)[1]) if pending else None


def _wait(look: Callable[[], int | bool | None]) -> int:
    while not (found := look()):
        time.sleep(POLL_S)
    return found


def _unit(run: str, weights: WeightsRef) -> WorkUnit:
    row = {"source_id": "class:3", "label": 3, "class_name": "3", "prompt": "3", "guidance_scale": 2.0}
    rows = [WorkRow.model_validate(row | {"sample_id": f"{n}", "index": n, "seed": n}) for n in range(8)]
    return WorkUnit(
        id=f"{run}.0.0.x",
        run=run,
        feedback=0,
        unit=0,
        units=1,
        model_version=0,
        weights=weights,
        steps=1000,
        scheduler="ddim",
        strength=1.0,
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lease", type=float, default=3.0, help="broker.lease_idle_s")
    options = parser.parse_args()
    bench(options.rounds, options.lease)


if __name__ == "__main__":
    main()
