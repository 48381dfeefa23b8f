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
# # What the losses see
#
# Each term of the catalogue looks at something else. This notebook takes a teacher, a student and one scene, and
# draws what the terms compare there, so that one sees where each would send its gradient. `make demo` makes the
# runs that it takes by default; `RUNS` names another folder with a `teacher` in it, `STUDENT` the student's run in
# it (else `distilled`, or the first beside the teacher), `SCENE` another scene. White is unlabelled.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

HOUSE = Path.cwd() if Path("train_teacher.py").exists() else Path.cwd().parent
sys.path.insert(0, str(HOUSE))
from data import IGNORE_INDEX, DataConfig, build_dataset
from evaluation.pictures import denormalise, error_map, overlay
from losses.logits import bpkd
from losses.relations import labels_at, unit_vectors
from losses.supervised import boundary_weight, lovasz
from losses.term import resize
from models import load_model

RUNS = HOUSE / os.environ.get("RUNS", "runs/demo")
SCENE = int(os.environ.get("SCENE", "0"))
found = sorted((p.parent.name for p in RUNS.glob("*/results.json")), key=lambda name: (name != "distilled", name))
STUDENT = os.environ.get("STUDENT", next((name for name in found if name != "teacher"), ""))
assert {"teacher", STUDENT} <= set(found), f"{RUNS}: no run `teacher` with another beside it; call `make demo`"
teacher, student = load_model(RUNS / "teacher/best").eval(), load_model(RUNS / STUDENT / "best").eval()
print(f"teacher: {RUNS / 'teacher'}, student: {RUNS / STUDENT}, scene {SCENE}")

config = OmegaConf.load(RUNS / "teacher/config.yaml")
data = build_dataset(OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config.data)), "val")
assert len(data) > SCENE, f"SCENE={SCENE}: there are {len(data)} scenes"
batch = next(iter(data.eval_loader(rank=SCENE, world_size=len(data))))
image, labels = denormalise(batch.images[0], config.data.mean, config.data.std), batch.labels

# %%
TAP, DEEP = list(student.taps)[-1], "bottleneck"
with torch.no_grad():
    ours, theirs = (model(batch.images, [TAP, DEEP]) for model in (student, teacher))
s, t = (F.interpolate(x.logits, labels.shape[-2:], mode="bilinear", align_corners=False) for x in (ours, theirs))
labelled = labels != IGNORE_INDEX
target = torch.where(labelled, labels, 0)
colours = data.labels.colours


def only(values: torch.Tensor) -> np.ndarray:
    """One map [1, H, W] as an array, unlabelled pixels left out."""
    values = torch.where(labelled, values.float(), torch.nan) if values.shape == labels.shape else values
    return values[0].numpy()


# %% [markdown]
# ## Per pixel
#
# `kd` where the distributions differ; `wsl` how much of that it keeps (nothing where the student already does
# better than the teacher); `dist` where the classes' proportions differ; `confidence_penalty` the teacher's
# entropy; `ohem` the pixels that it keeps; `boundary` its weights.

# %%
temperature = 2.0
log_p, log_q = F.log_softmax(s / temperature, 1), F.log_softmax(t / temperature, 1)
kd = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)
cost_s, cost_t = (F.cross_entropy(x, target, reduction="none") for x in (s, t))
wsl = -torch.expm1(-cost_s / (cost_t + 1e-7))
p, q = s.softmax(1), t.softmax(1)
p, q = (x - x.mean(1, keepdim=True) for x in (p, q))
dist = 1 - F.cosine_similarity(p, q, dim=1)
entropy = -(t.softmax(1) * F.log_softmax(t, 1)).sum(1)
pictures = {
    "scene": image,
    "labels": overlay(image, labels[0], colours),
    "teacher's errors": error_map(t[0].argmax(0), labels[0], image),
    "student's errors": error_map(s[0].argmax(0), labels[0], image),
    "kd: √(T² KL)": only(kd.sqrt()),
    "wsl: weight": only(wsl),
    "dist: 1 - correlation over classes": only(dist),
    "confidence_penalty: the teacher's entropy": only(entropy),
    "ohem: cost of what is kept": only(torch.where(cost_s > -np.log(0.7), cost_s, 0.0)),
    "boundary: weight": only(boundary_weight(labels, 10.0, 5.0)),
}

# %% [markdown]
# ## Per map
#
# `cwd` the softmax over space of one class; `attention_transfer` the energy of both models' features; `affinity`
# how like one position (the star) all others are; `ifvd` how like its class's mean each position is. Of `lovasz`
# and `bpkd`, which have no such map, where their gradient goes.


# %%
def similarity_to(features: torch.Tensor, row: int, column: int) -> np.ndarray:
    height, width = features.shape[-2:]
    unit = unit_vectors(features)[0]
    return (unit.T @ unit[:, row * width + column]).view(height, width).numpy()


def to_class_mean(features: torch.Tensor) -> np.ndarray:
    size = (features.shape[-2], features.shape[-1])
    classes, flat = labels_at(labels, size)[0].flatten(), features[0].flatten(1)
    found = torch.full((flat.shape[1],), torch.nan)
    for one in classes[classes != IGNORE_INDEX].unique():
        inside = classes == one
        found[inside] = F.cosine_similarity(flat[:, inside], flat[:, inside].mean(1, keepdim=True), dim=0)
    return found.view(size).numpy()


present = torch.bincount(target[labelled], minlength=len(data.labels.names))
thing = int((present * (present < 0.1 * present.sum())).argmax())
height, width = ours.features[TAP].shape[-2:]
spot = divmod(int((labels_at(labels, (height, width))[0] == thing).flatten().float().argmax()), width)
models = {"teacher": theirs.features[TAP], "student": ours.features[TAP]}
for name, logits in (("teacher", t), ("student", s)):
    where = (logits[0, thing] / 4).flatten().softmax(0).view(logits.shape[-2:])
    pictures[f"cwd: {data.labels.names[thing]}, {name}"] = where.numpy()
for name, features in models.items():
    energy = features[0].square().mean(0)
    pictures[f"attention_transfer: {name}"] = (energy / energy.norm()).numpy()
for name, features in models.items():
    pictures[f"affinity: {name}, to ★"] = similarity_to(resize(features, (height, width)), *spot)
for name, features in models.items():
    pictures[f"ifvd: {name}"] = to_class_mean(features)
leaf = ours.logits.clone().requires_grad_()
for name, loss in (("lovasz", lovasz(leaf, labels)), ("bpkd", bpkd(leaf, theirs.logits, labels))):
    (gradient,) = torch.autograd.grad(loss, leaf)
    pictures[f"{name}: √ of the gradient's norm"] = gradient[0].norm(dim=0).sqrt().numpy()

# %%
columns = 4
rows = -(-len(pictures) // columns)
tall = 4.2 * image.shape[0] / image.shape[1] + 0.35
figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, tall * rows), constrained_layout=True)
for axis in axes.flat:
    axis.axis("off")
for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=False):
    pair = [p for t, p in pictures.items() if t.split(":")[0] == title.split(":")[0]]  # on one scale
    low, high = (min(map(np.nanmin, pair)), max(map(np.nanmax, pair))) if picture.ndim == 2 else (None, None)
    axis.imshow(picture, "magma" if picture.ndim == 2 else None, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    if "★" in title:
        axis.plot(spot[1], spot[0], marker="*", color="cyan", markersize=9)
plt.show()

# %% [markdown]
# The same picture as a file, for a document: set `PICTURE` to its path.

# %%
if "PICTURE" in os.environ:
    figure.savefig(os.environ["PICTURE"], dpi=60)
