"""The processes that train one run together: which rows each of them has, and how they put their results together.

Every process runs the same loop and comes to the same decisions, on its own rows of each batch and of each set that is
scored. The first one alone talks to the service and the queue, and reads and writes the run's folder. What one process
needs for this is `OneProcess`, which is nothing; several are `Processes`. Knows nothing of the algorithm.

    torchrun --nproc-per-node 2 -m trainer --config run.toml
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from protocol.errors import ConfigError, OnTheFlyError, PeerFailed
from trainer.batch_norm import SynchronisedBatchNorm
from trainer.data.batches import derive, whole

Value = TypeVar("Value")
Pack = Callable[[Any], Any]

STALLED = timedelta(minutes=10)  # a process that is so late for an exchange of numbers hangs
PATIENCE = timedelta(days=365)  # the first process may have to wait for the service: the others wait for it
CLOSING_S = 20.0  # what a process that failed may need to close its connections and files
SPEAKING_S = 1.0  # and to say why
FAILED = "failed"  # key of the processes' store: how many of them failed; the first to do so says why


def _same(value: Any) -> Any:
    return value


class OneProcess:
    """The only process of a run: its part is the whole.

    Raises:
        ConfigError: this machine does not have the device.
    """

    is_first = True

    def __init__(self, device: str):
        self.device = device_of(device)

    def part(self, total: int) -> slice:
        """This process's rows, of so many; the parts follow each other in order."""
        return whole(total)

    def gather(self, values: Tensor, total: int) -> Tensor:
        """The values [total, ...] of all rows, of those [part, ...] that each process has."""
        return values

    def mean(self, losses: Tensor) -> Tensor:
        """Mean over the losses [b] of all processes, to go backward from: `average` makes of each one's gradients those
        of the mean."""
        return losses.mean()

    def average(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each tensor's mean over the processes."""
        return tensors

    def totals(self, amounts: Mapping[str, float]) -> Mapping[str, float]:
        """Each amount's sum over the processes."""
        return amounts

    def first(self, work: Callable[[], Value], pack: Pack = _same, unpack: Pack = _same) -> Value:
        """What `work` returns in the first process, the only one that does it.

        Args:
            pack: makes tensors and plain values of it, for the way. unpack: the reverse.

        Raises:
            PeerFailed: it raised an OnTheFlyError, which is raised in the first process.
        """
        return work()

    def together(self) -> AbstractContextManager[None]:
        """A block that all processes get through, or none: an OnTheFlyError in one is PeerFailed in the others."""
        return nullcontext()

    def replica(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients after a backward pass are the average over the processes."""
        return model

    def statistics(self) -> AbstractContextManager[Any]:
        """Forward passes in train mode, in which batch normalisation sees the rows of all processes."""
        return nullcontext()

    def draw_apart(self, seed: int) -> None:
        """Let each process draw its own random numbers (dropout), which follow from the seed."""


class Processes(OneProcess):
    """This process among several. What the first one decides goes over gloo, without a time limit, for it may have to
    wait; numbers of all, where none has to, go over gloo with one, and gradients over nccl between GPUs.

    Raises:
        ConfigError: a process does not have the device. PeerFailed: another process does not.
    """

    def __init__(self, device: str):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_first = self.rank == 0
        with self.together():
            self.device = device_of(device, int(os.environ["LOCAL_RANK"]))
        on_gpu = self._all(torch.tensor([self.device.type == "cuda"], dtype=torch.uint8)).bool()
        with self.together():
            if on_gpu.any() and not on_gpu.all():
                raise ConfigError('some processes have a GPU and some have none: set trainer.device = "cpu"')
        if on_gpu.all():
            torch.cuda.set_device(self.device)
        self._numbers = dist.new_group(backend="gloo", timeout=STALLED)
        self._gradients = dist.new_group(backend="nccl", timeout=STALLED) if on_gpu.all() else self._numbers

    def part(self, total: int) -> slice:
        return self._part(total, self.rank)

    def _part(self, total: int, rank: int) -> slice:
        return slice(total * rank // self.size, total * (rank + 1) // self.size)

    def gather(self, values: Tensor, total: int) -> Tensor:
        padded = values.new_zeros(-(-total // self.size), *values.shape[1:], device="cpu")
        padded[: len(values)] = values
        lengths = [part.stop - part.start for part in (self._part(total, rank) for rank in range(self.size))]
        parts = self._all(padded, self._numbers)
        rows = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(rows).to(values.device)

    def mean(self, losses: Tensor) -> Tensor:
        sums = self.totals({"loss": float(losses.detach().sum()), "rows": len(losses)})
        own = losses.sum() * (self.size / sums["rows"])
        return own + (sums["loss"] / sums["rows"] - own.detach())

    def average(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # one exchange, whatever the number of layers
        dist.all_reduce(flat, group=self._gradients)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def totals(self, amounts: Mapping[str, float]) -> Mapping[str, float]:
        values = torch.tensor(list(amounts.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self._numbers)
        return dict(zip(amounts, values.tolist(), strict=True))

    def first(self, work: Callable[[], Value], pack: Pack = _same, unpack: Pack = _same) -> Value:
        value, buffer = None, io.BytesIO()
        with self.together():
            if self.is_first:
                value = work()
                torch.save(pack(value), buffer)
        size = torch.tensor(buffer.tell())
        dist.broadcast(size, 0)
        data = bytearray(buffer.getbuffer() if self.is_first else int(size))
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)
        if self.is_first:
            return value
        return unpack(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))

    @contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except OnTheFlyError as raised:
            error = raised
        failed = self._all(torch.tensor([error is not None], dtype=torch.uint8)).flatten().tolist()
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise PeerFailed(f"process {failed.index(True)} of this run failed: its own message says why")

    def _all(self, values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """The values [...] of every process, [processes, ...]; equal shapes, on the CPU."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values, group=group)
        return torch.stack(found)

    def replica(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, process_group=self._gradients)

    def statistics(self) -> AbstractContextManager[Any]:
        return SynchronisedBatchNorm(self._gradients)

    def draw_apart(self, seed: int) -> None:
        torch.manual_seed(derive(seed, "process", self.rank))


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[OneProcess]:
    """This process, together with those that torchrun started beside it.

    Raises:
        ConfigError: the device is not to be had.
        PeerFailed: what the block could not go on from, another process has failed of before; that one says why.
    """
    if not several():
        yield OneProcess(device)
        return
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Processes(device)
    except BaseException as error:
        follows = isinstance(error, Exception) and (isinstance(error, PeerFailed) or store.add(FAILED, 1) > 1)
        if not torch.cuda.is_initialized():  # nccl may wait for what a peer will never send
            dist.destroy_process_group()
        if not follows:
            raise
        _let_speak(store)  # of the same error, or of what made it close a connection
        raise PeerFailed(f"another process of this run failed: its own message says why ({error})") from error
    dist.destroy_process_group()


def _let_speak(store: dist.Store) -> None:
    """Wait until the process that failed first can have said why: torchrun ends them all as soon as one has ended."""
    deadline = time.monotonic() + CLOSING_S
    with suppress(KeyboardInterrupt):
        while time.monotonic() < deadline and not store.check([FAILED]):
            time.sleep(0.05)
        time.sleep(SPEAKING_S)


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device that trainer.device names; one GPU a process when there are several on this machine.

    Raises:
        ConfigError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f'trainer.device = {name!r} names one GPU for several processes: set "cuda"', param="device"
            )
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'trainer.device = {name!r} is not to be had: {error}. Set "cpu" or "auto", or start fewer processes',
            param="device",
        ) from error
