"""Action units from 68 facial landmarks: how far brows, lids, nose and mouth have moved from a neutral face.

Pure geometry: knows nothing of pixels, nor of where landmarks come from. Lengths are in inter-ocular distances (between
the midpoints of the eyes' corners, about 63 mm of an adult), measured in the frame of the face: the eyes' line is its
x axis. So position, size and rotation in the image plane do not matter; turning the head out of it does. Each unit has
a span: the movement that counts as its greatest intensity, FACS level E. The spans are our own round figures for
adults; no FACS coder's scores went into them.

    N faces; points (x, y) in the order of 300-W: 0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes, 48-67 lips
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

INNER_BROW, OUTER_BROW = [20, 21, 22, 23], [17, 18, 25, 26]
EYES = ([36, 39], [42, 45])  # corners of each
UPPER_LIDS, LOWER_LIDS = [37, 38, 43, 44], [40, 41, 46, 47]
NOSTRILS, NOSE_BASE = [31, 35], [33]
CORNERS = [48, 54]  # of the mouth
UPPER_LIP, LOWER_LIP = [50, 51, 52], [56, 57, 58]  # outer edges
INNER_UPPER, INNER_LOWER = [61, 62, 63], [65, 66, 67]
CHIN = [8]
SMALLEST = 1e-6  # pixels between the eyes, below which there is no face to measure


@dataclass(frozen=True)
class Measures:
    """Of N faces, each float64 [N] in inter-ocular distances. Heights are above the eyes' line: below it, negative."""

    inner_brow: np.ndarray  # height
    outer_brow: np.ndarray  # height
    brow_gap: np.ndarray  # between the brows' inner ends
    upper_lid: np.ndarray  # height
    lower_lid: np.ndarray  # height
    nostrils: np.ndarray  # height
    upper_lip: np.ndarray  # height
    corners: np.ndarray  # of the mouth, height
    width: np.ndarray  # of the mouth
    parting: np.ndarray  # between the lips
    lips: np.ndarray  # thickness of both
    lower_lip: np.ndarray  # height of its inner edge
    nose_to_chin: np.ndarray


def aligned(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks [N, 68, 2] in the frame of the face: the origin between the eyes, the eyes' line along x, the distance
    of their midpoints 1. A face without extent is NaN."""
    left, right = (landmarks[:, corners].mean(axis=1) for corners in EYES)
    across = right - left
    distance = np.hypot(across[:, 0], across[:, 1])
    with np.errstate(invalid="ignore"):
        across = np.where((distance > SMALLEST)[:, None], across, np.nan) / np.maximum(distance, SMALLEST)[:, None] ** 2
    x, y = (landmarks - ((left + right) / 2)[:, None]).transpose(2, 0, 1)
    cos, sin = across.T[:, :, None]
    return np.stack([x * cos + y * sin, y * cos - x * sin], axis=2)


def measured(landmarks: np.ndarray) -> Measures:
    """What units are told by, of landmarks [N, 68, 2]."""
    face = aligned(landmarks)

    def height(points: list[int]) -> np.ndarray:
        return -face[:, points, 1].mean(axis=1)

    return Measures(
        inner_brow=height(INNER_BROW),
        outer_brow=height(OUTER_BROW),
        brow_gap=face[:, 22, 0] - face[:, 21, 0],
        upper_lid=height(UPPER_LIDS),
        lower_lid=height(LOWER_LIDS),
        nostrils=height(NOSTRILS),
        upper_lip=height(UPPER_LIP),
        corners=height(CORNERS),
        width=face[:, 54, 0] - face[:, 48, 0],
        parting=height(INNER_UPPER) - height(INNER_LOWER),
        lips=height(UPPER_LIP) - height(INNER_UPPER) + height(INNER_LOWER) - height(LOWER_LIP),
        lower_lip=height(INNER_LOWER),
        nose_to_chin=height(NOSE_BASE) - height(CHIN),
    )


UNITS = (
    "AU01",  # inner brow raiser: the brows' inner ends rise
    "AU02",  # outer brow raiser: their outer ends rise
    "AU04",  # brow lowerer: half from the inner ends' fall, half from their drawing together
    "AU05",  # upper lid raiser
    "AU06",  # cheek raiser: no landmark is on the cheek; what the lower lids rise while the mouth's corners rise
    "AU07",  # lid tightener: what they rise otherwise
    "AU09",  # nose wrinkler: the nostrils rise
    "AU10",  # upper lip raiser: the upper lip rises, beyond what the wrinkling nose lifts it
    "AU12",  # lip corner puller: the mouth's corners rise
    "AU15",  # lip corner depressor: they fall
    "AU17",  # chin raiser: the lower lip rises
    "AU20",  # lip stretcher: the mouth widens, beyond what a smile widens it
    "AU23",  # lip tightener: the lips thin; pressing them (AU24) looks the same here
    "AU25",  # lips part
    "AU26",  # jaw drop: the chin goes away from the nose
    "AU45",  # blink: the lids' distance falls below half; closed eyes (AU43) look the same in one frame
)
JAW_TO_CORNERS = 1 / 3  # of the chin's way down the mouth's corners go with it
NOSE_TO_LIP = 1 / 2  # of the nostrils' way up the upper lip goes with them


def intensities(landmarks: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """How strongly each unit of `UNITS` shows.

    Args:
        landmarks: float [N, 68, 2].
        neutral: float [N, 68, 2], the neutral face of each; or [1, 68, 2], of all. Of any size and position.

    Returns:
        float64 [N, K] in [0, 1]; NaN where a face has no extent.
    """
    now, rest = measured(landmarks), measured(neutral)
    jaw = now.nose_to_chin - rest.nose_to_chin
    corners = now.corners - rest.corners + JAW_TO_CORNERS * np.maximum(jaw, 0.0)
    nose = now.nostrils - rest.nostrils
    lids, smile = _part(now.lower_lid - rest.lower_lid, 0.05), _part(corners, 0.14)
    opening = (now.upper_lid - now.lower_lid) / (rest.upper_lid - rest.lower_lid)
    found = {
        "AU01": _part(now.inner_brow - rest.inner_brow, 0.16),
        "AU02": _part(now.outer_brow - rest.outer_brow, 0.16),
        "AU04": (_part(rest.inner_brow - now.inner_brow, 0.10) + _part(rest.brow_gap - now.brow_gap, 0.12)) / 2,
        "AU05": _part(now.upper_lid - rest.upper_lid, 0.08),
        "AU06": np.minimum(lids, smile),
        "AU07": np.maximum(lids - smile, 0.0),
        "AU09": _part(nose, 0.08),
        "AU10": _part(now.upper_lip - rest.upper_lip - NOSE_TO_LIP * np.maximum(nose, 0.0), 0.10),
        "AU12": smile,
        "AU15": _part(-corners, 0.12),
        "AU17": _part(now.lower_lip - rest.lower_lip, 0.08),
        "AU20": np.maximum(_part(now.width - rest.width, 0.25) - smile, 0.0),
        "AU23": _part(1 - now.lips / rest.lips, 0.6),
        "AU25": _part(now.parting - rest.parting, 0.12),
        "AU26": _part(jaw, 0.30),
        "AU45": _part(0.5 - opening, 0.5),
    }
    return np.stack([found[unit] for unit in UNITS], axis=1)


def _part(moved: np.ndarray, span: float) -> np.ndarray:
    """How much of its span something has moved, in [0, 1]."""
    return np.clip(moved / span, 0.0, 1.0)
