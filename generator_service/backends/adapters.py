"""LoRAs as named adapters of one model in memory: put in, chosen, taken out. Switching moves no parameters.

Works on any diffusers model, by peft alone. Knows nothing of files, nor of who trains or serves an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from protocol.messages import WeightsRef

WRAPPED = ".base_layer"  # in the name of a parameter, where an adapter is or was around its layer
ADAPTER = ".lora_"  # in the name of an adapter's own


def named(ref: WeightsRef) -> str:
    """What the adapter of a weight set is called. Torch wants no dots in names of modules."""
    return f"{ref}-{ref.digest[:16]}".replace(".", "_")


def begin(model: nn.Module, name: str, rank: int, targets: Sequence[str], seed: int) -> None:
    """Put in a new LoRA that changes nothing yet: its first factor is drawn, its second is zero; then none is in use.

    Args:
        targets: ends of the names of the layers that get an update.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several are what is wanted
        torch.manual_seed(seed)  # peft draws from the global generator
        inject_adapter_in_model(config, model, name)
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = True  # as its own `add_adapter` would; it refuses to switch otherwise
    use(model, None)


def use(model: nn.Module, name: str | None, scale: float = 1.0) -> None:
    """From now on this adapter counts, `scale` times, and no other; None: none does. Its parameters require gradients
    while it is used, those of the others do not."""
    for layer in _layers(model):
        if name is None:
            layer.enable_adapters(False)
        else:
            layer.set_adapter(name)
            layer.set_scale(name, scale)
            layer.enable_adapters(True)


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter from every layer that it is in, be it but some, or none; then no adapter is in use. With the
    last one, the layers are again what they were before the first."""
    for layer in _layers(model):
        layer.set_adapter([])  # peft warns when the one that is active goes
        layer.delete_adapter(name)
        layer.enable_adapters(False)
    configs = getattr(model, "peft_config", {})
    configs.pop(name, None)
    if configs:
        return
    wrapped = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for path in wrapped:
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, model.get_submodule(path).get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if isinstance(model, PeftAdapterMixin):
        model._hf_peft_config_loaded = False  # diffusers says so before it adds the first


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Those of an adapter, by their names in the model, which do not depend on what other adapters there are."""
    own = f".{name}."
    return {path: value for path, value in model.named_parameters() if own in path and ADAPTER in path}


def base_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter of the model without its adapters -> its name now, which adapters may have changed."""
    return {path.replace(WRAPPED, ""): path for path, _ in model.named_parameters() if ADAPTER not in path}


def _layers(model: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
