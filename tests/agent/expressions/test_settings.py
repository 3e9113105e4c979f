from __future__ import annotations

import pytest

from agent.settings import AgentConfig
from protocol import config
from protocol.errors import ConfigError


def read(**table) -> AgentConfig:
    return config.section({"agent": {"expressions": table}}, "agent", AgentConfig)


def test_defaults_are_the_papers():
    chosen = read().expressions
    assert (chosen.openai.temperature, chosen.openai.max_tokens, chosen.openai.extra) == (0.8, 256, {"top_p": 0.9})
    assert (chosen.frames, chosen.retrieval, chosen.guidance) == (16, True, None)


@pytest.mark.parametrize("intensity", [[0.6, 0.2], [0.0, 0.0], [-0.1, 0.5], [0.2, 1.5], [0.5]])
def test_an_intensity_that_is_no_range_is_refused(intensity: list[float]):
    with pytest.raises(ConfigError, match="intensity"):
        read(intensity=intensity)


def test_a_curve_of_guidance_is_read_from_a_table():
    chosen = read(guidance={"a": 3, "b": 2.0}, policy=False).expressions
    assert (chosen.guidance.a, chosen.guidance.minimum, chosen.policy) == (3.0, 7.0, False)
