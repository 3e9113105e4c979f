import json
from dataclasses import replace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from generator_service.backends.dit import Config, DiTBackend
from generator_service.backends.interface import Row, Sampling
from protocol.errors import ConfigError, WeightsCorrupt
from tests.generator_service.tiny_dit import CLASSES, class_embedding, full, open_backend, save_checkpoint


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    return open_backend(save_checkpoint(tmp_path_factory.mktemp("pixel")))


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


def test_another_full_checkpoint_is_served_beside_the_base(backend, base, tmp_path):
    other = save_checkpoint(tmp_path)
    path = next((other / "transformer").glob("*.safetensors"))
    save_file({name: value * 0.5 for name, value in load_file(path).items()}, path)
    rows, sampling = [Row(seed=1, label=0)], Sampling(5, "ddim")
    before = backend.sample(base, rows, sampling)
    halved = backend.sample(full(backend, other, "halved"), rows, sampling)
    assert torch.equal(halved, open_backend(other).sample(full(open_backend(other)), rows, sampling))
    assert not torch.equal(halved, before) and torch.equal(backend.sample(base, rows, sampling), before)


def test_older_checkpoints_under_the_general_class_name_load(backend, base, tmp_path):
    old = save_checkpoint(tmp_path)
    path = old / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}))
    rows, sampling = [Row(seed=1, label=0)], Sampling(5, "ddim")
    opened = open_backend(old)
    assert torch.equal(opened.sample(full(opened), rows, sampling), backend.sample(base, rows, sampling))


@pytest.mark.parametrize("damage", ["missing", "surplus", "bytes", "shape"])
def test_tensors_that_do_not_fit_are_refused(backend, tmp_path, damage):
    other = save_checkpoint(tmp_path)
    path = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    if damage == "missing":
        del tensors["proj_out_2.bias"]
    if damage == "surplus":
        tensors["proj_out_3.bias"] = torch.zeros(1)
    if damage == "shape":
        tensors["proj_out_2.bias"] = torch.zeros(3)
    save_file(tensors, path)
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsCorrupt, match="transformer"):
        backend.load(full(backend, other, f"damaged-{damage}"))


def test_a_set_that_names_other_classes_is_refused(backend, tmp_path):
    weights = replace(full(backend, save_checkpoint(tmp_path), "renamed"), classes=("alpha", "beta"))
    with pytest.raises(WeightsCorrupt, match="other classes"):
        backend.load(weights)


def test_an_unknown_kind_is_refused(backend, base, tmp_path):
    with pytest.raises(WeightsCorrupt, match="'strange'"):
        backend.load(replace(class_embedding(base, tmp_path, CLASSES, "strange"), kind="strange"))


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"no model_index\.json"):
        open_backend(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    other = save_checkpoint(tmp_path)
    path = next((other / "transformer").glob("*.safetensors"))
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ConfigError, match="pickles are never read"):
        open_backend(other)


def test_latent_channels_without_a_vae(tmp_path):
    with pytest.raises(ConfigError, match="`vae` is missing"):
        open_backend(save_checkpoint(tmp_path, channels=4))


def test_class_names_with_gaps(tmp_path):
    other = save_checkpoint(tmp_path)
    (other / "model_index.json").write_text(json.dumps({"id2label": {"0": "a", "2": "b", "3": "c"}}))
    with pytest.raises(ConfigError, match="labels 0 to 2"):
        open_backend(other)


def test_a_checkpoint_without_class_names_numbers_them(tmp_path):
    other = save_checkpoint(tmp_path)
    (other / "model_index.json").write_text("{}")
    assert open_backend(other).classes == ("0", "1", "2")


@pytest.mark.parametrize("checkpoint", ["nobody/nothing-at-all", "/no/such/folder/anywhere"])
def test_what_is_neither_a_folder_nor_on_the_hub(checkpoint, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="give an existing folder, a hub id"):
        DiTBackend(Config(checkpoint=checkpoint))
