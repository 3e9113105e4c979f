"""HTTP bodies: what is said to the generator service and what it answers. Stream entries are in `entries`.

Each field says who writes it and what None means. Unknown fields are refused everywhere. This module does not know
how messages travel (`bus`, `client`) nor how pixels are encoded (`codec`).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from protocol import prompts
from protocol.fields import Finite, Guidance, LoraScale, Message, Name, Scheduler, Seed, Steps, Unit, WeightsRef
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob
from protocol.video import VideoJob

# ---------------------------------------------------------------- identity


def sample_id(run: str, feedback: int, source: str, index: int) -> str:
    """Id of one synthetic sample: the same question always has the same answer, so a retried unit repeats it.

    Args:
        run: run name. feedback: index of the feedback (the trainer's iteration). source: sample id, or `class:{name}`.
        index: which of the source's images this is, from 0.
    """
    text = "\0".join((run, str(feedback), source, str(index)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


CLASS_SOURCE = "class:"  # no id of a real sample begins so


def class_source(name: str) -> str:
    """The source of a sample that was made for a class, not for a sample."""
    return CLASS_SOURCE + name


def seed_of(sample: str) -> int:
    """Seed of a sample, from its id; in [0, 2**63)."""
    return int(sample[:16], 16) >> 1


# ---------------------------------------------------------------- weights


class WeightsInfo(WeightsRef):
    """One named weight set, as `GET /v1/weights` lists it."""

    backend: str
    kind: str  # "full", "class_embedding", later "lora", ...
    base: str | None  # "name@version" this one sits on; None for a full checkpoint
    classes: list[str]  # label index -> class name; empty for text-conditioned weights
    created: float  # unix seconds
    active: bool
    metadata: dict[str, Any] = {}  # what the adaptation recorded: steps, last loss, ...
    problem: str | None = None  # why it cannot be used, and the fields above say little; None: it can


class WeightsList(Message):
    object: Literal["list"] = "list"
    active: WeightsRef
    data: list[WeightsInfo]


# ---------------------------------------------------------------- images (OpenAI's images API, and extensions)


class ImageGenerationRequest(Message):
    """Body of `POST /v1/images/generations`. OpenAI's fields first, then ours.

    A documented OpenAI field that this service cannot honour is refused by name, never ignored.
    """

    prompt: str = Field(min_length=1, max_length=32_000)  # class-conditional weights: must name one class
    model: str | None = None  # "name" or "name@version" of a weight set; None: the active one
    n: int | None = Field(default=None, ge=1, le=64)  # None: 1
    size: str | None = None  # "WIDTHxHEIGHT"; None or "auto": the weights' own
    response_format: Literal["b64_json", "url"] | None = None  # None: b64_json
    output_format: Literal["png", "jpeg", "webp"] | None = None  # None: png
    output_compression: int | None = Field(default=None, ge=0, le=100)  # jpeg, webp quality; None: 100
    user: str | None = Field(default=None, max_length=256)  # kept in the sample's provenance
    quality: str | None = None  # only "auto"
    style: str | None = None  # refused
    background: str | None = None  # only "auto" and "opaque"
    moderation: str | None = None  # only "auto": there is no moderation model here
    stream: bool | None = None  # only false
    partial_images: int | None = None  # only 0

    negative_prompt: str | None = None  # text-conditioned weights only; refused by class-conditional ones
    num_inference_steps: Steps | None = None  # None: the service's setting
    guidance_scale: Guidance | None = None  # 0..1: off; None: the service's setting
    scheduler: Scheduler | None = None  # None: the service's setting
    seed: Seed | None = None  # of the first image; image i has seed + i; None: drawn, and told in the reply
    class_label: int | str | None = None  # index or name; None: taken from the prompt
    image: str | None = None  # base64 or data URL of the init image; None: from noise
    strength: Unit | None = None  # with `image`: 1 replaces it, 0 returns it; None: the service's setting
    lora_scale: LoraScale | None = None  # how much of the LoRA in `model` counts, 0: none; None: 1; LoRA weights only


class GeneratedImage(Message):
    b64_json: str | None = None
    url: str | None = None  # of the image on this replica; the same key opens it
    revised_prompt: str | None = None  # the class name, for class-conditional weights
    sample_id: str
    seed: Seed
    near_copy: bool = False  # closer to a real training image than the service's threshold


class ImagesResponse(Message):
    created: int  # unix seconds
    data: list[GeneratedImage]
    output_format: str
    size: str
    weights: WeightsRef


# ---------------------------------------------------------------- jobs


class GenerateJob(Message):
    type: Literal["generate"] = "generate"
    request: ImageGenerationRequest


class LoraOptions(Message):
    """What only method "lora" can be told (Real-Fake, as GenDataAgent uses it)."""

    rank: int = Field(default=4, ge=1, le=512)  # of the updates of the attention projections
    min_snr_gamma: float = Field(default=5.0, ge=0.0, allow_inf_nan=False)  # of the min-SNR weights; 0: all steps alike
    discrepancy: float = Field(default=0.003, ge=0.0, allow_inf_nan=False)  # weight of the within-class loss; 0: off
    visual: Literal["none", "class", "image"] = "class"  # CLIP feature in the prompt: none, class mean, image's own
    prompt: str = prompts.PROMPT  # of an image without caption; agent.prompt should say the same
    captioned_prompt: prompts.CaptionedTemplate = prompts.CAPTIONED_PROMPT  # of one with; likewise
    gradient_accumulation: int = Field(default=1, ge=1)  # batches of one optimiser step
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the forward passes; the LoRA stays float32
    cache: bool = True  # latents and text embeddings are computed once, and kept in memory
    checkpoint_every: int | None = Field(default=500, ge=1)  # steps between checkpoints to resume from; None: none
    validation: Unit = 0.1  # part of the images held out to measure the loss on; 0: none
    validate_every: int = Field(default=100, ge=1)  # steps between validations, each with a few pictures
    patience: int | None = Field(default=None, ge=1)  # validations without a better loss until it stops; None: never

    @model_validator(mode="after")
    def _patience_has_an_end(self) -> LoraOptions:
        if self.patience is not None and self.validation == 0:
            raise ValueError("patience counts validations: hold images out with validation, or leave patience out")
        return self


class AdaptJob(Message):
    """Fine-tune the generator on the service's dataset; the result is a named weight set."""

    type: Literal["adapt"] = "adapt"
    method: Literal["cold_start", "lora"] = "cold_start"  # the backend says which it can do
    lora: LoraOptions | None = None  # method "lora" only; None: the defaults
    name: Name  # of the resulting weight set; an existing name gets its next version
    again: bool = False  # false: when this very job was done before, on the same images, its weights are the result
    base: str | None = None  # weights to start from; None: the service's base checkpoint
    steps: int = Field(default=1000, ge=1, le=1_000_000)  # optimiser steps
    batch_size: int = Field(default=128, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0.0, le=1.0, allow_inf_nan=False)
    seed: Seed = 0
    activate: bool = False  # hot-swap to the result when it is ready

    @model_validator(mode="after")
    def _options_fit(self) -> AdaptJob:
        if self.lora is not None and self.method != "lora":
            raise ValueError('lora has options of method "lora": set that method, or leave lora out')
        return self


JobRequest = Annotated[GenerateJob | VideoJob | AdaptJob | TuneJob | PolicyJob, Field(discriminator="type")]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Job(Message):
    id: str
    type: str
    status: JobStatus
    created: float  # unix seconds
    started: float | None = None
    finished: float | None = None
    step: int = 0
    steps: int | None = None  # None: not known yet
    result: dict[str, Any] | None = None  # ImagesResponse, VideosResponse or WeightsInfo, when succeeded
    problem: dict[str, Any] | None = None  # problem document, when failed or cancelled


class JobList(Message):
    object: Literal["list"] = "list"
    data: list[Job]


class JobEvent(Message):
    """One server-sent event: `id: seq`, `event: kind`, `data:` this document."""

    seq: int
    job: str
    # "end" is the last one and carries the whole job; "skipped": those before `seq` are not kept any more
    kind: Literal["status", "progress", "skipped", "end"]
    time: float
    data: dict[str, Any]  # progress: step, steps, and loss when it learns, more when tuned; skipped: first and last


# ---------------------------------------------------------------- feedback


class MarginalSample(Message):
    """A real sample that the model is unsure of. Written by the trainer."""

    sample_id: str
    label: int = Field(ge=0)
    class_name: str
    caption: str | None = None  # None: the dataset has none
    score: Finite  # of the trainer's criterion; lower is more marginal
    pixels: str | None = None  # base64 image; None: the service reads the sample from its own dataset


class ClassShortage(Message):
    """A class that is short of data. Written by the trainer."""

    label: int = Field(ge=0)
    class_name: str
    images: int = Field(ge=1)  # how many it lacks; clips, where samples are clips


class Feedback(Message):
    """Body of `POST /v1/feedback`: what the model finds hard now. Answered 202 with `FeedbackAccepted`."""

    run: Name
    feedback: int = Field(ge=0)  # the trainer's iteration; one feedback each
    model_version: int = Field(ge=0)  # optimiser updates done when the scores were taken
    samples: list[MarginalSample] = []
    classes: list[ClassShortage] = []
    images_per_sample: int | None = Field(default=None, ge=1, le=1000)  # None: the agent's setting
    model: str | None = None  # weights to use; None: the active ones when this is planned

    @model_validator(mode="after")
    def _asks_for_something(self) -> Feedback:
        if not self.samples and not self.classes:
            raise ValueError("feedback names neither samples nor classes: send at least one")
        return self

    def fingerprint(self) -> str:
        """Hash of the whole question. Part of its work units' ids, so that an answer can be told from one to another
        question that an earlier run of the same name asked."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class FeedbackAccepted(Message):
    run: str
    feedback: int
    units: int  # SampleBatch entries that will come, failed ones included
    samples: int
    weights: WeightsRef
