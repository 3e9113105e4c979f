from __future__ import annotations

import pytest
import torch

from generator_service.rl.trajectories import Ring, SampledBatch, Transitions, in_pieces
from tests.generator_service.rl.tiny_policy import brightness, checkpoint, job, opened, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dit"))


def batch(rows: int, steps: int = 2) -> SampledBatch:
    numbers = torch.arange(rows)
    return SampledBatch(numbers, numbers % 2, numbers.tolist(), torch.arange(steps * rows).float().view(steps, rows))


def latents(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows, 1, 2, 2), value)


def test_what_is_stored_is_what_is_read():
    ring = Ring(capacity=2, rows=3, steps=2, shape=(1, 2, 2), device=CPU, offload=False)
    for number, rows in enumerate((3, 2)):  # the last batch of a rollout may be smaller
        ring.begin(number, latents(rows, 10.0 * number))
        for step in range(2):
            ring.add(number, step, latents(rows, 10.0 * number + step + 1))
    first, last = ring.read(1, batch(2), [0, 1])
    assert (first.before == 10).all() and (first.after == 11).all() and (last.after == 12).all() and len(first) == 2
    assert first.steps.tolist() == [0, 0] and last.log_prob.tolist() == [2, 3] and last.labels.tolist() == [0, 1]
    assert [piece.before.mean().item() for piece in ring.read(0, batch(3), [1])] == [1]


def test_the_oldest_batch_makes_room_and_is_not_read_by_mistake():
    ring = Ring(capacity=2, rows=1, steps=1, shape=(1, 2, 2), device=CPU, offload=True)
    for number in range(3):
        ring.begin(number, latents(1, number))
        ring.add(number, 0, latents(1, number + 0.5))
    assert next(ring.read(2, batch(1), [0])).before.mean() == 2
    assert next(ring.read(1, batch(1), [0])).before.mean() == 1
    with pytest.raises(AssertionError, match="batch 0 was overwritten"):
        next(ring.read(0, batch(1), [0]))


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ([4, 4, 2], 4, [4, 4, 2]),
        ([2, 2, 2], 4, [2, 2, 2]),  # a last batch is smaller, and what was sampled stays together
        ([4, 4, 2], 7, [4, 4, 2]),
        ([4, 4, 4, 2], 8, [8, 6]),
        ([4, 4], 3, [3, 1, 3, 1]),
        ([4, 2], 1, [1] * 6),
        ([], 2, []),
    ],
)
def test_pieces_have_all_transitions_in_order(sizes, size, expected):
    rows = torch.arange(sum(sizes)).split(sizes)
    parts = [Transitions(part, part, part, part.float(), part.float(), part.float()) for part in rows]
    pieces = list(in_pieces(parts, size, batch_size=4))
    assert [len(piece) for piece in pieces] == expected
    joined = torch.cat([piece.after for piece in pieces]) if pieces else torch.empty(0)
    assert joined.tolist() == list(range(sum(sizes)))


UPDATES = [
    {},
    {"epochs": 2, "optimizer_steps": 2, "clip": 0.5},
    {"epochs": 2, "optimizer_steps": 3, "clip": 0.5, "batch_size": 9},
    {"optimizer_steps": 2, "batch_size": 3, "precision": "bfloat16"},
]


def updated(folder, update, parameters, **policy) -> tuple[dict[str, torch.Tensor], tuple]:
    wanted = job(update=update, policy={"parameters": parameters, **policy}, rollout={"guidance_scale": 2.0})
    with opened(folder, wanted) as tiny:
        rng, told = torch.Generator().manual_seed(5), None
        trajectories = tiny.trajectories()
        for seed in range(2):  # the second rollout is made with weights that have learnt
            made = tiny.sampled(trajectories, tiny.wanted(seed))
            told = run(tiny.learner.learn(made, trajectories, brightness(made), rng))
        return tiny.policy.state(), told


@pytest.mark.parametrize("parameters", ["lora", "full"])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_are_equal_to_the_bit_however_latents_are_kept(folder, update, parameters):
    stored, told = updated(folder, update, parameters, keep="store")
    for other in ({"keep": "recompute"}, {"keep": "store", "offload": True}):
        weights, also_told = updated(folder, update, parameters, **other)
        assert also_told == told
        assert all(torch.equal(weights[name], stored[name]) for name in stored)
    with opened(folder, job(policy={"parameters": parameters})) as tiny:
        begun = tiny.policy.state()
    assert any(not torch.equal(begun[name], stored[name]) for name in stored)


def test_what_is_made_again_is_made_with_the_weights_that_sampled_it(folder):
    """Also when the policy has learnt since; and it is left as it was."""
    wanted = job(policy={"keep": "recompute", "parameters": "full"})
    with opened(folder, wanted) as tiny, opened(folder, job(policy={"parameters": "full"})) as other:
        trajectories, ring = tiny.trajectories(), other.trajectories()
        made, same = tiny.sampled(trajectories), other.sampled(ring)
        trajectories.weights_change()
        with torch.no_grad():
            for value in tiny.policy.parameters.values():
                value.add_(0.05)
        changed = tiny.policy.state()
        for number, sampled in enumerate(made.batches):
            again = trajectories.read(number, sampled, [0, 2])
            for now, then in zip(again, ring.read(number, same.batches[number], [0, 2]), strict=True):
                assert now.before.equal(then.before) and now.after.equal(then.after) and now.steps.equal(then.steps)
        after = tiny.policy.state()
        assert all(after[name].equal(changed[name]) for name in changed)
        assert not any(value.requires_grad and value.grad is not None for value in tiny.policy.parameters.values())


def test_making_again_stores_no_latents(folder):
    with opened(folder, job(policy={"keep": "recompute"})) as tiny:
        trajectories = tiny.trajectories()
        tiny.sampled(trajectories)
        held = [value for value in vars(trajectories).values() if isinstance(value, torch.Tensor | dict | list)]
        assert held == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_what_is_offloaded_is_pinned_and_comes_back_equal():
    device = torch.device("cuda")
    ring = Ring(capacity=1, rows=3, steps=2, shape=(1, 2, 2), device=device, offload=True)
    made = [torch.randn(3, 1, 2, 2, device=device) for _ in range(3)]
    ring.begin(0, made[0])
    for step in range(2):
        ring.add(0, step, made[step + 1])
    sampled = batch(3)
    for step, piece in enumerate(ring.read(0, sampled, [0, 1])):
        assert (
            piece.before.device.type == "cuda" and piece.before.equal(made[step]) and piece.after.equal(made[step + 1])
        )
