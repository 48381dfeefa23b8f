"""A short training before the first step, of something that the objective needs."""

import os
from typing import Any

from accelerate.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint import sync
from engine.loop import Teacher, TrainingData, to_device, train_step
from engine.player import Player, TrainConfig
from engine.run import Run
from errors import ConfigurationError, DamagedFileError, Terminated


def train_stage(
    run: Run,
    name: str,
    learner: Any,
    kept: nn.Module,
    train: TrainingData,
    config: TrainConfig,
    workers: int = 0,
    teacher: Teacher | None = None,
) -> None:
    """Trains `learner` (see `engine.player.Learner`) and writes the weights of `kept`, a part of it, to the run.

    They stand in `NAME.safetensors`. A run that goes on takes them from there; one that was cut off during the
    stage begins it anew, and comes to the same weights.
    """
    path = run.folder / f"{name}.safetensors"
    if path.exists():
        load_weights(kept, str(path), run)
        return
    if run.is_main:
        run.metrics.rewind(-1)
    accelerator = run.accelerator
    player = Player(learner, config, accelerator)
    total = config.total_steps(train)
    loader = train.train_loader(
        batch_size=config.batch_size,
        seed=run.seed,
        start_step=0,
        steps=total,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulate=config.accumulate,
        workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    stream = iter(loader)
    values: dict[str, float] = {}
    for step in tqdm(range(total), unit="step", desc=name, dynamic_ncols=True):
        parts = [to_device(next(stream), accelerator.device) for _ in range(config.accumulate)]
        values, terminated = train_step(run, player, parts, step, total, teacher)
        if step == 0 or (step + 1) % config.log_every == 0 or step + 1 == total:
            run.log(0, 0, name, {"stage_step": step + 1, **values})
        if terminated:
            raise Terminated(f"{run.folder}: stopped by SIGTERM during {name}; begin it anew with resume=true")
    player.broadcast_buffers()
    if run.is_main:
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in kept.state_dict().items()}, temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(run.folder)
    accelerator.wait_for_everyone()
    shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items() if key.endswith("error"))
    run.say(f"{name}: {total} steps, {shown}; written: {path}")


def load_weights(kept: nn.Module, path: str, run: Run) -> None:
    """Takes the weights that `train_stage` wrote, of this run or of another.

    Raises:
        ConfigurationError: no such file, or of other shapes.
        DamagedFileError: not a whole safetensors file.
    """
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file; name one that a run wrote") from error
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path}: damaged ({error}); delete it to make it anew") from error
    try:
        kept.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ConfigurationError(f"{path}: does not fit this configuration ({reason}); use another") from error
    run.say(f"taken from {path}")
