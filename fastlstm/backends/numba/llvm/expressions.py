"""The expressions of the kernels' Python as LLVM IR. See `emit` for what they may say."""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import intrinsics
from fastlstm.backends.numba.llvm.simd import I1, I64

_ADDING = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.BitAnd: "and_", ast.BitOr: "or_", ast.RShift: "ashr"}
_ORDERS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_COMPARISONS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_EXTREMES = {"min": "<", "max": ">"}
Numbers = list[ir.Value]
Fields = Mapping[str, ir.Constant]  # of a struct: the number of each field as an int32, or its value as an int64


def need(condition: bool) -> None:
    """Raise an error, which names the statement, unless a condition holds."""
    if not condition:
        raise ValueError


class Expressions:
    """Emits the expressions of one function. A method `of_` emits a kind of expression and returns its numbers."""

    b: ir.IRBuilder  # builds the LLVM function
    code: Any  # of the Python function
    fields: Fields  # of the struct of arguments
    constants: dict[str, Any]  # of the function's module, and of the functions around it
    variables: dict[str, ir.Value]  # the memory of each variable, which LLVM turns into a register
    assigned: set[str]  # the variables that have a number here, whichever way was taken
    structs: dict[str, ir.Value]  # the address of each struct by the name of its parameter

    def called(self, function: Any) -> ir.Function:
        """Return the LLVM function of a Python function that is called."""
        raise NotImplementedError

    def either(self, number: ir.Value, *ways: Callable[[], Numbers | None]) -> Numbers:
        """Emit both ways of a branch: the first is taken if `number` is true. Return the numbers that result."""
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

    def numbers(self, node: Any) -> Numbers:
        return getattr(self, f"of_{type(node).__name__}")(node)

    def number(self, node: Any) -> ir.Value:
        [number] = self.numbers(node)
        return number

    def bit(self, number: ir.Value) -> ir.Value:
        """Return whether a number is true, as one bit."""
        if isinstance(number, ir.CastInstr) and number.operands[0].type == I1:  # a comparison
            return number.operands[0]
        return self.b.icmp_signed("!=", number, I64(0))

    def compared(self, order: str, x: ir.Value, y: ir.Value) -> ir.Value:
        if isinstance(x, ir.Constant) and isinstance(y, ir.Constant):
            return I64(int(_COMPARISONS[order](x.constant, y.constant)))
        return self.b.zext(self.b.icmp_signed(order, x, y), I64)

    def of_Constant(self, node: Any) -> Numbers:
        need(isinstance(node.value, int) and -(1 << 63) <= node.value < 1 << 63)
        return [I64(int(node.value))]

    def of_Name(self, node: ast.Name) -> Numbers:
        if node.id not in self.code.co_varnames:
            return self.of_Constant(ast.Constant(self.constants[node.id]))
        need(node.id in self.assigned)
        return [self.b.load(self.variables[node.id])]

    def of_Attribute(self, node: Any) -> Numbers:
        field = self.fields[node.attr]
        if field.type == I64:
            return [field]
        number = self.b.load(self.b.gep(self.structs[node.value.id], [field]))
        number.set_metadata("invariant.load", self.b.module.add_metadata([]))  # no kernel changes its arguments
        return [number]

    def of_Tuple(self, node: ast.Tuple) -> Numbers:
        return [self.number(part) for part in node.elts]

    def of_UnaryOp(self, node: ast.UnaryOp) -> Numbers:
        number = self.number(node.operand)
        if isinstance(node.op, ast.Not):
            return self.either(number, lambda: [I64(0)], lambda: [I64(1)])
        need(isinstance(node.op, ast.USub))
        return [I64(-number.constant) if isinstance(number, ir.Constant) else self.b.neg(number)]

    def of_BinOp(self, node: ast.BinOp) -> Numbers:
        x, y = self.number(node.left), self.number(node.right)
        if isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            return [self.divided(x, y)[isinstance(node.op, ast.Mod)]]
        return [getattr(self.b, _ADDING[type(node.op)])(x, y)]

    def divided(self, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the quotient, rounded down, and the rest. LLVM drops the one that is not used."""
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
        if node.func.id in _EXTREMES:
            need(not node.keywords)
            order, (number, *others) = _EXTREMES[node.func.id], map(self.number, node.args)
            for other in others:
                number = self.b.select(self.b.icmp_signed(order, other, number), other, number)
            return [number]
        function = self.constants[node.func.id]
        if function.__module__ == intrinsics.__name__:
            need(not node.keywords)
            result = function(self.b, *map(self.number, node.args))
            return [] if result is None else [result]
        code = function.__code__
        names = [*code.co_varnames[: len(node.args)], *(keyword.arg for keyword in node.keywords)]
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        arguments = {
            name: self.structs.get(getattr(part, "id", "")) or self.number(part)
            for name, part in zip(names, parts, strict=True)
        }
        need(sorted(names) == sorted(code.co_varnames[: code.co_argcount]))
        results = self.b.call(self.called(function), [arguments[name] for name in code.co_varnames[: len(names)]])
        return [self.b.extract_value(results, k) for k in range(len(results.type))]
