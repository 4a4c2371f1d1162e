"""From the kernels' Python to LLVM: functions of 64-bit integers, in the module of the task that runs them.

Numba would infer the types of each function, and optimise and emit it once for itself and once more in every caller.
There is nothing to infer here: a value is an int64, a truth value one of 0 and 1, a tuple what it consists of, and
`a.name` a number of the struct of arguments. Functions may have `if`, `for .. in range`, `while`, assignments and
calls of each other, of `min` and `max`, and of what is `emitted`. Division rounds down, as in Python.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import I1, I64

_COMPARE: dict[type, str] = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_BINARY: dict[type, tuple[Callable[[int, int], int], str]] = {
    ast.Add: (int.__add__, "add"),
    ast.Sub: (int.__sub__, "sub"),
    ast.Mult: (int.__mul__, "mul"),
    ast.BitAnd: (int.__and__, "and_"),
    ast.BitOr: (int.__or__, "or_"),
    ast.RShift: (int.__rshift__, "ashr"),
}


inspect.getsource(sys.modules[__name__])  # raises here, and not in a call, where sources are not installed


class Struct:
    """The arguments of a kernel: an address, and where each number lies."""

    def __init__(self, pointer: ir.Value, fields: Fields) -> None:
        self.pointer, self.fields = pointer, fields


@cache
def _functions_of(module: ModuleType) -> dict[int, ast.FunctionDef]:
    """Of a module's source, by the line of `def` or of the first decorator."""
    found = [node for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.FunctionDef)]
    return {min([node.lineno, *(line.lineno for line in node.decorator_list)]): node for node in found}


def _shape(value: Any) -> Any:
    """Of a tuple those of its parts, of a struct its fields' names, else None."""
    if isinstance(value, tuple):
        return (*map(_shape, value),)
    return value.fields if isinstance(value, Struct) else None


def _leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, tuple) else [value]


def _formed(shape: Any, leaves: Any) -> Any:
    """What has this shape, of the next leaves."""
    if isinstance(shape, tuple):
        return (*(_formed(part, leaves) for part in shape),)
    return next(leaves) if shape is None else Struct(next(leaves), shape)


def function_of(module: ir.Module, prefix: str, function: FunctionType, shapes: tuple[Any, ...]) -> tuple[Any, int]:
    """The LLVM function for arguments of these shapes, emitted when first asked for, and how many numbers it returns.

    `prefix`: of names, since other functions may have the same.
    """
    node = _functions_of(inspect.getmodule(function))[function.__code__.co_firstlineno]
    returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
    count = 0 if not returned else len(returned[0].elts) if isinstance(returned[0], ast.Tuple) else 1
    tuples = "".join(f".{len(_leaves(shape))}" for shape in shapes if isinstance(shape, tuple))
    name = f"{prefix}.{function.__module__}.{function.__qualname__}{tuples}"
    found = module.globals.get(name)
    if found is None:
        result = ir.VoidType() if count == 0 else I64 if count == 1 else ir.LiteralStructType([I64] * count)
        kinds = [I64 if leaf is None else I64.as_pointer() for leaf in map(_kind, shapes) for leaf in leaf]
        found = ir.Function(module, ir.FunctionType(result, kinds), name)
        found.linkage = "internal"
        found.attributes.add("nounwind")
        if function.inlined:  # type: ignore[attr-defined]
            found.attributes.add("alwaysinline")
        _Body(found, partial(function_of, module, prefix), function, shapes).emit(node)
    return found, count


def _kind(shape: Any) -> list[Any]:
    """None for each number, and a struct's fields."""
    return [leaf for part in shape for leaf in _kind(part)] if isinstance(shape, tuple) else [shape]


class Fields(list[str]):
    """Names of the fields of a struct: not a tuple, which has a shape of its own.

    Attributes:
        known: what fields are that the kernel is compiled for: a number, or the name of a field of the same value. What
            they decide is decided then, and costs nothing when the kernel runs.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, names: Iterable[str], known: Mapping[str, int | str] | None = None) -> None:
        super().__init__(names)
        self.known = known or {}


class _Body:
    """Emits one function."""

    def __init__(self, emitted: ir.Function, find: Any, function: FunctionType, shapes: tuple[Any, ...]) -> None:
        closure = zip(function.__code__.co_freevars, function.__closure__ or ())
        self.names = vars(builtins) | function.__globals__ | {name: cell.cell_contents for name, cell in closure}
        self.emitted, self.find, self.function, self.shapes = emitted, find, function, shapes
        self.entry = ir.IRBuilder(emitted.append_basic_block("entry"))  # of the variables
        self.b = ir.IRBuilder(emitted.append_basic_block("body"))
        self.variables: dict[str, Any] = {}
        self.loops: list[tuple[Any, Any]] = []  # where `continue` and `break` go

    def emit(self, node: ast.FunctionDef) -> None:
        leaves = iter(self.emitted.args)
        for argument, shape in zip(node.args.args, self.shapes, strict=True):
            self.assign(argument.arg, _formed(shape, leaves))
        self.block(node.body)
        if not self.b.block.is_terminated:
            if isinstance(self.emitted.ftype.return_type, ir.VoidType):
                self.b.ret_void()
            else:
                self.b.unreachable()
        self.entry.branch(self.emitted.blocks[1])

    # Values: a Python int is known, a vector of one bit is a truth value

    def number(self, value: Any) -> ir.Value:
        if isinstance(value, int):
            return I64(int(value))
        return self.b.zext(value, I64) if value.type == I1 else value

    def truth(self, value: Any) -> Any:
        """A Python bool if it is known, else one bit."""
        if isinstance(value, int):
            return bool(value)
        return value if value.type == I1 else self.b.icmp_signed("!=", value, I64(0))

    def assign(self, name: str, value: Any) -> None:
        """To a variable: one place for each number, which LLVM turns into registers."""
        if isinstance(value, Struct):
            self.variables[name] = value
            return
        places = self.variables.get(name)
        if _shape(places) != _shape(value) or places is None:
            made = [self.entry.alloca(I64) for _ in _leaves(value)]
            places = self.variables[name] = _formed(_shape(value), iter(made))
        for place, leaf in zip(_leaves(places), _leaves(value)):
            self.b.store(self.number(leaf), place)

    def bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            for part, one in zip(target.elts, value, strict=True):
                self.bind(part, one)
        else:
            assert isinstance(target, ast.Name)
            self.assign(target.id, value)

    def method(self, kind: str, node: Any) -> Any:
        """What emits a statement or an expression."""
        found = getattr(self, f"{kind}_{type(node).__name__}", None)
        if found is None or (getattr(node, "orelse", None) and isinstance(node, (ast.For, ast.While))):
            raise self.cannot(node)
        return found

    def cannot(self, node: Any) -> NotImplementedError:
        code = self.function.__code__
        place, name = f"{code.co_filename}:{code.co_firstlineno}", code.co_name
        return NotImplementedError(f"{place}: {name} cannot be compiled, it has {ast.unparse(node)!r}")

    # Statements

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if self.b.block.is_terminated:
                return
            self.method("on", statement)(statement)

    def on_Pass(self, node: ast.Pass) -> None:
        pass

    def on_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.value(node.value)

    def on_Assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        self.bind(target, self.value(node.value))

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        assert isinstance(node.target, ast.Name)
        old = ast.Name(node.target.id, ast.Load())
        self.assign(node.target.id, self.binary(node.op, self.value(old), self.value(node.value)))

    def on_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self.b.ret_void()
            return
        numbers = [self.number(leaf) for leaf in _leaves(self.value(node.value))]
        if len(numbers) == 1:
            self.b.ret(numbers[0])
        else:
            found = ir.Constant(self.emitted.ftype.return_type, ir.Undefined)
            for k, number in enumerate(numbers):
                found = self.b.insert_value(found, number, k)
            self.b.ret(found)

    def make(self, name: str) -> Any:
        return self.emitted.append_basic_block(name)

    def on_If(self, node: ast.If) -> None:
        test = self.truth(self.value(node.test))
        if isinstance(test, bool):
            self.block(node.body if test else node.orelse)
            return
        then, after = self.make("then"), self.make("endif")
        other = self.make("else") if node.orelse else after
        self.b.cbranch(test, then, other)
        reached = not node.orelse
        for start, body in ((then, node.body), (other, node.orelse)):
            if start is after:
                continue
            self.b.position_at_end(start)
            self.block(body)
            if not self.b.block.is_terminated:
                self.b.branch(after)
                reached = True
        self.b.position_at_end(after)
        if not reached:
            self.b.unreachable()

    def on_While(self, node: ast.While) -> None:
        test, body, after = self.make("while"), self.make("do"), self.make("done")
        self.b.branch(test)
        self.b.position_at_end(test)
        goes_on = self.truth(self.value(node.test))
        if goes_on is True:
            self.b.branch(body)
        else:
            self.b.cbranch(goes_on, body, after)
        self.loop(node.body, body, test, after)

    def loop(self, statements: list[ast.stmt], body: Any, again: Any, after: Any) -> None:
        self.loops.append((again, after))
        self.b.position_at_end(body)
        self.block(statements)
        if not self.b.block.is_terminated:
            self.b.branch(again)
        self.loops.pop()
        self.b.position_at_end(after)

    def on_For(self, node: ast.For) -> None:
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            self.loops.append((None, None))
            for part in self.value(call):  # a tuple: once for each part
                self.bind(node.target, part)
                self.block(node.body)
            self.loops.pop()
            return
        given = [self.value(argument) for argument in call.args]
        start, stop, step = (0, *given, 1) if len(given) == 1 else (*given, 1) if len(given) == 2 else given
        down = isinstance(step, int) and step < 0  # any other step is positive
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int) and step:
            turns = range(start, stop, step)
            if len(turns) < 2:  # no loop
                for turn in turns:
                    self.bind(node.target, turn)
                    body, after = self.make("once"), self.make("done")
                    self.b.branch(body)
                    self.loop(node.body, body, after, after)
                return
        start, stop, by = map(self.number, (start, stop, step))
        test, body, again, after = (self.make(name) for name in ("for", "do", "next", "done"))
        counter = self.entry.alloca(I64)
        self.b.store(start, counter)
        self.b.branch(test)
        self.b.position_at_end(test)
        k = self.b.load(counter)
        self.b.cbranch(self.b.icmp_signed(">" if down else "<", k, stop), body, after)
        self.b.position_at_end(again)
        self.b.store(self.b.add(self.b.load(counter), by), counter)
        self.b.branch(test)
        self.b.position_at_end(body)
        self.bind(node.target, self.b.load(counter))
        self.loop(node.body, body, again, after)

    def on_Break(self, node: ast.Break) -> None:
        self.leave(node, 1)

    def on_Continue(self, node: ast.Continue) -> None:
        self.leave(node, 0)

    def leave(self, node: ast.stmt, place: int) -> None:
        block = self.loops[-1][place]
        if block is None:  # of a tuple
            raise self.cannot(node)
        self.b.branch(block)

    # Expressions

    def value(self, node: ast.expr) -> Any:
        return self.method("of", node)(node)

    def of_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def of_Tuple(self, node: ast.Tuple) -> Any:
        return (*map(self.value, node.elts),)

    def of_Name(self, node: ast.Name) -> Any:
        found = self.variables.get(node.id)
        if found is None:
            return self.names[node.id]
        if isinstance(found, Struct):
            return found
        return _formed(_shape(found), map(self.b.load, _leaves(found)))

    def of_Attribute(self, node: ast.Attribute) -> Any:
        struct = self.value(node.value)
        field = struct.fields.known.get(node.attr, node.attr)
        if isinstance(field, int):
            return field
        found = self.b.load(self.b.gep(struct.pointer, [I64(struct.fields.index(field))]))
        found.set_metadata("invariant.load", self.b.module.add_metadata([]))  # no kernel changes its arguments
        return found

    def of_BinOp(self, node: ast.BinOp) -> Any:
        return self.binary(node.op, self.value(node.left), self.value(node.right))

    def binary(self, op: ast.operator, x: Any, y: Any) -> Any:
        if isinstance(op, (ast.FloorDiv, ast.Mod)):
            return self.divided(x, y, isinstance(op, ast.Mod))
        known, name = _BINARY[type(op)]
        if isinstance(x, int) and isinstance(y, int):
            return known(int(x), int(y))
        if not isinstance(x, int) and not isinstance(y, int) and x.type == y.type == I1:
            assert name in ("and_", "or_")
            return getattr(self.b, name)(x, y)
        return getattr(self.b, name)(self.number(x), self.number(y))

    def divided(self, x: Any, y: Any, rest: bool) -> Any:
        """Rounded down; by zero it is zero."""
        b = self.b
        if isinstance(x, int) and isinstance(y, int):
            return x % y if rest else x // y
        if isinstance(y, int) and y > 0 and y & (y - 1) == 0:
            x = self.number(x)
            return b.and_(x, I64(y - 1)) if rest else b.ashr(x, I64(y.bit_length() - 1))
        known = isinstance(y, int) and y != 0
        x, y = self.number(x), self.number(y)
        by = y if known else b.select(b.icmp_signed("==", y, I64(0)), I64(1), y)
        quotient, left = b.sdiv(x, by), b.srem(x, by)
        lower = b.and_(b.icmp_signed("!=", left, I64(0)), b.icmp_signed("<", b.xor(left, by), I64(0)))
        if rest:
            return b.add(left, b.select(lower, by, I64(0)))
        return b.sub(quotient, b.zext(lower, I64))

    def of_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        if isinstance(node.op, ast.Not):
            value = self.truth(value)
            return not value if isinstance(value, bool) else self.b.not_(value)
        assert isinstance(node.op, ast.USub)
        return -value if isinstance(value, int) else self.b.neg(self.number(value))

    def of_Compare(self, node: ast.Compare) -> Any:
        found, left = None, self.value(node.left)
        for op, right in zip(node.ops, map(self.value, node.comparators)):
            if isinstance(left, int) and isinstance(right, int):
                one = {"==": left == right, "!=": left != right, "<": left < right, "<=": left <= right,
                       ">": left > right, ">=": left >= right}[_COMPARE[type(op)]]  # fmt: skip
            else:
                one = self.b.icmp_signed(_COMPARE[type(op)], self.number(left), self.number(right))
            found = one if found is None else self.b.and_(found, one)
            left = right
        return found

    def of_BoolOp(self, node: ast.BoolOp) -> Any:
        """A truth value, of which later parts are looked at where they decide."""
        decided, after, incoming = isinstance(node.op, ast.Or), None, []
        for k, part in enumerate(node.values):
            test = self.truth(self.value(part))
            if isinstance(test, bool):
                if test is not decided and k + 1 < len(node.values):
                    continue
                if after is None:
                    return test
                test = I1(test)
                last = True
            else:
                last = k + 1 == len(node.values)
            if last and after is None:
                return test
            after = after or self.make("decided")
            if last:
                incoming.append((test, self.b.block))
                self.b.branch(after)
                break
            more = self.make("more")
            incoming.append((I1(decided), self.b.block))
            self.b.cbranch(test, *((after, more) if decided else (more, after)))
            self.b.position_at_end(more)
        self.b.position_at_end(after)
        phi = self.b.phi(I1)
        for value, block in incoming:
            phi.add_incoming(value, block)
        return phi

    def of_IfExp(self, node: ast.IfExp) -> Any:
        test = self.truth(self.value(node.test))
        if isinstance(test, bool):
            return self.value(node.body if test else node.orelse)
        then, other, after = self.make("then"), self.make("else"), self.make("either")
        self.b.cbranch(test, then, other)
        found = []
        for start, part in ((then, node.body), (other, node.orelse)):
            self.b.position_at_end(start)
            value = self.value(part)
            found.append((_shape(value), [self.number(leaf) for leaf in _leaves(value)], self.b.block))
            self.b.branch(after)
        self.b.position_at_end(after)
        phis = []
        for pair in zip(found[0][1], found[1][1], strict=True):
            phis.append(self.b.phi(I64))
            for value, (_, _, block) in zip(pair, found):
                phis[-1].add_incoming(value, block)
        return _formed(found[0][0], iter(phis))

    def of_Call(self, node: ast.Call) -> Any:
        function, arguments = self.value(node.func), [self.value(argument) for argument in node.args]
        if function is min or function is max:
            return self.extreme("<" if function is min else ">", arguments)
        if hasattr(function, "emits"):
            return function.emits(self.b, *map(self.number, arguments))
        callee, count = self.find(function, (*map(_shape, arguments),))
        leaves = [leaf for argument in arguments for leaf in _leaves(argument)]
        found = self.b.call(callee, [x.pointer if isinstance(x, Struct) else self.number(x) for x in leaves])
        return found if count < 2 else (*(self.b.extract_value(found, k) for k in range(count)),)

    def extreme(self, order: str, values: list[Any]) -> Any:
        if all(isinstance(value, int) for value in values):
            return (min if order == "<" else max)(values)
        found, *others = map(self.number, values)
        for other in others:
            found = self.b.select(self.b.icmp_signed(order, other, found), other, found)
        return found


def emit(b: ir.IRBuilder, prefix: str, function: Any, fields: Fields, address: ir.Value, *numbers: ir.Value) -> None:
    """Call a function of a struct at an address and of numbers, emitted into the module that is being built."""
    shapes = (fields, *(None for _ in numbers))
    callee, _ = function_of(b.module, prefix, function, shapes)
    b.call(callee, [b.bitcast(address, I64.as_pointer()), *numbers])
