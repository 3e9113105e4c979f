"""Models that trainers published, on disk, with versions and digests.

    {root}/{name}/{version}/model.safetensors   see `protocol.published`
    {root}/{name}/{version}/manifest.json       its digest, and what its metadata say
    {root}/{name}/{version}/{holder}.pin        somebody still needs this version

Folders appear by one rename, so that replicas may share the root. Of a name the newest versions are kept, and those
that are pinned. Whether tensors fit a model is asked of `rl.backbone`; what the models are for is not known here.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from generator_service.manifest import MANIFEST, write_json
from protocol.disk import full_disk_told
from protocol.errors import InvalidRequest, UnknownWeights, WeightsCorrupt
from protocol.published import PublishedCard, PublishedModel

MODEL = "model.safetensors"
NAMES = 64  # more are refused: whoever may publish is not to fill the disk
KEEP = 4  # newest versions of a name; two at least, for one may be read while the next comes
PINNED_S = 30 * 86_400.0  # a pin that is not renewed ends
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
AGAIN = "let the trainer publish it again"


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    size_bytes: int
    created: float
    card: PublishedCard


class PublishedModels:
    """The published models of one folder, which is created by the first of them. Thread-safe; replicas may share it."""

    def __init__(self, root: Path, keep: int = KEEP):
        assert keep >= 2
        self.root, self._keep = root, keep
        self.uploads = root / ".uploads"  # where files lie before they are published; on the same file system

    # ------------------------------------------------------------ publishing

    def publish(self, name: str, file: Path) -> PublishedModel:
        """Make a file the next version of a name; a version with the same bytes stays as it is, and is the result.

        Args:
            file: on the root's file system; moved into the root.

        Raises:
            InvalidRequest: a bad name, one too many, no such file, or tensors that are not the timm model's it names.
            DiskFull.
        """
        if not NAME.fullmatch(name):
            raise InvalidRequest(f"{name[:100]!r} is no name: use letters, digits, '.', '_' and '-'", param="name")
        if name not in (names := self._names()) and len(names) >= NAMES:
            raise InvalidRequest(
                f"{NAMES} names of published models are taken, the last of them {names[-1]!r}: publish as one of them, "
                "or remove folders that nobody needs",
                param="name",
            )
        card = read_card(file)
        from generator_service.rl import backbone  # torch and timm, which the service loads after its settings

        backbone.check_file(file, card)
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        manifest = _Manifest(digest=digest, size_bytes=file.stat().st_size, created=time.time(), card=card)
        parent = self.root / name
        with full_disk_told(parent):
            parent.mkdir(parents=True, exist_ok=True)
            published = self._moved_in(parent, file, manifest)
        self._prune(name)
        return published

    def _moved_in(self, parent: Path, file: Path, manifest: _Manifest) -> PublishedModel:
        staging = self.root / f".staging-{secrets.token_hex(8)}"
        staging.mkdir()
        try:
            file.rename(staging / MODEL)
            write_json(staging / MANIFEST, manifest.model_dump(mode="json"))
            while True:
                versions = self._versions(parent.name)
                if found := self._same(parent.name, versions, manifest.digest):
                    return found
                version = max(versions, default=0) + 1
                try:
                    staging.rename(parent / str(version))
                    return _told(parent.name, version, manifest)
                except OSError:  # somebody took this version since the listing, perhaps with the same bytes
                    if not (parent / str(version)).exists():
                        raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _same(self, name: str, versions: Sequence[int], digest: str) -> PublishedModel | None:
        """That of these versions which has these bytes, if they are still whole."""
        for version in versions:
            with suppress(UnknownWeights, WeightsCorrupt):
                found = self.find(name, version)
                if found.digest == digest and self.content(found):
                    return found
        return None

    def _prune(self, name: str) -> None:
        for version in self._versions(name)[: -self._keep]:
            folder = self.root / name / str(version)
            pins = [path for path in folder.glob("*.pin") if _age_s(path) < PINNED_S]
            if not pins:
                trash = self.root / f".trash-{secrets.token_hex(8)}"
                with suppress(FileNotFoundError):  # another replica was faster
                    folder.rename(trash)
                shutil.rmtree(trash, ignore_errors=True)

    # ------------------------------------------------------------ reading

    def find(self, name: str, version: int | None = None) -> PublishedModel:
        """A version of a name; None: the newest.

        Raises:
            UnknownWeights: there is none; the message says what there is.
            WeightsCorrupt: its manifest cannot be read.
        """
        versions = self._versions(name)
        wanted = max(versions, default=0) if version is None else version
        if wanted not in versions:
            known = ", ".join(f"{known}@{version}" for known in self._names() for version in self._versions(known))
            asked = name[:100] if version is None else f"{name[:100]}@{version}"
            raise UnknownWeights(
                f"no model was published as {asked!r} here: use one of {known or '(there is none)'}, or let a trainer "
                "publish it (trainer.publish.name)",
                param="features",
            )
        path = self.root / name / str(wanted) / MANIFEST
        try:
            return _told(name, wanted, _Manifest.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise WeightsCorrupt(f"{path} cannot be read ({_line(error)}): remove its folder, or {AGAIN}") from error

    def content(self, model: PublishedModel) -> bytes:
        """The file of a version, checked against its digest.

        Raises:
            UnknownWeights: it is not kept any more.
            WeightsCorrupt: it was damaged.
        """
        path = self.root / model.name / str(model.version) / MODEL
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.find(model.name, model.version)
            raise WeightsCorrupt(f"{path} is missing: remove its folder, or {AGAIN}") from None
        if hashlib.sha256(data).hexdigest() != model.digest:
            raise WeightsCorrupt(f"{path} does not match its sha256: remove its folder, or {AGAIN}")
        return data

    def list(self) -> list[PublishedModel]:
        """Every version, the oldest first within a name; one that cannot be read has its `problem`."""
        return [
            found for name in self._names() for version in self._versions(name) for found in self._info(name, version)
        ]

    def _info(self, name: str, version: int) -> list[PublishedModel]:
        try:
            return [self.find(name, version)]
        except UnknownWeights:
            return []  # removed meanwhile
        except WeightsCorrupt as error:
            nothing = {"digest": "", "size_bytes": 0, "created": 0.0, "card": None}
            return [PublishedModel(name=name, version=version, problem=error.message, **nothing)]

    # ------------------------------------------------------------ pins

    def pin(self, model: PublishedModel, holder: str) -> None:
        """Keep a version until `unpin`, or for 30 days if it is not pinned again; across restarts and replicas.

        Args:
            holder: who needs it, as a name of the file system.

        Raises:
            UnknownWeights: it is not kept any more.
        """
        with suppress(FileNotFoundError):
            self._pin(model, holder).touch()
        self.find(model.name, model.version)

    def unpin(self, model: PublishedModel, holder: str) -> None:
        """Whether or not it was pinned."""
        self._pin(model, holder).unlink(missing_ok=True)

    def _pin(self, model: PublishedModel, holder: str) -> Path:
        assert NAME.fullmatch(holder), holder
        return self.root / model.name / str(model.version) / f"{holder}.pin"

    # ------------------------------------------------------------ folders

    def _names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and NAME.fullmatch(entry.name))

    def _versions(self, name: str) -> list[int]:
        parent = self.root / name
        if not NAME.fullmatch(name) or not parent.is_dir():
            return []
        return sorted(int(entry.name) for entry in parent.iterdir() if entry.name.isdecimal())


def read_card(file: Path) -> PublishedCard:
    """What a file says of itself. Raises InvalidRequest: it is damaged, or no published model."""
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
    except SafetensorError as error:
        raise InvalidRequest(
            f"the file is not safetensors, or it is damaged ({_line(error)}): send it again, as the trainer writes it",
            param="body",
        ) from error
    return PublishedCard.of(metadata or {})


def _told(name: str, version: int, manifest: _Manifest) -> PublishedModel:
    return PublishedModel(name=name, version=version, **dict(manifest))


def _age_s(path: Path) -> float:
    try:
        return time.time() - os.stat(path).st_mtime
    except FileNotFoundError:  # unpinned meanwhile
        return PINNED_S


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
