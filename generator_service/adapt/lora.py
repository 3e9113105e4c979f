"""Adapts a Stable Diffusion to the real images with a LoRA (Real-Fake, as GenDataAgent 2.1 uses it).

Trained on prompts "a photo of {class}, which is {caption}" with CLIP image features as visual tokens. The LoRA counts
inside an optimiser step or a piece of a validation only, so that the backend may serve any weights between two. Knows
nothing of jobs, of the dataset's files or of where weight sets are kept.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file

from generator_service.adapt import denoising, resume
from generator_service.adapt.lora_adapter import LoraAdapter
from generator_service.adapt.lora_objective import Objective
from generator_service.adapt.training_set import TrainingSet, class_means, held_out
from generator_service.adapt.validation import AT_MOST, Validation
from generator_service.backends.clip_vision import BATCH
from generator_service.backends.interface import Progress, WeightSet
from generator_service.backends.lora_sets import CLASS_MEANS, VISUAL_FILE
from generator_service.backends.sd_checkpoint import SDCheckpoint
from generator_service.backends.stable_diffusion import StableDiffusionBackend, carrier
from generator_service.real_images import RealImages
from protocol.errors import GenerationFailed, InvalidRequest, TrainingDiverged
from protocol.messages import AdaptJob, LoraOptions

log = logging.getLogger(__name__)

Piece = TypeVar("Piece")

PICTURES = "validation"  # folder of them, in that of the weight set


def lora(
    backend: StableDiffusionBackend,
    base: WeightSet,
    real: RealImages,
    classes: Sequence[str],
    job: AdaptJob,
    folder: Path,
    unfinished: Path,
) -> Generator[Progress, None, tuple[str, dict[str, Any]]]:
    """See `interface.Adaptation`. Returns ("lora", metadata); on a CPU an equal job gives equal bits, resumed or not.

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        GenerationFailed: it does not fit into the GPU's memory.
        ConfigError: visual tokens are wanted but there is no image encoder that fits.
        InvalidRequest: the base is itself a LoRA.
    """
    if base.kind == "lora":
        raise InvalidRequest(
            f"weights {base.ref} are a LoRA, and one cannot sit on another: adapt {carrier(base).ref}", param="base"
        )
    options = job.lora or LoraOptions()
    assert real.images.shape[1:3] == backend.native_size() and real.labels.max() < len(classes)
    checkpoint = backend.checkpoint(base)
    held = held_out(real.labels, options.validation, AT_MOST, job.seed)
    encoder = None if options.visual == "none" else checkpoint.image_encoder_digest
    with _memory_told():
        visual, means = yield from _visual_tokens(checkpoint, real, ~held, len(classes), job)
        data = TrainingSet(checkpoint, real, classes, visual, options)
        with LoraAdapter.added(checkpoint, options.rank, job.seed) as adapter:
            training = Training(checkpoint, data, job, held, adapter)
            yield from training.run(unfinished, _identity(base, real, classes, job, encoder))
            adapter.save(folder)
    if means is not None:
        save_file({CLASS_MEANS: means.cpu().contiguous()}, folder / VISUAL_FILE)
    if (unfinished / PICTURES).is_dir():
        shutil.copytree(unfinished / PICTURES, folder / PICTURES)
    without_caption = sum(not (caption or "").strip() for caption in real.captions)
    found = {"images": len(real.images), "without_caption": without_caption, "image_encoder": encoder}
    return "lora", training.metadata() | found


@contextmanager
def _memory_told() -> Iterator[None]:
    """Raises GenerationFailed, saying what to do, where the block finds no room in the GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GenerationFailed(
            "the adaptation does not fit into the GPU's memory: lower batch_size (and raise gradient_accumulation "
            'instead), set precision = "bfloat16" or the backend\'s dtype, or cache = false'
        ) from error


def _visual_tokens(
    checkpoint: SDCheckpoint, real: RealImages, trained: np.ndarray, classes: int, job: AdaptJob
) -> Generator[Progress, None, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The token of each image [N, D], and the mean feature of each class [classes, D] over the images trained on."""
    visual = (job.lora or LoraOptions()).visual
    if visual == "none":
        return None, None
    parts = []
    for start in range(0, len(real.images), BATCH):
        parts.append(checkpoint.visual_features(real.images[start : start + BATCH]))
        yield Progress(0, job.steps, None)
    features = torch.cat(parts)
    means = class_means(features[trained], real.labels[trained], classes)
    return (features if visual == "image" else means[real.labels]), means


def _identity(base: WeightSet, real: RealImages, classes: Sequence[str], job: AdaptJob, encoder: str | None) -> str:
    """What decides how an adaptation goes; its checkpoints are for no other."""
    said = job.model_dump_json(exclude={"name", "again", "activate"})
    return "\n".join(
        [said, base.ref.digest, encoder or "", *classes, *real.ids, *(caption or "" for caption in real.captions)]
    )


@dataclass
class History:
    """What has happened so far."""

    step: int = 0  # optimiser steps done
    denoising: list[float] = field(default_factory=list)  # loss of each step
    discrepancy: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss); the first before any step
    best: tuple[int, float] | None = None  # (step, loss) of the best validation after a step
    worse: int = 0  # validations since then
    seconds: float = 0.0  # what was served meanwhile counts too


class Training:
    """A LoRA, its optimiser, and how far they are."""

    def __init__(
        self, checkpoint: SDCheckpoint, data: TrainingSet, job: AdaptJob, held: np.ndarray, adapter: LoraAdapter
    ):
        """held: bool [N], which images are not trained on."""
        options = job.lora or LoraOptions()
        self._checkpoint, self._job, self._options, self._adapter = checkpoint, job, options, adapter
        self._objective = Objective(checkpoint, data, options)
        self._rows = torch.from_numpy(np.flatnonzero(~held))
        rows = torch.from_numpy(np.flatnonzero(held))
        self._validation = Validation(self._objective, rows, job.batch_size, job.seed) if len(rows) else None
        self._rng = torch.Generator().manual_seed(job.seed)
        self._optimizer = torch.optim.AdamW(self._adapter.parameters.values(), lr=job.learning_rate)
        half = torch.float16 in (checkpoint.dtype, getattr(torch, options.precision))
        self._scaler = torch.amp.GradScaler(checkpoint.device.type, enabled=half)  # small gradients vanish in float16
        self._history = History()
        self._best: dict[str, torch.Tensor] | None = None  # state of the adapter at the best validation

    def run(self, unfinished: Path, identity: str) -> Generator[Progress, None, None]:
        """Train to the end, from the newest checkpoint in `unfinished`; yields after each optimiser step, and
        between the pieces of a validation."""
        began = time.monotonic()
        if (state := resume.load(unfinished, identity)) is not None:
            self._restore(state)
            log.info("adaptation resumed after step %d", self._history.step)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            yield from self._validate(unfinished)
        history, before = self._history, self._history.seconds
        while history.step < self._job.steps and not self._stopped():
            loss = self._step()
            if history.step % self._options.validate_every == 0 or history.step == self._job.steps:
                yield from self._validate(unfinished)
            history.seconds = before + time.monotonic() - began
            if self._options.checkpoint_every and history.step % self._options.checkpoint_every == 0:
                resume.save(unfinished, history.step, self._state(), identity)
            yield Progress(history.step, self._job.steps, loss)
        if self._best is not None:
            self._adapter.restore(self._best)

    def _step(self) -> float:
        """One optimiser step; the loss before it. The discrepancy is summed within each of the batches it takes."""
        options, history = self._options, self._history
        size, batches = self._job.batch_size, options.gradient_accumulation
        rows = self._rows[torch.randint(len(self._rows), (size * batches,), generator=self._rng)]
        shape = (len(rows), *self._checkpoint.latent_shape)
        noise, times = denoising.draw(self._checkpoint.forward_process, shape, self._rng)
        done = []
        self._optimizer.zero_grad()
        with self._adapter.in_use():
            for part in torch.arange(len(rows)).split(size):
                losses = self._objective(rows[part], noise[part], times[part])
                total = losses.denoising + options.discrepancy * losses.discrepancy
                self._scaler.scale(total / batches).backward()
                done.append([value.item() for value in losses])
        denoised, differed = np.mean(done, axis=0).tolist()
        history.step += 1
        history.denoising.append(denoised)
        history.discrepancy.append(differed)
        loss = self._finite(denoised + options.discrepancy * differed)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrainingDiverged(f"lora: loss {loss} at step {self._history.step}; lower learning_rate")
        return loss

    # ------------------------------------------------------------ validation

    def _validate(self, unfinished: Path) -> Generator[Progress, None, None]:
        if self._validation is None:
            return
        history = self._history
        loss = self._finite(sum((yield from self._pieces(self._validation.losses()))))
        pictures = yield from self._pieces(self._validation.pictures())
        self._validation.save(pictures, unfinished / PICTURES / f"step-{history.step:06d}.png")
        history.validation.append((history.step, loss))
        if history.step == 0 or self._options.patience is None:
            return
        if history.best is None or loss < history.best[1]:
            history.best, history.worse, self._best = (history.step, loss), 0, self._adapter.state()
        else:
            history.worse += 1

    def _pieces(self, pieces: Iterator[Piece]) -> Generator[Progress, None, list[Piece]]:
        """All of them; yields before and after each. The LoRA is in use while one is made, and not in between."""
        made: list[Piece] = []
        yield self._pause()
        while True:
            with self._adapter.in_use():
                piece = next(pieces, None)
            if piece is None:
                return made
            made.append(piece)
            yield self._pause()

    def _pause(self) -> Progress:
        return Progress(self._history.step, self._job.steps, None)

    def _stopped(self) -> bool:
        return self._options.patience is not None and self._history.worse >= self._options.patience

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {
            "history": asdict(self._history),
            "adapter": self._adapter.state(),
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "rng": self._rng.get_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._history = History(**state["history"])
        self._adapter.restore(state["adapter"])
        self._best = state["best"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._rng.set_state(state["rng"])

    def metadata(self) -> dict[str, Any]:
        """What the weight set's metadata tell of the training."""
        history = self._history
        last = slice(-max(1, history.step // 10), None)
        denoised, differed = float(np.mean(history.denoising[last])), float(np.mean(history.discrepancy[last]))
        told = self._job.model_dump(include={"batch_size", "learning_rate", "seed"})
        told |= self._options.model_dump(exclude={"cache", "checkpoint_every"})
        return told | {
            "steps": history.step,
            "loss": denoised + self._options.discrepancy * differed,  # all three over the last tenth of the steps
            "denoising_loss": denoised,
            "discrepancy_loss": differed,
            "held_out_losses": [list(point) for point in history.validation],  # [step, loss]
            "best_step": None if history.best is None else history.best[0],  # what was kept; None: the last
            "stopped_early": self._stopped(),
            "seconds": history.seconds,
        }
