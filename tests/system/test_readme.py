"""What the README shows is run: settings, commands and programs, in its order, on a few pictures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agent import cli
from protocol.client import GeneratorClient
from protocol.entries import SampleBatch
from tests.generator_service.language.tiny_language import save_blip2
from tests.generator_service.tiny_sd import save_checkpoint
from tests.system.people import write_market
from tests.system.readme import BLOCKS, PORT, README, ROOT, SHORT, blocks, one, overrides, shell
from trainer import books


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's settings and a few pictures of pets."""
    settings = one("toml", "# pets.toml")
    (tmp_path / "pets.toml").write_text(settings)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("beagle", "bombay"):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for number in range(5):
                picture = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(picture).save(place / f"{number:04d}.jpg")
    return tmp_path


def shortened(script: str) -> str:
    """The README's commands with a small run's settings, and a small model; its address and environment become this
    test's."""
    added = overrides([*SHORT, "trainer.model.model=timm:test_resnet"])
    script = re.sub(r"(onthefly (?:up|serve|train) --config \S+)", rf"\1 {added}", script)
    script = re.sub(r"(onthefly (?:adapt|generate) )", rf"\1--url http://127.0.0.1:{PORT} ", script)
    return script.replace("8000", str(PORT))


def test_every_block_is_run_here():
    """A block of a new kind, or one more, wants a test of its own."""
    kinds = [kind for kind, _ in BLOCKS if kind != "text"]
    assert kinds == [*["sh"] * 2, *["toml", "sh"] * 4, "python", "sh", *["python"] * 2, "sh"]


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"\b(RESULTS|TODO|TBD|XXX)\b", README)


def test_the_two_commands_exist():
    for line in blocks("sh")[0].splitlines():
        command = line.split("#")[0].split()
        result = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_the_ablations_are_ones_that_the_cli_takes(capsys: pytest.CaptureFixture[str]):
    for line in one("sh", "onthefly ablate").splitlines():
        command = line.split("#")[0].split()[1:]
        assert cli.main([*command, "--list"]) == 0
    assert "gendataagent" in capsys.readouterr().out
    for recipe in re.findall(r"`onthefly up (--recipe \w+) --set", README):
        assert cli._parser().parse_args(["up", *recipe.split()]).config.is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_your_own_images(folder: Path, environment: dict[str, str]):
    script = one("sh", "onthefly up --config pets.toml").replace("source .venv/bin/activate\n", "")
    environment.pop("ONTHEFLY_BROKER_URL")  # `up` brings its own
    shell(shortened(script), folder, environment)
    report = (folder / "report.html").read_text()
    assert "baseline" in report
    assert (folder / "runs" / "pets" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_stable_diffusion(folder: Path, environment: dict[str, str]):
    """With tiny checkpoints of the same classes; from captions to a run whose samples say where they are from."""
    (folder / "photos.toml").write_text(one("toml", "# photos.toml"))
    checkpoint, captioner = save_checkpoint(folder / "sd"), save_blip2(folder / "captioner")
    small = [
        *SHORT,
        f"generator.stable_diffusion.checkpoint={checkpoint}",
        f"generator.stable_diffusion.image_encoder={checkpoint / 'image_encoder'}",
        "generator.stable_diffusion.dtype=float32",
        "generator.stable_diffusion.device=cpu",
        f"agent.captioner.model={captioner}",
        "agent.adapt.lora.validate_every=5",
        "agent.images_per_sample=2",
        "trainer.model={model = 'small_cnn', image_size = 16}",
    ]
    environment.pop("ONTHEFLY_BROKER_URL")
    added = overrides(setting for setting in small if not setting.startswith("generator.dit"))
    script = one("sh", "onthefly caption").replace("photos.toml", f"photos.toml {added}")
    shell(script, folder, environment)
    listed = [json.loads(line) for line in (folder / "pets/train/metadata.jsonl").read_text().splitlines()]
    assert len(listed) == 10 and all(row["caption"] for row in listed)
    account = books.open_books(folder / "runs" / "photos", None)
    assert account.balanced and account.fates["trained"] > 0
    batches = [SampleBatch.model_validate_json(path.read_bytes()) for path in folder.glob("runs/photos/batches/*.json")]
    samples = [sample for batch in batches for sample in batch.samples]
    assert {(sample.weights.name, sample.prompt_by) for sample in samples} == {("pets", "template")}
    assert all(sample.prompt.startswith(f"a photo of {sample.class_name}") for sample in samples)
    assert len({sample.prompt for sample in samples}) > len(samples) / 4


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_identities(tmp_path: Path, environment: dict[str, str]):
    """With the embedded generator and small models: adapted, tuned, trained with and looked into for privacy."""
    (tmp_path / "people.toml").write_text(one("toml", "# people.toml"))
    write_market(tmp_path / "people", learnt=4, searched=3)
    small = [
        *SHORT,
        "generator.dit.checkpoint=embedded",
        "generator.dit.dtype=float32",
        "agent.images_per_sample=2",
        "agent.tune.steps=4",
        "agent.tune.publish_every=2",
        "agent.tune.rollout={identities = 2, samples = 2, denoising_steps = 3}",
        "agent.tune.features=timm:test_resnet",
        "agent.tune.pretrained=false",
        "trainer.model.model=timm:test_resnet",
        "trainer.model.pretrained=false",
        "trainer.model.image_size=[32, 16]",
    ]
    environment.pop("ONTHEFLY_BROKER_URL")
    script = one("sh", "trainer.privacy").replace("people.toml", f"people.toml {overrides(small)}")
    shell(script.replace("--held-out gallery", "--held-out gallery --features pixels"), tmp_path, environment)
    assert books.open_books(tmp_path / "runs" / "people", None).balanced
    paths = (tmp_path / "runs" / "people" / "batches").glob("*.json")
    batches = [SampleBatch.model_validate_json(path.read_bytes()) for path in paths]
    assert {batch.weights.name for batch in batches} == {"people-tuned"}
    assert json.loads((tmp_path / "runs" / "people" / "summary.json").read_text())["headline"] == "mAP"
    assert "<html" in (tmp_path / "privacy.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_of_their_own_and_your_own_loop(folder: Path, environment: dict[str, str]):
    script = one("sh", "onthefly serve").replace("redis://127.0.0.1:6379/0", environment["ONTHEFLY_BROKER_URL"])
    serve, _, rest = shortened(script).partition("&")
    assert "onthefly serve" in serve
    command = serve.strip().splitlines()[-1].split("#")[0]
    service = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment)
    try:
        with GeneratorClient(f"http://127.0.0.1:{PORT}") as client:
            client.wait_ready(timeout_s=90)
        rest = rest.partition("\n")[2]
        rest = rest.replace("--steps 400", "--steps 5 --batch-size 4")
        shell(rest, folder, environment)
        assert len(list((folder / "samples").glob("*.png"))) == 4

        loop = one("python", "OnTheFly").replace(
            'overrides=["trainer.run=mine"]', f"overrides={['trainer.run=mine', *SHORT]!r}"
        )
        shell(f"{sys.executable} - <<'END'\n{loop}END", folder, environment)
        assert (folder / "runs" / "mine" / "summary.json").exists()

        program = one("python", "GeneratorClient").replace("8000", str(PORT))
        assert shell(f"{sys.executable} - <<'END'\n{program}END", folder, environment).endswith("end 50\n")

        program = one("python", "OpenAI").replace("8000", str(PORT))
        assert "iVBOR" in shell(f"{sys.executable} - <<'END'\n{program}END", folder, environment)  # a PNG, in base64
    finally:
        service.terminate()
        service.wait()
