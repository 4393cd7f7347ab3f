"""Assembly of the fused kernels for sm_90, without a card: registers, spilled bytes and shared memory of each, as JSON.

    python tests/helpers/assemble.py

Triton's interpreter has to be off, so that this is a process of its own.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.fused import deformable, reads, windows

HEAD, SIDE = 32, 7  # channels of a head, of a window's side
TABLES = {27: 14, 111: 56}  # side of a bias table -> of its map
INTEGERS = ["B", "H", "W", "PH", "PW", "SY", "SX", "M", "N", "S", "G", "PER", "PARTS"]
SINGLE = ["bias", "table", "query", "position", "lse", "delta", "dbias", "dposition", "dtable"]
HALF_OR_SINGLE = [
    "qkv",
    "q",
    "kv",
    "z",
    "dz",
    "dq",
    "dkv",
    "dqkv",
    "dscores",
    "x",
    "out",
    "dout",
    "dx",
]


def signature(dtype: str) -> dict[str, str]:
    """The types of all arguments, by name."""
    types = {"scale": "fp32"}
    types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(SINGLE, "*fp32")
    return types | dict.fromkeys(HALF_OR_SINGLE, f"*{dtype}")


def assemble(kernel: triton.JITFunction, dtype: str, constants: dict) -> dict:
    """What the assembler says of `kernel` with `constants`, num_warps and num_stages among them."""
    options = {
        name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants
    }
    names, types = kernel.arg_names, signature(dtype)
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name not in constants and types[name].startswith("*")
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(compiled.asm["ptx"].encode())
        file.flush()
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": kernel.__name__,
        "type": dtype,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        "shared": compiled.metadata.shared,
        "atomics": len(re.findall(r"\b(?:red|atom)\.", compiled.asm["ptx"])),
    }


def assemble_all() -> list[dict]:
    """Every kernel with every entry of the block tables."""
    rows = []
    for dtype in ("bf16", "fp32"):
        half = dtype == "bf16"
        blocks = windows.window_blocks(SIDE * SIDE, half)
        window = {"WH": SIDE, "WW": SIDE, "D": HEAD, **blocks}
        for kernel in (windows.window_forward, windows.window_backward):
            rows.append(assemble(kernel, dtype, dict(window)))
        for side, extent in TABLES.items():
            table, number = {"TY": side, "TX": side}, extent * extent
            for name in ("forward", "keys"):
                kernel = getattr(deformable, f"deformable_{name}")
                blocks = deformable.deformable_blocks(name, number, number, half)
                rows.append(assemble(kernel, dtype, {"D": HEAD, **table, **blocks}))
            blocks = deformable.table_blocks((side, side), (extent, extent), half)
            rows.append(assemble(deformable.deformable_table, dtype, {**table, **blocks}))
        blocks = deformable.deformable_blocks("queries", 196, 196, half)
        rows.append(assemble(deformable.deformable_queries, dtype, {"D": HEAD, **blocks}))
        blocks = reads.sample_blocks(128)
        for kernel in (reads.sample_forward, reads.sample_positions):
            rows.append(assemble(kernel, dtype, dict(blocks)))
        own = {"BN": reads.SAMPLE_CELLS, "IP": "tf32" if half else "ieee"}
        rows.append(assemble(reads.sample_map, dtype, {**blocks, **own}))
    return rows


if __name__ == "__main__":
    for row in assemble_all():
        print(json.dumps(row))
