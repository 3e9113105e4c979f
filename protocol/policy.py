"""What is said to learn a sampling policy by reward (ARGen 3.3): body of a `policy` job, and what its events tell.

Each field says what None means. Does not know how a reward is computed, nor how the policy learns from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.fields import Frames, Guidance, Message, Name, Resampling, Scheduler, Seed, Steps
from protocol.tuning import RewardTerm
from protocol.video import Shape

Part = Annotated[float, Field(gt=0.0, lt=1.0)]
Pair = Annotated[tuple[Shape, Shape], Field(strict=False)]  # a list in JSON and TOML, which have no tuples
QUALITY = 3.0  # lambda of eq. 18


class ActionSpace(Message):
    """What a policy chooses from; the paper's values."""

    steps: list[Steps] = Field(default=[5, 10, 15, 20], min_length=1)  # T
    pairs: list[Pair] = Field(default=[(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)], min_length=1)  # (a, b)
    factorised: bool = False  # false: one head over the pairs; true: a head for a and one for b, as printed in eqs. 13
    # and 21, which may draw combinations that are not among the pairs
    minimum: Guidance = 7.0  # g_min
    maximum: Guidance = 11.0  # g_max
    peak_normalised: bool = False  # see `GuidanceCurve`

    @model_validator(mode="after")
    def _distinct(self) -> ActionSpace:
        if len(set(self.steps)) < len(self.steps) or len(set(self.pairs)) < len(self.pairs):
            raise ValueError("the policy would choose between equals: name each value of steps and pairs once")
        if self.minimum > self.maximum:
            raise ValueError(f"minimum = {self.minimum:g} is above maximum = {self.maximum:g}: exchange them")
        return self


class PolicyJob(Message):
    """Learn which steps and guidance suit a first frame and a text (ARGen Algorithm 1); the result is a weight set that
    adds the policy to its base."""

    type: Literal["policy"] = "policy"
    name: Name  # of the resulting weight set; an existing name gets its next version
    again: bool = False  # false: when this very job was done before, on the same clips, its weights are the result
    base: str | None = None  # weights whose clips are judged; None: the active ones; of a policy, what it is for
    method: Literal["reinforce", "random"] = "reinforce"  # random: nothing is learnt, the policy draws for each first
    # frame and text among all actions alike
    # whose expressions the clips are to show; None: every class that is not neutral
    classes: list[str] | None = Field(default=None, min_length=1)
    pairs: int | None = Field(default=None, ge=2)  # of first frame and text, drawn from all that there are, those held
    # out included; None: all of them
    steps: int = Field(default=2000, ge=1, le=1_000_000)  # updates
    batch_size: int = Field(default=32, ge=1, le=4096)  # pairs of first frame and text in an update
    candidates: int = Field(default=4, ge=1, le=1024)  # clips of each pair: actions that are drawn from the policy
    top: int = Field(default=2, ge=1)  # of them, those that get their reward; the others get the penalty
    penalty: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0  # gamma: the others get minus this
    # what rewards are compared with before they teach. none: nothing, as printed; as rewards are above 0, whatever is
    # drawn is learnt then, and the policy may settle early on one action for all, which an event tells. state: the mean
    # of the pair's candidates
    baseline: Literal["none", "state"] = "none"
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1e-4  # of Adam
    seed: Seed = 0
    actions: ActionSpace = ActionSpace()
    rewards: dict[str, RewardTerm] = {  # by name; a table that names some names them all (eq. 18)
        "steps": RewardTerm(weight=1.0),
        "quality": RewardTerm(weight=QUALITY),
        "face": RewardTerm(weight=QUALITY),
        "amplitude": RewardTerm(weight=QUALITY),
    }
    validation: Part = 0.2  # part of the people who are not learnt from, whose pairs the policy is measured on
    frames: Frames = 16  # of a clip that is judged
    resampling: Resampling = 0  # repeats of each of their steps by re-noising
    scheduler: Scheduler = "ddim"  # that they are made with
    cache: bool = True  # rewards of a pair's actions are kept, so that as many clips are made as there are pairs times
    # actions at most: all clips of a pair have one seed; false: a new one in each update
    generate_batch: int = Field(default=8, ge=1, le=4096)  # clips made together; other requests wait for so many, and
    # so does a cancel
    validate_every: int = Field(default=100, ge=1)  # updates between measurements of the validation pairs
    validation_pairs: int = Field(default=16, ge=1)  # at most so many are measured: with every action, once
    checkpoint_every: int = Field(default=10, ge=0)  # updates between checkpoints to resume from; 0: none. Rewards that
    # `cache` keeps are on the disk at once
    activate: bool = False  # hot-swap to the result when it is ready

    @model_validator(mode="after")
    def _learns_something(self) -> PolicyJob:
        if not any(term.weight for term in self.rewards.values()):
            raise ValueError("every reward has weight 0, so that nothing would be learnt: give one of them a weight")
        if self.top > self.candidates:
            raise ValueError(f"top = {self.top} of {self.candidates} candidates: set it to fewer")
        if self.top == self.candidates and self.candidates > 1:
            raise ValueError("every candidate would get its reward: set top below candidates, so that some are worse")
        return self
