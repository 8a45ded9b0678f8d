"""Measure a model for the policies that want it: AMS-KV, ScaleKV, HeatKV. Writes the small files that they load."""

from amskv_kernels.calibrate.attention import AttentionRecorder
from amskv_kernels.calibrate.similarity import SimilarityRecorder, calibrate, demanding_layers, key_similarity

__all__ = ["AttentionRecorder", "SimilarityRecorder", "calibrate", "demanding_layers", "key_similarity"]
