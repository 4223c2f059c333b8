"""The tables of train/results/scale.md, from what `train.compile_aot --out` wrote.

python -m tools.scale train/results/scale/steps.jsonl
"""

import json
import sys
from pathlib import Path

HEAD = (
    "| network | chips | fsdp x tensor | a chip | recomputed | arguments, temporary, peak: GiB | "
    "TFLOP | HBM GB | gathered, reduced, passed on: GB | compute, memory, sending: ms | bound |"
)
GIB = 2**30


def row(found: dict) -> str:
    """One line of the table."""
    sent = {"all-gather": 0.0, "reduce": 0.0, "collective-permute": 0.0}
    for kind, one in found["collectives"].items():
        name = kind.split()[0]
        if name == "all-to-all":
            continue  # of the classes' table, less than 0.1 MB
        sent[name if name in sent else "reduce"] += one["bytes"] / 1e9
    seconds = found["seconds"]
    cells = (
        found["network"] + (f", DDIM of {found['sampling_steps']}" if found["sample"] else ""),
        f"{found['topology']} = {found['chips']}",
        f"{found['fsdp']} x {found['tensor']}",
        found["per_chip"],
        "-" if found["sample"] else found["remat"],
        ", ".join(f"{found[name] / GIB:.2f}" for name in ("arguments", "temporary", "peak")),
        f"{found['flops'] / 1e12:.2f}",
        f"{found['bytes'] / 1e9:.1f}",
        ", ".join(f"{value:.2f}" for value in sent.values()),
        ", ".join(f"{1e3 * seconds[name]:.1f}" for name in ("compute", "memory", "communication")),
        f"{found['bound']:.0%}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main(path: str) -> None:
    """Print the table."""
    print(HEAD)
    print("|---" * HEAD.count(" | ") + "|---|")
    for line in Path(path).read_text().splitlines():
        print(row(json.loads(line)))


if __name__ == "__main__":
    main(sys.argv[1])
