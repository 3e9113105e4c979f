"""Caption perturbation (GenDataAgent 2.3): m versions of a scene for each caption, from a language model or a template.

Whatever the model answers, or when it does not, there are always m distinct versions: it is asked again for those that
are missing, and the template makes up the rest. Versions by the model alone are used again wherever their caption
comes; those that the template helped out with, for the same purpose (one feedback) alone: what is done again has the
same versions, and the next time the model is asked anew. Knows nothing of work units, of HTTP or of how models run.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from agent import caption_template
from agent.caption_parser import distinct, parse
from agent.language import ChatModel, Turn
from protocol.entries import Versions
from protocol.errors import LanguageUnavailable, NotReady, Retryable
from protocol.interruption import Interruption

log = logging.getLogger(__name__)

MAX_WORDS = 10  # of a version, as the system prompt says
SYSTEM = (
    "You are an editor tasked with subtly altering the scene described after a comma in a sentence. The goal is to "
    "change the scene slightly in no more than 10 words. Respond with {m} versions."
)
USER = (
    "Given the sentence '{sentence}', slightly alter the scene described after the comma to depict a similar yet "
    "different scenario."
)
AT_ONCE = 25  # versions in one answer; more are asked for in parts, for answers have a limit
ROUNDS = 3  # that the model is asked in, for what is missing
QUIET_S = 30.0  # without trouble, after which it is over
CACHED = 100_000  # captions whose versions are kept in memory
KEPT_S, MADE_UP_S = 24 * 3600, 3600  # life of versions by the model; of those that the template helped out with, which
# is longer than a work unit is tried again for


class Subject(NamedTuple):
    """What a prompt is about."""

    class_name: str
    caption: str | None  # None: the class alone


class Store(Protocol):
    """Versions that all replicas share. Its methods raise Retryable when it is full or away."""

    def get(self, names: Sequence[str]) -> list[Versions | None]: ...

    def put(self, name: str, versions: Versions, ttl_s: int) -> Versions:
        """Keep these, unless there are some already. Returns those that are kept."""
        ...


Count = Callable[[str, int], None]
"""Called with what became of versions and how many: "model", "template" or "cache" where they were used, "long" or
"repeated" where an answer's were not."""


class Perturber:
    """Makes versions of captions. Thread-safe."""

    def __init__(
        self,
        model: ChatModel | None,
        prompt: str,
        count: Count = lambda what, how_many: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            model: None: the template alone.
            prompt: of a captioned sample, with {class_name} and {caption} in it.
            clock: seconds, from any origin.
        """
        self._model, self._prompt, self._count = model, prompt, count
        self._memory = _Memory(clock)
        self._closed = False
        self._trouble = Interruption(
            lambda error: log.warning("captions are perturbed by the template meanwhile: %s", error.message),
            lambda: log.info("captions are perturbed by %s again", model.name if model else caption_template.NAME),
            quiet_s=QUIET_S,
            clock=clock,
        )
        self._unshared = Interruption(
            lambda error: log.warning("versions of captions are not shared with other replicas: %s", error.message),
            lambda: log.info("versions of captions are shared with other replicas again"),
            quiet_s=QUIET_S,
            clock=clock,
        )

    def close(self) -> None:
        """Ask no more: who waits for an answer gets NotReady, and leaves the unit to another replica."""
        self._closed = True
        if self._model is not None:
            self._model.close()

    def __call__(
        self, subjects: Iterable[Subject], m: int, store: Store | None = None, purpose: str = ""
    ) -> dict[Subject, Versions]:
        """C'_x = CaptionPerturbation_m(p_x, c_x) for each subject (eq. 2): m distinct versions of at most `MAX_WORDS`
        words, none of them the caption itself. The same again while the caches last.

        Args:
            m: 1 to 1000.
            store: shared with other replicas; None, full or away: this one's memory alone.
            purpose: what the versions are for, such as one feedback; see the module's docstring.

        Raises:
            NotReady: closed meanwhile.
        """
        wanted = list(dict.fromkeys(subjects))
        if self._model is None:
            return {subject: self._counted(_filled(subject, [], m, "")) for subject in wanted}
        names = {subject: self._names(self._model, subject, m, purpose) for subject in wanted}
        found = self._kept(names, store)
        if found:
            self._count("cache", m * len(found))
        missing = [subject for subject in wanted if subject not in found]
        made: dict[Subject, _Made] = {}
        for subject, answered in self._ask(self._model, missing, m).items():
            versions = self._counted(_filled(subject, answered, m, self._model.name))
            whole = len(answered) == m
            made[subject] = _Made(names[subject][0 if whole else 1], versions, KEPT_S if whole else MADE_UP_S)
            self._memory.put(*made[subject])  # before sharing, which may fail: the model is not asked twice
        return found | self._shared(made, store)

    def fill_in(self, subject: Subject, version: str) -> str:
        """The prompt of a version."""
        return self._prompt.replace("{class_name}", subject.class_name).replace("{caption}", version)

    # ------------------------------------------------------------ caches

    def _names(self, model: ChatModel, subject: Subject, m: int, purpose: str) -> tuple[str, str]:
        """Of versions for any purpose, and of those for this one."""
        parts = (model.name, str(m), self._prompt, subject.class_name, subject.caption or "")
        return _digest(*parts)[:32], _digest(*parts, purpose)[:32]

    def _kept(self, names: Mapping[Subject, tuple[str, str]], store: Store | None) -> dict[Subject, Versions]:
        """Those for this purpose go first, wherever they are: they may have been used already."""
        here = {subject: self._memory.get(of_this) for subject, (_, of_this) in names.items()}
        found = {subject: kept for subject, kept in here.items() if kept is not None}
        elsewhere = [(subject, name) for subject in names if subject not in found for name in reversed(names[subject])]
        for (subject, name), kept in zip(
            elsewhere, self._in_store([name for _, name in elsewhere], store), strict=True
        ):
            if kept is not None and subject not in found:
                self._memory.put(name, kept, MADE_UP_S)  # whose life there is not known
                found[subject] = kept
        for subject, (of_any, _) in names.items():
            if subject not in found and (kept := self._memory.get(of_any)):
                found[subject] = kept
        return found

    def _in_store(self, names: Sequence[str], store: Store | None) -> Sequence[Versions | None]:
        try:
            return [None] * len(names) if store is None else store.get(names)
        except Retryable as error:
            self._unshared.failed(error)
            return [None] * len(names)

    def _shared(self, made: Mapping[Subject, _Made], store: Store | None) -> dict[Subject, Versions]:
        """What is used of what was made: another replica's, when that was first."""
        used = {subject: each.versions for subject, each in made.items()}
        if store is None or not made:
            return used
        try:
            for subject, each in made.items():
                used[subject] = store.put(*each)
                self._memory.put(each.name, used[subject], each.ttl_s)
            self._unshared.worked()
        except Retryable as error:
            self._unshared.failed(error)
        return used

    # ------------------------------------------------------------ the model

    def _ask(self, model: ChatModel, subjects: Sequence[Subject], m: int) -> dict[Subject, list[str]]:
        """At most m versions by the model for each subject; fewer where it does not give them."""
        found: dict[Subject, list[str]] = {subject: [] for subject in subjects}
        short = list(subjects)
        errors: list[LanguageUnavailable] = []
        for round_number in range(ROUNDS):
            questions = [
                (subject, part, min(AT_ONCE, m - begun))
                for subject in short
                for part, begun in enumerate(range(len(found[subject]), m, AT_ONCE))
            ]
            conversations = [self._conversation(subject, count) for subject, _, count in questions]
            seeds = [_seed(subject, round_number, part) for subject, part, _ in questions]
            answers = model.complete(conversations, seeds) if questions else []
            silent = set()
            for (subject, _, _), answer in zip(questions, answers, strict=True):
                if isinstance(answer, str):
                    found[subject] = self._usable(subject, answer, found[subject])[:m]
                else:
                    errors.append(answer)
                    silent.add(subject)
            short = [subject for subject in short if subject not in silent and len(found[subject]) < m]
        if self._closed:
            raise NotReady("the service is shutting down: try another replica")
        self._tell(model, found, short, errors)
        return found

    def _tell(
        self,
        model: ChatModel,
        found: Mapping[Subject, Sequence[str]],
        short: Sequence[Subject],
        errors: Sequence[LanguageUnavailable],
    ) -> None:
        """What came of asking."""
        if errors:
            self._trouble.failed(errors[0])
        elif short:
            told = f"the answers of {model.name!r} held too few versions for {len(short)} captions of {len(found)}"
            self._trouble.failed(LanguageUnavailable(f"{told}: use a model that follows instructions"))
        elif found:
            self._trouble.worked()

    def _conversation(self, subject: Subject, count: int) -> list[Turn]:
        sentence = self.fill_in(subject, subject.caption or subject.class_name)
        return [
            {"role": "system", "content": SYSTEM.replace("{m}", str(count))},
            {"role": "user", "content": USER.replace("{sentence}", sentence)},
        ]

    def _usable(self, subject: Subject, answer: str, before: Sequence[str]) -> list[str]:
        """The versions before, and those of an answer that are short and new."""
        prefix, _, suffix = self.fill_in(subject, "\0").partition("\0")
        said = parse(answer, prefix, suffix)
        short = [version for version in said if len(version.split()) <= MAX_WORDS]
        new = list(distinct(short, [*before, subject.caption or subject.class_name]))
        for what, dropped in (("long", len(said) - len(short)), ("repeated", len(short) - len(new))):
            if dropped:
                self._count(what, dropped)
        return [*before, *new]

    def _counted(self, made: Versions) -> Versions:
        by_template = sum(by == caption_template.NAME for by in made.by)
        for what, how_many in (("template", by_template), ("model", len(made.by) - by_template)):
            if how_many:
                self._count(what, how_many)
        return made


class _Made(NamedTuple):
    """Versions, the name that they are kept under, and for how long."""

    name: str
    versions: Versions
    ttl_s: int


class _Memory:
    """The versions used last, as long as they may live. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, tuple[Versions, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Versions | None:
        with self._lock:
            versions, until = self._kept.get(name, (None, 0.0))
            return versions if self._clock() < until else None

    def put(self, name: str, versions: Versions, ttl_s: int) -> None:
        with self._lock:
            self._kept[name] = (versions, self._clock() + ttl_s)
            self._kept.move_to_end(name)
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)


def _filled(subject: Subject, answered: Sequence[str], m: int, model: str) -> Versions:
    """The model's versions, and the template's up to m."""
    spare = caption_template.versions(subject.caption, subject.class_name, MAX_WORDS)
    more = list(islice(distinct(spare, answered), m - len(answered)))
    by = [model] * len(answered) + [caption_template.NAME] * len(more)
    return Versions(texts=[*answered, *more], by=by)


def _seed(subject: Subject, round_number: int, part: int) -> int:
    """Of one question: the same wherever it is asked."""
    return int(_digest(subject.class_name, subject.caption or "", str(round_number), str(part))[:15], 16)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
