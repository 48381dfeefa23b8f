"""Segmentation models behind one interface: logits at native stride, features by tap."""

from models.build import ModelConfig, build_model, fingerprint, load_model
from models.interface import Output, SegmentationModel, Tap

__all__ = ["ModelConfig", "Output", "SegmentationModel", "Tap", "build_model", "fingerprint", "load_model"]
