"""Evaluate runs: accuracy by class, calibration, pictures, and one table of all of them; or bias and variance.

one run          python evaluate.py runs/teacher
several          python evaluate.py runs/teacher runs/baseline runs/distilled split=test out=results/mine
over seeds       python evaluate.py runs/plain-* runs/distilled-* mode=bias_variance out=results/bias-variance
many processes   accelerate launch --config_file configs/accelerate/eight_gpus.yaml evaluate.py runs/teacher

Each run gets `evaluation_SPLIT.json` and pictures in `images/`: image, truth, prediction, errors. With `out`, the
tables of all runs go to OUT.md, their figures to OUT.json and a picture of them side by side to OUT.png. Runs that
differ in their seed alone are summed up as mean and spread.

In the mode bias_variance the runs of each method, two or more seeds, are taken apart into what is wrong with the
method and what the seed does to it, by class, near boundaries and away from them, and as maps in OUT.png.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import DataConfig, SegmentationData, build_dataset
from deploy.profiling import count_flops, count_parameters
from engine.config import run_script
from engine.loop import evaluate, summarise, to_device
from engine.player import TrainConfig
from engine.run import environment, on_main_process, read_json, start_accelerator
from engine.tracking import write_json
from errors import ConfigurationError
from evaluation.calibration import Calibration
from evaluation.decomposition import Decomposition, decompose_image, wsl_weights
from evaluation.metrics import predict
from evaluation.pictures import colour_scale, colourise, error_map, grid, heat_map, save_png
from evaluation.report import (
    calibration_table,
    compare_runs,
    decomposition_by_class,
    decomposition_table,
    method_name,
    per_class_table,
    seeds_by_class,
    seeds_table,
)
from models import SegmentationModel, load_model


@dataclass
class Config:
    """What evaluate.py can be told."""

    runs: list[str] = field(default_factory=list)
    """Run directories; those among the arguments are added."""
    mode: Literal["scores", "bias_variance"] = "scores"
    """scores: accuracy and calibration of each run; bias_variance: of each method, over its seeds."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the data set that each run was trained on."""
    root: str = ""
    """Folder of the data set, if it is not where it was in training."""
    pictures: int = 4
    """Images to draw, spread evenly over the split."""
    out: str = ""
    """Path, without an ending, of the comparison of several runs; nothing is written if it is empty."""
    calibration_every: int = 1
    """Take each n-th row and column of the labels for entropy and calibration; all of them cost 2.5 times the time
    of an evaluation, each third hardly anything."""
    workers: int = 0
    """Loader processes."""
    teacher: str = ""
    """bias_variance: run directory of the teacher whose weights of weighted soft labels are drawn beside the maps;
    by default that of the runs' own configuration, if it is there."""
    boundary_width: int = 3
    """bias_variance: a pixel is at a boundary if one of another class is at most so many rows and columns away."""

    def __post_init__(self) -> None:
        if self.boundary_width < 1:
            raise ConfigurationError(f"boundary_width: {self.boundary_width} is no width; give 1 or more")
        if self.calibration_every < 1:
            raise ConfigurationError(f"calibration_every: {self.calibration_every} is too small; give 1 or more")


def main(config: Config) -> None:
    if not config.runs:
        raise ConfigurationError("runs: no run is named; give one or several run directories")
    accelerator = start_accelerator(TrainConfig())
    if config.mode == "bias_variance":
        bias_and_variance(accelerator, config)
    else:
        score(accelerator, config)


# ------------------------------------------------------------------------------------------------- scores


def score(accelerator: Accelerator, config: Config) -> None:
    """Accuracy, calibration, costs and pictures of each run."""
    results, columns = [], []
    for run_dir in config.runs:
        folder = Path(run_dir)
        data_of_run = data_config(folder, config.root)
        data = build_dataset(data_of_run, config.split)
        model = model_of_run(accelerator, folder, data_of_run, data)
        calibration = Calibration(len(data.labels), accelerator.device, every=config.calibration_every)
        matrix = evaluate(accelerator, model, data, workers=config.workers, calibration=calibration)
        scored = summarise(matrix, data.labels.names) | calibration.summarise()
        result = scored | costs(folder, model, data) | {"run": run_dir, "split": config.split, "images": len(data)}
        result["method"] = method(folder)
        pictures = on_main_process(
            accelerator, lambda m=model, d=data: predictions(accelerator, m, d, config.pictures)
        )
        results.append(result)
        columns.append(pictures)
        if accelerator.is_main_process:
            write_json(folder / f"evaluation_{config.split}.json", result)
            draw_run(folder, config.split, data, pictures)
    if accelerator.is_main_process:
        report(config, results, columns, data, environment(accelerator, data.manifest_hash()))


def model_of_run(
    accelerator: Accelerator, folder: Path, data_of_run: DataConfig, data: SegmentationData
) -> SegmentationModel:
    """The best model of a run, for the images of its data set."""
    model = load_model(folder).to(accelerator.device).eval()
    model.take_images(data_of_run.mean, data_of_run.std)
    if model.class_names != list(data.labels.names):
        raise ConfigurationError(f"{folder}: its model knows other classes than its data set; train it again")
    return model


def saved_config(folder: Path) -> dict[str, Any]:
    """What a run's config.yaml says; a fellow of online distillation, RUN/teacher say, has that of its run."""
    path = folder / "config.yaml"
    fellow = not path.exists() and (folder / "best").is_dir()
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(folder.parent / path.name if fellow else path))
        saved |= {"fellow": folder.name} if fellow else {}
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file; name the directory of a run") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{path}: not the configuration of a run ({error}); train it again") from error
    return saved


def data_config(folder: Path, root: str) -> DataConfig:
    """The data set of a run, as its config.yaml has it."""
    try:
        saved = saved_config(folder)["data"]
        return DataConfig(**(saved | ({"root": root} if root else {})))
    except (KeyError, TypeError) as error:
        path = folder / "config.yaml"
        raise ConfigurationError(f"{path}: not the configuration of a run ({error}); train it again") from error


def method(folder: Path) -> str:
    """What a run's configuration says besides seed, folder and tracking: equal for several seeds of one method.

    A teacher of the same seed, runs/teacher-1 of seed 1, is no difference.
    """
    saved = saved_config(folder)
    said = {key: value for key, value in saved.items() if key not in ("run_dir", "seed", "tracking")}
    if "teacher" in said:
        said["teacher"] |= {"run": said["teacher"]["run"].removesuffix(f"-{saved['seed']}")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def costs(folder: Path, model: SegmentationModel, data: SegmentationData) -> dict[str, Any]:
    """Parameters, FLOPs at the size of evaluation, and what the run's other files know: latency, training time."""
    size = tuple(data.sample((-1, 0, 0), seed=0).images.shape[-2:])
    found: dict[str, Any] = {
        "parameters": count_parameters(model),
        "flops": count_flops(model, size),
        "size": list(size),
    }
    if (folder / "results.json").exists():
        found["train_seconds"] = read_json(folder / "results.json").get("train_seconds")
    if (folder / "latency.json").exists():
        found["latency_ms"] = read_json(folder / "latency.json").get("latency_ms")
    return found


@torch.no_grad()
def predictions(
    accelerator: Accelerator, model: SegmentationModel, data: SegmentationData, count: int
) -> dict[int, np.ndarray]:
    """Predicted classes at label size of `count` images spread evenly over the split, by index."""
    answers = {}
    for index in spread_evenly(data, count):
        sample = data.sample((-1, index, index), seed=0)
        logits = model(sample.images[None].to(accelerator.device)).logits
        answers[index] = predict(logits, tuple(sample.labels.shape))[0].cpu().numpy().astype(np.uint8)
    return answers


def spread_evenly(data: SegmentationData, count: int) -> list[int]:
    """Indices of `count` images, or of all if there are fewer."""
    return np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)).tolist()


def draw_run(folder: Path, split: str, data: SegmentationData, answers: dict[int, np.ndarray]) -> None:
    """One picture an image in `images/`: image, truth, prediction, errors."""
    colours = data.labels.colours
    for index, answer in answers.items():
        image, label = data.read(index)
        errors = error_map(answer, label, image)
        cells = [image, colourise(label, colours), colourise(answer, colours), errors]
        picture = grid([cells], ["image", "truth", "prediction", "errors"])
        save_png(folder / "images" / f"{split}_{data.names[index]}.png", picture)


def report(
    config: Config,
    results: list[dict[str, Any]],
    columns: list[dict[int, np.ndarray]],
    data: SegmentationData,
    made_with: dict[str, Any],
) -> None:
    """Prints the tables, and writes them with the figures, the command, the environment and a picture to `out`."""
    size = "×".join(map(str, results[0]["size"]))
    tables = f"{compare_runs(results)}\n\n"
    over_seeds = seeds_table(results)
    if over_seeds:
        tables += f"Over seeds, mean ± standard deviation:\n\n{over_seeds}\n\n"
    tables += f"Entropy and cross-entropy in nats, calibration error, inter-class correlation, {config.split}:\n\n"
    tables += f"{calibration_table(results)}\n\n"
    tables += f"IoU by class, {config.split}, {len(data)} images of {size}, in per cent:\n\n"
    tables += per_class_table(results)
    if over_seeds:
        tables += (
            f"\n\nThe same over seeds, mean ± standard deviation:\n\n{seeds_by_class(results, data.labels.names)}"
        )
    print(f"\n{tables}\n")
    if not config.out:
        return
    colours, rows = data.labels.colours, []
    for index in columns[0]:
        image, label = data.read(index)
        rows.append(
            [image, colourise(label, colours), *(colourise(answers[index], colours) for answers in columns)]
        )
    titles = ["image", "truth", *(Path(run).name for run in config.runs)]
    figures = {"split": config.split, "environment": made_with, "runs": results}
    legend = "image, truth and predictions"
    write_out(Path(config.out), tables, legend, figures, grid(rows, titles))


def write_out(out: Path, tables: str, legend: str, figures: dict[str, Any], picture: np.ndarray) -> None:
    """OUT.md, OUT.json and OUT.png; `figures` has the `environment` that they were made with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made_with = figures["environment"]
    revision = str(made_with["revision"])[:12] + (" with changes" if made_with["dirty"] else "")
    page = [
        f"# {out.name}",
        f"{date.today()}, revision {revision}, {made_with['device']}, {made_with['threads']} threads, "
        f"torch {made_with['packages']['torch']}.",
        f"```\npython {' '.join(sys.argv)}\n```",
        tables,
        f"The pictures, {legend}: `{out.name}.png`, beside this file where the command ran.",
    ]
    out.with_name(f"{out.name}.md").write_text("\n\n".join(page) + "\n")
    write_json(out.with_name(f"{out.name}.json"), figures)
    save_png(out.with_name(f"{out.name}.png"), picture)
    print(f"written: {out}.md, {out}.json, {out}.png")


# ------------------------------------------------------------------------------------------ bias and variance


def bias_and_variance(accelerator: Accelerator, config: Config) -> None:
    """Bias and variance of each method over its runs, as tables and maps."""
    results, rows = [], []
    manifest = ""
    for name, folders in seeds_by_method(config.runs):
        data_of_run = data_config(folders[0], config.root)
        data = build_dataset(data_of_run, config.split)
        if manifest and data.manifest_hash() != manifest:
            raise ConfigurationError(
                f"{folders[0]}: its data set is not that of {config.runs[0]}; compare them apart"
            )
        manifest = data.manifest_hash()
        models = [model_of_run(accelerator, folder, data_of_run, data) for folder in folders]
        teacher = teacher_of_method(accelerator, config, folders[0], data_of_run, data)
        parts = decompose_runs(accelerator, models, data, config).summarise(data.labels.names)
        results.append({"method": name, "runs": [str(folder) for folder in folders], "images": len(data)} | parts)
        if config.out:
            drawn = on_main_process(
                accelerator,
                lambda m=models, t=teacher, d=data: draw_maps(accelerator, m, t, d, config.pictures),
            )
            rows += [(name, cells) for cells in drawn]
    if accelerator.is_main_process:
        report_parts(config, results, rows, data, environment(accelerator, manifest))


def seeds_by_method(runs: list[str]) -> list[tuple[str, list[Path]]]:
    """Each method's name and the folders of its runs, two or more that differ in their seed."""
    groups: dict[str, dict[Any, Path]] = {}
    for folder in map(Path, runs):
        seeds = groups.setdefault(method(folder), {})
        seed = saved_config(folder).get("seed")
        if seed in seeds:
            raise ConfigurationError(f"{folder}: has the seed and the method of {seeds[seed]}; name one of them")
        seeds[seed] = folder
    alone = [str(folder) for seeds in groups.values() if len(seeds) == 1 for folder in seeds.values()]
    if alone:
        raise ConfigurationError(
            f"runs: {', '.join(alone)}: no other run differs from it in the seed alone; "
            "variance takes two or more seeds of a method, train another or leave it out"
        )
    folders = [list(seeds.values()) for seeds in groups.values()]
    return [(method_name([str(folder) for folder in group]), group) for group in folders]


def teacher_of_method(
    accelerator: Accelerator, config: Config, folder: Path, data_of_run: DataConfig, data: SegmentationData
) -> SegmentationModel | None:
    """The teacher that the configuration names, else that of the run, if its folder is there; else None."""
    if config.teacher:
        return model_of_run(accelerator, Path(config.teacher), data_of_run, data)
    named = (saved_config(folder).get("teacher") or {}).get("run")
    if not named or not Path(named, "best").is_dir():
        return None
    return model_of_run(accelerator, Path(named), data_of_run, data)


@torch.no_grad()
def decompose_runs(
    accelerator: Accelerator, models: list[SegmentationModel], data: SegmentationData, config: Config
) -> Decomposition:
    """The sums over the split; every process takes its share of the images."""
    sums = Decomposition(len(data.labels), accelerator.device, width=config.boundary_width)
    loader = data.eval_loader(
        rank=accelerator.process_index, world_size=accelerator.num_processes, workers=config.workers
    )
    for batch in tqdm(loader, desc="bias and variance", leave=False, dynamic_ncols=True):
        batch = data.finish(to_device(batch, accelerator.device))
        sums.update([model(batch.images).logits[0] for model in models], batch.labels[0])
    sums.reduce(accelerator)
    return sums


@torch.no_grad()
def draw_maps(
    accelerator: Accelerator,
    models: list[SegmentationModel],
    teacher: SegmentationModel | None,
    data: SegmentationData,
    count: int,
) -> list[list[np.ndarray | None]]:
    """A row an image: image, truth, bias, variance and, with a teacher, the weights of weighted soft labels."""
    rows = []
    limits = map_limits(data)
    for index in spread_evenly(data, count):
        sample = data.sample((-1, index, index), seed=0)
        images, labels = sample.images[None].to(accelerator.device), sample.labels.to(accelerator.device)
        logits = [model(images).logits[0] for model in models]
        parts = decompose_image(logits, labels)
        maps: dict[str, torch.Tensor] = {"bias": parts.bias, "variance": parts.variance}
        if teacher is not None:
            maps["WSL weight"] = wsl_weights(logits, teacher(images).logits[0], labels)
        image, label = data.read(index)
        drawn = [heat_map(maps[name], limit) if name in maps else None for name, limit in limits.items()]
        rows.append([image, colourise(label, data.labels.colours), *drawn])
    return rows


def map_limits(data: SegmentationData) -> dict[str, float]:
    """The end of each map's colours: a bias of log C is that of a guess among the C classes."""
    guess = math.log(len(data.labels))
    return {"bias": guess, "variance": guess / 4, "WSL weight": 1.0}


def report_parts(
    config: Config,
    results: list[dict[str, Any]],
    rows: list[tuple[str, list[np.ndarray | None]]],
    data: SegmentationData,
    made_with: dict[str, Any],
) -> None:
    """Prints the tables of bias and variance, and writes them with figures and maps to `out`."""
    tables = (
        f"Expected cross-entropy over seeds and its parts, in nats a pixel, {config.split}, {len(data)} images. "
        f"Boundary: another class within {config.boundary_width} pixels. Off by: loss less the sum of its parts."
        "\n\n"
        f"{decomposition_table(results)}\n\nBias + variance by true class:\n\n{decomposition_by_class(results)}"
    )
    print(f"\n{tables}\n")
    if not config.out:
        return
    limits = map_limits(data)
    width = rows[0][1][0].shape[1]
    scales = [colour_scale(width, limit, "" if "WSL" in name else "nats") for name, limit in limits.items()]
    cells = [row for _, row in rows] + [[None, None, *scales]]
    picture = grid(cells, ["image", "truth", *limits], row_titles=[*(name for name, _ in rows), "scale"])
    figures = {"split": config.split, "environment": made_with, "methods": results}
    legend = (
        "image, truth, maps of bias and variance, and the weights of weighted soft labels where a teacher is known"
    )
    write_out(Path(config.out), tables, legend, figures, picture)


if __name__ == "__main__":
    run_script(main, Config, runs="runs")
