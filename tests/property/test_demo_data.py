"""The packaged demo data: every line is a pair, the tokenizer loses nothing, and the model's numbers are the tokenizer's."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from fengshen.utils.resources import resource

TOKENIZER = AutoTokenizer.from_pretrained(resource("fengshen:tokenizer_demo"))
SPECIAL = ("<|endoftext|>", "<|pad|>")
PROMPT = "Question:{question} answer:"


def pairs(name):
    "The pairs of a packaged file; the file is UTF-8 without a byte-order mark, and every line ends in a newline."
    raw = resource(f"fengshen:qa_demo/{name}.jsonl").read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf") and raw.endswith(b"\n") and b"\r" not in raw
    return [json.loads(line) for line in raw.decode("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["train", "valid"])
def test_every_line_is_a_pair_of_plain_strings(name):
    for row in pairs(name):
        assert set(row) == {"question", "answer"}
        assert all(isinstance(text, str) and text == text.strip() and text.isprintable() for text in row.values())
        assert 8 <= len(row["answer"]) <= 40, row


def test_no_two_training_pairs_ask_or_say_the_same():
    rows = pairs("train")
    for key in ("question", "answer"):
        assert len({"".join(filter(str.isalnum, row[key])) for row in rows}) == len(rows)


def test_an_untrained_guess_cannot_pass_for_an_answer():
    "The demo calls an answer learnt at a character F1 of 0.8: no answer may reach that for another question."
    from fengshen.metric import char_f1

    answers = [row["answer"] for row in pairs("train")]
    close = [(a, b) for i, a in enumerate(answers) for b in answers[:i] if float(char_f1(a, b)) >= 0.8]
    assert not close, close


def test_prompt_and_answer_tokenised_apart_are_the_tokens_of_the_whole():
    "Otherwise the first token of an answer would depend on how the training data joins the two."
    for row in pairs("train") + pairs("valid"):
        prompt = PROMPT.format(**row)
        assert TOKENIZER(prompt)["input_ids"] + TOKENIZER(row["answer"])["input_ids"] == TOKENIZER(prompt + row["answer"])["input_ids"], row


@settings(max_examples=300, deadline=None)
@given(st.text().filter(lambda text: not any(special in text for special in SPECIAL)))
def test_any_text_survives_the_round_trip(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert not {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} & set(ids)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=8))
def test_broken_utf8_from_a_model_decodes_to_something_printable(raw):
    "A half-trained model emits bytes that are no character; decoding must not raise."
    byte_ids = [TOKENIZER.convert_tokens_to_ids(token) for token in byte_tokens(raw)]
    assert None not in byte_ids
    assert TOKENIZER.decode(byte_ids) == raw.decode("utf-8", errors="replace")


def byte_tokens(raw):
    "The vocabulary's names of single bytes: printable Latin-1 as it is, the rest moved above 255."
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(moved)}
    return [names[byte] for byte in raw]


def test_every_byte_is_a_token_of_its_own():
    ids = {TOKENIZER.convert_tokens_to_ids(token) for token in byte_tokens(bytes(range(256)))}
    assert len(ids) == 256 and None not in ids


def test_the_model_fits_the_tokenizer():
    config = AutoConfig.from_pretrained(resource("fengshen:models/gpt2_demo.json"))
    assert config.vocab_size == len(TOKENIZER)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    assert config.pad_token_id != config.eos_token_id
    longest = max(len(TOKENIZER(PROMPT.format(**row) + row["answer"])["input_ids"]) + 1 for row in pairs("train") + pairs("valid"))
    assert longest <= config.n_positions


def test_what_ships_is_small():
    folder = resource("fengshen:tokenizer_demo")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
