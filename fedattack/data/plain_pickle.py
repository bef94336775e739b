"""Pickles of plain data, read without unpickling: numbers, text, lists, dicts with text keys, arrays of integers.

A pickle is a program, and Python's own machine for it builds what the program says: a key of tuples of tuples that no
hash function gets to the end of, or lists so deep that freeing them ends the interpreter. This machine knows the few
instructions that a batch of data is written with. Whatever else a file asks for, it is refused.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

_MOST_VALUES = 1_000_000
_DEEPEST = 8
_WIDEST = 32  # of a tuple that is used twice
_ARRAY_TYPES = {"u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8"}
_BYTE_ORDERS: dict[object, str] = {order: order for order in "|<>"} | {b"|": "|", b"<": "<", b">": ">"}
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}


class Refused(ValueError):
    """A pickle that is no plain data; the message says why."""


class _Named:
    """One of :data:`_GLOBALS`, which a file may name and call in one way only."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what


class _Dtype:
    """A type of integers; its byte order may be said once."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code


class _Array:
    """An array that is to be filled by its state."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: np.ndarray | None = None


_MARK = object()


def read_plain(data: bytes) -> Any:
    """What a pickle of plain data holds: mostly a dict, whose arrays are read-only; strings of Python 2 are bytes.

    Raises Refused, or an error of damaged data (struct.error, ValueError, IndexError, KeyError, TypeError).
    """
    found = _Machine(data).run()
    if isinstance(found, dict):
        return {key: value.values if isinstance(value, _Array) else value for key, value in found.items()}
    return found


class _Machine:
    """Containers are put into one another once and never taken out again, so that none can hold itself."""

    def __init__(self, data: bytes) -> None:
        self._raw, self._data, self._place, self._values = data, memoryview(data), 0, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._depths: dict[int, int] = {}  # of the containers on the stack, by identity

    def run(self) -> Any:
        while True:
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                if len(self._stack) != 1:
                    raise Refused(f"it ends with {len(self._stack)} values")
                return self._pop()
            act = _ACTIONS.get(code)
            if act is None:
                raise Refused(f"it uses the instruction {bytes([code])!r}, which plain data does not need")
            act(self)

    # ------------------------------------------------------------- reading

    def _take(self, count: int) -> memoryview:
        if count < 0 or self._place + count > len(self._data):
            raise Refused("it is truncated")
        self._place += count
        return self._data[self._place - count : self._place]

    def _number(self, form: str) -> int:
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(value)

    def _line(self) -> bytes:
        end = self._raw.find(b"\n", self._place)
        if end < 0:
            raise Refused("it is truncated")
        return bytes(self._take(end + 1 - self._place)[:-1])

    # --------------------------------------------------------------- stack

    def push(self, value: Any, depth: int = 0) -> None:
        self._values += 1
        if self._values > _MOST_VALUES:
            raise Refused(f"it holds more than {_MOST_VALUES:,} values")
        if isinstance(value, list | dict | tuple):
            self._depths[id(value)] = depth
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise Refused("its marks are out of place")
        return value

    def _to_mark(self) -> list[Any]:
        taken = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def _within(self, *inner: Any) -> int:
        """The depth of a container of these, which are inside it from now on."""
        depth = 1 + max((self._depths.pop(id(value), 0) for value in inner), default=0)
        if depth > _DEEPEST:
            raise Refused(f"its lists lie more than {_DEEPEST} deep")
        return depth

    # --------------------------------------------------------- instructions

    def mark(self) -> None:
        self._stack.append(_MARK)
        if len(self._stack) > _MOST_VALUES:
            raise Refused("its marks are out of place")

    def integer(self, form: str) -> None:
        self.push(self._number(form))

    def real(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def line_real(self) -> None:
        self.push(float(self._line()[:64]))

    def line_number(self) -> None:
        text = self._line().removesuffix(b"L")
        if text in (b"00", b"01"):
            self.push(text == b"01")
        else:
            if len(text) > 40:
                raise Refused(f"it holds a number of {len(text):,} digits")
            self.push(int(text))

    def long(self, form: str) -> None:
        length = self._number(form)
        if length > 16:
            raise Refused(f"it holds a number of {length:,} bytes")
        self.push(int.from_bytes(self._take(length), "little", signed=True))

    def line_text(self) -> None:
        text = self._line()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            raise Refused("it holds text without quotes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an escape that is none stands for itself
            self.push(text[1:-1].decode("unicode_escape").encode("latin-1"))

    def line_unicode(self) -> None:
        self.push(self._line().decode("raw_unicode_escape"))

    def bytes(self, form: str) -> None:
        self.push(bytes(self._take(self._number(form))))

    def text(self, form: str) -> None:
        self.push(bytes(self._take(self._number(form))).decode("utf-8"))

    def constant(self, value: object) -> None:
        self.push(value)

    def empty(self, kind: type) -> None:
        self.push(kind())

    def group(self, count: int | None) -> None:
        inner = self._to_mark() if count is None else [self._pop() for _ in range(count)][::-1]
        depth = self._within(*inner)
        self.push(tuple(inner), depth)

    def collection(self, kind: type) -> None:
        inner = self._to_mark()
        self.push(kind())
        self._fill(inner, kind)

    def append(self) -> None:
        self._fill([self._pop()], list)

    def appends(self) -> None:
        self._fill(self._to_mark(), list)

    def item(self) -> None:
        value = self._pop()
        self._fill([self._pop(), value], dict)

    def items(self) -> None:
        self._fill(self._to_mark(), dict)

    def _fill(self, inner: list[Any], kind: type) -> None:
        if type(self._stack[-1]) is not kind:
            raise Refused(f"it puts values into a {type(self._stack[-1]).__name__}")
        target: Any = self._stack[-1]
        self._depths[id(target)] = max(self._depths[id(target)], self._within(*inner))
        if kind is list:
            target.extend(inner)
            return
        if len(inner) % 2:
            raise Refused("it has a key without a value")
        for key, value in zip(inner[::2], inner[1::2], strict=True):
            if type(key) not in (str, bytes):
                raise Refused(f"it has a {type(key).__name__} for a key; text is accepted")
            target[key] = value

    def put(self, form: str | None) -> None:
        key = int(self._line()[:20]) if form is None else self._number(form)
        if not 0 <= key <= len(self._data):
            raise Refused(f"it uses a memo position of {key}")
        self._memo[key] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, form: str | None) -> None:
        value = self._memo[int(self._line()[:20]) if form is None else self._number(form)]
        parts = value if isinstance(value, tuple) else (value,)
        if len(parts) > _WIDEST or any(isinstance(one, list | dict | tuple | _Array) for one in parts):
            raise Refused("it holds one list in two places")
        self.push(value)

    def line_global(self) -> None:
        module = self._line()
        self._global(module.decode("utf-8"), self._line().decode("utf-8"))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it names something by what is no text")
        self._global(module, name)

    def _global(self, module: str, name: str) -> None:
        what = _GLOBALS.get((module, name))
        if what is None:
            raise Refused(f"it names {module}.{name}, which is not data"[:200])
        self.push(_Named(what))

    def reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if type(arguments) is not tuple or type(called) is not _Named:
            raise Refused("it calls what is no array")
        self._depths.pop(id(arguments), None)
        self.push(self._called(called.what, arguments))

    @staticmethod
    def _called(what: str, arguments: tuple[Any, ...]) -> Any:
        match what, arguments:
            case "array", (_Named(what="ndarray"), (0,), _):
                return _Array()
            case "dtype", (str() | bytes() as code, *_) if len(arguments) <= 3:
                text = code.decode("latin-1") if isinstance(code, bytes) else code
                if text not in _ARRAY_TYPES:
                    raise Refused(f"it holds an array of type {text[:40]!r}")
                return _Dtype(text)
            case "encode", (str() as text, "latin1" | b"latin1"):
                return text.encode("latin-1")
        raise Refused(f"it makes a {what} in an unexpected form")

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        self._depths.pop(id(state), None)
        match target, state:
            case _Array(), (1, tuple() as shape, _Dtype(code=code), False | 0, bytes() as raw):
                sides = [side for side in shape if type(side) is int and side >= 0]
                if len(sides) != len(shape) or target.values is not None:
                    raise Refused("it holds an array in an unexpected form")
                target.values = np.frombuffer(raw, code).reshape(sides)
            case _Dtype(), (3, str() | bytes() as order, None, None, None, -1, -1, 0) if (
                order in _BYTE_ORDERS
            ):
                if len(target.code) != 2:
                    raise Refused("it holds an array type in an unexpected form")
                target.code = _BYTE_ORDERS[order] + target.code
            case _:
                raise Refused("it holds an array in an unexpected form")
        self._stack.append(target)

    def skip(self, count: int) -> None:
        self._take(count)


def _with(name: str, *arguments: Any) -> Callable[[_Machine], None]:
    return lambda machine: getattr(machine, name)(*arguments)


# By the byte of the instruction; see the standard library's pickletools for what each does.
_INSTRUCTIONS: dict[str, Any] = {
    "\x80": ("skip", 1),
    "\x95": ("skip", 8),
    "(": "mark",
    "I": "line_number",
    "L": "line_number",
    "J": ("integer", "<i"),
    "K": ("integer", "<B"),
    "M": ("integer", "<H"),
    "\x8a": ("long", "<B"),
    "\x8b": ("long", "<i"),
    "S": "line_text",
    "V": "line_unicode",
    "U": ("bytes", "<B"),
    "T": ("bytes", "<i"),
    "C": ("bytes", "<B"),
    "B": ("bytes", "<I"),
    "\x8e": ("bytes", "<Q"),
    "\x8c": ("text", "<B"),
    "X": ("text", "<I"),
    "\x8d": ("text", "<Q"),
    "F": "line_real",
    "G": "real",
    "N": ("constant", None),
    "\x88": ("constant", True),
    "\x89": ("constant", False),
    "]": ("empty", list),
    "}": ("empty", dict),
    ")": ("group", 0),
    "\x85": ("group", 1),
    "\x86": ("group", 2),
    "\x87": ("group", 3),
    "t": ("group", None),
    "l": ("collection", list),
    "d": ("collection", dict),
    "a": "append",
    "e": "appends",
    "s": "item",
    "u": "items",
    "p": ("put", None),
    "q": ("put", "<B"),
    "r": ("put", "<I"),
    "\x94": "memoize",
    "g": ("get", None),
    "h": ("get", "<B"),
    "j": ("get", "<I"),
    "c": "line_global",
    "\x93": "stack_global",
    "R": "reduce",
    "b": "build",
}
_ACTIONS = {
    ord(code): _with(*([action] if isinstance(action, str) else action))
    for code, action in _INSTRUCTIONS.items()
}
