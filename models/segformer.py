"""SegFormer (Xie et al. 2021, arXiv 2105.15203): a hierarchical transformer with a decoder of linear layers."""

from typing import Any

import torch
from torch import nn

from errors import ConfigurationError
from models.hub import HubModel, config_of, load_network, names_of
from models.weights import check_weights, fetch_folder, read_json, read_normalisation

# Table 6 of the paper: channels C_i, layers L_i; and the decoder's channels C of section 4.1.
VARIANTS: dict[str, tuple[list[int], list[int], int]] = {
    "b0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "b1": ([64, 128, 320, 512], [2, 2, 2, 2], 256),
    "b2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
    "b3": ([64, 128, 320, 512], [3, 4, 18, 3], 768),
    "b4": ([64, 128, 320, 512], [3, 8, 27, 3], 768),
    "b5": ([64, 128, 320, 512], [3, 6, 40, 3], 768),
}
HEADS = [1, 2, 5, 8]


class SegFormer(HubModel):
    """SegFormer B0 to B5 as the authors publish them, through transformers' modules.

    As in the authors' code and unlike the paper's table 6, the expansion of the feed-forward layers is 4 in every
    stage of every variant. As in transformers and unlike the authors' code, all layer norms add 1e-5 to the
    variance, where those of blocks and stages add 1e-6 there.

    Taps: `encoder.0` … `encoder.3` at strides 4, 8, 16 and 32, `bottleneck` (the last of them), `decoder.0` (the
    fused map at stride 4, what the classifier sees but for dropout). Logits at stride 4.

    Args:
        class_names: names of the classes, in the order of the logits.
        variant: "b0" … "b5".
        hidden_sizes: channels of the four stages, multiples of 1, 2, 5 and 8, in place of the variant's.
        depths: layers of the four stages, in place of the variant's.
        decoder_channels: in place of the variant's.
    """

    architecture = "segformer"

    def __init__(
        self,
        class_names: list[str],
        variant: str = "b0",
        hidden_sizes: list[int] | None = None,
        depths: list[int] | None = None,
        decoder_channels: int | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigurationError(f"model.variant: {variant!r} is no SegFormer; give {', '.join(VARIANTS)}")
        sizes, layers, channels = VARIANTS[variant]
        sizes, layers = list(hidden_sizes or sizes), list(depths or layers)
        if len(sizes) != 4 or any(size % heads for size, heads in zip(sizes, HEADS, strict=False)):
            raise ConfigurationError(f"model.hidden_sizes: {sizes} are not four multiples of {HEADS}")
        if len(layers) != 4 or min(layers) < 1:
            raise ConfigurationError(f"model.depths: {layers} are not four numbers of layers")
        config = {
            "model_type": "segformer",
            "hidden_sizes": sizes,
            "depths": layers,
            "num_attention_heads": HEADS,
            "decoder_hidden_size": decoder_channels or channels,
            "drop_path_rate": 0.1,
            "classifier_dropout_prob": 0.1,
        }
        super().__init__(class_names, config)

    def load_weights(self, source: str, key: str = "model.weights") -> None:
        """Takes the weights of a pretrained SegFormer of this shape, and the normalisation that they know.

        An image classifier (nvidia/mit-b0 … b5, ImageNet) or a bare SegformerModel gives the encoder. A segmenter
        gives the decoder too, and its classifier if its classes are this model's by name, in whatever order; else
        the classifier stays as it is. So does the normalisation where the source has no preprocessor_config.json.

        Args:
            source: a folder or a name on the Hub: see `models.weights.fetch_folder`.
            key: where the user wrote it; begins the message of an error.

        Raises:
            ConfigurationError: there is no such model, or it is no SegFormer.
            DamagedFileError: a file can't be read, or weights are missing, superfluous or of another shape.
        """
        folder = fetch_folder(source, key)
        found = read_json(folder / "config.json")
        made = (found.get("architectures") or ["nothing that is named"])[0]
        whole = made == "SegformerForSemanticSegmentation"
        encoders = ("SegformerForImageClassification", "SegformerModel")
        if found.get("model_type") != "segformer" or not (whole or made in encoders):
            raise ConfigurationError(
                f"{key}: {folder} holds {made}, not a SegFormer; give nvidia/mit-b0 or the like"
            )
        names = (
            names_of(found, folder / "config.json") if whole else list(found.get("id2label") or self.class_names)
        )
        network = load_network(made, folder, config_of(found, names))

        if not whole:
            take_state(self.net.segformer, getattr(network, "segformer", network), folder)
        elif sorted(names) == sorted(self.class_names):
            classifier, order = network.decode_head.classifier, [names.index(name) for name in self.class_names]
            classifier.weight.data, classifier.bias.data = (
                classifier.weight.data[order],
                classifier.bias.data[order],
            )
            take_state(self.net, network, folder)
        else:
            network.decode_head.classifier = self.net.decode_head.classifier
            take_state(self.net, network, folder)
        if (folder / "preprocessor_config.json").is_file():
            self.mean, self.std, _ = read_normalisation(folder, key)


def take_state(own: nn.Module, other: Any, folder: object) -> None:
    """Copies all weights and buffers of `other`, which has to have the same shape."""
    theirs = other.state_dict()
    check_weights(theirs, own.state_dict(), f"{folder}: weights of another SegFormer", "check model.variant")
    with torch.no_grad():
        own.load_state_dict(theirs)
