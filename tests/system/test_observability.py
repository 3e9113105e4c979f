"""The whole system in one run, seen from outside: its log lines, traces and metrics, and the dashboard for them."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import promql_parser
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from protocol import logs, tracing
from protocol.broker import EmbeddedBroker
from tests.ports import free_port
from tests.system.whole import run_training, serving_both, trainer_config
from trainer.run import Run

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "onthefly.json").read_text())
LAST = 3  # iterations 0 to 3; the first two on real data only


@dataclass(frozen=True)
class Seen:
    lines: list[dict]  # of the log
    spans: list[ReadableSpan]
    pages: list[str]  # of metrics: the service's and the trainer's

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def parent(self, span: ReadableSpan) -> ReadableSpan:
        assert span.parent is not None, span.name
        return next(other for other in self.spans if other.context.span_id == span.parent.span_id)

    def ancestors(self, span: ReadableSpan) -> list[str]:
        """Names from its parent up to the root."""
        names = []
        while span.parent is not None:
            span = self.parent(span)
            names.append(span.name)
        return names


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, data: Path) -> Iterator[Seen]:
    folder, written, exporter = tmp_path_factory.mktemp("seen"), io.StringIO(), InMemorySpanExporter()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonLines("both"))
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    port = free_port()
    pages: list[str] = []

    def scrape(run: Run) -> None:
        if run.at.iteration == LAST:
            pages.append(httpx.get(f"http://127.0.0.1:{port}/metrics").text)

    with pytest.MonkeyPatch.context() as patch, EmbeddedBroker() as broker:
        patch.setattr(logging.root, "handlers", [handler])
        level = logging.root.level
        logging.root.setLevel(logging.INFO)
        tracing.use(provider)
        try:
            with serving_both(folder, broker.url, checkpoint, data) as (service, url):
                settings = {"iterations": LAST + 1, "metrics_port": port}
                run_training(trainer_config(folder / "runs", data, url, **settings), broker.url, scrape)
                httpx.post(f"{url}/v1/images/generations", json={"prompt": "alpha"}).raise_for_status()
                pages.append(service.metrics().decode())
        finally:
            tracing.use(None)
            logging.root.setLevel(level)
    yield Seen([json.loads(line) for line in written.getvalue().splitlines()], exporter.get_finished_spans(), pages)


# ---------------------------------------------------------------- logs


def test_every_line_about_a_unit_names_run_feedback_unit_and_request_on_both_sides(seen: Seen):
    lines = [line for line in seen.lines if line["logger"] == "units"]
    by_unit: dict[str, list[dict]] = {}
    for line in lines:
        by_unit.setdefault(line["unit"], []).append(line)
    assert by_unit
    for unit, told in by_unit.items():
        assert sorted(line["message"] for line in told) == ["admitted", "claimed", "made", "published"]
        for line in told:
            assert line["run"] == "run" and unit.startswith(f"run.{line['feedback']}.")
            assert line["request_id"] == f"run.{line['feedback']}"


def test_the_service_logs_the_trainers_request_under_the_trainers_id(seen: Seen):
    lines = [line for line in seen.lines if line["logger"] == "access" and line["route"] == "/v1/feedback"]
    assert [line["request_id"] for line in lines] == [f"run.{iteration}" for iteration in range(2, LAST + 1)]
    assert {line["status"] for line in lines} == {202}


# ---------------------------------------------------------------- traces


def test_one_trace_goes_from_the_iteration_through_http_and_queue_to_the_admission(seen: Seen):
    admissions = seen.named("admit")
    assert admissions
    for admission in admissions:
        way = ["unit", "plan", "POST /v1/feedback", "feedback", "iteration"]
        assert seen.ancestors(admission) == way
        assert {span.context.trace_id for span in (admission, seen.parent(admission))} == {admission.context.trace_id}


def test_spans_of_a_unit_say_what_was_made_and_when(seen: Seen):
    assert len(seen.named("unit")) >= LAST - 1  # iterations that asked
    for unit in seen.named("unit"):
        inside = [span.name for span in seen.spans if span.parent and span.parent.span_id == unit.context.span_id]
        assert sorted(inside) == ["admit", "denoise", "publish"]
        assert unit.attributes["run"] == "run" and unit.attributes["rows"] > 0
        assert unit.attributes["weights"].startswith("base@1") and unit.attributes["request_id"].startswith("run.")
    denoised = {span.parent.span_id for span in seen.named("denoise")}
    linked = {link.context.span_id for span in seen.named("batch") for link in span.links}
    assert denoised == linked  # each batch on the GPU points to those it worked for


def test_the_phases_of_an_iteration_are_spans_in_it(seen: Seen):
    iterations = {span.attributes["iteration"]: span.context.span_id for span in seen.named("iteration")}
    assert list(iterations) == list(range(LAST + 1))
    for phase in ("score", "wait", "vog", "train", "evaluate", "save"):
        spans = seen.named(phase)
        assert {span.attributes["iteration"] for span in spans} >= {2, LAST}
        assert all(span.parent.span_id == iterations[span.attributes["iteration"]] for span in spans)


# ---------------------------------------------------------------- metrics


SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}


def exposed(pages: list[str]) -> dict[str, set[str] | None]:
    """Series name -> names of its labels, as the pages have them; None: it is announced and has no value yet."""
    found: dict[str, set[str] | None] = {}
    for family in (family for page in pages for family in text_string_to_metric_families(page)):
        found |= {f"{family.name}{ending}": None for ending in SERIES.get(family.type, ("",))}
        found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def value(page: str, series: str) -> float:
    return float(re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)[1])


def test_the_trainers_page_says_where_the_run_is(seen: Seen):
    page = seen.pages[0]  # after the first update of the last iteration
    assert value(page, 'onthefly_trainer_iteration{run="run"}') == LAST
    assert value(page, 'onthefly_trainer_updates{run="run"}') > 0
    assert value(page, 'onthefly_trainer_answer_lag_iterations{run="run"}') == 0  # mode sync
    assert 0 <= value(page, 'onthefly_trainer_accuracy{run="run",split="train"}') <= 1
    assert value(page, 'onthefly_trainer_loss{rows="real",run="run"}') > 0
    assert value(page, 'onthefly_trainer_phase_seconds_total{phase="train",run="run"}') > 0
    trained = value(page, 'onthefly_trainer_samples_total{fate="trained",run="run"}')
    assert trained > 0 and value(page, 'onthefly_trainer_samples_total{fate="vog",run="run"}') > 0


def test_the_services_page_counts_units_waits_and_the_broker(seen: Seen):
    page = seen.pages[-1]
    units = len(seen.named("unit"))
    assert value(page, 'onthefly_units_total{outcome="published"}') == units
    assert value(page, "onthefly_unit_queued_seconds_count") == units
    assert value(page, "onthefly_publish_seconds_count") == units
    assert value(page, 'onthefly_wait_seconds_count{lane="queue"}') == units
    assert value(page, 'onthefly_wait_seconds_count{lane="request"}') == 1
    assert value(page, 'onthefly_request_seconds_count{method="POST",route="/v1/feedback"}') == LAST - 1
    assert value(page, "onthefly_broker_up") == 1
    assert value(page, "process_resident_memory_bytes") > 1e6
    assert 'onthefly_build_info{python="' in page


# ---------------------------------------------------------------- dashboard


def panels() -> list[dict]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Every query with Grafana's variables filled in."""
    filled = {"$__rate_interval": "5m", "$__range": "1h"}
    texts = [target["expr"] for panel in panels() for target in panel["targets"]]
    for variable in DASHBOARD["templating"]["list"]:
        filled[f"${variable['name']}"] = ".*"
        if variable["type"] == "query":
            inner = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            texts.append(f"sum by ({inner[2]}) ({inner[1]})")
    for name, text in filled.items():
        texts = [query.replace(name, text) for query in texts]
    assert not [query for query in texts if "$" in query]
    return texts


def selected(text: str) -> list[tuple[str, set[str]]]:
    """Series names of a query, each with the labels it is chosen by."""
    found = []

    def enter(expression: object) -> bool:
        if isinstance(expression, promql_parser.VectorSelector):
            found.append((expression.name, {matcher.name for matcher in expression.matchers.matchers}))
        return True

    promql_parser.walk(promql_parser.parse(text), enter)
    return found


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_asks_for_what_is_there(query: str, seen: Seen):
    known = exposed(seen.pages)
    chosen = selected(query)
    assert chosen
    scraped = {"job", "instance"}
    grouped = {name.strip() for text in re.findall(r"\bby \((.*?)\)", query) for name in text.split(",")}
    for name, labels in chosen:
        assert name in known
        assert known[name] is None or labels | grouped <= known[name] | scraped


def test_every_metric_of_ours_is_on_the_dashboard(seen: Seen):
    shown = {name for query in queries() for name, _ in selected(query)}
    for page in seen.pages:
        for family in text_string_to_metric_families(page):
            if family.name.startswith("onthefly_") and not family.name.endswith("_created"):
                series = {f"{family.name}{ending}" for ending in SERIES.get(family.type, ("",))}
                assert series & shown, family.name
