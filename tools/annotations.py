"""An extension of griffe: shapes in annotations stay text, and what is returned keeps its words."""

import re

import griffe

ARRAYS = ("Float", "Int", "Bool", "Num", "Key")


class Annotations(griffe.Extension):
    """Mends what griffe makes of annotations and docstrings."""

    def on_function(self, *, func: griffe.Function, **_) -> None:
        """Mend a function."""
        for parameter in func.parameters:
            _mend(parameter.annotation)
        _mend(func.returns)
        if func.docstring is not None and func.returns is not None:
            # Without a type of its own, words before a colon would be taken for one.
            kind = re.sub(
                rf"({'|'.join(ARRAYS)})" + r'\[Array, "[^"]*"\]', "Array", str(func.returns)
            )
            found = func.docstring.value
            func.docstring.value = re.sub(r"(\nReturns:\n\s+)", rf"\1{kind}: ", found)


def _mend(annotation) -> None:
    """Text such as "n *event", which griffe has read as arithmetic, becomes text again."""
    if not isinstance(annotation, griffe.Expr):
        return
    for part in annotation.iterate(flat=False):
        if part is not annotation:  # a name is its own part
            _mend(part)
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) in ARRAYS:
        array, shape = annotation.slice.elements
        text = str(shape).strip("'\"").replace(" * ", " *")
        annotation.slice.elements = [array, f'"{text}"']
