"""Runnable recipes: `python -m train.pretrain`, `python -m train.sample`, and their kin."""

from importlib.util import find_spec

for _name in ("tyro", "tqdm", "matplotlib", "grain", "PIL"):
    if find_spec(_name) is None:
        raise SystemExit(
            f"error: {_name} is missing. The recipes need: pip install 'jaxdiff[train]'"
        )
