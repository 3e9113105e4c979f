"""The privacy report as a page, in the look of a run's report. Every text from elsewhere is escaped; the page refers to
nothing outside itself. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from PIL import Image

from protocol import codec
from trainer.privacy import figures
from trainer.privacy.assessment import Assessment, Comparison, Findings, MembershipInference
from trainer.privacy.image_set import ImageSet
from trainer.privacy.intervals import Interval
from trainer.privacy.subject import Subject
from trainer.report.style import CSS
from trainer.report.words import ABSENT, count, percent

LARGEST = 160  # pixels of the longer side of a picture; larger ones are made smaller
TINY = 64  # up to this side they are enlarged without smoothing


def page(subject: Subject, found: Assessment) -> str:
    """The whole report, as one HTML document."""
    title = escape(f"{found.title}: privacy")
    sections = [_header(found), *(_space(subject, found, number) for number in range(len(found.findings))), _how(found)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{CSS}</style></head><body><main>{''.join(sections)}"
        "<footer>Made by onthefly. This page shows training images: keep it as private as they are.</footer>"
        "</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


# ---------------------------------------------------------------- head


def _header(found: Assessment) -> str:
    first, copies = found.findings[0], found.near_copy_rate_interval
    attack = first.membership
    closer, known = first.overall.closer_interval, attack.true_positive_rate_interval
    errors = percent(attack.false_positive_rate)
    tiles = [
        (percent(found.near_copy_rate), f"near copies of a training image, by pixels; {_parts(copies)}"),
        (percent(first.overall.closer), f"as near as {_usual(found)} of held-out images are; {_parts(closer)}"),
        (_two(attack.auc), f"area under the ROC of membership inference; {_interval(attack.auc_interval)}"),
        (
            percent(attack.true_positive_rate),
            f"of training images recognised, where {errors} of others are mistaken for them; {_parts(known)}",
        ),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    many = found.images
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in found.warnings)
    return (
        f'<header><p class="meta">What the synthetic images give away</p><h1>{escape(found.title)}</h1>'
        f'<p class="meta">{count(many["synthetic"])} synthetic · {count(many["train"])} training · '
        f"{count(many['held_out'])} held-out images · {count(found.classes)} classes</p>"
        f"<p>Compared are {escape(found.synthetic_are)} with the training images (split {escape(found.train_split)}) "
        f"and with real images that the generator has not seen (split {escape(found.held_out_split)}): a synthetic "
        "image should come no nearer to the training images than these do.</p>"
        f'{warnings}<div class="tiles">{shown}</div></header>'
    )


# ---------------------------------------------------------------- one space


def _space(subject: Subject, found: Assessment, number: int) -> str:
    findings, name = found.findings[number], f"space{number}"
    charts = [figures.distances(f"{name}-overall", "Nearest of all", findings.overall)]
    if findings.within_class is not None:
        charts.append(figures.distances(f"{name}-class", "Nearest of the same class", findings.within_class))
    charts.append(figures.roc(f"{name}-roc", findings.membership))
    drawn = "".join(f'<figure class="card"><div class="drawn">{chart}</div></figure>' for chart in charts)
    caution = f'<p class="warning">{escape(findings.caution)}</p>' if findings.caution else ""
    return _section(
        f"By {findings.space}",
        f"<p>Distance: {escape(findings.measure)}.</p>{caution}<p>{_verdict(found, findings)}</p>"
        f'<div class="charts">{drawn}</div>{_numbers(found, findings)}'
        f"<h3>The closest pairs</h3>{_pairs(subject, findings)}",
    )


def _verdict(found: Assessment, findings: Findings) -> str:
    """What the numbers say, no more surely than their intervals allow."""
    closer, (low, high) = findings.overall.closer, findings.overall.closer_interval
    usual = found.options.quantile
    leans = "more than" if low > usual else "fewer than" if high < usual else "in line with"
    area, (least, most) = findings.membership.auc, findings.membership.auc_interval
    if least > 0.5:
        leaks = "an attacker tells training images from others better than by guessing"
    elif most < 0.5:
        leaks = "the attack does worse than guessing: the two real sets differ in more than membership"
    else:
        leaks = "no sign that an attacker tells training images from others"
    return (
        f"{percent(closer)} of the synthetic images are as near to a training image as {_usual(found)} of the held-out "
        f"ones: {leans} the {percent(usual)} of images that are like them. Membership inference has an area of "
        f"{_two(area)} ({_interval((least, most))}): {leaks}."
    )


Row = tuple[str, Callable[[Comparison], str]]


def _numbers(found: Assessment, findings: Findings) -> str:
    scopes = [("of all", findings.overall)]
    scopes += [("of the same class", findings.within_class)] if findings.within_class is not None else []
    rows: list[Row] = [
        ("Median distance, synthetic", lambda c: _three(c.synthetic.quantiles[0.5])),
        ("Median distance, held out", lambda c: _three(c.held_out.quantiles[0.5])),
        ("Synthetic over held out", lambda c: _with(c.median_ratio, c.median_ratio_interval, _three)),
        (f"Close: within {_usual(found)} of held-out ones", lambda c: _three(c.limit)),
        ("Synthetic images that are close", lambda c: _with(c.closer, c.closer_interval, percent)),
        ("Smallest distance, synthetic", lambda c: _three(c.synthetic.quantiles[0.0])),
        ("Smallest distance, held out", lambda c: _three(c.held_out.quantiles[0.0])),
    ]
    head = "".join(f'<th scope="col">nearest {scope}</th>' for scope, _ in scopes)
    body = "".join(
        f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{value(c)}</td>" for _, c in scopes) + "</tr>"
        for label, value in rows
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card">{table}</div><div class="card">{_attack(findings.membership)}</div>'


def _attack(attack: MembershipInference) -> str:
    rows = [
        ("Membership inference, area under the ROC", _with(attack.auc, attack.auc_interval, _three)),
        (
            f"Members recognised at {percent(attack.false_positive_rate)} false positives",
            _with(attack.true_positive_rate, attack.true_positive_rate_interval, percent),
        ),
        ("Training images attacked, and as many others", count(attack.members)),
        (
            "Classes, each with as many of either",
            "drawn whatever their class" if attack.classes is None else count(attack.classes),
        ),
    ]
    body = "".join(f'<tr><th scope="row">{label}</th><td>{value}</td></tr>' for label, value in rows)
    return f"<table><tbody>{body}</tbody></table>"


def _pairs(subject: Subject, findings: Findings) -> str:
    rows = "".join(
        f"<b>{escape(pair.synthetic_class)}</b>"
        f"{_picture(subject.synthetic, pair.synthetic, 'synthetic image', _three(pair.distance))}"
        '<div class="strip split">'
        f"{_picture(subject.train, pair.train, 'training image nearest to it', escape(pair.train_class))}</div>"
        for pair in findings.closest
    )
    head = '<span class="head">class</span><span class="head">synthetic</span>'
    head += '<span class="head split">nearest training image</span>'
    return f'<div class="card"><div class="rows">{head}{rows}</div></div>'


def _picture(images: ImageSet, row: int, what: str, note: str) -> str:
    pixels = _shown(images.pictures([row])[0])
    tiny = ' class="tiny"' if max(pixels.shape[:2]) <= TINY else ""
    alt = f"{what}, of class {escape(images.class_of(row))}"
    source = f"data:image/png;base64,{codec.image_to_base64(pixels)}"
    return f'<figure class="picture"><img{tiny} src="{source}" alt="{alt}"><figcaption>{note}</figcaption></figure>'


def _shown(pixels: np.ndarray) -> np.ndarray:
    if max(pixels.shape[:2]) <= LARGEST:
        return pixels
    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST, LARGEST))
    return np.asarray(picture)


# ---------------------------------------------------------------- the rest


def _how(found: Assessment) -> str:
    options = found.options
    told: Sequence[str] = (
        "Each synthetic and each held-out image is compared with every training image; the nearest one counts, of all "
        "or of its own class. Were synthetic images like other real images, the two distributions would be alike.",
        f"A synthetic image is close when it is no further away than {_usual(found)} of the held-out images are. It is "
        f"a near copy when its pixels differ by {options.near_copy:g} or less (root mean square, in [0, 1]): "
        f"{count(found.near_copies)} of {count(found.images['synthetic'])} do.",
        "Membership inference: an attacker who has the synthetic images and nothing else takes a real image for a "
        "training image the surer, the nearer the nearest synthetic one is (the full black-box attack of GAN-Leaks, "
        "Chen et al. 2020). The area under the ROC curve is 0.5 where nothing leaks and 1 where every training image "
        "is told from every other. An attacker who has more may do better.",
        "Intervals are of 95 %: for the area Wilson's with DeLong's variance, for rates Wilson's, for the two "
        f"comparisons of distances a bootstrap of the images (seed {options.seed}). Few images make them wide. They "
        "hold for these synthetic and training images; another training would make others.",
    )
    return _section("How this was measured", "".join(f"<p>{text}</p>" for text in told))


def _usual(found: Assessment) -> str:
    return f"the nearest {percent(found.options.quantile)}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3g}"


def _interval(interval: Interval) -> str:
    return f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"


def _parts(interval: Interval) -> str:
    return f"95 % interval {percent(interval[0])} to {percent(interval[1])}"


def _with(value: float | None, interval: Interval | None, written: Callable[[float], str]) -> str:
    if value is None or interval is None:
        return ABSENT
    return f"{written(value)} <small>({written(interval[0])} to {written(interval[1])})</small>"
