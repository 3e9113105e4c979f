import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generator_service import registry
from generator_service.rl.rewards import (
    Bank,
    Generated,
    check_options,
    contributions,
    coverage,
    expression,
    measure,
    semantic,
    standardise,
    total,
)
from protocol.errors import Cancelled, GenerationFailed, InvalidRequest, UnknownClass
from protocol.tuning import RewardTerm, TuneJob

REWARDS = {"semantic": semantic, "coverage": coverage, "expression": expression}
WEIGHTS = {"semantic": 1.0, "coverage": 0.75, "expression": 0.25}


def unit(*rows) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def bank_of(features: torch.Tensor, labels: list[int]) -> Bank:
    return Bank(features, torch.tensor(labels))


def made(features: torch.Tensor, labels: list[int]) -> Generated:
    return Generated(features, torch.tensor(labels), np.zeros((len(labels), 4, 4, 3), np.uint8))


def random_case(seed: int = 0, *, size: int = 16) -> tuple[Generated, Bank]:
    """Four identities of uneven size in any order, among a bank of six."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, size, generator=generator)

    def draw(labels: list[int], spread: float) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.randperm(len(labels), generator=generator)
        chosen = torch.tensor(labels)[order]
        noise = torch.randn(len(labels), size, generator=generator)
        return F.normalize(centres[chosen] + spread * noise, dim=1), chosen

    features, labels = draw([1] * 5 + [2] * 3 + [4] * 6 + [5] * 2, 0.6)
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    return Generated(features, labels, images), Bank(*draw([0] * 4 + [1] * 7 + [2] * 2 + [3] + [4] * 5 + [5] * 3, 0.5))


# ---------------------------------------------------------------- plain loops that spell the equations out


def rows_of(collection, label) -> list[np.ndarray]:
    pairs = zip(collection.features.double().numpy(), collection.labels.tolist(), strict=True)
    return [feature for feature, of in pairs if of == label]


def kernel(u, v, sigma):
    return math.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / (2 * sigma**2))


def plain_semantic(generated, bank):
    values = []
    for feature, label in zip(generated.features.double().numpy(), generated.labels.tolist(), strict=True):
        references = rows_of(bank, label)
        mean = sum(reference / np.linalg.norm(reference) for reference in references) / len(references)
        values.append(0.5 * (feature @ mean / np.linalg.norm(mean) + 1))
    return values


def plain_coverage(generated, bank, sigma, alpha):
    values = []
    for label in generated.labels.tolist():
        own, references = rows_of(generated, label), rows_of(bank, label)
        to_real = np.mean([kernel(g, r, sigma) for g in own for r in references])
        pairs = [kernel(a, b, sigma) for i, a in enumerate(own) for j, b in enumerate(own) if i != j]
        values.append(to_real - alpha * (np.mean(pairs) if pairs else 0.0))
    return values


def plain_trace(rows):
    mean = sum(rows) / len(rows)
    return np.trace(sum(np.outer(row - mean, row - mean) for row in rows) / len(rows))


def plain_expression(generated, bank, epsilon, tau):
    values = []
    for label in generated.labels.tolist():
        own, references = plain_trace(rows_of(generated, label)), plain_trace(rows_of(bank, label))
        values.append(-((own - (1 + epsilon) * references / tau) ** 2))
    return values


@pytest.mark.parametrize("seed", range(3))
def test_the_rewards_are_those_of_plain_loops(seed):
    generated, bank = random_case(seed)
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7)
    close(semantic(generated, bank), plain_semantic(generated, bank))
    close(coverage(generated, bank, sigma=0.4, alpha=0.7), plain_coverage(generated, bank, 0.4, 0.7))
    close(coverage(generated, bank), plain_coverage(generated, bank, bank.bandwidth, 0.5))
    close(expression(generated, bank, epsilon=0.3, tau=2.0), plain_expression(generated, bank, 0.3, 2.0))
    close(expression(generated, bank), plain_expression(generated, bank, 0.1, 1.0))


def test_many_features_are_compared_as_few_are():
    """More rows than torch measures one by one."""
    generator = torch.Generator().manual_seed(0)
    features, labels = F.normalize(torch.randn(80, 8, generator=generator), dim=1), [0, 1] * 40
    generated, bank = made(features[:40], labels[:40]), bank_of(features, labels)
    np.testing.assert_allclose(
        coverage(generated, bank, sigma=0.5), plain_coverage(generated, bank, 0.5, 0.5), rtol=1e-4
    )


# ---------------------------------------------------------------- by hand


def test_the_bank_by_hand():
    bank = bank_of(unit([1, 0], [0, 1], [0, -1], [3, 4]), [7, 7, 2, 2])
    assert torch.equal(bank.of(7), unit([1, 0], [0, 1]))
    torch.testing.assert_close(bank.prototype(7), torch.tensor([math.sqrt(0.5)] * 2))
    torch.testing.assert_close(bank.prototype(2), unit([0.6, -0.2])[0])
    torch.testing.assert_close(bank.prototypes(torch.tensor([2, 7])), unit([0.6, -0.2], [1, 1]))
    with pytest.raises(UnknownClass, match=r"\[3\]"):
        bank.of(3)


def test_semantic_by_hand():
    """Cosines 1, 0 and -1 to the prototype (1, 1) / sqrt 2."""
    bank = bank_of(unit([1, 0], [0, 1]), [0, 0])
    values = semantic(made(unit([2, 2], [1, -1], [-1, -1]), [0, 0, 0]), bank)
    torch.testing.assert_close(values, torch.tensor([1.0, 0.5, 0.0]))


def test_references_that_cancel_out_favour_nobody():
    bank = bank_of(unit([1, 0], [-1, 0]), [0, 0])
    assert semantic(made(unit([1, 0], [0, 1]), [0, 0]), bank).tolist() == [0.5, 0.5]


def test_coverage_by_hand():
    """Squared distances 0 and 2; sigma 1: kernels 1 and 1/e."""
    bank = bank_of(unit([1, 0], [0, 1], [1, 0]), [0, 0, 1])
    generated = made(unit([1, 0], [1, 0], [0, 1], [1, 0]), [0, 1, 0, 1])
    e = math.exp(-1)
    of_0, of_1 = (1 + e) / 2 - 0.25 * e, 1 - 0.25
    values = coverage(generated, bank, sigma=1.0, alpha=0.25)
    torch.testing.assert_close(values, torch.tensor([of_0, of_1, of_0, of_1]))


def test_coverage_falls_when_samples_collapse():
    generated, bank = random_case()
    one = generated.features.clone()
    rows = generated.labels == 4
    one[rows] = one[rows][:1]
    collapsed = Generated(one, generated.labels, generated.images)
    before, after = coverage(generated, bank), coverage(collapsed, bank)
    assert after[rows][0] < before[rows][0] and torch.equal(after[~rows], before[~rows])


def test_coverage_with_alpha_a_half_follows_the_squared_mean_discrepancy():
    """-1/2 MMD^2 differs from it by half the mean kernel among the references, with distinct pairs on both sides."""
    generated, bank = random_case()
    values = coverage(generated, bank, sigma=0.5)
    for label in (1, 4):
        own, references = rows_of(generated, label), rows_of(bank, label)

        def distinct(rows):
            return np.mean([kernel(a, b, 0.5) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

        across = np.mean([kernel(a, b, 0.5) for a in own for b in references])
        discrepancy = distinct(own) + distinct(references) - 2 * across
        wanted = -discrepancy / 2 + distinct(references) / 2
        assert values[generated.labels == label][0].item() == pytest.approx(wanted, rel=1e-5)


def test_expression_by_hand():
    """Traces 1 and 1/2 of samples; 1 and 1/2 of references: -(1 - 1.5)^2 and -(.5 - .75)^2 with epsilon 1/2."""
    bank = bank_of(unit([1, 0], [-1, 0], [1, 0], [0, 1]), [0, 0, 1, 1])
    generated = made(unit([0, 1], [0, -1], [1, 0], [0, -1]), [0, 0, 1, 1])
    values = expression(generated, bank, epsilon=0.5)
    torch.testing.assert_close(values, torch.tensor([-0.25, -0.25, -0.0625, -0.0625]))
    torch.testing.assert_close(expression(generated, bank, epsilon=0.0, tau=1.0), torch.zeros(4), rtol=0, atol=1e-12)


def test_expression_is_highest_at_the_wanted_spread():
    """Samples on an arc whose angle grows: the reward climbs until the trace is (1 + epsilon) times the references'."""
    reference = bank_of(unit([1, 0.5], [1, -0.5], [1, 0.5], [1, -0.5]), [0, 0, 1, 1])
    wanted = 1.1 * plain_trace(rows_of(reference, 0))
    angles = np.linspace(0.05, 1.2, 24)
    spread = np.sin(angles) ** 2  # the trace of two samples at plus and minus the angle
    arcs = [unit([1, 0.5], [1, -0.5], [math.cos(a), math.sin(a)], [math.cos(a), -math.sin(a)]) for a in angles]
    values = [expression(made(arc, [1, 1, 0, 0]), reference)[2].item() for arc in arcs]
    assert np.argmax(values) == np.argmin(np.abs(spread - wanted))
    np.testing.assert_allclose(values, -((spread - wanted) ** 2), atol=1e-6)


def test_the_bandwidth_by_hand():
    """Medians of the classes: sqrt 2, 2, and none of a class of one; the median of the two is the lower one."""
    bank = bank_of(unit([1, 0], [0, 1], [0, 1], [0, -1], [1, 0]), [0, 0, 1, 1, 2])
    assert bank.bandwidth == pytest.approx(math.sqrt(2))
    assert bank_of(unit([1, 0], [0, 1]), [0, 1]).bandwidth == 1.0
    assert bank_of(unit([1, 0], [1, 0]), [0, 0]).bandwidth == 1.0


# ---------------------------------------------------------------- standardised, weighted, in all


def test_standardise_by_hand():
    torch.testing.assert_close(
        standardise(torch.tensor([1.0, 3.0]), 1e-6), torch.tensor([-1.0, 1.0]), rtol=1e-6, atol=0
    )
    assert standardise(torch.tensor([1.0, 3.0]), 2.0).tolist() == [-0.5, 0.5]
    values = standardise(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    assert abs(values.mean()) < 1e-6 and values.std(correction=0).item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1 / 3])
@pytest.mark.parametrize("count", [1, 3, 64, 1000])
def test_zero_variance_gives_exactly_0(value, count):
    assert torch.equal(standardise(torch.full((count,), value)), torch.zeros(count))


def test_the_total_by_hand():
    components = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5, 4.0])}
    values = total(components, {"a": 0.5, "b": -0.25})
    torch.testing.assert_close(values, torch.tensor([math.tanh(0.5 - 0.125), math.tanh(-1.0 - 1.0)]))


def test_measuring_everything():
    generated, bank = random_case()
    measured = measure(REWARDS, WEIGHTS, generated, bank)
    assert list(measured.components) == list(REWARDS)
    scores = {}
    for name, reward in REWARDS.items():
        raw = reward(generated, bank)
        assert torch.equal(measured.components[name], raw)
        scores[name] = (raw.numpy() - raw.numpy().mean()) / raw.numpy().std()
    wanted = np.tanh(sum(WEIGHTS[name] * score for name, score in scores.items()))
    np.testing.assert_allclose(measured.total, wanted, rtol=1e-4, atol=1e-5)
    assert contributions(measured.components, WEIGHTS | {"coverage": 0.0}) == {
        "semantic": float(measured.components["semantic"].mean()),
        "expression": 0.25 * float(measured.components["expression"].mean()),
    }


def test_a_reward_without_weight_is_only_measured():
    generated, bank = random_case()
    both = measure(REWARDS, WEIGHTS | {"coverage": 0.0, "expression": 0.0}, generated, bank)
    alone = measure({"semantic": semantic}, {"semantic": 1.0}, generated, bank)
    assert torch.equal(both.total, alone.total) and both.components["coverage"].std() > 0


def test_groups_and_rows_may_come_in_any_order():
    generated, bank = random_case()
    order = torch.randperm(len(generated.labels), generator=torch.Generator().manual_seed(3))
    shuffled = Generated(generated.features[order], generated.labels[order], generated.images)
    for reward in REWARDS.values():
        torch.testing.assert_close(reward(shuffled, bank), reward(generated, bank)[order], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- little to go by


def test_fewer_than_two_groups_leave_only_the_semantic_reward():
    generated, bank = random_case()
    rows = generated.labels == 4
    one = Generated(generated.features[rows], generated.labels[rows], generated.images[rows])
    assert not coverage(one, bank).any() and not expression(one, bank).any()
    measured = measure(REWARDS, WEIGHTS, one, bank)
    assert torch.equal(measured.total, standardise(semantic(one, bank)).tanh())


def test_an_identity_with_one_reference_is_neutral_in_expression_only():
    """It gets the mean of the others."""
    bank = bank_of(unit([1, 0], [-1, 1], [1, 0], [0, 1], [1, 1]), [0, 0, 1, 1, 2])
    generated = made(unit([1, 0], [0, 1], [1, 0], [1, 0], [1, 0], [0, 1]), [0, 0, 1, 1, 2, 2])
    values = expression(generated, bank)
    assert values[0] != values[2]
    assert values[4].item() == pytest.approx((values[0] + values[2]).item() / 2)
    assert abs(standardise(values)[4]) < 1e-6
    np.testing.assert_allclose(
        coverage(generated, bank), plain_coverage(generated, bank, bank.bandwidth, 0.5), rtol=1e-5
    )
    np.testing.assert_allclose(semantic(generated, bank), plain_semantic(generated, bank), rtol=1e-5)


def test_a_group_of_one_sample():
    """No pairs in coverage; neutral in expression."""
    bank = bank_of(unit([1, 0], [-1, 0], [1, 0], [0, 1], [1, 1], [1, 2]), [0, 0, 1, 1, 2, 2])
    generated = made(unit([1, 0], [0, 1], [1, 0], [1, 0], [1, 0]), [0, 0, 1, 1, 2])
    np.testing.assert_allclose(
        coverage(generated, bank, sigma=0.7), plain_coverage(generated, bank, 0.7, 0.5), rtol=1e-5
    )
    values = expression(generated, bank)
    assert values[4].item() == pytest.approx((values[0] + values[2]).item() / 2)


def test_where_no_group_can_be_measured_expression_is_0():
    bank = bank_of(unit([1, 0], [0, 1]), [0, 1])
    assert expression(made(unit([1, 0], [0, 1], [1, 1], [1, 2]), [0, 0, 1, 1]), bank).tolist() == [0.0] * 4
    both = bank_of(unit([1, 0], [0, 1], [1, 0], [0, 1]), [0, 0, 1, 1])
    assert expression(made(unit([1, 0], [0, 1]), [0, 1]), both).tolist() == [0.0] * 2


def test_samples_that_are_all_alike_get_a_total_of_0():
    bank = bank_of(unit([1, 0], [0, 1], [1, 0], [0, 1]), [0, 0, 1, 1])
    generated = made(unit([1, 1], [1, 1], [1, 1], [1, 1]), [0, 0, 1, 1])
    assert not measure(REWARDS, WEIGHTS, generated, bank).total.any()


# ---------------------------------------------------------------- what is refused


def test_an_identity_without_references_is_named():
    bank = bank_of(unit([1, 0], [0, 1]), [0, 1])
    generated = made(unit([1, 0], [0, 1]), [0, 5])
    for reward in REWARDS.values():
        with pytest.raises(UnknownClass, match=r"\[5\]"):
            reward(generated, bank)


@pytest.mark.parametrize("kind", [made, bank_of])
def test_features_of_another_norm_are_named(kind):
    with pytest.raises(GenerationFailed, match=r"features have norms from 1 to 2: scale each to norm 1"):
        kind(unit([1, 0], [0, 1]) * torch.tensor([[1.0], [2.0]]), [0, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_no_numbers_are_named(value):
    with pytest.raises(GenerationFailed, match="reference features are NaN or infinite"):
        bank_of(torch.tensor([[value, 0.0]]), [0])
    with pytest.raises(GenerationFailed, match="generated features are NaN or infinite"):
        made(torch.tensor([[1.0, 0.0], [value, 0.0]]), [0, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named(value):
    generated, bank = random_case()

    def broken(generated, bank):
        return torch.where(torch.arange(16) == 3, value, torch.zeros(16))

    with pytest.raises(GenerationFailed, match="'mine' is NaN or infinite for 1 of 16 samples"):
        measure({"mine": broken}, {"mine": 1.0}, generated, bank)


@pytest.mark.parametrize(
    ("given", "told"),
    [(torch.zeros(3), r"\(3,\)"), (torch.zeros(16, 1), r"\(16, 1\)"), (0.5, "float"), (None, "NoneType")],
)
def test_a_reward_of_another_shape_is_named(given, told):
    with pytest.raises(GenerationFailed, match=rf"'mine' gave {told}: it has to give a tensor of shape \(16,\)"):
        measure({"mine": lambda generated, bank: given}, {"mine": 1.0}, *random_case())


def test_a_reward_that_raises_is_named_with_what_it_raised():
    def broken(generated, bank):
        return {}["no such key"]

    with pytest.raises(GenerationFailed, match="'mine' raised KeyError: 'no such key'") as caught:
        measure({"semantic": semantic, "mine": broken}, {"semantic": 1.0, "mine": 1.0}, *random_case())
    assert isinstance(caught.value.__cause__, KeyError)


def test_errors_of_the_tree_pass_as_they_are():
    def cancelled(generated, bank):
        raise Cancelled("by the user")

    with pytest.raises(Cancelled):
        measure({"mine": cancelled}, {"mine": 1.0}, *random_case())


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (coverage, {"sigma": -1.0}),
        (coverage, {"alpha": -0.1}),
        (expression, {"tau": 0.0}),
        (expression, {"epsilon": -1.0}),
    ],
)
def test_options_out_of_range_are_named(reward, options):
    with pytest.raises(InvalidRequest, match=next(iter(options))) as caught:
        measure({"it": partial(reward, **options)}, {"it": 1.0}, *random_case())
    assert caught.value.param == f"rewards.{reward.__name__}.options"


def test_unknown_options_are_refused_by_name():
    for name in registry.REWARDS:
        reward = registry.load(registry.REWARDS, name)
        check_options(name, reward, {})
        with pytest.raises(InvalidRequest, match=rf"reward {name} has no option 'bandwith'") as caught:
            check_options(name, reward, {"bandwith": 1.0})
        assert caught.value.param == f"rewards.{name}"
    check_options("mine", coverage, {"sigma": 1.0, "alpha": 1.0})
    with pytest.raises(InvalidRequest, match="reward mine has no option 'tau': use sigma, alpha") as caught:
        check_options("mine", coverage, {"tau": 1.0})
    assert caught.value.param == "rewards.mine"  # as it is registered, whatever the function is called
    with pytest.raises(InvalidRequest, match="it has none"):
        check_options("mine", semantic, {"sigma": 1.0})


@pytest.mark.parametrize("name", registry.REWARDS)
def test_every_registered_reward_takes_the_default_job(name):
    """Its options are its own, and it gives something to learn from."""
    reward = registry.load(registry.REWARDS, name)
    term = TuneJob(name="x").rewards.get(name, RewardTerm(weight=1.0))
    check_options(name, reward, term.options)
    generated, bank = random_case()
    measured = measure({name: partial(reward, **term.options)}, {name: term.weight}, generated, bank)
    assert measured.total.shape == (16,) and measured.total.abs().max() <= 1 and measured.total.std() > 0
