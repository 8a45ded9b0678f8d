"""What the commands measure and draw with: a VAR and its VQ-VAE, or an Infinity stack of random weights."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amskv_kernels.cache import PagedKVCache
from amskv_kernels.calibrate import LossRecorder
from amskv_kernels.models import VAR, VQVAE, ConcatKVCache, Generation
from amskv_kernels.models.infinity import InfinityStack, Text
from amskv_kernels.planning.layout import row_bytes, row_size
from amskv_kernels.planning.plan import CachePlan
from amskv_kernels.policies import Full, Policy
from amskv_kernels.schedule import ScaleSchedule
from amskv_kernels.shapes import ModelShape

PROMPT = 16  # tokens of the random prompts that a random stack is given

Progress = Callable[[int, int], None]  # called with (scales done, scales in all)


class Drawn(NamedTuple):
    """Pictures (B, C, h, w), what was sampled on the way (B, …), and the seconds it took."""

    images: Tensor
    tokens: Tensor
    seconds: float


@dataclass
class Subject(ABC):
    """A model to fit a policy to, of a sharded one this process's heads; its pages hold eight bits where `eight_bit`,
    else its own dtype."""

    shape: ModelShape
    dtype: torch.dtype
    device: torch.device
    eight_bit: bool = field(default=False, kw_only=True)

    @abstractmethod
    def watch(self, recorder: LossRecorder, images: int, seed: int) -> None:
        """Draw `images` at once with everything kept while the recorder observes."""

    @abstractmethod
    def draw(self, policy: Policy, images: int, seed: int, progress: Progress | None = None) -> Drawn:
        """Draw `images` at once under a policy; the same seed, the same images."""

    @property
    def images(self) -> int | None:
        """How many images the user's labels or prompts are for; None where there are none."""
        return None

    def plan(self, policy: Policy) -> CachePlan:
        """The policy's plan."""
        return CachePlan.build(self.shape.schedule, policy, self.shape.layers, kv_heads=self.shape.kv_heads)

    def image_bytes(self, plan: CachePlan) -> float:
        """Bytes of the pool per image, two sequences each."""
        rows = 2 * self.shape.kv_heads * plan.allocated_tokens / plan.heads
        return rows * 2 * self.row_bytes

    @property
    def pages(self) -> str:
        """What the pages are of: "int8", "float32"."""
        return str(torch.int8 if self.eight_bit else self.dtype).removeprefix("torch.")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of K or of V in its page."""
        return row_bytes(row_size("head_dim", self.shape.head_dim), 1 if self.eight_bit else self.dtype.itemsize)

    def _wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Checkpoint(Subject):
    """A class-conditional VAR."""

    var: VAR
    vae: VQVAE
    sampling: dict[str, Any]
    labels: Tensor | None = None  # (B,); spread over all classes where none are given

    @classmethod
    def of(
        cls, var: VAR, vae: VQVAE, name: str, sampling: dict[str, Any], labels: Tensor | None = None
    ) -> Checkpoint:  # fmt: skip
        """The subject that a loaded checkpoint is."""
        config = var.config
        shape = ModelShape(name, config.depth, var.kv_heads, var.kv_heads, config.head_dim, config.schedule)
        weight = var.word_embed.weight
        return cls(shape, weight.dtype, weight.device, var, vae, sampling, labels)

    @property
    def images(self) -> int | None:
        return None if self.labels is None else len(self.labels)

    def watch(self, recorder: LossRecorder, images: int, seed: int) -> None:
        recorder.inner = ConcatKVCache()
        self._generate(recorder, images, seed)

    def draw(self, policy: Policy, images: int, seed: int, progress: Progress | None = None) -> Drawn:
        shape = self.shape
        cache = PagedKVCache(
            self.plan(policy), batch=2 * images, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            dtype=torch.int8 if self.eight_bit else self.dtype, device=self.device,
        )  # fmt: skip
        start = self._wait()
        pictures, tokens = self._generate(cache, images, seed, progress)
        return Drawn(pictures.cpu(), tokens.cpu(), self._wait() - start)

    def _generate(self, attention: Any, images: int, seed: int, progress: Progress | None = None) -> Generation:
        from amskv_kernels.cli.calibrate import spread_classes

        labels = spread_classes(self.var.config.num_classes, images, seed) if self.labels is None else self.labels
        rng = torch.Generator(self.device).manual_seed(seed)
        return self.var.generate(
            self.vae, labels[:images].to(self.device), attention, generator=rng, progress=progress, **self.sampling
        )


@dataclass
class RandomStack(Subject):
    """An Infinity stack of random weights: what it draws means nothing, but it takes what the real one takes."""

    stack: InfinityStack
    text: Text | None = None  # two sequences a prompt; random ones where none are given

    @classmethod
    def of(cls, stack: InfinityStack, schedule: ScaleSchedule, text: Text | None = None) -> RandomStack:
        """The subject that a stack is on a schedule."""
        config, weight = stack.config, stack.word_embed.weight
        shape = ModelShape("infinity-stack", config.layers, stack.kv_heads, stack.kv_heads, config.head_dim, schedule)
        return cls(shape, weight.dtype, weight.device, stack, text)

    @property
    def images(self) -> int | None:
        return None if self.text is None else (len(self.text[1]) - 1) // 2

    def watch(self, recorder: LossRecorder, images: int, seed: int) -> None:
        self._generate(Full(), images, seed, recorder)

    def draw(self, policy: Policy, images: int, seed: int, progress: Progress | None = None) -> Drawn:
        return self._generate(policy, images, seed, progress=progress)

    def _generate(
        self, policy: Policy, images: int, seed: int, recorder: LossRecorder | None = None,
        progress: Progress | None = None,
    ) -> Drawn:  # fmt: skip
        from amskv_kernels.integrations import patch

        text = self._prompts(images, seed) if self.text is None else self.text
        features, lengths, longest = text[0].to(self.device, self.dtype), text[1].to(self.device), text[2]
        observe, pages = recorder.observe if recorder else None, "int8" if self.eight_bit else None
        with patch(self.stack, policy, observe=observe, pages=pages):
            start = self._wait()
            maps = self.stack.generate((features, lengths, longest), self.shape.schedule, progress)[::2].float()
            seconds = self._wait() - start
        span = maps.amax((1, 2, 3), keepdim=True) - maps.amin((1, 2, 3), keepdim=True)
        pictures = (maps - maps.amin((1, 2, 3), keepdim=True)) / span
        # Infinity samples signs of its channels.
        return Drawn(pictures[:, :3].cpu(), (maps > 0).flatten(1).cpu(), seconds)

    def _prompts(self, images: int, seed: int) -> Text:
        rng = torch.Generator("cpu").manual_seed(seed)
        features = torch.randn(2 * images * PROMPT, self.stack.config.width, generator=rng)
        return features, torch.arange(0, len(features) + 1, PROMPT, dtype=torch.int32), PROMPT
