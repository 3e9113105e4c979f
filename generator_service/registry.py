"""Names of what can be chosen: backends, adaptations, policies, rewards, language models, face readers; and where they
live. A new one is one new file and one line here.

Entries are imported when first used, so that reading settings or serving /livez never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from protocol.errors import ConfigError

BACKENDS = {
    "dit": "generator_service.backends.dit:DiTBackend",
    "stable_diffusion": "generator_service.backends.stable_diffusion:StableDiffusionBackend",
    "ti2v": "generator_service.backends.ti2v:TI2VBackend",
    "image_to_video": "generator_service.backends.image_to_video:ImageToVideoBackend",
}
ADAPTATIONS = {
    "cold_start": "generator_service.adapt.cold_start:cold_start",
    "lora": "generator_service.adapt.lora:lora",
}
POLICIES = {  # by the name of the backend
    "dit": "generator_service.rl.dit_policy:DiTPolicy",
    "stable_diffusion": "generator_service.rl.sd_policy:StableDiffusionPolicy",
}
REWARDS = {
    "semantic": "generator_service.rl.rewards:semantic",
    "coverage": "generator_service.rl.rewards:coverage",
    "expression": "generator_service.rl.rewards:expression",
}
CLIP_REWARDS = {
    "steps": "generator_service.rl.clip_rewards:steps",
    "quality": "generator_service.rl.clip_rewards:quality",
    "face": "generator_service.rl.clip_rewards:face",
    "amplitude": "generator_service.rl.clip_rewards:amplitude",
}
LANGUAGE = {
    "chat": "generator_service.language.chat:LocalChat",
    "captioner": "generator_service.language.captioner:Captioner",
    "vision_chat": "generator_service.language.vision_chat:VisionChat",
}
FACE_READERS = {
    "landmarks": "generator_service.faces.landmarks:LandmarkReader",
    "openface": "generator_service.faces.openface:OpenFaceReader",
    "pyfeat": "generator_service.faces.pyfeat:PyFeatReader",
}


def load(entries: dict[str, str], name: str) -> Any:
    """The object registered as `name`. Raises ConfigError listing the known names."""
    if name not in entries:
        raise ConfigError(f"unknown name {name!r}: use one of {', '.join(sorted(entries))}")
    module, attribute = entries[name].split(":")
    return getattr(import_module(module), attribute)


def backend(name: str) -> tuple[type, type]:
    """The class of a backend, and of its settings: `Config` in the same module. Raises ConfigError."""
    return _configured(BACKENDS, name)


def language(name: str) -> tuple[type, type]:
    """The class of a model that reads or writes text on this machine, and of its settings. Raises ConfigError."""
    return _configured(LANGUAGE, name)


def face_reader(name: str) -> tuple[type, type]:
    """The class of a face reader, and of its settings. Raises ConfigError."""
    return _configured(FACE_READERS, name)


def _configured(entries: dict[str, str], name: str) -> tuple[type, type]:
    kind = load(entries, name)
    return kind, import_module(kind.__module__).Config
