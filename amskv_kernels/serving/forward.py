"""VAR over packed rows: images at different steps in one pass, and one map drawn for each.

Linear layers see the rows of everyone at once; what depends on the step or the class goes group by group. The numbers
are those of `VAR.generate`, operation for operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from amskv_kernels.models import VAR, VQVAE
from amskv_kernels.models.var import Block
from amskv_kernels.serving.batch import Group, Limits

# A matrix product of fewer rows may sum in another order, on the CPU: an image's numbers would depend on who else is
# there. So packed rows are never fewer, nor a convolution's images fewer than two.
LEAST_ROWS = 16
LEAST_IMAGES = 2


class PackedAttention(Protocol):
    """Attention of all sequences of a tick."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, out: Tensor) -> None:
        """q, k, v (T, H, D) of `layer` -> out (T, H, D), contiguous; rows past the last sequence's stay as they are."""
        ...


class PackedVAR:
    """The model and the state of every image inside.

    Args:
        var: on the device that serves.
        vae: beside it.
        places: images at most.
    """

    def __init__(self, var: VAR, vae: VQVAE, places: int) -> None:
        self.var, self.vae = var, vae
        config, weight = var.config, var.word_embed.weight
        self.device, width, (h, w) = weight.device, config.embed_dim, config.schedule.sizes[-1]
        self.fhat = torch.zeros(places, config.z_channels, h, w, dtype=torch.float32, device=self.device)
        self.tokens = torch.zeros(places, config.schedule.total, dtype=torch.int64, device=self.device)
        self._starts = weight.new_zeros(places + 1, config.schedule.tokens[0], width)
        self._modulations = weight.new_zeros(config.depth, places + 1, 6, width)
        self._head_modulations = weight.new_zeros(places + 1, 2, width)
        self._places = var.places()[0]
        self._biases = [block.attn.qkv_bias() for block in self._blocks]
        self._lengths = [block.attn.q_length()[0] if block.attn.l2_norm else None for block in self._blocks]
        self._set_conditions([0], config.num_classes)

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.var.blocks))

    def enter(self, place: int, label: int) -> None:
        """An image of a class begins at a place."""
        self.fhat[place].zero_()
        self._set_conditions([place + 1], label)

    def _set_conditions(self, rows: list[int], label: int) -> None:
        """What depends on the class alone, worked out as for one image with guidance: two rows at once."""
        labels = torch.tensor([label, self.var.config.num_classes], device=self.device)
        cond = self.var.class_emb(labels)
        self._starts[rows] = self.var.start(cond)[:1]
        for layer, modulation in enumerate(self.var.modulations(cond)):
            gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:1, 0].unbind(1)
            self._modulations[layer, rows] = torch.stack((gate1, gate2, scale1 + 1, scale2 + 1, shift1, shift2), 1)
        scale, shift = self.var.head_nm.modulation(cond)[:1, 0].unbind(1)
        self._head_modulations[rows] = torch.stack((scale + 1, shift), 1)

    def step(
        self, groups: Sequence[Group], limits: Limits, generators: Sequence[torch.Generator | None],
        attention: PackedAttention,
    ) -> None:  # fmt: skip
        """Draw the next map of every image: its tokens, and what they add to its latent."""
        conditions = torch.cat([torch.from_numpy(group.conditions) for group in groups]).to(self.device)
        logits = self._logits(self._inputs(groups, conditions), groups, conditions, attention)
        drawn = self._draw(logits, limits, self._noise(groups, generators, logits.shape[1]))
        for group in groups:
            self._keep(group, drawn[group.map_rows].view(-1, group.tokens))

    def _inputs(self, groups: Sequence[Group], conditions: Tensor) -> Tensor:
        """(T, C), at least `LEAST_ROWS`."""
        quantize, later = self.vae.quantize, [group for group in groups if group.step]
        embedded = self._starts.new_empty(0)
        if later:
            maps = [quantize.next_map(group.step, self.fhat[group.places]).flatten(0, 1) for group in later]
            embedded = self.var.embed(_at_least(torch.cat(maps), LEAST_ROWS))
        found = []
        for group in groups:
            if group.step == 0:
                x = self._starts[conditions[group.first : group.last]]
            else:
                own = embedded[group.map_row - later[0].map_row :][: len(group.places) * group.tokens]
                x = own.view(len(group.places), group.tokens, -1)
                x = torch.cat((x, x[group.guided]))
            offset = self.var.config.schedule.offsets[group.step]
            found.append((x + self._places[offset : offset + group.tokens]).flatten(0, 1))
        return _at_least(torch.cat(found), LEAST_ROWS)

    def _logits(self, x: Tensor, groups: Sequence[Group], conditions: Tensor, attention: PackedAttention) -> Tensor:
        heads, head_dim = self.var.kv_heads, self.var.config.head_dim
        modulations = self._modulations[:, conditions]
        mixed = x.new_zeros(len(x), heads, head_dim)
        for layer, block in enumerate(self._blocks):
            gate1, gate2, scale1, scale2, shift1, shift2 = modulations[layer].unbind(1)
            h = _modulated(F.layer_norm(x, x.shape[-1:], eps=1e-6), groups, scale1, shift1)
            qkv = F.linear(h, block.attn.mat_qkv.weight, self._biases[layer]).view(len(x), 3, heads, head_dim)
            q, k, v = qkv.unbind(1)
            length = self._lengths[layer]
            if length is not None:
                q = (F.normalize(q.float(), dim=-1) * length).to(v.dtype)
                k = F.normalize(k.float(), dim=-1).to(v.dtype)
            attention.attend(layer, q, k, v, block.attn.softmax_scale, mixed)
            x = x + _modulated(block.attn.proj(mixed.flatten(1)), groups, gate1)
            h = _modulated(F.layer_norm(x, x.shape[-1:], eps=1e-6), groups, scale2, shift2)
            x = x + _modulated(block.ffn(h), groups, gate2)
        h = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        h = _modulated(h, groups, *self._head_modulations[conditions].unbind(1))
        return self.var.head(h.to(self.var.head.weight.dtype)).float()

    def _noise(
        self, groups: Sequence[Group], generators: Sequence[torch.Generator | None], vocab_size: int
    ) -> Tensor:  # fmt: skip
        """Each image's own: what `torch.multinomial` would take from its generator."""
        noise = torch.empty(groups[-1].map_rows.stop, vocab_size, device=self.device)
        for group in groups:
            parts = noise[group.map_rows].view(len(group.places), -1)
            for place, part in zip(group.places.tolist(), parts, strict=True):
                part.exponential_(generator=generators[place])
        return noise

    def _draw(self, logits: Tensor, limits: Limits, noise: Tensor) -> Tensor:
        """(rows of all maps,) tokens: `filter_logits` and `torch.multinomial`, with every row's own limits."""
        own, other, weights, kept, floor = (
            torch.from_numpy(x).to(self.device) for x in (*limits.pair, limits.weights, limits.kept, limits.floor)
        )
        mixed = weights[0] * logits[own] - weights[1] * logits[other]
        ascending, order = mixed.sort(-1)
        smallest = ascending.gather(-1, ascending.shape[1] - kept)
        ascending.masked_fill_(ascending < smallest, -torch.inf)
        outside = ascending.softmax(-1).cumsum(-1) <= floor
        outside[:, -1] = False
        ascending.masked_fill_(outside, -torch.inf)
        return (mixed.scatter_(-1, order, ascending).softmax(-1) / noise).argmax(-1)

    def _keep(self, group: Group, tokens: Tensor) -> None:
        places = torch.from_numpy(group.places).to(self.device)
        offset = self.var.config.schedule.offsets[group.step]
        self.tokens[places, offset : offset + group.tokens] = tokens
        added = self.vae.quantize.spread(group.step, _at_least(tokens, LEAST_IMAGES))
        self.fhat.index_add_(0, places, added[: len(places)])

    def decode(self, places: Sequence[int]) -> Tensor:
        """(images, 3, H, W) fp32 in [0, 1] of what these places hold, on the CPU."""
        return self.vae.decode(self.fhat[list(places)]).float().cpu()


def _modulated(x: Tensor, groups: Sequence[Group], scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """x (T, C), in place: times its sequence's row of `scale` (N, C), plus that of `shift`."""
    for group in groups:
        rows, own = x[group.rows].view(group.sequences, group.tokens, -1), slice(group.first, group.last)
        rows.mul_(scale[own, None])
        if shift is not None:
            rows.add_(shift[own, None])
    return x


def _at_least(x: Tensor, rows: int) -> Tensor:
    """x with its last row repeated until there are so many."""
    return x if len(x) >= rows else torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))
