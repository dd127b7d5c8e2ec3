"""Small changes to a solution, one at a time: the slips that no author of an exercise thought of."""

import ast
import sys
from contextlib import contextmanager
from dataclasses import dataclass

from labkit.student_copies import BEGIN, END

FILENAME = "<mutant>"
MOST_LINES = 500_000

_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_COMMUTATIVE = (ast.Add, ast.Mult, ast.BitAnd, ast.BitOr)
_OPERATORS = {
    ast.Add: (ast.Sub, ast.Mult), ast.Sub: (ast.Add,), ast.Mult: (ast.Div, ast.Add), ast.Div: (ast.Mult,), ast.MatMult: (ast.Mult,),
    ast.FloorDiv: (ast.Div,), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    **{kind: tuple(other for other in _COMPARISONS if other is not kind) for kind in _COMPARISONS},
}  # fmt: skip
_PAIRS = [("mean", "sum"), ("softmax", "log_softmax"), ("zeros_like", "ones_like"), ("zeros", "ones"), ("max", "min"), ("argmax", "argmin"),
          ("amax", "amin"), ("cat", "stack"), ("exp", "log"), ("any", "all"), ("floor", "ceil"), ("ceil", "round"), ("sin", "cos"), ("triu", "tril")]
_OTHER_NAME = {**dict(_PAIRS), **{b: a for a, b in _PAIRS}}


@dataclass(frozen=True)
class Mutant:
    """what: the changed line before and after.   source: the whole cell with the change."""

    what: str
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of the solution regions of a cell that compiles and reads differently."""
    tree = ast.parse(source)
    lines = _solution_lines(source)
    found = {ast.unparse(tree): None}
    for holder, place, statement in _statements(tree):
        if statement.lineno not in lines:
            continue
        before = _first_line(statement)
        names, numbers = _names_before(tree, statement), _numbers(statement)
        for replacement in _changed_statements(statement):
            holder[place] = replacement
            found.setdefault(ast.unparse(tree), f"{before} -> {_first_line(replacement)}")
        holder[place] = statement
        for node, field, index, child in _slots(statement):
            for replacement in _changed(child, names, numbers, node, field):
                _put(node, field, index, replacement)
                found.setdefault(ast.unparse(tree), f"{before} -> {_first_line(statement)}")
            _put(node, field, index, child)
    return [Mutant(what, text) for text, what in found.items() if what and _compiles(text)]


@contextmanager
def at_most(lines: int = MOST_LINES):
    """Let mutants run so many lines and no more: a changed loop may never end."""
    left, before = lines, sys.gettrace()

    def count(frame, event, argument):
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise RecursionError(f"more than {lines} lines")
        return count

    sys.settrace(lambda frame, event, argument: count if frame.f_code.co_filename == FILENAME else None)
    try:
        yield
    finally:
        sys.settrace(before)


def _solution_lines(source):
    inside, found = False, set()
    for number, line in enumerate(source.split("\n"), start=1):
        if line.strip() in (BEGIN, END):
            inside = line.strip() == BEGIN
        elif inside:
            found.add(number)
    return found


def _compiles(text):
    try:
        compile(text, FILENAME, "exec")
        return True
    except (SyntaxError, ValueError):
        return False


def _first_line(statement):
    return ast.unparse(statement).split("\n")[0]


def _statements(tree):
    """(list that holds it, its place there, statement), of all statements."""
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list):
                yield from [(value, place, item) for place, item in enumerate(value) if isinstance(item, ast.stmt)]


def _slots(node):
    """(parent, field, index or None, expression) of all expressions of one statement, not of the statements inside it."""
    for field, value in ast.iter_fields(node):
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, (ast.expr, ast.keyword, ast.comprehension)) and not isinstance(child, ast.JoinedStr):
                if isinstance(child, ast.expr):
                    yield node, field, index, child
                if not _is_number(child):
                    yield from _slots(child)


def _put(node, field, index, value):
    if index is None:
        setattr(node, field, value)
    else:
        getattr(node, field)[index] = value


def _names_before(tree, statement):
    """Parameters and local names that a student could mistake for one another at this statement."""
    around = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.lineno <= statement.lineno <= f.end_lineno]
    names = [a.arg for f in around for a in f.args.args if a.arg != "self"]
    stored = [n for f in around for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    names += [n.id for n in sorted(stored, key=lambda n: n.lineno) if n.lineno < statement.lineno]
    return list(dict.fromkeys(names))


def _numbers(statement):
    return sorted({ast.literal_eval(child) for *_, child in _slots(statement) if _is_number(child)})


def _changed_statements(statement):
    yield ast.Pass()
    if isinstance(statement, ast.AugAssign):
        yield _with(statement, op=ast.Add() if not isinstance(statement.op, ast.Add) else ast.Sub())
        yield ast.Assign([statement.target], statement.value, lineno=0)
    elif isinstance(statement, (ast.If, ast.While)):
        yield _with(statement, test=ast.UnaryOp(ast.Not(), statement.test))
    elif isinstance(statement, (ast.Break, ast.Continue)):
        yield ast.Continue() if isinstance(statement, ast.Break) else ast.Break()


def _changed(node, names, numbers, parent, field):
    """Expressions that could stand in place of `node`, which is what `parent` has in its `field`."""
    yield from _of_its_kind(node, names, numbers, field)
    if field == "value" and isinstance(parent, (ast.Assign, ast.Return)) and not isinstance(node, ast.Tuple):
        yield ast.UnaryOp(ast.Invert() if isinstance(node, ast.Compare) else ast.USub(), node)
    if isinstance(parent, ast.Subscript) and field == "slice" and isinstance(node, ast.Name):
        yield ast.UnaryOp(ast.Invert(), node)


def _of_its_kind(node, names, numbers, field):
    if _is_number(node):
        value = ast.literal_eval(node)
        yield from (ast.Constant(other) for other in (value + 1, value - 1, -value, *numbers) if other != value)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or node.value in _OTHER_NAME:
            yield ast.Constant(not node.value if isinstance(node.value, bool) else _OTHER_NAME[node.value])
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id in names:
            yield from (ast.Name(other) for other in names if other != node.id)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield from (_with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]]) for other in _OPERATORS[type(op)])
    elif isinstance(node, ast.BinOp):
        yield from (_with(node, op=other()) for other in _OPERATORS.get(type(node.op), ()))
        yield from (node.left, node.right)
        if not isinstance(node.op, _COMMUTATIVE):
            yield _with(node, left=node.right, right=node.left)
    elif isinstance(node, ast.BoolOp):
        yield from (_with(node, op=other()) for other in _OPERATORS[type(node.op)])
        yield from node.values
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.Slice):
        yield from _changed_slices(node)
    elif isinstance(node, (ast.Tuple, ast.List)):
        yield from (_with(node, elts=elements) for elements in (*_swapped(node.elts), *_shortened(node.elts)))
    elif isinstance(node, ast.Call):
        yield from _changed_calls(node, names)
    elif isinstance(node, ast.Attribute):
        if node.attr in _OTHER_NAME:
            yield _with(node, attr=_OTHER_NAME[node.attr])
        if field != "func" and _root(node) in names:
            yield node.value
    elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        for i, part in enumerate(node.generators):
            if part.ifs:
                yield _with(node, generators=[*node.generators[:i], _with(part, ifs=[]), *node.generators[i + 1 :]])


def _changed_slices(node):
    for end, nothing in (("lower", 1), ("upper", -1)):
        value = getattr(node, end)
        if value is None:
            yield _with(node, **{end: ast.Constant(nothing)})
            continue
        yield _with(node, **{end: None})
        if not _is_number(value):
            yield from (_with(node, **{end: ast.BinOp(value, op(), ast.Constant(1))}) for op in (ast.Add, ast.Sub))


def _changed_calls(node, names):
    yield from (_with(node, args=arguments) for arguments in _swapped(node.args))
    yield from (_with(node, args=arguments) for arguments in _shortened(node.args))
    yield from (_with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :]) for i in range(len(node.keywords)))
    if node.args:
        yield node.args[0]
    if isinstance(node.func, ast.Attribute) and _root(node.func) in names:
        yield node.func.value


def _swapped(items):
    return [[*items[:i], items[i + 1], items[i], *items[i + 2 :]] for i in range(len(items) - 1)]


def _shortened(items):
    return [items[:i] + items[i + 1 :] for i in range(len(items))] if len(items) > 1 else []


def _is_number(node):
    """A number, with or without a minus."""
    inner = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    return isinstance(inner, ast.Constant) and type(inner.value) in (int, float)


def _root(node):
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _with(node, **changes):
    return type(node)(**{field: getattr(node, field, None) for field in node._fields} | changes)
