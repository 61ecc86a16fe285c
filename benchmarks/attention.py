"""Which attention is the fastest: forward and backward of one layer, a JSON line a shape, contender and dropout.

usage: python benchmarks/attention.py --data FOLDER [--only NAME ...] [--repeat N] [--out FILE]
       python benchmarks/attention.py --table [--out FILE] | --smoke [--only NAME ...] [--out FILE]

FOLDER is what `benchmarks/gpu_data.py` writes; of it only the lengths of the Chinese documents are read. Shapes: documents of those lengths packed
into 16 rows of 1,024 tokens, causal (GPT-2 of 3.56B: 32 heads of 96; Qwen3: 32 heads of 128 over 8 of keys; GPT-2 of 110M: 12 of 64), 32 windows
of 1,024 tokens each, causal (GPT-2 of 110M as it is pretrained), and rows of 512 that are not causal, whole or with a third of each row padding
(BERT: 128 rows, 12 heads of 64; MegatronBERT: 32 rows, 8 of 256). --only takes names of shapes and of contenders, or patterns.

    varlen       this library's attention by document: torch's flash kernel with the boundaries, documents in one flat sequence
    loop         this library's fallback: a call for each document
    cudnn_varlen cuDNN's kernel with the same boundaries, by operators of torch that have no public name
    flex         FlexAttention, compiled, with a block mask of the documents
    mask_*       scaled_dot_product_attention with a boolean mask, in the kernel that is named
    sdpa_*       the same without a mask, where there is nothing to hide

All take [rows, tokens, heads, width] or [tokens, heads, width] as a projection leaves them; without padding where they can (varlen, loop,
cudnn_varlen: the real tokens alone). `ms` is forward and backward, `forward_ms` the first of the two: medians of --repeat after three rounds that
are not counted, by events on the device. `error_*` is |contender - float32| / |float32| of the output and the gradients, computed on the timed
tensors by a plain product in float32; more than 0.02 is a failed row that is not timed, and so is dropout that drops nothing or does not
scale what it keeps. `tflops` counts what the documents need, forward and backward. A block mask and a boolean mask are made once, before.
"""

import argparse
import fnmatch
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fengshen.utils.kernels.attention import document_attention, flash_attention, flash_ready

HERE = Path(__file__).resolve().parent
WORST = 2e-2  # relative error that a contender may have
WARM = 3
DRAWS = 16  # of dropout, for its mean
DROPOUTS = (0.0, 0.1)
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
BOTH = dict(bert=dict(rows=128, heads=12, width=64), megatron_bert=dict(rows=32, heads=8, width=256))
SHAPES = dict(
    gpt2_3b6=dict(kind="packed", rows=16, row=1024, heads=32, width=96),
    qwen3_4b=dict(kind="packed", rows=16, row=1024, heads=32, keys=8, width=128),
    gpt2_110m=dict(kind="packed", rows=16, row=1024, heads=12, width=64),
    gpt2_windows=dict(kind="windows", rows=32, row=1024, heads=12, width=64),
    **{f"{name}_{kind}": shape | dict(kind=kind, row=512) for name, shape in BOTH.items() for kind in ("whole", "padded")},
)
TINY = dict(rows=2, row=48, width=16)


# ---------------------------------------------------------------------------------------------------------------- shapes
def fill(lengths, rows, row):
    """[[tokens of a document ...] for each row]: each document goes to the fullest row that it fits into, what is left is one more."""
    found = [[] for _ in range(rows)]
    for length in lengths:
        room = [r for r in found if sum(r) + length <= row]
        if room:
            max(room, key=sum).append(int(length))
    return [r + [row - sum(r)] * (sum(r) < row) for r in found]


def documents_of(shape, lengths):
    """[[tokens of a document ...] for each row], without padding."""
    rows, row = shape["rows"], shape["row"]
    if shape["kind"] == "packed":
        return fill(np.minimum(lengths, row)[: 8 * rows], rows, row)
    return [[row - row // 3 if shape["kind"] == "padded" else row]] * rows


class Case:
    """The tensors of a shape, and what a float32 attention makes of them."""

    def __init__(self, shape, lengths):
        documents = documents_of(shape, lengths)
        self.kind, self.causal, self.row = shape["kind"], shape["kind"] in ("packed", "windows"), shape["row"]
        self.lengths = [length for row in documents for length in row]
        number = np.zeros((shape["rows"], self.row), np.int64)  # of the document a position is in, 0 for padding
        for r, row in enumerate(documents):
            number[r, : sum(row)] = np.repeat(np.arange(1, len(row) + 1), row)
        self.doc_bl = torch.from_numpy(number).to(DEVICE)
        self.real = self.doc_bl > 0
        self.bounds = torch.tensor([0, *np.cumsum(self.lengths)], dtype=torch.int32, device=DEVICE)
        self.longest = max(self.lengths)
        self.heads, self.keys, self.width = shape["heads"], shape.get("keys", shape["heads"]), shape["width"]
        draw = torch.Generator(DEVICE).manual_seed(0)
        heads = (self.heads, self.keys, self.keys, self.heads)
        made = [torch.randn(*self.doc_bl.shape, h, self.width, device=DEVICE, dtype=DTYPE, generator=draw) for h in heads]
        *self.qkv, self.grad = [x * self.real[..., None, None] for x in made]
        self.flops = 3.5 * 4 * self.heads * self.width * sum(n * n for n in self.lengths) * (0.5 if self.causal else 1)

    def inputs(self, flat):
        """(queries, keys and values that want gradients, the gradient of the output): rows, or the real tokens alone."""
        *qkv, grad = [x[self.real] if flat else x for x in (*self.qkv, self.grad)]
        return [x.detach().clone().requires_grad_() for x in qkv], grad

    def reference(self):
        """Output and gradients of the real tokens in float32, a document after the other."""
        leaves = [x[self.real].float().requires_grad_() for x in self.qkv]
        out = []
        for parts in zip(*(x.split(self.lengths) for x in leaves)):
            q, k, v = (x.transpose(0, 1).repeat_interleave(self.heads // x.shape[1], 0) for x in parts)
            scores = q @ k.mT * self.width**-0.5
            if self.causal:
                scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            out.append((scores.softmax(-1) @ v).transpose(0, 1))
        out = torch.cat(out)
        return out.detach(), *torch.autograd.grad(out, leaves, self.grad[self.real].float())


# ---------------------------------------------------------------------------------------------------------------- contenders
def by_heads(case, tensors, repeat):
    """[..., heads, tokens, width] views; keys and values as often as there are queries, if asked for."""
    return [x.repeat_interleave(case.heads // x.shape[-2], -2).transpose(-3, -2) if repeat else x.transpose(-3, -2) for x in tensors]


def varlen(case):
    def attend(*qkv, dropout):
        q, k, v = (x[None] for x in by_heads(case, qkv, repeat=False))
        return flash_attention(q, k, v, case.bounds, case.longest, causal=case.causal, dropout=dropout)[0]

    return attend


def loop(case):
    def attend(*qkv, dropout):
        q, k, v = (x[None] for x in by_heads(case, qkv, repeat=True))
        return document_attention(q, k, v, case.bounds, causal=case.causal, dropout=dropout)[0].transpose(0, 1)

    return attend


class CudnnVarlen(torch.autograd.Function):
    """cuDNN's attention over flat documents; torch has the operators, and no derivative for their flat form."""

    @staticmethod
    def forward(ctx, q, k, v, bounds, longest, causal, dropout):
        ctx.rest, scale = (longest, longest, dropout, causal), q.shape[-1] ** -0.5
        found = torch.ops.aten._cudnn_attention_forward(q, k, v, None, bounds, bounds, longest, longest, True, dropout, causal, False, scale=scale)
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, bounds)
        return out.reshape(q.shape)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, seed, offset, bounds = ctx.saved_tensors
        flat, saved, scale = (bounds, bounds, *ctx.rest), (q, k, v, out, lse, seed, offset), q.shape[-1] ** -0.5
        found = torch.ops.aten._cudnn_attention_backward(grad.reshape(out.shape).contiguous(), *saved, None, *flat, scale=scale)
        return *found, None, None, None, None


def cudnn_varlen(case):
    return lambda *qkv, dropout: CudnnVarlen.apply(*qkv, case.bounds, case.longest, case.causal, dropout)


COMPILED = torch.compile(flex_attention, dynamic=False)


def flex(case):
    doc_bl, causal = case.doc_bl, case.causal

    def visible(b, h, q, s):
        together = doc_bl[b, q] == doc_bl[b, s]
        return together & (q >= s) if causal else together

    mask = create_block_mask(visible, len(doc_bl), None, case.row, case.row, device=DEVICE)

    def attend(*qkv, dropout):
        return COMPILED(*by_heads(case, qkv, repeat=False), block_mask=mask, enable_gqa=case.heads != case.keys).transpose(1, 2)

    return attend


def masked(backend):
    def make(case):
        if case.causal:
            mask = (case.doc_bl[:, None, :, None] == case.doc_bl[:, None, None, :]).tril()
        else:
            mask = case.real[:, None, None, :].expand(-1, 1, case.row, -1)

        def attend(*qkv, dropout):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*by_heads(case, qkv, repeat=True), attn_mask=mask, dropout_p=dropout).transpose(1, 2)

        return attend

    return make


def unmasked(backend):
    def make(case):
        def attend(*qkv, dropout):
            with sdpa_kernel(backend):
                heads = by_heads(case, qkv, repeat=False)
                return F.scaled_dot_product_attention(*heads, dropout_p=dropout, is_causal=case.causal).transpose(1, 2)

        return attend

    return make


FLAT = ("varlen", "loop", "cudnn_varlen")
CONTENDERS = dict(
    varlen=varlen,
    loop=loop,
    mask_efficient=masked(SDPBackend.EFFICIENT_ATTENTION),
    mask_cudnn=masked(SDPBackend.CUDNN_ATTENTION),
    mask_math=masked(SDPBackend.MATH),
    sdpa_flash=unmasked(SDPBackend.FLASH_ATTENTION),
    sdpa_cudnn=unmasked(SDPBackend.CUDNN_ATTENTION),
    sdpa_efficient=unmasked(SDPBackend.EFFICIENT_ATTENTION),
    flex=flex,
    cudnn_varlen=cudnn_varlen,
)
LATE = ("flex", "cudnn_varlen")  # the first is compiled for each shape; the second could take the device's context down


def why_not(name, shape, dropout):
    """Why a contender is not tried on a shape; empty where it is."""
    if name == "varlen" and not flash_ready(DEVICE, shape["width"], DTYPE):
        return f"no fused kernel for heads of {shape['width']} in {str(DTYPE).removeprefix('torch.')} on {DEVICE}"
    if name in ("cudnn_varlen", "mask_cudnn", "sdpa_cudnn") and not GPU:
        return "cuDNN needs a GPU"
    if name == "flex" and not GPU:
        return "flex attention has no backward pass on a CPU"
    if name == "flex" and dropout:
        return "flex attention has no dropout"
    if name.startswith("mask_") and shape["kind"] in ("whole", "windows"):
        return "there is nothing to mask"
    if name == "mask_math" and GPU:
        return "its scores are written out; it is here for the CPU"
    if name.startswith("sdpa_") and shape["kind"] in ("packed", "padded"):
        return "documents share rows" if shape["kind"] == "packed" else "rows have padding"
    return ""


# ---------------------------------------------------------------------------------------------------------------- measuring
def apart(got, want):
    """|got - want| / |want|"""
    return float((got.float() - want).norm() / want.norm())


def check(attend, leaves, grad, case, flat, want):
    """Relative errors of the output and the gradients at the real tokens, without dropout."""
    out = attend(*leaves, dropout=0.0)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    names = ("out", "query", "key", "value")
    return {f"error_{name}": round(apart(x if flat else x[case.real], y), 5) for name, x, y in zip(names, found, want)}


def check_dropout(attend, leaves, case, flat, want, dropout):
    """Why what dropout did is not dropout; empty where it is. On average over the draws it leaves the output as it is."""
    with torch.no_grad():
        outs = [attend(*leaves, dropout=dropout) for _ in range(DRAWS)]
    outs = [(out if flat else out[case.real]).float() for out in outs]
    if apart(outs[0], want[0]) < 0.05:
        return "dropout drops nothing"
    mean = float(sum((out * want[0]).sum() for out in outs) / want[0].square().sum() / DRAWS)
    return "" if abs(mean - 1) < 0.06 else f"dropout scales what it keeps to {mean:.2f}"


def timed(attend, leaves, grad, dropout, repeat):
    """{ms, forward_ms, peak_mib}: medians."""
    taken = []
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(WARM + repeat):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)] if GPU else []
        note = (lambda i, marks=marks: marks[i].record()) if GPU else (lambda i, marks=marks: marks.append(1000 * time.perf_counter()))
        note(0)
        out = attend(*leaves, dropout=dropout)
        note(1)
        torch.autograd.grad(out, leaves, grad)
        note(2)
        del out
        if GPU:
            torch.cuda.synchronize()
        taken.append([marks[0].elapsed_time(m) if GPU else m - marks[0] for m in marks[1:]])
    forward, both = (statistics.median(column) for column in zip(*taken[WARM:]))
    peak = dict(peak_mib=round((torch.cuda.max_memory_allocated() - before) / 2**20)) if GPU else {}
    return dict(ms=round(both, 4), forward_ms=round(forward, 4)) | peak


def attempt(name, case, want, dropout, repeat):
    """What is found of a contender on a case."""
    flat = name in FLAT
    attend, (leaves, grad) = CONTENDERS[name](case), case.inputs(flat)
    errors = check(attend, leaves, grad, case, flat, want)
    if not max(errors.values()) <= WORST:  # NaN is worse
        return errors | dict(error=f"wrong: more than {WORST} from float32")
    wrong = check_dropout(attend, leaves, case, flat, want, dropout) if dropout else ""
    if wrong:
        return errors | dict(error=wrong)
    found = timed(attend, leaves, grad, dropout, repeat)
    return errors | found | dict(tflops=round(case.flops / found["ms"] / 1e9, 1))


def reason(error, told):
    """One line of an exception, and of what torch warned of before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join([lines[0], *(str(w.message).split(" (Trigger")[0] for w in told)])[:400]


def measure(name, shape, case, want, dropout, repeat):
    """The measured part of a row; what cannot run says why."""
    why, start = why_not(name, shape, dropout), time.time()
    if why:
        return dict(skipped=why)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = attempt(name, case, want, dropout, repeat)
        except Exception as e:  # one that fails is a row
            cannot = "No available kernel" in str(e) or "No viable backend" in str(e)
            found = {"skipped" if cannot else "error": reason(e, told)}
    return found | dict(wall_s=round(time.time() - start, 1))


def chosen(only):
    """(shapes, contenders) asked for, all where none is named; a pattern that fits neither ends the program."""
    for pattern in only or []:
        if not fnmatch.filter([*SHAPES, *CONTENDERS], pattern):
            sys.exit(f"nothing fits {pattern!r}; there are {', '.join([*SHAPES, *CONTENDERS])}")
    fits = [[name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in only or [])] for names in (SHAPES, CONTENDERS)]
    return [some or list(names) for some, names in zip(fits, (SHAPES, CONTENDERS))]


def measure_all(options, lengths):
    """A row a shape, contender and dropout, each written as soon as it is there."""
    shapes, names = chosen(options.only)
    facts = dict(device=torch.cuda.get_device_name() if GPU else "cpu", torch=torch.__version__, dtype=str(DTYPE).removeprefix("torch."))
    for some in ([n for n in names if n not in LATE], *([n] for n in LATE if n in names)):
        for key in shapes if some else []:
            shape = SHAPES[key] | (TINY if options.smoke else {})
            case = Case(shape, lengths)
            want = case.reference()
            what = dict(shape=key) | shape | dict(tokens=sum(case.lengths), documents=len(case.lengths)) | facts | dict(smoke=options.smoke)
            for name in some:
                for dropout in DROPOUTS:
                    found = measure(name, shape, case, want, dropout, options.repeat)
                    write(options.out, dict(contender=name, dropout=dropout) | what | found)
    print(table(options.out), flush=True)


def write(out, row):
    text = json.dumps(row)
    print(text, flush=True)
    with open(out, "a", encoding="utf8") as f:
        f.write(text + "\n")


# ---------------------------------------------------------------------------------------------------------------- table
HEAD = ["contender", "forward ms", "forward and backward ms", "to varlen", "TFLOP/s", "memory MiB", "largest error", "not measured because"]


def cells(row, ours):
    """A row of the file as the cells of the table."""
    if "ms" not in row:
        return [row["contender"], *[""] * 6, (row.get("error") or row.get("skipped", "")).replace("|", "/")]
    worst = max(value for key, value in row.items() if key.startswith("error_"))
    share = f"{row['ms'] / ours:.2f}" if ours else ""
    times, memory = [f"{row['forward_ms']:.3f}", f"{row['ms']:.3f}"], str(row.get("peak_mib", ""))
    return [row["contender"], *times, share, f"{row['tflops']:.0f}", memory, f"{worst:.4f}", ""]


def table(file):
    """The newest row of each as markdown, a table a shape and dropout, the fastest first."""
    rows = {}
    for row in map(json.loads, Path(file).read_text("utf8").splitlines()):
        rows.setdefault((row["shape"], row["dropout"]), {})[row["contender"]] = row
    parts = []
    for (shape, dropout), found in rows.items():
        ours = found.get("varlen", {}).get("ms")
        body = [cells(row, ours) for row in sorted(found.values(), key=lambda row: row.get("ms", float("inf")))]
        first = next(iter(found.values()))
        head = f"### {shape}: {first['rows']} x {first['row']}, {first['kind']}, {first['heads']} heads of {first['width']}, dropout {dropout:g}"
        parts.append(head + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, ["---"] * len(HEAD), *body)))
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--repeat", type=int, default=12)
    parser.add_argument("--out", default=str(HERE / "results" / "attention.jsonl"))
    for flag in ("smoke", "table"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    if options.table:
        return print(table(options.out))
    if not options.data and not options.smoke:
        parser.error("--data FOLDER is needed (benchmarks/gpu_data.py writes it)")
    lengths = np.load(Path(options.data, "zh_lengths.npy")).astype(int) if options.data else np.array([20, 48, 31, 7, 40])
    measure_all(options, lengths)


if __name__ == "__main__":
    main()
