"""What generated identities are rewarded for (RL-identity 4.2, eqs. 2-11): nearness to their class, coverage of it,
and a spread like its own.

Pure functions over features. A reward is a function of (Generated, Bank), with float options by keyword, to float [n];
others' rewards are such functions too, named in `generator_service.registry.REWARDS`. Knows nothing of the model that
makes the features, nor of the generator.

    n generated rows, M reference features, m of them of the rows' labels, D values of a feature, G identity groups
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.errors import GenerationFailed, InvalidRequest, OnTheFlyError, UnknownClass

FLOOR = 1e-6  # least std that a reward is divided by: what varies less does not count
UNIT = 1e-3  # how far the norm of a feature may be from 1


@dataclass(frozen=True)
class Bank:
    """The memory bank: features of real images. Raises GenerationFailed when they are not unit vectors."""

    features: Tensor  # float32 [M, D], unit norm
    labels: Tensor  # int64 [M]

    def __post_init__(self) -> None:
        _check_features(self.features, self.labels, "reference")

    def of(self, label: int) -> Tensor:
        """Features [N, D] of a class, as many as it has. Raises UnknownClass when it has none."""
        return self.features[self.among(torch.tensor([label], device=self.labels.device))[0].bool()]

    def among(self, labels: Tensor) -> Tensor:
        """Which features are of each of G classes, float32 [G, M] of 0 and 1. Raises UnknownClass."""
        members = labels.to(self.labels.device)[:, None] == self.labels
        if not members.any(1).all():
            missing = labels[~members.any(1)].tolist()
            raise UnknownClass(f"no reference image of class {missing}: give them one each, or leave them out")
        return members.float()

    def prototypes(self, labels: Tensor) -> Tensor:
        """Eq. 2: the mean of the normalised features of each of G classes, [G, D].

        Scaled to unit norm, since eq. 3 is a cosine: else identities of many looks would be worth less than those of
        few. References that cancel out give 0, to which every feature has the cosine 0.
        """
        members = self.among(labels)
        return F.normalize(members @ self.features / members.sum(1, keepdim=True))

    def prototype(self, label: int) -> Tensor:
        """[D], see `prototypes`."""
        return self.prototypes(torch.tensor([label], device=self.labels.device))[0]

    @cached_property
    def bandwidth(self) -> float:
        """The median over classes of the median distance between two of a class's references; 1 where no class has two
        that differ (unrelated unit vectors lie about 1.4 apart)."""
        counts = self.labels.unique(return_counts=True)
        medians = [torch.pdist(self.of(int(label))).median() for label, count in zip(*counts, strict=True) if count > 1]
        return (float(torch.stack(medians).median()) if medians else 0.0) or 1.0


@dataclass(frozen=True)
class Generated:
    """A rollout's samples. Raises GenerationFailed when their features are not unit vectors."""

    features: Tensor  # float32 [n, D], unit norm, on the bank's device
    labels: Tensor  # int64 [n], the identities that were asked for
    images: np.ndarray  # uint8 [n, H, W, 3]

    def __post_init__(self) -> None:
        _check_features(self.features, self.labels, "generated")
        assert len(self.images) == len(self.features)


Reward = Callable[[Generated, Bank], Tensor]  # its options are bound already; [n]


@dataclass(frozen=True)
class Measured:
    """The rewards of a rollout."""

    components: dict[str, Tensor]  # raw, float32 [n] each
    total: Tensor  # float32 [n] in [-1, 1], eq. 11


# ---------------------------------------------------------------- the three rewards


def semantic(generated: Generated, bank: Bank) -> Tensor:
    """Semantic consistency, eq. 3: (cosine to the prototype + 1) / 2, in [0, 1], of each row: [n]."""
    labels, group = generated.labels.unique(return_inverse=True)
    cosine = (generated.features * bank.prototypes(labels)[group]).sum(1)
    return (cosine + 1) / 2


def coverage(generated: Generated, bank: Bank, *, sigma: float = 0.0, alpha: float = 0.5) -> Tensor:
    """Distributional coverage, eq. 5: mean kernel between a group's samples and its references, minus alpha times that
    between two samples of the group: [n], the same for all rows of a group.

    Pairs are of two different samples (with itself a sample always has the kernel 1); a group of one has none, and the
    second term is 0. With fewer than two groups there is nothing to compare: 0 for all.

    Args:
        sigma: width of the kernel of eq. 4, in distances of unit vectors; 0: `Bank.bandwidth`.
        alpha: weight of redundancy, at least 0. With 1/2 the reward is -1/2 times the squared maximum mean discrepancy
            to the references, up to a constant of the class.

    Raises InvalidRequest on other options.
    """
    if sigma < 0 or alpha < 0:
        raise InvalidRequest("coverage: use a sigma and an alpha of 0 or more", param="rewards.coverage.options")
    labels, group = generated.labels.unique(return_inverse=True)
    if len(labels) < 2:
        return torch.zeros_like(generated.features[:, 0])
    sigma = sigma or bank.bandwidth
    own = F.one_hot(group).T.to(generated.features)  # [G, n]
    references, theirs = _references(bank, labels)
    count = own.sum(1)
    to_real = (own @ _kernel(generated.features, references, sigma) * theirs).sum(1) / (count * theirs.sum(1))
    among = _kernel(generated.features, generated.features, sigma).fill_diagonal_(0)
    to_each_other = (own @ among * own).sum(1) / (count * (count - 1)).clamp(min=1)
    return (to_real - alpha * to_each_other)[group]


def expression(generated: Generated, bank: Bank, *, epsilon: float = 0.1, tau: float = 1.0) -> Tensor:
    """Expressive diversity, eqs. 6-9: -(S_g - (1 + epsilon) S_y / tau)^2, where S is the trace of a group's covariance,
    of its samples (g) and of its references (y): [n], the same for all rows of a group.

    One sample, or one reference, has no spread to speak of: such a group gets the mean of the others, which is 0 once
    standardised. With fewer than two groups, or none that can be measured: 0 for all.

    Args:
        epsilon: how much more than the references the samples should spread, as a part; above -1.
        tau: divisor of the wanted spread, above 0.

    Raises InvalidRequest on other options.
    """
    if epsilon <= -1 or tau <= 0:
        raise InvalidRequest(
            "expression: use an epsilon above -1 and a tau above 0", param="rewards.expression.options"
        )
    labels, group = generated.labels.unique(return_inverse=True)
    own = F.one_hot(group).T.to(generated.features)  # [G, n]
    references, theirs = _references(bank, labels)
    measurable = (own.sum(1) > 1) & (theirs.sum(1) > 1)
    if len(labels) < 2 or not measurable.any():
        return torch.zeros_like(generated.features[:, 0])
    spread, wanted = _traces(generated.features, own), (1 + epsilon) * _traces(references, theirs) / tau
    values = -(spread - wanted).square()
    return torch.where(measurable, values, values[measurable].mean())[group]


# ---------------------------------------------------------------- all of them together


def check_options(name: str, function: Callable[..., Tensor], options: Iterable[str]) -> None:
    """Raises InvalidRequest, naming those it has, when a reward, known as `name`, lacks one of these options."""
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            instead = f"use {', '.join(known)}" if known else "it has none"
            raise InvalidRequest(f"reward {name} has no option {option!r}: {instead}", param=f"rewards.{name}")


def measure(rewards: Mapping[str, Reward], weights: Mapping[str, float], generated: Generated, bank: Bank) -> Measured:
    """All rewards of a rollout and their total.

    Args:
        rewards: by name, with their options bound. weights: of the same names; 0: only measured.

    Raises GenerationFailed when a reward raises, or gives what is no finite [n]; it names the reward. Errors of the
    tree, such as InvalidRequest, pass as they are.
    """
    components = {name: _measured(name, reward, generated, bank) for name, reward in rewards.items()}
    return Measured(components, total({name: standardise(raw) for name, raw in components.items()}, weights))


def standardise(values: Tensor, floor: float = FLOOR) -> Tensor:
    """Eq. 10: z-scores [n] over the rollout. Values that are all alike give 0.

    Args:
        values: [n]. floor: the least std that is divided by.
    """
    exact = values.double()
    return ((exact - exact.mean()) / exact.std(correction=0).clamp(min=floor)).to(values)


def total(components: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Eq. 11: tanh of the weighted sum, [n].

    Args:
        components: standardised, [n] each. weights: of the same names.
    """
    return torch.stack([weights[name] * values for name, values in components.items()]).sum(0).tanh()


def contributions(components: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, float]:
    """Weight times mean of each raw component that has a weight. Comparable between rollouts, which totals are not:
    what is standardised has the mean 0 in each."""
    return {name: weights[name] * float(values.mean()) for name, values in components.items() if weights[name]}


# ---------------------------------------------------------------- parts


def _measured(name: str, reward: Reward, generated: Generated, bank: Bank) -> Tensor:
    try:
        values = reward(generated, bank)
    except OnTheFlyError:
        raise
    except Exception as error:  # it may be anybody's
        raise GenerationFailed(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    wanted = (len(generated.labels),)
    if not isinstance(values, Tensor) or values.shape != wanted:
        given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise GenerationFailed(f"reward {name!r} gave {given}: it has to give a tensor of shape {wanted}")
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise GenerationFailed(f"reward {name!r} is NaN or infinite for {bad} of {len(values)} samples: look into it")
    return values.detach().to(generated.features)


def _check_features(features: Tensor, labels: Tensor, whose: str) -> None:
    assert features.ndim == 2 and labels.shape == features.shape[:1]
    norms = features.norm(dim=1)
    if not norms.isfinite().all():
        raise GenerationFailed(f"{whose} features are NaN or infinite: look at the model that makes them")
    if ((norms - 1).abs() > UNIT).any():
        raise GenerationFailed(
            f"{whose} features have norms from {norms.min():.3g} to {norms.max():.3g}: scale each to norm 1"
        )


def _references(bank: Bank, labels: Tensor) -> tuple[Tensor, Tensor]:
    """References of G classes [m, D], and which of them are of each class: float32 [G, m]. Raises UnknownClass."""
    members = bank.among(labels)
    of_any = members.any(0)
    return bank.features[of_any], members[:, of_any]


def _kernel(u: Tensor, v: Tensor, sigma: float) -> Tensor:
    """Eq. 4, of all pairs of u [a, D] and v [b, D]: [a, b]."""
    return (-torch.cdist(u, v).square() / (2 * sigma**2)).exp()


def _traces(features: Tensor, members: Tensor) -> Tensor:
    """Eqs. 6-8: the mean squared distance to the mean, of each group: [G].

    Args:
        features: [a, D]. members: [G, a], 0 or 1, every feature being of one group.
    """
    count = members.sum(1)
    means = members @ features / count[:, None]
    return members @ (features - members.T @ means).square().sum(1) / count
