"Question-answer data: any text survives, nothing is lost in silence, broken files are named."

import gzip
import json
import lzma

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen.data.task_dataloader.medicalQADataset import BadLine, Encoder, GPT2QADataModel, GPT2QADataset, Template, field, parse_line
from fengshen.tokenizer import load_tokenizer

settings.register_profile("house", deadline=None)  # a loaded machine is not a failure
settings.load_profile("house")

TOKENIZER = load_tokenizer("fengshen:tokenizer_demo")
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
hard = [
    "<|endoftext|>", "{answer}", "{question}", "answer:", "\r\n", "\u2028", "\x00",
    "👩‍👩‍👧‍👦", "🇨🇳", "頭疼", "，。？", "é", "e\u0301", "\ufeff", "'\"\\", "  ",
]
anything, chinese = st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text("头疼怎么办多休息少看手机", max_size=30)
pieces = st.one_of(st.sampled_from(hard), anything, chinese)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join).filter(str.strip)
pairs = st.lists(st.builds(lambda q, a: dict(question=q, answer=a), texts, texts), min_size=1, max_size=6)


def scored(sample):
    return sample["labels"][sample["labels"] != -100].tolist()


@given(pairs)
def test_answer_and_end_are_scored_and_decode_to_the_very_text(data):
    dataset = GPT2QADataset(data, TOKENIZER, max_length=4096)
    assert len(dataset) == len(data)
    for i, pair in enumerate(data):
        ids, labels = scored(dataset[i]), dataset[i]["labels"]
        assert ids[-1] == END and END not in ids[:-1], "one end, and it is ours"
        assert TOKENIZER.decode(ids[:-1]) == pair["answer"] == dataset.answer(i)
        prompt = dataset[i]["input_ids"][: len(labels) - len(ids)].tolist()
        assert prompt == TOKENIZER(f"Question:{pair['question']} answer:")["input_ids"], "the prompt generation will make"
        assert (labels[: len(prompt)] == -100).all() and (labels[len(prompt) :] == dataset[i]["input_ids"][len(prompt) :]).all()


@given(pairs, st.booleans(), st.booleans())
def test_the_end_is_learned_though_it_is_the_padding_too(data, packing, everything):
    tokenizer = load_tokenizer("fengshen:tokenizer_demo")
    tokenizer.pad_token = tokenizer.eos_token
    module = GPT2QADataModel(data, tokenizer=tokenizer, max_length=2048, packing=packing, micro_batch=3, loss_on="all" if everything else "answer")
    module.setup("fit")
    batches = list(module.train_dataloader())
    ends = sum(int((b["labels"] == END).sum()) for b in batches)
    in_prompt = sum(pair["question"].count("<|endoftext|>") for pair in data) if everything else 0
    assert ends == len(data) + in_prompt
    assert sum(b["tokens"] for b in batches) == module.sets["train"].report["tokens"]
    assert sum(b["num_labels"] for b in batches) == module.sets["train"].report["scored"]


long_texts = st.lists(texts, min_size=1, max_size=12).map("".join)
long_pairs = st.builds(lambda q, a: dict(question=q, answer=a), long_texts, long_texts)


@given(st.lists(long_pairs, min_size=1, max_size=4), st.integers(40, 200))
@settings(max_examples=60)
def test_truncated_is_shorter_and_keeps_the_template(data, max_length):
    dataset = GPT2QADataset(data, TOKENIZER, max_length=max_length, on_long="truncate")
    assert len(dataset) == len(data) and dataset.lengths.max() <= max_length
    for i, pair in enumerate(data):
        ids = scored(dataset[i])
        whole = ids[-1] == END
        answer = TOKENIZER.decode(ids[:-1] if whole else ids)
        assert answer == pair["answer"] if whole else (pair["answer"].startswith(answer.rstrip("\ufffd")) and END not in ids)
        prompt = TOKENIZER.decode(dataset[i]["input_ids"][: -len(ids)])
        assert prompt.startswith("Question:") and prompt.endswith(" answer:") and pair["question"].endswith(dataset.question(i))
        if not whole:
            assert len(dataset[i]["input_ids"]) > max_length - 4, "the answer is cut only as far as needed"


@given(st.lists(long_pairs, min_size=1, max_size=4), st.integers(40, 200))
@settings(max_examples=60)
def test_split_loses_no_token_of_the_answers_and_ends_once(data, max_length):
    dataset = GPT2QADataset(data, TOKENIZER, max_length=max_length, on_long="split")
    assert dataset.lengths.max() <= max_length
    learned = sum((scored(dataset[i]) for i in range(len(dataset))), [])
    answers = Encoder(TOKENIZER).answers([pair["answer"] for pair in data])
    assert learned == sum((ids + [END] for ids in answers), [])
    assert all(scored(dataset[i]) != [END] for i in range(len(dataset))), "no sample teaches to stop at once"


@given(st.lists(long_pairs, min_size=1, max_size=6), st.integers(40, 200))
@settings(max_examples=60)
def test_error_and_drop_agree_on_what_is_long(data, max_length):
    lengths = GPT2QADataset(data, TOKENIZER, max_length=10**6).lengths
    long = int((lengths > max_length).sum())
    if not long:
        assert len(GPT2QADataset(data, TOKENIZER, max_length=max_length)) == len(data)
        return
    with pytest.raises(ValueError, match=f"{long} of {len(data)} pairs are longer.*drop leaves out {long} pairs"):
        GPT2QADataset(data, TOKENIZER, max_length=max_length)
    if long < len(data):
        kept = GPT2QADataset(data, TOKENIZER, max_length=max_length, on_long="drop")
        assert kept.lengths.tolist() == lengths[lengths <= max_length].tolist() and kept.report["long"] == long
    else:
        with pytest.raises(ValueError, match="gives no samples"):
            GPT2QADataset(data, TOKENIZER, max_length=max_length, on_long="drop")


def write(folder, name, lines, opener=open, eol="\n", start=""):
    path = folder / name
    with opener(path, "wb") as f:
        f.write((start + eol.join(lines) + eol).encode())
    return path


DATA = [dict(question=f"第{i}个问题？", answer="答" * (1 + i % 7) + "\u2028'\"😀") for i in range(30)]


def test_every_kind_of_file_gives_the_same_samples(tmp_path):
    as_json = [json.dumps(p, ensure_ascii=False) for p in DATA]
    originals = [repr(dict(Question=p["question"], answer=p["answer"])) for p in DATA]
    escaped = [json.dumps(p) for p in DATA]
    files = [
        write(tmp_path, "a.jsonl", as_json), write(tmp_path, "b.txt", originals), write(tmp_path, "c.jsonl", escaped, eol="\r\n", start="\ufeff"),
        write(tmp_path, "d.jsonl.xz", as_json, lzma.open), write(tmp_path, "e.jsonl.gz", as_json, gzip.open),
        write(tmp_path, "f.jsonl", [line for pair in zip(as_json, [""] * 10 + ["  "] * 20) for line in pair]),
    ]
    want = GPT2QADataset(DATA, TOKENIZER).fingerprint
    assert [GPT2QADataset(f, TOKENIZER).fingerprint for f in files] == [want] * len(files)
    assert GPT2QADataset(str(files[0]), TOKENIZER, limit=7).fingerprint == GPT2QADataset(DATA[:7], TOKENIZER).fingerprint != want


def test_a_damaged_archive_is_named(tmp_path):
    for name, opener in (("a.jsonl.xz", lzma.open), ("a.jsonl.gz", gzip.open)):
        path = write(tmp_path, name, [json.dumps(dict(question=str(i), answer=str(i * 7919))) for i in range(5000)], opener)
        for content in (path.read_bytes()[:-40], b"not an archive"):
            (tmp_path / ("x" + name)).write_bytes(content)
            with pytest.raises(ValueError, match="cannot decompress the file"):
                GPT2QADataset(tmp_path / ("x" + name), TOKENIZER)


BAD = [
    b"", b"null", b"[]", b"3", b'"text"', b"{}", b"\x00", b"{'a': 1}", b"{1: 2}",
    b'{"question": "a"}', b'{"question": "a", "answer": ""}', b'{"question": "a", "answer": " \\n"}', b'{"question": "", "answer": "b"}',
    b'{"question": "a", "answer": 1}', b'{"question": "a", "answer": null}', b'{"question": ["a"], "answer": "b"}',
    b'{"question": "a", "answer": "b"', b'{"question": "a", "answer": "\\ud83d"}', b"{'question': 'a', 'answer': '\\ud83d'}",
    b"{'question': 'a', 'answer': b'b'}",
    "{'question': '问', 'answer': '答'}".encode("gb18030"), b"{'question': 'a',\x00 'answer': 'b'}",
    b"{'question': open('x', 'w'), 'answer': 'b'}", b"__import__('os').system('touch owned')",
    b"[" * 100_000, b"{" * 100_000, b"-" * 50_000 + b"1", b"(" * 300 + b")" * 300,
]


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_refused_with_its_number_or_counted(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.jsonl"
    good = json.dumps(DATA[0], ensure_ascii=False).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    if line.strip():
        with pytest.raises(ValueError, match=r"data\.jsonl, line 2: (?s:.)*on_bad_line=skip") as refusal:
            GPT2QADataset(path, TOKENIZER)
        assert len(str(refusal.value)) < 1500
    dataset = GPT2QADataset(path, TOKENIZER, on_bad_line="skip")
    assert len(dataset) == 2 and dataset.report["bad"] == bool(line.strip())
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}, "nothing was run"


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_random_bytes_are_a_record_or_a_bad_line(line):
    try:
        record = parse_line(line)
        field(record, "question"), field(record, "answer")
    except BadLine as e:
        assert str(e)


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))


@given(st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3)))
def test_any_record_is_a_text_or_a_bad_line(record):
    for value in (record, dict(question=record)):
        try:
            assert isinstance(field(value, "question"), str)
        except BadLine as e:
            assert str(e)


def test_the_report_keeps_twenty_bad_lines_and_counts_all(tmp_path):
    path = write(tmp_path, "a.jsonl", [json.dumps(DATA[0])] + ["x"] * 50)
    report = GPT2QADataset(path, TOKENIZER, on_bad_line="skip").report
    assert report["bad"] == 50 and len(report["bad_lines"]) == 20 and report["bad_lines"][0][0] == 2
    with pytest.raises(ValueError, match="record 2: no 'answer'"):
        GPT2QADataset([DATA[0], dict(question="问")], TOKENIZER)
    with pytest.raises(ValueError, match="gives no samples"):
        GPT2QADataset([], TOKENIZER)


@pytest.mark.parametrize("name, value", [("loss_on", "answers"), ("on_long", "cut"), ("on_bad_line", "ignore")])
def test_an_unknown_choice_is_refused(name, value):
    with pytest.raises(ValueError, match=f"unknown {name}: got '{value}'"):
        GPT2QADataset(DATA, TOKENIZER, **{name: value})


USELESS = ["", "{question}", "{answer}", "{answer}{question}", "{question}{answer}。", "{question}{question}{answer}", "{question} {answer}{answer}"]


@pytest.mark.parametrize("prompt", USELESS)
def test_a_template_that_would_lose_something_is_refused(prompt):
    with pytest.raises(ValueError, match="the prompt cannot be used"):
        Template(prompt)


@given(st.text("问答{}:<|>\n", max_size=12).filter(lambda t: "{question}" not in t and "{answer}" not in t), texts)
def test_a_template_with_braces_is_text(words, question):
    assert Template(words + "{question}" + words + "{answer}")(question) == words + question + words


def test_a_tokenizer_without_an_end_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n头\n疼\n休\n息\n", "utf8")
    bert = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match='no end-of-text token.*"eos_token"'):
        GPT2QADataset(DATA, bert)
    bert.eos_token = "[SEP]"
    dataset = GPT2QADataset([dict(question="头疼", answer="休息")], bert, prompt="{question}{answer}")
    assert dataset[0]["input_ids"].tolist() == [5, 6, 7, 8, 3] and scored(dataset[0]) == [7, 8, 3]
    with pytest.raises(ValueError, match="record 1: the tokenizer finds no token"):
        GPT2QADataset([dict(question="头疼", answer="\u200b")], bert, prompt="{question}{answer}")


def test_a_begin_token_that_generation_has_is_learned_too():
    from tokenizers import processors

    llama = load_tokenizer("fengshen:tokenizer_demo")
    llama.bos_token = llama.pad_token  # another id than the end, for this test
    llama.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", PAD)])
    dataset = GPT2QADataset(DATA[:3], llama)
    for i, pair in enumerate(DATA[:3]):
        prompt = llama(f"Question:{pair['question']} answer:")["input_ids"]
        assert prompt[0] == PAD and dataset[i]["input_ids"][: len(prompt)].tolist() == prompt
        assert dataset.question(i) == pair["question"] and dataset.answer(i) == pair["answer"]


def test_ids_are_stored_in_four_bytes():
    dataset = GPT2QADataset(DATA * 50, TOKENIZER)
    assert dataset.ids.dtype == np.int32 and dataset.ids.nbytes == 4 * dataset.report["tokens"]
    assert [dataset[-1][k].tolist() for k in dataset[-1]] == [dataset[len(dataset) - 1][k].tolist() for k in dataset[-1]]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


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


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="no tokenizer.*data.tokenizer"):
        GPT2QADataModel(DATA).setup("fit")
    with pytest.raises(ValueError, match="call setup"):
        GPT2QADataModel(DATA, tokenizer=TOKENIZER).train_dataloader()
    data = GPT2QADataModel(DATA, tokenizer=TOKENIZER, valid=DATA[:3])
    data.setup("validate")
    assert set(data.sets) == {"valid", "valid_rows"}, "validation does not read the training data"
    with pytest.raises(ValueError, match="no such file"):
        GPT2QADataModel("没有.jsonl", tokenizer=TOKENIZER).setup("fit")


def test_the_command_line_takes_its_types():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GPT2QADataModel, "data")
    values = parser.parse_args("--data.train a.jsonl --data.max_length 64 --data.packing false --data.valid_micro_batch null".split()).data
    assert (values.train, values.max_length, values.packing, values.valid_micro_batch, values.tokenizer) == ("a.jsonl", 64, False, None, None)


def test_questions_to_ask_are_the_file_s_own_text():
    data = GPT2QADataModel(DATA, [dict(question="长" * 500, answer="x")] + DATA[3:5], tokenizer=TOKENIZER, max_length=100)
    assert data.prompts(5) == [(p["question"], f"Question:{p['question']} answer:", p["answer"]) for p in DATA[3:5]]


def test_real_chinese_pairs(shared):
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / "gpt2")
    path = shared / "data" / "medical_qa" / "medqa_zh_valid.jsonl.xz"
    dataset = GPT2QADataset(path, tokenizer, on_long="split", limit=200)
    with lzma.open(path, "rt", encoding="utf-8") as f:
        answers = [json.loads(line)["answer"] for line, _ in zip(f, range(200))]
    learned = sum((scored(dataset[i]) for i in range(len(dataset))), [])
    assert tokenizer.decode(learned) == tokenizer.eos_token.join(answers) + tokenizer.eos_token
    assert 400 < dataset.report["lengths"]["median"] < 650 and dataset.report["long"] > 10
