"""The report's pictures as HTML: which rows are shown, what is said beside them, and what where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from protocol import codec
from protocol.messages import Feedback
from trainer.report.pictures import Album, Pair, Picture

HARD_ROWS = 6  # of each of the two iterations shown
MADE = 8  # synthetic samples beside each real one
VOG_CLASSES = 10
VOG_EACH = 5  # lowest and highest of each class
NEAR_COPIES = 12
TINY = 64  # pixels: pictures up to this side are enlarged without smoothing
CRITERIA = {
    "marginal": "the probability that the model gave to its own class: the lower, the harder",
    "entropy": "the negated entropy of the model's prediction: the lower, the less sure",
    "random": "drawn at random",
}
FATES = {
    "kept": "trained on",
    "dropped": "dropped by variance of gradients",
    "near copy": "dropped as a near copy",
    "not used": "not used",
}


def hard_samples(album: Album) -> str:
    """The hardest real samples of the first and the last answered question, each beside what was made for it."""
    answered = album.answered()
    if not answered:
        return "<p>No synthetic samples were made for real ones in this run.</p>"
    criterion = album.record.config.feedback.criterion
    text = f"<p>Hardest first. The score is {CRITERIA.get(criterion, f'by the criterion {escape(criterion)}')}.</p>"
    if album.record.config.mode == "offline":
        text = "<p>The pool was made beforehand for every real sample; these are the first of them.</p>"
    shown = answered if len(answered) == 1 else [answered[0], answered[-1]]
    return text + _missing(album) + _key() + "".join(_asked(album, feedback) for feedback in shown)


def _asked(album: Album, feedback: Feedback) -> str:
    pairs = album.hardest(feedback, HARD_ROWS, MADE)
    title = (
        "Asked for beforehand"
        if album.record.config.mode == "offline"
        else f"Asked for in iteration {feedback.feedback + 1}"
    )
    return f"<h3>{title}</h3>{_pairs(pairs, 'real', 'made for it')}"


def chosen_by_vog(album: Album) -> str:
    """For each class, what was dropped beside what was kept, in the last iteration that dropped anything."""
    classes = album.by_vog(VOG_CLASSES, VOG_EACH)
    if not classes:
        return "<p>Variance of gradients dropped nothing in this run.</p>"
    rows = "".join(
        f'<b>{escape(name)}</b><div class="strip">{_strip(dropped)}</div><div class="strip">{_strip(kept)}</div>'
        for name, dropped, kept in classes
    )
    return (
        "<p>The score (VoG) is how much the gradient at a sample's pixels changed while the model learnt; samples off "
        "the real distribution tend to score low. The scores are those of the last iteration that dropped any; at most "
        f"{VOG_CLASSES} classes are shown, each from its lowest to its highest score.</p>"
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


def _key() -> str:
    colours = {"kept": "--good", "dropped": "--bad", "near copy": "--vog", "not used": "--muted"}
    items = (f'<li><i style="background:var({colour})"></i>{FATES[fate]}</li>' for fate, colour in colours.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _pairs(pairs: Sequence[Pair], left: str, right: str) -> str:
    rows = "".join(
        f'<b>{escape(pair.class_name)}</b>{_picture(pair.real)}<div class="strip split">{_strip(pair.made)}</div>'
        for pair in pairs
    )
    head = f'<span class="head">class</span><span class="head">{left}</span><span class="head split">{right}</span>'
    return f'<div class="card"><div class="rows">{head}{rows}</div></div>'


def _strip(pictures: Sequence[Picture]) -> str:
    return "".join(_picture(picture) for picture in pictures)


def _picture(picture: Picture) -> str:
    alt = escape(picture.alt)
    if picture.pixels is None:
        shown = f'<span class="gone" role="img" aria-label="{alt}: the file is gone">gone</span>'
    else:
        tiny = ' class="tiny"' if max(picture.pixels.shape[:2]) <= TINY else ""
        shown = f'<img{tiny} src="data:image/png;base64,{codec.image_to_base64(picture.pixels)}" alt="{alt}">'
    fate = "" if picture.fate is None else " " + picture.fate.replace(" ", "-")
    title = "" if picture.fate is None else f' title="{FATES[picture.fate]}"'
    return f'<figure class="picture{fate}"{title}>{shown}<figcaption>{escape(picture.note)}</figcaption></figure>'
