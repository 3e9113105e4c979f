"""One run: its model, its data, where it is, and how all of that is saved and found again.

The algorithm itself is in `loop`; this is what it acts on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from protocol.errors import ConfigError, DiskFull, TrainingDiverged
from trainer import checkpoint, folder
from trainer.data.batches import Batch, batches, batches_an_epoch, schedule
from trainer.data.images import RealImages, SyntheticImages, read
from trainer.journal import Journal
from trainer.parallel import OneProcess
from trainer.pool import Candidate, Pool, packed, unpacked
from trainer.settings import OptimizerConfig, TrainerConfig
from trainer.tasks.interface import Task

EVALUATION_ROWS = 256  # rows of one forward pass without gradients


@dataclass
class Position:
    """Where the run is, and the running sums of the iteration it is in."""

    iteration: int = 0
    done: int = 0  # batches of this iteration that are done
    updates: int = 0  # optimiser updates in all: the model's version
    kept: list[str] = field(default_factory=list)  # ids of this iteration's synthetic training samples
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.sums[name] = self.sums.get(name, 0.0) + amount

    def mean(self, total: str, count: str) -> float | None:
        """Sum `total` over sum `count`; None when nothing was counted."""
        rows = self.sums.get(count, 0.0)
        return self.sums[total] / rows if rows and total in self.sums else None


class Run:
    """Everything that one run owns.

    Args:
        real, test: images to train and to evaluate on; test is None when nothing is held out.
        pool: every synthetic sample that has arrived; only the first process has it.
        processes: this one, among those that train the run.
        model, optimizer: None: the task's own, and SGD as the settings say.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        real: RealImages,
        test: RealImages | None,
        pool: Pool | None,
        journal: Journal,
        processes: OneProcess,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.config, self.task, self.real, self.test = config, task, real, test
        self.pool, self.journal = pool, journal
        self.processes, self.device = processes, processes.device
        torch.manual_seed(config.seed)
        self.model = (task.build_model() if model is None else model).to(self.device)
        self.optimizer = optimizer or torch.optim.SGD(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        self.snapshots: list[dict[str, Tensor]] = []  # the checkpoints that VoG compares
        self.synthetic = SyntheticImages.none(real.size)  # this iteration's
        self.at = Position()
        self.disk_full = False  # so that the last checkpoint could not be written

    # ------------------------------------------------------------ data

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> the model's normalised input [B, 3, S, S] on the device."""
        return self.task.preprocess(images.to(self.device))

    def with_pixels(self, candidates: Sequence[Candidate]) -> SyntheticImages:
        """Candidates and their images, which the first process reads from the run's folder for all."""
        return SyntheticImages(candidates, self.processes.first(lambda: read(candidates, self.real.size)))

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """On the device, input [b, 3, S, S] and labels [b] of the rows of a batch that this process holds, and the
        synthetic mask [B] of the whole batch."""
        total = len(batch.synthetic)
        generator = torch.Generator().manual_seed(batch.seed)
        x = self.task.augment(self.inputs(batch.images), generator, self.processes.part(total).start, total)
        self.processes.draw_apart(batch.seed)
        return x, batch.labels.to(self.device), batch.synthetic.to(self.device)

    def batches(self) -> Iterator[Batch]:
        """The batches of this iteration that are still to do."""
        data = ConcatDataset([self.real, self.synthetic]) if len(self.synthetic) else self.real
        seed, iteration = self.config.seed, self.at.iteration
        return batches(
            data,
            schedule(len(data), self.config.batch_size, self.steps(), seed, iteration),
            real=len(self.real),
            seed=seed,
            iteration=iteration,
            start=self.at.done,
            workers=self.config.workers,
            part=self.processes.part,
        )

    def steps(self) -> int:
        """Updates of this iteration: its epochs over real and synthetic rows, unless their number is set."""
        if self.config.steps_per_iteration is not None:
            return self.config.steps_per_iteration
        rows = len(self.real) + len(self.synthetic)
        return self.config.epochs * batches_an_epoch(rows, self.config.batch_size)

    # ------------------------------------------------------------ model

    def autocast(self) -> AbstractContextManager:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """A forward pass in train mode, and its losses; every process goes through it."""
        with self.autocast(), self.processes.statistics():
            yield

    @cached_property
    def replica(self) -> nn.Module:
        """The model, for the pass of an update: every process is left with the gradients of the whole batch."""
        return self.processes.replica(self.model)

    def learning_rate(self) -> float:
        """Multistep decay by the epochs done (GenDataAgent Table 12)."""
        epoch = self.at.iteration * self.config.epochs + self.at.done * self.config.epochs // self.steps()
        return multistep(self.config.optimizer, epoch)

    def predict(self, data: RealImages | SyntheticImages) -> Tensor:
        """Logits [N, C] of every row, un-augmented, model in eval mode; on the CPU. Raises TrainingDiverged."""
        part = self.processes.part(len(data))
        outputs = [torch.empty(0, len(self.task.classes))]
        for start in range(part.start, part.stop, EVALUATION_ROWS):
            x = self.inputs(data.images[start : min(start + EVALUATION_ROWS, part.stop)])
            with self.autocast():
                outputs.append(self.task.predict(self.model, x).float().cpu())
        return self.check_finite(self.processes.gather(torch.cat(outputs), len(data)))

    def check_finite(self, values: Tensor) -> Tensor:
        """The values themselves. Raises TrainingDiverged when one is NaN or infinite: nothing bad is ever saved."""
        if not torch.isfinite(values).all():
            raise TrainingDiverged(
                f"the loss is NaN or infinite at update {self.at.updates} (iteration {self.at.iteration}): lower "
                f"trainer.optimizer.learning_rate (now {self.learning_rate():g}) and start again; the run goes on from "
                "its last checkpoint, which is intact"
            )
        return values

    def advance(self, losses: Tensor, synthetic: Tensor, chosen: Tensor) -> None:
        """Count one update that is done, and save when that is due.

        Args:
            losses: of the rows trained on in this process. synthetic, chosen: bool [B] over the mixed batch.
        """
        part = self.processes.part(len(synthetic))
        made = synthetic[part][chosen[part]]
        sums = {"real_loss": float(losses[~made].sum()), "synthetic_loss": float(losses[made].sum())}
        self.at.add(**self.processes.totals(sums))
        self.count(synthetic, chosen)
        self.at.done += 1
        every = self.config.checkpoint_every
        if every is not None and self.at.updates % every == 0:
            self.save()

    def count(self, synthetic: Tensor, chosen: Tensor) -> None:
        """Count the rows of one update; the arguments as in `advance`."""
        self.at.add(
            real_rows=int((chosen & ~synthetic).sum()),
            synthetic_rows=int((chosen & synthetic).sum()),
            lookahead_seen=int(synthetic.sum()) if self.config.lookahead.enabled else 0,
        )
        self.at.updates += 1

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint, in the first process. Raises as `_save`."""
        self.processes.first(self._save)

    def _save(self) -> None:
        """Write a checkpoint; while the disk is full, the run goes on with the one before. Raises DiskFull at the end
        of the run, and TrainingDiverged rather than keep weights that are not numbers."""
        for parameter in self.model.parameters():
            self.check_finite(parameter.detach())
        state = {
            "position": asdict(self.at),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "snapshots": self.snapshots,
            "pool": self.pool.state_dict(),
            "rng": checkpoint.rng_state(),
        }
        try:
            self.journal.sync()
            checkpoint.save(self.config.folder / "checkpoints", state, updates=self.at.updates)
            self.disk_full = False
        except DiskFull as error:
            if self.at.iteration == self.config.iterations:
                raise
            if not self.disk_full:
                self.journal.event("disk_full", f"training goes on without new checkpoints: {error}")
            self.disk_full = True

    def restore(self) -> bool:
        """Go on from the newest checkpoint; False when there is none.

        Raises:
            CheckpointCorrupt: it is there but damaged.
            ConfigError: the folder was made with settings, data or a model that do not fit these.
        """
        state = self.processes.first(self._saved)
        if state is None:
            return False
        self.at = Position(**state["position"])
        with self.processes.together():
            try:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"{self.config.folder} holds a run with another model or optimizer: {error}. Use those to go on, "
                    "choose another trainer.run, or start anew with --fresh"
                ) from error
        self.snapshots = state["snapshots"]
        self.synthetic = self.with_pixels(
            self.processes.first(lambda: self._go_back(state), pack=packed, unpack=unpacked)
        )
        checkpoint.load_rng_state(state["rng"])
        return True

    def _saved(self) -> dict[str, Any] | None:
        """The newest checkpoint of the folder."""
        folder.check_made_for(self.config.folder, self._made_for())
        state = checkpoint.load(self.config.folder / "checkpoints")
        if state is None:
            self.journal.rewind(0, selected=False)
            return None
        return state

    def _go_back(self, state: dict[str, Any]) -> list[Candidate]:
        """Pool and journal as they were at a checkpoint, and the synthetic training set of then."""
        self.pool.load_state_dict(state["pool"])
        self.journal.rewind(self.at.iteration, selected=self.at.done > 0)
        return self.pool.find(self.at.kept)

    def _made_for(self) -> dict[str, Any]:
        """What must be the same for a run's folder to fit."""
        config = self.config
        return {
            "seed": config.seed,
            "task": config.task,
            "model": config.model,
            "classes": list(self.task.classes),
            "dataset": self.real.dataset.digest(),
            "batch_size": config.batch_size,
            "mode": config.mode,
            "pool": config.feedback.images_per_sample if config.mode == "offline" else None,
        }


def multistep(config: OptimizerConfig, epoch: int) -> float:
    """Learning rate of an epoch: decayed once for each decay epoch that is past."""
    return config.learning_rate * config.decay_rate ** sum(epoch >= milestone for milestone in config.decay_epochs)
