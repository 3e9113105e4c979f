"""A small convolutional network for images of 8 to 64 pixels. Knows nothing of the task."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions, two poolings, global average, linear: 85 k parameters at 10 classes.

    Batch normalisation: with a few images a class, group normalisation did as well or better at 8 pixels (digits), but
    fell behind at 16 (digits) and far behind at 32 (photos).

    Args:
        classes: number of outputs; 0: no linear layer, what it would see comes out.
        image_size: shorter side in pixels; from 64 on the first convolution has a stride, to keep the view wide.
        drop_rate: dropout before the linear layer.
    """

    def __init__(self, classes: int, image_size: int = 32, drop_rate: float = 0.0):
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, 32, stride=max(1, image_size // 32)),
            _convolution(32, 32),
            nn.MaxPool2d(2),
            _convolution(32, 64),
            nn.MaxPool2d(2),
            _convolution(64, 96),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(96, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of x [B, 3, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, 96] of x [B, 3, H, W]. This and `forward_head` are named as timm names them."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returns, or with `pre_logits` what the linear layer sees."""
        x = self.dropout(x)
        return x if pre_logits else self.head(x)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
