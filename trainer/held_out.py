"""What an iteration gained on held-out samples: thresholds are learnt from it. Knows a run, not how they are chosen."""

from __future__ import annotations

import math

from trainer.measure import accuracy
from trainer.run import Run

LEAST_LOSS = 1e-6  # nats: below this, held-out samples say nothing more


def learn_thresholds(run: Run) -> dict[str, float]:
    """Credit the iteration that ends now to the thresholds that it used; its numbers, none where thresholds are fixed.

    Every process of the run takes part, and comes to the same thresholds.
    """
    if run.splits.held_out is None:
        return {}
    now = accuracy(run, run.splits.held_out)
    value = now.top1 if run.config.thresholds.value == "accuracy" else -math.log(max(now.loss, LEAST_LOSS))
    return run.thresholds.credit(run.at.iteration, value)
