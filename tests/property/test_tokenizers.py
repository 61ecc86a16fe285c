"""Vocabularies of any texts: nothing is lost, the same texts give the same folder, a trimmed one cuts as before, and a model's rows go where its tokens go."""
import json

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from fengshen.models.megatron_t5 import T5Tokenizer
from fengshen.tokenizer.compare import bars, compare, lost
from fengshen.tokenizer.extend import extend, pieces_of
from fengshen.tokenizer.presets import PRESETS, choose_preset
from fengshen.tokenizer.rows import token_axes, with_rows
from fengshen.tokenizer.spm import THREADS, from_spm, spm_settings, train_spm
from fengshen.tokenizer.train import covered, lines_of, train
from fengshen.tokenizer.trim import complete, trim, trimmed_backend

CLASSIC = ["道可道，非常道。名可名，非常名。", "無名天地之始；有名萬物之母。", "故常無欲，以觀其妙；常有欲，以觀其徼。", "此兩者同出而異名，同謂之玄。"]
TEXTS = [*CLASSIC, "insulin resistance and metabolic syndrome, abc abd bcd cde", "Ｉnsulin １２％  of 2023\n\nxyz xyz", "他说：“好！”😀"] * 3
LOSSLESS = ("byte_bpe", "unigram", "bpe", "chat")
CLOSE = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
unicode = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)
like_ours = st.lists(st.sampled_from([*"道可名無天insulab ,。12\n", "xyz", "😀", "１"]), max_size=20).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "{preset: (tokenizer, its folder)} of the same texts."
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = tmp_path_factory.mktemp("made")
    sizes = dict(byte_bpe=350, chat=350, unigram=400, bpe=400, wordpiece=150, erlangshen=150, randeng_t5=500, ziya=400, randeng_bart=200)
    return {name: (train(TEXTS, folder / name, name, vocab_size=size, progress=False), folder / name) for name, size in sizes.items()}


@pytest.mark.parametrize("name", LOSSLESS)
@CLOSE
@given(text=unicode | like_ours)
@example(text="繁體字與简体字，ＡＢＣ１２３％abc 123")
@example(text="👩‍👩‍👧‍👦🏳️‍🌈𠮷𪚥鿿㐀　\u200b\ufeff\x00")
@example(text="  两个空格  \t\r\n\n结尾 ")
@example(text="<s></s><unk><pad><|im_end|><0x41>[UNK]")
def test_any_text_comes_back(made, name, text):
    tokenizer = made[name][0]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


@pytest.fixture(scope="module")
def pairs(made):
    "(SentencePiece's own reader, ours) of every file it made here."
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    files = [(made[name][1] / "spiece.model").read_bytes() for name in ("unigram", "bpe", "ziya", "randeng_t5", "randeng_bart")]
    return [(spm.SentencePieceProcessor(model_proto=file), from_spm(file)) for file in files]


@CLOSE
@example("\x85")  # white space that is no blank
@example(" \x85\n ")
@example("道\n 道")
@given(text=like_ours | unicode.map(lambda text: text.replace("\x00", "")))
def test_sentencepiece_itself_cuts_alike(pairs, text):
    "Without zero bytes, which end a text for its reader, and without the marks, which it does not look for in a text."
    assume(not any(mark in text for mark in ("<s>", "</s>", "<unk>", "<pad>")))
    for theirs, ours in pairs:
        assert ours.encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize("name", ["byte_bpe", "erlangshen", "unigram", "bpe"])
def test_the_same_texts_give_the_same_folder(made, tmp_path, name):
    tokenizer, folder = made[name]
    settings_ = json.loads((folder / "training.json").read_text())
    train(tuple(TEXTS), tmp_path / "again", name, vocab_size=settings_["vocab_size"], progress=False)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_chinese_characters_stay_apart(made):
    vocabulary = made["erlangshen"][0].get_vocab()
    chinese = [token for token in vocabulary if any("一" <= c <= "鿿" for c in token)]
    assert len(chinese) > 30 and all(len(token) == 1 for token in chinese) and "##n" in vocabulary and any(len(t) > 4 and t.isascii() for t in vocabulary)


def test_a_small_vocabulary_keeps_the_most_frequent_characters(tmp_path):
    made = train(["道道道德", "a"], tmp_path / "small", "wordpiece", vocab_size=6, progress=False)
    assert set(made.get_vocab()) == {*PRESETS["wordpiece"].first, "道"}
    assert covered(dict(b=2, a=2, c=1), 0.8) == ["a", "b"] and covered({}, 1.0) == []


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_marks_in_place(name):
    preset = PRESETS[name]
    marks = [*preset.first, *preset.last]
    assert len(set(marks)) == len(marks) and choose_preset(name.replace("_", "-")) == preset
    assert {word for word in preset.wrap.split() if word != "$A"} <= set(marks)
    assert preset.kind not in ("unigram", "bpe") or spm_settings(preset)["vocab_size"] == preset.vocab_size - len(preset.last)


def test_the_originals_recipe():
    asked = spm_settings(PRESETS["randeng_bart"])
    wanted = dict(model_type="bpe", vocab_size=40000, character_coverage=0.9995, max_sentencepiece_length=6, input_sentence_size=100_000,
                  shuffle_input_sentence=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=THREADS)
    assert wanted.items() <= asked.items() and PRESETS["randeng_bart"].seed == 42


def test_megatron_t5_reads_its_preset(tmp_path):
    made = train(TEXTS, tmp_path / "t5", "randeng_megatron_t5", vocab_size=260, progress=False)
    read = T5Tokenizer.from_pretrained(tmp_path / "t5")
    assert len(read) == len(made) and made.bos_token_id == len(made) - 120 == read.bos_token_id
    assert read("道<extra_id_117>")["input_ids"] == made("道<extra_id_117>")["input_ids"]


@pytest.mark.parametrize("name, config", [("randeng_t5", T5Config), ("byte_bpe", GPT2Config)])
def test_a_model_beside_it_does_not_change_how_it_is_read(made, tmp_path, name, config):
    tokenizer = made[name][0]
    tokenizer.save_pretrained(tmp_path)
    config().save_pretrained(tmp_path)
    text = "道  可\n道😀<extra_id_3>"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["byte_bpe", "erlangshen", "unigram", "bpe", "randeng_bart"])
@settings(CLOSE, max_examples=20)
@given(texts=st.lists(like_ours | unicode | st.sampled_from(TEXTS), max_size=6))
def test_a_trimmed_tokenizer_cuts_as_before(made, name, texts):
    tokenizer = made[name][0]
    old = tokenizer.backend_tokenizer
    used = {i for text in texts for i in old.encode(text, add_special_tokens=False).ids}
    keep = complete(tokenizer, used, texts)
    new = trimmed_backend(old, keep)
    assert keep == sorted(keep) and used <= set(keep)
    for text in texts:
        for special in (True, False):
            assert [keep[i] for i in new.encode(text, add_special_tokens=special).ids] == old.encode(text, add_special_tokens=special).ids
            assert new.encode(text, add_special_tokens=special).offsets == old.encode(text, add_special_tokens=special).offsets


def test_a_word_that_was_unknown_stays_unknown(tmp_path):
    "abq begins with the piece ab, after which nothing fits. Without ab, a and ##bq would fit."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(["[UNK]", "a", "ab", "##bq", "xbq", "x"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    report = trim(tokenizer, tmp_path / "small", ["a abq", "a"], progress=False)
    assert report["different"] == 0
    trim(tokenizer, tmp_path / "other", keep=[0, 1, 3], progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").tokenize("abq") == ["a", "##bq"], "the danger is real"


def test_the_price_of_an_unknown_character_stays(made):
    "Ten below the lowest score: with only frequent pieces it would cost less than some piece did."
    tokenizer = made["randeng_t5"][0]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    lowest = min(range(len(vocabulary)), key=lambda i: vocabulary[i][1])
    assert lowest in complete(tokenizer, set())


def test_min_count_drops_what_is_rare_and_says_how_many_texts_it_cost(made, tmp_path, capsys):
    report = trim(made["byte_bpe"][0], tmp_path / "rare", TEXTS, min_count=4, progress=False)
    assert report["different"] > 0 and f"{report['texts'] - report['different']:,} of {report['texts']:,} texts" in capsys.readouterr().out


@settings(CLOSE, max_examples=20)
@given(sources=st.lists(st.lists(st.integers(0, 29), max_size=4), min_size=1, max_size=12))
def test_rows_come_from_where_they_are_said_to(sources):
    model = model_of(GPT2LMHeadModel, GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None))
    old_vd, new_vd = (m.get_input_embeddings().weight for m in (model, with_rows(model, sources)))
    for row, source in zip(new_vd, sources, strict=True):
        torch.testing.assert_close(row, old_vd[source].mean(0) if source else old_vd.mean(0))


def model_of(kind, config):
    "A model with seeded weights."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def test_other_weights_stay_and_a_foreign_table_is_refused():
    model = model_of(T5ForConditionalGeneration, T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=30, num_layers=1, num_heads=2))
    new, axes = with_rows(model, [[0], [1], [5]]).state_dict(), token_axes(model)
    assert all(torch.equal(t, new[name]) for name, t in model.state_dict().items() if name not in axes), "a width of 30 is no vocabulary"
    model.config.vocab_size = 31
    with pytest.raises(ValueError, match="not those of the vocabulary"):
        token_axes(model)


def test_extended_untied_heads_begin_as_means_too(made, tmp_path):
    tokenizer = made["randeng_t5"][0]
    config = T5Config(vocab_size=len(tokenizer) + 3, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False)
    model = model_of(T5ForConditionalGeneration, config)
    pieces = pieces_of(tokenizer, "無道")
    report = extend(tokenizer, tmp_path / "more", ["無道", "[CTSTART]"], model=model, marks=["[KN]"], pad_to=16)
    larger, taught = AutoTokenizer.from_pretrained(tmp_path / "more"), T5ForConditionalGeneration.from_pretrained(tmp_path / "more")
    for old, new in ((model.shared, taught.shared), (model.lm_head, taught.lm_head)):
        torch.testing.assert_close(new.weight[len(tokenizer)], old.weight[pieces].mean(0))
    assert report["rows"] % 16 == 0 and larger.convert_tokens_to_ids(["無道", "[CTSTART]", "[KN]"]) == [len(tokenizer) + i for i in range(3)]
    assert "[KN]" in larger.all_special_tokens and "[CTSTART]" not in larger.all_special_tokens and "道" in larger.decode(larger("無道")["input_ids"])


@CLOSE
@given(before=unicode, after=unicode)
def test_a_difference_is_found_where_there_is_one(before, after):
    assert (lost(before, after) == "") is (before == after)


def test_a_comparison_counts_what_is_lost(made):
    rows = compare({name: made[name][0] for name in ("byte_bpe", "erlangshen", "randeng_bart")}, ["道可道", "１２％", "胍𠮷"], progress=False)
    assert [(row["failures"], row["beyond_blanks"]) for row in rows] == [(0, 0), (3, 1), (2, 2)] and rows[1]["unknown"] > 0 == rows[0]["unknown"]
    assert bars([dict(name="<b>", x=0)], "x", "a & b").count("<rect") == 1 and "<b>" not in bars([dict(name="<b>", x=0)], "x", "")


@CLOSE
@given(text=st.text(max_size=50))
def test_lines_hold_what_the_text_holds(text):
    lines = list(lines_of([text]))
    assert all(line and not line.isspace() and "\n" not in line for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_what_cannot_be_trained_is_explained(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    with pytest.raises(ValueError, match="SentencePiece cannot train on this text"):
        train_spm([], choose_preset("bpe", vocab_size=300))
    with pytest.raises(ValueError, match="one text is not a collection"):
        train("道可道", tmp_path / "one")
    assert not list(tmp_path.iterdir())
