"""Straight-line NumPy code of a traced JAX function.

What a function computes from arrays that are known when it is translated (parameters, schedules)
is computed then, loops of known length are written out, and standard normal draws become an
argument. What is left are some dozen kinds of array operations, each a line of NumPy. An operation
that has no line here is refused by name.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal as JaxLiteral

BINARY = {
    **{"add": "+", "add_any": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"},
    **{"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="},
    **{"and": "&", "or": "|"},
}
CALLS = {
    **{"exp": "np.exp", "log": "np.log", "log1p": "np.log1p", "expm1": "np.expm1"},
    **{"sin": "np.sin", "cos": "np.cos", "acos": "np.arccos", "tanh": "np.tanh", "sqrt": "np.sqrt"},
    **{"abs": "np.abs", "sign": "np.sign", "neg": "-", "not": "~", "floor": "np.floor"},
    **{"max": "np.maximum", "min": "np.minimum", "is_finite": "np.isfinite"},
}
REDUCTIONS = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min"}
INLINE = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call")
"""Calls of a traced function, written out where they stand."""


@dataclass(frozen=True)
class Symbol:
    """A value that is only known when the code runs, by its name in the code."""

    name: str
    shape: tuple[int, ...]
    dtype: Any


class RandomKey:
    """A random key: nothing is computed from one but draws, which the code takes as arguments."""


@dataclass
class Code:
    """A function `outputs = f(inputs, draws, constants)`, as lines of NumPy."""

    lines: list[str] = field(default_factory=list)
    constants: list[np.ndarray] = field(default_factory=list)
    draws: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the standard normal arrays it takes, in the order of drawing."""
    outputs: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    """Which of all draws those are; the others have no effect on any output."""

    def emit(self, expression: str, aval: Any) -> Symbol:
        """A new line, and the symbol it defines."""
        symbol = Symbol(f"v{len(self.lines)}", tuple(aval.shape), aval.dtype)
        self.lines.append(f"{symbol.name} = {expression}")
        return symbol

    def text(self, value: Any) -> str:
        """A symbol's name, a number, or a constant array's place."""
        if isinstance(value, Symbol):
            return value.name
        if isinstance(value, RandomKey):
            raise ValueError("there is no line of NumPy for a policy that returns a random key")
        array = np.asarray(value)
        if array.ndim == 0:
            number = array.item()
            if not np.isfinite(number):
                return f"float('{number}')"
            return f"({number!r})" if number < 0 else repr(number)
        for index, known in enumerate(self.constants):
            if known.dtype == array.dtype and np.array_equal(known, array):
                return f"c[{index}]"
        self.constants.append(array)
        return f"c[{len(self.constants) - 1}]"


def translate(
    function: Callable[..., Any],
    inputs: Sequence[tuple[str, jax.ShapeDtypeStruct]],
    *,
    key: Any,
) -> Code:
    """The code of `function(*inputs, key)`, whose outputs are arrays, flattened in order.

    `inputs` are names and shapes. Raises `ValueError` for an operation that has no line of NumPy.
    """
    closed = jax.make_jaxpr(function)(*(shape for _, shape in inputs), key)
    code = Code()
    symbols = [Symbol(name, tuple(shape.shape), shape.dtype) for name, shape in inputs]
    outputs = _run(code, closed.jaxpr, closed.consts, [*symbols, RandomKey()])
    code.outputs = [code.text(value) for value in outputs]
    return _needed(code)


def evaluate(
    function: Callable[..., Any], inputs: Sequence[Any], *, key: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(outputs, every standard normal draw) of `function(*inputs, key)`, computed by JAX."""
    closed = jax.make_jaxpr(function)(*inputs, key)
    drawn: list[np.ndarray] = []
    outputs = _run(Code(), closed.jaxpr, closed.consts, [*inputs, key], drawn)
    return [np.asarray(value) for value in outputs], drawn


def _needed(code: Code) -> Code:
    """The code without lines, constants and draws that no output depends on."""
    wanted = set(re.findall(r"\w+", " ".join(code.outputs)))
    kept = []
    for line in reversed(code.lines):
        name, expression = line.split(" = ", 1)
        if name in wanted:
            kept.append(line)
            wanted |= set(re.findall(r"\w+", expression))
    text = "\n".join(reversed(kept))
    outputs = ", ".join(code.outputs)
    needed = Code()
    for letter, held, into in (
        ("c", code.constants, needed.constants),
        ("draws", code.draws, needed.draws),
    ):
        pattern = rf"\b{letter}\[(\d+)\]"
        used = sorted({int(index) for index in re.findall(pattern, text + outputs)})
        into.extend(held[index] for index in used)  # pyright: ignore[reportArgumentType]
        place = {str(index): new for new, index in enumerate(used)}

        def moved(match: re.Match[str], letter: str = letter, place: Any = place) -> str:
            return f"{letter}[{place[match[1]]}]"

        text, outputs = re.sub(pattern, moved, text), re.sub(pattern, moved, outputs)
        if letter == "draws":
            needed.kept = used
    needed.lines, needed.outputs = text.splitlines(), outputs.split(", ")
    return needed


def _run(
    code: Code,
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    drawn: list[np.ndarray] | None = None,
) -> list[Any]:
    """Write a traced function's operations; its outputs as symbols or known arrays.

    What is known is computed. Draws from keys that are known go to `drawn`.
    """
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, JaxLiteral) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        results = _operation(code, equation, operands, drawn)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _operation(
    code: Code, equation: Any, operands: list[Any], drawn: list[np.ndarray] | None
) -> list[Any]:
    name, parameters = equation.primitive.name, equation.params
    secret = any(isinstance(operand, RandomKey) for operand in operands)
    draw = name in INLINE and parameters.get("name") == "_normal"
    if draw and secret:
        (out,) = equation.outvars
        code.draws.append(tuple(out.aval.shape))
        return [code.emit(f"draws[{len(code.draws) - 1}]", out.aval)]
    if secret and name == "random_bits":
        raise ValueError("there is no line of NumPy for draws that are not standard normal")
    if secret and name not in (*INLINE, "scan"):
        kinds = [variable.aval.dtype for variable in equation.outvars]
        if not all(jax.dtypes.issubdtype(kind, jax.dtypes.prng_key) for kind in kinds):
            raise _without_line(name, "a random key")
        return [RandomKey() for _ in kinds]  # split, cut, folded: still a key
    if name in INLINE:
        inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
        results = _run(code, inner.jaxpr, inner.consts, operands, drawn)
        if draw and drawn is not None:
            drawn.append(np.asarray(results[0]))
        return results
    if name == "scan" and (drawn is not None or secret or _symbolic(operands)):
        return _unrolled(code, equation, operands, drawn)
    if not _symbolic(operands):
        found = equation.primitive.bind(*operands, **parameters)
        return list(found) if equation.primitive.multiple_results else [found]
    if name in ("mul", "dot_general") and any(_zero(operand) for operand in operands):
        (out,) = equation.outvars  # noise that is not wanted
        return [np.zeros(out.aval.shape, out.aval.dtype)]
    if name == "split":
        return _split(code, equation, operands)
    out, *others = equation.outvars
    if others:
        raise _without_line(name)
    return [code.emit(_expression(code, equation, operands, out.aval), out.aval)]


def _symbolic(operands: list[Any]) -> bool:
    return any(isinstance(operand, Symbol) for operand in operands)


def _zero(value: Any) -> bool:
    return not isinstance(value, Symbol | RandomKey) and not np.any(np.asarray(value))


def _unrolled(
    code: Code, equation: Any, operands: list[Any], drawn: list[np.ndarray] | None
) -> list[Any]:
    """A loop of known length, written out."""
    parameters = equation.params
    inner, length = parameters["jaxpr"], parameters["length"]
    fixed, carried = parameters["num_consts"], parameters["num_carry"]
    constants, carry = operands[:fixed], operands[fixed : fixed + carried]
    stacked = operands[fixed + carried :]
    order = range(length)[::-1] if parameters["reverse"] else range(length)
    rows: dict[int, list[Any]] = {}
    for i in order:
        slices = [_row(code, each, i) for each in stacked]
        arguments = [*constants, *carry, *slices]
        results = _run(code, inner.jaxpr, inner.consts, arguments, drawn)
        carry, rows[i] = results[:carried], results[carried:]
    collected = []
    for index, variable in enumerate(equation.outvars[carried:]):
        parts = [rows[i][index] for i in range(length)]
        if _symbolic(parts):
            text = f"np.stack([{', '.join(map(code.text, parts))}])"
            collected.append(code.emit(text, variable.aval))
        else:
            collected.append(np.stack([np.asarray(part) for part in parts]))
    return [*carry, *collected]


def _row(code: Code, value: Any, i: int) -> Any:
    if isinstance(value, RandomKey):
        return value
    if not isinstance(value, Symbol):
        return value[i]
    aval = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
    return code.emit(f"{value.name}[{i}]", aval)


def _split(code: Code, equation: Any, operands: list[Any]) -> list[Any]:
    axis, start, parts = equation.params["axis"], 0, []
    for size, variable in zip(equation.params["sizes"], equation.outvars, strict=True):
        cut = ":, " * axis + f"{start}:{start + size}"
        parts.append(code.emit(f"{code.text(operands[0])}[{cut}]", variable.aval))
        start += size
    return parts


def _expression(code: Code, equation: Any, operands: list[Any], aval: Any) -> str:
    """The right-hand side of one operation with one result."""
    name, parameters = equation.primitive.name, equation.params
    texts = [code.text(operand) for operand in operands]
    if name in BINARY:
        return f"{texts[0]} {BINARY[name]} {texts[1]}"
    if name in CALLS:
        return f"{CALLS[name]}({', '.join(texts)})"
    if name in REDUCTIONS:
        return f"{texts[0]}.{REDUCTIONS[name]}(axis={tuple(parameters['axes'])})"
    match name:
        case "rsqrt":
            return f"1.0 / np.sqrt({texts[0]})"
        case "square":
            return f"{texts[0]} * {texts[0]}"
        case "integer_pow":
            return f"{texts[0]} ** {parameters['y']}"
        case "logistic":
            return f"1.0 / (1.0 + np.exp(-{texts[0]}))"
        case "select_n" if len(texts) == 3:
            return f"np.where({texts[0]}, {texts[2]}, {texts[1]})"
        case "clamp":
            return f"np.clip({texts[1]}, {texts[0]}, {texts[2]})"
        case "convert_element_type":
            return f"np.asarray({texts[0]}).astype('{np.dtype(parameters['new_dtype'])}')"
        case "copy" | "copy_p" | "stop_gradient":
            return texts[0]
        case "reshape" | "squeeze":
            return f"np.reshape({texts[0]}, {aval.shape})"
        case "transpose":
            return f"np.transpose({texts[0]}, {tuple(parameters['permutation'])})"
        case "rev":
            return f"np.flip({texts[0]}, {tuple(parameters['dimensions'])})"
        case "concatenate":
            return f"np.concatenate([{', '.join(texts)}], {parameters['dimension']})"
        case "broadcast_in_dim":
            placed = [1] * len(parameters["shape"])
            kept = zip(parameters["broadcast_dimensions"], _shape(operands[0]), strict=True)
            for place, size in kept:
                placed[place] = size
            return f"np.broadcast_to(np.reshape({texts[0]}, {tuple(placed)}), {aval.shape})"
        case "slice":
            steps = parameters["strides"] or (1,) * len(aval.shape)
            cuts = zip(parameters["start_indices"], parameters["limit_indices"], steps, strict=True)
            inner = ", ".join(f"{a}:{b}" if s == 1 else f"{a}:{b}:{s}" for a, b, s in cuts)
            return f"{texts[0]}[{inner}]"
        case "dynamic_slice" if not any(isinstance(each, Symbol) for each in operands[1:]):
            sizes = parameters["slice_sizes"]
            starts = [
                int(np.clip(int(start), 0, full - size))
                for start, full, size in zip(operands[1:], operands[0].shape, sizes, strict=True)
            ]
            inner = ", ".join(f"{a}:{a + n}" for a, n in zip(starts, sizes, strict=True))
            return f"{texts[0]}[{inner}]"
        case "dot_general":
            return _product(code, operands, parameters["dimension_numbers"])
        case "gather" if not isinstance(operands[1], Symbol):
            return _gathered(code, equation, operands)
        case "scatter-add" | "scatter" if not isinstance(operands[1], Symbol):
            return _scattered(code, equation, operands, aval)
    raise _without_line(name)


def _without_line(name: str, of: str = "this policy") -> ValueError:
    return ValueError(f"there is no line of NumPy for the operation `{name}` of {of}")


def _product(code: Code, operands: list[Any], dimensions: Any) -> str:
    (left, right), batch = dimensions
    if any(batch) or len(left) != 1 or any(len(_shape(each)) > 2 for each in operands):
        raise ValueError("there is no line of NumPy for a batched `dot_general`")
    one = _turned(code, operands[0], left[0] != len(_shape(operands[0])) - 1)
    other = _turned(code, operands[1], right[0] != 0)
    return f"{one} @ {other}"


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, Symbol) else np.shape(value)


def _turned(code: Code, value: Any, transposed: bool) -> str:
    if not transposed:
        return code.text(value)
    if isinstance(value, Symbol):
        return f"{value.name}.T"
    return code.text(np.ascontiguousarray(np.asarray(value).T))


def _gathered(code: Code, equation: Any, operands: list[Any]) -> str:
    """A gather at known places: those of its elements in the flat operand."""
    source, places = operands
    flat = np.arange(int(np.prod(source.shape)), dtype=np.int32).reshape(source.shape)
    parameters = {**equation.params, "fill_value": -1}
    index = np.asarray(equation.primitive.bind(jnp.asarray(flat), places, **parameters))
    if (index < 0).any():
        raise ValueError("there is no line of NumPy for a `gather` from outside its operand")
    return f"np.ravel({source.name})[{code.text(index)}]"


def _scattered(code: Code, equation: Any, operands: list[Any], aval: Any) -> str:
    """A sum into known places, as a matrix of zeros and ones on the flat updates."""
    base, places, updates = operands
    if equation.primitive.name == "scatter":
        raise ValueError("there is no line of NumPy for `scatter` of values known only at run time")
    shape, count = _shape(updates), int(np.prod(_shape(updates)))
    zeros = jnp.zeros(aval.shape, aval.dtype)

    def landed(update: Any) -> Any:
        found = equation.primitive.bind(zeros, places, update.reshape(shape), **equation.params)
        return found.ravel()

    matrix = np.asarray(jax.vmap(landed, out_axes=1)(jnp.eye(count, dtype=aval.dtype)))
    return (
        f"{code.text(base)} + np.reshape({code.text(matrix)} @ np.ravel({code.text(updates)}), "
        f"{aval.shape})"
    )
