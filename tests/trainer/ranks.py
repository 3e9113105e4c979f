"""What three processes work out together, for tests to compare with what one does."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocol.errors import DatasetError, InvalidImage, OnTheFlyError, PeerFailed
from trainer import parallel
from trainer.parallel import OneProcess, Processes, joined
from trainer.selection.lookahead import lookahead, lookahead_scores

SIZE = 3
BATCHES = (7, 2)  # rows; of two rows the first process holds none
KEPT = [True, False, False, True, True, True, False]  # of seven: 1, 2 and 1 by process


def network() -> nn.Module:
    """Normalisation of every kind that the synchronised one takes the place of, in double precision."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False, momentum=None),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.Linear(6, 3),
    )
    return model.double()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 4, 4, generator=draw).double(), torch.randint(3, (rows,), generator=draw)


def losses(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none")


def one_update(processes: OneProcess, rows: int, chosen: Tensor | None = None) -> dict[str, Any]:
    """Loss, outputs, gradients and buffers of an update of `network` on a batch of so many rows, or some of them."""
    model, (x, y), part = network(), batch(rows), processes.part(rows)
    own = torch.ones(rows, dtype=torch.bool)[part] if chosen is None else chosen[part]
    x = x[part][own].requires_grad_()
    replica = processes.replica(model)
    with processes.statistics():
        outputs = replica(x)
    loss = processes.mean(losses(outputs, y[part][own]))
    loss.backward()
    return {
        "loss": loss.item(),
        "outputs": outputs.detach(),
        "inputs": x.grad,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def choices(processes: OneProcess, rows: int) -> list[list[bool]]:
    """What lookahead chooses of batches with several numbers of synthetic rows."""
    (x, y), part = batch(rows), processes.part(rows)
    found = []
    for real in range(rows):
        with torch.random.fork_rng():
            chosen = lookahead(
                network(),
                losses,
                x[part],
                y[part],
                torch.arange(rows) >= real,
                virtual_lr=0.5,
                context=processes.statistics,
                mean=processes.mean,
                average=processes.average,
                gather=partial(processes.gather, total=rows),
            )
        found.append(chosen.tolist())
    return found


def scores(processes: OneProcess, rows: int) -> Tensor:
    """Lookahead's score of every row of a batch."""
    (x, y), part = batch(rows), processes.part(rows)
    own = lookahead_scores(
        network(),
        losses,
        x[part],
        y[part],
        virtual_lr=0.5,
        context=processes.statistics,
        mean=processes.mean,
        average=processes.average,
    )
    return processes.gather(own, rows)


def raised(processes: Processes, work: Any, culprit: int | None = None) -> str:
    """Name of the error class that `work` ends with."""
    try:
        if culprit is None:
            processes.first(work)
        else:
            with processes.together():
                work() if processes.rank == culprit else None
    except OnTheFlyError as error:
        return type(error).__name__
    return "none"


def fail(error: OnTheFlyError) -> None:
    raise error


def drawn(processes: Processes) -> list[float]:
    processes.draw_apart(5)
    first = torch.rand(1).item()
    processes.draw_apart(5)
    assert torch.rand(1).item() == first
    return [first]


def answers(processes: Processes) -> dict[str, Any]:
    rank = processes.rank
    return {
        "parts": [[part.start, part.stop] for part in map(processes.part, (7, 2))],
        "gathered": [processes.gather(torch.arange(n)[processes.part(n)] * 1.5, n) for n in (7, 2)],
        "masks": processes.gather((torch.arange(14).view(7, 2) % 3 == 0)[processes.part(7)], 7),
        "totals": processes.totals({"a": rank, "b": 0.5}),
        "first": processes.first(lambda: {"rank": rank, "tensor": torch.arange(3), "nothing": None}),
        "packed": list(processes.first(lambda: {rank}, pack=list, unpack=lambda plain: {*plain, "told"})),
        "first_failed": raised(processes, lambda: fail(DatasetError("none"))),
        "last_failed": raised(processes, lambda: fail(InvalidImage("none")), culprit=2),
        "nobody_failed": raised(processes, lambda: None),
        "updates": [one_update(processes, rows) for rows in BATCHES],
        "selected": one_update(processes, 7, torch.tensor(KEPT)),
        "scores": [scores(processes, rows) for rows in BATCHES],
        "choices": [choices(processes, rows) for rows in BATCHES],
        "drawn": drawn(processes),
    }


def stall(processes: Processes, folder: Path) -> None:
    """One process hangs, until both of the others have noticed. Raises what they notice it by."""
    noticed = [folder / f"{rank}.noticed" for rank in (0, 2)]
    if processes.rank == 1:
        while not all(path.exists() for path in noticed):
            time.sleep(0.05)
        return
    try:
        processes.totals({"a": 1.0})
    except RuntimeError:
        (folder / f"{processes.rank}.noticed").touch()
        raise


def end(processes: Processes, how: str) -> None:
    """A mistake of one process while the others wait for it, or the same one of all."""
    if how == "all" or processes.rank == 1:
        raise ValueError("a mistake")
    processes.totals({"a": 1.0})


def main(rank: int, port: int, folder: Path, how: str) -> None:
    """One of the processes, with the environment that torchrun would give it. Writes its answers to the folder."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    if how == "stall":
        parallel.STALLED = timedelta(seconds=3)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is that of the parent, which survives them
    ended = "well"
    try:
        with joined("cpu") as processes:
            assert isinstance(processes, Processes)
            if how == "stall":
                stall(processes, folder)
            elif how == "well":
                torch.save(answers(processes), folder / f"{rank}.pt")
            else:
                end(processes, how)
    except (PeerFailed, RuntimeError, ValueError) as error:
        ended = type(error).__name__
    (folder / f"{rank}.txt").write_text(ended)
