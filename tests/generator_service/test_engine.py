from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from generator_service.adaptation_run import AdaptationRun
from generator_service.backends.interface import Progress, Row, Sampling, WeightSet
from generator_service.batching import Batch, Generation
from generator_service.engine import Engine
from protocol.errors import Cancelled, GenerationFailed, NotReady, QueueFull, WeightsCorrupt
from protocol.messages import WeightsRef
from tests.generator_service.scripted import CLASSES, Config, ScriptedBackend

STEPS = 3


def weight_set(name: str = "base") -> WeightSet:
    return WeightSet(WeightsRef(name=name, version=1, digest=name), "scripted", "full", None, CLASSES, Path("."))


def generation(*seeds: int, weights: str = "base", prompt: str = "alpha", **more) -> Generation:
    rows = [Row(seed=seed, label=0, prompt=prompt) for seed in seeds]
    return Generation(weight_set(weights), Sampling(STEPS, "ddim"), rows, **more)


class Recorder:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.losses: list[float] = []

    def batch_done(self, batch: Batch, started: float, finished: float) -> None:
        self.batches.append(len(batch.rows))

    def adaptation_step(self, loss: float) -> None:
        self.losses.append(loss)


def verify(weights: WeightSet) -> None:
    if weights.ref.name == "corrupt":
        raise WeightsCorrupt("the file is damaged")


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend(Config(checkpoint=Path(".")))


@pytest.fixture
def engine(backend: ScriptedBackend) -> Iterator[Engine]:
    metrics = Recorder()
    engine = Engine(lambda: (backend, weight_set()), verify, metrics, max_batch=4, window_s=0.0, max_waiting_rows=8)
    engine.start()
    engine.ready.result()
    yield engine
    backend.release()
    engine.stop()


def busy(engine: Engine, backend: ScriptedBackend, *seeds: int, **more) -> Generation:
    """A generation that is being denoised and waits before its first step."""
    backend.hold()
    first = generation(*(seeds or (99,)), **more)
    engine.submit(first)
    backend.inside.wait()
    return first


def test_each_caller_gets_its_own_rows_of_a_shared_batch(engine, backend):
    busy(engine, backend)
    futures = [engine.submit(generation(1, 2)), engine.submit(generation(3))]
    backend.release()
    results = [future.result().images[:, 0, 0, 0].tolist() for future in futures]
    assert results == [[1, 2], [3]]
    assert backend.batches == [[99], [1, 2, 3]]


def test_a_generation_longer_than_a_batch_comes_back_whole_with_one_progress(engine, backend):
    steps = []
    wanted = generation(1, 2, 3, 4, 5, 6, on_step=lambda done, total: steps.append((done, total)))
    generated = engine.submit(wanted).result()
    assert generated.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert backend.batches == [[1, 2, 3, 4], [5, 6]]
    assert steps == [(0, 3), (1, 3), (2, 3), (2, 3), (2, 3), (3, 3)]
    assert generated.started <= generated.finished


def test_requests_and_queued_units_take_turns(engine, backend):
    busy(engine, backend)
    futures = [engine.submit(generation(10 * n, 0, 0, 0, lane="queue", alone=True)) for n in (1, 2)]
    futures += [engine.submit(generation(n, 0, 0, 0)) for n in (1, 2)]
    backend.release()
    [future.result() for future in futures]
    assert [batch[0] for batch in backend.batches] == [99, 10, 1, 20, 2]


# ---------------------------------------------------------------- cancelling


def test_a_waiting_generation_is_cancelled_at_once_and_never_runs(engine, backend):
    busy(engine, backend)
    waiting = generation(1)
    engine.submit(waiting)
    engine.cancel(waiting)
    assert isinstance(waiting.future.exception(), Cancelled)
    backend.release()
    engine.submit(generation(2)).result()
    assert backend.batches == [[99], [2]]


def test_a_batch_whose_rows_are_all_cancelled_is_aborted_between_steps(engine, backend):
    running = busy(engine, backend)
    backend.allow(1)
    engine.cancel(running)
    backend.allow(1)
    assert isinstance(running.future.exception(), Cancelled)
    backend.release()
    engine.submit(generation(2)).result()
    first = [event for event in backend.events if event[0] in ("batch", "step")]
    begun = first.index(("batch", "base@1", [99]))
    assert first[begun + 1 :].index(("batch", "base@1", [2])) < STEPS  # it never came to its last step


def test_batch_mates_of_a_cancelled_generation_get_their_rows(engine, backend):
    busy(engine, backend)
    staying, leaving = generation(1), generation(2)
    engine.submit(staying)
    engine.submit(leaving)
    left_before_the_end = []
    staying.on_step = lambda done, total: (
        engine.cancel(leaving) if done == 1 else left_before_the_end.append(leaving.future.done())
    )
    backend.release()
    assert staying.future.result().images[0, 0, 0, 0] == 1
    assert isinstance(leaving.future.exception(), Cancelled)
    assert left_before_the_end[-1] is True
    assert backend.batches == [[99], [1, 2]]


def test_a_cancelled_long_generation_leaves_no_rows_behind(engine, backend):
    running = busy(engine, backend, 1, 2, 3, 4, 5, 6)
    engine.cancel(running)
    backend.release()
    assert isinstance(running.future.exception(), Cancelled)
    engine.submit(generation(7)).result()
    assert backend.batches == [[1, 2, 3, 4], [7]]


# ---------------------------------------------------------------- failures


def test_a_backend_error_fails_its_batch_only(engine, backend, caplog):
    failed = engine.submit(generation(1, prompt="boom")).exception()
    assert isinstance(failed, GenerationFailed) and "RuntimeError: boom" in failed.message
    assert "Traceback" in caplog.text
    assert engine.submit(generation(2)).result().images[0, 0, 0, 0] == 2


def test_a_batch_that_does_not_fit_in_memory_is_made_in_halves(engine, backend, caplog):
    backend.fits = 2
    steps = []
    unit = generation(1, 2, 3, 4, 5, lane="queue", alone=True, on_step=lambda done, total: steps.append((done, total)))
    generated = engine.submit(unit).result()
    assert generated.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert backend.batches == [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2], [3], [4, 5]]
    assert steps[-1] == (STEPS, STEPS) and max(done for done, _ in steps[:-1]) < STEPS
    told = [record.rows for record in caplog.records if getattr(record, "event", None) == "batch_split"]
    assert told == [5, 3]
    assert engine.submit(generation(6, 7)).result().images[:, 0, 0, 0].tolist() == [6, 7]


def test_an_image_that_does_not_fit_in_memory_alone_fails_and_the_engine_goes_on(engine, backend):
    backend.fits = 0
    failed = engine.submit(generation(1, 2)).exception()
    assert isinstance(failed, GenerationFailed) and "one image does not fit" in failed.message
    backend.fits = None
    assert engine.submit(generation(3)).result().images[0, 0, 0, 0] == 3


def test_a_batch_in_halves_is_cancelled_between_steps(engine, backend):
    backend.fits = 1
    running = generation(1, 2)
    running.on_step = lambda done, total: engine.cancel(running) if backend.batches[-1] == [1] else None
    assert isinstance(engine.submit(running).exception(), Cancelled)
    engine.submit(generation(3)).result()
    assert backend.batches == [[1, 2], [1], [3]]


def test_corrupt_weights_fail_what_wants_them_only(engine, backend):
    assert isinstance(engine.submit(generation(1, weights="corrupt")).exception(), WeightsCorrupt)
    assert isinstance(engine.load(weight_set("corrupt")).exception(), WeightsCorrupt)
    engine.submit(generation(2)).result()
    assert ("load", "corrupt@1") not in backend.events


def test_more_rows_than_may_wait_are_refused_and_nothing_is_queued(engine, backend):
    busy(engine, backend)
    engine.submit(generation(1, 2, 3))
    with pytest.raises(QueueFull) as refused:
        engine.submit(generation(4, 5, 6, 7, 8, 9))
    assert refused.value.retry_after
    assert engine.waiting_rows() == {"request": 3, "queue": 0}


def test_nothing_is_taken_before_the_model_is_there_and_the_cause_of_a_failure_is_told(backend):
    def missing():
        raise WeightsCorrupt("the checkpoint is damaged")

    engine = Engine(missing, verify, Recorder(), max_batch=4, window_s=0.0, max_waiting_rows=8)
    with pytest.raises(NotReady, match="loading"):
        engine.submit(generation(1))
    engine.start()
    assert isinstance(engine.ready.exception(), WeightsCorrupt)
    with pytest.raises(NotReady, match="the checkpoint is damaged"):
        engine.submit(generation(1))
    engine.stop()


def test_stopping_finishes_the_current_batch_and_fails_the_rest(engine, backend):
    running = busy(engine, backend)
    waiting = engine.submit(generation(1))
    adaptation = engine.adapt(adaptation_run(backend, steps=5))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while True:  # until `stop` has begun
        try:
            engine.check_ready()
        except NotReady:
            break
    backend.release()
    stopping.join()
    assert running.future.result().images.shape == (1, 8, 8, 3)
    assert isinstance(waiting.exception(), NotReady)
    assert isinstance(adaptation.exception(), NotReady)


# ---------------------------------------------------------------- hot swap and adaptation


def test_a_swap_waits_for_the_batch_and_goes_before_the_next(engine, backend):
    busy(engine, backend)
    waiting = engine.submit(generation(1))
    swapped = engine.load(weight_set("other"))
    backend.release()
    waiting.result()
    swapped.result()
    order = [event[:2] for event in backend.events if event[0] in ("batch", "load")]
    assert order[-4:] == [("batch", "base@1"), ("load", "other@1"), ("load", "base@1"), ("batch", "base@1")]


def adaptation_run(backend: ScriptedBackend, steps: int, on_progress=lambda progress: None, fail_at: int = -1):
    def begin(given) -> Iterator[Progress]:
        assert given is backend
        for step in range(1, steps + 1):
            if step == fail_at:
                raise FloatingPointError("nan")
            backend.events.append(("optimise", step))
            yield Progress(step, steps, loss=1 / step)
        return "class_embedding", {"steps": steps}

    return AdaptationRun(weight_set(), begin, on_progress)


def test_an_adaptation_and_generation_take_turns(engine, backend):
    busy(engine, backend)
    waiting = [engine.submit(generation(n, 0, 0, 0)) for n in (1, 2)]
    adapted = engine.adapt(adaptation_run(backend, steps=4))
    mark = len(backend.events)
    backend.release()
    assert adapted.result() == ("class_embedding", {"steps": 4})
    [future.result() for future in waiting]
    order = [event[0] for event in backend.events[mark:] if event[0] in ("batch", "optimise")]
    assert order == ["optimise", "batch", "optimise", "batch", "optimise", "optimise"]


def test_requests_that_keep_coming_do_not_starve_an_adaptation(engine, backend):
    """Each optimiser step asks for another batch, so that one always waits."""
    again = []

    def ask(progress: Progress) -> None:
        again.append(engine.submit(generation(progress.step)))

    engine.adapt(adaptation_run(backend, steps=3, on_progress=ask)).result()
    [future.result() for future in again]
    order = [event[0] for event in backend.events if event[0] in ("batch", "optimise")][1:]
    assert order == ["optimise", "batch"] * 3


def test_a_cancelled_adaptation_stops_between_steps(engine, backend):
    steps: list[int] = []

    def cancel_at_two(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 2:
            engine.cancel_adaptation(run)

    run = adaptation_run(backend, steps=1000, on_progress=cancel_at_two)
    assert isinstance(engine.adapt(run).exception(), Cancelled)
    assert steps == [1, 2]


def test_adaptations_run_one_after_another_and_a_failed_one_gives_way(engine, backend):
    first = engine.adapt(adaptation_run(backend, steps=3, fail_at=2))
    second = engine.adapt(adaptation_run(backend, steps=2))
    assert isinstance(first.exception(), GenerationFailed)
    assert second.result()[1] == {"steps": 2}
    assert [event for event in backend.events if event[0] == "optimise"] == [
        ("optimise", 1),
        ("optimise", 1),
        ("optimise", 2),
    ]


def test_images_are_the_backends_own(engine):
    images = engine.submit(generation(5)).result().images
    np.testing.assert_array_equal(images, np.full((1, 8, 8, 3), 5, dtype=np.uint8))
