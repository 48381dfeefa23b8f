"""Files of models: found in a folder or on the Hub, read, and held against what they should be."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file
from torch import Tensor

from errors import ConfigurationError, DamagedFileError

FILES = ["*.json", "*.txt"]  # txt: a tokenizer's merges, which OneFormer needs
SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # older; opened as tensors alone, never as code
SECONDS = 10.0  # to wait for the Hub before the cache is asked


def fetch_folder(source: str, key: str, weights: bool = True) -> Path:
    """The folder with the config.json and the weights of `source`.

    A folder stands for itself. Anything of the form `owner/name` or `owner/name@revision` is a model on the Hub:
    it is downloaded (JSON and weights only; pytorch_model.bin where there is no model.safetensors), or taken from
    the cache where there is no network.

    Args:
        source: folder or name on the Hub.
        key: where the user wrote it; begins the message of an error.
        weights: false where config.json will do.

    Raises:
        ConfigurationError: there is no such folder or model, it is gated, it has no config.json or no weights,
            or there is no network and nothing in the cache.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        local = folder.exists() or folder.parent.is_dir() and folder.parent != Path()
        if local or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", source):
            raise ConfigurationError(
                f"{key}: {source} is no folder; give a model's folder or its name on the Hub, owner/name"
            )
        folder = download(source, key, weights)
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"{key}: {folder} has no config.json; give the folder of a saved model")
    if weights and not any((folder / name).is_file() for name in SAFE + PICKLED):
        raise ConfigurationError(
            f"{key}: {folder} has no weights; save it with save_pretrained, which writes model.safetensors"
        )
    return folder


def download(source: str, key: str, weights: bool) -> Path:
    """The snapshot of a model on the Hub: fresh if the Hub answers, else the one in the cache."""
    name, _, revision = source.partition("@")
    revision = revision or "main"
    wanted = {"allow_patterns": FILES, "ignore_patterns": "*/*", "revision": revision}
    if weights:
        wanted["allow_patterns"] = [*FILES, "*.safetensors", "pytorch_model*"]
    try:
        found = HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings or []
        files = {file.rfilename for file in found}
        if weights and not files & {*SAFE, *PICKLED}:
            raise ConfigurationError(f"{key}: {name} has no weights on the Hub; check the name and the revision")
        if weights and files & {*SAFE}:
            wanted["allow_patterns"] = [*FILES, "*.safetensors"]
        return Path(snapshot_download(name, **wanted))  # type: ignore[call-overload]
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{key}: {name} is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{key}: {name} has no revision {revision} on the Hub; check it") from error
    except HFValidationError as error:
        raise ConfigurationError(f"{key}: {source} is no folder and no name on the Hub; check it") from error
    except RepositoryNotFoundError as error:
        raise ConfigurationError(
            f"{key}: {source} is no folder and no model on the Hub; check the name, or log in if it is private"
        ) from error
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set"
    except (httpx.HTTPError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = f"the Hub does not answer ({type(error).__name__})"
    try:
        return Path(snapshot_download(name, local_files_only=True, **wanted))  # type: ignore[call-overload]
    except LocalEntryNotFoundError as error:
        raise ConfigurationError(
            f"{key}: {source} is neither a folder nor in the cache, and {reason}; connect, or give a folder"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model's folder, whole or in shards, by name.

    Raises:
        ConfigurationError: there are none.
        DamagedFileError: a file can't be read.
    """
    paths = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise ConfigurationError(f"{folder / SAFE[0]}: no such file; a model's folder has config.json and weights")
    state: dict[str, Tensor] = {}
    for path in paths:
        try:
            safe = path.suffix == ".safetensors"
            state |= load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedFileError(f"{path}: can't be read ({reason}); download or save it again") from error
    return state


def check_weights(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: object, advice: str) -> None:
    """Raises DamagedFileError, listing five of them, if weights are missing, superfluous or of another shape.

    Args:
        where: what the message begins with: a file or folder, and whose weights they are.
        advice: what it ends with.
    """
    wrong = [f"missing {name}" for name in expected.keys() - state.keys()]
    wrong += [f"superfluous {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    refuse(wrong, where, advice)


def refuse(wrong: list[str], where: object, advice: str) -> None:
    """Raises DamagedFileError with the first five of what is wrong, if anything is."""
    if wrong:
        listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DamagedFileError(f"{where}: {listed}; {advice}")


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{path}: can't be read as JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise DamagedFileError(f"{path}: holds no mapping; download or save it again")
    return found


def read_normalisation(folder: Path, key: str) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and deviation of RGB values in 0..1, and whether the network knows BGR, of preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ConfigurationError(
            f"{key}: {path} is missing, so its normalisation is unknown; copy it from the original model, "
            "or write one with image_mean and image_std"
        )
    found = read_json(path)
    kind = str(found.get("image_processor_type") or found.get("feature_extractor_type") or "")
    bgr = bool(found.get("do_flip_channel_order", kind.startswith("MobileViT")))
    scale = 255 * (float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0)
    mean, std = [0.0] * 3, [1.0] * 3
    if found.get("do_normalize", "image_mean" in found):
        try:
            mean, std = ([float(value) for value in found[name]] for name in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path}: do_normalize without image_mean and image_std; write them") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DamagedFileError(f"{path}: image_mean and image_std are not of three channels; correct them")
    if bgr:
        mean, std = mean[::-1], std[::-1]
    return tuple(value / scale for value in mean), tuple(value / scale for value in std), bgr
