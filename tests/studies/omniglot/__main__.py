"""Does tuning by reward help where an identity has five pictures? Handwritten characters, end to end, in numbers.

    python -m tests.studies.omniglot --archive omniglot_small1.zip --out DIR --seeds 0 1 2

A DiT that has seen other alphabets is adapted to twenty characters of a new one (cold start), tuned by reward, and
feeds a re-identification training that is measured on twenty characters more. Rewards come from a model of the other
alphabets; the judge has learnt the same identities from drawings that nobody else gets. All through the real service,
over HTTP and the queue. What DIR holds already is not made again; several seeds may run side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

from agent import machine
from agent.settings import AgentConfig
from protocol import config
from protocol.published import PublishedCard
from protocol.tuning import TuneJob
from tests.studies.omniglot import characters, generators, models, prior
from tests.studies.omniglot.scene import Scene, stage
from trainer import checkpoint
from trainer.metrics.verification import similarity, verify
from trainer.tasks.reid import Reid, ReidConfig

PRIOR_STEPS = 6000
ARMS = {  # what each changes in the trainer's settings; {cold} and {tuned} are weight sets
    "real only": ["trainer.mode=real"],
    "cold-start synthetic": ["trainer.feedback.model={cold}"],
    "tuned synthetic": ["trainer.feedback.model={tuned}"],
    "tuned, and lookahead": ["trainer.feedback.model={tuned}", "trainer.lookahead.enabled=true"],
}
GENERATORS = ("semantic", "coverage", "expression", "judge", "diversity")
TRAININGS = ("mAP", "rank1", "verification")


def tuning(seed: int, base: str, steps: int) -> TuneJob:
    return TuneJob.model_validate(
        {
            "name": "tuned",
            "base": base,
            "seed": seed,
            "steps": steps,
            "features": "published:reward",
            "rollout": {
                "identities": 20,
                "samples": 8,
                "denoising_steps": 10,
                "guidance_scale": 1.0,
                "batch_size": 80,
            },
            "update": {"learning_rate": 2e-3, "batch_size": 80, "max_gradient_norm": 0.02},
            "policy": {"rank": 8},
        }
    )


def study(archive: Path, out: Path, seed: int, steps: int) -> dict[str, Any]:
    """One seed; at once when it was done."""
    folder = out / f"seed-{seed}"
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    general, target = characters.read(archive, target=False), characters.read(archive, target=True)
    scene = stage(target, prior.build(out / "prior", general, PRIOR_STEPS), folder, seed)
    judge = models.judge(folder / "judge.safetensors", scene.held_out)
    model = models.reward_model(out / "reward.safetensors", general)
    found: dict[str, Any] = {"judge on the few real drawings": models.accuracy(judge, scene.few)}
    with machine.machine(scene.settings, []) as running:
        agent = config.section(config.load(scene.settings, []), "agent", AgentConfig)
        sets = {"cold": running.adapt(agent.adapt)}
        running.client.publish_model("reward", _published(model))
        sets["tuned"] = running.tune(tuning(seed, sets["cold"], steps))
        made = {str(weights): weights.metadata for weights in running.client.weights().data}
        found["tuning, minutes"] = made[sets["tuned"]]["seconds"] / 60
        found["generators"] = _generators(running, scene, judge, sets, folder)
        found["arms"] = {name: _arm(running, name, settings, scene, sets) for name, settings in ARMS.items()}
    result.write_text(json.dumps(found, indent=2))
    return found


def _published(model: torch.nn.Module) -> bytes:
    """As a trainer publishes it: without its classifier."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    side, half = models.REWARD_SIDE, (0.5, 0.5, 0.5)
    card = PublishedCard(
        model=models.REWARD_MODEL, size=(side, side), mean=half, std=half, run="other", iteration=0, updates=0
    )
    return save(state, card.metadata())


def _generators(
    running: machine.Machine, scene: Scene, judge: models.Judge, sets: dict[str, str], folder: Path
) -> dict[str, dict[str, float]]:
    measure = generators.Yardstick(scene, judge, folder / "weights")
    made = {
        "cold start": generators.drawn(running.client, sets["cold"], scene.few.names),
        "cold start, guidance 4": generators.drawn(running.client, sets["cold"], scene.few.names, guidance_scale=4.0),
        "tuned": generators.drawn(running.client, sets["tuned"], scene.few.names),
        "tuned, guidance 4": generators.drawn(running.client, sets["tuned"], scene.few.names, guidance_scale=4.0),
    }
    for name, samples in made.items():
        generators.picture(samples, folder / f"{name}.png")
    return {name: measure(samples) for name, samples in {"real, other drawers": scene.held_out, **made}.items()}


def _arm(
    running: machine.Machine, name: str, settings: list[str], scene: Scene, sets: dict[str, str]
) -> dict[str, float]:
    run = name.replace(",", "").replace(" ", "-")
    own = [f"trainer.run={run}", *(setting.format(**sets) for setting in settings)]
    folder = scene.settings.parent / "runs" / run
    folder.parent.mkdir(exist_ok=True)
    status = running.train(*(part for text in own for part in ("--set", text)), log=folder.with_suffix(".log")).wait()
    assert status == 0, f"the trainer of {name} ended with status {status}: see {folder}.log"
    summary = json.loads((folder / "summary.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"mAP": last["mAP"], "rank1": last["rank1"], "verification": _verification(folder, scene)} | {
        "updates": summary["updates"],
        "synthetic rows": sum(
            json.loads(line)["synthetic_rows"] for line in (folder / "metrics.jsonl").read_text().splitlines()
        ),
    }


def _verification(run: Path, scene: Scene) -> float:
    """Ten-fold accuracy on pairs of the identities that nobody learnt, by the run's last model."""
    settings = config.load(scene.settings, [])["trainer"]["model"]
    task = Reid(ReidConfig.model_validate(settings), scene.few.names)
    network = task.build_model()
    network.load_state_dict(checkpoint.load(run / "checkpoints")["model"])
    others = scene.others
    pictures = torch.nn.functional.interpolate(
        torch.from_numpy(others.images).float()[:, None], task.config.image_size, mode="bicubic", antialias=True
    )
    images = pictures.clamp(0, 255).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    features = torch.cat([task.features(network, task.preprocess(part)) for part in images.split(200)])
    first, second, same, fold = _pairs(others)
    return verify(similarity(features[first], features[second]), same, fold).accuracy


def _pairs(others: characters.Characters) -> tuple[torch.Tensor, ...]:
    """As many pairs of one identity as of two, in ten folds that share no drawing's identity."""
    rng, rows = np.random.default_rng(0), []
    identities = rng.permutation(len(others.names)).reshape(10, -1)
    for fold, members in enumerate(identities):
        own = [np.flatnonzero(others.labels == member) for member in members]
        for at, drawings in enumerate(own):
            for _ in range(60):
                rows.append((*rng.choice(drawings, 2, replace=False), True, fold))
                rows.append((rng.choice(drawings), rng.choice(own[at - 1]), False, fold))
    first, second, same, fold = (torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True))
    return first, second, same, fold


def _shown(results: list[dict[str, Any]], part: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=f"{part}, mean ± standard error of {len(results)} seeds")
    for column in ("", *columns):
        table.add_column(column)
    for row in results[0][part]:
        table.add_row(row, *(_estimate([result[part][row][column] for result in results]) for column in columns))
    return table


def _estimate(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="omniglot's images_background_small1.zip")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="rollouts of the tuning (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = [study(options.archive, options.out.resolve(), seed, options.steps) for seed in options.seeds]
    console = Console(width=140)
    console.print(_shown(results, "generators", GENERATORS))
    console.print(_shown(results, "arms", TRAININGS))
    for name in ("judge on the few real drawings", "tuning, minutes"):
        console.print(f"{name}: {_estimate([result[name] for result in results])}")


if __name__ == "__main__":
    main()
