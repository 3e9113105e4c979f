from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from generator_service import registry
from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.published_models import PublishedModels
from generator_service.real_images import RealImages
from generator_service.rl import tune as tune_module
from generator_service.rl.reward_terms import reward_functions
from generator_service.rl.rewards import Bank, Generated
from generator_service.rl.tune import tune
from protocol.errors import ConfigError, GenerationFailed, InvalidRequest, TrainingDiverged, UnknownWeights
from protocol.messages import WeightsRef
from protocol.tuning import TuneJob
from tests.generator_service import tiny_sd
from tests.generator_service.published_file import published_file
from tests.generator_service.rl.tiny_policy import checkpoint, job
from tests.generator_service.tiny_dit import CLASSES, class_embedding, full, open_backend

SMALL = {"features": "timm:test_resnet", "features_size": 32, "checkpoint_every": 0, "grid_every": 0, "steps": 3}
ROWS = [Row(seed=1, label=2, guidance_scale=1.0)]


# ---------------------------------------------------------------- rewards of others


def dark(generated: Generated, bank: Bank, *, floor: float = 0.0) -> torch.Tensor:
    return 1 - torch.from_numpy(generated.images).float().mean((1, 2, 3)).clamp(min=floor) / 255


def nan(generated: Generated, bank: Bank) -> torch.Tensor:
    return torch.full((len(generated.labels),), math.nan)


def raises(generated: Generated, bank: Bank) -> torch.Tensor:
    raise ZeroDivisionError("no such thing")


def constant(generated: Generated, bank: Bank) -> torch.Tensor:
    return torch.ones(len(generated.labels))


OTHERS = registry.REWARDS | {name: f"{__name__}:{name}" for name in ("dark", "nan", "raises", "constant")}


def only(name: str) -> dict:
    return {"rewards": {name: {"weight": 1.0}}}


# ---------------------------------------------------------------- a run


def dataset(classes: int = len(CLASSES), per_class: int = 3, size: int = 8) -> RealImages:
    labels = np.repeat(np.arange(classes), per_class)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), size, size, 3), dtype=np.uint8)
    return RealImages(images, labels, [str(index) for index in range(len(labels))], [None] * len(labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dit"))


@pytest.fixture
def backend(folder):
    return open_backend(folder)


class Run:
    """A tune job in a folder of its own."""

    def __init__(self, backend, place: Path, wanted: TuneJob | None = None, base=None, real=None, classes=CLASSES):
        self.folder, self.unfinished = place / "result", place / ".unfinished-1"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.wanted = wanted or job(**SMALL)
        self.progress, self.made = [], []
        self.published = PublishedModels(place / "published")
        self.pieces = tune(
            backend,
            base or full(backend),
            dataset() if real is None else real,
            classes,
            self.wanted,
            self.folder,
            self.unfinished,
            rewards=reward_functions(self.wanted, OTHERS),
            published=self.published,
        )

    def __iter__(self):
        while True:
            try:
                progress = next(self.pieces)
            except StopIteration as end:
                self.kind, self.metadata = end.value
                return
            self.made.extend([progress.made] if progress.made else [])
            self.progress.extend([progress] if progress.loss is not None else [])
            yield progress

    def to_end(self) -> Run:
        for _ in self:
            pass
        return self

    def to_step(self, step: int, made: bool = False) -> Run:
        for progress in self:
            if progress.step == step and (progress.made if made else progress.loss is not None):
                break
        self.pieces.close()
        return self

    @property
    def files(self) -> dict[str, bytes]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}

    def told(self, name: str) -> list:
        return [progress.data[name] for progress in self.progress]


# ---------------------------------------------------------------- the result


@pytest.mark.parametrize("parameters", ["lora", "full"])
def test_the_result_is_a_weight_set_that_the_backend_serves(backend, tmp_path, parameters):
    before = backend.generate(full(backend), ROWS, Sampling(3, "ddim"))
    options = {"policy": {"parameters": parameters}, "update": {"learning_rate": 0.05}, "guard": {"kl_ceiling": 0}}
    run = Run(backend, tmp_path, job(**SMALL, **options)).to_end()
    ref = WeightsRef(name="tuned", version=1, digest="tuned")
    made = WeightSet(ref, "dit", run.kind, full(backend), CLASSES, run.folder, metadata=run.metadata)
    served = backend.generate(made, ROWS, Sampling(3, "ddim"))
    assert run.kind == {"lora": "lora", "full": "transformer"}[parameters]
    assert (served != before).any() and (backend.generate(full(backend), ROWS, Sampling(3, "ddim")) == before).all()
    told = run.metadata
    assert (told["step"], told["rollbacks"], told["stopped"]) == (3, 0, None)
    assert told["rewards"].keys() == {"semantic", "coverage", "expression"} and told["kl"] > 0
    assert told["features"]["name"] == "timm:test_resnet" and len(told["features"]["digest"]) == 64
    assert told["options"]["update"]["learning_rate"] == 0.05 and "name" not in told["options"]
    json.dumps(told, allow_nan=False)


def test_stable_diffusion_is_tuned_too(tmp_path):
    backend = tiny_sd.open_backend(tiny_sd.save_checkpoint(tmp_path / "sd"))
    real = dataset(2, size=tiny_sd.SIZE)
    options = {"rollout": {"identities": 2, "samples": 2, "guidance_scale": 2.0, "denoising_steps": 3}}
    base = tiny_sd.full(backend)
    run = Run(backend, tmp_path, job(**SMALL | {"steps": 2}, **options), base, real, ("cat, fat", "dog")).to_end()
    assert run.kind == "lora" and run.told("kl")[1] > run.told("kl")[0] == 0 and run.told("ratio") == [1, 1]


def test_events_tell_how_it_goes(backend, tmp_path):
    run = Run(backend, tmp_path, job(**SMALL | {"grid_every": 2, "steps": 4})).to_end()
    assert [(progress.step, progress.steps) for progress in run.progress] == [(step, 4) for step in range(1, 5)]
    for progress in run.progress:
        data = json.loads(json.dumps(progress.data, allow_nan=False))
        weights = {"semantic": 1.0, "coverage": 0.75, "expression": 0.25}
        total = sum(weights[name] * value for name, value in data["rewards"].items())
        assert data["total"] == pytest.approx(total) and 0 < data["rewards"]["semantic"] < 1
        assert data["ratio"] == 1 and data["clip_share"] == 0 and data["findings"] == []
        assert data["diversity"] > 0 and data["nearest"] > 0 and data["features_version"] is None
    assert run.told("kl")[0] == 0 < min(run.told("kl")[1:])
    assert ["grid" in progress.data for progress in run.progress] == [True, True, False, True]
    picture = Image.open(io.BytesIO(base64.b64decode(run.progress[0].data["grid"])))
    assert picture.format == "PNG" and picture.size == (8 * 8, 3 * 8)


def test_others_are_served_between_pieces_and_see_nothing_of_it(backend, tmp_path):
    """Any piece: the served pictures are those of the base, and what is tuned is what it would be without them."""
    straight = Run(backend, tmp_path / "a").to_end()
    before = backend.generate(full(backend), ROWS, Sampling(1, "ddim"))
    between = Run(backend, tmp_path / "b")
    served = [(backend.generate(full(backend), ROWS, Sampling(1, "ddim")) == before).all() for _ in between]
    assert len(served) > 3 * (2 * 3 + 2 * 3) and all(served)
    assert between.files == straight.files


def test_a_cold_started_base_keeps_its_classes(backend, tmp_path):
    classes = ("one", "two", "three", "four")
    rng = torch.Generator().manual_seed(0)
    tables = {
        name: torch.randn(5, table.shape[1], generator=rng)
        for name, table in backend.checkpoint(full(backend)).tables.items()
    }
    (tmp_path / "tables").mkdir()
    backend.save_tables(tables, full(backend), tmp_path / "tables")
    base = class_embedding(full(backend), tmp_path / "tables", classes)
    run = Run(backend, tmp_path, job(**SMALL), base, dataset(4), classes).to_end()
    ref = WeightsRef(name="tuned", version=1, digest="tuned")
    made = WeightSet(ref, "dit", run.kind, base, classes, run.folder)
    assert backend.generate(made, [Row(seed=1, label=3)], Sampling(2, "ddim")).shape == (1, 8, 8, 3)


# ---------------------------------------------------------------- resuming

KINDS = [
    {"update": {"baseline": "group"}},
    {"update": {"baseline": "value", "epochs": 2, "optimizer_steps": 2}, "policy": {"keep": "recompute"}},
    {"update": {"precision": "float16"}, "policy": {"parameters": "full"}, "guard": {"kl_ceiling": 1e-9}},
]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_it_ends_with_equal_bits(backend, folder, tmp_path, kind):
    guard = {"on_breach": "rollback", "rollbacks": 2} | kind.get("guard", {})
    wanted = job(**SMALL | {"checkpoint_every": 2, "steps": 5}, **kind | {"guard": guard})
    straight = Run(backend, tmp_path / "a", wanted).to_end()
    cut = Run(backend, tmp_path / "b", wanted).to_step(3)  # the third rollout is done twice
    resumed = Run(open_backend(folder), tmp_path / "b", wanted).to_end()
    assert resumed.progress[0].step == 3 and len(cut.progress) == 3
    assert resumed.files.keys() == straight.files.keys()
    for name in (name for name in straight.files if name.endswith("safetensors")):
        ends, other = load_file(straight.folder / name), load_file(resumed.folder / name)
        assert all(torch.equal(ends[key], other[key]) for key in ends)
    again = [progress.data for progress in resumed.progress]
    assert again == [progress.data for progress in straight.progress[2:]]
    same = ("step", "rewards", "kl", "first", "rollbacks", "stopped")
    assert {name: resumed.metadata[name] for name in same} == {name: straight.metadata[name] for name in same}


def test_a_checkpoint_of_another_base_or_job_is_not_gone_on_with(backend, tmp_path, caplog):
    wanted = job(**SMALL | {"checkpoint_every": 1})
    Run(backend, tmp_path, wanted).to_step(2)
    other = Run(backend, tmp_path, wanted, full(backend, name="other"))
    other.to_step(1)
    assert other.progress[0].step == 1 and "of another adaptation" in caplog.text


# ---------------------------------------------------------------- features that are published meanwhile


def publish(models: PublishedModels, place: Path, seed: int) -> int:
    models.uploads.mkdir(parents=True, exist_ok=True)
    (file := models.uploads / str(seed)).write_bytes(published_file(seed=seed))
    return models.publish("judge", file).version


def test_rewards_follow_the_model_that_a_trainer_publishes(backend, tmp_path):
    """From the next look on; a resumed job goes on with what its checkpoint was made with, and then looks."""
    options = {"features": "published:judge", "features_size": None, "refresh_every": 2, "checkpoint_every": 1}
    wanted = job(**SMALL | options | {"steps": 6})
    run = Run(backend, tmp_path, wanted)
    publish(run.published, tmp_path, seed=1)
    for progress in run:
        if progress.loss is not None and progress.step == 1:
            publish(run.published, tmp_path, seed=2)
        if progress.loss is not None and progress.step == 4:
            break
    run.pieces.close()
    assert run.told("features_version") == [1, 1, 2, 2]
    for seed in range(3, 9):  # more than are kept of a name; the one in the checkpoint stays
        publish(run.published, tmp_path, seed)
    kept = [model.version for model in run.published.list()]
    assert 2 in kept and 1 not in kept and 3 not in kept
    resumed = Run(backend, tmp_path, wanted).to_end()
    assert resumed.told("features_version") == [8, 8] and resumed.metadata["features"]["version"] == 8
    publish(run.published, tmp_path, 9)
    assert 2 not in [model.version for model in run.published.list()]  # nobody needs it any more


def test_without_checkpoints_no_older_version_is_held(backend, tmp_path):
    options = {"features": "published:judge", "features_size": None, "checkpoint_every": 0}
    run = Run(backend, tmp_path, job(**SMALL | options))
    publish(run.published, tmp_path, seed=1)
    for progress in run:
        if progress.loss is not None:
            pins = list(run.published.root.rglob("*.pin"))
            assert [pin.parent.name for pin in pins] == [str(progress.step)]
            publish(run.published, tmp_path, seed=progress.step + 1)
    assert list(run.published.root.rglob("*.pin")) == []


# ---------------------------------------------------------------- published on the way


def test_sets_are_published_on_the_way_and_tell_where_they_are_from(backend, tmp_path):
    options = {"update": {"learning_rate": 0.05}, "guard": {"kl_ceiling": 0}}
    run = Run(backend, tmp_path, job(**SMALL | {"publish_every": 2, "steps": 4}, **options))
    found = {}
    for progress in run:
        if progress.made:
            assert progress.step == 2 and progress.made.folder.is_relative_to(run.unfinished)
            found = load_file(progress.made.folder / "transformer_lora.safetensors")
    (made,) = run.made  # what is there after the last rollout is the result
    assert (made.kind, made.metadata["step"], made.metadata["rewards"]) == ("lora", 2, run.told("rewards")[1])
    last = load_file(run.folder / "transformer_lora.safetensors")
    assert found.keys() == last.keys() and any(not found[name].equal(last[name]) for name in found)


def test_a_set_that_nobody_took_is_told_again(backend, tmp_path):
    wanted = job(**SMALL | {"publish_every": 1, "checkpoint_every": 2, "steps": 4})
    cut = Run(backend, tmp_path, wanted).to_step(2, made=True)
    resumed = Run(backend, tmp_path, wanted).to_end()
    assert [made.metadata["step"] for made in cut.made] == [1, 2]
    assert [made.metadata["step"] for made in resumed.made] == [1, 2, 3] and resumed.progress[0].step == 3


def test_what_is_published_on_the_way_are_the_last_good_weights(backend, tmp_path):
    """Not those of the last update, of which nobody has seen a sample: here each is too far from the base."""
    guard = {"kl_ceiling": 1e-6, "on_breach": "rollback", "rollbacks": 2}
    options = SMALL | {"steps": 20, "guard": guard, "update": {"learning_rate": 0.04}}
    run = Run(backend, tmp_path / "a", job(**options | {"publish_every": 1}))
    for progress in run:
        if progress.made:
            tensors = load_file(progress.made.folder / "transformer_lora.safetensors")
            assert all((value == 0).all() for name, value in tensors.items() if "lora_B" in name)
    assert [made.metadata["step"] for made in run.made] == [1, 2, 3, 4, 5]
    straight = Run(backend, tmp_path / "b", job(**options)).to_end()
    assert straight.told("kl") == run.told("kl")  # it is not disturbed by that


def test_a_set_is_not_written_anew_while_somebody_publishes_it(backend, tmp_path):
    """A resumed job tells of it, and comes by its step again."""
    wanted = job(**SMALL | {"publish_every": 1, "checkpoint_every": 2, "steps": 4})
    Run(backend, tmp_path, wanted).to_step(3, made=True)
    third = tmp_path / ".unfinished-1" / "set-0000003"
    before = third.stat().st_ino
    resumed = Run(backend, tmp_path, wanted).to_end()
    assert [made.metadata["step"] for made in resumed.made] == [1, 2, 3] and third.stat().st_ino == before


def test_without_room_for_a_set_it_goes_on(backend, tmp_path, monkeypatch, caplog):
    from generator_service.rl.dit_policy import DiTPolicy

    real = DiTPolicy.save

    def save(self, folder):
        if "partial" in folder.name:
            raise OSError(28, "No space left on device")
        return real(self, folder)

    monkeypatch.setattr(DiTPolicy, "save", save)
    run = Run(backend, tmp_path, job(**SMALL | {"publish_every": 1})).to_end()
    assert run.made == [] and len(run.progress) == 3 and "no room left" in caplog.text


# ---------------------------------------------------------------- guard rails


def test_a_breach_ends_it_with_the_last_good_weights(backend, tmp_path):
    """The first rollout is as far from the base as nothing; what was learnt of it is too far."""
    learning = {"update": {"learning_rate": 0.05}}
    run = Run(backend, tmp_path / "a", job(**SMALL | {"steps": 9}, guard={"kl_ceiling": 1e-6}, **learning)).to_end()
    assert [progress.step for progress in run.progress] == [1, 2] and run.told("kl")[1] > 1e-6
    (finding,) = run.told("findings")[1]
    assert (finding["kind"], finding["breach"]) == ("kl", True) and "above the ceiling" in run.metadata["stopped"]
    tensors = load_file(run.folder / "transformer_lora.safetensors")
    assert all((value == 0).all() for name, value in tensors.items() if "lora_B" in name)  # the base again


def test_after_a_breach_it_goes_back_and_goes_on_at_half_the_rate(backend, tmp_path):
    guard = {"kl_ceiling": 1e-6, "on_breach": "rollback", "rollbacks": 2}
    run = Run(backend, tmp_path, job(**SMALL | {"steps": 20}, guard=guard, update={"learning_rate": 0.04})).to_end()
    far = [kl > 1e-6 for kl in run.told("kl")]
    assert far == [False, True, False, True, False, True]  # the third ends it
    assert run.told("learning_rate") == [0.04, 0.02, 0.02, 0.01, 0.01, 0.01]
    assert run.metadata["rollbacks"] == 2 and run.metadata["stopped"]


def test_the_floor_of_diversity(backend, tmp_path):
    """Samples that got alike: the bar is the first rollout's own diversity, which the next ones do not all reach."""
    run = Run(backend, tmp_path, job(**SMALL | {"steps": 12}, guard={"diversity_floor": 1.0})).to_end()
    last = run.progress[-1].data
    assert last["diversity"] < run.told("diversity")[0] and last["findings"][0]["kind"] == "diversity"


def test_samples_that_are_copies(backend, tmp_path):
    run = Run(backend, tmp_path, job(**SMALL, guard={"copy_distance": 1.0})).to_end()
    assert [found["kind"] for found in run.told("findings")[0]] == ["copies"] and len(run.progress) == 1


# ---------------------------------------------------------------- bad input


def test_a_reward_that_is_not_finite_or_raises_is_named(backend, tmp_path):
    with pytest.raises(GenerationFailed, match="'nan' is NaN or infinite"):
        Run(backend, tmp_path / "a", job(**SMALL, **only("nan"))).to_end()
    with pytest.raises(GenerationFailed, match="'raises' raised ZeroDivisionError"):
        Run(backend, tmp_path / "b", job(**SMALL, **only("raises"))).to_end()


@pytest.mark.parametrize("name", ["constant", "coverage"])
def test_rewards_without_variance_teach_nothing(backend, tmp_path, name):
    """All alike, or fewer than two identities to compare: documented as neutral."""
    options = {"update": {"kl": 0.0}, "rollout": {"identities": 1 if name == "coverage" else 3}}
    run = Run(backend, tmp_path, job(**SMALL, **only(name), **options)).to_end()
    tensors = load_file(run.folder / "transformer_lora.safetensors")
    assert all((value == 0).all() for key, value in tensors.items() if "lora_B" in key)
    assert [progress.loss for progress in run.progress] == [0.0] * 3


def test_one_sample_of_an_identity_has_no_diversity(backend, tmp_path):
    run = Run(backend, tmp_path, job(**SMALL, rollout={"samples": 1})).to_end()
    assert run.told("diversity") == [None] * 3 and run.told("findings") == [[], [], []]


def test_divergence_ends_it_with_a_named_error(backend, tmp_path):
    update = {"learning_rate": 1.0, "max_gradient_norm": 0, "optimizer_steps": 3, "epochs": 5, "clip": 1e30}
    wanted = job(**SMALL | {"steps": 300}, policy={"parameters": "full"}, update=update, guard={"kl_ceiling": 0})
    with pytest.raises(TrainingDiverged, match=r"lower update\.learning_rate"):
        Run(backend, tmp_path, wanted).to_end()
    assert backend.generate(full(backend), ROWS, Sampling(1, "ddim")).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("rewards", "error", "param"),
    [
        ({"glamour": {"weight": 1.0}}, InvalidRequest, "rewards.glamour"),
        ({"coverage": {"weight": 1.0, "options": {"sigmas": 1.0}}}, InvalidRequest, "rewards.coverage"),
        ({"broken": {"weight": 1.0}}, ConfigError, "generator.rewards.broken"),
        ({"missing": {"weight": 1.0}}, ConfigError, "generator.rewards.missing"),
    ],
)
def test_rewards_that_cannot_be_had(rewards, error, param):
    entries = OTHERS | {"broken": "no.such.module:function", "missing": f"{__name__}:nothing"}
    with pytest.raises(error) as caught:
        reward_functions(TuneJob(name="x", rewards=rewards), entries)
    assert caught.value.param == param


def test_a_base_of_other_classes(backend, tmp_path):
    with pytest.raises(InvalidRequest, match="cold start first") as caught:
        Run(backend, tmp_path, classes=("one", "two", "three")).to_end()
    assert caught.value.param == "base"


def test_features_that_nobody_published(backend, tmp_path):
    options = {"features": "published:judge", "features_size": None}
    with pytest.raises(UnknownWeights, match="judge"):
        Run(backend, tmp_path, job(**SMALL | options)).to_end()


def test_memory_that_is_too_small_is_told(backend, tmp_path, monkeypatch):
    def sample(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(tune_module.rollout, "sample", sample)
    with pytest.raises(GenerationFailed, match=r"lower update\.batch_size and rollout\.batch_size"):
        Run(backend, tmp_path).to_end()


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("name", registry.REWARDS)
def test_every_reward_of_the_registry_can_be_tuned_by(backend, tmp_path, name):
    """A finite value for each row, alone and beside others; options bound; an unknown one refused."""
    run = Run(backend, tmp_path, job(**SMALL | {"steps": 1}, **only(name))).to_end()
    (found,) = run.told("rewards")
    assert found.keys() == {name} and math.isfinite(found[name])
    with pytest.raises(InvalidRequest, match="no option 'nonsense'"):
        reward_functions(TuneJob(name="x", rewards={name: {"weight": 1.0, "options": {"nonsense": 1}}}), OTHERS)


def test_options_reach_a_reward(backend, tmp_path):
    rewards = {"dark": {"weight": 1.0, "options": {"floor": 255.0}}}
    run = Run(backend, tmp_path, job(**SMALL | {"steps": 1}, rewards=rewards)).to_end()
    assert run.told("rewards") == [{"dark": 0}]
