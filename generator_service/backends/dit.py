"""Class-conditional generation with a diffusion transformer (DiT): from noise, or from an image, with guidance.

Serves any diffusers DiT checkpoint, with or without a VAE, and weight sets that replace its class embedding. Knows
nothing of requests, queues or of how a weight set was adapted.

    B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from pydantic import BaseModel, ConfigDict, Field

from generator_service.backends.dit_checkpoint import DiTCheckpoint, Tables, write_tables
from generator_service.backends.hub import EMBEDDED, locate
from generator_service.backends.interface import OnStep, Row, Sampling, WeightSet
from protocol.errors import ConfigError, InvalidRequest, UnknownClass, WeightsCorrupt
from protocol.messages import WeightsRef

LETTERS = Path(__file__).parents[1] / "assets" / "letters_dit"
COMPONENTS = ("transformer", "scheduler", "vae")


class Config(BaseModel):
    """Settings of the DiT backend."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = EMBEDDED  # a diffusers DiT folder, a hub id such as "facebook/DiT-XL-2-256", or "embedded"
    revision: str | None = None  # branch, tag or commit on the hub; None: its main branch
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights and of the forward passes
    max_resident: int = Field(default=4, ge=2)  # weight sets in memory; the least recently used go, the base never


@dataclass(frozen=True)
class _Resident:
    checkpoint: DiTCheckpoint
    tables: Tables
    null: int  # label of the null class: the last row of this set's own tables


class DiTBackend:
    """A DiT with hot-swappable weight sets. See `interface.Backend`.

    Weight sets of kind "class_embedding" share the parameters of the checkpoint they sit on, so that changing between
    them costs nothing; sets of kind "full" are checkpoints of their own.
    """

    name = "dit"
    conditioning = "class"

    def __init__(self, config: Config):
        """Loads the base checkpoint. Raises ConfigError when it cannot be found, or is not a DiT."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError('device = "cuda" but no GPU is to be seen: use "auto" or "cpu"')
        gpu = torch.cuda.is_available() and config.device != "cpu"
        self._device = torch.device("cuda" if gpu else "cpu")
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._max_resident = config.max_resident
        self._base = self._open(locate(config.checkpoint, config.revision, LETTERS, COMPONENTS))
        self._resident: OrderedDict[WeightsRef, _Resident] = OrderedDict()

    @property
    def folder(self) -> Path:
        """Where the base checkpoint lies; with `classes`, what a weight store needs to list it."""
        return self._base.folder

    @property
    def classes(self) -> tuple[str, ...]:
        """Label index -> class name of the base checkpoint."""
        return self._base.classes

    def native_size(self) -> tuple[int, int]:
        return self._base.size

    # ------------------------------------------------------------ weight sets

    def load(self, weights: WeightSet) -> None:
        """See `interface.Backend`. Raises WeightsCorrupt when the files do not fit what the set says of itself."""
        self._load(weights)

    def checkpoint(self, weights: WeightSet) -> DiTCheckpoint:
        """The frozen checkpoint under a weight set: what an adaptation builds on. It must not change its parameters."""
        return self._load(weights).checkpoint

    def save_tables(self, tables: Tables, base: WeightSet, folder: Path) -> None:
        """Write a "class_embedding" weight set that was learnt on the checkpoint under `base`."""
        write_tables(tables, folder, _whole(base).ref.digest)

    def _load(self, weights: WeightSet) -> _Resident:
        if weights.base is not None:
            self._load(_whole(weights))  # stays younger than what sits on it, so that it is never dropped first
        if weights.ref not in self._resident:
            self._resident[weights.ref] = self._read(weights)
        self._resident.move_to_end(weights.ref)
        while len(self._resident) > self._max_resident:
            self._resident.popitem(last=False)
        return self._resident[weights.ref]

    def _read(self, weights: WeightSet) -> _Resident:
        if weights.kind == "full":
            checkpoint = self._base if weights.folder == self._base.folder else self._open(weights.folder)
            if checkpoint.classes != weights.classes or checkpoint.size != self._base.size:
                raise WeightsCorrupt(f"weights {weights.ref}: {weights.folder} has other classes or another image size")
            tables = checkpoint.tables
        elif weights.kind == "class_embedding" and weights.base is not None:
            checkpoint = self._load(_whole(weights)).checkpoint
            tables = checkpoint.read_tables(weights.folder, len(weights.classes), _whole(weights).ref.digest)
        else:
            raise WeightsCorrupt(
                f"weights {weights.ref} are of kind {weights.kind!r}, which the DiT backend cannot read"
            )
        return _Resident(checkpoint, tables, null=len(weights.classes))

    def _open(self, folder: Path) -> DiTCheckpoint:
        return DiTCheckpoint(folder, self._device, self._dtype)

    # ------------------------------------------------------------ generation

    def generate(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> np.ndarray:
        """See `interface.Backend`. Equal to the bit at equal batch shape, on one machine.

        Rows with an image run the last int(steps * strength) steps, as diffusers' img2img does; none of them is left
        when strength is small, and the row is the image itself at the native size.
        """
        images = self.sample(weights, rows, sampling, on_step)
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    def sample(
        self, weights: WeightSet, rows: Sequence[Row], sampling: Sampling, on_step: OnStep = lambda done, total: None
    ) -> torch.Tensor:
        """`generate` before rounding: float32 [B, 3, H, W] in [-1, 1].

        On a CPU in float32 a row differs by at most 1e-3, an eighth of an 8-bit level, from one batch to another.
        """
        resident = self._load(weights)  # outside inference mode: adaptations put these parameters into autograd
        _check_labels(rows, weights)
        with torch.inference_mode():
            return self._sample(resident, rows, sampling, on_step)

    def _sample(self, resident: _Resident, rows: Sequence[Row], sampling: Sampling, on_step: OnStep) -> torch.Tensor:
        """Rows from noise first, then rows from images: each kind is one batch, since they run other steps."""
        drawn = [at for at, row in enumerate(rows) if row.image is None or sampling.strength == 1]
        redrawn = [at for at, row in enumerate(rows) if row.image is not None and sampling.strength < 1]
        plan = [(drawn, sampling.steps), (redrawn, int(sampling.steps * sampling.strength))]
        plan = [(members, steps) for members, steps in plan if members]
        progress, total = itertools.count(1), sum(steps for _, steps in plan)
        images = torch.empty(len(rows), 3, *resident.checkpoint.size, device=self._device)
        for members, steps in plan:
            chosen = [rows[at] for at in members]
            images[members] = _denoise(resident, chosen, sampling, steps, lambda: on_step(next(progress), total))
        return images


def _denoise(
    resident: _Resident, rows: Sequence[Row], sampling: Sampling, steps: int, report: Callable[[], None]
) -> torch.Tensor:
    """The last `steps` steps of the schedule; RGB float32 [B, 3, H, W] in [-1, 1]."""
    checkpoint = resident.checkpoint
    device = checkpoint.device
    scheduler = checkpoint.scheduler(sampling.scheduler)
    times = _timesteps(scheduler, sampling.steps, device)[sampling.steps - steps :]
    latents = torch.stack([_noise(row.seed, checkpoint.latent_shape) for row in rows]).to(device)
    if steps < sampling.steps:
        images = np.stack([checkpoint.fit(row.image) for row in rows])
        if steps == 0:
            return checkpoint.pixels(images)
        latents = scheduler.add_noise(checkpoint.encode(images), latents, times[:1].expand(len(rows)))
    labels = [resident.null if row.label is None else row.label for row in rows]
    if sampling.guided:
        labels += [resident.null] * len(rows)
    labels = torch.tensor(labels, device=device)
    guidance = torch.tensor([max(row.guidance_scale, 1.0) for row in rows], device=device)[:, None, None, None]
    # DDIM: after clipping the clean image, the noise has to follow from it, as it does in DPM-Solver++
    options = {"use_clipped_model_output": True} if sampling.scheduler == "ddim" else {}
    for time in times:
        noisy = torch.cat([latents, latents]) if sampling.guided else latents
        output = checkpoint.predict(noisy, time.expand(len(noisy)), labels, resident.tables)
        if sampling.guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(output, time, latents, **options).prev_sample
        report()
    return checkpoint.decode(latents)


def _noise(seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _timesteps(
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler, steps: int, device: torch.device
) -> torch.Tensor:
    """The sampler's times, int64 [steps], from noise to image. Raises InvalidRequest when it cannot take so many."""
    trained = scheduler.config.num_train_timesteps
    if steps <= trained:
        scheduler.set_timesteps(steps, device=device)
        times = scheduler.timesteps
        if len(times.unique()) == steps and times.max() < trained:
            return times
    raise InvalidRequest(
        f"{steps} steps are too many for this sampler on a schedule of {trained}: ask for fewer",
        param="num_inference_steps",
    )


def _whole(weights: WeightSet) -> WeightSet:
    """The full checkpoint at the bottom of a weight set."""
    while weights.base is not None:
        weights = weights.base
    return weights


def _check_labels(rows: Sequence[Row], weights: WeightSet) -> None:
    for row in rows:
        if row.label is not None and not 0 <= row.label < len(weights.classes):
            raise UnknownClass(
                f"no class {row.label} in weights {weights.ref}: use 0 to {len(weights.classes) - 1}",
                param="class_label",
            )
