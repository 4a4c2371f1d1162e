"""The kernels' Python as LLVM IR, statement by statement, in the module of the task that runs it.

Kernels are integer code, in which no type has to be inferred. Numba would infer types nevertheless. It would also make
each of their 125 functions a library of its own, optimise it there, and optimise it again in every caller: 14 seconds
for a first training step, which takes 4 without. Here a kernel is one module, which Numba optimises, compiles and keeps
in its cache.

What a kernel says means what it means in Python:

* Numbers are integers of 64 bits, and wrap. True is 1, and False is 0.
* A parameter `a` is the struct of arguments, and ``a.name`` one of its fields. Every other name is a number: a constant
  of the module or of an enclosing function, or a variable, which has to be assigned on every way to where it is read.
* There are ``+ - * // % & | >>``, comparisons, `not`, `and`, `or`, conditional expressions, `min` and `max`. What a
  division by zero gives is not defined.
* There are assignments, also of several numbers, `if`, `while`, `for` over a `range`, `break`, `continue`, `return` and
  calls: of functions like this one, and of those in `intrinsics`. The step of a `range` is positive, or a constant.

Anything else raises NotImplementedError, which names the function, the line and the statement.
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import intrinsics
from fastlstm.backends.numba.llvm.simd import I1, I32, I64
from fastlstm.backends.numba.llvm.sources import functions_of, source_of

_ADDING = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and_", ast.BitOr: "or_", ast.RShift: "ashr"}
_ORDERS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_COMPARISONS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_EXTREMES = {"min": "<", "max": ">"}
Numbers = list[ir.Value]


Fields = Mapping[str, ir.Constant]  # of a struct: where each lies as an int32, or its value as an int64


def fields_of(names: Sequence[str], known: Mapping[str, int | str] = MappingProxyType({})) -> Fields:
    """The fields of a struct, of which some have values that are known, or those of other fields."""
    places = {name: I32(k) for k, name in enumerate(names)}
    return places | {name: places[of] if isinstance(of, str) else I64(of) for name, of in known.items()}


def emitted(module: ir.Module, function: Any, fields: Fields, known: dict[Any, ir.Function]) -> ir.Function:
    """The LLVM function that does what a Python function does: one of those that are `known`, or else emitted into a
    module. It takes the struct, whose fields these are, by its address, and returns a struct of what Python returns.
    """
    if function not in known:
        node = functions_of(function.__module__)[function.__code__.co_firstlineno]
        returned = next((each.value for each in ast.walk(node) if isinstance(each, ast.Return)), None)
        count = len(returned.elts) if isinstance(returned, ast.Tuple) else int(returned is not None)
        kinds = [I64.as_pointer() if parameter.arg == "a" else I64 for parameter in node.args.args]
        name = module.get_unique_name(f"{function.__module__}.{function.__qualname__}")
        known[function] = new = ir.Function(module, ir.FunctionType(ir.LiteralStructType([I64] * count), kinds), name)
        new.linkage = "internal"
        if getattr(function, "inlined", False):
            new.attributes.add("alwaysinline")
        _Body(new, function, node, fields, known)
    return known[function]


def run(b: ir.IRBuilder, function: Any, fields: Fields, address: ir.Value, *numbers: ir.Value) -> ir.Value:
    """Emit the call of a function of the struct at an address, and of these numbers."""
    return b.call(emitted(b.module, function, fields, {}), [b.inttoptr(address, I64.as_pointer()), *numbers])


def _need(condition: bool) -> None:
    if not condition:
        raise ValueError


class _Body:
    """Emits one function. A method `on_` emits a statement. A method `of_` emits an expression and returns its numbers,
    which are several for a tuple and for a call that returns several.
    """

    def __init__(self, new: ir.Function, function: Any, node: ast.FunctionDef, fields: Fields, known: Any) -> None:
        self.new, self.function, self.code, self.fields, self.known = new, function, function.__code__, fields, known
        cells = zip(self.code.co_freevars, function.__closure__ or ())
        self.constants = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
        self.entry = ir.IRBuilder(new.append_basic_block())
        self.b = ir.IRBuilder(new.append_basic_block())
        self.places: dict[str, ir.Value] = {}  # of variables in memory, which LLVM turns into registers
        self.assigned: set[str] = set()  # the variables that have a number here, whichever way was taken
        self.structs: dict[str, ir.Value] = {}
        self.loops: list[tuple[ir.Block, ir.Block]] = []  # where `continue` and `break` lead
        for parameter, value in zip(node.args.args, new.args):
            if parameter.arg == "a":
                self.structs["a"] = value
            else:
                self.assign(parameter.arg, value)
        self.block(node.body[ast.get_docstring(node) is not None :])
        self.statement(node.body[-1], lambda _: self.on_Return(ast.Return()))
        self.entry.branch(new.blocks[1])

    def statement(self, node: Any, emit: Callable[[Any], Any]) -> None:
        """Emit a statement, if a way leads to it. If anything in it has no method, no number or another type than it
        needs, raise the error that names it.
        """
        if self.b.block.is_terminated:
            return
        try:
            emit(node)
        except NotImplementedError:  # names a statement within this one, or in a function that it calls
            raise
        except Exception as error:
            place = f"{self.code.co_filename}:{node.lineno}: {self.code.co_name}"
            line = source_of(self.function.__module__).decode().splitlines()[node.lineno - 1].strip()
            raise NotImplementedError(f"{place} cannot be compiled, because of {line!r}") from error

    def block(self, statements: list[ast.stmt]) -> None:
        for node in statements:
            self.statement(node, lambda node: getattr(self, f"on_{type(node).__name__}")(node))

    def on_Pass(self, node: ast.Pass) -> None:
        pass

    def on_Expr(self, node: ast.Expr) -> None:
        self.of_Call(node.value)

    def assign(self, name: str, number: ir.Value) -> None:
        if name not in self.places:
            self.places[name] = self.entry.alloca(I64)
        self.b.store(number, self.places[name])
        self.assigned.add(name)

    def on_Assign(self, node: ast.Assign) -> None:
        [target] = node.targets
        parts: Any = target.elts if isinstance(target, ast.Tuple) else [target]
        for part, number in zip(parts, self.numbers(node.value), strict=True):
            self.assign(part.id, number)

    def on_AugAssign(self, node: ast.AugAssign) -> None:
        self.on_Assign(ast.Assign([node.target], ast.BinOp(node.target, node.op, node.value)))

    def on_Return(self, node: ast.Return) -> None:
        result = ir.Constant(self.new.ftype.return_type, ir.Undefined)
        numbers = self.numbers(node.value) if node.value else []
        for k, number in zip(range(len(result.type)), numbers, strict=True):
            result = self.b.insert_value(result, number, k)
        self.b.ret(result)

    def on_If(self, node: ast.If) -> None:
        self.either(self.number(node.test), partial(self.block, node.body), partial(self.block, node.orelse))

    def either(self, number: ir.Value, *ways: Callable[[], Numbers | None]) -> Numbers:
        """Go the first way if a number is true, or else the second. Return the numbers that this leads to."""
        if isinstance(number, ir.Constant):
            return ways[0 if number.constant else 1]() or []
        blocks, after = [self.b.append_basic_block() for _ in ways], self.b.append_basic_block()
        self.b.cbranch(self.bit(number), *blocks)
        assigned, ends = self.assigned, []
        for block, way in zip(blocks, ways):
            self.b.position_at_end(block)
            self.assigned = {*assigned}
            numbers = way() or []
            if not self.b.block.is_terminated:
                self.b.branch(after)
                ends.append((numbers, self.b.block, self.assigned))
        self.b.position_at_end(after)
        if not ends:
            self.b.unreachable()
            return []
        self.assigned = set.intersection(*(names for _, _, names in ends))
        results = [self.b.phi(I64) for _ in ends[0][0]]
        for numbers, block, _ in ends:
            for result, each in zip(results, numbers, strict=True):
                result.add_incoming(each, block)
        return results

    def on_While(self, node: ast.While) -> None:
        self.loop(node, lambda: self.number(node.test))

    def on_For(self, node: Any) -> None:
        _need(node.iter.func.id == "range")
        numbers = [self.number(argument) for argument in node.iter.args]
        start, stop, step = {1: [I64(0), *numbers, I64(1)], 2: [*numbers, I64(1)], 3: numbers}[len(numbers)]
        known = [number.constant for number in (start, stop, step) if isinstance(number, ir.Constant)]
        if len(known) == 3 and len(range(*known)) == 1:
            self.once(node, start)
            return
        down = isinstance(step, ir.Constant) and not range(0, 1, step.constant)  # a step of 0 is an error
        counter = self.entry.alloca(I64)
        self.b.store(start, counter)
        self.loop(
            node,
            lambda: self.compared(">" if down else "<", self.b.load(counter), stop),
            lambda: self.assign(node.target.id, self.b.load(counter)),
            lambda: self.b.store(self.b.add(self.b.load(counter), step), counter),
        )

    def once(self, node: Any, number: ir.Value) -> None:
        """Emit the body of a loop that has one turn, and this number in it."""
        _need(not node.orelse)
        done = self.b.append_basic_block()
        self.assign(node.target.id, number)
        assigned = {*self.assigned}
        self.loops.append((done, done))
        self.block(node.body)
        self.loops.pop()
        if not self.b.block.is_terminated:
            self.b.branch(done)
        self.b.position_at_end(done)
        self.assigned = assigned

    def loop(self, node: Any, test: Any, begin: Any = lambda: None, end: Any = lambda: None) -> None:
        """Emit `begin`, the body of a loop and `end`, for as long as the number of `test` is true."""
        _need(not node.orelse)
        again, body, next_, done = (self.b.append_basic_block() for _ in range(4))
        assigned = {*self.assigned}
        self.b.branch(again)
        self.b.position_at_end(again)
        self.b.cbranch(self.bit(test()), body, done)
        self.b.position_at_end(body)
        begin()
        self.loops.append((next_, done))
        self.block(node.body)
        self.loops.pop()
        if not self.b.block.is_terminated:
            self.b.branch(next_)
        self.b.position_at_end(next_)
        end()
        self.b.branch(again)
        self.b.position_at_end(done)
        self.assigned = assigned  # the body may not have run

    def on_Continue(self, node: ast.Continue) -> None:
        self.b.branch(self.loops[-1][0])

    def on_Break(self, node: ast.Break) -> None:
        self.b.branch(self.loops[-1][1])

    def numbers(self, node: Any) -> Numbers:
        return getattr(self, f"of_{type(node).__name__}")(node)

    def number(self, node: Any) -> ir.Value:
        [number] = self.numbers(node)
        return number

    def bit(self, number: ir.Value) -> ir.Value:
        """Whether a number is true."""
        if isinstance(number, ir.CastInstr) and number.operands[0].type == I1:  # a comparison
            return number.operands[0]
        return self.b.icmp_signed("!=", number, I64(0))

    def compared(self, order: str, x: ir.Value, y: ir.Value) -> ir.Value:
        if isinstance(x, ir.Constant) and isinstance(y, ir.Constant):
            return I64(int(_COMPARISONS[order](x.constant, y.constant)))
        return self.b.zext(self.b.icmp_signed(order, x, y), I64)

    def of_Constant(self, node: Any) -> Numbers:
        _need(isinstance(node.value, int) and -(1 << 63) <= node.value < 1 << 63)
        return [I64(int(node.value))]

    def of_Name(self, node: ast.Name) -> Numbers:
        if node.id not in self.code.co_varnames:
            return self.of_Constant(ast.Constant(self.constants[node.id]))
        _need(node.id in self.assigned)
        return [self.b.load(self.places[node.id])]

    def of_Attribute(self, node: Any) -> Numbers:
        place = self.fields[node.attr]
        if place.type == I64:
            return [place]
        field = self.b.load(self.b.gep(self.structs[node.value.id], [place]))
        field.set_metadata("invariant.load", self.b.module.add_metadata([]))  # no kernel changes its arguments
        return [field]

    def of_Tuple(self, node: ast.Tuple) -> Numbers:
        return [self.number(part) for part in node.elts]

    def of_UnaryOp(self, node: ast.UnaryOp) -> Numbers:
        number = self.number(node.operand)
        if isinstance(node.op, ast.Not):
            return self.either(number, lambda: [I64(0)], lambda: [I64(1)])
        _need(isinstance(node.op, ast.USub))
        return [I64(-number.constant) if isinstance(number, ir.Constant) else self.b.neg(number)]

    def of_BinOp(self, node: ast.BinOp) -> Numbers:
        x, y = self.number(node.left), self.number(node.right)
        if isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            return [self.divided(x, y)[isinstance(node.op, ast.Mod)]]
        return [getattr(self.b, _ADDING[type(node.op)])(x, y)]

    def divided(self, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The quotient, rounded down, and the rest. LLVM drops the one that is not used."""
        b = self.b
        if isinstance(y, ir.Constant) and y.constant > 0 and y.constant & (y.constant - 1) == 0:
            return b.ashr(x, I64(y.constant.bit_length() - 1)), b.and_(x, I64(y.constant - 1))
        y = b.select(b.icmp_signed("==", y, I64(0)), I64(1), y)  # a division by 0 would end the process
        quotient, rest = b.sdiv(x, y), b.srem(x, y)  # rounded to zero
        above = b.and_(b.icmp_signed("!=", rest, I64(0)), b.icmp_signed("<", b.xor(rest, y), I64(0)))
        return b.sub(quotient, b.zext(above, I64)), b.add(rest, b.select(above, y, I64(0)))

    def of_Compare(self, node: ast.Compare, left: ir.Value | None = None) -> Numbers:
        left, right = left or self.number(node.left), self.number(node.comparators[0])
        result = self.compared(_ORDERS[type(node.ops[0])], left, right)
        if len(node.ops) == 1:
            return [result]
        others = ast.Compare(node.left, node.ops[1:], node.comparators[1:])
        return self.either(result, partial(self.of_Compare, others, right), lambda: [I64(0)])

    def of_BoolOp(self, node: ast.BoolOp) -> Numbers:
        number = self.number(node.values[0])
        for other in node.values[1:]:
            ways = [partial(self.numbers, other), partial(list, [number])]
            [number] = self.either(number, *(ways if isinstance(node.op, ast.And) else reversed(ways)))
        return [number]

    def of_IfExp(self, node: ast.IfExp) -> Numbers:
        return self.either(self.number(node.test), partial(self.numbers, node.body), partial(self.numbers, node.orelse))

    def of_Call(self, node: Any) -> Numbers:
        _need(not node.keywords)
        if node.func.id in _EXTREMES:
            order, (number, *others) = _EXTREMES[node.func.id], map(self.number, node.args)
            for other in others:
                number = self.b.select(self.b.icmp_signed(order, other, number), other, number)
            return [number]
        function = self.constants[node.func.id]
        if function.__module__ == intrinsics.__name__:
            result = function(self.b, *map(self.number, node.args))
            return [] if result is None else [result]
        callee = emitted(self.b.module, function, self.fields, self.known)
        arguments = [self.structs.get(getattr(part, "id", "")) or self.number(part) for part in node.args]
        _need(len(arguments) == len(callee.args))
        results = self.b.call(callee, arguments)
        return [self.b.extract_value(results, k) for k in range(len(results.type))]
