"""Chat templates: what transformers renders, nothing of Python's, and never for long."""

from __future__ import annotations

import time

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.text import limits
from jaxserve.text.chat import ChatPrompts
from jaxserve.text.template import Template
from tests.api_fakes import byte_level_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be kind.  "},
    {"role": "user", "content": "  What is 2 < 3 & 日本?\n"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nI look.",
        "tool_calls": [
            {"type": "function", "id": "123456789",
             "function": {"name": "look", "arguments": {"where": "日本", "n": 2}}}
        ],
    },
    {"role": "tool", "content": "{\"found\": true}", "tool_call_id": "123456789"},
    {"role": "user", "content": "And now?"},
]  # fmt: skip
TOOLS = [
    {"type": "function", "function": {
        "name": "look", "description": "Looks <somewhere>",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}}
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot_id|>
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501
MISTRAL = """{%- set loop_messages = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
            {%- endfor %}
            {{- "]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if tool_call.id|length != 9 %}{{- raise_exception("nine") }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""  # noqa: E501
QWEN3 = """{%- macro header(role) %}{{- '<|im_start|>' ~ role }}{%- endmacro %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- header(message.role) + '\\n' }}
        {%- if loop.index0 > ns.last or loop.last %}{{- '<think>\\n' + reasoning.strip('\\n') }}{%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.function.name ~ '", "arguments": ' }}
            {%- if tool_call.function.arguments is string %}{{- tool_call.function.arguments }}
            {%- else %}{{- tool_call.function.arguments | tojson }}{%- endif %}
        {%- endfor %}
        {%- endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- header('user') }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
    {%- else %}{{- header(message.role) + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
{{ "%s-%03d" | format("x", 7) }} {{ "{:>5}".format("é") }} {{ ["b", "a"] | sort | join("-") }} {{ 7 // 2 }} {{ none }}
{{ messages | map(attribute="role") | unique | list }} {{ "a\\nb" | indent(2) }} {{ {"a": [1.5, true]} }} {{ undefined_name }}
"""  # noqa: E501
NAMES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3}


def oracle(template: str, messages, **variables) -> str:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = template
    variables = {"add_generation_prompt": True, **variables}
    return tokenizer.apply_chat_template(messages, tokenize=False, **variables)


def ours(template: str, messages, tools=None, **variables) -> str:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = template
    return ChatPrompts.of(tokenizer).render(messages, tools=tools, template_kwargs=variables)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False, "bos_token": "B"}])
def test_prompts_are_those_of_transformers(name, tools, variables):
    template = NAMES[name]
    # Mistral's roles alternate.
    messages = MESSAGES[:4] if name == "mistral" else MESSAGES
    assert ours(template, messages, tools, **variables) == oracle(
        template, messages, tools=tools, **variables
    )


def test_the_demo_models_own_template_renders_as_in_transformers():
    from converters import load_tokenizer
    from examples.demo_model import fetch

    tokenizer = load_tokenizer(str(fetch()))
    text = ChatPrompts.of(tokenizer).render(MESSAGES[:2])
    assert text == tokenizer.apply_chat_template(
        MESSAGES[:2], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("ending", ["The answer is", "The answer is "])
def test_a_final_message_is_continued_as_in_transformers(name, ending):
    messages = [*MESSAGES[:2], {"role": "assistant", "content": ending}]
    expected = oracle(
        NAMES[name], messages, add_generation_prompt=False, continue_final_message=True
    )
    assert ours(NAMES[name], messages, continue_final_message=True) == expected
    assert expected.rstrip().endswith("The answer is")


BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ 'a'*10**10 }}",
    "{{ ['a'*1000000]*1000000 }}",
    "{{ (9**999)**999 }}",
    "{% set n=namespace(x='a') %}{% for i in range(99) %}{% set n.x=n.x~n.x %}{% endfor %}",
    "{% set n=namespace(x=['a']) %}{% for i in range(99) %}{% set n.x=[n.x,n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(99) %}{% set n.x=[n.x,n.x] %}{% endfor %}"
    "{{ n.x == [n.x, 1] }}",
    "{% set n=namespace(x=[1]) %}{% for i in range(99) %}{% set n.x=[n.x,n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "{% set n=namespace(x='a') %}{% for i in range(99) %}{% set n.x %}{{n.x}}{{n.x}}{% endset %}"
    "{% endfor %}",
    "{% set n=namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x=n.x+['a'*9999999] %}{% endfor %}",
    "{% set x='a'*16000000 %}{% for i in range(99999) %}"
    "{% if x == 'b'+x[1:] %}{% endif %}{% endfor %}",
    "{% filter upper %}{% for i in range(99999) %}{{ messages }}{% endfor %}{% endfilter %}",
    *(
        "{% set n=namespace(x=(1,)) %}{% for i in range(99) %}{% set n.x=(n.x,n.x) %}{% endfor %}"
        + use
        for use in ("{{ {n.x: 1} }}", "{{ {}[n.x] }}", "{{ n.x in {} }}", "{{ {}.get(n.x) }}",
                    "{{ dict([(n.x, 1)]) }}", "{{ [n.x]|unique|list }}", "{{ n.x ~ '' }}",
                    "{% for i in [1] %}{{ loop.changed(n.x) }}{{ loop.changed(n.x) }}{% endfor %}",
                    "{{ 1 is in n.x }}", "{{ [[n.x, 1]]|selectattr(0, 'eq', [n.x])|list }}")
    ),
    "{{ 'a'|center(10**10) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'a'.zfill(10**10) }}",
    "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (10**10, 1) }}", "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**10) }}", "{{ '%9999999999d' | format(1) }}",
    "{{ ('a'*9999999).replace('a', 'b'*9999999) }}",
    "{{ ('a'*9999999)|replace('a', 'b'*9999999) }}",
    "{{ ('b'*9999999).join('a'*1000000) }}", "{{ ('a'*1000000)|join('b'*9999999) }}",
    "{{ ('a\n'*1000000)|indent(60000) }}", "{{ ('\t'*1000000).expandtabs(60000) }}",
    "{{ ('a'*9999999).rfind('b'+'a'*5000000) }}", "{{ ('a'*9999999).strip('b'*5000000) }}",
    "{{ ('é'*1000000).encode('punycode') }}", "{{ ('ab '*1000000)|wordwrap(1) }}",
    "{{ ('a,'*8000000).split(',') }}", "{{ ('a'*16000000)|list }}", "{{ lipsum(10**8) }}",
    "{{ messages|tojson(indent=10**9) }}", "{{ [1]|batch(10**10, 'x')|list }}",
    "{{ 1.5|round(10**9) }}", "{{ strftime_now('%c'*1000000) }}", "{{ (1).to_bytes(10**10) }}",
    "{{ 'a'.translate({97: 'b'*9999999}) * 9 }}", "{{ '0'|int * 'x'.__len__() }}{{ 1/0 }}",
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "".join(f"{{% if a{i} %}}{{% set b{i}=1 %}}{{% endif %}}" for i in range(5000)),
    "{{ 1" + "+1" * 100_000 + " }}", "x" * (limits.TEMPLATE_SOURCE + 1),
]  # fmt: skip


@pytest.mark.parametrize("source", BOMBS, ids=lambda s: s[:60])
def test_no_template_takes_long_or_much(source):
    """A loop that never ends, text without end, a number of any size: refused soon."""
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match="the chat template") as caught:
        Template(source).render({"messages": MESSAGES})
    assert time.thread_time() - began < 2 * limits.TEMPLATE_SECONDS
    assert len(str(caught.value)) < 2000


def test_what_a_bomb_makes_is_forgotten_before_it_fills_the_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in BOMBS:
        if "99999) %}" in source and "'a'*" not in source:
            continue  # loops that make nothing take their whole second
        with pytest.raises(InvalidRequestError):
            Template(source).render({"messages": MESSAGES})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB


ESCAPES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__ }}", "{{ ''['__class__'].__name__ }}", "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}", "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ (''|attr('format'))('{0.__class__}') }}{{ '{0.__class__.__init__}'.format(1) }}",
    "{{ cycler.__init__.__globals__ }}", "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}", "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop.__class__ }}{{ range.__self__ }}", "{{ dict.__class__.__bases__ }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}", "{{ namespace(__class__=1) }}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}", "{{ messages.append(1) }}",
    "{{ messages[0].clear() }}", "{{ messages[0].update(a=1) }}", "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}", "{% extends '/etc/passwd' %}",
    "{{ ''.join.__func__ }}{{ 'a'.upper.__self__ }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}", "{{ messages|sum(attribute='__class__') }}",
    "{{ budget.spend() }}{{ environment.budget }}", "{{ self._context.environment }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{% call(x) caller() %}{% endcall %}", "{{ ().__reduce_ex__(2) }}",
    "{{ 1.0.__class__.fromhex }}",
    "{{ dict.fromkeys.__globals__ }}", "{{ [''.encode]|map('attr', '__self__')|list }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    """What leads from a value to its class, its module or its frame, changes the messages or reads
    a file: an error, or the nothing that an unsafe attribute is."""
    messages = [dict(message) for message in MESSAGES]
    try:
        text = Template(source).render({"messages": messages})
    except InvalidRequestError:
        text = ""
    assert not any(word in text for word in ("class '", "function", "object at", "root:", "module"))
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ 2.0 ** 5000 }}", "{{ messages[0] + 1 }}",
        "{{ 'x'.encode('ascii').decode('utf-16') }}", "{{ 'é'.encode('ascii') }}", "{{ x }",
        "{% for %}", "{{ {}|tojson(sort_keys=1)|int(base=99) }}{{ [1]|max(attribute=3).x }}",
        "{{ messages|no_such_filter }}", "{{ 1 is no_such_test }}", "{{ [3, 'x']|sort }}",
        "{{ ('9'*5000)|int + 1 }}{{ [].index(1) }}", "{{ {}|dictsort(by='x') }}",
        "{{ range(10**9) }}", "{{ raise_exception('x' * 1000000) }}",
    ],
)  # fmt: skip
def test_whatever_a_template_raises_is_one_kind_of_error(source):
    with pytest.raises(InvalidRequestError, match="the chat template") as caught:
        Template(source).render({"messages": MESSAGES})
    assert len(str(caught.value)) < 2000


def test_long_messages_are_rendered():
    """Five megabytes in a few messages, and a thousand short ones."""
    long = [{"role": "user", "content": "word " * 1_000_000}]
    assert ours(CHATML, long) == oracle(CHATML, long)
    many = [{"role": role, "content": "hello"} for role in ("user", "assistant")] * 500
    for template in (CHATML, LLAMA3, MISTRAL, QWEN3):
        assert ours(template, many) == oracle(template, many)
