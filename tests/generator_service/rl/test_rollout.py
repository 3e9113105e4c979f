from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from generator_service.rl import logprob, rollout
from generator_service.rl.reverse_process import ReverseProcess, RowNoise
from generator_service.rl.rollout import Wanted
from protocol.errors import InvalidRequest
from tests.generator_service.rl.tiny_policy import CLASSES, checkpoint, job, opened, run
from tests.generator_service.tiny_dit import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dit"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_diffusers_own_ddim(folder, guidance):
    """Its scheduler steps the same model, with the noise that a row's generator draws."""
    with opened(folder, job(rollout={"guidance_scale": guidance, "denoising_steps": 7, "eta": 0.7})) as tiny:
        made = tiny.sampled(ring := tiny.trajectories())
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(7)
        for number, batch in enumerate(made.batches):
            noise = RowNoise(batch.seeds, (1, 8, 8), torch.device("cpu"))
            latents = noise.draw()
            seen = list(ring.read(number, batch, range(7)))
            for step, time in enumerate(scheduler.timesteps):
                assert torch.allclose(seen[step].before, latents, atol=1e-5)
                times = time.expand(len(latents))
                with torch.no_grad(), tiny.policy.in_use():
                    output = tiny.policy.predict(latents, times, batch.labels, guidance)
                options = {"eta": 0.7, "use_clipped_model_output": True, "variance_noise": noise.draw()}
                latents = scheduler.step(output, time, latents, **options).prev_sample
            assert torch.allclose(seen[-1].after, latents, atol=1e-5)
            pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            shown = torch.from_numpy(made.images)[batch.rows, :, :, 0]
            assert (shown.int() - pixels[:, 0].int()).abs().max() <= 1


def test_what_is_drawn():
    """Each identity once and its samples side by side; all of them where there are fewer than wanted."""
    rng = torch.Generator().manual_seed(0)
    draws = [rollout.draw([2, 5, 7, 9], 3, 2, rng) for _ in range(30)]
    for wanted in draws:
        chosen = wanted.labels.tolist()
        assert chosen[::2] == chosen[1::2] and len(set(chosen)) == 3 and set(chosen) <= {2, 5, 7, 9}
        assert len(set(wanted.seeds)) == 6
    assert len({tuple(wanted.labels.tolist()) for wanted in draws}) > 10
    assert sorted(rollout.draw([2, 5], 8, 1, rng).labels.tolist()) == [2, 5]
    again = rollout.draw([2, 5, 7, 9], 3, 2, torch.Generator().manual_seed(0))
    assert again.seeds == draws[0].seeds and again.labels.equal(draws[0].labels)


def test_a_row_does_not_depend_on_its_batch_mates(folder):
    with opened(folder) as tiny:
        labels, seeds = torch.tensor([0, 1, 2]), [11, 12, 13]
        together = tiny.sampled(tiny.trajectories(), Wanted(labels, seeds))
        alone = tiny.sampled(tiny.trajectories(), Wanted(labels[1:2], seeds[1:2]))
        other = tiny.sampled(tiny.trajectories(), Wanted(labels, [1, 12, 99]))
    assert abs(together.images[1].astype(int) - alone.images[0]).max() <= 1
    assert (together.images[1] == other.images[1]).all() and (together.images[0] != other.images[0]).any()


def test_the_log_probability_is_the_gaussian_density_of_the_noise_that_was_drawn(folder):
    with opened(folder) as tiny:
        made = tiny.sampled(tiny.trajectories())
        for batch in made.batches:
            noise = RowNoise(batch.seeds, (1, 8, 8), torch.device("cpu"))
            noise.draw()
            for step in range(3):
                with torch.no_grad(), tiny.policy.in_use():
                    latents = torch.zeros(len(batch.labels), 1, 8, 8)
                    steps = torch.full_like(batch.labels, step)
                    _, transition = tiny.process.forward(latents, batch.labels, steps)
                density = torch.distributions.Normal(0.0, transition.std).log_prob(transition.std * noise.draw())
                assert torch.allclose(batch.log_prob[step], density.mean((1, 2, 3)), atol=1e-4)


def test_a_step_without_variance_is_no_choice_and_nothing_is_learnt_of_it(tmp_path, folder):
    with opened(save_checkpoint(tmp_path)) as tiny:  # its schedule ends at the clean image
        made = tiny.sampled(tiny.trajectories())
        assert tiny.process.learnt == [0, 1] and (made.batches[0].log_prob[2] == 0).all()
    with opened(folder) as tiny:
        assert tiny.process.learnt == [0, 1, 2]


@pytest.mark.parametrize("keep", ["store", "recompute"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"denoising_steps": 8}])
def test_on_unchanged_weights_replay_differs_by_exactly_0(folder, keep, precision, options):
    """Log-probabilities with gradients, of batches with the shape of those that were sampled."""
    wanted = job(rollout=options, update={"precision": precision}, policy={"keep": keep})
    with opened(folder, wanted) as tiny:
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        for number, batch in enumerate(made.batches):
            for piece in trajectories.read(number, batch, tiny.process.learnt):
                with tiny.policy.in_use():
                    _, transition = tiny.process.forward(piece.before, piece.labels, piece.steps)
                now = logprob.log_prob(transition, piece.after)
                assert now.requires_grad and (now - piece.log_prob).abs().max() == 0
                assert ((now - piece.log_prob).exp() == 1).all()


def test_learned_variance(tmp_path, folder):
    """Of a model that tells it: steps are its own; of one that does not, the job is refused."""
    save_checkpoint(tmp_path, learned_sigma=True)
    with opened(tmp_path, job(rollout={"variance": "learned", "denoising_steps": 4})) as tiny:
        trajectories = tiny.trajectories()
        made = tiny.sampled(trajectories)
        assert tiny.process.learnt == [0, 1, 2]  # its last step leads to the clean image
        piece = next(trajectories.read(0, made.batches[0], [1]))
        with torch.no_grad(), tiny.policy.in_use():
            output, transition = tiny.process.forward(piece.before, piece.labels, piece.steps)
        assert output.shape[1] == 2 and transition.std.shape == piece.before.shape
        assert transition.std.flatten(1).std(1).min() > 0
        assert logprob.log_prob(transition, piece.after).equal(piece.log_prob)
    with pytest.raises(InvalidRequest, match='variance = "ddim"') as caught, opened(folder) as tiny:
        ReverseProcess(tiny.policy, job(rollout={"variance": "learned"}).rollout, "float32")
    assert caught.value.param == "rollout.variance"


def test_more_steps_than_the_schedule_has_are_refused(tmp_path):
    checkpoint(tmp_path, num_train_timesteps=10)
    with (
        pytest.raises(InvalidRequest, match="20 steps") as caught,
        opened(tmp_path, job(rollout={"denoising_steps": 20})),
    ):
        pass
    assert caught.value.param == "rollout.denoising_steps"


def test_it_can_be_stopped_between_denoising_steps(folder):
    with opened(folder) as tiny:
        pieces = rollout.sample(tiny.process, tiny.wanted(), 4, tiny.trajectories())
        assert sum(1 for _ in pieces) == 2 * 3  # batches of 4 and 2 rows, three steps each
        run(rollout.sample(tiny.process, Wanted(torch.tensor([len(CLASSES) - 1]), [1]), 4, tiny.trajectories()))
