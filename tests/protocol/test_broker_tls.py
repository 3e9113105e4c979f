"""A broker over TLS with a user and a password, all of it said by the URL."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.broker import BrokerConfig, connect, open_broker
from protocol.bus import Bus, BusConfig
from protocol.errors import BrokerUnavailable, ConfigError
from tests.ports import free_port
from tests.protocol.messages_to_send import reply, unit

PASSWORD = "p%2Fss%3Aword"  # p/ss:word
SECRETS = ("p/ss:word", PASSWORD, "wr/ong", "wr%2Fong")


def certificate(folder: Path) -> Path:
    """A self-signed one for 127.0.0.1, which is its own authority; its key lies beside it."""
    path = folder / "broker.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", path, "-keyout", path.with_suffix(".key")], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Port and certificate of a server that speaks TLS only."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None or shutil.which("openssl") is None:
        pytest.skip("TLS is tested with redis-server (or valkey-server) and openssl on PATH")
    folder = tmp_path_factory.mktemp("tls")
    crt = certificate(folder)
    port = free_port()
    settings = f"""
        port 0
        tls-port {port}
        tls-cert-file {crt}
        tls-key-file {crt.with_suffix(".key")}
        tls-ca-cert-file {crt}
        tls-auth-clients no
        bind 127.0.0.1
        save ""
        dir {folder}
        user trainer on >p/ss:word ~* &* +@all
    """
    (folder / "broker.conf").write_text("\n".join(line.strip() for line in settings.splitlines()))
    command = [binary, folder / "broker.conf"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "Ready to accept connections" in line:
                break
        else:
            if "tls" in said.lower():
                pytest.skip(f"{binary} was built without TLS")
            raise AssertionError(said)
        try:
            yield port, crt
        finally:
            process.terminate()


def url(server: tuple[int, Path], password: str = PASSWORD, authority: Path | None = None) -> str:
    port, crt = server
    return f"rediss://trainer:{password}@127.0.0.1:{port}/0?ssl_ca_certs={authority or crt}"


def test_work_and_batches_travel_over_tls(server: tuple[int, Path]) -> None:
    with open_broker(BrokerConfig(url=url(server))) as address:
        bus = Bus(address, BusConfig())
        assert bus.publish_plan("r", 0, "print", [unit()], {}, reply()) == reply()
        assert bus.claim_work("worker").message == unit()
        bus.close()


def refused(address: str) -> Exception:
    """The error of opening a broker, which tells no secret, and neither do its causes."""
    with pytest.raises((BrokerUnavailable, ConfigError)) as caught, open_broker(BrokerConfig(url=address)):
        pass
    silent(caught.value)
    return caught.value


def silent(error: BaseException | None) -> None:
    said, cause = "", error
    while cause is not None:
        said, cause = f"{said}\n{cause}", cause.__cause__
    assert not any(secret in said for secret in SECRETS), said


def test_a_wrong_password_is_told_without_it(server: tuple[int, Path]) -> None:
    error = refused(url(server, "wr%2Fong"))
    assert "refuses the user or password" in str(error) and "wr/ong" not in str(error)


def test_a_certificate_of_a_stranger_is_refused(server: tuple[int, Path], tmp_path: Path) -> None:
    assert "certificate" in str(refused(url(server, authority=certificate(tmp_path))))


@pytest.mark.parametrize("query", ["ssl_ca_certs=/nowhere.crt", "ssl_ca_cert=/misspelt.crt", "ssl_cert_reqs=never"])
def test_a_wrong_option_of_the_url_is_told(server: tuple[int, Path], query: str) -> None:
    assert "broker" in str(refused(f"{url(server).partition('?')[0]}?{query}"))


def test_a_plain_connection_is_refused(server: tuple[int, Path]) -> None:
    refused(url(server).replace("rediss://", "redis://").partition("?")[0])


def test_clients_do_not_show_the_password(server: tuple[int, Path]) -> None:
    with connect(url(server)) as client:
        assert not any(secret in repr(client) for secret in SECRETS)
