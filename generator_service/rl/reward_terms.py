"""The rewards of a tune or policy job: looked up by name, their options bound. Knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from generator_service import registry
from generator_service.rl import rewards
from protocol.errors import ConfigError, InvalidRequest
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob


def reward_functions(
    job: TuneJob | PolicyJob, entries: Mapping[str, str], table: str = "generator.rewards"
) -> dict[str, Callable[..., Any]]:
    """Of each of the job's terms. `entries`: name -> "module:function". `table`: of the settings, that added to them.

    Raises:
        InvalidRequest: a reward that is not there, or an option that it does not know.
        ConfigError: what the settings name cannot be imported.
    """
    found = {}
    for name, term in job.rewards.items():
        if name not in entries:
            raise InvalidRequest(f"no reward {name!r} here: use {', '.join(sorted(entries))}", param=f"rewards.{name}")
        try:
            function = registry.load(dict(entries), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{table}.{name} = {entries[name]!r} cannot be imported ({error}): correct the service's settings",
                param=f"{table}.{name}",
            ) from error
        rewards.check_options(name, function, term.options)
        found[name] = partial(function, **term.options)
    return found
