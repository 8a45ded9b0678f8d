"""VAR over packed rows: images at different steps in one pass, and one map drawn for each.

The transformer is VAR's own, on the rows of everyone as one sequence, with each row's own conditions. What goes before
and after it, inputs and sampling, is that of `VAR.generate` with each image's own state, generator and limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from amskv_kernels.models import VAR, VQVAE
from amskv_kernels.models.modulation import Conditions, Modulation
from amskv_kernels.models.tensor_parallel import ranks_of
from amskv_kernels.serving.attention import PoolAttention
from amskv_kernels.serving.batch import LEAST_ROWS, Group, Mixture
from amskv_kernels.serving.graphs import Graphs

LEAST_IMAGES = 2  # of a convolution, for the reason of LEAST_ROWS


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
        # Of every condition, by row: 0 is no class, 1 + place that of the image there.
        self._starts = weight.new_zeros(places + 1, config.schedule.tokens[0], width)
        self._layers = weight.new_zeros(config.depth, 6, places + 1, width)
        self._head = torch.zeros(2, places + 1, width, device=self.device)
        self._positions = var.places()[0]
        self._noise = torch.empty(0, config.vocab_size, device=self.device)
        self._spread = weight.new_empty(0, width)  # conditions of one layer, for every packed row
        self._graphs = Graphs(self.device, ranks_of(var) == 1)
        self._set_conditions(0, config.num_classes)

    def enter(self, place: int, label: int) -> None:
        """An image of a class begins at a place."""
        self.fhat[place].zero_()
        self._set_conditions(place + 1, label)

    def _set_conditions(self, row: int, label: int) -> None:
        """What depends on the class alone, worked out as for one image with guidance: two rows at once."""
        labels = torch.tensor([label, self.var.config.num_classes], device=self.device)
        cond = self.var.class_emb(labels)
        found = self.var.conditions(cond)
        self._starts[row] = self.var.start(cond)[0]
        for layer, modulation in enumerate(found.layers):
            self._layers[layer, :, row] = _stacked(modulation)
        self._head[:, row] = _stacked(found.head)

    def step(
        self, groups: Sequence[Group], mixture: Mixture, generators: Sequence[torch.Generator | None],
        attention: PoolAttention,
    ) -> None:  # fmt: skip
        """Draw the next map of every image: its tokens, and what they add to its latent.

        Args:
            groups: who is at which step.
            mixture: theirs, filled for this tick.
            generators: by place.
            attention: over the pool.
        """
        self._make_room(mixture)
        self._make_noise(groups, generators)
        attention.begin(mixture)
        self._graphs.run(mixture, partial(self._run, groups, mixture, attention))

    def _run(self, groups: Sequence[Group], mixture: Mixture, attention: PoolAttention) -> None:
        """The device's part: nothing here depends on more than the mixture, but for what lies in memory."""
        x = self._inputs(groups, mixture)
        logits = self.var.transform(x[None], self._conditions(mixture), attention)[0]
        self._keep(groups, mixture, self._draw(logits, mixture))

    def _inputs(self, groups: Sequence[Group], mixture: Mixture) -> Tensor:
        """(T, C)."""
        places, parts = mixture.places.device, [self._starts[0]]
        if groups[0].step == 0:
            parts.append(self._starts[mixture.conditions.device[groups[0].images]].flatten(0, 1))
        if later := [group for group in groups if group.step]:
            next_map, fhat = self.vae.quantize.next_map, self.fhat[places]
            maps = [next_map(group.step, fhat[group.images]).flatten(0, 1) for group in later]
            parts.append(self.var.embed(_at_least(torch.cat(maps), LEAST_ROWS)))
        return torch.cat(parts)[mixture.source] + self._positions[mixture.position]

    def _conditions(self, mixture: Mixture) -> Conditions:
        """Of every packed row; a layer's lie in memory that the next one's take."""
        places, width = self._layers.shape[2:]
        rows = mixture.conditions.device[mixture.owner]
        at = (torch.arange(6, device=self.device)[:, None] * places + rows).flatten()

        def layers() -> Iterator[Modulation]:
            for layer in self._layers:
                torch.index_select(layer.flatten(0, 1), 0, at, out=self._spread[: len(at)])
                found = self._spread[: len(at)].view(3, 2, 1, len(rows), width).unbind(0)
                gates, scales, shifts = (kind.unbind(0) for kind in found)
                yield Modulation(gates, scales, shifts)

        scale, shift = self._head[:, rows].unsqueeze(1).unbind(0)
        return Conditions(layers(), Modulation((), (scale,), (shift,)))

    def _make_room(self, mixture: Mixture) -> None:
        """Working memory for a mixture's ticks; graphs read and write the old one where it is too small."""
        maps, rows = len(mixture.image), len(mixture.owner)
        if maps > len(self._noise) or 6 * rows > len(self._spread):
            self._noise = self._noise.new_empty(max(maps, len(self._noise)), self._noise.shape[1])
            self._spread = self._spread.new_empty(max(6 * rows, len(self._spread)), self._spread.shape[1])
            self._graphs.clear()

    def _make_noise(self, groups: Sequence[Group], generators: Sequence[torch.Generator | None]) -> None:
        """Each image's own: what `torch.multinomial` would take from its generator."""
        for group in groups:
            parts = self._noise[group.rows].view(len(group.places), -1)
            for place, part in zip(group.places.tolist(), parts, strict=True):
                part.exponential_(generator=generators[place])

    def _draw(self, logits: Tensor, mixture: Mixture) -> Tensor:
        """(map rows,) tokens: `filter_logits` and `torch.multinomial`, with every row's own limits."""
        gain, loss, kept, floor = (limit.device[mixture.image][:, None] for limit in mixture.limits)
        mixed = gain * logits[: len(mixture.image)] - loss * logits[mixture.other]
        ascending, order = mixed.sort(-1)
        smallest = ascending.gather(-1, ascending.shape[1] - kept)
        ascending.masked_fill_(ascending < smallest, -torch.inf)
        outside = ascending.softmax(-1).cumsum(-1) <= floor
        outside[:, -1] = False
        ascending.masked_fill_(outside, -torch.inf)
        return (mixed.scatter_(-1, order, ascending).softmax(-1) / self._noise[: len(mixed)]).argmax(-1)

    def _keep(self, groups: Sequence[Group], mixture: Mixture, drawn: Tensor) -> None:
        places, total = mixture.places.device, self.tokens.shape[1]
        self.tokens.view(-1)[places[mixture.image] * total + mixture.position[: len(drawn)]] = drawn
        quantize, added = self.vae.quantize, []
        for phi, alike in groupby(groups, lambda group: quantize.phi_of[group.step]):  # which ascend with the steps
            grown = [quantize.grown(group.step, drawn[group.rows].view(-1, group.tokens)) for group in alike]
            maps = torch.cat(grown)
            added.append(quantize.blended(phi, _at_least(maps, LEAST_IMAGES))[: len(maps)])
        self.fhat.index_add_(0, places, torch.cat(added))

    def decode(self, places: Sequence[int]) -> Tensor:
        """(images, 3, H, W) fp32 in [0, 1] of what these places hold, on the CPU."""
        return self.vae.decode(self.fhat[list(places)]).float().cpu()


def _stacked(modulation: Modulation) -> Tensor:
    """(gates, scales and shifts, C) of the first of a batch."""
    return torch.stack([x[0, 0] for kind in modulation for x in kind])


def _at_least(x: Tensor, rows: int) -> Tensor:
    """x with its last row repeated until there are so many."""
    return x if len(x) >= rows else torch.cat((x, x[-1:].expand(rows - len(x), *x.shape[1:])))
