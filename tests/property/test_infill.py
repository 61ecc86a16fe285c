"Faulty texts for CBART: edits that lead to the target whatever the text, rates that are what they say, rows that depend on their number alone, files that go on."

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fengshen.data.cbart_dataloader import Infill, InfillCollator, InfillDataset, Signs, apply_edits, infill_corrupt, original_files, write_infill
from fengshen.data.cbart_dataloader.corrupt import CHOICES, corrupt_flat, signs_of
from fengshen.data.cbart_dataloader.edits import NAMES, check_rows, first_wrong, sizes_after, skeleton
from fengshen.data.cbart_dataloader.store import gone_on, rows_from
from fengshen.data.mmap_dataloader.mmap_legacy import write_original
from fengshen.models.bart import refinement

settings.register_profile("house", deadline=None)
settings.load_profile("house")
SIGNS = Signs(begin=2, end=3, mask=4, pad=0, words=np.r_[6:15, 17:40])  # 5, 15 and 16 are no words
texts = st.lists(st.lists(st.integers(5, 39), max_size=20), min_size=1, max_size=6)
shares = st.floats(0, 1)
chosen = st.fixed_dictionaries(dict(delete=shares, replace=shares, max_insert=st.integers(1, 25), choose=st.sampled_from(sorted(CHOICES))))


def within(short, long):
    "Whether a sequence is a part of another, in order."
    rest = iter(long)
    return all(x in rest for x in short)


@given(texts, chosen, st.integers(0, 2**63 - 1), st.integers(0, 10**6))
@settings(max_examples=150)
def test_the_edits_lead_from_the_faulty_text_to_the_target(rows, how, seed, epoch):
    flat, lengths = corrupt_flat(rows, seed, range(len(rows)), epoch, SIGNS, **how)
    check_rows(flat, lengths, how["max_insert"] + 2)
    for row, (x, y, t) in zip(rows, zip(*(np.split(flat[n], np.cumsum(lengths[n])[:-1]) for n in NAMES))):
        assert (x[0], x[-1], t[0], t[-1]) == (2, 3, 2, 3) and y[0] == 0 and y[-1] != 1
        assert len(t) == sum(1 if edit <= 1 else edit for edit in y.tolist()) and y.max() <= how["max_insert"] + 1
        new, places = skeleton(x, y, 4), np.cumsum(sizes_after(y)) - 1
        assert np.array_equal(apply_edits(x, y, t[new == 4]), t)
        assert (x[y == 1] != t[places[y == 1]]).all() and np.isin(x[y == 1], SIGNS.words).all()
        whole = [2, *row, 3]
        assert within(t.tolist(), whole) and within(x[y != 1].tolist(), t.tolist())
        assert how["max_insert"] < len(row) or t.tolist() == whole
        strange = [i for i in row if i in (5, 15, 16)]
        assert [i for i in x.tolist() if i in (5, 15, 16)] == strange and (y[np.isin(x, (5, 15, 16))] != 1).all()


@given(texts, chosen, st.integers(0, 99))
@settings(max_examples=60)
def test_a_hole_has_as_many_of_its_tokens_in_the_target_as_one_round_can_put_in(rows, how, seed):
    "The same draws with room for every hole tell how long each one is; the choice changes nothing else."
    most = how["max_insert"]
    (flat, lengths), (whole, _) = (corrupt_flat(rows, seed, range(len(rows)), 0, SIGNS, **how | dict(max_insert=n)) for n in (most, 25))
    assert np.array_equal(flat[NAMES[0]], whole[NAMES[0]])
    holes = np.maximum(whole[NAMES[1]] - 1, 0)
    assert np.array_equal(flat[NAMES[1]], np.where(holes > 0, np.minimum(holes, most) + 1, whole[NAMES[1]]))


@given(texts, chosen, st.data())
@settings(max_examples=60)
def test_a_sample_is_the_same_in_any_company(rows, how, data):
    numbers = data.draw(st.lists(st.integers(0, 10**12), min_size=len(rows), max_size=len(rows)))
    some = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
    all_, few = (infill_corrupt([rows[i] for i in ids], 1, [numbers[i] for i in ids], 2, SIGNS, **how) for ids in (range(len(rows)), some))
    alone = infill_corrupt(rows[some[0]], 1, numbers[some[0]], 2, SIGNS, **how)
    assert all(np.array_equal(few[n][j], all_[n][i]) for n in NAMES for j, i in enumerate(some))
    assert all(np.array_equal(alone[n], few[n][0]) for n in NAMES)


def near(count, total, share, sigmas=5):
    return abs(count - share * total) < sigmas * (total * share * (1 - share)) ** 0.5 + 1


def test_rates_of_a_hundred_thousand_texts():
    n, b = 20, 100_000
    grid = np.random.RandomState(0).choice(SIGNS.words, (b, n))
    flat, lengths = corrupt_flat(grid, 7, np.arange(b), 3, SIGNS, replace=0.15, max_insert=n)
    stay, wrong = lengths[NAMES[0]] - 2, flat[NAMES[1]] == 1
    # with a share drawn evenly from 0 to 1, any number of missing tokens is as likely as any other
    assert all(near(count, b, 1 / (n + 1)) for count in np.bincount(n - stay, minlength=n + 1))
    assert near(wrong.sum(), stay.sum(), 0.15)
    # a wrong token is every other word alike
    right = flat[NAMES[2]][np.cumsum(sizes_after(flat[NAMES[1]])) - 1][wrong]
    pairs = np.bincount(SIGNS.place[right] * len(SIGNS.words) + SIGNS.place[flat[NAMES[0]][wrong]], minlength=len(SIGNS.words) ** 2).reshape(len(SIGNS.words), -1)
    assert not pairs.diagonal().any() and abs(pairs[~np.eye(len(pairs), dtype=bool)] / (wrong.sum() / len(pairs) / (len(pairs) - 1)) - 1).max() < 0.5
    assert all(near(row.sum(), wrong.sum(), 1 / len(pairs)) for row in pairs.T)
    # without wrong tokens, a text of which k tokens are missing has each of them missing alike: places are even
    flat, lengths = corrupt_flat(np.tile(SIGNS.words[:n], (b, 1)), 8, np.arange(b), 0, SIGNS, delete=0.3, replace=0.0, max_insert=n)
    assert all(near(count, b, 0.7, 8) for count in np.bincount(SIGNS.place[flat[NAMES[0]]] + 1, minlength=n + 1)[1 : n + 1])


def test_any_token_of_a_hole_is_as_likely_in_the_target():
    b, n = 20_000, 5
    made = {choose: infill_corrupt(np.tile(SIGNS.words[:n], (b, 1)), 1, np.arange(b), 0, SIGNS, delete=1.0, max_insert=2, choose=choose) for choose in CHOICES}
    counts = {choose: np.bincount(SIGNS.place[np.concatenate(rows[NAMES[2]])] + 1, minlength=n + 1)[1:] for choose, rows in made.items()}
    assert all(near(count, b, 2 / n) for count in counts["random"])
    assert counts["left"].tolist() == [b, b, 0, 0, 0] and counts["middle"].tolist() == [0, b, 0, b, 0]


def slow_batch(rows, signs, masked_lm):
    "The original's steps, token by token."
    made = []
    for x, y, t in rows:
        holes = []
        for token, edit in zip(x, y):
            holes += [token] if edit == 0 else [signs.mask] if edit == 1 else [signs.mask] * (edit - 1) + [token]
        holes[-1] = signs.pad
        labels = [-100] + [token if holes[i] == signs.mask or not masked_lm else -100 for i, token in enumerate(t)][1:]
        made.append((list(x), list(y), holes, labels))
    longest = [max(len(row[part]) for row in made) for part in range(4)]
    ids, edits, holes, labels = ([row[part] + [fill] * (longest[part] - len(row[part])) for row in made] for part, fill in enumerate((signs.pad, -100, signs.pad, -100)))
    return dict(input_ids=ids, encoder_labels=edits, decoder_input_ids=[[signs.end] + row[:-1] for row in holes], labels=labels,
                attention_mask=[[1.0] * len(x) + [0.0] * (longest[0] - len(x)) for x, _, _ in rows])


@given(texts, chosen, st.booleans(), st.integers(0, 3))
@settings(max_examples=60)
def test_collator_and_objective_are_the_originals_steps(rows, how, masked_lm, more):
    made = infill_corrupt(rows, 5, np.arange(len(rows)), 1, SIGNS, **how)
    samples = [tuple(row.tolist() for row in sample) for sample in zip(*made.values())]
    wanted = slow_batch(samples, SIGNS, masked_lm)
    found = InfillCollator(SIGNS, how["max_insert"] + 2, masked_lm=masked_lm)(samples)
    assert {name: t.tolist() for name, t in found.items()} == wanted
    objective = Infill(**how, masked_lm=masked_lm)
    objective.signs, objective.pieces = SIGNS, type("Pieces", (), dict(tokenizer=None))
    batch = objective.batch(rows, len(rows) + more, 24, 5, 1, np.arange(len(rows)))
    x, t = found["input_ids"].shape[1], found["labels"].shape[1]
    for name, columns in dict(input_ids=slice(x), encoder_labels=slice(x), attention_mask=slice(x), decoder_input_ids=slice(t), labels=slice(1, t + 1)).items():
        assert batch[name].shape == (len(rows) + more, 24 + (name == "labels"))
        assert torch.equal(batch[name][: len(rows), columns], found[name].long()), name
    assert (batch["labels"][:, 0] == -100).all() and (batch["labels"][len(rows) :] == -100).all()
    assert batch["num_labels"] == (found["labels"] != -100).sum() and batch["tokens"] == sum(len(x) + len(t) for x, _, t in samples)


@given(texts, chosen, st.data())
@settings(max_examples=60)
def test_a_sample_with_a_lost_or_added_number_is_refused(rows, how, data):
    made = infill_corrupt(rows, 5, np.arange(len(rows)), 1, SIGNS, **how)
    columns = {name: [row.tolist() for row in each] for name, each in made.items()}
    name, row = data.draw(st.sampled_from(NAMES)), data.draw(st.integers(0, len(rows) - 1))
    at = data.draw(st.integers(0, len(columns[name][row]) - 1))
    columns[name][row][at : at + 1] = data.draw(st.sampled_from([[], [7, 7]]))
    flat = {n: np.concatenate([np.array(r, np.int64) for r in each]) for n, each in columns.items()}
    wrong = first_wrong(flat, {n: np.array([len(r) for r in each]) for n, each in columns.items()}, how["max_insert"] + 2)
    assert wrong is not None and (wrong[0] == row or name == NAMES[1])


def rows_of(parts):
    "Rows of what `rows_from` gives."
    found = []
    for flat, lengths in parts:
        lengths = {name: lengths[own] for name, own in zip(NAMES, (NAMES[0], NAMES[0], NAMES[2]))}
        found += zip(*([r.tolist() for r in np.split(flat[n], np.cumsum(lengths[n])[:-1])] for n in NAMES))
    return found


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.data())
@settings(max_examples=50)
def test_writing_goes_on_at_any_row(count, copies, size, data):
    held = [np.arange(6, 6 + n % 8) for n in range(count)]

    def corrupt(texts, numbers, copy):
        flat, lengths = corrupt_flat(texts, 1, numbers, copy, SIGNS)
        return flat, {name: lengths[name] for name in (NAMES[0], NAMES[2])}

    whole = rows_of(rows_from(held, 0, copies, corrupt, size))
    assert sorted(whole) == sorted(tuple(r.tolist() for r in infill_corrupt(t, 1, i, c, SIGNS).values()) for c in range(copies) for i, t in enumerate(held))
    skip = data.draw(st.integers(1, len(whole)))
    stored = {name: whole[skip - 1][NAMES.index(name)] for name in (NAMES[0], NAMES[2])}
    assert rows_of(gone_on(rows_from(held, skip - 1, copies, corrupt, size), stored)) == whole[skip:]
    with pytest.raises(ValueError, match="hold other rows"):
        next(gone_on(rows_from(held, skip - 1, copies, corrupt, size), stored | {NAMES[0]: [9]}))


def tokenizer_of(words):
    from transformers import BertTokenizer

    return BertTokenizer(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])})


def test_the_originals_files_hold_what_a_dataset_holds(tmp_path):
    tokenizer = tokenizer_of("床前明月光疑是地上霜")
    made = infill_corrupt([[5, 6, 7, 8], [], [9, 10, 11]], 2, [0, 1, 2], 0, tokenizer, max_insert=3)
    write_infill(tmp_path / "new", [[5, 6, 7, 8], [], [9, 10, 11]], tokenizer, seed=2, max_insert=3)
    for shard, rows in enumerate(([0], [1, 2])):
        part = {name: [each[i] for i in rows] for name, each in made.items()}
        write_original(tmp_path / f"dev_synthetic_max_insert_label3_insert_mode1_{shard}",
                       [({n: np.concatenate(r) for n, r in part.items()}, {n: [len(x) for x in r] for n, r in part.items()})])
    old, new = InfillDataset(original_files(tmp_path, "dev")), InfillDataset(tmp_path / "new")
    assert len(old) == len(new) == 3 and old.num_labels == new.num_labels == 5 and (old.counts() == new.counts()).all()
    assert all(torch.equal(a[n], b[n]) and a[n].tolist() == made[n][i].tolist() for i, (a, b) in enumerate(zip(old, new)) for n in NAMES)
    with pytest.raises(ValueError, match="which files are the train data"):
        original_files(tmp_path, "train")
    convertible = tmp_path / "dev_synthetic_max_insert_label1_insert_mode1_0"
    write_original(convertible, [({n: np.array([2, 3]) * (n != NAMES[1]) for n in NAMES}, {n: [2] for n in NAMES})])
    with pytest.raises(ValueError, match="shards of one kind"):
        original_files(tmp_path, "dev")
    assert original_files(tmp_path, "dev", num_labels=3) == [str(convertible)]


def test_the_model_has_one_loss_on_both_kinds_of_batches():
    from fengshen.models.bart import BartForTextInfill, BartTextInfillConfig
    from fengshen.utils.device import seeded

    tokenizer = tokenizer_of("床前明月光疑是地上霜举头望低思故乡")
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    with seeded(0):
        model = BartForTextInfill(BartTextInfillConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=20, num_labels=4, pad_token_id=0)).eval()
    rows = [list(range(5, 15)), list(range(9, 20)), [6]]
    batch = Infill(max_insert=2).bind(tokenizer).batch(rows, 5, 14, 1, 0, [0, 1, 2])
    made = infill_corrupt(rows, 1, [0, 1, 2], 0, tokenizer, max_insert=2)
    collated = InfillCollator(tokenizer, 4)(list(zip(*made.values())))
    keys = ("input_ids", "attention_mask", "decoder_input_ids", "encoder_labels")
    ours = model(**{name: batch[name] for name in keys}, labels=batch["labels"][:, 1:].contiguous())
    theirs = model(**collated)
    torch.testing.assert_close(ours.encoder_loss, theirs.encoder_loss)
    torch.testing.assert_close(ours.decoder_loss, theirs.decoder_loss)


def test_draws_of_neighbours_are_not_alike():
    "Texts, epochs and seeds beside each other share no faults."
    row = np.tile(SIGNS.words[:20], (400, 1))
    made = [infill_corrupt(row, seed, np.arange(400), epoch, SIGNS)[NAMES[1]] for seed, epoch in itertools.product((1, 2), (0, 1))]
    known = [{(i, tuple(r.tolist())) for i, r in enumerate(rows) if len(r) > 8} for rows in made]
    assert all(len(a & b) < 20 for a, b in itertools.combinations(known, 2))
    missing = [np.array([len(r) for r in rows]) for rows in made]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.25 for a, b in itertools.combinations(missing, 2))
    assert all(abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.25 for a in missing)


@pytest.mark.parametrize("max_insert", [1, 3])
def test_keywords_are_in_what_an_untrained_model_writes(max_insert):
    from fengshen.models.bart import BartForTextInfill, BartTextInfillConfig
    from fengshen.pipelines.infill import covered, evaluate
    from fengshen.utils.device import seeded

    sentences = ["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。", "霜", "，。", "月月月月"]
    tokenizer = tokenizer_of(dict.fromkeys("".join(sentences)))
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    with seeded(0):
        model = BartForTextInfill(BartTextInfillConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=24, num_labels=max_insert + 2, init_std=1.0)).eval()
    reports = [evaluate(model, tokenizer, sentences, keywords=n, batch=2, rounds=4, seed=n) for n in (1, 2, 9)]
    assert all(report.coverage == 1 and 0 <= report.bleu <= 100 and 0 <= report.chrf <= 100 for report in reports)
    assert [len(words) for words, _, _ in reports[2].rows] == [9, 9, 1, 0, 4] and reports[0].rounds > 0
    assert covered([1, 2], [[1, 2], [2]]) == 1 and covered([2, 1, 2], [[1], [2]]) == 2


def test_stored_texts_go_through_the_loaders_dataset(tmp_path):
    "What an objective is wrapped in for the loaders takes a stored set as it takes a corpus; the epoch changes nothing in it."
    from fengshen.data.universal_datamodule.corrupted import Corrupted

    tokenizer = tokenizer_of("床前明月光疑是地上霜")
    rows, infill = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 5, 6]], Infill(max_insert=2).bind(tokenizer)
    write_infill(tmp_path / "set", rows, tokenizer, seed=4, max_insert=2)
    found = Corrupted(InfillDataset(tmp_path / "set"), infill, 9)
    batch, later = (found.batch(found.at([2, 0], epoch), 3) for epoch in (0, 5))
    made = infill.batch([rows[2], rows[0]], 3, 9, 4, 0, [2, 0])
    assert all(torch.equal(batch[name], made[name]) and torch.equal(later[name], made[name]) for name in made if torch.is_tensor(made[name]))


@pytest.mark.parametrize("roles", [dict(cls_token="[CLS]", sep_token="[SEP]"), dict(bos_token="<s>", eos_token="</s>"), dict(cls_token="[CLS]", sep_token="[SEP]", eos_token="</s>"),
                                   dict(cls_token="[CLS]", sep_token="[SEP]", bos_token="<s>", eos_token="</s>")])
def test_data_and_model_take_the_same_signs(roles):
    "What trains a CBART and what writes with it are two layers; both read the tokenizer."
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", *"天地玄黄"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", **roles)
    ours, theirs = signs_of(tokenizer), refinement.signs_of(tokenizer)
    assert (ours.begin, ours.end, ours.mask, ours.pad) == (theirs.begin, theirs.end, theirs.mask, theirs.pad)
