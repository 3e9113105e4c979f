"""Networks for clips: a network for images sees each frame, and an LSTM or a transformer what it made of them in order
(ARGen 4.2: two layers, hidden dimension 256). Knows nothing of tasks.

Shapes: B clips, M frames, H, W pixels, F features of a frame, D hidden dimension, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WIDER = 4  # the transformer's feed-forward layers are so many times D


class Lstm(nn.Module):
    """Layers of LSTM (Hochreiter & Schmidhuber 1997), step by step: what torch's fused one computes.

    The fused one has no gradient in eval mode on a GPU, which VoG takes, and cannot be mapped over rows.

    Args:
        inputs: F. hidden: D. dropout: between layers.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float = 0.0):
        super().__init__()
        widths = [inputs] + [hidden] * (layers - 1)
        self.of_input = nn.ModuleList(nn.Linear(width, 4 * hidden) for width in widths)
        self.of_state = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in widths)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """States [B, M, D] of the last layer, of x [B, M, F]."""
        for layer, (of_input, of_state) in enumerate(zip(self.of_input, self.of_state, strict=True)):
            x = _unrolled(of_input(self.dropout(x) if layer else x), of_state)
        return x


def _unrolled(inputs: Tensor, of_state: nn.Linear) -> Tensor:
    """States [B, M, D] of one layer. Inputs: [B, M, 4 D], of input, forget, cell and output gate."""
    state = cell = inputs.new_zeros(len(inputs), of_state.in_features)
    states = []
    for step in inputs.unbind(1):
        enter, forget, new, leave = (step + of_state(state)).chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = leave.sigmoid() * cell.tanh()
        states.append(state)
    return torch.stack(states, dim=1)


class LstmHead(nn.Module):
    """[B, D] of a sequence [B, M, F]: the last state of an LSTM."""

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.lstm = Lstm(inputs, hidden, layers, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[:, -1]


class TransformerHead(nn.Module):
    """[B, D] of a sequence [B, M, F]: the mean over its frames of what a transformer encoder makes of them.

    Args:
        frames: M, each of which has a position that is learnt.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, dropout: float, heads: int, frames: int):
        super().__init__()
        self.project = nn.Linear(inputs, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(frames, hidden))
        layer = nn.TransformerEncoderLayer(hidden, heads, WIDER * hidden, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.project(x) + self.positions).mean(1)


class ClipNetwork(nn.Module):
    """A classifier of clips. `forward_features` and `forward_head` are named as timm names them.

    Args:
        of_frames: images [N, 3, H, W] to features [N, F].
        of_sequence: [B, M, F] to [B, D].
        classes: C.
        drop_rate: dropout before the last layer.
    """

    def __init__(self, of_frames: nn.Module, of_sequence: nn.Module, hidden: int, classes: int, drop_rate: float):
        super().__init__()
        self.of_frames, self.of_sequence = of_frames, of_sequence
        self.dropout, self.head = nn.Dropout(drop_rate), nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of x [B, M, 3, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, D] of x [B, M, 3, H, W]."""
        return self.of_sequence(self.of_frames(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returns, or with `pre_logits` what the last layer sees."""
        x = self.dropout(x)
        return x if pre_logits else self.head(x)
