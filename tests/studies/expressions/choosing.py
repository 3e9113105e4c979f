"""Does the policy learn? A `policy` job over HTTP, its reward curve, and its choices on people it has not seen.

Held-out states are measured by the job itself, with every action on the same noise, so that learned, random, the best
fixed action (in hindsight) and the best of each state are compared on the same clips.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agent.machine import Machine, machine
from protocol.messages import Job
from protocol.policy import PolicyJob
from tests.studies.expressions import scene

NAME = "chosen"
PEOPLE, HELD_OUT = 30, 0.33  # neutral clips to begin with; part of the people that is held out
KEPT = ("step", "reward", "rewarded", "entropy", "clips")  # of each update's event
ACTIONS = {  # guidance, as printed: 7 throughout; from 1 to 2.5 and back; rising to 7; falling from 7
    "steps": [5, 10],
    "pairs": [[1.0, 1.0], [2.0, 2.0], [2.0, 1.0], [1.0, 2.0]],
    "minimum": 1.0,
    "maximum": 7.0,
}
REWARDS = {  # an amplitude that is wanted: surprise shows at once here, disgust and fear only when guided strongly, so
    # that the best action depends on the state; the printed reward pays most for no expression, whatever the state
    "steps": {"weight": 0.3},
    "quality": {"weight": 3.0, "options": {"sharpness": 1000.0}},
    "face": {"weight": 3.0},
    "amplitude": {"weight": 3.0, "options": {"maximum": 0.9, "wanted": 0.9}},
}


def job(seed: int, steps: int, frames: int) -> PolicyJob:
    return PolicyJob.model_validate(
        {
            "name": NAME,
            "seed": seed,
            "baseline": "state",
            "steps": steps,
            "batch_size": 32,
            "frames": frames,
            "validation": HELD_OUT,
            "validation_pairs": 3 * PEOPLE,
            "validate_every": 50,
            "generate_batch": 16,
            "actions": ACTIONS,
            "rewards": REWARDS,
        }
    )


def study(root: Path, seed: int, steps: int, frames: int) -> dict[str, Any]:
    """One seed; at once when it was done. Its weight set stays in the folder `policy/weights`."""
    result = root / f"policy-{seed}.json"
    if not result.exists():
        settings = scene.of_policy(root, root / "policy", PEOPLE)
        with machine(settings, []) as running:
            found = _learned(running, job(seed, steps, frames))
        result.write_text(json.dumps(found, indent=1))
    return json.loads(result.read_text())


def _learned(running: Machine, wanted: PolicyJob) -> dict[str, Any]:
    done, curve = _followed(running, wanted)
    made = f"{done.result['name']}@{done.result['version']}"
    told = next(weights.metadata for weights in running.client.weights().data if str(weights) == made)
    told = {name: told[name] for name in ("validation", "first", "clips", "seconds", "pairs", "people")}
    return {"weights": made, "curve": curve} | told


def _followed(running: Machine, wanted: PolicyJob) -> tuple[Job, list[dict[str, Any]]]:
    """The job when it is done, and what its events told."""
    begun, curve = running.client.submit(wanted), []
    for event in running.client.events(begun.id):
        if event.kind == "progress" and "reward" in event.data:
            curve.append({name: event.data[name] for name in KEPT} | {"validation": event.data.get("validation")})
            if len(curve) % 20 == 0:
                print(f"  policy, update {curve[-1]['step']}: reward {curve[-1]['reward']:.3f}", flush=True)
    done = running.client.job(begun.id)
    assert done.status == "succeeded", done.problem
    return done, curve
