"""timm models without their classifier: by name with timm's weights or random ones, or with those that were published.

Whatever is built, torch's global random state stays as it was. Knows nothing of images, of rewards, nor of where
published models are kept.

    B rows, D features, H W the model's input
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor, nn

from protocol.errors import InvalidRequest
from protocol.published import PublishedCard

SEED = 0  # of random weights
# of timm.create_model, that a published model may set: none that reads a file, or fetches one
OPTIONS = ("img_size", "global_pool", "output_stride", "patch_size", "class_token", "reg_tokens")
LARGEST = 4096  # number in them


def recorded(name: str) -> timm.models.PretrainedCfg:
    """What timm records of "NAME" or "NAME.WEIGHTS": normalisation and input size.

    Raises:
        InvalidRequest: it has no such model, or no such weights of it.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=5)
        hint = f"close matches: {', '.join(close)}" if close else "see timm.list_models()"
        raise InvalidRequest(f"unknown timm model {name[:100]!r}; {hint}", param="features")
    weights = [entry for entry in timm.list_pretrained(f"{architecture}.*") if entry.split(".")[0] == architecture]
    if "." in name and name not in weights:
        raise InvalidRequest(
            f"unknown weights {name[:100]!r}; timm has: {', '.join(weights) or 'none'}", param="features"
        )
    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    """What the classifier would see, [B, D], of x [B, 3, H, W]."""
    return model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)


def built(name: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """In eval mode, on the CPU. Without timm's weights they are random, and always the same.

    Raises:
        InvalidRequest: weights that are neither cached nor reachable.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # the CPU's alone: `torch.manual_seed` is of every device
        try:
            model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise InvalidRequest(
                f"cannot get the weights of {name!r}: {error}. Download them on a machine with network into HF_HOME",
                param="features",
            ) from error
    return model.eval().requires_grad_(False)


def dimensions(name: str, options: Mapping[str, Any], size: tuple[int, int]) -> int:
    """D, of images of this size (height, width). Nothing is computed, and no weights are made.

    Raises:
        InvalidRequest: the model does not take such images, or tells no features.
    """
    return _dimensions(name, _skeleton(name, options), size)


def digest(model: nn.Module) -> str:
    """sha256 of the weights."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


# ---------------------------------------------------------------- published ones


def check_file(file: Path, card: PublishedCard) -> None:
    """Whether `opened` will do with a file.

    Raises:
        InvalidRequest: unknown model, options or size, or tensors that are not this model's, or not finite.
    """
    skeleton = _described(card)
    _dimensions(card.model, skeleton, card.size)
    expected = skeleton.state_dict()
    with safe_open(file, "pt") as content:
        found = {name: content.get_slice(name).get_shape() for name in content.offset_keys()}
        shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
        if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            first = wrong[0]
            raise InvalidRequest(
                f"{len(wrong)} tensors do not fit timm's {card.model!r} with num_classes=0 and {card.options}: "
                f"{first!r} is {found.get(first, 'missing')}, and should be {shapes.get(first, 'left out')}",
                param="body",
            )
        for name in found:
            tensor = content.get_tensor(name)
            if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
                raise InvalidRequest(f"tensor {name!r} is {tensor.dtype}, not {expected[name].dtype}", param="body")
            if not torch.isfinite(tensor).all():
                raise InvalidRequest(f"tensor {name!r} has values that are NaN or infinite", param="body")


def opened(card: PublishedCard, content: bytes) -> nn.Module:
    """A model that `check_file` let pass, in eval mode, on the CPU."""
    model = built(card.model, plain(card.options), pretrained=False)
    model.load_state_dict(load(content))
    return model


def _described(card: PublishedCard) -> nn.Module:
    recorded(card.model)
    return _skeleton(card.model, plain(card.options))


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as timm takes them. Raises InvalidRequest for one that no publication may set."""
    plain = {}
    for name, value in options.items():
        parts = value if isinstance(value, list | tuple) else [value]
        allowed = len(parts) <= 2 and all(
            isinstance(part, bool) or (isinstance(part, int) and 0 <= part <= LARGEST) or _short(part) for part in parts
        )
        if name not in OPTIONS or not allowed:
            raise InvalidRequest(
                f"option {name[:100]!r} is not one that a published model may set, or its value is none: use "
                f"{', '.join(OPTIONS)}",
                param="body",
            )
        plain[name] = tuple(value) if isinstance(value, list) else value
    return plain


def _short(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 32


def _skeleton(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model with shapes and no values."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    except Exception as error:  # timm does not check options: a patch of 0 is a ZeroDivisionError
        raise InvalidRequest(f"timm cannot build {name!r} with {dict(options)}: {error}", param="features") from error


def _dimensions(name: str, skeleton: nn.Module, size: tuple[int, int]) -> int:
    if not hasattr(skeleton, "forward_head"):
        raise InvalidRequest(
            f"timm's {name!r} does not tell its features (forward_head): use another", param="features"
        )
    try:
        with torch.no_grad(), torch.device("meta"):
            features = pooled(skeleton, torch.empty(1, 3, *size))
    except Exception as error:  # any that a layer raises
        raise InvalidRequest(
            f"timm's {name!r} cannot take images of {size[0]} x {size[1]} pixels ({error}): use its own size, or "
            "another multiple of its patch or stride",
            param="features_size",
        ) from error
    return features.shape[1]
