"""The policy that chooses how a clip is sampled (ARGen 3.3, eq. 13): from the latents of its first frame and the
embedding of its text, how many steps to take and which curve guides them. And its files:

    policy.json          what it chooses from, and its sizes
    policy.safetensors   its tensors; absent for a policy that draws

Does not know how it is taught, nor how clips are made.

    B states, C channels of the latents, h w their height and width, T tokens of a text, D values of each
    W values of a token inside, A actions, K of them drawn for a state
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from protocol.errors import WeightsCorrupt
from protocol.policy import ActionSpace
from protocol.video import GuidanceCurve

SIZES_FILE, TENSORS_FILE = "policy.json", "policy.safetensors"
GRID = 8  # cells a side that the latents are averaged to, so that clips of every size are as many tokens


@dataclass(frozen=True)
class Action:
    """u = (T, a, b)."""

    steps: int
    guidance: GuidanceCurve


class Sizes(BaseModel):
    """What policy.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    actions: ActionSpace
    method: Literal["reinforce", "random"]
    channels: int = Field(ge=1)  # C
    text_width: int = Field(ge=1)  # D
    width: int = Field(default=64, ge=1)  # W
    attention_heads: int = Field(default=4, ge=1)
    blocks: int = Field(default=2, ge=1)
    seed: int = 0  # of a policy that draws


class Chooser(Protocol):
    """What the policy of a weight set is asked for."""

    sizes: Sizes

    def best(self, latents: Tensor, text: Tensor) -> list[Action]:
        """Of each state: latents float32 [B, C, h, w] and text float32 [B, T, D]."""
        ...


def actions(space: ActionSpace) -> list[Action]:
    """All of a space, the last factor of eq. 13 changing first."""
    return [Action(steps, _curve(space, a, b)) for steps, (a, b) in product(space.steps, _shapes(space))]


def _shapes(space: ActionSpace) -> list[tuple[float, float]]:
    if not space.factorised:
        return list(space.pairs)
    return list(product(*(list(dict.fromkeys(values)) for values in zip(*space.pairs, strict=True))))


def _curve(space: ActionSpace, a: float, b: float) -> GuidanceCurve:
    return GuidanceCurve(minimum=space.minimum, maximum=space.maximum, a=a, b=b, peak_normalised=space.peak_normalised)


def _head_sizes(space: ActionSpace) -> list[int]:
    """Of the heads for T and for the pair (a, b); or, factorised, for T, a and b."""
    if not space.factorised:
        return [len(space.steps), len(space.pairs)]
    return [len(space.steps), *(len(set(values)) for values in zip(*space.pairs, strict=True))]


class Block(nn.Module):
    """Self-attention among tokens [B, N, W], then an MLP of each; both on normalised input, added to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.project(self.before_attention(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, heads, N, W / heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.before_mlp(tokens))


class SamplingPolicy(nn.Module):
    """pi(u | c, r): self-attention fuses both, and one MLP a head reads what came of each, the mean over the image and
    the mean over the text, so that neither is lost among the other's tokens. It begins indifferent, all actions alike,
    whatever its seed."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes, self.actions = sizes, actions(sizes.actions)
        width = sizes.width
        self.of_latents = nn.Linear(sizes.channels, width)
        self.of_text = nn.Sequential(nn.LayerNorm(sizes.text_width), nn.Linear(sizes.text_width, width))
        self.place = nn.Parameter(torch.randn(GRID * GRID, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, sizes.attention_heads) for _ in range(sizes.blocks)))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, values))
            for values in _head_sizes(sizes.actions)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        """Log-probability of each action: the sum of its heads' (eq. 13), [B, A]."""
        fused = self.fused(latents, text)
        joint = fused.new_zeros(len(fused), 1)
        for head in self.heads:
            own = F.log_softmax(head(fused), dim=1)
            joint = (joint[:, :, None] + own[:, None, :]).flatten(1)
        return joint

    def fused(self, latents: Tensor, text: Tensor) -> Tensor:
        """What the heads read: [B, 2W]."""
        cells = F.adaptive_avg_pool2d(latents.to(self.place), GRID).flatten(2).transpose(1, 2)
        seen, read = self.of_latents(cells) + self.place, self.of_text(text.to(self.place))
        tokens = self.norm(self.blocks(torch.cat([seen, read], dim=1)))
        return torch.cat([tokens[:, : GRID * GRID].mean(1), tokens[:, GRID * GRID :].mean(1)], dim=1)

    def log_prob(self, latents: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        """Of actions int64 [B, K], as indices into `actions`: [B, K]."""
        return self(latents, text).gather(1, chosen)

    @torch.no_grad()
    def sample(self, latents: Tensor, text: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """So many actions of each state, any of them more than once: int64 [B, K]."""
        return torch.multinomial(self(latents, text).exp(), count, replacement=True, generator=generator)

    @torch.no_grad()
    def entropy(self, latents: Tensor, text: Tensor) -> Tensor:
        """Of each state's distribution, in nats, from 0 to log A: [B]."""
        joint = self(latents, text)
        return -(joint.exp() * joint).sum(1)

    @torch.no_grad()
    def likeliest(self, latents: Tensor, text: Tensor) -> Tensor:
        """The action of the largest probability, which is that of each head: int64 [B]."""
        return self(latents, text).argmax(1)

    def best(self, latents: Tensor, text: Tensor) -> list[Action]:
        """See `Chooser`: u* of Algorithm 1, line 14."""
        return [self.actions[index] for index in self.likeliest(latents, text).tolist()]


class RandomPolicy:
    """Draws among all actions alike, by a hash of the state: on one machine an equal state always gets the same. The
    arm "random policy" of Table 5."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.actions = sizes, actions(sizes.actions)

    def best(self, latents: Tensor, text: Tensor) -> list[Action]:
        """See `Chooser`."""
        return [self._drawn(*state) for state in zip(latents, text, strict=True)]

    def _drawn(self, latents: Tensor, text: Tensor) -> Action:
        content = hashlib.sha256(self.sizes.seed.to_bytes(8, "big"))
        for values in (latents, text):
            content.update(values.detach().cpu().float().contiguous().numpy().tobytes())
        return self.actions[int.from_bytes(content.digest()[:8], "big") % len(self.actions)]


def write_policy(folder: Path, policy: SamplingPolicy | RandomPolicy) -> None:
    """Equal policies are equal files."""
    (folder / SIZES_FILE).write_text(policy.sizes.model_dump_json(indent=2))
    if isinstance(policy, SamplingPolicy):
        save_file({name: value.contiguous() for name, value in policy.state_dict().items()}, folder / TENSORS_FILE)


def read_policy(folder: Path) -> Chooser:
    """The policy in a folder, on the CPU. Raises WeightsCorrupt when it cannot be read, or its files do not fit."""
    path = folder / SIZES_FILE
    try:
        sizes = Sizes.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise WeightsCorrupt(
            f"{path} says nothing of a policy ({error}): restore it or learn the policy again"
        ) from error
    if sizes.method == "random":
        return RandomPolicy(sizes)
    policy, path = SamplingPolicy(sizes), folder / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsCorrupt(f"{path} cannot be read ({error}): restore it or learn the policy again") from error
    wanted = policy.state_dict()
    wrong = [
        name
        for name in sorted(wanted.keys() | tensors.keys())
        if name not in wanted
        or name not in tensors
        or tensors[name].shape != wanted[name].shape
        or not tensors[name].isfinite().all()
    ]
    if wrong:
        raise WeightsCorrupt(
            f"{path}: {wrong[0]} is missing, not finite, or not of the shape that {SIZES_FILE} says: restore it or "
            "learn the policy again"
        )
    policy.load_state_dict(tensors)
    return policy.eval()


def stacked(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Single states as a batch: [B, C, h, w] and [B, T, D]."""
    latents, text = zip(*states, strict=True)
    return torch.stack(latents), torch.stack(text)
