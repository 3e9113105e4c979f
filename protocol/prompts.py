"""The prompts that a generator is adapted on and asked with (GenDataAgent, section 2.1). Knows nothing of models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

PROMPT = "a photo of {class_name}"
CAPTIONED_PROMPT = "a photo of {class_name}, which is {caption}"

CaptionedTemplate = Annotated[str, Field(pattern=r"\{caption\}")]
"""With a place for the caption."""


def fill(prompt: str, captioned_prompt: str, class_name: str, caption: str | None) -> str:
    """The prompt for an image of this class: the captioned one where it has a caption."""
    template = captioned_prompt if caption else prompt
    return template.replace("{class_name}", class_name).replace("{caption}", caption or "")
