"""What the notebooks import from this package exists; this needs no notebook extra."""

import ast
import importlib
import json

import pytest

from support import paths


@pytest.mark.parametrize(
    "path", sorted((paths.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_imported_names_exist(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ())
    ]
    imports = [
        node
        for node in ast.walk(ast.parse("\n".join(code)))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hunyuan_jax")
    ]
    assert imports
    for node in imports:
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")
