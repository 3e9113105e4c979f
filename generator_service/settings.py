"""The table [generator] of a run's settings. No torch here: settings are parsed before it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from generator_service.access import AccessConfig
from generator_service.faces.interface import FacesConfig
from generator_service.image_request import ImageDefaults
from generator_service.limits import LimitsConfig
from generator_service.registry import BACKENDS
from generator_service.video_request import VideoDefaults
from protocol.dataset import DatasetConfig

Plugin = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")]


class GeneratorConfig(AccessConfig):
    """One replica of the generator service. Its keys are settings of `access.AccessConfig`."""

    model_config = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"  # address to listen on; one that other machines reach wants a key
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free port, told in the log
    limits: LimitsConfig = LimitsConfig()  # of each caller, and of all together
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)  # of a request; larger ones are refused
    max_feedback_bytes: int = Field(default=64 * 2**20, ge=1024)  # of a feedback, which may bring many images
    max_model_bytes: int = Field(default=2 * 2**30, ge=1024)  # of a model that a trainer publishes

    backend: str = "dit"  # registry name
    backends: dict[str, dict[str, Any]] = {}  # [generator.dit] and the like; checked by the backend's Config at loading
    threads: int | None = Field(default=None, ge=1)  # CPU threads of torch; None: torch's choice
    weights_dir: Path = Path("runs/generator/weights")  # named weight sets; replicas share it
    samples_dir: Path = Path("runs/generator/samples")  # provenance and REST images; each replica has its own
    dataset: DatasetConfig | None = None  # the real data: init images, adaptation, near-copies; None: not mounted
    roots: list[Path] = []  # folders that all of these, links resolved, must be in; []: any

    rewards: dict[str, Plugin] = {}  # that a generator can be tuned by beside ours: name = "module:function"
    clip_rewards: dict[str, Plugin] = {}  # that a sampling policy can be learnt by beside ours, likewise

    images: ImageDefaults = ImageDefaults()  # what image requests get that leave a field out
    videos: VideoDefaults = VideoDefaults()  # the same of requests for clips
    faces: FacesConfig | None = None  # how the faces of a dataset of clips are read; None: they are not

    max_batch: int = Field(default=32, ge=1, le=4096)  # rows of a merged batch; work units have the agent's unit_size
    batch_window_ms: float = Field(default=10.0, ge=0.0, le=10_000.0)  # a batch that is not full waits so long for more
    deterministic: bool = True  # never merge a work unit with others: its pixels are reproducible to the bit
    queue_threads: int = Field(default=3, ge=1, le=64)  # work units in hand: one denoised, others on their way
    max_waiting_rows: int = Field(default=256, ge=64)  # images of requests that may wait, of clips frames
    max_jobs: int = Field(default=1000, ge=1)  # jobs remembered
    max_unfinished_jobs: int = Field(default=64, ge=1, le=1000)  # jobs waiting or running; then "queue full"
    max_samples: int = Field(default=1_000_000, ge=2)  # samples whose provenance is kept
    max_image_bytes: int = Field(default=2**30, ge=2**20)  # of REST images and clips that are kept
    near_copy_distance: float = Field(default=0.02, ge=0.0, le=1.0)  # RMS pixel distance to a real one; 1 flags all.
    # Of clips over four frames: a copy is within 0.01, another person's clip 0.05 or more away, and a clip that hardly
    # moves from a real one's first frame about 0.02, so that it may be flagged
    keep_alive_s: float = Field(default=15.0, gt=0.0)  # between comments on a silent event stream

    @model_validator(mode="after")
    def _within_roots(self) -> GeneratorConfig:
        roots = [root.resolve() for root in self.roots]
        named = (self.weights_dir, self.samples_dir, *(self.dataset.places() if self.dataset else ()))
        named += (self.faces.folder,) if self.faces else ()
        for path in named if roots else ():
            if not any(path.resolve().is_relative_to(root) for root in roots):
                raise ValueError(f"{path} is in none of the folders that generator.roots allows")
        return self

    @model_validator(mode="before")
    @classmethod
    def _gather_backend_tables(cls, table: dict[str, Any]) -> dict[str, Any]:
        """[generator.dit] is the table of backend "dit", for every name in the registry."""
        own = {name: value for name, value in table.items() if name in BACKENDS}
        rest = {name: value for name, value in table.items() if name not in BACKENDS}
        return rest | {"backends": rest.get("backends", {}) | own} if own else rest
