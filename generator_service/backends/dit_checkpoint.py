"""A diffusers DiT checkpoint, frozen: pixels to latents, latents to noise predictions, latents to pixels.

The class embedding tables are arguments, not state: weight sets that differ only in them share one backbone in memory,
and an adaptation can train its own tables while the same backbone serves requests. Knows nothing of sampling loops,
guidance or weight set names.

    B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    ModelMixin,
)
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.func import functional_call

from protocol.errors import ConfigError, WeightsCorrupt

Tables = Mapping[str, torch.Tensor]
"""State dict name -> [classes + 1, width]: each block's class embedding. The last row is the null class."""

TABLE_SUFFIX = "class_embedder.embedding_table.weight"
CLASS_EMBEDDING = "class_embedding.safetensors"
VAE_BATCH = 16  # images encoded at once, so that memory does not grow with the dataset
DERIVED = {"pos_embed.pos_embed"}  # computed from the configuration; older checkpoints store it all the same


class DiTCheckpoint:
    """One checkpoint on one device. Parameters take no gradients; dropout and label dropping are off."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ConfigError when the folder does not hold a DiT; WeightsCorrupt when its tensors do not fit it."""
        self.folder, self.device, self.dtype = folder, device, dtype
        index = _read_json(folder / "model_index.json")
        self.scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
        self.forward_process = DDPMScheduler.from_config(self.scheduler_config)  # adds noise as in training
        self.transformer = _load(DiTTransformer2DModel, folder / "transformer", device, dtype)
        self.vae = _load(AutoencoderKL, folder / "vae", device, dtype) if (folder / "vae").is_dir() else None
        config = self.transformer.config
        self.classes = _classes(index.get("id2label"), config.num_embeds_ada_norm, folder)
        self.tables: Tables = {
            name: value.detach() for name, value in self.transformer.named_parameters() if name.endswith(TABLE_SUFFIX)
        }
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae else 1
        self.size = (config.sample_size * scale, config.sample_size * scale)  # (H, W) of its images
        self._check_channels()

    def _check_channels(self) -> None:
        config = self.transformer.config
        expected = (self.vae.config.latent_channels,) if self.vae else (1, 3)
        if config.in_channels not in expected:
            cause = "its VAE does not fit" if self.vae else "the folder `vae` is missing"
            raise ConfigError(f"{self.folder}: the transformer has {config.in_channels} channels but {cause}")
        if self.transformer.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ConfigError(f"{self.folder}: {self.transformer.out_channels} output channels are not a DiT's")

    # ------------------------------------------------------------ the model

    def predict(self, noisy: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, tables: Tables) -> torch.Tensor:
        """What the transformer predicts (noise, for prediction type "epsilon"), float32 [B, C, h, w].

        Args:
            noisy: float [B, C, h, w]. times: int64 [B]. labels: int64 [B], rows of the tables.
            tables: may require gradients. The variance half of a learned-sigma model's output is dropped.
        """
        cast = {name: table.to(self.dtype) for name, table in tables.items()}
        output = functional_call(self.transformer, cast, (noisy.to(self.dtype), times, labels)).sample
        return output[:, : noisy.shape[1]].float()

    def scheduler(self, name: str) -> DDIMScheduler | DPMSolverMultistepScheduler:
        """A fresh sampler, "ddim" or "dpm-solver", on the checkpoint's noise schedule.

        Pixel models, and only they, have their estimate of the clean image clipped to [-1, 1] at each step. The cosine
        schedule's signal-to-noise ratio is bounded below for DPM-Solver, as its authors advise.
        """
        pixels = self.vae is None
        if name == "ddim":
            return DDIMScheduler.from_config(self.scheduler_config | {"clip_sample": pixels})
        assert name == "dpm-solver", name
        spaced = {"timestep_spacing": "linspace", "thresholding": pixels, "sample_max_value": 1.0}
        config = self.scheduler_config | spaced
        if config.get("beta_schedule") == "squaredcos_cap_v2":
            config["lambda_min_clipped"] = -5.1
        return DPMSolverMultistepScheduler.from_config(config)

    # ------------------------------------------------------------ pixels

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [any, any, 3] at the checkpoint's size and in its channels, still uint8 [H, W, 3]."""
        fitted = Image.fromarray(image).resize(self.size[::-1], Image.Resampling.BICUBIC)
        if self.latent_shape[0] == 1:
            fitted = fitted.convert("L").convert("RGB")
        return np.asarray(fitted)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
        return torch.tensor(images, device=self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [B, H, W, 3] at the checkpoint's size -> latents float32 [B, C, h, w].

        With a VAE: the mode of its posterior, times its scaling factor; so there is no randomness here.
        """
        pixels = self.pixels(images)
        if self.vae is None:
            return pixels[:, : self.latent_shape[0]]
        latents = [self.vae.encode(part.to(self.dtype)).latent_dist.mode() for part in pixels.split(VAE_BATCH)]
        return torch.cat(latents).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> RGB float32 [B, 3, H, W], clipped to [-1, 1]."""
        if self.vae is not None:
            latents = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.dtype)).sample.float()
        return latents.clamp(-1, 1).expand(-1, 3, -1, -1)

    # ------------------------------------------------------------ class embeddings

    def read_tables(self, folder: Path, classes: int, digest: str) -> Tables:
        """The tables that `write_tables` left in a folder. Raises WeightsCorrupt unless they fit exactly.

        Args:
            classes: how many there are, the null class not counted. digest: of this checkpoint.
        """
        path = folder / CLASS_EMBEDDING
        try:
            with safe_open(path, "pt") as file:
                made_for = (file.metadata() or {}).get("checkpoint")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise WeightsCorrupt(f"{path} cannot be read ({error}): restore it or adapt again") from error
        if made_for != digest or found.keys() != self.tables.keys():
            raise WeightsCorrupt(f"{path} was not learnt on {self.folder}: set its own base checkpoint, or adapt again")
        for name, table in found.items():
            expected = (classes + 1, self.tables[name].shape[1])
            if table.shape != expected or not table.isfinite().all():
                raise WeightsCorrupt(f"{path}: {name} is not a finite table of shape {expected}; adapt again")
        return {name: table.to(self.device, self.dtype) for name, table in found.items()}


def write_tables(tables: Tables, folder: Path, digest: str) -> None:
    """Write class embeddings, and the digest of the checkpoint they were learnt on."""
    tensors = {name: table.detach().cpu().contiguous() for name, table in tables.items()}
    save_file(tensors, folder / CLASS_EMBEDDING, metadata={"checkpoint": digest})


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): the folder must be a diffusers DiT checkpoint") from error


def _load(kind: type[ModelMixin], folder: Path, device: torch.device, dtype: torch.dtype) -> ModelMixin:
    _read_json(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} holds no safetensors, and pickles are never read: convert the checkpoint first")
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsCorrupt(f"{folder} cannot be loaded ({error}): fetch or make the checkpoint again") from error
    wrong = set(report["missing_keys"]) | set(report["unexpected_keys"]) - DERIVED
    if wrong or report["mismatched_keys"] or report["error_msgs"]:
        raise WeightsCorrupt(f"{folder}: tensors do not fit its config.json, among them {sorted(wrong)[:3]}")
    return model.eval().requires_grad_(False).to(device)


def _classes(id2label: dict[str, str] | None, count: int, folder: Path) -> tuple[str, ...]:
    """Label index -> class name; plain numbers when the checkpoint names none."""
    if id2label is None:
        return tuple(str(label) for label in range(count))
    by_label = {int(label): name for label, name in id2label.items()}
    if sorted(by_label) != list(range(count)):
        raise ConfigError(f"{folder}/model_index.json: id2label must name the labels 0 to {count - 1}, each once")
    return tuple(by_label[label] for label in range(count))
