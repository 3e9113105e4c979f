"""The table [trainer] of a run's settings. No torch here: settings are parsed before it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.dataset import SPLIT, DatasetConfig
from protocol.messages import Name

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Part = Annotated[float, Field(gt=0.0, le=1.0)]
Dropped = Annotated[float, Field(ge=0.0, lt=1.0)]


ADAM_TO_SGD = 100.0  # a plain SGD step that does about as much as one of Adam has so many times its learning rate


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OptimizerConfig(Table):
    """SGD (GenDataAgent Table 12) or Adam (RL-identity 5.1), with multistep decay."""

    kind: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 0.1  # Adam's is usually far lower, such as 3.5e-4
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9  # of sgd
    weight_decay: Annotated[float, Field(ge=0.0)] = 5e-4  # added to the gradient (L2), of adam too
    decay_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # factor at each decay epoch
    decay_epochs: list[int] = [50, 100, 150]  # counted over the whole run; [] keeps the rate constant


class ScarcityConfig(Table):
    """Which classes the generator is asked for as such, because they are scarce (ARGen 3): badly recognised and rare.

    How well a class is recognised is told by samples that are not trained on: those of `split`, or else those that
    thresholds.auto holds out. Where there are neither, rarity alone decides; so it does for the pool of mode offline,
    which is made before there is a model.
    """

    enabled: bool = False
    recall: Part = 0.5  # badly recognised is a class below this recall; 1: every class that is ever mistaken
    split: str | None = Field(default=None, pattern=SPLIT)  # of the dataset, that recall is measured on, such as "val";
    # "test": what is reported of it is then not of unseen samples any more. None: see above
    part: Part = 1 / 7  # and rare, one below this part of the real samples: an equal share of seven expressions; 1: all
    classes: list[str] | None = Field(default=None, min_length=1)  # these are scarce, whatever their recall and part;
    # None: by the rule
    clips: int | None = Field(default=None, ge=1, le=100_000)  # samples asked of each scarce class, in each iteration
    # of stage 2; None: `total` shared out
    total: int = Field(default=500, ge=1)  # samples of all scarce classes in the whole run: about the paper's 483

    @model_validator(mode="after")
    def _distinct(self) -> ScarcityConfig:
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names a class twice: name each once")
        return self


class FeedbackConfig(Table):
    """Which real samples are sent to the generator (GenDataAgent 2.2)."""

    enabled: bool = True  # false: no samples are asked for, only scarce classes (see scarcity)
    criterion: str = "marginal"  # registry kind "feedback": marginal, entropy, random, similarity
    fraction: Part = 0.2  # k as a part of the real set, rounded up: never less than one sample
    per_class: bool = False  # true: this part of each class; false: of the whole set, so that hard classes get more
    images_per_sample: int | None = Field(default=None, ge=1)  # m; None: the agent's. 1:r synthetic is fraction * m = r
    model: str | None = None  # weights to ask for, "name" or "name@version"; None: whichever are active
    send_pixels: bool = False  # true: images travel with the feedback, first frames of clips; false: both sides mount
    # the dataset
    scarcity: ScarcityConfig = ScarcityConfig()  # classes that are asked for beside the samples


class VogConfig(Table):
    """Variance-of-gradients filter (GenDataAgent 2.4). Its checkpoints are the ends of the warm-up iterations."""

    enabled: bool = True
    fraction: Dropped = 0.25  # dropped of each class: 0 none; 0.75 is the paper's best on Pets
    spread: Literal["std", "variance"] = "std"


class SimilarityConfig(Table):
    """Filter by similarity to the nearest real samples, in the place of VoG: the Internet Explorer arm (GenDataAgent
    3.1, Li et al. 2023a), together with feedback.criterion = "similarity"."""

    enabled: bool = False
    neighbours: int = Field(default=15, ge=1)  # of filter and criterion; all real samples where there are fewer
    fraction: Dropped = 0.25  # the least similar, dropped of each class: 0 none


class ThresholdsConfig(Table):
    """feedback.fraction and the filter's fraction, learnt during the run from the gain on held-out samples.

    The samples are held out from the model, not from the generator: one adapted to the whole training split knows them
    too, so that gains, and with them the parts that are learnt, are biased towards more synthetic data.
    """

    auto: bool = False
    held_out: Dropped = 0.1  # part of each class's real samples, rounded down, that is measured on and not trained on
    value: Literal["loss", "accuracy"] = "loss"  # gain: of -log(mean loss), which is relative; or of the accuracy
    asked: list[Part] = Field(default=[0.2, 0.25, 0.5], min_length=1)  # values of feedback.fraction to try
    dropped: list[Dropped] = Field(default=[0.0, 0.25, 0.5, 0.75], min_length=1)  # values of the filter's fraction
    exploration: Annotated[float, Field(ge=0.0)] = 0.05  # of UCB1, in units of the gain: 0 settles, large never does


class LookaheadConfig(Table):
    """Lookahead selection before each update (RL-identity 4.3)."""

    enabled: bool = True
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # part of each batch's synthetic rows that is trained on
    virtual_lr: Positive | None = None  # of the virtual plain-SGD step; None: the current learning rate of sgd, or 100
    # times that of adam, whose steps do not shrink with the gradient


class PrivacyConfig(Table):
    """Filter that drops synthetic samples too near to a real one of their class, before any other filter looks at them.

    Too near is what is no further away than few real samples of the class are from the nearest other one. A class of
    one real sample goes by all classes' together. `python -m trainer.privacy` tells whether it is needed.
    """

    filter: bool = False
    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05  # of the real samples' distances: the higher, the stricter
    distance: Literal["pixels", "features"] = "pixels"  # of what the model sees; features: of the model as it is now


class VideoMeasureConfig(Table):
    """Frechet distances and diversity of the synthetic clips that a run trained on (ARGen eqs. 27 to 33, Table 8), see
    `trainer.video_quality`."""

    features: str | None = None  # network that distances are taken in: "torchscript:FILE", as of I3D,
    # "torchvision:NAME", "torchvision:NAME:FILE" or "transformers:FOLDER_OR_ID"; None: no distances
    diversity: str | None = None  # image network: "timm:NAME", "torchvision:alexnet" or vgg16; None: no diversity
    diversity_weights: Path | None = None  # file of LPIPS with learnt weights of its channels; None: 1 each
    frames: int | None = Field(default=None, ge=1)  # of each clip, evenly spread; None: as the network wants, else 16
    size: int | None = Field(default=None, ge=1)  # pixels a side that clips are brought to; None: the network's own
    batch_size: int = Field(default=8, ge=1)  # clips in memory at a time
    pairs: int = Field(default=200, ge=1)  # of clips of a class, at most, that diversity compares

    @property
    def wanted(self) -> bool:
        return self.features is not None or self.diversity is not None


class MeasureConfig(Table):
    """What is measured at the end of a run beside its accuracy. Each can be switched off."""

    corruptions: list[Literal["gaussian_blur", "speckle_noise"]] = ["gaussian_blur", "speckle_noise"]  # of the test
    # split, which is evaluated once for each and each severity (GenDataAgent Table 13); [] off
    severities: list[Annotated[int, Field(ge=1, le=5)]] = Field(default=[1, 2, 3, 4, 5], min_length=1)  # of each; their
    # mean is reported, as Hendrycks & Dietterich do with all five
    corruption_scale: Literal["auto", "imagenet-c", "cifar-c"] = "auto"  # whose strengths, see `metrics.corruptions`;
    # auto: CIFAR-C's up to 64 pixels, ImageNet-C's from there on
    features_per_class: int = Field(default=20, ge=0)  # samples of each kind kept for Figure 3; 0 off
    features_classes: int = Field(default=50, ge=1)  # at most so many, spread evenly over the labels
    video: VideoMeasureConfig = VideoMeasureConfig()  # of clips only


class ServiceConfig(Table):
    """The generator service this trainer asks."""

    url: str | list[str] = "http://127.0.0.1:8000"  # of its replicas, if several: the next is asked when one is away
    api_key: str | None = None  # None: environment variable ONTHEFLY_API_KEY, if set
    timeout_s: Positive = 10.0  # of one HTTP request
    answer_timeout_s: Positive = 600.0  # how long an iteration waits for the answers it is due
    on_outage: Literal["continue", "wait"] = "continue"  # service or broker gone: train with what there is, or wait
    outage_grace_s: Positive = 5.0  # how long the service may be unreachable before that counts as an outage


class PublishConfig(Table):
    """Whether, and how often, the service gets the model, so that generators are rewarded by its features (RL-identity
    4.2): job `tune` with features = "published:NAME". Models of timm only."""

    name: Name | None = None  # NAME; None: never
    every: int = Field(default=1, ge=1)  # iterations between two versions
    timeout_s: Positive = 30.0  # that training may be held up by it


class TrainerConfig(Table):
    """One training run. Defaults are GenDataAgent's (Table 12, section 2)."""

    run: Name = "run"
    runs_dir: Path = Path("runs")  # the run's folder is runs_dir/run
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = "auto"  # "cpu", "cuda", "cuda:1"; auto: cuda when there is one; several processes: a GPU for each
    threads: int | None = Field(default=None, ge=1)  # torch CPU threads of each process; None: torch's own choice
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast

    dataset: DatasetConfig
    test_split: str = "test"  # split of the same dataset to evaluate on; "": nothing is held out. Of tasks
    # classification and video: tasks on identities name what they are measured on in [trainer.model]
    drop_near_copies: bool = False  # drop synthetic samples that the service flags as near copies of a real one
    workers: int = Field(default=0, ge=0)  # data loading processes; 0: in this process
    cache_gib: Annotated[float, Field(ge=0.0)] = 4.0  # decoded images kept in memory, of each set and in each process

    task: str = "classification"  # registry kind "task"
    model: dict[str, Any] = {}  # the task's own settings, see its Config

    mode: Literal["async", "sync", "offline", "synthetic", "real"] = "async"
    max_staleness: int = Field(default=1, ge=1)  # K of mode async: iterations a sample may be late; others have K = 0
    pool_match: Literal["marginal", "all"] = "marginal"  # mode offline: entries of marginal samples, or all (static)
    pool_from: Path | None = None  # modes offline, synthetic: folder of a run whose pool is used; None: a new pool
    iterations: int = Field(default=20, ge=1)
    warmup_iterations: int = Field(default=3, ge=0)  # real data only; one VoG checkpoint at the end of each
    epochs: int = Field(default=10, ge=1)  # of each iteration
    steps_per_iteration: int | None = Field(default=None, ge=1)  # fixes the updates instead of the epochs
    batch_size: int = Field(default=128, ge=1)  # of all processes together: the paper's 128 on each of 8 GPUs are 1024
    images_per_identity: int | None = Field(default=None, ge=2)  # K of batches of batch_size / K classes with K rows
    # each, as triplet losses want them; None: rows are shuffled, whatever their class
    gradient_rows: int = Field(default=64, ge=0)  # rows whose gradient norm is measured each iteration; 0: none
    checkpoint_every: int | None = Field(default=None, ge=1)  # updates between checkpoints; None: each iteration's end

    metrics_port: int = Field(default=0, ge=0, le=65535)  # of this trainer's page of Prometheus metrics; 0: none
    metrics_host: str = "127.0.0.1"  # address to serve that page on; nobody is asked for a key

    optimizer: OptimizerConfig = OptimizerConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    vog: VogConfig = VogConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    thresholds: ThresholdsConfig = ThresholdsConfig()
    lookahead: LookaheadConfig = LookaheadConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    measure: MeasureConfig = MeasureConfig()
    service: ServiceConfig = ServiceConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainerConfig:
        if self.mode != "real" and self.vog.enabled and self.warmup_iterations < 2:
            raise ValueError("vog needs two checkpoints at least: set warmup_iterations >= 2, or vog.enabled = false")
        if self.mode == "async" and self.max_staleness > self.warmup_iterations:
            raise ValueError("max_staleness must not exceed warmup_iterations: feedback would start before training")
        if self.vog.enabled and self.similarity.enabled:
            raise ValueError(
                "similarity takes the place of vog: set one of vog.enabled and similarity.enabled to false"
            )
        if self.mode == "synthetic" and self.warmup_iterations < 1:
            raise ValueError("mode synthetic trains on its pool alone at first: set warmup_iterations >= 1")
        if self.pool_from is not None and not self.has_pool:
            raise ValueError(f"mode {self.mode} has no pool: leave pool_from out, or set mode offline or synthetic")
        if self.images_per_identity is not None and self.batch_size % self.images_per_identity:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of images_per_identity = {self.images_per_identity}: "
                "set it to the identities of a batch times their images"
            )
        if self.images_per_identity == self.batch_size:
            raise ValueError(
                f"images_per_identity = {self.images_per_identity} leaves room for one identity in a batch, which "
                f"nothing could be told apart in: set batch_size to {2 * self.batch_size} at least"
            )
        if self.privacy.filter and self.mode == "synthetic":
            raise ValueError(
                "mode synthetic trains on no real samples, to which others could be near: set privacy.filter = false"
            )
        asks = self.feedback.enabled or (self.feedback.scarcity.enabled and self.mode != "synthetic")
        if self.mode != "real" and not asks:
            raise ValueError(
                f"with feedback.enabled = false and mode {self.mode}, nothing would be asked for: set "
                + ("it to true" if self.mode == "synthetic" else "scarcity.enabled = true")
            )
        if not self.feedback.enabled and self.thresholds.auto:
            raise ValueError("feedback.enabled = false leaves no fraction to learn: set thresholds.auto = false")
        if self.thresholds.auto and self.mode in ("real", "synthetic"):
            raise ValueError(f"mode {self.mode} has no thresholds to learn: set thresholds.auto = false")
        return self

    @property
    def has_pool(self) -> bool:
        """Whether feedback 0 asks for a pool: images of every real sample, however hard."""
        return self.mode in ("offline", "synthetic")

    @property
    def filter(self) -> Literal["vog", "similarity"] | None:
        """What drops synthetic samples before an iteration trains on them; None: nothing."""
        if self.vog.enabled:
            return "vog"
        return "similarity" if self.similarity.enabled else None

    @property
    def dropped(self) -> float:
        """The part of each class that the filter drops, unless it is learnt."""
        return {"vog": self.vog.fraction, "similarity": self.similarity.fraction, None: 0.0}[self.filter]

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.run

    @property
    def staleness(self) -> int:
        """K: how many iterations old a sample may be when it is trained on."""
        return self.max_staleness if self.mode == "async" else 0
