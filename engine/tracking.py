"""What a run reports: one line of JSON an event, mirrored to Weights & Biases, which never stops a run."""

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

logger = logging.getLogger("segdistill")


@dataclass
class TrackingConfig:
    """Where a run reports to, besides its own metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases; without a network or a key, `online` falls back to `offline`."""
    project: str = "segdistill"
    """Project in Weights & Biases."""


def to_json(value: Any) -> Any:
    """Numbers, lists and mappings as JSON has them: what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, syncs it and renames it: the file is whole or is not there."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(to_json(value), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Metrics:
    """`metrics.jsonl`: one line an event, with "step", "epoch", "split" and values; times stand under "system"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(to_json(line)) + "\n")

    def sync(self) -> None:
        """Puts all lines on the disk, before a checkpoint that vouches for them."""
        if self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, and one that was cut off in writing."""
        if not self.path.exists():
            return
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                logger.info("%s: dropped a line that was cut off", self.path)
                continue
            if line["step"] <= step:
                kept.append(text + "\n")
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


class WandbMirror:
    """Sends the same values to Weights & Biases. What fails there is said once, and the run goes on."""

    def __init__(self, config: TrackingConfig, folder: Path, run_config: Any) -> None:
        self.run: Any = None
        if config.wandb == "disabled":
            return
        try:
            import wandb

            mode = config.wandb
            if mode == "online" and not wandb.api.api_key:
                logger.warning("tracking.wandb: no key, so the run is kept offline; `wandb sync` sends it later")
                mode = "offline"
            self.run = wandb.init(
                project=config.project,
                name=folder.name,
                dir=str(folder),
                mode=mode,
                config=asdict(run_config) if is_dataclass(run_config) else None,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True, init_timeout=30),
            )
        except Exception as error:  # noqa: BLE001 (a tracker's failure of whatever kind must not stop a run)
            self._give_up(error)

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run is not None:
            try:
                self.run.log(values, step=step)
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def finish(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:  # noqa: BLE001
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("tracking.wandb: %s: %s; the run goes on without it", type(error).__name__, error)
        self.run = None


def system_values(device: torch.device) -> dict[str, float]:
    """Memory in MiB and utilisation in per cent of this process, and of its GPU where there is one."""
    process = psutil.Process()
    values = {
        "process_memory_mib": process.memory_info().rss / 2**20,
        "cpu_percent": psutil.cpu_percent(),
    }
    if device.type == "cuda":
        values["device_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        try:
            values["gpu_percent"] = float(torch.cuda.utilization(device))
        except (ModuleNotFoundError, RuntimeError) as error:  # needs nvidia-ml-py and a driver that answers
            logger.debug("no GPU utilisation: %s", error)
    return values
