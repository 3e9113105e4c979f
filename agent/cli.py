"""`onthefly ...`: thin; each command is a few lines over the module that does it."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agent import (
    ablate,
    adapt_command,
    caption_command,
    dead_letters,
    demo,
    dry_run,
    faces_command,
    fvd_command,
    machine,
    policy_command,
    privacy_command,
    recipes,
    tune_command,
    video_command,
)
from agent.arguments import checked
from agent.sizing import Load, demand
from protocol import codec, logs, parent
from protocol.client import GeneratorClient
from protocol.errors import ConfigError, DatasetError, InvalidImage, InvalidRequest, OnTheFlyError
from protocol.messages import ImageGenerationRequest


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
    for add in (
        _demo_command,
        ablate.add_command,
        _up_command,
        _process_commands,
        caption_command.add,
        faces_command.add,
        _learning_commands,
        _size_command,
        _dead_commands,
        _generate_command,
        _video_command,
        privacy_command.add,
        fvd_command.add,
    ):
        add(commands)
    return parser


def _demo_command(commands: Any) -> None:
    command = commands.add_parser("demo", help="handwritten digits, end to end, on this machine")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    command.add_argument("--seed", type=_seed, default=0, help="of the images drawn, the model and the noise")
    command.set_defaults(run=lambda o: demo.demo(o.out, o.seed))


def _up_command(commands: Any) -> None:
    command = commands.add_parser("up", help="broker, generator and trainer on this machine, from one settings file")
    recipes.settings_arguments(command, required=True)
    command.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside and start anew")
    command.add_argument("--replicas", type=int, help="generators to start (default: agent.replicas, 1)")
    command.add_argument("--dry-run", action="store_true", help="only check the settings, and show what would be done")
    command.set_defaults(run=_up)


def _process_commands(commands: Any) -> None:
    serve = commands.add_parser("serve", help="a generator service")
    train = commands.add_parser("train", help="a trainer, against a service and a broker that run already")
    for command, module in ((serve, "generator_service"), (train, "trainer")):
        recipes.settings_arguments(command)
        command.set_defaults(run=_become, module=module)
    train.add_argument("--fresh", action="store_true", help="set an earlier run of this name aside")
    train.add_argument("--processes", type=_positive(int), help="that train it together (default: one)")


def _learning_commands(commands: Any) -> None:
    for kind, make in (
        (adapt_command, machine.adapt),
        (tune_command, machine.tune),
        (policy_command, machine.learn_policy),
    ):
        command = kind.add(commands)
        _service(command)
        command.set_defaults(run=partial(_learn, kind, make))


def _size_command(commands: Any) -> None:
    command = commands.add_parser("size", help="how many generators a trainer needs, from measured numbers")
    command.add_argument("--run", type=Path, dest="measured", help="folder of a run, which tells the next two")
    command.add_argument("--samples", type=_positive(int), help="that an iteration asks for: k * m")
    command.add_argument("--train-seconds", type=_positive(float), help="of an iteration, without waiting")
    command.add_argument("--rate", type=_positive(float), required=True, help="samples a second of one generator")
    command.add_argument("--replicas", type=_positive(int), help="also say what so many would do")
    command.set_defaults(run=_size)


def _dead_commands(commands: Any) -> None:
    subject = commands.add_parser("dead", help="work units that failed for good: list, retry or drop them")
    actions = subject.add_subparsers(required=True, metavar="ACTION")
    command = actions.add_parser("list", help="the newest first")
    command.add_argument("--limit", type=int, default=20, help="how many (default: %(default)s)")
    _service(command)
    command.set_defaults(run=_list_dead)
    for action, text in (("retry", "put their work on the queue anew"), ("drop", "throw them away")):
        command = actions.add_parser(action, help=text)
        command.add_argument("ids", nargs="*", metavar="ID", help="as `onthefly dead list` tells them")
        command.add_argument("--all", action="store_true", help="every one that there is now")
        _service(command)
        command.set_defaults(run=_treat_dead, action=action)


def _generate_command(commands: Any) -> None:
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


def _video_command(commands: Any) -> None:
    command = video_command.add(commands)
    _service(command)
    command.set_defaults(run=_video)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A number above 0; what is none raises ValueError, which argparse tells."""

    def positive(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    positive.__name__ = f"positive {kind.__name__}"
    return positive


def _seed(text: str) -> int:
    """Raises ValueError, which argparse tells, for what cannot seed a generator."""
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise ValueError
    return seed


def _service(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of the service (default: %(default)s)")


def _client(options: argparse.Namespace, *, admin: bool = False) -> GeneratorClient:
    """`admin`: for what is an administrator's to do, where the service tells one from its users."""
    key = (os.environ.get("ONTHEFLY_ADMIN_KEY") if admin else None) or os.environ.get("ONTHEFLY_API_KEY")
    return GeneratorClient(options.url, api_key=key, timeout=600.0)


def _up(options: argparse.Namespace) -> int:
    replicas = [] if options.replicas is None else [f"agent.replicas={options.replicas}"]
    if options.dry_run:
        return dry_run.dry_run(options.config, [*options.set, *replicas])
    return machine.up(options.config, [*options.set, *replicas], fresh=options.fresh)


def _become(options: argparse.Namespace) -> int:
    """Turn into a process of ours, which then gets every signal itself."""
    command = ["-m", options.module]
    command += ["--config", str(options.config)] if options.config else []
    command += [part for override in options.set for part in ("--set", override)]
    if processes := getattr(options, "processes", None):
        if status := subprocess.run([sys.executable, *command, "--check"]).returncode:
            return status  # said once, not by every process
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    command += ["--fresh"] if getattr(options, "fresh", False) else []
    os.execv(sys.executable, [sys.executable, *command])


def _learn(kind: Any, make: Callable[[GeneratorClient, Any], str], options: argparse.Namespace) -> int:
    job = kind.job(options)
    if job is None:
        print(f"{options.config} has no table [{kind.TABLE}]: nothing to do")
        return 0
    with _client(options, admin=True) as client:
        make(client, job)
    return 0


def _list_dead(options: argparse.Namespace) -> int:
    with _client(options) as client:
        dead_letters.show(client, options.limit)
    return 0


def _treat_dead(options: argparse.Namespace) -> int:
    if options.all == bool(options.ids):
        raise InvalidRequest(f"say which: onthefly dead {options.action} ID..., or --all")
    with _client(options, admin=True) as client:
        act = client.retry_dead_letter if options.action == "retry" else client.drop_dead_letter
        return dead_letters.treat(client, options.ids, act)


def _size(options: argparse.Namespace) -> int:
    if (options.measured is None) == (options.samples is None or options.train_seconds is None):
        raise InvalidRequest("say --run FOLDER, or --samples and --train-seconds")
    samples, train_s = demand(options.measured) if options.measured else (options.samples, options.train_seconds)
    if options.measured:
        print(f"{options.measured}: an iteration asks for {samples} samples and trains for {train_s:.1f} s")
    load = Load(samples, train_s, options.rate)
    needed = load.replicas()
    print(f"generators that the trainer never waits for: {needed}")
    for replicas in sorted({1, needed, options.replicas or needed}):
        took = f"async {load.async_s(replicas):.1f} s, sync {load.sync_s(replicas):.1f} s"
        waits = 1 - load.train_s / load.async_s(replicas)
        print(f"an iteration with {replicas}: {took}; async, the trainer waits {waits:.0%} of it")
    return 0


def _generate(options: argparse.Namespace) -> int:
    image = None
    if options.image is not None:
        try:
            data = options.image.read_bytes()
        except OSError as error:
            raise InvalidImage(f"cannot read {options.image}: {error.strerror}", param="image") from error
        image = codec.image_to_base64(codec.image_from_bytes(data, max_pixels=2**26))
    request = checked(
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


def _video(options: argparse.Namespace) -> int:
    with _client(options) as client:
        return video_command.run(options, client)


if __name__ == "__main__":
    sys.exit(main())
