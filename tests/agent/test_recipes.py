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


def settings(name: str) -> config.Settings:
    return config.load(recipes.find(name), ROOT)


def test_the_recipes_are_these():
    assert recipes.names() == sorted([*PRINTED, *IDENTITIES, "digits"])
    with pytest.raises(
        argparse.ArgumentTypeError, match="no recipe 'cats': there are birdsnap, casia, cub, cuhk03, digits"
    ):
        recipes.find("cats")
    with pytest.raises(argparse.ArgumentTypeError):
        recipes.find("_photographs")


@pytest.mark.parametrize("name", [*PRINTED, *IDENTITIES, "digits"])
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


def test_only_what_differs_is_said_again():
    def repeated(over: dict, under: dict) -> list[str]:
        both = over.keys() & under.keys()
        inner = [repeated(over[key], under[key]) for key in both if isinstance(over[key], dict)]
        return sum(inner, [key for key in both if not isinstance(over[key], dict) and over[key] == under[key]])

    parts = ("_persons", *PRINTED, *IDENTITIES)
    for path in (recipes.FOLDER / f"{name}.toml" for name in parts):
        own = tomllib.loads(path.read_text())
        assert repeated(own, config.load(path.parent / own.pop("include"))) == []
