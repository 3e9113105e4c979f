"""Features against timm's own, and what is published against what is opened."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from generator_service.published_models import PublishedModels
from generator_service.rl.features import Extractor, newer, open_extractor
from protocol.errors import GenerationFailed, InvalidRequest, UnknownWeights, WeightsCorrupt
from tests.generator_service.published_file import HALF, published_file, random_model


@pytest.fixture
def store(tmp_path: Path) -> PublishedModels:
    return PublishedModels(tmp_path / "published")


def publish(store: PublishedModels, **file: object) -> None:
    """The next version of "face"."""
    path = store.root.parent / "file"
    path.write_bytes(published_file(**file))
    store.publish("face", path)


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def of_timm(name: str, store: PublishedModels, size: int | None = 32) -> Extractor:
    return open_extractor(f"timm:{name}", pretrained=False, size=size, published=store, device="cpu")


def reference(model: torch.nn.Module, images: np.ndarray, mean: tuple, std: tuple) -> np.ndarray:
    """The same in float64 arithmetic, but for the model itself; one image at a time."""
    rows = []
    for image in images:
        x = (image / 255.0 - np.array(mean)) / np.array(std)
        with torch.no_grad():
            feature = model(torch.from_numpy(x.transpose(2, 0, 1)[None]).float()).double().numpy()[0]
        rows.append(feature / np.sqrt((feature**2).sum()))
    return np.stack(rows)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet10t"])
def test_features_are_timms_own_scaled_to_unit_length(store: PublishedModels, name: str):
    extractor, images = of_timm(name, store), pictures(70, 32, 32)  # more than one pass
    found = extractor(images)
    torch.manual_seed(0)
    options = {"img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    expected = reference(model, images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert found.dtype == torch.float32 and found.shape == expected.shape == (70, extractor.dimensions)
    assert not found.requires_grad
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    assert (extractor.name, extractor.version, extractor.exactly) == (f"timm:{name}", None, f"timm:{name}")


def test_without_images_there_are_no_features(store: PublishedModels):
    assert of_timm("test_resnet", store)(pictures(0, 8, 8)).shape == (0, 96)


def test_images_of_any_size_are_resized_to_the_models(store: PublishedModels):
    extractor, images = of_timm("test_resnet", store), pictures(3, 20, 50)
    resized = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in images]
    assert torch.equal(extractor(images), extractor(np.stack(resized)))
    assert of_timm("test_resnet", store, size=None).size == (160, 160)


def test_random_weights_are_always_the_same_and_draw_nothing(store: PublishedModels):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = of_timm("test_vit", store)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second, images = of_timm("test_vit", store), pictures(2, 32, 32)
    assert first.digest == second.digest != of_timm("test_resnet", store).digest
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize(
    ("features", "size", "said", "param"),
    [
        ("timm:resnet5O", None, "close matches: resnet50", "features"),
        ("timm:test_resnet.of_nobody", None, "timm has: test_resnet.r160_in1k", "features"),
        ("timm:", None, "unknown timm model", "features"),
        ("resnet50", None, "timm:NAME", "features"),
        ("published:../x", None, "published:NAME", "features"),
        ("timm:test_vit", 40, "40 x 40|img_size", None),
        ("published:face", 64, "a size of its own", "features_size"),
    ],
)
def test_features_that_cannot_be_are_refused(
    store: PublishedModels, features: str, size: int | None, said: str, param: str | None
):
    with pytest.raises(InvalidRequest, match=said) as refused:
        open_extractor(features, pretrained=False, size=size, published=store, device="cpu")
    assert param is None or refused.value.param == param


def test_weights_that_cannot_be_fetched_are_named(store: PublishedModels, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InvalidRequest, match="HF_HOME"):
        open_extractor("timm:test_resnet", pretrained=True, size=None, published=store, device="cpu")


# ---------------------------------------------------------------- published ones


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": (64, 32)})], ids=["resnet", "vit"]
)
def test_a_published_model_of_a_rectangular_size(store: PublishedModels, name: str, options: dict):
    publish(store, name=name, size=(64, 32), seed=3, options=options)
    extractor = open_extractor("published:face", pretrained=True, size=None, published=store, device="cpu")
    images = pictures(4, 64, 32)
    expected = reference(random_model(name, 3, **options), images, HALF, (0.25, 0.5, 0.125))
    np.testing.assert_allclose(extractor(images).numpy(), expected, atol=2e-6)
    assert (extractor.size, extractor.version, extractor.name) == ((64, 32), 1, "published:face")
    assert extractor.digest == store.find("face").digest


def test_the_newest_version_is_followed_and_any_kept_one_opened_again(store: PublishedModels):
    publish(store, seed=1)
    first = open_extractor("published:face", pretrained=False, size=None, published=store, device="cpu")
    assert newer(first, store) is None and newer(of_timm("test_resnet", store), store) is None
    publish(store, seed=2)
    second, images = newer(first, store), pictures(2, 32, 32)
    assert second is not None and second.version == 2 and newer(second, store) is None
    again = open_extractor(first.exactly, pretrained=False, size=None, published=store, device="cpu")
    assert first.exactly == "published:face@1" and torch.equal(again(images), first(images))
    assert not torch.allclose(first(images), second(images), atol=1e-3)


def test_what_was_not_published_is_named_with_what_was(store: PublishedModels):
    publish(store)
    for features in ("published:gait", "published:face@2"):
        with pytest.raises(UnknownWeights, match=r"face@1.*trainer\.publish") as refused:
            open_extractor(features, pretrained=False, size=None, published=store, device="cpu")
        assert refused.value.param == "features"


def test_a_damaged_model_is_not_opened(store: PublishedModels):
    publish(store)
    path = store.root / "face" / "1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsCorrupt, match=r"sha256.*publish it again"):
        open_extractor("published:face", pretrained=False, size=None, published=store, device="cpu")


def zeroed(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        tensor.zero_()


def enlarged(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.mul_(1e30)


@pytest.mark.parametrize("change", [zeroed, enlarged])
def test_features_without_a_direction_are_an_error(store: PublishedModels, change):
    publish(store, change=change)
    extractor = open_extractor("published:face", pretrained=False, size=None, published=store, device="cpu")
    with pytest.raises(GenerationFailed, match="published:face@1 of 3 of 3 images are all 0 or not finite"):
        extractor(pictures(3, 32, 32))
