"""Shapes and types, as the annotations say them, checked at every call of what `CHECKED` names."""

import jaxtyping
from beartype import BeartypeConf, beartype

# Modules whose annotations carry shapes.
CHECKED = [
    "jaxdiff.data._toy2d",
    "jaxdiff.geometry._grassmann",
    "jaxdiff.losses._batch",
    "jaxdiff.metrics",
    "jaxdiff.solvers._grids",
]
# An int is a float, as for Python's type checkers.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install():
    jaxtyping.install_import_hook(CHECKED, "shapes.check")
