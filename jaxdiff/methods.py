"""METHODS.md: every public method with its kind, paper, file and test, read off the code.

    python -m jaxdiff.methods            writes METHODS.md
    python -m jaxdiff.methods --check    fails if it is out of date, or a method lacks its parts

The paper is the "Reference:" of the docstring; a method without one, or without a test that
names it, is an error.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "processes": "process",
    "predictions": "prediction",
    "oracles": "oracle",
    "networks": "network",
    "solvers": "solver",
    "likelihood": "likelihood",
    "traces": "trace",
    "guidance": "guidance",
    "geometry": "geometry",
    "losses": "loss",
    "training": "training",
    "metrics": "metric",
}
# Parts of methods, not methods: interfaces, records and helpers, with no paper of their own.
PARTS = {
    "processes": ("Process",),
    "predictions": ("Prediction", "X0"),
    "oracles": ("GaussianMixture",),
    "networks": ("ConvClassifier", "EditedNetwork", "MLP", "Tap"),
    "solvers": (
        *("ChainStates", "DiffusionSolver", "Problem", "RestartInterval", "Schedule", "Step"),
    ),
    "likelihood": ("LogLikelihood",),
    "traces": ("ExactTrace", "TraceEstimator"),
    "geometry": (
        *("ChannelSVD", "EditedBetween", "Estimate", "Geodesic", "Hyperplane", "InteractionBasis"),
        *("Jacobian", "JacobianDimension", "KarcherMean", "MixingTime", "NormalBundle"),
        *("NumericalRank", "Offset", "PrincipalDirections", "ScaledDenoiser", "SpectralMethod"),
        *("Spectrum", "SubspaceClusters", "TapFeature", "TapResponse", "TimedOffset"),
    ),
    "losses": ("TimeLaw", "UniformTime", "Weighting"),
    "training": (
        *("CheckpointError", "CheckpointStore", "EMA", "Hook", "Interrupted"),
        *("NonFiniteLossError", "Player", "PlayerState", "TrainState"),
    ),
    "metrics": ("Kernel",),
}

# Solvers whose order is that of another, or which have none; the text below says which.
WITHOUT_ORDER = (
    *("EVODiff", "FixedPointInversion", "LearnedAncestral", "PredictorCorrector", "RNRI"),
    *("Reflected", "Restart"),
)


def _public(module: ModuleType) -> dict[str, object]:
    """Classes and functions a family exports, by name, that are its own."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    }


def reference(value: object) -> str | None:
    """The first source that a docstring or its module cites, up to the arXiv number or year."""
    module = value if inspect.ismodule(value) else sys.modules[value.__module__]
    for text in (value.__doc__, module.__doc__):
        match = re.search(r"Reference:\s*(.+?)(?:\n\s*\n|\Z)", text or "", re.DOTALL)
        if match:
            text = " ".join(match.group(1).split())
            short = re.match(r".*?arXiv (?:\d{4}\.\d{4,5}|[a-z-]+/\d{7})|.*?(19|20)\d\d\b", text)
            return short.group() if short else text
    return None


def _source(value: object) -> Path:
    return Path(inspect.getsourcefile(inspect.unwrap(value))).relative_to(ROOT)


def _test(name: str, tests: dict[Path, str]) -> Path | None:
    """The test file that names a method most often."""
    word = re.compile(rf"\b{name}\b")
    counts = {path: len(word.findall(text)) for path, text in tests.items()}
    best = max(counts, key=counts.get)
    return best if counts[best] else None


def _in_full(paper: str, known: list[str]) -> str:
    """The citation with a title, of the same arXiv number: later ones in a file leave it out."""
    if '"' in paper:
        return paper
    number = paper.split("arXiv ")[-1]
    return min((k for k in known if '"' in k and k.endswith(number)), key=len, default=paper)


def rows() -> tuple[list[str], list[str]]:
    """The table's rows, and what is missing."""
    tests = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    lines, missing = [], []
    for family, kind in FAMILIES.items():
        public = _public(importlib.import_module(f"jaxdiff.{family}"))
        modules = {sys.modules[value.__module__] for value in public.values()}
        known = [paper for v in (*public.values(), *modules) if (paper := reference(v))]
        for name, value in public.items():
            paper, test = reference(value), _test(name, tests)
            if name in PARTS.get(family, ()) or (paper is None and inspect.isfunction(value)):
                continue
            if paper is None:
                missing.append(f"{family}.{name} names no reference in its docstring")
            if test is None:
                missing.append(f"{family}.{name} is named by no test")
            paper = _in_full(paper, known)
            lines.append(f"| `{name}` | {kind} | {paper} | `{_source(value)}` | `{test}` |")
    return lines, missing


def orders() -> tuple[list[str], list[str]]:
    """The table of solvers, from what `make orders` measured, and the solvers it lacks."""
    measured = json.loads((ROOT / "benchmarks" / "orders.json").read_text())
    lines = [
        f"| {m['solver']} | `{m['class']}` | {m['kind']} | {m['noise']} | {m['claimed']} | "
        f"{m['measured']:.2f} | {m['evaluations']} |"
        for m in measured
    ]
    solvers = importlib.import_module("jaxdiff.solvers")
    public = {n for n, v in _public(solvers).items() if inspect.isclass(v)}
    own = {n for n in public if issubclass(getattr(solvers, n), solvers.DiffusionSolver)}
    missing = own - {m["class"] for m in measured} - set(WITHOUT_ORDER) - {"DiffusionSolver"}
    return lines, [f"solvers.{name} is not in benchmarks/orders.json" for name in sorted(missing)]


def main() -> int:
    """Write or check METHODS.md."""
    lines, missing = rows()
    measured, unmeasured = orders()
    missing += unmeasured
    for problem in missing:
        print(f"error: {problem}", file=sys.stderr)
    text = "\n".join(
        [
            "# Methods",
            "",
            "Generated by `python -m jaxdiff.methods`. The test named is the one that says most "
            "about the method.",
            "",
            "| name | kind | paper | file | test |",
            "| --- | --- | --- | --- | --- |",
            *lines,
            "",
            "## Orders of the solvers",
            "",
            "Measured by `make orders` on closed forms: the global order of deterministic solvers "
            "on the exact flow of a mixture on the line (the first rows), and of a Gaussian from "
            "exact starting values; the weak order of solvers with noise by the exact variance. "
            "Wrappers (`Restart`, `PredictorCorrector`, `Reflected`) have that of what they wrap, "
            "inversions (`FixedPointInversion`, `RNRI`) that of DDIM, and `EVODiff` does not "
            "converge.",
            "",
            "| solver | class | kind | equation | order claimed | measured | evaluations a step |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *measured,
            "",
        ]
    )
    path = ROOT / "METHODS.md"
    if "--check" not in sys.argv:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print("error: METHODS.md is out of date; run `make methods`", file=sys.stderr)
        return 1
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
