"""Runs the notebooks of this folder, and writes their outputs into them.

python docs/notebooks/run.py smollm.ipynb tenants.ipynb

The cells run in one namespace, in the folder of the notebook. The outputs of a cell are
what it prints and its last expression. Standard error, with progress bars, is left out.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import sys
from typing import Any

FOLDER = pathlib.Path(__file__).parent


def run(notebook: dict[str, Any], folder: pathlib.Path = FOLDER) -> dict[str, Any]:
    """Runs the code cells in order, and replaces their outputs.

    Args:
        notebook: the content of a notebook; changed in place.
        folder: to run the cells in.

    Returns:
        The namespace after the last cell.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with contextlib.chdir(folder):
        for count, cell in enumerate(cells, start=1):
            cell["execution_count"] = count
            cell["outputs"] = _run_cell("".join(cell["source"]), count, namespace)
    return namespace


def _run_cell(source: str, count: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a cell and returns its outputs."""
    tree, shown, printed = ast.parse(source), None, io.StringIO()
    name = f"cell {count}"
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if shown is not None:
        result = {"execution_count": count, "metadata": {}}
        result |= {"output_type": "execute_result", "data": _display(shown)}
        outputs.append(result)
    return outputs


def _display(value: Any) -> dict[str, Any]:
    """The forms in which a notebook shows a value."""
    if hasattr(value, "savefig"):
        file = io.BytesIO()
        value.savefig(file, format="png", dpi=60)
        data: dict[str, Any] = {"image/png": base64.b64encode(file.getvalue()).decode()}
        return data | {"text/plain": [f"<Figure of {len(value.axes)} axes>"]}
    if not hasattr(value, "_repr_html_"):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    forms = {"text/html": value._repr_html_(), "text/plain": str(value)}
    return {kind: text.splitlines(keepends=True) for kind, text in forms.items()}


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))


def main(names: list[str]) -> None:
    """Runs notebooks and writes them back."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in names:
        notebook = read(FOLDER / name)
        run(notebook)
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
