"""The states that a sampling policy learns from: first frames and texts (ARGen Algorithm 1, line 1).

Each is a neutral frame of the service's clips together with an emotion of another class, whose text is composed as that
of a work unit is. Knows nothing of how clips are made or judged, nor of policies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from agent.expressions.compose import Asked, Composer
from agent.expressions.emotions import emotion_of
from agent.expressions.plan import IdentityFrame
from agent.expressions.settings import ExpressionsConfig
from generator_service import json_lines
from generator_service.backends.interface import Row, WeightSet
from generator_service.expressions import Expressions
from generator_service.faces.interface import FacesConfig
from protocol import prompts
from protocol.dataset import Dataset
from protocol.errors import InvalidRequest, NoFace, UnknownClass
from protocol.messages import sample_id, seed_of
from protocol.policy import PolicyJob

if TYPE_CHECKING:
    import torch

PROMPTS = "prompts.jsonl"  # in the job's unfinished folder: what a model composed is not composed the same again
CHUNK = 16  # prompts that are composed at a time
PAUSE_S = 0.05  # while somebody else composes


@runtime_checkable
class Stateful(Protocol):
    """A backend whose clips a policy can be learnt for."""

    def state(self, weights: WeightSet, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the first frames, float32 [B, C, h, w], and embeddings of the prompts, float32 [B, T, D]."""
        ...


@dataclass(frozen=True)
class Pair:
    """(x0, y)."""

    identity: IdentityFrame
    class_name: str  # whose emotion the clip is to show
    prompt: str = ""  # "": not composed yet

    @property
    def name(self) -> str:
        return f"{self.identity.sample_id}:{self.identity.frame}:{self.class_name}"

    @property
    def person(self) -> str:
        """Whom it shows; a clip whose subject is not known is of a person of its own."""
        return self.identity.subject or f"\0{self.identity.sample_id}"


@dataclass(frozen=True)
class Source:
    """What a service has to make states of."""

    dataset: Dataset | None  # None: not mounted
    expressions: Expressions | None  # None: the backend makes images
    settings: ExpressionsConfig
    faces: FacesConfig | None  # None: faces are not read
    negative_prompt: str | None

    def check(self, job: PolicyJob) -> None:
        """Raises InvalidRequest unless there are clips to learn from and a reader to judge them; NoFace when fewer than
        two people are to be seen in them."""
        if self.dataset is None or not self.dataset.is_clips:
            raise InvalidRequest(
                "a policy is learnt from first frames of clips: set generator.dataset to a dataset of clips",
                param="type",
            )
        if self.faces is None and job.method != "random":
            raise InvalidRequest(
                "clips are rewarded for what a reader sees in their faces: add a table [generator.faces]", param="type"
            )
        assert self.expressions is not None
        if self.faces is not None and job.method != "random" and not self.expressions.reads_pixels:
            raise InvalidRequest(
                f"the reader {self.faces.reader!r} has readings of the dataset's own clips alone, and a policy is "
                "learnt from clips that are made: give it what it reads pixels with (generator.faces.openface.binary), "
                "or use another generator.faces.reader",
                param="type",
            )
        self.split(job)

    def digest(self) -> str:
        """Hash of all that decides which pairs there are, how their texts are composed, and what is read in their
        clips; of files and models, what they hold."""
        assert self.expressions is not None and self.dataset is not None
        known = {name: [asdict(e) for e in held] for name, held in self.expressions.composer.knowledge.entries.items()}
        faces = ["" if self.faces is None else self.faces.model_dump_json(), self.expressions.reader]
        said = [self.settings.model_dump_json(), *faces, self.negative_prompt, known, *self.dataset.classes]
        return hashlib.sha256(json.dumps([*said, *self.expressions.identities]).encode()).hexdigest()

    # ------------------------------------------------------------ pairs

    def split(self, job: PolicyJob) -> tuple[list[Pair], list[Pair]]:
        """Those that are learnt from, and those that the policy is measured on; without texts yet.

        People are in one of the two only: the frames of a person are near each other, and so are the texts that go with
        them, so that a split of pairs would measure what was learnt by heart. Raises NoFace.
        """
        pairs = self._pairs(job)
        people = sorted({pair.person for pair in pairs})
        if len(people) < 2:
            more = "draw more `pairs`, " if job.pairs is not None else ""
            raise NoFace(
                f"clips of {len(people)} people can be used, and some are to be held out: {more}mount clips of two "
                "people at least, say who is who (`subject`), or loosen the gates of generator.faces",
                param="type",
            )
        order = np.random.default_rng(job.seed).permutation(len(people))
        held = max(1, round(job.validation * len(people)))
        apart = {people[at] for at in order[: min(held, len(people) - 1)]}
        drawn = [pairs[at] for at in np.random.default_rng([job.seed, 1]).permutation(len(pairs))]
        train = [pair for pair in pairs if pair.person not in apart]
        return train, [pair for pair in drawn if pair.person in apart][: job.validation_pairs]

    def _pairs(self, job: PolicyJob) -> list[Pair]:
        """Neutral frames, where there are any, with each emotion that is wanted, never with their own; of too many,
        some are drawn."""
        assert self.expressions is not None
        aliases = self.settings.aliases
        neutral = {emotion_of(name, aliases) for name in self.settings.neutral_classes}
        identities = self.expressions.identities
        preferred = [one for one in identities if emotion_of(one.class_name, aliases) in neutral]
        found = [
            Pair(identity, name)
            for identity in preferred or identities
            for name in self._wanted(job, neutral)
            if name != identity.class_name
        ]
        order = np.random.default_rng([job.seed, 2]).permutation(len(found))
        return [found[at] for at in sorted(order[: job.pairs])]

    def _wanted(self, job: PolicyJob, neutral: set[str | None]) -> list[str]:
        """Classes that clips are to show. Raises InvalidRequest and UnknownClass."""
        assert self.expressions is not None and self.dataset is not None
        known = self.dataset.classes
        if unknown := sorted(set(job.classes or ()) - set(known)):
            raise UnknownClass(
                f"the clips have no class {unknown[0]!r}: use some of {', '.join(known)}", param="classes"
            )
        wanted = job.classes or [name for name in known if emotion_of(name, self.settings.aliases) not in neutral]
        if self.settings.composer != "fixed":
            for name in wanted:
                self.expressions.composer.knowledge.of(name)
        return wanted

    def first_frame(self, pair: Pair) -> np.ndarray:
        """uint8 [H, W, 3]. Raises BadFile."""
        assert self.dataset is not None
        return self.dataset.image(pair.identity.sample_id, pair.identity.frame)

    # ------------------------------------------------------------ texts

    def worded(self, pairs: Sequence[Pair], job: PolicyJob, folder: Path) -> Generator[None, None, list[Pair]]:
        """The pairs with their texts; pauses while they are composed, which another thread does.

        Args:
            folder: keeps them as they come, so that a job that begins again has the same and goes on with the others.
        """
        texts: list[str] = json_lines.read(path := folder / PROMPTS)
        with ThreadPoolExecutor(1, thread_name_prefix="prompts") as thread:
            for start in range(len(texts), len(pairs), CHUNK):
                future = thread.submit(self._composed, pairs[start : start + CHUNK], job)
                yield from _pauses(future)
                json_lines.append(path, future.result())
                texts += future.result()
        return [Pair(pair.identity, pair.class_name, text) for pair, text in zip(pairs, texts, strict=True)]

    def _composed(self, pairs: Sequence[Pair], job: PolicyJob) -> list[str]:
        if self.settings.composer == "fixed":
            template = self.settings.fixed_prompt
            return [prompts.fill(template, template, pair.class_name, None) for pair in pairs]
        assert self.expressions is not None
        compose: Composer = self.expressions.composer
        asked = [
            Asked(
                found := sample_id("policy", job.seed, pair.name, 0),
                seed_of(found),
                pair.class_name,
                pair.identity.caption,
                partial(self.first_frame, pair),
            )
            for pair in pairs
        ]
        return [made.prompt for made in compose(asked)]


def _pauses(future: Future) -> Generator[None, None, None]:
    while not future.done():
        wait([future], PAUSE_S)
        yield
