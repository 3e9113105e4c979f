"""The only training loop, for every task and every mode: GenDataAgent's Algorithm 1, with lookahead before each update.

What is generated, how it travels, and what the model looks like is not known here. When several processes train the
run, each goes through this same loop with its own part of the rows (`run.processes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer import registry
from trainer.data.batches import Batch, derive
from trainer.data.images import SyntheticImages
from trainer.measure import measure
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
        with run.journal.iteration(run.at.iteration):
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
    copies = [c for c in candidates if run.config.drop_near_copies and c.sample.near_copy]
    run.journal.dropped(run.at.iteration, copies, "near copy")
    data = run.with_pixels(allowed)
    kept = torch.ones(len(data), dtype=torch.bool)
    scores = torch.full((len(data),), math.nan)
    if run.config.vog.enabled and len(data):
        with run.journal.timed("vog", iteration=run.at.iteration):
            part = run.processes.part(len(data))
            x, y = run.inputs(data.images[part]), data.labels[part].to(run.device)
            spread = run.config.vog.spread
            own = vog.vog(run.model, run.snapshots, x, y, logit=run.task.true_logit, spread=spread)
            scores = run.processes.gather(own.cpu(), len(data))
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
    own = chosen[run.processes.part(len(chosen))]
    with run.training_pass():
        losses = run.task.losses(run.replica(x[own]), y[own])
    loss = run.check_finite(run.processes.mean(losses))
    run.optimizer.param_groups[0]["lr"] = rate
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.advance(losses.detach(), synthetic, chosen)


def select(run: Run, x: Tensor, y: Tensor, synthetic: Tensor, learning_rate: float) -> Tensor:
    """Which rows of a mixed batch to train on: all real ones and what lookahead keeps.

    Args:
        x, y: the rows of this process. synthetic: bool [B], of the whole batch.

    Returns:
        bool [B].
    """
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
        context=run.training_pass,
        mean=run.processes.mean,
        average=run.processes.average,
        gather=partial(run.processes.gather, total=len(synthetic)),
    )


def finish(run: Run) -> None:
    """End of an iteration: evaluate, keep the checkpoint that VoG will compare, save."""
    with run.journal.timed("evaluate", iteration=run.at.iteration):
        run.journal.metrics(measure(run))
    if run.at.iteration < run.config.warmup_iterations:
        run.snapshots.append({name: value.detach().clone() for name, value in run.model.state_dict().items()})
    run.at = Position(iteration=run.at.iteration + 1, updates=run.at.updates)
    run.synthetic = SyntheticImages.none(run.real.size)
    with run.journal.timed("save", iteration=run.at.iteration - 1):
        run.save()
