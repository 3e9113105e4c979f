"""The drop-in for a plain PyTorch loop: yours stays as it is, and asks here for samples and for the rows to train on.

    with OnTheFly("pets.toml", model, optimizer) as otf:
        for iteration in otf:
            loader = DataLoader(ConcatDataset([otf.real, otf.synthetic]), batch_size=64, shuffle=True)
            for epoch in range(10):
                for images, labels, synthetic in loader:
                    x = otf.inputs(images)
                    keep = otf.select(x, labels, synthetic)
                    loss = cross_entropy(model(x[keep]), labels[keep])
                    ...

The steps are those of `loop`; only the updates are the caller's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from protocol import config as settings_file
from protocol.bus import QueueConfig
from trainer import loop, summary
from trainer.data.images import RealImages, SyntheticImages
from trainer.settings import TrainerConfig
from trainer.start import open_run


class OnTheFly:
    """One training run whose updates the caller makes. A context manager; iterate over it.

    Args:
        config: settings file; its table [trainer] says what to ask, whom, and how to select. Its optimizer, epochs and
            batch size are not used.
        model: any module whose outputs are logits [B, C] for the classes of the dataset, in the dataset's order.
        optimizer: saved and restored with the model.
        overrides: `table.key=value` over the file.

    Raises:
        ConfigError, DatasetError, CheckpointCorrupt, BrokerUnavailable: when the context is entered. ConfigError also
            under torchrun: several processes train a run with `onthefly train --processes`.
    """

    def __init__(
        self, config: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, overrides: Sequence[str] = ()
    ):
        settings = settings_file.load(Path(config), overrides)
        settings_file.check_tables(settings, settings_file.TABLES)
        self.config = settings_file.section(settings, "trainer", TrainerConfig)
        self._queue = settings_file.section(settings, "broker", QueueConfig)
        self._model, self._optimizer = model, optimizer
        self._stack = ExitStack()

    def __enter__(self) -> OnTheFly:
        self._run, self._source = self._stack.enter_context(
            open_run(self.config, self._queue, self._model, self._optimizer)
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        if kind is None:
            summary.write(self.config.folder)

    def __iter__(self) -> Iterator[int]:
        """The iterations that remain: before each, samples are gathered; after each, all is evaluated and saved."""
        while self._run.at.iteration < self.config.iterations:
            with self._run.journal.iteration(self._run.at.iteration):
                loop.gather(self._run, self._source)
                with self._run.journal.timed("train", iteration=self._run.at.iteration):
                    yield self._run.at.iteration
                loop.finish(self._run)

    @property
    def real(self) -> RealImages:
        """The real samples, a dataset of (image uint8 [S, S, 3], label, False)."""
        return self._run.real

    @property
    def synthetic(self) -> SyntheticImages:
        """This iteration's synthetic samples, a dataset of (image uint8 [S, S, 3], label, True); empty at first."""
        return self._run.synthetic

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] -> normalised float [B, 3, S, S] on the model's device."""
        return self._run.inputs(images)

    def select(self, x: Tensor, labels: Tensor, synthetic: Tensor) -> Tensor:
        """Which rows of a mixed batch to train on (RL-identity eq. 12). Call it once before each update.

        Args:
            x: the model's input [B, ...]. labels: long [B]. synthetic: bool [B]. The model is in train mode.

        Returns:
            bool [B] on the model's device: all real rows and the synthetic ones that lookahead keeps.
        """
        rate = self._optimizer.param_groups[0]["lr"]
        labels, synthetic = labels.to(x.device), synthetic.to(x.device)
        chosen = loop.select(self._run, x, labels, synthetic, rate)
        self._run.count(synthetic, chosen)
        return chosen
