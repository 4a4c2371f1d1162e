"""The kernels' Python as LLVM IR, statement by statement, in the module of the task that runs it.

Kernels are integer code, in which no type has to be inferred. Numba would infer them, and optimise each function alone
and again in every caller: 14 seconds for a first training step, which takes 4 as one module.

The kernels' Python means what it means in Python:

* Numbers are integers of 64 bits, and wrap. True is 1, and False is 0.
* A parameter `a` is the struct of arguments, and ``a.name`` one of its fields. Every other name is a number: a constant
  of the module or of an enclosing function, or a variable, which has to be assigned on every way to where it is read.
* There are ``+ - * // % & | >>``, comparisons, `not`, `and`, `or`, conditional expressions, `min` and `max`. What a
  division by zero gives is not defined.
* There are assignments, also of several numbers, `if`, `while`, `for` over a `range`, `break`, `continue`, `return` and
  calls: of functions like this one, whose arguments may have names, and of those in `intrinsics`. The step of a `range`
  is positive, or a constant.

Anything else raises NotImplementedError, which names the function, the line and the statement.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.expressions import Expressions, Fields, need
from fastlstm.backends.numba.llvm.simd import I32, I64
from fastlstm.backends.numba.llvm.sources import functions_of, source_of


def fields_of(names: Sequence[str], known: Mapping[str, int | str] = MappingProxyType({})) -> Fields:
    """Return the fields of a struct. Those in `known` have a known value, or that of another field."""
    numbers = {name: I32(k) for k, name in enumerate(names)}
    return numbers | {name: numbers[of] if isinstance(of, str) else I64(of) for name, of in known.items()}


def emitted(module: ir.Module, function: Any, fields: Fields, known: dict[Any, ir.Function]) -> ir.Function:
    """Return the LLVM function of a Python function, known or emitted: (struct's address) -> struct of results."""
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
    """Emit the call of a function with the struct at an address, and with these numbers."""
    return b.call(emitted(b.module, function, fields, {}), [b.inttoptr(address, I64.as_pointer()), *numbers])


class _Body(Expressions):
    """Emits one function. A method `on_` emits a kind of statement."""

    def __init__(self, new: ir.Function, function: Any, node: ast.FunctionDef, fields: Fields, known: Any) -> None:
        self.new, self.function, self.code, self.fields, self.known = new, function, function.__code__, fields, known
        cells = zip(self.code.co_freevars, function.__closure__ or ())
        self.constants = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
        self.entry = ir.IRBuilder(new.append_basic_block())
        self.b = ir.IRBuilder(new.append_basic_block())
        self.variables: dict[str, ir.Value] = {}  # of variables in memory, which LLVM turns into registers
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
        """Emit a statement, unless no way leads to it. An error names it, if anything in it cannot be emitted."""
        if self.b.block.is_terminated:
            return
        try:
            emit(node)
        except NotImplementedError:  # names a statement within this one, or in a function that it calls
            raise
        except Exception as error:
            where = f"{self.code.co_filename}:{node.lineno}: {self.code.co_name}"
            line = source_of(self.function.__module__).decode().splitlines()[node.lineno - 1].strip()
            raise NotImplementedError(f"{where} cannot be compiled, because of {line!r}") from error

    def block(self, statements: list[ast.stmt]) -> None:
        for node in statements:
            self.statement(node, lambda node: getattr(self, f"on_{type(node).__name__}")(node))

    def on_Pass(self, node: ast.Pass) -> None:
        pass

    def on_Expr(self, node: ast.Expr) -> None:
        self.of_Call(node.value)

    def assign(self, name: str, number: ir.Value) -> None:
        if name not in self.variables:
            self.variables[name] = self.entry.alloca(I64)
        self.b.store(number, self.variables[name])
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

    def on_While(self, node: ast.While) -> None:
        self.loop(node, lambda: self.number(node.test))

    def on_For(self, node: Any) -> None:
        need(node.iter.func.id == "range")
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
        """Emit the body of a loop that runs once, with this number."""
        need(not node.orelse)
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
        need(not node.orelse)
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

    def called(self, function: Any) -> ir.Function:
        return emitted(self.b.module, function, self.fields, self.known)
