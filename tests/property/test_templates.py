"Templates: what every shape of record becomes under every template, and that any conversation is rendered, masked and read back exactly."
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.data.task_dataloader.formats import BadLine
from fengshen.data.task_dataloader.templates import TABLES, JinjaTemplate, TableTemplate, get_template, line_table, text_of
from fengshen.tokenizer import load_tokenizer

settings.register_profile("house", deadline=None)  # a loaded machine is not a failure
settings.load_profile("house")

END = "<|endoftext|>"
ROLES = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<tool_call>"]
TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
TOKENIZER.add_special_tokens({"additional_special_tokens": ROLES})
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.role + ':' + m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}")
BARE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content | trim + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")

RECORDS = dict(
    question_answer=dict(question="头疼怎么办？", answer="多休息。"),
    alpaca=dict(instruction="译成英文", input="你好", output="Hello", history=[["早", "早上好"]]),
    messages=dict(messages=[dict(role=r, content=c) for r, c in (
        ("system", "简短"), ("user", "你好"), ("assistant", "您好😀"), ("user", "再见"), ("assistant", "慢走"))]),
    sharegpt=dict(system="简短", conversations=[{"from": f, "value": v} for f, v in (("human", "你好"), ("gpt", ""), ("human", "在吗"), ("gpt", "在"))]),
    query_response=dict(query=f"什么是{END}？", response=f"{END}是结束。"),
)
S, X, H, T = "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>\n\n"
# What is learned stands between ⟦ and ⟧; § is the end of text
GOLDEN = dict(
    yuyuan=dict(
        question_answer="Question:头疼怎么办？ answer:⟦多休息。§⟧",
        alpaca="Question:早 answer:⟦早上好§⟧Question:译成英文\n你好 answer:⟦Hello§⟧",
        messages="简短\nQuestion:你好 answer:⟦您好😀§⟧Question:再见 answer:⟦慢走§⟧",
        sharegpt="简短\nQuestion:你好 answer:§Question:在吗 answer:⟦在§⟧",
        query_response="Question:什么是§？ answer:⟦§是结束。§⟧"),
    ziya=dict(
        question_answer="<human>:头疼怎么办？\n<bot>:⟦多休息。§⟧",
        alpaca="<human>:早\n<bot>:⟦早上好§⟧\n<human>:译成英文\n你好\n<bot>:⟦Hello§⟧",
        messages="简短\n<human>:你好\n<bot>:⟦您好😀§⟧\n<human>:再见\n<bot>:⟦慢走§⟧",
        sharegpt="简短\n<human>:你好\n<bot>:§\n<human>:在吗\n<bot>:⟦在§⟧",
        query_response="<human>:什么是§？\n<bot>:⟦§是结束。§⟧"),
    plain=dict(
        question_answer="头疼怎么办？\n⟦多休息。§⟧",
        alpaca="早\n⟦早上好§⟧\n译成英文\n你好\n⟦Hello§⟧",
        messages="简短\n你好\n⟦您好😀§⟧\n再见\n⟦慢走§⟧",
        sharegpt="简短\n你好\n§\n在吗\n⟦在§⟧",
        query_response="什么是§？\n⟦§是结束。§⟧"),
    chatml=dict(
        question_answer=f"{S}user\n头疼怎么办？{X}\n{S}assistant\n⟦多休息。{X}⟧",
        alpaca=f"{S}user\n早{X}\n{S}assistant\n⟦早上好{X}⟧\n{S}user\n译成英文\n你好{X}\n{S}assistant\n⟦Hello{X}⟧",
        messages=f"{S}system\n简短{X}\n{S}user\n你好{X}\n{S}assistant\n⟦您好😀{X}⟧\n{S}user\n再见{X}\n{S}assistant\n⟦慢走{X}⟧",
        sharegpt=f"{S}system\n简短{X}\n{S}user\n你好{X}\n{S}assistant\n{X}\n{S}user\n在吗{X}\n{S}assistant\n⟦在{X}⟧",
        query_response=f"{S}user\n什么是§？{X}\n{S}assistant\n⟦§是结束。{X}⟧"),
    llama3=dict(
        question_answer=f"<|begin_of_text|>{H}user{T}头疼怎么办？<|eot_id|>{H}assistant{T}⟦多休息。<|eot_id|>⟧",
        alpaca=f"<|begin_of_text|>{H}user{T}早<|eot_id|>{H}assistant{T}⟦早上好<|eot_id|>⟧{H}user{T}译成英文\n你好<|eot_id|>{H}assistant{T}⟦Hello<|eot_id|>⟧",
        messages=f"<|begin_of_text|>{H}system{T}简短<|eot_id|>{H}user{T}你好<|eot_id|>{H}assistant{T}⟦您好😀<|eot_id|>⟧"
                 f"{H}user{T}再见<|eot_id|>{H}assistant{T}⟦慢走<|eot_id|>⟧",
        sharegpt=f"<|begin_of_text|>{H}system{T}简短<|eot_id|>{H}user{T}你好<|eot_id|>{H}assistant{T}<|eot_id|>{H}user{T}在吗<|eot_id|>{H}assistant{T}⟦在<|eot_id|>⟧",
        query_response=f"<|begin_of_text|>{H}user{T}什么是§？<|eot_id|>{H}assistant{T}⟦§是结束。<|eot_id|>⟧"),
    marked=dict(
        question_answer="user:头疼怎么办？\nA:⟦多休息。§⟧",
        alpaca="user:早\nA:⟦早上好§⟧\nuser:译成英文\n你好\nA:⟦Hello§⟧",
        messages="system:简短\nuser:你好\nA:⟦您好😀§⟧\nuser:再见\nA:⟦慢走§⟧",
        sharegpt="system:简短\nuser:你好\nA:§\nuser:在吗\nA:⟦在§⟧",
        query_response="user:什么是§？\nA:⟦§是结束。§⟧"),
    bare=dict(
        question_answer="[user]头疼怎么办？§\n[assistant]⟦多休息。§⟧",
        alpaca="[user]早§\n[assistant]⟦早上好§⟧\n[user]译成英文\n你好§\n[assistant]⟦Hello§⟧",
        messages="[system]简短§\n[user]你好§\n[assistant]⟦您好😀§⟧\n[user]再见§\n[assistant]⟦慢走§⟧",
        sharegpt="[system]简短§\n[user]你好§\n[assistant]§\n[user]在吗§\n[assistant]⟦在§⟧",
        query_response="[user]什么是§？§\n[assistant]⟦§是结束。§⟧"),
)
JINJA = dict(marked=MARKED, bare=BARE)


def template_of(name):
    return JinjaTemplate(name, JINJA[name], TOKENIZER) if name in JINJA else get_template(name, TOKENIZER)


def drawn(dataset, i=0):
    return "".join(f"⟦{text}⟧" if learned else text for learned, text in dataset.texts(i)).replace(END, "§")


@pytest.mark.parametrize("shape", RECORDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, shape):
    read = {on: ConversationDataset([RECORDS[shape]], TOKENIZER, template=template_of(name), loss_on=on) for on in ("assistant", "last", "all")}
    assert set(read["all"].report["shapes"].values()) == {shape}
    want = GOLDEN[name][shape]
    before, _, last = want.rpartition("⟦")
    assert drawn(read["assistant"]) == want
    assert drawn(read["last"]) == before.replace("⟦", "").replace("⟧", "") + "⟦" + last
    assert TOKENIZER.decode(read["all"][0]["input_ids"]).replace(END, "§") == re.sub("[⟦⟧]", "", want)
    assert (read["all"][0]["labels"] != -100).tolist() == [False] + [True] * (len(read["all"][0]["labels"]) - 1)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_plain_text_knows_no_template(name):
    dataset = ConversationDataset([dict(text=f"头疼{END}多休息")], TOKENIZER, template=template_of(name))
    assert TOKENIZER.decode(dataset[0]["input_ids"]) == f"头疼{END}多休息{END}" and (dataset[0]["labels"][1:] != -100).all()


def test_golden_tool_calls():
    call = dict(type="function", function=dict(name="天气", arguments={"城": "北京", "天": [1, None]}))
    talk = [dict(role="user", content="热吗"), dict(role="assistant", content="查一下", tool_calls=[call, call]), dict(role="tool", content="三十度"), dict(role="assistant", content="热")]
    dataset = ConversationDataset([dict(messages=talk)], TOKENIZER, template="chatml")
    said = '<tool_call>\n{"name": "天气", "arguments": {"城": "北京", "天": [1, null]}}\n</tool_call>'
    assert drawn(dataset) == (f"{S}user\n热吗{X}\n{S}assistant\n⟦查一下\n{said}\n{said}{X}⟧\n{S}user\n<tool_response>\n三十度\n</tool_response>{X}\n"
                              f"{S}assistant\n⟦热{X}⟧")
    for name in ("yuyuan", "ziya", "plain", "llama3"):
        with pytest.raises(ValueError, match="record 1: the template .* has no place for"):
            ConversationDataset([dict(messages=talk)], TOKENIZER, template=name)
    with pytest.raises(ValueError, match="record 1: .* no place for a list of tools"):
        ConversationDataset([dict(messages=talk, tools=[dict(type="function", function=dict(name="天气"))])], TOKENIZER, template="chatml")


# Any conversation

hard = [END, *ROLES, "</tool_call>", "{{ x }}", "{% if %}", "{answer}", "\r\n", "\u2028", "\x00", "👩‍👩‍👧‍👦", "🇨🇳", "，。？", "e\u0301", "\ufeff", "'\"\\", "\\n", "  ", "<bot>:"]
anything, chinese = st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text("头疼怎么办多休息少看手机", max_size=20)
texts = st.lists(st.one_of(st.sampled_from(hard), anything, chinese), max_size=4).map("".join)
full = texts.filter(str.strip)
values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda x: st.lists(x, max_size=2) | st.dictionaries(texts, x, max_size=2), max_leaves=4)
calls = st.lists(st.builds(lambda n, a: dict(type="function", function=dict(name=n, arguments=a)), full, st.dictionaries(texts, values, max_size=3)), min_size=1, max_size=2)
plain_turn = st.builds(lambda q, a: [dict(role="user", content=q), dict(role="assistant", content=a)], texts, texts)
tool_turn = st.builds(lambda q, said, c, r, a: [
    dict(role="user", content=q), dict(role="assistant", content=said, tool_calls=c), dict(role="tool", content=r), dict(role="assistant", content=a)], texts, texts, calls, texts, full)


def conversations(turn, system=texts):
    return st.builds(lambda head, turns: [dict(role="system", content=t) for t in head] + sum(turns, []), st.lists(system, max_size=1), st.lists(turn, min_size=1, max_size=5)).filter(
        lambda talk: any(m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls")) for m in talk))


def check(talk, template):
    "The tokens read back as the template's rendering, and the learned ones as the answers that say something, each with its end."
    dataset = ConversationDataset([dict(messages=talk)], TOKENIZER, template=template, max_length=10**6)
    rendered = TOKENIZER.apply_chat_template(talk, chat_template=template.jinja, tokenize=False)
    text = "".join(text for _, text in dataset.texts(0))
    assert rendered.startswith(text) and rendered == text + template.after.removeprefix(template.end if isinstance(template, JinjaTemplate) else "")
    said = [text_of(m) for m in talk if m["role"] == "assistant"]
    assert [text for learned, text in dataset.texts(0) if learned] == [t + template.end for t in said if t]
    assert dataset.report["changed"] == 0


@pytest.mark.parametrize("name", ["yuyuan", "ziya", "llama3", "marked"])
def test_any_conversation_is_rendered_and_masked_exactly(name):
    template = template_of(name)
    given(conversations(plain_turn))(settings(max_examples=30)(lambda talk: check(talk, template)))()


@given(conversations(plain_turn | tool_turn))
@settings(max_examples=60)
def test_tool_calls_are_learned_as_chatml_renders_them(talk):
    check(talk, template_of("chatml"))


@given(conversations(plain_turn))
@settings(max_examples=40)
def test_a_template_without_marks_is_masked_or_refused(talk):
    "`trim` changes what is said: whatever is learned is what the template renders, or the record is refused."
    try:
        dataset = ConversationDataset([dict(messages=talk)], TOKENIZER, template=template_of("bare"), max_length=10**6)
    except ValueError as e:
        assert "record 1: " in str(e)
        return
    stripped = [m["content"].strip() for m in talk if m["role"] == "assistant"]
    assert [text for learned, text in dataset.texts(0) if learned] == [text + END for text in stripped if text]


@given(st.sampled_from([*TABLES]), conversations(plain_turn), texts)
@settings(max_examples=60)
def test_what_chat_asks_is_what_was_trained_on(name, talk, question):
    "transformers' rendering of the stored template, the text before an answer, and the tokens of a sample are one."
    template = template_of(name)
    asked = [*talk, dict(role="user", content=question)]
    rendered = TOKENIZER.apply_chat_template(asked, chat_template=template.jinja, tokenize=False, add_generation_prompt=True)
    assert rendered == template.history(asked)
    dataset = ConversationDataset([dict(messages=[*asked, dict(role="assistant", content="好")])], TOKENIZER, template=template, loss_on="last", max_length=10**6)
    *told, answer = dataset.texts(0)
    assert ("".join(text for _, text in told), answer) == (rendered, (True, "好" + template.end))


words = st.text("问答{}:<|>\n'\"\\%#- ", max_size=12).filter(lambda t: "{question}" not in t and "{answer}" not in t)


@given(words, words, texts)
@settings(max_examples=60)
def test_a_line_with_braces_is_text(before, between, question):
    template = TableTemplate("line", line_table(before + "{question}" + between + "{answer}"), TOKENIZER)
    asked = [dict(role="user", content=question)]
    assert template.history(asked) == before + question + between
    assert TOKENIZER.apply_chat_template(asked, chat_template=template.jinja, tokenize=False, add_generation_prompt=True) == before + question + between


USELESS = ["{question}", "{answer}", "{answer}{question}", "{question}{answer}。", "{question}{question}{answer}", "{question} {answer}{answer}"]


@pytest.mark.parametrize("line", USELESS)
def test_a_line_that_would_lose_something_is_refused(line):
    with pytest.raises(ValueError, match="the template cannot be used"):
        get_template(line, TOKENIZER)


def test_templates_that_cannot_be_used_are_refused_with_the_reason(tmp_path):
    for name in ("", "chatlm", "nowhere"):
        with pytest.raises(ValueError, match="unknown template.*chatml.*{question}.*jinja"):
            get_template(name, TOKENIZER)
    with pytest.raises(ValueError, match="does not have.*<.im_end.>"):
        get_template("chatml", load_tokenizer("fengshen:tokenizer_demo"))
    with pytest.raises(ValueError, match="does not end an answer with a special token.*never stop"):
        JinjaTemplate("endless", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", TOKENIZER)
    file = tmp_path / "mine.jinja"
    file.write_text(BARE, "utf-8")
    assert get_template(str(file), TOKENIZER).jinja == BARE
    with pytest.raises(ValueError, match="no such file"):
        get_template(str(tmp_path / "yours.jinja"), TOKENIZER)


THINKING = (  # as Qwen3 does, thoughts are dropped from all answers but the last
    "{% for m in messages %}{{ '[' + m.role + ']' + (m.content if loop.last else m.content.split('</think>')[-1]) + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}")


def test_a_template_that_rewrites_earlier_answers_is_learned_as_it_is_told_or_refused():
    template = JinjaTemplate("thinking", THINKING, TOKENIZER)
    talk = [dict(role="user", content="一"), dict(role="assistant", content="想</think>二"), dict(role="user", content="三"), dict(role="assistant", content="想</think>四")]
    with pytest.raises(ValueError, match="record 1: .*cannot be masked at message 2.*loss_on=last"):
        ConversationDataset([dict(messages=talk)], TOKENIZER, template=template)
    dataset = ConversationDataset([dict(messages=talk)], TOKENIZER, template=template, loss_on="last")
    assert drawn(dataset) == "[user]一§\n[assistant]二§\n[user]三§\n[assistant]⟦想</think>四§⟧"


def test_marks_without_an_end_inside_or_behind_are_refused():
    endless = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}!{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises((ValueError, BadLine), match="does not end an answer|does not end"):
        ConversationDataset([RECORDS["question_answer"]], TOKENIZER, template=JinjaTemplate("endless", endless, TOKENIZER))
    after = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert drawn(ConversationDataset([RECORDS["question_answer"]], TOKENIZER, template=JinjaTemplate("after", after, TOKENIZER))) == "头疼怎么办？⟦多休息。§⟧"


@pytest.mark.parametrize("inside", [True, False])
def test_an_answer_keeps_its_last_line_break_under_marks(inside):
    marks = "{% generation %}{{ m.content + eos_token }}{% endgeneration %}" if inside else "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
    template = JinjaTemplate("marks", "{% for m in messages %}{% if m.role == 'assistant' %}" + marks + "{% else %}{{ m.content }}{% endif %}{% endfor %}", TOKENIZER)
    talk = [dict(role="user", content="头疼？"), dict(role="assistant", content="休息。\n\n")]
    assert template.turns(dict(messages=talk)) == [("头疼？", "休息。\n\n")]
