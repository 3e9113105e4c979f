"""The operators' page in a real browser, over two real replicas and what a real training run left.

Set ONTHEFLY_SCREENSHOTS to a folder to look at it.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from generator_service.service import Service
from generator_service.showcase import moving_thumbnail
from protocol import codec, keys
from protocol.broker import EmbeddedBroker, connect
from protocol.bus import Bus, QueueConfig
from protocol.bus_failure import letter
from protocol.entries import WorkRow, WorkUnit
from protocol.errors import GenerationFailed
from protocol.messages import WeightsRef
from protocol.operations import ShownSample
from protocol.video import GuidanceCurve
from tests.generator_service.tiny_service import make_service, served
from tests.system.whole import run_training, serving_both, trainer_config
from trainer import record

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tested")

PATIENCE_MS = 15_000
expect = sync_api.expect  # never page.wait_for_function: it evaluates text, which the page's policy forbids
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror='window.hacked=1'>"
KEY = "open sesame"

expect.set_options(timeout=PATIENCE_MS)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: the page is not tested in a browser")


@dataclass
class Site:
    url: str
    broker: str
    services: list[Service]
    rows: list[dict]  # of metrics.jsonl
    bus: Bus = field(repr=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Site]:
    """Weights adapted to a class with a hostile name, and a run that used them."""
    folder = tmp_path_factory.mktemp("site")
    data = _write_dataset(folder / "data")
    more = {"weights_dir": folder / "weights"}
    with (
        EmbeddedBroker() as broker,
        serving_both(folder / "a", broker.url, checkpoint, data, **more) as (first, url),
        serving_both(folder / "b", broker.url, checkpoint, data, **more) as (second, _),
    ):
        with httpx.Client(base_url=url, timeout=60) as client:
            job = {"type": "adapt", "name": "odd", "steps": 3, "batch_size": 4, "learning_rate": 0.1}
            submitted = client.post("/v1/jobs", json=job).json()
            client.get(f"/v1/jobs/{submitted['id']}/events")
            assert client.post("/v1/weights/odd/activate").status_code == 200
        config = trainer_config(folder / "runs", data, url, run="night", iterations=4)
        run_training(config, broker.url)
        bus = Bus(broker.url, QueueConfig(url=broker.url))
        yield Site(url, broker.url, [first, second], record.rows(config.folder / "metrics.jsonl"), bus)
        bus.close()


def _write_dataset(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("alpha", "beta", HOSTILE):
        (root / name).mkdir(parents=True)
        for index in range(4):
            grey = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(grey).save(root / name / f"{index}.png")
    return root


def die(site: Site, number: int, weights: WeightsRef) -> WorkUnit:
    """A dead letter about a unit that could be made."""
    row = {"sample_id": f"{number:032x}", "source_id": f"class:{HOSTILE}", "index": 0, "seed": number}
    row |= {"label": 2, "class_name": HOSTILE, "prompt": HOSTILE, "guidance_scale": 2.0}
    unit = WorkUnit(
        id=f"lost.0.{number}.x",
        run="lost",
        feedback=0,
        unit=number,
        units=2,
        model_version=0,
        weights=weights,
        steps=4,
        scheduler="ddim",
        strength=1.0,
        rows=[WorkRow(**row)],
    )
    problem = GenerationFailed(f"it failed with {HOSTILE}").to_problem()
    with connect(site.broker) as client:
        client.xadd(keys.DEAD, {"body": letter(keys.WORK, unit.model_dump_json(), 5, problem).model_dump_json()})
    return unit


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def tab(browser: sync_api.Browser, url: str, width: int = 1280, **options) -> Iterator[sync_api.Page]:
    """The page at `url`; it must ask nobody else for anything, and complain of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    complaints, elsewhere = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def note(request: sync_api.Request) -> None:
        if not request.url.startswith((url, "data:")):
            elsewhere.append(request.url)

    page.on("request", note)
    page.goto(url)
    yield page
    context.close()
    assert elsewhere == []
    assert complaints == []


@pytest.fixture
def page(browser, site: Site) -> Iterator[sync_api.Page]:
    with tab(browser, site.url) as page:
        page.locator("#connection.live").wait_for()
        yield page


def shot(page: sync_api.Page, name: str) -> None:
    if folder := os.environ.get("ONTHEFLY_SCREENSHOTS"):
        page.wait_for_timeout(2500)
        page.screenshot(path=Path(folder) / f"page-{name}.png", full_page=True)


def look(page: sync_api.Page) -> None:
    """Have the page look at everything now, not in a few seconds."""
    page.evaluate("dispatchEvent(new Event('hashchange'))")


def text(page: sync_api.Page, where: str) -> str:
    return page.locator(where).inner_text()


# ---------------------------------------------------------------- what it shows


def test_it_shows_the_run_and_the_fleet(page: sync_api.Page, site: Site):
    page.get_by_role("heading", name="night").wait_for()
    run, last = text(page, "#run"), site.rows[-1]
    assert "done" in run and "all 4 iterations" in run
    assert f"train top-1\n{100 * last['train_top1']:.1f} %" in run
    assert f"updates\n{last['updates']}" in run
    kept = last["candidates"] - last["near_copies"] - last["vog_dropped"]
    assert f"{kept:.0f} of {last['candidates']:.0f}" in run
    told = site.bus.board.run("night")
    assert f"trainer idle\n{100 * told.trainer_idle:.0f} %" in run
    assert f"generators idle\n{100 * told.generator_idle:.0f} %" in run
    page.get_by_text("As a table").click()
    table = page.locator("#accuracy table tbody tr")
    assert [row.split()[0] for row in table.all_inner_texts()] == ["1", "2", "3", "4"]
    assert page.locator("#accuracy svg circle.second").count() == 4
    for service in site.services:
        assert service.membership.now().name in text(page, "#replicas")
    assert text(page, "#replicas").count("odd@1") == 2
    assert page.locator("#weights tr.active").inner_text().startswith("odd@1")
    assert page.get_by_text("waiting", exact=True).first.is_visible()
    shot(page, "desktop")


def test_names_are_shown_as_they_are_and_never_run(page: sync_api.Page, site: Site):
    die(site, 1, site.services[0].loaded.weights.resolve("odd").ref)
    look(page)
    page.locator("#dead tbody tr").first.wait_for()
    assert f"it failed with {HOSTILE}" in text(page, "#dead")
    assert HOSTILE in text(page, "#hard"), "the run's hard samples include one of this class"
    page.locator(".card", has_text=HOSTILE).locator("button").first.click()
    assert HOSTILE in text(page, "#dialog")
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None
    with connect(site.broker) as client:
        client.delete(keys.DEAD)


def test_where_a_sample_came_from(page: sync_api.Page, site: Site):
    thumbnail = page.locator("#hard button").first
    thumbnail.focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Where this sample came from").wait_for()
    shown = dict(
        zip(
            page.locator("#dialog dt").all_inner_texts(),
            page.locator("#dialog dd").all_inner_texts(),
            strict=True,
        )
    )
    (sample,) = [one.sample for one in site.bus.board.samples("night", 100) if one.sample.id == shown["sample"]]
    told = site.bus.board.run("night")
    assert (shown["seed"], shown["prompt"], shown["source"]) == (str(sample.seed), sample.prompt, sample.source_id)
    assert shown["weights"] == f"odd@1 ({sample.weights.digest[:12]})"
    assert (shown["strength"], shown["guidance"], shown["steps"]) == ("0.5", "2", "4, ddim")
    assert shown["nearest real"] == sample.nearest_real
    assert shown["distance to it"].startswith(f"{sample.nearest_distance:.4f}")
    assert shown["source's score"] == f"{told.hard[0].score:.4f}"
    pictures = page.locator("#dialog img")
    assert pictures.count() == 3
    expect(page.locator("#dialog img.pending")).to_have_count(0)
    decoded = "async (image) => { await image.decode(); return image.naturalWidth; }"
    assert [picture.evaluate(decoded) for picture in pictures.all()] == [8, 8, 8]
    shot(page, "dialog")
    before, name = page.locator("#hard button").count(), thumbnail.get_attribute("data-key")
    (newest,) = site.bus.board.samples("night", 1, [sample.source_id])
    another = newest.model_copy(update={"sample": newest.sample.model_copy(update={"id": "f" * 32})})
    site.bus.board.show("night", [another])  # so that the list behind the dialog is made anew
    look(page)
    expect(page.locator("#hard button")).to_have_count(before + 1)
    page.keyboard.press("Escape")
    expect(page.locator("#dialog")).to_be_hidden()
    assert page.evaluate("document.activeElement.dataset.key") == name


def test_a_clip_moves_and_tells_how_it_was_made(page: sync_api.Page, site: Site):
    source = site.bus.board.run("night").hard[0].sample_id
    (newest,) = site.bus.board.samples("night", 1, [source])
    told = {"frames": 4, "fps": 2.0, "guidance": GuidanceCurve(a=3.0), "steps": 15, "policy": True}
    told |= {"id": "c" * 32, "action_units": ["AU06", "AU12"], "init_id": source, "init_frame": 0}
    levels = np.array([20, 200, 20, 200], dtype=np.uint8)
    clip = levels[:, None, None, None] * np.ones((1, 8, 8, 3), dtype=np.uint8)
    picture = base64.b64encode(moving_thumbnail(clip, 2.0)).decode("ascii")
    shown = ShownSample(sample=newest.sample.model_copy(update=told), thumbnail=picture, media_type="image/webp")
    site.bus.board.show("night", [shown])
    look(page)
    thumbnail = page.locator(f'#hard button[data-key="sample {"c" * 32}"]')
    thumbnail.click()
    rows = dict(zip(*(page.locator(f"#dialog {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert (rows["frames"], rows["guidance"], rows["steps"]) == ("4, 2 a second", "7 to 11, a = 3, b = 2", "15, ddim")
    assert (rows["chosen by"], rows["action units"]) == ("the policy of the weights", "AU06, AU12")
    assert rows["begins with"] == source and "strength" not in rows
    made = page.locator("#dialog figure", has_text="made").locator("img").last
    assert made.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") == 8
    seen: set[bool] = set()
    while len(seen) < 2:  # dark and bright frames take turns
        seen.add(bool(codec.image_from_bytes(made.screenshot()).mean() > 100))
    page.keyboard.press("Escape")


# ---------------------------------------------------------------- what it does


def test_weights_are_activated_on_all_replicas(page: sync_api.Page, site: Site):
    for ref in ("base@1", "odd@1"):
        page.get_by_role("button", name=f"Activate {ref}").click()
        page.get_by_role("button", name="Activate", exact=True).last.click()
        page.get_by_text(f"{ref} is active on all replicas").wait_for()
        assert {str(service.loaded.weights.active().ref) for service in site.services} == {ref}
        expect(page.locator("#replicas tbody tr", has_text=ref)).to_have_count(2)


def test_dead_letters_are_retried_and_dropped(page: sync_api.Page, site: Site):
    weights = site.services[0].loaded.weights.resolve("odd").ref
    good, bad = die(site, 2, weights), die(site, 3, weights)
    look(page)
    page.get_by_role("button", name=f"Retry {good.id}").click()
    page.get_by_text(f"{good.id} is on the queue again").wait_for()
    while (delivery := site.bus.next_batch("lost", "test", 1.0)) is None:
        pass
    assert (delivery.message.unit_id, delivery.message.error) == (good.id, None)
    site.bus.ack_batch(delivery)
    page.get_by_role("button", name=f"Drop {bad.id}").click()
    page.get_by_role("button", name="Cancel").click()
    assert site.bus.dead.newest().total == 1
    page.get_by_role("button", name=f"Drop {bad.id}").click()
    page.get_by_role("button", name="Drop", exact=True).last.click()
    page.get_by_text(f"{bad.id} is dropped").wait_for()
    page.locator("#dead", has_text="None.").wait_for()
    assert site.bus.dead.newest().total == 0


def test_a_service_with_a_key_asks_for_it(browser, tmp_path: Path, site: Site):
    service = make_service(tmp_path, site.broker, api_key=KEY)
    with served(service) as url, httpx.Client(base_url=url) as client:
        assert client.get("/v1/runs").status_code == 401
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        for attempt in ("wrong", KEY):
            page.get_by_label("API key").fill(attempt)
            page.get_by_role("button", name="Use it").click()
            if attempt == "wrong":
                expect(page.get_by_label("API key")).to_have_value("")
        page.get_by_role("heading", name="night").wait_for()
        assert KEY not in page.content() and page.evaluate("document.cookie") == ""
        context.close()


def test_a_service_that_went_away_is_told_and_found_again(browser, tmp_path: Path, site: Site):
    service = make_service(tmp_path, site.broker)
    context = browser.new_context()
    page = context.new_page()
    with served(service) as url:
        page.goto(url)
        page.locator("#connection.live").wait_for()
    again = "document.dispatchEvent(new Event('visibilitychange'))"  # it waits longer and longer by itself
    page.evaluate(again)
    page.get_by_text("not reachable since").wait_for()
    assert page.get_by_role("heading", name="night").is_visible(), "what was known stays"
    with served(service, urlsplit(url).port):
        page.evaluate(again)
        page.locator("#connection.live").wait_for()
    context.close()


# ---------------------------------------------------------------- how it looks


@pytest.fixture
def dead_letter(site: Site) -> Iterator[None]:
    die(site, 4, site.services[0].loaded.weights.resolve("odd").ref)
    yield
    with connect(site.broker) as client:
        client.delete(keys.DEAD)


def test_nothing_is_wider_than_the_screen(dead_letter, page: sync_api.Page):
    page.locator("#dead tbody tr").first.wait_for()
    page.locator("#hard .card").first.wait_for()
    for width, name in ((768, "tablet"), (390, "phone"), (320, "small")):
        page.set_viewport_size({"width": width, "height": 900})
        shot(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#hard button").first.click()
        assert page.evaluate("document.getElementById('dialog').scrollWidth") <= width
        page.keyboard.press("Escape")


CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = numbers(getComputedStyle(at).backgroundColor);
      layers.unshift([r, g, b, a]);
    }
    return layers.reduce((under, [r, g, b, a]) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    const style = getComputedStyle(node);
    const ink = light(numbers(node instanceof SVGElement ? style.fill : style.color));
    const paper = light(ground(node));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    found.push([ratio, node.tagName + "." + node.getAttribute("class") + ": " + node.textContent.slice(0, 40)]);
  }
  return found;
}"""


def test_text_can_be_read(dead_letter, page: sync_api.Page):
    """WCAG AA: every text has a contrast of 4.5 at least; every control a name."""
    page.locator("#dead tbody tr").first.wait_for()
    page.locator("#hard .card").first.wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 60
        assert [entry for entry in contrasts if entry[0] < 4.5] == []
        shot(page, scheme)
    nameless = (
        "[...document.querySelectorAll('button, a, input')].filter((node) => !(node.ariaLabel ?? node.innerText))"
    )
    assert page.evaluate(f"{nameless}.length") == 0


# ---------------------------------------------------------------- its files


def test_its_files_are_cached_and_allow_nothing_foreign(site: Site):
    with httpx.Client(base_url=site.url) as client:
        for path, media_type in (
            ("/", "text/html"),
            ("/page/page.js", "text/javascript"),
            ("/page/page.css", "text/css"),
        ):
            first = client.get(path)
            assert first.status_code == 200 and first.headers["Content-Type"].startswith(media_type)
            policy = first.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy
            again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"If-None-Match": '"another"'}).status_code == 200
        for path in ("/page/nope.js", "/page/..%2fapp.py", "/page/__init__.py"):
            assert client.get(path).status_code == 404
