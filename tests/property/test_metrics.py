"""What is asked of every metric, and each against a slow definition."""
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fengshen import metric as m
from fengshen.metric.bundles import TASKS
from fengshen.metric.qa import CHINESE, MARKS
from tests.metric_cases import DECISIONS, TOKENS, Vocabulary, measure, plain, scores

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")
few = settings(max_examples=25, deadline=None)
everyone = pytest.mark.parametrize("name", DECISIONS)


def fed(metric, samples, size=1):
    "The result after the samples have come in batches of a size."
    for i in range(0, len(samples), size):
        metric.update(*(list(side) for side in zip(*samples[i : i + size])))
    return plain(metric.compute())


@everyone
def test_batches_and_order_do_not_matter(name):
    make, samples = DECISIONS[name]
    whole = fed(make(), samples, len(samples))
    shuffled = random.Random(1).sample(samples, len(samples))
    assert fed(make(), samples) == pytest.approx(whole, abs=1e-6) and fed(make(), shuffled, 2) == pytest.approx(whole, abs=1e-6)


@everyone
def test_a_reference_scores_best_and_nothing_scores_nothing(name):
    make, samples = DECISIONS[name]
    wanted = [reference for _, reference in samples if reference]
    top = 100 if name in ("bleu", "chrf") else 1
    first = [one[0] if name == "answers" and isinstance(one, list) else one for one in wanted]
    assert all(score == pytest.approx(top, abs=1e-4) for score in fed(make(), list(zip(first, wanted))).values())
    blank = {"accuracy": "", "rouge": "", "bleu": "", "chrf": "", "answers": ""}.get(name, [])
    nothing = [(["O"] * len(one) if name == "entities" else blank, one) for one in wanted]
    assert not any(fed(make(), nothing).values())


@everyone
def test_no_samples_and_a_reset(name):
    make, samples = DECISIONS[name]
    metric = make()
    metric.update([], [])
    none = plain(metric.compute())
    assert all(math.isnan(score) or score == 0 for score in none.values())
    fed(metric, samples)
    metric.reset()
    assert str(plain(metric.compute())) == str(none)
    with pytest.raises(ValueError, match="one to one"):
        metric.update([samples[0][0]], [])


@pytest.mark.parametrize("name", TOKENS)
def test_token_metrics_over_chunks(name):
    logits, labels = scores(9)
    one, many = TOKENS[name](), TOKENS[name]()
    one.update(logits, labels)
    for i in (0, 4, 8):
        many.update(logits[i : i + 4], labels[i : i + 4])
    torch.testing.assert_close(one.compute(), many.compute())
    assert TOKENS[name]().compute().isnan()


def test_the_measurements_of_one_process_are_plain_numbers():
    assert all(isinstance(x, (int, float)) for found in measure(0, 1).values() for row in found.values() for x in (row.values() if isinstance(row, dict) else [row]))


@few
@given(asked=st.lists(st.booleans(), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_masked_accuracy_by_hand(asked, seed):
    rng = random.Random(seed)
    labels, guesses = ([rng.randrange(3) for _ in asked] for _ in range(2))
    logits = torch.nn.functional.one_hot(torch.tensor([guesses]), 3).float()
    right = [g == y for g, y, a in zip(guesses, labels, asked) if a]
    metric = m.MaskedLMAccuracy()
    metric.update(logits, torch.tensor([[y if a else -100 for y, a in zip(labels, asked)]]))
    old = m.metrics_mlm_acc(logits, torch.tensor([labels]), torch.tensor([asked]).int())
    if not right:
        assert metric.compute().isnan() and old == 0
    else:
        assert float(metric.compute()) == pytest.approx(sum(right) / len(right)) == old


def text_perplexity(labels, logits, per):
    "Term by term: the sum of losses over what the tokens' bytes add up to."
    nll = -sum(float(row.double().log_softmax(-1)[y]) for row, y in zip(logits, labels.tolist()))
    held = b"".join(Vocabulary()[y] for y in labels.tolist() if not Vocabulary().special(y))
    return math.exp(nll / (len(held) if per == "byte" else sum(b < 0x80 or b >= 0xC0 for b in held)))


@few
@given(seed=st.integers(0, 999), per=st.sampled_from(["character", "byte"]))
def test_perplexity_of_text_by_definition(seed, per):
    logits, labels = scores(12, seed)
    labels[0] = 3  # a mark: paid for, and no text
    metric = m.TextPerplexity(Vocabulary(), per)
    metric.update(logits, labels)
    assert float(metric.compute()) == pytest.approx(text_perplexity(labels, logits, per), rel=1e-4)


# Entities

SHAPES = dict(bio=("B", "I", None, None), bios=("B", "I", None, "S"), bioes=("B", "I", "E", "S"), bmes=("B", "M", "E", "S"), bilou=("B", "I", "L", "U"))
tagged = st.sampled_from(sorted(SHAPES)).flatmap(lambda scheme: st.tuples(st.just(scheme), st.lists(st.sampled_from(
    ["O", *(f"{mark}-{kind}" for mark in SHAPES[scheme] if mark for kind in ("PER", "PER-NAM"))]), max_size=8)))


@given(tagged)
@settings(max_examples=100, deadline=None)
def test_entities_are_the_stretches_that_have_the_shape_of_one(case):
    "Every stretch is tried: a single, or a beginning, insides and an end, all of one type; without an end mark it goes as far as it can."
    scheme, tags = case
    begin, inside, end, single = SHAPES[scheme]
    want = []
    for i, j in itertools.combinations(range(len(tags) + 1), 2):
        kind = tags[i].partition("-")[2]
        shape = [f"{begin}-{kind}"] + [f"{inside}-{kind}"] * (j - i - 1)
        if end:
            shape = shape[:-1] + [f"{end}-{kind}"] if j - i > 1 else []
        goes_on = not end and j < len(tags) and tags[j] == f"{inside}-{kind}"
        if tags[i:j] == [f"{single}-{kind}"] or (tags[i:j] == shape and not goes_on):
            want.append((kind, i, j - 1))
    assert m.tag_entities(tags, scheme) == want
    assert {tuple(e) for e in m.get_entities(tags, markup=scheme)} >= set(want)
    assert all(i <= j for _, i, j in m.get_entities(tags, markup=scheme))


sets = st.lists(st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 2), st.integers(0, 2)), max_size=5), min_size=2, max_size=2)


@given(st.lists(sets, max_size=4))
@few
def test_f1_of_sets_by_definition(texts):
    metric = m.EntityF1(types="AB")
    metric.update([found for found, _ in texts], [wanted for _, wanted in texts])
    found, wanted = ({(i, *item) for i, pair in enumerate(texts) for item in pair[side]} for side in (0, 1))

    def f1(a, b):
        return 2 * len(a & b) / (len(a) + len(b)) if a & b else 0.0

    by_type = [f1(*({item for item in group if item[1] == t} for group in (found, wanted))) for t in "AB"]
    got = plain(metric.compute())
    assert (got["f1"], got["macro_f1"]) == pytest.approx((f1(found, wanted), sum(by_type) / 2))
    assert [row["f1"] for row in metric.by_type().values()] == pytest.approx(by_type)
    assert metric.by_type()["A"]["support"] == sum(item[1] == "A" for item in wanted)


def test_old_scores_and_spans():
    "Found twice counts once; a start without an end is none; the nearest end is taken."
    score = m.EntityScore(["LOC"])
    score.update([("LOC", 0, 1)], [["LOC", 0, 1], ["LOC", 0, 1]])
    assert score.result()[0] == dict(acc=1.0, recall=1.0, f1=1.0)
    assert m.span_entities([1, 2, 1, 0], [0, 1, 1, 0]) == [(1, 0, 1), (1, 2, 2)]
    bmes = m.SeqEntityScore({0: "O", 1: "B-LOC", 2: "M-LOC", 3: "E-LOC", 4: "[PAD]"}, "bioes", middle_prefix="M-")
    bmes.update([[1, 2, 3, 4]], [[1, 2, 3, 0]])
    assert bmes.result() == (dict(acc=1.0, recall=1.0, f1=1.0), {"LOC": dict(acc=1.0, recall=1.0, f1=1.0)})


# Texts

texts = st.text(alphabet="今天北京有雨 NLP3.。，", max_size=10)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def subsequence(a, b):
    "Length of the longest common subsequence, from its recursion."
    row = [0] * (len(b) + 1)
    for x in a:
        row = [0, *itertools.accumulate(range(len(b)), lambda best, j: row[j] + 1 if x == b[j] else max(best, row[j + 1]), initial=0)][: len(b) + 2][1:]
    return row[-1]


@given(pairs)
@few
def test_rouge_by_definition(samples):
    got = fed(m.CharRouge(), samples)

    def f1(same, a, b):
        return 2 * same / (a + b) if same else 0.0

    for name, n in (("rouge1", 1), ("rouge2", 2), ("rougeL", 0)):
        want = []
        for found, wanted in (["".join(text.split()) for text in pair] for pair in samples):
            if not n:
                want.append(f1(subsequence(found, wanted), len(found), len(wanted)))
                continue
            grams = [[text[i : i + n] for i in range(len(text) - n + 1)] for text in (found, wanted)]
            same = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
            want.append(f1(same, *map(len, grams)))
        assert got[name] == pytest.approx(sum(want) / len(want), abs=1e-6), name


@given(pairs, st.booleans())
@few
def test_bleu_and_chrf_are_sacrebleus(samples, several):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    found, wanted = map(list, zip(*samples))
    streams = [wanted, wanted[::-1]] if several else [wanted]
    references = [list(refs) for refs in zip(*streams)]
    for metric, scorer in ((m.BLEU(), sacrebleu.BLEU(tokenize="zh")), (m.ChrF(), sacrebleu.CHRF())):
        got = fed(metric, list(zip(found, references)))[""]
        want = scorer.corpus_score(found, streams).score
        assert got == pytest.approx(want, abs=1e-4) or (math.isnan(got) and want == 0)


def script_tokens(text, tokenize):
    "The script's own way: a buffer that is emptied at each Chinese character."
    tokens, buffer = [], ""
    for c in text.lower().strip():
        if c in MARKS:
            continue
        if CHINESE.match(c):
            tokens += tokenize(buffer) + [c]
            buffer = ""
        else:
            buffer += c
    return tokens + tokenize(buffer)


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=2)), min_size=1, max_size=3))
@few
def test_answers_are_scored_as_by_the_script(samples):
    nltk = pytest.importorskip("nltk", reason="nltk is not installed")
    got, f1s, exact = fed(m.AnswerScore(), samples), [], []

    def tokenize(text):
        return nltk.word_tokenize(text, preserve_line=True) if text else []

    for answer, references in samples:
        a, best = script_tokens(answer, tokenize), []
        for b in (script_tokens(reference, tokenize) for reference in references):
            run = max((k for i in range(len(a)) for j in range(len(b)) for k in range(1, min(len(a) - i, len(b) - j) + 1) if a[i : i + k] == b[j : j + k]), default=0)
            best.append(2 * run / (len(a) + len(b)) if run else 0.0)
        f1s.append(max(best))
        bare = ["".join(c for c in text.lower().strip() if c not in MARKS) for text in (answer, *references)]
        exact.append(bare[0] in bare[1:])
    assert (got["f1"], got["exact_match"]) == pytest.approx((sum(f1s) / len(f1s), sum(exact) / len(exact)), abs=1e-6)


def test_answers_on_real_questions(shared):
    "Every gold answer of CMRC scores 1 against itself, and a longer one less than 1 but not 0."
    rows = [json.loads(line) for line in (shared / "data" / "clue" / "cmrc2018_dev.jsonl").read_text("utf8").splitlines()[:60]]
    answers = [[answer["text"] for answer in row["answers"]] for row in rows]
    whole = fed(m.AnswerScore(), [(refs[0], refs) for refs in answers])
    longer = fed(m.AnswerScore(), [(f"大约{refs[0]}左右吧", refs) for refs in answers])
    assert whole["exact_match"] == whole["f1"] == 1 and longer["exact_match"] < 0.05 and 0.3 < longer["f1"] < 1


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_scored(task):
    metrics = m.task_metrics(task)
    assert set(metrics.keys()) == set(TASKS[task])
    by_kind = {m.LabelAccuracy: "a", m.EntityF1: [("name", "甲")], m.RelationF1: [("甲", "在", "乙")], m.EventF1: [dict(type="婚", trigger="嫁", arguments=[("人", "甲")])]}
    sample = by_kind.get(type(next(iter(metrics.values()))), "今天北京有雨。")
    found = m.task_scores(task, [sample], [sample])
    assert m.overall({task: found}) == pytest.approx(10.0 if task == "cluener" else 100, abs=1e-3)  # one of its ten types
