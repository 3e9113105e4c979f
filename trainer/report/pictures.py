"""The report's pictures and clips: real samples beside what was made for them, what VoG chose, near copies.

Finds pixels and says what became of each sample; knows nothing of HTML.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from protocol import codec
from protocol.dataset import Dataset
from protocol.entries import Sample
from protocol.errors import DatasetError
from protocol.messages import ClassShortage, Feedback, MarginalSample, class_source
from trainer.record import Record

Fate = Literal["kept", "dropped", "near copy", "too near", "not used"]
SHOWN_FATES: dict[str, Fate] = {
    "trained": "kept",
    "pool": "kept",
    "vog": "dropped",
    "similarity": "dropped",
    "near copy": "near copy",
    "privacy": "too near",
    "stale": "not used",
}
SCORES = {"vog": "VoG", "similarity": "near"}  # filter -> what its score is called below a picture
FPS = 8.0  # of clips that do not say
REAL_FRAMES = 16  # of a real clip, evenly spread
LARGEST_CLIP = 112  # pixels of the longer side of a clip
LARGEST = 160  # pixels of the longer side; larger pictures are made smaller


@dataclass(frozen=True)
class Picture:
    """One sample to show."""

    pixels: np.ndarray | None  # uint8 RGB [H, W, 3], of a clip [M, H, W, 3], as large as shown; None: they are gone
    alt: str
    note: str  # below the picture
    fate: Fate | None = None  # None: a real sample
    prompt: str = ""  # that it was made from
    prompt_by: str | None = None  # who perturbed or composed it; None: nobody
    made_with: str = ""  # of a clip: its action units, steps and guidance
    fps: float = FPS  # of a clip


@dataclass(frozen=True)
class Pair:
    """A real sample, or a member of the pool that stands in for them, and the synthetic ones made from it."""

    real: Picture
    made: list[Picture]
    class_name: str
    caption: str | None = None  # of the real sample


class Album:
    """Every picture of one run. Files are read when a picture is asked for.

    `missing` says why real samples cannot be shown; None when they can.
    """

    def __init__(self, record: Record):
        self.record, self.filter = record, record.config.filter or "vog"
        self.missing: str | None = None
        self._dataset: Dataset | None = None
        try:
            self._dataset = Dataset.open(record.config.dataset)
        except DatasetError as error:
            self.missing = error.message
        self.classes = list(self._dataset.classes) if self._dataset else []
        self._sent = {
            sample.sample_id: sample.pixels
            for feedback in record.feedback
            for sample in feedback.samples
            if sample.pixels
        }
        self._places = {
            sample.id: (record.folder / "batches" / f"{batch.feedback:06d}-{batch.unit:06d}.safetensors", row)
            for batch in record.batches
            for row, sample in enumerate(batch.samples)
        }
        self._samples = {sample.id: sample for sample in record.samples()}
        self._rows = {row["id"]: row for row in record.selection}
        self._by_source: dict[tuple[int | None, str | None], list[Sample]] = defaultdict(list)
        for sample in record.samples():
            self._by_source[sample.feedback, sample.source_id].append(sample)

    # ------------------------------------------------------------ pixels

    def real(self, sample_id: str) -> np.ndarray | None:
        """What a question is about: a real sample from the dataset, or, like members of a pool, as it was sent with the
        feedback; None when neither has it."""
        if self._dataset is not None and sample_id in self._dataset:
            clip = self._dataset.by_id(sample_id).is_clip
            return self._dataset.clip(sample_id, REAL_FRAMES) if clip else self._dataset.image(sample_id)
        sent = self._sent.get(sample_id)
        return codec.image_from_base64(sent) if sent else None

    def synthetic(self, sample_id: str) -> np.ndarray | None:
        """A synthetic sample; None when its file was deleted."""
        path, row = self._places[sample_id]
        return codec.decode_row(path, "images", row) if path.exists() else None

    # ------------------------------------------------------------ what to show

    def answered(self) -> list[Feedback]:
        """The questions that were answered with samples, by iteration."""
        answered = {sample.feedback for sample in self.record.samples()}
        return [feedback for feedback in self.record.feedback if feedback.feedback in answered and feedback.samples]

    def is_pool(self, feedback: Feedback) -> bool:
        """Whether a question asks for a pool: images of every real sample, of which none was scored."""
        return self.record.config.has_pool and feedback.feedback == 0

    def hardest(self, feedback: Feedback, most: int, most_made: int) -> list[Pair]:
        """The hardest samples of a question that were answered, hardest first, each with what was made for it."""
        asked = sorted(feedback.samples, key=lambda sample: sample.score)
        answered = [sample for sample in asked if self._by_source[feedback.feedback, sample.sample_id]]
        return [self._pair(feedback, sample, most_made) for sample in answered[:most]]

    def _pair(self, feedback: Feedback, hard: MarginalSample, most: int) -> Pair:
        made = sorted(self._by_source[feedback.feedback, hard.sample_id], key=lambda sample: sample.index)[:most]
        note = "" if self.is_pool(feedback) else f"score {hard.score:.2g}"
        kind = "pool member" if hard.sample_id in self._samples else "real sample"
        return Pair(
            real=Picture(_shown(self.real(hard.sample_id)), f"{kind} of class {hard.class_name}", note),
            made=[self._made(sample) for sample in made],
            class_name=hard.class_name,
            caption=hard.caption,
        )

    def _made(self, sample: Sample) -> Picture:
        fate = self.fate(sample)
        score = self._rows.get(sample.id, {}).get(self.filter)
        return Picture(
            pixels=_shown(self.synthetic(sample.id)),
            alt=f"synthetic sample of class {sample.class_name}, {fate}",
            note="" if score is None else f"{SCORES[self.filter]} {score:.2g}",
            fate=fate,
            prompt=sample.prompt,
            prompt_by=sample.prompt_by,
            made_with=_made_with(sample),
            fps=sample.fps or FPS,
        )

    def short_of(self, feedback: Feedback, most: int) -> list[tuple[ClassShortage, list[Picture]]]:
        """The classes of a question that were answered, each with what was made for it."""
        found = []
        for short in feedback.classes:
            made = sorted(self._by_source[feedback.feedback, class_source(short.class_name)], key=lambda one: one.index)
            if made:
                found.append((short, [self._made(sample) for sample in made[:most]]))
        return found

    def fate(self, sample: Sample) -> Fate:
        """What became of a synthetic sample; offline, the last time it was drawn."""
        row = self._rows.get(sample.id)
        return SHOWN_FATES[row["fate"]] if row is not None else "not used"

    def by_filter(self, most_classes: int, most: int) -> list[tuple[str, list[Picture], list[Picture]]]:
        """For each class, the samples of lowest score that were dropped and those of highest score that were kept.

        Only of the last iteration that dropped any, as scores compare within one; classes in order of their names.
        """
        dropping = [row["iteration"] for row in self.record.selection if row["fate"] == self.filter]
        chosen = [row for row in self.record.selection if dropping and row["iteration"] == dropping[-1]]
        rows = [row for row in chosen if row.get(self.filter) is not None]
        rows.sort(key=lambda row: row[self.filter])
        found = []
        for name in sorted({row["class"] for row in rows if not row["kept"]})[:most_classes]:
            dropped = [row["id"] for row in rows if row["class"] == name and not row["kept"]][:most]
            kept = [row["id"] for row in rows if row["class"] == name and row["kept"]][-most:]
            found.append((name, self._all(dropped), self._all(kept)))
        return found

    def _all(self, ids: Iterable[str]) -> list[Picture]:
        return [self._made(self._samples[name]) for name in ids]

    def near_copies(self, most: int) -> list[Pair]:
        """Synthetic samples flagged as near copies, nearest first, beside the real sample they are near to."""
        flagged = [sample for sample in self.record.samples() if sample.near_copy and sample.nearest_real]
        flagged.sort(key=lambda sample: sample.nearest_distance or 0.0)
        pairs = []
        for sample in flagged[:most]:
            note = f"distance {sample.nearest_distance or 0.0:.2g}"
            real = Picture(_shown(self.real(sample.nearest_real or "")), "the real sample nearest to it", note)
            pairs.append(Pair(real, [self._made(sample)], sample.class_name or ""))
        return pairs


def _made_with(sample: Sample) -> str:
    """What a clip was made with, beside its prompt."""
    if sample.frames is None:
        return ""
    guidance = f"guidance {sample.guidance_scale:g}"
    if sample.guidance is not None:
        curve = sample.guidance
        guidance = f"guidance {curve.minimum:g} to {curve.maximum:g}, a = {curve.a:g}, b = {curve.b:g}"
    units = "+".join(sample.action_units)
    return ", ".join([*([units] if units else []), f"{sample.steps} steps", guidance, *(["policy"] * sample.policy)])


def _shown(pixels: np.ndarray | None) -> np.ndarray | None:
    """The picture or clip as it is, or made smaller when it is large."""
    if pixels is None:
        return None
    largest = LARGEST_CLIP if pixels.ndim == 4 else LARGEST
    if max(pixels.shape[-3:-1]) <= largest:
        return pixels
    if pixels.ndim == 4:
        return np.stack([_smaller(frame, largest) for frame in pixels])
    return _smaller(pixels, largest)


def _smaller(image: np.ndarray, largest: int) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((largest, largest))
    return np.asarray(picture)
