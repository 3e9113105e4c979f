"""`python -m tests.soak --kills 100 --seed 1`: a run that goes on while its processes are killed; then the books.

Exit status 0: the run is complete and everything is accounted for. `--without-dedup` must not end so.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx

import generator_service.backends.dit
import generator_service.service  # noqa: F401  loaded here, once, so that the forked processes need not
import trainer.start  # noqa: F401
from protocol.bus import Bus, BusConfig
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import Retryable
from protocol.messages import FeedbackAccepted, WeightsRef
from protocol.parent import TEMPORARY
from tests.soak import audit, scene
from tests.soak.fleet import Fleet
from tests.soak.storm import CALM_ITERATIONS, Storm
from trainer import books

KILLS_AN_ITERATION = 1.25
DRAIN_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that an iteration waits for its answers")
    parser.add_argument("--folder", type=Path, help="where to work, and leave everything; default: a temporary one")
    parser.add_argument("--at", metavar="POINT:NTH", help="where the trainer's first life ends (see failpoints)")
    parser.add_argument("--without-dedup", action="store_true", help="admit every delivery: the books must not balance")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onthefly-soak-") as temporary:
        return soak(options, options.folder or Path(temporary))


def soak(options: argparse.Namespace, folder: Path) -> int:
    """One soak; prints what happened and returns the exit status."""
    started = time.monotonic()
    iterations = CALM_ITERATIONS + 2 + int(options.kills / KILLS_AN_ITERATION)
    place = scene.build(folder, iterations, options.patience)
    with Fleet(folder / "hits.txt") as fleet:
        scene.crew(place, fleet, ["--without-dedup"] if options.without_dedup else [])
        poisoned = prepare(place, fleet)
        storm = Storm(place, fleet, options.kills, iterations, random.Random(options.seed))
        fleet.members["trainer"].start(options.at)
        finished = storm.rage(options.timeout)
        calm(fleet, place)
        account = books.open_books(place.run_folder, place.broker)
        wrong = poison_complaints(place, poisoned)
        wrong += audit.complaints(place.run_folder, place.broker, iterations, poisoned)
        deaths = storm.failures
        lives = {name: member.lives for name, member in fleet.members.items()}
    report(storm, lives, time.monotonic() - started)
    print(books.table(account))
    wrong += [] if finished else [f"the run did not finish within {options.timeout:.0f} s"]
    wrong += [] if storm.struck >= options.kills else [f"only {storm.struck} kills of {options.kills}"]
    wrong += [
        f"{death.member} ended by itself with status {death.status}"
        for death in deaths
        if death.status not in (1, TEMPORARY)
    ]
    for complaint in wrong:
        print(f"complaint: {complaint}")
    good = account.balanced and account.finished and not wrong
    print("the soak PASSED" if good else "the soak FAILED")
    return 0 if good else 1


def prepare(place: scene.Scene, fleet: Fleet) -> int:
    """Start broker and replicas, make a second weight set to swap with, and poison the queue; returns dead letters
    to come."""
    for name in ("broker", *scene.REPLICAS):
        fleet.members[name].start()
    url = place.replicas[scene.REPLICAS[0]]
    wait_until(lambda: answers(f"{url}/readyz"))
    job = {"type": "adapt", "name": "other", "steps": 2, "batch_size": 4}
    made = httpx.post(f"{url}/v1/jobs", json=job).raise_for_status().json()
    wait_until(lambda: httpx.get(f"{url}/v1/jobs/{made['id']}").json()["status"] == "succeeded")
    return poison(place.broker)


def poison(broker: str) -> int:
    """A unit of another run whose weights exist nowhere: nobody can make it."""
    weights = WeightsRef(name="nowhere", version=1, digest="0" * 64)
    row = WorkRow(
        sample_id="f" * 32, source_id="x", index=0, seed=0, label=0, class_name="alpha", prompt="", guidance_scale=1.0
    )
    unit = WorkUnit(
        id="poison.0.0.x",
        run="poison",
        feedback=0,
        unit=0,
        units=1,
        model_version=0,
        weights=weights,
        steps=1,
        scheduler="ddim",
        strength=1.0,
        rows=[row],
    )
    bus = Bus(broker, BusConfig())
    bus.publish_plan(
        "poison", 0, "x", [unit], {}, FeedbackAccepted(run="poison", feedback=0, units=1, samples=1, weights=weights)
    )
    bus.close()
    return 1


def poison_complaints(place: scene.Scene, poisoned: int) -> list[str]:
    """The poisoned unit is with the dead letters that the API shows, and its run was told."""
    bus = Bus(place.broker, BusConfig())
    shown = httpx.get(f"{place.replicas[scene.REPLICAS[0]]}/v1/dead-letters").raise_for_status().json()["data"]
    letters = [letter for letter in shown if letter["run"] == "poison"]
    answer = bus.next_batch("poison", "soak")
    if answer is not None:
        bus.ack_batch(answer)
    bus.close()
    if len(letters) == poisoned and answer is not None and answer.message.error is not None:
        return []
    return [f"{len(letters)} dead letters of {poisoned} poisoned units; told: {answer is not None}"]


def calm(fleet: Fleet, place: scene.Scene) -> None:
    """Everybody runs undisturbed until the queue is empty; answers of the run that nobody reads any more may stay."""
    for member in fleet.startable():
        member.start()
    bus = Bus(place.broker, BusConfig())

    def empty() -> bool:
        fleet.reap()
        for member in fleet.startable():
            member.start()
        try:
            return not any(bus.depths()[what] for what in ("waiting", "in_work"))
        except Retryable:
            return False

    wait_until(empty, DRAIN_S)
    bus.close()


def report(storm: Storm, lives: dict[str, int], seconds: float) -> None:
    """What was done to whom."""
    print(
        f"{storm.struck} kills in {seconds:.0f} s over {storm.iterations} iterations; "
        f"{storm.activations} activations, {storm.retried} dead letters retried"
    )
    print(f"{'process':<14}{'lives':>6}{'killed':>8}{'paused':>8}{'failed':>8}  killed at named points")
    failed = Counter(death.member for death in storm.failures)
    for name, count in lives.items():
        hows = {how: times for (member, how), times in storm.killed.items() if member == name}
        points = ", ".join(f"{how} {times}" for how, times in sorted(hows.items()) if how != "from outside")
        print(f"{name:<14}{count:>6}{sum(hows.values()):>8}{storm.pauses[name]:>8}{failed[name]:>8}  {points}")


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that: see the logs in the soak's folder"
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
