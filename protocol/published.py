"""Models that a trainer publishes: what their files say of themselves, and how the service lists them.

A file is safetensors: the tensors of a timm model without its classifier, and as metadata a `PublishedCard`. Each field
says what None means. Does not know the tensors, nor where files are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from protocol.errors import InvalidRequest
from protocol.fields import Finite, Message, Name

ENTRY = "published_model"  # of the metadata
Side = Annotated[int, Field(ge=8, le=2048)]
Spread = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class PublishedCard(Message):
    """What a file says of itself; written by the trainer."""

    model: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_.-]+)?$", max_length=200)  # timm's name of it
    options: dict[str, Any] = {}  # of timm.create_model beside num_classes = 0: img_size, ...
    size: tuple[Side, Side]  # (height, width) of its input in pixels
    mean: tuple[Finite, Finite, Finite]  # of the channels, in [0, 1] units
    std: tuple[Spread, Spread, Spread]
    run: Name  # that trains it
    iteration: int = Field(ge=0)  # of the run, finished when this was written; from 0
    updates: int = Field(ge=0)  # optimiser updates done

    def metadata(self) -> dict[str, str]:
        """As safetensors keep it. One entry: of several, the order, and with it the file's digest, would be any."""
        return {ENTRY: self.model_dump_json()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> PublishedCard:
        """What `metadata` gave; other entries are not looked at. Raises InvalidRequest: it is missing, or is not as it
        must be."""
        try:
            return cls.model_validate_json(metadata.get(ENTRY, ""))
        except ValueError as error:
            why = " ".join(str(error).split())[:300]
            raise InvalidRequest(
                f"the file's metadata {ENTRY!r} does not describe a published model ({why}): let the trainer write it "
                "(trainer.publish)",
                param="body",
            ) from error


class PublishedModel(Message):
    """One version of a published model, as `GET /v1/published-models` lists it."""

    name: Name
    version: int = Field(ge=1)
    digest: str  # sha256 of the file; "": not known, see `problem`
    size_bytes: int
    created: float  # unix seconds
    card: PublishedCard | None  # None: it cannot be read
    problem: str | None = None  # why it cannot be used; None: it can

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class PublishedModelList(Message):
    """Oldest version first within a name."""

    object: Literal["list"] = "list"
    data: list[PublishedModel]
