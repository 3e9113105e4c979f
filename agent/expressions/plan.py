"""From feedback to work units of clips: a neutral frame of one clip, and the emotion that another, or a class, lacks.

Knows nothing of HTTP, of the broker, of how neutral frames are found nor of how clips are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np

from agent.expressions.emotions import emotion_of
from agent.expressions.knowledge import KnowledgeBase
from agent.planner import asked, check_amount, unit, within_budget
from agent.settings import AgentConfig
from protocol import prompts
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import InvalidRequest, NoFace
from protocol.messages import ClassShortage, Feedback, MarginalSample, WeightsRef, sample_id, seed_of


class IdentityFrame(NamedTuple):
    """A neutral frame that clips may begin with (eq. 6)."""

    sample_id: str  # of the clip that it is a frame of
    frame: int
    class_name: str  # of that clip
    subject: str | None = None  # who it is; None: the dataset does not say
    caption: str | None = None  # who is to be seen, in words; None: the dataset has none


def plan_expressions(
    feedback: Feedback,
    config: AgentConfig,
    weights: WeightsRef,
    identities: Sequence[IdentityFrame],
    knowledge: KnowledgeBase,
    *,
    has_policy: bool,
) -> list[WorkUnit]:
    """Cut a feedback into work units, each row with a first frame and an emotion. The same arguments give the same
    units, down to the seeds.

    A class that is short of n clips gets n rows, a marginal sample `images_per_sample` of its class. Their first frames
    are of clips of no class that the feedback calls short, and preferably of the neutral ones (D*_ns of the paper);
    none comes a second time before all came once, and no subject before all did that have as many.

    Args:
        weights: the weight set that every unit is pinned to.
        has_policy: whether it has a policy that chooses steps and guidance.

    Raises:
        UnknownClass: no emotion is known for a class.
        NoFace: there is no first frame to begin with.
        InvalidRequest: a source is named twice, too much is asked for, or pixels come along.
    """
    check_amount(feedback, config)
    for wanted in (*feedback.samples, *feedback.classes):
        if config.expressions.composer != "fixed":
            knowledge.of(wanted.class_name)
    for sample in feedback.samples:
        if sample.pixels is not None:
            raise InvalidRequest(
                f"sample {sample.sample_id!r} comes with pixels, but clips begin with a neutral frame of the service's "
                "own dataset: mount the dataset there, and send no pixels",
                param="pixels",
            )
    every = (_row(feedback, config, *each) for each in asked(feedback, config))
    rows = list(within_budget(every, config.max_per_class))
    frames = _in_turn(_usable(feedback, config, identities, knowledge), feedback)
    rows = [row.model_copy(update=_first_frame(next(frames))) for row in rows]
    size, fingerprint = config.expressions.clips_per_unit, feedback.fingerprint()
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    how = _how(config, has_policy)
    return [
        unit(feedback, weights, (number, len(chunks), fingerprint), chunk, **how) for number, chunk in enumerate(chunks)
    ]


def _how(config: AgentConfig, has_policy: bool) -> dict[str, object]:
    """How the clips of a unit are made."""
    chosen = config.expressions
    return {
        "steps": chosen.steps,
        "scheduler": config.scheduler,
        "strength": 1.0,
        "lora_scale": config.lora_scale,
        "frames": chosen.frames,
        "fps": chosen.fps,
        "resampling": chosen.resampling,
        "policy": has_policy and chosen.policy,
        "expressions": chosen.composer != "fixed",
    }


def _row(
    feedback: Feedback, config: AgentConfig, wanted: MarginalSample | ClassShortage, source: str, index: int
) -> WorkRow:
    chosen, identity = config.expressions, sample_id(feedback.run, feedback.feedback, source, index)
    return WorkRow(
        sample_id=identity,
        source_id=source,
        index=index,
        seed=seed_of(identity),
        label=wanted.label,
        class_name=wanted.class_name,
        prompt=prompts.fill(chosen.fixed_prompt, chosen.fixed_prompt, wanted.class_name, None),
        negative_prompt=config.negative_prompt,
        guidance_scale=chosen.guidance_scale,
        guidance=chosen.guidance,
    )


def _first_frame(identity: IdentityFrame) -> dict[str, str | int | None]:
    return {"init_id": identity.sample_id, "init_frame": identity.frame, "caption": identity.caption}


def _usable(
    feedback: Feedback, config: AgentConfig, identities: Sequence[IdentityFrame], knowledge: KnowledgeBase
) -> list[IdentityFrame]:
    """Those that clips of this feedback may begin with. Raises NoFace."""
    scarce = {shortage.class_name for shortage in feedback.classes}
    others = [identity for identity in identities if identity.class_name not in scarce]
    if not others:
        told = f"all {len(identities)} of its neutral frames are of {', '.join(sorted(scarce))}, which it lacks"
        raise NoFace(
            f"no clip of the service's dataset can lend its first frame: {told if identities else 'none is usable'}. "
            "Loosen the gates of generator.faces, mount a dataset with clips of other classes too, or call fewer "
            "classes scarce",
            param="classes",
        )
    neutral = {emotion_of(name, knowledge.aliases) for name in config.expressions.neutral_classes}
    preferred = [each for each in others if emotion_of(each.class_name, knowledge.aliases) in neutral]
    return preferred or others


def _in_turn(identities: Sequence[IdentityFrame], feedback: Feedback) -> Iterator[IdentityFrame]:
    """All of them, again and again, in an order drawn for this feedback: first one of each subject, then another."""
    seed = seed_of(sample_id(feedback.run, feedback.feedback, "identities", 0))
    order = np.random.default_rng(seed).permutation(len(identities))
    met: dict[str, int] = {}

    def turn(identity: IdentityFrame) -> int:
        who = identity.subject or f"\0{identity.sample_id}"
        met[who] = met.get(who, -1) + 1
        return met[who]

    return cycle(sorted((identities[at] for at in order), key=turn))
