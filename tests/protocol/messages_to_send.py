"""Small valid messages for the queue's tests."""

from __future__ import annotations

import numpy as np

from protocol import codec
from protocol.bus import Delivery
from protocol.entries import BlobRef, Sample, SampleBatch, WorkRow, WorkUnit
from protocol.messages import FeedbackAccepted, WeightsRef, sample_id, seed_of

WEIGHTS = WeightsRef(name="digits", version=1, digest="0" * 64)


def unit(run: str = "r", feedback: int = 0, number: int = 0, units: int = 1, init: BlobRef | None = None) -> WorkUnit:
    identity = sample_id(run, feedback, "source", number)
    row = WorkRow(
        sample_id=identity,
        source_id="source",
        index=number,
        seed=seed_of(identity),
        label=3,
        class_name="three",
        prompt="a photo of three",
        guidance_scale=2.0,
    )
    return WorkUnit(
        id=f"{run}.{feedback}.{number}.print",
        run=run,
        feedback=feedback,
        unit=number,
        units=units,
        model_version=7,
        weights=WEIGHTS,
        steps=5,
        scheduler="ddim",
        strength=1.0,
        rows=[row],
        init_blob=init,
    )


def reply(run: str = "r", feedback: int = 0, units: int = 1) -> FeedbackAccepted:
    return FeedbackAccepted(run=run, feedback=feedback, units=units, samples=units, weights=WEIGHTS)


def batch(delivery: Delivery[WorkUnit]) -> SampleBatch:
    made = delivery.message
    samples = [
        Sample(
            id=row.sample_id,
            run=made.run,
            feedback=made.feedback,
            model_version=made.model_version,
            source_id=row.source_id,
            index=row.index,
            seed=row.seed,
            label=row.label,
            class_name=row.class_name,
            prompt=row.prompt,
            guidance_scale=row.guidance_scale,
            steps=made.steps,
            scheduler=made.scheduler,
            strength=made.strength,
            weights=made.weights,
            created=1.0,
        )
        for row in made.rows
    ]
    return SampleBatch(
        unit_id=made.id,
        run=made.run,
        feedback=made.feedback,
        unit=made.unit,
        units=made.units,
        model_version=made.model_version,
        weights=made.weights,
        samples=samples,
        blob=None,
        worker=delivery.consumer,
        started=1.0,
        finished=2.0,
    )


def pixels(delivery: Delivery[WorkUnit]) -> bytes:
    """Safetensors bytes that tell units apart."""
    count = len(delivery.message.rows)
    return codec.encode({"images": np.full((count, 2, 2, 3), delivery.message.unit % 256, np.uint8)})
