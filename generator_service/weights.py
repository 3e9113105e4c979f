"""Named weight sets on disk, with versions and digests.

    {root}/{name}/{version}/manifest.json   what it is, and the sha256 of each other file in the folder
    {root}/.active.json                     the set chosen for requests naming none; survives restarts

Folders appear by one rename, so that a reader on a shared volume never sees half a set. The base checkpoint is `base@1`
and stays where it is. Does not know what the tensors mean, nor which of them are resident on a device.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from generator_service.backends.interface import WeightSet
from generator_service.manifest import MANIFEST, Manifest, digest, hash_files, read_manifest, write_json
from protocol.errors import InvalidRequest, UnknownWeights, WeightsCorrupt
from protocol.messages import WeightsInfo, WeightsRef

BASE = "base"
ACTIVE = ".active.json"  # no name of a set begins with a dot
SPEC = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?:@(?P<version>[1-9][0-9]{0,8}))?")


class WeightStore:
    """The weight sets of one folder, and which of them is active. Thread-safe; replicas may share the folder."""

    def __init__(self, root: Path, base_folder: Path, backend: str, base_classes: Sequence[str]):
        """
        Args:
            root: created when missing.
            base_folder: the base checkpoint, listed as `base@1`; hashed once, here.
            base_classes: label index -> class name; empty when the checkpoint is text-conditioned.
        """
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self._lock = threading.Lock()
        ref = WeightsRef(name=BASE, version=1, digest=digest(hash_files(base_folder)))
        self.base = WeightSet(
            ref=ref,
            backend=backend,
            kind="full",
            base=None,
            classes=tuple(base_classes),
            folder=base_folder,
            created=base_folder.stat().st_mtime,
        )
        self._cache: dict[tuple[str, int], WeightSet] = {(BASE, 1): self.base}
        self._serving: WeightSet | None = None  # None: nothing was read or served yet

    # ------------------------------------------------------------ reading

    def resolve(self, spec: str | None) -> WeightSet:
        """The set that "name" (its newest version), "name@3" or None (the active one) stands for.

        Raises UnknownWeights, listing what there is; WeightsCorrupt when its manifest cannot be read.
        """
        if spec is None:
            return self.active()
        parts = SPEC.fullmatch(spec)
        versions = self._versions(parts["name"]) if parts else []
        wanted = int(parts["version"]) if parts and parts["version"] else max(versions, default=0)
        if parts is None or wanted not in versions:
            known = ", ".join(f"{name}@{version}" for name, version in self._all())
            raise UnknownWeights(f"no weights {spec[:100]!r} here: use one of {known}", param="model")
        return self._read(parts["name"], wanted)

    def pinned(self, ref: WeightsRef) -> WeightSet:
        """The set a work unit was planned for. Raises UnknownWeights, or WeightsCorrupt when its digest differs."""
        found = self.resolve(f"{ref.name}@{ref.version}")
        if found.ref.digest != ref.digest:
            raise WeightsCorrupt(
                f"weights {ref} have digest {found.ref.digest[:12]} here but {ref.digest[:12]} where the work was "
                "planned: give all replicas the same weights folder and base checkpoint"
            )
        return found

    def verify(self, weights: WeightSet) -> None:
        """Check every file of the set and of its bases against the manifest. Raises WeightsCorrupt naming the file."""
        if weights.base is not None:
            self.verify(weights.base)
        found = hash_files(weights.folder)
        if weights.ref.name == BASE:
            if digest(found) != weights.ref.digest:
                raise WeightsCorrupt(f"the base checkpoint in {weights.folder} changed: restart the service")
            return
        expected = read_manifest(weights.folder).files
        wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        if wrong or digest(expected) != weights.ref.digest:
            raise WeightsCorrupt(
                f"weights {weights.ref}: {weights.folder / (wrong[0] if wrong else MANIFEST)} is missing or does not "
                "match its sha256; restore it or adapt again"
            )

    def list(self) -> list[WeightsInfo]:
        """Every set, oldest version first within a name; one that cannot be read has its `problem`."""
        active = self.active().ref
        return [self._info(name, version, active) for name, version in self._all()]

    def _info(self, name: str, version: int, active: WeightsRef) -> WeightsInfo:
        try:
            return info(self._read(name, version), active)
        except (WeightsCorrupt, UnknownWeights) as error:
            nothing = {"digest": "", "backend": "", "kind": "unreadable", "base": None, "classes": [], "created": 0.0}
            return WeightsInfo(name=name, version=version, active=False, problem=error.message, **nothing)

    # ------------------------------------------------------------ active set

    def active(self) -> WeightSet:
        """The set that serves requests naming none in this process; at first the chosen one."""
        if self._serving is None:
            self._serving = self.chosen()
        return self._serving

    def serve(self, weights: WeightSet) -> None:
        """Make this the active set of this process; it should be resident."""
        self._serving = weights

    def chosen(self) -> WeightSet:
        """What the folder says shall serve. Raises WeightsCorrupt."""
        path = self.root / ACTIVE
        if not path.exists():
            return self.base
        try:
            choice = json.loads(path.read_text())
            return self.resolve(f"{choice['name']}@{choice['version']}")
        except (OSError, ValueError, KeyError, TypeError, UnknownWeights) as error:
            raise WeightsCorrupt(
                f"{path} does not name weights that are here ({error}): activate others, or remove it to serve {BASE}@1"
            ) from error

    def choose(self, weights: WeightSet) -> None:
        """Make this the set for requests that name none: after a restart, and in replicas that look."""
        choice = {"name": weights.ref.name, "version": weights.ref.version}
        with self._lock:
            write_json(self.root / ACTIVE, choice)

    # ------------------------------------------------------------ publishing

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest for a name that no new set may have."""
        if name == BASE:
            raise InvalidRequest(f"{BASE!r} is the checkpoint itself: choose another name", param="name")

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder beside the sets, for `publish`; removed at the end if it was not published. Who may read it
        is what the process's umask says, for it keeps its mode."""
        folder = self.root / f".staging-{secrets.token_hex(8)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, folder: Path, name: str, base: WeightSet, kind: str, classes: Sequence[str], metadata: Mapping[str, Any]
    ) -> WeightSet:
        """Turn a staging folder into the next version of `name`, in one rename."""
        self.check_name(name)
        files = hash_files(folder)
        manifest = Manifest(
            backend=base.backend,
            kind=kind,
            base=str(base.ref),
            base_digest=base.ref.digest,
            classes=list(classes),
            created=time.time(),
            digest=digest(files),
            files=files,
            metadata=dict(metadata),
        )
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
        parent = self.root / name
        parent.mkdir(exist_ok=True)
        with self._lock:
            version = (self._versions(name) or [0])[-1] + 1
            while True:
                try:
                    os.rename(folder, parent / str(version))
                    return self._read(name, version)
                except OSError:  # another replica took this version between the listing and the rename
                    if not (parent / str(version)).exists():
                        raise
                    version += 1

    def find(self, name: str, told: Mapping[str, Any]) -> WeightSet | None:
        """The newest version of `name` whose metadata tell this; None when there is none that can be read."""
        for version in reversed(self._versions(name)):
            with suppress(WeightsCorrupt, UnknownWeights):
                weights = self._read(name, version)
                if told.items() <= weights.metadata.items():
                    return weights
        return None

    # ------------------------------------------------------------ folders

    def _versions(self, name: str) -> list[int]:
        if name == BASE:
            return [1]
        parent = self.root / name
        if not parent.is_dir():
            return []
        return sorted(int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal())

    def _all(self) -> list[tuple[str, int]]:
        names = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and SPEC.fullmatch(entry.name))
        return [(name, version) for name in [BASE, *names] for version in self._versions(name)]

    def _read(self, name: str, version: int) -> WeightSet:
        if (name, version) not in self._cache:
            folder = self.root / name / str(version)
            stored = read_manifest(folder)
            base = self.resolve(stored.base)
            if stored.base_digest not in (None, base.ref.digest):
                raise WeightsCorrupt(
                    f"weights {name}@{version} were made on a {stored.base} of digest {stored.base_digest[:12]}, and "
                    f"the one here is another checkpoint ({base.ref.digest[:12]}): serve the one they were made on, or "
                    "adapt again"
                )
            self._cache[name, version] = WeightSet(
                ref=WeightsRef(name=name, version=version, digest=stored.digest),
                backend=stored.backend,
                kind=stored.kind,
                base=base,
                classes=tuple(stored.classes),
                folder=folder,
                created=stored.created,
                metadata=stored.metadata,
            )
        return self._cache[name, version]


def info(weights: WeightSet, active: WeightsRef) -> WeightsInfo:
    """A set as `GET /v1/weights` lists it."""
    return WeightsInfo(
        **weights.ref.model_dump(),
        backend=weights.backend,
        kind=weights.kind,
        base=str(weights.base.ref) if weights.base else None,
        classes=list(weights.classes),
        created=weights.created,
        active=weights.ref == active,
        metadata=weights.metadata,
    )
