"""The recipes hold what the paper's tables print, and every process accepts them."""

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
from trainer.settings import TrainerConfig
from trainer.tasks.classification import Classification, ClassificationConfig

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


def settings(name: str) -> config.Settings:
    return config.load(recipes.find(name), ROOT)


def test_the_recipes_are_these():
    assert recipes.names() == sorted([*PRINTED, "digits"])
    with pytest.raises(argparse.ArgumentTypeError, match="no recipe 'cats': there are birdsnap, cub, digits"):
        recipes.find("cats")
    with pytest.raises(argparse.ArgumentTypeError):
        recipes.find("_photographs")


@pytest.mark.parametrize("name", [*PRINTED, "digits"])
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
    Classification(ClassificationConfig.model_validate(trainer.model), ["a", "b"])  # timm has the model and its weights


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


def test_only_what_differs_is_said_again():
    common = config.load(recipes.FOLDER / "_photographs.toml")

    def repeated(over: dict, under: dict) -> list[str]:
        both = over.keys() & under.keys()
        inner = [repeated(over[key], under[key]) for key in both if isinstance(over[key], dict)]
        return sum(inner, [key for key in both if not isinstance(over[key], dict) and over[key] == under[key]])

    for name in PRINTED:
        own = tomllib.loads(recipes.find(name).read_text())
        assert own.pop("include") == "_photographs.toml"
        assert repeated(own, common) == []
