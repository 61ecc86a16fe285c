"""What a corpus of two terabytes and a slow disk do to FengShen's reading; the parts `scale` and `step` of benchmarks/data.py."""

import contextlib
import json
import mmap
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import numpy as np
from data_peers import BATCH, SEED, SEQ

SIZES = (1, 8, 32, 128, 512, 2000)  # gigabytes, in files of two
READ = 20_000 // BATCH  # batches
DISKS = dict(slow=dict(bytes_per_second=100_000_000, reads_per_second=2000), spinning=dict(bytes_per_second=100_000_000, reads_per_second=200))
CGROUP = Path("/sys/fs/cgroup/blkio/fengshen-benchmark")


def holes(work, gigabytes):
    """A dataset of files that are all hole: read as zeros, and no disk is taken. Rows are of 1,000 tokens, and all shards share one index file."""
    from fengshen.data.mmap_dataloader.mmap_writer import publish

    folder, size = work / f"holes-{gigabytes}", min(gigabytes, 2) * 500_000_000
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    np.arange(0, size + 1, 1000, dtype="<u8").tofile(folder / "index")
    for k in range(max(1, gigabytes // 2)):
        name = folder / f"shard-{k:05d}"
        with open(f"{name}_input_ids.bin", "wb") as f:
            f.truncate(2 * size)
        os.link(folder / "index", f"{name}_input_ids.idx")
        record = dict(schema=dict(input_ids="<u2"), rows=size // 1000, elements=dict(input_ids=size), block=1 << 22, sums={})
        Path(f"{name}.json").write_text(json.dumps(record))
    publish(folder)
    return folder


def solid(work, gigabytes=4):
    """A dataset of random tokens that are on the disk: what a cold read is."""
    from fengshen.data.mmap_dataloader.mmap_writer import ShardWriter, publish

    folder = work / f"solid-{gigabytes}"
    if not (folder / "manifest.json").exists():
        random = np.random.default_rng(0)
        for k in range(gigabytes):
            writer = ShardWriter(folder, k, dict(input_ids="<u2"))
            for _ in range(50):
                writer.add(dict(input_ids=random.integers(0, 50_000, 10_000_000, np.uint16)), dict(input_ids=np.full(10_000, 1000)))
            writer.close()
        publish(folder)
    return folder


def make(work):
    """All datasets of these parts."""
    for gigabytes in SIZES:
        holes(work, gigabytes)
    solid(work)


def forget(folder):
    """Take a dataset out of the page cache."""
    for path in folder.glob("*.bin"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory(key="RssAnon"):
    """Megabytes of this process."""
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith(key))


def windows(folder):
    """The dataset's windows in stored order."""
    from fengshen.data.mmap_dataloader.mmap_index_dataset import MMapIndexDataset
    from fengshen.data.reading import StoredWindows

    return StoredWindows(MMapIndexDataset([folder], ["input_ids"]).tokens(), SEQ)


def chosen(size, key=0):
    """20,000 windows of all, in batches."""
    from fengshen.data.blend import Permutation

    return Permutation(size, SEED, key)[: READ * BATCH].reshape(READ, BATCH)


def rates(data, ids, clock):
    """Tokens a second of a pass over batches."""
    start = clock()
    for row in ids:
        data.__getitems__(row)
    return ids.size * (SEQ + 1) / (clock() - start)


def scale(work, name):
    """One size, in a process of its own: opening, the first batch, a cold and warm passes, memory."""
    folder = work / name
    next(iter(loader(windows(solid(work)), 0)))  # imported and compiled
    forget(folder)
    before, start = memory(), time.perf_counter()
    data = windows(folder)
    opened = time.perf_counter() - start
    next(iter(loader(data, 0)))
    first, ids = time.perf_counter() - start, chosen(len(data))
    cold = rates(data, ids, time.perf_counter)
    warm = statistics.median(rates(data, ids, time.process_time) for _ in range(5))
    added, (seek, resumed) = memory() - before, resuming(data)
    return dict(scale=dict(gigabytes=len(data.tokens) * 2 / 1e9, open_ms=opened * 1e3, first_batch_ms=first * 1e3, cold_tokens_per_second=cold,
                           second_pass_tokens_per_second=warm, loader_tokens_per_second=loading(data), seek_ms=seek, resumed_batch_ms=resumed,
                           anonymous_mb=memory(), anonymous_mb_added=added))


def loading(data):
    """The second pass over 20,000 windows by the training loader, with what it adds to a batch; its thread's time is counted."""
    for _ in range(2):
        start = time.process_time()
        for _ in zip(range(READ), loader(data, SEED)):
            pass
    return READ * BATCH * (SEQ + 1) / (time.process_time() - start)


def resuming(data):
    """Milliseconds from a saved position to the numbers of the next windows, and to their tokens: the worst of 20 positions, never read before."""
    from fengshen.data.blend import Blend
    from fengshen.data.sampler import GlobalBatchSampler

    found = []
    for share in [0, *np.linspace(0, 0.999, 20)]:
        sampler = GlobalBatchSampler(len(data), BATCH, order=Blend([len(data)], [1], seed=SEED))
        state = sampler.state_dict()
        state["consumed"] = int(len(data) * share)
        state["blend"] = state["blend"] | dict(drawn=[state["consumed"]], since=[state["consumed"]])
        start = time.perf_counter()
        sampler.load_state_dict(state)
        numbers = sampler.window()[0]
        found.append([time.perf_counter() - start])
        data.__getitems__(numbers)
        found[-1].append(time.perf_counter() - start)
    return (np.max(found[1:], axis=0) * 1e3).tolist()  # the first one compiles


def advice(work, name):
    """The cold rate on a real disk: `random` as FengShen maps, `usual` with the system's own reading ahead."""
    if name == "usual":
        del mmap.MADV_RANDOM
    folder = solid(work)
    data = windows(folder)
    ids = chosen(len(data), os.getpid())[:100]
    data.__getitems__(ids[0])
    forget(folder)
    return dict(cold=dict(tokens_per_second=rates(data, ids, time.perf_counter)))


def worker(folder, number, barrier, results):
    """One of eight readers: its tokens a CPU second over two seconds, and its memory."""
    data = windows(folder)
    ids = chosen(len(data), number)
    rates(data, ids, time.perf_counter)
    barrier.wait()
    count, end, start = 0, time.perf_counter() + 2, time.process_time()
    while time.perf_counter() < end:
        data.__getitems__(ids[count % READ])
        count += 1
    results.put((count * BATCH * (SEQ + 1) / (time.process_time() - start), memory()))
    barrier.wait()


def workers(work, name, count=8):
    """Eight processes on one dataset, beside one process."""
    context, out = multiprocessing.get_context("spawn"), {}
    for n in (1, count):
        barrier, results = context.Barrier(n), context.Queue()
        running = [context.Process(target=worker, args=(work / name, k, barrier, results)) for k in range(n)]
        for process in running:
            process.start()
        found = [results.get() for _ in running]
        for process in running:
            process.join()
        out[f"workers_{n}"] = dict(tokens_per_cpu_second=statistics.median(f[0] for f in found), anonymous_mb_each=max(f[1] for f in found))
    return out


@contextlib.contextmanager
def slow_disk(device, bytes_per_second, reads_per_second):
    """This process reads no faster from the disk than this; needs a cgroup (version 1, blkio) that one may write."""
    CGROUP.mkdir(exist_ok=True)
    for key, limit in (("read_bps", bytes_per_second), ("read_iops", reads_per_second)):
        (CGROUP / f"blkio.throttle.{key}_device").write_text(f"{device} {limit}")
    (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
    yield
    (CGROUP.parent / "cgroup.procs").write_text(str(os.getpid()))
    CGROUP.rmdir()


def loader(data, key):
    """FengShen's training loader over windows."""
    from fengshen.data.batch import Batch, finish
    from fengshen.data.blend import Blend
    from fengshen.data.sampler import GlobalBatchSampler, TrainLoader

    def collate(ids):
        return finish(Batch(input_ids=ids, labels=ids), ids.numel())

    return TrainLoader(data, GlobalBatchSampler(len(data), BATCH, order=Blend([len(data)], [1], seed=key)), collate)


def waiting(data, tokens_per_second, key, steps=20):
    """Share of the time of `steps` training steps that was spent waiting for the next batch; a step is a sleep. The first batch is not counted."""
    batches = iter(loader(data, key))
    next(batches)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(steps):
        time.sleep(BATCH * SEQ / tokens_per_second)
        start = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - start
    return waited / (time.perf_counter() - begin)


def step(work, name):
    """Waiting at one speed of training: warm, cold, or cold on a disk of `DISKS`."""
    rate, state = name.split()
    data, key, disk = windows(solid(work)), os.getpid(), DISKS.get(state, {})
    for _ in range(2):  # compiles; and maps what a later epoch finds mapped
        list(zip(range(50 if state == "warm" else 1), loader(data, key)))
    if state != "warm":
        forget(work / "solid-4")
    before = from_disk()
    with slow_disk(device_of(work), **disk) if disk else contextlib.nullcontext():
        waited = waiting(data, int(rate), key, steps=8 if int(rate) < 100_000 else 40)
    return {f"step, {state}": dict(tokens_per_second=int(rate), waiting=waited, disk_mb=from_disk() - before) | disk}


def from_disk():
    """Megabytes that this process has read from a disk."""
    return next(int(line.split()[1]) / 1e6 for line in open("/proc/self/io") if line.startswith("read_bytes"))


def device_of(path):
    """"major:minor" of the disk a path is on."""
    number = os.stat(path).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def epoch(work, name):
    """Anonymous memory over an epoch of the training loader: megabytes at ten places of it."""
    data = windows(holes(work, 1))
    batches, found = iter(loader(data, 0)), []
    total = len(data) // BATCH
    for number, _ in enumerate(batches):
        if number % (total // 10) == 0:
            found.append(memory())
    return dict(epoch=dict(batches=total, first_mb=found[1], last_mb=found[-1], most_mb=max(found)))


PARTS = (scale, workers, advice, step, epoch)
