"""One run: its model, its data, where it is, and how all of that is saved and found again.

The algorithm itself is in `loop`; this is what it acts on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from protocol.errors import ConfigError, TrainingDiverged
from trainer import checkpoint, folder
from trainer.data.batches import Batch, batches, batches_an_epoch, schedule
from trainer.data.images import RealImages, SyntheticImages
from trainer.evaluate import Evaluation, evaluate, gradient_magnitude, train_val_gap
from trainer.journal import Journal
from trainer.pool import Pool
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
        pool: every synthetic sample that has arrived.
        model, optimizer: None: the task's own, and SGD as the settings say.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        real: RealImages,
        test: RealImages | None,
        pool: Pool,
        journal: Journal,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.config, self.task, self.real, self.test = config, task, real, test
        self.pool, self.journal = pool, journal
        self.device = _device(config.device)
        torch.manual_seed(config.seed)
        self.model = (task.build_model() if model is None else model).to(self.device)
        self.optimizer = optimizer or torch.optim.SGD(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
        )
        self.snapshots: list[dict[str, Tensor]] = []  # the checkpoints that VoG compares
        self.synthetic = SyntheticImages([], real.size)  # this iteration's
        self.at = Position()

    # ------------------------------------------------------------ data

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> the model's normalised input [B, 3, S, S] on the device."""
        return self.task.preprocess(images.to(self.device))

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Input [B, 3, S, S], labels [B] and the synthetic mask [B] of one batch, on the device."""
        generator = torch.Generator().manual_seed(batch.seed)
        x = self.task.augment(self.inputs(batch.images), generator)
        return x, batch.labels.to(self.device), batch.synthetic.to(self.device)

    def batches(self) -> Iterator[Batch]:
        """The batches of this iteration that are still to do."""
        data = ConcatDataset([self.real, self.synthetic]) if len(self.synthetic) else self.real
        seed, iteration = self.config.seed, self.at.iteration
        chosen = schedule(len(data), self.config.batch_size, self.steps(), seed, iteration)
        return batches(data, chosen, seed=seed, iteration=iteration, start=self.at.done, workers=self.config.workers)

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

    def learning_rate(self) -> float:
        """Multistep decay by the epochs done (GenDataAgent Table 12)."""
        epoch = self.at.iteration * self.config.epochs + self.at.done * self.config.epochs // self.steps()
        return multistep(self.config.optimizer, epoch)

    def predict(self, data: RealImages | SyntheticImages) -> Tensor:
        """Logits [N, C] of every row, un-augmented, model in eval mode; on the CPU. Raises TrainingDiverged."""
        outputs = []
        for start in range(0, len(data), EVALUATION_ROWS):
            x = self.inputs(data.images[start : start + EVALUATION_ROWS])
            with self.autocast():
                outputs.append(self.task.predict(self.model, x).float().cpu())
        return self.check_finite(torch.cat(outputs))

    def check_finite(self, values: Tensor) -> Tensor:
        """The values themselves. Raises TrainingDiverged when one is NaN or infinite: nothing bad is ever saved."""
        if not torch.isfinite(values).all():
            raise TrainingDiverged(
                f"the loss is NaN or infinite at update {self.at.updates} (iteration {self.at.iteration}): lower "
                f"trainer.optimizer.learning_rate (now {self.learning_rate():g}) and start again; the run goes on from "
                "its last checkpoint, which is intact"
            )
        return values

    def evaluate(self, data: RealImages | SyntheticImages) -> Evaluation:
        """Accuracy of the model on un-augmented rows."""
        return evaluate(self.predict(data), data.labels, len(self.task.classes))

    def measure(self) -> dict[str, Any]:
        """The numbers of the iteration that ends now: one line of metrics.jsonl."""
        train = self.evaluate(self.real)
        row: dict[str, Any] = {
            "iteration": self.at.iteration,
            "updates": self.at.updates,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss_real": self.at.mean("real_loss", "real_rows"),
            "loss_synthetic": self.at.mean("synthetic_loss", "synthetic_rows"),
            "train_top1": train.top1,
            "gradient_real": self.gradient(self.real),
            "gradient_synthetic": self.gradient(self.synthetic),
            **{name: self.at.sums.get(name, 0.0) for name in COUNTS},
            "stale": self.pool.stale,
        }
        if len(self.synthetic):
            row["synthetic_top1"] = self.evaluate(self.synthetic).top1
        if self.test is not None:
            held_out = self.evaluate(self.test)
            row |= {
                "test_top1": held_out.top1,
                "worst_case_disparity": held_out.worst_case_disparity,
                "per_class": held_out.per_class,
                "train_val_gap": train_val_gap(train, held_out),
            }
        return row

    def gradient(self, data: RealImages | SyntheticImages) -> float | None:
        """Mean gradient norm of the first rows of a set (GenDataAgent Figure 6b); None for an empty one."""
        rows = slice(self.config.gradient_rows)
        if not len(data.labels[rows]):
            return None
        x, y = self.inputs(data.images[rows]), data.labels[rows].to(self.device)
        return gradient_magnitude(self.task, self.model, x, y)

    def advance(self, losses: Tensor, synthetic: Tensor, chosen: Tensor) -> None:
        """Count one update that is done, and save when that is due.

        Args:
            losses: of the rows trained on [chosen.sum()]. synthetic, chosen: bool [B] over the mixed batch.
        """
        made = synthetic[chosen]
        self.at.add(real_loss=float(losses[~made].sum()), synthetic_loss=float(losses[made].sum()))
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
        """Write a checkpoint. Raises TrainingDiverged rather than keep weights that are not numbers."""
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
        checkpoint.save(self.config.folder / "checkpoints", state, updates=self.at.updates)

    def restore(self) -> bool:
        """Go on from the newest checkpoint; False when there is none.

        Raises:
            CheckpointCorrupt: it is there but damaged.
            ConfigError: the folder was made with settings, data or a model that do not fit these.
        """
        folder.check_made_for(self.config.folder, self._made_for())
        state = checkpoint.load(self.config.folder / "checkpoints")
        if state is None:
            self.journal.rewind(0, selected=False)
            return False
        self.at = Position(**state["position"])
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{self.config.folder} holds a run with another model or optimizer: {error}. Use those to go on, "
                "choose another trainer.run, or start anew with --fresh"
            ) from error
        self.snapshots = state["snapshots"]
        self.pool.load_state_dict(state["pool"])
        self.synthetic = SyntheticImages(self.pool.find(self.at.kept), self.real.size)
        self.journal.rewind(self.at.iteration, selected=self.at.done > 0)
        checkpoint.load_rng_state(state["rng"])
        return True

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


COUNTS = (
    "candidates",  # samples handed to this iteration
    "near_copies",  # of them, dropped as near copies of a real one
    "vog_dropped",  # of the rest, dropped by VoG; what remains is the synthetic training set
    "real_rows",  # rows trained on
    "synthetic_rows",  # rows trained on, after lookahead
    "lookahead_seen",  # synthetic rows that lookahead scored
)


def multistep(config: OptimizerConfig, epoch: int) -> float:
    """Learning rate of an epoch: decayed once for each decay epoch that is past."""
    return config.learning_rate * config.decay_rate ** sum(epoch >= milestone for milestone in config.decay_epochs)


def _device(name: str) -> torch.device:
    """Raises ConfigError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'trainer.device = {name!r} is not to be had: {error}. Set "cpu" or "auto"', param="device"
        ) from error
