"""Learning a sampling policy with a tiny text-to-video model of the real classes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from generator_service.backends.interface import Row, Sampling, WeightSet
from generator_service.registry import CLIP_REWARDS, FACE_READERS
from generator_service.rl import policy_job as policy_job_module
from generator_service.rl.clip_judge import ClipJudge
from generator_service.rl.clip_pairs import Source
from generator_service.rl.reward_terms import reward_functions
from generator_service.rl.sampling_policy import actions, read_policy
from protocol.errors import GenerationFailed, InvalidRequest
from protocol.messages import WeightsRef, sample_id, seed_of
from tests.generator_service import tiny_t2v
from tests.generator_service.rl.clip_place import READER, Config, Run, ShadesReader, drawn, policy_job, source


@pytest.fixture(autouse=True)
def _reader(monkeypatch):
    monkeypatch.setitem(FACE_READERS, "shades", READER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_t2v.save_checkpoint(tmp_path_factory.mktemp("t2v"))


@pytest.fixture(scope="module")
def backend(folder):
    return tiny_t2v.open_backend(folder, window=2)


@pytest.fixture(scope="module")
def given(tmp_path_factory, backend):
    return source(drawn(tmp_path_factory.mktemp("clips")), backend)


# ---------------------------------------------------------------- the result


def test_the_result_is_a_weight_set_whose_policy_the_backend_serves(backend, given, tmp_path):
    run = Run(backend, given, tmp_path, policy_job()).to_end()
    assert run.kind == "policy" and run.files.keys() == {"policy.json", "policy.safetensors"}
    made = WeightSet(
        WeightsRef(name="chooser", version=1, digest="chooser"),
        "ti2v",
        run.kind,
        tiny_t2v.full(backend),
        (),
        run.folder,
    )
    backend.load(made)
    image = given.first_frame(given.split(policy_job())[0][0])
    rows = [Row(seed=1, label=None, prompt="she smiles", image=image), Row(seed=2, label=None, prompt="x", image=image)]
    sampling = Sampling(9, "ddim", guided=True, frames=2, policy=True)
    chosen = backend.chosen(made, rows, sampling)
    best = read_policy(run.folder).best(*backend.state(made, rows))
    assert [(row.steps, row.guidance) for row in chosen] == [(action.steps, action.guidance) for action in best]
    assert backend.generate(made, chosen, sampling).shape == (2, 2, 32, 32, 3)


def end_of(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def test_what_it_tells(backend, given, tmp_path):
    run = Run(backend, given, tmp_path, policy_job()).to_end()
    assert [(progress.step, progress.steps) for progress in run.progress] == [(step, 4) for step in range(1, 5)]
    assert ["validation" in progress.data for progress in run.progress] == [False, True, False, True]
    for progress in run.progress:
        data = json.loads(json.dumps(progress.data, allow_nan=False))
        weights = {"steps": 1.0, "quality": 3.0, "face": 3.0, "amplitude": 3.0}
        assert data["reward"] == pytest.approx(sum(weights[name] * value for name, value in data["rewards"].items()))
        assert data["rewarded"] <= data["reward"]
    assert run.told("rewarded") != run.told("reward")  # of some the penalty was taken
    assert run.told("entropy")[0] == pytest.approx(np.log(4), abs=1e-5) and run.told("entropy")[-1] < np.log(4)
    told = json.loads(json.dumps(run.metadata, allow_nan=False))
    assert (told["step"], told["method"], told["faces"], told["pairs"]) == (4, "reinforce", "shades", 10)
    assert (
        told["classes"] == ["fear", "surprise"] and told["options"]["batch_size"] == 2 and "name" not in told["options"]
    )
    assert told["clips"] == run.told("clips")[-1] and told["first"]["reward"] == run.told("reward")[0]
    measured = told["validation"]
    assert measured["states"] == 2 and measured["fixed"]["mean"] <= measured["oracle"]["mean"]
    assert [(one["steps"], one["a"]) for one in measured["actions"]] == [(1, 2.0), (1, 3.0), (2, 2.0), (2, 3.0)]
    assert sum(one["chosen"] for one in measured["actions"]) == 2


def test_a_reward_is_that_of_the_clip_that_the_action_makes(backend, given, tmp_path):
    """Against a clip that is made apart, with the same seed, and what the reader says of it."""
    terms = {"face": {"weight": 2.0}, "steps": {"weight": 0.5}, "amplitude": {"weight": 1.0}}
    job = policy_job(rewards=terms, generate_batch=1)
    pairs, space = given.split(job)[0], actions(job.actions)
    base = tiny_t2v.full(backend)
    rewards, reader = reward_functions(job, CLIP_REWARDS), ShadesReader(Config())
    judge = ClipJudge(backend, base, given, reader, rewards, job, pairs, space, tmp_path, "x")
    found = end_of(judge.worth([(1, 0), (4, 3), (1, 0)], draw=7))
    assert found.keys() == {(1, 0), (4, 3)} and judge.made == 2
    action = space[3]
    row = Row(
        seed=seed_of(sample_id("policy", job.seed, pairs[4].name, 0)),
        label=None,
        prompt=pairs[4].prompt,
        negative_prompt="blurry",
        image=given.first_frame(pairs[4]),
        guidance=action.guidance,
        steps=action.steps,
    )
    clip = backend.generate(base, [row], Sampling(1, "ddim", guided=True, frames=2))[0] / 255
    presence = clip.mean((1, 2, 3))
    moved = [max(0.0, clip[0][part].mean() - clip[1][part].mean()) for part in (slice(16), slice(16, 32))]
    weak = (1 + 1 - np.linalg.norm(moved) / 1.5) / 2
    assert found[4, 3].tolist() == pytest.approx([presence.mean(), 0.0, weak], abs=1e-12) and weak < 1
    assert judge.total(found[4, 3]) == pytest.approx(2 * presence.mean() + weak)
    assert found[1, 0][1] == 0.5  # one step of two at most


def test_clips_of_a_pair_and_action_are_made_once(backend, given, tmp_path):
    """At most pairs times actions, while without a cache every update makes its own, with a seed of its own."""
    seeds: dict[bool, list[int]] = {}
    for cache in (True, False):
        made = []
        generate = backend.generate

        def spy(weights, rows, *rest, made=made, generate=generate):
            made += [(row.seed, row.prompt, row.steps, row.guidance.a) for row in rows]
            return generate(weights, rows, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "generate", spy)
            run = Run(backend, given, tmp_path / str(cache), policy_job(steps=5, cache=cache)).to_end()
        seeds[cache] = [seed for seed, *_ in made]
        assert len(made) == run.metadata["clips"]
        assert not cache or len(set(made)) == len(made) <= 4 * (10 + 2)
    assert len(set(seeds[True])) < len(set(seeds[False])) == 2 + 5 * 2  # of those measured, and of each update


def test_others_are_served_between_batches_and_see_nothing_of_it(backend, given, tmp_path):
    straight = Run(backend, given, tmp_path / "a", policy_job(generate_batch=2)).to_end()
    row = [Row(seed=1, label=None, prompt="x", image=np.zeros((32, 32, 3), np.uint8))]
    sampling = Sampling(1, "ddim", frames=2)
    before = backend.generate(tiny_t2v.full(backend), row, sampling)
    between = Run(backend, given, tmp_path / "b", policy_job(generate_batch=2))
    served = [(backend.generate(tiny_t2v.full(backend), row, sampling) == before).all() for _ in between]
    assert all(served) and between.pauses >= between.metadata["clips"] // 2
    assert between.files == straight.files


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("options", [{}, {"cache": False, "baseline": "state"}])
def test_interrupted_and_resumed_it_ends_with_equal_bits(backend, folder, given, tmp_path, options):
    job = policy_job(steps=5, checkpoint_every=2, **options)
    straight = Run(backend, given, tmp_path / "a", job).to_end()
    cut = Run(backend, given, tmp_path / "b", job).to_step(3)  # the third update is done twice
    resumed = Run(tiny_t2v.open_backend(folder, window=2), given, tmp_path / "b", job).to_end()
    assert resumed.progress[0].step == 3 and len(cut.progress) == 3
    assert resumed.files == straight.files
    assert [progress.data for progress in resumed.progress] == [progress.data for progress in straight.progress[2:]]
    assert resumed.metadata | {"seconds": 0} == straight.metadata | {"seconds": 0}


def test_killed_before_its_first_checkpoint_it_makes_no_clip_twice(backend, given, tmp_path):
    job, made, generate = policy_job(generate_batch=2, checkpoint_every=3), [], backend.generate

    def spy(weights, rows, *rest):
        made.extend((row.prompt, row.seed, row.steps, row.guidance.a) for row in rows)
        return generate(weights, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "generate", spy)
        straight = Run(backend, given, tmp_path / "a", job).to_end()
        wanted = sorted(made)
        made.clear()
        killed = Run(backend, given, tmp_path / "b", job)
        for _, _ in zip(range(3), killed, strict=False):
            pass  # among the clips of the pairs that it is measured on
        assert not killed.progress and len(made) >= 2
        (path,) = killed.unfinished.glob("rewards-*.jsonl")
        path.write_bytes(path.read_bytes() + b"\n[0, 1, [0.2")  # cut off
        Run(backend, given, tmp_path / "b", job).to_step(2)
        resumed = Run(backend, given, tmp_path / "b", job).to_end()
    assert sorted(made) == wanted
    assert resumed.files == straight.files and resumed.metadata["clips"] == straight.metadata["clips"]


def test_clips_are_told_of_before_the_first_update(backend, given, tmp_path):
    """The first update may be an hour away."""
    run = Run(backend, given, tmp_path, policy_job(generate_batch=2))
    told = [progress.data for progress in run if progress.data]  # nothing while texts are composed
    assert told[0] == {"clips": 2} and "reward" not in told[0]
    counts = [data["clips"] for data in told]
    assert counts == sorted(counts)


def test_a_checkpoint_of_another_base_is_not_gone_on_with(backend, given, tmp_path, caplog):
    job = policy_job(checkpoint_every=1)
    Run(backend, given, tmp_path, job).to_step(2)
    other = Run(backend, given, tmp_path, job, tiny_t2v.full(backend, name="other")).to_step(1)
    assert other.progress[0].step == 1 and "of another adaptation" in caplog.text


# ---------------------------------------------------------------- it learns


def test_where_light_frames_pay_it_learns_the_action_that_makes_them(backend, given, tmp_path):
    """An environment that is a function of the action, told in pixels: each action makes clips of its own shade."""
    shades = {(1, 2.0): 60, (1, 3.0): 120, (2, 2.0): 240, (2, 3.0): 20}

    def generate(weights, rows, sampling, on_step=None):
        return np.stack([np.full((2, 32, 32, 3), shades[row.steps, row.guidance.a], dtype=np.uint8) for row in rows])

    job = policy_job(rewards={"face": {"weight": 5.0}}, steps=30, batch_size=8, validate_every=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "generate", generate)
        run = Run(backend, given, tmp_path, job).to_end()
    measured = run.metadata["validation"]
    assert measured["learned"]["mean"] == measured["oracle"]["mean"] == pytest.approx(5 * 240 / 255)
    assert measured["random"]["mean"] == pytest.approx(5 * 110 / 255) and measured["agrees"] == 1.0
    assert np.mean(run.told("reward")[-5:]) > np.mean(run.told("reward")[:5]) + 1
    assert run.told("entropy")[-1] < run.told("entropy")[0] / 2
    assert not any("findings" in progress.data for progress in run.progress)  # settled, on what is best everywhere


def test_settling_on_a_worse_action_is_told(backend, given, tmp_path, monkeypatch):
    """A learner that always teaches the first action, whatever the rewards."""
    shades = {(1, 2.0): 60, (1, 3.0): 120, (2, 2.0): 240, (2, 3.0): 20}

    def generate(weights, rows, sampling, on_step=None):
        return np.stack([np.full((2, 32, 32, 3), shades[row.steps, row.guidance.a], dtype=np.uint8) for row in rows])

    def first(rewards, top, penalty):
        return np.where(rewards == 5 * 60 / 255, 8.0, -8.0)

    monkeypatch.setattr(backend, "generate", generate)
    monkeypatch.setattr(policy_job_module, "relative", first)
    job = policy_job(rewards={"face": {"weight": 5.0}}, steps=15, batch_size=8, learning_rate=3e-2, validate_every=5)
    findings = [progress.data.get("findings") for progress in Run(backend, given, tmp_path, job).to_end().progress]
    assert findings[0] is None  # indifferent, and nothing measured
    assert "baseline" in findings[-1][0]["message"] and findings[-1][0]["kind"] == "settled"


# ---------------------------------------------------------------- the arm that draws


def test_a_random_policy_learns_nothing_and_makes_no_clip(backend, given, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "_composed", None)  # nor a text, which a model takes long for
    run = Run(backend, replace(given, faces=None), tmp_path, policy_job(method="random", seed=5)).to_end()
    assert run.files.keys() == {"policy.json"} and run.progress == [] and run.metadata["method"] == "random"
    latents, text = torch.randn(40, 4, 4, 4), torch.randn(40, 7, 16)
    drawn_actions = read_policy(run.folder).best(latents, text)
    assert set(drawn_actions) == set(actions(policy_job().actions))


# ---------------------------------------------------------------- bad input


def test_what_goes_wrong_with_a_clip_is_told(backend, given, tmp_path):
    with pytest.raises(InvalidRequest, match="steps"):
        wanted = {"steps": [1, 1000], "pairs": [(2.0, 2.0)]}
        Run(backend, given, tmp_path / "a", policy_job(actions=wanted)).to_end()
    with pytest.raises(InvalidRequest, match="alpha from 0 to 1"):
        rewards = {"quality": {"weight": 1.0, "options": {"alpha": 3.0}}}
        Run(backend, given, tmp_path / "b", policy_job(rewards=rewards)).to_end()


def test_a_clip_that_finds_no_room_is_told(backend, given, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backend, "generate", full)
    with pytest.raises(GenerationFailed, match="one clip does not fit"):
        Run(backend, given, tmp_path, policy_job(generate_batch=1)).to_end()
