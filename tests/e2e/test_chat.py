"The template of a finetune reaches whoever talks to the model: in the export, in generation's settings, in `fengshen chat`."

import io
import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

import fengshen
from fengshen.cli.main import main
from fengshen.data.task_dataloader.templates import find_template
from fengshen.pipelines.chat import Chat
from fengshen.tokenizer import load_tokenizer
from fengshen.training.export import export

TALK = [dict(role="system", content="你是医生。"), dict(role="user", content="头疼怎么办？"), dict(role="assistant", content="多休息。"), dict(role="user", content="还疼呢？")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Two steps on chats, under ChatML, with a tokenizer that has its tokens."
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = load_tokenizer("fengshen:tokenizer_demo")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", "<|im_end|>"]))
    tokenizer.save_pretrained(folder / "tokenizer")
    talks = [dict(messages=[*TALK, dict(role="assistant", content="去医院。" * (1 + n % 3))]) for n in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in talks), "utf8")
    settings = {
        "run_dir": str(folder / "run"), "data.train": str(folder / "chats.jsonl"), "data.valid": None, "data.tokenizer": str(folder / "tokenizer"),
        "data.template": "chatml", "model.samples": 0, "trainer.max_steps": 2, "trainer.strategy": "auto", "trainer.val_check_interval": None,
    }
    return fengshen.fit("demo", settings)


def test_the_export_carries_template_and_end(run):
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    prompt = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert prompt == find_template("chatml", tokenizer)[0].history(TALK)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(GenerationConfig.from_pretrained(run.export).eos_token_id) == {end, tokenizer.eos_token_id}
    report = json.loads((run.dir / "data.json").read_text("utf8"))["train"]
    assert (report["template"], report["conversations"], report["duplicates"], report["steps_per_epoch"]) == ("chatml", 12, 9, 2)


@pytest.mark.slow
def test_an_export_of_the_checkpoint_carries_them_too(run, tmp_path):
    export(run.dir, out=tmp_path / "again")
    assert (tmp_path / "again/chat_template.jinja").read_text("utf8") == (run.export / "chat_template.jinja").read_text("utf8")
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == GenerationConfig.from_pretrained(run.export).eos_token_id


def test_chat_asks_with_the_template_and_stops_at_its_end(run):
    chat = Chat(str(run.export), system="你是医生。", max_new_tokens=6)
    assert chat.template.end == "<|im_end|>"
    end, passes = chat.tokenizer.convert_tokens_to_ids("<|im_end|>"), []

    def third_is_the_end(module, inputs, logits):
        passes.append(1)
        logits[:, :, :] = 0
        logits[:, :, end if len(passes) == 3 else 300] = 1
        return logits

    chat.model.lm_head.register_forward_hook(third_is_the_end)
    assert chat.answer("头疼怎么办？") == chat.tokenizer.decode([300, 300]) and len(passes) == 3, "three passes, not the six it might take"
    assert chat.template.history(chat.messages).startswith("<|im_start|>system\n你是医生。<|im_end|>\n<|im_start|>user\n头疼怎么办？<|im_end|>\n")


def test_the_command_answers_and_ends(run, capsys):
    assert main(["chat", str(run.export), "--message", "头疼怎么办？", "--message", "还疼呢？", "--max_new_tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert main(["chat", str(run.export), "--template", "zyia", "--message", "头疼？"]) == 2
    assert "did you mean 'ziya'?" in capsys.readouterr().err
    assert main(["chat", str(run.export), "--message", " "]) == 2


def test_a_conversation_from_the_keyboard(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("头疼怎么办？\n" + "疼" * 500 + "\n/reset\n你好\n"))
    assert main(["chat", str(run.export), "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "too long for the model" in out and "/reset begins anew" in out
