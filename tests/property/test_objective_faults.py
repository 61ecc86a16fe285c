"""Bad input of objectives: what they cannot learn from is refused in words, and what is poor but allowed loses no text."""
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from fengshen.data.cbart_dataloader.objective import Infill
from fengshen.data.masking.objectives import OBJECTIVES, T5, Bart, Bert, Causal, Pegasus, UniLM
from fengshen.data.masking.show import restored

CHARACTERS = "白日依山尽黄河入海流欲穷千里目更上一层楼，。"
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[EOS]"]


def tokenizer_of(sentinels=60, **roles):
    "A tokenizer of characters; a role of None is not played."
    marks = MARKS + [f"<extra_id_{i}>" for i in range(sentinels)]
    made = BertTokenizer(vocab={word: i for i, word in enumerate([*marks, *CHARACTERS])}, eos_token="[EOS]", additional_special_tokens=marks[6:])
    for role, token in roles.items():
        setattr(made, f"{role}_token", token)
    return made


TOKENIZER = tokenizer_of()
FIRST, STOP, UNKNOWN = len(MARKS) + 60, TOKENIZER.convert_tokens_to_ids("。"), TOKENIZER.unk_token_id
EACH = [Causal(), Bert(), Bert(sentence_order=True), T5(), Bart(), Bart(mean_span=0), Pegasus(), UniLM(), Infill()]
BOUND = [objective.bind(TOKENIZER) for objective in EACH]
names = dict(argvalues=BOUND, ids=lambda objective: repr(objective)[:24])
poor = st.lists(st.one_of(st.lists(st.integers(FIRST, len(TOKENIZER) - 1), max_size=14), st.just([STOP] * 3), st.just([UNKNOWN] * 4)), max_size=4)


def made(objective, texts, rows=4, length=24, index=None):
    "A batch of these texts."
    texts = [np.array(text, np.int64) for text in texts]
    return objective.batch(texts, rows, length, 0, 0, np.arange(len(texts)) if index is None else index)


def text_of(objective, batch, row):
    "The text that a row was made of, from what the model reads and what it has to say."
    ids = batch["input_ids"][row][batch["attention_mask"][row] > 0].tolist()
    labels = batch["labels"][row, 1:]
    if isinstance(objective, T5):
        found = [id for _, id in restored(ids, labels[labels != -100].tolist(), TOKENIZER.get_vocab())]
    elif isinstance(objective, (Bart, Infill)):
        found = labels[labels != -100].tolist()
    elif isinstance(objective, Bert):
        found = [label if label != -100 else id for id, label in zip(ids, labels.tolist())]
    else:
        found = ids
    return [id for id in found if id not in (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.eos_token_id)]


@pytest.mark.parametrize("objective", **names)
@settings(max_examples=25, deadline=None)
@given(texts=poor)
def test_poor_texts_make_whole_batches(objective, texts):
    "Empty texts, single characters, nothing but stops or unknown tokens: shapes stay, labels are ids, and no token is lost."
    batch = made(objective, texts)
    assert batch["input_ids"].shape == (4, 24) and len(batch["labels"]) == 4
    labels = batch["labels"]
    assert ((labels == -100) | ((labels >= 0) & (labels < len(TOKENIZER)))).all() and (labels[:, 0] == -100).all()
    assert (batch["attention_mask"][:, 0] == 1).all() and batch["num_labels"] == int((labels[:, 1:] != -100).sum())
    assert (labels[len(texts):] == -100).all(), "a row without a text has nothing to learn"
    if not isinstance(objective, (Pegasus, Infill)) and not getattr(objective, "sentence_order", False):
        for row, text in enumerate(texts):
            if len(text) > 1:
                assert text_of(objective, batch, row) == text


@pytest.mark.parametrize("objective", **names)
def test_a_text_of_one_token_hides_nothing_it_cannot_give_back(objective):
    batch = made(objective, [[FIRST], []])
    read = batch["input_ids"][0].tolist()
    assert FIRST in read or FIRST in batch["labels"][0].tolist()
    assert (batch["labels"][1] == -100).sum() >= batch["labels"].shape[1] - 3, "at most marks are learned of an empty text"


@pytest.mark.parametrize("objective", **names)
@pytest.mark.parametrize("texts, index, said", [
    ([[FIRST] * 60], None, "too long|longer than its row"),
    ([[FIRST]] * 5, None, "more texts than rows|at most 4"),
    ([[10_000]], None, "outside the vocabulary|take the tokenizer"),
    ([[-1]], None, "outside the vocabulary|take the tokenizer"),
])
def test_texts_that_do_not_fit_are_refused(objective, texts, index, said):
    with pytest.raises(ValueError, match=said):
        made(objective, texts, index=index)


@pytest.mark.parametrize("objective", [each for each in BOUND if not isinstance(each, Infill)], ids=lambda objective: repr(objective)[:24])
def test_texts_that_are_no_ids_and_samples_without_a_number_are_refused(objective):
    for texts in (["白日依山"], [np.array([30.5, 31.5])]):
        with pytest.raises(ValueError, match="texts are given as token ids"):
            objective.batch(texts, 2, 24, 0, 0, [0])
    with pytest.raises(ValueError, match="2 texts, 1 numbers"):
        made(objective, [[FIRST], [FIRST]], index=[0])


@pytest.mark.parametrize("objective", [each for each in BOUND if not isinstance(each, (Causal, Infill))], ids=lambda objective: repr(objective)[:24])
def test_rows_without_room_for_text_name_the_least_length(objective):
    with pytest.raises(ValueError, match="at least") as refused:
        objective.source_length(1)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert objective.source_length(least) >= 1
    made(objective, [[FIRST]], length=least)
    with pytest.raises(ValueError, match="at least"):
        objective.source_length(least - 1)


@pytest.mark.parametrize("objective", [T5(), T5(rate=0.5, mean_span=1.5), Pegasus(), Pegasus(rate=1.0), Bart(), Bert(), UniLM()], ids=repr)
def test_targets_are_as_long_as_they_are_said_to_be(objective):
    bound = objective.bind(TOKENIZER)
    for length in (8, 13, 40):
        text = np.resize([FIRST, FIRST + 1, STOP], bound.source_length(length))
        batch = bound.batch(text[None], 1, length, 0, 0, [0])
        assert batch["labels"].shape[1] - 1 == bound.target_length(length)
        expected = bound.expected(len(text))
        if isinstance(objective, T5):
            assert batch["num_labels"] == expected == bound.target_length(length)
        elif isinstance(objective, Bert):
            assert math.floor(expected) <= batch["num_labels"] <= math.ceil(expected)


@pytest.mark.parametrize("objective, roles, said", [
    (Bert(), dict(mask=None), "no mask_token"), (Bert(), dict(cls=None), "no cls_token"), (Bart(), dict(mask=None), "no mask_token"),
    (Pegasus(), dict(mask=None), "no mask_token"), (Pegasus(), dict(eos=None, sep=None), "no eos_token"), (T5(), dict(sentinels=0), "no sentinels"), (T5(), dict(eos=None, sep=None), "no eos_token"),
    (UniLM(), dict(cls=None), "no cls_token"), (Infill(), dict(mask=None), "no mask_token"),
])
def test_a_vocabulary_without_its_marks_is_refused_with_what_to_do(objective, roles, said):
    with pytest.raises(ValueError, match=f"{said}.*;.*token"):
        objective.bind(tokenizer_of(**roles))


def test_sentinels_that_do_not_suffice():
    "Before the first step, for rows of that length; and for a text that has more spans than that."
    few = tokenizer_of(sentinels=2)
    bound, letter = T5().bind(few), few.convert_tokens_to_ids("白")
    assert bound.source_length(40) > 40
    with pytest.raises(ValueError, match="more spans than the tokenizer has sentinels: got 3, expected at most 2"):
        bound.source_length(60)
    with pytest.raises(ValueError, match="more spans than the tokenizer has sentinels|longer than its row"):
        made(bound, [np.resize([letter], 70)], length=40)


@pytest.mark.parametrize("objective, said", [
    (Bert(rate=0), "hides nothing"), (T5(rate=0), "hides nothing"), (Pegasus(rate=0), "hides nothing"), (Bert(rate=1.5), "share of the whole"), (Bert(rate=float("nan")), "share of the whole"),
    (Bert(mask=0.9, random=0.5), "shares of the chosen tokens"), (Bert(mask=float("nan")), "shares of the chosen tokens"), (T5(mean_span=0), "mean_span counts"), (T5(mean_span=float("inf")), "mean_span counts"),
    (Bart(mean_span=-1), "mean_span counts"), (UniLM(least=0.9, most=0.1), "shares of a text"), (T5(start="<s>"), "start is no token"), (Bert(ngrams=0), "ngrams"), (Bert(favour="longer"), "law of lengths"),
])
def test_settings_are_refused_before_any_text_is_read(objective, said):
    with pytest.raises(ValueError, match=said):
        objective.bind(TOKENIZER)
    assert set(OBJECTIVES) >= {type(objective).__name__}


def test_hiding_nothing_is_allowed_where_something_else_is_learned():
    assert made(Bert(rate=0, sentence_order=True).bind(TOKENIZER), [[FIRST, STOP, FIRST, STOP]])["num_labels"] == 0
    assert made(Bart(rate=0).bind(TOKENIZER), [[FIRST, STOP, FIRST + 1, STOP]])["num_labels"] == 6
