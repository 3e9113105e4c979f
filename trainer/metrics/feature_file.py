"""The samples of a run in its model's feature space, read back from the run's folder. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol import codec

FILE = "features.safetensors"
# "kinds" of the file holds positions in this: kept and dropped by the filter, real with a part of it hidden by noise
KINDS = ("real", "kept", "dropped", "erased")


@dataclass(frozen=True)
class FeatureMap:
    """N samples in K principal components of the model's penultimate features at the end of the run."""

    components: np.ndarray  # float32 [N, K]
    labels: np.ndarray  # int64 [N]
    kinds: np.ndarray  # uint8 [N], positions in KINDS


def read(folder: Path) -> FeatureMap | None:
    """The samples of a run's folder; None: they were not kept. Raises BlobCorrupt."""
    path = folder / FILE
    return FeatureMap(**codec.decode(path.read_bytes())) if path.exists() else None
