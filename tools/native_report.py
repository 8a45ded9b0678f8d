"""Tells what the compiled kernels are made of: registers, spills and the instructions that matter, per kernel.

    python tools/native_report.py [build/cuda/libamskv.so] [--out tools/reports/native-report.json]

Needs cuobjdump, of a CUDA toolkit or of the triton package. Clocks are estimates: see tools/sass_clocks.py. Exits with
an error where a kernel touches local memory, lacks an instruction it is written for, where the Hopper kernel's loop is
not what it was written to be, or where its producer would hold its consumers back.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "csrc" / "cmake"), str(ROOT)]

from build_info import readable  # noqa: E402

from amskv_kernels.cli import console  # noqa: E402
from tools.sass_clocks import Instruction, Loop, clocks, functions, loops, path  # noqa: E402

# SASS mnemonic → what it is.
WATCHED = {
    "LDGSTS": "cp.async", "LDSM": "ldmatrix", "HMMA": "mma", "UTMALDG": "TMA load", "UTMASTG": "TMA store",
    "HGMMA": "wgmma", "MUFU.EX2": "exp2", "FFMA": "fma", "LDL": "spill", "STL": "spill",
}  # fmt: skip
# What every attention kernel must show, and must not.
PORTABLE = {"LDGSTS": True, "LDSM": True, "HMMA": True, "MUFU.EX2": True}
HOPPER = {"UTMALDG": True, "UTMASTG": True, "HGMMA": True, "MUFU.EX2": True, "HMMA": False, "LDGSTS": False}
MULTIPROCESSOR = 228 * 1024  # bytes of shared memory of an sm_90, of which a block takes 1 KiB for itself
PRODUCTS = 2048  # 16-bit multiply-adds of its tensor cores in a clock
EXPONENTIALS = 16  # in a clock
CONSUMERS, THREADS, ROWS = 2, 128, 64  # of the Hopper kernel, and threads and query rows of each
PANEL = 64  # elements of a row that one box holds
TEAM = 128  # threads of the portable kernels' largest team


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if found is None:
        raise SystemExit("no cuobjdump: put a CUDA toolkit on PATH, or pip install triton")
    return found


def count(code: Iterable[Instruction], mnemonic: str) -> int:
    return sum(instruction.starts(mnemonic) for instruction in code)


def main_loop(code: list[Instruction]) -> Loop:
    """The consumers' loop: the shortest around the wait that leaves one group of products under way."""
    wait = next(i.address for i in code if "DEPBAR.LE gsb0, 0x1" in i.text)
    return next(loop for loop in loops(code) if loop.body[0].address <= wait < loop.body[-1].address)


def loading_clocks(code: list[Instruction], boxes: int, panels: int, paged: bool) -> int:
    """Clocks of the slower loading warp for a tile that comes in so many boxes of so many panels."""
    all_loops = loops(code)
    waiting = [loop for loop in all_loops if loop.has("UTMALDG") and loop.has("SYNCS.PHASECHK")]
    tiles = [loop for loop in waiting if not any(loop.holds(other) for other in waiting)]
    found = []
    for tile in (tile for tile in tiles if tile.has("SHFL") == paged):  # lanes tell each other of their boxes
        # The inner loops: lanes that issue one after the other, in a loop over panels where there are several.
        inner = [loop for loop in all_loops if tile.holds(loop) and loop.has("UTMALDG")]
        repeats = dict(zip(inner, (boxes, panels), strict=False))
        found.append(clocks(path(tile, repeats, longest=True)))
    return max(found)


def hopper_clocks(code: list[Instruction], tile: dict[str, int]) -> dict[str, int]:
    """Estimates per tile of keys, and what the multiprocessor's units take at least for both consumers' rows."""
    keys, head_dim, panels = tile["keys"], tile["head_dim"], tile["head_dim"] // PANEL
    executed = path(main_loop(code), {}, longest=False)  # all keys there, no new maximum
    scores = ROWS * keys * head_dim // PRODUCTS
    return {
        "clocks to load pages of 16, estimated": loading_clocks(code, keys // 16, panels, True),
        "clocks to load pages of 64, estimated": loading_clocks(code, keys // 64, panels, True),
        "clocks to load one box, estimated": loading_clocks(code, 1, panels, False),
        "clocks of a consumer, estimated": clocks(executed) + scores,  # it waits for its scores, not for its output
        "clocks of products, at least": 2 * CONSUMERS * scores,
        "clocks of exp2, at least": CONSUMERS * THREADS * count(executed, "MUFU.EX2") // EXPONENTIALS,
        "instructions per tile, executed": len(executed),
    }


def hopper_facts(code: list[Instruction], tile: dict[str, int]) -> dict[str, object]:
    """What one thread of a consumer does for one tile of keys, and what the roles take."""
    loop = main_loop(code).body
    waits = [k for k, i in enumerate(loop) if i.starts("WARPGROUP.DEPBAR")]
    between = loop[waits[0] : waits[-1]] if waits else ()
    registers = [int(i.text.split()[-1 if "DEALLOC" in i.text else 2].rstrip(","), 16) for i in code
                 if i.starts("USETMAXREG")]  # fmt: skip
    return {
        "consumer registers": max(registers), "producer registers": min(registers), "shared": tile["shared"],
        "blocks per multiprocessor": MULTIPROCESSOR // (tile["shared"] + 1024),
        "scores per tile": tile["keys"] // 2, "exp2 per tile": count(loop, "MUFU.EX2"),
        "fma per tile": count(loop, "FFMA"), "wgmma per tile": count(loop, "HGMMA"),
        "wgmma groups per tile": sum(i.starts("HGMMA") and "gsb0" in i.text for i in loop),
        "exp2 under wgmma": count(between, "MUFU.EX2"), "waits per tile": len(waits),
        "instructions per tile, static": len(loop),
    } | hopper_clocks(code, tile)  # fmt: skip


def hopper_faults(facts: dict[str, object], tile: dict[str, int]) -> list[str]:
    """Two row maxima change per tile: an exponential each beside the scores', and a multiply-add."""
    scores = tile["keys"] // 2
    expected = {
        "consumer registers": tile["consumer_registers"], "producer registers": tile["producer_registers"],
        "blocks per multiprocessor": 1, "exp2 per tile": scores + 2, "fma per tile": scores + 2, "waits per tile": 2,
        "wgmma groups per tile": 2,  # more would let the wait for all but the latest drain the products it spares
        "wgmma per tile": tile["head_dim"] // 16 + tile["keys"] // 16,
    }  # fmt: skip
    found = [f"{name} is {facts[name]}, not {value}" for name, value in expected.items() if facts[name] != value]
    if facts["exp2 under wgmma"] < 0.9 * scores:  # the compiler may leave a few behind the wait
        found.append(f"only {facts['exp2 under wgmma']} exponentials run under products")
    load, consume = facts["clocks to load pages of 16, estimated"], facts["clocks of a consumer, estimated"]
    if load > consume:
        found.append(f"a tile takes {load} clocks to load, and the consumers {consume}")
    return found


def portable_name(tile: dict[str, int]) -> str:
    return f"head_dim {tile['head_dim']}, {tile['rows_per_warp']} rows per warp"


def portable_facts(code: list[Instruction], tile: dict[str, int]) -> dict[str, int]:
    """What one thread of a team of four warps does for one tile of keys, on the longest way; int8 pages are widened."""
    main = next(loop for loop in loops(code) if loop.has("HMMA"))
    inner = [loop for loop in loops(code) if main.holds(loop)]
    if not tile["int8_pages"]:
        return {"instructions per tile, at most": len(path(main, {}, longest=True))}
    widen = next(loop for loop in inner if loop.has("HFMA2"))
    chunks = 2 * tile["keys"] * tile["head_dim"] // 16 // TEAM  # 16-byte loads of K and V
    rounds = chunks // count(widen.body, "LDS.128")
    besides = [i for i in path(main, {}, longest=True) if i not in widen.body]
    return {
        "instructions per tile, at most": len(besides) + rounds * len(widen.body),
        "keys per tile": tile["keys"], "bytes to widen": 16 * chunks, "instructions to widen": rounds * len(widen.body),
        "PRMT to widen": rounds * count(widen.body, "PRMT"), "HFMA2 to widen": rounds * count(widen.body, "HFMA2"),
        "scale pairs loaded": count(main.body, "LDS.64"), "scores": tile["rows_per_warp"] * tile["keys"] // 32,
    }  # fmt: skip


def portable_faults(facts: dict[str, int], tile: dict[str, int]) -> list[str]:
    """A conversion takes one permutation and one fused multiply-add for two elements, a key two scales."""
    if not tile["int8_pages"]:
        return []
    pairs = facts["bytes to widen"] // 2
    expected = {"PRMT to widen": pairs, "HFMA2 to widen": pairs, "scale pairs loaded": tile["keys"] // 4}
    return [f"{name} is {facts[name]}, not {value}" for name, value in expected.items() if facts[name] != value]


def examine(symbol: str, architecture: str, code: list[Instruction], info: dict) -> tuple[dict, list[str]]:
    """A row of the report, and what is wrong with the kernel."""
    name = readable(symbol)
    built = next(k for k in info["kernels"] if k["name"] == name and k["architecture"].replace(".", "") == architecture)
    row: dict[str, object] = {"kernel": name, "arch": architecture, "registers": built["registers"]}
    row |= {"spilled bytes": built["spill"], "instructions": len(code)}
    row |= {f"{mnemonic} ({what})": count(code, mnemonic) for mnemonic, what in WATCHED.items() if what != "spill"}
    wrong = [f"{m} {count(code, m)} times" for m in ("LDL", "STL") if count(code, m)]
    wrong += [f"{built['spill']} bytes spilled"] if built["spill"] else []
    wrong += ["its products are serialised"] if built["serialised"] else []
    hopper = name.endswith("Hopper>")
    if name.startswith("attn<"):
        for mnemonic, wanted in (HOPPER if hopper else PORTABLE).items():
            if (count(code, mnemonic) > 0) != wanted:
                wrong.append(f"{'no' if wanted else 'has'} {mnemonic}")
    if hopper and not built["serialised"]:  # else it has no such loop
        tile = next(t for t in info["hopper_tiles"] if f"head_dim {t['head_dim']}," in name)
        facts = hopper_facts(code, tile)
        row |= facts
        wrong += hopper_faults(facts, tile)
    if name.startswith("attn<") and not hopper:
        tile = next(t for t in info["tiles"] if portable_name(t) in name and t["int8_pages"] == ("int8" in name))
        own = portable_facts(code, tile)
        row |= own
        wrong += portable_faults(own, tile)
    return row, [f"{name} on {architecture}: {fault}" for fault in wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=ROOT / "build" / "cuda" / "libamskv.so")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "reports" / "native-report.json")
    options = parser.parse_args()
    import tabulate
    import torch

    from amskv_kernels.files import write_json
    from amskv_kernels.ops.backends.library import portable  # noqa: F401  defines the namespace that the library adds to
    from benchmarks.report.tables import facts as transposed

    torch.ops.load_library(str(options.library.resolve()))
    info = json.loads(torch.ops.amskv.build_info())
    command = [cuobjdump(), "-sass", str(options.library)]
    found = functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    examined = [examine(symbol, architecture, code, info) for (architecture, symbol), code in found.items()]
    rows = sorted((row for row, _ in examined), key=lambda row: (row["kernel"], row["arch"]))
    common = [key for key in rows[0] if all(key in row for row in rows)]
    headers = [key.partition(" (")[0] for key in common]
    tabulate.MIN_PADDING = 0  # the widest table fits 160 columns
    print(tabulate.tabulate([[row[key] for key in common] for row in rows], headers=headers))
    special = [row for row in rows if "waits per tile" in row]
    print("\nThe Hopper kernel, per thread of a consumer:\n")
    own = [{key: row[key] for key in row if key not in common} for row in special]
    for facts, row in zip(own, special, strict=True):
        facts["kernel"] = row["kernel"].removeprefix("attn<").removesuffix(", Hopper>")
    print(transposed(own, "kernel", "simple"))
    eight_bit = [row for row in rows if "bytes to widen" in row]
    print("\nTiles of int8 pages, per thread of four warps:\n")
    own = [{key: row[key] for key in row if key not in common or key == "arch"} for row in eight_bit]
    for facts, row in zip(own, eight_bit, strict=True):
        facts["kernel"] = re.sub(r"attn<(.*), \d+ rows.*", r"\1", row["kernel"])
    print(transposed(own, "kernel", "simple"))
    facts = {key: info[key] for key in ("version", "cuda", "architectures")}
    write_json(options.out, facts | {"rows": rows}, ensure_ascii=False)
    if wrong := [fault for _, faults in examined for fault in faults]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    sys.exit(console.run(main))
