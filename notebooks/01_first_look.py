# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first look at runs
#
# What a run leaves behind is plain files: `metrics.jsonl`, `results.json`, `best/`. This notebook reads those of
# every run below one folder with pandas, draws the training curves, and compares results and predictions.
# `make demo` makes the runs that it shows by default; set `RUNS` to the folder of your own.

# %%
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image, Markdown, display

HOUSE = Path.cwd() if Path("train_teacher.py").exists() else Path.cwd().parent
sys.path.insert(0, str(HOUSE))
RUNS = Path(os.environ.get("RUNS", HOUSE / "runs" / "demo"))
folders = sorted(path.parent for path in RUNS.glob("*/metrics.jsonl"))
assert folders, f"{RUNS}: no runs; call `make demo`, or set RUNS to a folder of runs"
[folder.name for folder in folders]

# %% [markdown]
# ## Curves
#
# One line of `metrics.jsonl` is one event; times, speeds and memory stand under `system`.


# %%
def read_metrics(folder: Path) -> pd.DataFrame:
    """All events of a run, one a row, nested values as dotted columns."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return pd.json_normalize(lines).assign(run=folder.name)


metrics = pd.concat([read_metrics(folder) for folder in folders], ignore_index=True)
train, val = metrics[metrics.split == "train"], metrics[metrics.split == "val"]

terms = [c for c in ("loss", "cross_entropy", "kd", "attention_transfer", "fitnet", "affinity") if c in train]
figure, axes = plt.subplots(1, len(terms) + 1, figsize=(4 * (len(terms) + 1), 3.2), constrained_layout=True)
for axis, term in zip(axes, terms, strict=False):
    for run, rows in train.groupby("run"):
        axis.plot(rows.step, rows[term], label=run)
    axis.set(title=term, xlabel="step", yscale="log")
for run, rows in val.groupby("run"):
    axes[-1].plot(rows.step, 100 * rows.miou, marker="o", label=run)
axes[-1].set(title="val mIoU %", xlabel="step")
axes[-1].legend()
plt.show()

# %% [markdown]
# ## Results

# %%
finished = [folder for folder in folders if (folder / "results.json").exists()]
results = pd.DataFrame({f.name: json.loads((f / "results.json").read_text()) for f in finished}).T
table = pd.DataFrame(
    {
        "parameters": results.parameters.astype(int),
        "val mIoU %": (100 * results.miou.astype(float)).round(2),
        "best %": (100 * results.best_miou.astype(float)).round(2),
        "pixel accuracy %": (100 * results.pixel_accuracy.astype(float)).round(2),
        "training s": results.train_seconds,
    }
).sort_values("parameters", ascending=False)
table

# %%
iou = pd.DataFrame({name: row.iou for name, row in results.iterrows()}).astype(float) * 100
iou.loc[iou.mean(axis=1).sort_values().index].plot.barh(figsize=(8, 0.35 * len(iou) + 1), width=0.8)
plt.xlabel("val IoU %")
plt.show()

# %% [markdown]
# ## Predictions
#
# Each run's best weights, on images of the validation split: image, truth, then one column a run.

# %%
from data import build_dataset
from evaluate import data_config
from evaluation.metrics import predict
from evaluation.pictures import colourise, grid
from models import load_model

data = build_dataset(data_config(finished[0], root=""), "val")
models = [load_model(folder / "best").eval() for folder in finished]
rows = []
for index in np.linspace(0, len(data) - 1, min(4, len(data))).round().astype(int).tolist():
    image, label = data.read(index)
    sample = data.sample((-1, index, index), seed=0)
    with torch.no_grad():
        answers = [predict(model(sample.images[None]).logits, label.shape)[0] for model in models]
    rows.append([image, *(colourise(classes, data.labels.colours) for classes in (label, *answers))])
picture = grid(rows, ["image", "truth", *(folder.name for folder in finished)])
plt.figure(figsize=(14, 14 * picture.shape[0] / picture.shape[1]))
plt.imshow(picture)
plt.axis("off")
plt.show()

# %% [markdown]
# ## What the last evaluation saved
#
# `python evaluate.py RUN RUN … out=FOLDER` writes the same comparison as files.

# %%
if (RUNS / "comparison.md").exists():
    display(Markdown((RUNS / "comparison.md").read_text()), Image(str(RUNS / "comparison.png")))
