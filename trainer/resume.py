"""How a run is saved, and found again: everything that it needs to go on as if it had not stopped.

Every process of the run calls `save` and `restore`; the first one alone writes and reads the folder. How a checkpoint
lies on the disk is known to `checkpoint` only.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError, DiskFull
from trainer import checkpoint, folder
from trainer.pool import Candidate, packed, unpacked
from trainer.position import Position
from trainer.run import Run


def save_when_due(run: Run) -> None:
    """After an update: save if the settings ask for a checkpoint now. Raises as `save`."""
    every = run.config.checkpoint_every
    if every is not None and run.at.updates % every == 0:
        save(run)


def save(run: Run) -> None:
    """Write a checkpoint. While the disk is full, the run goes on with the one before.

    Raises:
        DiskFull: at the end of the run.
        TrainingDiverged: rather than keep weights that are not numbers.
    """
    run.processes.first(lambda: _write(run))


def restore(run: Run) -> bool:
    """Go on from the newest checkpoint; False when there is none.

    Raises:
        CheckpointCorrupt: it is there but damaged.
        ConfigError: the folder was made with settings, data or a model that do not fit these.
    """
    state = run.processes.first(lambda: _read(run))
    if state is None:
        return False
    run.at = Position(**state["position"])
    with run.processes.together():
        try:
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{run.config.folder} holds a run with another model or optimizer: {error}. Use those to go on, "
                "choose another trainer.run, or start anew with --fresh"
            ) from error
    run.snapshots = state["snapshots"]
    if "thresholds" in state:  # a run that is older than learnt thresholds has fixed ones, which have no state
        run.thresholds.load_state_dict(state["thresholds"])
    run.synthetic = run.with_pixels(run.processes.first(lambda: _go_back(run, state), pack=packed, unpack=unpacked))
    checkpoint.load_rng_state(state["rng"])
    return True


# ---------------------------------------------------------------- in the first process


def _write(run: Run) -> None:
    for parameter in run.model.parameters():
        run.check_finite(parameter.detach())
    state = {
        "position": asdict(run.at),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "snapshots": run.snapshots,
        "thresholds": run.thresholds.state_dict(),
        "pool": run.pool.state_dict(),
        "rng": checkpoint.rng_state(),
    }
    try:
        run.journal.sync()
        checkpoint.save(run.config.folder / "checkpoints", state, updates=run.at.updates)
        run.disk_full = False
    except DiskFull as error:
        if run.at.iteration == run.config.iterations:
            raise
        if not run.disk_full:
            run.journal.event("disk_full", f"training goes on without new checkpoints: {error}")
        run.disk_full = True


def _read(run: Run) -> dict[str, Any] | None:
    """The newest checkpoint of the folder."""
    folder.check_made_for(run.config.folder, _made_for(run))
    state = checkpoint.load(run.config.folder / "checkpoints")
    if state is None:
        run.journal.rewind(0, selected=False)
    return state


def _go_back(run: Run, state: dict[str, Any]) -> list[Candidate]:
    """Pool and journal as they were at a checkpoint, and the synthetic training set of then."""
    run.pool.load_state_dict(state["pool"])
    run.journal.rewind(run.at.iteration, selected=run.at.done > 0)
    return run.pool.find(run.at.kept)


def _made_for(run: Run) -> dict[str, Any]:
    """What must be the same for a run's folder to fit."""
    config, learnt = run.config, None
    if config.thresholds.auto:  # which part was tried for which filter, and in which iteration its gain shows
        learnt = config.thresholds.model_dump() | {"filter": config.filter, "staleness": config.staleness}
    return {
        "seed": config.seed,
        "task": config.task,
        "model": _without_places(run.task.Config.model_validate(config.model).model_dump(exclude_unset=True)),
        "classes": list(run.task.classes),
        "thresholds": learnt,
        "dataset": run.splits.dataset.digest(),
        "batch_size": config.batch_size,
        "images_per_identity": config.images_per_identity,
        "optimizer": None if config.optimizer.kind == "sgd" else config.optimizer.kind,
        "mode": config.mode,
        "pool": config.feedback.images_per_sample if config.mode == "offline" else None,
    }


def _without_places(value: Any) -> Any:
    """Settings without the files and folders that they name, which may be moved as the dataset may."""
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items() if not isinstance(inner, Path)}
    if isinstance(value, list | tuple):
        return [_without_places(inner) for inner in value if not isinstance(inner, Path)]
    return value
