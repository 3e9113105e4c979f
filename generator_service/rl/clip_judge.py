"""What an action is worth in a state: the clip is made, its faces are read, and it is rewarded (ARGen Algorithm 1,
lines 5 to 7).

The same question is answered once, where answers are kept: in a file as well, as they come, for a clip takes seconds to
minutes, and a job that is killed begins again. Knows nothing of the policy that asks.

    n clips, M frames of each
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from generator_service import json_lines, out_of_memory
from generator_service.adapt.resume import spared_when_full
from generator_service.backends.interface import Backend, Row, Sampling, WeightSet
from generator_service.faces.interface import FaceReader
from generator_service.rl import clip_rewards
from generator_service.rl.clip_pairs import Pair, Source
from generator_service.rl.clip_rewards import Candidates, ClipReward
from generator_service.rl.sampling_policy import Action
from protocol.messages import sample_id, seed_of
from protocol.policy import PolicyJob

Key = tuple[int, int]
"""A pair and an action, by index."""
Components = np.ndarray
"""Each reward of one clip, before weights: float64, in the job's order."""


class ClipJudge:
    def __init__(
        self,
        backend: Backend,
        base: WeightSet,
        source: Source,
        reader: FaceReader,
        rewards: Mapping[str, ClipReward],
        job: PolicyJob,
        pairs: Sequence[Pair],
        actions: Sequence[Action],
        place: Path,
        identity: str,
    ):
        """
        Args:
            rewards: the job's, by name, their options bound.
            pairs: what a question is about, by index.
            place: folder of the answers' file.
            identity: all that answers depend on: those of another judge are not read.
        """
        self._backend, self._base, self._source, self._reader = backend, base, source, reader
        self._rewards, self._job, self._pairs, self._actions = rewards, job, pairs, actions
        self._weights = np.array([job.rewards[name].weight for name in rewards])
        self._path = place / f"rewards-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.jsonl"
        known = json_lines.read(self._path) if job.cache else []
        self._kept: dict[Key, Components] = {(pair, action): np.array(told) for pair, action, told in known}
        self.made = len(self._kept)  # clips

    def worth(self, wanted: Iterable[Key], draw: int) -> Generator[None, None, dict[Key, Components]]:
        """Of each; pauses after each batch of clips.

        Args:
            draw: number of the update that asks: clips of a pair have one seed in each, or one in all where answers are
                kept.

        Raises GenerationFailed when a reward fails or a clip finds no room, and what the backend and the reader raise.
        """
        wanted = sorted(set(wanted), key=lambda key: (self._actions[key[1]].steps, key))
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        missing = [key for key in wanted if key not in found]
        for steps, group in groupby(missing, key=lambda key: self._actions[key[1]].steps):
            keys = list(group)
            for start in range(0, len(keys), self._job.generate_batch):
                part = keys[start : start + self._job.generate_batch]
                answers = dict(zip(part, self._judged(part, steps, 0 if self._job.cache else draw), strict=True))
                if self._job.cache:
                    self._keep(answers)
                found |= answers
                yield
        return found

    def _keep(self, answers: Mapping[Key, Components]) -> None:
        self._kept |= answers
        with spared_when_full(self._path):
            json_lines.append(self._path, [[*key, told.tolist()] for key, told in answers.items()])

    def total(self, components: Components) -> float:
        """Eq. 18, before any penalty."""
        return float(self._weights @ components)

    def _judged(self, keys: Sequence[Key], steps: int, draw: int) -> np.ndarray:
        """[n, rewards]."""
        sampling = Sampling(
            steps, self._job.scheduler, guided=True, frames=self._job.frames, resampling=self._job.resampling
        )
        rows = [self._row(key, draw) for key in keys]
        clips = out_of_memory.generate(self._backend, self._base, rows, sampling, lambda done, total: None)
        self.made += len(clips)
        n, frames = clips.shape[:2]
        reading = self._reader.read(clips.reshape(n * frames, *clips.shape[2:]), neutral=clips[:, 0])
        candidates = Candidates(
            clips,
            reading.presence.reshape(n, frames),
            reading.intensity.reshape(n, frames, -1),
            [self._actions[action] for _, action in keys],
            max(action.steps for action in self._actions),
        )
        components = clip_rewards.measure(self._rewards, candidates)
        return np.stack(list(components.values()), axis=1)

    def _row(self, key: Key, draw: int) -> Row:
        pair, action = self._pairs[key[0]], self._actions[key[1]]
        return Row(
            seed=seed_of(sample_id("policy", self._job.seed, pair.name, draw)),
            label=None,
            guidance_scale=action.guidance.maximum,
            prompt=pair.prompt,
            negative_prompt=self._source.negative_prompt,
            image=self._source.first_frame(pair),
            guidance=action.guidance,
            steps=action.steps,
        )
