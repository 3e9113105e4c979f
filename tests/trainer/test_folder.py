from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from trainer.folder import check_made_for, held, set_aside

HOLD = """
import sys
from pathlib import Path
from trainer.folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_one_trainer_at_a_time_and_none_after_its_death(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another trainer"), held(tmp_path):
            pass
        with pytest.raises(ConfigError, match="another trainer"):
            set_aside(tmp_path)
        other.kill()
        other.wait()
        with held(tmp_path):
            pass


def test_a_folder_is_for_what_it_was_made_for(tmp_path: Path):
    check_made_for(tmp_path, {"seed": 0, "classes": ("a", "b")})
    check_made_for(tmp_path, {"seed": 0, "classes": ("a", "b")})
    with pytest.raises(ConfigError, match=r"another seed: 0, now 1.*--fresh"):
        check_made_for(tmp_path, {"seed": 1, "classes": ("a", "b")})


def test_set_aside_loses_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    set_aside(folder)
    for number in (1, 2):
        folder.mkdir()
        (folder / "x").write_text(str(number))
        set_aside(folder)
        assert (tmp_path / f"run.{number}" / "x").read_text() == str(number)
        assert not folder.exists()
