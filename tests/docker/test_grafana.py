"""The dashboard and what brings it up: fields that Grafana needs, places and ports that fit each other.

What its queries ask for is tested where a whole system runs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml

from agent import cli
from protocol import config
from trainer.settings import TrainerConfig

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "onthefly.json").read_text())
PANELS = DASHBOARD["panels"]
MONITORING = yaml.safe_load((DOCKER / "compose.monitoring.yaml").read_text())
JOBS = {job["job_name"]: job for job in yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def provisioning(kind: str) -> dict:
    (file,) = (DOCKER / "grafana" / "provisioning" / kind).iterdir()
    return yaml.safe_load(file.read_text())


def mounts(service: str) -> dict[str, Path]:
    """Place in the container -> file or folder here."""
    binds = [volume for volume in MONITORING["services"][service]["volumes"] if isinstance(volume, dict)]
    return {bind["target"]: DOCKER / bind["source"] for bind in binds}


def test_grafana_takes_it():
    assert DASHBOARD["uid"] == "onthefly" and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for variable in variables.values():
        assert variable["type"] != "query" or variable["datasource"] == SOURCE


@pytest.mark.parametrize("panel", [panel for panel in PANELS if panel["type"] != "row"], ids=lambda p: p["title"])
def test_a_panel_has_its_source_its_queries_and_says_what_it_shows(panel: dict):
    assert panel["datasource"] == SOURCE
    assert panel["targets"] and all(target["datasource"] == SOURCE for target in panel["targets"])
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names)
    assert panel["title"] and panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_what_is_mounted_is_there_and_grafana_looks_for_it_there():
    for service in ("prometheus", "grafana"):
        assert all(path.exists() for path in mounts(service).values())
    (provider,) = provisioning("dashboards")["providers"]
    assert f"{provider['options']['path']}/onthefly.json" in mounts("grafana")
    (source,) = provisioning("datasources")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert source["type"] == "prometheus" and host in MONITORING["services"] and port == "9090"


def test_prometheus_asks_where_generator_and_trainer_answer(monkeypatch: pytest.MonkeyPatch):
    started = cli._parser().parse_args(MONITORING["services"]["trainer"]["command"])
    monkeypatch.chdir(DOCKER)
    settings = config.load(Path("settings/run.toml"), started.set)
    trainer = config.section(settings, "trainer", TrainerConfig)
    assert trainer.metrics_host == "0.0.0.0"
    ports = {"generator": settings["generator"]["port"], "trainer": trainer.metrics_port}
    for service, port in ports.items():
        (discovery,) = JOBS[f"onthefly-{service}"]["dns_sd_configs"]
        assert (discovery["names"], discovery["port"]) == ([service], port)
    (secret,) = MONITORING["services"]["prometheus"]["secrets"]
    assert JOBS["onthefly-generator"]["authorization"] == {"credentials_file": f"/run/secrets/{secret}"}
    assert MONITORING["secrets"][secret] == {"environment": "ONTHEFLY_API_KEY"}
    queried = json.dumps([panel.get("targets") for panel in PANELS])
    assert 'job=~\\"onthefly-.*\\"' in queried and all(name.startswith("onthefly-") for name in JOBS)
