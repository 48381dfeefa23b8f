"""Distil a teacher into a student.

one CPU or GPU   python distill.py runs/teacher configs/camvid_cpu_distill.yaml
eight GPUs       accelerate launch --config_file configs/accelerate/eight_gpus.yaml distill.py runs/teacher …
a cached teacher python distill.py runs/teacher configs/camvid_cpu_distill.yaml teacher.source=cache
learn together   python distill.py configs/demo_distill.yaml mode=online online.alternate=step
go on            python distill.py runs/distilled/config.yaml resume=true

docs/paradigms.md has a paragraph and a command on each way of teaching.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from data import DataConfig, SegmentationData, build_dataset
from deploy.quantize import quantize_int8
from engine.cache import CachedTeacher, open_cache
from engine.config import run_script
from engine.loop import add_up, evaluate, fit, summarise
from engine.player import Learner, TrainConfig
from engine.run import Run, on_main_process, start_chain, start_run
from engine.stage import load_weights, train_stage
from engine.teachers import LiveTeacher, OwnTeacher, PeerTeacher, Teacher, TeacherConfig, own_autocast
from engine.tracking import TrackingConfig
from errors import ConfigurationError, Terminated
from evaluation.metrics import chance_miou
from losses import DistillationLoss, LossConfig
from losses.latent import Latents, Reconstruction
from losses.logits import KDConfig
from models import (
    Mapped,
    ModelConfig,
    SegmentationModel,
    StudentConfig,
    build_model,
    fetch_folder,
    fingerprint,
    load_model,
    map_classes,
)

Objective = Callable[
    [LossConfig, SegmentationModel, SegmentationModel | None], DistillationLoss
]  # of pupil, teacher


@dataclass
class OnlineConfig:
    """Those who learn beside the student in online distillation: a teacher, or fellow students."""

    models: list[ModelConfig] = field(default_factory=lambda: [ModelConfig(width=32)])
    """One is the student's teacher, and begins with the weights of `teacher.run` where that is given; of several,
    and the student, each learns from all others."""
    alternate: Literal["none", "step", "epoch"] = "none"
    """none: all learn at every step. step, epoch: they learn by turns, the teacher first, a step or an epoch
    each."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Their objective; terms that compare with a teacher compare with the student and the other fellows."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """Their optimizer; null: train.optimizer."""
    lr: float | None = None
    """Their highest learning rate; null: train.lr."""
    weight_decay: float | None = None
    """Their weight decay; null: train.weight_decay."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigurationError("online.models: empty; give one model or more, say [{width: 32}]")


@dataclass
class Config:
    """What distill.py can be told; each part is documented where it is defined."""

    run_dir: str = "runs/distilled"
    """Folder of the run."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    resume: bool = False
    """Go on with the run in `run_dir` from its newest checkpoint."""
    mode: Literal["offline", "online"] = "offline"
    """offline: the teacher is there before, see teacher.source. online: it learns beside the student."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher; a run directory or a model's folder among the arguments names it."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""
    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Who learns beside the student in mode=online."""
    assistants: list[StudentConfig] = field(default_factory=list)
    """Students between teacher and student, each taught by the one before; each link is a run of its own."""
    generations: int = 1
    """How often the student is trained anew, each time taught by its former self (born-again networks)."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    losses: LossConfig = field(default_factory=lambda: LossConfig(kd=KDConfig()))
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where to report."""

    def __post_init__(self) -> None:
        if self.generations < 1:
            raise ConfigurationError(f"generations: {self.generations} is too few; give 1 or more")
        chain = "assistants" if self.assistants else "generations" if self.generations > 1 else ""
        if chain and (self.mode == "online" or self.teacher.own):
            raise ConfigurationError(f"{chain}: a chain needs mode=offline and a teacher; leave one of them out")
        if chain and self.losses.autoencoder.file:
            raise ConfigurationError(
                f"losses.autoencoder.file: is of one teacher, and {chain} has several; leave one of them out"
            )
        if self.mode == "online":
            known = ("run", "hub", "classes", "absent", "averaging")
            self.teacher.only(*known, where="mode=online")
        if self.teacher.source == "average" and not self.train.ema:
            raise ConfigurationError("train.ema: teacher.source=average is the average of weights; give say 0.99")


def main(config: Config) -> None:
    chain = links(config)
    if len(chain) > 1:
        start_chain(config)
    for link in chain[:-1]:
        if not (config.resume and (Path(link.run_dir) / "results.json").exists()):
            distil(link, more=True)
    distil(chain[-1])


def links(config: Config) -> list[Config]:
    """The runs of a chain, RUN_DIR/1, RUN_DIR/2, …, each taught by the one before; without assistants, one run.

    The last has the seed of the configuration, the one before it the next, and so on: another generation starts
    with other weights.
    """
    students = [*config.assistants, *[config.student] * config.generations]
    if len(students) == 1:
        return [config]
    chain: list[Config] = []
    for number, student in enumerate(students, 1):
        teacher = config.teacher
        if chain:
            cache = replace(teacher.cache, folder="")
            teacher = replace(
                teacher, run=chain[-1].run_dir, hub="", runs=[], classes={}, absent=[], size=None, cache=cache
            )
        link = replace(config, run_dir=f"{config.run_dir}/{number}", seed=config.seed + len(students) - number)
        chain.append(replace(link, student=student, teacher=teacher, assistants=[], generations=1))
    return chain


def distil(config: Config, more: bool = False) -> None:
    with start_run(config, more=more) as run:
        train, val = build_dataset(config.data, "train"), build_dataset(config.data, "val")
        student = build_model(config.student, train.labels, config.data.mean, config.data.std)
        objective = objective_for(train, config.train.total_steps(train))

        if config.mode == "online":
            learners = learn_together(run, config, student, train, objective)
        elif config.teacher.own:
            goal = objective(config.losses, student, student)
            need_a_taught_term(goal, f"teacher.source={config.teacher.source}")
            need_no_latents(goal, f"teacher.source={config.teacher.source}")
            run.describe({"student": student}, {"loss": goal}, train)
            learners = [Learner(student, goal, OwnTeacher(run.accelerator.autocast, config.teacher))]
        else:
            learners = [learn_from_frozen(run, config, student, train, val, objective)]
        run.finish(fit(run, learners, train, val, config.train, workers=config.data.workers))
        ended = add_up(run.accelerator, torch.tensor([float(run.terminated)], device=run.accelerator.device))
        if more and ended > 0:
            raise Terminated(
                f"{run.folder}: finished, stopped by SIGTERM before the next link; go on with resume=true"
            )


def objective_for(train: SegmentationData, steps: int) -> Objective:
    """Makes objectives for trainings of so many steps on a data set."""

    def objective(
        losses: LossConfig, pupil: SegmentationModel, teacher: SegmentationModel | None
    ) -> DistillationLoss:
        return DistillationLoss(
            losses,
            pupil.taps,
            None if teacher is None else teacher.taps,
            classes=len(train.labels.names),
            class_weights=train.class_weights,
            total_steps=steps,
            unlabelled=train.unlabelled,
        )

    return objective


def learn_from_frozen(
    run: Run,
    config: Config,
    student: SegmentationModel,
    train: SegmentationData,
    val: SegmentationData,
    objective: Objective,
) -> Learner:
    """The student of a teacher that is there before, live or in a cache."""
    models = load_teachers(run, config, train.labels.names)
    goal = objective(config.losses, student, models[0])
    if train.unlabelled:
        need_a_taught_term(goal, "unlabelled images in data.mix")
    weights = "+".join(fingerprint(model) for model in models)
    sources = [config.teacher.run or config.teacher.hub, *config.teacher.runs]
    numbers = [""] if len(models) == 1 else [f" {number}" for number in range(1, len(models) + 1)]
    called = [f"teacher{number}, {source}" for number, source in zip(numbers, sources, strict=True)]
    run.describe({"student": student, **dict(zip(called, models, strict=True))}, {"loss": goal}, train, weights)
    taken = take_latents(run, goal.latents, config, weights)
    live = make_live(run, config, models, train)
    announce(run, live, val, config.teacher)
    cached = make_cached(run, config, live, weights, goal) if config.teacher.source == "cache" else None
    if not taken:
        stage_teacher = cached or (lambda batch, taps: live.answer(batch.images, taps))
        train_latents(run, goal.latents, train, config, stage_teacher)
    return Learner(student, goal, cached or live)


def learn_together(
    run: Run,
    config: Config,
    student: SegmentationModel,
    train: SegmentationData,
    objective: Objective,
) -> list[Learner]:
    """The student and those who learn beside it, each with its objective, its teacher and its turn."""
    online, names = config.online, train.labels.names
    fellows = [build_model(model, train.labels, config.data.mean, config.data.std) for model in online.models]
    begun_with = None
    if config.teacher.run or config.teacher.hub:
        fellows[0] = load_teachers(run, config, names)[0]
        if isinstance(fellows[0], Mapped):
            raise ConfigurationError(
                "teacher.run: its classes are not those of the data set, and in mode=online it learns itself; "
                "give one of these classes, or mode=offline"
            )
        begun_with = fingerprint(fellows[0])
    called = ["teacher"] if len(fellows) == 1 else [f"fellow{number}" for number in range(1, len(fellows) + 1)]
    goal = objective(config.losses, student, fellows[0])
    goals = [objective(online.losses, fellow, student) for fellow in fellows]
    need_a_taught_term(goal, "mode=online")
    for one in (goal, *goals):
        need_no_latents(one, "mode=online")

    steps = config.train.total_steps(train)
    length = {"none": 0, "step": 1, "epoch": train.steps_per_epoch(config.train.batch_size)}[online.alternate]

    if steps < length * (len(fellows) + 1):
        raise ConfigurationError(
            f"online.alternate: {steps} steps are too few for a turn of each at {length} steps a turn; "
            "raise train.steps, or give alternate=step"
        )

    def turn(number: int) -> Callable[[int], bool] | None:
        return (lambda step: step // length % (len(fellows) + 1) == number) if length else None

    options = {key: getattr(online, key) for key in ("optimizer", "lr", "weight_decay")}
    options = {key: value for key, value in options.items() if value is not None}
    learners = [Learner(student, goal, turn=turn(len(fellows)))]
    for number, (fellow, theirs) in enumerate(zip(fellows, goals, strict=True)):
        learners.append(Learner(fellow, theirs, name=called[number], options=options, turn=turn(number)))
        if not length:
            learners[-1].tells = goal.teacher_taps if number == 0 else []
    for learner in learners:
        others = [other for other in learners if other is not learner]
        heard = others if learner is learners[0] else [learners[0], *[o for o in others if o is not learners[0]]]
        learner.teacher = PeerTeacher(heard, run.accelerator.autocast, config.teacher)
    source = config.teacher.run or config.teacher.hub
    described = {
        f"{name}, {source}" if source and name == called[0] else name: m
        for name, m in zip(called, fellows, strict=True)
    }
    run.describe(
        {"student": student, **described},
        {"loss": goal, **{f"loss of {name}": theirs for name, theirs in zip(called, goals, strict=True)}},
        train,
        begun_with,
    )
    return learners


def need_a_taught_term(objective: DistillationLoss, where: str) -> None:
    """Raises ConfigurationError if no term compares with a teacher."""
    if not any(term.taught for term in objective.terms.values()):
        raise ConfigurationError(f"losses: with {where}, and none compares with a teacher; add say losses.kd={{}}")


def need_no_latents(objective: DistillationLoss, where: str) -> None:
    """Raises ConfigurationError if a term needs an autoencoder, which a teacher that still learns has not."""
    if objective.latents.taps:
        raise ConfigurationError(
            f"losses.kta: {where} has no frozen teacher for an autoencoder; leave kta out, and give "
            "losses.affinity.space=raw"
        )


def load_teachers(run: Run, config: Config, names: tuple[str, ...]) -> list[SegmentationModel]:
    """The teachers' weights, for our normalisation of images, answering in our classes; first `run` or `hub`."""
    said = config.teacher
    if not said.run and not said.hub:
        raise ConfigurationError(
            "teacher.run: no teacher is named; give its run directory, say runs/teacher, or teacher.hub=OWNER/NAME"
        )
    if said.hub:  # downloaded once, so that the other processes find it
        on_main_process(run.accelerator, lambda: str(fetch_folder(said.hub, "teacher.hub")))
    first = fetch_folder(said.hub, "teacher.hub") if said.hub else said.run
    sources = [
        (first, "teacher.hub" if said.hub else "teacher.run"),
        *[(each, "teacher.runs") for each in said.runs],
    ]
    return [load_teacher(source, key, said, config.data, names) for source, key in sources]


def load_teacher(
    source: str | Path, key: str, config: TeacherConfig, data: DataConfig, names: tuple[str, ...]
) -> SegmentationModel:
    """The weights that stand in a run or a folder, which `key` names."""
    teacher = load_model(source, key)
    teacher.take_images(data.mean, data.std)
    return map_classes(teacher, names, config.classes, config.absent)


def make_live(run: Run, config: Config, models: list[SegmentationModel], train: SegmentationData) -> LiveTeacher:
    """The frozen teachers at their precision."""
    said, device = config.teacher, run.accelerator.device
    training = nullcontext if said.source == "cache" else run.accelerator.autocast
    ready: list[nn.Module] = list(models)
    if said.precision == "int8":
        if device.type != "cpu":
            raise ConfigurationError("teacher.precision: int8 is for CPUs; give bf16 or fp16 on a GPU")
        images = [train.sample((-1, index, index), seed=0).images for index in range(min(8, len(train)))]
        ready = [quantize_int8(model, images) for model in models]
    return LiveTeacher(ready, device, own_autocast(said.precision, device, training), said)


def make_cached(
    run: Run, config: Config, live: LiveTeacher, weights: str, objective: DistillationLoss
) -> CachedTeacher:
    """The cache of the teacher's answers to the whole training images, filled as far as it is not."""
    said, data = config.teacher, config.data
    if said.cache.storage == "uint8" and objective.needs_true_logits:
        raise ConfigurationError(
            f"losses.{objective.needs_true_logits[0]}: compares logits across positions, and uint8 keeps of each "
            "pixel's only how far they are below the highest; give teacher.cache.storage=float16"
        )
    if data.copy_paste:
        raise ConfigurationError(
            "data.copy_paste: the cache has not seen what is pasted; give teacher.source=live, or leave it out"
        )
    whole = build_dataset(replace(data, size=said.size or data.size), "train")
    folder = Path(said.cache.folder or Path(said.run or f"runs/cache/{said.hub.replace('/', '--')}") / "cache")
    key = {
        "teacher": weights,
        "images": f"mean {data.mean}, std {data.std}, size {said.size or data.size}",
        "views": f"scales {said.scales}, flip {said.flip}, averaging {said.averaging}",
        "data": whole.manifest_hash(),
        "precision": "fp32" if said.precision == "train" else said.precision,
        "classes": f"{', '.join(whole.labels.names)}; {said.classes or 'by name'}; without {said.absent}",
    }
    return open_cache(run, live, whole, folder, key, objective.teacher_taps, said.cache)


def announce(run: Run, teacher: LiveTeacher, val: SegmentationData, config: TeacherConfig) -> None:
    """Prints the teacher's own score, so that a wrong teacher is noticed before the training and not after it.

    Raises:
        ConfigurationError: a teacher that is no run of ours has less than 3 % of what guesses lack of perfection.
    """
    matrix = evaluate(run.accelerator, teacher.as_model(), val)
    score, guessed = 100 * summarise(matrix, val.labels.names)["miou"], 100 * chance_miou(matrix)
    run.say(f"teacher: val mIoU {score:.2f} %")
    if score - guessed >= 0.03 * (100 - guessed):
        return
    said = f"val mIoU {score:.2f} % is near chance ({guessed:.2f} % for guesses as frequent as its answers)"
    ours = bool(config.run) and (Path(config.run) / "config.yaml").exists()
    if ours or config.accept_near_chance:
        run.say(f"teacher: WARNING: {said}")
        return
    raise ConfigurationError(
        f"teacher.{'run' if config.run else 'hub'}: {config.run or config.hub}: {said}; check its classes "
        "(teacher.classes) and its preprocessor_config.json, or say teacher.accept_near_chance=true"
    )


def take_latents(run: Run, latents: Latents, config: Config, teacher_weights: str) -> bool:
    """Takes the encoders of knowledge adaptation from the file that is named; False if they must be trained."""
    file = config.losses.autoencoder.file
    if file and not latents.taps:
        raise ConfigurationError(
            "losses.autoencoder.file: no term uses it; add say losses.kta={}, or leave it out"
        )
    if not latents.taps:
        return True
    latents.made_for["teacher"] = teacher_weights
    if not file:
        return False
    path = Path(file) / "autoencoder.safetensors" if Path(file).is_dir() else Path(file)
    load_weights(latents.encoders, path, latents.made_for, run, "losses.autoencoder.file")
    return True


def train_latents(run: Run, latents: Latents, train: SegmentationData, config: Config, teacher: Teacher) -> None:
    """Stage 1 of knowledge adaptation: the autoencoders of the teacher's features."""
    stage = config.losses.autoencoder
    steps = max(1, round(stage.epochs * train.steps_per_epoch(config.train.batch_size)))
    options = replace(config.train, epochs=None, steps=steps, optimizer="sgd", lr=stage.lr, ema=0.0)
    learner, workers = Reconstruction(latents, teacher), config.data.workers
    train_stage(run, "autoencoder", learner, latents.encoders, train, options, latents.made_for, workers)
    latents.freeze()


if __name__ == "__main__":
    run_script(main, Config, runs="teacher.run")
