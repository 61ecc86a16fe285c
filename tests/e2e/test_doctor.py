"""`fengshen doctor`: each check fails when its fault is planted, says what to do, and passes on recipes that work; nothing raises, nothing stays behind."""
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fengshen.cli import checks, doctor
from fengshen.cli.recipes import recipe_names
from tests.training_runs import TINY, cli, here, tiny_config

PAIR = dict(question="头疼怎么办？", answer="多喝温水，注意休息。")
LATER = ("step", "checkpoint", "memory", "disk")


def nan_loss(logits_nv, labels_n):
    "A loss that is not a number."
    return logits_nv[:, 0].float() * float("nan")


def raising_loss(logits_nv, labels_n):
    "A loss with a fault of its own."
    raise KeyError("no such weight")


def flat_loss(logits_nv, labels_n):
    "A loss that nothing can lower."
    return logits_nv[:, 0].float() * 0.0


def diagnosis(tmp_path, recipe="demo", **settings):
    "The findings for a recipe that runs on one device, unless told otherwise."
    before = set(tmp_path.iterdir())
    found = doctor.doctor(str(recipe), **({"run_dir": str(tmp_path / "run"), "trainer.strategy": "auto"} | settings))
    assert set(tmp_path.iterdir()) == before, "the doctor left something behind"
    return found


def failures(found):
    "{check: finding} of what failed; each has a remedy."
    failed = {name: f for name, f in found.findings.items() if f.status == "fail"}
    assert all(f.remedy for f in failed.values()), failed
    assert found.ok is not bool(failed)
    return failed


def pairs_file(folder, *lines):
    "A file of the given lines among good ones; dicts are written as JSON."
    path = Path(folder) / "pairs.jsonl"
    rows = [PAIR] * 5 + list(lines) + [PAIR] * 5
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf8")
    return str(path)


def trained_model(folder, **changes):
    "A Hugging Face folder with the weights of a tiny model and the demo's tokenizer."
    from fengshen.models.loading import from_config
    from fengshen.tokenizer import load_tokenizer

    Path(folder).mkdir(exist_ok=True)
    from_config(tiny_config(folder, **changes)).save_pretrained(folder)
    load_tokenizer("fengshen:tokenizer_demo").save_pretrained(folder)
    return str(folder)


def edited_tokenizer(folder, **changes):
    "The demo's tokenizer with changes in its configuration; None takes a key away."
    from fengshen.utils.resources import resource

    shutil.copytree(resource("fengshen:tokenizer_demo"), folder, dirs_exist_ok=True)
    path = Path(folder) / "tokenizer_config.json"
    values = json.loads(path.read_text("utf8")) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), "utf8")
    for name in ("special_tokens_map.json",):
        (Path(folder) / name).unlink(missing_ok=True)
    return str(folder)


# Recipes that work

PRETRAINING = {name for name in recipe_names() if name.startswith("pretrain_")} - {"pretrain_bert", "pretrain_t5"}

@pytest.mark.parametrize("recipe", [pytest.param(name, marks=[pytest.mark.slow] * (name in PRETRAINING)) for name in recipe_names()])
def test_the_packaged_recipes_pass_at_their_smoke_size(tmp_path, recipe):
    found = doctor.diagnose(["-c", recipe, "--smoke", "--run_dir", str(tmp_path / "run")])
    assert [f.status for f in found.findings.values()] == ["ok"] * len(doctor.CHECKS), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [
    {"data.packing": False}, {"model.attention": "eager"}, {"model.gradient_checkpointing": True}, {"trainer.precision": "bf16-mixed"}, {"data.loss_on": "all"},
    {"model.lora": {"r": 4}}, {"model.schedule": {"kind": "inverse_sqrt", "warmup_steps": 20}}, {"trainer.max_epochs": 2, "trainer.max_steps": -1}, {"model.optimizer.kind": "adamw"}])
def test_what_a_recipe_may_choose_is_rehearsed(tmp_path, changes):
    found = diagnosis(tmp_path, **changes)
    assert [f.status for f in found.findings.values()] == ["ok"] * len(doctor.CHECKS), found


def test_a_trained_folder_passes_with_its_own_tokenizer(tmp_path):
    model = trained_model(tmp_path / "model")
    found = diagnosis(tmp_path, **{"model.path": model, "data.tokenizer": None})
    assert found.ok and found.findings["tokenizer"].status == "ok", found


def test_wenzhong_with_a_local_config_in_half_a_minute(tmp_path):
    "The model of 3.5 billion parameters is examined without being built: only this machine's memory and disk may be too small for it."
    settings = {"model.path": None, "model.config": "fengshen:models/gpt2_3.5b.json", "data.train": "fengshen:qa_demo/train.jsonl", "data.tokenizer": "fengshen:tokenizer_demo"}
    start = time.process_time()
    found = diagnosis(tmp_path, "wenzhong_qa", **settings)
    assert time.process_time() - start < 30
    assert set(failures(found)) <= {"memory", "disk"}, found
    assert found.findings["step"].status == "ok" and found.memory.part("weights").device == 4 * 3_556_270_080


# Planted faults

@pytest.mark.parametrize("settings, check, remedy", [
    ({"trainer.max_stepz": 3}, "recipe", "trainer.max_steps"),
    ({"trainer.strategy": "zero33"}, "recipe", "zero3"),
    ({"model.loss": "fengshen.losses.cross_entropi"}, "recipe", "cross_entropy"),
    ({"model.config": "nowhere.json"}, "model", "spelling"),
    ({"model.attention": "flash"}, "model", "one of"),
    ({"model.path": "nowhere/at/all", "model.config": None}, "model", ""),
    ({"data.train": None}, "data", "data.train"),
    ({"data.train": "nowhere.jsonl"}, "data", "spelling"),
    ({"data.tokenizer": "./nowhere"}, "tokenizer", "spelling"),
    ({"data.max_length": 256}, "context", "128"),
    ({"data.max_length": 40}, "lengths", "drop leaves out"),
    ({"data.max_length": 5}, "lengths", "data.max_length"),
    ({"data.template": "no place for the question"}, "tokenizer", "data.template"),
    ({"checkpoint.keep": 10**9}, "disk", "checkpoint.keep"),
    ({"data.micro_batch": 10**7}, "memory", "gradient_checkpointing"),
    ({"run_dir": "/proc/nowhere/run"}, "folder", "--run_dir"),
    ({"model.loss": "tests.e2e.test_doctor.nan_loss"}, "step", ""),
    ({"model.loss": "tests.e2e.test_doctor.raising_loss"}, "step", "--trainer.max_steps 1"),
    ({"model.loss": "tests.e2e.test_doctor.flat_loss"}, "step", "trained"),
])
def test_a_planted_fault_fails_its_check(tmp_path, settings, check, remedy):
    found = diagnosis(tmp_path, **settings)
    failed = failures(found)
    assert check in failed and remedy in failed[check].found + failed[check].remedy, found
    others = set(failed) - {check}
    assert not others, found  # one fault is told once


def test_no_recipe_and_an_unknown_one(tmp_path):
    assert "recipe" in failures(doctor.diagnose([]))
    assert "did you mean 'demo'" in doctor.diagnose(["-c", "demoo"]).findings["recipe"].remedy


@pytest.mark.parametrize("line, said", [
    ("not a pair\n", "neither JSON"), ({"question": "头疼怎么办？", "answer": ""}, "empty"), ({"question": "头疼怎么办？"}, "answer"), ({"question": "头疼", "answer": 3}, "not text"), ("[1, 2]", "list")])
def test_a_bad_line_is_shown_with_its_number(tmp_path, line, said):
    settings = {"data.train": pairs_file(tmp_path, line if isinstance(line, dict) else line.strip())}
    found = diagnosis(tmp_path, **settings)
    assert set(failures(found)) == {"data"} and "line 6" in found.findings["data"].found and said in found.findings["data"].found, found
    assert "on_bad_line=skip" in found.findings["data"].remedy
    allowed = diagnosis(tmp_path, **settings, **{"data.on_bad_line": "skip"})
    assert allowed.ok and allowed.findings["data"].status == "warn"


def test_a_file_without_any_pair(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("nothing\nat all\n", "utf8")
    assert "data" in failures(diagnosis(tmp_path, **{"data.train": str(path)}))


@pytest.mark.parametrize("on_long", ["drop", "truncate", "split"])
def test_long_pairs_that_are_allowed_are_a_warning_with_their_price(tmp_path, on_long):
    path = pairs_file(tmp_path, PAIR | dict(answer="很长" * 400))
    found = diagnosis(tmp_path, **{"data.train": path, "data.on_long": on_long})
    assert found.ok and (found.findings["lengths"].status == "warn") == (on_long != "split"), found
    assert "lengths" in failures(diagnosis(tmp_path, **{"data.train": path}))


def test_a_tokenizer_of_another_model(tmp_path):
    "More tokens than the trained model has rows; on random weights the embedding grows, which is only worth a warning."
    model = trained_model(tmp_path / "model", vocab_size=500)
    found = diagnosis(tmp_path, **{"model.path": model, "data.tokenizer": "fengshen:tokenizer_demo"})
    assert "another model's tokenizer" in failures(found)["tokenizer"].remedy
    config = tiny_config(tmp_path, vocab_size=500)
    found = diagnosis(tmp_path, **{"model.config": config})
    assert found.ok and found.findings["tokenizer"].status == "warn" and "780" in found.findings["tokenizer"].found, found


def test_a_tokenizer_without_an_end(tmp_path):
    found = diagnosis(tmp_path, **{"data.tokenizer": edited_tokenizer(tmp_path / "tokenizer", eos_token=None)})
    assert "eos_token" in failures(found)["tokenizer"].remedy
    assert found.findings["lengths"].status == "skip" and found.findings["model"].status == "ok"


def test_a_tokenizer_that_ends_elsewhere_than_the_model(tmp_path):
    found = diagnosis(tmp_path, **{"model.config": tiny_config(tmp_path, eos_token_id=7)})
    assert found.ok and "7" in found.findings["tokenizer"].found and found.findings["tokenizer"].status == "warn"


def test_a_tokenizer_that_does_not_know_the_language(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "Question": 2, ":": 3, "answer": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(tmp_path / "english")
    found = diagnosis(tmp_path, **{"data.tokenizer": str(tmp_path / "english"), "data.on_long": "truncate"})
    assert "unknown tokens" in failures(found)["vocabulary"].found


def test_a_folder_without_weights(tmp_path):
    model = Path(trained_model(tmp_path / "model"))
    (model / "model.safetensors").unlink()
    found = diagnosis(tmp_path, **{"model.path": str(model), "data.tokenizer": "fengshen:tokenizer_demo"})
    assert "no weights" in failures(found)["model"].found


def test_an_unreachable_hub_is_one_failed_check(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent / "no-cache"))
    found = diagnosis(tmp_path, **{"model.path": "IDEA-CCNL/no-such-model", "data.tokenizer": "fengshen:tokenizer_demo"})
    assert set(failures(found)) == {"model"} and "hf download" in found.findings["model"].remedy
    assert all(found.findings[name].status == "ok" for name in ("tokenizer", "data", "lengths", "vocabulary", "labels", "folder")), found
    assert all(found.findings[name].status == "skip" for name in LATER)
    own = diagnosis(tmp_path, **{"model.path": "IDEA-CCNL/no-such-model", "data.tokenizer": None})
    assert set(failures(own)) == {"model"} and own.findings["tokenizer"].status == "skip"


@pytest.mark.parametrize("tool, said", [("ninja", "ninja is not on PATH"), ("c++", "no C++ compiler")])
def test_a_tool_that_deepspeed_needs(tmp_path, monkeypatch, tool, said):
    tools = tmp_path.parent / f"tools-without-{tool[:1]}"
    tools.mkdir(exist_ok=True)
    for name in {"ninja", "c++"} - {tool}:
        (tools / name).write_text("#!/bin/sh\n", "utf8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    found = diagnosis(tmp_path, **{"trainer.strategy": "zero3"})
    assert set(failures(found)) == {"compiler"} and said in found.findings["compiler"].found
    assert diagnosis(tmp_path).findings["compiler"].status == "ok", "without DeepSpeed nothing is compiled"


def test_a_package_outside_its_range(tmp_path, monkeypatch):
    real = checks.metadata.version
    monkeypatch.setattr(checks.metadata, "version", lambda name: "4.57.0" if name == "transformers" else real(name))
    found = diagnosis(tmp_path)
    assert "transformers 4.57.0 is outside" in failures(found)["environment"].found and found.findings["step"].status == "ok"


def test_several_processes_are_added_up(tmp_path):
    one, two = (diagnosis(tmp_path, **{"trainer.strategy": "zero3", "trainer.devices": n}) for n in (1, 2))
    assert one.ok and two.ok and "2 processes" in two.findings["recipe"].found
    assert two.memory.part("process").host == 2 * one.memory.part("process").host and two.memory.part("optimizer").device * 2 == one.memory.part("optimizer").device


def test_what_has_no_formula_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "strategy_name", lambda case: "fsdp")
    found = diagnosis(tmp_path)
    assert found.ok and found.findings["memory"].status == "warn" and found.findings["disk"].status == "skip", found


def test_labels_that_miss_their_end(tmp_path, monkeypatch):
    from fengshen.data.task_dataloader.conversations import ConversationDataset

    real = ConversationDataset.__getitem__

    def without_end(self, i):
        sample = real(self, i)
        sample["labels"][-1] = -100
        return sample

    monkeypatch.setattr(ConversationDataset, "__getitem__", without_end)
    assert set(failures(diagnosis(tmp_path))) == {"labels"}


def test_a_checkpoint_that_lost_something(tmp_path, monkeypatch):
    from fengshen.training import weights

    real = weights.read_weights

    def changed(path):
        found = real(path)
        name = next(iter(found))
        found[name] = found[name] + 1
        return found

    monkeypatch.setattr(weights, "read_weights", changed)
    assert set(failures(diagnosis(tmp_path))) == {"checkpoint"}


@pytest.mark.parametrize("error", [RuntimeError("something\nelse"), AssertionError(), SystemExit(3), torch.cuda.OutOfMemoryError("no memory"), ValueError("plain")])
def test_an_exception_nobody_foresaw_is_a_failed_check(tmp_path, monkeypatch, error):
    def broken(case):
        raise error

    monkeypatch.setitem(doctor.CHECKS, "context", (broken, "a remedy"))
    found = diagnosis(tmp_path)
    assert set(failures(found)) == {"context"} and found.findings["context"].remedy == "a remedy"
    assert type(error).__name__ in found.findings["context"].found or str(error) == found.findings["context"].found
    assert "\n" not in doctor.finding_lines("context", found.findings["context"]).split("\n")[0]


def test_a_finished_run_in_the_folder_is_told(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}", "utf8")
    found = diagnosis(tmp_path)
    assert found.ok and found.findings["folder"].status == "warn" and (tmp_path / "run" / "summary.json").exists()


# Corpora and objectives

CHARACTERS = "白日依山尽黄河入海流欲穷千里目更上一层楼床前明月光疑是地霜举头望低思故乡，。"
LINES = ["白日依山尽，黄河入海流。", "欲穷千里目，更上一层楼。", "床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"]
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dict(layers=3, attention_heads=2, ffn_dim=32).items()}
SHAPES = dict(
    bert=dict(model_type="bert", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32),
    t5=dict(model_type="fengshen-megatron-t5", d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0),
    bart=dict(model_type="fengshen-bart", d_model=16, bos_token_id=2, decoder_start_token_id=3, forced_eos_token_id=3, **SIDES),
    roformer=dict(model_type="fengshen-roformer", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32),
    roberta=dict(model_type="roberta", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32),
    gpt2=dict(model_type="gpt2", n_embd=16, n_layer=3, n_head=2),
)


def characters(folder, sentinels=20, order=1):
    "A tokenizer of characters with marks for every objective, saved in a folder; of another order, it has other ids."
    from transformers import BertTokenizer

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{i}>" for i in range(sentinels))]
    made = BertTokenizer(vocab={word: i for i, word in enumerate([*marks, *dict.fromkeys(CHARACTERS[::order])])}, eos_token="[SEP]", additional_special_tokens=marks[5:])
    made.save_pretrained(folder)
    return made


def corpus(folder, tokenizer, texts, end=True):
    "The path of a tokenised corpus."
    from fengshen.data.mmap_dataloader.mmap_writer import write_mmap

    write_mmap(folder, (tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end for text in texts), tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A tokenizer, corpora of good and of poor texts, and a small model of each architecture."
    folder = tmp_path_factory.mktemp("objectives")
    made = characters(folder / "tokenizer")
    poems = ["".join(LINES[(i + j) % 4] for j in range(4)) for i in range(40)]
    for name, texts in dict(poems=poems, titles=["白日依山尽"] * 60, empty=[""] * 60 + poems, strange=["猫狗鸟鱼"] * 60, little=["白日"]).items():
        corpus(folder / name, made, texts)
    corpus(folder / "endless", made, poems, end=False)
    for name, shape in SHAPES.items():
        (folder / f"{name}.json").write_text(json.dumps(dict(vocab_size=len(made), max_position_embeddings=32, pad_token_id=0, eos_token_id=3) | shape), "utf8")
    return folder


def words(place, tmp_path, shape, objective, **more):
    "Settings of a run on the poems."
    given = {"model.config": str(place / f"{shape}.json"), "data.train": str(place / "poems"), "data.valid": None, "data.split": "80,20", "data.tokenizer": str(place / "tokenizer"),
             "data.objective": objective, "data.max_length": 32, "data.micro_batch": 4, "trainer.max_steps": 20, "trainer.strategy": "auto", "run_dir": str(tmp_path / "run")}
    return given | more


def read_only(place, tmp_path, *args, **more):
    "{check: finding} of the checks that train nothing."
    from fengshen.cli.fit import words as command_line

    case = checks.Case(command_line("demo", words(place, tmp_path, *args, **more)))
    return {name: doctor.examine(check, case, remedy) for name, (check, remedy) in doctor.CHECKS.items() if name not in ("environment", "compiler", "folder", *LATER)}


@pytest.mark.parametrize("shape, objective, more", [
    ("bert", "Bert", {"data.objective.sentence_order": True}), ("t5", "T5", {}), pytest.param("bart", "Infill", {}, marks=pytest.mark.slow), pytest.param("roformer", "UniLM", {}, marks=pytest.mark.slow),
    pytest.param("gpt2", None, {}, marks=pytest.mark.slow)])
def test_objectives_are_examined_to_the_last_check(place, tmp_path, shape, objective, more):
    found = diagnosis(tmp_path, **words(place, tmp_path, shape, objective, **more))
    assert [f.status for f in found.findings.values()] == ["ok"] * len(doctor.CHECKS), found


@pytest.mark.parametrize("shape, objective, settings, check, status, said", [
    ("t5", "T5", {"data.tokenizer": "few"}, "tokenizer", "fail", "more spans than the tokenizer has sentinels"),
    ("t5", "T5", {"data.tokenizer": "none"}, "tokenizer", "fail", "no sentinels"),
    ("bert", "Bert", {"data.max_length": 2}, "tokenizer", "fail", "no room for text"),
    ("bert", "Bert", {"data.tokenizer": "other"}, "data", "fail", "written with another tokenizer"),
    ("bert", "Bert", {"data.train": "empty"}, "data", "warn", "of a token or none"),
    ("bert", "Bert", {"data.valid": "poems", "data.split": None}, "data", "warn", "data.valid is what is trained on"),
    ("bert", "Bert", {"data.train": "little"}, "lengths", "fail", "shorter than one window"),
    ("bert", "Bert", {"data.train": "strange"}, "vocabulary", "fail", "unknown tokens"),
    ("t5", "T5", {"data.objective.rate": 0.6, "data.objective.mean_span": 8}, "context", "fail", "targets are longer than the decoder's positions"),
    ("bert", "Bert", {"data.train": "titles", "data.objective.sentence_order": True}, "labels", "warn", "rows have only one"),
    ("gpt2", None, {"data.train": "endless"}, "labels", "warn", "0% of the documents close with"),
    ("gpt2", "Bert", {}, "model", "fail", "AutoModelForMaskedLM"),
    ("roberta", "Bert", {}, "context", "fail", "at most 31 tokens"),
    ("t5", "Pairs", {}, "data", "fail", "no questions and answers"),
])
def test_what_is_wrong_with_an_objective_is_told_once(place, tmp_path, shape, objective, settings, check, status, said):
    for name, changes in dict(few=dict(sentinels=1), none=dict(sentinels=0), other=dict(order=-1)).items():
        if settings.get("data.tokenizer") == name:
            characters(place / name, **changes)
    at = {key: str(place / value) if key in ("data.tokenizer", "data.train", "data.valid") and value else value for key, value in settings.items()}
    found = read_only(place, tmp_path, shape, objective, **at)
    assert {name for name, finding in found.items() if finding.status in ("warn", "fail")} == {check}, found
    assert found[check].status == status and said in found[check].found and found[check].remedy, found[check]


def test_a_corpus_that_does_not_say_who_wrote_it(place, tmp_path):
    "Megatron's files carry no mark: ids beyond the vocabulary are another tokenizer's."
    from fengshen.data.megatron_dataloader.builder import IndexedDatasetBuilder

    with IndexedDatasetBuilder(tmp_path / "others", np.uint16) as builder:
        for _ in range(20):
            builder.add_document(np.arange(5, 95, dtype=np.uint16), [90])
    found = read_only(place, tmp_path, "gpt2", None, **{"data.train": str(tmp_path / "others")})
    assert found["vocabulary"].status == "fail" and "the id 94" in found["vocabulary"].found, found


# The command line

@pytest.mark.slow
def test_json_is_one_object_and_nothing_else(tmp_path):
    done = cli("doctor", "-c", "demo", "--run_dir", tmp_path / "run", "--json", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and [row["name"] for row in report["checks"]] == list(doctor.CHECKS)
    assert {row["status"] for row in report["checks"]} == {"ok"} and report["memory"]["device"] > 0
    assert list(tmp_path.iterdir()) == []


def test_exit_status_and_lines(tmp_path):
    words = ["doctor", "-c", "demo", "--run_dir", tmp_path / "run", "--trainer.strategy", "auto"]
    status, out, err = here(*words)
    assert status == 0 and not err and len(out.splitlines()) == len(doctor.CHECKS) + 1, out + err
    status, out, err = here(*words, "--data.max_length", "40")
    assert status == 1 and "Traceback" not in out + err
    lines = out.splitlines()
    failed = [i for i, line in enumerate(lines) if line.startswith("fail")]
    assert len(failed) == 1 and lines[failed[0] + 1].strip().startswith("-> choose data.on_long")
    status, out, err = here(*words, "--json", "--no.such.key", "1")
    assert status == 1 and not json.loads(out)["ok"]


def test_help_names_the_checks():
    status, out, err = here("doctor", "--help")
    assert status == 0 and all(name in out for name in doctor.CHECKS)
    assert "doctor" in here()[1]


def test_every_check_is_in_the_how_to(root):
    text = "".join("".join(cell["source"]) for cell in json.loads((root / "nbs/howto/doctor.ipynb").read_text("utf8"))["cells"])
    assert all(f"| {name} |" in text for name in doctor.CHECKS)


# Architectures

@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "opt", "bloom", "gpt_neox", "gptj", "phi3", "mixtral", "qwen3_moe", "glm4", "falcon"])
def test_any_architecture_can_be_made_small(kind):
    from transformers import CONFIG_MAPPING

    from fengshen.cli.rehearsal import small_config, why_not_small

    config = CONFIG_MAPPING[kind]()
    small = small_config(config)
    assert why_not_small(small) == "" and small.vocab_size == config.vocab_size and small.num_hidden_layers <= 6 and type(small) is type(config)


@pytest.mark.parametrize("kind, auto", [("bert", "MaskedLM"), ("roberta", "MaskedLM"), ("deberta-v2", "MaskedLM"), ("megatron-bert", "PreTraining"), ("fengshen-longformer", "MaskedLM"), ("t5", "Seq2SeqLM"), ("pegasus", "Seq2SeqLM"),
                                        ("fengshen-megatron-t5", "Seq2SeqLM"), ("fengshen-bart", "TextInfill")])
def test_any_kind_of_model_can_be_made_small(kind, auto):
    from transformers import CONFIG_MAPPING

    from fengshen.cli.rehearsal import small_config, why_not_small
    from fengshen.models import auto as classes

    whole = CONFIG_MAPPING[kind]().to_dict() | dict(vocab_size=300)
    small = small_config(CONFIG_MAPPING[kind].from_dict(whole))
    assert why_not_small(small, getattr(classes, f"AutoModelFor{auto}")) == "" and small.vocab_size == 300 and small.hidden_size == 64 and small.num_hidden_layers == 2


@pytest.mark.parametrize("kind, changes", [("llama", dict(num_key_value_heads=2)), ("qwen3", dict(head_dim=16)), ("gpt_neox", {})])
def test_another_architecture_from_end_to_end(tmp_path, kind, changes):
    config = dict(model_type=kind, vocab_size=1280, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
                  pad_token_id=1)
    (tmp_path / "config.json").write_text(json.dumps(config | changes), "utf8")
    found = diagnosis(tmp_path, **{"model.config": str(tmp_path / "config.json")})
    assert found.ok and found.findings["step"].status == "ok", found


def test_an_architecture_that_cannot_be_made_small_is_a_warning(tmp_path, monkeypatch):
    from fengshen.cli import rehearsal

    monkeypatch.setattr(rehearsal, "why_not_small", lambda *model: "RuntimeError: no")
    found = diagnosis(tmp_path)
    assert found.ok and found.findings["step"].status == "warn" and found.findings["checkpoint"].status == "skip" and found.findings["memory"].status == "ok"


def test_the_environment_of_this_process_is_left_alone(tmp_path):
    before, folder = dict(os.environ), os.getcwd()
    diagnosis(tmp_path, **{"model.config": tiny_config(tmp_path)})
    assert dict(os.environ) == before and os.getcwd() == folder and TINY["vocab_size"] == 1280
