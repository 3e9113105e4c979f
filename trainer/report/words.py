"""What the report calls things, and how it writes numbers. Knows nothing of a run."""

from __future__ import annotations

ABSENT = "\N{EN DASH}"
FILTERS = {"vog": "variance of gradients", "similarity": "similarity to real samples"}  # fate of a sample -> by what
CORRUPTIONS = {"gaussian_blur": "Gaussian blur", "speckle_noise": "speckle noise"}
SCORES = {  # main figure -> name
    "test_top1": "top-1 accuracy",
    "mAP": "mAP",
    "verification": "verification accuracy",
    "test_uar": "UAR",
    "zero_shot_uar": "zero-shot UAR",
}
SCALES = {"imagenet-c": "ImageNet-C", "cifar-c": "CIFAR-C"}
DEVICES = {"cuda": "GPU", "cpu": "CPU"}


def score(headline: str | None) -> str:
    """What a run's main figure is called; None: nothing was held out, so that it would have been accuracy."""
    return SCORES.get(headline or "test_top1", headline or "")


def begun(text: str) -> str:
    """As the first words of a line."""
    return text if text.startswith(("mAP", "UAR")) else text[:1].upper() + text[1:]


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference of two parts of one, in percentage points."""
    return f"{100 * value:+.1f} points"


def ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    return ABSENT if value is None else f"{value:+.2f}"


def seconds(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f} s"


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def time_unit(hours: float) -> tuple[str, float]:
    """The unit that suits so many hours, and how many of it an hour has."""
    if hours >= 1:
        return "hours", 1.0
    return ("minutes", 60.0) if hours * 60 >= 3 else ("seconds", 3600.0)
