"""Plans: what is said to fit fits, speeds are those that were measured, a change that is named helps, and the terminal says the same as Python."""
import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

import fengshen
from fengshen.cli.main import main
from fengshen.cli.plan import wanted_by
from fengshen.models.lora import LoRAConfig
from fengshen.training.memory import GIB, estimate
from fengshen.training.placement import SPARE
from fengshen.training.plans import CARDS, RATES, Card, ask_for, card_of, plans, rates_for, scaled, share_of, speed, told, work_of

SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=300, n_positions=64, bos_token_id=0, eos_token_id=0)


def rows_of(root, name):
    "A record of benchmarks/results."
    return [json.loads(line) for line in (root / "benchmarks/results" / name).read_text("utf8").splitlines()]


def test_measured_shares_are_those_of_the_records(root):
    "A row that names a record has its speed, on the card and the model it was measured with: that of the newest run of that name."
    card, small = card_of("h200"), dict(model_type="gpt2", vocab_size=50304, n_embd=768, n_layer=12, n_head=12)
    steps = dict(ours=(16, 1), ours_80gb_nine_tenths=(8, 2), gpt2_110m=(32, 1), gpt2_lora_20gb=(2, 8), gpt2_lora_20gb_budget=(4, 4), ours_fp8=(16, 1), ours_host=(16, 4), ours_zero3=(8, 2), two_zero2=(16, 1, 2),
                 default_single=(8, 2), offload=(8, 8))
    named = [rate for rate in RATES if rate.card]
    for rate in named:
        file, name = rate.where.partition(":")[0].split(", ")
        runs = [row for row in rows_of(root, file.removeprefix("benchmarks/results/")) if row["name"] == name and "tokens_per_second" in row]
        work = work_of(small if rate.parameters < 1e9 else "fengshen:models/gpt2_3.5b.json", lora=16 if rate.lora else None)
        micro, *times = steps[name]
        assert speed(rate, work, card, 1024 * micro, *times) == pytest.approx(runs[-1]["tokens_per_second"], rel=0.05), rate
    assert len(named) >= 8


def test_every_row_says_where_it_is_from(root):
    for rate in RATES:
        assert 0 < rate.share < 1 and rate.where.startswith("derived: " if not rate.card else "benchmarks/results/")
        assert not rate.card or rate.card in {card.name for card in CARDS.values()} and (root / rate.where.partition(",")[0].partition(":")[0]).exists()
        assert 0 < share_of(rate, 1e8) <= rate.share * (1 + 1e-9) and share_of(rate, rate.parameters) == pytest.approx(rate.share)
    assert [rate.way for rate in rates_for(3e9, lora=True)] == [rate.way for rate in rates_for(3e9)]
    whole, adapter = ({rate.way: rate.share for rate in rates_for(3.56e9, lora=lora)} for lora in (False, True))
    assert all(adapter[way] < whole[way] for way in whole)  # small products beside the large ones
    assert rates_for(3e9, lora=True, strategy="auto")[0].lora and not any(rate.fp8 for rate in rates_for(3e9)) and any(rate.fp8 for rate in rates_for(3e9, fp8=True))
    assert all(card.peak and card.gib > 10 for card in CARDS.values())


def test_only_the_very_run_is_called_measured():
    zero2 = next(rate for rate in RATES if rate.strategy == "zero2" and not rate.checkpointing)
    big, other = "fengshen:models/gpt2_3.5b.json", dict(model_type="gpt2", n_embd=512, n_layer=2, n_head=8)
    asks = [ask_for(big, card="h200"), ask_for(big, card="b200"), ask_for(big, card="h200", compiled=False), ask_for(other, card="h200")]
    assert [told(zero2, ask).partition(" ")[0] for ask in asks] == ["measured:", "projected", "projected", "projected"]


@settings(max_examples=12, deadline=None)
@given(mib=st.integers(8, 60), rows=st.sampled_from([8, 16, 24]), devices=st.sampled_from([1, 2, 4]), host=st.sampled_from([None, 3, 100]))
def test_what_is_said_to_fit_fits(mib, rows, devices, host):
    "Each row against the estimate of exactly its settings; misfits have a change, and the first row is the fastest of those that fit."
    card = Card("tiny", mib / 1024, 1e12)
    found = plans(SMALL, rows=rows, length=64, card=card, devices=devices, host=host)
    for row in found.rows:
        assert row["micro_batch"] * row["accumulate"] * devices == rows
        need = estimate(SMALL, row["strategy"], row["micro_batch"], 64, devices, checkpointing=row["checkpointing"], optimizer=row["optimizer"], activation_budget=row["budget"], compiled=True)
        assert row["device_gib"] == pytest.approx(need.device / GIB, abs=0.006)
        slack = 1.01 if row["fits"] else 0.99  # `placement.needed` may be off by the rounding of its parts
        roomy = host is None or need.host <= host * GIB
        assert row["fits"] == (need.device <= SPARE * mib * 2**20 * slack and roomy)
        assert row["fits"] != bool(row["change"])
    speeds = [row["tokens_per_second"] for row in found.rows if row["fits"] and row["busy"]]
    assert speeds == sorted(speeds, reverse=True) and (found.best is None) == (not any(row["fits"] for row in found.rows))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), rate=st.sampled_from([rate for rate in RATES if rate.strategy in ("auto", "zero3_offload")]))
def test_a_memory_that_is_carried_over_is_that_of_an_estimate(rows, rate):
    ask = ask_for(SMALL, rows=rows, length=64, card=24)
    one, two, whole = (estimate(micro_batch=n, length=64, **ask.of(rate)) for n in (1, 2, rows))
    made = scaled(one, two, rows, 64)
    assert {part.name for part in made.parts} == {part.name for part in whole.parts} and made.device == pytest.approx(whole.device, rel=0.002)


def test_a_change_that_is_named_makes_it_fit():
    "The settings of a misfit with the change laid over them are a way that fits."
    found = plans(dict(model_type="gpt2", n_embd=2048, n_layer=2, n_head=16), rows=16, card=4)
    misfits = [row for row in found.rows if not row["fits"]]
    assert misfits and found.best
    for row in misfits:
        named = dict(part.split(" ", 1) for part in row["change"].split(", "))
        after = {key: str(value).lower() for key, value in row["flags"].items()} | named
        same = {key: str(value).lower() for key, value in found.best["flags"].items()}
        assert after | {"trainer.accumulate_grad_batches": 0} == same | {"trainer.accumulate_grad_batches": 0}


def test_speed_follows_card_step_and_devices():
    work, rate = work_of(SMALL, 64), next(rate for rate in RATES if rate.strategy == "zero3_offload" and rate.checkpointing)
    fast, slow = card_of("h100"), card_of("a100")
    assert speed(rate, work, fast, 4096, 4) > speed(rate, work, slow, 4096, 4) > 0
    assert speed(rate, work, fast, 4096, 8) > speed(rate, work, fast, 4096, 1)
    assert speed(rate, work, fast, 4096, 4, 2) == pytest.approx(2 * speed(rate, work, fast, 4096, 4))
    assert speed(rate, work, Card("new", 100.0, None), 4096) is None
    assert plans(SMALL, rows=8, length=64, card=24, precision="32-true").best["tokens_per_second"] is None
    assert work_of(SMALL, 64, lora=4).flops < work.flops and {r.optimizer for r in rates_for(1e9, precision="32-true")} == {"fused_adamw", "auto"}


def test_rows_of_several_documents_are_long_and_see_little():
    "The memory is that of a row; the arithmetic of attention that of a document."
    words = ["-c", "demo", "--data.row_length", "512"]
    wanted = wanted_by(words)[0]
    assert wanted["length"] == 512 and wanted["document"] == 128 and wanted_by([*words, "--data.packing", "false"])[0]["length"] == 128
    whole, cut = (ask_for(SMALL, rows=4, length=512, card=24, document=document).work.flops for document in (None, 128))
    assert cut < whole


def test_products_of_8_bits_take_a_card_that_has_them():
    found = plans(SMALL, rows=8, length=64, card="h100", fp8=True)
    assert any(row["fp8"] and row["flags"]["model.fp8"] == "tensorwise" for row in found.rows)
    with pytest.raises(ValueError, match="does not multiply in 8 bits"):
        plans(SMALL, rows=8, length=64, card="a100", fp8=True)


def test_a_base_of_4_bits_takes_less_and_goes_without_deepspeed():
    "No way that the run would refuse is in the table, nor a change that leads to one."
    shape = dict(model_type="gpt2", n_embd=512, n_layer=4, n_head=8)
    narrow, wide = (LoRAConfig(r=8, quantize=quantize) for quantize in ("nf4", None))
    for devices in (1, 4):
        wanted = dict(rows=8, length=64, devices=devices)
        found, whole = (plans(shape, card=24, lora=lora, **wanted) for lora in (narrow, wide))
        assert {row["strategy"] for row in found.rows} == {"auto"} and len({row["strategy"] for row in whole.rows}) > 1
        need = {(row["optimizer"], row["checkpointing"], row["budget"], row["micro_batch"]): row["device_gib"] for row in whole.rows if row["strategy"] == "auto"}
        assert all(row["device_gib"] < need[row["optimizer"], row["checkpointing"], row["budget"], row["micro_batch"]] for row in found.rows)
        assert any("4 bits" in note for note in found.notes) and not any("4 bits" in note for note in whole.notes)
        assert not any("zero" in row["change"] for row in plans(shape, card=0.01, lora=narrow, **wanted).rows)
    for more, said in (dict(strategy="zero2", devices=2), "set trainer.strategy"), (dict(fp8=True), "set model.fp8"):
        with pytest.raises(ValueError, match=said):
            plans(shape, card="h100", rows=8, length=64, lora=narrow, **more)


@pytest.fixture
def model(tmp_path):
    "The path of a small model's configuration."
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_dict()), "utf8")
    return str(path)


def test_the_terminal_says_what_python_says(model, capsys):
    words = ["plan", "--model", model, "--gib", "2", "--rows", "8", "--length", "64"]
    assert main(words) == 0
    text = capsys.readouterr().out
    found = fengshen.plan(model, card=2, rows=8, length=64)
    assert text.strip() == repr(found).strip() and "part by part" in text
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.as_dict()))
    assert found._repr_html_().count("<tr>") == 2 + len(found.rows) + len(found.memory.rows())
    narrow = [*words, "--lora", "8", "--quantize", "nf4", "--json"]
    assert main(narrow) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fengshen.plan(model, card=2, rows=8, length=64, lora=8, quantize="nf4").as_dict()))
    assert main(["plan", "--model", model, "--gib", "0.001", "--rows", "8", "--length", "64"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("words, wrong", [
    (["--gib", "24"], "one recipe or one model"), (["--model", "MODEL", "-c", "demo"], "one recipe or one model"), (["--model", "MODEL", "--card", "h1000"], "did you mean 'h100'"),
    (["--model", "MODEL", "--gib", "0"], "a card has memory"), (["--model", "MODEL", "--gib", "24", "--rows", "3", "--devices", "2"], "cannot be shared by the processes"),
    (["--model", "MODEL", "--gib", "24", "--micro_batch", "3", "--rows", "8"], "cannot be cut into micro-batches"), (["--model", "nowhere/config.json", "--gib", "24"], "nowhere/config.json"),
    (["--model", "MODEL", "--gib", "24", "--quantize", "nf4"], "only the base of an adapter"), (["--model", "MODEL", "--gib", "24", "--lora", "8", "--quantize", "nf3"], "expected nf4"),
    (["--model", "MODEL", "--gib", "24", "--strategy", "fsdp"], "nobody has measured"), (["-c", "demoo", "--gib", "24"], "did you mean 'demo'"),
])
def test_what_cannot_be_planned_is_refused_in_a_line(words, wrong, model, capsys):
    assert main(["plan", *(model if word == "MODEL" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert wrong in said and said.count("\n") == 1


def test_predictions_are_held_against_what_was_measured(root):
    "Ratios of peaks, and whether running out of memory was foreseen."
    spec = importlib.util.spec_from_file_location("plan_memory", root / "benchmarks/plan_memory.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    predicted = {row["name"]: row for row in script.read(root / "benchmarks/results/plan_predictions.jsonl")}
    assert len(predicted) >= 5 and sum(not row["fits"] for row in predicted.values()) >= 1
    measured = [dict(name="ours", reserved_gib=predicted["ours"]["reserved_gib"] / 1.05, host_gib=50), dict(name="ours_32", error="torch.OutOfMemoryError: CUDA out of memory"),
                dict(name="ours_80gb", error="OutOfMemoryError"), dict(name="another", reserved_gib=3), dict(name="gpt2_110m", error="not finished in 100 s")]
    found = {row["name"]: row for row in script.compare(predicted, measured)}
    assert set(found) == {"ours", "ours_32", "ours_80gb"} and found["ours"]["ratio"] == 1.05 and found["ours"]["right"]
    assert found["ours_32"]["right"] and not found["ours_80gb"]["right"] and "ratio" not in found["ours_32"]
