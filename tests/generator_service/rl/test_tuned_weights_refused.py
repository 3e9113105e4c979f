"""Tuned weight sets whose files are damaged, or belong to something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from generator_service.backends import dit_lora, lora_sets
from generator_service.backends.interface import WeightSet
from protocol.errors import WeightsCorrupt
from tests.generator_service import tiny_dit, tiny_sd
from tests.generator_service.rl.tuned_place import MODEL, Place

LORA = {"dit": dit_lora.LORA_FILE, "sd": lora_sets.LORA_FILE}


def edited(path: Path, change) -> None:
    """Change the tensors of a file, and leave its metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def poisoned(tensors):
    name = sorted(tensors)[0]
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def widened(tensors):
    name = sorted(tensors)[0]
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=-1)


DAMAGE = {
    "missing": lambda tensors: tensors.pop(sorted(tensors)[0]),
    "surplus": lambda tensors: tensors.update({"strange.weight": torch.zeros(1)}),
    "not finite": poisoned,
    "shape": widened,
    "empty": lambda tensors: tensors.clear(),
}


class TestWhatDoesNotFit:
    def unpublished(self, weights: WeightSet, folder: Path) -> WeightSet:
        """A copy of a set that can be damaged, under a name of its own."""
        for path in weights.folder.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                copy = folder / path.relative_to(weights.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        return replace(weights, ref=weights.ref.model_copy(update={"name": "damaged"}), folder=folder)

    @pytest.mark.parametrize("damage", [*DAMAGE, "bytes", "file"])
    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_damaged_files(self, place, tmp_path, parameters, damage):
        base = place.start()
        weights, _ = place.tuned(base, parameters)
        broken = self.unpublished(weights, tmp_path / "broken")
        file = LORA[place.kind] if parameters == "lora" else f"{MODEL[place.kind]}/diffusion_pytorch_model.safetensors"
        path = broken.folder / file
        if damage == "bytes":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "file":
            path.unlink()
        else:
            edited(path, DAMAGE[damage])
        before = place.image(base)
        with pytest.raises(WeightsCorrupt):
            place.backend.load(broken)
        assert torch.equal(place.image(base), before)
        place.backend.load(self.unpublished(weights, tmp_path / "whole"))

    def test_a_configuration_that_is_another_models(self, place, tmp_path):
        weights, _ = place.tuned(place.start(), "full")
        for name, change in (("away", None), ("wrong", {"norm_num_groups": 3})):
            broken = self.unpublished(weights, tmp_path / name)
            path = broken.folder / MODEL[place.kind] / "config.json"
            if change is None:
                path.unlink()
            else:
                path.write_text(json.dumps(json.loads(path.read_text()) | change))
            with pytest.raises(WeightsCorrupt, match=r"config\.json"):
                place.backend.load(broken)

    def test_other_classes_than_its_tables_have(self, dit, tmp_path):
        for parameters in ("lora", "full"):
            weights, _ = dit.tuned(dit.start(), parameters, name=parameters)
            renamed = replace(self.unpublished(weights, tmp_path / parameters), classes=("a", "b", "c"))
            with pytest.raises(WeightsCorrupt, match=r"other classes|num_embeds_ada_norm"):
                dit.backend.load(renamed)

    @pytest.mark.parametrize("parameters", ["lora", "full"])
    def test_another_base(self, place, checkpoints, tmp_path, parameters):
        """Of the same shapes: only the digest tells."""
        weights, _ = place.tuned(place.start(), parameters)
        base = place.store.base
        elsewhere = replace(base, ref=base.ref.model_copy(update={"digest": "f" * 64}))
        middle = replace(weights.base, base=elsewhere) if weights.base.base else elsewhere
        moved = replace(self.unpublished(weights, tmp_path / "moved"), base=middle)
        words = "another (base|checkpoint)"
        if place.kind == "dit" and parameters == "lora":  # its tables are what is told apart
            other = middle.ref.model_copy(update={"digest": "e" * 64})
            moved = replace(moved, base=replace(weights.base, ref=other))
        with pytest.raises(WeightsCorrupt, match=words):
            place.backend.load(moved)

    def test_the_store_refuses_it_too(self, place, checkpoints, tmp_path):
        place.tuned(place.start())
        tiny = tiny_dit if place.kind == "dit" else tiny_sd
        other = tiny.save_checkpoint(tmp_path / "other")
        index = json.loads((other / "model_index.json").read_text())
        (other / "model_index.json").write_text(json.dumps(index | {"_name": "another"}))
        with pytest.raises(WeightsCorrupt, match="another checkpoint"):
            Place(place.kind, tmp_path, other).store.resolve("tuned")
