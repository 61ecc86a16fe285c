"""Small trainings for the tests: the command line in a process of its own or in this one, and what a run left behind."""
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Half a second of training for 50 steps; no dropout, so that two runs can be compared number by number.
TINY = dict(model_type="gpt2", vocab_size=1280, n_positions=128, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, pad_token_id=1)
QUIET = {"model.samples": 0, "export": False, "trainer.val_check_interval": 1_000_000}


def uneven_pairs(path, count, seed=0):
    "A file of question-answer pairs whose answers have from 1 to 60 characters; 37 of them fill no whole number of windows of 8."
    rng = random.Random(seed)
    words = "头痛发热咳嗽失眠饮食休息医生检查药物治疗每天多喝温水保持心情注意保暖及时就诊"
    with open(path, "w", encoding="utf8") as f:
        for i in range(count):
            answer = "".join(rng.choices(words, k=rng.choice([1, 2, 3, 5, 30, 60])))
            f.write(json.dumps(dict(question=f"问题{i}", answer=answer), ensure_ascii=False) + "\n")
    return str(path)


def tiny_config(folder, **changes):
    "The path of a config.json for a model that trains in no time."
    path = Path(folder) / "tiny.json"
    path.write_text(json.dumps(TINY | changes), "utf8")
    return str(path)


def flags(settings):
    "{key: value} as words of the command line."
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def environment(**changes):
    "This process's environment without a launcher's variables, with one thread a process; None takes a variable away."
    launcher = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])  # DeepSpeed looks for ninja there
    return {name: value for name, value in (kept | changes).items() if value is not None}


def cli(*words, cwd, launcher=(), timeout=600, **env):
    "`fengshen WORDS` in a process of its own; the finished process with its text."
    command = [sys.executable, *launcher, "-m", "fengshen.cli.main", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(**env))


def fit(run_dir, recipe="demo", launcher=(), **settings):
    "A quiet training in a process of its own; its folder. A failure shows what the process said."
    run_dir = Path(run_dir)
    done = cli("fit", "-c", recipe, *flags(QUIET | {"run_dir": str(run_dir)} | settings), cwd=run_dir.parent, launcher=launcher)
    assert done.returncode == 0, f"{settings}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return run_dir


def here(*words):
    "`fengshen WORDS` in this process: (exit status, what it printed, what it said about errors). A traceback is an exception here."
    from fengshen.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(w) for w in words])
        except SystemExit as e:
            status = e.code or 0
    return status, out.getvalue(), err.getvalue()


def fit_here(run_dir, recipe="demo", **settings):
    "A quiet training in this process, on one device; its folder."
    status, out, err = here("fit", "-c", recipe, *flags(QUIET | {"run_dir": str(run_dir), "trainer.strategy": "auto"} | settings))
    assert status == 0, out + err
    return Path(run_dir)


def back_to(run, step, folder):
    "A copy of a run as a kill after `step` would have left it: later checkpoints and the end are missing."
    from fengshen.training.checkpoint import checkpoints, step_of

    copy = folder / f"stopped-{step}"
    shutil.copytree(run, copy)
    for path in checkpoints(copy):
        if step_of(path) > step:
            shutil.rmtree(path)
    for name in ("summary.json", "report.html"):
        (copy / name).unlink()
    return copy


def read(run_dir, split="train"):
    "The record's lines of a split; every line of the record has to be JSON."
    lines = (Path(run_dir) / "metrics.jsonl").read_text("utf8").splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def series(run_dir, key, split="train"):
    "One column of the record."
    return [row[key] for row in read(run_dir, split)]


def apart(a, b):
    "Largest difference of two columns, relative to 1 or to the larger value."
    assert len(a) == len(b) > 0, (len(a), len(b))
    return max(abs(x - y) / max(1.0, abs(y)) for x, y in zip(a, b))


def weights(run_dir):
    "The weights of a run's newest checkpoint."
    from fengshen.training.checkpoint import checkpoints
    from fengshen.training.weights import read_weights

    return read_weights(checkpoints(run_dir)[-1])


def weights_apart(a, b):
    "Largest difference of two sets of weights; the names and shapes have to be the same."
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return max(float((a[k].detach().float() - b[k].detach().float()).abs().max()) for k in a)


def same(a, b):
    "Whether two nestings of tensors are equal to the bit."
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
