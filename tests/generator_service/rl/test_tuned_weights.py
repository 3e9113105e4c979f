"""What tuning makes, written, published through a real store, and served."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file

from generator_service.backends.dit_lora import LORA_FILE
from generator_service.backends.interface import Row
from generator_service.image_request import ImageDefaults, order
from protocol.errors import InvalidRequest, UnsupportedField
from protocol.messages import ImageGenerationRequest
from protocol.tuning import PolicyOptions, RolloutOptions, TuneJob
from tests.generator_service.rl.test_dit_policy import shaken
from tests.generator_service.rl.tuned_place import CLASSES, GUIDED, LABELS, MODEL, PROMPT, TIMES, Place


def sampled_by_policy(place: Place, policy) -> torch.Tensor:
    """Images of the policy's own predictions, by the sampler alone."""
    scheduler = policy.space.scheduler("ddim")
    scheduler.set_timesteps(GUIDED.steps)
    sources = [torch.Generator().manual_seed(row.seed) for row in place.rows()]
    latents = torch.stack([torch.randn(policy.space.latent_shape, generator=source) for source in sources])
    with policy.in_use(), torch.no_grad():
        for time in scheduler.timesteps:
            output = policy.predict(latents, time.expand(2), LABELS, 3.0)[:, : latents.shape[1]]
            latents = scheduler.step(output, time, latents).prev_sample
        return policy.space.decode(latents)


class TestServed:
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_images_are_those_of_the_policys_own_predictions(self, place, parameters):
        base = place.start()
        job = TuneJob(
            name="t", policy=PolicyOptions(parameters=parameters, rank=2), rollout=RolloutOptions(prompt=PROMPT)
        )
        before = place.image(base)
        with place.policy.opened(place.backend, base, CLASSES, job) as policy:
            assert torch.equal(sampled_by_policy(place, policy), before)
            shaken(policy, size=0.3 if parameters == "lora" else 0.03)
            expected = sampled_by_policy(place, policy)
            with place.store.staging() as folder:
                kind, metadata = policy.save(folder)
                weights = place.store.publish(folder, "t", base, kind, CLASSES, metadata)
        assert kind == ("lora" if parameters == "lora" else MODEL[place.kind])
        assert weights.classes == CLASSES and weights.base == base
        got = place.image(weights)
        assert torch.equal(got, expected) and (got - before).abs().max() > 1e-2
        assert torch.equal(place.image(base), before)

    def test_by_another_service_on_the_same_folder(self, place, checkpoints, tmp_path):
        weights, _ = place.tuned(place.start())
        other = Place(place.kind, tmp_path, checkpoints[place.kind])
        assert torch.equal(other.image(other.store.resolve("tuned")), place.image(weights))

    def test_several_in_turn(self, place):
        base = place.start()
        sets = [base, place.store.base] if place.kind == "sd" else [base]
        sets += [place.tuned(base, "lora", seed, name=f"lora{seed}")[0] for seed in (1, 2)]
        sets += [place.tuned(base, "full", seed, name=f"full{seed}")[0] for seed in (1, 2)]
        first = [place.image(weights) for weights in sets]
        for at in (3, 1, 2, 0, 4, 2, 4, 0, 3):
            assert torch.equal(place.image(sets[at]), first[at])
        assert all((first[a] - first[b]).abs().max() > 1e-3 for a in range(1, len(sets)) for b in range(1 + (a < 2), a))

    def test_how_much_of_a_lora_counts(self, place):
        base = place.start()
        weights, _ = place.tuned(base)
        whole, none = place.image(weights), place.image(base)
        assert torch.equal(place.image(weights, 0.0), none)
        half = place.image(weights, 0.5)
        assert min((half - whole).abs().max(), (half - none).abs().max()) > 1e-3
        assert torch.equal(place.image(weights), whole)

    def test_half_a_lora_is_half_its_update_added_to_the_weights(self, dit):
        weights, _ = dit.tuned(dit.start())
        got = dit.image(weights, 0.5)
        tensors = load_file(weights.folder / LORA_FILE)
        transformer = dit.backend.checkpoint(dit.store.base).transformer
        layers = {name.split(".lora_")[0] for name in tensors}
        with torch.no_grad():
            for layer in layers:
                now = transformer.get_submodule(layer).base_layer.weight
                now.add_(tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"], alpha=0.5)
        torch.testing.assert_close(dit.image(weights, 0.0), got, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_on_a_backend_of_half_precision(self, place, checkpoints, tmp_path, parameters):
        half = Place(place.kind, tmp_path / "half", checkpoints[place.kind], dtype="bfloat16")
        base = half.start()
        weights, _ = half.tuned(base, parameters)
        assert (half.image(weights) - half.image(base)).abs().max() > 1e-2
        stored = [load_file(path) for path in weights.folder.rglob("*.safetensors")]
        assert {tensor.dtype for tensors in stored for tensor in tensors.values()} == {torch.float32}


class TestTunedAgain:
    def test_a_lora_goes_on_and_tells_all_that_is_to_be_added(self, place):
        base = place.start()
        first, predicted = place.tuned(base)
        options = TuneJob(name="t", policy=PolicyOptions(rank=5), rollout=RolloutOptions(prompt=PROMPT))
        with place.policy.opened(place.backend, first, CLASSES, options) as policy:
            assert {min(value.shape) for value in policy.parameters.values()} == {2}  # the base keeps its rank
            with policy.in_use():
                now = policy.predict(place.noise(), TIMES, LABELS, 3.0)
                assert torch.equal(now, predicted)
                assert torch.equal(policy.reference(place.noise(), TIMES, LABELS, 3.0), predicted)
        second, predicted_then = place.tuned(first, seed=2, name="again")
        assert second.base == first and second.kind == "lora"
        assert torch.equal(place.image(second, 0.0), place.image(base))
        third, predicted_last = place.tuned(second, seed=3, size=0.0, name="thrice")
        assert torch.equal(predicted_last, predicted_then)
        assert torch.equal(place.image(third), place.image(second))

    def test_all_parameters_go_on(self, place):
        base = place.start()
        first, predicted = place.tuned(base, "full")
        second, then = place.tuned(first, "full", size=0.0, name="again")
        assert torch.equal(then, predicted) and second.whole == place.store.base
        assert torch.equal(place.image(second), place.image(first))

    def test_a_lora_on_tuned_parameters(self, place):
        under, _ = place.tuned(place.start(), "full")
        weights, _ = place.tuned(under, "lora", seed=2, name="on-top")
        assert torch.equal(place.image(weights, 0.0), place.image(under))
        assert (place.image(weights) - place.image(under)).abs().max() > 1e-2

    def test_all_parameters_of_a_lora_are_refused(self, place):
        weights, _ = place.tuned(place.start())
        with pytest.raises(InvalidRequest, match=r'parameters = "lora", or give .*@1 as base') as error:
            place.tuned(weights, "full")
        assert error.value.param == "base"

    def test_real_fake_keeps_its_tokens_and_its_alpha(self, sd):
        base = sd.real_fake()
        weights, _ = sd.tuned(base, size=0.0)
        assert weights.metadata["visual"] == "class" and weights.metadata["image_encoder"] == "digest"
        rows = [Row(seed, seed, 3.0, "an owl") for seed in (0, 1)]
        got, expected = (sd.backend.sample(which, rows, GUIDED) for which in (weights, base))
        assert torch.equal(got, expected)
        plain = sd.backend.sample(sd.store.base, [replace(row, label=None) for row in rows], GUIDED)
        assert (got - plain).abs().max() > 1e-2

    def test_a_cold_start_does_not_forget_what_was_tuned(self, dit):
        under, _ = dit.tuned(dit.start(), "full")
        own = dit.backend.checkpoint(under)
        assert own.classes == CLASSES
        tables = {name: torch.zeros(5, table.shape[1]) for name, table in own.tables.items()}
        write = lambda folder: dit.backend.save_tables(tables, under, folder)  # noqa: E731
        weights = dit.published(under, "class_embedding", write, "anew", tuple("abcd"))
        assert dit.backend.checkpoint(weights) is own
        lora, _ = dit.tuned(dit.start(), name="lora")
        with pytest.raises(InvalidRequest, match="are a LoRA"):
            dit.backend.checkpoint(lora)


class TestMemory:
    def test_the_least_recently_used_loras_leave_the_transformer(self, checkpoints, tmp_path):
        dit = Place("dit", tmp_path, checkpoints["dit"], max_resident=3)
        base = dit.start()
        sets = [dit.tuned(base, seed=seed, name=f"l{seed}")[0] for seed in range(3)]
        first = [dit.image(weights) for weights in sets]
        transformer = dit.backend.checkpoint(base).transformer
        for weights in sets:
            dit.backend.load(weights)
        assert len(transformer.peft_config) == 2
        assert all(torch.equal(dit.image(weights), images) for weights, images in zip(sets, first, strict=True))
        fulls = [dit.tuned(base, "full", seed=seed, name=f"f{seed}")[0] for seed in range(2)]
        for weights in (*fulls, base):
            dit.backend.load(weights)
        assert len(dit.backend._resident) == 3 and not hasattr(transformer, "peft_config")
        assert not any("base_layer" in name for name, _ in transformer.named_parameters())

    def test_what_sits_on_a_transformer_leaves_with_it(self, checkpoints, tmp_path):
        dit = Place("dit", tmp_path, checkpoints["dit"], max_resident=2)
        base = dit.start()
        under, _ = dit.tuned(base, "full", name="under")
        lora, _ = dit.tuned(under, name="lora")
        other, _ = dit.tuned(base, "full", seed=2, name="other")
        expected = dit.image(lora)
        for _ in range(2):
            dit.image(other)
            assert torch.equal(dit.image(lora), expected)
            assert len(dit.backend._resident) == 2

    def test_no_more_unets_are_in_memory_than_may_be(self, checkpoints, tmp_path):
        sd = Place("sd", tmp_path, checkpoints["sd"], max_unets=1)
        first, second = (sd.tuned(sd.store.base, "full", seed, name=f"f{seed}")[0] for seed in (1, 2))
        lora, _ = sd.tuned(first, name="lora")
        expected = [sd.image(weights) for weights in (first, second, lora)]
        for _ in range(2):
            for weights, images in zip((first, second, lora), expected, strict=True):
                assert torch.equal(sd.image(weights), images)
                assert len(sd.backend._unets) == 1
        sd.image(second)
        assert not sd.backend._loras


class TestRequests:
    def asked(self, place, weights, **fields):
        request = ImageGenerationRequest(prompt="x", **fields)
        return order(request, weights, place.backend, ImageDefaults())

    def test_a_dits_lora_has_classes_and_a_scale(self, dit):
        weights, _ = dit.tuned(dit.start())
        asked = self.asked(dit, weights, class_label="y", lora_scale=0.5, guidance_scale=2.0)
        assert asked.label == 1 and asked.sampling.lora_scale == 0.5

    def test_what_counts_for_nothing_is_refused(self, place):
        base = place.start()
        full, _ = place.tuned(base, "full")
        for weights in (base, full):
            with pytest.raises(UnsupportedField) as error:
                self.asked(place, weights, lora_scale=0.5)
            assert error.value.param == "lora_scale"
        if place.kind == "sd":
            lora, _ = place.tuned(base, name="lora")
            for weights in (full, lora):
                with pytest.raises(UnsupportedField, match="no visual tokens") as error:
                    self.asked(place, weights, class_label="y")
                assert error.value.param == "class_label"


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_equal_weights_are_equal_files(checkpoints, tmp_path, kind, parameters):
    """To the byte, so that their digests are equal: safetensors writes several metadata in any order."""
    place = Place(kind, tmp_path, checkpoints[kind])
    base = place.start()
    sets = [place.tuned(base, parameters)[0] for _ in range(6)]
    assert len({weights.ref.digest for weights in sets}) == 1
    other, _ = place.tuned(base, parameters, seed=2)
    assert other.ref.digest != sets[0].ref.digest


@pytest.mark.parametrize("kind", ["dit", "sd"])
def test_diffusers_reads_the_tuned_model_and_no_path_of_this_machine_is_told(checkpoints, tmp_path, kind):
    place = Place(kind, tmp_path, checkpoints[kind])
    weights, _ = place.tuned(place.start(), "full")
    folder = weights.folder / MODEL[kind]
    model = (DiTTransformer2DModel if kind == "dit" else UNet2DConditionModel).from_pretrained(folder).eval()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.named_parameters())
    if kind == "dit":
        assert model.config.num_embeds_ada_norm == 2  # the null class is the last row of three
        assert model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.shape[0] == 3
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    assert str(tmp_path) not in (folder / "config.json").read_text()
