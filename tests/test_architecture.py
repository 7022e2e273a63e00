"""Who may import whom, and what only some places may touch (docs/architecture.md); read from the
syntax tree, nothing is run.
"""

import ast
import re
from pathlib import Path

import pytest

from support import paths

ROOT = paths.ROOT

# What each part may import of the others: every part of a lower layer, and what stands before it
# in its own.
LAYERS = [
    ["pallas_kernels"],
    ["errors", "files", "hub", "storage", "progress", "malloc", "startup"],
    ["config", "presets", "flags"],
    ["quant", "gguf"],
    ["parallel"],
    ["params"],
    ["layers", "model"],
    ["tokenizer", "chat", "data", "optim", "runlog"],
    ["checkpoint", "weights"],
    ["train", "infer"],
    ["post"],
    ["serve", "evals", "plan", "report", "bench"],
    ["cli", "__main__", "train.py", "convert_torch.py", "configs"],
]
ORDER = [part for layer in LAYERS for part in layer]
ALLOWED = {part: set(ORDER[: ORDER.index(part)]) for part in ORDER}
# Below the model nothing knows a kernel's device, and data, optimizer and log do not know the
# model.
NO_KERNELS = {
    "errors",
    "files",
    "hub",
    "storage",
    "progress",
    "malloc",
    "startup",
    "config",
    "presets",
    "parallel",
    "quant",
    "gguf",
    "params",
}
NO_MODEL = {"tokenizer", "chat", "data", "optim", "runlog", "checkpoint"}
for part in NO_KERNELS | NO_MODEL:
    ALLOWED[part] -= {"pallas_kernels"}
for part in NO_MODEL:
    ALLOWED[part] -= {"layers", "model"}
ALLOWED["pallas_kernels"] = set()
ALLOWED["runlog"] |= {"pallas_kernels"}  # the table of chips
ALLOWED[""] = {"presets", "infer"}  # hunyuan_jax/__init__.py, by name and only when used

COLLECTIVES = {
    "all_to_all",
    "ragged_all_to_all",
    "psum",
    "pmean",
    "pmax",
    "pmin",
    "psum_scatter",
    "all_gather",
    "ppermute",
    "pshuffle",
}
COLLECTIVES |= {"axis_index", "axis_size", "pbroadcast"}
SHARDING_NAMES = {"PartitionSpec", "shard_map", "AxisType"}
DEVICE_NAMES = {
    "devices",
    "local_devices",
    "default_backend",
    "device_count",
    "local_device_count",
}
AXIS_WORDS = {"replica", "expert", "tensor"}
# "data" is a config section too, so the word itself is only banned where no config section is read
# by name.
AXIS_WORDS_IN = dict.fromkeys(
    ("layers", "model", "params", "quant", "infer"), AXIS_WORDS | {"data"}
)


# A parameter's name.  What reads parameters asks for their role (params/roles.py); only the layers
# that declare them and the table of official names in weights/ know the names.
PARAM_NAME = re.compile(
    r"(\A|/)(w[qkvo_]\w*_[A-Z]{2,}|b[qkvo]_[A-Z]+|[qk]_norm_H|embedding_VD|router_DE|scale_D)\Z"
    r"|_lora_"
)
KNOWS_PARAM_NAMES = {"params", "layers", "model", "weights", "pallas_kernels"}
# Sizes are counted without jax, so that `count` answers at once; the engine's plans are too.
WITHOUT_JAX = (
    "model/count.py",
    "model/layout.py",
    "params/roles.py",
    *(f"infer/{name}.py" for name in ("request", "pages", "scheduler")),
)
# Files that declare or start commands; nothing else reads a command line.
COMMAND_LINES = ("command.py", "cli.py", "__main__.py", "train.py", "convert_torch.py")


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
    """Dotted names of everything a module imports: at the top, in functions, and by
    import_module('...').
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("hunyuan_jax.")
        ):
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
    return (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def problems(path, source):
    """Everything a file does that it may not, as lines of text."""
    tree, part = ast.parse(source), part_of(path)
    allowed = ALLOWED[part] | {part}
    imported = list(imports(tree))
    # `from jax.lax import psum` counts like `jax.lax.psum`.
    used = set(attributes(tree)) | set(imported)
    last_words = {name.rsplit(".", 1)[-1] for name in used}
    found = [
        f"imports {name}" for name in imported if part_of_module(name) not in (None, *allowed)
    ]
    from_jax = {name.rsplit(".", 1)[-1] for name in used if name.split(".")[0] in ("jax", "lax")}
    is_parallel = part == "parallel"
    if part == "pallas_kernels":
        # A kernel's axes are those of its own grid, and benchmarks measure on the device that is
        # there.
        last_words -= {"AxisType"}
        from_jax -= {"axis_index", "axis_size"} | (
            DEVICE_NAMES if path.name == "bench.py" else set()
        )
    if not is_parallel and path != Path("hunyuan_jax/layers/ffn/moe/dispatch.py"):
        found += [f"calls the collective {name}" for name in sorted(from_jax & COLLECTIVES)]
    if not is_parallel:
        found += [f"uses {name}" for name in sorted(last_words & SHARDING_NAMES)]
    if (
        part in ALLOWED
        and not is_parallel
        and part not in ("config", "presets", "configs", "pallas_kernels")
    ):
        words = AXIS_WORDS_IN.get(part, AXIS_WORDS)
        found += [f"names the mesh axis {word!r}" for word in sorted(words & set(strings(tree)))]
    if path != Path("hunyuan_jax/parallel/mesh.py") and part not in ("plan", "cli"):
        found += [f"asks for {name}" for name in sorted(from_jax & DEVICE_NAMES)]
    if part not in KNOWS_PARAM_NAMES:
        names = filter(PARAM_NAME.search, strings(tree))
        found += [f"names the parameter {name!r}" for name in sorted(names)]
    roots = {name.split(".")[0] for name in imported}
    if part not in ("weights", "convert_torch.py"):
        found += ["imports torch"] * ("torch" in roots)
    if part != "flags" and path.name not in COMMAND_LINES:
        found += [f"imports {name}" for name in imported if part_of_module(name) == "flags"]
    if path != Path("hunyuan_jax/config/parse.py") and part not in ("flags", "configs"):
        found += ["imports ml_collections"] * ("ml_collections" in roots)
    is_without_jax = path.as_posix().endswith(WITHOUT_JAX) or path.stem.endswith("facts")
    if part in ("errors", "config", "presets", "flags", "") or is_without_jax:
        found += [
            f"imports {root}"
            for root in sorted(roots & {"jax", "flax", "optax", "grain", "orbax", "numpy"})
        ]
    if part == "pallas_kernels":
        found += [f"imports {root}" for root in sorted(roots & {"flax", "optax", "hunyuan_jax"})]
    return found


def sources():
    files = [
        *(ROOT / "hunyuan_jax").rglob("*.py"),
        *(ROOT / "pallas_kernels").rglob("*.py"),
        *(ROOT / "configs").glob("*.py"),
    ]
    files += [ROOT / name for name in ("train.py", "convert_torch.py") if (ROOT / name).exists()]
    return sorted(path.relative_to(ROOT) for path in files)


# What is known to break a rule, and why; a line here that no longer applies fails.
KNOWN = {}


# Private functions that tests still reach for; none is to be added.
PRIVATE_IN_TESTS = {
    "aot._overflow_error",
    "bench._operations",
    "command_lib._print_answer",
    "command_lib._questions",
    "gpu._grouped",
    "gpu._row_blocks",
    "gpu._row_tiles",
    "mesh._has_tpu",
    "report._thinned",
    "triton._pieces",
    "verify._fields",
    "watchdog._stacks",
}


def problems_of_test(source):
    """What a test does that it may not: importing a test, using what the project keeps private."""
    tree, ours = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and part_of_module(node.module) is not None:
            ours |= {alias.asname or alias.name for alias in node.names}
    modules = [name.split(".") for name in imports(tree)]
    found = [f"imports {piece}" for name in modules for piece in name if piece.startswith("test_")]
    found += [
        f"uses the private {name}"
        for name in set(attributes(tree)) | {name for name in ours if name.startswith("_")}
        if name.split(".")[0] in ours
        and re.search(r"(^|\.)_[a-z]\w*$", name)
        and not name.endswith("._replace")
    ]
    return sorted(found)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.name)
def test_tests(path):
    known = {f"uses the private {name}" for name in PRIVATE_IN_TESTS}
    assert set(problems_of_test(path.read_text(encoding="utf-8"))) <= known


def test_the_check_of_tests():
    assert problems_of_test("from test_step import MODEL") == ["imports test_step"]
    assert problems_of_test("from hunyuan_jax.plan import _size") == ["uses the private _size"]
    private = "from pallas_kernels.expert_matmul import gpu\ngpu._tiles(gpu.tiles)"
    assert problems_of_test(private) == ["uses the private gpu._tiles"]
    assert problems_of_test("from support import runs\nruns._x") == []


@pytest.mark.parametrize("path", sources(), ids=str)
def test_layers(path):
    assert problems(path, (ROOT / path).read_text(encoding="utf-8")) == KNOWN.get(
        path.as_posix(), []
    )


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in sources()} <= set(ALLOWED)
    assert len(sources()) > 40


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "layers/norm.py",
            "from hunyuan_jax.train.state import TrainState",
            ["imports hunyuan_jax.train.state.TrainState"],
        ),
        (
            "layers/norm.py",
            "def f():\n    from hunyuan_jax.infer import engine",
            ["imports hunyuan_jax.infer.engine"],
        ),
        ("layers/norm.py", "import hunyuan_jax.optim.build", ["imports hunyuan_jax.optim.build"]),
        (
            "data/loader.py",
            "from hunyuan_jax.layers.ffn.moe import layer",
            ["imports hunyuan_jax.layers.ffn.moe.layer"],
        ),
        (
            "optim/groups.py",
            "import importlib\nimportlib.import_module('hunyuan_jax.layers.ffn.moe.layer')",
            ["imports hunyuan_jax.layers.ffn.moe.layer"],
        ),
        ("layers/norm.py", "from hunyuan_jax.errors import ConfigError", []),
        (
            "layers/norm.py",
            "from hunyuan_jax.report.page import page",
            ["imports hunyuan_jax.report.page.page"],
        ),
        (
            "layers/ffn/moe/layer.py",
            "import jax\njax.lax.psum(1, 'x')",
            ["calls the collective psum"],
        ),
        (
            "layers/ffn/moe/layer.py",
            "from jax import lax\nlax.all_gather(1, 'x')",
            ["calls the collective all_gather"],
        ),
        (
            "layers/ffn/moe/layer.py",
            "from jax.lax import ppermute",
            ["calls the collective ppermute"],
        ),
        ("layers/ffn/moe/dispatch.py", "import jax\njax.lax.all_to_all(1, 'x')", []),
        ("parallel/island.py", "import jax\njax.lax.psum(1, 'x')", []),
        ("train/step.py", "from jax.sharding import PartitionSpec as P", ["uses PartitionSpec"]),
        ("train/step.py", "import jax\njax.sharding.PartitionSpec('x')", ["uses PartitionSpec"]),
        ("layers/ffn/moe/layer.py", "x = ('expert',)", ["names the mesh axis 'expert'"]),
        ("layers/ffn/moe/layer.py", "x = 'data'", ["names the mesh axis 'data'"]),
        ("checkpoint/store.py", "x = config['data']", []),
        ("train/loop.py", "import jax\njax.devices()", ["asks for devices"]),
        ("train/loop.py", "import jax\njax.default_backend()", ["asks for default_backend"]),
        ("train/loop.py", "mesh.devices", []),
        ("infer/engine.py", "import torch", ["imports torch"]),
        ("weights/folder.py", "def f():\n    import torch", []),
        ("train/loop.py", "from ml_collections import ConfigDict", ["imports ml_collections"]),
        ("config/model.py", "import jax", ["imports jax"]),
        ("config/data.py", "import ml_collections", ["imports ml_collections"]),
        ("config/parse.py", "import ml_collections", []),
        ("infer/command.py", "from hunyuan_jax import flags", []),
        ("infer/text.py", "from hunyuan_jax import flags", ["imports hunyuan_jax.flags"]),
        ("model/count.py", "import jax.numpy as jnp", ["imports jax"]),
        ("layers/mixer/attention_facts.py", "import jax", ["imports jax"]),
        (
            "optim/groups.py",
            "path.endswith('moe/router_DE')",
            ["names the parameter 'moe/router_DE'"],
        ),
    ],
)
def test_the_check_itself(path, source, expected):
    assert problems(Path("hunyuan_jax") / path, source) == expected
