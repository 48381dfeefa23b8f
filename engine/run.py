"""A run: its folder, its processes, its signals and its end."""

import importlib.metadata
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.checkpoint import recover_folder
from engine.config import save, to_yaml
from engine.player import TrainConfig
from engine.tracking import Metrics, TrackingConfig, WandbMirror, system_values, write_json
from errors import ConfigurationError, DamagedFileError, UserError

# Keys that may change when a run goes on: they don't change its numbers.
FREE_KEYS = (
    "run_dir",
    "resume",
    "tracking.",
    "data.workers",
    "data.root",
    "train.checkpoint_every",
    "train.keep",
    "teacher.cache.folder",
    "trials",  # of a search: how far it goes, and how many processes work on it
    "finalists",
    "worker",
)
# What a run leaves that ended before its first step, over a wrong path say: it may simply be started again.
BEFORE_FIRST_STEP = ("config.yaml", "environment.json", "wandb")
PACKAGES = ("torch", "accelerate", "transformers", "numpy", "opencv-python-headless", "omegaconf", "wandb")


class RunConfig(Protocol):
    """What a run needs of a script's configuration."""

    run_dir: str
    seed: int
    resume: bool
    train: TrainConfig
    tracking: TrackingConfig


class Run:
    """One training in one folder, shared by all of its processes.

    Args:
        config: the resolved configuration of the script.
        accelerator: Accelerate's view of devices, processes and precision.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.run_dir)
        self.seed = config.seed
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self.terminated = False  # SIGTERM arrived at this process
        self.mirror: WandbMirror | None = None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, message: str) -> None:
        """Prints a line, on the main process alone."""
        self.accelerator.print(message, flush=True)

    def log(self, step: int, epoch: int, split: str, values: dict[str, Any], **system: float) -> None:
        """Writes one event to metrics.jsonl and to W&B, on the main process alone.

        Args:
            system: times and speeds, to which memory and utilisation are added; they stand under "system", apart
                from what a repeated run repeats.
        """
        if self.is_main:
            system |= system_values(self.accelerator.device)
            self.metrics.append({"step": step, "epoch": epoch, "split": split, **values, "system": system})
            assert self.mirror is not None
            flat = {f"{split}/{key}": value for key, value in values.items() if not isinstance(value, dict)}
            self.mirror.log(flat | {f"system/{key}": value for key, value in system.items()}, step)

    def describe(
        self,
        models: Mapping[str, Any],
        objectives: Mapping[str, Any],
        data: Any,
        teacher_weights: str | None = None,
    ) -> None:
        """Prints what takes part and writes environment.json.

        Args:
            models: by what they are called here, `student` say, or `teacher, runs/teacher`.
            objectives: by what is printed before their terms.
            teacher_weights: their fingerprint; a run that goes on needs the same.

        Raises:
            ConfigurationError: the run goes on, and images, labels or teacher are no longer those of its start.
        """
        for called, model in models.items():
            role, _, source = called.partition(", ")
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            what = f"{model.architecture}, {millions:.2f} M parameters, stride {model.stride}"
            self.say(f"{role}: {source + ', ' if source else ''}{what}")
            for note in model.notes():
                self.say(f"{role}: {note}")
        self.say(f"data: {len(data)} images, {len(data.labels.names)} classes")
        for note in data.notes():
            self.say(f"data: {note}")
        for called, objective in objectives.items():
            for line in objective.describe():
                self.say(f"{called}: {line}")
        inputs = {"data_manifest": data.manifest_hash(), "teacher_weights": teacher_weights}
        on_main_process(self.accelerator, lambda: self._write_environment(inputs))

    def _write_environment(self, inputs: dict[str, str | None]) -> None:
        path = self.folder / "environment.json"
        if self.config.resume and path.exists():
            began = read_json(path)
            words = {"data_manifest": "images or labels", "teacher_weights": "weights of the teacher"}
            for name, value in inputs.items():
                if began.get(name, value) != value:
                    raise ConfigurationError(
                        f"{path}: the run began with other {words[name]} than there are now; "
                        "restore the files, or begin in another run_dir"
                    )
        write_json(path, environment(self.accelerator, **inputs))

    def finish(self, results: dict[str, Any]) -> None:
        """Writes results.json, which marks the run as finished."""
        if self.is_main:
            write_json(self.folder / "results.json", results)
        for name, one in {"": results, **{k: v for k, v in results.items() if isinstance(v, dict)}}.items():
            if "best_miou" in one:
                miou, best = 100 * one["miou"], 100 * one["best_miou"]
                self.say(f"finished: {name} val mIoU {miou:.2f} %, best {best:.2f} %".replace("  ", " "))
        self.say(f"written: {self.folder}")


@contextmanager
def start_run(config: RunConfig, *, more: bool = False) -> Iterator[Run]:
    """Opens a run: processes, folder, resolved configuration, tracker and SIGTERM, which saves and then ends it.

    Args:
        more: whether other runs follow in the same processes.

    Raises:
        ConfigurationError: the launcher started fewer processes than it was asked for, fp16 without CUDA, the
            folder exists (or, to go on, holds a run of another configuration).
        SystemExit: 0 if the run to go on with is finished.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    accelerator = start_accelerator(config.train)
    torch.manual_seed(config.seed)
    run = Run(config, accelerator)

    if on_main_process(accelerator, lambda: _open_folder(config)) == "finished":
        run.say(f"{run.folder}: finished; its figures are in results.json (delete the folder to begin anew)")
        raise SystemExit(0)
    if run.is_main:
        run.mirror = WandbMirror(config.tracking, run.folder, config)

    def on_sigterm(*_: Any) -> None:
        run.terminated = True

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield run
    finally:
        signal.signal(signal.SIGTERM, previous)
        if run.mirror is not None:
            run.mirror.finish()
        if torch.distributed.is_initialized() and sys.exc_info()[0] is None and not more:
            accelerator.end_training()


def start_chain(config: RunConfig) -> None:
    """Opens the folder of several runs that belong together, each below it: it holds what all of them are made of.

    Raises:
        ConfigurationError: as `start_run`.
    """
    on_main_process(start_accelerator(config.train), lambda: _open_folder(config))


def on_main_process(accelerator: Accelerator, action: Any) -> Any:
    """Runs `action()` on the main process; its result, or its UserError, is that of every process."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def start_accelerator(train: TrainConfig) -> Accelerator:
    """Accelerate on the GPU if there is one, else on the CPU, with as many processes as were asked for."""
    cuda = torch.cuda.is_available()
    if train.precision == "fp16" and not cuda:
        raise ConfigurationError("train.precision: fp16 needs a CUDA GPU and there is none; give bf16 or fp32")
    if "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigurationError(
            "accelerate launch: asked for several processes, it started one; launch with "
            "--config_file configs/accelerate/two_cpu.yaml, whose distributed_type is MULTI_GPU on CPUs too"
        )
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if train.threads:
        torch.set_num_threads(train.threads)
    # On GPUs synchronised batch-norm keeps its statistics equal; on CPUs each step takes those of process 0.
    buffers = DistributedDataParallelKwargs(broadcast_buffers=not cuda)
    precision = "no" if train.precision == "fp32" else train.precision
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision, kwargs_handlers=[buffers])
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ConfigurationError(
            f"WORLD_SIZE: {asked} processes were asked for and {accelerator.num_processes} work together; "
            "launch with one of configs/accelerate/"
        )
    return accelerator


def _open_folder(config: RunConfig) -> str | None:
    """Makes the run's folder, or checks that the run in it may go on; "finished" where there is nothing to do."""
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"run_dir: {folder} is a file; name another folder")
    began = folder.is_dir() and any(path.name not in BEFORE_FIRST_STEP for path in folder.iterdir())
    if began:
        if not config.resume:
            raise ConfigurationError(
                f"run_dir: {folder} exists; go on with resume=true, name another folder, or delete it"
            )
        if saved.exists():
            changed = changed_keys(saved, config)
            if changed:
                raise ConfigurationError(
                    f"{changed[0]}: differs from {saved}, so the run can't go on; "
                    f"resume with {saved} itself, or begin in another run_dir"
                )
            if (folder / "results.json").exists():
                return "finished"
            for holder in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                recover_folder(holder / "best")
            return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(config, saved)
    except PermissionError as error:
        raise ConfigurationError(f"run_dir: can't write to {folder} ({error.strerror}); name another") from error
    return None


def changed_keys(saved: Path, config: Any) -> list[str]:
    """Dotted keys in which the configuration differs from the saved one, but for those that may change."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
        return {prefix.rstrip("."): value}

    try:  # a key that the saved one does not have yet had its default
        whole = OmegaConf.merge(OmegaConf.structured(type(config)), OmegaConf.load(saved))
    except OmegaConfBaseException as error:
        return [error.full_key or str(saved)]
    before: Any = flatten(OmegaConf.to_container(whole, enum_to_str=True))
    now: Any = flatten(OmegaConf.to_container(OmegaConf.create(to_yaml(config))))
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [key for key in different if not key.startswith(FREE_KEYS)]


def environment(
    accelerator: Accelerator, data_manifest: str | None, teacher_weights: str | None = None
) -> dict[str, Any]:
    """What a number depends on besides the configuration."""
    device = accelerator.device

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None  # not a checkout: the revision is unknown, and said to be
        return done.stdout.strip()

    status = git("status", "--porcelain")
    return {
        "revision": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
        "data_manifest": data_manifest,
        **({"teacher_weights": teacher_weights} if teacher_weights else {}),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_json(path: Path) -> Any:
    """What a run wrote to a JSON file.

    Raises:
        ConfigurationError: the file does not exist.
        DamagedFileError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file; name the directory of a finished run") from error
    except ValueError as error:
        raise DamagedFileError(f"{path}: not JSON ({error}); make it again") from error
