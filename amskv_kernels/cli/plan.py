"""`amskv plan`: exact cache memory of a model under a policy."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from amskv_kernels.cli.arguments import add_model, command, model_shape, picture, whole

EPILOG = """\
next: give the same policy to your model, amskv_kernels.integrations.patch(model, "ams-kv:75"), or measure yours first:
  amskv calibrate --help
"""

if TYPE_CHECKING:
    from amskv_kernels.planning.memory import MemoryReport


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    from amskv_kernels.policies.parse import SYNTAX

    plan = command(commands, "plan", "exact cache memory of a model under a policy", EPILOG)
    add_model(plan)
    plan.add_argument("--policy", required=True, help=SYNTAX.replace("%", "%%"))
    plan.add_argument("--images", type=whole(1), default=1, help="images generated at once (default 1)")
    plan.add_argument("--dtype", default="bf16", help="of the pages: bf16 (default), fp16, fp32, int8")
    plan.add_argument("--page-size", type=whole(1), help="16, 32, 64 or 128 (default: what suits the schedule)")
    plan.add_argument("--no-cfg", action="store_true", help="one sequence an image instead of two")
    plan.add_argument("--plot", type=picture, metavar="PNG", help="draw the bytes over the steps")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print what it takes."""
    from amskv_kernels.planning.memory import counted, report
    from amskv_kernels.planning.plan import CachePlan
    from amskv_kernels.policies import parse_policy

    shape = model_shape(arguments)
    policy = parse_policy(arguments.policy, shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, policy, shape.layers, arguments.page_size, shape.kv_heads)
    memory = report(plan, shape, arguments.policy, arguments.images, arguments.dtype, not arguments.no_cfg)
    if arguments.plot:
        from amskv_kernels.cli import plots
        from amskv_kernels.planning.memory import ELEMENT_BYTES, MIB, stock_token_mib, token_mib

        ours = token_mib(shape, memory.sequences, ELEMENT_BYTES[arguments.dtype], memory.row)
        stock = stock_token_mib(shape, memory.sequences)
        token_bytes = {name: round(mib * MIB) for name, mib in (("ours", ours), ("stock", stock))}
        title = f"{shape.name}, {counted(arguments.images, 'image')}, {arguments.dtype}"
        plots.timeline({arguments.policy: plan}, token_bytes, title, arguments.plot)
    if arguments.json:
        print(json.dumps({**memory.as_dict(), "settings": repr(policy)}, indent=2))
        return 0
    print("\n".join(_lines(memory, repr(policy), plan.selection is not None)))
    if arguments.plot:
        print(f"plot       {arguments.plot}")
    return 0


def _lines(memory: MemoryReport, settings: str, chosen: bool) -> list[str]:
    """The report for people: first what a GPU must have free, then what the papers count."""
    from amskv_kernels.planning.memory import counted, shares

    def line(name: str, mib: float, what: str) -> str:
        return f"{name:<11}{mib:12,.1f} MiB  {what}"

    drawn = f"{counted(memory.images, 'image')} = {counted(memory.sequences, 'sequence')}"
    dropped = "tokens" if chosen else "scales"
    kept = f"approximate: some earlier {dropped} are dropped"
    if memory.lossless:
        kept = "all that is read, in eight bits" if memory.dtype == "int8" else "lossless"
    rounded = " and a scale per row" if memory.dtype == "int8" else ""
    of_prefix = f"{shares(memory.kept_of_prefix)} of those before the last scale"
    padded = f"of both: there are no kernels of this head size, heads lie in rows of {memory.row}"
    held = f"{memory.retained_tokens_per_layer:.1f} of {memory.total_tokens} tokens per layer"
    return [
        f"{memory.model} ({memory.schedule}), {drawn}, {memory.dtype}",
        f"policy     {memory.policy}: {settings}",
        line("needed", memory.needed_mib, "free on the device for keys and values, known before step 1"),
        line("  pool", memory.allocated_mib, f"pages of {memory.page_size} tokens{rounded}, made before step 1"),
        line("  in flight", memory.in_flight_mib, "K, V of the largest map while a layer attends"),
        *([line("  padding", memory.padding_mib, padded)] if memory.padding_mib else []),
        *([line("  scores", memory.scores_mib, "attention added up, in fp32")] if memory.scores_mib else []),
        line("stock", memory.stock_mib, "every token, fp32 K and 16-bit V"),
        f"saved      {memory.saved:12.1%} of stock's bytes",
        line("retained", memory.retained_mib, f"between steps, as papers count: {held}, {kept}"),
        line("", memory.retained_at_stock_dtype_mib, "the same tokens with stock's fp32 K and 16-bit V"),
        f"tokens     {shares(memory.kept_of_all)} of all; {of_prefix}",
    ]
