"Prompts in batches by length: every family, cache and list gives each prompt the text that it gets alone."

import json
import random
import subprocess
import sys

import pytest
import torch
import transformers as stock
from transformers import CompileConfig

from fengshen.cli.main import main
from fengshen.models.generation import Group, continue_ids, generate_batched, groups_of, may_pad, rounded, stops
from fengshen.models.roformer import RoFormerConfig, RoFormerForCausalLM
from fengshen.pipelines.generate import generate_file, read_prompts
from fengshen.tokenizer import load_tokenizer
from fengshen.utils.device import seeded

IDS = dict(vocab_size=99, bos_token_id=1, eos_token_id=1, pad_token_id=0)
LLAMA = IDS | dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                   initializer_range=0.2)
FAMILIES = dict(
    gpt2=(stock.GPT2Config, stock.GPT2LMHeadModel, IDS | dict(n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)),
    llama=(stock.LlamaConfig, stock.LlamaForCausalLM, LLAMA),
    mistral=(stock.MistralConfig, stock.MistralForCausalLM, LLAMA | dict(sliding_window=6)),
    mamba=(stock.MambaConfig, stock.MambaForCausalLM, IDS | dict(hidden_size=16, num_hidden_layers=1, state_size=4)),
    roformer=(RoFormerConfig, RoFormerForCausalLM, IDS | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2)),
    t5=(stock.T5Config, stock.T5ForConditionalGeneration, IDS | dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, initializer_factor=3.0)),
)
PROMPTS = [[random.Random(n).randrange(5, 99) for _ in range(n)] for n in (2, 8, 3, 17, 7, 5)]


def made(name):
    "A tiny model whose scores are far apart."
    config, model, sizes = FAMILIES[name]
    with seeded(0):
        return model(config(**sizes)).eval()


def alone(model, ids, new, ends=(1,), **settings):
    "What transformers writes for each prompt by itself."
    begin = (lambda row: 1) if model.config.is_encoder_decoder else len
    options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=list(ends)) | settings
    found = [model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **options)[0] for row in ids]
    return [out[begin(row) :].tolist() for row, out in zip(ids, found)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_writes_what_each_would_alone(name):
    model = made(name)
    wanted = alone(model, PROMPTS, 8)
    ends = [1, wanted[1][4], wanted[4][0]]  # one text stops in the middle, one at once
    stopped = alone(model, PROMPTS, 8, ends)
    assert len({len(row) for row in stopped}) > 1
    for cache in ("dynamic", "static"):
        assert continue_ids(model, PROMPTS, 8, stops=ends, budget=40, cache=cache) == stopped
    assert continue_ids(model, PROMPTS[::-1], 8, stops=[1], pad=98, budget=10_000) == wanted[::-1]


def test_a_static_cache_carries_nothing_from_batch_to_batch():
    "Three batches of one shape share a cache: poisoned by the first, it would show in the others."
    model = made("llama")
    ids = [row * 2 for row in ([7, 8], [50, 60], [9, 9], [30, 2], [80, 81], [5, 6])]
    assert continue_ids(model, ids, 6, budget=2 * 10, cache="static", stops=[1]) == alone(model, ids, 6)
    model.train()
    continue_ids(model, ids[:1], 2)
    assert model.training


@pytest.mark.slow  # the compiler's front end loads for some seconds
def test_a_shape_is_compiled_once():
    "Batches are filled up and caches used again, so that there is one graph a shape, whatever the prompts."
    graphs, model, lengths = [], made("llama"), [300, 4, 5, 6, 7, 3]
    model.config.max_position_embeddings = 1024

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    how = CompileConfig(dynamic=False, backend=backend, mode=None)
    how._compile_all_devices = True
    ids = [[5 + i % 90 for i in range(n)] for n in lengths]
    found = continue_ids(model, ids, 3, stops=[1], budget=2048, cache="static", compile=True, compile_config=how)
    assert [(g.size, g.length, len(g.rows)) for g in groups_of(lengths, 3, 2048, repeat=True)] == [(4, 512, 4), (4, 512, 2)]
    assert found == alone(model, ids, 3) and len(graphs) == 1


def test_any_lengths_are_all_there_and_within_the_budget():
    for seed in range(60):
        draw = random.Random(seed)
        lengths, new = [draw.randint(1, 60) for _ in range(draw.randint(1, 40))], draw.randint(1, 20)
        budget, context, padded, repeat = draw.choice((1, 90, 400, 5000)), draw.choice((None, 64)), draw.random() < 0.7, draw.random() < 0.5
        groups = groups_of(lengths, new, budget, context, padded, repeat)
        assert sorted(i for g in groups for i in g.rows) == list(range(len(lengths)))
        for g in groups:
            longest = max(lengths[i] for i in g.rows)
            assert 1 <= len(g.rows) <= g.size and longest + g.new <= g.length and (g.size == 1 or g.size * g.length <= budget)
            assert all(g.new == (new if context is None else min(new, context - lengths[i])) for i in g.rows)
            assert padded or len({lengths[i] for i in g.rows}) == 1
    assert [rounded(n) for n in (1, 256, 257, 1025)] == [256, 256, 512, 2048] and groups_of([3], 2, 100) == [Group([0], 2, 1, 5)]


def test_the_end_of_the_context_is_each_prompts_own(capsys):
    "The longest have room for a few tokens; the others write all they were asked for."
    model = made("gpt2")
    ids = [list(range(5, 5 + n)) for n in (60, 10, 63, 61, 60)]
    found = continue_ids(model, ids, 12, budget=10_000)
    assert [len(row) for row in found] == [4, 12, 1, 3, 4]
    assert found == [alone(model, [row], min(12, 64 - len(row)), [-1])[0] for row in ids]
    assert "4 of 5 texts end with the model's context of 64 tokens, before 12 new ones" in capsys.readouterr().out


def test_a_penalty_does_not_count_the_padding():
    "Prompts of one length only share a batch; otherwise the end, which pads, would be punished."
    model = made("gpt2")
    model.generation_config.repetition_penalty = 1.7
    assert not may_pad(model)[0]
    assert continue_ids(model, PROMPTS, 8, stops=[1], pad=1) == alone(model, PROMPTS, 8)


def test_beams_are_beams_in_a_batch_too():
    model = made("llama")
    found = continue_ids(model, PROMPTS, 6, stops=[1], budget=100, num_beams=3, cache="static")
    assert found == alone(model, PROMPTS, 6, num_beams=3)


def test_a_draw_does_not_depend_on_its_neighbours():
    model = made("llama")
    found = continue_ids(model, PROMPTS, 6, top_p=0.95, seed=7, budget=40)
    other = continue_ids(model, [[9] * 20, *PROMPTS[::-1]], 6, top_p=0.95, seed=7)
    assert found == other[:0:-1] and found != continue_ids(model, PROMPTS, 6, top_p=0.95, seed=8)
    twice = continue_ids(model, PROMPTS[:1] * 2, 6, top_p=0.95, seed=7)
    assert twice[0] == found[0] != twice[1]
    assert continue_ids(model, PROMPTS, 6, seed=7, do_sample=True) == continue_ids(model, PROMPTS, 6, top_p=1.0, seed=7, budget=40)
    assert continue_ids(model, PROMPTS, 6, stops=[1], do_sample=True, top_k=1, temperature=3.0) == alone(model, PROMPTS, 6)
    assert continue_ids(model, PROMPTS, 6, top_p=1e-6, stops=[1]) == alone(model, PROMPTS, 6)  # only the likeliest is left


def test_choices_are_told_for_long_lists_and_where_something_asked_for_is_not_to_be_had(capsys):
    model = made("mamba")
    continue_ids(model, PROMPTS[:2], 2, cache="static", compile=True)
    said = capsys.readouterr().out
    assert "cache = dynamic: transformers has no static one for MambaForCausalLM" in said and "compile = False" in said
    continue_ids(model, PROMPTS[:2], 2)
    assert not capsys.readouterr().out
    continue_ids(model, PROMPTS * 3, 2)
    assert "batches = of equal length: MambaForCausalLM takes no positions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A Hugging Face folder."
    place, tokenizer = tmp_path_factory.mktemp("model"), load_tokenizer("fengshen:tokenizer_demo")
    with seeded(0):
        model = stock.GPT2LMHeadModel(stock.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
                                                       bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_prompts_of_a_file(folder, tmp_path, capsys):
    texts, out = ["头疼怎么办？", "{不是 JSON}", "中国的首都是哪里？"], tmp_path / "new/texts.jsonl"
    (tmp_path / "lines.txt").write_text("\ufeff" + "\r\n\n".join(texts), "utf8")
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "lines.txt"), "--out", str(out), "--max_new_tokens", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text("utf8").splitlines()]
    model, tokenizer = stock.GPT2LMHeadModel.from_pretrained(folder), load_tokenizer(str(folder))
    assert [row["prompt"] for row in rows] == texts
    assert [row["text"] for row in rows] == [generate_batched(model, tokenizer, [text], 4)[0] for text in texts]
    assert stops(model, tokenizer) == [tokenizer.eos_token_id] and "3 texts in" in capsys.readouterr().out


@pytest.mark.parametrize("line, wrong", [("{", "line 2 of asked.jsonl is no prompt"), ("[1]", "line 2"), ('{"prompt": ""}', "line 2"), ('{"prompt": 3}', "line 2")])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, wrong):
    (tmp_path / "asked.jsonl").write_text('"问"\n' + line, "utf8")
    with pytest.raises(ValueError, match=wrong):
        read_prompts(tmp_path / "asked.jsonl")


def test_a_crash_loses_only_what_is_not_done(folder, tmp_path, capsys):
    "Every batch before the fault is in OUT.part, with its place; the next start puts it aside, and ends with all in order and no part."
    records, out = [dict(prompt="头" * n, id=n, at="mine") for n in (3, 9, 1, 5)], tmp_path / "texts.jsonl"
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf8")
    model, tokenizer = stock.GPT2LMHeadModel.from_pretrained(folder), load_tokenizer(str(folder))
    write, calls = model.generate, []

    def faulty(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) == 3:
            raise MemoryError("planted")
        return write(*args, **kwargs)

    model.generate = faulty
    again = dict(max_new_tokens=4, budget=1)
    with pytest.raises(MemoryError, match="planted"):
        generate_file((model, tokenizer), tmp_path / "asked.jsonl", out, **again)
    part = [json.loads(line) for line in (tmp_path / "texts.jsonl.part").read_text("utf8").splitlines()]
    alone = [generate_batched(model, tokenizer, [r["prompt"]], 4)[0] for r in records]
    assert [row["at"] for row in part] == [1, 3] and all(row["text"] == alone[row["at"]] and row["id"] == records[row["at"]]["id"] for row in part)
    assert generate_file((model, tokenizer), tmp_path / "asked.jsonl", out, **again) == 4
    assert [json.loads(line) for line in out.read_text("utf8").splitlines()] == [r | dict(text=text) for r, text in zip(records, alone)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["asked.jsonl", "texts.jsonl", "texts.jsonl.part.aside"] and "did not end" in capsys.readouterr().out


def test_a_file_of_prompts_needs_a_file_of_texts(folder, tmp_path, capsys):
    (tmp_path / "none.txt").write_text("\n", "utf8")
    assert main(["generate", str(folder), "--prompts", "absent"]) == 2 and "belong together" in capsys.readouterr().err
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "none.txt"), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert "a file of prompts is empty" in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size(root, tmp_path):
    words = [sys.executable, "benchmarks/generation.py", "--device", "cpu", "--models", "gpt2-tiny", "--prompts", "6", "--singles", "2", "--new", "4"]
    done = subprocess.run([*words, "--out", str(tmp_path / "rows.jsonl")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf8").splitlines()]
    assert [row["equal"] for row in rows if "ratio" in row] == [1.0, 1.0] and len(rows) == 3
