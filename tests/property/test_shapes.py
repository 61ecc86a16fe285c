"Shapes: any record is a conversation of the one form or a bad line, and the same words come out of every shape."

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.task_dataloader.formats import BadLine, read_lines
from fengshen.data.task_dataloader.shapes import KEPT, ROLES, SHAPES, conversation, describe, recognise

settings.register_profile("house", deadline=None)
settings.load_profile("house")

NAMES = ["question", "Answer", "answer", "instruction", "input", "output", "history", "system", "messages", "conversations", "query", "response",
         "prompt", "completion", "text", "tools", "role", "from", "content", "value", "tool_calls", "function_call", "name", "arguments", "function", "type"]
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([*ROLES, "[]", "[{}]", "{}", "text", "\ud83d", " "]))
keys = st.one_of(st.sampled_from(NAMES), st.text(max_size=6))
values = st.recursive(leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=4), max_leaves=20)
turns = st.lists(st.dictionaries(st.sampled_from(NAMES), values, max_size=4) | st.builds(lambda r, c: dict(role=r, content=c), st.sampled_from([*ROLES]), values), max_size=4)


def check(made):
    "The one form: text, or messages in an order that is possible."
    if "text" in made:
        assert made.keys() == {"text"} and made["text"].strip()
        return
    assert made.keys() == {"messages", "tools"} and (made["tools"] is None or all(isinstance(t, dict) for t in made["tools"]))
    roles = [m["role"] for m in made["messages"]]
    assert set(roles) <= {"system", "user", "assistant", "tool"} and "system" not in roles[1:] and roles[0] in ("system", "user")
    assert all(before in ("assistant", "tool") for before, role in zip(roles, roles[1:]) if role == "tool")
    for m in made["messages"]:
        assert m.keys() <= {"role", "content", "tool_calls", *KEPT}
        m["content"].encode("utf-8")
        for call in m.get("tool_calls", []):
            assert m["role"] == "assistant" and call["type"] == "function" and isinstance(call["function"]["arguments"], dict) and call["function"]["name"]
    assert any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in made["messages"])


@given(values | st.dictionaries(st.sampled_from(NAMES), values | turns, max_size=6), st.sampled_from([None, *SHAPES]))
@settings(max_examples=600)
def test_any_value_is_a_conversation_or_a_bad_line(record, shape):
    try:
        name = shape or recognise(record)
        made = conversation(record, name)
    except BadLine as e:
        assert 0 < len(str(e)) < 1500
        return
    check(made)
    assert describe(record, name).startswith(f"shape {name}")


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
said = words.filter(str.strip)
rounds = st.lists(st.tuples(words, words), max_size=3)


@given(st.none() | said, rounds, said, said)
def test_the_same_words_in_every_shape(system, history, asked, answer):
    all_turns = ([("system", system)] if system else []) + [t for q, a in history for t in (("user", q), ("assistant", a))] + [("user", asked), ("assistant", answer)]
    pairs = [list(pair) for pair in history]
    sharegpt = dict(system="system", user="human", assistant="gpt")
    turns = [{"from": sharegpt[role], "value": text} for role, text in all_turns]
    openai = [dict(role=role, content=text) for role, text in all_turns]
    parts = [dict(role=role, content=[dict(type="text", text=c) for c in text]) for role, text in all_turns]
    records = [
        ("messages", dict(messages=openai)), ("messages", dict(messages=parts, tools=[])), ("messages", dict(messages=json.dumps(openai))),
        ("sharegpt", dict(conversations=turns)), ("sharegpt", dict(conversation=openai)), ("messages", dict(messages=turns)),
        ("query_response", dict(prompt=openai[:-1], completion=openai[-1:])),
        ("alpaca", dict(instruction=asked, input="", output=answer, history=pairs, system=system, text="x")),
        ("query_response", dict(query=asked, response=answer, history=json.dumps(pairs), system=system)),
        ("query_response", dict(Prompt=asked, Response=answer, history=pairs, system=system or ""))]
    if system:
        records.append(("sharegpt", dict(conversations=turns[1:], system=system, tools="")))
    if not system and not history:
        records += [("question_answer", dict(Question=asked, Answer=answer, title="t")), ("alpaca", dict(instruction="", input=asked, output=answer))]
    for shape, record in records:
        assert recognise(record) == shape
        assert conversation(record, shape) == dict(messages=openai, tools=None)


U, A = dict(role="user", content="几点？"), dict(role="assistant", content="三点。")


def call(**arguments):
    return dict(name="clock", arguments=arguments)


@pytest.mark.parametrize("turn", [
    dict(role="assistant", tool_calls=[dict(id="7", type="function", function=dict(name="clock", arguments='{"zone": "东八区"}'))]),
    dict(role="assistant", content=None, tool_calls=[dict(id="7", function=call(zone="东八区"))]),
    dict(role="assistant", content="", tool_calls=[dict(id="7", **call(zone="东八区"))]),
], ids=["text", "object", "bare"])
def test_tool_calls_have_one_form(turn):
    tool = dict(role="tool", content="15:00", tool_call_id="7", name="clock")
    made = conversation(dict(messages=[U, turn, tool, tool, A], tools=[dict(type="function")]), "messages")
    wanted = dict(id="7", type="function", function=call(zone="东八区"))
    assert made["messages"][1] == dict(role="assistant", content="", tool_calls=[wanted])
    assert made["messages"][2] == tool and made["tools"] == [dict(type="function")]


def test_calls_as_sharegpt_and_old_openai_have_them():
    for value in (json.dumps(call(zone="东八区")), json.dumps([call(zone="东八区")])):
        turns = [{"from": "human", "value": "几点？"}, {"from": "function_call", "value": value}, {"from": "observation", "value": "15:00"}, {"from": "gpt", "value": "三点。"}]
        made = conversation(dict(conversations=turns, tools='[{"name": "clock"}]'), "sharegpt")
        old = [U, dict(role="assistant", content=None, function_call=dict(name="clock", arguments='{"zone": "东八区"}')), dict(role="function", content="15:00"), A]
        assert made["messages"] == conversation(dict(messages=old), "messages")["messages"] and made["tools"] == [dict(name="clock")]
        assert made["messages"][1]["tool_calls"] == [dict(type="function", function=call(zone="东八区"))]
    no_arguments = conversation(dict(messages=[U, dict(role="assistant", tool_calls=[dict(name="clock")])]), "messages")
    assert no_arguments["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}


def test_tables_write_null_in_what_a_turn_does_not_have():
    padded = dict(tool_calls=None, tool_call_id=None, name=None, function_call=None)
    record = dict(messages=[dict(U, **padded), dict(A, **padded)], text=None, question=None, answer=None, tools=None, system=None)
    assert recognise(record) == "messages" and conversation(record, "messages") == dict(messages=[U, A], tools=None)
    assert recognise(dict(messages=None, conversations=None, text="文")) == "text"
    assert recognise(dict(question="问", answer=None)) == "question_answer", "a null answer is a bad answer, not another shape"


BAD = [
    ("question_answer", dict(question="问"), "no 'answer' among the keys question"),
    ("question_answer", dict(question="问", anser="答"), "is 'anser' meant"),
    ("question_answer", dict(question="问", answer=""), "'answer' is empty"),
    ("question_answer", dict(question=" ", answer="答"), "'question' is empty"),
    ("question_answer", dict(question="问", Answer=7), "'Answer' is a int"),
    ("question_answer", dict(question="问", answer=math.nan), "'answer' is a float"),
    ("question_answer", dict(question="问", answer=None), "'answer' is a NoneType"),
    ("question_answer", dict(question=["问"], answer="答"), "'question' is a list"),
    ("question_answer", dict(question="问", answer="\ud83d"), "half a character"),
    ("question_answer", [1], "a list, not an object"),
    ("alpaca", dict(instruction="", input=" ", output="答"), "'instruction' is empty"),
    ("alpaca", dict(instruction="问", input=math.nan, output="答"), "'input' is a float"),
    ("alpaca", dict(instruction="问", output="答", history=[["一"]]), "entry 1 of 'history'"),
    ("alpaca", dict(instruction="问", output="答", history=[["一", 2]]), "'history 1' is a int"),
    ("alpaca", dict(instruction="问", output="答", history="[[1"), "text that is not JSON"),
    ("query_response", dict(query="问", response=" "), "'response' is empty"),
    ("query_response", dict(prompt=[U], completion=[]), "says nothing"),
    ("query_response", dict(prompt="问", completion=[A]), "'prompt' is text that is not JSON"),
    ("text", dict(text=[]), "'text' is a list"),
    ("messages", dict(messages=[]), "there are no messages"),
    ("messages", dict(messages={}), "'messages' is a dict, not a list"),
    ("messages", dict(messages=[U]), "says nothing"),
    ("messages", dict(messages=[U, dict(A, content="")]), "says nothing"),
    ("messages", dict(messages=[A, U, A]), "speaks first"),
    ("messages", dict(messages=[U, A, dict(role="system", content="x")]), "message 3 is the system's"),
    ("messages", dict(messages=[dict(role="system", content="x"), U, A], system="y"), "message 2 is the system's"),
    ("messages", dict(messages=[U, dict(role="tool", content="x"), A]), "message 2 is a tool's"),
    ("messages", dict(messages=[dict(role="user"), A]), "no content among the keys role"),
    ("messages", dict(messages=[dict(role="usr", content=""), A]), "unknown role 'usr'.*is 'user' meant"),
    ("messages", dict(messages=[U, "三点"]), "a turn is a str"),
    ("messages", dict(messages=[U, dict(A, content=3)]), "'content' is a int"),
    ("messages", dict(messages=[dict(role="user", content=[dict(type="image_url", image_url={})]), A]), "part of type 'image_url'"),
    ("messages", dict(messages=[dict(role="user", content=["几点"]), A]), "part of type 'str'"),
    ("messages", dict(messages=[dict(U, tool_calls=[call()]), A]), "only the assistant can"),
    ("messages", dict(messages=[U, dict(A, tool_calls=[dict(name="f", arguments="{")])]), "'arguments' is text that is not JSON"),
    ("messages", dict(messages=[U, dict(A, tool_calls=[dict(name="f", arguments="[]")])]), "arguments of 'f' are a list"),
    ("messages", dict(messages=[U, dict(A, tool_calls=[dict(arguments={})])]), "no 'name'"),
    ("messages", dict(messages=[U, dict(A, tool_calls=[3])]), "a tool call is a int"),
    ("messages", dict(messages=[U, A], tools=["clock"]), "'tools' holds a str"),
    ("sharegpt", dict(conversations=[{"from": "human", "value": "x"}, {"from": "function_call", "value": "clock()"}]), "'function_call' is text that is not JSON"),
]


@pytest.mark.parametrize("shape, record, why", BAD, ids=[f"{i}-{shape}" for i, (shape, _, _) in enumerate(BAD)])
def test_what_is_wrong_is_said(shape, record, why):
    with pytest.raises(BadLine, match=why):
        conversation(record, shape)


def test_untidy_chats_are_chats():
    empty = dict(role="user", content="")
    greeting = dict(role="system", content="你好")
    for messages in ([empty, A], [U, U, A, A], [U, A, U], [greeting, A, U], [U, dict(A, content=""), U, A], [dict(role="system", content=""), U, A]):
        assert conversation(dict(messages=messages), "messages")["messages"] == messages


@pytest.mark.parametrize("record, shape", [
    (dict(messages=[], prompt="x", completion="y"), "messages"), (dict(conversations=[], system="x"), "sharegpt"), (dict(conversations=[], messages=[]), "messages"),
    (dict(instruction="x", output="y", text="z"), "alpaca"), (dict(query="x", response="y", question="x", answer="y"), "query_response"),
    (dict(question="x", answer="y", text="z"), "question_answer"), (dict(TEXT="x", title="y"), "text"), (dict(INSTRUCTION="x", Output="y"), "alpaca"),
])
def test_the_order_decides_where_two_shapes_fit(record, shape):
    assert recognise(record) == shape


@pytest.mark.parametrize("record, why", [
    (dict(question="x", anwser="y"), "question_answer, has question and answer; is 'answer' meant by 'anwser'"),
    (dict(mesages=[]), "messages, has messages; is 'messages' meant by 'mesages'"), (dict(instruction="x", outputs="y"), "alpaca"),
    ({}, "known are messages"), ({str(i): i for i in range(99)}, "and 87 more"), ({3: 4}, "known are"), ([], "a list, not an object"), (None, "a NoneType"),
])
def test_an_unknown_shape_names_the_nearest(record, why):
    with pytest.raises(BadLine, match=why):
        recognise(record)


def test_described_in_few_lines():
    record = dict(messages=[U, A] * 50)
    lines = describe(record, "messages").splitlines()
    assert len(lines) == 8 and lines[-1] == "  and 94 more turns" and lines[1] == "  user: 几点？"
    assert len(describe(dict(text="长\n" * 10**6), "text")) < 200
    assert '"clock"' in describe(dict(messages=[U, dict(role="assistant", tool_calls=[call()])]), "messages")


def test_real_questions_are_recognised(shared):
    for name in ("medqa_zh_valid.jsonl.xz", "medquad_en.jsonl.xz"):
        bad = total = 0
        for _, record, _ in read_lines(shared / "data" / "medical_qa" / name):
            total += 1
            try:
                check(conversation(record, recognise(record)))
            except BadLine:
                bad += 1
        assert total > 500 and bad < total / 100, (name, bad, total)
