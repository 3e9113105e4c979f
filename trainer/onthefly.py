"""The drop-in for a plain PyTorch loop: the loop and its loader stay as they are, and each epoch's batches go through
here.

    with OnTheFly("pets.toml", model, optimizer) as augment:
        for epoch in augment.epochs:
            for images, labels in augment(loader):
                loss = cross_entropy(model(images), labels)
                ...

The steps are those of `loop`; only the updates are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from protocol import config as settings_file
from protocol.bus import QueueConfig
from protocol.errors import ConfigError
from trainer import loop, summary
from trainer.data.batches import derive
from trainer.data.images import SyntheticImages
from trainer.data.layout import opened
from trainer.settings import TrainerConfig
from trainer.start import open_run

Transform = Callable[[Image.Image], Tensor]


class OnTheFly:
    """One training run whose updates the caller makes. A context manager, and then a wrapper of the caller's loader.

    Args:
        config: settings file; its table [trainer] says what to ask, whom, and how to select: trainer.dataset names the
            images that the loader loads, trainer.epochs how many epochs an iteration has. Its optimizer and batch size
            are not used, and trainer.model only for image_size, which synthetic images have before the transform.
        model: any module whose outputs are logits [B, C] for the classes of the dataset, in the dataset's order.
        optimizer: saved and restored with the model.
        transform: makes the model's input of a PIL image, as the loader does; None: `loader.dataset.transform`.
        eval_transform: likewise, without augmentation, to score and to evaluate with; None: `transform`.
        overrides: `table.key=value` over the file.

    Raises:
        ConfigError, DatasetError, CheckpointCorrupt, BrokerUnavailable: when the context is entered. ConfigError also
            under torchrun: several processes train a run with `onthefly train --processes`.
    """

    def __init__(
        self,
        config: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        transform: Transform | None = None,
        eval_transform: Transform | None = None,
        overrides: Sequence[str] = (),
    ):
        settings = settings_file.load(Path(config), overrides)
        settings_file.check_tables(settings, settings_file.TABLES)
        self.config = settings_file.section(settings, "trainer", TrainerConfig)
        if self.config.task == "video":
            raise ConfigError(
                "OnTheFly mixes images into the batches of your loader, not clips: train with `onthefly train`",
                param="task",
            )
        if self.config.mode == "synthetic" or self.config.thresholds.auto:
            raise ConfigError(
                "your loader loads all real samples, and mode synthetic and thresholds.auto keep some from the model: "
                "train with `onthefly train`, or choose another mode and fixed thresholds"
            )
        self._queue = settings_file.section(settings, "broker", QueueConfig)
        self._model, self._optimizer = model, optimizer
        self._transform, self._eval_transform = transform, eval_transform or transform
        self._stack = ExitStack()
        self._in_epoch = False

    def __enter__(self) -> OnTheFly:
        opening = open_run(self.config, self._queue, self._model, self._optimizer, preprocess=self._evaluated)
        self._run, self._source = self._stack.enter_context(opening)
        self._epoch = self._run.at.iteration * self.config.epochs
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._in_epoch:
            self._end_epoch()
        self._stack.__exit__(kind, error, at)
        if kind is None:
            summary.write(self.config.folder)

    @property
    def epochs(self) -> range:
        """The epochs that remain; a run that is entered again goes on after its last finished iteration."""
        return range(self._epoch, self.config.iterations * self.config.epochs)

    @property
    def synthetic(self) -> SyntheticImages:
        """This iteration's synthetic samples, a dataset of (image uint8 [S, S, 3], label, True); empty at first."""
        return self._run.synthetic

    def __call__(self, loader: DataLoader) -> Iterator[Any]:
        """One epoch: the loader's batches, with synthetic rows added and those that lookahead drops taken out.

        Before the first epoch of an iteration samples are gathered, and after its last all is evaluated and saved. An
        epoch that is left early counts. The model is in train mode at the start.

        Args:
            loader: of the real samples, with a length; its batches are pairs (images, labels) or dicts of these two.

        Yields:
            Batches like the loader's.

        Raises:
            ConfigError: batches of another layout, no transform, or no epoch remains.
        """
        if self._in_epoch:
            self._end_epoch()
        self._transform = self._transform or _transform_of(loader)
        self._eval_transform = self._eval_transform or self._transform
        self._begin_epoch()
        run = self._run
        with run.journal.iteration(run.at.iteration), run.journal.timed("train", iteration=run.at.iteration):
            portions = self._portions(len(loader))
            for batch, rows in zip(loader, chain(portions, repeat(portions[0][:0])), strict=False):
                yield self._mixed(batch, rows)
        self._end_epoch()

    def _begin_epoch(self) -> None:
        if not self.epochs:
            raise ConfigError(
                f"this run has had its {self.config.iterations} iterations of {self.config.epochs} epochs: loop over "
                "`augment.epochs`, which are those that remain, or set trainer.iterations higher"
            )
        if self._epoch % self.config.epochs == 0:
            with self._run.journal.iteration(self._run.at.iteration):
                loop.gather(self._run, self._source)
        self._run.model.train()
        self._in_epoch = True

    def _end_epoch(self) -> None:
        self._in_epoch = False
        self._epoch += 1
        if self._epoch % self.config.epochs == 0:
            with self._run.journal.iteration(self._run.at.iteration):
                loop.finish(self._run)

    def _portions(self, batches: int) -> tuple[Tensor, ...]:
        """The synthetic rows of each of an epoch's batches: every one once, in an order of this epoch's own."""
        generator = torch.Generator().manual_seed(derive(self.config.seed, "mixed", self._epoch))
        return torch.randperm(len(self.synthetic), generator=generator).tensor_split(batches)

    def _mixed(self, batch: Any, rows: Tensor) -> Any:
        """A batch of the loader and these synthetic rows, less what lookahead drops (RL-identity eq. 12)."""
        images, labels, closed = opened(batch)
        real = len(labels)
        if len(rows):
            images = torch.cat([images, self._made(rows, images)])
            labels = torch.cat([labels, self.synthetic.labels[rows].to(labels)])
        synthetic = torch.arange(len(labels)) >= real
        rate = self._optimizer.param_groups[0]["lr"]
        device = self._run.device
        chosen = loop.select(self._run, images.to(device), labels.to(device), synthetic.to(device), rate).cpu()
        self._run.count(synthetic, chosen)
        chosen = chosen.to(images.device)
        return closed(images[chosen], labels[chosen])

    def _made(self, rows: Tensor, like: Tensor) -> Tensor:
        """The model's input for synthetic rows, transformed as the loader's images are."""
        made = _transformed(self.synthetic.images[rows], self._transform).to(like)
        if made.shape[1:] != like.shape[1:]:
            raise ConfigError(
                f"the transform makes images of shape {list(made.shape[1:])}, and the loader's are "
                f"{list(like.shape[1:])}: give OnTheFly the transform that the loader's dataset has"
            )
        return made

    def _evaluated(self, images: Tensor) -> Tensor:
        """The model's input of uint8 [B, S, S, 3], to score and to evaluate with."""
        return _transformed(images, self._eval_transform)


def _transform_of(loader: DataLoader) -> Transform:
    transform = getattr(loader.dataset, "transform", None)
    if transform is None:
        raise ConfigError(
            "the loader's dataset does not say how it makes tensors of images: give OnTheFly `transform`, which makes "
            "the model's input of a PIL image"
        )
    return transform


def _transformed(images: Tensor, transform: Transform) -> Tensor:
    return torch.stack([transform(Image.fromarray(image.numpy())) for image in images.cpu()])
