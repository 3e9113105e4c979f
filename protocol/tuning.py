"""What is said to tune a generator by reward: body of a `tune` job, and what its events tell.

Each field says what None means. Does not know how a reward is computed, nor how the generator learns from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol import prompts
from protocol.fields import Guidance, Message, Name, Seed, Unit

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
ASIDE = {"name", "again", "activate"}  # fields of a job that do not change the weights that it makes


class RewardTerm(Message):
    """One component of the reward."""

    weight: Annotated[float, Field(allow_inf_nan=False)]  # lambda in eq. 11; 0: only measured
    options: dict[str, float] = {}  # of the component, by name; what it does not know is refused


class RolloutOptions(Message):
    """How samples are drawn to learn from."""

    identities: int = Field(default=8, ge=1, le=4096)  # classes, drawn anew for each rollout; all where there are fewer
    samples: int = Field(default=8, ge=1, le=4096)  # of each of them
    denoising_steps: int = Field(default=50, ge=2, le=1000)
    variance: Literal["ddim", "learned"] = "ddim"  # of a reverse step: DDIM's with eta, or what the model itself says
    eta: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of DDIM: 1 is as random as DDPM; 0 would be deterministic
    guidance_scale: Guidance = 1.0  # 0 to 1: off
    batch_size: int = Field(default=64, ge=1, le=4096)  # rows denoised together
    prompt: str = prompts.PROMPT  # of models that read text


class UpdateOptions(Message):
    """How the generator learns from a rollout."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = 1e-5
    clip: Positive = 1e-4  # of the importance ratio, to both sides of 1
    kl: NotNegative = 0.01  # weight of the distance to the frozen generator
    epochs: int = Field(default=1, ge=1, le=100)  # passes over a rollout's transitions
    optimizer_steps: int = Field(default=1, ge=1, le=1000)  # in a pass; between them gradients are accumulated
    batch_size: int = Field(default=64, ge=1, le=4096)  # transitions in one forward and backward pass
    baseline: Literal["none", "group", "value"] = "group"  # what the reward is compared with: nothing, the running mean
    # of its identity, or a small net that predicts it from latents and time
    max_gradient_norm: NotNegative = 1.0  # 0: no clipping. Later steps of a rollout are held to the norm of its first
    # as well, which is mostly far below 1: the loss is a mean over the values of a latent
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of the passes; what is trained stays float32


class PolicyOptions(Message):
    """What of the generator is trained."""

    parameters: Literal["lora", "full"] = "lora"
    rank: int = Field(default=4, ge=1, le=512)  # of a LoRA that begins here; one that is the base keeps its own
    keep: Literal["store", "recompute"] = "store"  # of a rollout's latents: all of them, or none but the first noise
    offload: bool = False  # what is stored lies in the CPU's memory


class GuardOptions(Message):
    """When tuning has gone wrong, and what is done about it."""

    kl_ceiling: NotNegative = 0.1  # mean squared distance to the frozen generator's predictions; 0: no ceiling
    diversity_floor: Unit = 0.2  # of the mean pairwise feature distance in an identity, as part of the first rollout's
    copy_distance: Unit = 0.0  # mean distance to the nearest real feature below which samples count as copied; 0: off
    trend: int = Field(default=20, ge=4, le=1000)  # rollouts over which components are watched: one that falls while
    # the total rises is told
    on_breach: Literal["stop", "rollback"] = "stop"  # end with the last good weights, or go back to them with half the
    # learning rate and go on
    rollbacks: int = Field(default=3, ge=1, le=100)  # before it stops all the same


class TuneJob(Message):
    """Tune a generator by reward (DPOK, RL-identity 4.2); the result is a named weight set."""

    type: Literal["tune"] = "tune"
    method: Literal["dpok"] = "dpok"
    name: Name  # of the resulting weight sets; an existing name gets its next version
    again: bool = False  # false: when this very job was done before, on the same images, its weights are the result
    base: str | None = None  # weights to start from, most often cold-started ones; None: the active ones
    steps: int = Field(default=100, ge=1, le=1_000_000)  # rollouts, each followed by its updates
    seed: Seed = 0
    rollout: RolloutOptions = RolloutOptions()
    update: UpdateOptions = UpdateOptions()
    policy: PolicyOptions = PolicyOptions()
    guard: GuardOptions = GuardOptions()
    rewards: dict[str, RewardTerm] = {  # by name; a table that names some names them all
        "semantic": RewardTerm(weight=1.0),
        "coverage": RewardTerm(weight=0.75),
        "expression": RewardTerm(weight=0.25),
    }
    features: str = "timm:resnet50"  # "timm:NAME[.WEIGHTS]", or "published:NAME": what a trainer published of its model
    pretrained: bool = True  # timm only; false: random weights, for tests
    features_size: int | None = Field(default=None, ge=8, le=2048)  # pixels a side; None: the model's own
    refresh_every: int = Field(default=1, ge=1)  # rollouts between looks for a newer published model
    publish_every: int = Field(default=0, ge=0)  # rollouts between weight sets; 0: one, at the end
    activate: bool = False  # hot-swap to each weight set that is published
    checkpoint_every: int = Field(default=10, ge=0)  # rollouts between checkpoints to resume from; 0: none
    grid_every: int = Field(default=10, ge=0)  # rollouts between pictures in the job's events; 0: none

    @model_validator(mode="after")
    def _rewards_something(self) -> TuneJob:
        if not any(term.weight for term in self.rewards.values()):
            raise ValueError(
                "every reward has weight 0, so that nothing would be learnt: give one of them another weight. A table "
                "`rewards` stands in the place of the default one, so name in it all that count"
            )
        return self
