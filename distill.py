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
from engine.run import Run, best_folder, start_run
from engine.stage import load_weights, train_stage
from engine.teachers import OfflineTeacher, TeacherConfig
from engine.tracking import TrackingConfig
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from losses.latent import Latents, Reconstruction
from losses.logits import KDConfig
from models import ModelConfig, SegmentationModel, build_model, fingerprint, load_model


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
    """The teacher; a run directory among the arguments names it."""
    student: ModelConfig = field(default_factory=ModelConfig)
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
        student = build_model(config.student, train.labels)  # before the teacher: the same weights as a baseline's
        teacher = load_teacher(config.teacher, train.labels.names)
        steps = config.train.total_steps(train)
        objective = DistillationLoss(
            config.losses,
            student.taps,
            teacher.taps,
            classes=len(train.labels.names),
            class_weights=train.class_weights,
            total_steps=steps,
        )
        run.describe(student, objective, train, teacher)
        offline = OfflineTeacher(teacher, run.accelerator.device, run.accelerator.autocast)
        taken = take_latents(run, objective.latents, config, teacher)
        announce(run, teacher, val)
        if not taken:
            train_latents(run, objective.latents, train, config, offline)
        run.finish(
            fit(run, student, objective, train, val, config.train, workers=config.data.workers, teacher=offline)
        )


def load_teacher(config: TeacherConfig, names: tuple[str, ...]) -> SegmentationModel:
    """The best weights of the teacher's run, which must know the same classes in the same order."""
    if not config.run:
        raise ConfigurationError("teacher.run: no teacher is named; give its run directory, say runs/teacher")
    teacher = load_model(best_folder(config.run))
    if teacher.class_names != list(names):
        raise ConfigurationError(
            f"teacher.run: {config.run} knows {len(teacher.class_names)} classes and the data set {len(names)}, "
            "or in another order; train a teacher on the classes of this data set"
        )
    return teacher


def announce(run: Run, teacher: SegmentationModel, val: object) -> None:
    """Prints the teacher's own score, so that a wrong teacher is noticed before the training and not after it."""
    scored = summarise(evaluate(run.accelerator, teacher, val), teacher.class_names)  # type: ignore[arg-type]
    run.say(f"teacher: val mIoU {100 * scored['miou']:.2f} %")


def take_latents(run: Run, latents: Latents, config: Config, teacher: SegmentationModel) -> bool:
    """Takes the encoders of knowledge adaptation from the file that is named; False if they must be trained."""
    file = config.losses.autoencoder.file
    if file and not latents.taps:
        raise ConfigurationError(
            "losses.autoencoder.file: no term uses it; add say losses.kta={}, or leave it out"
        )
    if not latents.taps:
        return True
    latents.made_for["teacher"] = fingerprint(teacher)
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
