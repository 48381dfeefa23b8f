"""Folders of transformers' models, tiny, as the Hub has them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEGFORMER = {
    "model_type": "segformer",
    "architectures": ["SegformerForSemanticSegmentation"],
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def write_folder(
    folder: Path,
    config: dict[str, Any],
    names: Sequence[str],
    normalisation: tuple[list[float], list[float]] = IMAGENET,
) -> Path:
    """A model of `config` for the classes `names`, freshly drawn, with the settings of its image processor."""
    import torch
    from transformers import AutoConfig, AutoModelForSemanticSegmentation

    torch.manual_seed(0)
    options = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    labels = dict(enumerate(names))
    made = AutoConfig.for_model(config["model_type"], id2label=labels, num_labels=len(names), **options)
    AutoModelForSemanticSegmentation.from_config(made).save_pretrained(folder)
    write_processor(folder, *normalisation)
    return folder


def write_processor(folder: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    processor = {"do_normalize": True, "image_mean": list(mean), "image_std": list(std), "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"rescale_factor": 1 / 255}))
