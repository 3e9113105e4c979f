"""The services of compose.yaml run as plain processes, from the same files, commands and environment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from protocol import config
from tests.docker import compose
from tests.ports import free_ports

SMALL = [  # the example's run in seconds
    "generator.threads=1",
    "generator.dit.device=cpu",
    "agent.steps=4",
    "agent.images_per_sample=2",
    "agent.adapt.steps=4",
    "agent.adapt.batch_size=4",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.iterations=4",
    "trainer.epochs=1",
    "trainer.warmup_iterations=2",
    "trainer.batch_size=8",
    "trainer.model.model=small_cnn",
    "trainer.model.image_size=8",
]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("beagle", "bombay"):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{number}.png")
    return tmp_path / "images"


def variables(tmp_path: Path, dataset: Path) -> dict[str, str]:
    """docker/.env as the example says to fill it in, with the example's settings made small."""
    settings = tmp_path / "small.toml"
    settings.write_text(tomli_w.dumps(config.load(compose.DOCKER / "settings" / "run.toml", SMALL)))
    secrets = {name: f"secret-of-{name}" for name in ("REDIS_PASSWORD", "ONTHEFLY_API_KEY", "ONTHEFLY_ADMIN_KEY")}
    own = {"DATASET": str(dataset), "SETTINGS": str(settings)}
    return compose.read_env(compose.DOCKER / ".env.example") | secrets | own


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_run_from_start_to_end(tmp_path: Path, dataset: Path):
    for program in ("redis-server", "redis-cli"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on PATH: the services of compose.yaml cannot run here")
    services = compose.load(compose.DOCKER / "compose.yaml", variables=variables(tmp_path, dataset))
    with compose.Machine(services, tmp_path, dict(zip((6379, 8000), free_ports(2), strict=True))) as machine:
        machine.up()
        assert machine.wait("trainer", 120) == 0, machine.log("trainer")
        assert "adapted@1" in machine.log("adapt")
        run = machine.place("trainer", "/var/lib/onthefly/runs") / "run"
        summary = json.loads((run / "summary.json").read_text())
        assert summary["iterations"] == 4
        assert summary["trained"] > 0
        assert summary["balanced"] is True
        weights = machine.place("generator", "/var/lib/onthefly/weights")
        assert json.loads((weights / ".active.json").read_text())["name"] == "adapted"
        assert (machine.place("redis", "/data") / "appendonlydir").is_dir()
        for name in services["services"]:
            assert "secret-of" not in machine.log(name)
    assert "Traceback" not in machine.log("generator")


@pytest.mark.parametrize("missing", ["DATASET", "REDIS_PASSWORD", "ONTHEFLY_API_KEY", "ONTHEFLY_ADMIN_KEY"])
def test_what_is_not_filled_in_is_told(tmp_path: Path, dataset: Path, missing: str):
    given = variables(tmp_path, dataset) | {missing: ""}
    with pytest.raises(compose.Unset, match=rf"set {missing} in docker/\.env"):
        compose.load(compose.DOCKER / "compose.yaml", variables=given)
