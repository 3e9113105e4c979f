"""What messages are made of: their base, and the kinds of their fields. Knows no message."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Unit = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)]
Scheduler = Literal["ddim", "dpm-solver", "euler", "euler-a", "pndm", "unipc"]
Frames = Annotated[int, Field(ge=2, le=1024)]  # of a clip
Fps = Annotated[float, Field(gt=0.0, le=240.0, allow_inf_nan=False)]
Resampling = Annotated[int, Field(ge=0, le=20)]
LoraScale = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]


class Message(BaseModel):
    """Base of all messages: immutable, unknown fields refused, and nothing converted: `true` and "1" are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WeightsRef(Message):
    """Which weights made a sample. Written by the generator; a work unit is pinned to one when it is planned."""

    name: Name
    version: int = Field(ge=1)
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"
