"""A diffusers DiT checkpoint, frozen: pixels to latents, latents to noise predictions, latents to pixels.

Parameters are arguments where they are trained: weight sets that differ only in their class embedding tables share one
backbone in memory, and an adaptation can train tables, or all of it, while the same backbone serves requests. LoRAs are
adapters of the one transformer. Knows nothing of sampling loops, guidance or weight set names.

    B batch, C channels, H W height and width in pixels, h w in latents
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.func import functional_call

from generator_service.backends import adapters, autoencoder
from generator_service.backends.components import load_component, read_json
from generator_service.backends.tuned_model import read_model
from protocol.errors import ConfigError, WeightsCorrupt

Tables = Mapping[str, torch.Tensor]
"""State dict name -> [classes + 1, width]: each block's class embedding. The last row is the null class."""

TABLE_SUFFIX = "class_embedder.embedding_table.weight"
CLASS_EMBEDDING = "class_embedding.safetensors"


class DiTCheckpoint:
    """One checkpoint on one device. Parameters take no gradients; dropout and label dropping are off."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        """Raises ConfigError when the folder does not hold a DiT; WeightsCorrupt when its tensors do not fit it."""
        self.folder, self.device, self.dtype = folder, device, dtype
        index = read_json(folder / "model_index.json")
        self.scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
        self.forward_process = DDPMScheduler.from_config(self.scheduler_config)  # adds noise as in training
        self.transformer = load_component(DiTTransformer2DModel, folder / "transformer", device, dtype)
        self.vae = load_component(AutoencoderKL, folder / "vae", device, dtype) if (folder / "vae").is_dir() else None
        config = self.transformer.config
        self.classes = _classes(index.get("id2label"), config.num_embeds_ada_norm, folder)
        self.tables = _tables(self.transformer)
        self._used: tuple[str | None, float] = (None, 1.0)  # adapter, and how much of it
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        scale = autoencoder.scale_factor(self.vae) if self.vae else 1
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

    def with_transformer(self, folder: Path, classes: tuple[str, ...], digest: str) -> DiTCheckpoint:
        """This checkpoint with another transformer, which has class tables of its own; all else is shared.

        Args:
            folder: as `tuned_model.write_model` left it. digest: of this checkpoint.

        Raises WeightsCorrupt unless it fits exactly.
        """
        other = copy.copy(self)
        changed = {"num_embeds_ada_norm": len(classes)}
        other.transformer = read_model(self.transformer, folder, self.device, self.dtype, digest, **changed)
        other.classes, other.tables, other._used = classes, _tables(other.transformer), (None, 1.0)
        return other

    # ------------------------------------------------------------ the model

    @property
    def learned_variance(self) -> bool:
        """The second half of the transformer's output tells the variance of a reverse step."""
        return self.transformer.out_channels == 2 * self.latent_shape[0]

    def predict(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        labels: torch.Tensor,
        tables: Tables,
        *,
        variance: bool = False,
    ) -> torch.Tensor:
        """What the transformer predicts (noise, for prediction type "epsilon"), float32 [B, C, h, w].

        Args:
            noisy: float [B, C, h, w]. times: int64 [B]. labels: int64 [B], rows of the tables.
            tables: may require gradients; beside them, any other parameters of the transformer to put in its own's
                place.
            variance: the output is [B, 2C, h, w] where the model has learnt the variance, whose half is dropped
                otherwise.
        """
        cast = {name: table.to(self.dtype) for name, table in tables.items()}
        output = functional_call(self.transformer, cast, (noisy.to(self.dtype), times, labels)).sample
        return output.float() if variance else output[:, : noisy.shape[1]].float()

    def use(self, adapter: str | None, scale: float = 1.0) -> None:
        """From now on this LoRA of the transformer counts, `scale` times, and no other; None: none does.

        Its parameters require gradients while it is used, those of the others do not.
        """
        adapters.use(self.transformer, adapter, scale)
        self._used = (adapter, scale)

    @contextmanager
    def using(self, adapter: str | None, scale: float = 1.0) -> Iterator[None]:
        """`use` while the block runs; then what was used before."""
        before = self._used
        self.use(adapter, scale)
        try:
            yield
        finally:
            self.use(*before)

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
        fitted = autoencoder.fit(image, self.size)
        if self.latent_shape[0] == 1:
            fitted = np.asarray(Image.fromarray(fitted).convert("L").convert("RGB"))
        return fitted

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
        return autoencoder.pixels(images, self.device)

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Images uint8 [B, H, W, 3] at the checkpoint's size -> latents float32 [B, C, h, w].

        With a VAE: the mode of its posterior, times its scaling factor; so there is no randomness here.
        """
        if self.vae is None:
            return self.pixels(images)[:, : self.latent_shape[0]]
        return autoencoder.encode(self.vae, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> RGB float32 [B, 3, H, W], clipped to [-1, 1]."""
        if self.vae is None:
            return latents.clamp(-1, 1).expand(-1, 3, -1, -1)
        return autoencoder.decode(self.vae, latents)

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


def _tables(transformer: DiTTransformer2DModel) -> Tables:
    """Those that are built in."""
    parameters = transformer.named_parameters()
    return {name: value.detach() for name, value in parameters if name.endswith(TABLE_SUFFIX)}


def _classes(id2label: dict[str, str] | None, count: int, folder: Path) -> tuple[str, ...]:
    """Label index -> class name; plain numbers when the checkpoint names none."""
    if id2label is None:
        return tuple(str(label) for label in range(count))
    by_label = {int(label): name for label, name in id2label.items()}
    if sorted(by_label) != list(range(count)):
        raise ConfigError(f"{folder}/model_index.json: id2label must name the labels 0 to {count - 1}, each once")
    return tuple(by_label[label] for label in range(count))
