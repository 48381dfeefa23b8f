"""Search for a student: the UNet of the highest mIoU within a budget, or the best at every cost.

in this process    python search_student.py configs/search/camvid.yaml
two at work        python search_student.py configs/search/camvid.yaml workers=2
with a teacher     python search_student.py runs/teacher configs/search/camvid.yaml losses.kd.weight=1
go on, or join     python search_student.py runs/search/config.yaml resume=true

Each trial draws a UNet, measures what it costs, and trains it briefly. The best are then trained in full, and
the reference with them: RUN_DIR/students/NAME.yaml is what train_teacher.py, or with a teacher distill.py, takes,
and RUN_DIR/finalists/NAME its run. RUN_DIR/study.db holds the trials; Optuna's own tools read it too.
"""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

import distill
import train_teacher
from data import DataConfig, SegmentationData, build_dataset
from deploy.search import (
    DRAWS,
    LatencyConfig,
    Row,
    Shape,
    SpaceConfig,
    called,
    counted,
    draw,
    draw_front,
    exact,
    front_of,
    hopeless,
    import_optuna,
    latencies,
    locked,
    make_ready,
    naswot,
    next_trial,
    open_study,
    rank_correlation,
    ratio,
    spread,
    take,
    trained,
    try_lock,
    widest,
)
from engine.config import run_script
from engine.loop import evaluate, fit, summarise
from engine.player import Learner, TrainConfig
from engine.run import Run, read_json, start_accelerator, start_chain, start_run
from engine.teachers import TeacherConfig
from engine.tracking import TrackingConfig, write_json
from errors import ConfigurationError, NonFiniteError, Terminated
from evaluation.report import duration, percent, quantity, significant, table
from losses import DistillationLoss, LossConfig
from losses.logits import kl_divergence
from models import ModelConfig, SegmentationModel, StudentConfig, build_model, fingerprint, load_model
from models.slimmable import SLIMMABLE, answer_as, cut_out, has_slice

UNITS = {"latency": "ms", "flops": "FLOPs", "parameters": "parameters"}
KEPT_BYTES = 2**29  # of decoded images
PROXY_IMAGES = 16
RECALIBRATION = 12  # batches for the batch-norm statistics of a slice


@dataclass
class ReferenceConfig(ModelConfig):
    """The model to compare with."""

    key: ClassVar[str] = "reference"
    preset_width: ClassVar[int] = ModelConfig.width


@dataclass
class Config:
    """What search_student.py can be told; each part is documented where it is defined."""

    run_dir: str = "runs/search"
    """Folder of the search."""
    seed: int = 0
    """Seed of what is drawn, and of each training."""
    resume: bool = False
    """Go on with the search in `run_dir`, or join those who are at work on it."""
    trials: int = 30
    """Candidates to train, those that are pruned among them; a search that goes on may be given more."""
    finalists: int = 3
    """The best candidates that are trained in full, by `train`, and the reference with them; 0: none."""
    workers: int = 1
    """Processes of this machine that work on the trials, each with its share of the CPU's threads."""
    worker: int = 0
    """Number of a process that another has started; not to be given by hand."""
    space: SpaceConfig = field(default_factory=SpaceConfig)
    """The candidates."""
    cost: Literal["latency", "flops", "parameters"] = "latency"
    """What mIoU is weighed against: measured milliseconds, FLOPs of one image, or parameters."""
    budget: float | None = None
    """Most that a student may cost: milliseconds, FLOPs or parameters. Without a budget there are two objectives,
    mIoU and cost."""
    budget_ratio: float | None = None
    """The same as a factor of what the reference costs: 1.0 is as much."""
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    """How latency is measured."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """A model made by hand, with which all are compared: trained alike, and measured in turn with each."""
    method: Literal["separate", "slimmable"] = "separate"
    """separate: each candidate is trained by itself. slimmable: one UNet is trained once, such that the first
    channels of its levels are good UNets too (Yu & Huang 2019), and a trial cuts out a candidate: for one depth,
    one stride, and plain or separable blocks."""
    shared_channels: list[int] = field(default_factory=list)
    """slimmable: channels of each level of that UNet, the bottleneck last; no candidate is wider, and in training
    none is narrower than a quarter."""
    shared_steps: int = 3000
    """slimmable: steps of its training, each of which costs about two of the UNet by itself."""
    sampler: Literal["tpe", "nsga2"] = "tpe"
    """Who draws: Optuna's TPE, or the genetic NSGA-II for two objectives."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """When a trial ends early, by its mIoU until then; with two objectives none does, Optuna's rule."""
    proxy: Literal["none", "naswot"] = "none"
    """A score before any training, by which the lowest are discarded; with a budget alone, since it favours what
    costs more."""
    proxy_share: float = 0.25
    """Share of the candidates that are discarded by it."""
    trial_steps: int = 400
    """Steps of a trial's training, which for the rest is that of `train`."""
    trial_evaluate_every: int = 100
    """Steps between a trial's evaluations, after each of which it may be pruned."""
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(source="cache"))
    """Who teaches all candidates, from one cache; a run directory among the arguments names it. Without one they
    learn from labels alone."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set. In a trial the training's process loads it itself, and keeps the decoded images in memory."""
    losses: LossConfig = field(default_factory=LossConfig)
    """The objective of trials and finalists."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The finalists' training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the finalists report."""

    def __post_init__(self) -> None:
        least = {
            "trials": 1,
            "finalists": 0,
            "workers": 1,
            "worker": 0,
            "trial_steps": 1,
            "trial_evaluate_every": 1,
            "shared_steps": 1,
        }
        for key, lowest in least.items():
            if getattr(self, key) < lowest:
                raise ConfigurationError(f"{key}: {getattr(self, key)} is too small; give {lowest} or more")
        for key in ("budget", "budget_ratio"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{key}: {value} is not possible; give a number above 0")
        if self.budget is not None and self.budget_ratio is not None:
            raise ConfigurationError("budget_ratio: stands beside budget; give one of both")
        if self.sampler == "nsga2" and self.limited:
            raise ConfigurationError("sampler: nsga2 is for two objectives; leave the budget out, or give tpe")
        if self.proxy != "none" and not self.limited:
            raise ConfigurationError("proxy: ranks candidates of equal cost; give budget_ratio, or proxy=none")
        if self.method == "slimmable":
            for key in ("depth", "stride", "block"):
                if len(getattr(self.space, key)) != 1:
                    raise ConfigurationError(f"space.{key}: method=slimmable is for one; give one")
            if self.space.block[0] not in SLIMMABLE:
                raise ConfigurationError(
                    f"space.block: method=slimmable is for {' or '.join(SLIMMABLE)}; give one of both"
                )
            levels = self.space.depth[0] + 1
            if len(self.shared_channels) != levels or min(self.shared_channels) < 2:
                raise ConfigurationError(
                    f"shared_channels: {self.shared_channels} are not those of a UNet of depth {levels - 1}; "
                    f"give {levels} numbers above 1"
                )
        elif self.shared_channels:
            raise ConfigurationError("shared_channels: does nothing without method=slimmable; leave it out")
        if not 0 < self.proxy_share < 1:
            raise ConfigurationError(f"proxy_share: {self.proxy_share} is no share; give a number between 0 and 1")
        if self.taught and self.teacher.source != "cache":
            raise ConfigurationError("teacher.source: a search asks its teacher once for all; give cache")

    @property
    def limited(self) -> bool:
        """Whether there is a budget, and so one objective."""
        return self.budget is not None or self.budget_ratio is not None

    @property
    def shared_shape(self) -> Shape:
        """The UNet whose weights all candidates share."""
        space = self.space
        one = {"depth": space.depth[0], "stride": space.stride[0], "block": space.block[0]}
        return one | {"channels": list(self.shared_channels)}

    @property
    def taught(self) -> bool:
        return bool(self.teacher.run or self.teacher.hub)


@dataclass
class Parts:
    """What a process needs for its trials, made once."""

    study: Any
    train: SegmentationData
    val: SegmentationData
    size: list[int]
    reference: Callable[[], Any] | None  # its forward pass, to measure others with
    reference_costs: dict[str, float]
    teacher: Any
    teacher_taps: Any
    most: float
    shared: Any = None  # of method=slimmable, the UNet that candidates are cut out of
    least_seen: float = math.inf  # what the cheapest candidate yet would cost


def main(config: Config) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "workers: a search starts its processes itself; without a launcher, give workers=2"
        )
    import_optuna()
    start_chain(config)
    if config.worker:
        end_with_parent()
    try:
        parts = prepare(config)
        with workers(config):
            if config.method == "slimmable":
                train_shared(config, parts)
            search(config, parts)
            finish(config, parts)
    except ConfigurationError:
        clear_away(Path(config.run_dir))
        raise
    if not config.worker:
        with locked(Path(config.run_dir) / "study.lock"):  # others who joined it come to the same end
            report(config, parts)


def clear_away(folder: Path) -> None:
    """Deletes what a search has left that trained nothing, so that it may be begun again with other keys."""
    if any(folder.glob("trials/*/metrics.jsonl")):
        return
    shutil.rmtree(folder / "trials", ignore_errors=True)
    for path in (folder / "study.db", folder / "study.lock", *folder.glob("worker_*.log")):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- preparing


def prepare(config: Config) -> Parts:
    """Data, study, the reference's costs and the teacher's answers; what is there already is taken as it is."""
    folder = Path(config.run_dir)
    train, val = (keep_decoded(build_dataset(config.data, split)) for split in ("train", "val"))
    size = list(config.latency.size or config.data.size or val.read(0)[0].shape[:2])
    model = build_model(config.reference, train.labels, config.data.mean, config.data.std)
    reference = make_ready(model, size, config.latency) if config.cost == "latency" else None
    directions = ["maximize"] if config.limited else ["maximize", "minimize"]
    with locked(folder / "study.lock"):  # one process at a time writes the cache, and the others find it
        study = open_study(folder, directions, config.pruner, config.trial_steps)
        if "reference" not in study.user_attrs:
            costs: dict[str, float] = dict(exact(model, size))
            if reference is not None:
                rounds = replace(config.latency, rounds=4 * config.latency.rounds)
                costs["latency"] = float(np.median(latencies({"reference": reference}, rounds)["reference"]))
            study.set_user_attr("reference", costs)
        costs = study.user_attrs["reference"]
        said = f"{significant(costs['latency'])} ms" if "latency" in costs else ""
        print(
            f"reference: {', '.join(filter(None, [said, quantity(costs['flops']) + 'FLOPs']))}, "
            f"{quantity(costs['parameters'])} parameters at {size[0]}x{size[1]}",
            flush=True,
        )
        teacher, taps = open_teacher(config, model, train, val, study) if config.taught else (None, {})
    most = config.budget or math.inf
    if config.budget_ratio is not None:
        most = config.budget_ratio * costs[config.cost]
    return Parts(study, train, val, size, reference, costs, teacher, taps, most)


def keep_decoded(data: SegmentationData) -> SegmentationData:
    """The same data set, which keeps the images that it has read, up to half a gigabyte."""
    image, label = data.read(0)
    data.read = functools.lru_cache(KEPT_BYTES // (image.nbytes + label.nbytes))(data.read)  # type: ignore
    return data


def open_teacher(
    config: Config, reference: SegmentationModel, train: SegmentationData, val: SegmentationData, study: Any
) -> tuple[Any, Any]:
    """The teacher's cached answers, and its taps."""
    run = Run(config, start_accelerator(config.train))
    recipe: Any = recipe_of(config, asdict(config.reference), config.run_dir)
    models = distill.load_teachers(run, recipe, train.labels.names)
    goal = make_objective(config, reference, models[0].taps, train, 1)
    distill.need_a_taught_term(goal, "teacher.run")
    distill.need_no_latents(goal, "a search")
    live = distill.make_live(run, recipe, models, train)
    if "teacher" not in study.user_attrs:
        distill.announce(run, live, val, config.teacher)
        study.set_user_attr("teacher", config.teacher.run or config.teacher.hub)
    weights = "+".join(fingerprint(model) for model in models)
    return distill.make_cached(run, recipe, live, weights, goal), models[0].taps


def recipe_of(
    config: Config, model: dict[str, Any], run_dir: str | Path, train: TrainConfig | None = None
) -> distill.Config | train_teacher.Config:
    """The configuration by which distill.py, or train_teacher.py where there is no teacher, trains a model."""
    shared: dict[str, Any] = {"run_dir": str(run_dir), "seed": config.seed, "train": train or config.train}
    shared |= {key: getattr(config, key) for key in ("data", "losses", "tracking")}
    if config.taught:
        return distill.Config(**shared, teacher=config.teacher, student=StudentConfig(**model))
    return train_teacher.Config(**shared, model=ModelConfig(**{"width": ModelConfig.preset_width, **model}))


def make_objective(
    config: Config, model: SegmentationModel, teacher_taps: Any, train: SegmentationData, steps: int
) -> DistillationLoss:
    return DistillationLoss(
        config.losses,
        model.taps,
        teacher_taps,
        classes=len(train.labels.names),
        class_weights=train.class_weights,
        total_steps=steps,
        unlabelled=train.unlabelled,
    )


# ------------------------------------------------------------------------------------------------ processes


@contextmanager
def workers(config: Config) -> Iterator[None]:
    """The further processes, `config.workers` with this one: each runs this very script and joins the search.

    What they print goes to RUN_DIR/worker_NUMBER.log. They end with this process, whatever ends it.
    """
    others = []
    threads = max(1, (os.cpu_count() or 1) // config.workers)
    if config.workers > 1 and not config.train.threads:
        torch.set_num_threads(threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for number in range(1, config.workers):
        command = [sys.executable, __file__, *sys.argv[1:], "resume=true", "workers=1", f"worker={number}"]
        with (Path(config.run_dir) / f"worker_{number}.log").open("a") as log:
            others.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
            )
    try:
        yield
        for number, other in enumerate(others, 1):
            if other.wait():
                said = (Path(config.run_dir) / f"worker_{number}.log").read_text().strip().splitlines()
                print(
                    f"worker {number}: ended with exit code {other.returncode}: {(said or [''])[-1]}", flush=True
                )
    finally:
        for other in others:
            other.terminate()
        for other in others:
            other.wait()


def end_with_parent() -> None:
    """Sends this process SIGTERM when the one that has started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------- trials


def search(config: Config, parts: Parts) -> None:
    """Trains candidates until there are enough, here and in the other processes."""
    folder, study = Path(config.run_dir), parts.study
    failed = import_optuna().trial.TrialState.FAIL

    def shapes_of(trial: Any) -> list[Shape]:
        return draw(trial, config.space, fill=config.limited)

    discarded = 0
    while (taken := next_trial(study, folder, config.trials, config.sampler, config.seed, shapes_of)) is not None:
        trial, shapes, lock = taken
        with lock:
            reason = work_on(config, parts, trial, shapes)
            if reason:
                trial.set_user_attr("discarded", reason)
                study.tell(trial, state=failed)
        discarded = discarded + 1 if reason else 0
        if discarded == DRAWS:
            said = f"{DRAWS} candidates in a row came to nothing, the last since {reason}"
            if not trained(study):
                key = (
                    "budget_ratio" if config.budget_ratio is not None else "budget" if config.limited else "space"
                )
                least = f"; the cheapest costs {price(config, parts.least_seen)}" if config.limited else ""
                raise ConfigurationError(f"{key}: {said}{least}; give more, or smaller choices in space")
            print(f"space: {said}; the search ends with {len(trained(study))} trials", flush=True)
            return


def work_on(config: Config, parts: Parts, trial: Any, shapes: list[Shape]) -> str:
    """Trains a trial's candidate and tells its score; or the reason for which it is discarded."""
    optuna = import_optuna()
    folder, study = Path(config.run_dir), parts.study
    if not shapes:
        return "there is no UNet of this stride and depth"
    if parts.shared is not None:
        shapes = [shape for shape in shapes if has_slice(parts.shared, shape["channels"])]
        if not shapes:
            return "it is no part of the shared UNet"
    found = widest(shapes, lambda shape: cost_of(config, parts, shape), parts.most)
    if found is None:
        return f"the narrowest of its kind costs more than {price(config, parts.most)}"
    shape, cost = found
    name = called(shape)
    if not take(study, trial, folder, name):
        return f"{name} is known already"
    model = build_model(ModelConfig(**shape), parts.train.labels, config.data.mean, config.data.std)
    for key, value in {"shape": shape, "cost": cost, **exact(model, parts.size)}.items():
        trial.set_user_attr(key, value)
    if config.proxy == "naswot":
        score = proxy_score(config, parts, shape)
        lowest = hopeless(score, study, config.proxy_share)
        trial.set_user_attr("proxy", score)
        if lowest:
            return f"{name} has a low score before training"

    last: dict[str, Any] = {}

    def judged(step: int, scored: dict[str, Any]) -> None:
        last.update(miou=scored["miou"], steps=step)
        if config.limited:
            trial.report(scored["miou"], step)
            if trial.should_prune():
                raise optuna.TrialPruned

    state, values = optuna.trial.TrialState.COMPLETE, None
    try:
        if parts.shared is None:
            results = train_briefly(config, parts, f"{trial.number:04d}", shape, judged)
        else:
            results = score_slice(config, parts, shape)
        last.update(miou=results["miou"], steps=results["steps"], seconds=results["train_seconds"])
        values = [results["miou"]] if config.limited else [results["miou"], cost]
    except optuna.TrialPruned:
        state = optuna.trial.TrialState.PRUNED
    except NonFiniteError as error:
        state = optuna.trial.TrialState.FAIL
        trial.set_user_attr("failed", str(error))
    for key, value in last.items():
        trial.set_user_attr(key, value)
    study.tell(trial, values, state=state)
    words = {"COMPLETE": "", "PRUNED": f", pruned at step {last.get('steps')}", "FAIL": ", not finite"}
    print(
        f"trial {trial.number}: {name}, {price(config, cost)}, val mIoU {percent(last.get('miou'))} %"
        f"{words[state.name]}; {len(trained(study))} of {config.trials}",
        flush=True,
    )
    return ""


def cost_of(config: Config, parts: Parts, shape: Shape) -> float:
    """What a candidate costs, in the unit of the budget."""
    if config.cost == "latency":
        assert parts.reference is not None
        model = build_model(ModelConfig(**shape), parts.train.labels, config.data.mean, config.data.std)
        passes = {"candidate": make_ready(model, parts.size, config.latency), "reference": parts.reference}
        cost = ratio(latencies(passes, config.latency), "candidate") * parts.reference_costs["latency"]
    else:
        cost = counted(shape, config.cost, len(parts.train.labels.names), parts.size)
    parts.least_seen = min(parts.least_seen, cost)
    return cost


def price(config: Config, cost: float) -> str:
    """A cost for people."""
    return f"{significant(cost)} ms" if config.cost == "latency" else f"{quantity(cost)} {UNITS[config.cost]}"


def proxy_score(config: Config, parts: Parts, shape: Shape) -> float:
    """The score before training, of the weights with which a trial begins, on the first validation images."""
    torch.manual_seed(config.seed)
    model = build_model(ModelConfig(**shape), parts.train.labels, config.data.mean, config.data.std)
    keys = [(-1, index, index) for index in range(min(PROXY_IMAGES, len(parts.val)))]
    return naswot(model, torch.stack([parts.val.sample(key, seed=0).images for key in keys]))


def train_briefly(
    config: Config,
    parts: Parts,
    name: str,
    model: dict[str, Any],
    judged: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The short training of a model, from its start, as a run in RUN_DIR/trials/NAME that keeps no weights.

    Raises:
        Terminated: SIGTERM arrived.
    """
    folder = Path(config.run_dir) / "trials" / name
    shutil.rmtree(folder, ignore_errors=True)
    brief = {"steps": config.trial_steps, "evaluate_every": config.trial_evaluate_every}
    train = replace(config.train, epochs=None, checkpoint_every=config.trial_steps, **brief)
    recipe = recipe_of(config, model, folder, train)
    recipe.tracking = TrackingConfig()
    try:
        with start_run(recipe, more=True) as run:
            student = build_model(ModelConfig(**model), parts.train.labels, config.data.mean, config.data.std)
            goal = make_objective(config, student, parts.teacher_taps, parts.train, config.trial_steps)
            learner = Learner(student, goal, parts.teacher)
            try:
                results = fit(run, [learner], parts.train, parts.val, train, judged=judged)
            finally:
                if run.terminated:  # whatever else may have ended it
                    raise Terminated(f"{config.run_dir}: stopped by SIGTERM; go on with resume=true")
    finally:
        for weights in ("checkpoints", "best"):
            shutil.rmtree(folder / weights, ignore_errors=True)
    write_json(folder / "results.json", results)
    return results


# -------------------------------------------------------------------------------------------- shared weights


class Sandwich(Learner):
    """The training of shared weights: at each step the widest UNet learns as any student does, and the narrowest
    and two of random widths learn its answer (the sandwich rule and in-place distillation, Yu & Huang 2019)."""

    def __init__(self, model: SegmentationModel, objective: DistillationLoss, teacher: Any, seed: int) -> None:
        super().__init__(model, objective, teacher)
        self.tells = []  # so that its answer is kept
        self.seed = seed
        self.most: Any = model.channels
        self.least = [max(2, count // 4) for count in self.most]

    def forward(self, images: Any, labels: Any, answer: Any, step: int, denominators: Any) -> Any:
        loss, values = super().forward(images, labels, answer, step, denominators)
        assert self.latest is not None
        rng = np.random.default_rng([self.seed, step])
        between = rng.integers(self.least, self.most, size=(2, len(self.most)), endpoint=True).tolist()
        narrow: Any = 0.0
        for channels in (self.least, *between):
            narrow = narrow + kl_divergence(answer_as(self.model, channels, images).logits, self.latest.logits)
        return loss + narrow, values | {"narrow": narrow.detach() / 3}


def train_shared(config: Config, parts: Parts) -> None:
    """Trains the shared weights, an ordinary run in RUN_DIR/shared, unless another process has; and takes them."""
    folder = Path(config.run_dir) / "shared"

    def train() -> None:
        options = replace(config.train, epochs=None, steps=config.shared_steps)
        recipe = recipe_of(config, config.shared_shape, folder, options)
        with start_run(replace(recipe, resume=folder.exists()), more=True) as run:
            model = build_model(
                ModelConfig(**config.shared_shape), parts.train.labels, config.data.mean, config.data.std
            )
            goal = make_objective(config, model, parts.teacher_taps, parts.train, config.shared_steps)
            run.describe({"shared": model}, {"loss": goal}, parts.train)
            learner = Sandwich(model, goal, parts.teacher, config.seed)
            run.finish(fit(run, [learner], parts.train, parts.val, options))

    share({folder: train})
    parts.shared = load_model(folder)


def score_slice(config: Config, parts: Parts, shape: Shape) -> dict[str, Any]:
    """mIoU of a candidate that is cut out of the shared weights, its batch-norm statistics taken anew."""
    accelerator, size = start_accelerator(config.train), config.train.batch_size
    began = time.perf_counter()
    steps = [
        [(0, at, at % len(parts.train)) for at in range(k * size, (k + 1) * size)] for k in range(RECALIBRATION)
    ]
    batches = (parts.train.batch(keys, seed=config.seed).images.to(accelerator.device) for keys in steps)
    model = cut_out(parts.shared.to(accelerator.device), shape["channels"], batches)
    scored = summarise(evaluate(accelerator, model, parts.val), parts.val.labels.names)
    return {"miou": scored["miou"], "steps": config.shared_steps, "train_seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------ finalists


def best_of(config: Config, parts: Parts) -> list[Row]:
    """The finalists: with a budget those of the highest mIoU, the best first; else some along the front."""
    rows = rows_of(parts)
    if not config.limited:
        return spread(front_of(rows), config.finalists)
    whole = [row for row in rows if not row["pruned"]]
    return sorted(whole, key=lambda row: -row["miou"])[: config.finalists]


def rows_of(parts: Parts) -> list[Row]:
    """What is known of each trial that was trained."""
    return [
        {"trial": trial.number, "pruned": trial.state.name == "PRUNED", **trial.user_attrs}
        for trial in trained(parts.study)
    ]


def finish(config: Config, parts: Parts) -> None:
    """The reference's short training, the finalists' YAML files, and their training in full; shared by all."""
    folder = Path(config.run_dir)
    models = {"reference": asdict(config.reference)}
    models |= {row["name"]: row["shape"] for row in best_of(config, parts)}
    script = distill if config.taught else train_teacher

    def compare() -> None:
        results = train_briefly(config, parts, "reference", models["reference"])
        print(f"reference: val mIoU {percent(results['miou'])} % after {results['steps']} steps", flush=True)

    def train_in_full(name: str) -> None:
        recipe = recipe_of(config, models[name], folder / "finalists" / name)
        script.main(replace(recipe, resume=Path(recipe.run_dir).exists()))

    jobs: dict[Path, Callable[[], None]] = {}
    if config.method == "separate":
        jobs[folder / "trials" / "reference"] = compare
    for name in models if config.finalists else ():
        with locked(folder / "study.lock"):
            recipe = recipe_of(config, models[name], folder / "students" / name)
            write_recipe(folder / "students" / f"{name}.yaml", recipe, script.__name__)
        jobs[folder / "finalists" / name] = functools.partial(train_in_full, name)
    share(jobs)


def share(jobs: dict[Path, Callable[[], None]]) -> None:
    """Does the jobs that are not done and that no other process does, then waits for those that others do.

    Args:
        jobs: by the folder of the run that each is; results.json in it says that it is done.
    """
    while jobs:
        for folder in list(jobs):
            lock = try_lock(folder.with_suffix(".lock"))
            if lock is not None:
                with lock:
                    if not (folder / "results.json").exists():
                        jobs[folder]()
                del jobs[folder]
        if jobs:
            time.sleep(0.5)


def write_recipe(path: Path, recipe: Any, script: str) -> None:
    """A YAML file of the keys in which a configuration differs from the script's defaults."""
    path.parent.mkdir(exist_ok=True)
    plain = OmegaConf.to_container(OmegaConf.create(changed(recipe, type(recipe)())))
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"# python {script}.py {path}\n{text}", encoding="utf-8")
    temporary.replace(path)


def changed(config: Any, usual: Any) -> dict[str, Any]:
    """The values of a configuration that differ from the usual ones, nested as they are."""
    found = {}
    for key, value in vars(config).items():
        other = getattr(usual, key)
        if key == "resume" or value == other:
            continue
        nested = is_dataclass(value) and type(value) is type(other)
        found[key] = changed(value, other) if nested else asdict(value) if is_dataclass(value) else value
    return found


# --------------------------------------------------------------------------------------------------- report


def report(config: Config, parts: Parts) -> None:
    """The picture of all trials, their table, that of the finalists, and results.json."""
    folder = Path(config.run_dir)
    rows = rows_of(parts)
    reference = {"name": "reference", "cost": parts.reference_costs[config.cost], **parts.reference_costs}
    if config.method == "separate":
        brief = read_json(folder / "trials" / "reference" / "results.json")
        reference |= {"miou": brief["miou"], "steps": brief["steps"], "seconds": brief["train_seconds"]}
    units = {"latency": f"latency on {config.latency.runtime}, ms"}
    draw_front(folder / "search.png", rows, reference, units.get(config.cost, UNITS[config.cost]))

    whole = [row for row in rows if not row["pruned"]]
    scores = [row["miou"] for row in whole]
    known = [key for key in ("proxy", "parameters", "flops", "cost") if all(key in row for row in whole)]
    correlations = {key: rank_correlation([row[key] for row in whole], scores) for key in known}
    finalists = score_finalists(config, parts, reference)
    write_json(
        folder / "results.json",
        {
            "trials": rows,
            "front": [row["name"] for row in front_of(rows)],
            "reference": reference,
            "rank_correlation": correlations,
            "finalists": finalists,
        },
    )
    texts = [f"{len(whole)} trials in full, {len(rows) - len(whole)} pruned; rank correlation with val mIoU:"]
    texts[0] += "".join(f" {key} {value:.2f}," for key, value in correlations.items() if value is not None)
    texts = [texts[0].removesuffix(",").removesuffix("; rank correlation with val mIoU:") + "."]
    texts.append(table([shown(config, row) for row in [reference, *sorted(rows, key=lambda row: -row["miou"])]]))
    if finalists:
        texts.append("In full:")
        texts.append(table([shown(config, row) for row in finalists]))
    (folder / "search.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print("\n\n".join([texts[0], *texts[2:]]))
    print(f"written: {folder / 'search.md'}, search.png, results.json, students/")


def score_finalists(config: Config, parts: Parts, reference: Row) -> list[dict[str, Any]]:
    """The finalists and the reference with the figures of their runs; latencies taken in turn once more."""
    if not config.finalists:
        return []
    rows = [reference, *best_of(config, parts)]
    found = []
    for row in rows:
        results = read_json(Path(config.run_dir) / "finalists" / row["name"] / "results.json")
        kept = {key: row[key] for key in ("name", "parameters", "flops", "cost")}
        found.append(kept | {"miou": results["best_miou"], "steps": results["steps"]})
        found[-1]["seconds"] = results["train_seconds"]
    if config.cost == "latency" and parts.reference is not None:
        passes = {"reference": parts.reference}
        for row in rows[1:]:
            model = build_model(ModelConfig(**row["shape"]), parts.train.labels, config.data.mean, config.data.std)
            passes[row["name"]] = make_ready(model, parts.size, config.latency)
        times = latencies(passes, replace(config.latency, rounds=4 * config.latency.rounds))
        for row in found:
            row["cost"] = ratio(times, row["name"]) * parts.reference_costs["latency"]
    return found


def shown(config: Config, row: Row) -> dict[str, str]:
    """A row of a table for people."""
    line = {"student": row["name"], "params": quantity(row["parameters"]), "FLOPs": quantity(row["flops"])}
    if config.cost == "latency":
        line["latency ms"] = significant(row["cost"])
    line["val mIoU %"] = percent(row.get("miou"))
    if "steps" in row:
        line["steps"] = str(row["steps"])
    if row.get("proxy") is not None:
        line["naswot"] = significant(row["proxy"])
    if row.get("seconds") is not None:
        line["training"] = duration(row["seconds"])
    return line


if __name__ == "__main__":
    run_script(main, Config, runs="teacher.run")
