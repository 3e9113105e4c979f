"""Settings that every transformers model here has, and how one is opened. Knows nothing of what it is asked.

Weights are read from safetensors only, and no code of a checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from protocol.errors import ConfigError

Opened = TypeVar("Opened")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class PretrainedConfig(BaseModel):
    """Which model, where, and how many questions at a time."""

    model_config = ConfigDict(extra="forbid")

    model: str  # a transformers folder, or a hub id
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights and of the forward passes
    batch_size: int = Field(default=16, ge=1, le=4096)  # questions in a forward pass; more need more memory

    def place(self) -> torch.device:
        """Raises ConfigError when a GPU is wanted and there is none."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError('device = "cuda" but no GPU is to be seen: use "auto" or "cpu"')
        return torch.device("cuda" if torch.cuda.is_available() and self.device != "cpu" else "cpu")

    def open(self, read: Callable[..., Opened], **options: Any) -> Opened:
        """What a `from_pretrained` gives for this model. Raises ConfigError when it cannot be found, is another kind of
        model, or needs a package that is not installed."""
        advice = "name a transformers folder, or a hub id"
        folder = Path(self.model).expanduser()
        if not folder.is_dir() and not _HUB_ID.fullmatch(self.model):
            raise ConfigError(f"there is no folder {self.model!r}: {advice}")
        try:
            where = str(folder) if folder.is_dir() else self.model
            return read(where, revision=self.revision, trust_remote_code=False, **options)
        except ImportError as error:
            needed = error.name or " ".join(str(error).split())
            raise ConfigError(f"cannot load {self.model!r} without a package: install it ({needed})") from error
        except (OSError, ValueError) as error:
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"cannot load {self.model!r} ({told}): {advice}") from error
