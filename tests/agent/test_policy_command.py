"""A sampling policy from the command line and from settings: what is asked for, in which order, and what is shown."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from agent import cli, policy_command
from agent.follow import _described, notable
from agent.machine import Machine
from agent.settings import AgentConfig
from agent.supervisor import Supervisor
from protocol.errors import ConfigError, InvalidRequest
from protocol.messages import AdaptJob
from protocol.policy import PolicyJob
from protocol.tuning import TuneJob


def said(*arguments: str) -> argparse.Namespace:
    return cli._parser().parse_args(["policy", *arguments])


def test_arguments_say_the_job():
    job = policy_command.job(
        said("chooser", "--steps", "7", "--again", "--set", "actions.steps=[5,10]", "--set", "cache=false")
    )
    assert job == PolicyJob.model_validate(
        {"name": "chooser", "steps": 7, "again": True, "actions": {"steps": [5, 10]}, "cache": False}
    )


def test_settings_say_it_too(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[agent.policy]\nname = "chooser"\nrewards = {steps = {weight = 1.0}, quality = {weight = 3.0}}\n')
    job = policy_command.job(said("--config", str(path), "--set", "agent.policy.seed=3"))
    assert job is not None and (job.name, job.seed, sorted(job.rewards)) == ("chooser", 3, ["quality", "steps"])
    path.write_text("[agent]\npolicy = false\n")
    assert policy_command.job(said("--config", str(path))) is None
    with pytest.raises(InvalidRequest, match=r"--set agent\.policy\.steps="):
        policy_command.job(said("--config", str(path), "--steps", "3"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "NAME of the weights"),
        (("x", "--set", "top=4"), "set top below candidates"),
        (("x", "--set", "rewards.steps.weight=0"), "every reward has weight 0"),
        (("x", "--steps", "0"), "steps"),
        (("x", "--set", 'method="magic"'), "method"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words):
    with pytest.raises((InvalidRequest, ConfigError), match=words):
        policy_command.job(said(*arguments))


class Recorded(Machine):
    """Tells what it was asked to do, on which base, and makes "NAME@1" of it."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str | None]] = []

    def adapt(self, job: AdaptJob) -> str:
        return self._did(job)

    def tune(self, job: TuneJob) -> str:
        return self._did(job)

    def learn_policy(self, job: PolicyJob) -> str:
        return self._did(job)

    def _did(self, job: AdaptJob | TuneJob | PolicyJob) -> str:
        self.done.append((job.type, job.base))
        return f"{job.name}@1"


ADAPT, TUNE, POLICY = {"name": "cold", "steps": 2}, {"name": "tuned"}, {"name": "chooser"}


@pytest.mark.parametrize(
    ("tables", "done"),
    [
        ({"policy": POLICY}, [("policy", None)]),
        ({"adapt": ADAPT, "policy": POLICY}, [("adapt", None), ("policy", "cold@1")]),
        (
            {"adapt": ADAPT, "tune": TUNE, "policy": POLICY},
            [("adapt", None), ("tune", "cold@1"), ("policy", "tuned@1")],
        ),
        ({"adapt": ADAPT, "policy": POLICY | {"base": "base"}}, [("adapt", None), ("policy", "base")]),
        ({"adapt": ADAPT, "policy": False}, [("adapt", None)]),
    ],
)
def test_a_policy_is_learnt_last_for_what_came_of_the_rest(tables, done):
    machine = Recorded()
    assert machine.prepare(AgentConfig.model_validate(tables)) is None
    assert machine.done == done


def test_it_is_begun_again_when_its_generator_dies(monkeypatch):
    """As an adaptation is; the job goes on from its checkpoint."""
    from agent import machine as module
    from protocol.errors import ServiceUnreachable

    calls = []

    def learn(client, job):
        calls.append(job.name)
        if len(calls) == 1:
            raise ServiceUnreachable("it died")
        return "chooser@1"

    class Client:
        def wait_ready(self, timeout_s):
            calls.append("ready")

    monkeypatch.setattr(module, "learn_policy", learn)
    with Supervisor() as nobody:
        machine = Machine(nobody, Client(), [], {})
        monkeypatch.setattr(machine, "gone", lambda: False)
        assert machine.learn_policy(PolicyJob(name="chooser")) == "chooser@1"
    assert calls == ["chooser", "ready", "chooser"]


def test_a_policy_is_not_learnt_for_a_generator_that_changes():
    tune = {"name": "t", "activate": True, "publish_every": 3}
    with pytest.raises(ValueError, match="tune_while_training = false"):
        AgentConfig.model_validate({"tune": tune, "tune_while_training": True, "policy": POLICY})


def test_what_is_shown_of_it():
    data = {"step": 4, "loss": -1.5, "reward": 5.25, "entropy": 1.75}
    assert _described("policy", data) == "policy, reward 5.2500, entropy 1.75"
    means = {"learned": 6.0, "fixed": 5.5, "random": 5.0, "oracle": 6.5}
    measured = {name: {"mean": mean, "error": 0.125} for name, mean in means.items()} | {"states": 16}
    (line,) = notable(data | {"validation": measured})
    assert line == (
        "step 4: reward in 16 held-out states: learned 6.000 +- 0.125, fixed 5.500 +- 0.125, random 5.000 +- 0.125, "
        "oracle 6.500 +- 0.125"
    )
    measured["oracle"]["error"] = None
    assert next(notable(data | {"validation": measured})).endswith("oracle 6.500")
