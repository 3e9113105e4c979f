"""The recipes hold what the papers print, and every process accepts them."""

from __future__ import annotations

import argparse
import tomllib

import pytest

from agent import recipes
from agent.recipes import RecipeConfig
from agent.settings import AgentConfig
from generator_service import registry
from generator_service.settings import GeneratorConfig
from protocol import config
from protocol.bus import QueueConfig
from trainer import registry as trainer_registry
from trainer.settings import TrainerConfig
from trainer.tasks.classification import ClassificationConfig
from trainer.tasks.video import VideoConfig

ROOT = ['trainer.dataset.root="/data"']
# Table 12; the best cells of Tables 8, 9 and 10
PRINTED = {  # paper's name, size, learning rate, batch on each of 8 GPUs, strength, k, dropped by VoG
    "pets": ("Pets", 224, 0.1, 128, 0.9, 1 / 2, 0.75),
    "cub": ("CUB", 448, 0.2, 64, 0.9, 1 / 4, 0.5),
    "flowers": ("Flowers", 224, 0.1, 128, 0.5, 1 / 2, 0.75),
    "birdsnap": ("Birdsnap", 224, 0.1, 128, 0.75, 1 / 5, 0.75),
    "food101": ("Food", 224, 0.1, 128, 0.75, 1 / 2, 0.25),
    "imagenet100": ("IN100", 224, 0.1, 128, 0.9, 1 / 2, 0.25),
}
IDENTITIES = {"market1501": "Market-1501", "cuhk03": "CUHK03", "casia": "CASIA"}
EXPRESSIONS = {"dfew": "DFEW", "ferv39k": "FERV39k", "ckplus": "CK+"}


def settings(name: str) -> config.Settings:
    return config.load(recipes.find(name), ROOT)


def test_the_recipes_are_these():
    assert recipes.names() == sorted([*PRINTED, *IDENTITIES, *EXPRESSIONS, "digits"])
    with pytest.raises(
        argparse.ArgumentTypeError, match="no recipe 'cats': there are birdsnap, casia, ckplus, cub, cuhk03, dfew"
    ):
        recipes.find("cats")
    with pytest.raises(argparse.ArgumentTypeError):
        recipes.find("_photographs")


@pytest.mark.parametrize("name", [*PRINTED, *IDENTITIES, *EXPRESSIONS, "digits"])
def test_every_process_accepts_every_recipe(name: str):
    tables = settings(name)
    config.check_tables(tables, config.TABLES)
    config.section(tables, "recipe", RecipeConfig)
    config.section(tables, "broker", QueueConfig)
    agent = config.section(tables, "agent", AgentConfig)
    generator = config.section(tables, "generator", GeneratorConfig)
    trainer = config.section(tables, "trainer", TrainerConfig)
    kind, settings_of_backend = registry.backend(generator.backend)
    settings_of_backend.model_validate(generator.backends[generator.backend])
    if name in PRINTED:
        registry.language("captioner")[1].model_validate(agent.captioner)
    assert agent.scheduler in kind.can.schedulers
    if name in EXPRESSIONS:
        registry.language("vision_chat")[1].model_validate(agent.expressions.local)
        assert (kind.can.makes, agent.adapt, agent.tune) == ("clip", None, None)
    else:
        assert agent.adapt is not None and agent.adapt.method in kind.can.adaptations
    task = trainer_registry.resolve("task", trainer.task)
    task(task.Config.model_validate(trainer.model), ["a", "b"])  # timm has the model and its weights


@pytest.mark.parametrize("name", PRINTED)
def test_the_numbers_are_the_paper_s(name: str):
    paper, size, rate, batch, strength, k, dropped = PRINTED[name]
    tables = settings(name)
    agent = config.section(tables, "agent", AgentConfig)
    trainer = config.section(tables, "trainer", TrainerConfig)
    model = ClassificationConfig.model_validate(trainer.model)
    assert tables["recipe"]["paper"] == paper
    assert (model.image_size, trainer.optimizer.learning_rate, trainer.batch_size) == (size, rate, 8 * batch)
    assert (agent.strength, trainer.feedback.fraction, trainer.vog.fraction) == (strength, k, dropped)
    assert trainer.feedback.images_per_sample == 1 / k  # as many synthetic images as real ones
    assert (model.model.split(".")[0], model.pretrained) == ("timm:resnet50", name != "imagenet100")
    assert (agent.guidance_scale, agent.negative_prompt) == (7.5, "distorted, unrealistic, blurry, out of frame")


@pytest.mark.parametrize("name", PRINTED)
def test_the_training_is_algorithm_1(name: str):
    trainer = config.section(settings(name), "trainer", TrainerConfig)
    assert (trainer.mode, trainer.lookahead.enabled, trainer.vog.enabled) == ("sync", False, True)
    assert (trainer.iterations, trainer.warmup_iterations, trainer.epochs) == (20, 3, 10)
    assert trainer.steps_per_iteration is None
    optimizer = trainer.optimizer
    assert (optimizer.decay_rate, optimizer.decay_epochs, optimizer.weight_decay) == (0.2, [50, 100, 150], 5e-4)
    assert trainer.precision == "bfloat16"


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_are_cold_started_tuned_and_generated_from_noise_as_in_section_5_1(name: str):
    tables = settings(name)
    agent = config.section(tables, "agent", AgentConfig)
    assert tables["recipe"]["paper"] == IDENTITIES[name]
    assert tables["generator"]["dit"]["checkpoint"] == "facebook/DiT-XL-2-256"
    assert (agent.init, agent.perturb) == (False, "none")
    assert agent.adapt is not None and agent.tune is not None
    assert (agent.adapt.method, agent.adapt.learning_rate, agent.adapt.activate) == ("cold_start", 1e-5, True)
    update = agent.tune.update
    assert (update.learning_rate, update.clip, update.kl) == (1e-5, 1e-4, 0.01)
    weights = {name: term.weight for name, term in agent.tune.rewards.items()}
    assert weights == {"semantic": 1.0, "coverage": 0.75, "expression": 0.25}
    assert (agent.tune.base, agent.tune.activate) == (None, True)
    assert agent.tune.rollout.guidance_scale == agent.guidance_scale  # tuned as it is asked
    trainer = config.section(tables, "trainer", TrainerConfig)
    assert (trainer.lookahead.enabled, trainer.vog.enabled) == (True, False)
    assert trainer.optimizer.weight_decay == 5e-4
    assert trainer.model["model"].split(".")[0] == "timm:resnet50" and trainer.model["flip"]


def test_the_recognisers_are_trained_as_in_section_5_1():
    for name in ("market1501", "cuhk03"):
        trainer = config.section(settings(name), "trainer", TrainerConfig)
        assert (trainer.task, trainer.optimizer.kind) == ("reid", "adam")
        assert (trainer.batch_size, trainer.images_per_identity) == (16 * 4, 4)
        assert trainer.model["image_size"] == [256, 128]
    trainer = config.section(settings("casia"), "trainer", TrainerConfig)
    assert (trainer.task, trainer.batch_size, trainer.model["image_size"]) == ("face", 128, [128, 128])
    assert (trainer.optimizer.kind, trainer.optimizer.momentum) == ("sgd", 0.9)
    plain = [pairs["name"] for pairs in trainer.model["pairs"] if "group" not in pairs]
    assert plain == ["LFW", "AgeDB", "CFP-FP", "CA-LFW", "CP-LFW"]
    groups = [pairs["group"] for pairs in trainer.model["pairs"] if "group" in pairs]
    assert groups == ["Caucasian", "Indian", "Asian", "African"]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_clips_are_made_and_recognised_as_in_section_4_2(name: str):
    tables = settings(name)
    agent = config.section(tables, "agent", AgentConfig)
    generator = config.section(tables, "generator", GeneratorConfig)
    trainer = config.section(tables, "trainer", TrainerConfig)
    assert tables["recipe"]["paper"] == EXPRESSIONS[name]
    own = generator.backends["ti2v"]
    assert (own["checkpoint"], own["image_size"]) == ("ali-vilab/text-to-video-ms-1.7b", 256)
    assert generator.faces is not None and generator.faces.reader == "openface"
    chosen = agent.expressions
    assert (chosen.composer, chosen.retrieval, chosen.frames, chosen.guidance_scale) == ("local", True, 16, 9.0)
    assert (chosen.policy, chosen.guidance) == (True, None)
    model = registry.language("vision_chat")[1].model_validate(chosen.local)
    assert model.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (model.temperature, model.top_p, model.max_new_tokens) == (0.8, 0.9, 256)
    video = VideoConfig.model_validate(trainer.model)
    assert (trainer.task, video.model, video.head, video.pretrained) == ("video", "resnet18", "transformer", False)
    assert (video.layers, video.hidden, video.frames, video.image_size) == (2, 256, 16, 224)
    assert (trainer.optimizer.kind, trainer.optimizer.learning_rate) == ("sgd", 1e-3)
    assert (trainer.feedback.enabled, trainer.feedback.scarcity.enabled) == (False, True)
    assert trainer.feedback.scarcity.classes == ["surprise", "disgust", "fear"]
    assert trainer.feedback.scarcity.total == 180 + 162 + 141  # Table 7
    assert (trainer.vog.enabled, trainer.lookahead.enabled) == (False, False)
    assert trainer.dataset.layout == name
    if name == "ckplus":  # nothing is learnt from it
        assert (agent.policy, trainer.feedback.model, trainer.test_split) == (None, "dfew-policy", "")
        return
    policy = agent.policy
    assert policy is not None
    assert (policy.steps, policy.batch_size, policy.candidates, policy.top) == (2000, 32, 4, 2)
    assert (policy.penalty, policy.learning_rate, policy.validation, policy.activate) == (1.0, 1e-4, 0.2, True)
    assert {name: term.weight for name, term in policy.rewards.items()} == {
        "steps": 1.0,
        "quality": 3.0,
        "face": 3.0,
        "amplitude": 3.0,
    }
    space = policy.actions
    assert (space.steps, space.pairs) == ([5, 10, 15, 20], [(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)])
    assert (space.minimum, space.maximum) == (7.0, 11.0)


def test_another_fold_of_dfew_is_one_setting():
    for fold in range(1, 6):
        tables = config.load(recipes.find("dfew"), [*ROOT, f"trainer.dataset.fold={fold}"])
        dataset = config.section(tables, "trainer", TrainerConfig).dataset
        assert (dataset.fold, dataset.split, dataset.layout) == (fold, "train", "dfew")


def test_only_what_differs_is_said_again():
    def repeated(over: dict, under: dict) -> list[str]:
        both = over.keys() & under.keys()
        inner = [repeated(over[key], under[key]) for key in both if isinstance(over[key], dict)]
        return sum(inner, [key for key in both if not isinstance(over[key], dict) and over[key] == under[key]])

    parts = ("_persons", *PRINTED, *IDENTITIES, *EXPRESSIONS)
    for path in (recipes.FOLDER / f"{name}.toml" for name in parts):
        own = tomllib.loads(path.read_text())
        assert repeated(own, config.load(path.parent / own.pop("include"))) == []
