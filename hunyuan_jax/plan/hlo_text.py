"""Parses the text of a compiled, scheduled XLA module into computations and ops; uses no jax."""

import dataclasses
import math
import re

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"  (?:ROOT )?%?[\w.\-]+ = ")
_END = re.compile(r'\}(, execution_thread="\w+")?$')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_UNKNOWN_CYCLES = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction.

    shape: as written, with layouts.
    operands: names of the operands.
    attributes: the text after the operands.
    cycles: the compiler's estimate; 0 if the op has none, None if it is unknown (2^63 - 1).
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool
    cycles: int | None

    @property
    def op_name(self) -> str:
        """Origin in the Python program, such as 'jit(step)/jvp()/while/body/dot_general'."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Returns the names of the computations in the attributes `keys`, such as 'calls'."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match[1]) if match else []
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, each a list of ops in scheduled order; `entry` names the first."""

    computations: dict[str, list[Op]]
    entry: str

    def __getitem__(self, name: str) -> list[Op]:
        return self.computations[name]


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    An op may span several lines (a Pallas kernel's metadata has line breaks).  A computation ends
    at a line that is '}', or '}, execution_thread="NAME"' if it runs beside the main one.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Op]] = {}
    entry, current, lines = "", None, []
    for line in text.splitlines():
        if current is None:
            match = _COMPUTATION.match(line)
            if match and not line.startswith("HloModule"):
                current, lines = match[2], []
                entry = current if match[1] else entry
        elif _END.match(line):
            computations[current] = [_parse_op(op) for op in lines]
            current = None
        elif _OP.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line
    if not entry:
        raise ValueError(
            "the text has no ENTRY computation; pass the text of one compiled module."
        )
    return Module(computations, entry)


def split_tuple(shape: str) -> list[str]:
    """Returns the elements of a tuple shape; [shape] if it is not a tuple."""
    if not shape.startswith("("):
        return [shape]
    elements, depth, start = [], 0, 1
    for i, char in enumerate(shape):
        depth += (char in "({[") - (char in ")}]")
        if (char == "," and depth == 1) or (depth == 0 and i > start):
            elements.append(re.sub(r"/\*.*?\*/", "", shape[start:i]).strip())
            start = i + 1
    return elements


def num_bytes(shape: str) -> int:
    """Returns the bytes of a shape or tuple of shapes, without padding by the layout."""
    bits = 0
    for dtype, dims in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)
        bits += (int(width[0]) if width else 8) * _product(dims)
    return bits // 8


def num_elements(shape: str) -> int:
    """Returns the elements of a shape or tuple of shapes."""
    return sum(_product(dims) for _, dims in _ARRAY.findall(shape))


def _product(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)


def trip_count(module: Module, loop: Op) -> int | None:
    """Returns how often a while op runs its body, or None if that depends on data.

    The compiler's own figure if it wrote one.  Otherwise the constant that the loop's condition
    compares its counter with: jax's loops count up from zero by one.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = module[loop.called("condition")[0]]
    root = next(op for op in condition if op.is_root)
    limits = _constants_of(root, condition)
    if not limits and root.opcode == "fusion":
        fused = module[root.called("calls")[0]]
        limits = _constants_of(next(op for op in fused if op.is_root), fused)
    return limits.pop() if len(limits) == 1 else None


def _constants_of(op: Op, computation: list[Op]) -> set[int]:
    """Returns the values of the op's operands that are integer constants."""
    constants = {
        other.name: other.arguments for other in computation if other.opcode == "constant"
    }
    return {
        int(constants[name])
        for name in op.operands
        if re.fullmatch(r"\d+", constants.get(name, ""))
    }


def _parse_op(text: str) -> Op:
    is_root = text.startswith("  ROOT ")
    name, rest = text.strip().removeprefix("ROOT ").split(" = ", 1)
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    arguments, attributes = rest[len(opcode) + 1 : end], rest[end + 1 :]
    match = re.search(r'"estimated_cycles":"(\d+)"', attributes)
    cycles = int(match[1]) if match else 0
    return Op(
        name=name.lstrip("%"),
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=attributes,
        is_root=is_root,
        cycles=None if cycles == _UNKNOWN_CYCLES else cycles,
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")
