"""Every metric with small samples, for the tests that ask the same of all of them; run as a module it is one of several processes."""
import json
import sys
from functools import partial

import torch

from fengshen import metric as m

TAGS = [["B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC"], ["O B-LOC I-LOC O", "O B-LOC O O"], ["B-PER-NAM O", "O B-PER-NAM"], ["O O B-LOC", "O O B-LOC"]]
TAGS = [tuple(side.split() for side in pair) for pair in TAGS]
TRIPLES = [([("鲁迅", "毕业于", "仙台")], [("鲁迅", "毕业于", "仙台"), ("鲁迅", "生于", "绍兴")]), ([], [("北京", "首都", "中国")]), ([("中", "在", "亚")], [("中", "在", "亚")])]
EVENTS = [([dict(type="胜负", trigger="击败", arguments={"胜者": "中国"})], [dict(type="胜负", trigger="战胜", arguments=[("胜者", "中国"), ("败者", "日本")])]), ([], []),
          ([dict(type="婚", trigger="结婚", arguments=[("人", "甲")])], [dict(type="婚", trigger="结婚", arguments=[("人", "甲"), ("人", "乙")])])]
TEXTS = [("今天北京有雨，注意带伞", "今天北京下雨，记得带伞"), ("NLP 很有意思", "NLP 真的很有意思"), ("", "空的预测"), ("完全一样的一句话。", "完全一样的一句话。")]
ANSWERS = [("光荣和ω-force", "光荣"), ("《战国无双3》", "战国无双3"), ("", "1843年11月17日"), ("上海市", ["在上海市", "上海市。"])]
LABELS = [("财经", "财经"), ("体育", "科技"), ("文化", "文化")]
# name: (how it is made, (prediction, reference) of each sample)
DECISIONS = {
    "accuracy": (m.LabelAccuracy, LABELS), "entities": (partial(m.EntityF1, "bio", types=["PER", "LOC", "PER-NAM"]), TAGS), "relations": (m.RelationF1, TRIPLES),
    "triggers": (partial(m.EventF1, "trigger"), EVENTS), "arguments": (m.EventF1, EVENTS), "rouge": (m.CharRouge, TEXTS), "bleu": (m.BLEU, TEXTS),
    "chrf": (m.ChrF, TEXTS), "answers": (m.AnswerScore, ANSWERS)}


class Vocabulary:
    "Tokens of one or two Chinese characters, and some that are only the first bytes of one; the first ten are marks."

    def __getitem__(self, id):
        text = chr(0x4E00 + id).encode()
        return text[: id % 3 + 1] if id % 3 else text * (id % 2 + 1)

    def special(self, id):
        return id < 10


def scores(rows, seed=0):
    "(logits, labels) of some tokens, drawn."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1280, generator=g), torch.randint(0, 1280, (rows,), generator=g)


# name: how it is made; fed with the rows of `scores`
TOKENS = {"tokens": m.TokenAccuracy, "masked": m.MaskedLMAccuracy, "perplexity": m.Perplexity,
          "per_character": lambda: m.TextPerplexity(Vocabulary()), "per_byte": lambda: m.TextPerplexity(Vocabulary(), "byte")}


def plain(found):
    "A metric's result as {name: float}."
    return {name: float(x) for name, x in (found if isinstance(found, dict) else {"": found}).items()}


def measure(rank, world) -> dict:
    "What every metric says after this process has given it its share: uneven ones, and none at all of some."
    found = {}
    for name, (make, samples) in DECISIONS.items():
        metric, mine = make(), samples[rank::world] if name != "relations" else samples if rank == 0 else []
        for prediction, reference in mine:
            metric.update([prediction], [reference])
        found[name] = plain(metric.compute())
        found |= {f"{name} by type": metric.by_type()} if getattr(metric, "types", None) else {}
    logits, labels = scores(7)
    for name, make in TOKENS.items():
        metric = make()
        metric.update(logits[rank::world], labels[rank::world])
        found[name] = plain(metric.compute())
    speed, mfu = m.Throughput(), m.MFU(2.0, 10.0)
    for metric in (speed, mfu):
        metric.update(tokens=120 // world, seconds=1.0 + rank)
        found[type(metric).__name__] = plain(metric.compute())
    return found


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    with open(f"{folder}/{rank}.json", "w", encoding="utf8") as f:
        json.dump(measure(rank, world), f)
    torch.distributed.destroy_process_group()
