"""The same conversations through FengShen, TRL and LLaMA-Factory, token by token and mask by mask: a JSON line each comparison.

usage: DISABLE_VERSION_CHECK=1 PYTHONPATH=FOLDER python benchmarks/peers_data.py [--data FOLDER] [--tokenizer FOLDER] [--out FILE]

The peers are not needed by FengShen and are kept out of its environment: `pip install --no-deps --target FOLDER trl llamafactory omegaconf
antlr4-python3-runtime==4.9.3 av fire termcolor tyro`, and an empty FOLDER/torchaudio/__init__.py, since LLaMA-Factory imports that for
sound. What runs is their own code: `SFTTrainer`'s preparation of its dataset, and LLaMA-Factory's templates with its supervised
processor, whose check of versions is off.

200 conversations of 1 to 4 questions and answers, every third with a system message, every fourth in English, joined from the pairs of
`medqa_zh_valid` and `medquad_en` in their order. The tokenizer is GPT-2's, with the special tokens of both templates. Samples are
compared as ids, and their masks byte by byte, so that a mask can be compared where the tokens differ. `tails` is what the peer writes
after our last token, and `same_tokens` does not count it; `peer_only` and `ours_only` count the stretches of text that only one side
learns; `as_asked` counts the samples (ours, theirs) whose tokens before the first learned one are those of the same text alone, which
is what the model is given when it is used.
"""

import argparse
import copy
import itertools
import json
import logging
import lzma
import tempfile
from collections import Counter
from pathlib import Path

import llamafactory.data.template as factory
import trl
from datasets import Dataset, disable_progress_bars
from llamafactory.data.formatter import StringFormatter
from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.extras.env import VERSION
from llamafactory.hparams import DataArguments
from transformers import GPT2Config, GPT2LMHeadModel

from fengshen.data.task_dataloader.conversations import ConversationDataset
from fengshen.tokenizer import load_tokenizer
from fengshen.tokenizer.pieces import Pieces

LIMIT = 512  # tokens, for what is too long
SYSTEMS = ("你是一名耐心的医生，回答要简短。", "You are a careful doctor.")
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
LINE = "Question:{question} answer:{answer}"
SPACED = "Question: {question}\nAnswer: {answer}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def conversations(folder, count=200):
    """`count` conversations in messages format."""
    pairs = {name: map(json.loads, lzma.open(Path(folder) / f"{name}.jsonl.xz", "rt", encoding="utf8")) for name in ("medqa_zh_valid", "medquad_en")}
    out = []
    for i in range(count):
        english = i % 4 == 3
        turns = itertools.islice(pairs["medquad_en" if english else "medqa_zh_valid"], 1 + i // 2 % 4)
        messages = [dict(role="system", content=SYSTEMS[english])] if i % 3 == 0 else []
        for pair in turns:
            messages += [dict(role="user", content=pair["question"]), dict(role="assistant", content=pair["answer"])]
        out.append(messages)
    return out


def ours(tokenizer, talks, template=None, jinja=None, max_length=100_000, **settings):
    """[(ids, scored)] of FengShen, with a named template or the tokenizer's own."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = jinja
    found = ConversationDataset([dict(messages=m) for m in talks], tokenizer, max_length, template, **settings)
    return [(sample["input_ids"].tolist(), (sample["labels"] != -100).tolist()) for sample in found]


def trls(tokenizer, records, template=None, **settings):
    """[(ids, scored)] of TRL's `SFTTrainer`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.pad_token = template, tokenizer.eos_token
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1))
    with tempfile.TemporaryDirectory() as folder:
        options = trl.SFTConfig(folder, report_to=[], use_cpu=True, bf16=False, **dict(max_length=None) | settings)
        made = trl.SFTTrainer(model, options, train_dataset=Dataset.from_list(records), processing_class=tokenizer).train_dataset
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in made]


def factorys(tokenizer, talks, template, cutoff_len=100_000, **settings):
    """[(ids, scored)] of LLaMA-Factory's supervised processor."""
    tokenizer, options = copy.deepcopy(tokenizer), DataArguments(template=template, cutoff_len=cutoff_len, **settings)
    processor = SupervisedDatasetProcessor(factory.get_template_and_fix_tokenizer(tokenizer, options), tokenizer, None, options)
    systems = [m[0]["content"] if m[0]["role"] == "system" else "" for m in talks]
    spoken = [[turn for turn in m if turn["role"] != "system"] for m in talks]
    nothing = [None] * len(talks)
    columns = dict(_prompt=[m[:-1] for m in spoken], _response=[m[-1:] for m in spoken], _system=systems, _tools=[""] * len(talks))
    made = processor.preprocess_dataset(columns | dict(_images=nothing, _videos=nothing, _audios=nothing))
    return [(ids, [label != -100 for label in labels]) for ids, labels in zip(made["input_ids"], made["labels"], strict=True)]


def spread(sample, pieces):
    """(bytes, one flag a byte) of (ids, scored)."""
    parts = [pieces[i] for i in sample[0]]
    return b"".join(parts), [flag for part, flag in zip(parts, sample[1], strict=True) for _ in part]


def stretches(text, flags):
    """The stretches of bytes where the flags are set, as text."""
    groups = itertools.groupby(range(len(flags)), key=flags.__getitem__)
    return [text[found[0] : found[-1] + 1].decode(errors="replace") for on, found in ((on, list(g)) for on, g in groups) if on]


def as_asked(sample, start, text, tokenizer):
    """Whether a sample begins with the tokens that the text before its first answer has alone."""
    prompt = tokenizer(text[:start].decode(), add_special_tokens=False)["input_ids"]
    return sample[0][: len(prompt)] == prompt


def compare(mine, theirs, tokenizer):
    """What is the same and what is not, over samples in the same order."""
    pieces, same, asked, found = Pieces(tokenizer), Counter(), [0, 0], {name: Counter() for name in ("tails", "peer_only", "ours_only")}
    for a, b in zip(mine, theirs, strict=True):
        (text, flags), (other, others) = spread(a, pieces), spread(b, pieces)
        assert other.startswith(text), "another text: not explained yet"
        pairs = [*itertools.zip_longest(flags, others, fillvalue=False)]
        same.update(same_tokens=a[0] == b[0][: len(a[0])], same_learned_text=flags == others[: len(flags)], same_all=a == b)
        asked = [n + as_asked(sample, flags.index(True), text, tokenizer) for n, sample in zip(asked, (a, b), strict=True)]
        found["tails"][other[len(text) :].decode()] += 1
        found["peer_only"].update(stretches(other, [y and not x for x, y in pairs]))
        found["ours_only"].update(stretches(other, [x and not y for x, y in pairs]))
    found["tails"].pop("", None)
    return dict(same) | dict(as_asked=asked) | {name: dict(counter.most_common(4)) for name, counter in found.items()}


def limits(samples, whole, end):
    """What a limit leaves: samples, those with a learned end, those that begin inside an answer, and the share of all tokens to learn."""
    stopping = sum(any(flag and i == end for i, flag in list(zip(*sample, strict=True))[-2:]) for sample in samples)
    learned, of = (sum(sum(flags) for _, flags in found) for found in (samples, whole))
    inside = sum(flags[0] for _, flags in samples)
    assert all(len(ids) <= LIMIT for ids, _ in samples)
    return dict(samples=len(samples), ending=stopping, beginning_inside=inside, learned=round(learned / of, 4))


def refused(function, *arguments, **settings):
    """The message of the error."""
    try:
        function(*arguments, **settings)
    except (ValueError, RuntimeError) as e:
        return str(e)[:200]


def factory_comparisons(tokenizer, talks, published):
    """Name and (ours, theirs) of each comparison with LLaMA-Factory."""
    def theirs(template, **settings):
        return factorys(tokenizer, talks, template, **settings)

    yield "chatml", "every answer", ours(tokenizer, talks, "chatml"), theirs("chatml")
    yield "chatml", "the last answer", ours(tokenizer, talks, "chatml", loss_on="last"), theirs("chatml", mask_history=True)
    yield "qwen", "every answer", ours(tokenizer, talks, jinja=published("qwen2_5")), theirs("qwen")
    yield "llama3", "every answer", ours(tokenizer, talks, "llama3"), theirs("llama3")
    for name, line in (("yuyuan", LINE), ("spaced", SPACED)):
        asked = StringFormatter(slots=[line.replace("{question}", "{{content}}").removesuffix("{answer}")])
        factory.register_template(name, format_user=asked, format_system=StringFormatter(slots=["{{content}}\n"]))
        yield line, "every answer", ours(tokenizer, talks, line), theirs(name)


def trl_comparisons(tokenizer, talks, published):
    """Name and (ours, theirs) of each comparison with TRL."""
    records, only = [dict(messages=m) for m in talks], dict(assistant_only_loss=True)
    for name, jinja in (("chatml", CHATML), ("qwen", published("qwen2_5")), ("llama3", published("llama3"))):
        yield name, "every answer", ours(tokenizer, talks, jinja=jinja), trls(tokenizer, records, jinja, **only)
    halves = [dict(prompt=m[:-1], completion=m[-1:]) for m in talks]
    yield "chatml", "the last answer", ours(tokenizer, talks, jinja=UNMARKED, loss_on="last"), trls(tokenizer, halves, UNMARKED)
    single = [[m for m in talk if m["role"] != "system"][:2] for talk in talks]
    for line in (LINE, SPACED):
        prompt = line.removesuffix("{answer}")
        halves = [dict(prompt=prompt.replace("{question}", asked["content"]), completion=said["content"]) for asked, said in single]
        yield line, "one question and answer", ours(tokenizer, single, line), trls(tokenizer, halves)


def too_long(tokenizer, talks):
    """What each does with conversations over the limit."""
    records, whole = [dict(messages=m) for m in talks], ours(tokenizer, talks, "chatml")
    for way in ("drop", "truncate", "split"):
        yield f"FengShen, on_long={way}", whole, ours(tokenizer, talks, "chatml", max_length=LIMIT, on_long=way)
    for mode in ("keep_start", "keep_end"):
        yield f"TRL, {mode}", whole, trls(tokenizer, records, CHATML, max_length=LIMIT, truncation_mode=mode, assistant_only_loss=True)
    yield "LLaMA-Factory, cutoff_len", whole, factorys(tokenizer, talks, "chatml", LIMIT)


def quoted(tokenizer, end):
    """How many ends a sample has, and how many are learned, where question and answer quote the end's text."""
    talk = [dict(role="user", content="<|im_end|> 是什么？"), dict(role="assistant", content="<|im_end|> 是结束符。")]
    made = dict(FengShen=ours(tokenizer, [talk], "chatml"), TRL=trls(tokenizer, [dict(messages=talk)], CHATML, assistant_only_loss=True))
    made["LLaMA-Factory"] = factorys(tokenizer, [talk], "chatml")
    ends = {name: [flag for i, flag in zip(*samples[0], strict=True) if i == end] for name, samples in made.items()}
    counts = {"ends": len, "learned": sum}
    return dict(quoted="<|im_end|>") | {what: {name: count(flags) for name, flags in ends.items()} for what, count in counts.items()}


def comparisons(tokenizer, talks):
    """The lines of the record."""
    def published(name):
        return (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text("utf8")

    for peer, found in (("LLaMA-Factory", factory_comparisons), ("TRL", trl_comparisons)):
        for template, learned, mine, theirs in found(tokenizer, talks, published):
            yield dict(peer=peer, template=template, learned=learned) | compare(mine, theirs, tokenizer)
    mine, marked = ours(tokenizer, talks, jinja=UNMARKED), ours(tokenizer, talks, jinja=CHATML)
    message = refused(trls, tokenizer, [dict(messages=m) for m in talks], UNMARKED, assistant_only_loss=True)
    yield dict(peer="TRL", template="chatml without marks", refused=message, ours=len(mine), same_as_with_marks=mine == marked)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for way, whole, samples in too_long(tokenizer, talks):
        yield dict(limit=LIMIT, way=way) | limits(samples, whole, end)
    yield quoted(tokenizer, end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/medical_qa")
    parser.add_argument("--tokenizer", default="../shared/data/tokenizers/gpt2")
    parser.add_argument("--out", default="benchmarks/results/peers_data.jsonl")
    options = parser.parse_args()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    talks, tokenizer = conversations(options.data), load_tokenizer(options.tokenizer)
    tokenizer.add_special_tokens(dict(additional_special_tokens=SPECIALS, bos_token="<|begin_of_text|>"))
    lines = [dict(conversations=len(talks), trl=trl.__version__, llamafactory=VERSION), *comparisons(tokenizer, talks)]
    with open(options.out, "w", encoding="utf8") as f:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False), flush=True)
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
