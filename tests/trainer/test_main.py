"""The trainer's exit status tells its supervisor whether to start it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.supervisor import job_is_over
from protocol.errors import BrokerUnavailable, ConfigError, TrainingDiverged
from trainer import __main__ as program


@pytest.mark.parametrize(
    ("raised", "status", "over"),
    [
        (None, 0, True),
        (TrainingDiverged("the loss is NaN"), 1, True),
        (BrokerUnavailable("away"), 75, False),
        (ConfigError("wrong"), 2, True),
        (KeyboardInterrupt(), 130, True),
        (RuntimeError("nobody expected this"), 70, False),
    ],
    ids=repr,
)
def test_status(
    raised: BaseException | None, status: int, over: bool, monkeypatch: pytest.MonkeyPatch, caplog, capsys
) -> None:
    def start(*_: object, **__: object) -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr("trainer.start.start", start)
    monkeypatch.setattr("trainer.__main__.logs.setup", lambda *_, **__: None)  # the handler would outlive this test
    assert program.main(["--set", "trainer.dataset.root=/data"]) == status
    assert job_is_over(status) is over
    assert not isinstance(raised, RuntimeError) or "nobody expected this" in caplog.text


def test_a_run_is_set_aside_and_nothing_else_happens(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    settings = ["--set", "trainer.dataset.root=/data", "--set", f'trainer.runs_dir="{tmp_path}"']
    assert program.main([*settings, "--set-aside"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.1"]
    assert program.main([*settings, "--set-aside"]) == 0
