import logging

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from generator_service.adapt import lora as lora_module
from generator_service.adapt import resume, validation
from generator_service.adapt.lora import lora
from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.real_images import RealImages
from protocol.errors import ConfigError, GenerationFailed, InvalidRequest, TrainingDiverged, WeightsCorrupt
from protocol.messages import AdaptJob, LoraOptions, WeightsRef
from tests.generator_service.tiny_sd import SIZE, full, open_backend, save_checkpoint, save_image_encoder
from tests.trainer.test_durable import FULL, needs_full_device

CLASSES = ("cat, fat", "dog")
LORA, TOKENS = "pytorch_lora_weights.safetensors", "visual_tokens.safetensors"
ROWS = [Row(seed=1, label=None, prompt="a photo of dog", guidance_scale=3.0)]
GUIDED = Sampling(3, "ddim", guided=True)


def job(steps: int = 6, **options) -> AdaptJob:
    rest = {name: options.pop(name) for name in ("batch_size", "learning_rate", "seed") if name in options}
    options = {"validation": 0.0, "validate_every": 2, "checkpoint_every": None, **options}
    wanted = {"batch_size": 4, "learning_rate": 1e-2, "seed": 3, **rest}
    return AdaptJob(method="lora", name="adapted", steps=steps, lora=LoraOptions(**options), **wanted)


def dataset(captions: bool = True, count: int = 12) -> RealImages:
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 60, (count, SIZE, SIZE, 3), dtype=np.uint8)
    images = noise + (labels * 190).astype(np.uint8)[:, None, None, None]
    texts = [
        f"a {'light' if label else 'dark'} one" if captions and at % 3 else None for at, label in enumerate(labels)
    ]
    return RealImages(images, labels, [str(index) for index in range(count)], texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    monkeypatch.setattr(validation, "STEPS", 2)


@pytest.fixture
def backend(folder):
    return open_backend(folder)


def adapted(backend, folder, metadata, name="adapted") -> WeightSet:
    ref = WeightsRef(name=name, version=1, digest=name)
    return WeightSet(ref, "stable_diffusion", "lora", full(backend), CLASSES, folder, metadata=metadata)


class Run:
    """An adaptation in a folder of its own."""

    def __init__(self, backend, place, wanted=None, real=None, unfinished=None):
        self.folder, self.unfinished = place / "result", unfinished or place / "unfinished"
        self.folder.mkdir(parents=True)
        self.progress = []  # of optimiser steps
        real = dataset() if real is None else real
        self.steps = lora(backend, full(backend), real, CLASSES, wanted or job(), self.folder, self.unfinished)

    def to_end(self, between=lambda: None):
        while True:
            try:
                progress = next(self.steps)
            except StopIteration as end:
                self.kind, self.metadata = end.value
                return self
            between()
            self.progress.extend([progress] if progress.loss is not None else [])

    def to_step(self, step):
        while (progress := next(self.steps)).loss is None or progress.step < step:
            pass
        return self

    @property
    def losses(self) -> list[float]:
        return [progress.loss for progress in self.progress]

    @property
    def files(self) -> dict[str, bytes]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in found}


# ---------------------------------------------------------------- the result


def test_the_result_is_a_weight_set_that_backend_and_diffusers_read_alike(backend, folder, tmp_path):
    run = Run(backend, tmp_path, job(rank=2)).to_end()
    assert run.kind == "lora" and run.files.keys() == {LORA, TOKENS}
    assert [(p.step, p.steps) for p in run.progress] == [(step, 6) for step in range(1, 7)]
    told = run.metadata
    assert (told["steps"], told["rank"], told["visual"], told["images"]) == (6, 2, "class", 12)
    assert told["without_caption"] == 4 and not told["stopped_early"] and told["loss"] == run.losses[-1]

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    latents, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    told = backend.checkpoint(full(backend)).conditions(["a photo of dog"])
    with torch.no_grad():
        before = unet(latents, times, told.embeddings).sample
        unet.load_lora_adapter(run.folder, prefix="unet", weight_name=LORA)
        loaded = unet(latents, times, told.embeddings).sample
        weights = adapted(backend, run.folder, {"visual": "none"})
        backend.sample(weights, ROWS, GUIDED)  # leaves its LoRA in use
        served = backend.checkpoint(weights).predict(latents, times, told)
    assert torch.allclose(loaded, served, atol=1e-5) and not torch.allclose(loaded, before, atol=1e-2)
    assert {tensor.shape[0 if "lora.down" in name else 1] for name, tensor in load_file(run.folder / LORA).items()} == {
        2
    }


def test_only_attention_projections_of_the_unet_are_trained(backend, tmp_path):
    checkpoint = backend.checkpoint(full(backend))
    before = {name: value.clone() for name, value in checkpoint.unet.named_parameters()}
    run = Run(backend, tmp_path).to_end()
    layers = {name.rsplit(".lora", 1)[0].rsplit(".", 1)[-1] for name in load_file(run.folder / LORA)}
    assert layers == {"to_q", "to_k", "to_v", "0"}
    after = {name.replace(".base_layer", ""): value for name, value in checkpoint.unet.named_parameters()}
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(value.requires_grad or value.grad is not None for value in after.values())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_first_loss_computed_again_with_the_models_alone(tmp_path, prediction):
    """Tokenizer, text encoder and UNet as diffusers and transformers load them; both losses written out."""
    folder, real = save_checkpoint(tmp_path / "sd", prediction=prediction), dataset()
    backend = open_backend(folder)
    checkpoint = backend.checkpoint(full(backend))
    run = Run(backend, tmp_path, job(steps=1, discrepancy=0.7)).to_end()

    rng = torch.Generator().manual_seed(3)
    rows = torch.randint(12, (4,), generator=rng)
    noise = torch.randn(4, 4, 8, 8, generator=rng)
    times = torch.randint(1000, (4,), generator=rng)
    texts = [f"a photo of {CLASSES[real.labels[row]]}" for row in rows]
    texts = [
        f"{text}, which is {real.captions[row]}" if real.captions[row] else text
        for text, row in zip(texts, rows, strict=True)
    ]
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = words(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    features = checkpoint.visual_features(real.images)
    with torch.no_grad():
        context = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids).last_hidden_state
        for at, row in enumerate(rows):
            context[at, -1] = features[real.labels == real.labels[row]].mean(0)
        schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
        latents = checkpoint.encode(real.images[rows.numpy()])
        unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        said = unet(schedule.add_noise(latents, noise, times), times, context).sample
    kept = schedule.alphas_cumprod[times][:, None, None, None]
    snr = (kept / (1 - kept)).flatten()
    if prediction == "epsilon":
        noise_error = error = said - noise
        weights = snr.clamp(max=5) / snr
    else:
        error = said - (kept.sqrt() * noise - (1 - kept).sqrt() * latents)
        noise_error = kept.sqrt() * error
        weights = snr.clamp(max=5) / (snr + 1)
    expected = (weights * error.square().mean((1, 2, 3))).mean()
    sums = [
        sum(snr[at].clamp(max=5) / snr[at] * noise_error[at] for at in range(4) if real.labels[rows[at]] == label)
        for label in {real.labels[row] for row in rows}
    ]
    expected = expected + 0.7 * torch.stack(sums).square().mean()
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-4)
    assert run.metadata["discrepancy_loss"] == pytest.approx(torch.stack(sums).square().mean().item(), rel=1e-4)


def test_training_lowers_the_loss_on_images_held_out(backend, tmp_path):
    run = Run(backend, tmp_path, job(steps=40, validation=0.4, validate_every=40, learning_rate=1e-2)).to_end()
    (first, before), (last, after) = run.metadata["held_out_losses"]
    assert (first, last) == (0, 40) and after < 0.95 * before


@pytest.mark.parametrize("visual", ["none", "class", "image"])
def test_visual_tokens(backend, tmp_path, visual):
    real = dataset()
    run = Run(backend, tmp_path, job(steps=1, visual=visual, validation=0.3)).to_end()
    assert run.metadata["visual"] == visual
    if visual == "none":
        assert TOKENS not in run.files
        return
    means = load_file(run.folder / TOKENS)["class_means"]
    features = backend.checkpoint(full(backend)).visual_features(real.images)
    of_all = torch.stack([features[real.labels == label].mean(0) for label in (0, 1)])
    assert means.shape == of_all.shape and not torch.allclose(means, of_all)  # those held out are not in it
    backend.load(adapted(backend, run.folder, run.metadata))


def test_features_of_another_image_encoder_are_refused(backend, folder, tmp_path):
    """A set that gets tokens of its own at generation must get them of the encoder that it was trained with."""
    torch.manual_seed(1)
    other = open_backend(folder, image_encoder=str(save_image_encoder(tmp_path / "other")))
    assert other.beside_base() != backend.beside_base() == open_backend(folder).beside_base() != ""
    for kind in ("image", "class"):
        run = Run(backend, tmp_path / kind, job(steps=1, visual=kind)).to_end()
        weights = adapted(other, run.folder, run.metadata, kind)
        if kind == "image":
            with pytest.raises(WeightsCorrupt, match="another image encoder"):
                other.load(weights)
            weights.metadata.pop("image_encoder")  # as it was written before it was recorded
        other.load(weights)


def test_the_prompts_of_the_job_are_trained_on_and_told(backend, tmp_path):
    options = {"prompt": "{class_name}", "captioned_prompt": "{caption}: {class_name}"}
    own, papers = (Run(backend, tmp_path / str(len(o)), job(steps=1, **o)).to_end() for o in (options, {}))
    assert own.losses != papers.losses
    assert {name: own.metadata[name] for name in options} == options


def test_each_kind_of_visual_token_trains_on_other_conditions(backend, tmp_path):
    kinds = ("none", "class", "image")
    assert len({Run(backend, tmp_path / kind, job(steps=1, visual=kind)).to_end().losses[0] for kind in kinds}) == 3


# ---------------------------------------------------------------- exactness


def test_requests_between_steps_change_nothing_nor_are_they_changed(backend, folder, tmp_path):
    alone = Run(open_backend(folder), tmp_path / "alone").to_end()
    other = adapted(backend, Run(backend, tmp_path / "other", job(seed=9)).to_end().folder, {"visual": "none"}, "other")
    sets = (full(backend), other)
    before = [backend.sample(weights, ROWS, GUIDED) for weights in sets]
    assert not torch.equal(*before)
    during = []

    def serve():
        during.extend(zip(before, (backend.sample(weights, ROWS, GUIDED) for weights in sets), strict=True))

    served = Run(backend, tmp_path / "served").to_end(between=serve)
    serve()
    assert len(during) == 16 and all(torch.equal(expected, image) for expected, image in during)
    assert served.files == alone.files and served.losses == alone.losses


def test_another_seed_gives_another_result(backend, tmp_path):
    one, other = (Run(backend, tmp_path / str(seed), job(seed=seed)).to_end() for seed in (1, 2))
    assert one.files[LORA] != other.files[LORA]


def test_without_cache_the_bits_are_the_same(backend, tmp_path):
    kept, computed = (Run(backend, tmp_path / str(cache), job(cache=cache)).to_end() for cache in (True, False))
    assert kept.losses == computed.losses and kept.files == computed.files


def test_cached_rows_are_computed_once(backend, tmp_path, monkeypatch):
    checkpoint, encoded = backend.checkpoint(full(backend)), []
    encode = checkpoint.encode
    monkeypatch.setattr(checkpoint, "encode", lambda images: encoded.extend(map(bytes, images)) or encode(images))
    Run(backend, tmp_path / "kept", job(steps=8)).to_end()
    once = len(encoded)
    assert 0 < once == len(set(encoded)) <= 12
    Run(backend, tmp_path / "computed", job(steps=8, cache=False)).to_end()
    assert len(encoded) == once + 8 * 4


def test_accumulated_batches_equal_a_bigger_one(backend, tmp_path):
    """Without the discrepancy, whose sums are within a batch."""
    whole = Run(backend, tmp_path / "whole", job(batch_size=8, discrepancy=0.0)).to_end()
    parts = Run(backend, tmp_path / "parts", job(batch_size=2, discrepancy=0.0, gradient_accumulation=4)).to_end()
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
    one, other = load_file(whole.folder / LORA), load_file(parts.folder / LORA)
    assert all(torch.allclose(one[name], other[name], atol=1e-3) for name in one)


# ---------------------------------------------------------------- interruption

RESUMABLE = {"validation": 0.4, "checkpoint_every": 2}


def test_a_resumed_adaptation_equals_an_uninterrupted_one(backend, folder, tmp_path):
    wanted = job(patience=5, **RESUMABLE)
    whole = Run(backend, tmp_path / "whole", wanted).to_end()
    first = Run(open_backend(folder), tmp_path / "first", wanted)
    first.to_step(3).steps.close()
    assert not first.files
    second = Run(open_backend(folder), tmp_path / "second", wanted, unfinished=first.unfinished).to_end()
    assert [progress.step for progress in second.progress] == [3, 4, 5, 6]
    assert second.losses == whole.losses[2:] and second.files == whole.files
    assert {**second.metadata, "seconds": 0} == {**whole.metadata, "seconds": 0}
    assert "validation/step-000002.png" in second.files


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "STEPS", 2)
        return Run(open_backend(folder), tmp_path_factory.mktemp("whole"), job(**RESUMABLE)).to_end()


@pytest.mark.parametrize("harm", ["cut", "altered", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_not_read(backend, uninterrupted, tmp_path, caplog, harm):
    first = Run(backend, tmp_path / "first", job(seed=8 if harm == "foreign" else 3, **RESUMABLE))
    first.to_step(3).steps.close()
    (path,) = first.unfinished.glob("checkpoint-*")
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-100], "altered": data[:500] + b"x" + data[501:], "foreign": data}[harm])
    with caplog.at_level(logging.WARNING):
        second = Run(backend, tmp_path / "second", job(**RESUMABLE), unfinished=first.unfinished).to_end()
    assert "begins anew" in caplog.text and path.name in caplog.text
    assert second.files == uninterrupted.files and len(second.progress) == 6


@pytest.mark.parametrize("end", ["closed", "forgotten", "failed"])
def test_nothing_is_left_in_the_unet(backend, tmp_path, monkeypatch, end):
    before, unet = backend.sample(full(backend), ROWS, GUIDED), backend.checkpoint(full(backend)).unet
    run = Run(backend, tmp_path).to_step(1)
    assert len(unet.peft_config) == 1
    if end == "closed":
        run.steps.close()
    elif end == "forgotten":
        del run.steps
    else:
        monkeypatch.setattr(unet, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(run.steps)
        monkeypatch.undo()
    assert not getattr(unet, "peft_config", {}) and not any("lora" in name for name, _ in unet.named_parameters())
    assert torch.equal(backend.sample(full(backend), ROWS, GUIDED), before) and not run.files


def test_others_get_a_turn_before_long(backend, tmp_path, monkeypatch):
    """Between two yields there are at most a batch of images for CLIP, one of rows for the UNet, or one picture."""
    monkeypatch.setattr(lora_module, "BATCH", 5)
    checkpoint, unet, clip = backend.checkpoint(full(backend)), [0], [0]
    forward, features = checkpoint.unet.forward, checkpoint.visual_features

    def counted(latents, *args, **kwargs):
        unet[-1] += len(latents)
        return forward(latents, *args, **kwargs)

    def seen(images):
        clip[-1] += len(images)
        return features(images)

    monkeypatch.setattr(checkpoint.unet, "forward", counted)
    monkeypatch.setattr(checkpoint, "visual_features", seen)
    run = Run(backend, tmp_path, job(steps=2, batch_size=3, validation=0.6))
    for _ in run.steps:
        unet.append(0)
        clip.append(0)
    assert sorted(filter(None, clip)) == [2, 5, 5]
    held, shown, pictured = 7, 2, 2 * validation.STEPS
    assert max(unet) == pictured and sum(unet) == 2 * 3 + 2 * (held + shown * pictured)


@pytest.mark.parametrize("failing", ["the LoRA", "the training"])
def test_a_lora_that_cannot_be_trained_is_not_half_there(backend, tmp_path, monkeypatch, failing):
    before, unet = backend.sample(full(backend), ROWS, GUIDED), backend.checkpoint(full(backend)).unet
    if failing == "the LoRA":  # after peft has put it into the UNet
        named = unet.named_parameters
        monkeypatch.setattr(unet, "named_parameters", lambda **options: named(**options) if options else 1 / 0)
    else:
        monkeypatch.setattr(lora_module, "Training", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run(backend, tmp_path / "failed").to_end()
    monkeypatch.undo()
    assert not getattr(unet, "peft_config", {}) and not any("lora" in name for name, _ in unet.named_parameters())
    assert torch.equal(backend.sample(full(backend), ROWS, GUIDED), before)
    assert Run(backend, tmp_path / "next", job(steps=1)).to_end().kind == "lora"


def test_out_of_memory_says_what_to_do(backend, tmp_path, monkeypatch):
    def full_up(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend.checkpoint(full(backend)).unet, "forward", full_up)
    with pytest.raises(GenerationFailed, match=r"lower batch_size .* precision .* cache = false"):
        Run(backend, tmp_path).to_end()


@needs_full_device
def test_a_full_disk_costs_a_checkpoint_and_not_the_adaptation(backend, tmp_path, caplog):
    first = Run(backend, tmp_path, job(checkpoint_every=2)).to_step(3)
    (kept,) = first.unfinished.glob("checkpoint-*")
    (first.unfinished / resume.PARTIAL).symlink_to(FULL)
    with caplog.at_level(logging.WARNING):
        first.to_step(4)
    assert "no room left" in caplog.text and list(first.unfinished.iterdir()) == [kept]
    first.to_step(6)  # there is room again
    assert [path.name[:18] for path in first.unfinished.iterdir()] == ["checkpoint-0000006"]


@needs_full_device
def test_a_full_disk_costs_a_picture_and_not_the_adaptation(backend, tmp_path):
    run = Run(backend, tmp_path, job(steps=3, validation=0.4, validate_every=2)).to_step(1)
    (run.unfinished / "validation" / "step-000002.png").symlink_to(FULL)
    run.to_end()
    assert [name for name in sorted(run.files) if "step" in name] == [f"validation/step-00000{n}.png" for n in (0, 3)]


# ---------------------------------------------------------------- validation


def test_validation_pictures_show_real_images_over_made_ones(backend, tmp_path):
    run = Run(backend, tmp_path, job(steps=4, validation=0.4)).to_end()
    names = [f"validation/step-00000{step}.png" for step in (0, 2, 4)]
    assert run.files.keys() == {LORA, TOKENS, *names}
    grids = [np.asarray(Image.open(run.folder / name)) for name in names]
    assert {grid.shape for grid in grids} == {(2 * SIZE, 2 * SIZE, 3)}
    real = dataset().images
    for half in (slice(SIZE), slice(SIZE, None)):
        assert any(np.array_equal(grids[0][:SIZE, half], image) for image in real)
    assert np.array_equal(grids[0][:SIZE], grids[2][:SIZE]) and not np.array_equal(grids[0], grids[2])


def test_validation_without_change_is_the_same_number(backend, tmp_path):
    run = Run(backend, tmp_path, job(validation=0.4, learning_rate=1e-30, precision="float32")).to_end()
    assert len(run.metadata["held_out_losses"]) == 4
    assert len({loss for _, loss in run.metadata["held_out_losses"]}) == 1


def test_patience_keeps_the_best(backend, tmp_path):
    """A rate so high that it soon gets worse."""
    wild = {"validation": 0.4, "validate_every": 1, "learning_rate": 0.5, "discrepancy": 0.0}
    run = Run(backend, tmp_path / "patient", job(steps=40, patience=2, **wild)).to_end()
    curve, best = run.metadata["held_out_losses"][1:], run.metadata["best_step"]
    assert run.metadata["stopped_early"] and run.metadata["steps"] == best + 2 == len(run.progress) < 40
    assert min(curve, key=lambda point: point[1])[0] == best
    until_best = Run(backend, tmp_path / "until", job(steps=best, **wild)).to_end()
    assert run.files[LORA] == until_best.files[LORA]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "float32")]
)
def test_half_precision(folder, tmp_path, dtype, precision):
    exact = Run(open_backend(folder), tmp_path / "exact").to_end()
    half = Run(open_backend(folder, dtype=dtype), tmp_path / "half", job(precision=precision)).to_end()
    assert half.losses != exact.losses and half.losses == pytest.approx(exact.losses, rel=0.05)
    tensors = load_file(half.folder / LORA)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(
        tensor.abs().max() > 1e-3 for name, tensor in tensors.items() if "lora.up" in name
    )  # which began at zero


# ---------------------------------------------------------------- odd data and mistakes


def test_one_image_a_class_and_fewer_images_than_a_batch(backend, tmp_path):
    wanted = job(batch_size=16, validation=0.5, patience=1)
    run = Run(backend, tmp_path, wanted, dataset(captions=False, count=2)).to_end()
    assert run.metadata["held_out_losses"] == [] and run.metadata["without_caption"] == 2 and len(run.progress) == 6


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    folder = save_checkpoint(tmp_path / "sd")
    path = next((folder / "unet").glob("*.safetensors"))
    save_file(load_file(path) | {"conv_out.bias": torch.full((4,), float("nan"))}, path)
    run = Run(open_backend(folder), tmp_path)
    with pytest.raises(TrainingDiverged, match="at step 1; lower learning_rate"):
        run.to_end()
    assert not run.files


def test_a_checkpoint_without_image_encoder_is_adapted_without_visual_tokens(tmp_path):
    backend = open_backend(save_checkpoint(tmp_path / "sd", image_encoder=None))
    with pytest.raises(ConfigError, match='visual = "none"'):
        next(Run(backend, tmp_path / "class").steps)
    assert Run(backend, tmp_path / "none", job(visual="none")).to_end().kind == "lora"


def test_a_lora_cannot_sit_on_another(backend, tmp_path):
    base = adapted(backend, tmp_path, {})
    with pytest.raises(InvalidRequest, match="adapt base@1"):
        next(lora(backend, base, dataset(), CLASSES, job(), tmp_path, tmp_path / "unfinished"))
