"""Small changes of a program, each of which some test should notice."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_PAIRS = (
    *(("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all")),
    *(("sum", "mean"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("floor", "ceil")),
)
_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS}


Path = tuple[tuple[str, int | None], ...]
"""From the module down: the field, and the place in it where it is a list."""

_SYMMETRIC = {"min", "max", "zip", "isinstance", "getattr", "setattr", "torch.maximum"}
_SYMMETRIC |= {"torch.minimum", "torch.logaddexp"}
"""Functions whose arguments are not exchanged: nothing or everything would change."""


@dataclass(frozen=True)
class Mutant:
    """One place that may be changed.

    Attributes:
        line: Where it is.
        scope: Class and function around it.
        change: What is changed into what.
        path: The node.
        index: Which of the changes of this node.
    """

    line: int
    scope: str
    change: str
    path: Path
    index: int


def mutants(source: str) -> list[Mutant]:
    """Every change of a program that this module knows.

    Messages of errors, annotations and docstrings are left alone.

    Example:
        >>> [mutant.change for mutant in mutants("def f(x):\\n    return x + 2")]
        ['x + 2 -> x - 2', '2 -> 3']
    """
    found = []
    for path, scope, node in _places(ast.parse(source), (), ""):
        for index, (before, after) in enumerate(_changes(node)):
            change = " ".join(f"{_shown(before)} -> {_shown(after)}".split())
            found.append(Mutant(getattr(node, "lineno", 0), scope, change, path, index))
    return found


def mutated(source: str, mutant: Mutant) -> str:
    """The changed program.

    Example:
        >>> source = "x + 2"
        >>> mutated(source, mutants(source)[0])
        'x - 2'
    """
    tree = ast.parse(source)
    changes = [*_changes(_at(tree, mutant.path))]
    _put(tree, mutant.path, changes[mutant.index][1])
    return ast.unparse(ast.fix_missing_locations(tree))


def _places(node: ast.AST, path: Path, scope: str) -> Iterator[tuple[Path, str, ast.AST]]:
    """All nodes that run."""
    yield path, scope, node
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        scope = f"{scope}.{node.name}".strip(".")
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "type_params", "bases"}:
            continue
        listed = value if isinstance(value, list) else [value]
        for index, child in enumerate(listed):
            if isinstance(child, ast.AST) and not _is_silent(child):
                step = (field, index if isinstance(value, list) else None)
                yield from _places(child, (*path, step), scope)


def _is_silent(node: ast.AST) -> bool:
    """Is it no part of what the program computes?"""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return True  # of zip: a check, like an assertion
    imports = (ast.Import, ast.ImportFrom, ast.Raise, ast.Assert, ast.JoinedStr)
    return isinstance(node, imports) or (
        isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id in {"__all__"} for t in node.targets)
    )


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """What a node is, and may become."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.BinOp | ast.AugAssign) and type(new.op) in _OPERATORS:
        new.op = _OPERATORS[type(new.op)]()
        yield node, new
    elif isinstance(new, ast.Compare) and len(new.ops) == 1:
        new.ops = [_COMPARISONS[type(new.ops[0])]()]
        yield node, new
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        yield node, new
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub | ast.Invert):
        # The last dimension is the second of most tensors; -1 becomes -2 as a constant.
        if ast.unparse(new) != "-1":
            yield node, new.operand
    elif isinstance(new, ast.Constant):
        yield from ((node, ast.Constant(value)) for value in _other_constants(new.value))
    elif isinstance(new, ast.IfExp):
        new.body, new.orelse = new.orelse, new.body
        yield node, new
    elif isinstance(new, ast.If) and not isinstance(new.test, ast.Compare | ast.UnaryOp):
        new.test = ast.UnaryOp(ast.Not(), new.test)
        yield node, new
    elif isinstance(new, ast.Attribute) and new.attr in _NAMES:
        new.attr = _NAMES[new.attr]
        yield node, new
    elif isinstance(new, ast.Call):
        yield from _other_calls(node, new)
    yield from _without(node)


def _other_constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value + 1.0]
    return []


def _other_calls(node: ast.AST, new: ast.Call) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Its first two arguments exchanged, or another function of the same kind."""
    if isinstance(new.func, ast.Name) and new.func.id in _NAMES:
        other = copy.deepcopy(new)
        other.func = ast.Name(_NAMES[new.func.id], ast.Load())
        yield node, other
    starred = any(isinstance(given, ast.Starred) for given in new.args[:2])
    if ast.unparse(new.func) in _SYMMETRIC or starred or len(new.args) < 2:
        return
    if ast.dump(new.args[0]) != ast.dump(new.args[1]):
        new.args[:2] = [new.args[1], new.args[0]]
        yield node, new


def _without(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Nothing, instead of a statement that the program can do without and still run."""
    stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if stored or called or isinstance(node, ast.AugAssign):
        yield node, ast.Pass()


def _shown(node: ast.AST) -> str:
    """Its text; of a branch only the condition."""
    return f"if {ast.unparse(node.test)}" if isinstance(node, ast.If) else ast.unparse(node)


def _at(tree: ast.AST, path: Path) -> ast.AST:
    for field, index in path:
        value = getattr(tree, field)
        tree = value if index is None else value[index]
    return tree


def _put(tree: ast.AST, path: Path, new: ast.AST) -> None:
    field, index = path[-1]
    parent = _at(tree, path[:-1])
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new
