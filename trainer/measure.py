"""The numbers of one iteration: one line of metrics.jsonl. Knows a run; not where the line goes."""

from __future__ import annotations

from typing import Any

from trainer.data.images import RealImages, SyntheticImages
from trainer.evaluate import Evaluation, evaluate, gradient_magnitude, train_val_gap
from trainer.run import Run

COUNTS = (
    "candidates",  # samples handed to this iteration
    "near_copies",  # of them, dropped as near copies of a real one
    "vog_dropped",  # of the rest, dropped by VoG; what remains is the synthetic training set
    "real_rows",  # rows trained on
    "synthetic_rows",  # rows trained on, after lookahead
    "lookahead_seen",  # synthetic rows that lookahead scored
)


def measure(run: Run) -> dict[str, Any]:
    """Measure the iteration that ends now; every process of the run takes part."""
    train = accuracy(run, run.real)
    row: dict[str, Any] = {
        "iteration": run.at.iteration,
        "updates": run.at.updates,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "loss_real": run.at.mean("real_loss", "real_rows"),
        "loss_synthetic": run.at.mean("synthetic_loss", "synthetic_rows"),
        "train_top1": train.top1,
        "gradient_real": gradient(run, run.real),
        "gradient_synthetic": gradient(run, run.synthetic),
        **{name: run.at.sums.get(name, 0.0) for name in COUNTS},
        "stale": run.processes.first(lambda: run.pool.stale),
    }
    if len(run.synthetic):
        row["synthetic_top1"] = accuracy(run, run.synthetic).top1
    if run.test is not None:
        held_out = accuracy(run, run.test)
        row |= {
            "test_top1": held_out.top1,
            "worst_case_disparity": held_out.worst_case_disparity,
            "per_class": held_out.per_class,
            "train_val_gap": train_val_gap(train, held_out),
        }
    return row


def accuracy(run: Run, data: RealImages | SyntheticImages) -> Evaluation:
    """How good the model is on un-augmented rows."""
    return evaluate(run.predict(data), data.labels, len(run.task.classes))


def gradient(run: Run, data: RealImages | SyntheticImages) -> float | None:
    """Mean gradient norm of the first rows of a set (GenDataAgent Figure 6b); None for an empty one."""
    rows = slice(run.config.gradient_rows)
    if not len(data.labels[rows]):
        return None
    x, y = run.inputs(data.images[rows]), data.labels[rows].to(run.device)
    return gradient_magnitude(run.task, run.model, x, y)
