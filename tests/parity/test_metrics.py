"""Entities and their scores are those that seqeval 1.2.2 gave in its strict mode, for tags that are right, nearly right, and random."""
import json
from pathlib import Path

import pytest

from fengshen.metric import EntityF1, tag_entities

CASES = json.loads((Path(__file__).parent / "golden" / "seqeval.json").read_text("utf8"))["cases"]


@pytest.mark.parametrize("scheme", ["bio", "bioes", "bilou"])
def test_seqeval_strict(scheme):
    cases = [case for case in CASES if case["scheme"] == scheme]
    assert len(cases) > 20
    for case in cases:
        found, wanted = ([text.split() for text in case[side]] for side in ("found", "wanted"))
        assert [sorted(map(list, tag_entities(tags, scheme))) for tags in found] == case["entities"], case
        metric = EntityF1(scheme)
        metric.update(found, wanted)
        scores = metric.compute()
        assert [float(scores[name]) for name in ("precision", "recall", "f1")] == pytest.approx(case["scores"], abs=2e-6), case
