"""The general prior: a small pixel DiT that has seen every alphabet but the target's.

Knows nothing of the target, of adaptation or of rewards.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel

from tests.studies.omniglot.characters import SIDE, Characters, signed, warped

LABEL_DROP = 0.1  # part of the rows trained with the null class


def build(folder: Path, characters: Characters, steps: int, seed: int = 0) -> Path:
    """A diffusers folder; at once when it is there."""
    if not (folder / "model_index.json").exists():
        _save(_train(characters, steps, seed), characters, folder)
    return folder


def _model(classes: int) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        num_layers=5,
        sample_size=SIDE,
        patch_size=4,
        num_embeds_ada_norm=classes,
        norm_num_groups=1,
    )


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=True, set_alpha_to_one=True, timestep_spacing="leading"
    )


def _train(characters: Characters, steps: int, seed: int) -> DiTTransformer2DModel:
    """The averaged model; never in train mode, where diffusers' DiT drops the labels of each block on its own."""
    torch.manual_seed(seed)
    rng, scheduler, classes = torch.Generator().manual_seed(seed), _scheduler(), len(characters.names)
    images, labels = signed(characters.images), torch.from_numpy(characters.labels)
    model, average = _model(classes).eval(), _model(classes).eval()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    losses, started = [], time.monotonic()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = 1.5e-3 * rate
        rows = torch.randint(len(images), (64,), generator=rng)
        clean = warped(images[rows], rng)
        given = labels[rows].masked_fill(torch.rand(64, generator=rng) < LABEL_DROP, classes)
        noise, times = torch.randn(clean.shape, generator=rng), torch.randint(0, 1000, (64,), generator=rng)
        loss = F.mse_loss(model(scheduler.add_noise(clean, noise, times), times, given).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.999, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            print(
                f"prior {step + 1}/{steps} loss {sum(losses[-250:]) / 250:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return average


def _save(model: DiTTransformer2DModel, characters: Characters, folder: Path) -> None:
    model.save_pretrained(folder / "transformer")
    _scheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiTPipeline", "id2label": {str(at): name for at, name in enumerate(characters.names)}}
    (folder / "model_index.json").write_text(json.dumps(index))
