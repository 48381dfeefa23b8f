"""The search for a student: its space, what a candidate costs, a score before any training, and the study.

A study is Optuna's, in one SQLite file, RUN_DIR/study.db. Any number of processes work on it: each asks for a
candidate, trains it, and tells its score. Who asks holds the lock of RUN_DIR/study.lock meanwhile, and that of its
trial, RUN_DIR/trials/NUMBER.lock, until it has told the score, by `flock`: both are free again when their process
ends, however it ends, so a trial that nobody works on is known at once.
"""

import fcntl
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from deploy.export import ExportConfig, export
from deploy.exported import open_exported
from deploy.profiling import BackendUnavailable, count_flops, count_parameters, measure_latency, prepare
from errors import ConfigurationError
from evaluation.latency_pictures import STYLE, Point, pareto_front, save
from models import SegmentationModel
from models.budget import unet_costs
from models.unet import BLOCKS, STRIDES

Made = TypeVar("Made")
Row = Mapping[str, Any]  # a trial in a table: name, cost, miou (0..1), pruned and more
Shape = dict[str, Any]  # a UNet's depth, stride, block and channels
Cost = Literal["latency", "flops", "parameters"]
RUNTIMES = ("eager", "channels_last", "compile", "onnxruntime", "openvino")
FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
FIRST_RANDOM = (
    10  # trials that Optuna's TPE draws at random before it models them; as many scores before any counts
)
ENOUGH = 0.97  # of a budget
DRAWS = 100  # candidates in a row of which none is trained before the search gives up


def import_optuna() -> Any:
    """Optuna, silent but for warnings.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigurationError("optuna: is not installed; pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


# ------------------------------------------------------------------------------------------------- the space


@dataclass
class SpaceConfig:
    """The UNets among which is searched: the choices of each dimension. One choice settles it."""

    stride: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """Strides of the logits, which say how far the decoder goes; up to 4 that of the stem too."""
    depth: list[int] = field(default_factory=lambda: [2, 3, 4])
    """Numbers of levels above the bottleneck."""
    block: list[str] = field(default_factory=lambda: list(BLOCKS))
    """Blocks: plain, separable, residual, inverted."""
    width: list[int] = field(default_factory=lambda: [8, 16, 24, 32, 48, 64])
    """Channels of the finest level. With a budget it is not drawn: the widest that meets the budget is taken, from
    the smallest to the largest number here and whatever lies between."""
    growth: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Channels of a level over those of the level above it, drawn for each level by itself."""
    multiple: int = 8
    """Channels are rounded to multiples of this; 1 leaves them free."""

    def __post_init__(self) -> None:
        for key in ("stride", "depth", "block", "width", "growth"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ConfigurationError(f"space.{key}: {values} has no choice, or one twice; give one or more")
        known = {"stride": STRIDES, "block": tuple(BLOCKS), "depth": range(1, 7)}
        for key, allowed in known.items():
            wrong = [value for value in getattr(self, key) if value not in allowed]
            if wrong:
                raise ConfigurationError(
                    f"space.{key}: {wrong[0]!r} is not possible; give some of {', '.join(map(str, allowed))}"
                )
        if min(self.width) < 2:
            raise ConfigurationError(f"space.width: {min(self.width)} is too few channels; give 2 or more")
        if not 0 < min(self.growth) <= max(self.growth) <= 8:
            raise ConfigurationError(f"space.growth: {self.growth} are no factors; give numbers above 0, up to 8")
        if self.multiple < 1:
            raise ConfigurationError(f"space.multiple: {self.multiple} is too small; give 1 or more")


def draw(trial: Any, space: SpaceConfig, fill: bool) -> list[Shape]:
    """The shapes that a trial's choices stand for, narrowest first: one of them is the candidate.

    Level i has width · growth₁ · … · growthᵢ channels, rounded. With `fill` the width is open, and there is one
    shape for each that rounds to another; otherwise there is the one.

    Args:
        trial: Optuna's; it is asked for every dimension, also where a small depth leaves a growth unused, so that
            the space is the same for all trials.

    Returns:
        list: empty where a UNet of this depth has no such stride.
    """
    depth = trial.suggest_categorical("depth", space.depth)
    stride = trial.suggest_categorical("stride", space.stride)
    block = trial.suggest_categorical("block", space.block)
    growth = [
        trial.suggest_categorical(f"growth{level}", space.growth) for level in range(1, max(space.depth) + 1)
    ]
    if fill:
        widths: Sequence[int] = range(min(space.width), max(space.width) + 1)
    else:
        widths = [trial.suggest_categorical("width", space.width)]
    if stride > min(stride, 4) * 2**depth:
        return []
    factors = np.cumprod([1.0, *growth[:depth]])
    step = space.multiple
    rounded = [[max(step, 2, int(w * f / step + 0.5) * step) for f in factors] for w in widths]
    return [
        {"depth": depth, "stride": stride, "block": block, "channels": list(channels)}
        for channels in dict.fromkeys(map(tuple, rounded))
    ]


def widest(shapes: Sequence[Shape], cost: Callable[[Shape], float], most: float) -> tuple[Shape, float] | None:
    """A shape that costs at most so much and nearly so much, with its cost; None if even the narrowest costs more.

    By bisection over the shapes, narrowest first, so that few costs need to be measured: a wider one is taken to
    cost no less. It ends at the widest within the budget, or sooner, at one that spends 97 % of it.
    """
    found, low, high = None, 0, len(shapes)
    while low < high:
        middle = (low + high) // 2
        price = cost(shapes[middle])
        if price <= most:
            found, low = (shapes[middle], price), middle + 1
            if price >= ENOUGH * most:
                break
        else:
            high = middle
    return found


def called(shape: Shape) -> str:
    """A name for a shape: `plain-s8-16-48-64-96`, block, stride and the channels of each level."""
    return "-".join([shape["block"], f"s{shape['stride']}", *map(str, shape["channels"])])


# -------------------------------------------------------------------------------------------------- the cost


@dataclass
class LatencyConfig:
    """How latency is measured: each model in turn with a reference, in one process, batch 1.

    A latency is the median of the rounds' ratios of both times, by the reference's own latency, which is measured
    once for a study: what else the machine does slows both, and cancels.
    """

    runtime: Literal["eager", "channels_last", "compile", "onnxruntime", "openvino"] = "eager"
    """What runs the models; onnxruntime and openvino run files that are exported for it, seconds each."""
    threads: int = 1
    """CPU threads."""
    size: list[int] | None = None
    """[height, width] of the image; null is the size at which the data set is evaluated."""
    rounds: int = 10
    """Timed passes of model and reference, in turn."""
    warmup: int = 2
    """Passes of each before those."""

    def __post_init__(self) -> None:
        for key, least in (("threads", 1), ("rounds", 1), ("warmup", 0)):
            if getattr(self, key) < least:
                raise ConfigurationError(f"latency.{key}: {getattr(self, key)} is too small; give {least} or more")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigurationError(f"latency.size: {self.size} is not a size; give [height, width] in pixels")


def make_ready(model: SegmentationModel, size: Sequence[int], config: LatencyConfig) -> Callable[[], Any]:
    """A forward pass of one image of `size` in the chosen runtime, run once; to be called again and again.

    Raises:
        ConfigurationError: the runtime is not installed or does not run here.
    """
    if config.runtime not in FORMATS:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            return prepare(model, images, config.runtime)
        except BackendUnavailable as error:
            raise ConfigurationError(f"latency.runtime: {error}; give eager") from error
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        said = ExportConfig(formats=[FORMATS[config.runtime]], size=list(size), images=1)
        (path,) = export(model, said, folder, [values])
        exported = open_exported(path, runtime=config.runtime, threads=config.threads)
        array = np.zeros((1, 3, *size), np.float32)
        exported(array)  # some runtimes read the file late
    return lambda: exported(array)


def latencies(passes: Mapping[str, Callable[[], Any]], config: LatencyConfig) -> dict[str, list[float]]:
    """Milliseconds of each pass in each round, in which all take turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return measure_latency(passes, rounds=config.rounds, warmup=config.warmup)
    finally:
        torch.set_num_threads(before)


def ratio(times: Mapping[str, Sequence[float]], name: str) -> float:
    """Time of a pass over that of the reference: the median over the rounds."""
    return float(np.median(np.divide(times[name], times["reference"])))


def counted(shape: Shape, cost: Cost, classes: int, size: Sequence[int]) -> float:
    """Parameters of a shape, or the FLOPs of one image of `size`, by formula."""
    channels = np.array(shape["channels"], dtype=float)
    parameters, flops = unet_costs(
        channels, stride=shape["stride"], block=shape["block"], classes=classes, size=size
    )
    return float(parameters if cost == "parameters" else flops)


def exact(model: nn.Module, size: Sequence[int]) -> dict[str, int]:
    """Parameters and FLOPs of any model."""
    return {"parameters": count_parameters(model), "flops": count_flops(model, size)}


# ------------------------------------------------------------------------------------ a score before training


@torch.no_grad()
def naswot(model: nn.Module, images: Tensor) -> float:
    """How differently an untrained network's ReLUs answer different images: log |det K|, the more the better.

    K[i, j] is the number of units of all ReLUs (and ReLU6s) that are on for both of the images i and j or off for
    both (Mellor et al. 2021, arXiv 2006.04647). Batch normalisation takes the batch's statistics. The same weights
    and images give the same score.

    Args:
        model: a UNet as it was initialised; it is left as it is.
        images: [B, 3, H, W], B ≥ 2.
    """
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)

    def add(_: nn.Module, __: Any, output: Tensor) -> None:
        on = (output > 0).flatten(1).float()
        kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).double())

    hooks = [part.register_forward_hook(add) for part in model.modules() if isinstance(part, nn.ReLU | nn.ReLU6)]
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    kept = [{name: buffer.clone() for name, buffer in part.named_buffers()} for part in norms]
    was_training = model.training
    try:
        model.train()
        model(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        for part, buffers in zip(norms, kept, strict=True):
            part.load_state_dict(buffers, strict=False)
    return float(torch.linalg.slogdet(kernel).logabsdet)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None of fewer than three pairs, or where one side is all equal."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)


# ------------------------------------------------------------------------------------------------- the study


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file, for which it waits."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> IO[str] | None:
    """The lock of a file, held until it is closed or the process ends; None if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def open_study(folder: Path, directions: Sequence[str], pruner: str, steps: int) -> Any:
    """The study in RUN_DIR/study.db, made where there is none.

    Args:
        directions: "maximize" mIoU, and "minimize" the cost where it is the second objective.
        pruner: "median", "hyperband" or "none".
        steps: of a trial.
    """
    optuna = import_optuna()
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=FIRST_RANDOM // 2),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=max(1, steps // 9), max_resource=steps),
        "none": optuna.pruners.NopPruner,
    }
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{folder.absolute() / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    return optuna.create_study(
        storage=storage,
        study_name="search",
        directions=list(directions),
        pruner=pruners[pruner](),
        load_if_exists=True,
    )


def make_sampler(sampler: Literal["tpe", "nsga2"], trials: int, seed: Sequence[int]) -> Any:
    """Optuna's sampler for one candidate.

    It is made anew for each, with a seed that the study's length is part of: a search that goes on draws what it
    would have drawn, and never again what it has drawn before.
    """
    optuna = import_optuna()
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    if sampler == "nsga2":  # several generations even of few trials, where Optuna's default is 50 of each
        return optuna.samplers.NSGAIISampler(population_size=max(4, math.isqrt(trials)), seed=number)
    return optuna.samplers.TPESampler(n_startup_trials=FIRST_RANDOM, seed=number)


def counts(trial: Any) -> bool:
    """Whether it is one of the trials that were asked for: in training or trained, not discarded, not cut off."""
    return trial.state.name in ("RUNNING", "COMPLETE", "PRUNED") or "failed" in trial.user_attrs


def trained(study: Any) -> list[Any]:
    """The trials whose mIoU is known, of those that were pruned the last one, in order."""
    finished = ("COMPLETE", "PRUNED")
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in finished]


def next_trial(
    study: Any, folder: Path, total: int, sampler: Literal["tpe", "nsga2"], seed: int, make: Callable[[Any], Made]
) -> tuple[Any, Made, IO[str]] | None:
    """A new trial, what `make` makes of it, and its lock; None when there are `total`, and none in training.

    The trial of a process that has ended counts as failed, and its choices are the next to be taken. While others
    are at work on the last trials it waits, since they may come to nothing.
    """
    failed = import_optuna().trial.TrialState.FAIL
    while True:
        with locked(folder / "study.lock"):
            for trial in study.get_trials(deepcopy=False):
                lock = try_lock(lock_of(folder, trial.number)) if trial.state.name == "RUNNING" else None
                if lock is not None:
                    # It may have ended between the list and the lock; who holds the lock sees its last state.
                    if study.get_trials(deepcopy=False)[trial.number].state.name == "RUNNING":
                        study.tell(trial.number, state=failed)
                        study.enqueue_trial(trial.params)
                    lock.close()
            known = study.get_trials(deepcopy=False)
            if sum(map(counts, known)) < total:
                study.sampler = make_sampler(sampler, total, [seed, len(known)])
                trial = study.ask()
                lock = try_lock(lock_of(folder, trial.number))
                assert lock is not None, "only the holder of study.lock makes trials"
                return trial, make(trial), lock
            if not any(trial.state.name == "RUNNING" for trial in known):
                return None
        time.sleep(0.2)


def lock_of(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}.lock"


def take(study: Any, trial: Any, folder: Path, name: str) -> bool:
    """Gives a trial the name of its candidate, unless that of another trial is the same."""
    with locked(folder / "study.lock"):
        if any(counts(other) and other.user_attrs.get("name") == name for other in study.get_trials()):
            return False
        trial.set_user_attr("name", name)
        return True


def hopeless(score: float, study: Any, share: float) -> bool:
    """Whether a score before training is among the lowest `share` of those so far, of which there must be some."""
    scores = [trial.user_attrs["proxy"] for trial in study.get_trials() if "proxy" in trial.user_attrs]
    return len(scores) >= FIRST_RANDOM and score < np.quantile(scores, share)


# ------------------------------------------------------------------------------------------------ what it found


def front_of(rows: Sequence[Row]) -> list[Row]:
    """Of what was trained to the end, what nothing else beats in both cost and mIoU, the cheapest first."""
    rows = [row for row in rows if not row["pruned"]]
    front = pareto_front([Point(str(i), "", row["cost"], row["miou"]) for i, row in enumerate(rows)])
    return [rows[int(point.label)] for point in front]


def spread(front: Sequence[Row], number: int) -> list[Row]:
    """So many points of a front, evenly spaced over it, from the dearest to the cheapest."""
    places = np.linspace(len(front) - 1, 0, min(number, len(front))).round().astype(int)
    return [front[place] for place in places]


def draw_front(path: Path, rows: Sequence[Row], reference: Row, unit: str) -> None:
    """The picture of a search: every trial by cost and mIoU, the front as a line, a star for the reference if
    it was scored alike.

    Args:
        unit: what the cost is in, as the axis says it.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
        axes = figure.subplots()
        for pruned, label in ((False, "trained"), (True, "pruned: its last score")):
            some = [row for row in rows if row["pruned"] == pruned]
            faces = "none" if pruned else "tab:blue"
            x, y = [row["cost"] for row in some], [100 * row["miou"] for row in some]
            axes.scatter(x, y, s=26, facecolors=faces, edgecolors="tab:blue", alpha=0.8, label=label)
        front = front_of(rows)
        x, y = [row["cost"] for row in front], [100 * row["miou"] for row in front]
        axes.step(x, y, where="post", color="tab:orange", label="Pareto front")
        if "miou" in reference:
            x, y = [reference["cost"]], [100 * reference["miou"]]
            axes.scatter(x, y, s=120, marker="*", color="tab:red", label="reference")
        axes.set_xlabel(unit)
        axes.set_ylabel("val mIoU % in the trial")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
        save(figure, path)
