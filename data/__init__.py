"""Data sets, their labels, augmentation, sampling order and statistics."""

from data.build import DataConfig, build_dataset
from data.dataset import Batch, SegmentationData
from data.labels import CAMVID, CITYSCAPES, IGNORE_INDEX, Labels

__all__ = [
    "CAMVID",
    "CITYSCAPES",
    "IGNORE_INDEX",
    "Batch",
    "DataConfig",
    "Labels",
    "SegmentationData",
    "build_dataset",
]
