"""Prompts of clips, composed by a vision-language model that sees the first frame and is told which action units.

Answers that are off the format, of another emotion or name action units that were not retrieved are refused and asked
for again; after a few rounds the fixed phrases serve. What was used for a sample is kept where all replicas find it:
a work unit made twice has the same prompts. Knows nothing of work units, of HTTP or of how models run.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agent.captions import KEPT_S, MADE_UP_S, QUIET_S, Store
from agent.expressions import prompt
from agent.expressions.action_units import ACTION_UNITS
from agent.expressions.check import Answer, Refused, check, hallucinated, parse
from agent.expressions.compose import NAME, Asked, Composed, Draw, Fits, TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from agent.language import ChatModel, Turn
from protocol import codec
from protocol.entries import Versions
from protocol.errors import LanguageUnavailable, NotReady, Retryable
from protocol.interruption import Interruption

log = logging.getLogger(__name__)

QUALITY = 95  # of the first frame's JPEG, 100 at most; lossless pictures take many times as long to send

Count = Callable[[str, int], None]
"""Called with what became of prompts and how many: "model", "template" or "cache" where they were used; "answers" that
came, "hallucinating" ones among those that have the format, and why answers were refused: a `Refused.reason`, or
"long"."""


class Question(NamedTuple):
    """What is asked about one clip."""

    asked: Asked
    drawn: Draw
    text: str
    name: str  # that its answer is kept under


class VisionComposer:
    """Asks a model. A `Composer`."""

    def __init__(
        self,
        model: ChatModel,
        knowledge: KnowledgeBase,
        config: ExpressionsConfig,
        fits: Fits = lambda text: True,
        count: Count = lambda what, how_many: None,
    ):
        self.knowledge = knowledge
        self.tally: Counter[str] = Counter()  # all that was counted
        self._model, self._config, self._fits, self._count = model, config, fits, count
        self._template = TemplateComposer(knowledge, config, fits)
        self._closed, self._lock = False, threading.Lock()
        self._trouble = Interruption(
            lambda error: log.warning("prompts are composed by the template meanwhile: %s", error.message),
            lambda: log.info("prompts are composed by %s again", model.name),
            quiet_s=QUIET_S,
        )
        self._unshared = Interruption(
            lambda error: log.warning("composed prompts are not shared with other replicas: %s", error.message),
            lambda: log.info("composed prompts are shared with other replicas again"),
            quiet_s=QUIET_S,
        )

    def close(self) -> None:
        """See `Composer`: who waits gets NotReady, and leaves the unit to another replica."""
        self._closed = True
        self._model.close()

    def __call__(self, asked: Sequence[Asked], store: Store | None = None) -> list[Composed]:
        """See `Composer`."""
        questions = [self._question(each) for each in asked]
        used = self._kept(questions, store)
        self._counted("cache", len(used))
        missing = [question for question in questions if question.name not in used]
        answers = self._ask(missing)
        for question in missing:
            answer = answers.get(question.name)
            kept = Versions(texts=[answer or ""], by=[self._model.name if answer else NAME])
            used[question.name] = self._shared(question.name, kept, KEPT_S if answer else MADE_UP_S, store)
        composed = [self._composed(question, used[question.name]) for question in questions]
        if missing:
            fresh = {question.asked.sample_id for question in missing}
            by_template = sum(
                c.by == NAME for q, c in zip(questions, composed, strict=True) if q.asked.sample_id in fresh
            )
            self._counted("template", by_template)
            self._counted("model", len(missing) - by_template)
        return composed

    def hallucination_rate(self) -> float:
        """Of the answers in the format that came so far, the part that named an action unit which was not retrieved; in
        the arm without retrieval, one of no entry of the emotion. 0 before any."""
        with self._lock:
            return self.tally["hallucinating"] / max(1, self.tally["answers"] - self.tally["format"])

    # ------------------------------------------------------------ what was used before

    def _kept(self, questions: Sequence[Question], store: Store | None) -> dict[str, Versions]:
        """By name."""
        if store is None or not questions:
            return {}
        names = [question.name for question in questions]
        try:
            return {name: kept for name, kept in zip(names, store.get(names), strict=True) if kept is not None}
        except Retryable as error:
            self._unshared.failed(error)
            return {}

    def _shared(self, name: str, made: Versions, ttl_s: int, store: Store | None) -> Versions:
        """What is used: another replica's, when that was first."""
        if store is None:
            return made
        try:
            made = store.put(name, made, ttl_s)
            self._unshared.worked()
        except Retryable as error:
            self._unshared.failed(error)
        return made

    # ------------------------------------------------------------ the model

    def _question(self, asked: Asked) -> Question:
        drawn = self._template.draw(asked)
        text = prompt.question(drawn.emotion, drawn.retrieved if self._config.retrieval else None)
        parts = ("expressions", self._model.name, asked.sample_id, text)
        return Question(asked, drawn, text, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32])

    def _ask(self, questions: Sequence[Question]) -> dict[str, str]:
        """Usable answers by name, none where the model gives none."""
        found: dict[str, str] = {}
        errors: list[LanguageUnavailable] = []
        conversations = {question.name: _conversation(question) for question in questions}
        open_questions = list(questions)
        for round_number in range(self._config.rounds):
            if not open_questions:
                break
            seeds = [_seed(question, round_number) for question in open_questions]
            answers = self._model.complete([conversations[question.name] for question in open_questions], seeds)
            refused = []
            for question, answer in zip(open_questions, answers, strict=True):
                if not isinstance(answer, str):
                    errors.append(answer)
                elif self._usable(question, answer):
                    found[question.name] = answer
                else:
                    refused.append(question)
            open_questions = refused
        if self._closed:
            raise NotReady("the service is shutting down: try another replica")
        self._tell(len(questions), len(open_questions), errors)
        return found

    def _tell(self, asked: int, short: int, errors: Sequence[LanguageUnavailable]) -> None:
        """What came of asking."""
        if errors:
            self._trouble.failed(errors[0])
        elif short:
            rate, refused = (
                self.hallucination_rate(),
                f"for {short} clips of {asked} {self._model.name!r} gave no answer",
            )
            told = f"{refused} that could be used; so far {rate:.0%} named action units that were not retrieved"
            self._trouble.failed(LanguageUnavailable(f"{told}: use a model that follows instructions"))
        elif asked:
            self._trouble.worked()

    def _usable(self, question: Question, text: str) -> bool:
        self._counted("answers", 1)
        answer = parse(text)
        if answer is not None and hallucinated(answer, self._retrieved(question)):
            self._counted("hallucinating", 1)
        found = check(text, question.drawn.emotion, self._allowed(question), self.knowledge.aliases)
        if isinstance(found, Answer) and not self._fits(self._worded(question, found)):
            found = Refused("long")
        if isinstance(found, Refused):
            self._counted(found.reason, 1)
        return isinstance(found, Answer)

    def _allowed(self, question: Question) -> Mapping[str, float] | None:
        return question.drawn.retrieved.units if self._config.retrieval else None

    def _retrieved(self, question: Question) -> set[str]:
        if self._config.retrieval:
            return set(question.drawn.retrieved.units)
        return {code for entry in self.knowledge.of(question.asked.class_name) for code in entry.units}

    # ------------------------------------------------------------ prompts

    def _composed(self, question: Question, used: Versions) -> Composed:
        """The prompt of an answer that was found usable, or the template's."""
        answer = parse(used.texts[0]) if used.by[0] != NAME else None
        if answer is None:
            return self._template.one(question.asked)
        units = sorted(set(answer.units) & ACTION_UNITS.keys())
        return Composed(self._worded(question, answer), used.by[0], units)

    def _worded(self, question: Question, answer: Answer) -> str:
        intensities = self._allowed(question) or {}
        named = {code: intensities[code] for code in answer.units if code in intensities}
        draw = np.random.default_rng(question.asked.seed)
        return prompt.answered(answer.identity, question.drawn.emotion, answer.changes, named, draw)

    def _counted(self, what: str, how_many: int) -> None:
        if how_many:
            with self._lock:
                self.tally[what] += how_many
            self._count(what, how_many)


def _conversation(question: Question) -> list[Turn]:
    url = f"data:image/jpeg;base64,{codec.image_to_base64(question.asked.image(), 'jpeg', QUALITY)}"
    content = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": content}]


def _seed(question: Question, round_number: int) -> int:
    """Of one question: the same wherever it is asked."""
    return int(hashlib.sha256(f"{question.name}\0{round_number}".encode()).hexdigest()[:15], 16)
