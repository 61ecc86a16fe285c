"""Who reads and writes in benchmarks/data.py: one class each, FengShen's first.

Every class has `write(flat, ends)`, which stores documents, `prepare(flat)`, which stores windows where the documents cannot be read as
windows, and, after `open()`, what it can do of `document(i)`, `documents(ids)`, `window(i)` and `batches(ids)`; all give int64 tensors.
Window i is `length` tokens from token `i * stride` on. `order` is "stored" or "megatron": windows of documents that megatron-core's
seed shuffled. Nothing of another project's is needed before a method is called.
"""

import os

import numpy as np
import torch
from torch.utils.data import DataLoader

SEQ, BATCH, SEED, VOCAB = 1024, 32, 1234, 50257


def documents_of(flat, ends):
    """The documents, one after the other."""
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist()):
        yield flat[a:b]


def long(array):
    """A new int64 tensor."""
    return torch.from_numpy(array.astype(np.int64))


class Picked:
    """A map-style dataset of one field, or of a function of each item."""

    def __init__(self, data, pick):
        self.data, self.pick = data, pick

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.pick(self.data[i])


class Contender:
    order, length, stride = "stored", SEQ + 1, SEQ

    def __init__(self, folder):
        self.folder = str(folder)

    def prepare(self, flat):
        """Nothing more to store."""

    def open(self):
        self.documents_ = None

    def windows(self):
        """A map-style dataset of windows."""

    def documents(self, ids):
        return torch.cat([self.document(i) for i in ids.tolist()])

    def window(self, i):
        if not hasattr(self, "map"):
            self.map = self.windows()
        return self.map[i]

    def batches(self, ids):
        return DataLoader(self.windows(), batch_sampler=ids.tolist())


class Ours(Contender):
    """Stored order: windows of an `MMapIndexDataset`."""

    def write(self, flat, ends):
        from fengshen.data.mmap_dataloader.mmap_writer import write_mmap

        write_mmap(self.folder + "/set", documents_of(flat, ends), vocab_size=VOCAB)

    def open(self):
        from fengshen.data.mmap_dataloader.mmap_index_dataset import MMapIndexDataset

        self.set = MMapIndexDataset([self.folder + "/set"], ["input_ids"])

    def document(self, i):
        return self.set[i]["input_ids"]

    def documents(self, ids):
        return self.set.__getitems__(ids, copy=False).flat["input_ids"]

    def windows(self):
        from fengshen.data.reading import StoredWindows

        return StoredWindows(self.set.tokens(), SEQ)

    def batches(self, ids):
        return map(self.windows().__getitems__, ids)


class OursBulk(Ours):
    """The same set written from arrays, many documents at once."""

    def write(self, flat, ends):
        from fengshen.data.mmap_dataloader.mmap_writer import ShardWriter, publish

        os.makedirs(self.folder + "/set")
        writer = ShardWriter(self.folder + "/set", 0, dict(input_ids="<u2"))
        lengths = np.diff(ends)
        for first in range(0, len(lengths), 10_000):
            some = lengths[first : first + 10_000]
            writer.add(dict(input_ids=flat[ends[first] : ends[first + len(some)]]), dict(input_ids=some))
        writer.close()
        publish(self.folder + "/set")


class OursMegatron(Contender):
    """Megatron's files, and megatron-core's order."""

    order = "megatron"

    def write(self, flat, ends):
        from fengshen.data.megatron_dataloader import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(self.folder + "/m.bin", dtype=np.uint16)
        for document in documents_of(flat, ends):
            builder.add_document(document, [len(document)])
        builder.finalize(self.folder + "/m.idx")

    def open(self):
        from fengshen.data.megatron_dataloader import IndexedDataset

        self.set = IndexedDataset(self.folder + "/m")

    def document(self, i):
        return long(self.set[i])

    def documents(self, ids):
        return self.set.read(ids)

    def windows(self):
        from fengshen.data.megatron_dataloader.gpt_dataset import GPTDataset

        return GPTDataset(self.set, SEQ, seed=SEED)

    def batches(self, ids):
        return map(self.windows().__getitems__, ids)


class OursMegatronBulk(OursMegatron):
    """The same files written from arrays, many documents at once."""

    def write(self, flat, ends):
        from fengshen.data.megatron_dataloader import IndexedDatasetBuilder

        builder, lengths = IndexedDatasetBuilder(self.folder + "/m.bin", dtype=np.uint16), np.diff(ends)
        for first in range(0, len(lengths), 10_000):
            some = lengths[first : first + 10_000]
            builder.add_documents(flat[ends[first] : ends[first + len(some)]], some)
        builder.finalize(self.folder + "/m.idx")


class NanoGPT(Contender):
    """A memory map and a slice, as nanoGPT reads; torch's DataLoader stacks."""

    def write(self, flat, ends):
        with open(self.folder + "/d.bin", "wb") as f:
            for document in documents_of(flat, ends):
                f.write(document.tobytes())
        np.save(self.folder + "/ends.npy", ends)

    def open(self):
        self.flat, self.ends = np.memmap(self.folder + "/d.bin", np.uint16, "r"), np.load(self.folder + "/ends.npy")

    def document(self, i):
        return long(self.flat[self.ends[i] : self.ends[i + 1]])

    def windows(self):
        starts = range(0, len(self.flat) - SEQ, SEQ)
        return Picked(starts, lambda start: long(self.flat[start : start + SEQ + 1]))


class Datasets(Contender):
    """Hugging Face datasets: Arrow files in torch format."""

    def write(self, flat, ends):
        from datasets import Dataset, Features, List, Value

        features = Features({"ids": List(Value("uint16"))})
        made = Dataset.from_generator(lambda: ({"ids": d} for d in documents_of(flat, ends)), features=features, cache_dir=self.folder + "/cache")
        made.save_to_disk(self.folder + "/documents")

    def prepare(self, flat):
        import pyarrow as pa
        from datasets import Dataset

        view = np.lib.stride_tricks.sliding_window_view(flat, SEQ + 1)[::SEQ]
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(view).ravel()), SEQ + 1)
        Dataset(pa.table(dict(ids=column))).save_to_disk(self.folder + "/windows")

    def load(self, name):
        from datasets import load_from_disk

        return load_from_disk(f"{self.folder}/{name}").with_format("torch")

    def open(self):
        self.set = self.load("documents")

    def document(self, i):
        return self.set[i]["ids"]

    def documents(self, ids):
        return torch.cat(list(self.set[ids.tolist()]["ids"]))

    def windows(self):
        return Picked(self.load("windows"), lambda item: item["ids"])

    def batches(self, ids):
        return DataLoader(self.load("windows"), batch_sampler=ids.tolist(), collate_fn=lambda items: torch.stack([item["ids"] for item in items]))


class LitData(Contender):
    """litdata: windows that follow each other by its TokensLoader, in its own order and with its own loader."""

    stride = SEQ + 1

    def store(self, name, flat, ends, loader=None):
        from litdata.streaming import Cache

        os.makedirs(f"{self.folder}/{name}")
        cache = Cache(f"{self.folder}/{name}", chunk_bytes=1 << 26, item_loader=loader)
        for i, document in enumerate(documents_of(flat, ends)):
            cache[i] = torch.from_numpy(np.array(document))
        cache.done()
        cache.merge()

    def load(self, name, loader=None, shuffle=False):
        from litdata import StreamingDataset

        return StreamingDataset(f"{self.folder}/{name}", item_loader=loader, shuffle=shuffle, transform=lambda item: torch.as_tensor(item).long())

    def write(self, flat, ends):
        self.store("documents", flat, ends)

    def prepare(self, flat):
        from litdata import TokensLoader

        self.store("windows", flat, np.array([0, len(flat)]), TokensLoader(block_size=SEQ + 1))

    def open(self):
        self.set = self.load("documents")

    def document(self, i):
        return self.set[i]

    def windows(self, shuffle=False):
        from litdata import TokensLoader

        return self.load("windows", TokensLoader(block_size=SEQ + 1), shuffle)

    def batches(self, ids):
        from litdata import StreamingDataLoader

        in_order = (ids.ravel() == np.arange(ids.size)).all()
        return StreamingDataLoader(self.windows(shuffle=not in_order), batch_size=BATCH)


class MegatronCore(Contender):
    """megatron-core 0.16: the text of its GPTDataset alone, without the masks and positions it makes of every sample."""

    order = "megatron"

    def write(self, flat, ends):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(self.folder + "/m.bin", dtype=np.uint16)
        for document in documents_of(flat, ends):
            builder.add_document(document, [len(document)])
        builder.finalize(self.folder + "/m.idx")

    def open(self):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.set = IndexedDataset(self.folder + "/m")

    def document(self, i):
        return long(self.set.get(i))

    def samples(self):
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        class Tokenizer:
            eod, pad, vocab_size, unique_identifiers = 0, -1, VOCAB, {"class": "benchmark"}

        config = GPTDatasetConfig(random_seed=SEED, sequence_length=SEQ, blend=([self.folder + "/m"], None), split="1,0,0",
                                  path_to_cache=self.folder + "/cache", tokenizer=Tokenizer(), reset_position_ids=False,
                                  reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
        return GPTDataset(self.set, self.folder + "/m", np.arange(len(self.set), dtype=np.int32), None, Split.train, config)

    def windows(self):
        samples = self.samples()
        return Picked(range(len(samples)), lambda i: torch.from_numpy(samples._query_document_sample_shuffle_indices(i)[0]))


class MegatronWhole(MegatronCore):
    """The same as its users get it: tokens, labels, loss mask and positions of each sample."""

    length = SEQ

    def windows(self):
        return Picked(self.samples(), lambda sample: sample["tokens"])

    def batches(self, ids):
        return map(lambda batch: batch["tokens"], DataLoader(self.samples(), batch_sampler=ids.tolist()))


OURS = dict(mmap=Ours, mmap_arrays=OursBulk, megatron=OursMegatron, megatron_arrays=OursMegatronBulk)
PEERS = {"nanoGPT": NanoGPT, "datasets": Datasets, "litdata": LitData, "megatron-core": MegatronCore, "megatron-core, whole": MegatronWhole}
