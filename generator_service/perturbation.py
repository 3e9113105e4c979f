"""The prompts of a work unit made final: each row gets its version of its source's caption, when the unit says so.

Knows nothing of how versions are made, nor of images.
"""

from __future__ import annotations

from agent.captions import Count, Perturber, Store, Subject
from agent.language import ChatModel, OpenAIChat
from agent.settings import AgentConfig
from generator_service import registry
from protocol.config import section
from protocol.entries import WorkRow, WorkUnit


def perturber(agent: AgentConfig, count: Count) -> Perturber:
    """As the settings say. Raises ConfigError when they are wrong, or the model cannot be loaded."""
    model: ChatModel | None = None
    if agent.perturb == "openai":
        model = OpenAIChat(agent.openai)
    elif agent.perturb == "local":
        kind, settings = registry.language("chat")
        model = kind(section({"agent.local": agent.local}, "agent.local", settings))
    return Perturber(model, agent.captioned_prompt, count)


def perturbed(unit: WorkUnit, perturb: Perturber, store: Store) -> WorkUnit:
    """The unit with its prompts as they are to be used, and who made them. All its captions are asked for at once. The
    same unit gets the same prompts again, for as long as versions are kept. Raises NotReady when the service stops."""
    if unit.versions is None:
        return unit
    open_rows = [row for row in unit.rows if row.prompt_by is None]
    found = perturb((_subject(row) for row in open_rows), unit.versions, store, f"{unit.run}.{unit.feedback}")

    def final(row: WorkRow) -> WorkRow:
        if row.prompt_by is not None:
            return row
        made = found[_subject(row)]
        index = row.index % len(made.texts)
        prompt = perturb.fill_in(_subject(row), made.texts[index])
        return row.model_copy(update={"prompt": prompt, "prompt_by": made.by[index]})

    return unit.model_copy(update={"rows": [final(row) for row in unit.rows], "versions": None})


def _subject(row: WorkRow) -> Subject:
    return Subject(row.class_name, row.caption)
