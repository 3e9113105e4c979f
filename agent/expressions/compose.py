"""Prompts of clips, composed from retrieved action units by fixed phrases: the embedded default, and what serves where
a model's answers cannot be used.

The same row has the same prompt everywhere. Knows nothing of work units, nor of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from agent.captions import Store
from agent.expressions import prompt
from agent.expressions.emotions import emotion_of
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.retrieve import Retrieved, retrieve
from agent.expressions.settings import ExpressionsConfig

NAME = "template"

Fits = Callable[[str], bool]
"""Whether the text encoder reads a prompt to its end."""


class Asked(NamedTuple):
    """A clip that wants a prompt."""

    sample_id: str
    seed: int
    class_name: str  # whose emotion it is to show
    caption: str | None  # of whom the first frame shows; None: nothing is known
    image: Callable[[], np.ndarray]  # the first frame, uint8 [H, W, 3], read when it is looked at


class Composed(NamedTuple):
    prompt: str
    by: str  # as `Sample.prompt_by`
    action_units: list[str]


class Composer(Protocol):
    """Something that writes prompts. May be shared by threads."""

    knowledge: KnowledgeBase

    def __call__(self, asked: Sequence[Asked], store: Store | None = None) -> list[Composed]:
        """A prompt for each, none with a code of an action unit in it. The same again for the same sample while the
        store, which replicas share, keeps it.

        Raises:
            UnknownClass: no emotion is known for a class.
            NotReady: closed meanwhile.
        """
        ...

    def close(self) -> None:
        """Ask no model any more."""
        ...


class Draw(NamedTuple):
    """What a row's seed decides."""

    emotion: str
    retrieved: Retrieved
    wording: np.random.Generator  # for all that is drawn after that


class TemplateComposer:
    """Words the first of the retrieved candidates: the others say other things of the same face. A `Composer`."""

    def __init__(self, knowledge: KnowledgeBase, config: ExpressionsConfig, fits: Fits = lambda text: True):
        self.knowledge, self._config, self._fits = knowledge, config, fits

    def __call__(self, asked: Sequence[Asked], store: Store | None = None) -> list[Composed]:
        """See `Composer`; `store` is not needed."""
        return [self.one(each) for each in asked]

    def one(self, asked: Asked) -> Composed:
        """As much of it as fits the text encoder, which reads the shortest form where it can read anything."""
        drawn = self.draw(asked)
        told = drawn.retrieved.candidates[0]
        text = ""
        for text in prompt.templated(drawn.emotion, told, asked.caption, drawn.wording):
            if self._fits(text):
                break
        return Composed(text, NAME, list(told.units))

    def draw(self, asked: Asked) -> Draw:
        """Eqs. 8 and 9 for this row. Raises UnknownClass."""
        draw, config = np.random.default_rng(asked.seed), self._config
        entries = self.knowledge.of(asked.class_name)
        retrieved = retrieve(entries, config.candidates, config.intensity, draw)
        return Draw(emotion_of(asked.class_name, self.knowledge.aliases), retrieved, draw)

    def close(self) -> None:
        pass
