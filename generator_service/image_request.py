"""From an OpenAI-shaped image request to rows for the engine, or the error that says what to change.

A documented field that cannot be honoured is refused by name. Knows nothing of HTTP nor of who runs the rows.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends.interface import Abilities, Backend, Row, Sampling, WeightSet
from generator_service.real_images import resized
from protocol.codec import image_from_base64
from protocol.errors import InvalidRequest, UnknownClass, UnsupportedField
from protocol.messages import Guidance, ImageGenerationRequest, Scheduler, Steps, Unit

MAX_SEED = 2**63 - 1
SHOWN_CLASSES = 20


class ImageDefaults(BaseModel):
    """What a request that leaves a field out gets."""

    model_config = ConfigDict(extra="forbid")

    steps: Steps = 50  # denoising steps of the whole schedule; fewer is faster and coarser
    scheduler: Scheduler = "ddim"
    guidance_scale: Guidance = 4.0  # 0 to 1: off; high: typical of its class, less diverse
    strength: Unit = 0.75  # of img2img: 0 returns the init image, 1 forgets it
    max_pixels: int = Field(default=16_000_000, ge=1)  # of an init image; larger ones are refused


@dataclass(frozen=True)
class ImageOrder:
    """A request that can be served: what to run, and what its reply says."""

    request: ImageGenerationRequest
    weights: WeightSet
    sampling: Sampling
    rows: list[Row]
    label: int | None
    class_name: str | None
    base_url: str  # of links in the reply


def order(
    request: ImageGenerationRequest,
    weights: WeightSet,
    backend: Backend,
    defaults: ImageDefaults,
    base_url: str = "",
) -> ImageOrder:
    """Check a request against what the weights can do. Init images get the backend's size at once, for orders wait in
    memory.

    Raises:
        UnsupportedField, UnknownClass, InvalidImage, InvalidRequest: `param` names the field.
    """
    can, native_size = backend.can, backend.native_size()
    if can.makes == "clip":
        raise InvalidRequest(
            f'weights {weights.ref} make clips: send a job of type "video" with a first frame to /v1/jobs',
            param="model",
        )
    _check_openai_fields(request)
    check_size(request.size, native_size)
    label = _label(request, weights.classes, can.conditioning)
    _check_abilities(request, weights, can)
    check_scheduler(request.scheduler, can)
    guidance = request.guidance_scale if request.guidance_scale is not None else defaults.guidance_scale
    check_prompts(request.prompt, request.negative_prompt, guidance, backend)
    image, strength = _init_image(request, native_size, defaults)
    rows = [
        Row(
            seed=seed,
            label=label,
            guidance_scale=guidance,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            image=image,
        )
        for seed in seeds(request.seed, request.n or 1)
    ]
    sampling = Sampling(
        steps=request.num_inference_steps or defaults.steps,
        scheduler=request.scheduler or defaults.scheduler,
        strength=strength,
        guided=guidance > 1.0,
        lora_scale=1.0 if request.lora_scale is None else request.lora_scale,
    )
    class_name = weights.classes[label] if label is not None else None
    request = request.model_copy(update={"image": None})
    return ImageOrder(request, weights, sampling, rows, label, class_name, base_url)


def _check_openai_fields(request: ImageGenerationRequest) -> None:
    served = {
        "quality": (None, "auto"),
        "style": (None,),
        "background": (None, "auto", "opaque"),
        "moderation": (None, "auto"),
        "stream": (None, False),
        "partial_images": (None, 0),
    }
    for name, values in served.items():
        value = getattr(request, name)
        if value not in values:
            allowed = " or ".join(repr(value) for value in values if value is not None)
            advice = f"use {allowed}, or leave it out" if allowed else "leave it out"
            raise UnsupportedField(f"{name} = {value!r} is not served here: {advice}", param=name)
    if request.output_compression is not None and request.output_format in (None, "png"):
        raise UnsupportedField(
            "png is lossless: leave output_compression out, or choose output_format jpeg or webp",
            param="output_compression",
        )


def _check_abilities(request: ImageGenerationRequest, weights: WeightSet, can: Abilities) -> None:
    if can.conditioning == "class" and request.negative_prompt is not None:
        raise UnsupportedField(
            "weights conditioned on classes take no negative prompt: leave negative_prompt out", param="negative_prompt"
        )
    if request.lora_scale is not None and weights.kind != "lora":
        raise UnsupportedField(f"weights {weights.ref} are no LoRA: leave lora_scale out", param="lora_scale")
    unseen = can.conditioning == "text" and weights.kind != "full" and weights.metadata.get("visual", "none") == "none"
    if request.class_label is not None and unseen:
        raise UnsupportedField(
            f"weights {weights.ref} have no visual tokens of classes: name the class in the prompt alone, and leave "
            "class_label out",
            param="class_label",
        )


def seeds(first: int | None, count: int) -> range:
    """The seeds of a request's rows; without a first one, drawn. Raises InvalidRequest."""
    first = secrets.randbelow(2**53) if first is None else first  # exact in a JSON number
    if first + count - 1 > MAX_SEED:
        raise InvalidRequest(f"seed + n - 1 must be at most {MAX_SEED}", param="seed")
    return range(first, first + count)


def check_scheduler(name: str | None, can: Abilities) -> None:
    """Raises UnsupportedField when the backend lacks it."""
    if name not in (None, *can.schedulers):
        raise UnsupportedField(f"no scheduler {name!r} here: use one of {', '.join(can.schedulers)}", param="scheduler")


def check_prompts(prompt: str, negative_prompt: str | None, guidance: float, backend: Backend) -> None:
    """Raises UnsupportedField for a negative prompt that would do nothing, and InvalidRequest for what is not read to
    its end. `guidance`: the strongest that is used."""
    if negative_prompt is not None and guidance <= 1.0:
        raise UnsupportedField(
            f"a negative prompt has no effect at guidance_scale = {guidance:g}: leave it out, or use more than 1",
            param="negative_prompt",
        )
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        tokens, most = (text and backend.prompt_length(text)) or (0, 0)
        if tokens > most:
            raise InvalidRequest(
                f"{name} has {tokens} tokens, and the text encoder reads {most}, two of which begin and end it: "
                "shorten it",
                param=name,
            )


def check_size(size: str | None, native_size: tuple[int, int], what: str = "images") -> None:
    """Raises InvalidRequest and UnsupportedField. `native_size`: (height, width)."""
    height, width = native_size
    if size in (None, "auto", f"{width}x{height}"):
        return
    if not re.fullmatch(r"[0-9]+x[0-9]+", size):
        raise InvalidRequest(f"size must look like {width}x{height}, or be auto", param="size")
    raise UnsupportedField(f"these weights make {width}x{height} {what} only: use that, or no size", param="size")


def _init_image(
    request: ImageGenerationRequest, native_size: tuple[int, int], defaults: ImageDefaults
) -> tuple[np.ndarray | None, float]:
    """(uint8 image or None, strength). Without an image the strength is 1: from noise."""
    if request.image is None:
        if request.strength is not None:
            raise InvalidRequest("strength says how far to leave the init image: send image too", param="strength")
        return None, 1.0
    image = resized(image_from_base64(request.image, max_pixels=defaults.max_pixels), native_size)
    return image, request.strength if request.strength is not None else defaults.strength


def _label(request: ImageGenerationRequest, classes: tuple[str, ...], conditioning: str) -> int | None:
    """Index of the class that the request names: in class_label, or else in its prompt when that says nothing more.

    Weights that read the prompt may know classes too, by their visual tokens; None there: no class.
    """
    wanted = request.class_label
    if conditioning == "text" and wanted is None:
        return None
    if not classes:
        raise UnsupportedField("these weights know no classes: leave class_label out", param="class_label")
    if isinstance(wanted, int):
        if not 0 <= wanted < len(classes):
            raise UnknownClass(
                f"class_label {wanted} is out of range: these weights have {len(classes)} classes, from 0",
                param="class_label",
            )
        return wanted
    if isinstance(wanted, str):
        if wanted not in classes:
            raise UnknownClass(f"no class {wanted[:100]!r}: {_listing(classes)}", param="class_label")
        return classes.index(wanted)
    return _named_in(request.prompt, classes)


def _named_in(prompt: str, classes: tuple[str, ...]) -> int:
    if prompt.strip() in classes:
        return classes.index(prompt.strip())
    for flags in (re.NOFLAG, re.IGNORECASE):
        found = {match.casefold() if flags else match for match in _any_class(classes, flags).findall(prompt)}
        named = [i for i, name in enumerate(classes) if (name.casefold() if flags else name) in found]
        if len(named) == 1:
            return named[0]
        if named:
            names = ", ".join(classes[index] for index in named[:SHOWN_CLASSES])
            raise UnknownClass(f"the prompt names {names}: name one class, or send class_label", param="prompt")
    raise UnknownClass(f"the prompt names no class: {_listing(classes)}, or send class_label", param="prompt")


@lru_cache(maxsize=32)
def _any_class(classes: tuple[str, ...], flags: re.RegexFlag) -> re.Pattern[str]:
    """Matches any class name as a whole word, the longest at each place."""
    names = "|".join(re.escape(name) for name in sorted(classes, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{names})(?!\w)", flags)


def _listing(classes: tuple[str, ...]) -> str:
    shown = ", ".join(classes[:SHOWN_CLASSES])
    return f"use one of {shown}" + (f" ... ({len(classes)} in all)" if len(classes) > SHOWN_CLASSES else "")
