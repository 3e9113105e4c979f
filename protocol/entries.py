"""Stream entries: what goes over the queue, and where a sample came from. HTTP bodies are in `messages`.

Each field says who writes it and what None means. Unknown fields are refused. This module does not know how entries
travel (`bus`) nor how pixels are encoded (`codec`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from protocol.fields import (
    Fps,
    Frames,
    Guidance,
    LoraScale,
    Message,
    Name,
    Resampling,
    Scheduler,
    Seed,
    Steps,
    Unit,
    WeightsRef,
)
from protocol.video import GuidanceCurve


class BlobRef(Message):
    """Claim check: where the bytes of an entry lie, and what they must be."""

    ref: str  # "redis:{key}" or "file:{path}"
    sha256: str
    size: int


class WorkRow(Message):
    """One sample to make. Written by the planner."""

    sample_id: str
    source_id: str  # the marginal sample, or "class:{name}"
    index: int
    seed: Seed
    label: int
    class_name: str
    prompt: str
    negative_prompt: str | None = None
    guidance_scale: Guidance
    guidance: GuidanceCurve | None = None  # of each frame of a clip; None: guidance_scale, of all frames alike
    init_id: str | None = None  # dataset sample that gives the init image; None: from noise, or from init_blob
    init_frame: int | None = Field(default=None, ge=0)  # which frame of that clip; None: its first
    caption: str | None = None  # the source's, which a perturbation of the prompt starts from; None: it has none
    prompt_by: str | None = None  # as in `Sample`, of a prompt that is final
    action_units: list[str] = []  # codes that a final prompt was composed from


class Versions(Message):
    """A caption's versions, as one replica made them and all use them. Written by who makes a unit."""

    texts: list[str]
    by: list[str]  # of each, as in `Sample.prompt_by`


class WorkUnit(Message):
    """One GPU batch to make, on the stream `work`. All rows share the settings named here."""

    id: str  # "{run}.{feedback}.{unit}.{fingerprint of the feedback}"
    run: Name
    feedback: int
    unit: int  # index within the feedback, from 0
    units: int  # how many units the feedback has
    model_version: int
    weights: WeightsRef
    steps: Steps
    scheduler: Scheduler
    strength: Unit  # 1: from noise
    lora_scale: LoraScale = 1.0  # of weights that are a LoRA
    frames: Frames | None = None  # of each clip; None: these are images
    fps: Fps | None = None  # that clips play with
    resampling: Resampling = 0  # repeats of each step of a clip by re-noising
    policy: bool = False  # the weights' policy chooses steps and guidance of each clip; `steps` says nothing then
    expressions: bool = False  # prompts are composed from action units by who makes the unit, for each row's class and
    # first frame; false: they stand as they are
    versions: int | None = Field(default=None, ge=1)  # m of the caption perturbation, made by who makes the unit: row
    # `index` gets version `index` modulo m; None: the prompts stand as they are
    rows: list[WorkRow]
    init_blob: BlobRef | None = None  # uint8 "images" [rows, H, W, 3], when the feedback carried pixels
    attempt: int = Field(default=1, ge=1)  # how often it is asked for: again when its answer was lost
    missing: list[str] = []  # ids of samples that an answer which was lost had given up; the next answer repeats them
    request_id: str | None = None  # of the HTTP request that asked for it; None: it did not come by HTTP
    traceparent: str | None = None  # W3C trace context of the span that planned it; None: not traced


class Sample(Message):
    """One synthetic sample and where it came from. Written by the generator; also `GET /v1/samples/{id}`."""

    id: str
    run: str | None  # None: made for a REST request
    feedback: int | None
    model_version: int | None
    source_id: str | None
    index: int
    seed: Seed
    label: int | None
    class_name: str | None
    prompt: str
    negative_prompt: str | None = None
    guidance_scale: float
    guidance: GuidanceCurve | None = None  # of each frame of a clip; None: guidance_scale, of all frames alike
    steps: int  # of each frame, where it is a clip
    scheduler: str
    strength: float
    lora_scale: float = 1.0
    frames: int | None = None  # of the clip, the first one included; None: it is an image
    fps: float | None = None
    resampling: int = 0
    policy: bool = False  # the weights' policy chose steps and guidance
    init_id: str | None = None
    init_frame: int | None = None  # which frame of that sample the clip begins with
    action_units: list[str] = []  # codes that the prompt was composed from, such as "AU04"
    prompt_by: str | None = None  # what perturbed the caption, or composed the prompt from action units: a model's
    # name, or "template"; None: nothing did
    weights: WeightsRef
    created: float
    user: str | None = None
    nearest_real: str | None = None  # dataset sample id; None: no dataset mounted
    nearest_distance: float | None = None  # root mean square pixel difference in [0, 1]
    near_copy: bool = False


class SampleBatch(Message):
    """The answer to one work unit, on the stream `batches:{run}`. A unit that failed for good has an `error`."""

    unit_id: str
    run: Name
    feedback: int
    unit: int
    units: int
    model_version: int
    weights: WeightsRef
    samples: list[Sample]
    missing: list[str] = []  # ids of the samples that were asked for and failed
    blob: BlobRef | None  # uint8 "images" [samples, H, W, 3], of clips [samples, M, H, W, 3]; None when failed
    error: dict[str, Any] | None = None  # problem document
    init_blob: BlobRef | None = None  # its work unit's, kept until the answer is taken in; None when failed
    attempt: int = Field(default=1, ge=1)  # its work unit's
    request_id: str | None = None  # its work unit's
    traceparent: str | None = None  # of the span that made it, or else its work unit's
    worker: str
    started: float  # unix seconds: the denoising interval on the worker
    finished: float
    captions_s: float = 0.0  # seconds that the worker spent on the versions of captions before that


class DeadLetter(Message):
    """What could not be delivered, on the stream `dead`."""

    stream: str
    entry: str  # the entry's body as it was
    deliveries: int
    problem: dict[str, Any]
    time: float
