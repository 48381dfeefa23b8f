"""Segmentation models of Hugging Face transformers, from a folder or the Hub, behind this house's interface."""

import copy
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError, DamagedFileError
from models.batchnorm import SafeBatchNorm2d, recomputation
from models.families import FAMILIES, Family, family_of, resize
from models.interface import Output, SegmentationModel, native_size, pad_to
from models.weights import SAFE, fetch_folder, read_json, read_normalisation, refuse

TENSORFLOWS_DECAY = 0.997  # what the running statistics keep, where PyTorch's momentum is what they take in
MULTIPLE = 32  # the coarsest stride of all the families that take any size


class HubModel(SegmentationModel):
    """A semantic-segmentation model of transformers: any of `FAMILIES`.

    Taps: `encoder.0` (finest) … , `bottleneck`, `decoder.0` … in running order. What they are is said at each
    family's `run_…`. The last one is what the classifier sees but for dropout; for mask classifiers it is what
    masks are read from. Token maps come without class and register tokens.

    Logits are at the network's own stride: 4, but 2 for DPT and 8 to 32 for the MobileNets. Mask classifiers
    answer by `pixel_scores`. Images of networks of one fixed size (BEiT, Data2Vec-vision, EoMT) are resized to it,
    whatever their shape, bilinearly and antialiased; their logits and taps are resized to what the contract says.
    Images of all others are padded to a multiple of 32.

    What never acts on the logits is not there: auxiliary heads, poolers, norms and layers behind the last map in
    use, text encoders, training criteria. So every parameter gets a gradient.

    Args:
        class_names: names of the classes, in the order of the logits.
        network: transformers' configuration (the contents of its config.json); its own labels are not used. It is
            not named `config`, which the Hub's mixin would spread over our config.json.
        size: [height, width] to which images are resized and their maps back, for networks that take any size; the
            fixed size of the others is in their configuration.
        task: OneFormer alone: the tokens of "the task is semantic".
    """

    architecture = "hub"

    def __init__(
        self,
        class_names: list[str],
        network: dict[str, Any],
        size: list[int] | None = None,
        task: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.class_names = list(class_names)
        self.family = family_of(network, "model.network")
        self.size = list(size) if size else None
        if self.family.resizes:
            own = config_of(network, self.class_names).image_size
            fixed = list(own) if isinstance(own, (list, tuple)) else [own, own]
            if self.size not in (None, fixed):
                raise ConfigurationError(f"model.size: {size} is not the one size of this network; leave it out")
            self.size = fixed
        elif self.size and (len(self.size) != 2 or any(side < 1 or side % MULTIPLE for side in self.size)):
            raise ConfigurationError(
                f"model.size: {size} is not two multiples of {MULTIPLE}; give [height, width]"
            )
        if (network["model_type"] == "oneformer") != (task is not None):
            raise ConfigurationError("model.task: tokens of the semantic task are for OneFormer, which needs them")
        self.task = task
        self.take(new_network(network, self.class_names))

    def take(self, network: Any) -> None:
        """Makes `network` this model's, less what is never reached."""
        self.taps, self.stride = self.family.publish(network)
        if self.task is not None:
            network.register_buffer("task", torch.tensor([self.task]), persistent=False)
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SafeBatchNorm2d
                if module.momentum == TENSORFLOWS_DECAY:  # of the MobileNets: it would keep the last batch alone
                    module.momentum = 0.1
        self.net = network

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size."""
        self.check_taps(taps)
        x = self.renormalise(images)
        if self.size:
            whole = F.interpolate(x.float(), size=tuple(self.size), mode="bilinear", antialias=True)
            x = whole.to(x.dtype)  # antialiasing has no bfloat16 on a CPU
        else:
            x = pad_to(x, MULTIPLE)
        logits, maps = self.family.run(self.net, x)
        return self.answer(images, logits, dict(zip(self.taps, maps, strict=True)), taps)

    def notes(self) -> list[str]:
        return [f"{type(self.net).__name__} of transformers"]

    def to_native(self, map_: Tensor, height: int, width: int, stride: int) -> Tensor:
        """A map of the resized or padded image as the contract wants it of the given one."""
        if self.size:
            return resize(map_, native_size(height, width, stride))
        return super().to_native(map_, height, width, stride)

    def enable_gradient_checkpointing(self) -> None:
        """Of the whole network, or of its backbone where transformers has none for the rest."""
        able = [m for m in self.net.modules() if getattr(m, "supports_gradient_checkpointing", False)]
        if not able:
            super().enable_gradient_checkpointing()
        contexts = functools.partial(recomputation, self.net)
        for module in able:
            module.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def config_of(config: dict[str, Any], class_names: Sequence[str]) -> Any:
    """transformers' configuration object, with these classes."""
    from transformers import CONFIG_MAPPING

    names = {str(i): name for i, name in enumerate(class_names)}
    left_out = ("num_labels", "dtype", "torch_dtype")
    given = {key: copy.deepcopy(value) for key, value in config.items() if key not in left_out}  # some are emptied
    given |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    if config["model_type"] == "oneformer":
        given["is_training"] = False  # else it asks for a text to every image
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(given)
    except Exception as error:  # transformers' validators raise of many kinds
        raise broken(config, error) from error


def broken(config: dict[str, Any], error: Exception) -> DamagedFileError:
    """The error of a configuration that transformers does not take."""
    reason = " ".join(str(error).split())
    return DamagedFileError(f"config.json of a {config['model_type']}: {reason}; download or save the model again")


def new_network(config: dict[str, Any], class_names: Sequence[str]) -> Any:
    """A network with fresh weights."""
    import transformers

    network, own = getattr(transformers, FAMILIES[config["model_type"]].network), config_of(config, class_names)
    try:
        return network(own)
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise broken(config, error) from error


# --------------------------------------------------------------------------------------------------- loading


def from_hub(source: str, key: str = "teacher.run", class_names: list[str] | None = None) -> HubModel:
    """A pretrained model from a folder or the Hub, whole.

    Its class names are those of config.json, its normalisation that of preprocessor_config.json; a network that
    knows BGR images (MobileViT) gets the weights of its first layer turned to RGB.

    Args:
        source: a folder as save_pretrained writes it, or a name on the Hub: see `fetch_folder`.
        key: where the user wrote it; begins the message of an error.
        class_names: other classes to fine-tune for: everything is kept but the classifier, which is drawn anew.
            Not for mask classifiers, whose queries know their classes.

    Raises:
        ConfigurationError: there is no such model or it has no use here.
        DamagedFileError: a file can't be read, or weights are missing, misshapen or unknown. Weights of what is
            dropped (auxiliary heads, poolers, text encoders: see HubModel) may be missing or there.
    """
    from transformers.initialization import no_init_weights

    folder = fetch_folder(source, key)
    config = read_json(folder / "config.json")
    family = family_of(config, f"{key}: {folder / 'config.json'}")
    names = names_of(config, folder / "config.json")
    mean, std, bgr = read_normalisation(folder, key)
    task = task_tokens(folder, config, key) if config["model_type"] == "oneformer" else None

    network = load_network(family.network, folder, config_of(config, names))
    if config["model_type"] == "eomt" and network.attn_mask_probs.any():
        raise ConfigurationError(f"{key}: {folder} still masks its attention; finish its training first")
    if bgr:
        turn_stem(network, key)
    if class_names is not None:
        renew_classifier(network, family, len(class_names), key)
    with no_init_weights():
        model = HubModel(class_names or names, config, task=task)
    model.take(network)
    model.mean, model.std = mean, std
    return model


def renew_classifier(network: Any, family: Family, classes: int, key: str) -> None:
    """Puts a new 1×1 convolution in the place of the last one."""
    if family.classifier is None:
        raise ConfigurationError(f"{key}: the classes of a mask classifier can't be replaced; take another model")
    parent, _, child = family.classifier.rpartition(".")
    owner = network.get_submodule(parent)
    new = nn.Conv2d(getattr(owner, child).in_channels, classes, 1)
    nn.init.normal_(new.weight, std=0.02)
    nn.init.zeros_(new.bias)  # type: ignore[arg-type]
    setattr(owner, child, new)


def from_shape(source: str, key: str, class_names: list[str]) -> HubModel:
    """A model of the shape of a pretrained one for these classes, all its weights drawn anew.

    Args as for `from_hub`, whose errors it raises; no weights are asked for. Its normalisation is that of
    preprocessor_config.json, or ImageNet's where there is none, since no weights depend on it.
    """
    folder = fetch_folder(source, key, weights=False)
    config = read_json(folder / "config.json")
    family_of(config, f"{key}: {folder / 'config.json'}")
    task = task_tokens(folder, config, key) if config["model_type"] == "oneformer" else None
    model = HubModel(class_names, config, task=task)
    if (folder / "preprocessor_config.json").is_file():
        model.mean, model.std, _ = read_normalisation(folder, key)
    return model


# Buffers that transformers computes, and weights of what is dropped.
UNUSED = re.compile(
    r"relative_position_index|num_batches_tracked|position_ids|auxiliary_head\.|pooler\.|text_mapper\.|criterion\."
    r"|prompt_ctx|mask_token|(swin|model)\.layernorm\.|fusion_stage\.layers\.0\.residual_layer1\."
)


def load_network(name: str, folder: Path, config: Any) -> Any:
    """A network of transformers with the weights of `folder`, all of them and no others.

    Raises:
        DamagedFileError: the first five of the missing, unexpected and misshapen weights, and how many there are.
    """
    import transformers

    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # its report of wrong weights becomes the error below
    transformers.logging.disable_progress_bar()
    try:
        network, info = getattr(transformers, name).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=(folder / SAFE[0]).is_file() or (folder / SAFE[1]).is_file(),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(
            f"{folder}: weights can't be read ({reason}); download or save them again"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
    wrong = [f"missing {key}" for key in info["missing_keys"] if not UNUSED.search(key)]
    wrong += [f"superfluous {key}" for key in info["unexpected_keys"] if not UNUSED.search(key)]
    wrong += [
        f"{key} is {list(there)}, not {list(here)}"
        for key, there, here in info["mismatched_keys"]
        if not UNUSED.search(key)
    ]
    refuse(wrong, f"{folder}: {len(wrong)} weights do not fit its config.json", "check config.json")
    return network


def names_of(config: dict[str, Any], path: Path) -> list[str]:
    """The classes of config.json, in the order of the logits."""
    found = config.get("id2label") or {}
    try:
        numbered = {int(number): str(name) for number, name in found.items()}
    except (ValueError, AttributeError) as error:
        raise DamagedFileError(f"{path}: id2label is no mapping of numbers to names; correct it") from error
    if sorted(numbered) != list(range(len(numbered))):
        raise DamagedFileError(f"{path}: id2label does not number its classes from 0 without gaps; correct it")
    names = [numbered[number] for number in range(len(numbered))]
    if len(names) < 2 or all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        raise ConfigurationError(
            f"{path}: names no classes to segment, so they can't be matched; write them into id2label"
        )
    return names


def turn_stem(network: Any, key: str) -> None:
    """Exchanges red and blue in the weights of the first layer."""
    body = getattr(network, "mobilevit", None) or getattr(network, "mobilevitv2", None)
    if body is None:
        raise ConfigurationError(f"{key}: do_flip_channel_order is known of MobileViT alone; convert the weights")
    weight = body.conv_stem.convolution.weight
    weight.data = weight.data.flip(1).contiguous()


def task_tokens(folder: Path, config: dict[str, Any], key: str) -> list[int]:
    """The tokens of OneFormer's semantic task, padded with 0."""
    from transformers import CLIPTokenizer

    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise ConfigurationError(
            f"{key}: {folder} has no tokenizer (vocab.json and merges.txt), which OneFormer needs"
        )
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer("the task is semantic")["input_ids"]
    length = int(config.get("task_seq_len", 77))
    return [*tokens, *[0] * (length - len(tokens))][:length]
