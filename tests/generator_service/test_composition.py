"""Prompts of clips: from feedback through first frames and emotions to samples, on a real broker."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from agent.expressions.action_units import named
from agent.expressions.compose import TemplateComposer
from agent.expressions.knowledge import KnowledgeBase
from agent.expressions.settings import ExpressionsConfig
from agent.settings import AgentConfig
from generator_service import registry
from generator_service.composition import composed, composer
from generator_service.expressions import Expressions
from generator_service.faces.interface import FacesConfig
from generator_service.language.vision_chat import VisionChat
from generator_service.service import Service
from protocol import codec
from protocol.bus import Bus, QueueConfig
from protocol.dataset import Dataset, DatasetConfig
from protocol.entries import SampleBatch
from protocol.errors import ConfigError, UnknownClass
from protocol.messages import WeightsRef
from tests.agent.fake_endpoint import Reply, endpoint, said
from tests.generator_service.faces.drawn import RedReader
from tests.generator_service.language.tiny_language import save_vision_chat
from tests.generator_service.scripted_clips import ScriptedClips, clips, publish_policy
from tests.generator_service.test_queue_worker import RUN, batches, images, work_row, work_unit
from tests.generator_service.test_queue_worker import bus as bus
from tests.generator_service.tiny_service import make_service, served, started

CLASSES = ("Angry", "Fear", "Neutral")
WEIGHTS = WeightsRef(name="base", version=1, digest="x")
TEMPLATE = TemplateComposer(KnowledgeBase.open(ExpressionsConfig()), ExpressionsConfig())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of three clips of noise that turns redder; every clip has a caption."""
    root, rng, lines = tmp_path_factory.mktemp("faces"), np.random.default_rng(0), []
    for name in CLASSES:
        for number in range(3):
            clip = root / name / f"clip{number}"
            clip.mkdir(parents=True)
            for frame in range(3):
                noise = rng.integers(40, 200, (8, 8, 3), dtype=np.uint8)
                noise[..., 0] = (90, 30, 150)[frame]
                Image.fromarray(noise).save(clip / f"{frame}.png")
            lines.append({"file_name": f"{name}/clip{number}", "label": name, "caption": f"person {name} {number}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def dataset(root: Path) -> Dataset:
    return Dataset.open(DatasetConfig(root=root, layout="clips"))


@pytest.fixture
def settings(root: Path, clip_settings: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(ScriptedClips, "prompt_length", lambda self, prompt: (len(prompt.split()), 70))
    return clip_settings | {"dataset": {"root": root, "layout": "clips"}}


def served_by(folder: Path, queue_url: str, settings: dict, **expressions) -> Service:
    config = make_service(folder, queue_url, **settings).config
    chosen = {"images_per_sample": 2, "expressions": {"frames": 4, "steps": 1, "clips_per_unit": 4} | expressions}
    return Service(config, AgentConfig.model_validate(chosen), QueueConfig(url=queue_url, lease_idle_s=1.0))


def feedback(number: int = 0, *, fear: int = 5, angry: int = 0, **fields) -> dict:
    wanted = (("Fear", 1, fear), ("Angry", 0, angry))
    classes = [{"label": label, "class_name": name, "images": n} for name, label, n in wanted if n]
    return {"run": RUN, "feedback": number, "model_version": 7, "classes": classes} | fields


def answered(url: str, bus: Bus, asked: dict) -> list[SampleBatch]:
    reply = httpx.post(f"{url}/v1/feedback", json=asked)
    assert reply.status_code == 202, reply.text
    return batches(bus, reply.json()["units"])


# ---------------------------------------------------------------- one unit


def test_rows_get_their_prompts_and_the_rest_stays():
    rows = [work_row(n, class_name="Fear", caption=f"person {n}") for n in range(3)]
    final = composed(work_unit(0, WEIGHTS, *rows, expressions=True), TEMPLATE, None, lambda row: np.zeros(1))
    changed = {"prompt", "prompt_by", "action_units"}
    assert [r.model_dump(exclude=changed) for r in final.rows] == [r.model_dump(exclude=changed) for r in rows]
    assert not final.expressions and {row.prompt_by for row in final.rows} == {"template"}
    for number, row in enumerate(final.rows):
        assert "fear" in row.prompt and f"erson {number}" in row.prompt and row.action_units
    assert composed(final, TEMPLATE, None, lambda row: np.zeros(1)) is final


def test_prompts_that_are_final_stay_and_units_of_others_too():
    done = work_row(0, class_name="Fear", prompt="as it is", prompt_by="qwen", action_units=["AU01"])
    unit = work_unit(0, WEIGHTS, done, work_row(1, class_name="Fear"), expressions=True)
    final = composed(unit, TEMPLATE, None, lambda row: np.zeros(1))
    assert final.rows[0] == done and final.rows[1].prompt_by == "template"
    assert composed(unit, None, None, lambda row: np.zeros(1)) is unit
    plain = work_unit(0, WEIGHTS, work_row(0))
    assert composed(plain, TEMPLATE, None, lambda row: np.zeros(1)) is plain


def test_the_composer_is_as_set(tmp_path: Path):
    class Short:
        def prompt_length(self, prompt: str) -> tuple[int, int]:
            return len(prompt.split()), 9

    made = composer(ExpressionsConfig(), Short(), lambda what, many: None)
    assert isinstance(made, TemplateComposer)
    rows = [work_row(number, class_name="Fear") for number in range(9)]
    final = composed(work_unit(0, WEIGHTS, *rows, expressions=True), made, None, lambda row: np.zeros(1))
    assert all(len(row.prompt.split()) <= 9 for row in final.rows)
    with pytest.raises(ConfigError, match=r"agent\.expressions\.local\.model: missing"):
        composer(ExpressionsConfig(composer="local"), Short(), lambda what, many: None)
    with pytest.raises(ConfigError, match=r"agent\.expressions\.openai\.url"):
        composer(ExpressionsConfig(composer="openai", openai={"url": "nowhere"}), Short(), lambda what, many: None)


def test_a_model_on_this_machine_that_says_nothing_of_use_is_helped_out(tmp_path: Path):
    local = {"model": str(save_vision_chat(tmp_path)), "device": "cpu", "max_new_tokens": 3}
    counts: dict[str, int] = {}

    class AnyLength:
        def prompt_length(self, prompt: str) -> None:
            return None

    config = ExpressionsConfig(composer="local", local=local, rounds=2)
    made = composer(config, AnyLength(), lambda what, many: counts.update({what: counts.get(what, 0) + many}))
    assert isinstance(made._model, VisionChat)
    rows = [work_row(number, class_name="Fear") for number in range(2)]
    unit = work_unit(0, WEIGHTS, *rows, expressions=True)
    frame = np.zeros((16, 16, 3), dtype=np.uint8)
    assert composed(unit, made, None, lambda row: frame) == composed(unit, TEMPLATE, None, lambda row: frame)
    assert counts == {"answers": 4, "format": 4, "template": 2}


# ---------------------------------------------------------------- first frames


class Reader(RedReader):
    """One that can be named in settings."""

    def __init__(self, config: Config):
        super().__init__()


class Config(BaseModel):
    pass


GATES = {"min_side": 4, "min_sharpness": 0.0, "min_contrast": 0.0, "min_brightness": 0.0, "unit_threshold": 0.2}


def test_neutral_frames_and_statistics_come_from_the_reader(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(registry.FACE_READERS, "red", f"{__name__}:Reader")
    faces = FacesConfig.model_validate(GATES | {"reader": "red", "folder": tmp_path / "faces"})
    opened = Expressions.open(ExpressionsConfig(), faces, dataset, None)
    assert [(one.sample_id, one.frame, one.class_name, one.caption) for one in opened.identities] == [
        (entry.id, 1, entry.class_name, entry.caption) for entry in dataset.samples
    ]
    mined = opened.composer.knowledge.of("Fear")[-1]
    assert dict(mined.units) == {"AU12": pytest.approx(150 / 255, abs=1e-3)}
    assert len(opened.composer.knowledge.of("Fear")) == len(TEMPLATE.knowledge.of("Fear")) + 1


def test_without_a_reader_clips_begin_with_first_frames(dataset: Dataset):
    opened = Expressions.open(ExpressionsConfig(), None, dataset, None)
    assert {one.frame for one in opened.identities} == {0} and len(opened.identities) == 9
    assert Expressions.open(ExpressionsConfig(), None, None, None).identities == []


# ---------------------------------------------------------------- the whole way


@pytest.fixture
def template_service(tmp_path: Path, settings: dict, queue_url: str) -> Iterator[Service]:
    with started(served_by(tmp_path, queue_url, settings)) as service:
        yield service


def test_a_shortage_becomes_clips_of_that_emotion(template_service: Service, bus: Bus, dataset: Dataset):
    with served(template_service) as url:
        found = answered(url, bus, feedback(fear=5, angry=2))
        metrics = httpx.get(f"{url}/metrics").text
    samples = [sample for batch in found for sample in batch.samples]
    assert [len(batch.samples) for batch in found] == [4, 3]
    assert [(s.class_name, s.label) for s in samples] == [("Fear", 1)] * 5 + [("Angry", 0)] * 2
    neutral = {entry.id: entry.caption for entry in dataset.samples if entry.class_name == "Neutral"}
    assert {sample.init_id for sample in samples} == neutral.keys()
    for sample, clip in zip(samples, np.concatenate([images(batch) for batch in found]), strict=True):
        emotion = {"Fear": "fear", "Angry": "anger"}[sample.class_name]
        assert emotion in sample.prompt and neutral[sample.init_id].lower() in sample.prompt.lower()
        assert named(sample.prompt) == [] and sample.action_units and sample.prompt_by == "template"
        assert (sample.frames, sample.fps, sample.steps, sample.guidance_scale) == (4, 8.0, 1, 9.0)
        np.testing.assert_array_equal(clip[0], dataset.image(sample.init_id, 0))
    asked = [row.prompt for rows, _ in clips(template_service).asked[1:] for row in rows]
    assert sorted(asked) == sorted(sample.prompt for sample in samples)  # units may overtake each other
    assert "onthefly_prompts_total" in metrics and all(batch.captions_s > 0.0 for batch in found)


def test_a_marginal_sample_becomes_clips_of_its_class(template_service: Service, bus: Bus, dataset: Dataset):
    entry = dataset.samples[0]
    sample = {"sample_id": entry.id, "label": 0, "class_name": "Angry", "score": 0.1}
    with served(template_service) as url:
        (batch,) = answered(url, bus, feedback(fear=0, samples=[sample]))
        wrong = httpx.post(f"{url}/v1/feedback", json=feedback(1, samples=[sample | {"label": 2}]))
        pixels = httpx.post(f"{url}/v1/feedback", json=feedback(2, samples=[sample | {"pixels": "AAAA"}]))
    assert [(s.source_id, s.class_name, s.index) for s in batch.samples] == [(entry.id, "Angry", n) for n in (0, 1)]
    assert all(s.init_id != entry.id for s in batch.samples)
    assert wrong.json()["error"]["code"] == "unknown_class" and wrong.status_code == 422
    assert "clips begin with a neutral frame" in pixels.json()["detail"]


def test_the_policy_of_the_weights_is_asked_where_there_is_one(template_service: Service, bus: Bus):
    chooser = publish_policy(template_service.loaded.weights)
    with served(template_service) as url:
        (batch,) = answered(url, bus, feedback(fear=2, model=str(chooser.ref)))
    assert {sample.policy for sample in batch.samples} == {True}
    assert {sample.steps for sample in batch.samples} <= {5, 20}


def test_prompts_of_the_fixed_arm_stand_as_they_are(tmp_path: Path, settings: dict, queue_url: str, bus: Bus):
    service = served_by(tmp_path, queue_url, settings, composer="fixed", fixed_prompt="{class_name}!", policy=False)
    with started(service), served(service) as url:
        (batch,) = answered(url, bus, feedback(fear=2))
    assert {(s.prompt, s.prompt_by, tuple(s.action_units)) for s in batch.samples} == {("Fear!", None, ())}


def test_a_class_that_is_no_emotion_is_refused_when_it_is_asked_for(
    tmp_path: Path, settings: dict, queue_url: str, root: Path
):
    shown = tmp_path / "named"
    shown.mkdir()
    for own, name in zip(("One", "Two", "Neutral"), CLASSES, strict=True):
        (shown / own).symlink_to(root / name)
    data = {"root": shown, "layout": "clips", "links_to": [root]}
    asked = feedback(classes=[{"label": 1, "class_name": "One", "images": 1}])
    with started(served_by(tmp_path, queue_url, settings | {"dataset": data})) as service, served(service) as url:
        reply = httpx.post(f"{url}/v1/feedback", json=asked)
    assert reply.status_code == 422 and "agent.expressions.aliases" in reply.json()["detail"]
    assert reply.json()["error"]["code"] == UnknownClass.code


def test_another_replica_makes_the_same_prompts(tmp_path: Path, settings: dict, queue_url: str, bus: Bus):
    """What the first was told of these very samples is used, though the second's model would say something else."""

    def prompts(replica: str, how: str) -> list[tuple]:
        def answer(body: dict) -> Reply:
            text, image = (part for part in body["messages"][0]["content"])
            assert codec.image_from_base64(image["image_url"]["url"]).shape == (8, 8, 3)
            codes = re.findall(r"AU\d\d", text["text"].rsplit("Cite no", 1)[1])[:2]
            changes = ", ".join(f"something moves {how} ({code})" for code in codes)
            return said(f"Identity: male, {how} hair; Expression: fear; {changes}")

        with endpoint(answer) as model:
            openai = {"url": model.url, "model": "qwen"}
            service = served_by(tmp_path / replica, queue_url, settings, composer="openai", openai=openai)
            unit = work_unit(0, WEIGHTS, *ROWS, expressions=True)
            with started(service):
                loaded = service.loaded
                made = composed(
                    unit, loaded.expressions.composer, bus.captions, lambda row: loaded.dataset.image(row.label)
                )
                assert loaded.expressions.composer.hallucination_rate() == 0.0
        return [(row.prompt, row.prompt_by, row.action_units) for row in made.rows]

    first = prompts("one", "short")
    assert first == prompts("two", "long")
    assert all(by == "qwen" and "a man with short hair: something moves short" in prompt for prompt, by, _ in first)


ROWS = [work_row(n, class_name="Fear", label=n) for n in range(3)]
