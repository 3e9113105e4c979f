"""`onthefly privacy`: samples of a weight set, of every class, and a report on what they give away of real images.

Makes the samples through a running service; what they give away is measured by the trainer's own `trainer.privacy`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from agent import machine
from agent.recipes import settings_arguments
from agent.settings import AgentConfig
from protocol import codec, config, prompts
from protocol.client import GeneratorClient
from protocol.dataset import Dataset, DatasetConfig
from protocol.dataset_layout import METADATA, check_root
from protocol.errors import ConfigError, UnknownClass, UnknownWeights, WrongWeights
from protocol.messages import ImageGenerationRequest, WeightsInfo

AT_ONCE = 16  # images of one request
SEEDS = 2**63


def add(commands: Any) -> None:
    """The command's parser."""
    told = "The settings are the service's: they name its dataset, which the weights were adapted on."
    command = commands.add_parser("privacy", help="what a weight set gives away of its training images", epilog=told)
    command.add_argument("name", metavar="NAME[@VERSION]", help="of the weights; the newest version, if it says none")
    settings_arguments(command, required=True)
    command.add_argument("--samples", type=int, default=500, help="how many, of all classes (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the first sample; each has the next (default: 0)")
    told = "of the dataset, that the generator has not seen (default: %(default)s)"
    command.add_argument("--held-out", metavar="SPLIT", default="test", help=told)
    told = "compare these too, beside pixels; repeatable: timm:MODEL"
    command.add_argument("--features", action="append", default=[], metavar="NAME", help=told)
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("privacy"), help="folder (default: %(default)s)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the samples and their report; returns the report's exit status."""
    settings = config.load(options.config, options.set)
    config.check_tables(settings, config.TABLES)
    data = DatasetConfig.of_service(settings)
    if data.split in (None, options.held_out):
        raise ConfigError(
            f"--held-out {options.held_out} is not held out from {data.split or 'all of the dataset'}, which the "
            "generator learns from: name another split, and the training images' with dataset.split",
            param="held_out",
        )
    check_root(data.root, options.held_out, data.layout)
    classes, samples = Dataset.open(data).classes, options.out / "samples"
    if options.samples < len(classes) or not 0 <= options.seed <= SEEDS - options.samples:
        raise ConfigError(
            f"--samples must be {len(classes)} at least, one of each class, and --seed and what follows in [0, 2**63)",
            param="samples",
        )
    if samples.exists():
        raise ConfigError(f"{samples} is there already: remove it, or choose another --out", param="out")
    with GeneratorClient(options.url, api_key=os.environ.get("ONTHEFLY_API_KEY"), timeout=600.0) as client:
        weights = find(client.weights().data, options.name)
        asked = questions(
            weights, classes, options.samples, options.seed, config.section(settings, "agent", AgentConfig)
        )
        write(client, weights, asked, samples)
    command = [
        "--samples",
        str(samples),
        "--title",
        f"{weights.name}@{weights.version}",
        "--config",
        str(options.config),
    ]
    command += [part for override in options.set for part in ("--set", override)]
    command += [part for name in options.features for part in ("--features", name)]
    if "near_copy_distance" in settings.get("generator", {}):
        command += ["--near-copy", str(settings["generator"]["near_copy_distance"])]
    command += ["--held-out", options.held_out, "--out", str(options.out / "privacy.html")]
    return subprocess.run([sys.executable, "-m", "trainer.privacy", *command]).returncode


def find(known: Sequence[WeightsInfo], name: str) -> WeightsInfo:
    """The weights "name", whose newest version it is, or "name@version". Raises UnknownWeights."""
    named = [weights for weights in known if name in (weights.name, str(weights))]
    if not named:
        there = ", ".join(map(str, known)) or "none"
        raise UnknownWeights(f"the service has no weights {name!r}; it has {there}", param="name")
    return max(named, key=lambda weights: weights.version)


def questions(
    weights: WeightsInfo, classes: Sequence[str], samples: int, seed: int, agent: AgentConfig
) -> list[tuple[str, ImageGenerationRequest]]:
    """What to ask the service, and of which class: so many samples, as many of each class as can be, and seeds that
    follow each other.

    Raises:
        UnknownClass: the weights do not know a class of the dataset.
    """
    if weights.classes and (missing := sorted(set(classes) - set(weights.classes))):
        raise UnknownClass(
            f"{weights} knows no class {', '.join(missing[:20])}: name weights that were adapted to this dataset",
            param="name",
        )
    found = []
    for number, name in enumerate(classes):
        wanted = samples // len(classes) + (number < samples % len(classes))
        for start in range(0, wanted, AT_ONCE):
            count = min(AT_ONCE, wanted - start)
            if weights.classes:
                told = {"prompt": name, "class_label": name}
            else:
                filled = prompts.fill(agent.prompt, agent.captioned_prompt, name, None)
                told = {"prompt": filled, "negative_prompt": agent.negative_prompt}
            found.append((name, ImageGenerationRequest(model=str(weights), n=count, seed=seed, **told)))
            seed += count
    return found


def write(
    client: GeneratorClient, weights: WeightsInfo, asked: Sequence[tuple[str, ImageGenerationRequest]], folder: Path
) -> None:
    """Ask, and write the pictures as a dataset: PNG files, and labels and seeds in their metadata.

    Raises:
        WrongWeights: the service did not use these weights. And what the service answers.
    """
    folder.mkdir(parents=True)
    lines = []
    for name, request in track(asked, description=f"samples of {weights}", console=machine.console, transient=True):
        for seed, image in _answers(client, weights, request):
            file = f"{len(lines):06d}.png"
            (folder / file).write_bytes(image)
            lines.append({"file_name": file, "label": name, "seed": seed, "weights": str(weights)})
    (folder / METADATA).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _answers(
    client: GeneratorClient, weights: WeightsInfo, request: ImageGenerationRequest
) -> Iterator[tuple[int, bytes]]:
    """Seed and PNG file of each image."""
    answer = client.generate(request)
    if (answer.weights.name, answer.weights.digest) != (weights.name, weights.digest):
        raise WrongWeights(f"the service made samples with {answer.weights}, and {weights} were asked for")
    for made in answer.data:
        pixels = codec.image_from_base64(made.b64_json or "", max_pixels=2**26)
        yield made.seed, codec.image_to_bytes(pixels)
