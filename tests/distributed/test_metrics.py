"""Metrics of two processes, one of which has less to count, are those of one."""
import json
import subprocess
import sys

import pytest

from tests.metric_cases import measure
from tests.training_runs import ROOT, environment


def test_two_processes_measure_what_one_measures(tmp_path):
    both = [subprocess.Popen([sys.executable, "-m", "tests.metric_cases", str(rank), "2", str(tmp_path)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text("utf8")) for rank in range(2))
    alone = measure(0, 1)
    assert first == second and first.keys() == alone.keys()
    speed, mfu = first.pop("Throughput"), first.pop("MFU")
    assert speed[""] == 60 and mfu[""] == pytest.approx(60 * 2 / 20)  # 120 tokens in the two seconds of the slower one, on two devices
    assert alone.pop("Throughput")[""] == 120 and alone.pop("MFU")[""] == 24
    for name, found in alone.items():
        assert first[name] == (pytest.approx(found, abs=1e-6) if "by type" not in name else {t: pytest.approx(row, abs=1e-6) for t, row in found.items()}), name
