"""From a trainer's feedback to work units on the broker. Knows nothing of HTTP nor of how images and clips are made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.expressions.plan import plan_expressions
from agent.planner import plan
from agent.settings import AgentConfig
from generator_service import access
from generator_service.backends.interface import WeightSet
from generator_service.expressions import Expressions
from generator_service.feedback_quota import FeedbackQuota
from generator_service.real_images import resized
from generator_service.video_request import POLICY
from generator_service.weights import WeightStore
from protocol import codec, logs, tracing
from protocol.bus import Bus
from protocol.dataset import Dataset
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import BrokerUnavailable, InvalidRequest, UnknownClass
from protocol.messages import Feedback, FeedbackAccepted


@dataclass(frozen=True)
class FeedbackDesk:
    """Plans feedback and publishes the units, each feedback once."""

    bus: Bus | None  # None: no broker is configured
    config: AgentConfig
    weights: WeightStore
    dataset: Dataset | None
    reads_prompts: bool  # whether the backend is conditioned on text
    native_size: tuple[int, int]  # (height, width) that init images sent with the feedback get
    max_pixels: int  # of an image sent with the feedback
    quota: FeedbackQuota
    expressions: Expressions | None = None  # None: the backend makes images

    def accept(self, feedback: Feedback) -> FeedbackAccepted:
        """Publish all of a feedback's units, or none; asking again gives the first reply.

        Raises:
            UnknownClass, UnknownSource, InvalidRequest, InvalidImage, UnknownWeights: the feedback is wrong.
            NoFace: no clip of the dataset has a frame that those asked for could begin with.
            IdempotencyConflict: another feedback came for this run and iteration.
            QueueFull, BrokerUnavailable: ask again later; the queue is full, or has enough of this caller's work.
        """
        if self.bus is None:
            raise BrokerUnavailable("this service has no broker: set broker.url to the one the trainer uses")
        with logs.fields(run=feedback.run, feedback=feedback.feedback), tracing.span("plan"):
            return self._plan(self.bus, feedback)

    def _plan(self, bus: Bus, feedback: Feedback) -> FeedbackAccepted:
        weights = self.weights.resolve(feedback.model)
        self._check_labels(feedback)
        units = self._units(feedback, weights)
        reply = FeedbackAccepted(
            run=feedback.run,
            feedback=feedback.feedback,
            units=len(units),
            samples=sum(len(unit.rows) for unit in units),
            weights=weights.ref,
        )
        blobs = self._init_blobs(feedback, units)
        asked_by = {"request_id": logs.current().get("request_id"), "traceparent": tracing.traceparent()}
        init = {unit_id: {"init_blob": bus.blob_ref(f"init.{unit_id}", data)} for unit_id, data in blobs.items()}
        units = [unit.model_copy(update=asked_by | init.get(unit.id, {})) for unit in units]
        named = {f"init.{unit_id}": data for unit_id, data in blobs.items()}
        caller = access.current().name
        with self.quota.taking(caller, feedback.run, feedback.feedback, [unit.id for unit in units]):
            return bus.publish_plan(feedback.run, feedback.feedback, feedback.fingerprint(), units, named, reply)

    def _units(self, feedback: Feedback, weights: WeightSet) -> list[WorkUnit]:
        config, clips = self.config, self.expressions
        if clips is None:
            return plan(feedback, config, weights.ref, weights.classes, self._known, reads_prompts=self.reads_prompts)
        knowledge, has_policy = clips.composer.knowledge, weights.kind == POLICY
        return plan_expressions(feedback, config, weights.ref, clips.identities, knowledge, has_policy=has_policy)

    def _known(self, sample_id: str) -> bool:
        return self.dataset is not None and sample_id in self.dataset

    def _check_labels(self, feedback: Feedback) -> None:
        """Both sides must number the classes alike, where both have the dataset."""
        if self.dataset is None:
            return
        classes = self.dataset.classes
        for wanted in (*feedback.samples, *feedback.classes):
            if wanted.label >= len(classes) or classes[wanted.label] != wanted.class_name:
                raise UnknownClass(
                    f"label {wanted.label} is not class {wanted.class_name!r} in the service's dataset, whose classes "
                    f"are {', '.join(classes[:20])}: mount the same dataset on both sides",
                    param="label",
                )

    def _init_blobs(self, feedback: Feedback, units: list[WorkUnit]) -> dict[str, bytes]:
        """Unit id -> init images, for the units whose samples came with pixels."""
        pixels = {sample.sample_id: sample.pixels for sample in feedback.samples if sample.pixels is not None}
        if not pixels:
            return {}
        images = {
            source: resized(codec.image_from_base64(text, max_pixels=self.max_pixels), self.native_size)
            for source, text in pixels.items()
        }
        blobs = {}
        for unit in units:
            if unit.strength < 1.0 and any(row.source_id in images for row in unit.rows):
                blobs[unit.id] = codec.encode({"images": np.stack([self._init(row, images) for row in unit.rows])})
        return blobs

    def _init(self, row: WorkRow, images: dict[str, np.ndarray]) -> np.ndarray:
        if row.source_id in images:
            return images[row.source_id]
        if self.dataset is None or row.init_id is None:
            raise InvalidRequest(f"sample {row.source_id!r} lacks pixels that others have: send all", param="samples")
        return resized(self.dataset.image(row.init_id), self.native_size)
