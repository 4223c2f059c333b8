"""The tables of geometry.md, from reports of train.analyze on several runs of each data set.

    python train/results/summarise_geometry.py digits=DIR,DIR,DIR grey=DIR,DIR,DIR

Each DIR is a report folder. Entries are means over runs, with the standard error over runs.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

MEASURES = {
    "mean frequency of the directions": ("directions.csv", "mean_frequency", {}),
    "distance between samples in H": ("distances_samples.csv", "distance", {"space": "H"}),
    "distance between samples in X": ("distances_samples.csv", "distance", {"space": "X"}),
    "distance between labels in H": ("conditions.csv", "mean", {"between": "H of labels"}),
    "distance between labels in X": ("conditions.csv", "mean", {"between": "X of labels"}),
    "numerical rank of the denoiser's Jacobian": ("structure.csv", "numerical_rank", {}),
    "participation ratio of the denoiser's Jacobian": ("structure.csv", "participation_ratio", {}),
    "dimension by the trace": ("structure.csv", "dimension_trace", {}),
    "asymmetry of the denoiser's Jacobian": ("structure.csv", "asymmetry", {}),
    "relative Fokker-Planck residual": ("structure.csv", "fokker_planck_relative", {}),
    "score explained by a Gaussian": ("structure.csv", "explained_variance", {}),
} | {
    f"cosine with u of the move along {name}": ("transport.csv", f"cosine_of_{column}", {})
    for name, column in (
        ("a direction of the other example's own", "own_direction"),
        ("the first example's direction, unchanged", "unchanged"),
        ("that direction by transport", "transport"),
        ("that direction by pullback", "pullback"),
    )
}


def by_time(folder: Path, name: str, column: str, wanted: dict[str, str]) -> dict[float, float]:
    """Mean of a column at each time, over the rows whose entries begin as wanted."""
    values = defaultdict(list)
    with open(folder / name, newline="") as file:
        for row in csv.DictReader(file):
            itself = "sample2" in row and row["sample"] == row["sample2"]
            noise = row.get("kind", "").startswith("white")
            if all(row[k].startswith(v) for k, v in wanted.items()) and not itself and not noise:
                values[round(float(row["t"]), 2)].append(float(row[column]))
    return {t: float(np.mean(v)) for t, v in sorted(values.items())}


def main() -> None:
    """Print the tables."""
    groups = dict(arg.split("=") for arg in sys.argv[1:])
    for title, source in MEASURES.items():
        print(f"**{title}**\n")
        for i, (name, folders) in enumerate(groups.items()):
            runs = [by_time(Path(folder), *source) for folder in folders.split(",")]
            values = np.array([list(run.values()) for run in runs])
            error = values.std(0, ddof=1) / len(values) ** 0.5
            if i == 0:
                print("| t | " + " | ".join(f"{t:g}" for t in runs[0]) + " |")
                print("| --- |" + " --- |" * len(runs[0]))
            cells = [f"{m:.3g} ± {e:.1g}" for m, e in zip(values.mean(0), error, strict=True)]
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
