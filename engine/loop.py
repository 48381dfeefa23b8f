"""The one loop: it steps a list of players over batches, evaluates, saves, and goes on where a run was cut off."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn

from engine.checkpoint import clear_checkpoints, load_checkpoint, replace_folder, save_checkpoint
from engine.player import Learner, Player, TrainConfig, learning_rate, resolution
from engine.teachers import in_eval_mode
from errors import DamagedFileError, NonFiniteError, Terminated
from evaluation.calibration import Calibration
from evaluation.metrics import ConfusionMatrix, scores

if TYPE_CHECKING:
    from engine.run import Run


class TrainingData(Protocol):
    """What the loop needs of a data set; of a batch it reads `images`, `labels` and `pixels`."""

    labels: Any

    def steps_per_epoch(self, batch_size: int) -> int: ...
    def train_loader(self, **options: Any) -> Any: ...
    def eval_loader(self, **options: Any) -> Any: ...
    def finish(self, batch: Any) -> Any: ...


def fit(
    run: "Run",
    learners: Sequence[Learner],
    train: TrainingData,
    val: TrainingData,
    config: TrainConfig,
    *,
    workers: int = 0,
    judged: Callable[[int, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains the learners, from the newest checkpoint of the run if it is resumed.

    The first is the one that the run is about; others, its fellows in online distillation, have a name each and
    step before it, so that it hears what they said of the batch before they changed. Their objectives' opponents
    (a critic, say) step after it: each a learner with a `name`, the `options` in which its training differs from
    `config`, and `active(step)`.

    `judged` is told the step and the first learner's scores after each evaluation but the last; what it raises
    ends the training.

    The batches, their augmentation and the random numbers of a step are functions of the seed and the step, so a
    run that was cut off and resumed is bit for bit the run that was not.

    Returns:
        The final scores on `val`, the best ones with their step, and the seconds spent training; a fellow's under
        its name.
    """
    accelerator = run.accelerator
    total = config.total_steps(train)
    students = [Player(learner, replace(config, **learner.options), accelerator) for learner in learners]
    critics: list[tuple[Player, Learner]] = []  # each with whom it judges
    for learner in learners:
        for opponent in learner.objective.make_opponents():
            opponent.name = f"{learner.name}.{opponent.name}" if learner.name else opponent.name
            critics.append((Player(opponent, replace(config, **opponent.options), accelerator), learner))
    players = [*students, *(critic for critic, _ in critics)]
    in_turn = [*((player, player.learner) for player in [*students[1:], students[0]]), *critics]
    progress = Progress()
    restore(run, players, progress)
    stream = batches(run, train, config, progress.step, workers)
    clock, waited = time.perf_counter(), 0.0
    scored: dict[str, Any] = {}

    with tqdm(initial=progress.step, total=total, unit="step", desc=run.folder.name, dynamic_ncols=True) as bar:
        while progress.step < total:
            step, terminated = progress.step, False
            asked = time.perf_counter()
            parts = next(stream)
            waited += time.perf_counter() - asked
            values: dict[str, float] = {}
            for player, owner in in_turn:
                if owner.active(step) and player.learner.active(step):
                    theirs, stop = train_step(run, player, parts, step, total)
                    prefix = f"{player.learner.name}." if player.learner.name else ""
                    values |= {f"{prefix}{name}": value for name, value in theirs.items()}
                    terminated = terminated or stop
            progress.add(values | produced(accelerator, parts, train.labels.names))
            progress.step = step = step + 1
            epoch = step // train.steps_per_epoch(config.batch_size)
            bar.update()

            now = time.perf_counter()
            progress.seconds, clock = progress.seconds + now - clock, now
            if step % config.log_every == 0 or step == total:
                images = config.batch_size * progress.window_steps
                elapsed, averages = progress.window_seconds(), progress.averages()
                speed = images / elapsed
                system = {"seconds": progress.seconds, "images_per_second": speed, "waiting": waited / elapsed}
                run.log(step, epoch, "train", averages, **system)
                waited = 0.0
                loss = averages.get("loss", next(iter(averages.values())))
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} images/s")
            if step == total or (config.evaluate_every and step % config.evaluate_every == 0):
                for learner in learners:
                    learner.forget()
                scored = judge(run, students, val, workers, progress, epoch)
                if run.is_main:
                    bar.write(f"step {step}: {shown(scored)}")
                if judged is not None and step < total:
                    judged(step, scored[learners[0].name])
                clock = time.perf_counter()
            if step == total or step % config.checkpoint_every == 0 or terminated:
                checkpoint(run, players, progress, config)
                clock = time.perf_counter()
            if terminated and step < total:
                raise Terminated(f"{run.folder}: stopped by SIGTERM at step {step}, saved; go on with resume=true")
    if not scored:  # cut off after its last checkpoint and before results.json
        scored = {player.learner.name: measure(run, player, val, workers) for player in students}

    def results(player: Player) -> dict[str, Any]:
        best_miou, best_step = progress.best[player.learner.name]
        parameters = sum(p.numel() for p in player.learner.model.parameters())
        found = {"best_miou": best_miou, "best_step": best_step, "parameters": parameters}
        return scored[player.learner.name] | {"split": "val", "steps": total} | found

    return (
        results(students[0])
        | {"train_seconds": round(progress.seconds, 1)}
        | {player.learner.name: results(player) for player in students[1:]}
    )


def judge(
    run: "Run", students: Sequence[Player], val: TrainingData, workers: int, progress: "Progress", epoch: int
) -> dict[str, dict[str, Any]]:
    """Scores each learner on `val`, logs it, and keeps the weights that are the best yet; the scores by name."""
    scored = {}
    for player in students:
        name = player.learner.name
        player.broadcast_buffers()
        scored[name] = measure(run, player, val, workers)
        run.log(progress.step, epoch, f"val.{name}" if name else "val", scored[name], seconds=progress.seconds)
        save_best(run, player, scored[name], progress)
    return scored


def measure(run: "Run", player: Player, val: TrainingData, workers: int) -> dict[str, Any]:
    """The scores of a learner on `val`, and how sure and how well calibrated it is, on a 25th of the pixels."""
    calibration = Calibration(len(val.labels.names), run.accelerator.device, every=5)
    matrix = evaluate(run.accelerator, player.evaluated, val, workers=workers, calibration=calibration)
    return summarise(matrix, val.labels.names) | calibration.summarise()


def shown(scored: dict[str, dict[str, Any]]) -> str:
    """The mIoU of each learner for people."""
    return ", ".join(f"{name} val mIoU {100 * one['miou']:.2f} %".strip() for name, one in scored.items())


def batches(
    run: "Run", train: TrainingData, config: TrainConfig, start_step: int, workers: int
) -> Iterator[list[Any]]:
    """This process's share of each step's batch from `start_step` on, as its accumulated parts, on the device."""
    accelerator = run.accelerator
    loader = train.train_loader(
        batch_size=config.batch_size,
        seed=run.seed,
        start_step=start_step,
        steps=config.total_steps(train),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        accumulate=config.accumulate,
        workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    stream = iter(loader)  # its workers start here

    def parts() -> list[Any]:
        return [train.finish(to_device(next(stream), accelerator.device)) for _ in range(config.accumulate)]

    return (parts() for _ in range(start_step, config.total_steps(train)))


def train_step(
    run: "Run",
    player: Player,
    parts: list[Any],
    step: int,
    total: int,
) -> tuple[dict[str, float], bool]:
    """One optimizer step over the parts of a batch; returns the logged values and whether to end.

    The learner's teacher sees the parts at their full size, the learner at that of `train.resolution`. The
    denominators of the loss are added up over parts and processes first, and DDP's mean is undone, so that
    the gradient is that of the whole batch however it is split.
    """
    accelerator, learner, config = run.accelerator, player.learner, player.config
    seeds = np.random.SeedSequence([run.seed, step, accelerator.process_index, *learner.name.encode()])
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    rate = learning_rate(step, total, config)
    for group in player.optimizer.param_groups:
        group["lr"] = rate
    player.wrapped.train()
    seen = at_resolution(parts, resolution(step, total, config))
    wanted = learner.wanted(step)
    if isinstance(learner, Learner):
        learner.forget()

    counts = torch.stack([learner.counts(part.labels) for part in seen]).sum(0)
    stop = counts.new_full((1,), float(run.terminated))
    shared = add_up(accelerator, torch.cat([counts, stop]))
    denominators = shared[:-1]

    may_skip = config.on_nonfinite == "skip"
    statistics = [buffer.clone() for buffer in player.statistics] if may_skip else []
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(player.wrapped):
            answer = None if wanted is None else learner.teacher(part, wanted)
            loss, values = player.wrapped(seen[i].images, seen[i].labels, answer, step, denominators)
            accelerator.backward(loss * accelerator.num_processes)
        if isinstance(learner, Learner) and learner.latest is not None:
            learner.said.append((part, learner.latest))
        for name, value in {"loss": loss.detach(), **values}.items():
            sums[name] = sums.get(name, torch.zeros_like(counts[0])) + value.double()
    added = add_up(accelerator, torch.stack(list(sums.values())))
    parameters = [p for group in player.optimizer.param_groups for p in group["params"]]
    clipped = accelerator.clip_grad_norm_(parameters, config.clip or math.inf)
    # The one moment of a learner's step at which the host waits for a GPU.
    told = torch.cat([added, clipped.reshape(1).to(added), shared]).tolist()
    logged, norm = dict(zip(sums, told, strict=False)), told[len(sums)]
    counted, terminated = told[len(sums) + 1 : -1], told[-1] > 0
    scaled = accelerator.scaler is not None  # fp16's scaler skips overflowing gradients by itself
    finite = math.isfinite(logged["loss"]) and (scaled or math.isfinite(norm))
    if not finite and config.on_nonfinite == "stop":
        terms = ", ".join(f"{name} {value:g}" for name, value in logged.items())
        raise NonFiniteError(
            f"losses: not finite at step {step + 1} ({terms}, gradient norm {norm:g}); "
            "lower train.lr or a term's weight, or set train.on_nonfinite=skip"
        )
    if finite:
        player.optimizer.step()
        if player.ema is not None and not player.optimizer.step_was_skipped:
            player.ema.update_parameters(learner.model)
    else:  # batch-norm's statistics have taken in what is skipped
        if accelerator.scaler is not None:
            accelerator.scaler.update()  # or its next unscaling fails
        for buffer, before in zip(player.statistics, statistics, strict=True):
            buffer.copy_(before)
    player.optimizer.zero_grad(set_to_none=True)
    if isinstance(learner, Learner):  # a term that nothing was counted for has no value, and 0 is none
        for name, count in zip(learner.objective.terms, counted, strict=True):
            if count == 0:
                logged.pop(name, None)
    logged |= {
        "lr": rate,
        "gradient_norm": norm,
        "skipped": float(not finite or player.optimizer.step_was_skipped),
    }
    return logged, terminated


def produced(accelerator: Accelerator, parts: list[Any], names: Sequence[str]) -> dict[str, float]:
    """`pixels.NAME`: the share of each class among all pixels of a step's batch, over parts and processes."""
    pixels = torch.stack([part.pixels.sum(0) for part in parts]).sum(0).double()
    if accelerator.num_processes > 1:  # else the host need not wait for a GPU
        pixels = add_up(accelerator, pixels.to(accelerator.device)).cpu()
    shares = (pixels / pixels.sum()).tolist()
    return {f"pixels.{name}": share for name, share in zip(names, shares, strict=False)}


def at_resolution(parts: list[Any], factor: float) -> list[Any]:
    """The parts with images (antialiased) and labels (nearest neighbour) shrunk by a factor."""
    if factor == 1:
        return parts
    shrunk = []
    for part in parts:
        size = tuple(max(1, round(side * factor)) for side in part.images.shape[-2:])
        images = F.interpolate(part.images, size, mode="bilinear", align_corners=False, antialias=True)
        labels = F.interpolate(part.labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
        images = images.contiguous(memory_format=torch.channels_last)
        shrunk.append(part._replace(images=images, labels=labels))
    return shrunk


def add_up(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Sum of a tensor over the processes."""
    return accelerator.reduce(values, reduction="sum") if accelerator.num_processes > 1 else values


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with images, channels-last, and labels on the device; a cache reads the rest on the host."""
    images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels))
    if images.dtype != torch.uint8:  # bytes are [B, H, W, 3] until the data set finishes them
        images = images.contiguous(memory_format=torch.channels_last)
    return batch._replace(images=images, labels=labels)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    *,
    workers: int = 0,
    calibration: Any = None,
) -> Tensor:
    """Confusion matrix [C, C] (int64, rows truth) of `model` over all of `data`, in float32, at label size.

    Every process takes its share of the images, none twice, and the counts are added up once: the matrix does not
    depend on the number of processes. A `calibration` (evaluation.calibration) is filled beside it and added up.
    """
    loader = data.eval_loader(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        workers=workers,
    )
    matrix = ConfusionMatrix(len(data.labels.names), accelerator.device)
    with in_eval_mode(model):
        for batch in tqdm(loader, desc="evaluate", leave=False, dynamic_ncols=True):
            batch = data.finish(to_device(batch, accelerator.device))
            logits = model(batch.images).logits
            matrix.update(logits, batch.labels)
            if calibration is not None:
                calibration.update(logits, batch.labels)
    if calibration is not None:
        calibration.reduce(accelerator)
    return matrix.reduce(accelerator)


def summarise(matrix: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The scores of a confusion matrix as plain numbers, the IoU by class name."""
    result = scores(matrix)
    iou = dict(zip(names, (float(value) for value in result["iou"]), strict=True))
    return {key: float(result[key]) for key in ("miou", "pixel_accuracy", "class_accuracy")} | {"iou": iou}


class Progress:
    """Where a training stands: its step, the sums since the last log line, the best score, the seconds spent."""

    def __init__(self) -> None:
        self.step = 0
        self.window: dict[str, float] = {}
        self.window_counts: dict[str, int] = {}
        self.window_steps = 0
        self.window_start = 0.0
        self.best: dict[str, tuple[float, int]] = {}  # by the learner's name: mIoU and step
        self.seconds = 0.0

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + value
            self.window_counts[name] = self.window_counts.get(name, 0) + 1
        self.window_steps += 1

    def window_seconds(self) -> float:
        return max(self.seconds - self.window_start, 1e-9)

    def averages(self) -> dict[str, float]:
        """Means since the last call, each over the steps at which its term was in force."""
        means = {name: total / self.window_counts[name] for name, total in self.window.items()}
        self.window, self.window_counts, self.window_steps = {}, {}, 0
        self.window_start = self.seconds
        return means


def save_best(run: "Run", player: Player, scored: dict[str, Any], progress: Progress) -> None:
    """Writes `best/`, or a fellow's `NAME/best/`, if no evaluation before was better."""
    name = player.learner.name
    if scored["miou"] <= progress.best.get(name, (-1.0, 0))[0]:
        return
    progress.best[name] = scored["miou"], progress.step
    if run.is_main:
        folder = run.folder / name
        temporary = folder / ".best.tmp"
        player.evaluated.save_pretrained(temporary)  # type: ignore[operator]
        replace_folder(temporary, folder / "best")


def checkpoint(run: "Run", players: list[Player], progress: Progress, config: TrainConfig) -> None:
    """Saves players and progress; all processes take part, the main one writes."""
    for player in players:
        player.broadcast_buffers()
    if run.is_main:
        run.metrics.sync()
        scaler = run.accelerator.scaler
        state = {
            "players": [player.state_dict() for player in players],
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": vars(progress),
        }
        save_checkpoint(run.folder / "checkpoints", progress.step, state, config.keep_checkpoints)
    run.accelerator.wait_for_everyone()


def restore(run: "Run", players: list[Player], progress: Progress) -> None:
    """Takes up the newest checkpoint of a run that goes on, and rewinds its log to it."""
    folder = run.folder / "checkpoints"
    state = load_checkpoint(folder) if run.config.resume else None
    if run.config.resume:
        where = "no whole checkpoint, so it starts" if state is None else "goes on"
        run.say(f"{run.folder}: {where} at step {0 if state is None else state['progress']['step']}")
    if state is not None:
        try:
            for player, saved in zip(players, state["players"], strict=True):
                player.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise DamagedFileError(f"{folder}: a checkpoint of another model ({reason}); begin anew") from error
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(state["scaler"])
        vars(progress).update(state["progress"])
    if run.is_main:
        run.metrics.rewind(progress.step)
        if state is not None:
            clear_checkpoints(folder, run.config.train.keep_checkpoints)
    run.accelerator.wait_for_everyone()
