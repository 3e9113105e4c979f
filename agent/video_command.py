"""`onthefly video`: clips from a running service, each beginning with one image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from agent.arguments import checked
from agent.follow import follow
from protocol import codec
from protocol.client import GeneratorClient
from protocol.errors import InvalidImage
from protocol.video import VideoGenerationRequest, VideoJob, VideosResponse

MAX_PIXELS = 2**26  # of the first frame


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser; who adds it says how it is run."""
    command = commands.add_parser("video", help="clips from a running service that begin with an image")
    command.add_argument("image", type=Path, help="the first frame")
    command.add_argument("prompt", help="what happens from there on")
    command.add_argument("-n", type=int, default=1, help="how many")
    command.add_argument("--frames", type=int, help="of each, the first one included (default: the service's)")
    command.add_argument("--model", help="weights, NAME or NAME@VERSION (default: the active ones)")
    command.add_argument("--seed", type=int, help="of the first clip")
    told = "(default: as the policy of the weights chooses, or the service's)"
    command.add_argument("--steps", type=int, help=f"denoising steps of each frame {told}")
    command.add_argument("--guidance-scale", type=float, help=told)
    command.add_argument("--format", help="webp, gif or mp4 (default: webp)")
    command.add_argument("--out", type=Path, default=Path("."), help="folder for the files")
    return command


def run(options: argparse.Namespace, client: GeneratorClient) -> int:
    """Make the clips, showing how far they are; Ctrl-C cancels them."""
    request = checked(
        VideoGenerationRequest,
        prompt=options.prompt,
        image=_first_frame(options.image),
        model=options.model,
        n=options.n,
        num_frames=options.frames,
        output_format=options.format,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
    )
    job = follow(client, VideoJob(request=request))
    answer = VideosResponse.model_validate(job.result)
    options.out.mkdir(parents=True, exist_ok=True)
    for made in answer.data:
        path = options.out / f"{made.sample_id}.{answer.output_format}"
        path.write_bytes(client.video(made.sample_id, job.id))
        print(f"{path}  seed {made.seed}  {made.steps} steps  {answer.weights}")
    return 0


def _first_frame(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidImage(f"cannot read {path}: {error.strerror}", param="image") from error
    return codec.image_to_base64(codec.image_from_bytes(data, max_pixels=MAX_PIXELS))
