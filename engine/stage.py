"""A short training before the first step, of something that the objective needs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from engine.checkpoint import sync
from engine.loop import TrainingData, batches, train_step
from engine.player import Player, TrainConfig
from engine.run import Run, on_main_process
from errors import ConfigurationError, DamagedFileError, Terminated


def train_stage(
    run: Run,
    name: str,
    learner: Any,
    kept: nn.Module,
    train: TrainingData,
    config: TrainConfig,
    made_for: Mapping[str, str],
    workers: int = 0,
) -> None:
    """Trains `learner` (see `engine.player.Learner`) and writes the weights of `kept`, a part of it, to the run.

    They stand in `NAME.safetensors`, with `made_for`, what they depend on. A run that goes on takes them from
    there; one that was cut off during the stage begins it anew, and comes to the same weights.
    """
    path = run.folder / f"{name}.safetensors"
    if on_main_process(run.accelerator, path.exists):
        load_weights(kept, path, made_for, run)
        return
    if run.is_main:
        run.metrics.rewind(-1)
    player = Player(learner, config, run.accelerator)
    total = config.total_steps(train)
    stream = batches(run, train, config, 0, workers)
    values: dict[str, float] = {}
    for step, parts in enumerate(tqdm(stream, total=total, unit="step", desc=name, dynamic_ncols=True)):
        values, terminated = train_step(run, player, parts, step, total)
        if step == 0 or (step + 1) % config.log_every == 0 or step + 1 == total:
            run.log(0, 0, name, {"stage_step": step + 1, **values})
        if terminated and step + 1 < total:
            raise Terminated(f"{run.folder}: stopped by SIGTERM during {name}; begin it anew with resume=true")
    player.broadcast_buffers()
    if run.is_main:
        temporary = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in kept.state_dict().items()}, temporary, dict(made_for))
        sync(temporary)
        os.replace(temporary, path)
        sync(run.folder)
    player.retire()
    run.accelerator.wait_for_everyone()
    shown = ", ".join(f"{key} {value:.3g}" for key, value in values.items() if key.endswith("error"))
    run.say(f"{name}: {total} steps, {shown}; written: {path}")


def load_weights(kept: nn.Module, path: Path, made_for: Mapping[str, str], run: Run, key: str = "") -> None:
    """Takes the weights that `train_stage` wrote, of this run or of another.

    Args:
        key: of the configuration, which names the file, or its run, if it is not the run's own.

    Raises:
        ConfigurationError: no such file, or made for something else.
        DamagedFileError: not a whole safetensors file.
    """
    named = f"{key}: {path}" if key else str(path)
    advice = "name another" if key else "delete it to make it anew"
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{named}: no such file; name one that a run wrote, or the run") from error
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{named}: damaged ({error}); {advice}") from error
    for what, value in made_for.items():
        if found.get(what) != value:
            raise ConfigurationError(f"{named}: made for {what} {found.get(what)}, and here is {value}; {advice}")
    kept.load_state_dict(state)
    run.say(f"{path.stem}: taken from {path}")
