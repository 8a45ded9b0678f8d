"""Compile every kernel for every architecture, without a GPU, and read the binaries.

    python -m tools.kernel_report [--triton 3.6.0] [--out tools/reports/kernel-report.json] [--jobs 2]

The launches are recorded from the launchers themselves, so a kernel is compiled with the constants, the pointer and
stride alignment and the warps it would run with. Fails if anything spills or needs more than the architecture has. With
--triton another Triton compiles, fetched into build/ and used from there; the report has a part for each.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from amskv_kernels.cli import console
from amskv_kernels.cli.arguments import output_file
from amskv_kernels.files import read_json, write_json
from amskv_kernels.ops.backends.triton import append, attn, attn_ragged, compact, prepare_qk, window_scores
from amskv_kernels.ops.backends.triton.common import Device
from amskv_kernels.ops.backends.triton.tiles import lines

ARCHITECTURES = (80, 90, 100, 120)
SHARED_KB = {80: 163, 90: 227, 100: 227, 120: 99}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64", torch.int8: "*i8"}  # fmt: skip
INSTRUCTIONS = {
    "wgmma": r"\bHGMMA\.",
    "tcgen05": r"\bUTC\w*MMA\b",
    "mma": r"\bHMMA\.",
    "cp.async 16 B": r"\bLDGSTS\.E\.BYPASS\.(?:\w+\.)*128\b",
    "16 B loads": r"\bLDG\.E\.(?:\w+\.)*128\b",
    "16 B stores": r"\bSTG\.E\.(?:\w+\.)*128\b",
    "I2F": r"\bI2FP?\.",  # a byte becomes fp32 …
    "PRMT": r"\bPRMT\b",  # … and two of these 16 bits each
    "F2F": r"\bF2FP?\.",
}


@dataclass
class Launch:
    """One kernel, specialised as at run time."""

    kernel: str
    module: str
    case: str
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: list[str]
    options: dict[str, int] = field(default_factory=dict)


def specialise(function: JITFunction, args: tuple, kwargs: dict, case: str) -> Launch:
    """What Triton derives from a launch's arguments: types, alignment, constants."""
    names = [p.name for p in function.params]
    options = {k: v for k, v in kwargs.items() if k not in names and v is not None}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, aligned = {}, {}, []
    for p in function.params:
        value = values[p.name]
        if p.is_constexpr or value is None or (type(value) is int and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[p.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned.append(p.name)
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            signature[p.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not p.do_not_specialize:
                aligned.append(p.name)
    return Launch(function.__name__, function.__module__, case, signature, constants, aligned, options)


def record(call, case: str, arch: int, processors: int = 1) -> list[Launch]:
    """The launches of one call, as on a GPU of that architecture; nothing runs."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(specialise(self, args, kwargs, case))

    device = lambda _: Device(arch, processors)  # noqa: E731
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(attn, "describe", device),
        mock.patch.object(attn_ragged, "describe", device),
    ):
        call()
    return launches


def attn_call(
    n: int, entries: int, head_dim: int, page_size: int, group: int = 1, dtype=torch.bfloat16, eight_bit: bool = False
):  # fmt: skip
    """A call of `attn` on tensors of the right shape and layout; contents do not matter."""
    heads = 4 * group
    qkv = torch.zeros(2, n, heads + 8, head_dim, dtype=dtype)
    q, k, v = qkv.split([heads, 4, 4], dim=2)
    pages = torch.zeros(1, 2, page_size, head_dim, dtype=torch.int8 if eight_bit else dtype)
    scales = torch.zeros(1, 2, page_size) if eight_bit else None
    arena, slots = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 1, entries, dtype=torch.int32)
    return lambda: attn.attn(q, k, v, pages, arena, slots, slots, 1.0, scales)


def attn_launches(arch: int) -> list[Launch]:
    """Every line of the tile table, at page sizes below and above BLOCK_N; GQA, fp16 and split where they differ.

    With int8 pages the same lines, with K and V of the other half of the dtypes at GQA.
    """
    launches = []
    for head_dim in (64, 96, 128):
        for line in lines(arch, head_dim):
            rows, entries = min(line.rows, 4096), min(line.entries, 40)
            name = f"D {head_dim}, rows ≤ {line.rows if line.rows < 4096 else '…'}"
            for page_size in (16, 64) if head_dim != 96 else (64,):
                call = attn_call(rows, entries, head_dim, page_size)
                launches += record(call, f"{name}, page {page_size}", arch)
            if head_dim != 96:
                call = attn_call(max(1, rows // 4), entries, head_dim, 64, group=4, dtype=torch.float16)
                launches += record(call, f"{name}, page 64, GQA, fp16", arch)
                call = attn_call(max(1, rows // 4), entries, head_dim, 64, group=4, dtype=torch.float16, eight_bit=True)
                launches += record(call, f"{name}, page 64, GQA, fp16, int8", arch)
            call = attn_call(rows, entries, head_dim, 16 if head_dim == 64 else 64, eight_bit=True)
            launches += record(call, f"{name}, page {16 if head_dim == 64 else 64}, int8", arch)
    launches += record(attn_call(64, 40, 64, 64), "D 64, split", arch, processors=1000)
    launches += record(attn_call(64, 40, 64, 64, eight_bit=True), "D 64, split, int8", arch, processors=1000)
    launches += record(attn_call(64, 40, 64, 64, dtype=torch.float32), "D 64, fp32", arch)
    launches += record(attn_call(64, 40, 64, 64, dtype=torch.float32, eight_bit=True), "D 64, fp32, int8", arch)
    return launches


def ragged_launches(arch: int) -> list[Launch]:
    """Every line of the tile table that takes one head a program, for 40 sequences of that many rows on average."""
    launches = []
    starts, arena = torch.zeros(41, dtype=torch.int32), torch.zeros(40, 4, dtype=torch.int32)
    slots = torch.zeros(40, 1, 40, dtype=torch.int32)
    for head_dim in (64, 128):
        for line in (line for line in lines(arch, head_dim) if line.tile.heads == 1):
            rows = min(line.rows, 4096)
            q, k, v = torch.zeros(40 * rows, 12, head_dim, dtype=torch.bfloat16).split([4, 4, 4], dim=1)
            for eight_bit in (False, True):
                pages = torch.zeros(1, 2, 64, head_dim, dtype=torch.int8 if eight_bit else torch.bfloat16)
                scales = torch.zeros(1, 2, 64) if eight_bit else None
                rest = (pages, arena, slots, slots, starts, 1.0, scales)
                name = f"D {head_dim}, rows ≤ {line.rows if rows < 4096 else '…'}{', int8' if eight_bit else ''}"
                launches += record(partial(attn_ragged.attn_ragged, q, k, v, *rest), name, arch)
    return launches


def other_launches(arch: int) -> list[Launch]:
    """The other ops, at D 64 and 128, pages of 16 and 64."""
    launches = []
    for head_dim in (64, 128):
        for page_size in (16, 64):
            for eight_bit in (False, True):
                kind = ", int8" if eight_bit else ""
                for what, call in other_calls(head_dim, page_size, eight_bit).items():
                    launches += record(call, f"D {head_dim}, page {page_size}{kind} {what}".strip(), arch)
    return launches


def other_calls(head_dim: int, page_size: int, eight_bit: bool = False) -> dict[str, Callable[[], object]]:
    """A call of every other op on tensors of the right shape and layout."""
    qkv = torch.zeros(2, 64, 12, head_dim, dtype=torch.bfloat16)
    _, k, v = qkv.split([4, 4, 4], dim=2)
    window = torch.zeros(2, 16, 4, head_dim, dtype=torch.bfloat16)
    scale, angle = torch.zeros(4), torch.zeros(64, head_dim // 2)
    arena, slots = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(1, 1, 40, dtype=torch.int32)
    keep = torch.zeros(2, 4, 64, dtype=torch.int64)
    pages = torch.zeros(1, 2, page_size, head_dim, dtype=torch.int8 if eight_bit else torch.bfloat16)
    scales = torch.zeros(1, 2, page_size) if eight_bit else None
    scores = partial(window_scores.window_scores, window, k, pages, arena, slots, 1.0)
    calls: dict[str, Callable[[], object]] = {
        "": partial(append.append, k, v, pages, arena, slots, scales),
        "sum_logits": partial(scores, "sum_logits", scales),
        "softmax": partial(scores, "softmax", scales),
        "keep": partial(compact.compact, pages, arena, slots, k, v, keep, slots, scales),
    }
    if not eight_bit:  # it meets no pages
        calls["norm, scale, rope"] = partial(prepare_qk.prepare_qk, qkv, 4, scale, angle, angle, True, 1e-12)
    return calls


def measure(launch: Launch, arch: int) -> dict[str, object]:
    """Compile, and read registers, stack, shared memory and instructions from the binary."""
    function = getattr(sys.modules[launch.module], launch.kernel)
    names = [p.name for p in function.params]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(function, launch.signature, launch.constants, attrs)
    row: dict[str, object] = {"arch": arch, "kernel": launch.kernel, "case": launch.case}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(TOOLS / "cuobjdump", "-sass", file.name)
    registers, stack, local = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK", "LOCAL"))
    warps = compiled.metadata.num_warps
    row |= {"warps": warps, "stages": compiled.metadata.num_stages, "registers": registers}
    row |= {"shared": compiled.metadata.shared, "stack": stack + local}
    row |= {"spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}
    row |= {"programs": programs_per_processor(registers, compiled.metadata.shared, warps, arch)}
    row |= {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    return row


def programs_per_processor(registers: int, shared: int, warps: int, arch: int) -> int:
    """How many fit a multiprocessor: registers go to warps in blocks of 256, each program reserves 1 KB."""
    per_warp = -(-registers * 32 // 256) * 256
    by_warps = {80: 64, 90: 64, 100: 64, 120: 48}[arch] // warps
    return min(65536 // (per_warp * warps), (SHARED_KB[arch] + 1) * 1024 // (shared + 1024), by_warps, 32)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _versions() -> dict[str, str]:
    assembler = _run(TOOLS / "ptxas", "--version").strip().splitlines()[-1]
    return {"triton": triton.__version__, "torch": torch.__version__, "ptxas": assembler}


def faults(row: dict) -> list[str]:
    """What a row must not have, and what it must."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spills, {row['stack']} bytes of stack")
    if row["shared"] > 1024 * SHARED_KB[row["arch"]]:
        found.append(f"{row['shared']} bytes of shared memory; {SHARED_KB[row['arch']]} KB exist")
    if row["kernel"] == "attn_kernel" and "fp32" not in row["case"]:
        if not row["cp.async 16 B"]:
            found.append("no 16-byte cp.async")
        if not any(row[name] for name in ("wgmma", "tcgen05", "mma")):
            found.append("no matrix instruction")
    return found


def with_triton(version: str, arguments: list[str]) -> int:
    """This command under another Triton, which is fetched first; its exit code."""
    folder = Path("build") / f"triton-{version}"
    if not folder.exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder))
        subprocess.run([*pip, f"triton=={version}"], check=True)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-W", "ignore", "-m", "tools.kernel_report", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode


def merged(path: Path, versions: dict[str, str], rows: list[dict[str, object]]) -> dict[str, object]:
    """The report with these rows in the part of their Triton, whose other architectures stay; the newest part first."""
    parts = read_json(path, "report").get("reports", []) if path.exists() else []
    new = {row["arch"] for row in rows}
    same = [part for part in parts if part["versions"]["triton"] == versions["triton"]]
    kept = [row for part in same for row in part["rows"] if row["arch"] not in new]
    parts = [part for part in parts if part not in same]
    parts.append({"versions": versions, "rows": sorted(kept + rows, key=lambda row: row["arch"])})
    order = lambda part: [int(x) for x in part["versions"]["triton"].split(".")[:3]]  # noqa: E731
    return {"reports": sorted(parts, key=order, reverse=True)}


def _measure(job: tuple[Launch, int]) -> dict[str, object]:
    return measure(*job)


def main() -> int:
    """Compile everything, print the table, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=output_file, default=Path("tools/reports/kernel-report.json"))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--triton", metavar="VERSION", help="compile with this one instead of the one installed")
    options = parser.parse_args()
    if options.triton not in (None, triton.__version__):
        return with_triton(options.triton, sys.argv[1:])
    jobs = [
        (launch, arch)
        for arch in options.arch
        for launch in attn_launches(arch) + ragged_launches(arch) + other_launches(arch)
    ]
    unique = {f"{replace(launch, case='')} {arch}": (launch, arch) for launch, arch in jobs}
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(_measure, unique.values()))
    print(tabulate(rows, headers="keys", tablefmt="simple"))
    write_json(options.out, merged(options.out, _versions(), rows), ensure_ascii=False)
    broken = [f"sm_{row['arch']} {row['kernel']} ({row['case']}): {fault}" for row in rows for fault in faults(row)]
    said = f"Triton {triton.__version__}: {len(rows)} kernels, no spills"
    print("\n".join(broken) or said, file=sys.stderr if broken else sys.stdout)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
