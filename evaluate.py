"""Evaluate runs: accuracy by class, pictures, and one table of all of them.

one run          python evaluate.py runs/teacher
several          python evaluate.py runs/teacher runs/baseline runs/distilled split=test out=results/mine
many processes   accelerate launch --config_file configs/accelerate/eight_gpus.yaml evaluate.py runs/teacher

Each run gets `evaluation_SPLIT.json` and pictures in `images/`: image, truth, prediction, errors. With `out`, the
tables of all runs go to OUT.md, their figures to OUT.json and a picture of them side by side to OUT.png. Runs that
differ in their seed alone are summed up as mean and spread.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import DataConfig, SegmentationData, build_dataset
from deploy.profiling import count_flops, count_parameters
from engine.config import run_script
from engine.loop import evaluate, summarise
from engine.player import TrainConfig
from engine.run import environment, on_main_process, read_json, start_accelerator
from engine.tracking import write_json
from errors import ConfigurationError
from evaluation.metrics import predict
from evaluation.pictures import colourise, error_map, grid, save_png
from evaluation.report import compare_runs, per_class_table, seeds_table
from models import SegmentationModel, load_model


@dataclass
class Config:
    """What evaluate.py can be told."""

    runs: list[str] = field(default_factory=list)
    """Run directories; those among the arguments are added."""
    split: Literal["val", "test", "train"] = "val"
    """Split of the data set that each run was trained on."""
    root: str = ""
    """Folder of the data set, if it is not where it was in training."""
    pictures: int = 4
    """Images to draw, spread evenly over the split."""
    out: str = ""
    """Path, without an ending, of the comparison of several runs; nothing is written if it is empty."""
    workers: int = 0
    """Loader processes."""


def main(config: Config) -> None:
    if not config.runs:
        raise ConfigurationError("runs: no run is named; give one or several run directories")
    accelerator = start_accelerator(TrainConfig())
    results, columns = [], []
    for run_dir in config.runs:
        folder = Path(run_dir)
        model = load_model(folder).to(accelerator.device).eval()
        data_of_run = data_config(folder, config.root)
        data = build_dataset(data_of_run, config.split)
        model.take_images(data_of_run.mean, data_of_run.std)
        if model.class_names != list(data.labels.names):
            raise ConfigurationError(f"{folder}: its model knows other classes than its data set; train it again")
        scored = summarise(evaluate(accelerator, model, data, workers=config.workers), data.labels.names)
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


def data_config(folder: Path, root: str) -> DataConfig:
    """The data set of a run, as its config.yaml has it."""
    path = folder / "config.yaml"
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(path).data)
        return DataConfig(**(saved | ({"root": root} if root else {})))
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path}: no such file; name the directory of a run") from error
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path}: not the configuration of a run ({error}); train it again") from error


def method(folder: Path) -> str:
    """What a run's configuration says besides seed, folder and tracking: equal for several seeds of one method."""
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    said = {key: value for key, value in saved.items() if key not in ("run_dir", "seed", "tracking")}
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
    chosen = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int))
    answers = {}
    for index in chosen.tolist():
        sample = data.sample((-1, index, index), seed=0)
        logits = model(sample.images[None].to(accelerator.device)).logits
        answers[index] = predict(logits, tuple(sample.labels.shape))[0].cpu().numpy().astype(np.uint8)
    return answers


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
    tables += f"IoU by class, {config.split}, {len(data)} images of {size}, in per cent:\n\n"
    tables += per_class_table(results)
    print(f"\n{tables}\n")
    if not config.out:
        return
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    revision = str(made_with["revision"])[:12] + (" with changes" if made_with["dirty"] else "")
    page = [
        f"# {out.name}",
        f"{date.today()}, revision {revision}, {made_with['device']}, {made_with['threads']} threads, "
        f"torch {made_with['packages']['torch']}.",
        f"```\npython {' '.join(sys.argv)}\n```",
        tables,
        f"The pictures, image, truth and predictions: `{out.name}.png`, beside this file where the command ran.",
    ]
    out.with_name(f"{out.name}.md").write_text("\n\n".join(page) + "\n")
    write_json(
        out.with_name(f"{out.name}.json"), {"split": config.split, "environment": made_with, "runs": results}
    )
    colours, rows = data.labels.colours, []
    for index in columns[0]:
        image, label = data.read(index)
        rows.append(
            [image, colourise(label, colours), *(colourise(answers[index], colours) for answers in columns)]
        )
    titles = ["image", "truth", *(Path(run).name for run in config.runs)]
    save_png(out.with_name(f"{out.name}.png"), grid(rows, titles))
    print(f"written: {out}.md, {out}.json, {out}.png")


if __name__ == "__main__":
    run_script(main, Config, runs="runs")
