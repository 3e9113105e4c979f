"""One run: its model, its data, and where it is.

The algorithm itself is in `loop`, this is what it acts on; how it is saved and found again is in `resume`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from protocol.errors import TrainingDiverged
from trainer.data import identity_batches
from trainer.data.batches import Batch, batches, batches_an_epoch, schedule
from trainer.data.images import Images, StandIn, SyntheticImages, read
from trainer.data.splits import Splits
from trainer.journal import Journal
from trainer.parallel import OneProcess
from trainer.pool import Candidate, Pool
from trainer.position import Position
from trainer.selection.thresholds import FixedThresholds, LearntThresholds
from trainer.settings import ADAM_TO_SGD, OptimizerConfig, TrainerConfig
from trainer.tasks.interface import Task

EVALUATION_IMAGES = 256  # images, or frames, of one forward pass without gradients


class Run:
    """Everything that one run owns.

    Args:
        splits: the images to train and to evaluate on.
        pool: every synthetic sample that has arrived; only the first process has it.
        processes: this one, among those that train the run.
        model, optimizer: None: the task's own, and the one that the settings name.
        preprocess: uint8 [B, H, W, 3], of clips [B, M, H, W, 3], to the model's input [B, ...]; None: the task's.
    """

    def __init__(
        self,
        config: TrainerConfig,
        task: Task,
        splits: Splits,
        pool: Pool | None,
        journal: Journal,
        processes: OneProcess,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
    ):
        self.config, self.task, self.splits = config, task, splits
        self.real, self.test, self.frame = splits.real, splits.test, task.frame
        self.pool, self.journal = pool, journal
        self.processes, self.device = processes, processes.device
        self._preprocess, self.has_own_input = preprocess or task.preprocess, preprocess is not None
        torch.manual_seed(config.seed)
        self.model = (task.build_model() if model is None else model).to(self.device)
        self.optimizer = optimizer or _optimizer(config.optimizer, self.model)
        self.snapshots: list[dict[str, Tensor]] = []  # the checkpoints that VoG compares
        self.synthetic = SyntheticImages.none(self.frame)  # this iteration's
        self.thresholds = _thresholds(config)
        self.at = Position()
        self.near: Tensor | None = None  # [C], what the privacy filter drops up to; None: it has not looked yet
        self.disk_full = False  # so that the last checkpoint could not be written
        self.after_iteration: list[Callable[[Run], None]] = []  # called once it is saved

    # ------------------------------------------------------------ data

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> the model's normalised input [B, 3, H, W] on the device; of clips [B, M, 3, H, W]."""
        return self._preprocess(images.to(self.device)).to(self.device)

    def with_pixels(self, candidates: Sequence[Candidate]) -> SyntheticImages:
        """Candidates and their images, which the first process reads from the run's folder for all."""
        return SyntheticImages(candidates, self.processes.first(lambda: read(candidates, self.frame)))

    def stand_in(self, members: Sequence[Candidate]) -> None:
        """Train on these synthetic samples in the place of the real ones (mode synthetic)."""
        self.real = StandIn(members, self.processes.first(lambda: read(members, self.frame)))

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """On the device, input [b, 3, H, W] and labels [b] of the rows of a batch that this process holds, and the
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
            self._schedule(seed, iteration),
            real=len(self.real),
            seed=seed,
            iteration=iteration,
            start=self.at.done,
            workers=self.config.workers,
            part=self.processes.part,
        )

    def _schedule(self, seed: int, iteration: int) -> list[list[int]]:
        """The rows of each batch: shuffled, or so many of each identity."""
        size, each = self.config.batch_size, self.config.images_per_identity
        if each is None:
            return schedule(len(self.real) + len(self.synthetic), size, self.steps(), seed, iteration)
        labels, real = torch.cat([self.real.labels, self.synthetic.labels]), len(self.real)
        return identity_batches.identity_schedule(labels, real, size, each, self.steps(), seed, iteration)

    def steps(self) -> int:
        """Updates of this iteration: its epochs over real and synthetic rows, unless their number is set."""
        if self.config.steps_per_iteration is not None:
            return self.config.steps_per_iteration
        size, each, real = self.config.batch_size, self.config.images_per_identity, len(self.real)
        if each is None:
            return self.config.epochs * batches_an_epoch(real + len(self.synthetic), size)
        labels = torch.cat([self.real.labels, self.synthetic.labels])
        return self.config.epochs * identity_batches.batches_an_epoch(labels, real, size, each)

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

    def virtual_lr(self, learning_rate: float) -> float:
        """Step of lookahead's virtual plain-SGD update at a learning rate, see `LookaheadConfig.virtual_lr`."""
        factor = ADAM_TO_SGD if self.config.optimizer.kind == "adam" else 1.0
        return self.config.lookahead.virtual_lr or factor * learning_rate

    def predict(self, data: Images) -> Tensor:
        """Logits [N, C] of every row, un-augmented, model in eval mode; on the CPU. Raises TrainingDiverged."""
        return self._of_every_row(self.task.predict, data)

    def features(self, data: Images) -> Tensor:
        """What the model's last layer sees of every row, [N, D]; else as `predict`. Raises ConfigError as the task."""
        return self._of_every_row(self.task.features, data)

    @property
    def evaluation_rows(self) -> int:
        """Rows of one forward pass without gradients."""
        return max(1, EVALUATION_IMAGES // self.frame.pictures)

    def _of_every_row(self, compute: Callable[[nn.Module, Tensor], Tensor], data: Images) -> Tensor:
        part, outputs, most = self.processes.part(len(data)), [], self.evaluation_rows
        for start in range(part.start, max(part.stop, part.start + 1), most):
            rows = range(start, min(start + most, part.stop))
            x = self.inputs(data.images[rows.start : rows.stop] if rows else data.images[:1])
            with self.autocast():
                outputs.append(compute(self.model, x)[: len(rows)].float().cpu())
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
        """Count one update that is done.

        Args:
            losses: of the rows trained on in this process. synthetic, chosen: bool [B] over the mixed batch.
        """
        part = self.processes.part(len(synthetic))
        made = synthetic[part][chosen[part]]
        sums = {"real_loss": float(losses[~made].sum()), "synthetic_loss": float(losses[made].sum())}
        self.at.add(**self.processes.totals(sums))
        self.count(synthetic, chosen)
        self.at.done += 1

    def count(self, synthetic: Tensor, chosen: Tensor) -> None:
        """Count the rows of one update; the arguments as in `advance`."""
        self.at.add(
            real_rows=int((chosen & ~synthetic).sum()),
            synthetic_rows=int((chosen & synthetic).sum()),
            lookahead_seen=int(synthetic.sum()) if self.config.lookahead.enabled else 0,
        )
        self.at.updates += 1

    def record_choice(
        self,
        candidates: Sequence[Candidate],
        copies: Sequence[Candidate],
        revealing: Sequence[Candidate],
        scores: Tensor,
        kept: Tensor,
    ) -> None:
        """Write down, and count, what this iteration trains on.

        Args:
            candidates: samples that the filter looked at. copies: near copies, which it did not. revealing: those too
                near to a real sample, which it did not either.
            scores, kept: of the candidates, [N]; scores are not looked at where there is no filter.
        """
        kind, chosen = self.config.filter, [c for c, keep in zip(candidates, kept.tolist(), strict=True) if keep]
        self.at.kept = [candidate.sample.id for candidate in chosen]
        dropped = {"near_copies": len(copies), "privacy_dropped": len(revealing)}
        self.at.add(candidates=len(candidates) + sum(dropped.values()), **dropped)
        if kind is not None:
            self.at.add(**{f"{kind}_dropped": len(candidates) - len(chosen)})
        self.journal.dropped(self.at.iteration, copies, "near copy")
        self.journal.dropped(self.at.iteration, revealing, "privacy")
        self.journal.selection(self.at.iteration, candidates, scores.tolist(), kept.tolist(), kind)
        self.journal.emptied(self.at.iteration, [*candidates, *copies, *revealing], chosen)


def multistep(config: OptimizerConfig, epoch: int) -> float:
    """Learning rate of an epoch: decayed once for each decay epoch that is past."""
    return config.learning_rate * config.decay_rate ** sum(epoch >= milestone for milestone in config.decay_epochs)


def _optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the settings name, of all parameters."""
    shared = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.kind == "adam":
        return torch.optim.Adam(model.parameters(), **shared)
    return torch.optim.SGD(model.parameters(), momentum=config.momentum, **shared)


def _thresholds(config: TrainerConfig) -> FixedThresholds | LearntThresholds:
    """How many samples to ask for and to drop, as the settings say."""
    auto = config.thresholds
    if not auto.auto:
        return FixedThresholds(config.feedback.fraction, config.dropped)
    dropped = auto.dropped if config.filter else [0.0]
    return LearntThresholds(
        auto.asked, dropped, auto.exploration, first=config.warmup_iterations, staleness=config.staleness
    )
