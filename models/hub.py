"""Segmentation models of Hugging Face transformers, from a folder or the Hub, behind this house's interface."""

import copy
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from errors import ConfigurationError, DamagedFileError
from models.interface import Output, SegmentationModel, Tap, crop_to_native, native_size, pad_to

FILES = ["*.json", "*.txt"]  # txt: a tokenizer's merges, which OneFormer needs
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SECONDS = 10.0  # to wait for the Hub before the cache is asked


def fetch_folder(source: str, key: str, weights: bool = True) -> Path:
    """The folder with the config.json and the weights of `source`.

    A folder stands for itself. Anything of the form `owner/name` or `owner/name@revision` is a model on the Hub:
    it is downloaded (JSON and safetensors only), or taken from the cache where there is no network. Pickles
    (pytorch_model.bin) are not opened.

    Args:
        source: folder or name on the Hub.
        key: where the user wrote it; begins the message of an error.
        weights: false where config.json will do.

    Raises:
        ConfigurationError: there is no such folder or model, it is gated, it has no config.json or no weights in
            safetensors, or there is no network and nothing in the cache.
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
    if weights and not any((folder / name).is_file() for name in WEIGHTS):
        pickled = any(folder.glob("*.bin"))
        raise ConfigurationError(f"{key}: {folder} has {'only pickled' if pickled else 'no'} weights; {ADVICE}")
    return folder


ADVICE = "save it with save_pretrained, which writes model.safetensors"


def download(source: str, key: str, weights: bool) -> Path:
    """The snapshot of a model on the Hub: fresh if the Hub answers, else the one in the cache."""
    name, _, revision = source.partition("@")
    revision = revision or "main"
    wanted = {
        "allow_patterns": FILES + ["*.safetensors"] * weights,
        "ignore_patterns": "*/*",
        "revision": revision,
    }
    try:
        files = [
            file.rfilename for file in HfApi().model_info(name, revision=revision, timeout=SECONDS).siblings or []
        ]
        if weights and not set(WEIGHTS) & set(files):
            pickled = any(file.endswith(".bin") for file in files)
            raise ConfigurationError(
                f"{key}: {name} has {'only pickled weights' if pickled else 'no weights'} on the Hub; "
                f"give a revision with model.safetensors as {name}@REVISION, or load it elsewhere and {ADVICE}"
            )
        return Path(snapshot_download(name, **wanted))  # type: ignore[call-overload]
    except GatedRepoError as error:
        raise ConfigurationError(
            f"{key}: {name} is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigurationError(f"{key}: {name} has no revision {revision} on the Hub; check it") from error
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


# ---------------------------------------------------------------------------------------- families of networks


class Family(NamedTuple):
    """How one kind of transformers' networks is used.

    Args:
        network: name of its class in transformers.
        publish: drops from a network what `run` never reaches (auxiliary heads, layers behind the last one in use)
            and tells its taps and the stride of its logits.
        run: (network, images) -> (logits, maps in the order of the taps).
        classifier: name of the layer that is drawn anew for other classes; none for mask classifiers.
        resizes: whether images have to be of the one size in its configuration.
    """

    network: str
    publish: Callable[[Any], tuple[dict[str, Tap], int]]
    run: Callable[[Any, Tensor], tuple[Tensor, list[Tensor]]]
    classifier: str | None = None
    resizes: bool = False


MULTIPLE = 32  # the coarsest stride of all the families that take any size


def drop(network: nn.Module, *names: str) -> None:
    """Puts nothing in the place of the submodules of these names that are there: their weights go with them."""
    for name in names:
        parent, _, child = name.rpartition(".")
        try:
            owner = network.get_submodule(parent)
        except AttributeError:
            continue
        if isinstance(getattr(owner, child, None), nn.Module):
            setattr(owner, child, nn.Identity())


def resize(map_: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(map_, size=tuple(size), mode="bilinear", align_corners=False)


def grid(tokens: Tensor, rows: int, columns: int, *, prefix: int = 1) -> Tensor:
    """[B, prefix + rows * columns, C] as a map [B, C, rows, columns], without the prefix (class, registers)."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


def levels(strides: Sequence[int], channels: Sequence[int]) -> list[Tap]:
    return [Tap(channel, stride) for channel, stride in zip(channels, strides, strict=True)]


def named(encoder: Sequence[Tap], bottleneck: Tap, decoder: Sequence[Tap]) -> dict[str, Tap]:
    """The taps by their names, in running order."""
    taps = {f"encoder.{i}": tap for i, tap in enumerate(encoder)} | {"bottleneck": bottleneck}
    return taps | {f"decoder.{i}": tap for i, tap in enumerate(decoder)}


def publish_segformer(net: Any) -> tuple[dict[str, Tap], int]:
    config = net.config
    strides = list(itertools.accumulate(config.strides, operator.mul))
    encoder, fused = levels(strides, config.hidden_sizes), Tap(config.decoder_hidden_size, strides[0])
    return named(encoder, encoder[-1], [fused]), strides[0]


def run_segformer(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """SegFormer: the four stages; the last of them; the fused map."""
    maps, head = [images], net.decode_head
    for stage in net.segformer.stages:
        maps.append(stage(maps[-1]))
    projected = [
        resize(project(map_).transpose(1, 2).unflatten(2, map_.shape[-2:]), maps[1].shape[-2:])
        for project, map_ in zip(head.linear_projections, maps[1:], strict=True)
    ]
    fused = head.activation(head.batch_norm(head.linear_fuse(torch.cat(projected[::-1], dim=1))))
    return head.classifier(head.dropout(fused)), [*maps[1:], maps[-1], fused]


BY_STAGE = ("SwinBackbone", "ConvNextBackbone", "ConvNextV2Backbone")


def publish_backbone(backbone: Any) -> list[Tap]:
    """Stages of a hierarchical backbone, at strides 4, 8, 16 and 32."""
    drop(backbone, "swin.layernorm", "model.layernorm", "layernorm")
    if type(backbone).__name__ in BY_STAGE:
        for module in backbone.modules():
            module._forward_hooks.clear()  # transformers', which collect what is not asked for
    stages = [int(name.removeprefix("stage")) for name in backbone.out_features]
    return levels([2 ** (stage + 1) for stage in stages], backbone.channels)


def run_backbone(backbone: Any, images: Tensor) -> list[Tensor]:
    """The stages of a hierarchical backbone. Those of BY_STAGE, which transformers collects by forward hooks, are
    called one by one; of others its own maps are taken."""
    if type(backbone).__name__ not in BY_STAGE:
        return list(backbone(images).feature_maps)
    names, norms, maps = backbone.stage_names[1:], backbone.hidden_states_norms, []
    if not hasattr(backbone, "swin"):
        x = backbone.embeddings(images)
        for name, stage in zip(names, backbone.encoder.stages, strict=True):
            x = stage(x)
            maps += [norms[name](x)] if name in norms else []
        return maps
    tokens, size = backbone.swin.embeddings(images)
    for name, stage in zip(names, backbone.swin.encoder.layers, strict=True):
        tokens, map_, _ = stage(tokens, size, always_partition=True, output_hidden_states_before_downsampling=True)
        maps += [norms[name](map_.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)] if name in norms else []
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return maps


def publish_pyramid(encoder: list[Tap], width: int, strides: list[int]) -> tuple[dict[str, Tap], int]:
    """Taps of a UPerNet head with levels of these strides, fine to coarse."""
    finer = [Tap(width, stride) for stride in strides[-2::-1]]
    return named(encoder, Tap(width, strides[-1]), [*finer, finer[-1]]), strides[0]


def run_pyramid(head: Any, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """UPerNet's head (Xiao et al. 2018): logits; its pooled pyramid, the finer levels and the fused map."""
    tops = [conv(map_) for conv, map_ in zip(head.lateral_convs, maps, strict=False)] + [head.psp_forward(maps)]
    for i in range(len(tops) - 1, 0, -1):
        tops[i - 1] = tops[i - 1] + resize(tops[i], tops[i - 1].shape[-2:])
    tops = [conv(map_) for conv, map_ in zip(head.fpn_convs, tops, strict=False)] + tops[-1:]
    size = tops[0].shape[-2:]
    fused = head.fpn_bottleneck(torch.cat([tops[0], *(resize(map_, size) for map_ in tops[1:])], dim=1))
    return head.classifier(fused), [*tops[::-1], fused]


def publish_upernet(net: Any) -> tuple[dict[str, Tap], int]:
    drop(net, "auxiliary_head")
    encoder = publish_backbone(net.backbone)
    return publish_pyramid(encoder, net.config.hidden_size, [tap.stride for tap in encoder])


def run_upernet(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """UPerNet: the backbone's stages; the pooled pyramid; the finer levels and the fused map."""
    maps = run_backbone(net.backbone, images)
    logits, decoded = run_pyramid(net.decode_head, maps)
    return logits, maps + decoded


def publish_beit(net: Any) -> tuple[dict[str, Tap], int]:
    body = net.beit if hasattr(net, "beit") else net.data2vec_vision
    drop(net, "auxiliary_head")
    drop(body, "layernorm")
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer
    del layers[max(net.config.out_indices) - 1 :]
    width, patch = net.config.hidden_size, net.config.patch_size
    return publish_pyramid([Tap(width, patch)] * 4, width, [patch // 4, patch // 2, patch, patch * 2])


def run_beit(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """BEiT: the four token maps that its pyramid is made of; UPerNet's maps as above."""
    body, size = net.beit, images.shape[-2:]
    rows, columns = (length // net.config.patch_size for length in size)
    states, bias = [body.embeddings(images)], None
    if body.shared_position_bias is not None:
        bias = body.shared_position_bias((rows, columns), dim_size=states[0].shape[1])
    for layer in body.layers:
        states.append(layer(states[-1], attention_mask=bias, resolution=size))
    maps = [grid(states[i - 1], rows, columns) for i in net.config.out_indices]
    logits, decoded = run_pyramid(net.decode_head, list(net.fpn(maps)))
    return logits, maps + decoded


def run_data2vec(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Data2Vec-vision: as BEiT."""
    rows, columns = (length // net.config.patch_size for length in images.shape[-2:])
    states = net.data2vec_vision(images, output_hidden_states=True, return_dict=True).hidden_states
    maps = [grid(states[i - 1], rows, columns) for i in net.config.out_indices]
    pyramid = [net.fpn1(maps[0]), net.fpn2(maps[1]), net.fpn3(maps[2]), net.fpn4(maps[3])]
    logits, decoded = run_pyramid(net.decode_head, pyramid)
    return logits, maps + decoded


def publish_dpt(net: Any) -> tuple[dict[str, Tap], int]:
    config = net.config
    if config.head_in_index != -1:
        raise ConfigurationError("config.head_in_index: DPT's head reads its last map here; give -1")
    drop(net, "auxiliary_head", "dpt.layernorm")
    del net.dpt.encoder.layer[max(config.backbone_out_indices) + 1 :]
    # the first fusion has no residual map, so its first unit is never reached
    drop(net, "neck.fusion_stage.layers.0.residual_layer1")
    encoder = [Tap(config.hidden_size, config.patch_size)] * 4
    if config.is_hybrid:
        encoder[:2] = publish_backbone(net.dpt.embeddings.backbone)[:2]
    width = config.fusion_hidden_size
    return named(encoder, encoder[-1], levels([16, 8, 4, 2, 2], [width] * 5)), 2


def run_dpt(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """DPT: the four token maps (hybrid: two of the convolutions, two of tokens); the last of them; the fusions,
    coarse to fine, and the head's map. Logits are those before the head's last layer, which doubles their size."""
    config, rows, columns = net.config, *(length // net.config.patch_size for length in images.shape[-2:])
    if config.is_hybrid:
        start = net.dpt.embeddings(images, interpolate_pos_encoding=True)
        maps, chosen = list(start.intermediate_activations), config.backbone_out_indices[2:]
    else:
        start, maps, chosen = net.dpt.embeddings(images), [], config.backbone_out_indices
    tokens, states, convolved = start.last_hidden_states, list(maps), list(maps)
    for i, layer in enumerate(net.dpt.encoder.layer):
        tokens = layer(tokens)
        if i in chosen:
            states.append(tokens)
            convolved.append(grid(tokens, rows, columns))
    fusions = net.neck(states, rows, columns)
    *before, dropout, classifier, _ = net.head.head
    fused = fusions[-1]
    for layer in before:
        fused = layer(fused)
    return classifier(dropout(fused)), [*convolved, convolved[-1], *fusions, fused]


def publish_mobilenet(net: Any) -> tuple[dict[str, Tap], int]:
    drop(net, "mobilenet_v2.conv_1x1")
    encoder: list[Tap] = []
    stride, body = 2, net.mobilenet_v2
    for channels, step in mobilenet_layers(body):
        stride *= step
        encoder = [tap for tap in encoder if tap.stride != stride] + [Tap(channels, stride)]
    return named(encoder, encoder[-1], [Tap(256, stride)]), stride


def mobilenet_layers(body: Any) -> list[tuple[int, int]]:
    """Channels and stride of the stem (whose stride of 2 counts as 1) and of each layer."""
    layers = [
        (layer.reduce_1x1.convolution.out_channels, layer.conv_3x3.convolution.stride[0]) for layer in body.layer
    ]
    return [(body.conv_stem.reduce_1x1.convolution.out_channels, 1), *layers]


def run_mobilenet(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """MobileNetV2 with DeepLab's head: the last map of each stride; the last of all; the projected map."""
    body, head = net.mobilenet_v2, net.segmentation_head
    maps = [body.conv_stem(images)]
    for layer, (_, step) in zip(body.layer, mobilenet_layers(body)[1:], strict=True):
        map_ = layer(maps[-1])
        maps = [*maps, map_] if step > 1 else [*maps[:-1], map_]
    pooled = head.conv_pool(head.avg_pool(maps[-1])).expand(-1, -1, *maps[-1].shape[-2:])
    fused = head.conv_projection(torch.cat([pooled, head.conv_aspp(maps[-1])], dim=1))
    return head.classifier(head.dropout(fused)), [*maps, maps[-1], fused]


def publish_mobilevit(net: Any) -> tuple[dict[str, Tap], int]:
    body = net.mobilevit if hasattr(net, "mobilevit") else net.mobilevitv2
    last = net.config.output_stride
    strides = [min(stride, last) for stride in (2, 4, 8, 16, 32)]
    layers = list(body.encoder.layer)
    channels = [layers[0].layer[-1].reduce_1x1.convolution.out_channels] + [
        (
            layer.layer[0] if hasattr(layer, "layer") else layer.downsampling_layer
        ).reduce_1x1.convolution.out_channels
        for layer in layers[1:]
    ]
    encoder = levels(strides, channels)
    return named(encoder, encoder[-1], [Tap(net.config.aspp_out_channels, last)]), last


def run_mobilevit(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """MobileViT and MobileViTV2 with DeepLabV3's head: the five stages; the last of them; the pooled pyramid."""
    body = net.mobilevit if hasattr(net, "mobilevit") else net.mobilevitv2
    head, maps = net.segmentation_head, [body.conv_stem(images)]
    for layer in body.encoder.layer:
        maps.append(layer(maps[-1]))
    fused = head.aspp(maps[-1])
    return head.classifier(head.dropout(fused)), [*maps[1:], maps[-1], fused]


def pixel_scores(classes: Tensor, masks: Tensor) -> Tensor:
    """Logits of a mask classifier (Cheng et al. 2021, Per-Pixel Classification is Not All You Need, section 3.4).

    The score of class c is sum_q softmax(classes)[q, c] * sigmoid(masks)[q]; its logarithm is the logit, so that
    softmax over the classes gives the scores' shares. In float32 whatever the precision around it; a score below
    1e-30 counts as 1e-30, so logits are at least -69.1.

    Args:
        classes: [B, Q, C + 1], the last class being "nothing".
        masks: [B, Q, h, w] logits.

    Returns:
        [B, C, h, w] in float32.
    """
    with torch.autocast(masks.device.type, enabled=False):
        shares = classes.float().softmax(dim=-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", shares, masks.float().sigmoid())
        return scores.clamp_min(1e-30).log()


def publish_mask2former(net: Any) -> tuple[dict[str, Tap], int]:
    drop(net, "criterion", "model.text_mapper")
    encoder = publish_backbone(net.model.pixel_level_module.encoder)
    width = getattr(net.config, "feature_size", None) or net.config.conv_dim
    masks = getattr(net.config, "mask_feature_size", None) or net.config.mask_dim
    decoder = net.model.transformer_module.decoder
    if hasattr(decoder, "layerdrop"):
        decoder.layerdrop = 0.0  # transformers takes the dropout's rate, and fails where it leaves a layer out
    return named(encoder, encoder[-1], levels([32, 16, 8, 4], [width, width, width, masks])), 4


def run_mask2former(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Mask2Former: the backbone's stages; the last of them; the pixel decoder's levels and the map that masks
    are read from."""
    pixel = net.model.pixel_level_module
    maps = run_backbone(pixel.encoder, images)
    decoded = pixel.decoder(maps, output_hidden_states=False)
    decoder, features = list(decoded.multi_scale_features), decoded.mask_features
    answer = net.model.transformer_module(decoder, features, output_hidden_states=False)
    classes = net.class_predictor(answer.intermediate_hidden_states[-1].transpose(0, 1))
    return pixel_scores(classes, answer.masks_queries_logits[-1]), [*maps, maps[-1], *decoder, features]


def run_oneformer(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """OneFormer for the semantic task: as Mask2Former."""
    pixel = net.model.pixel_level_module
    maps = run_backbone(pixel.encoder, images)
    decoded = pixel.decoder(maps, output_hidden_states=False)
    decoder, features = list(decoded.multi_scale_features), decoded.mask_features
    task = net.model.task_encoder(net.task.to(features.dtype).expand(len(images), -1))
    answer = net.model.transformer_module(decoder, features, task)
    return pixel_scores(answer.prediction_class, answer.prediction_masks), [*maps, maps[-1], *decoder, features]


def publish_maskformer(net: Any) -> tuple[dict[str, Tap], int]:
    drop(net, "criterion")
    encoder = publish_backbone(net.model.pixel_level_module.encoder)
    width, strides = net.config.fpn_feature_size, [tap.stride for tap in encoder[-2::-1]]
    masks = Tap(net.config.mask_feature_size, strides[-1])
    return named(encoder, encoder[-1], [*levels(strides, [width] * len(strides)), masks]), strides[-1]


def run_maskformer(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """MaskFormer: the backbone's stages; the last of them; the pixel decoder's levels and the map that masks
    are read from."""
    pixel = net.model.pixel_level_module
    maps = run_backbone(pixel.encoder, images)
    decoder = pixel.decoder.fpn(maps)
    features = pixel.decoder.mask_projection(decoder[-1])
    queries = net.model.transformer_module(maps[-1]).last_hidden_state
    masks = torch.einsum("bqc,bchw->bqhw", net.mask_embedder(queries), features)
    return pixel_scores(net.class_predictor(queries), masks), [*maps, maps[-1], *decoder, features]


def publish_eomt(net: Any) -> tuple[dict[str, Tap], int]:
    drop(net, "criterion")
    del net.attn_mask_probs
    config = net.config
    fine = config.patch_size // 2**config.num_upscale_blocks
    tokens = Tap(config.hidden_size, config.patch_size)
    return named([tokens] * 4, tokens, [Tap(config.hidden_size, fine)]), fine


def run_eomt(net: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """EoMT without masked attention, as at the end of its annealing: the token maps after each quarter of the
    layers, the last one normalised; that last one; the map that masks are read from."""
    config, (rows, columns) = net.config, net.grid_size
    tokens, layers, maps, queries = net.embeddings(images), len(net.layers), [], 0
    prefix = net.embeddings.num_prefix_tokens
    ends = [layers * quarter // 4 for quarter in (1, 2, 3)]
    for i, layer in enumerate(net.layers):
        if i == layers - config.num_blocks:
            queries = config.num_queries
            tokens = torch.cat([net.query.weight.expand(len(images), -1, -1), tokens], dim=1)
        tokens = layer(tokens, None)
        maps += [grid(tokens, rows, columns, prefix=queries + prefix)] * ends.count(i + 1)
    tokens = net.layernorm(tokens)
    maps.append(grid(tokens, rows, columns, prefix=queries + prefix))
    features, chosen = net.upscale_block(maps[-1]), tokens[:, : config.num_queries]
    masks = torch.einsum("bqc,bchw->bqhw", net.mask_head(chosen), features)
    return pixel_scores(net.class_predictor(chosen), masks), [*maps, maps[-1], features]


HEAD, DEEPLAB = "decode_head.classifier", "segmentation_head.classifier.convolution"
FAMILIES = {
    "segformer": Family("SegformerForSemanticSegmentation", publish_segformer, run_segformer, HEAD),
    "upernet": Family("UperNetForSemanticSegmentation", publish_upernet, run_upernet, HEAD),
    "beit": Family("BeitForSemanticSegmentation", publish_beit, run_beit, HEAD, resizes=True),
    "data2vec-vision": Family(
        "Data2VecVisionForSemanticSegmentation", publish_beit, run_data2vec, HEAD, resizes=True
    ),
    "dpt": Family("DPTForSemanticSegmentation", publish_dpt, run_dpt, "head.head.4"),
    "mobilenet_v2": Family("MobileNetV2ForSemanticSegmentation", publish_mobilenet, run_mobilenet, DEEPLAB),
    "mobilevit": Family("MobileViTForSemanticSegmentation", publish_mobilevit, run_mobilevit, DEEPLAB),
    "mobilevitv2": Family("MobileViTV2ForSemanticSegmentation", publish_mobilevit, run_mobilevit, DEEPLAB),
    "mask2former": Family("Mask2FormerForUniversalSegmentation", publish_mask2former, run_mask2former),
    "oneformer": Family("OneFormerForUniversalSegmentation", publish_mask2former, run_oneformer),
    "maskformer": Family("MaskFormerForInstanceSegmentation", publish_maskformer, run_maskformer),
    "eomt": Family("EomtForUniversalSegmentation", publish_eomt, run_eomt, resizes=True),
}


def family_of(config: dict[str, Any], key: str) -> Family:
    """The family of a configuration of transformers."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConfigurationError(f"{key}: {kind!r} is no segmentation model known here; use {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    made = config.get("architectures") or [family.network]
    if family.network not in made:
        raise ConfigurationError(f"{key}: {made[0]} answers no pixels; give a {family.network}")
    return family


# -------------------------------------------------------------------------------------------------- the model


class SafeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that uses its running statistics where a batch has one value a channel (a single image
    behind global pooling), which torch refuses to train on."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(x)


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation moves copies of its running statistics. (Without any it would save fewer tensors
    for the backward pass than the first time, which checkpointing refuses.)"""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


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
        self.net = network

    def forward(self, images: Tensor, taps: Sequence[str] = ()) -> Output:
        """images: [B, 3, H, W] of any size."""
        self.check_taps(taps)
        height, width = images.shape[-2:]
        images = self.renormalise(images)
        if self.size:
            images = F.interpolate(images, size=tuple(self.size), mode="bilinear", antialias=True)
        else:
            images = pad_to(images, MULTIPLE)

        logits, maps = self.family.run(self.net, images)
        features = dict(zip(self.taps, maps, strict=True))

        wanted = {tap: self.native(features[tap], height, width, self.taps[tap].stride) for tap in taps}
        return Output(self.native(logits, height, width, self.stride), wanted)

    def native(self, map_: Tensor, height: int, width: int, stride: int) -> Tensor:
        """A map of the resized or padded image as the contract wants it of the given one."""
        if self.size:
            return resize(map_, native_size(height, width, stride))
        return crop_to_native(map_, height, width, stride)

    def enable_gradient_checkpointing(self) -> None:
        """Of the whole network, or of its backbone where transformers has none for the rest."""
        able = [m for m in self.net.modules() if getattr(m, "supports_gradient_checkpointing", False)]
        if not able:
            super().enable_gradient_checkpointing()
        contexts = functools.partial(recomputation, self.net)
        for module in able:
            module.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def recomputation(network: nn.Module) -> tuple[Any, Any]:
    """Contexts of a checkpointed block's first pass and of its repetition, which must not count twice."""
    return nullcontext(), still_statistics(network)


def config_of(config: dict[str, Any], class_names: Sequence[str]) -> Any:
    """transformers' configuration object, with these classes."""
    from transformers import CONFIG_MAPPING

    names = {str(i): name for i, name in enumerate(class_names)}
    left_out = ("num_labels", "dtype", "torch_dtype")
    given = {key: copy.deepcopy(value) for key, value in config.items() if key not in left_out}  # some are emptied
    given |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    if config["model_type"] == "oneformer":
        given["is_training"] = False  # else it asks for a text to every image
    return CONFIG_MAPPING[config["model_type"]].from_dict(given)


def new_network(config: dict[str, Any], class_names: Sequence[str]) -> Any:
    """A network with fresh weights."""
    import transformers

    network = getattr(transformers, FAMILIES[config["model_type"]].network)
    return network(config_of(config, class_names))


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
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
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
    if wrong:
        listed = ", ".join(sorted(wrong)[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise DamagedFileError(
            f"{folder}: {len(wrong)} weights do not fit its config.json: {listed}; check config.json"
        )
    return network


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{path}: can't be read as JSON ({error}); download or save it again") from error
    if not isinstance(found, dict):
        raise DamagedFileError(f"{path}: holds no mapping; download or save it again")
    return found


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
