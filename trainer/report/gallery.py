"""The report's pictures as HTML: which rows are shown, what is said beside them, and what where there are none."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from protocol import clips, codec
from protocol.messages import ClassShortage, Feedback
from trainer.report.pictures import Album, Pair, Picture
from trainer.report.words import FILTERS, count, percent
from trainer.summary import TEMPLATE

HARD_ROWS = 6  # of each of the two iterations shown
MADE = 8  # synthetic samples beside each real one
FILTER_CLASSES = 10
FILTER_EACH = 5  # lowest and highest of each class
NEAR_COPIES = 12
QUALITY = 75  # of clips, as WebP
TINY = 64  # pixels: pictures up to this side are enlarged without smoothing
CRITERIA = {
    "marginal": "the probability that the model gave to its own class: the lower, the harder",
    "entropy": "the negated entropy of the model's prediction: the lower, the less sure",
    "random": "drawn at random",
    "similarity": "the negated similarity to its nearest neighbours: the lower, the more typical",
}
MEANINGS = {
    "vog": "The score (VoG) is how much the gradient at a sample's pixels changed while the model learnt",
    "similarity": "The score is how similar a sample's features are to those of the nearest real samples",
}
FATES = {
    "kept": "trained on",
    "dropped": "dropped by the filter",
    "near copy": "dropped as a near copy",
    "too near": "dropped as too near to a real sample",
    "not used": "not used",
}


def hard_samples(album: Album, prompts_by: Mapping[str, int]) -> str:
    """The hardest samples of the first and the last answered question, each beside what was made for it; before them
    the pool, where there is one.

    Args:
        prompts_by: who perturbed captions -> the samples made from its prompts.
    """
    answered = album.answered()
    if not answered:
        return "<p>No synthetic samples were made for real ones in this run.</p>"
    pools = [feedback for feedback in answered if album.is_pool(feedback)]
    asked = [feedback for feedback in answered if not album.is_pool(feedback)]
    return (
        _order(album, pools, asked)
        + _perturbed(prompts_by)
        + _missing(album)
        + _key(album)
        + "".join(_asked(album, feedback) for feedback in (*pools, *asked[:1], *asked[1:][-1:]))
    )


def _order(album: Album, pools: Sequence[Feedback], asked: Sequence[Feedback]) -> str:
    """Which samples are shown, and what their scores are."""
    criterion, text = album.record.config.feedback.criterion, ""
    if pools:
        text = "<p>The pool was made beforehand for every real sample; these are the first of them.</p>"
    if pools and asked:
        text += "<p>Its members then took the place of the real samples, and were asked about later.</p>"
    if asked:
        told = CRITERIA.get(criterion, f"by the criterion {escape(criterion)}")
        text += f"<p>{'Lowest score' if criterion == 'similarity' else 'Hardest'} first. The score is {told}.</p>"
    return text


def _asked(album: Album, feedback: Feedback) -> str:
    pairs = album.hardest(feedback, HARD_ROWS, MADE)
    if album.is_pool(feedback):
        return f"<h3>Asked for beforehand</h3>{_pairs(pairs, 'real', 'made for it')}"
    left = "pool" if album.record.config.mode == "synthetic" else "real"
    return f"<h3>Asked for in iteration {feedback.feedback + 1}</h3>{_pairs(pairs, left, 'made for it')}"


def scarce_classes(album: Album) -> str:
    """What was made for the scarce classes of the first and of the last question that named any."""
    asked = [(feedback, album.short_of(feedback, MADE)) for feedback in album.record.feedback]
    answered = [(feedback, found) for feedback, found in asked if found]
    if not answered:
        return "<p>Nothing came for the classes that were asked for.</p>"
    told = "<p>These classes were asked for as such, because they are scarce.</p>"
    return told + _key(album) + "".join(_short(album, *one) for one in (*answered[:1], *answered[1:][-1:]))


def _short(album: Album, feedback: Feedback, found: Sequence[tuple[ClassShortage, list[Picture]]]) -> str:
    when = "beforehand" if album.is_pool(feedback) else f"in iteration {feedback.feedback + 1}"
    rows = "".join(
        f"<b>{escape(short.class_name)}</b><span>{count(short.images)} asked for</span>"
        f'<div class="strip split">{_strip(made)}</div>{_prompts(made, None)}'
        for short, made in found
    )
    return f'<h3>Asked for {when}</h3><div class="card"><div class="rows">{rows}</div></div>'


def chosen(album: Album) -> str:
    """For each class, what was dropped beside what was kept, in the last iteration that dropped anything."""
    classes, name = album.by_filter(FILTER_CLASSES, FILTER_EACH), FILTERS[album.filter]
    if not classes:
        return f"<p>{name.capitalize()} dropped nothing in this run.</p>"
    rows = "".join(
        f'<b>{escape(name)}</b><div class="strip">{_strip(dropped)}</div><div class="strip">{_strip(kept)}</div>'
        for name, dropped, kept in classes
    )
    return (
        f"<p>{MEANINGS[album.filter]}; samples off the real distribution tend to score low. The scores are those of "
        f"the last iteration that dropped any; at most {FILTER_CLASSES} classes are shown, each from its lowest to its "
        "highest score.</p>"
        '<div class="card"><div class="rows"><span class="head">class</span><span class="head">lowest: dropped</span>'
        f'<span class="head split">highest: kept</span>{rows}</div></div>'
    )


def near_copies(album: Album) -> str:
    """Flagged samples beside the real sample each is near to."""
    pairs = album.near_copies(NEAR_COPIES)
    if not pairs:
        return "<p>No synthetic sample was flagged as a near copy of a real one.</p>"
    fate = "were dropped" if album.record.config.drop_near_copies else "were treated like any other sample"
    text = (
        "<p>Samples closer to a real one than the service's threshold, nearest first (distance: root mean square "
        f"difference of pixels, 0 to 1). By this run's settings they {fate}.</p>"
    )
    return text + _missing(album) + _pairs(pairs, "real", "synthetic")


# ---------------------------------------------------------------- parts


def _missing(album: Album) -> str:
    if album.missing is None:
        return ""
    return (
        '<p class="warning">The real samples cannot be read any more, and are shown only where they were sent with the '
        f"feedback: {escape(album.missing)}</p>"
    )


def _perturbed(prompts_by: Mapping[str, int]) -> str:
    """Who wrote the prompts, and how often the template had to stand in for the language model."""
    if not prompts_by:
        return ""
    total = sum(prompts_by.values())
    who = ", ".join(f"{escape(name)} ({count(number)} samples)" for name, number in prompts_by.items())
    told = f"<p>Captions were perturbed (Figure 2) by {who}."
    if len(prompts_by) > 1 and TEMPLATE in prompts_by:
        told += f" The template stood in for the language model in {percent(prompts_by[TEMPLATE] / total)} of them."
    return told + "</p>"


def _prompts(made: Sequence[Picture], caption: str | None) -> str:
    """The prompts of a row's synthetic samples, in their order, where they say more than the class; of clips, and what
    else they were made with."""
    if caption is None and not any(picture.prompt_by or picture.made_with for picture in made):
        return ""
    items = "".join(f"<li>{escape(picture.prompt)} {_by(picture)}</li>" for picture in made)
    real = f"; caption: {escape(caption)}" if caption else ""
    return f'<details class="prompts"><summary>{len(made)} prompts{real}</summary><ol>{items}</ol></details>'


def _by(picture: Picture) -> str:
    told = "; ".join(part for part in (picture.prompt_by, picture.made_with) if part)
    return f"<small>({escape(told)})</small>" if told else ""


def _key(album: Album) -> str:
    colours = {"kept": "--good", "dropped": "--bad", "near copy": "--vog", "not used": "--muted"}
    colours |= {"too near": "--privacy"} if album.record.config.privacy.filter else {}
    items = (f'<li><i style="background:var({colour})"></i>{FATES[fate]}</li>' for fate, colour in colours.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _pairs(pairs: Sequence[Pair], left: str, right: str) -> str:
    rows = "".join(
        f'<b>{escape(pair.class_name)}</b>{_picture(pair.real)}<div class="strip split">{_strip(pair.made)}</div>'
        f"{_prompts(pair.made, pair.caption)}"
        for pair in pairs
    )
    head = f'<span class="head">class</span><span class="head">{left}</span><span class="head split">{right}</span>'
    return f'<div class="card"><div class="rows">{head}{rows}</div></div>'


def _strip(pictures: Sequence[Picture]) -> str:
    return "".join(_picture(picture) for picture in pictures)


def _image(picture: Picture, alt: str) -> str:
    data = codec.image_to_base64(picture.pixels)
    return f'<img{_tiny(picture)} src="data:image/png;base64,{data}" alt="{alt}">'


def _clip(picture: Picture, alt: str) -> str:
    """It plays; whoever asked the browser for less motion sees its middle frame."""
    clip = base64.b64encode(clips.to_bytes(picture.pixels, "webp", picture.fps, QUALITY)).decode("ascii")
    still = codec.image_to_base64(picture.pixels[len(picture.pixels) // 2], "webp", QUALITY)
    return (
        f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="data:image/webp;base64,{still}">'
        f'<img{_tiny(picture)} src="data:image/webp;base64,{clip}" alt="{alt}"></picture>'
    )


def _tiny(picture: Picture) -> str:
    return ' class="tiny"' if max(picture.pixels.shape[-3:-1]) <= TINY else ""


def _picture(picture: Picture) -> str:
    alt = escape(picture.alt)
    if picture.pixels is None:
        shown = f'<span class="gone" role="img" aria-label="{alt}: the file is gone">gone</span>'
    else:
        shown = (_clip if picture.pixels.ndim == 4 else _image)(picture, alt)
    fate = "" if picture.fate is None else " " + picture.fate.replace(" ", "-")
    title = "" if picture.fate is None else f' title="{FATES[picture.fate]}"'
    return f'<figure class="picture{fate}"{title}>{shown}<figcaption>{escape(picture.note)}</figcaption></figure>'
