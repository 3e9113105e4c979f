"""Who may ask what: keys, administrators, other sites' pages, addresses."""

from __future__ import annotations

import re

import pytest

from generator_service import access
from generator_service.access import Access, AccessConfig
from generator_service.app import create_app
from generator_service.service import Service
from protocol.errors import ConfigError, Forbidden, Unauthorized

LOCAL = {"host": "127.0.0.1:8000"}
ADMIN_REQUESTS = [
    ("POST", "/v1/weights/base/activate"),
    ("POST", "/v1/dead-letters/1-1/retry"),
    ("DELETE", "/v1/dead-letters/1-1"),
    ("GET", "/v1/sources/beagle.jpg/image"),
]


def made(environment: dict[str, str] | None = None, **settings: object) -> Access:
    return Access(AccessConfig.model_validate(settings), environment or {})


def bearer(key: str) -> dict[str, str]:
    return LOCAL | {"authorization": f"Bearer {key}"}


def test_without_keys_everybody_on_this_machine_may_do_everything():
    for method, path in [("GET", "/v1/jobs"), *ADMIN_REQUESTS]:
        assert made().caller(method, path, LOCAL) == access.ANYONE
    assert made().caller("GET", "/v1/jobs", bearer("none")) == access.ANYONE  # OpenAI's client must send something


def test_one_key_is_good_for_everything():
    one = made(api_key="hush")
    for method, path in [("GET", "/v1/jobs"), *ADMIN_REQUESTS]:
        assert one.caller(method, path, bearer("hush")).name == "user"
        with pytest.raises(Unauthorized):
            one.caller(method, path, LOCAL)


@pytest.mark.parametrize(("method", "path"), ADMIN_REQUESTS)
def test_with_an_admin_key_the_others_are_users(method: str, path: str):
    both = made(api_key="hush", admin_key="boss", keys={"alice": "rabbit"})
    assert both.caller(method, path, bearer("boss")).name == "admin"
    for key in ("hush", "rabbit"):
        with pytest.raises(Forbidden, match="ONTHEFLY_ADMIN_KEY"):
            both.caller(method, path, bearer(key))
    assert [both.caller("GET", "/v1/jobs", bearer(key)).name for key in ("hush", "rabbit", "boss")] == [
        "user",
        "alice",
        "admin",
    ]


def test_an_admin_key_alone_leaves_the_rest_open():
    one = made(admin_key="boss")
    assert one.caller("GET", "/v1/jobs", LOCAL).name == "anyone"
    with pytest.raises(Forbidden):
        one.caller(*ADMIN_REQUESTS[0], LOCAL)


def test_named_users_are_never_administrators():
    with pytest.raises(Forbidden):
        made(keys={"alice": "rabbit"}).caller(*ADMIN_REQUESTS[0], bearer("rabbit"))


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer hus", "Bearer hushh", "Basic hush", "hush", "Bearer h\xfcsh"]
)
def test_what_is_not_the_key_is_unauthorized(header: str):
    with pytest.raises(Unauthorized) as refused:
        made(api_key="hush").caller("GET", "/v1/jobs", LOCAL | {"authorization": header})
    assert "hush" not in refused.value.message


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch):
    """How long it takes says nothing of which one matched."""
    compared: list[int] = []
    compare = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: (compared.append(len(a)), compare(a, b))[1])
    keys = made(keys={name: name * 3 for name in ("alice", "bob", "carol")})
    keys.caller("GET", "/v1/jobs", bearer("alicealicealice"))
    assert compared == [32, 32, 32]


def test_probes_and_the_page_are_open_and_metrics_when_it_is_said():
    for path in ("/livez", "/readyz", "/", "/page/page.js"):
        assert made(api_key="hush").caller("GET", path, {}) == access.ANYONE
    assert made(api_key="hush", open_metrics=True).caller("GET", "/metrics", {}) == access.ANYONE
    with pytest.raises(Unauthorized):
        made(api_key="hush").caller("GET", "/metrics", LOCAL)


# ---------------------------------------------------------------- where keys come from


def test_the_environment_fills_in_and_settings_go_first():
    environment = {access.API_KEY: "env", access.ADMIN_KEY: "boss"}
    assert made(environment).caller("GET", "/v1/jobs", bearer("env")).name == "user"
    both = made(environment, api_key="file")
    assert both.caller("GET", "/v1/jobs", bearer("file")).name == "user"
    with pytest.raises(Unauthorized):
        both.caller("GET", "/v1/jobs", bearer("env"))
    assert made({access.API_KEY: "", access.ADMIN_KEY: ""}).caller("GET", "/v1/jobs", LOCAL) == access.ANYONE


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({access.API_KEY: "s\u00e9same"}, {}),
        ({access.API_KEY: " sesame"}, {}),
        ({access.API_KEY: "same-key", access.ADMIN_KEY: "same-key"}, {}),
        ({access.API_KEY: "same-key"}, {"keys": {"alice": "same-key"}}),
        ({}, {"keys": {"admin": "same-key"}}),
    ],
)
def test_unusable_keys_are_refused_and_not_quoted(environment: dict[str, str], settings: dict):
    with pytest.raises(ConfigError) as refused:
        made(environment, **settings)
    assert "same-key" not in refused.value.message and "sesame" not in refused.value.message


# ---------------------------------------------------------------- addresses and websites


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str):
    made().check_address(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "generator", ""])
def test_other_machines_need_one(host: str):
    for settings in ({}, {"admin_key": "boss"}):
        with pytest.raises(ConfigError, match=r"ONTHEFLY_API_KEY.*generator\.insecure"):
            made(**settings).check_address(host)
    for settings in ({"api_key": "hush"}, {"keys": {"alice": "rabbit"}}, {"insecure": True}):
        made(**settings).check_address(host)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_website_may_not_act_for_its_reader(site: str):
    headers = LOCAL | {"sec-fetch-site": site}
    with pytest.raises(Forbidden, match="another website"):
        made().caller("POST", "/v1/weights/base/activate", headers)
    made().caller("POST", "/v1/weights/base/activate", LOCAL | {"sec-fetch-site": "same-origin"})
    made(api_key="hush").caller("POST", "/v1/jobs", headers | bearer("hush"))  # it knows the key


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[", "127.0.0.1.evil"])
def test_a_name_that_was_bent_to_this_machine_is_refused(host: str):
    with pytest.raises(Forbidden, match="localhost"):
        made().caller("GET", "/v1/jobs", {"host": host})
    made(api_key="hush").caller("GET", "/v1/jobs", bearer("hush") | {"host": host})


def test_the_public_name_is_known():
    made(public_url="https://images.example").caller("GET", "/v1/jobs", {"host": "images.example"})


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "[::1]:8000", "10.0.0.3:80", ""])
def test_addresses_and_localhost_are_known(host: str):
    assert made().caller("GET", "/v1/jobs", {"host": host}) == access.ANYONE


# ---------------------------------------------------------------- all routes

USERS = [
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/jobs"),
    ("DELETE", "/v1/jobs/{}"),
    ("POST", "/v1/feedback"),
    ("POST", "/v1/published-models/{}"),
]


def test_every_route_that_changes_something_is_for_users_or_for_administrators(scripted_service: Service):
    """A new one has to be put on one of the two lists."""
    paths = create_app(scripted_service).openapi()["paths"]
    changing = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, operations in paths.items()
        for method in operations
        if method != "get"
    }
    administrators = {(verb, re.sub("base|1-1", "{}", path)) for verb, path in ADMIN_REQUESTS if verb != "GET"}
    assert changing == administrators | set(USERS)
    for method, path in USERS:
        assert made(api_key="hush", admin_key="boss").caller(method, path, bearer("hush")).name == "user"
