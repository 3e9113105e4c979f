import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from protocol.errors import ConfigError
from trainer.selection.lookahead import lookahead
from trainer.selection.vog import vog
from trainer.tasks.classification import Classification, ClassificationConfig

CLASSES = [str(digit) for digit in range(4)]


def task(**config) -> Classification:
    return Classification(ClassificationConfig(**config), CLASSES)


def test_preprocess_normalises_each_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 8, 8, 3)
    x = task(image_size=8, mean=(0.5, 0.1, 0.0), std=(0.5, 0.2, 2.0)).preprocess(images)
    expected = torch.tensor([-1.0, 0.5, 0.5])[:, None, None].expand(1, 3, 8, 8)
    torch.testing.assert_close(x, expected)


def test_shift_moves_each_row_on_its_own_and_repeats_the_edge():
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    augmented = task(image_size=8, shift=2).augment(x, torch.Generator().manual_seed(1))
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for row, shifted in enumerate(augmented):
        offsets = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(padded[row, :, top : top + 8, left : left + 8], shifted)
        ]
        assert len(offsets) == 1
        seen.update(offsets)
    assert len(seen) > 15  # of 25


def test_flip_mirrors_half_of_the_rows():
    x = torch.randn(400, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    augmented = task(flip=True).augment(x, torch.Generator().manual_seed(1))
    same = torch.tensor([torch.equal(a, b) for a, b in zip(x, augmented, strict=True)])
    mirrored = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(x, augmented, strict=True)])
    assert (same ^ mirrored).all()
    assert abs(mirrored.float().mean().item() - 0.5) < 0.1


def test_augmentation_depends_on_the_generator_alone():
    x, augmenting = torch.randn(8, 3, 8, 8), task(image_size=8, shift=1, flip=True)
    rng = torch.get_rng_state()
    first = augmenting.augment(x, torch.Generator().manual_seed(3))
    torch.testing.assert_close(augmenting.augment(x, torch.Generator().manual_seed(3)), first, rtol=0, atol=0)
    assert not torch.equal(augmenting.augment(x, torch.Generator().manual_seed(4)), first)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(task(image_size=8).augment(x, torch.Generator()), x)


def test_parts_of_a_batch_become_what_they_become_in_the_whole():
    x, augmenting = torch.randn(7, 3, 8, 8), task(image_size=8, shift=2, flip=True)
    whole = augmenting.augment(x, torch.Generator().manual_seed(3))
    cuts = [0, 3, 3, 7]
    parts = [
        augmenting.augment(x[first:last], torch.Generator().manual_seed(3), first, 7)
        for first, last in itertools.pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_losses_and_logit_by_hand():
    outputs = torch.tensor([[0.0, math.log(2.0), 0.0, 0.0]])
    y = torch.tensor([1])
    torch.testing.assert_close(task().losses(outputs, y), torch.tensor([math.log(2.5)]))  # 2 / 5
    smoothed = 0.9 * math.log(2.5) + 0.1 * (math.log(2.5) + 3 * math.log(5.0)) / 4
    torch.testing.assert_close(task(label_smoothing=0.1).losses(outputs, y), torch.tensor([smoothed]))
    torch.testing.assert_close(task().true_logit(outputs, y), torch.tensor([math.log(2.0)]))


def test_predict_is_in_eval_mode_and_leaves_the_model_as_it_was():
    predicting = task(drop_rate=0.5, image_size=8)
    model = predicting.build_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, 3, 8, 8)
    logits = predicting.predict(model, x)
    torch.testing.assert_close(predicting.predict(model, x[:1]), logits[:1])  # neither dropout nor batch statistics
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "timm:resnet18.a1_in1k"])
def test_a_timm_model_by_its_name(name):
    building = task(model=name, drop_rate=0.25, image_size=64)
    model = building.build_model()
    assert type(model).__name__ == "ResNet" and model.fc.out_features == 4 and model.drop_rate == 0.25
    white = building.preprocess(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])  # ImageNet's statistics
    torch.testing.assert_close(white[0, :, 0, 0], expected)


def test_a_model_of_fixed_size_is_built_at_the_image_size():
    building = task(model="vit_tiny_patch16_224", image_size=32)
    model = building.build_model()
    assert building.predict(model, torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert building.preprocess(torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)).max() == 1.0  # its mean is 0.5


def test_an_unknown_model_is_answered_with_close_ones():
    with pytest.raises(ConfigError, match=r"unknown model 'resnet81'; close matches: .*resnet18") as caught:
        task(model="resnet81")
    assert caught.value.param == "model"
    with pytest.raises(ConfigError, match="small_cnn"):
        task(model="smal_cnn")


def test_unknown_weights_are_answered_with_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown weights 'resnet18.a9'; timm has: .*resnet18.a1_in1k"):
        task(model="resnet18.a9")


def test_the_small_cnn_has_no_pretrained_weights():
    with pytest.raises(ConfigError, match="set pretrained = false"):
        task(pretrained=True)


def test_weights_that_cannot_be_fetched(tmp_path, monkeypatch):
    """The real download path, offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot get the weights of 'resnet18'.*HF_HOME"):
        task(model="resnet18", pretrained=True).build_model()


@pytest.mark.parametrize("wrong", [{"image_size": 4}, {"std": (1.0, 0.0, 1.0)}, {"drop_rate": 1.0}, {"colour": 1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        ClassificationConfig(**wrong)


def test_the_model_is_the_settings_own():
    model = task(drop_rate=0.4, image_size=8).build_model()
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.4]


CLIP_MEAN, CLIP_STD = (
    torch.tensor([0.48145466, 0.4578275, 0.40821073]),
    torch.tensor([0.26862954, 0.26130258, 0.27577711]),
)


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("timm:resnet50", 32, 2048),
        ("timm:resnet50_clip", 64, 2048),  # attention pooling, of a grid of fixed size
        ("timm:vit_base_patch16_clip_224", 32, 768),
        ("small_cnn", 16, 96),
    ],
)
def test_the_papers_backbones(name: str, size: int, width: int):
    """Real architectures, random weights: logits follow from the features, and VoG and lookahead run on them."""
    torch.manual_seed(0)
    with_it = task(model=name, image_size=size)
    model = with_it.build_model().train()
    images = torch.randint(0, 256, (4, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x, y = with_it.preprocess(images), torch.tensor([0, 1, 2, 3])
    if "clip" in name:
        torch.testing.assert_close(x[:, :, 0, 0], (images[:, 0, 0] / 255 - CLIP_MEAN) / CLIP_STD)
    features = with_it.features(model, x)
    assert features.shape == (4, width) and model.training
    head = model.head if name == "small_cnn" else model.get_classifier()
    torch.testing.assert_close(head(features), with_it.predict(model, x), rtol=1e-4, atol=1e-5)

    snapshots = [{key: value + 0.01 * number for key, value in model.state_dict().items()} for number in range(2)]
    assert (vog(model, snapshots, x, y, logit=with_it.true_logit) > 0).all()
    synthetic = torch.tensor([False, False, True, True])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = lookahead(model, with_it.losses, x, y, synthetic, virtual_lr=0.1, keep=0.5)
    assert chosen[:2].all() and int(chosen.sum()) == 3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "size"), [("resnet50_clip", 16), ("convnext_tiny", 8)])
def test_an_image_size_that_a_model_cannot_take(name: str, size: int):
    with pytest.raises(
        ConfigError, match=rf"'{name}' cannot take images of {size} pixels .*: set image_size"
    ) as caught:
        task(model=name, image_size=size).build_model()
    assert caught.value.param == "image_size"


def test_weights_that_were_never_published():
    with pytest.raises(ConfigError, match="cannot get the weights of 'vovnet39a'"):
        task(model="vovnet39a", pretrained=True).build_model()


def test_a_model_that_does_not_tell_its_features():
    with pytest.raises(ConfigError, match="forward_head"):
        task().features(nn.Linear(3, 4), torch.zeros(1, 3))
