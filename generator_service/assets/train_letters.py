"""Trains the embedded prior: a small pixel-space DiT that draws letters, never digits.

    OMP_NUM_THREADS=1 python -m generator_service.assets.train_letters --out generator_service/assets/letters_dit

made the committed checkpoint: 859,684 parameters, 7,000 steps of 128 images, final loss 0.1571 (mean squared error of
the predicted noise over the last tenth of the steps), 13 minutes on one core. The seed fixes the result on one machine.

The general domain is letters of three alphabets, rendered from the fonts that matplotlib ships, warped at random and
reduced to 8 x 8 the way scikit-learn's handwritten digits were: a 32 x 32 bitmap filled from top to bottom, counted in
blocks of 4 x 4. Letters that look like a digit (o, l, Cyrillic ze, be and che, ...) are left out, so that what the cold
start makes of the digits is learnt from the user's images. Needs matplotlib and scipy, which the service does not.
Knows nothing of the service that loads the result.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

LETTERS = (
    "ABCDEFGHJKLMNPQRTUVWXY"  # without I O S Z, which look like 1 0 5 2
    "abcdefghijkmnpqrtuvwxy"  # without l o s z
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρςφχψω"
    "ДИЛУЦЭЯвдикмнцъьэя"  # without be, ze and che, which look like 6 3 4, and the widest
)
FONTS = ("DejaVu", "STIXGeneral", "cmmi", "cmr", "cmss", "cmti", "cmtt")  # not cmex and cmsy, which hold symbols
SIDE = 64  # pixels of a glyph's distance map
HEIGHT = 44  # pixels that the glyph itself takes in it, from top to bottom
LABEL_DROP = 0.1  # part of the rows trained with the null class
NULL = len(LETTERS)


@cache
def glyph_bank() -> tuple[torch.Tensor, torch.Tensor]:
    """Signed distance maps [G, SIDE, SIDE] of every letter in every font that has it, and their labels [G].

    Pixels inside a stroke are positive. Maps are lowered by the half-width of the glyph's strokes (twice the mean depth
    of its ink), so that a threshold of -w gives strokes of half-width w whatever the font's weight; bold fonts
    would add nothing.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    maps, labels = [], []
    for path in sorted(folder.glob("*.ttf")):
        if not path.name.startswith(FONTS) or "Bol" in path.name:
            continue
        covered = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 128)
        # TeX fonts map some codes to other symbols: only their basic Latin letters can be trusted.
        drawable = [c for c in LETTERS if ord(c) in covered and (c.isascii() or not path.name.startswith("cm"))]
        for letter in drawable:
            maps.append(_distance_map(letter, font))
            labels.append(LETTERS.index(letter))
    return torch.from_numpy(np.stack(maps)), torch.tensor(labels)


def _distance_map(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text((64, 32), letter, fill=255, font=font)
    glyph = canvas.crop(canvas.getbbox())
    width = round(HEIGHT * min(glyph.width / glyph.height, 0.8))
    page = Image.new("L", (SIDE, SIDE))
    page.paste(glyph.resize((max(width, 6), HEIGHT)), ((SIDE - width) // 2, (SIDE - HEIGHT) // 2))
    ink = np.asarray(page) > 127
    distance = distance_transform_edt(ink) - distance_transform_edt(~ink)
    return (distance - 2 * distance[ink].mean()).astype(np.float32)


class Letters:
    """Draws batches of warped letters."""

    def __init__(self, rng: torch.Generator):
        self.rng = rng
        self.maps, self.labels = glyph_bank()
        counts = torch.bincount(self.labels, minlength=NULL)
        assert counts.min() > 0, "some letter is in none of the fonts"
        self.weights = 1.0 / counts[self.labels]  # every letter equally often
        line = (torch.arange(32) + 0.5) / 16 - 1
        self.grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # [32, 32, (x, y)]

    def _uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=self.rng)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [size, 1, 8, 8] in [-1, 1] and labels [size]."""
        chosen = torch.multinomial(self.weights, size, replacement=True, generator=self.rng)
        maps = self.maps[chosen, None]
        level = -self._uniform(size, 3.4, 6.2)[:, None, None, None]  # half-width of the strokes
        where = self._warp(size)
        rough = F.grid_sample(maps, where, padding_mode="border", align_corners=False) > level
        refit = self._refit(rough[:, 0])
        where = F.grid_sample(where.permute(0, 3, 1, 2), refit, padding_mode="border", align_corners=False)
        fine = F.grid_sample(maps, where.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
        ink = (fine - level + 0.5).clamp(0, 1)
        return F.avg_pool2d(ink, 4) * 2 - 1, self.labels[chosen]

    def _warp(self, size: int) -> torch.Tensor:
        """Where each pixel of a 32 x 32 page looks in the distance map, [size, 32, 32, 2]: affine and elastic."""
        angle, slant = self._uniform(size, -0.2, 0.2), self._uniform(size, -0.3, 0.3)
        width = self._uniform(size, 0.75, 1.3)
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack([torch.stack([cos / width, slant - sin], 1), torch.stack([sin / width, cos], 1)], 1)
        wobble = torch.randn(size, 2, 4, 4, generator=self.rng) * self._uniform(size, 0.0, 0.14)[:, None, None, None]
        wobble = F.interpolate(wobble, (32, 32), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return torch.einsum("hwj,bij->bhwi", self.grid, matrix) + wobble

    def _refit(self, ink: torch.Tensor) -> torch.Tensor:
        """Page coordinates [B, 32, 32, 2] that make the ink [B, 32, 32] fill the page, as the digits do."""
        line = self.grid[0, :, 0]
        size = len(ink)
        sides = []
        for axis in (1, 2):  # any over rows gives the columns, then the other way round
            used = ink.any(axis)
            low = torch.where(used, line, 2.0).amin(1)
            high = torch.where(used, line, -2.0).amax(1)
            empty = ~used.any(1)
            sides.append((low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)))
        (left, right), (top, bottom) = sides
        tall = (bottom - top) / 2 + 1 / 32
        tall = tall * self._uniform(size, 0.96, 1.1)
        wide = torch.maximum(tall, ((right - left) / 2 + 1 / 32) / self._uniform(size, 0.6, 0.85))
        scale = torch.stack([wide, tall], 1)[:, None, None]
        centre = torch.stack([(left + right) / 2, (top + bottom) / 2], 1)
        centre = centre + torch.stack([self._uniform(size, -0.08, 0.12), self._uniform(size, -0.04, 0.04)], 1)
        return centre[:, None, None] + self.grid * scale


def new_model() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=len(LETTERS),
        norm_num_groups=1,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=True,
        set_alpha_to_one=True,
        timestep_spacing="leading",  # the very first times hold no signal and are ill-conditioned for epsilon
    )


def train(steps: int, batch: int, peak_lr: float, seed: int) -> tuple[DiTTransformer2DModel, float]:
    """The averaged model, and the mean denoising loss over the last tenth of the steps."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    letters, scheduler = Letters(rng), new_scheduler()
    # In train mode each block of diffusers' DiT drops labels on its own; so stay in eval mode and drop once a row.
    model, average = new_model().eval(), new_model().eval()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, (step + 1) / 200) * _cosine(step / steps)
        images, labels = letters.batch(batch)
        labels = labels.masked_fill(torch.rand(batch, generator=rng) < LABEL_DROP, NULL)
        noise = torch.randn(images.shape, generator=rng)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), generator=rng)
        predicted = model(scheduler.add_noise(images, noise, times), times, labels).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {np.mean(losses[-100:]):.4f}", flush=True)
    return average, float(np.mean(losses[-max(1, steps // 10) :]))


def _cosine(progress: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write a diffusers folder for `DiTPipeline`; there is no VAE, the model works on pixels."""
    model.save_pretrained(folder / "transformer")
    new_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(label): letter for label, letter in enumerate(LETTERS)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the letters prior.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in diffusers' layout")
    parser.add_argument("--steps", type=int, default=7000, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, loss = train(arguments.steps, arguments.batch, arguments.lr, arguments.seed)
    save(model, arguments.out)
    print(f"final loss {loss:.4f}, {sum(p.numel() for p in model.parameters())} parameters, in {arguments.out}")


if __name__ == "__main__":
    main()
