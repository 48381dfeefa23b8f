"""What a cached teacher saves, costs and loses: python benchmarks/cached_teacher.py [key=value …]

On CamVid with a trained teacher (streets and random weights where there is none): how far the cached logits of
training crops are from those in float32 and from a teacher that sees the crops themselves; bytes and time of the
writing; the time of a step that is plain, with the cached and with the live teacher, taking turns on batches that
are loaded already. And the size of a cache of Cityscapes' images, and how long the answer to a crop takes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import tqdm
from common import publish
from torch import Tensor

from data import DataConfig, SegmentationData, build_dataset
from data.transforms import draw
from deploy.profiling import measure_latency
from engine.cache import CachedTeacher, open_cache
from engine.config import run_script
from engine.loop import to_device, train_step
from engine.player import Learner, Player, TrainConfig
from engine.run import start_accelerator
from engine.teachers import Answer, CacheConfig, LiveTeacher, TeacherConfig, own_autocast
from evaluation.report import significant, table
from losses import DistillationLoss, LossConfig
from losses.logits import KDConfig
from losses.supervised import CrossEntropyConfig
from losses.upsampled import upsampled_loss
from models import ModelConfig, SegmentationModel, build_model, load_model

GOAL_STEP, GOAL_BYTES, GOAL_READ = 1.10, 660_000, 1.0
GOAL_KL = {"uint8": 1e-3, "float16": 1e-5}
CITYSCAPES = (1024, 2048)


@dataclass
class Config:
    """What benchmarks/cached_teacher.py can be told."""

    teacher: str = "runs/camvid-students/teacher"
    """Run of the teacher."""
    student: ModelConfig = field(default_factory=lambda: ModelConfig(width=16))
    """The student."""
    data: DataConfig = field(
        default_factory=lambda: DataConfig(name="camvid", crop=[240, 320], scale=[0.5, 2.0], jitter=0.1)
    )
    """The data set and its crops."""
    images: int = 48
    """Images that are cached."""
    crops: int = 160
    """Crops by which the logits are compared."""
    batch: int = 4
    """Images of a step."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the steps, as in train.precision."""
    temperatures: list[float] = field(default_factory=lambda: [1.0, 2.0])
    """Temperatures of the distillation."""
    at: list[str] = field(default_factory=lambda: ["labels", "logits"])
    """Where the distillation compares, as in losses.kd.at; the live teacher at the first of these alone."""
    rounds: int = 31
    """Timed rounds."""
    warmup: int = 3
    """Rounds before them that are not counted."""
    threads: int = 1
    """CPU threads."""
    output: str = "results/cached_teacher.md"
    """Where the tables are written."""


class Some:
    """The first images of a data set."""

    def __init__(self, data: SegmentationData, number: int) -> None:
        self.data, self.names = data, data.names[:number]

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, key: tuple[int, int, int], *, seed: int) -> Any:
        return self.data.sample(key, seed=seed)


class Exact(CachedTeacher):
    """The teacher's logits of whole images in float32, taken through crops as a cache takes them."""

    def __init__(self, logits: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self.layout: Any = SimpleNamespace(config=CacheConfig(storage="float16", shard=len(logits)))
        whole = torch.stack(list(logits)).numpy()
        self.maps = [{"logits": whole, "maxima": np.zeros_like(whole[:, 0])}]


def open_data(config: Config) -> tuple[SegmentationData, SegmentationModel, str]:
    """CamVid and its teacher, or what there is."""
    if os.environ.get("CAMVID_ROOT") and Path(config.teacher).is_dir():
        data = build_dataset(config.data, "train")
        teacher = load_model(config.teacher, "teacher")
        teacher.take_images(config.data.mean, config.data.std)
        return data, teacher, f"CamVid, teacher {config.teacher}"
    data = build_dataset(DataConfig(scenes=config.images, size=[240, 320], crop=[160, 224]), "train")
    torch.manual_seed(0)
    return data, build_model(ModelConfig(width=48), data.labels), "streets, teacher with random weights"


def fill(folder: Path, run: Any, teacher: Any, data: Any, storage: str) -> tuple[CachedTeacher, float, float]:
    """A cache, its seconds and bytes an image."""
    start = time.perf_counter()
    cached = open_cache(run, teacher, data, folder, {}, (), CacheConfig(storage=storage))  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    total = sum(path.stat().st_size for path in folder.glob("shard_*/*"))
    return cached, seconds / len(data), total / len(data)


def divergence(wanted: Tensor, found: Tensor, labels: Tensor) -> float:
    """Mean over labelled pixels of KL(wanted || found) at label size, in nats."""
    return float(upsampled_loss(found, labels, wanted, ce_weight=0.0, kl_weight=1.0)[1]["kl"])


def compare(config: Config, data: SegmentationData, answers: dict[str, Callable[[Any], Tensor]]) -> dict[str, Any]:
    """Divergences between the forms of the teacher over random crops, and their pixel accuracies."""
    pairs = [("exact", name) for name in answers if name != "exact"]
    pairs += [("crop", name) for name in answers if name not in ("exact", "crop")] + [("crop", "exact")]
    sums = dict.fromkeys([*pairs, *answers], 0.0)
    for position in tqdm(range(config.crops), desc="crops", dynamic_ncols=True):
        sample = data.sample((0, position, position % config.images), seed=0)
        batch = type(sample)(*(tensor.unsqueeze(0) for tensor in sample))
        logits = {name: answer(batch) for name, answer in answers.items()}
        for wanted, found in pairs:
            sums[wanted, found] += divergence(logits[wanted], logits[found], batch.labels)
        labelled = batch.labels != 255
        for name, maps in logits.items():
            size = batch.labels.shape[-2:]
            said = torch.nn.functional.interpolate(maps.float(), size=size, mode="bilinear").argmax(1)
            sums[name] += float((said == batch.labels)[labelled].float().mean()) if labelled.any() else 0.0
    return {name: value / config.crops for name, value in sums.items()}


def time_steps(
    config: Config, accelerator: Any, data: SegmentationData, teacher: SegmentationModel, cached: CachedTeacher
) -> dict[str, list[float]]:
    """Milliseconds of the three kinds of step, by temperature."""
    run: Any = SimpleNamespace(accelerator=accelerator, seed=0, terminated=False)
    train = TrainConfig(precision=config.precision, threads=config.threads)
    live = LiveTeacher([teacher], accelerator.device, accelerator.autocast, TeacherConfig())
    keys = [
        [(0, step * config.batch + i, (step * config.batch + i) % config.images) for i in range(config.batch)]
        for step in range(8)
    ]
    samples = [[data.sample(key, seed=0) for key in some] for some in keys]
    stacked = [type(some[0])(*(torch.stack(field) for field in zip(*some, strict=True))) for some in samples]
    batches = [to_device(batch, accelerator.device) for batch in stacked]
    total = config.rounds + config.warmup
    weights = data.class_weights("enet")

    def steps(kd: KDConfig | None, source: Any) -> Callable[[], Any]:
        torch.manual_seed(0)
        student = build_model(config.student, data.labels)
        losses = LossConfig(cross_entropy=CrossEntropyConfig(class_weights="enet"), kd=kd)
        objective = DistillationLoss(losses, student.taps, teacher.taps, class_weights=lambda scheme: weights)
        player, step = Player(Learner(student, objective, source), train, accelerator), count()

        def one() -> None:
            number = next(step)
            train_step(run, player, [batches[number % len(batches)]], number, total)

        return one

    parts = {"plain": steps(None, None)}
    for temperature in config.temperatures:
        for at in config.at:
            kd = KDConfig(temperature=temperature, at=at)  # type: ignore[arg-type]
            parts[f"cached, T = {temperature:g}, at {at}"] = steps(kd, cached)
        kd = KDConfig(temperature=temperature, at=config.at[0])  # type: ignore[arg-type]
        parts[f"live, T = {temperature:g}, at {config.at[0]}"] = steps(kd, live)
    answers = count()
    parts["cached answer alone"] = lambda: cached(batches[next(answers) % len(batches)], ())
    with tqdm(total=total, unit="round", dynamic_ncols=True) as bar:
        return measure_latency(parts, rounds=config.rounds, warmup=config.warmup, progress=bar.update)


class Blank:
    """Images and labels of Cityscapes' size without anything on them."""

    def __init__(self, number: int) -> None:
        self.names = [f"image {index}" for index in range(number)]
        self.image, self.label = torch.zeros(3, *CITYSCAPES), torch.zeros(CITYSCAPES, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, key: tuple[int, int, int], *, seed: int) -> Any:
        return SimpleNamespace(images=self.image, labels=self.label)


def measure_cityscapes(folder: Path, run: Any) -> tuple[float, list[float]]:
    """Bytes an image with 19 classes at stride 8, and the milliseconds of the answers to crops of 512×1024."""
    rng = np.random.default_rng(0)
    size = (CITYSCAPES[0] // 8, CITYSCAPES[1] // 8)
    logits = torch.from_numpy(4 * rng.standard_normal((1, 19, *size), dtype=np.float32))
    teacher, data = SimpleNamespace(answer=lambda images, taps: Answer(logits, {})), Blank(16)
    cached, _, size_of_one = fill(folder, run, teacher, data, "uint8")
    crop, warm, times = (512, 1024), 20, []
    for index in range(warm + 200):
        geometry, _ = draw(rng, CITYSCAPES, crop, scale=(0.5, 2.0), flip=0.5, jitter=0.0, blur=0.0)
        batch = SimpleNamespace(
            images=torch.empty(1, 3, *crop),
            index=torch.tensor([index % len(data)]),
            geometry=torch.tensor([geometry], dtype=torch.int64),
        )
        start = time.perf_counter()
        cached(batch, ())
        times.append(1000 * (time.perf_counter() - start))
    return size_of_one, times[warm:]


def verdict(value: float, goal: float) -> str:
    return f"goal at most {goal:g}: {'reached' if value <= goal else 'missed'}"


def main(config: Config) -> None:
    accelerator = start_accelerator(TrainConfig(precision=config.precision, threads=config.threads))
    run = SimpleNamespace(accelerator=accelerator, say=lambda text: None, terminated=False)
    device = accelerator.device
    data, model, what = open_data(config)
    full = LiveTeacher([model], device, own_autocast("fp32", device, accelerator.autocast), TeacherConfig())
    half = LiveTeacher([model], device, own_autocast("bf16", device, accelerator.autocast), TeacherConfig())
    some = Some(data, config.images)
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "uint8": fill(Path(folder, "uint8"), run, full, some, "uint8"),
            "float16": fill(Path(folder, "float16"), run, full, some, "float16"),
            "uint8 of a bf16 teacher": fill(Path(folder, "bf16"), run, half, some, "uint8"),
            "float16 of a bf16 teacher": fill(Path(folder, "bf16_float16"), run, half, some, "float16"),
        }

        def whole(index: int) -> Tensor:
            images = data.sample((-1, index, index), seed=0).images[None]
            return full.answer(images.to(device), ()).logits[0].cpu()

        exact = Exact([whole(index) for index in range(config.images)], device)
        answers: dict[str, Callable[[Any], Tensor]] = {
            "exact": lambda batch: exact(batch, ()).logits,
            "crop": lambda batch: full.answer(batch.images, ()).logits,
        }
        for name, (cached, _, _) in caches.items():
            answers[name] = lambda batch, cached=cached: cached(batch, ()).logits  # type: ignore[misc]
        found = compare(config, data, answers)
        times = time_steps(config, accelerator, data, model, caches["uint8"][0])
        city_bytes, city_times = measure_cityscapes(Path(folder, "cityscapes"), run)

    kept = [
        {
            "cache": name,
            "bytes an image": f"{size:,.0f}",
            "ms an image": significant(1000 * seconds),
            "KL from exact": f"{found['exact', name]:.1e}",
            "KL from crop": significant(found["crop", name]),
            "accuracy %": significant(100 * found[name]),
        }
        for name, (_, seconds, size) in caches.items()
    ]
    for name, label in (("exact", "none (exact)"), ("crop", "none (crop)")):
        kept.append({"cache": label, "accuracy %": significant(100 * found[name])})
        if name == "exact":
            kept[-1]["KL from crop"] = significant(found["crop", "exact"])
        else:
            kept[-1]["KL from exact"] = significant(found["exact", "crop"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    steps = [
        {
            "step": name,
            "median ms": significant(medians[name]),
            "least ms": significant(min(values)),
            "of plain": f"{statistics.median(a / b for a, b in zip(values, times['plain'], strict=True)):.3f}",
        }
        for name, values in times.items()
    ]
    goals = [
        f"- {name}: KL {found['exact', name]:.1e}, {verdict(found['exact', name], GOAL_KL[name])}."
        for name in GOAL_KL
    ]
    for name, values in times.items():
        if name.startswith("cached, "):
            ratio = statistics.median(a / b for a, b in zip(values, times["plain"], strict=True))
            goals.append(f"- Step, {name}: {ratio:.3f} of plain, {verdict(ratio, GOAL_STEP)}.")
    read = statistics.median(city_times)
    goals.append(f"- Bytes of a Cityscapes image: {city_bytes:,.0f}, {verdict(city_bytes, GOAL_BYTES)}.")
    goals.append(
        f"- Answer to a Cityscapes crop of 512×1024: median {significant(read)} ms, 95 % within "
        f"{significant(float(np.percentile(city_times, 95)))} ms; of the median, {verdict(read, GOAL_READ)}."
    )
    crop = "×".join(str(side) for side in data.settings.crop or ())
    low, high = data.settings.scale
    text = f"""# The cached teacher

{what}; {config.images} images cached; {config.crops} random crops of {crop}, scaled by {low:g} to {high:g}, half
of them mirrored.

"Exact" are the teacher's float32 logits of the whole image, taken through the same crop, scale and flip. "Crop"
is the teacher that sees the transformed crop itself, with its changed colours. KL is in nats, of that against what
the row names, a mean over labelled pixels at label size. Accuracy is that of the crops' labelled pixels.

{table(kept)}

Steps of batch {config.batch} in {config.precision} of a student {config.student.name}, width \
{config.student.width}; {config.rounds} rounds in which all took
turns; ratios are medians over the rounds. The cache is the first above. "Cached answer alone" is what it takes of
a cached step; the rest of what that has over a plain one is the loss, which a live teacher's step pays too.

{table(steps)}

{chr(10).join(goals)}
"""
    publish(text, config.output)


if __name__ == "__main__":
    run_script(main, Config)
