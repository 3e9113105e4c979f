"""From generated arrays to what callers get: samples with provenance, encoded images, batches for the trainer.

Runs off the compute thread, while the next batch is denoised. Knows nothing of HTTP nor of the broker.
"""

from __future__ import annotations

import base64
import time
import uuid
from dataclasses import dataclass

import numpy as np

from generator_service.backends.interface import Row, Sampling
from generator_service.batching import Generated
from generator_service.image_request import ImageOrder
from generator_service.metrics.nearest import NearestReal
from generator_service.samples import SampleStore
from generator_service.telemetry import Telemetry
from generator_service.video_request import VideoOrder
from protocol import clips, tracing
from protocol.codec import image_to_bytes
from protocol.entries import Sample, SampleBatch, WorkUnit
from protocol.messages import GeneratedImage, ImagesResponse
from protocol.video import GeneratedVideo, VideosResponse


@dataclass(frozen=True)
class Recorder:
    """Stamps samples with where they came from, checks them against the real ones, and stores them."""

    samples: SampleStore
    nearest: NearestReal | None  # None: no dataset mounted
    near_copy_distance: float  # at or below it a sample is a near-copy; 0: only exact copies
    telemetry: Telemetry
    blackens: bool = False  # a wholly black image is one that the backend's safety checker flagged

    def images_response(self, order: ImageOrder, generated: Generated) -> ImagesResponse:
        """Encode, store and describe the images of one request."""
        tracing.record("denoise", generated.started, generated.finished, rows=len(order.rows))
        request = order.request
        image_format = request.output_format or "png"
        quality = 100 if request.output_compression is None else request.output_compression
        inline = request.response_format != "url"
        samples = self._ordered(order, generated, label=order.label, class_name=order.class_name)
        data = []
        for sample, image in zip(samples, generated.images, strict=True):
            encoded = image_to_bytes(image, image_format, quality)
            self.samples.add_image(sample.id, encoded, image_format)
            data.append(
                GeneratedImage(
                    b64_json=base64.b64encode(encoded).decode("ascii") if inline else None,
                    url=None if inline else f"{order.base_url}/v1/samples/{sample.id}/image",
                    revised_prompt=order.class_name,
                    sample_id=sample.id,
                    seed=sample.seed,
                    near_copy=sample.near_copy,
                )
            )
        self.samples.add(samples)
        height, width = generated.images.shape[1:3]
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=image_format,
            size=f"{width}x{height}",
            weights=order.weights.ref,
        )

    def videos_response(self, order: VideoOrder, generated: Generated) -> VideosResponse:
        """Encode, store and describe the clips of one request."""
        tracing.record("denoise", generated.started, generated.finished, rows=len(order.rows))
        clip_format = order.request.output_format or "webp"
        inline = order.request.response_format == "b64_json"
        samples = self._ordered(order, generated, label=None, class_name=None, fps=order.fps)
        data = []
        for sample, clip in zip(samples, generated.images, strict=True):
            encoded = clips.to_bytes(clip, clip_format, order.fps)
            self.samples.add_clip(sample.id, encoded, clip_format)
            data.append(
                GeneratedVideo(
                    b64_json=base64.b64encode(encoded).decode("ascii") if inline else None,
                    url=None if inline else f"{order.base_url}/v1/samples/{sample.id}/video",
                    sample_id=sample.id,
                    seed=sample.seed,
                    steps=sample.steps,
                    guidance_scale=None if sample.guidance else sample.guidance_scale,
                    guidance=sample.guidance,
                    near_copy=sample.near_copy,
                )
            )
        self.samples.add(samples)
        frames, height, width = generated.images.shape[1:4]
        return VideosResponse(
            created=int(time.time()),
            data=data,
            output_format=clip_format,
            size=f"{width}x{height}",
            frames=frames,
            fps=order.fps,
            policy=order.sampling.policy,
            weights=order.weights.ref,
        )

    def _ordered(self, order: ImageOrder | VideoOrder, generated: Generated, **told: object) -> list[Sample]:
        """The samples of one request; `told`: what requests of its kind have besides."""
        return [
            Sample(
                id=uuid.uuid4().hex,
                run=None,
                feedback=None,
                model_version=None,
                source_id=None,
                index=index,
                seed=row.seed,
                prompt=row.prompt,
                negative_prompt=row.negative_prompt,
                weights=order.weights.ref,
                created=generated.finished,
                user=order.request.user,
                **_made(row, order.sampling),
                **told,
                **near,
            )
            for index, (row, near) in enumerate(zip(generated.rows, self._near(generated), strict=True))
        ]

    def sample_batch(
        self, unit: WorkUnit, generated: Generated, worker: str, captions_s: float
    ) -> tuple[SampleBatch, np.ndarray]:
        """The answer to a work unit and its images, uint8 [samples, H, W, 3], or clips, [samples, M, H, W, 3]; the
        caller records the samples and publishes both. Images that were flagged are missing: a label on black pixels
        would teach nothing but noise.

        Args:
            captions_s: seconds that the unit's prompts took.
        """
        samples, kept = self._planned(unit, generated), self._kept(generated.images)
        flagged = [sample.id for sample, keep in zip(samples, kept, strict=True) if not keep]
        batch = SampleBatch(
            unit_id=unit.id,
            run=unit.run,
            feedback=unit.feedback,
            unit=unit.unit,
            units=unit.units,
            model_version=unit.model_version,
            weights=unit.weights,
            samples=[sample for sample, keep in zip(samples, kept, strict=True) if keep],
            missing=[*unit.missing, *flagged],
            blob=None,  # the bus writes it with the entry
            worker=worker,
            started=generated.started,
            finished=generated.finished,
            captions_s=captions_s,
        )
        return batch, generated.images[kept]

    def _planned(self, unit: WorkUnit, generated: Generated) -> list[Sample]:
        """The samples of one work unit, flagged ones too."""
        return [
            Sample(
                id=row.sample_id,
                run=unit.run,
                feedback=unit.feedback,
                model_version=unit.model_version,
                source_id=row.source_id,
                index=row.index,
                seed=row.seed,
                label=row.label,
                class_name=row.class_name,
                prompt=row.prompt,
                negative_prompt=row.negative_prompt,
                fps=unit.fps,
                init_id=row.init_id,
                init_frame=row.init_frame,
                action_units=row.action_units,
                prompt_by=row.prompt_by,
                weights=unit.weights,
                created=generated.finished,
                **_made(made, unit),
                **near,
            )
            for row, made, near in zip(unit.rows, generated.rows, self._near(generated), strict=True)
        ]

    def _kept(self, images: np.ndarray) -> np.ndarray:
        """Which images, or clips, were not flagged, bool [B]."""
        return images.reshape(len(images), -1).any(axis=1) if self.blackens else np.ones(len(images), dtype=bool)

    def _near(self, generated: Generated) -> list[dict[str, object]]:
        """The nearest-neighbour fields of each sample."""
        if self.nearest is None:
            return [{}] * len(generated.images)
        found = [
            {"nearest_real": real, "nearest_distance": distance, "near_copy": distance <= self.near_copy_distance}
            for real, distance in self.nearest(generated.images)
        ]
        self.telemetry.near_copies(sum(near["near_copy"] for near in found))
        return found


def _made(row: Row, said: Sampling | WorkUnit) -> dict[str, object]:
    """What a sample tells of how its row was made: with the steps and guidance that were really used."""
    return {
        "guidance_scale": row.guidance_scale,
        "guidance": row.guidance,
        "steps": said.steps if row.steps is None else row.steps,
        "scheduler": said.scheduler,
        "strength": said.strength,
        "lora_scale": said.lora_scale,
        "frames": said.frames,
        "resampling": said.resampling,
        "policy": said.policy,
    }
