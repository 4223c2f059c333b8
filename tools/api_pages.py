"""A hook of mkdocs: pages of the API list what each package exports, without lists kept by hand."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent


def exported(package: str) -> list[str]:
    """Names that a package's `__init__.py` imports as themselves, modules left out."""
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    if not path.exists():
        return []
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module != package:
            names += [alias.asname for alias in node.names if alias.asname == alias.name]
    return sorted(names, key=str.lower)


def on_page_markdown(markdown: str, page, **_) -> str:
    """Add every exported name to a page of the API whose heading is the package."""
    package = markdown.split("\n", 1)[0].removeprefix("# ")
    if not page.file.src_uri.startswith("api/"):
        return markdown
    return markdown + "".join(f"\n::: {package}.{name}\n" for name in exported(package))
