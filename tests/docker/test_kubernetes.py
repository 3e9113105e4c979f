"""The Kubernetes manifests, read as written and, where kubectl is there, as kustomize puts them together."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import cli
from generator_service.__main__ import DRAIN_S
from tests.docker import compose
from tests.docker.test_compose import SERVICES, read_by_our_code

KUBERNETES = compose.DOCKER / "kubernetes"
BASE = KUBERNETES / "base"
MANIFESTS = [
    manifest
    for path in sorted(BASE.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for manifest in yaml.safe_load_all(path.read_text())
]
KIND_OF_PODS = ("Deployment", "StatefulSet", "Job")


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pods() -> Iterator[dict[str, Any]]:
    for manifest in MANIFESTS:
        if manifest["kind"] in KIND_OF_PODS:
            yield manifest["spec"]["template"]["spec"]


def containers() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(pod, container) of every pod, initial ones included."""
    return [(pod, one) for pod in pods() for one in [*pod.get("initContainers", []), *pod["containers"]]]


every_container = pytest.mark.parametrize(
    ("pod", "container"), [pytest.param(pod, one, id=one["name"]) for pod, one in containers()]
)


def test_every_manifest_is_put_in():
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert {name for name in listed if name.endswith(".yaml")} == {
        path.name for path in BASE.glob("*.yaml") if path.name != "kustomization.yaml"
    }


@every_container
def test_a_container_has_no_privileges(pod: dict[str, Any], container: dict[str, Any]):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == (999 if container["name"] == "redis" else 10001)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@every_container
def test_images_are_the_ones_of_compose(pod: dict[str, Any], container: dict[str, Any]):
    assert container["image"] in {service["image"] for service in SERVICES.values()}


@every_container
def test_what_is_mounted_is_declared(pod: dict[str, Any], container: dict[str, Any]):
    claims = {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "PersistentVolumeClaim"}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
    assert mounted <= volumes.keys() | {"data"}  # redis' own claim
    for volume in volumes.values():
        assert volume.get("persistentVolumeClaim", {"claimName": "runs"})["claimName"] in claims
        assert volume.get("configMap", {"name": "settings"})["name"] == "settings"


@every_container
def test_the_environment_is_known_and_secrets_come_from_the_secret(pod: dict[str, Any], container: dict[str, Any]):
    offered = compose.read_env(BASE / "secrets.env.example")
    assert not any(offered.values())
    for variable in container.get("env", []):
        name = variable["name"]
        assert name in ("REDIS_PASSWORD", "REDISCLI_AUTH") or read_by_our_code(name), name
        if "KEY" in name or "PASSWORD" in name or "AUTH" in name:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == "secrets"
            assert reference["key"] in offered


@every_container
def test_commands_are_the_ones_of_compose(pod: dict[str, Any], container: dict[str, Any]):
    name = container["name"]
    if name == "ready":
        ast_of_it = compile(container["command"][2], "ready", "exec")
        assert "wait_ready" in ast_of_it.co_names
    elif name == "redis":
        assert container["command"][2].replace("$", "") == SERVICES["redis"]["command"][2].replace("$", "")
    else:
        assert container["args"] == SERVICES[name]["command"]
        assert cli._parser().parse_args(container["args"])


def test_generators_are_probed_and_drained():
    pod = named("Deployment", "generator")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert "startupProbe" in container
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S


def test_replicas_share_their_weights_and_nothing_else_of_theirs():
    assert named("PersistentVolumeClaim", "weights")["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {v["name"]: v for v in named("Deployment", "generator")["spec"]["template"]["spec"]["volumes"]}
    assert "emptyDir" in volumes["samples"]


def test_a_job_restarts_a_trainer_that_failed():
    job = named("Job", "trainer")["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert job["backoffLimit"] >= 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The overlay with GPUs as `kubectl apply -k` would send it, secrets filled in."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on PATH: the overlay is not put together here")
    folder = tmp_path_factory.mktemp("kustomize") / "docker"
    shutil.copytree(compose.DOCKER, folder, ignore=shutil.ignore_patterns(".env", "secrets.env"))
    base = folder / "kubernetes" / "base"
    (base / "secrets.env").write_text((base / "secrets.env.example").read_text().replace("=\n", "=secret\n"))
    command = ["kubectl", "kustomize", str(folder / "kubernetes" / "gpu")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def test_the_overlay_gives_generators_and_trainer_a_gpu_each(built: list[dict[str, Any]]):
    limits = {
        container["name"]: container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu")
        for manifest in built
        if manifest["kind"] in KIND_OF_PODS
        for container in manifest["spec"]["template"]["spec"]["containers"]
    }
    assert limits == {"redis": None, "generator": 1, "trainer": 1}


def test_the_settings_are_the_ones_of_compose(built: list[dict[str, Any]]):
    (settings,) = [manifest for manifest in built if manifest["kind"] == "ConfigMap"]
    folder = compose.DOCKER / "settings"
    assert settings["data"] == {name: (folder / name).read_text() for name in ("run.toml", "redis.conf")}
    text = yaml.safe_dump_all(built)
    assert text.count(settings["metadata"]["name"]) == 4  # itself, redis, generator, trainer


def test_everything_lies_in_one_namespace(built: list[dict[str, Any]]):
    assert {m["metadata"].get("namespace") for m in built if m["kind"] != "Namespace"} == {"onthefly"}


def test_no_secret_is_tracked():
    listing = subprocess.run(["git", "ls-files", str(compose.DOCKER)], capture_output=True, text=True, cwd=Path.cwd())
    assert not {Path(name).name for name in listing.stdout.splitlines()} & {".env", "secrets.env"}
