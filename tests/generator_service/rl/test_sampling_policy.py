from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from generator_service.rl.sampling_policy import RandomPolicy, SamplingPolicy, Sizes, actions, read_policy, write_policy
from protocol.errors import WeightsCorrupt
from protocol.policy import ActionSpace

SPACE = ActionSpace()
PRINTED = ActionSpace(factorised=True)


def sizes(space: ActionSpace = SPACE, **more) -> Sizes:
    return Sizes(actions=space, method="reinforce", channels=4, text_width=6, width=8, attention_heads=2, **more)


def policy(space: ActionSpace = SPACE, seed: int = 0, spread: float = 1.0) -> SamplingPolicy:
    """One that has opinions, as a policy has that learnt something."""
    torch.manual_seed(seed)
    made = SamplingPolicy(sizes(space))
    for head in made.heads:
        torch.nn.init.normal_(head[-1].weight, std=spread)
        torch.nn.init.normal_(head[-1].bias, std=spread)
    return made


def states(count: int = 3, side: int = 8, words: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, side, side, generator=rng), torch.randn(count, words, 6, generator=rng)


# ---------------------------------------------------------------- what there is to choose


def test_actions_are_the_paper_s_and_the_pair_that_it_does_not_list_only_as_printed():
    listed = [(action.steps, action.guidance.a, action.guidance.b) for action in actions(SPACE)]
    pairs = [(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)]
    assert listed == [(count, a, b) for count in (5, 10, 15, 20) for a, b in pairs]
    printed = {(action.steps, action.guidance.a, action.guidance.b) for action in actions(PRINTED)}
    assert printed == set(product((5, 10, 15, 20), (2.0, 3.0), (2.0, 3.0))) and len(actions(PRINTED)) == 16
    assert {(action.guidance.minimum, action.guidance.maximum) for action in actions(SPACE)} == {(7.0, 11.0)}
    curved = actions(ActionSpace(minimum=1.0, maximum=2.0, peak_normalised=True))[0].guidance
    assert (curved.minimum, curved.maximum, curved.peak_normalised) == (1.0, 2.0, True)


# ---------------------------------------------------------------- the distribution, eq. 13


def test_it_begins_indifferent():
    torch.manual_seed(0)
    fresh = SamplingPolicy(sizes())
    assert torch.allclose(fresh(*states()), torch.full((3, 12), -math.log(12)))
    assert fresh.entropy(*states()).tolist() == pytest.approx([math.log(12)] * 3)


@pytest.mark.parametrize(("space", "heads"), [(SPACE, [4, 3]), (PRINTED, [4, 2, 2])])
def test_the_joint_is_the_product_of_its_heads(space, heads):
    """By hand from the logits of each, in the order of `actions`."""
    made = policy(space)
    with torch.no_grad():
        fused = made.fused(*states())
        parts = [head(fused).softmax(1) for head in made.heads]
        found = made(*states()).exp()
    assert [part.shape[1] for part in parts] == heads
    for row in range(3):
        wanted = [
            math.prod(float(part[row, i]) for part, i in zip(parts, at, strict=True))
            for at in product(*map(range, heads))
        ]
        assert found[row].tolist() == pytest.approx(wanted, rel=1e-5)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert len(made.actions) == math.prod(heads)


def test_log_prob_and_entropy_are_of_that_distribution():
    made, (latents, text) = policy(), states()
    joint = made(latents, text).detach().double()
    chosen = torch.tensor([[0, 5], [11, 11], [3, 7]])
    wanted = [[float(joint[row, index]) for index in indices] for row, indices in enumerate(chosen.tolist())]
    assert made.log_prob(latents, text, chosen).tolist() == [pytest.approx(row) for row in wanted]
    assert made.entropy(latents, text).tolist() == pytest.approx((-(joint.exp() * joint).sum(1)).tolist(), rel=1e-5)


def test_it_draws_as_often_as_it_says():
    """Within 4.5 standard errors, each of the 12."""
    made, (latents, text) = policy(spread=0.3), states(1)
    drawn = made.sample(latents, text, 20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 20_000)
    wanted = made(latents, text)[0].exp().detach().numpy()
    share = np.bincount(drawn[0].numpy(), minlength=12) / 20_000
    assert (np.abs(share - wanted) < 4.5 * np.sqrt(wanted * (1 - wanted) / 20_000)).all() and wanted.max() > 0.13
    again = made.sample(latents, text, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("space", [SPACE, PRINTED])
def test_the_best_is_the_largest_of_each_head(space):
    made = policy(space)
    with torch.no_grad():
        fused = made.fused(*states(20))
        parts = [head(fused).argmax(1).tolist() for head in made.heads]
    shapes = list(space.pairs) if not space.factorised else list(product((2.0, 3.0), (2.0, 3.0)))
    for row, action in enumerate(made.best(*states(20))):
        index = parts[1][row] if not space.factorised else 2 * parts[1][row] + parts[2][row]
        assert (action.steps, (action.guidance.a, action.guidance.b)) == (space.steps[parts[0][row]], shapes[index])


# ---------------------------------------------------------------- what it looks at


def test_it_sees_the_image_where_it_is_and_the_text():
    made, (latents, text) = policy(), states(1)
    before = made(latents, text)
    moved = latents.roll(1, dims=3)
    assert not torch.allclose(made(moved, text), before, atol=1e-4)
    assert not torch.allclose(made(latents, text + torch.randn(1, 5, 6)), before, atol=1e-4)
    dark = latents.clone()
    dark[:, :, 0, 0] += 3
    assert not torch.allclose(made(dark, text), before, atol=1e-4)


@pytest.mark.parametrize(("side", "words"), [(8, 5), (4, 5), (13, 77), (64, 1)])
def test_clips_of_every_size_and_texts_of_every_length(side, words):
    made = policy()
    assert made(*states(2, side, words)).exp().sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_a_state_is_not_touched_by_its_batch_mates():
    made, (latents, text) = policy(), states(4)
    together = made(latents, text)
    alone = torch.cat([made(latents[i : i + 1], text[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


# ---------------------------------------------------------------- its files


@pytest.mark.parametrize("space", [SPACE, PRINTED])
def test_it_comes_back_from_its_files(tmp_path, space):
    made = policy(space)
    write_policy(tmp_path, made)
    found = read_policy(tmp_path)
    assert torch.equal(found(*states()), made(*states())) and found.best(*states()) == made.best(*states())
    (tmp_path / "again").mkdir()
    write_policy(tmp_path / "again", found)
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["policy.json", "policy.safetensors"]
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def changed(tensors: dict[str, torch.Tensor], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors | {name.replace("__", "."): value for name, value in more.items()}


def test_what_does_not_fit_is_refused(tmp_path):
    write_policy(tmp_path, policy())
    path = tmp_path / "policy.safetensors"
    whole = load_file(path)
    nan = changed(whole, place=torch.full((64, 8), math.nan))
    cases = [
        ({name: value for name, value in whole.items() if name != "place"}, "place is missing"),
        (changed(whole, more=torch.zeros(1)), "more"),
        (changed(whole, heads__0__2__bias=torch.zeros(5)), "heads.0.2.bias"),
        (nan, "place is missing, not finite"),
    ]
    for tensors, told in cases:
        save_file(tensors, path)
        with pytest.raises(WeightsCorrupt, match=told):
            read_policy(tmp_path)
    path.write_bytes(b"nonsense")
    with pytest.raises(WeightsCorrupt, match="cannot be read"):
        read_policy(tmp_path)
    path.unlink()
    with pytest.raises(WeightsCorrupt, match=r"policy\.safetensors cannot be read"):
        read_policy(tmp_path)


def test_what_it_says_of_itself_is_checked(tmp_path):
    with pytest.raises(WeightsCorrupt, match=r"policy\.json"):
        read_policy(tmp_path)
    write_policy(tmp_path, policy())
    path = tmp_path / "policy.json"
    told = json.loads(path.read_text())
    for wrong in ({"width": 0}, {"method": "magic"}, {"colour": 1}, {"actions": {"steps": []}}):
        path.write_text(json.dumps(told | wrong))
        with pytest.raises(WeightsCorrupt, match="learn the policy again"):
            read_policy(tmp_path)
    path.write_text(json.dumps(told | {"text_width": 7}))
    with pytest.raises(WeightsCorrupt, match="of_text"):
        read_policy(tmp_path)


# ---------------------------------------------------------------- the arm that draws


def test_a_random_policy_draws_all_alike_and_an_equal_state_the_same(tmp_path):
    drawing = RandomPolicy(sizes().model_copy(update={"method": "random", "seed": 3}))
    write_policy(tmp_path, drawing)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]
    found, many = read_policy(tmp_path), states(3000)
    drawn = found.best(*many)
    assert drawn == drawing.best(*many) and found.best(many[0][:1], many[1][:1]) == drawn[:1]
    share = np.array([drawn.count(action) for action in actions(SPACE)])
    assert ((share - 250) ** 2 / 250).sum() < 31.3  # chi squared of 11 degrees of freedom, one in a thousand
    other = RandomPolicy(sizes().model_copy(update={"method": "random", "seed": 4}))
    assert other.best(*many) != drawn
