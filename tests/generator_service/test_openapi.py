"""The HTTP contract, frozen: a change of it shows here, line by line.

python -m tests.generator_service.test_openapi      # accept it
"""

from __future__ import annotations

import difflib
import json
import tempfile
from pathlib import Path

from generator_service.app import create_app
from tests.generator_service.tiny_service import make_service

FROZEN = Path(__file__).with_name("openapi.json")


def document(folder: Path) -> str:
    """The OpenAPI document as it is now."""
    described = create_app(make_service(folder)).openapi()
    return json.dumps(described, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_contract_is_the_frozen_one(tmp_path: Path):
    before, now = FROZEN.read_text(), document(tmp_path)
    changes = difflib.unified_diff(before.splitlines(), now.splitlines(), "openapi.json", "now", lineterm="", n=6)
    advice = "the HTTP contract changed; if that is meant: python -m tests.generator_service.test_openapi"
    assert before == now, "\n".join([advice, *changes])


def test_every_operation_says_what_may_go_wrong(tmp_path: Path):
    for path, operations in json.loads(document(tmp_path))["paths"].items():
        for method, operation in operations.items():
            assert {"401", "429", "500", "503"} <= operation["responses"].keys(), (method, path)
            open_to_all = path in ("/livez", "/readyz", "/metrics")
            assert ("security" in operation) != open_to_all, (method, path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        FROZEN.write_text(document(Path(temporary)))
