"""What the segmentation networks of transformers have in common and how each answers: logits and maps.

Each family has two functions: `publish_…` drops what its forward pass never reaches and tells its taps, `run_…`
is that pass, over the network's own modules and without hooks.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ConfigurationError
from models.interface import Tap


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
    with torch.autocast(images.device.type, enabled=False):  # tokens are numbers up to 49407
        dtype = next(net.model.task_encoder.parameters()).dtype
        task = net.model.task_encoder(net.task.to(dtype).expand(len(images), -1))
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
