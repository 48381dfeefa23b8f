"""Train a teacher, or any single model: the baseline is this script with a student's architecture.

one CPU or GPU   python train_teacher.py configs/demo_teacher.yaml
eight GPUs       accelerate launch --config_file configs/accelerate/eight_gpus.yaml train_teacher.py configs/…
go on            python train_teacher.py runs/teacher/config.yaml resume=true
"""

from dataclasses import dataclass, field

from data import DataConfig, build_dataset
from engine.config import run_script
from engine.loop import fit
from engine.player import Learner, TrainConfig
from engine.run import start_run
from engine.tracking import TrackingConfig
from errors import ConfigurationError
from losses import DistillationLoss, LossConfig
from models import ModelConfig, build_model


@dataclass
class Config:
    """What train_teacher.py can be told; each part is documented where it is defined."""

    run_dir: str = "runs/teacher"
    """Folder of the run."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    resume: bool = False
    """Go on with the run in `run_dir` from its newest checkpoint."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(width=32))
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    losses: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where to report."""


def main(config: Config) -> None:
    with start_run(config) as run:
        train, val = build_dataset(config.data, "train"), build_dataset(config.data, "val")
        if train.unlabelled:
            raise ConfigurationError("data.mix: unlabelled images need a teacher; use distill.py")
        model = build_model(config.model, train.labels, config.data.mean, config.data.std)
        steps = config.train.total_steps(train)
        objective = DistillationLoss(
            config.losses,
            model.taps,
            classes=len(train.labels.names),
            class_weights=train.class_weights,
            total_steps=steps,
        )
        run.describe({"model": model}, {"loss": objective}, train)
        run.finish(fit(run, [Learner(model, objective)], train, val, config.train, workers=config.data.workers))


if __name__ == "__main__":
    run_script(main, Config)
