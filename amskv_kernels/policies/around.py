"""A policy of a model's maps, inside a generation that has more than them: a prefix, a last map in several passes.

What a model attends to before its first map (a text, an image to edit) is scale 0 of the generation, and no policy
drops it. A last map that is drawn in passes is read by the passes after it; at each the policy is asked as for the map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amskv_kernels.policies.base import HeadPolicy, Policy, Selection, TokenPolicy
from amskv_kernels.schedule import ScaleSchedule


@dataclass(frozen=True)
class Around:
    """What stands around the maps.

    Attributes:
        maps: the schedule that the user's policy is made for.
        prefix: scales before the first map: 0 or 1.
        beside: layers that see the prefix in their own way, beside the cache.
        rule: the model's own, of what a map may see of those before it; no policy shows more.
    """

    maps: ScaleSchedule
    prefix: int = 1
    beside: tuple[int, ...] = ()
    rule: Policy | None = None

    def step(self, step: int) -> int:
        """The map that is drawn at a step; below 0 for the prefix."""
        return min(step - self.prefix, len(self.maps) - 1)

    def scales(self, visible: tuple[int, ...], layer: int, step: int) -> tuple[int, ...]:
        """Scales of the generation, from the maps that a policy shows at a step."""
        if step < self.prefix:
            return ()
        if self.rule is not None:
            allowed = self.rule.visible(self.maps, layer, self.step(step))
            visible = tuple(scale for scale in visible if scale in allowed)
        prefix = () if layer in self.beside else range(self.prefix)
        passes = range(len(self.maps) - 1 + self.prefix, step)  # of the last map, drawn before this one
        return (*prefix, *(scale + self.prefix for scale in visible), *passes)


def placed(policy: Policy, around: Around, schedule: ScaleSchedule) -> Policy:
    """The policy of the whole generation, which `schedule` is of.

    Raises:
        TypeError: a policy that chooses tokens, where some layers see the prefix beside the cache, or the model has a
            rule.
    """
    if isinstance(policy, TokenPolicy):
        if around.rule is not None:
            raise TypeError(f"policy is {policy!r}; this model has a rule of which scales it sees, and none of tokens")
        if around.beside:
            raise TypeError(
                f"policy is {policy!r}; this model's layer {around.beside[0]} sees the prefix anew at every scale, and "
                f"only policies of whole scales know layers apart"
            )
        return _PlacedTokens(policy, around, schedule)
    return _PlacedHeads(policy, around) if isinstance(policy, HeadPolicy) else _Placed(policy, around)


@dataclass(frozen=True)
class _Placed(Policy):
    inner: Policy
    around: Around

    def visible(self, schedule: ScaleSchedule, layer: int, step: int) -> tuple[int, ...]:
        at = self.around.step(step)
        return self.around.scales(() if at < 0 else self.inner.visible(self.around.maps, layer, at), layer, step)

    def check_layers(self, num_layers: int) -> None:
        self.inner.check_layers(num_layers)

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.inner.check_fits(self.around.maps, num_layers)


@dataclass(frozen=True)
class _PlacedHeads(_Placed, HeadPolicy):
    inner: HeadPolicy

    @property
    def alike(self) -> bool:
        return self.inner.alike

    def visible_to(self, schedule: ScaleSchedule, layer: int, head: int, step: int) -> tuple[int, ...]:
        at = self.around.step(step)
        shown = () if at < 0 else self.inner.visible_to(self.around.maps, layer, head, at)
        return self.around.scales(shown, layer, step)

    def check_heads(self, schedule: ScaleSchedule, num_layers: int, kv_heads: int) -> None:
        self.inner.check_heads(self.around.maps, num_layers, kv_heads)


@dataclass(frozen=True)
class _PlacedTokens(TokenPolicy):
    inner: TokenPolicy
    around: Around
    schedule: ScaleSchedule

    @property
    def selection(self) -> Selection:
        prefix = sum(self.schedule.tokens[: self.around.prefix])
        return replace(self.inner.selection, first=self.inner.selection.first + prefix)

    def held(self, schedule: ScaleSchedule, num_layers: int) -> tuple[tuple[int, ...], ...]:
        around, rows = self.around, self.inner.held(self.around.maps, num_layers)
        last = len(around.maps) - 1 + around.prefix
        found = []
        for step in range(len(schedule)):
            at = around.step(step)
            more = sum(schedule.tokens[: around.prefix]) + sum(schedule.tokens[last:step])
            found.append((0,) * num_layers if at < 0 else tuple(row + more for row in rows[at]))
        return tuple(found)

    def check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        self.inner.check_fits(self.around.maps, num_layers)
