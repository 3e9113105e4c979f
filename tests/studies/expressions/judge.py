"""Who judges clips: a small network for clips that has learnt emotions from people of its own.

It says how recognisable generated clips are, and as a TorchScript file its features serve Frechet distances. It shares
neither people, nor architecture, nor training with what is judged.

    B clips, M frames, S pixels a side
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocol.clips import spread
from tests.expressions.world import EMOTIONS, Clip, clips
from tests.studies.small_checkpoint import timed, train

FRAMES, SIDE = 8, 32
SEED, CLIPS, STEPS, WIDTH = 1202, 220, 900, 64


class Judge(nn.Module):
    """Clips float32 [B, 3, M, S, S] in [-1, 1] to features [B, WIDTH]; `classify` tells emotions."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.GELU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.GELU()),
            *(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GroupNorm(4, 48), nn.GELU()),
            *(nn.Flatten(), nn.Linear(48 * (SIDE // 8) ** 2, WIDTH)),
        )
        self.follow = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.tell = nn.Linear(WIDTH, len(EMOTIONS))

    def forward(self, clips: Tensor) -> Tensor:
        batch, frames = clips.size(0), clips.size(2)
        seen = self.look(clips.transpose(1, 2).flatten(0, 1)).view(batch, frames, -1)
        return self.follow(seen - seen[:, :1])[0][:, -1]

    def classify(self, clips: Tensor) -> Tensor:
        return self.tell(self(clips))


def build(file: Path) -> Judge:
    """Trained, or read from `file`; beside it lies the same network as TorchScript, `file` with the suffix .ts."""
    judge = Judge()
    if file.exists():
        judge.load_state_dict(torch.load(file, weights_only=True))
        return judge.eval()
    torch.manual_seed(0)
    judge = Judge()
    drawn = list(clips(seed=SEED, size=SIDE, counts=dict.fromkeys(EMOTIONS, CLIPS), split="judge"))
    frames = np.stack([clip.frames[spread(len(clip.frames), FRAMES)] for clip in drawn])
    labels, rng = torch.tensor([EMOTIONS.index(clip.emotion) for clip in drawn]), np.random.default_rng(0)

    def loss() -> Tensor:
        rows = rng.integers(len(frames), size=24)
        x = signed(frames[rows])
        x = x * torch.empty(len(x), 1, 1, 1, 1).uniform_(0.8, 1.2) + 0.03 * torch.randn_like(x)
        return F.cross_entropy(judge.classify(x), labels[rows], label_smoothing=0.05)

    with timed("judge"):
        train(list(judge.parameters()), loss, STEPS, 2e-3, "judge", bfloat16=False)
    torch.save(judge.state_dict(), file)
    torch.jit.script(judge.eval()).save(str(file.with_suffix(".ts")))
    return judge


def signed(frames: np.ndarray) -> Tensor:
    """uint8 [B, M, H, W, 3] -> float32 [B, 3, M, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@torch.no_grad()
def told(judge: Judge, frames: np.ndarray) -> np.ndarray:
    """What it takes each clip uint8 [B, M, S, S, 3] for: int64 [B], into EMOTIONS."""
    return np.concatenate(
        [judge.classify(signed(part)).argmax(1).numpy() for part in np.array_split(frames, 1 + len(frames) // 64)]
    )


def accuracy(judge: Judge, drawn: list[Clip]) -> float:
    """On drawn clips."""
    frames = np.stack([clip.frames[spread(len(clip.frames), FRAMES)] for clip in drawn])
    return float((told(judge, frames) == [EMOTIONS.index(clip.emotion) for clip in drawn]).mean())
