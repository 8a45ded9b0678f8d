"""`amskv plan`: exact cache memory of a model under a policy."""

from __future__ import annotations

import argparse
import json
from typing import Any

from amskv_kernels.cli.arguments import add_model, command, model_shape, picture, whole

EPILOG = """\
next: give the same policy to your model, amskv_kernels.integrations.patch(model, "ams-kv:75"), or measure yours first:
  amskv calibrate --help
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    from amskv_kernels.policies.parse import SYNTAX

    plan = command(commands, "plan", "exact cache memory of a model under a policy", EPILOG)
    add_model(plan)
    plan.add_argument("--policy", required=True, help=SYNTAX.replace("%", "%%"))
    plan.add_argument("--images", type=whole(1), default=1, help="images generated at once (default 1)")
    plan.add_argument("--dtype", default="bf16", help="of the pages: bf16 (default), fp16, fp32")
    plan.add_argument("--page-size", type=whole(1), help="16, 32, 64 or 128 (default: what suits the schedule)")
    plan.add_argument("--no-cfg", action="store_true", help="one sequence an image instead of two")
    plan.add_argument("--plot", type=picture, metavar="PNG", help="draw the bytes over the steps")
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan, and print what it takes."""
    from amskv_kernels.planning.memory import STOCK_PAIR_BYTES, counted, report, token_mib
    from amskv_kernels.planning.plan import CachePlan
    from amskv_kernels.policies import parse_policy

    shape = model_shape(arguments)
    policy = parse_policy(arguments.policy, shape.schedule, shape.layers)
    plan = CachePlan.build(shape.schedule, policy, shape.layers, arguments.page_size, shape.kv_heads)
    memory = report(plan, shape, arguments.policy, arguments.images, arguments.dtype, not arguments.no_cfg)
    if arguments.plot:
        from amskv_kernels.cli import plots
        from amskv_kernels.planning.memory import MIB, PAIR_BYTES

        pairs = {"ours": PAIR_BYTES[arguments.dtype], "stock": STOCK_PAIR_BYTES}
        token_bytes = {name: round(token_mib(shape, memory.sequences, pair) * MIB) for name, pair in pairs.items()}
        title = f"{shape.name}, {counted(arguments.images, 'image')}, {arguments.dtype}"
        plots.timeline({arguments.policy: plan}, token_bytes, title, arguments.plot)
    if arguments.json:
        print(json.dumps({**memory.as_dict(), "settings": repr(policy)}, indent=2))
        return 0
    share = f"{memory.retained_tokens_per_layer:.1f} of {memory.total_tokens} tokens per layer"
    dropped = "scales" if plan.selection is None else "tokens"
    kept = "lossless" if memory.lossless else f"approximate: some earlier {dropped} are dropped"
    drawn = f"{counted(memory.images, 'image')} = {counted(memory.sequences, 'sequence')}"
    print(f"{shape.name} ({memory.schedule}), {drawn}, {memory.dtype}")
    print(f"policy     {memory.policy}: {policy!r}")
    print(f"stock      {memory.stock_mib:12,.1f} MiB  every token, fp32 K and 16-bit V")
    print(f"retained   {memory.retained_mib:12,.1f} MiB  {share}: {memory.saved_of_all:.1%} fewer, {kept}")
    print(
        f"           {memory.retained_at_stock_dtype_mib:12,.1f} MiB  the same tokens with stock's fp32 K and 16-bit V"
    )
    print(f"allocated  {memory.allocated_mib:12,.1f} MiB  in pages of {memory.page_size} tokens, known before step 1")
    print(f"peak       {memory.peak_mib:12,.1f} MiB  with the current scale's own K, V")
    print(f"saved      {memory.saved_bytes:12.1%} of stock's bytes; tokens: {memory.saved_of_all:.1%} of all, "
          f"{memory.saved_of_prefix:.1%} of the prefix")  # fmt: skip
    if arguments.plot:
        print(f"plot       {arguments.plot}")
    return 0
