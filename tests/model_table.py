"""Every model and head of fengshen.models in one table: how it is made, what it reads, what is to be guessed, and what of its answer belongs to a token."""
from dataclasses import dataclass

import torch

import fengshen.models.bart as bart
import fengshen.models.longformer as longformer
import fengshen.models.megatron_t5 as megatron_t5
import fengshen.models.roformer as roformer
from fengshen.utils.device import seeded
from fengshen.utils.kernels.attention import register_attention

# no two of these are equal, so that an axis is known by its size
VOCAB, SOURCE, TARGET, SEP, WIDTH, POSITIONS = 60, 13, 7, 2, 32, 40
SOURCES, TARGETS = (SOURCE, 6, 4), (4, TARGET, 2)  # real tokens of the rows of a batch
SMALL = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=POSITIONS,
             initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
SIDES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in dict(layers=2, attention_heads=4, ffn_dim=48).items()}


@dataclass
class Case:
    "A model to test."

    model: type
    config: type
    sizes: dict
    two: bool = False  # reads a source and writes a target
    writes: bool = False  # generates
    labels: tuple = ()  # names of what is to be guessed
    still: tuple = ()  # parameters whose gradient is zero whatever the weights are
    types: int | None = None  # token type of all tokens, where there are any

    def make(self, attention="sdpa", seed=1, device="cpu", dtype=torch.float32, **changes):
        "A model whose every parameter is random, biases and norms too; the same numbers on every device."
        register_attention()
        with seeded(seed):
            model = self.model(self.config(**self.sizes | changes)).eval()
            for p in model.parameters():
                p.data.add_(torch.randn_like(p) * 0.1)
        model.set_attn_implementation(attention)
        return model.to(device, dtype)

    def batch(self, rows=3, source=SOURCE, target=TARGET, seed=0, masks=True):
        "Inputs; with masks the rows but the first are padded."
        ids = ids_of(rows, source, seed)
        batch = dict(input_ids=ids)
        if masks:
            batch["attention_mask"] = (torch.arange(source) < torch.tensor(SOURCES[:rows])[:, None]).long()
        if self.types is not None:
            batch["token_type_ids"] = torch.full_like(ids, self.types)
        if "ForMultipleChoice" in self.model.__name__:
            return {name: t[:, None].repeat(1, 2, 1) + (torch.arange(2)[:, None] if name == "input_ids" else 0) for name, t in batch.items()}
        if self.two:
            batch["decoder_input_ids"] = ids_of(rows, target, seed + 1)
            if masks:
                batch["decoder_attention_mask"] = (torch.arange(target) < torch.tensor(TARGETS[:rows])[:, None]).long()
        return batch

    def right(self, rows=3):
        "What is to be guessed for the rows of `batch`, by the names in `labels`."
        text, tokens = torch.arange(rows) % 2, ids_of(rows, TARGET if self.two else SOURCE, 5)
        number = "Token" in self.model.__name__
        of_text = any(name in self.model.__name__ for name in ("Sequence", "Choice", "Sentence"))
        made = dict(labels=text if of_text else tokens % 3 if number else tokens, next_sentence_label=text, start_positions=text, end_positions=text + 1,
                    encoder_labels=ids_of(rows, SOURCE, 6) % 3)
        return {name: made[name] for name in self.labels}


def ids_of(rows, length=SOURCE, seed=0):
    "Random ids with a separator in place 2."
    ids = torch.randint(SEP + 1, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 2:3] = SEP
    return ids


def answers(out):
    "The tensors of an output but losses."
    found = {name: value for name, value in out.items() if torch.is_tensor(value) and not name.endswith("loss")}
    assert found
    return found


def real(name, value, batch, row=None):
    "An answer where there are tokens, and all of it where it is about texts; of one row, or of all."
    which = {SOURCE: "attention_mask", TARGET: "decoder_attention_mask"}.get(value.shape[1]) if value.ndim > 1 else None
    if which not in batch or batch[which].ndim != 2:
        return value if row is None else value[row : row + 1]
    seen = batch[which].bool()
    return value[seen] if row is None else value[row][seen[row]]


def loss_of(model, out):
    "The loss, or a weighted sum of what a model without one gives."
    if out.get("loss") is not None:
        return out.loss
    return sum((value.float() * torch.linspace(-1, 1, value.shape[-1], device=value.device)).sum() for name, value in answers(out).items() if name != "encoder_last_hidden_state")


def still(head, last):
    "What never learns: a bias that adds the same to all scores of a softmax, over choices or over the positions of a text."
    return {"ForMultipleChoice": ("classifier.bias",), "ForQuestionAnswering": ("qa_outputs.bias", last)}.get(head, ())


def roformers():
    "RoFormer's cases."
    guessed = dict(Model=(), ForPreTraining=("labels", "next_sentence_label"), ForQuestionAnswering=("start_positions", "end_positions"))
    for head in ("Model", "ForPreTraining", "ForCausalLM", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice",
                 "ForTokenClassification", "ForQuestionAnswering"):
        yield f"roformer-{head}", Case(getattr(roformer, f"RoFormer{head}"), roformer.RoFormerConfig, SMALL, writes=head == "ForCausalLM", types=int(head == "ForCausalLM"),
                                       labels=guessed.get(head, ("labels",)), still=still(head, "encoder.ln.bias"))


def longformers():
    "Longformer's cases: with its window, and with full attention."
    guessed = dict(Model=(), ForQuestionAnswering=("start_positions", "end_positions"))
    for head in ("Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering"):
        for name, sparse in (("", True), ("-dense", False)):
            sizes = SMALL | dict(attention_window=[4, 8], use_sparse_attention=sparse)
            yield f"longformer-{head}{name}", Case(getattr(longformer, f"Longformer{head}"), longformer.LongformerConfig, sizes, types=0, labels=guessed.get(head, ("labels",)),
                                                   still=still(head, "encoder.layer.1.output.LayerNorm.bias"))


def seq2seqs():
    "The cases with an encoder and a decoder, and the encoder alone. A bias of keys adds the same to all scores of a query; rotary keys are turned, so theirs learns."
    sizes = dict(vocab_size=VOCAB, max_position_embeddings=POSITIONS, d_model=WIDTH, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, dropout_rate=0.0,
                 bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, initializer_factor=10.0)
    for name in ("T5EncoderModel", "T5Model", "T5ForConditionalGeneration"):
        head = name == "T5ForConditionalGeneration"
        yield f"megatron_t5-{name}", Case(getattr(megatron_t5, name), megatron_t5.T5Config, sizes, two=name != "T5EncoderModel", writes=head,
                                          labels=("labels",) * head, still=(".k.bias",))
    sizes = dict(vocab_size=VOCAB, d_model=WIDTH, max_position_embeddings=POSITIONS, init_std=0.2, dropout=0.0, num_labels=4, **SIDES)
    for number, kind in enumerate(("classes", "number")):
        yield f"bart-{kind}", Case(bart.BartForTextInfill, bart.BartTextInfillConfig, sizes | dict(encoder_loss_type=number), two=True, writes=True,
                                   labels=("labels", "encoder_labels"), still=("k_proj.bias",))


CASES = dict([*roformers(), *longformers(), *seq2seqs()])
FAMILIES = {"roformer": "roformer-ForCausalLM", "longformer": "longformer-ForMaskedLM", "megatron_t5": "megatron_t5-T5ForConditionalGeneration", "bart": "bart-classes"}
WRITERS = [name for name, case in CASES.items() if case.writes]
