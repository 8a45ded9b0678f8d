"""What every recorder refuses, before it has recorded anything of the call."""

from __future__ import annotations

import pytest
import torch

from amskv_kernels import ScaleSchedule
from amskv_kernels.calibrate import AttentionRecorder, LossRecorder, Recorder, SimilarityRecorder

SCHEDULE = ScaleSchedule([(1, 1), (2, 2)])
RECORDERS: list[type[Recorder]] = [AttentionRecorder, LossRecorder, SimilarityRecorder]


@pytest.mark.parametrize("kind", RECORDERS)
def test_a_recorder_is_made_for_a_model(kind):
    with pytest.raises(TypeError, match="schedule is 'var-256'; it must be a ScaleSchedule"):
        kind("var-256", 2)
    for layers in (0, -1, None, 1.5):
        with pytest.raises(ValueError, match=f"num_layers is {layers}; it must be a whole number"):
            kind(SCHEDULE, layers)


BAD = {
    "no tensor": (lambda q, k, v: (q, None, v), TypeError, "k is None; it must be a Tensor"),
    "another step's": (lambda q, k, v: (q, k, v[:, :0]), ValueError, r"v has shape \(2, 0, 2, 64\); step 0 takes"),
    "a batch of its own": (lambda q, k, v: (q, k[:1], v[:1]), ValueError, r"k has shape .* one B for all"),
    "one dimension": (lambda q, k, v: (q.flatten(), k, v), ValueError, r"q has shape \(512,\)"),
    "heads that do not divide": (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "q a multiple of them"),
    "other heads": (lambda q, k, v: (q, k, v[:, :, :1]), ValueError, "k and v must have the same heads"),
    "another head size": (lambda q, k, v: (q, k[..., :32], v), ValueError, "and one D"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("kind", RECORDERS)
def test_a_refused_call_leaves_a_recorder_as_it_was(kind, what):
    change, error, message = BAD[what]
    q, k, v = torch.randn(2, 1, 8, 64).split([4, 2, 2], dim=2)
    recorder = kind(SCHEDULE, 1)
    with pytest.raises(error, match=message):
        recorder.observe(0, *change(q, k, v), 0.1)
    recorder.observe(0, q, k, v, 0.1)
