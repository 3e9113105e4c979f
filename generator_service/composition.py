"""The prompts of a work unit of clips made final: each row gets one for its class and its first frame.

Knows nothing of how prompts are composed, nor of how clips are made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from agent.captions import Store
from agent.expressions.compose import Asked, Composer, Fits, TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from agent.expressions.vision import Count, VisionComposer
from agent.language import ChatModel, OpenAIChat
from generator_service import registry
from generator_service.backends.interface import Backend
from protocol.config import section
from protocol.entries import WorkRow, WorkUnit

ImageOf = Callable[[WorkRow], np.ndarray]
"""The first frame of a row, uint8 [H, W, 3]."""


def composer(config: ExpressionsConfig, backend: Backend, count: Count, statistics: Path | None = None) -> Composer:
    """As the settings say. Raises ConfigError when they are wrong, or the model cannot be loaded.

    Args:
        statistics: `action_units.json` of the dataset that is mounted; None: there are none.
    """
    knowledge, fits = KnowledgeBase.open(config, statistics), _fits(backend)
    model: ChatModel
    if config.composer == "openai":
        model = OpenAIChat(config.openai, table="agent.expressions.openai")
    elif config.composer == "local":
        kind, settings = registry.language("vision_chat")
        table = "agent.expressions.local"
        model = kind(section({table: config.local}, table, settings))
    else:
        return TemplateComposer(knowledge, config, fits)
    return VisionComposer(model, knowledge, config, fits, count)


def composed(unit: WorkUnit, compose: Composer | None, store: Store | None, image_of: ImageOf) -> WorkUnit:
    """The unit with its prompts as they are to be used, who wrote them, and of which action units. The same unit gets
    the same prompts again, for as long as `store` keeps what a model answered.

    Args:
        compose: None: this service makes no clips, and leaves the unit as it is.

    Raises:
        UnknownClass: no emotion is known for a row's class.
        NotReady: the service stops.
    """
    if not unit.expressions or compose is None:
        return unit
    open_rows = [row for row in unit.rows if row.prompt_by is None]
    asked = [Asked(row.sample_id, row.seed, row.class_name, row.caption, partial(image_of, row)) for row in open_rows]
    found = dict(zip((row.sample_id for row in open_rows), compose(asked, store), strict=True))

    def final(row: WorkRow) -> WorkRow:
        if row.sample_id not in found:
            return row
        made = found[row.sample_id]
        return row.model_copy(update={"prompt": made.prompt, "prompt_by": made.by, "action_units": made.action_units})

    return unit.model_copy(update={"rows": [final(row) for row in unit.rows], "expressions": False})


def _fits(backend: Backend) -> Fits:
    """Whether the backend's text encoder reads a prompt to its end."""

    def fits(text: str) -> bool:
        length = backend.prompt_length(text)
        return length is None or length[0] <= length[1]

    return fits
