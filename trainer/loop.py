"""The only training loop, for every task and every mode: GenDataAgent's Algorithm 1, with lookahead before each update.

What is generated, how it travels, and what the model looks like is not known here. When several processes train the
run, each goes through this same loop with its own part of the rows (`run.processes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainer import filters, registry, resume
from trainer.data.batches import Batch, derive
from trainer.data.images import SyntheticImages
from trainer.held_out import learn_thresholds
from trainer.measure import measure
from trainer.pool import Candidate, without_copies
from trainer.position import Position
from trainer.privacy.filter import too_near
from trainer.run import Run
from trainer.selection import ranking
from trainer.selection.feedback import Scored
from trainer.selection.lookahead import lookahead
from trainer.shortages import shortages
from trainer.source import Source, Wanted


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
                    resume.save_when_due(run)
                    after_update(run)
            finish(run)


def gather(run: Run, source: Source) -> None:
    """Begin an iteration: say what is hard, and in stage 2 choose this iteration's synthetic training set."""
    wanted = hardest(run)
    run.at.scarce = [shortage.class_name for shortage in wanted.classes]
    source.ask(run.at.iteration, run.at.updates, wanted)
    if run.at.iteration >= run.config.warmup_iterations:
        with run.journal.timed("wait", iteration=run.at.iteration):
            candidates = source.take(run.at.iteration, wanted)
        keep(run, candidates)


def hardest(run: Run) -> Wanted:
    """The real samples to ask for, hardest first, and their scores (GenDataAgent eq. 1); and the classes (ARGen 3)."""
    config, at = run.config.feedback, run.at.iteration
    if not config.enabled:
        with run.journal.timed("score", iteration=at):
            return Wanted([], [], shortages(run))
    criterion = registry.resolve("feedback", config.criterion)
    fraction = run.thresholds.ask(at)
    labels, features = run.real.labels, partial(run.features, run.real)
    generator = torch.Generator().manual_seed(derive(run.config.seed, "feedback", at))
    with run.journal.timed("score", iteration=at):
        logits = run.predict(run.real)
        scores = criterion(Scored(logits, labels, features, generator, run.config.similarity.neighbours))
        if config.per_class:
            marginal = ranking.lowest_of_each_class(scores, labels, fraction)
        else:
            marginal = ranking.lowest(scores, ranking.part(fraction, len(labels)))
        return Wanted(marginal.tolist(), scores[marginal].tolist(), shortages(run))


def keep(run: Run, candidates: Sequence[Candidate]) -> None:
    """Choose this iteration's synthetic training set: drop near copies and what is too near to a real sample (if set),
    and of each class those that fit the real samples least."""
    allowed, copies = without_copies(candidates, run.config.drop_near_copies)
    data = run.with_pixels(allowed)
    near = too_near(run, data)
    revealing = data.subset(near).candidates
    data = data.subset(~near) if revealing else data
    scores, kept = filters.scores(run, data), torch.ones(len(data), dtype=torch.bool)
    if run.config.filter and len(data):
        kept = ranking.keep(scores, data.labels, run.thresholds.drop(run.at.iteration))  # eq. 7
    run.synthetic = data.subset(kept)
    run.record_choice(data.candidates, copies, revealing, scores, kept)


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
    """Which rows of a mixed batch to train on: all real ones and what lookahead keeps, two at least where there are as
    many: batch statistics want two.

    Args:
        x, y: the rows of this process. synthetic: bool [B], of the whole batch.

    Returns:
        bool [B].
    """
    settings = run.config.lookahead
    if not settings.enabled:
        return torch.ones_like(synthetic)
    made = int(synthetic.sum())
    wanting = 2 - (len(synthetic) - made)
    return lookahead(
        run.model,
        run.task.losses,
        x,
        y,
        synthetic,
        virtual_lr=run.virtual_lr(learning_rate),
        keep=min(1.0, max(settings.keep, wanting / max(made, 1))),
        context=run.training_pass,
        mean=run.processes.mean,
        average=run.processes.average,
        gather=partial(run.processes.gather, total=len(synthetic)),
    )


def finish(run: Run) -> None:
    """End of an iteration: evaluate, keep the checkpoint that VoG will compare, save, tell who wants to know."""
    with run.journal.timed("evaluate", iteration=run.at.iteration):
        run.journal.metrics(measure(run) | learn_thresholds(run))
    if run.at.iteration < run.config.warmup_iterations:
        run.snapshots.append({name: value.detach().clone() for name, value in run.model.state_dict().items()})
    run.at = Position(iteration=run.at.iteration + 1, updates=run.at.updates)
    run.synthetic = SyntheticImages.none(run.frame)
    with run.journal.timed("save", iteration=run.at.iteration - 1):
        resume.save(run)
    with run.processes.together():
        for told in run.after_iteration:
            told(run)
