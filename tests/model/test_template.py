"""Chat templates: what a good one finds, and that a bad one is stopped."""

from __future__ import annotations

import time

import pytest

from apr_core.errors import InferenceError, LoadError
from apr_core.model import template as module
from apr_core.model.template import render

MESSAGES = {"messages": [{"role": "user", "content": "Hi <b>&</b>"}]}


@pytest.mark.parametrize(
    ("source", "rendering"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfor %}", "Hi <b>&</b>\n"),
        ("{% for m in messages %}\r\n  {{- m.role }}\r\n{% endfor %}\r\n", "user\n"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <b>&</b>"}]'),
        ("{{ {'é': 1} | tojson(ensure_ascii=True) }}", '{"\\u00e9": 1}'),
        ("{{ {'a': [1]} | tojson(indent=1) }}", '{\n "a": [\n  1\n ]\n}'),
        ("{% for i in range(9) %}"
         "{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{% set ns = namespace(n=0) %}{% for i in range(4) %}"
         "{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n ~ '!' }}", "6!"),
        ("{{ 'a' ~ 1 ~ none ~ [2] }}", "a1None[2]"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ ' x ' | trim }}"
         "{{ '%s:%d' % ('k', 3) }}{{ '{}={}'.format('k', 4) }}", "a+bxk:3k=4"),
        ("{{ 'abc'.replace('b', 'BB') | upper | indent(2) | replace('B', 'c') }}"
         "{{ 'x' * 3 }}{{ 2 ** 10 }}", "AccCxxx1024"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ nothing }}{{ dict(t=1700000000).t }}", "<1>1700000000"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1True"),
        ("{{ messages | map(attribute='role') | list | length }}{{ messages[::-1][0]['role'] }}", "1user"),
    ],
)  # fmt: skip
def test_renders_what_templates_are_made_of(source: str, rendering: str) -> None:
    """The helpers, blocks and white-space rules of transformers; HTML is not escaped; Windows line ends are legal."""
    assert render(source, MESSAGES) == rendering


def test_the_date_helper_is_there() -> None:
    """Some vendors write the date into the system prompt."""
    assert render("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")


def test_a_refusal_speaks_in_the_templates_own_words() -> None:
    """raise_exception is about the messages, not about the file."""
    with pytest.raises(InferenceError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", MESSAGES)


@pytest.mark.parametrize(
    "source", ["{{ 'x' + messages[0].nothing }}", "{{ 1 + 'x' }}", "{{ messages[0].content / 2 }}"]
)
def test_messages_that_do_not_fit_are_an_inference_error(source: str) -> None:
    """For instance a message without its content."""
    with pytest.raises(InferenceError, match="cannot render these messages"):
        render(source, MESSAGES)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''['__cla' + 'ss__'].x }}", "unsafe"),
        ("{{ (messages | attr('__class__')).x }}", "unsafe"),
        ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
        ("x" * (module.MAX_TEMPLATE_CHARS + 1), "characters"),
    ],
)
def test_a_template_that_is_broken_or_leaves_the_sandbox(source: str, words: str) -> None:
    """Exit 6: the companion is unusable, whatever the messages are."""
    with pytest.raises(LoadError, match=words):
        render(source, MESSAGES)


def test_a_template_cannot_read_files() -> None:
    """There is no loader behind include, import and extends."""
    with pytest.raises(InferenceError, match="no loader"):
        render("{% include '/etc/passwd' %}", MESSAGES)


DOUBLING = "{% set ns = namespace(x='x' * 9) %}{% for i in range(64) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
NEST = "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
EXPLOSIONS = {
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loops without calls": "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "shared list as text": NEST + "{{ ns.x | string | length }}",
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "output": "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "constant": "{{ 'x' * 10 ** 10 }}",
    "list": "{{ ([1] * 10 ** 9) | length }}",
    "power": "{{ 10 ** 99999 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "plus": DOUBLING.replace("OP", "+"),
    "tilde": DOUBLING.replace("OP", "~"),
    "shared list printed": NEST + "{{ ns.x }}",
    "shared list as json": NEST + "{{ ns.x | tojson }}",
    "namespace printed": NEST + "{{ ns ~ '' }}",
    "deep list": NEST.replace("64", "9999").replace("[ns.x, ns.x]", "[ns.x]") + "{{ ns.x | tojson }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "indent": "{{ ('\\n' * 9999) | indent(9999) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(9999) }}",
    "replace method": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "replace filter": "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
    "join": "{{ ('x' * 9999).join(['y'] * 9999) }}",
    "join filter": "{{ (['y'] * 9999) | join('x' * 9999) }}",
    "lazy map": "{{ range(9999) | map('string') | map('center', 9999) | join }}",
    "percent width": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format width": "{{ '{:9999999999}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format repeated": "{{ ('{0}' * 9999).format('x' * 9999) }}",
    "translate": "{{ ('x' * 9999).translate({120: 'y' * 9999}) }}",
    "round": "{{ 1 | round(-10 ** 9) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_a_template_that_explodes_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is stopped by the budget in less work than the time limit allows, before it takes memory."""
    allowed = module.MAX_SECONDS
    monkeypatch.setattr(module, "MAX_SECONDS", 60.0)  # the clock must not stop it first on a busy machine
    began = time.process_time()
    with pytest.raises(LoadError, match="chat template is unusable"):
        render(EXPLOSIONS[name], MESSAGES)
    assert time.process_time() - began < allowed


@pytest.mark.parametrize("name", sorted({"lipsum", *module._REMOVED_FILTERS}))
def test_what_was_removed_is_gone(name: str) -> None:
    """Helpers that no template needs are not there to be abused."""
    with pytest.raises((LoadError, InferenceError)):
        render(f"{{{{ {name}() }}}}" if name == "lipsum" else f"{{{{ 'x' | {name} }}}}", {})


def test_the_clock_stops_what_the_budget_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time at all the first step is refused."""
    monkeypatch.setattr(module, "MAX_SECONDS", -1.0)
    with pytest.raises(LoadError, match="runs for more than"):
        render("{{ messages }}", MESSAGES)


def test_the_output_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that the template spells out itself is not charged, so its length is."""
    monkeypatch.setattr(module, "MAX_OUTPUT_CHARS", 50)
    with pytest.raises(LoadError, match="its output exceeds 50"):
        render("{% for i in range(9) %}0123456789{% endfor %}", {})


def test_long_conversations_are_affordable() -> None:
    """Half a million characters in 200 messages, each looked at several times, stay within the budget."""
    source = (
        "{% for m in messages %}{% set c = m.content | trim %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\\n' + c.replace('x', 'yz') + '<|im_end|>\\n' }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "x1" * 1250} for _ in range(200)]
    assert len(render(source, {"messages": messages})) == 200 * (1250 * 3 + 12 + 4 + 1 + 10 + 1)
