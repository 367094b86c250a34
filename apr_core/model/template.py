"""
Render a chat template that nobody trusts: sandboxed, with a budget for work, for output and for time.

A chat template is a program that came with a file from the internet. Jinja's immutable sandbox keeps it away from
Python's internals; it does not keep it from looping for ever, from ``'x' * 10**10`` or from a list that holds itself
twice forty times over. So every call, filter, operator, concatenation, output and loop turn is charged here before and
after it runs, and the first one that the budget cannot pay stops the rendering.

Source: ``transformers.utils.chat_template_utils`` for what a template may expect to find (``trim_blocks``,
``lstrip_blocks``, loop controls, the ``generation`` block, ``tojson``, ``strftime_now``, ``raise_exception``).
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from apr_core.errors import InferenceError, LoadError

MAX_TEMPLATE_CHARS = 100 * 1024
MAX_RANGE = 10_000
MAX_OUTPUT_CHARS = 1 << 24
MAX_SECONDS = 5.0
_FUEL = 1 << 24  # characters and list items that may come to be, over the whole rendering
_FUEL_PER_INPUT = 64  # more of the same for each character of the messages
_FUEL_PER_TURN = 16  # the price of one step that makes nothing
_PER_ITEM = 32
_MAX_ARGUMENT = 100_000  # of an integer handed to a call or a filter (widths, counts)
_MAX_INTEGER_BITS = 4096

# Filters that no chat template needs and whose cost is not linear in what they are given, or that are not repeatable.
_REMOVED_FILTERS = ("pprint", "random", "striptags", "sum", "urlize", "wordwrap", "xmlattr")
_KEEPERS = frozenset({"Namespace", "d", "default", "dict"})  # they store a number and compute nothing with it
# These can return the product of what they are given; everything else returns about the sum.
_PRODUCTS = frozenset({"expandtabs", "indent", "tojson", "translate"})


class _SpentError(SecurityError):
    """A limit was reached."""


class _RefusedError(TemplateError):
    """The template itself called ``raise_exception``."""


def render(template: str, variables: Mapping[str, object]) -> str:
    """
    Render ``template`` with ``variables`` (plain strings, numbers, lists and dictionaries).

    Raises:
        LoadError: The template is too long, does not parse, leaves the sandbox, or exceeds a limit: it is unusable.
        InferenceError: The template refuses these messages (``raise_exception``) or cannot work with them, for
            instance because a message lacks its content; the message quotes the template's own words.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise _unusable(f"it has {len(template)} characters, allowed are {MAX_TEMPLATE_CHARS}")
    environment = _Budgeted(_FUEL + _FUEL_PER_INPUT * _weigh(variables, limit=MAX_OUTPUT_CHARS))
    try:
        return environment.render(template, variables)
    except _RefusedError as error:
        raise InferenceError(f"the chat template refuses these messages: {error}", advice="change them") from error
    except TemplateSyntaxError as error:
        raise _unusable(f"line {error.lineno}: {error.message}") from error
    except (SecurityError, RecursionError, MemoryError, OverflowError) as error:
        raise _unusable(str(error) or type(error).__name__) from error
    except Exception as error:  # a template is a program: it can raise whatever Python can
        raise InferenceError(
            f"the chat template cannot render these messages: {type(error).__name__}: {error}",
            advice="check that every message has the role and the content that this template expects",
        ) from error


class _Budgeted(ImmutableSandboxedEnvironment):
    """A sandbox that pays for every step from one budget. One per rendering."""

    # Without this set the optimiser computes `10 ** 10 ** 10` while compiling, before any limit can act.
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, fuel: int) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[LoopControlExtension, _Generation],
        )
        self._fuel = fuel
        self._deadline = time.monotonic() + MAX_SECONDS
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters["tojson"] = _tojson
        self.filters = {name: self._paid(name, function) for name, function in self.filters.items()}
        self.globals.pop("lipsum", None)
        self.globals |= {"range": _range, "raise_exception": _refuse, "strftime_now": _strftime_now}

    def render(self, template: str, variables: Mapping[str, object]) -> str:
        """Compile and run, counting the output piece by piece."""
        program = self.template_class.from_code(self, _compiled(template), self.make_globals(None))
        pieces, size = [], 0
        for piece in program.generate(**variables):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise _SpentError(f"its output exceeds {MAX_OUTPUT_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def pay(self, amount: int = 0) -> None:
        """Charge one step and ``amount``."""
        self._fuel -= _FUEL_PER_TURN + amount
        if self._fuel < 0:
            raise _SpentError("it does more work than any conversation needs (an endless loop, or text that grows)")
        if time.monotonic() > self._deadline:
            raise _SpentError(f"it runs for more than {MAX_SECONDS:g} seconds")

    def weigh(self, value: object) -> int:
        """Return the size of ``value``, stopping the rendering when that alone is more than the budget holds."""
        weight = _weigh(value, limit=max(self._fuel, 0))
        if weight > self._fuel:
            self.pay(weight)
        return weight

    def joined(self, *values: object) -> str:
        """Do what ``~`` does."""
        self.pay(self.weigh(values))
        return "".join(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (frees `self`)
        """Call a function or a method, paying for the arguments' growth before and for the result after."""
        if __obj == __self.pay or __obj == __self.joined:
            return __obj(*args)
        name = getattr(__obj, "__name__", "")
        receiver = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        __self._before(name, [receiver, *args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        __self.pay(__self.weigh(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right`` when the result is of a size that the budget can pay."""
        self.pay(_growth_of_operator(operator, left, right))
        result = super().call_binop(context, operator, left, right)
        self.pay(self.weigh(result))
        return result

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter; jinja's marks about the arguments it passes travel along in ``__dict__``."""

        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self._before(name, [a for a in (*args, *kwargs.values()) if not isinstance(a, Context | Environment)])
            result = function(*args, **kwargs)
            self.pay(self.weigh(result))
            return result

        return paid

    def _before(self, name: str, values: Sequence[object]) -> None:
        """Refuse a call whose result would be too large to look at."""
        weight = self.weigh(values)
        growth = 0
        first, rest = (values[0], values[1:]) if values else (None, [])
        for value in rest:
            if isinstance(value, int) and abs(value) > _MAX_ARGUMENT and name not in _KEEPERS:
                raise _SpentError(f"it hands a number above {_MAX_ARGUMENT} to {name or 'a call'}")
        sizes = [abs(v) if isinstance(v, int) else self.weigh(v) for v in rest]
        if name in _PRODUCTS:
            growth = self.weigh(first) * max(sizes, default=1)
        elif name == "replace" and len(rest) > 1 and isinstance(first, str) and isinstance(rest[0], str):
            growth = first.count(rest[0]) * sizes[1]
        elif name == "join":
            growth = weight * (1 + min(self.weigh(first), max(sizes, default=0)))
        elif name in ("format", "format_map") and isinstance(first, str):
            growth = _growth_of_format(first, max(sizes, default=0))
        self.pay(growth)


@lru_cache(maxsize=16)
def _compiled(template: str) -> CodeType:
    """Compile once: that takes 50 times what running takes, and holds nothing of the budget."""
    environment = _Budgeted(_FUEL)
    return environment.compile(_Instrument().visit(environment.parse(template)))


class _Instrument(NodeTransformer):
    """Put a charge into every loop turn, and make ``~`` a call that can be charged."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja names it)
        turn = nodes.Call(nodes.EnvironmentAttribute("pay"), [], [], None, None)
        node.body = [nodes.ExprStmt(turn), *node.body]
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (jinja names it)
        parts = [self.visit(part) for part in node.nodes]
        return nodes.Call(nodes.EnvironmentAttribute("joined"), parts, [], None, None, lineno=node.lineno)


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@pass_context
def _finalize(context: Context, value: object) -> object:
    """Charge what is about to be printed; taking the context keeps jinja from printing constants while compiling."""
    environment = context.environment
    assert isinstance(environment, _Budgeted)
    environment.pay(environment.weigh(value))
    return value


def _weigh(value: object, limit: int) -> int:
    """
    Measure nested plain values in characters, shared ones as often as they occur; stop above ``limit``.

    An item of a list or a mapping counts as ``_PER_ITEM``: what is costly about a million items is to look at them.
    """
    weight, stack = 0, [value]
    while stack and weight <= limit:
        item = stack.pop()
        if isinstance(item, str | bytes | range):
            weight += len(item)
        elif isinstance(item, int):
            weight += item.bit_length() // 8
        elif isinstance(item, Mapping):
            weight += _PER_ITEM * len(item)
            stack += (*item.keys(), *item.values())
        elif isinstance(item, Namespace):
            stack.append(object.__getattribute__(item, "_Namespace__attrs"))
        elif isinstance(item, list | tuple | set | frozenset):
            weight += _PER_ITEM * len(item)
            stack += item
    return weight


def _growth_of_operator(operator: str, left: object, right: object) -> int:
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
                return max(count, 0) * _weigh(sequence, limit=MAX_OUTPUT_CHARS)
    if operator == "%" and isinstance(left, str):
        return _growth_of_format(left, abs(right) if isinstance(right, int) else _weigh(right, limit=MAX_OUTPUT_CHARS))
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_INTEGER_BITS:
            raise _SpentError(f"it computes an integer of more than {_MAX_INTEGER_BITS} bits")
    return 0


def _growth_of_format(text: str, largest: int) -> int:
    """Bound what formatting can return: fields times the longest argument or the widest width, whichever is larger."""
    if "*" in text and "%" in text:
        raise _SpentError("it formats with a width that is computed")
    widths = [int(digits[:18]) for digits in re.findall(r"\d+", text)]
    return (text.count("{") + text.count("%")) * (largest + max(widths, default=0))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without escaping HTML, as transformers' own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise _SpentError(f"it loops over more than {MAX_RANGE} numbers")
    return numbers


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _unusable(why: str) -> LoadError:
    return LoadError(f"the model's chat template is unusable: {why}", advice="use raw text (text=...) or another copy")
