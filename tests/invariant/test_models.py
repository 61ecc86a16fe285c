"""What must hold for every model and head: what must not matter does not (padding, company, cache, packing, form of attention, checkpointing, folders), and what must learn does.

The weights are all random, biases and norms too, so that an equality is one. What is peculiar to a family is in the files named after it.
"""
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fengshen.models.lora import LoRAConfig, add_lora, linear_layers
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import NAME
from fengshen.utils.kernels.compile import blocks, compile_blocks
from tests.model_table import CASES, FAMILIES, SEP, SOURCE, SOURCES, TARGET, TARGETS, VOCAB, WRITERS, answers, ids_of, loss_of, real

CLOSE = dict(rtol=1e-4, atol=1e-5)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
every_family = pytest.mark.parametrize("family", FAMILIES)
every_writer = pytest.mark.parametrize("case", [CASES[name] for name in WRITERS], ids=WRITERS)


def alone(case, batch, row):
    "The inputs of one row without its padding."
    return {name: t[row : row + 1, ..., : TARGETS[row] if t.shape[-1] == TARGET else SOURCES[row]] for name, t in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_case
@torch.no_grad()
def test_padding_and_company_do_not_matter(case, attention):
    "What the padding is changes nothing, to the bit; each row is what it is alone."
    model, batch = case.make(attention), case.batch()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    if case.two:
        other["decoder_input_ids"] = torch.where(batch["decoder_attention_mask"] == 1, batch["decoder_input_ids"], 7)
    whole, same = answers(model(**batch)), answers(model(**other))
    for name, value in whole.items():
        torch.testing.assert_close(real(name, same[name], batch), real(name, value, batch), rtol=0, atol=0)
    for row in range(3):
        for name, value in answers(model(**alone(case, batch, row))).items():
            value = value[0] if value.ndim > 1 and whole[name].shape[1] in (SOURCE, TARGET) else value
            torch.testing.assert_close(value, real(name, whole[name], batch, row), **CLOSE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.two or case.writes])
@torch.no_grad()
def test_a_written_token_sees_what_is_before_it(name):
    "A change moves the scores at its place and behind it, and nothing before; a change of the source moves all."
    case = CASES[name]
    model, batch = case.make(), case.batch(1, masks=False)
    where = "decoder_input_ids" if case.two else "input_ids"
    scores = {True: "last_hidden_state", False: "logits"}[name.endswith("Model")]

    def moved(field, place):
        ids = batch[field].clone()
        ids[0, place] = ids[0, place] % (VOCAB - 6) + 5 + (ids[0, place] == VOCAB - 1)
        assert ids[0, place] != batch[field][0, place]
        return ((model(**batch | {field: ids})[scores] - model(**batch)[scores]).abs().amax(-1) > 0)[0].tolist()

    length = batch[where].shape[1]
    for place in range(length):
        assert moved(where, place) == [i >= place for i in range(length)]
    if case.two:
        assert all(moved("input_ids", SOURCE - 1))


@every_case
@torch.no_grad()
def test_forms_of_attention_agree(case):
    "With padding and without."
    for masks in (True, False):
        batch = case.batch(masks=masks)
        sdpa, eager = (answers(case.make(attention)(**batch)) for attention in ("sdpa", "eager"))
        for name, value in sdpa.items():
            torch.testing.assert_close(real(name, value, batch), real(name, eager[name], batch), **CLOSE)


@pytest.mark.slow
@every_family
@torch.no_grad()
def test_flex_attention_agrees_on_a_cpu(family):
    "Without padding in the target: torch 2.13 writes C++ that does not compile for a causal mask with padding; tests/gpu has it."
    case = CASES[FAMILIES[family]]
    batch = case.batch()
    batch.pop("decoder_attention_mask", None)
    sdpa, flex = (answers(case.make(attention)(**batch)) for attention in ("sdpa", "flex_attention"))
    for name, value in sdpa.items():
        torch.testing.assert_close(real(name, value, batch), real(name, flex[name], batch), rtol=1e-4, atol=1e-4)


def packed(case):
    "(three documents, the row they make with their positions, its boundaries)."
    lengths = (4, 2, 6)
    parts = [case.batch(1, n, seed=seed, masks=False) for seed, n in enumerate(lengths)]
    row = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    ends = torch.tensor([0, 4, 6, 12, 12], dtype=torch.int32)
    return parts, row | dict(position_ids=torch.cat([torch.arange(n) for n in lengths])[None]), dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=6, max_length_k=6)


READERS = [name for name, case in CASES.items() if not case.two and not any(word in name for word in ("Sequence", "Choice", "Sentence", "Question"))]


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_packed_is_unpacked(name):
    "One row of documents, told by positions or by boundaries, and by boundaries in the kernel."
    case = CASES[name]
    parts, row, ends = packed(case)
    each = [answers(case.make()(**part)) for part in parts]
    per_token = [field for field, value in each[0].items() if value.shape[1] == 4]
    for attention, extra in (("sdpa", {}), ("eager", {}), ("sdpa", ends), (NAME, ends)):
        got = answers(case.make(attention)(**row, **extra))
        for field in per_token:
            torch.testing.assert_close(got[field], torch.cat([out[field] for out in each], 1), **CLOSE)


@pytest.mark.parametrize("name, field", [("T5Model", "last_hidden_state"), ("T5ForConditionalGeneration", "logits")])
@torch.no_grad()
def test_packed_pairs_are_unpacked(name, field):
    "Texts that are read and texts that are written, each target with its source."
    case = CASES[f"megatron_t5-{name}"]
    parts = [case.batch(1, n, m, seed=seed, masks=False) for seed, (n, m) in enumerate(((9, 7), (5, 4)))]
    row = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    places = dict(position_ids=(9, 5), decoder_position_ids=(7, 4))
    row |= {name: torch.cat([torch.arange(n) for n in lengths])[None] for name, lengths in places.items()}
    for attention in ("sdpa", "eager"):
        model = case.make(attention)
        torch.testing.assert_close(model(**row)[field], torch.cat([model(**part)[field] for part in parts], 1), **CLOSE)


@pytest.mark.parametrize("name, words", [("megatron_t5-T5Model", "boundaries for one side of two"), ("megatron_t5-T5ForConditionalGeneration", "boundaries for one side of two"),
                                         ("bart-classes", "does not keep the documents of a packed row apart")])
def test_what_cannot_be_packed_is_refused(name, words):
    case = CASES[name]
    _, _, ends = packed(case)
    with pytest.raises(ValueError, match=words):
        case.make()(**case.batch(1, masks=False), **ends)
    with pytest.raises(ValueError, match="decoder_position_ids|does not keep"):
        case.make()(**case.batch(1, masks=False), position_ids=torch.arange(SOURCE)[None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_writer
@torch.no_grad()
def test_a_step_with_a_cache_is_a_step_of_the_whole(case, attention):
    model, batch = case.make(attention), case.batch(masks=False)
    where = "decoder_input_ids" if case.two else "input_ids"
    whole = model(**batch, use_cache=False).logits
    for cuts in ([2, 1, 3, whole.shape[1] - 6], [1] * whole.shape[1]):
        cache, start, steps = None, 0, []
        for count in cuts:
            part = slice(start, start + count)
            given = {name: t[:, part] if name in (where, "token_type_ids") else t for name, t in batch.items()}
            out = model(**given, past_key_values=cache, use_cache=True)
            cache, start, steps = out.past_key_values, part.stop, [*steps, out.logits]
        torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


@pytest.mark.parametrize("how", [dict(), dict(num_beams=3), dict(do_sample=True)], ids=["greedy", "beams", "sampled"])
@every_writer
def test_generation_with_a_cache_and_without(case, how):
    "And a row of a padded batch as alone; what only reads is padded behind, what goes on is padded before."
    model, ids, mask = case.make(), ids_of(3, SOURCE), (torch.arange(SOURCE) < torch.tensor(SOURCES)[:, None]).long()
    ids, mask = (ids, mask) if case.two else (ids.flip(1), mask.flip(1))

    def written(ids, mask, **more):
        with seeded(3):
            return model.generate(ids, attention_mask=mask, **dict(do_sample=False, max_new_tokens=7, pad_token_id=0) | how | more)

    cached = written(ids * mask, mask)
    assert torch.equal(cached, written(ids * mask, mask, use_cache=False))
    if not how.get("do_sample"):
        single = written(ids[1:2, mask[1] == 1], mask[1:2, mask[1] == 1])
        new = slice(None, single.shape[1]) if case.two else slice(SOURCE, SOURCE + 7)
        assert torch.equal(cached[1, new], single[0] if case.two else single[0, SOURCES[1] :])


def gradients(case, how):
    "Of the loss, or of a weighted sum where a model has none."
    model = case.make().train()
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    loss_of(model, model(**case.batch(), **case.right())).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@every_case
def test_every_parameter_learns_and_checkpointing_changes_nothing(case):
    plain, kept = gradients(case, "plain"), gradients(case, "checkpointing")
    largest = max(float(grad.abs().max()) for grad in plain.values() if grad is not None)
    still = {name for name, grad in plain.items() if grad is None or float(grad.abs().max()) <= 1e-6 * largest}
    assert all(name.endswith(case.still or ("nothing",)) for name in still), still
    for name, grad in plain.items():
        torch.testing.assert_close(kept[name], grad, rtol=1e-5, atol=1e-6 * max(largest, 1))


@every_case
@torch.no_grad()
def test_sixteen_bits_are_close(case):
    batch = case.batch()
    for name, want in answers(case.make()(**batch)).items():
        a, b = (real(name, value, batch).float() for value in (answers(case.make(dtype=torch.bfloat16)(**batch))[name], want))
        assert float((a - b).norm() / b.norm()) < 2e-2, name


@every_case
@torch.no_grad()
def test_saved_and_loaded(case, tmp_path, monkeypatch):
    "Without a word: no weight missing, left over or of another type of model."
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", lambda text, *args: warned.append(text))
    model, batch = case.make(), case.batch()
    model.save_pretrained(tmp_path)
    assert f'"model_type": "{case.config.model_type}"' in (tmp_path / "config.json").read_text()
    again, info = case.model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not warned, (info, warned)
    for name, value in answers(again.eval()(**batch)).items():
        torch.testing.assert_close(value, answers(model(**batch))[name])


@every_family
def test_blocks_compile_without_a_break(family):
    "Encoder and decoder, forward and backward, with a mask, and with global tokens where there are any."
    case = CASES[FAMILIES[family]]
    small = dict(num_layers=1, num_decoder_layers=1) if family == "megatron_t5" else dict(encoder_layers=1, decoder_layers=1) if case.two else dict(num_hidden_layers=1)
    small |= dict(attention_window=4) if family == "longformer" else {}
    plain, model, batch = case.make(**small).train(), case.make(**small).train(), case.batch() | case.right()
    if family == "longformer":
        batch["global_attention_mask"] = (batch["input_ids"] == SEP).long()
    torch._dynamo.reset()
    found = compile_blocks(model)
    assert len(found) == 1 + case.two
    for block in found:
        block.compile(dynamic=False, fullgraph=True, backend="eager")
    one, two = (m(**batch) for m in (model, plain))
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-5)
    one.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@every_family
def test_an_adapter_reaches_every_layer_and_moves_alone(family):
    case = CASES[FAMILIES[family]]
    model, batch = case.make().train(), case.batch() | case.right()
    layers = {id(layer) for block in blocks(model) for layer in block.modules() if isinstance(layer, torch.nn.Linear)}
    inside = {name for name, layer in linear_layers(model).items() if id(layer) in layers}
    assert len(inside) == len(layers)
    add_lora(model, LoRAConfig(r=2, alpha=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # the first step moves B alone, which is zero
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert {name.partition(".lora_A")[0] for name in moved} >= inside


ZERO3 = """
import sys, torch, deepspeed
from deepspeed.utils import safe_get_full_grad
from fengshen.models.loading import zero3_context
from tests.model_table import CASES
case, folder = CASES[sys.argv[1]], sys.argv[2]
batch = case.batch() | case.right()
plain = case.model.from_pretrained(folder).train()
plain(**batch).loss.backward()
deepspeed.init_distributed("gloo")
settings = dict(train_micro_batch_size_per_gpu=3, zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), zero_force_ds_cpu_optimizer=False,
                optimizer=dict(type="AdamW", params=dict(lr=1e-3, torch_adam=True)))
context = zero3_context(settings)
sharded = case.model.from_pretrained(folder)
assert all(p.numel() == 0 for p in sharded.parameters())
engine, *_ = deepspeed.initialize(model=sharded, config=settings)
engine.backward(engine(**batch).loss)
gradients = {name: p.grad for name, p in plain.named_parameters()}
assert set(gradients) == {name for name, _ in engine.module.named_parameters()}
for name, p in engine.module.named_parameters():
    torch.testing.assert_close(safe_get_full_grad(p), gradients[name], atol=1e-5, rtol=1e-4)
"""


@pytest.mark.slow
@every_family
def test_sharded_while_loading(family, tmp_path, root):
    "Under ZeRO-3 the weights are sharded as they are loaded, and give the gradients of one device; a head finds the table it shares."
    CASES[FAMILIES[family]].make().save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment = os.environ | place | dict(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(root))
    done = subprocess.run([sys.executable, "-c", ZERO3, FAMILIES[family], tmp_path], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


ONE = torch.ones(1, 2).long()
TOO_LONG = torch.ones(1, 41).long()
FAULTS = [
    ("roformer", dict(input_ids=torch.tensor([[VOCAB]])), "token ids out of range: got 60, expected 0 to 59"),
    ("roformer", dict(input_ids=torch.tensor([[-1]])), "token ids out of range: got -1"),
    ("roformer", dict(input_ids=TOO_LONG), "41 tokens.*at most 40"),
    ("roformer", dict(input_ids=ONE, token_type_ids=torch.tensor([[0, 2]])), "token types out of range: got 2, expected 0 to 1"),
    ("roformer", dict(input_ids=ONE, position_ids=torch.tensor([[0, 40]])), "positions out of range"),
    ("roformer", dict(input_ids=ONE, attention_mask=torch.ones(1, 3)), "does not cover the tokens"),
    ("roformer", dict(), "ids or embeddings"),
    ("longformer", dict(input_ids=torch.tensor([[VOCAB]])), "token ids out of range: got 60, expected 0 to 59"),
    ("longformer", dict(input_ids=TOO_LONG), "41 tokens.*at most 40"),
    ("longformer", dict(input_ids=ONE, token_type_ids=torch.tensor([[0, 2]])), "token types out of range: got 2, expected 0 to 1"),
    ("longformer", dict(input_ids=ONE, position_ids=torch.tensor([[0, 40]])), "positions out of range"),
    ("longformer", dict(input_ids=ONE, attention_mask=torch.ones(1, 3)), "attention_mask does not cover the tokens"),
    ("longformer", dict(input_ids=ONE, global_attention_mask=torch.ones(1, 3)), "global_attention_mask does not cover the tokens"),
    ("longformer", dict(), "ids or embeddings"),
    ("megatron_t5", dict(input_ids=torch.tensor([[VOCAB]]), decoder_input_ids=ONE), "token ids out of range.*60.*59"),
    ("megatron_t5", dict(input_ids=ONE, decoder_input_ids=torch.tensor([[-1]])), "token ids out of range.*-1"),
    ("megatron_t5", dict(input_ids=TOO_LONG, decoder_input_ids=ONE), "41 tokens.*40"),
    ("megatron_t5", dict(input_ids=ONE, decoder_input_ids=TOO_LONG), "41 tokens.*40"),
    ("megatron_t5", dict(decoder_input_ids=ONE), "needs a text"),
    ("bart", dict(input_ids=torch.tensor([[VOCAB]])), "ids of the text out of range: got 60, expected 0 to 59"),
    ("bart", dict(input_ids=ONE, decoder_input_ids=torch.tensor([[-1]])), "ids of the decoder input out of range: got -1"),
    ("bart", dict(input_ids=TOO_LONG), "41 tokens.*at most 40"),
    ("bart", dict(input_ids=ONE, encoder_labels=torch.tensor([[0, 4]])), "edit labels out of range: got 4, expected 0 to 3"),
    ("bart", dict(input_ids=ONE, lm_labels=ONE), "another name today.*labels"),
    ("bart", dict(input_ids=ONE, decoder_cached_states=ONE), "another name today.*past_key_values"),
]


@pytest.mark.parametrize("family, bad, words", FAULTS, ids=[f"{family}-{words[:24]}" for family, _, words in FAULTS])
def test_bad_input(family, bad, words):
    with pytest.raises(ValueError, match=words):
        CASES[FAMILIES[family]].make()(**bad)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    "(case, a folder with its weights)."
    folder, case = tmp_path_factory.mktemp(request.param), CASES[FAMILIES[request.param]]
    case.make().save_pretrained(folder)
    return case, folder


def test_another_vocabulary_is_refused(saved):
    case, folder = saved
    with pytest.raises(ValueError, match=r"\[60, 32\] in the file, \[70, 32\] in the model"):
        case.model.from_pretrained(folder, vocab_size=70)


def test_another_vocabulary_is_refused_with_both_names_of_a_tied_weight(saved, tmp_path):
    "As the originals' files have them; strict=False loads what fits."
    case, folder = saved
    shutil.copy(folder / "config.json", tmp_path)
    state = {name: value.clone() for name, value in case.model.from_pretrained(folder).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    assert case.model.from_pretrained(tmp_path).config.vocab_size == 60
    with pytest.raises(ValueError, match=r"\[60, 32\] in the file, \[70, 32\] in the model"):
        case.model.from_pretrained(tmp_path, vocab_size=70)
    loaded = case.model.from_pretrained(tmp_path, vocab_size=70, strict=False)
    assert not any(p.is_meta for p in loaded.parameters()) and loaded.get_input_embeddings().num_embeddings == 70


def test_a_truncated_file_is_refused(saved, tmp_path):
    case, folder = saved
    data = (folder / "model.safetensors").read_bytes()
    shutil.copy(folder / "config.json", tmp_path)
    for cut in (4, 200, len(data) // 2, len(data) - 1):
        (tmp_path / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot be read"):
            case.model.from_pretrained(tmp_path)


def test_another_architecture_is_refused(saved, tmp_path):
    "By its type; and where the type is right, by its weights: one missing, one left over."
    case, folder = saved
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=f"another architecture than {case.config.__name__}: got 'gpt2'"):
        case.model.from_pretrained(tmp_path / "gpt2")
    model = case.model.from_pretrained(folder)
    state = model.state_dict()
    name = next(name for name in state if name.endswith((".key.weight", ".k.weight", ".k_proj.weight")))
    for kind, names in dict(missing={n: t for n, t in state.items() if n != name}, unexpected=state | {name.replace("weight", "gate"): torch.zeros(2)}).items():
        model.save_pretrained(tmp_path / kind, state_dict=names)
        with pytest.raises(ValueError, match=f"{kind}.*{name.rpartition('.')[0]}"):
            case.model.from_pretrained(tmp_path / kind)
        case.model.from_pretrained(tmp_path / kind, strict=False)
