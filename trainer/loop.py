"""The only training loop, for every task and every mode: GenDataAgent's Algorithm 1, with lookahead before each update.

What is generated, how it travels, and what the model looks like is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer import registry
from trainer.data.batches import Batch, derive
from trainer.data.images import SyntheticImages
from trainer.pool import Candidate
from trainer.run import Position, Run
from trainer.selection import feedback, vog
from trainer.selection.lookahead import lookahead
from trainer.source import Source


def train(run: Run, source: Source, after_update: Callable[[Run], None] = lambda run: None) -> None:
    """Run the iterations that remain.

    Args:
        source: where synthetic samples come from.
        after_update: called after every optimiser update; what it raises stops the run.
    """
    while run.at.iteration < run.config.iterations:
        if run.at.done == 0:  # else: resumed within an iteration, whose samples are known
            gather(run, source)
        with run.journal.timed("train", iteration=run.at.iteration):
            for batch in run.batches():
                update(run, batch)
                after_update(run)
        finish(run)


def gather(run: Run, source: Source) -> None:
    """Begin an iteration: say what is hard, and in stage 2 choose this iteration's synthetic training set."""
    marginal, scores = hardest(run)
    source.ask(run.at.iteration, run.at.updates, marginal, scores)
    if run.at.iteration >= run.config.warmup_iterations:
        with run.journal.timed("wait", iteration=run.at.iteration):
            candidates = source.take(run.at.iteration, marginal)
        keep(run, candidates)


def hardest(run: Run) -> tuple[list[int], list[float]]:
    """The k real samples that the model is least sure of, hardest first, and their scores (GenDataAgent eq. 1)."""
    criterion = registry.resolve("feedback", run.config.feedback.criterion)
    with run.journal.timed("score", iteration=run.at.iteration):
        generator = torch.Generator().manual_seed(derive(run.config.seed, "feedback", run.at.iteration))
        scores = criterion(run.predict(run.real), run.real.labels, generator)
        marginal = feedback.lowest(scores, math.ceil(run.config.feedback.fraction * len(run.real) - 1e-9))
    return marginal.tolist(), scores[marginal].tolist()


def keep(run: Run, candidates: Sequence[Candidate]) -> None:
    """Choose this iteration's synthetic training set: drop near copies (if set), and the lowest VoG of each class."""
    allowed = [c for c in candidates if not (run.config.drop_near_copies and c.sample.near_copy)]
    data = SyntheticImages(allowed, run.real.size)
    kept = torch.ones(len(data), dtype=torch.bool)
    scores = torch.full((len(data),), math.nan)
    if run.config.vog.enabled and len(data):
        with run.journal.timed("vog", iteration=run.at.iteration):
            x, y = run.inputs(data.images), data.labels.to(run.device)
            spread = run.config.vog.spread
            scores = vog.vog(run.model, run.snapshots, x, y, logit=run.task.true_logit, spread=spread).cpu()
            kept = vog.keep(scores, data.labels, run.config.vog.fraction)  # eq. 7
    run.journal.selection(run.at.iteration, data.candidates, scores.tolist(), kept.tolist())
    run.synthetic = data.subset(kept)
    run.at.kept = [candidate.sample.id for candidate in run.synthetic.candidates]
    run.at.add(candidates=len(candidates), near_copies=len(candidates) - len(allowed), vog_dropped=int((~kept).sum()))


def update(run: Run, batch: Batch) -> None:
    """One optimiser update, on the real rows and the synthetic rows that lookahead keeps (RL-identity eq. 12).

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
    """
    x, y, synthetic = run.augmented(batch)
    rate = run.learning_rate()
    run.model.train()
    chosen = select(run, x, y, synthetic, rate)
    with run.autocast():
        losses = run.task.losses(run.model(x[chosen]), y[chosen])
    run.check_finite(losses)
    run.optimizer.param_groups[0]["lr"] = rate
    run.optimizer.zero_grad()
    losses.mean().backward()
    run.optimizer.step()
    run.advance(losses.detach(), synthetic, chosen)


def select(run: Run, x: Tensor, y: Tensor, synthetic: Tensor, learning_rate: float) -> Tensor:
    """Which rows of a mixed batch to train on: all real ones and what lookahead keeps. Bool [B]."""
    settings = run.config.lookahead
    if not settings.enabled:
        return torch.ones_like(synthetic)
    return lookahead(
        run.model,
        run.task.losses,
        x,
        y,
        synthetic,
        virtual_lr=settings.virtual_lr or learning_rate,
        keep=settings.keep,
        autocast=run.autocast,
    )


def finish(run: Run) -> None:
    """End of an iteration: evaluate, keep the checkpoint that VoG will compare, save."""
    with run.journal.timed("evaluate", iteration=run.at.iteration):
        run.journal.metrics(run.measure())
    if run.at.iteration < run.config.warmup_iterations:
        run.snapshots.append({name: value.detach().clone() for name, value in run.model.state_dict().items()})
    run.at = Position(iteration=run.at.iteration + 1, updates=run.at.updates)
    run.synthetic = SyntheticImages([], run.real.size)
    with run.journal.timed("save", iteration=run.at.iteration - 1):
        run.save()
