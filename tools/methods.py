"""METHODS.md: every public method with its kind, paper, file and test, read off the code.

    python -m tools.methods            writes METHODS.md
    python -m tools.methods --check    fails if it is out of date, or a method lacks its test

A method is a public class or function whose docstring, or that of its module, names a
"Reference:", and every concrete class of a public interface, such as a solver. Its test is the
test function that speaks of it most, with the tables of cases that it runs over.
"""

import ast
import functools
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
KINDS = {
    "processes": "process",
    "predictions": "prediction",
    "oracles": "oracle",
    "networks": "network",
    "denoiser": "denoiser",
    "solvers": "solver",
    "likelihood": "likelihood",
    "traces": "trace",
    "guidance": "guidance",
    "geometry": "geometry",
    "losses": "loss",
    "finetuning": "fine-tuning",
    "distillation": "distillation",
    "unlearning": "unlearning",
    "training": "training",
    "metrics": "metric",
}


def _public(module: ModuleType) -> dict[str, object]:
    """Classes and functions a family exports, by name, that are its own."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    }


def _cited(text: str | None) -> str | None:
    """The first source that a docstring cites, up to the arXiv number or year."""
    match = re.search(r"Reference:\s*(.+?)(?:\n\s*\n|\Z)", text or "", re.DOTALL)
    if not match:
        return None
    cited = " ".join(match.group(1).split())
    short = re.match(r".*?arXiv (?:\d{4}\.\d{4,5}|[a-z-]+/\d{7})|.*?(19|20)\d\d\b", cited)
    return short.group() if short else cited


def _in_full(paper: str, known: list[str]) -> str:
    """The citation with a title, of the same arXiv number: later ones in a file leave it out."""
    if '"' in paper:
        return paper
    number = paper.split("arXiv ")[-1]
    return min((k for k in known if '"' in k and k.endswith(number)), key=len, default=paper)


def _abstract(value: object) -> bool:
    """Whether a class is an interface, with methods or fields left open."""
    return inspect.isabstract(value) or bool(getattr(value, "__abstractvars__", ()))


def _implements(value: object, public: dict[str, object]) -> bool:
    """Whether a class is a concrete one of an interface of its family."""
    if not inspect.isclass(value) or _abstract(value):
        return False
    return any(_abstract(base) and base in public.values() for base in value.__mro__)


def methods() -> dict[tuple[str, str], tuple[str, object, str | None]]:
    """Kind, object and paper of every method, by family and name."""
    found = {}
    for family, kind in KINDS.items():
        public = _public(importlib.import_module(f"jaxdiff.{family}"))
        modules = {sys.modules[value.__module__] for value in public.values()}
        texts = [v.__doc__ for v in (*public.values(), *modules)]
        known = [paper for text in texts if (paper := _cited(text))]
        for name, value in public.items():
            member, paper = _implements(value, public), _cited(value.__doc__)
            if _abstract(value) or not (paper or member):
                continue
            # The members of an interface may share the reference of their module.
            paper = paper or _cited(sys.modules[value.__module__].__doc__)
            found[family, name] = kind, value, paper and _in_full(paper, known)
    return found


class TestFunctions:
    """The text of every test function, with the module-level names that it uses."""

    def __init__(self):
        self.modules = {}
        for path in sorted((ROOT / "tests").rglob("*.py")):
            source = path.read_text()
            named = {}
            for node in ast.parse(source).body:
                for name in _names(node):
                    named[name] = node, ast.get_source_segment(source, node)
            # By their short names, for imports; a second one of a name is imported by none.
            key = str(path) if path.stem in self.modules else path.stem
            self.modules[key] = path, named

    @functools.cached_property
    def texts(self) -> dict[str, list[str]]:
        """For every test, "file::function", its own text and those of what it uses."""
        found = {}
        for key, (path, named) in self.modules.items():
            for name, (node, text) in named.items():
                if path.stem.startswith("test_") and name.startswith("test_"):
                    decorators = "".join(map(ast.unparse, node.decorator_list))
                    used = [*self._used(key, node, depth=3)]
                    found[f"{path.relative_to(ROOT)}::{name}"] = [decorators + text, *used]
        return found

    def _used(self, key: str, node: ast.AST, depth: int):
        if depth == 0:
            return
        for part in ast.walk(node):
            if not isinstance(part, ast.Name) or part.id not in self.modules[key][1]:
                continue
            found, text = self.modules[key][1][part.id]
            if found is node:
                continue
            if isinstance(found, ast.ImportFrom):
                # From a helper beside the tests.
                if found.module in self.modules and part.id in self.modules[found.module][1]:
                    yield self.modules[found.module][1][part.id][1]
            elif not part.id.startswith("test_"):
                yield text
                yield from self._used(key, found, depth - 1)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def proofs(found: dict) -> dict[tuple[str, str], str]:
    """The test of every method: of those that name it, the one that speaks of little else."""
    names = {name for _, name in found}
    word = re.compile(r"\b(" + "|".join(sorted(names, key=len, reverse=True)) + r")\b")
    best: dict = {}
    for test, (own, *used) in TestFunctions().texts.items():
        said, around = word.findall(own), [name for text in used for name in word.findall(text)]
        spoken = {*said, *around}
        for (family, name), (_, value, _) in found.items():
            if name not in spoken:
                continue
            # Tests of a family live in its folder, those of a file in one of its name.
            parts = [part.strip("_") for part in value.__module__.split(".")[1:]]
            folder = test.split("::")[0]
            home = sum(part in folder for part in parts)
            if any(f"/{other}/" in folder for other in KINDS if other != parts[0]):
                home -= 0.5
            refusals = own.count("pytest.raises")
            share = (3 * said.count(name) + around.count(name)) / (3 * len(said) + len(around) + 3)
            score = share * (1 + home) ** 2 / (1 + refusals)
            if score > best.get((family, name), ("", 0.0))[1]:
                best[family, name] = test, score
    return {key: test for key, (test, _) in best.items()}


def rows() -> tuple[list[str], list[str]]:
    """The table's rows, and what is missing."""
    found = methods()
    tests = proofs(found)
    lines = []
    for key, (kind, value, paper) in found.items():
        name = key[1]
        source = Path(inspect.getsourcefile(inspect.unwrap(value))).relative_to(ROOT)
        lines.append(
            f"| `{name}` | {kind} | {paper or '-'} | `{source}` | `{tests.get(key, '-')}` |"
        )
    missing = [f"`{'.'.join(key)}` is named by no test" for key in found if key not in tests]
    return lines, missing


def orders() -> tuple[list[str], list[str]]:
    """The table of solvers, from what `make orders` measured, and the solvers it lacks."""
    measured = json.loads((ROOT / "benchmarks" / "orders.json").read_text())
    lines = [
        f"| {m['solver']} | `{m['class']}` | {m['kind']} | {m['noise']} | {m['claimed']} | "
        f"{m['measured']:.2f} | {m['evaluations']} |"
        for m in measured["orders"]
    ]
    solvers = importlib.import_module("jaxdiff.solvers")
    own = {
        name
        for name, value in _public(solvers).items()
        if inspect.isclass(value) and issubclass(value, solvers.DiffusionSolver)
        and not inspect.isabstract(value) and not issubclass(value, solvers.SolverWrapper)
    }  # fmt: skip
    missing = own - {m["class"] for m in measured["orders"]} - set(measured["none"])
    return lines, [f"solvers.{name} is not in benchmarks/orders.json" for name in sorted(missing)]


def without_order() -> list[str]:
    """Why some solvers are not in the table."""
    measured = json.loads((ROOT / "benchmarks" / "orders.json").read_text())
    return [f"* `{name}`: {why}." for name, why in measured["none"].items()]


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
            "Generated by `make methods`. The test named is the one that says most about the "
            "method.",
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
            "Wrappers have that of what they wrap. Not in the table:",
            "",
            *without_order(),
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
