"""Do generated clips help to recognise scarce emotions, and how near are they to real ones? Through the real system:
service, queue, and a training of task `video` whose feedback asks for the scarce classes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent.machine import machine
from tests.expressions.world import EMOTIONS, SCARCE, write_dataset
from tests.studies.expressions import scene
from tests.studies.expressions.film import FRAMES, SIDE

ARMS = {  # what each changes in the settings; {policy} is a weight set
    "real only": ["trainer.mode=real"],
    "TI2V-Zero": ["agent.expressions.composer=fixed", "agent.expressions.policy=false"],
    "ARGen": ["trainer.feedback.model={policy}"],
}
REFERENCE = 60  # real clips of each scarce emotion, of the same people, that made ones are compared with


def study(root: Path, seed: int, policy: str) -> dict[str, Any]:
    """One seed; at once when it was done. `policy`: weights in the folder `policy/weights`."""
    result = root / f"recognition-{seed}.json"
    if not result.exists():
        out = root / f"recognition-{seed}"
        settings = scene.of_recognition(root, out, seed)
        if not (out / "weights").exists():
            shutil.copytree(root / "policy" / "weights", out / "weights")
        found = {name: _arm(root, out, settings, name, seed, policy) for name in ARMS}
        result.write_text(json.dumps(found, indent=1))
    return json.loads(result.read_text())


def _arm(root: Path, out: Path, settings: Path, name: str, seed: int, policy: str) -> dict[str, Any]:
    """One training, measured at its end."""
    run = name.replace(" ", "-")
    folder, log = out / "runs" / run, out / "runs" / f"{run}.log"
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(exist_ok=True)
        overrides = [f"trainer.run={run}", *(text.format(policy=policy) for text in ARMS[name])]
        with machine(settings, overrides) as running:
            status = running.train(log=log).wait()
        assert status == 0, f"the training of {name} ended with status {status}: see {log}"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "test_uar" in line)
    recalls = dict(zip(sorted(EMOTIONS), last["per_class"], strict=True))
    found = {"UAR": last["test_uar"], "WAR": last["test_war"]} | {f"AR {name}": recalls[name] for name in SCARCE}
    found |= {"AR others": sum(v for k, v in recalls.items() if k not in SCARCE) / (len(EMOTIONS) - len(SCARCE))}
    return found if name == "real only" else found | _distances(root, out, folder, seed)


def _distances(root: Path, out: Path, run: Path, seed: int) -> dict[str, float]:
    """FVD, sFVD and tFVD of what a run trained on, from real clips of the same people (eqs. 27 to 33), in the features
    of the judge, which was trained on the world."""
    reference, told = out / "reference", run / "distances.json"
    if not reference.is_dir():
        counts = dict.fromkeys(SCARCE, REFERENCE)
        write_dataset(reference, seed=1000 + seed, size=SIDE, counts=counts, split=None, subjects=_people())
    if not told.exists():
        command = [sys.executable, "-m", "trainer.video_quality", "--made", str(run), "--real", str(reference)]
        command += ["--features", f"torchscript:{root / 'judge.ts'}", "--frames", str(FRAMES), "--size", str(SIDE)]
        subprocess.run([*command, "--device", "cpu", "--out", str(told)], check=True)
    quality = json.loads(told.read_text())["quality"]
    return {"FVD": quality["fvd"], "sFVD": quality["sfvd"]["mean"], "tFVD": quality["tfvd"]["mean"]}


def _people() -> int:
    """Of a training split of the world, see `world.clips`."""
    return sum(scene.COUNTS.values()) // 4
