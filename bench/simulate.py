"""A cluster on paper: what the index and eviction cost at 10 to 10,000 hosts.

Model. Memory is objects (a model, a table, an index): some pages that are the same wherever the
object is loaded, in runs as they are found in real memory, between pages of the process's own.
How popular objects are follows Zipf's law; a host draws what it runs by popularity, without
drawing one twice. A host rewrites a share of its pages every second, which gives each a new
fingerprint that nobody else has, and swaps an object for another now and then.

- The index holds, for each host, the fingerprints with the low k bits zero of all of its pages.
  Bytes an entry and fingerprints a second that one index process takes in are what `bench.index`
  measures (docs/performance.md).
- A lookup finds a run when at least one of its pages is published: its neighbours are compared
  with the holder's. So sampling costs hits on short runs only.
- A clone takes an object to a host that was drawn by chance, or to one that holds it already, if
  there is one besides the source; pages that the destination lacks are moved.
- A host evicts cold pages of which `min_holders` other hosts keep a copy; a page's holders must
  keep theirs then, so of n hosts that hold it n - min_holders can let go.

Every figure is a mean over draws from one seed: `python -m bench.simulate --seed N` repeats it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

PAGE = 4096
ENTRY_BYTES = 11.5
INDEX_FINGERPRINTS_A_SECOND = 300_000
RUNS_FILE = Path(__file__).parent / "runs.json"
HOSTS = (10, 100, 1_000, 10_000)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """What runs on the cluster.

    Attributes:
        host_gib: memory in arenas, each host.
        objects: different ones there are.
        object_mib: mean size; sizes are spread over two orders of magnitude.
        zipf: exponent of their popularity.
        own: share of a host's pages that nobody else has.
        rewritten: share of a host's pages that get new bytes, a second.
        cold: share of pages that nobody touches for long.
    """

    host_gib: float = 64.0
    objects: int = 5_000
    object_mib: float = 1024.0
    zipf: float = 0.9
    own: float = 0.3
    rewritten: float = 1e-5
    cold: float = 0.5


@dataclass(frozen=True)
class Point:
    """One size of the cluster, one sampling.

    Attributes:
        published_per_second: fingerprints a second that all hosts stream, at rest.
        indexes: processes of the index that this keeps busy.
        fill_minutes: until one process of the index has taken in a whole cluster that starts anew.
        found: share of the pages that others hold which a lookup finds.
        moved_random, moved_placed: share of an object's bytes that a clone moves, to any host and
            to the one that holds most of it.
        evicted: share of a host's pages that can leave it with nothing sent.
    """

    hosts: int
    sampling_bits: int
    entries: int
    index_gib: float
    published_per_second: float
    indexes: float
    fill_minutes: float
    found: float
    moved_random: float
    moved_placed: float
    evicted: float


class Runs:
    """The lengths of runs of equal pages, as they were found in real memory.

    Args:
        pages: by the shortest length of a class (a power of two), the pages that are in runs of
            that class, as `samepage scan --json` tells of real memory under "runs".
    """

    def __init__(self, pages: dict[int, int]) -> None:
        lengths = np.array(sorted(pages), np.int64)
        self._lengths = lengths * 3 // 2 + (lengths == 1)  # the middle of the class
        self._lengths[lengths == 1] = 1
        weights = np.array([pages[length] for length in lengths.tolist()], np.float64)
        self._weights = weights / weights.sum()

    def found(self, sampling_bits: int) -> float:
        """The share of pages whose run has at least one published page."""
        missed = (1 - 2.0**-sampling_bits) ** self._lengths if sampling_bits else 0.0
        return float((self._weights * (1 - missed)).sum())

    def sampled(self, random: np.random.Generator, sampling_bits: int, runs: int) -> float:
        """The same by drawing runs and fingerprints, to check the formula."""
        by_run = self._weights / self._lengths
        lengths = random.choice(self._lengths, runs, p=by_run / by_run.sum())
        published = random.binomial(lengths, 2.0**-sampling_bits)
        return float(lengths[published > 0].sum() / lengths.sum())


def read_runs(file: Path) -> Runs:
    """The distribution in a JSON file: {"shortest length": pages, ...}.

    Raises:
        ValueError: it holds something else.
    """
    pages = {int(length): int(count) for length, count in json.loads(file.read_text()).items()}
    if not pages or min(pages) < 1 or min(pages.values()) < 0 or not any(pages.values()):
        raise ValueError(f"{file} holds no pages by length of run")
    return Runs(pages)


class Cluster:
    """Who holds what: (host, object) pairs.

    Args:
        hosts: how many.
        random: where chance comes from.
    """

    def __init__(self, workload: Workload, hosts: int, random: np.random.Generator) -> None:
        self.hosts = hosts
        sigma = 1.5
        mean = workload.object_mib * (1 << 20) / PAGE
        sizes = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, workload.objects)
        self.object_pages: Ints = np.maximum(sizes, 1).astype(np.int64)
        ranks = np.arange(1, workload.objects + 1)
        popularity = ranks**-workload.zipf
        self._popularity: Floats = popularity / popularity.sum()
        room = workload.host_gib * (1 << 30) / PAGE * (1 - workload.own)
        held = [self._draw(random, room) for _ in range(hosts)]
        self.host_of: Ints = np.repeat(np.arange(hosts), [len(each) for each in held])
        self.object_of: Ints = np.concatenate(held)
        self.holders: Ints = np.bincount(self.object_of, minlength=workload.objects)
        shared = np.bincount(self.host_of, self.object_pages[self.object_of], hosts)
        self.host_pages: Floats = shared / (1 - workload.own)

    def _draw(self, random: np.random.Generator, room: float) -> Ints:
        """Objects for a host, by popularity, until the next would not fit any more."""
        keys = random.exponential(size=self._popularity.size) / self._popularity
        order = np.argsort(keys)
        return order[: np.searchsorted(np.cumsum(self.object_pages[order]), room)]

    def clones(self, random: np.random.Generator, count: int) -> Ints:
        """(host, object) pairs to be cloned: numbers of pairs."""
        return random.integers(0, self.object_of.size, count)


def moved(cluster: Cluster, pairs: Ints, random: np.random.Generator) -> tuple[float, float]:
    """What clones of these objects move, as a share of their bytes: to any, to the best host."""
    objects = cluster.object_of[pairs]
    pages = cluster.object_pages[objects].astype(np.float64)
    destinations = random.integers(0, cluster.hosts, pairs.size)
    known = set(zip(cluster.host_of.tolist(), cluster.object_of.tolist(), strict=True))
    has = np.fromiter(
        (pair in known for pair in zip(destinations.tolist(), objects.tolist(), strict=True)),
        np.bool_,
        pairs.size,
    )
    alone = cluster.holders[objects] <= 1  # nobody but the source: any place is as good
    total = pages.sum()
    return float(pages[~has].sum() / total), float(pages[alone].sum() / total)


def evictable(cluster: Cluster, workload: Workload, min_holders: int) -> float:
    """The share of all pages that can leave their hosts while others keep them."""
    copies = np.maximum(cluster.holders - min_holders, 0)
    gone = float((copies * cluster.object_pages).sum()) * workload.cold
    return gone / float(cluster.host_pages.sum())


def simulate(
    workload: Workload,
    runs: Runs,
    hosts: Iterable[int],
    sampling_bits: Iterable[int],
    min_holders: int,
    seed: int,
) -> Iterator[Point]:
    """Every size of the cluster with every sampling."""
    bits = list(sampling_bits)
    for count in hosts:
        random = np.random.default_rng([seed, count])
        cluster = Cluster(workload, count, random)
        pairs = cluster.clones(random, 20_000)
        anywhere, placed = moved(cluster, pairs, random)
        evicted = evictable(cluster, workload, min_holders)
        pages = float(cluster.host_pages.sum())
        for k in bits:
            entries = pages / 2**k
            # a page that is rewritten is one fingerprint gone, and one new
            published = 2 * pages * workload.rewritten / 2**k
            yield Point(
                hosts=count,
                sampling_bits=k,
                entries=round(entries),
                index_gib=entries * ENTRY_BYTES / (1 << 30),
                published_per_second=published,
                indexes=published / INDEX_FINGERPRINTS_A_SECOND,
                fill_minutes=entries / INDEX_FINGERPRINTS_A_SECOND / 60,
                found=runs.found(k),
                moved_random=anywhere,
                moved_placed=placed,
                evicted=evicted,
            )


def table(points: Iterable[Point]) -> Table:
    """The points for people."""
    made = Table(
        "hosts", "k", "entries", "index", "published/s", "indexes", "fill", "found",
        "clone moves, any host", "best host", "evictable",
    )  # fmt: skip
    for p in points:
        made.add_row(
            f"{p.hosts:,}",
            str(p.sampling_bits),
            f"{p.entries / 1e6:,.1f} M",
            f"{p.index_gib:,.2f} GiB",
            f"{p.published_per_second:,.0f}",
            f"{p.indexes:.2f}",
            f"{p.fill_minutes:,.1f} min",
            f"{p.found:.1%}",
            f"{p.moved_random:.1%}",
            f"{p.moved_placed:.1%}",
            f"{p.evicted:.1%}",
        )
    return made


def main(
    hosts: Annotated[
        list[int] | None, typer.Option(min=2, help="Hosts of the cluster. Repeatable.")
    ] = None,
    sampling_bits: Annotated[
        list[int] | None, typer.Option(min=0, max=20, help="Low bits that are 0. Repeatable.")
    ] = None,
    runs: Annotated[
        Path, typer.Option(help="JSON: pages by shortest length of run.", exists=True)
    ] = RUNS_FILE,
    host_gib: Annotated[float, typer.Option(min=0.1, help="Memory in arenas, each host.")] = 64.0,
    min_holders: Annotated[int, typer.Option(min=1, help="Hosts that keep a page.")] = 2,
    seed: Annotated[int, typer.Option(help="Of everything that chance decides.")] = 1,
) -> None:
    """Print a JSON line for each size and sampling, and a table beside it."""
    try:
        lengths = read_runs(runs)
    except (ValueError, AttributeError) as error:
        sys.exit(f"--runs: {error}")
    points = []
    workload = Workload(host_gib=host_gib)
    for point in simulate(
        workload, lengths, hosts or HOSTS, sampling_bits or (0, 4, 6), min_holders, seed
    ):
        print(json.dumps(asdict(point)), flush=True)
        points.append(point)
    Console(stderr=True, width=160).print(table(points))


if __name__ == "__main__":
    typer.run(main)
