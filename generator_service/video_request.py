"""From a request for clips to rows for the engine, or the error that says what to change.

Knows nothing of HTTP, of who runs the rows, nor of how a policy chooses what a request leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends.interface import Backend, Row, Sampling, WeightSet
from generator_service.image_request import check_prompts, check_scheduler, check_size, seeds
from generator_service.real_images import resized
from protocol.codec import image_from_base64
from protocol.errors import InvalidImage, InvalidRequest
from protocol.fields import Fps, Frames, Guidance, Resampling, Scheduler, Steps
from protocol.video import VideoGenerationRequest

POLICY = "policy"  # kind of weights that choose steps and guidance themselves


class VideoDefaults(BaseModel):
    """What a request for clips that leaves a field out gets."""

    model_config = ConfigDict(extra="forbid")

    frames: Frames = 16  # of a clip, the first one included; each takes as long as an image
    fps: Fps = 8.0  # frames a second that a clip plays with
    steps: Steps = 10  # T, denoising steps of each frame; fewer is faster and coarser
    scheduler: Scheduler = "ddim"
    resampling: Resampling = 0  # repeats of each step by re-noising; each takes as long again as the step
    guidance_scale: Guidance = 9.0  # of all frames alike; 0 to 1: off; high: as the prompt says, less natural
    max_pixels: int = Field(default=16_000_000, ge=1)  # of a first frame; larger ones are refused


@dataclass(frozen=True)
class VideoOrder:
    """A request that can be served: what to run, and what its reply says."""

    request: VideoGenerationRequest
    weights: WeightSet
    sampling: Sampling
    rows: list[Row]
    fps: float
    base_url: str  # of links in the reply


def order_video(
    request: VideoGenerationRequest,
    weights: WeightSet,
    backend: Backend,
    defaults: VideoDefaults,
    base_url: str = "",
) -> VideoOrder:
    """Check a request against what the weights can do. What it leaves open is for the policy of the weights, where they
    have one; a request that says some of it gets the rest from the settings.

    Raises:
        UnsupportedField, InvalidImage, InvalidRequest: `param` names the field.
    """
    if backend.can.makes != "clip":
        raise InvalidRequest(
            f'weights {weights.ref} make images only: send a job of type "generate", or ask a service whose backend '
            "makes clips",
            param="model",
        )
    native_size = backend.native_size()
    check_size(request.size, native_size, "clips")
    check_scheduler(request.scheduler, backend.can)
    policy = weights.kind == POLICY and request.leaves_sampling_open
    scale = request.guidance_scale if request.guidance_scale is not None else defaults.guidance_scale
    strongest = math.inf if policy else scale if request.guidance is None else request.guidance.maximum
    check_prompts(request.prompt, request.negative_prompt, strongest, backend)
    first = _first_frame(request.image, native_size, defaults.max_pixels)
    rows = [
        Row(
            seed=seed,
            label=None,
            guidance_scale=scale,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=first,
            guidance=request.guidance,
        )
        for seed in seeds(request.seed, request.n or 1)
    ]
    sampling = Sampling(
        steps=request.num_inference_steps or defaults.steps,
        scheduler=request.scheduler or defaults.scheduler,
        guided=strongest > 1.0,
        frames=request.num_frames or defaults.frames,
        resampling=defaults.resampling if request.resampling is None else request.resampling,
        policy=policy,
    )
    request = request.model_copy(update={"image": ""})  # which may be large, and is not needed any more
    return VideoOrder(request, weights, sampling, rows, request.fps or defaults.fps, base_url)


def _first_frame(text: str, native_size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """uint8 [H, W, 3] at the backend's size, for orders wait in memory. Raises InvalidImage."""
    try:
        return resized(image_from_base64(text, max_pixels=max_pixels), native_size)
    except InvalidImage as error:
        raise InvalidImage(error.message, param="image") from error
