"""Who may import whom, and what only some places may touch (docs/architecture.md); read from the syntax tree, nothing is run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of the others.  A lower layer never imports a higher one.
_LAYERS = [
    {"pallas_kernels"},
    {"config", "files", "heap", "presets", "obs.metrics", "obs.goodput"},
    {"parallel"},
    {"model", "quant"},
    {"optim", "data", "tokenizer"},
    {"checkpoint", "convert"},
    {"train", "infer"},
    {"post", "evals", "plan", "obs", "bench"},
    {"cli", "flags", "__main__", "train.py", "convert_torch.py", "configs"},
]


def _upto(layer, *, without=()):
    return set().union(*(parts for i, parts in enumerate(_LAYERS[: layer + 1]) if i not in without))


ALLOWED = {
    "": {"presets", "infer"},  # hunyuan_jax/__init__.py, by name and only when used
    "pallas_kernels": set(),
    "config": set(),
    "files": {"config"},
    "heap": set(),
    "presets": {"config"},
    "obs.metrics": {"config"},
    "obs.goodput": {"obs.metrics"},
    "parallel": _upto(1, without=(0,)),
    "model": _upto(2) | {"quant"},
    "quant": _upto(2),
    "optim": _upto(2, without=(0,)) | {"quant"},
    "tokenizer": _upto(2, without=(0,)),
    "data": _upto(2, without=(0,)) | {"tokenizer"},  # a batch is made of tokens
    "checkpoint": _upto(3, without=(0,)),
    "convert": _upto(3, without=(0,)),
    "train": _upto(5, without=(0,)),
    "infer": _upto(5, without=(0,)),
    **dict.fromkeys(_LAYERS[7] - {"bench"}, _upto(6, without=(0,))),
    "bench": _upto(6, without=(0,)) | {"obs"},
    **dict.fromkeys(_LAYERS[8], _upto(8)),
}

COLLECTIVES = {"all_to_all", "ragged_all_to_all", "psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "ppermute", "pshuffle"}
COLLECTIVES |= {"axis_index", "axis_size", "pbroadcast"}
SHARDING_NAMES = {"PartitionSpec", "shard_map", "AxisType"}
DEVICE_NAMES = {"devices", "local_devices", "default_backend", "device_count", "local_device_count"}
AXIS_WORDS = {"replica", "expert", "tensor"}
# "data" is a config section too, so the word itself is only banned where no config section is read by name.
AXIS_WORDS_IN = {"model": AXIS_WORDS | {"data"}, "quant": AXIS_WORDS | {"data"}, "infer": AXIS_WORDS | {"data"}}


def part_of(path):
    """The part of the project that a file, relative to the root, belongs to."""
    pieces = path.with_suffix("").parts
    if pieces[0] != "hunyuan_jax":
        return pieces[0] if len(pieces) > 1 else path.name
    if ".".join(pieces[1:]) in ALLOWED:
        return ".".join(pieces[1:])
    return "" if pieces[1] == "__init__" else pieces[1]


def part_of_module(name, known=ALLOWED):
    """The part that a dotted module of ours names, or None if it is somebody else's."""
    pieces = name.split(".")
    if pieces[0] == "pallas_kernels":
        return "pallas_kernels"
    if pieces[0] != "hunyuan_jax":
        return None
    if ".".join(pieces[1:3]) in known:
        return ".".join(pieces[1:3])
    return pieces[1] if len(pieces) > 1 else ""


def imports(tree):
    """Dotted names of everything a module imports: at the top, in functions, and by import_module('...')."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("hunyuan_jax."):
            yield node.value.split(" ")[0]


def attributes(tree):
    """Dotted attribute chains and names, such as 'jax.lax.psum'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            pieces = []
            while isinstance(node, ast.Attribute):
                pieces.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name):
                yield ".".join([node.id, *reversed(pieces)])


def strings(tree):
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def problems(path, source):
    """Everything a file does that it may not, as lines of text."""
    tree, part = ast.parse(source), part_of(path)
    allowed = ALLOWED[part] | {part}
    imported = list(imports(tree))
    # `from jax.lax import psum` counts like `jax.lax.psum`.
    used = set(attributes(tree)) | set(imported)
    last_words = {name.rsplit(".", 1)[-1] for name in used}
    found = [f"imports {name}" for name in imported if part_of_module(name) not in (None, *allowed)]
    from_jax = {name.rsplit(".", 1)[-1] for name in used if name.split(".")[0] in ("jax", "lax")}
    is_parallel = part == "parallel"
    if part == "pallas_kernels":
        # A kernel's axes are those of its own grid, and benchmarks measure on the device that is there.
        last_words -= {"AxisType"}
        from_jax -= {"axis_index", "axis_size"} | (DEVICE_NAMES if path.name == "bench.py" else set())
    if not is_parallel and path != Path("hunyuan_jax/model/dispatch.py"):
        found += [f"calls the collective {name}" for name in sorted(from_jax & COLLECTIVES)]
    if not is_parallel:
        found += [f"uses {name}" for name in sorted(last_words & SHARDING_NAMES)]
    if part in ALLOWED and not is_parallel and part not in ("config", "presets", "configs", "pallas_kernels"):
        words = AXIS_WORDS_IN.get(part, AXIS_WORDS)
        found += [f"names the mesh axis {word!r}" for word in sorted(words & set(strings(tree)))]
    if path != Path("hunyuan_jax/parallel/mesh.py") and part not in ("plan", "cli"):
        found += [f"asks for {name}" for name in sorted(from_jax & DEVICE_NAMES)]
    roots = {name.split(".")[0] for name in imported}
    if part not in ("convert", "convert_torch.py"):
        found += ["imports torch"] * ("torch" in roots)
    if part not in ("config", "flags", "train.py", "configs"):
        found += ["imports ml_collections"] * ("ml_collections" in roots)
    if part in ("config", "presets", "flags", "") or path == Path("hunyuan_jax/model/count.py"):
        found += [f"imports {root}" for root in sorted(roots & {"jax", "flax", "optax", "grain", "orbax", "numpy"})]
    if part == "pallas_kernels":
        found += [f"imports {root}" for root in sorted(roots & {"flax", "optax", "hunyuan_jax"})]
    return found


def sources():
    files = [*(ROOT / "hunyuan_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    files += [ROOT / name for name in ("train.py", "convert_torch.py") if (ROOT / name).exists()]
    return sorted(path.relative_to(ROOT) for path in files)


# What is known to break a rule, and why; a line here that no longer applies fails.
KNOWN = {
    "hunyuan_jax/checkpoint/store.py": ["imports hunyuan_jax.train.state.abstract_state", "imports hunyuan_jax.train.state.build_program"],
}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_layers(path):
    assert problems(path, (ROOT / path).read_text(encoding="utf-8")) == KNOWN.get(path.as_posix(), [])


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in sources()} <= set(ALLOWED)
    assert len(sources()) > 40


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("model/norm.py", "from hunyuan_jax.train.state import TrainState", ["imports hunyuan_jax.train.state.TrainState"]),
        ("model/norm.py", "def f():\n    from hunyuan_jax.infer import engine", ["imports hunyuan_jax.infer.engine"]),
        ("model/norm.py", "import hunyuan_jax.optim.build", ["imports hunyuan_jax.optim.build"]),
        ("data/loader.py", "from hunyuan_jax.model import moe", ["imports hunyuan_jax.model.moe"]),
        ("optim/groups.py", "import importlib\nimportlib.import_module('hunyuan_jax.model.moe')", ["imports hunyuan_jax.model.moe"]),
        ("model/norm.py", "from hunyuan_jax.obs.metrics import peak_flops", []),
        ("model/norm.py", "from hunyuan_jax.obs.report import page", ["imports hunyuan_jax.obs.report.page"]),
        ("model/moe.py", "import jax\njax.lax.psum(1, 'x')", ["calls the collective psum"]),
        ("model/moe.py", "from jax import lax\nlax.all_gather(1, 'x')", ["calls the collective all_gather"]),
        ("model/moe.py", "from jax.lax import ppermute", ["calls the collective ppermute"]),
        ("model/dispatch.py", "import jax\njax.lax.all_to_all(1, 'x')", []),
        ("parallel/island.py", "import jax\njax.lax.psum(1, 'x')", []),
        ("train/step.py", "from jax.sharding import PartitionSpec as P", ["uses PartitionSpec"]),
        ("train/step.py", "import jax\njax.sharding.PartitionSpec('x')", ["uses PartitionSpec"]),
        ("model/moe.py", "x = ('expert',)", ["names the mesh axis 'expert'"]),
        ("model/moe.py", "x = 'data'", ["names the mesh axis 'data'"]),
        ("checkpoint/store.py", "x = config['data']", []),
        ("train/loop.py", "import jax\njax.devices()", ["asks for devices"]),
        ("train/loop.py", "import jax\njax.default_backend()", ["asks for default_backend"]),
        ("train/loop.py", "mesh.devices", []),
        ("infer/engine.py", "import torch", ["imports torch"]),
        ("convert/torch_io.py", "def f():\n    import torch", []),
        ("train/loop.py", "from ml_collections import ConfigDict", ["imports ml_collections"]),
        ("config.py", "import jax", ["imports jax"]),
        ("model/count.py", "import jax.numpy as jnp", ["imports jax"]),
    ],
)
def test_the_check_itself(path, source, expected):
    assert problems(Path("hunyuan_jax") / path, source) == expected
