"""Backends of both kinds, each with a store of weight sets of its own."""

from __future__ import annotations

import pytest

from tests.generator_service import tiny_dit, tiny_sd
from tests.generator_service.rl.tuned_place import Place


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {
        "dit": tiny_dit.save_checkpoint(tmp_path_factory.mktemp("dit"), vae=True, learned_sigma=True),
        "sd": tiny_sd.save_checkpoint(tmp_path_factory.mktemp("sd")),
    }


@pytest.fixture(params=["dit", "sd"])
def place(request, checkpoints, tmp_path):
    return Place(request.param, tmp_path, checkpoints[request.param])


@pytest.fixture
def dit(checkpoints, tmp_path):
    return Place("dit", tmp_path, checkpoints["dit"])


@pytest.fixture
def sd(checkpoints, tmp_path):
    return Place("sd", tmp_path, checkpoints["sd"])
