"""Faults over a run, drawn from a seed: kills from outside, kills at named points, pauses, broker restarts.

Kills come with the run's progress rather than with time, so that all of them fall into the run, on any machine. Knows
nothing of what the books must say afterwards.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.soak.failpoints import ON_DEMAND, POINTS
from tests.soak.fleet import Death, Fleet, Member
from tests.soak.scene import REPLICAS, RUN, Scene

VICTIMS = {"generator-0": 4, "generator-1": 4, "trainer": 3, "broker": 4}  # weights of a random kill
KILL_GAP_S = (0.2, 0.8)  # at least this between two kills from outside
AHEAD = 3  # kills owed
PAUSE_EVERY = 5  # kills
PAUSE_S = (0.3, 3.0)  # past a lease at times
ACTIVATE_GAP_S = 1.5
ARMED_SHARE = 0.6  # lives that are to end at a named point
CALM_ITERATIONS = 6  # at the end
PASSAGES = 3  # a named point strikes at one of the first so many


@dataclass
class Storm:
    """Lets the run go to its end, and keeps everybody from getting there undisturbed."""

    scene: Scene
    fleet: Fleet
    kills: int  # wanted
    iterations: int
    draw: random.Random
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)  # (process, how) -> times
    pauses: Counter[str] = field(default_factory=Counter)
    activations: int = 0
    retried: int = 0  # dead letters
    failures: list[Death] = field(default_factory=list)  # lives that ended by themselves, with an error
    _deck: dict[str, list[str]] = field(default_factory=dict)  # module -> named points still to strike
    _next_kill: float = 0.0
    _next_activation: float = 0.0

    @property
    def struck(self) -> int:
        return sum(self.killed.values())

    def rage(self, timeout_s: float) -> bool:
        """Until the trainer is done; False when it is not within the time."""
        deadline = time.monotonic() + timeout_s
        trainer = self.fleet.members["trainer"]
        while not trainer.done:
            if time.monotonic() > deadline:
                return False
            self._count(self.fleet.reap())
            for member in self.fleet.startable():
                member.start(self._named_point(member))
            if time.monotonic() >= self._next_activation:
                self._activate()
            owed = self._owed()
            self._hold(trainer, owed)
            if owed > 0 and time.monotonic() >= self._next_kill:
                self._strike(owed)
            time.sleep(0.02)
        return True

    def _hold(self, trainer: Member, owed: float) -> None:
        """Keep the trainer where it is while it has reached the calm iterations and kills are still owed."""
        early = owed >= 1 and self.progress() >= self.iterations - CALM_ITERATIONS
        trainer.signal(signal.SIGSTOP if early else signal.SIGCONT)

    # ------------------------------------------------------------ what happened

    def _count(self, deaths: list[Death]) -> None:
        for death in deaths:
            member = self.fleet.members[death.member]
            if death.status == -signal.SIGKILL:
                self.killed[death.member, death.point or "from outside"] += 1
            elif death.status > 0:
                self.failures.append(death)
            if member.armed is not None and death.point is None:
                self._points(member).insert(0, member.armed.partition(":")[0])  # it has yet to strike

    def progress(self) -> int:
        """Iterations that are finished."""
        path = self.scene.run_folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        finished = 0
        for line in lines:
            try:
                finished = json.loads(line)["iteration"] + 1
            except ValueError:  # being written
                break
        return finished

    # ------------------------------------------------------------ named points

    def _points(self, member: Member) -> list[str]:
        """The named points that are left of this process's kind; all of them again once each has struck."""
        kind = "trainer" if member.name == "trainer" else "generator_service"
        if not self._deck.get(kind):
            self._deck[kind] = list(POINTS[kind])
            self.draw.shuffle(self._deck[kind])
        return self._deck[kind]

    def _named_point(self, member: Member) -> str | None:
        if member.name == "broker" or self.struck >= self.kills or self.draw.random() >= ARMED_SHARE:
            return None
        point = self._points(member).pop(0)
        passages = 1 if point in ON_DEMAND or point == "rewound" else self.draw.randint(1, PASSAGES)
        return f"{point}:{passages}"

    # ------------------------------------------------------------ faults from outside

    def _owed(self) -> float:
        """Kills that are due by now: they are spread over the iterations but the last few, in which what was late
        comes in."""
        share = min(1.0, (self.progress() + 1) / (self.iterations - CALM_ITERATIONS))
        return self.kills * share - self.struck

    def _strike(self, owed: float) -> None:
        """Whoever is drawn; when the run gets ahead of the kills, the trainer, which sets it back."""
        self._next_kill = time.monotonic() + self.draw.uniform(*KILL_GAP_S)
        running = {name: weight for name, weight in VICTIMS.items() if self.fleet.members[name].pid is not None}
        if not running:
            return
        if owed > AHEAD and "trainer" in running:
            self.fleet.members["trainer"].signal(signal.SIGKILL)
            return
        victim = self.fleet.members[self.draw.choices(list(running), list(running.values()))[0]]
        if self.draw.random() < 1 / PAUSE_EVERY:
            self._pause(victim)
        else:
            victim.signal(signal.SIGKILL)

    def _pause(self, victim: Member) -> None:
        self.pauses[victim.name] += 1
        victim.signal(signal.SIGSTOP)
        time.sleep(self.draw.uniform(*PAUSE_S))
        victim.signal(signal.SIGCONT)

    def _activate(self) -> None:
        """Swap weights at a replica: one that is to die of it, if there is one; refusals and silence are part of it."""
        self._next_activation = time.monotonic() + ACTIVATE_GAP_S
        waiting = [name for name in REPLICAS if (self.fleet.members[name].armed or "").startswith(ON_DEMAND)]
        replica = self.draw.choice(waiting or list(REPLICAS))
        try:
            url = self.scene.replicas[replica]
            reply = httpx.post(f"{url}/v1/weights/{self.draw.choice(('base', 'other'))}/activate", timeout=2.0)
            self.activations += reply.status_code == 200
            if self.struck < self.kills:
                self._retry_dead_letters(url)
        except httpx.TransportError:
            pass

    def _retry_dead_letters(self, url: str) -> None:
        """As an operator would, while the run still wants the samples."""
        for letter in httpx.get(f"{url}/v1/dead-letters", timeout=2.0).json().get("data", []):
            if letter["run"] == RUN:
                reply = httpx.post(f"{url}/v1/dead-letters/{letter['id']}/retry", timeout=2.0)
                self.retried += reply.status_code == 200
