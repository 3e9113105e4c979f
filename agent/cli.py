"""`onthefly ...`: thin; each command is a few lines over the module that does it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agent import demo, machine
from protocol import codec, logs, parent
from protocol.client import GeneratorClient
from protocol.errors import ConfigError, DatasetError, InvalidImage, InvalidRequest, OnTheFlyError
from protocol.messages import AdaptJob, ImageGenerationRequest

Body = TypeVar("Body", bound=BaseModel)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 wrong settings or arguments, 130 interrupted."""
    options = _parser().parse_args(arguments)
    logs.setup("onthefly")
    parent.interruptible()
    try:
        return options.run(options)
    except OnTheFlyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DatasetError | InvalidRequest) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="onthefly", description="A training loop that asks for the data it needs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="handwritten digits, end to end, on this machine")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    command.add_argument("--seed", type=_seed, default=0, help="of the images drawn, the model and the noise")
    command.add_argument("--seeds", type=int, help="instead: every arm over so many seeds, mean and standard error")
    command.set_defaults(run=lambda o: demo.study(o.out, o.seeds) if o.seeds else demo.demo(o.out, o.seed))

    command = commands.add_parser("up", help="broker, generator and trainer on this machine, from one settings file")
    _settings(command, required=True)
    command.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside and start anew")
    command.set_defaults(run=lambda o: machine.up(o.config, o.set, fresh=o.fresh))

    for name, module, text in (
        ("serve", "generator_service", "a generator service"),
        ("train", "trainer", "a trainer, against a service and a broker that run already"),
    ):
        command = commands.add_parser(name, help=text)
        _settings(command)
        if name == "train":
            command.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside")
        command.set_defaults(run=_become, module=module)

    command = commands.add_parser("adapt", help="fine-tune a running service on its dataset")
    _service(command)
    command.add_argument("name", help="of the weight set that results")
    command.add_argument("--base", help="weights to start from (default: the service's checkpoint)")
    for field, kind in (("steps", int), ("batch-size", int), ("learning-rate", float), ("seed", int)):
        default = AdaptJob.model_fields[field.replace("-", "_")].default
        command.add_argument(f"--{field}", type=kind, default=default, help=f"(default: {default})")
    command.add_argument("--activate", action="store_true", help="serve with the result when it is ready")
    command.set_defaults(run=_adapt)

    command = commands.add_parser("generate", help="images from a running service")
    _service(command)
    command.add_argument("prompt", help="text; for class-conditional weights a class name")
    command.add_argument("-n", type=int, default=1, help="how many")
    command.add_argument("--model", help="weights, NAME or NAME@VERSION (default: the active ones)")
    command.add_argument("--seed", type=int, help="of the first image")
    command.add_argument("--steps", type=int, help="denoising steps")
    command.add_argument("--guidance-scale", type=float)
    command.add_argument("--image", type=Path, help="start from this image")
    command.add_argument("--strength", type=float, help="how far from --image: 0 keeps it, 1 forgets it")
    command.add_argument("--out", type=Path, default=Path("."), help="folder for the PNG files")
    command.set_defaults(run=_generate)
    return parser


def _seed(text: str) -> int:
    """Raises ValueError, which argparse tells, for what cannot seed a generator."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise ValueError
    return seed


def _settings(command: argparse.ArgumentParser, *, required: bool = False) -> None:
    command.add_argument("--config", type=Path, required=required, help="settings file (TOML)")
    command.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a setting")


def _service(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")


def _client(options: argparse.Namespace) -> GeneratorClient:
    return GeneratorClient(options.url, api_key=os.environ.get("ONTHEFLY_API_KEY"), timeout=600.0)


def _checked(message: type[Body], **fields: Any) -> Body:
    """A message from the command line; fields that are None are left out."""
    try:
        return message.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"{first['loc'][0]}: {first['msg']} (it is {first['input']!r})") from error


def _become(options: argparse.Namespace) -> int:
    """Turn into a process of ours, which then gets every signal itself."""
    command = [sys.executable, "-m", options.module]
    command += ["--config", str(options.config)] if options.config else []
    command += [part for override in options.set for part in ("--set", override)]
    command += ["--fresh"] if getattr(options, "fresh", False) else []
    os.execv(sys.executable, command)


def _adapt(options: argparse.Namespace) -> int:
    job = _checked(
        AdaptJob,
        name=options.name,
        base=options.base,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        activate=options.activate,
        again=True,
    )
    with _client(options) as client:
        machine.adapt(client, job)
    return 0


def _generate(options: argparse.Namespace) -> int:
    image = None
    if options.image is not None:
        try:
            data = options.image.read_bytes()
        except OSError as error:
            raise InvalidImage(f"cannot read {options.image}: {error.strerror}", param="image") from error
        image = codec.image_to_base64(codec.image_from_bytes(data, max_pixels=2**26))
    request = _checked(
        ImageGenerationRequest,
        prompt=options.prompt,
        n=options.n,
        model=options.model,
        seed=options.seed,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        image=image,
        strength=options.strength,
    )
    with _client(options) as client:
        answer = client.generate(request)
    options.out.mkdir(parents=True, exist_ok=True)
    for made in answer.data:
        path = options.out / f"{made.sample_id}.png"
        path.write_bytes(codec.image_to_bytes(codec.image_from_base64(made.b64_json or "", max_pixels=2**26)))
        print(f"{path}  seed {made.seed}  {answer.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
