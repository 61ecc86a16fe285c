"""fengshen tokenizer as it is typed: files of any format, refusals without tracebacks, nothing half-written, mT5 to Randeng-T5 in one line."""
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from fengshen.cli.main import main
from fengshen.tokenizer import load_tokenizer, train

TEXTS = ["道可道，非常道。名可名，非常名。", "無名天地之始；有名萬物之母。", "insulin resistance 2023"] * 5


@pytest.fixture
def files(tmp_path):
    "The same texts as compressed JSON lines, plain text and Parquet."
    lines = "\n".join(json.dumps(dict(content=text), ensure_ascii=False) for text in TEXTS)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), "utf-8")
    pq.write_table(pa.table(dict(content=TEXTS)), tmp_path / "a.parquet")
    return tmp_path


def run(*words):
    "The exit status of a command."
    return main(["tokenizer", *map(str, words)])


def test_the_format_of_the_files_does_not_matter(files):
    for name in ("a.jsonl.xz", "a.txt", "a.parquet"):
        assert run("train", files / name, "--out", files / name.replace(".", "-"), "--preset", "erlangshen", "--vocab_size", 90, "--lowercase", "false") == 0
    tokenizers = [(files / name / "tokenizer.json").read_bytes() for name in ("a-jsonl-xz", "a-txt", "a-parquet")]
    assert len(set(tokenizers)) == 1 and json.loads((files / "a-txt/training.json").read_text())["lowercase"] is False


@pytest.mark.parametrize("words, message", [
    (["train", "a.txt", "--preset", "wenzong"], "did you mean 'wenzhong'"),
    (["train", "a.txt", "--preset", "wenzhong", "--coverage", "0.9"], "unknown setting"),
    (["train", "a.txt", "--chat_template", "chatmel"], "did you mean 'chatml'"),
    (["train", "a.jsonl.xz", "--field", "txet"], "none of the fields txet is there"),
    (["train", "a.txt", "--preset", "bpe", "--coverage", "1.5"], "above 0, at most 1"),
    (["trim", "fengshen:tokenizer_demo"], "texts, or a list of ids to keep"),
    (["extend", "fengshen:tokenizer_demo"], "nothing to add"),
    (["compare", "fengshen:tokenizer_demo"], "no text to compare on"),
    (["trian"], "did you mean 'train'"),
])
def test_refusals(files, capsys, monkeypatch, words, message):
    monkeypatch.chdir(files)
    out = ["--out", "new"] if words[0] in ("train", "trim", "extend") else []
    assert run(*words, *out) == 2
    assert message in (seen := capsys.readouterr().err) and "Traceback" not in seen and not (files / "new").exists()


def test_bad_lines_are_counted_and_left_out(files, capsys):
    (files / "bad.jsonl").write_text('{"text": "道可道"}\n{"text": 1}\n"\n{"text": "\\ud800"}\n', "utf-8")
    assert run("train", files / "bad.jsonl", "--out", files / "x") == 2 and "--on_bad_line skip" in capsys.readouterr().err
    assert run("train", files / "bad.jsonl", "--out", files / "x", "--on_bad_line", "skip", "--vocab_size", 300) == 0
    assert "skipped: 3 entries" in capsys.readouterr().out


def test_what_was_interrupted_leaves_no_folder(files, monkeypatch):
    "The tokenizer's own files are written, the record is not; then the same command again."
    words = "train", files / "a.txt", "--out", files / "new", "--vocab_size", 300

    def interrupted(record):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "as_json", interrupted)
        run(*words)
    assert not (files / "new").exists()
    half = files / "new.work"
    half.mkdir(exist_ok=True)
    (half / "rest").write_text("of an earlier call")
    assert run(*words) == 0 and not half.exists() and not (files / "new/rest").exists()
    assert run(*words) == 2, "what is there is not written over"


def test_mt5_to_randeng_t5(files, capsys):
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    assert run("train", files / "a.txt", "--out", files / "mt5", "--preset", "randeng-t5", "--vocab_size", 440) == 0
    tokenizer = load_tokenizer(files / "mt5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=448, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False, architectures=["T5ForConditionalGeneration"])
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(files / "mt5")
    (files / "some.txt").write_text(TEXTS[0])
    assert run("trim", files / "mt5", "--texts", files / "some.txt", "--model", files / "mt5", "--out", files / "small") == 0
    assert "1 of 1 texts are cut as before" in capsys.readouterr().out
    keep, small = json.loads((files / "small/keep_tokens.json").read_text()), load_tokenizer(files / "small")
    sliced = T5ForConditionalGeneration.from_pretrained(files / "small").eval()
    text = TEXTS[0] + "<extra_id_0>"
    old, new = tokenizer(text, return_tensors="pt")["input_ids"], small(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = model(input_ids=old, decoder_input_ids=old).logits, sliced(input_ids=new, decoder_input_ids=new).logits
    assert torch.allclose(before[..., keep], after, atol=1e-5) and len(keep) < len(tokenizer) and small.convert_tokens_to_ids("<extra_id_0>") == len(small) - 1
    assert run("trim", files / "mt5", "--keep", files / "small/keep_tokens.json", "--out", files / "again") == 0
    assert (files / "again/tokenizer.json").read_bytes() == (files / "small/tokenizer.json").read_bytes()


def test_tokens_of_a_file_and_a_comparison(files, capsys):
    (files / "new.txt").write_text("胰岛素\n糖尿病\n\n", "utf-8")
    assert run("extend", "fengshen:tokenizer_demo", "--tokens_file", files / "new.txt", "--chat_template", "chatml", "--out", files / "more") == 0
    assert load_tokenizer(files / "more").tokenize("胰岛素") == ["胰岛素"]
    capsys.readouterr()
    assert run("compare", "fengshen:tokenizer_demo", files / "more", "--texts", files / "new.txt", "--html", files / "page.html", "--plot", files / "bars.svg") == 0
    demo, more = capsys.readouterr().out.splitlines()[-2:]
    assert more.split()[0] == "more" and more.split()[2] == "3.000" and float(demo.split()[2]) < 1
    assert "<table>" in (files / "page.html").read_text("utf-8") and (files / "bars.svg").read_text("utf-8").startswith("<svg")


def test_help(capsys):
    assert run("--help") == 0 and "train,trim,extend,compare" in capsys.readouterr().out and run() == 2
    with pytest.raises(SystemExit) as end:
        run("train", "--help")
    assert end.value.code == 0 and "randeng_t5" in capsys.readouterr().out
