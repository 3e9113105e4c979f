"""Batches of synthetic clips as a service answers with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol import codec
from protocol.entries import BlobRef, Sample, SampleBatch
from protocol.fields import WeightsRef

WEIGHTS = WeightsRef(name="tiny", version=1, digest="0" * 64)


def sample(run: str, feedback: int, seed: int, label: int, name: str, frames: int, begins_with: str) -> Sample:
    """What is told of a clip that was made for a scarce class, `name`, from a frame of the real clip `begins_with`."""
    return Sample(
        id=f"made-{seed}",
        run=run,
        feedback=feedback,
        model_version=0,
        source_id=f"class:{name}",
        index=seed,
        seed=seed,
        label=label,
        class_name=name,
        prompt=name,
        guidance_scale=9.0,
        steps=5,
        scheduler="ddim",
        strength=1.0,
        frames=frames,
        init_id=begins_with,
        weights=WEIGHTS,
        created=0.0,
    )


def batch(
    samples: list[Sample], made: Sequence[np.ndarray], unit: int = 0, units: int = 1
) -> tuple[SampleBatch, bytes]:
    """Their batch, and its clips as they are sent."""
    run, feedback = samples[0].run, samples[0].feedback
    data = codec.encode({"images": np.stack(made)})
    told = SampleBatch(
        unit_id=f"{run}.{feedback}.{unit}",
        run=run,
        feedback=feedback,
        unit=unit,
        units=units,
        model_version=0,
        weights=WEIGHTS,
        samples=samples,
        blob=BlobRef(ref="file:x", sha256=codec.digest(data), size=len(data)),
        worker="w",
        started=0.0,
        finished=1.0,
    )
    return told, data
