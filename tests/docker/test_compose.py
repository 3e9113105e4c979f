"""What compose.yaml promises, read off the file: no service as root, no image unpinned, no name that leads nowhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from agent import cli
from protocol import config
from tests.docker import compose
from trainer.__main__ import main as train

ROOT = compose.DOCKER.parent
FILES = ("compose.yaml", "compose.gpu.yaml")
FILLED_IN = compose.read_env(compose.DOCKER / ".env.example") | {
    "DATASET": "../pets",
    "REDIS_PASSWORD": "redis-secret",
    "ONTHEFLY_API_KEY": "api-secret",
    "ONTHEFLY_ADMIN_KEY": "admin-secret",
}
COMPOSE = compose.load(*(compose.DOCKER / name for name in FILES), variables=FILLED_IN)
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("onthefly-")}
every_service = pytest.mark.parametrize("name", SERVICES)
every_one_of_ours = pytest.mark.parametrize("name", OURS)


def read_by_our_code(variable: str) -> bool:
    places = ["protocol", "agent", "generator_service", "trainer"]
    return not subprocess.run(["git", "grep", "--untracked", "-qw", variable, "--", *places], cwd=ROOT).returncode


@every_service
def test_a_service_has_no_privileges(name: str):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["read_only"] is True
    assert service.get("privileged", False) is False
    assert "network_mode" not in service


@every_service
def test_an_image_is_pinned_and_its_user_is_not_root(name: str):
    image, _, tag = SERVICES[name]["image"].partition(":")
    assert re.fullmatch(r"\d+\.\d+\.\d+(-[\w.]+)?", tag)
    if name in OURS:
        builders = [service for service in OURS.values() if service["image"] == f"{image}:{tag}" and "build" in service]
        assert len(builders) == 1
        dockerfile = compose.DOCKER / builders[0]["build"]["context"] / builders[0]["build"]["dockerfile"]
        assert re.search(r"^USER 10001:10001$", dockerfile.read_text(), re.MULTILINE)
        assert tag == re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    else:
        assert int(SERVICES[name]["user"].split(":")[0]) > 0


@every_service
def test_a_service_is_restarted_stopped_and_watched(name: str):
    service = SERVICES[name]
    one_shot = name in ("adapt", "trainer")  # these end by themselves: the exit status tells
    assert one_shot or service["restart"] == "unless-stopped"
    assert one_shot or "test" in service["healthcheck"]
    assert one_shot or compose_seconds(service["stop_grace_period"]) >= 30
    assert not service.get("restart", "no").startswith("on-failure") or ":" in service["restart"]  # not for ever


def compose_seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_the_generator_has_time_to_drain():
    from generator_service.__main__ import DRAIN_S

    assert compose_seconds(SERVICES["generator"]["stop_grace_period"]) > DRAIN_S


@every_service
def test_volumes_and_services_that_are_named_exist(name: str):
    service = SERVICES[name]
    for target, source in compose.mounts(service).items():
        assert target.startswith("/")
        if isinstance(source, str):
            assert source in COMPOSE["volumes"]
        elif source is not None and target != "/data":
            assert source.is_file(), source
    for other, how in service.get("depends_on", {}).items():
        healthy = how["condition"] == "service_healthy"
        assert "test" in SERVICES[other]["healthcheck"] if healthy else SERVICES[other]["restart"] == "no"
    used = {source for one in SERVICES.values() for source in compose.mounts(one).values() if isinstance(source, str)}
    assert used == COMPOSE["volumes"].keys()


def test_every_volume_of_ours_is_made_for_its_user():
    """A named volume takes its owner from the folder in the image that it is mounted over."""
    for name, service in OURS.items():
        dockerfile = {"adapt": "generator"}.get(name, name) + ".Dockerfile"
        made = re.search(r"install -d -o 10001 -g 10001 (.*)$", (compose.DOCKER / dockerfile).read_text(), re.MULTILINE)
        for target, source in compose.mounts(service).items():
            assert isinstance(source, Path) or target in made[1].split(), (name, target)


@every_one_of_ours
def test_the_settings_name_places_that_are_mounted(name: str):
    settings = config.load(compose.DOCKER / "settings" / "run.toml")
    places = {
        "generator": [settings["generator"]["dataset"]["root"], settings["generator"]["weights_dir"]],
        "trainer": [settings["trainer"]["dataset"]["root"], settings["trainer"]["runs_dir"]],
        "adapt": [],
    }[name]
    assert set(places) <= compose.mounts(SERVICES[name]).keys()


@every_service
def test_secrets_are_in_the_environment_and_nowhere_else(name: str):
    service = SERVICES[name]
    secrets = ("redis-secret", "api-secret", "admin-secret")
    told = str({key: value for key, value in service.items() if key != "environment"})
    assert not any(secret in told for secret in secrets)
    for text in ((compose.DOCKER / file).read_text() for file in (*FILES, ".env.example")):
        assert not re.search(r"(PASSWORD|KEY)(:|=) *[\w'\"]", text)


@every_one_of_ours
def test_variables_are_ones_that_our_code_reads(name: str):
    for variable in SERVICES[name]["environment"]:
        assert read_by_our_code(variable), variable


def test_the_trainer_may_not_do_what_an_administrator_may():
    assert "ONTHEFLY_ADMIN_KEY" not in SERVICES["trainer"]["environment"]


def test_only_the_generator_is_reached_from_outside_and_only_from_this_machine():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["generator"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["generator"]["ports"])


@every_one_of_ours
def test_commands_are_ones_that_the_cli_takes(name: str):
    assert compose.entrypoint(SERVICES[name]) == ["onthefly"]
    options = cli._parser().parse_args(SERVICES[name]["command"])
    assert str(options.config) in compose.mounts(SERVICES[name])


def test_the_settings_are_right(capsys: pytest.CaptureFixture[str]):
    from agent.settings import AgentConfig
    from generator_service.settings import GeneratorConfig

    path = compose.DOCKER / "settings" / "run.toml"
    assert train(["--config", str(path), "--check"]) == 0, capsys.readouterr().err
    settings = config.load(path)
    generator = config.section(settings, "generator", GeneratorConfig)
    assert settings["trainer"]["service"]["url"] == f"http://generator:{generator.port}"
    assert config.section(settings, "agent", AgentConfig).adapt is not None


def test_the_overlay_gives_both_sides_a_gpu_and_changes_nothing_else():
    plain = compose.load(compose.DOCKER / "compose.yaml", variables=FILLED_IN)["services"]
    for name, service in SERVICES.items():
        added = {key: value for key, value in service.items() if plain[name].get(key) != value}
        assert added.keys() == ({"deploy"} if name in ("generator", "trainer") else set())


def test_the_example_names_every_variable():
    asked = set(re.findall(r"\$\{(\w+)", "".join(path.read_text() for path in compose.DOCKER.glob("*.yaml"))))
    assert asked == compose.read_env(compose.DOCKER / ".env.example").keys()


def test_the_queue_evicts_nothing_and_logs_every_write():
    lines = (compose.DOCKER / "settings" / "redis.conf").read_text().splitlines()
    said = dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))
    assert said["maxmemory-policy"] == "noeviction"
    assert said["appendonly"] == "yes"
    assert int(said["maxmemory"].removesuffix("gb")) > 0
    assert said["protected-mode"] == "yes"
    assert "requirepass" not in said
