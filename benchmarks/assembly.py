"""What the compiler left of a kernel: what it takes of a multiprocessor, and what its loops are full of."""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

from triton import knobs

MATRIX_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
}
# The same of NVIDIA's machine code: HMMA, HGMMA, UTCHMMA, and those of other types than half precision.
MACHINE_MATRIX_INSTRUCTION = re.compile(r"(UTC)?[HIQ]G?MMA")
MACHINE_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")
LABEL = re.compile(r"(\.L\w+):")
BRANCH_TARGET = re.compile(r"`\((\.L\w+)\)")

WARP = 32
REGISTER_FILE = 16384  # of each quarter of a multiprocessor, 64 KiB
REGISTERS_AT_ONCE = 256  # what a warp is given is a multiple of them
QUARTERS = 4  # among which the warps are dealt out
SHARED_OF_SYSTEM = 1024  # bytes of each block
TENSOR_MEMORY_COLUMNS = 512


class Multiprocessor(NamedTuple):
    """What the blocks on it share: bytes of shared memory, warps, blocks."""

    shared: int
    warps: int
    blocks: int


# "Technical specifications per compute capability" of the CUDA C++ programming guide.
MULTIPROCESSORS = {
    "sm80": Multiprocessor(164 * 1024, 64, 32),
    "sm90": Multiprocessor(228 * 1024, 64, 32),
    "sm100": Multiprocessor(228 * 1024, 64, 32),
}


def blocks(architecture: str, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """How many blocks of `warps` warps a multiprocessor holds at once.

    `registers` are those of a thread, `shared` bytes and `tensor_memory` columns those of a block.
    """
    limits = MULTIPROCESSORS[architecture]
    of_warp = _round_up(registers * WARP, REGISTERS_AT_ONCE)
    return min(
        limits.blocks,
        limits.warps // warps,
        REGISTER_FILE // of_warp * QUARTERS // warps,
        limits.shared // (shared + SHARED_OF_SYSTEM),
        TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else limits.blocks,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def resources(compiled: Any, log: str, architecture: str) -> dict[str, Any]:
    """A kernel's registers of a thread, bytes spilled by it, shared memory, and matrix instructions by name.

    On NVIDIA also the blocks that a multiprocessor holds, whether the assembler serialised its wgmma, and the
    instructions of :func:`matrix_loops`. `log` is what the assembler printed.
    """
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    matrix = {name: len(re.findall(pattern, assembly)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    found = {
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": {name: count for name, count in matrix.items() if count},
    }
    if "ptx" not in compiled.asm:
        return {
            "registers": _number(r"\.vgpr_count: +(\d+)", assembly),
            "spilled_bytes": 4 * _number(r"\.vgpr_spill_count: +(\d+)", assembly),
            **found,
        }
    registers, metadata = _number(r"Used (\d+) registers", log), compiled.metadata
    return {
        "registers": registers,
        "spilled_bytes": _number(r"(\d+) bytes spill stores", log),
        **found,
        "blocks": blocks(architecture, metadata.num_warps, registers, metadata.shared, metadata.tmem_size or 0),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
        "loop_instructions": matrix_loops(machine_code(compiled.asm["cubin"])),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[-500:]}")
    return int(found[1])


def machine_code(cubin: bytes) -> str:
    """A kernel as the disassembler that comes with Triton prints it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def matrix_loops(code: str) -> list[int]:
    """How many instructions each innermost loop with matrix instructions has, in the order of the `code`."""
    labels: dict[str, int] = {}
    names: list[str] = []
    loops: list[range] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := MACHINE_INSTRUCTION.match(line):
            target = BRANCH_TARGET.search(line)
            if instruction[1] == "BRA" and target and target[1] in labels:  # backwards
                start = labels[target[1]]
                # What waits for a barrier lies behind the program's end, and returns into the midst of a loop.
                if not any(loop.start < start < loop.stop for loop in loops):
                    loops.append(range(start, len(names) + 1))
            names.append(instruction[1])
    loops = [loop for loop in loops if any(MACHINE_MATRIX_INSTRUCTION.fullmatch(names[i]) for i in loop)]
    inner = [a for a in loops if not any(b != a and a.start <= b.start and b.stop <= a.stop for b in loops)]
    return [len(loop) for loop in inner]
