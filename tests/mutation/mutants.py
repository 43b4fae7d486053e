"""Mutants: small changes to a source file, each of which should make a good test fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

# A comparison gains or loses equality, or is inverted.
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
LOOPS = {ast.Break: ast.Continue, ast.Continue: ast.Break}
# Texts for people, which no program computes with.
WORDS = (ast.JoinedStr, ast.Raise)
LONGEST = 100  # characters of the old text that are shown


@dataclass(frozen=True)
class Mutant:
    """One change: bytes ``start`` to ``end`` of the source, the text ``old``, become ``new``."""

    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def __str__(self) -> str:
        old = " ".join(self.old.split())
        return f"{old if len(old) <= LONGEST else old[:LONGEST] + '…'} → {self.new}"


def mutants(source: bytes) -> list[Mutant]:
    """Return all possible mutants of a file, in source order. Docstrings, annotations and messages are left out."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, replacement in _changes(tree):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        new = ast.unparse(ast.fix_missing_locations(replacement))
        if isinstance(node, ast.expr):
            new = f"({new})"  # binds as tightly as the old expression
        found.append(Mutant(node.lineno, start, end, source[start:end].decode(), new))
    return found


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    yield from _of_statement(node)
    yield from _of_expression(node)
    for child in _computing(node):
        yield from _changes(child)


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children that take part in a computation: no annotations, decorators, messages or `add_argument`."""
    if isinstance(node, WORDS) or (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def _of_statement(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield node, ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, ast.Pass()
        case ast.Break() | ast.Continue():
            yield node, LOOPS[type(node)]()
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield node, _with(node, op=ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)


def _of_expression(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    match node:
        case ast.Compare(ops=[op]):
            for other in COMPARISONS[type(op)]:
                yield node, _with(node, ops=[other()])
        case ast.BinOp(op=op) if type(op) in ARITHMETIC and not _joins_text(node):
            yield node, _with(node, op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield node, _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not()):
            yield node, node.operand
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name() | ast.Attribute() | ast.Call()):
            yield node, node.operand
        case ast.Constant(value=bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=float() as value):
            yield node, ast.Constant(2 * value if value else 1.0)
        case ast.Call(func=ast.Name(id=name)) if name in CALLS:
            yield node.func, ast.Name(CALLS[name])


def _joins_text(node: ast.BinOp) -> bool:
    """Whether an operator joins paths or texts: another operator there is a TypeError, which every test notices."""
    if isinstance(node.op, ast.BitOr | ast.BitAnd):
        return False
    return any(
        isinstance(part, ast.JoinedStr) or (isinstance(part, ast.Constant) and isinstance(part.value, str))
        for part in (node.left, node.right)
    )


def _with(node: ast.AST, **changes) -> ast.AST:
    changed = copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
