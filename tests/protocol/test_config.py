"""Settings: read, overridden, checked, and written without secrets."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from protocol.broker import BrokerConfig
from protocol.config import check_tables, load, section, write_resolved
from protocol.errors import ConfigError


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    strength: float = Field(default=0.5, ge=0, le=1)


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=32, ge=1)
    mode: Literal["sync", "async"] = "sync"
    inner: Inner | None = None
    many: list[Inner] = []
    api_key: str | None = None


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_overrides_lie_over_the_file_and_are_read_as_toml(tmp_path: Path) -> None:
    path = written(tmp_path, "[trainer]\nbatch_size = 8\nmode = 'async'\n[trainer.inner]\nstrength = 0.1\n")
    overrides = ["trainer.batch_size=16", "trainer.inner.strength = 0.25", "agent.name=plain words", "a.b=[1, 2]"]
    settings = load(path, [*overrides, "a.c='x=y'", "a.d=true", "a.e=1\nf=2", "a.g="])
    assert settings == {
        "trainer": {"batch_size": 16, "mode": "async", "inner": {"strength": 0.25}},
        "agent": {"name": "plain words"},
        "a": {"b": [1, 2], "c": "x=y", "d": True, "e": "1\nf=2", "g": ""},
    }
    assert section(settings, "trainer", Outer) == Outer(batch_size=16, mode="async", inner=Inner(strength=0.25))
    assert section(load(None), "trainer", Outer) == Outer()


def test_a_file_is_laid_over_the_one_that_it_includes(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "common.toml").write_text(
        "[trainer]\nbatch_size = 8\ninner = {strength = 0.1}\nmany = [1, 2]\n"
    )
    path = written(tmp_path, 'include = "base/common.toml"\n[trainer]\nmany = [3]\n[trainer.inner]\nweight = 2\n[a]\n')
    inner = {"strength": 0.1, "weight": 2}
    assert load(path) == {"trainer": {"batch_size": 8, "inner": inner, "many": [3]}, "a": {}}


@pytest.mark.parametrize(
    ("include", "message"),
    [('"run.toml"', "does not include this one"), ("3", "must name one"), ('"gone.toml"', "gone.toml .No such file")],
)
def test_an_include_that_leads_nowhere_is_told(tmp_path: Path, include: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, f"include = {include}"))


@pytest.mark.parametrize("override", ["batch_size=3", "trainer.batch_size", "trainer.=3", ".x=3", "=3", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"table\.key=value"):
        load(None, [override])


def test_an_override_cannot_go_through_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'batch_size' is a value, not a table"):
        load(written(tmp_path, "[trainer]\nbatch_size = 8"), ["trainer.batch_size.x=1"])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml \(No such file"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"run\.toml is not valid TOML: .*line 2"):
        load(written(tmp_path, "[trainer]\nx = = 3"))
    (tmp_path / "latin.toml").write_bytes(b"x = '\xe9'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("text", "said", "param"),
    [
        ("batchsize = 3", r"trainer\.batchsize: unknown key; did you mean 'batch_size'\?", "trainer.batchsize"),
        ("zzz = 3", r"trainer\.zzz: unknown key; known: api_key, batch_size, inner, many, mode", "trainer.zzz"),
        ("batch_size = 0", r"trainer\.batch_size: .*greater than or equal to 1 \(it is 0\)", "trainer.batch_size"),
        ("mode = 'fast'", r"trainer\.mode: .*'sync' or 'async' \(it is 'fast'\)", "trainer.mode"),
        ("inner = {strenght = 1}", r"inner\.strenght: unknown key; did you mean 'strength'", "trainer.inner.strenght"),
        ("many = [{strength = 2.0}]", r"trainer\.many\.0\.strength: .*less than or equal", "trainer.many.0.strength"),
        (
            "many = [{strenth = 2.0}]",
            r"many\.0\.strenth: unknown key; did you mean 'strength'",
            "trainer.many.0.strenth",
        ),
        ("api_key = 3", r"trainer\.api_key: Input should be a valid string$", "trainer.api_key"),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_neighbour(tmp_path: Path, text: str, said: str, param: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        section(load(written(tmp_path, f"[trainer]\n{text}")), "trainer", Outer)
    assert "run.toml" in refused.value.message
    assert refused.value.param == param


def test_all_wrong_keys_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        section(load(written(tmp_path, "[trainer]\nx = 1\nbatch_size = 0")), "trainer", Outer)
    assert "trainer.x" in refused.value.message and "trainer.batch_size" in refused.value.message


def test_unknown_tables_and_loose_keys_are_refused(tmp_path: Path) -> None:
    check_tables(load(written(tmp_path, "[trainer]\n[broker]\n")), {"trainer", "broker", "agent"})
    with pytest.raises(ConfigError, match=r"run\.toml: unknown table \[trainr\]; did you mean 'trainer'"):
        check_tables(load(written(tmp_path, "[trainr]")), {"trainer", "broker"})
    with pytest.raises(ConfigError, match=r"'trainer' must be a table"):
        check_tables(load(written(tmp_path, "trainer = 3")), {"trainer"})


def test_a_wrong_broker_url_is_not_shown_with_its_password() -> None:
    with pytest.raises(ConfigError) as refused:
        section(load(None, ["broker.url=http://user:sesame@host/"]), "broker", BrokerConfig)
    assert "sesame" not in refused.value.message and "broker.url" in refused.value.message


def test_resolved_settings_read_back_the_same_but_for_secrets(tmp_path: Path) -> None:
    settings = {
        "trainer": Outer(inner=Inner(strength=0.25), many=[Inner()], api_key="sesame"),
        "broker": {"url": "redis://:ses@me@host:6379/0", "other": "redis://host/0?password=sesame&db=1", "limit": None},
        "agent": {"identifier_token": "sks", "root": tmp_path, "llm_api_key": "sesame", "password": "sesame"},
    }
    write_resolved(settings, tmp_path / "resolved.toml")
    text = (tmp_path / "resolved.toml").read_text()
    assert "sesame" not in text and "ses@me" not in text
    back = tomllib.loads(text)
    assert section(back, "trainer", Outer) == Outer(inner=Inner(strength=0.25), many=[Inner()], api_key="***")
    assert back["broker"] == {"url": "redis://***@host:6379/0", "other": "redis://host/0?password=***&db=1"}
    assert back["agent"] == {"identifier_token": "sks", "root": str(tmp_path), "llm_api_key": "***", "password": "***"}
