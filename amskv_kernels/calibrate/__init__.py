"""Measure a model for the policies that want it: AMS-KV, ScaleKV, HeatKV, LeastLoss. Writes small files for them."""

from amskv_kernels.calibrate.attention import AttentionRecorder
from amskv_kernels.calibrate.losses import LossRecorder
from amskv_kernels.calibrate.recorder import Recorder
from amskv_kernels.calibrate.similarity import SimilarityRecorder, calibrate, demanding_layers, key_similarity

__all__ = [
    "AttentionRecorder",
    "LossRecorder",
    "Recorder",
    "SimilarityRecorder",
    "calibrate",
    "demanding_layers",
    "key_similarity",
]
