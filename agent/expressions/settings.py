"""The table [agent.expressions]: who writes the prompts of clips, from what, and how the clips are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agent.language import OpenAIConfig
from protocol.fields import Fps, Frames, Guidance, Resampling, Steps, Unit
from protocol.video import GuidanceCurve

FIXED = "a person with an expression of {class_name}"


class VisionEndpoint(OpenAIConfig):
    """An endpoint that reads pictures too. Defaults are the paper's (4.2)."""

    model: str = "qwen2.5vl"  # as the endpoint calls it
    temperature: float | None = Field(default=0.8, ge=0.0, le=2.0)
    max_tokens: int | None = Field(default=256, ge=1)
    extra: dict[str, Any] = {"top_p": 0.9}


class ExpressionsConfig(BaseModel):
    """Prompts from facial action units (ARGen 3.2), and the clips made of them. Only backends that make clips use it.

    The arms of Tables 3 and 5: "fixed" is the baseline and without ASI; a model without `retrieval` is VLM-only, with
    it VLM+RAG; `policy = false` is without ARD, and with `guidance` unset TI2V-Zero.
    """

    model_config = ConfigDict(extra="forbid")

    composer: Literal["template", "openai", "local", "fixed"] = "template"  # who writes the prompts: fixed phrases, a
    # model that sees the first frame, behind an endpoint or on this machine, or `fixed_prompt` alone
    fixed_prompt: str = Field(default=FIXED, min_length=1)  # of "fixed"; with {class_name}, where it is to be named
    openai: VisionEndpoint = VisionEndpoint()  # the model of composer = "openai"
    local: dict[str, Any] = {}  # that of composer = "local"; checked by its Config at loading
    rounds: int = Field(default=3, ge=1, le=20)  # that a model is asked in, while its answers are refused; then the
    # fixed phrases serve

    retrieval: bool = True  # a model may name the retrieved action units only; false: it is not told any
    candidates: int = Field(default=3, ge=1, le=100)  # k of eq. 8: entries of the emotion that are retrieved
    intensity: tuple[Unit, Unit] = (0.25, 0.6)  # range of r of eq. 9: 0 nothing of what an entry says, 1 all of it
    knowledge: Path | None = None  # TOML with entries of your own, in the place of ours for the emotions that it names
    mined: bool = True  # entries from what faces of the dataset do are added (eq. 7); false: the literature alone
    statistics: Path | None = None  # JSON that they are read from; None: what [generator.faces] finds, if anything
    aliases: dict[str, str] = {}  # class name -> emotion, for names that are not known

    neutral_classes: list[str] = ["neutral"]  # whose clips give the first frames; where there are none, or in [], clips
    # of any class that the feedback does not call short of data

    clips_per_unit: int = Field(default=8, ge=1, le=4096)  # rows of a work unit: one GPU batch
    frames: Frames = 16  # M, the first frame included
    fps: Fps = 8.0  # that clips play with
    policy: bool = True  # where the weights have a policy, it chooses steps and guidance; false: the settings below
    steps: Steps = 10  # T of each frame
    guidance_scale: Guidance = 9.0  # of all frames alike; 0 to 1 is off
    guidance: GuidanceCurve | None = None  # of each frame, in the place of guidance_scale
    resampling: Resampling = 0  # repeats of each step by re-noising

    @model_validator(mode="after")
    def _in_order(self) -> ExpressionsConfig:
        low, high = self.intensity
        if low > high or high == 0.0:
            raise ValueError(f"intensity = [{low:g}, {high:g}] is no range: write [low, high] with high above 0")
        return self
