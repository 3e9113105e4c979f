"""Publishes a run's model to the generator service, so that a generator can be rewarded by its features.

Training goes on while the service is away; a model that the service refuses for good stops the run. Knows nothing of
tasks, nor of what the service does with the model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors.torch import save

from protocol.client import GeneratorClient
from protocol.errors import ConfigError, OnTheFlyError, Retryable
from protocol.interruption import Interruption
from protocol.published import PublishedCard
from trainer.run import Run

log = logging.getLogger("trainer")


class Publisher:
    """Told of the end of each iteration, in the run's first process only."""

    def __init__(self, client: GeneratorClient, run: Run):
        """Raises ConfigError: the run's model is not one that timm can build."""
        run.task.backbone(run.model)
        self._client, self._config, self._journal = client, run.config.publish, run.journal
        self._trouble = Interruption(self._began, self._over)

    def __call__(self, run: Run) -> None:
        """`run.at` is the beginning of the next iteration.

        Raises:
            OnTheFlyError: the service refuses the model for good, as InvalidRequest, Unauthorized or BodyTooLarge.
        """
        if run.at.iteration % self._config.every:
            return
        with run.journal.timed("publish", iteration=run.at.iteration - 1):
            self._send(written(run))

    def _send(self, model: bytes) -> None:
        assert self._config.name is not None
        try:
            published = self._client.publish_model(self._config.name, model)
        except OnTheFlyError as error:
            if error.status < 500 and not isinstance(error, Retryable):
                raise
            self._trouble.failed(error)
        else:
            log.info("published as %s", published)
            self._trouble.worked()

    def _began(self, error: OnTheFlyError) -> None:
        self._journal.event("unpublished", f"the model is not published, training goes on: {error}")

    def _over(self) -> None:
        self._journal.event("published", "the model is published again")


@contextmanager
def opened(run: Run) -> Iterator[Publisher]:
    """Raises ConfigError: the run's model is not one that timm can build."""
    if run.has_own_input:
        raise ConfigError(
            "the model's input is made by a transform of yours, which its features would lack elsewhere: leave "
            "trainer.publish.name out, or train with `onthefly train`",
            param="publish",
        )
    service, timeout_s = run.config.service, run.config.publish.timeout_s
    key = service.api_key or os.environ.get("ONTHEFLY_API_KEY")
    with GeneratorClient(service.url, api_key=key, timeout=timeout_s, retries=1, deadline=timeout_s) as client:
        yield Publisher(client, run)


def written(run: Run) -> bytes:
    """What makes the features of the run's model, as safetensors; see `protocol.published`."""
    backbone = run.task.backbone(run.model)
    card = PublishedCard(
        model=backbone.name,
        options=backbone.options,
        size=backbone.size,
        mean=backbone.mean,
        std=backbone.std,
        run=run.config.run,
        iteration=run.at.iteration - 1,
        updates=run.at.updates,
    )
    state = {name: tensor.contiguous() for name, tensor in backbone.state.items()}
    return save(state, card.metadata())
