"""Who learns, and by which rules: the training's configuration, a model with its objective, its optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.teachers import Answer, LiveTeacher, OwnTeacher, Teacher, perturbed
from errors import ConfigurationError


@dataclass
class TrainConfig:
    """How to train."""

    steps: int = 400
    """Optimizer steps; `epochs`, if given, takes precedence."""
    epochs: int | None = None
    """Passes over the training images, in place of `steps`."""
    batch_size: int = 8
    """Images of one step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts in which a step's images are worked through, to save memory; the gradient is that of the whole."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    lr: float = 3e-3
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decays of AdamW's two averages."""
    weight_decay: float = 1e-2
    """Weight decay of convolutions; biases and normalisation have none."""
    resolution: list[float] = field(default_factory=lambda: [1.0])
    """Sizes of the training images as factors, each for an equal share of training: [0.5, 1.0] begins with small
    ones. A frozen teacher sees them at their full size."""
    schedule: Literal["poly", "cosine"] = "poly"
    """Decay of the learning rate: (1 - progress)^power, or half a cosine."""
    power: float = 0.9
    """Power of the polynomial schedule."""
    warmup: Union[int, float] = 0.05  # noqa: UP007 (OmegaConf tells 5 from 0.5 by it)
    """Linear rise of the learning rate at the start: an integer is steps, a float a fraction of training."""
    clip: float = 5.0
    """Largest norm of the gradient; 0 leaves it alone."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and saved; 0: none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks in training; losses and evaluation are in float32 always. fp16 needs CUDA."""
    deterministic: bool = False
    """Deterministic kernels on a GPU too, where they are slower; on a CPU they always are."""
    threads: int = 0
    """CPU threads of each process; 0 leaves PyTorch's choice."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: at the end only. There is always one at the end."""
    checkpoint_every: int = 200
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 20
    """Steps over which logged values are averaged."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with exit code 4, or skip that step's update and count it."""

    def __post_init__(self) -> None:
        for key in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ConfigurationError(f"train.{key}: {getattr(self, key)} is too small; give 1 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigurationError(f"train.lr: {self.lr} is not a learning rate; give a finite positive number")
        if (self.steps if self.epochs is None else self.epochs) < 1:
            raise ConfigurationError("train.steps: there is nothing to train; give 1 or more steps or epochs")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(f"train.betas: {self.betas} is not two decays from 0 to 1; give [0.9, 0.999]")
        if not self.resolution or not all(0 < factor <= 1 for factor in self.resolution):
            raise ConfigurationError(f"train.resolution: {self.resolution} are no factors; give say [0.5, 1.0]")
        if not 0 <= self.ema < 1:
            raise ConfigurationError(f"train.ema: {self.ema} is not a decay; give 0 for none, or say 0.999")

    def total_steps(self, data: Any) -> int:
        """Optimizer steps of the whole training."""
        return self.steps if self.epochs is None else self.epochs * data.steps_per_epoch(self.batch_size)


class Learner(nn.Module):
    """A model and its objective in one module, so that they are wrapped, moved and saved together.

    What a player steps is a module like this one: `wanted(step)`, `counts(labels)`, `active(step)`, and
    `forward(images, labels, answer, step, denominators) -> (loss, values to log)`; it may have `memories`, the
    names of buffers that all processes write alike.

    Args:
        model: answers `model(images, taps)`.
        objective: a `losses.DistillationLoss`.
        teacher: whom it learns from; None where no term needs one.
        name: what its values are logged under, and its folder in the run; empty for the first of a run.
        options: in which its training differs from the run's TrainConfig.
        turn: whether it learns at a step; always, if None.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Any,
        teacher: Teacher | None = None,
        *,
        name: str = "",
        options: Mapping[str, Any] | None = None,
        turn: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.teacher, self.name, self.options, self.turn = teacher, name, dict(options or {}), turn
        self.memories = [f"objective.{name}" for name in objective.memories]
        self.tells: Sequence[str] | None = None  # the taps that fellows listen to; None: nobody listens
        self.forget()

    def forget(self) -> None:
        """Lets go of what it said."""
        self.latest: Answer | None = None
        self.said: list[tuple[Any, Answer]] = []  # the parts of its last step and what it said of them

    def wanted(self, step: int) -> Sequence[str] | None:
        """The teacher's taps that a step needs; None where it needs no teacher."""
        return self.objective.teacher_taps_at(step) if self.objective.needs_teacher(step) else None

    def counts(self, labels: Tensor) -> Tensor:
        return self.objective.counts(labels)

    def active(self, step: int) -> bool:
        """Whether it is its turn to learn."""
        return self.turn is None or self.turn(step)

    def forward(self, images: Tensor, labels: Tensor, answer: Any, step: int, denominators: Tensor) -> Any:
        if isinstance(self.teacher, OwnTeacher) and self.teacher.config.perturb:
            images = perturbed(images, self.teacher.config.perturb)
        output = self.model(images, sorted({*self.objective.student_taps, *(self.tells or ())}))
        if self.tells is not None:
            features = {tap: output.features[tap].detach() for tap in self.tells}
            self.latest = Answer(output.logits.detach(), features)
        if isinstance(self.teacher, LiveTeacher) and answer is not None:
            self.teacher.wait(answer)
        return self.objective(output, answer, labels, step=step, denominators=denominators, images=images)


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution that autocast leaves in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def keep_dilated_depthwise_in_full_precision(module: nn.Module) -> None:
    """Turns the dilated depthwise convolutions of a module into FullPrecisionConv2d; names and weights stay.

    In bf16 and channels-last, oneDNN's gradient of their weights is wrong by orders of magnitude on CPUs with bf16
    units (PyTorch 2.13, stride 1): it reads memory that it has not written. Their share of the work is small.
    """
    for part in module.modules():
        if type(part) is nn.Conv2d and part.groups == part.in_channels > 1 and max(part.dilation) > 1:
            part.__class__ = FullPrecisionConv2d


class Player:
    """One that learns: a learner wrapped for its devices, its optimizer, and the average of its weights."""

    def __init__(self, learner: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
        learner.to(accelerator.device).to(memory_format=torch.channels_last)
        if accelerator.device.type == "cpu":
            keep_dilated_depthwise_in_full_precision(learner)
        self.learner, self.config, self.accelerator = learner, config, accelerator
        self.memories = set(getattr(learner, "memories", ()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, self.memories)
        self.optimizer = accelerator.prepare_optimizer(build_optimizer(learner, config))
        self.wrapped = accelerator.prepare_model(learner)
        if isinstance(learner, Learner) and isinstance(learner.teacher, OwnTeacher):
            learner.teacher.player = self
        average = get_ema_multi_avg_fn(config.ema)
        self.ema = AveragedModel(learner.model, multi_avg_fn=average) if config.ema else None

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and saved: their average if there is one."""
        return self.learner.model if self.ema is None else self.ema.module

    def retire(self) -> None:
        """Takes it out of what Accelerate holds and unscales, when its part is played."""
        held = self.accelerator._models
        held[:] = [model for model in held if model is not self.wrapped and model is not self.learner]
        self.accelerator._optimizers.remove(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    @property
    def statistics(self) -> list[Tensor]:
        """The learner's buffers but for its memories: batch-norm's statistics."""
        return [buffer for name, buffer in self.learner.named_buffers() if name not in self.memories]

    def broadcast_buffers(self) -> None:
        """Gives every process the batch-norm statistics of the first, before they are evaluated or saved."""
        if self.accelerator.num_processes > 1:
            # The average's own count is on the CPU, where NCCL does not reach, and the same everywhere.
            for buffer in [*self.statistics, *(self.ema.module.buffers() if self.ema is not None else ())]:
                torch.distributed.broadcast(buffer, src=0)


def build_optimizer(learner: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; vectors (biases, normalisation) are not decayed."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def resolution(step: int, total: int, config: TrainConfig) -> float:
    """The factor of the images' size at `step` (from 0) of `total`."""
    return config.resolution[min(len(config.resolution) * step // max(1, total), len(config.resolution) - 1)]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of `step` (from 0) of `total`."""
    warmup = config.warmup if isinstance(config.warmup, int) else round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if config.schedule == "poly":
        return config.lr * (1 - progress) ** config.power
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
