"""Waits for a condition, and says what was there instead when it does not come."""

import ast
import inspect
import linecache
import time


def eventually(holds, seconds=30):
    """The first true value of `holds()`."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds} s: {told(holds, found)}"
        time.sleep(0.05)
    return found


def told(holds, found):
    """The condition as it is written, its last value, and what its comparisons compare, looked at once more."""
    try:
        written = _body(holds.__code__)
        tree = ast.parse(f"({written})", mode="eval")
    except (AttributeError, OSError, SyntaxError, TypeError):
        return f"{holds!r} gave {found!r}"
    names = {**holds.__globals__, **inspect.getclosurevars(holds).nonlocals}
    compared = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    sides = dict.fromkeys(ast.unparse(side) for side in compared if not isinstance(side, ast.Constant))
    shown = [f"{side} is {_value(side, names)}" for side in sides]
    return "; ".join([f"{written} gave {found!r}", *shown])


def _body(code):
    """The text of a lambda's body."""
    places = [place for place in code.co_positions() if None not in place and place[2:] != (0, 0)]
    first = min((line, start) for line, _, start, _ in places)
    last = max((end, stop) for _, end, _, stop in places)
    lines = [linecache.getline(code.co_filename, number).encode() for number in range(first[0], last[0] + 1)]
    lines[-1] = lines[-1][: last[1]]
    lines[0] = lines[0][first[1] :]
    return " ".join(b"".join(lines).decode().split())


def _value(text, names):
    try:
        return repr(eval(text, names))[:2000]  # the test's own words
    except Exception as error:
        return repr(error)
