"""`python -m tools.gpu_session.one_call MODEL POLICY IMAGES BACKEND`: the last step's call, three times, to profile."""

from __future__ import annotations

import sys

import torch

from benchmarks.harness.cases import Case, groups
from benchmarks.harness.inputs import CallInputs, Pool
from benchmarks.harness.peers import ours


def main(model: str, policy: str, images: str, backend: str) -> None:
    """Make the inputs, call, wait."""
    case = Case(model, policy, int(images))
    inputs = CallInputs(Pool(case, "cuda"), groups((case.model, case.policy))[-1])
    for _ in range(3):
        ours(inputs, backend).calls[0]()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
