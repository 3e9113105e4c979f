"""What the README says about containers: its commands name files and services that are there, its sum is right."""

from __future__ import annotations

import re
import shlex

import pytest

from agent import cli
from tests.docker import compose
from tests.docker.test_compose import SERVICES

ROOT = compose.DOCKER.parent
SECTION = (ROOT / "README.md").read_text().split("## From one machine to many\n")[1].split("\n## ")[0]
COPIES = ("docker/.env", "docker/kubernetes/base/secrets.env")  # made of examples by the commands
COMMANDS = re.search(r"```sh\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_names_is_there(command: str):
    words = shlex.split(command, comments=True)
    for word in words:
        assert not word.startswith("docker/") or word in COPIES or (ROOT / word).exists(), word
        service, equals, number = word.partition("=")
        assert not equals or (service in SERVICES and number.isdecimal())


@pytest.mark.parametrize("command", re.findall(r"`(onthefly [^`]*)`", SECTION))
def test_our_commands_are_ones_that_the_cli_takes(command: str):
    cli._parser().parse_args(shlex.split(command)[1:])


def test_everything_that_is_to_be_read_off_has_its_name():
    from generator_service.telemetry import Telemetry

    page = Telemetry().scrape({}, {}, None).decode()
    for name in re.findall(r"`(onthefly_\w+)`", SECTION):
        assert name in page
