"""From feedback to work units: what to generate for the samples the model finds hard.

Decides how many images each source gets, their seeds, prompts, strength and guidance, and cuts them into GPU batches.
Knows nothing of HTTP, of the broker or of how images are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from protocol import prompts
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import InvalidRequest, UnknownClass, UnknownSource
from protocol.messages import (
    CLASS_SOURCE,
    ClassShortage,
    Feedback,
    Guidance,
    LoraScale,
    MarginalSample,
    Scheduler,
    Steps,
    Unit,
    WeightsRef,
    class_source,
    sample_id,
    seed_of,
)


class PlannerConfig(BaseModel):
    """How feedback becomes work. Defaults are GenDataAgent's (appendix E) where the paper gives them."""

    model_config = ConfigDict(extra="forbid")

    images_per_sample: int = Field(default=5, ge=1, le=1000)  # m: images for each marginal sample
    init: bool = True  # start from the marginal sample itself (img2img); false: from noise
    strength: Unit = 0.75  # of img2img: 0 returns the sample, 1 forgets it
    guidance_scale: Guidance = 7.5  # classifier-free guidance; 0 to 1 is off, high is typical but less diverse
    negative_prompt: str | None = None  # text-conditioned weights only
    prompt: str = prompts.PROMPT  # used where the sample has no caption; a LoRA wants the two that it was adapted on
    captioned_prompt: prompts.CaptionedTemplate = prompts.CAPTIONED_PROMPT
    perturb: Literal["template", "openai", "local", "none"] = "template"  # who makes m versions of each caption: fixed
    # phrases, a model behind an endpoint, one on this machine, or nobody; weights that read no prompts need none
    lora_scale: LoraScale = 1.0  # of weights that are a LoRA: 0 is the base, 1 as adapted
    steps: Steps = 50  # denoising steps of the whole schedule; img2img runs strength times as many
    scheduler: Scheduler = "ddim"
    unit_size: int = Field(default=32, ge=1, le=4096)  # rows in a work unit: one GPU batch
    max_images: int = Field(default=200_000, ge=1)  # of one feedback; one that asks for more is refused
    max_per_class: int | None = Field(default=None, ge=1)  # budget of one feedback for each class; None: no limit


def plan(
    feedback: Feedback,
    config: PlannerConfig,
    weights: WeightsRef,
    classes: Sequence[str],
    known: Callable[[str], bool],
    *,
    reads_prompts: bool = False,
) -> list[WorkUnit]:
    """Cut a feedback into work units. The same arguments give the same units, down to the seeds.

    Args:
        feedback: what the model finds hard.
        weights: the weight set that every unit is pinned to.
        classes: class names of these weights; empty when they are text-conditioned and take any class.
        known: whether the service's dataset holds a sample id.
        reads_prompts: whether these weights are conditioned on text; only then may captions be perturbed.

    Raises:
        UnknownClass: the weights do not know a class of the feedback.
        UnknownSource: an init image is wanted of a sample that the service lacks and that came without pixels.
        InvalidRequest: a source is named twice.
    """
    check_amount(feedback, config)
    _check(feedback, config, classes, known)
    every = (_row(feedback, config, *each) for each in asked(feedback, config))
    rows = list(within_budget(every, config.max_per_class))
    sources = {sample.sample_id for sample in feedback.samples}
    groups = [
        (config.strength if config.init else 1.0, [row for row in rows if row.source_id in sources]),
        (1.0, [row for row in rows if row.source_id not in sources]),
    ]
    chunks = [
        (strength, group[start : start + config.unit_size])
        for strength, group in groups
        for start in range(0, len(group), config.unit_size)
    ]
    perturbed, fingerprint = reads_prompts and config.perturb != "none", feedback.fingerprint()
    how = {
        "steps": config.steps,
        "scheduler": config.scheduler,
        "lora_scale": config.lora_scale,
        "versions": (feedback.images_per_sample or config.images_per_sample) if perturbed else None,
    }
    return [
        unit(feedback, weights, (number, len(chunks), fingerprint), chunk, strength=strength, **how)
        for number, (strength, chunk) in enumerate(chunks)
    ]


def unit(
    feedback: Feedback, weights: WeightsRef, place: tuple[int, int, str], rows: list[WorkRow], **how: object
) -> WorkUnit:
    """A work unit of a feedback.

    Args:
        place: its number, how many units there are, and the fingerprint of the feedback.
        how: its other fields, which say how the rows are made.
    """
    number, units, fingerprint = place
    about = {"run": feedback.run, "feedback": feedback.feedback, "model_version": feedback.model_version}
    name = f"{feedback.run}.{feedback.feedback}.{number}.{fingerprint}"
    return WorkUnit(**about, id=name, unit=number, units=units, weights=weights, rows=rows, **how)


def check_amount(feedback: Feedback, config: PlannerConfig) -> None:
    """Raises InvalidRequest: a source is named twice or like a class, or more is asked for than one feedback may."""
    repeated = [name for name, count in Counter(s.sample_id for s in feedback.samples).items() if count > 1]
    repeated += [name for name, count in Counter(s.class_name for s in feedback.classes).items() if count > 1]
    if repeated:
        raise InvalidRequest(f"feedback names {repeated[0]!r} twice: send each source once", param="samples")
    images = len(feedback.samples) * (feedback.images_per_sample or config.images_per_sample)
    images += sum(shortage.images for shortage in feedback.classes)
    if images > config.max_images:
        raise InvalidRequest(
            f"feedback asks for {images} images, and agent.max_images is {config.max_images}: ask for fewer samples or "
            "fewer images of each",
            param="images_per_sample",
        )
    for sample in feedback.samples:
        if sample.sample_id.startswith(CLASS_SOURCE):
            raise InvalidRequest(
                f"sample id {sample.sample_id!r}: it must not begin with {CLASS_SOURCE!r}", param="sample_id"
            )


def _check(feedback: Feedback, config: PlannerConfig, classes: Sequence[str], known: Callable[[str], bool]) -> None:
    for wanted in (*feedback.samples, *feedback.classes):
        if classes and wanted.class_name not in classes:
            raise UnknownClass(
                f"the weights in use do not know class {wanted.class_name!r}; they know {', '.join(classes[:20])}. "
                "Adapt the generator to this dataset first (`onthefly adapt`), or name other weights in `model`",
                param="class_name",
            )
    for sample in feedback.samples:
        if config.init and sample.pixels is None and not known(sample.sample_id):
            raise UnknownSource(
                f"sample {sample.sample_id!r} is not in the service's dataset: mount the same dataset on both sides, "
                "send `pixels` with the feedback, or set agent.init = false",
                param="sample_id",
            )


def asked(feedback: Feedback, config: PlannerConfig) -> Iterator[tuple[MarginalSample | ClassShortage, str, int]]:
    """All that a feedback asks for, in its order: what for, the source of that name, and which one of the source."""
    for sample in feedback.samples:
        for index in range(feedback.images_per_sample or config.images_per_sample):
            yield sample, sample.sample_id, index
    for shortage in feedback.classes:
        for index in range(shortage.images):
            yield shortage, class_source(shortage.class_name), index


def _row(
    feedback: Feedback,
    config: PlannerConfig,
    wanted: MarginalSample | ClassShortage,
    source: str,
    index: int,
) -> WorkRow:
    caption = getattr(wanted, "caption", None)
    from_sample = config.init and isinstance(wanted, MarginalSample) and wanted.pixels is None
    identity = sample_id(feedback.run, feedback.feedback, source, index)
    return WorkRow(
        sample_id=identity,
        source_id=source,
        index=index,
        seed=seed_of(identity),
        label=wanted.label,
        class_name=wanted.class_name,
        prompt=prompts.fill(config.prompt, config.captioned_prompt, wanted.class_name, caption),
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        init_id=source if from_sample else None,
        caption=caption,
    )


def within_budget(rows: Iterator[WorkRow], max_per_class: int | None) -> Iterator[WorkRow]:
    """At most `max_per_class` rows of each class, taken evenly from its sources: all first images before any second."""
    listed = list(rows)
    if max_per_class is None:
        return iter(listed)
    spent: Counter[str] = Counter()
    within: set[str] = set()
    for row in sorted(listed, key=lambda row: row.index):  # stable: the feedback's order within an index
        if spent[row.class_name] < max_per_class:
            spent[row.class_name] += 1
            within.add(row.sample_id)
    return (row for row in listed if row.sample_id in within)
