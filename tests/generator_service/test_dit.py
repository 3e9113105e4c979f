import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from generator_service.backends.dit import Config, DiTBackend
from generator_service.backends.dit_checkpoint import CLASS_EMBEDDING, write_tables
from generator_service.backends.interface import Row, Sampling
from protocol.errors import Cancelled, InvalidRequest, UnknownClass, WeightsCorrupt
from tests.generator_service.tiny_dit import CLASSES, class_embedding, full, open_backend, save_checkpoint

# raised inside diffusers' DPM-Solver, for torch and numpy 2 together
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("pixel"))


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("latent"), vae=True, learned_sigma=True)


@pytest.fixture(scope="module")
def backend(folder):
    return open_backend(folder)


@pytest.fixture(scope="module")
def base(backend):
    return full(backend)


@pytest.fixture(scope="module")
def embedded():
    """The prior shipped with the package: a trained model."""
    return DiTBackend(Config(device="cpu"))


def picture(seed: int, size: int = 8, channels: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return np.repeat(drawn, 3 // channels, axis=2)


def noise(seed: int, shape: tuple[int, ...] = (1, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new_tables(backend, classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    own = backend.checkpoint(full(backend)).tables
    return {name: torch.randn(classes + 1, table.shape[1], generator=rng) for name, table in own.items()}


@torch.no_grad()
def reference_ddim(model, x, labels, guidance, steps, first=0, null=3):
    """DDIM at eta 0 (its eq. 12) on the clipped clean image, with guidance, one row at a time."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    signal = torch.cumprod(1 - betas, 0)
    times = [(1000 // steps) * i for i in reversed(range(steps))]
    x = x.double()
    for t in times[first:]:
        rows = []
        for one, label, scale in zip(x, labels, guidance, strict=True):
            eps = model(one[None].float(), torch.tensor([t]), torch.tensor([label])).sample
            free = model(one[None].float(), torch.tensor([t]), torch.tensor([null])).sample
            rows.append((free + scale * (eps - free))[0].double())
        eps = torch.stack(rows)
        before = signal[t - 1000 // steps] if t >= 1000 // steps else torch.tensor(1.0)
        clean = ((x - (1 - signal[t]).sqrt() * eps) / signal[t].sqrt()).clamp(-1, 1)
        eps = (x - signal[t].sqrt() * clean) / (1 - signal[t]).sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * eps
    return x.clamp(-1, 1).float()


class TestFromNoise:
    def test_equals_ddim_written_out(self, backend, base, folder):
        model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        rows = [Row(seed=5, label=0, guidance_scale=3.0), Row(seed=6, label=2, guidance_scale=1.5)]
        expected = reference_ddim(model, torch.stack([noise(5), noise(6)]), [0, 2], [3.0, 1.5], steps=8)
        got = backend.sample(base, rows, Sampling(8, "ddim", guided=True))
        torch.testing.assert_close(got[:, :1], expected, atol=1e-4, rtol=0)

    def test_rows_are_gray_rgb_rounded_to_levels(self, backend, base):
        rows, sampling = [Row(seed=1, label=1)], Sampling(4, "ddim")
        exact = backend.sample(base, rows, sampling).permute(0, 2, 3, 1).numpy()
        got = backend.generate(base, rows, sampling)
        assert got.dtype == np.uint8 and got.shape == (1, 8, 8, 3)
        assert (got[..., 0] == got[..., 1]).all() and (got[..., 0] == got[..., 2]).all()
        assert np.abs(got / 127.5 - 1 - exact).max() <= 0.5 / 127.5 + 1e-6

    def test_equals_the_diffusers_pipeline_with_vae_and_learned_sigma(self, latent_folder):
        backend = open_backend(latent_folder)
        pipeline = DiTPipeline(
            DiTTransformer2DModel.from_pretrained(latent_folder / "transformer"),
            AutoencoderKL.from_pretrained(latent_folder / "vae"),
            DDIMScheduler.from_pretrained(latent_folder / "scheduler"),
        )
        pipeline.set_progress_bar_config(disable=True)
        rngs = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        expected = pipeline([1, 2], guidance_scale=1.0, generator=rngs, num_inference_steps=6, output_type="pt").images
        rows = [Row(seed=3, label=1), Row(seed=4, label=2)]
        got = backend.sample(full(backend), rows, Sampling(6, "ddim"))
        assert backend.native_size() == (16, 16)
        torch.testing.assert_close((got + 1) / 2, expected, atol=1e-5, rtol=0)

    def test_dpm_solver_and_ddim_approach_the_same_solution(self, embedded):
        weights = full(embedded)
        rows = [Row(seed=seed, label=seed % 9) for seed in range(8)]
        limit = embedded.sample(weights, rows, Sampling(250, "ddim"))
        samples = [embedded.sample(weights, rows, Sampling(steps, "dpm-solver")) for steps in (5, 60)]
        coarse, fine = ((images - limit).abs().mean() for images in samples)
        assert fine < 0.03 and fine < coarse / 3

    def test_no_label_is_the_null_class_of_the_weights(self, backend, base, folder):
        model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        expected = reference_ddim(model, noise(9)[None], [len(CLASSES)], [1.0], steps=5)
        got = backend.sample(base, [Row(seed=9, label=None)], Sampling(5, "ddim"))
        torch.testing.assert_close(got[:, :1], expected, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_guidance_up_to_one_is_off_in_a_guided_batch(self, backend, base, scale):
        plain = backend.sample(base, [Row(seed=2, label=0)], Sampling(5, "ddim"))
        guided = backend.sample(base, [Row(seed=2, label=0, guidance_scale=scale)], Sampling(5, "ddim", guided=True))
        torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


class TestFromImage:
    def test_runs_the_last_part_of_the_schedule(self, backend, base, folder):
        model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
        image, calls = picture(1), []
        got = backend.sample(
            base, [Row(seed=4, label=1, image=image)], Sampling(10, "ddim", strength=0.69), lambda *at: calls.append(at)
        )
        assert calls == [(done, 6) for done in range(1, 7)]  # int(10 * 0.69)
        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[500]
        clean = torch.from_numpy(image[None, None, :, :, 0]) / 127.5 - 1
        start = signal.sqrt() * clean + (1 - signal).sqrt() * noise(4)
        expected = reference_ddim(model, start, [1], [1.0], steps=10, first=4)
        torch.testing.assert_close(got[:, :1], expected, atol=1e-4, rtol=0)

    def test_strength_too_small_for_a_step_returns_the_image(self, backend, base, latent_folder):
        gray = picture(3)
        got = backend.generate(base, [Row(seed=0, label=0, image=gray)], Sampling(10, "ddim", strength=0.09))
        assert (got[0] == gray).all()
        latent, colour = open_backend(latent_folder), picture(4, 16, 3)
        got = latent.generate(full(latent), [Row(seed=0, label=0, image=colour)], Sampling(10, "ddim", strength=0.0))
        assert (got[0] == colour).all()

    def test_strength_one_replaces_the_image(self, backend, base):
        rows = [Row(seed=8, label=1, image=picture(5)), Row(seed=8, label=1)]
        one, other = backend.generate(base, rows, Sampling(4, "ddim", strength=1.0))
        assert (one == other).all()

    def test_images_of_any_size_are_resized(self, backend, base):
        flat = np.full((31, 17, 3), 200, np.uint8)
        got = backend.generate(base, [Row(seed=0, label=0, image=flat)], Sampling(10, "ddim", strength=0.0))
        assert got.shape == (1, 8, 8, 3) and (got == 200).all()

    @pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver"])
    def test_mixes_with_rows_from_noise(self, backend, base, scheduler):
        sampling = Sampling(8, scheduler, strength=0.5, guided=True)
        rows = [Row(1, 0, 2.0), Row(2, 1, 2.0, image=picture(2)), Row(3, 2, 1.0)]
        calls = []
        mixed = backend.sample(base, rows, sampling, lambda *at: calls.append(at))
        assert calls == [(done, 12) for done in range(1, 13)]
        for row, got in zip(rows, mixed, strict=True):
            torch.testing.assert_close(got, backend.sample(base, [row], sampling)[0], atol=1e-4, rtol=0)

    def test_latents_pass_through_the_vae_scaled(self, latent_folder):
        backend = open_backend(latent_folder)
        checkpoint = backend.checkpoint(full(backend))
        vae = AutoencoderKL.from_pretrained(latent_folder / "vae").eval()
        image = picture(6, 16, 3)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
            decoded = vae.decode(latents).sample.clamp(-1, 1)
        torch.testing.assert_close(checkpoint.encode(image[None]), latents * 0.5)
        torch.testing.assert_close(checkpoint.decode(latents * 0.5), decoded)


class TestDeterminism:
    @pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver"])
    @pytest.mark.parametrize("strength", [1.0, 0.6])
    def test_batch_mates_change_a_row_by_at_most_the_tolerance(self, embedded, scheduler, strength):
        sampling = Sampling(10, scheduler, strength, guided=True)
        image = None if strength == 1 else picture(0)
        rows = [Row(seed=40 + i, label=i, guidance_scale=1.0 + i / 2, image=image) for i in range(12)]
        together = embedded.sample(full(embedded), rows, sampling)
        for row, got in zip(rows, together, strict=True):
            assert (got - embedded.sample(full(embedded), [row], sampling)[0]).abs().max() <= 1e-3

    def test_equal_batch_shapes_are_equal_to_the_bit(self, backend, base):
        sampling = Sampling(10, "ddim", guided=True)
        rows = [Row(seed=i, label=0, guidance_scale=2.0) for i in range(4)]
        others = [rows[0], *(Row(seed=90 + i, label=2, guidance_scale=5.0) for i in range(3))]
        assert torch.equal(backend.sample(base, rows, sampling), backend.sample(base, rows, sampling))
        assert torch.equal(backend.sample(base, rows, sampling)[0], backend.sample(base, others, sampling)[0])

    def test_cancelling_between_steps_leaves_the_backend_usable(self, backend, base):
        rows, sampling = [Row(seed=1, label=1)], Sampling(6, "dpm-solver")
        before = backend.sample(base, rows, sampling)

        def cancel(done: int, total: int) -> None:
            if done == 3:
                raise Cancelled("stop")

        with pytest.raises(Cancelled):
            backend.sample(base, rows, sampling, cancel)
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(backend.sample(base, rows, sampling), before)


class TestClassEmbeddings:
    def test_replaces_the_tables_of_every_block_and_the_null_class(self, backend, base, folder, tmp_path):
        tables = new_tables(backend, classes=5)
        write_tables(tables, tmp_path, base.ref.digest)
        weights = class_embedding(base, tmp_path, tuple("abcde"))
        before = backend.sample(base, [Row(seed=1, label=0)], Sampling(5, "ddim"))
        config = DiTTransformer2DModel.load_config(folder / "transformer") | {"num_embeds_ada_norm": 5}
        model = DiTTransformer2DModel.from_config(config).eval()
        model.load_state_dict(load_file(next((folder / "transformer").glob("*.safetensors"))) | tables)
        expected = reference_ddim(model, torch.stack([noise(1), noise(2)]), [4, 5], [2.0, 2.0], steps=5, null=5)
        rows = [Row(seed=1, label=4, guidance_scale=2.0), Row(seed=2, label=None, guidance_scale=2.0)]
        got = backend.sample(weights, rows, Sampling(5, "ddim", guided=True))
        torch.testing.assert_close(got[:, :1], expected, atol=1e-4, rtol=0)
        assert torch.equal(backend.sample(base, [Row(seed=1, label=0)], Sampling(5, "ddim")), before)

    def test_shares_the_backbone(self, backend, base, tmp_path):
        write_tables(new_tables(backend, classes=2), tmp_path, base.ref.digest)
        weights = class_embedding(base, tmp_path, ("a", "b"), name="sharing")
        assert backend.checkpoint(weights) is backend.checkpoint(base)

    def test_only_the_least_recently_used_sets_leave_memory(self, folder, tmp_path):
        backend = open_backend(folder, max_resident=3)
        sets = []
        for name in ("first", "second", "third"):
            (tmp_path / name).mkdir()
            write_tables(new_tables(backend, classes=2), tmp_path / name, full(backend).ref.digest)
            sets.append(class_embedding(full(backend), tmp_path / name, ("a", "b"), name))
        first, second, third = sets
        for weights in (first, second, first, third):  # with the base: second is the one to go
            backend.load(weights)
        for weights in sets:
            (weights.folder / CLASS_EMBEDDING).unlink()
        backend.load(first)
        backend.load(third)
        with pytest.raises(WeightsCorrupt, match="cannot be read"):
            backend.load(second)

    @pytest.mark.parametrize("damage", ["rows", "width", "block", "nan", "bytes", "file", "checkpoint"])
    def test_what_does_not_fit_is_refused(self, backend, base, tmp_path, damage):
        tables = new_tables(backend, classes=2)
        first = next(iter(tables))
        if damage == "rows":
            tables[first] = tables[first][:-1]
        if damage == "width":
            tables[first] = tables[first][:, :-1]
        if damage == "block":
            del tables[first]
        if damage == "nan":
            tables[first][0, 0] = float("nan")
        write_tables(tables, tmp_path, "another" if damage == "checkpoint" else base.ref.digest)
        path = tmp_path / CLASS_EMBEDDING
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:-8])
        if damage == "file":
            path.unlink()
        with pytest.raises(WeightsCorrupt, match=CLASS_EMBEDDING):
            backend.load(class_embedding(base, tmp_path, ("a", "b"), name=f"damaged-{damage}"))


class TestRequests:
    def test_a_label_outside_the_weights(self, backend, base):
        with pytest.raises(UnknownClass, match="use 0 to 2"):
            backend.generate(base, [Row(seed=0, label=3)], Sampling(2, "ddim"))

    def test_more_steps_than_the_schedule_has(self, backend, base):
        with pytest.raises(InvalidRequest, match="ask for fewer"):
            backend.generate(base, [Row(seed=0, label=0)], Sampling(1000, "dpm-solver"))


def test_bfloat16_stays_close_to_float32(backend, base, folder):
    rows, sampling = [Row(seed=1, label=0)], Sampling(5, "ddim")
    half = open_backend(folder, dtype="bfloat16")
    assert (half.sample(full(half), rows, sampling) - backend.sample(base, rows, sampling)).abs().mean() < 0.05
