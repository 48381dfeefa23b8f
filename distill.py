"""Distil a teacher into a student.

one CPU or GPU   python distill.py runs/teacher configs/camvid_cpu_distill.yaml
eight GPUs       accelerate launch --config_file configs/accelerate/eight_gpus.yaml distill.py runs/teacher …
go on            python distill.py runs/distilled/config.yaml resume=true
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from data import DataConfig, SegmentationData, build_dataset
from engine.config import run_script
from engine.loop import Teacher, evaluate, fit, summarise
from engine.player import TrainConfig
from engine.run import Run, on_main_process, start_run
from engine.stage import load_weights, train_stage
from engine.teachers import OfflineTeacher, TeacherConfig
from engine.tracking import TrackingConfig
from errors import ConfigurationError
from evaluation.metrics import chance_miou
from losses import DistillationLoss, LossConfig
from losses.latent import Latents, Reconstruction
from losses.logits import KDConfig
from models import (
    SegmentationModel,
    StudentConfig,
    build_model,
    fetch_folder,
    fingerprint,
    load_model,
    map_classes,
)


@dataclass
class Config:
    """What distill.py can be told; each part is documented where it is defined."""

    run_dir: str = "runs/distilled"
    """Folder of the run."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    resume: bool = False
    """Go on with the run in `run_dir` from its newest checkpoint."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher; a run directory or a model's folder among the arguments names it."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The student."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    losses: LossConfig = field(default_factory=lambda: LossConfig(kd=KDConfig()))
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where to report."""


def main(config: Config) -> None:
    with start_run(config) as run:
        train, val = build_dataset(config.data, "train"), build_dataset(config.data, "val")
        student = build_model(config.student, train.labels, config.data.mean, config.data.std)
        if config.teacher.hub:  # downloaded once, so that the other processes find it
            on_main_process(run.accelerator, lambda: str(fetch_folder(config.teacher.hub, "teacher.hub")))
        teacher = load_teacher(config.teacher, config.data, train.labels.names)
        steps = config.train.total_steps(train)
        objective = DistillationLoss(
            config.losses,
            student.taps,
            teacher.taps,
            classes=len(train.labels.names),
            class_weights=train.class_weights,
            total_steps=steps,
        )
        teacher_weights = fingerprint(teacher)
        run.describe(student, objective, train, teacher, teacher_weights)
        offline = OfflineTeacher(teacher, run.accelerator.device, run.accelerator.autocast)
        taken = take_latents(run, objective.latents, config, teacher_weights)
        announce(run, teacher, val, config.teacher)
        if not taken:
            train_latents(run, objective.latents, train, config, offline)
        run.finish(
            fit(run, student, objective, train, val, config.train, workers=config.data.workers, teacher=offline)
        )


def load_teacher(config: TeacherConfig, data: DataConfig, names: tuple[str, ...]) -> SegmentationModel:
    """The teacher's weights, for our normalisation of images, answering in our classes."""
    if not config.run and not config.hub:
        raise ConfigurationError(
            "teacher.run: no teacher is named; give its run directory, say runs/teacher, or teacher.hub=OWNER/NAME"
        )
    if config.run:
        teacher = load_model(config.run, "teacher.run")
    else:
        teacher = load_model(fetch_folder(config.hub, "teacher.hub"), "teacher.hub")
    teacher.take_images(data.mean, data.std)
    return map_classes(teacher, names, config.classes, config.absent)


def announce(run: Run, teacher: SegmentationModel, val: SegmentationData, config: TeacherConfig) -> None:
    """Prints the teacher's own score, so that a wrong teacher is noticed before the training and not after it.

    Raises:
        ConfigurationError: a teacher that is no run of ours has less than 3 % of what guesses lack of perfection.
    """
    matrix = evaluate(run.accelerator, teacher, val)
    score, guessed = 100 * summarise(matrix, teacher.class_names)["miou"], 100 * chance_miou(matrix)
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
    learner, workers = Reconstruction(latents), config.data.workers
    train_stage(run, "autoencoder", learner, latents.encoders, train, options, latents.made_for, workers, teacher)
    latents.freeze()


if __name__ == "__main__":
    run_script(main, Config, runs="teacher.run")
