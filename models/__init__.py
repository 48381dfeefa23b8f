"""Segmentation models behind one interface: logits at native stride, features by tap."""

from models.build import ModelConfig, StudentConfig, build_model, fingerprint, load_model, student_for
from models.classes import Mapped, map_classes
from models.interface import Output, SegmentationModel, Tap
from models.weights import fetch_folder

__all__ = [
    "Mapped",
    "ModelConfig",
    "Output",
    "SegmentationModel",
    "StudentConfig",
    "Tap",
    "build_model",
    "fetch_folder",
    "fingerprint",
    "load_model",
    "map_classes",
    "student_for",
]
