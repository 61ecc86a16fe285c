"Conversations for training: any text survives, nothing is lost in silence, what is cut is listed, what is broken is named."
import bz2
import gzip
import json
import lzma
import re

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fengshen.data.task_dataloader import datamodule
from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.data.task_dataloader.datamodule import ConversationDataModule
from fengshen.data.task_dataloader.encode import Encoder
from fengshen.data.task_dataloader.medicalQADataset import GPT2QADataModel, GPT2QADataset
from fengshen.data.task_dataloader.templates import get_template
from fengshen.tokenizer import load_tokenizer
from tests.property.test_templates import TOKENIZER as CHAT
from tests.property.test_templates import conversations, full, plain_turn, tool_turn

settings.register_profile("house", deadline=None)  # a loaded machine is not a failure
settings.load_profile("house")

TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
YUYUAN, CHATML = get_template("yuyuan", TOKENIZER), get_template("chatml", CHAT)
pairs = st.lists(st.builds(lambda q, a: dict(question=q, answer=a), full, full), min_size=1, max_size=6)
DATA = [dict(question=f"第{i}个问题？", answer="答" * (1 + i % 7) + "\u2028'\"😀") for i in range(30)]


def scored(sample):
    return sample["labels"][sample["labels"] != -100].tolist()


def learned(dataset):
    "The learned tokens of all samples."
    return sum((scored(dataset[i]) for i in range(len(dataset))), [])


def pair(question, answer):
    return dict(messages=[dict(role="user", content=question), dict(role="assistant", content=answer)])


@given(pairs)
@settings(max_examples=40)
def test_answer_and_end_are_scored_and_decode_to_the_very_text(data):
    dataset = GPT2QADataset(data, TOKENIZER, max_length=4096)
    assert len(dataset) == len(data) and dataset.line.tolist() == [*range(1, len(data) + 1)] and not dataset.state.any()
    for i, record in enumerate(data):
        ids, labels = scored(dataset[i]), dataset[i]["labels"]
        assert ids[-1] == END and END not in ids[:-1], "one end, and it is ours"
        assert TOKENIZER.decode(ids[:-1]) == record["answer"]
        prompt = dataset[i]["input_ids"][: len(labels) - len(ids)].tolist()
        assert prompt == TOKENIZER(f"Question:{record['question']} answer:")["input_ids"], "the prompt generation will make"
        assert (labels[: len(prompt)] == -100).all() and (labels[len(prompt) :] == dataset[i]["input_ids"][len(prompt) :]).all()
        assert dataset.conversation(i)["messages"] == pair(**record)["messages"]
        ids, flags = dataset.encode(dataset.conversation(i))
        assert (ids, flags) == (dataset[i]["input_ids"].tolist(), (labels != -100).tolist())


@given(pairs, st.booleans(), st.booleans())
@settings(max_examples=40)
def test_the_end_is_learned_though_it_is_the_padding_too(data, packing, everything):
    tokenizer = load_tokenizer("fengshen:tokenizer_demo")
    tokenizer.pad_token = tokenizer.eos_token
    module = ConversationDataModule(data, tokenizer=tokenizer, max_length=2048, packing=packing, micro_batch=3, loss_on="all" if everything else "assistant")
    module.setup("fit")
    batches = list(module.train_dataloader())
    ends = sum(int((b["labels"] == END).sum()) for b in batches)
    in_prompt = sum(record["question"].count("<|endoftext|>") for record in data) if everything else 0
    assert ends == len(data) + in_prompt
    assert sum(b["tokens"] for b in batches) == module.sets["train"].report["tokens"]
    assert sum(b["num_labels"] for b in batches) == module.sets["train"].report["scored"]


@given(st.lists(conversations(plain_turn | tool_turn), min_size=1, max_size=6), st.booleans())
@settings(max_examples=25)
def test_batches_hold_every_conversation_once_and_no_label_crosses_a_border(talks, packing):
    module = ConversationDataModule([dict(messages=talk) for talk in talks], tokenizer=CHAT, template="chatml", max_length=4096, packing=packing, micro_batch=2)
    module.setup("fit")
    dataset, seen = module.sets["train"], []
    for batch in module.train_dataloader():
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        positions = batch["position_ids"].numpy() if packing else np.cumsum(batch["attention_mask"].numpy(), 1) - 1
        for row in range(len(ids)):
            borders = np.flatnonzero(positions[row] == 0).tolist()
            for start, stop in zip(borders, borders[1:] + [ids.shape[1]]):
                assert labels[row, start] == -100, "the first token of a document is told by none of its own"
                if (labels[row, start:stop] != -100).any():
                    last = start + int(np.flatnonzero(labels[row, start:stop] != -100)[-1]) + 1
                    seen.append((ids[row, start:last].tolist(), labels[row, start:last].tolist()))
    until = [int(np.flatnonzero(dataset[i]["labels"] != -100)[-1]) + 1 for i in range(len(dataset))]
    want = [(dataset[i]["input_ids"][:n].tolist(), dataset[i]["labels"][:n].tolist()) for i, n in enumerate(until)]
    assert sorted(seen) == sorted(want) and len(want) == len(talks)


# Too long

long_texts = st.lists(full, min_size=1, max_size=12).map("".join)
long_pairs = st.lists(st.builds(lambda q, a: dict(question=q, answer=a), long_texts, long_texts), min_size=1, max_size=4)


@given(long_pairs, st.integers(40, 200))
@settings(max_examples=40)
def test_truncated_is_shorter_and_keeps_the_template(data, max_length):
    dataset = ConversationDataset(data, TOKENIZER, max_length, YUYUAN, on_long="truncate")
    assert len(dataset) == len(data) and dataset.lengths.max() <= max_length
    assert {c["line"] for c in dataset.cuts()} == set(dataset.line[dataset.state == 1].tolist()) and len(dataset.cuts()) == dataset.report["long"]
    for i, record in enumerate(data):
        ids = scored(dataset[i])
        whole = ids[-1] == END
        answer = TOKENIZER.decode(ids[:-1] if whole else ids)
        assert answer == record["answer"] if whole else (record["answer"].startswith(answer.rstrip("\ufffd")) and END not in ids)
        prompt = TOKENIZER.decode(dataset[i]["input_ids"][: -len(ids)])
        assert prompt.startswith("Question:") and prompt.endswith(" answer:")
        assert record["question"].endswith(prompt.removeprefix("Question:").removesuffix(" answer:"))
        if not whole:
            assert len(dataset[i]["input_ids"]) > max_length - 4, "the answer is cut only as far as needed"


@given(long_pairs, st.integers(40, 200))
@settings(max_examples=40)
def test_split_loses_no_token_of_the_answers_and_ends_once(data, max_length):
    dataset = ConversationDataset(data, TOKENIZER, max_length, YUYUAN, on_long="split")
    assert dataset.lengths.max() <= max_length and len(dataset.cuts()) == dataset.report["long"]
    answers = Encoder(TOKENIZER, YUYUAN).said([record["answer"] for record in data])
    assert learned(dataset) == sum((ids + [END] for ids in answers), [])
    assert all(scored(dataset[i]) != [END] for i in range(len(dataset))), "no sample teaches to stop at once"


@given(long_pairs, st.integers(40, 200))
@settings(max_examples=40)
def test_error_and_drop_agree_on_what_is_long(data, max_length):
    lengths = ConversationDataset(data, TOKENIZER, 10**6, YUYUAN).lengths
    long = int((lengths > max_length).sum())
    if not long:
        assert len(ConversationDataset(data, TOKENIZER, max_length, YUYUAN)) == len(data)
        return
    with pytest.raises(ValueError, match=f"{long} of {len(data)} conversations are longer.*drop leaves out {long} conversations"):
        ConversationDataset(data, TOKENIZER, max_length, YUYUAN)
    if long == len(data):
        with pytest.raises(ValueError, match="gives no samples"):
            ConversationDataset(data, TOKENIZER, max_length, YUYUAN, on_long="drop")
        return
    kept = ConversationDataset(data, TOKENIZER, max_length, YUYUAN, on_long="drop")
    assert kept.lengths.tolist() == lengths[lengths <= max_length].tolist()
    assert (kept.report["long"], kept.report["lost"]) == (long, lengths[lengths > max_length].sum())
    assert [c["text"] for c in kept.cuts()] == [(r["question"] + r["answer"])[:2000] for r, n in zip(data, lengths) if n > max_length]


def test_the_price_that_error_names_is_the_one_that_is_paid():
    data = [pair("问" * (20 * i), "答" * (30 * i)) for i in range(1, 6)]
    with pytest.raises(ValueError) as refusal:
        ConversationDataset(data, TOKENIZER, 100, YUYUAN)
    price = re.search(r"drop leaves out (\d+) .*truncate cuts (\d+) tokens.*split makes (\d+) more samples and cuts (\d+) tokens", str(refusal.value).replace(",", ""))
    drop, truncate, split = (ConversationDataset(data, TOKENIZER, 100, YUYUAN, on_long=what) for what in ("drop", "truncate", "split"))
    paid = len(data) - len(drop), truncate.report["lost"], len(split) - len(data), split.report["lost"]
    assert tuple(map(int, price.groups())) == paid
    assert str(refusal.value).count("record 5: ") == 1 and f"{drop.report['lengths']['longest']}" in price.string


SAID = st.builds(lambda text, times: text * times, st.text("头疼怎么办多休息少看手机。\n😀ab ", max_size=12), st.integers(1, 12))
chats = conversations(st.builds(lambda q, a: [dict(role="user", content=q), dict(role="assistant", content=a)], SAID, SAID), SAID)
WORDS = re.compile(r"(?:<\|im_start\|>system\n([^<]*)<\|im_end\|>\n)?<\|im_start\|>user\n([^<]*)<\|im_end\|>\n<\|im_start\|>assistant\n([^<]*)(<\|im_end\|>)?")


@given(chats, st.integers(80, 200))
@settings(max_examples=40)
def test_a_truncated_chat_is_the_end_of_it(talk, max_length):
    try:
        dataset = ConversationDataset([dict(messages=talk)], CHAT, max_length, CHATML, on_long="truncate")
    except ValueError as e:  # the last answers are empty, and all others were left out
        assert "gives no samples" in str(e) and not talk[-1]["content"]
        return
    head, turns = (talk[:1], talk[1:]) if talk[0]["role"] == "system" else ([], talk)
    text = CHAT.decode(dataset[0]["input_ids"])
    assert dataset.lengths[0] <= max_length and dataset.state[0] == dataset.report["long"]
    for k in range(0, len(turns), 2):
        if text == CHATML.history(head + turns[k:-1]) + turns[-1]["content"] + CHATML.end:
            return
    system, question, answer, end = WORDS.fullmatch(text).groups()
    assert turns[-2]["content"].endswith(question) and turns[-1]["content"].startswith(answer) and (system is not None) == bool(head)
    assert not head or head[0]["content"].endswith(system)
    cut = [len(now) for now, whole in ((system or "", head[0]["content"] if head else ""), (question, turns[-2]["content"])) if now != whole]
    assert all(n >= min(len(system or ""), len(question)) // 2 for n in cut), "the longest loses first"
    assert (answer == turns[-1]["content"]) if end else dataset.lengths[0] > max_length - 4


@pytest.mark.parametrize("system, question", [("简短", "问" * 300), ("长" * 300, "问")])
def test_what_is_short_stays_whole_beside_what_is_long(system, question):
    talk = [dict(role="system", content=system), *pair(question, "答")["messages"]]
    dataset = ConversationDataset([dict(messages=talk)], CHAT, 100, CHATML, on_long="truncate")
    told, asked, answer, end = WORDS.fullmatch(CHAT.decode(dataset[0]["input_ids"])).groups()
    assert min(system, question, key=len) in (told, asked) and answer == "答" and end and dataset.lengths[0] > 90


@given(st.lists(chats, min_size=1, max_size=3), st.integers(80, 300))
@settings(max_examples=40)
def test_a_split_chat_learns_every_answer_once(talks, max_length):
    data = [dict(messages=talk) for talk in talks]
    whole = ConversationDataset(data, CHAT, 10**6, CHATML)
    dataset = ConversationDataset(data, CHAT, max_length, CHATML, on_long="split")
    assert dataset.lengths.max() <= max_length and learned(dataset) == learned(whole)
    assert set(dataset.line.tolist()) == set(whole.line.tolist())
    assert [c["line"] for c in dataset.cuts()] == [int(n) for n, tokens in zip(whole.line, whole.lengths) if tokens > max_length]


@given(st.lists(conversations(plain_turn | tool_turn), min_size=1, max_size=3), st.integers(80, 300), st.sampled_from(["assistant", "last", "all"]))
@settings(max_examples=25)
def test_whatever_is_too_long_fits_afterwards(talks, max_length, loss_on):
    "System, tools and trailing questions too: at most `max_length`, nothing to learn is learned twice, every sample has something to learn."
    data = [dict(messages=[*talk, dict(role="user", content="还有" * 20)]) for talk in talks]
    whole = ConversationDataset(data, CHAT, 10**6, CHATML, loss_on=loss_on, on_bad_line="skip") if loss_on != "last" or any(
        t[-1]["content"] or t[-1].get("tool_calls") for t in talks) else None
    for what in ("truncate", "split", "drop") if whole else ():
        try:
            dataset = ConversationDataset(data, CHAT, max_length, CHATML, on_long=what, loss_on=loss_on, on_bad_line="skip")
        except ValueError as e:
            assert "gives no samples" in str(e)
            continue
        assert dataset.lengths.max() <= max_length
        assert all(len(scored(dataset[i])) for i in range(len(dataset)))
        if loss_on != "all":
            assert len(learned(dataset)) <= len(learned(whole))
        if loss_on == "last" and what == "truncate":
            assert len(dataset) <= len(whole)


@given(st.text("头疼怎么办", min_size=1, max_size=10), st.text("多休息。\n😀", min_size=100, max_size=300), st.integers(200, 260))
@settings(max_examples=20)
def test_a_tool_call_is_learned_once_however_long_the_answer_is(question, answer, max_length):
    call = dict(type="function", function=dict(name="查", arguments={"词": question}))
    talk = [dict(role="user", content=question), dict(role="assistant", content="", tool_calls=[call]), dict(role="tool", content="见下"), dict(role="assistant", content=answer)]
    whole, parts = (ConversationDataset([dict(messages=talk)], CHAT, n, CHATML, on_long="split") for n in (10**6, max_length))
    assert learned(parts) == learned(whole) and parts.lengths.max() <= max_length
    assert all("</tool_call>" in CHAT.decode(parts[i]["input_ids"]) for i in range(len(parts))), "each part has the call before it"


def test_a_thousand_turns_are_divided():
    turns = sum(([dict(role="user", content=f"第{i}问"), dict(role="assistant", content=f"第{i}答")] for i in range(3000)), [])
    data = [dict(messages=[dict(role="system", content="简短"), *turns])]
    dataset = ConversationDataset(data, TOKENIZER, 128, YUYUAN, on_long="split")
    assert "".join(text for i in range(len(dataset)) for on, text in dataset.texts(i) if on) == "".join(f"第{i}答<|endoftext|>" for i in range(3000))
    assert all(dataset.texts(i)[0][1].startswith("简短\nQuestion:") for i in range(len(dataset))) and dataset.lengths.mean() > 64
    last = ConversationDataset(data, TOKENIZER, 128, YUYUAN, on_long="truncate")
    assert last.texts(0)[-1] == (True, "第2999答<|endoftext|>") and last.lengths[0] > 64


def test_plain_text_is_cut_and_split_too():
    data = [dict(text="头疼多休息。" * 50)]
    cut, parts = (ConversationDataset(data, TOKENIZER, 64, YUYUAN, on_long=what) for what in ("truncate", "split"))
    assert cut[0]["input_ids"][-1] != END and (cut.state.tolist(), parts.state.max(), parts.state.min()) == ([1], 2, 2)
    assert "".join(TOKENIZER.decode(parts[i]["input_ids"]) for i in range(len(parts))) == data[0]["text"] + "<|endoftext|>"


# Files

def write(folder, name, lines, opener=open, eol="\n", start=""):
    path = folder / name
    with opener(path, "wb") as f:
        f.write((start + eol.join(lines) + eol).encode())
    return path


def test_every_kind_of_file_gives_the_same_samples(tmp_path):
    as_json = [json.dumps(p, ensure_ascii=False) for p in DATA]
    chat = [json.dumps(pair(**p)) for p in DATA]
    files = [
        write(tmp_path, "a.jsonl", as_json), write(tmp_path, "b.txt", [repr(dict(Question=p["question"], answer=p["answer"])) for p in DATA]),
        write(tmp_path, "c.jsonl", [json.dumps(p) for p in DATA], eol="\r\n", start="\ufeff"), write(tmp_path, "d.jsonl.xz", as_json, lzma.open),
        write(tmp_path, "e.jsonl.gz", as_json, gzip.open), write(tmp_path, "f.json", [json.dumps(DATA)]), write(tmp_path, "g.jsonl.bz2", chat, bz2.open),
        write(tmp_path, "h.jsonl", [line for pair in zip(as_json, [""] * 10 + ["  "] * 20) for line in pair]),
    ]
    want = ConversationDataset(DATA, TOKENIZER).fingerprint
    assert [ConversationDataset(f, TOKENIZER).fingerprint for f in files] == [want] * len(files)
    assert ConversationDataset(str(files[0]), TOKENIZER, limit=7).fingerprint == ConversationDataset(DATA[:7], TOKENIZER).fingerprint != want
    several = ConversationDataset([str(f) for f in files[:3]], TOKENIZER)
    assert len(several) == 90 and [several.files[f] for f in several.file[[0, 30, 60]]] == [str(f) for f in files[:3]]
    assert several.report["duplicates"] == 60 and several.conversation(75)["messages"] == pair(**DATA[15])["messages"]


def test_samples_know_their_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", ["", json.dumps(DATA[0]), "nothing", "", json.dumps(pair("问", "答" * 200)), json.dumps(DATA[1])])
    dataset = ConversationDataset(path, TOKENIZER, 64, shape="question_answer", on_bad_line="skip")
    assert dataset.line.tolist() == [2, 6] and [number for _, number, _ in dataset.report["bad_lines"]] == [3, 5]
    dataset = ConversationDataset([*DATA[:2], dict(DATA[2], answer="答" * 200)], TOKENIZER, 64, on_long="split")
    assert dataset.line.tolist()[:3] == [1, 2, 3] and set(dataset.line.tolist()[2:]) == {3} and dataset.state.tolist()[:2] == [0, 0] and set(dataset.state[2:].tolist()) == {2}


BAD = [
    b"null", b"[]", b'"text"', b"{}", b"\x00", b"{1: 2}", b'{"question": "a"}', b'{"question": "a", "answer": " \\n"}', b'{"question": "", "answer": "b"}',
    b'{"question": "a", "answer": NaN}', b'{"question": ["a"], "answer": "b"}', b'{"question": "a", "answer": "b"', b"{'question': 'a', 'answer': '\\ud83d'}",
    "{'question': '问', 'answer': '答'}".encode("gb18030"), b"{'question': open('x', 'w'), 'answer': 'b'}", b"[" * 100_000, b"(" * 300 + b")" * 300,
]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_refused_with_its_number_or_counted(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / "data.jsonl", json.dumps(DATA[0], ensure_ascii=False).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: (?s:.)*on_bad_line=skip") as refusal:
        ConversationDataset(path, TOKENIZER)
    assert len(str(refusal.value)) < 1500
    dataset = ConversationDataset(path, TOKENIZER, on_bad_line="skip")
    assert len(dataset) == 2 and dataset.report["bad"] == 1
    (skipped,) = map(json.loads, (dataset.folder / "skipped.jsonl").read_text("utf-8").splitlines())
    assert skipped["file"] == str(path) and skipped["line"] == 2 and skipped["reason"] == dataset.report["bad_lines"][0][2] and len(skipped["text"]) < 1100
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}, "nothing was run"


def test_what_a_template_has_no_place_for_is_a_bad_line(tmp_path):
    talk = [dict(role="user", content="热吗"), dict(role="assistant", content="查"), dict(role="tool", content="三十度"), dict(role="assistant", content="热")]
    path = write(tmp_path, "a.jsonl", [json.dumps(pair("问", "答")), json.dumps(dict(messages=talk))])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the template 'ziya' has no place .* 'tool'"):
        ConversationDataset(path, TOKENIZER, template="ziya")
    assert ConversationDataset(path, TOKENIZER, template="ziya", on_bad_line="skip").report["bad"] == 1
    picky = tmp_path / "picky.jinja"
    picky.write_text("{% for m in messages %}{% if '热' in m.content %}{{ raise_exception('too hot') }}{% endif %}{{ m.content + eos_token }}{% endfor %}", "utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*refuses the conversation: too hot"):
        ConversationDataset(path, TOKENIZER, template=str(picky))


def test_a_template_that_refuses_what_was_cut_from_it_makes_a_bad_line(tmp_path):
    picky = tmp_path / "picky.jinja"
    picky.write_text("{% for m in messages %}{% if m.content.startswith('长') %}{{ raise_exception('headless') }}{% endif %}{{ m.content + eos_token }}{% endfor %}", "utf-8")
    talk = [dict(role="system", content="头" + "长" * 300), *pair("问", "答" * 300)["messages"]]
    path = write(tmp_path, "a.jsonl", [json.dumps(pair("问", "答")), json.dumps(dict(messages=talk))])
    assert len(ConversationDataset(path, TOKENIZER, template=str(picky))) == 2
    for what in ("error", "truncate", "split"):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*refuses the conversation: headless"):
            ConversationDataset(path, TOKENIZER, 64, str(picky), on_long=what)
        if what != "error":
            assert ConversationDataset(path, TOKENIZER, 64, str(picky), on_long=what, on_bad_line="skip").line.tolist() == [1]


def test_a_last_answer_that_is_empty_cannot_be_learned_alone(tmp_path):
    talk = dict(messages=[*pair("一", "二")["messages"], *pair("三", "")["messages"]])
    path = write(tmp_path, "a.jsonl", [json.dumps(pair("问", "答")), json.dumps(talk)])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: there is nothing to learn"):
        ConversationDataset(path, TOKENIZER, loss_on="last")
    dataset = ConversationDataset(path, TOKENIZER, loss_on="last", on_bad_line="skip")
    assert len(dataset) == 1 and json.loads((dataset.folder / "skipped.jsonl").read_text("utf-8"))["line"] == 2
    assert len(ConversationDataset(path, TOKENIZER)) == 2


def test_the_report_keeps_twenty_bad_lines_and_counts_all(tmp_path):
    path = write(tmp_path, "a.jsonl", [json.dumps(DATA[0])] + ["x"] * 50)
    dataset = ConversationDataset(path, TOKENIZER, on_bad_line="skip")
    assert dataset.report["bad"] == 50 and len(dataset.report["bad_lines"]) == 20 and dataset.report["bad_lines"][0][1] == 2
    assert len((dataset.folder / "skipped.jsonl").read_text("utf-8").splitlines()) == 50
    with pytest.raises(ValueError, match="record 2: no 'answer'"):
        ConversationDataset([DATA[0], dict(question="问")], TOKENIZER)
    with pytest.raises(ValueError, match="gives no samples"):
        ConversationDataset([], TOKENIZER)


@pytest.mark.parametrize("name, value", [("loss_on", "answers"), ("on_long", "cut"), ("on_bad_line", "ignore"), ("shape", "sharegtp")])
def test_an_unknown_choice_is_refused(name, value):
    with pytest.raises(ValueError, match=f"unknown {name}: got '{value}'"):
        ConversationDataset(DATA, TOKENIZER, **{name: value})


# Tokenizers

def test_a_tokenizer_without_an_end_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n头\n疼\n休\n息\n", "utf8")
    bert = BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no end-of-text token.*"eos_token"'):
        ConversationDataset(DATA, bert)
    bert = load_tokenizer(tmp_path)
    assert bert.eos_token == "[SEP]"
    dataset = ConversationDataset([dict(question="头疼", answer="休息")], bert, template="{question}{answer}")
    assert dataset[0]["input_ids"].tolist() == [5, 6, 7, 8, 3] and scored(dataset[0]) == [7, 8, 3]
    with pytest.raises(ValueError, match="record 1: there is nothing to learn"):
        ConversationDataset([dict(question="头疼", answer="\u200b")], bert, template="{question}{answer}")


def test_a_begin_token_that_generation_has_is_there_too():
    from tokenizers import processors

    llama = load_tokenizer("fengshen:tokenizer_demo")
    llama.bos_token = llama.pad_token  # another id than the end, for this test
    llama.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", PAD)])
    dataset = ConversationDataset(DATA[:3], llama)
    for i, record in enumerate(DATA[:3]):
        prompt = llama(f"Question:{record['question']} answer:")["input_ids"]
        assert prompt[0] == PAD and dataset[i]["input_ids"][: len(prompt)].tolist() == prompt and (dataset[i]["input_ids"] == PAD).sum() == 1
        assert llama.decode(scored(dataset[i])) == record["answer"] + "<|endoftext|>"
    text = ConversationDataset([dict(text="头疼")], llama)
    assert text[0]["input_ids"][0] == PAD and llama.decode(scored(text[0])) == "头疼<|endoftext|>"
    assert text.encode(text.conversation(0))[0] == text[0]["input_ids"].tolist(), "compared as it was tokenised"


def test_ids_are_stored_in_two_bytes_where_the_vocabulary_allows():
    dataset = ConversationDataset(DATA * 50, TOKENIZER)
    assert dataset.ids.dtype == np.uint16 and dataset.ids.nbytes == 2 * dataset.report["tokens"]
    assert [dataset[-1][k].tolist() for k in dataset[-1]] == [dataset[len(dataset) - 1][k].tolist() for k in dataset[-1]]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


# For a trainer

class Counter(pl.LightningModule):
    "Counts what it is trained and validated on."

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer, self.weight, self.counts = tokenizer, torch.nn.Parameter(torch.zeros(())), dict(train=0, valid=0)

    def training_step(self, batch, i):
        assert batch["step_labels"] >= batch["num_labels"]
        self.counts["train"] += batch["num_labels"]
        return self.weight * 1.0

    def validation_step(self, batch, i):
        self.counts["valid"] += batch["num_labels"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [True, False])
def test_a_trainer_sees_every_scored_token_once_an_epoch(packing):
    module = Counter(TOKENIZER)
    data = GPT2QADataModel(DATA, DATA[:11], max_length=64, packing=packing, micro_batch=2, valid_micro_batch=3)
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=4, accelerator="cpu", logger=False, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(module, data)
    assert module.counts == {split: data.sets[split].report["scored"] for split in ("train", "valid")}
    assert trainer.global_step == len(data.train_dataloader()) // 4


def test_padded_samples_of_like_length_come_in_the_order_of_seed_and_epoch_alone(monkeypatch):
    def order(few=8, **settings):
        monkeypatch.setattr(datamodule, "FEW", few)
        module = ConversationDataModule(DATA * 10, tokenizer=TOKENIZER, max_length=64, packing=False, **settings)
        module.setup("fit")
        return module.order()

    one, two, other = order(), order(micro_batch=3), order(seed=7)
    assert [o(3).tolist() for o in (two, one)] == [one(3).tolist()] * 2, "the micro-batch has no say"
    assert one(0).tolist() != one(1).tolist() and one(0).tolist() != other(0).tolist()
    assert all(sorted(one(epoch).tolist()) == [*range(300)] for epoch in range(3))
    assert order(few=2048) is None, "few samples are just shuffled"


@pytest.mark.parametrize("packing", [True, False])
def test_sources_by_weight_come_in_the_order_of_seed_and_epoch_alone(tmp_path, packing):
    files = {str(write(tmp_path, name, map(json.dumps, DATA[a:b]))): weight for name, a, b, weight in (("a.jsonl", 0, 20, 1), ("b.jsonl", 20, 30, 3))}

    def order(**settings):
        module = ConversationDataModule(files, tokenizer=TOKENIZER, max_length=64, packing=packing, **settings)
        module.setup("fit")
        return module

    module = order()
    one, first = module.order(), module.sets["train_rows"].group_sizes[0] if packing else 20
    assert one(4).tolist() == order(micro_batch=2).order()(4).tolist() != order(seed=1).order()(4).tolist()
    assert abs((one(0) < first).sum() - one.size / 4) <= 1
    assert set(np.concatenate([one(epoch) for epoch in range(5)]).tolist()) == {*range(len(module.samples("train")))}, "every sample has its turn"
    if packing:
        files_of = [{int(module.sets["train"].file[i]) for i in row} for row in module.sets["train_rows"].rows]
        assert all(len(found) == 1 for found in files_of), "a row is of one source"


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="no tokenizer.*data.tokenizer"):
        ConversationDataModule(DATA).setup("fit")
    with pytest.raises(ValueError, match="call setup"):
        ConversationDataModule(DATA, tokenizer=TOKENIZER).train_dataloader()
    data = ConversationDataModule(DATA, tokenizer=TOKENIZER, valid=DATA[:3])
    data.setup("validate")
    assert set(data.sets) == {"valid", "valid_rows"}, "validation does not read the training data"
    with pytest.raises(ValueError, match="no such file"):
        ConversationDataModule("没有.jsonl", tokenizer=TOKENIZER).setup("fit")


@pytest.mark.parametrize("make", [ConversationDataModule, GPT2QADataModel])
def test_the_command_line_takes_its_types(make):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(make, "data")
    values = parser.parse_args("--data.train a.jsonl --data.max_length 64 --data.packing false --data.valid_micro_batch null".split()).data
    assert (values.train, values.max_length, values.packing, values.valid_micro_batch, values.tokenizer) == ("a.jsonl", 64, False, None, None)
    several = parser.parse_args(["--data.train", '["a.jsonl", "b/"]', "--data.valid", "c.json"]).data
    assert several.train == ["a.jsonl", "b/"]
    assert parser.parse_args(["--data.train", '{"a.jsonl": 3, "b.jsonl": 0.5}']).data.train == {"a.jsonl": 3, "b.jsonl": 0.5}


def test_questions_to_ask_are_the_file_s_own_text():
    data = ConversationDataModule(DATA, [dict(question="长" * 500, answer="x")] + DATA[3:5], tokenizer=TOKENIZER, max_length=100, on_long="truncate")
    data.setup("fit")
    assert data.prompts(5) == [(p["question"], f"Question:{p['question']} answer:", p["answer"]) for p in DATA[3:5]]
    chat = ConversationDataModule(valid=[dict(messages=[*pair("一", "二")["messages"], *pair("三", "四")["messages"]])], tokenizer=TOKENIZER, template="ziya", max_length=100)
    chat.setup("validate")
    assert chat.prompts() == [("三", "<human>:一\n<bot>:二<|endoftext|>\n<human>:三\n<bot>:", "四")]


def test_real_chinese_pairs(shared):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "gpt2")
    path = shared / "data" / "medical_qa" / "medqa_zh_valid.jsonl.xz"
    dataset = ConversationDataset(path, tokenizer, on_long="split", limit=200)
    with lzma.open(path, "rt", encoding="utf-8") as f:
        answers = [json.loads(line)["answer"] for line, _ in zip(f, range(200))]
    assert tokenizer.decode(learned(dataset)) == tokenizer.eos_token.join(answers) + tokenizer.eos_token
    assert 400 < dataset.report["lengths"]["median"] < 650 and dataset.report["long"] > 10
