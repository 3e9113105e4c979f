"""What clips of expressions are made from: frames that they may begin with, and who writes their prompts.

Knows nothing of how faces are read, nor of how prompts are composed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from agent.expressions.compose import Composer
from agent.expressions.plan import IdentityFrame
from agent.expressions.settings import ExpressionsConfig
from agent.expressions.vision import Count
from generator_service.backends.interface import Backend
from generator_service.composition import composer
from generator_service.faces.identities import Identities
from generator_service.faces.interface import FaceReader, FacesConfig, open_reader
from generator_service.faces.statistics import FILE
from protocol.dataset import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expressions:
    identities: Sequence[IdentityFrame]  # empty where no dataset of clips is mounted
    composer: Composer
    reads_pixels: bool = True  # whether the reader of faces reads clips that are made; false: only what was stored
    reader: str = ""  # identity of the reader; "": faces are not read

    @classmethod
    def open(
        cls,
        config: ExpressionsConfig,
        faces: FacesConfig | None,
        dataset: Dataset | None,
        backend: Backend,
        count: Count = lambda what, how_many: None,
    ) -> Expressions:
        """As the settings say. Without a reader of faces, clips begin with the first frames of others, and no
        statistics are added to the knowledge base.

        Raises:
            ConfigError: settings are wrong, or a model cannot be loaded.
            NoFace: no clip of the dataset has a frame that can be used.
        """
        if faces is None or dataset is None or not dataset.is_clips:
            return cls(_first_frames(dataset), composer(config, backend, count))
        reader = open_reader(faces)
        frames = _neutral_frames(faces, dataset, reader)
        return cls(frames, composer(config, backend, count, faces.folder / FILE), reader.reads_pixels, reader.identity)


def _first_frames(dataset: Dataset | None) -> list[IdentityFrame]:
    if dataset is None or not dataset.is_clips:
        return []
    log.info("clips begin with the first frames of others: add a table [generator.faces] to find neutral ones")
    return [IdentityFrame(e.id, 0, e.class_name, e.subject, e.caption) for e in dataset.samples]


def _neutral_frames(faces: FacesConfig, dataset: Dataset, reader: FaceReader) -> list[IdentityFrame]:
    """Beside them, the statistics of action units are written."""
    found = Identities.open(dataset, faces, faces.folder, reader=reader)
    log.info("frames to begin clips with: %s", found.report)
    captions = {entry.id: entry.caption for entry in dataset.samples}
    return [IdentityFrame(i.sample_id, i.frame, i.class_name, i.subject, captions[i.sample_id]) for i in found]
