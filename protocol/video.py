"""Clips over HTTP: what is asked for, and what comes of it. Says nothing of how clips are made, nor of how they travel.

Each field says who writes it and what None means.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.fields import Fps, Frames, Guidance, Message, Resampling, Scheduler, Seed, Steps, WeightsRef

Shape = Annotated[float, Field(ge=1.0, le=20.0, allow_inf_nan=False)]


class GuidanceCurve(Message):
    """Classifier-free guidance of each frame of a clip, f(m; a, b) (ARGen eq. 12), where the paper's values are."""

    minimum: Guidance = 7.0  # g_min: of the first and the last frames, as far as a and b bring it down to that
    maximum: Guidance = 11.0  # g_max
    a: Shape = 2.0  # 1: guidance does not rise from the start; higher: it rises late
    b: Shape = 2.0  # 1: it does not fall to the end; higher: it falls early
    peak_normalised: bool = False  # false: as printed, which reaches a quarter of the way from g_min to g_max at most
    # for a, b >= 2; true: scaled so that its peak is g_max

    @model_validator(mode="after")
    def _in_order(self) -> GuidanceCurve:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum = {self.minimum:g} is above maximum = {self.maximum:g}: exchange them")
        return self


class VideoGenerationRequest(Message):
    """A clip that begins with an image and goes on as a text says. The `request` of a job of type "video"."""

    prompt: str = Field(min_length=1, max_length=32_000)
    image: str  # base64 or data URL of the first frame
    model: str | None = None  # "name" or "name@version" of a weight set; None: the active one
    n: int | None = Field(default=None, ge=1, le=16)  # clips; None: 1
    size: str | None = None  # "WIDTHxHEIGHT"; None or "auto": the weights' own
    num_frames: Frames | None = None  # of the clip, the first one included; None: the service's setting
    fps: Fps | None = None  # frames a second that it plays with; None: the service's setting
    response_format: Literal["b64_json", "url"] | None = None  # None: url
    output_format: Literal["webp", "gif", "mp4"] | None = None  # None: webp, animated and lossless
    user: str | None = Field(default=None, max_length=256)  # kept in the sample's provenance

    negative_prompt: str | None = None
    num_inference_steps: Steps | None = None  # T of each frame; None: the policy of the weights, or the setting
    guidance_scale: Guidance | None = None  # of all frames alike, 0 to 1: off; None: as num_inference_steps
    guidance: GuidanceCurve | None = None  # of each frame, in the place of guidance_scale; None: as that
    resampling: Resampling | None = None  # repeats of each step by re-noising; None: the service's setting
    scheduler: Scheduler | None = None  # None: the service's setting
    seed: Seed | None = None  # of the first clip; clip i has seed + i; None: drawn, and told in the reply

    @model_validator(mode="after")
    def _one_guidance(self) -> VideoGenerationRequest:
        if self.guidance is not None and self.guidance_scale is not None:
            raise ValueError("guidance_scale is one value for all frames, and guidance a curve: send one of them")
        return self

    @property
    def leaves_sampling_open(self) -> bool:
        """Whether it says neither how many steps to take nor how to guide them, so that a policy may choose."""
        return self.num_inference_steps is None and self.guidance is None and self.guidance_scale is None


class VideoJob(Message):
    """Body of `POST /v1/jobs` for clips; its result is a `VideosResponse`."""

    type: Literal["video"] = "video"
    request: VideoGenerationRequest


class GeneratedVideo(Message):
    b64_json: str | None = None
    url: str | None = None  # of the clip on this replica; the same key opens it
    sample_id: str
    seed: Seed
    steps: int  # T: as asked for, or as the policy chose
    guidance_scale: float | None  # of all frames alike; None: `guidance` says
    guidance: GuidanceCurve | None
    near_copy: bool = False  # closer to a real clip than the service's threshold


class VideosResponse(Message):
    created: int  # unix seconds
    data: list[GeneratedVideo]
    output_format: str
    size: str
    frames: int
    fps: float
    policy: bool  # whether the policy of the weights chose steps and guidance
    weights: WeightsRef
