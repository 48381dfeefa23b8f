"""Losses of the labels alone, for teachers, baselines and students."""

from dataclasses import dataclass

from errors import ConfigurationError
from losses.blocks import PixelTermConfig


@dataclass
class CrossEntropyConfig(PixelTermConfig):
    """Cross-entropy with the labels."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the classes (Szegedy et al. 2016)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(
                f"losses.cross_entropy.label_smoothing: {self.label_smoothing} is not in [0, 1); give say 0.1"
            )
