"""What a contrastive step costs on a cluster, by strategy: bytes over each link, memory, seconds.

The model replays what :mod:`fastvlp.losses` does, turn by turn: in each a block of similarities is computed while tensors travel, so that a
turn lasts as long as the slowest of the three. Bytes are those that one process sends (of all processes, the one that sends most over
the slow links); collectives count as rings, which cross each slow link once for all processes of a node. Memory is what the loss allocates
beyond its inputs, at its peak, without the operators' scratch, whose size is fixed. A step is one whose sizes are told and that is not
the first of its kind: others also compare the processes' arguments, in one collective of 2 KiB of each process. Neither contains anything
measured: tests hold both against what processes really send and allocate. Seconds are those of ideal links and products at the rates
given, and a lower bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SUMS = 4  # bytes of statistics and accumulated gradients
DOUBLE = 8  # of a sum of exponentials
PAIR = 2 * SUMS  # of a log-sum-exp: a reference, and the logarithm of a sum
MERGING = 2 * PAIR + 7 * DOUBLE + 1  # of one column while processes merge theirs, at the peak: its pair, then steps in float64, and a mask


@dataclass(frozen=True)
class Cluster:
    """Machines and links.

    Attributes:
        devices: processes in all. per_node: of them, that share fast links.
        intra, inter: GB/s that one device sends over its fast links, and over its share of the slow ones.
        tflops: 10^12 operations per second in matrix products, as reached, not as advertised. latency: microseconds of one exchange.
    """

    devices: int
    per_node: int = 8
    intra: float = 300.0
    inter: float = 40.0
    tflops: float = 400.0
    latency: float = 20.0

    def __post_init__(self) -> None:
        wrong = [f"{name}={value}" for name, value in vars(self).items() if not (value >= 0 if name == "latency" else value > 0)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: devices, per_node, intra, inter and tflops are positive, latency is not negative")
        if self.devices > self.per_node and self.devices % self.per_node:
            raise ValueError(f"{self.devices} devices are no whole number of nodes of {self.per_node}; all nodes must be alike")

    @property
    def width(self) -> int:
        """Devices of one node."""
        return min(self.devices, self.per_node)

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.devices // self.width


@dataclass(frozen=True)
class Turn:
    """What happens at the same time on one process.

    Attributes:
        operations: of matrix products. intra, inter: bytes sent. live: bytes that the loss holds.
    """

    operations: float
    intra: float
    inter: float
    live: float


@dataclass(frozen=True)
class Prediction:
    """One step of the loss on one process.

    Attributes:
        intra_bytes, inter_bytes: sent over fast and slow links. memory_bytes: beyond the features, at the peak.
        compute_seconds, communication_seconds: each by itself. seconds: with what overlaps.
    """

    strategy: str
    intra_bytes: float
    inter_bytes: float
    memory_bytes: float
    compute_seconds: float
    communication_seconds: float
    seconds: float


def predict(loss: str, batch: int, embed_dim: int, cluster: Cluster, dtype: str = "bfloat16") -> list[Prediction]:
    """The strategies of ``fastvlp.losses``, the fastest first.

    Args:
        loss: "clip" or "siglip". batch: pairs of all processes. dtype: of products, and of the features as they come.

    Example: a batch of 2^20 on 256 GPUs, ``predict("clip", 2**20, 1024, Cluster(256))``.

    Raises:
        ValueError: fewer pairs than devices, or the loss or the dtype is unknown.
    """
    if loss not in ("clip", "siglip") or dtype not in BYTES:
        raise ValueError(f"loss is {loss!r} and dtype is {dtype!r}; allowed: clip, siglip; {', '.join(BYTES)}")
    if batch < cluster.devices:
        raise ValueError(f"a batch of {batch} for {cluster.devices} devices; each needs at least one pair")
    # Sums of gradients need more range than float16 has (``SplitBatch.travels``).
    part = SUMS if dtype == "float16" else BYTES[dtype]
    model = _Loss(loss == "clip", batch, -(-batch // cluster.devices), embed_dim, BYTES[dtype], part)
    found = [_predict("gather", list(model.gather(cluster)), cluster)]
    found.append(_predict("ring", list(model.round(cluster, 1)), cluster))
    found.append(_predict("grouped", list(model.round(cluster, cluster.width)), cluster))
    return sorted(found, key=lambda prediction: prediction.seconds)


@dataclass(frozen=True)
class _Loss:
    """The softmax or the sigmoid loss of ``batch`` pairs, ``local`` of them here.

    Attributes:
        product: bytes of an element in products and as a feature travels. part: of a part of a gradient on its way.
    """

    softmax: bool
    batch: int
    local: int
    width: int
    product: int
    part: int

    @property
    def rows(self) -> int:
        """Elements of the features of one tower on one process."""
        return self.local * self.width

    def operations(self, blocks: float, products: int) -> float:
        """Of matrix products between the local images and ``blocks`` times as many texts."""
        return products * 2.0 * self.local * self.local * self.width * blocks

    def gather(self, cluster: Cluster) -> Iterator[Turn]:
        """All texts, one block, and the gradients back."""
        devices, share = cluster.devices, cluster.devices - 1
        whole, texts = self.rows * devices, self.rows * share * self.product
        cast = self.product if self.product < SUMS else 0
        if devices == 1:
            yield Turn(self.operations(1, 4 if self.softmax else 3), 0, 0, self.rows * (self.product + SUMS + cast))
            return
        yield Turn(0, *self._collective(texts, cluster), whole * self.product)
        gradients = 2 * (whole + self.rows) * SUMS + whole * (self.part + (self.part if self.part < SUMS else 0))
        if self.softmax:
            kept = self.batch * (PAIR + SUMS)  # columns, and their weights
            yield Turn(self.operations(devices, 1), 0, 0, whole * self.product + self.batch * PAIR)
            yield self._statistics(cluster, whole * self.product)
            yield Turn(self.operations(devices, 3), 0, 0, whole * (self.product + SUMS + cast) + self.rows * self.product + kept)
            gradients = whole * (2 * self.product + self.part + (self.part if self.part > self.product else 0)) + self.rows * self.product
            gradients += kept
        else:
            yield Turn(self.operations(devices, 3), 0, 0, whole * (self.product + SUMS) + self.rows * SUMS)
        inside = self.rows * (cluster.width - 1) * self.part
        between = self.rows * (devices - cluster.width) * self.part
        yield Turn(0, inside, between, gradients + self.rows * SUMS)

    def round(self, cluster: Cluster, width: int) -> Iterator[Turn]:
        """Nodes of ``width``; 1 is the plain ring, whose hops between the nodes of the cluster are as slow as the slowest."""
        if cluster.devices == 1:
            yield from self.gather(cluster)
            return
        nodes = cluster.devices // width
        tours = [self._tour(nodes, width, 1, False, False), self._tour(nodes, width, 3, True, True)]
        for number, turns in enumerate(tours if self.softmax else [self._tour(nodes, width, 3, False, True)]):
            for turn in turns:
                slow = turn.inter if cluster.nodes > 1 else 0
                live = turn.live + (self.batch * PAIR if self.softmax else 0)
                yield dataclasses.replace(turn, inter=slow, intra=turn.intra + turn.inter - slow, live=live)
            if self.softmax and number == 0:
                yield self._statistics(cluster, self.rows * self.product * (width + (width > 1)))

    def _tour(self, nodes: int, width: int, products: int, back: bool, trains: bool) -> Iterator[Turn]:
        """:func:`fastvlp.losses.across.circulate.circulate`, in units of the features of one tower on one process until the last line."""
        feature, part, total = self.product, self.part, SUMS
        # What a node gathers in one turn is computed in the next.
        lag = int(width > 1)
        home = nodes + 2 * lag
        held = (width if nodes > 1 else width - lag) * feature + lag * (nodes > 2) * feature if back else 0
        shard = before = block = reducing = carried = own = image = 0

        for turn in range(1 + lag if back else 0, home + 1):
            foreign = turn % nodes > 0
            following = (width if foreign else width - 1) * feature if lag and turn < nodes + back else 0
            hop = feature if turn + 1 < nodes else 0
            arriving = (width - 1) * part if reducing else 0
            intra = (width - 1) * feature * (following > 0) + arriving
            inter = hop + carried

            distance, visited = turn - lag, 0
            is_own = turn == (home if back else 0)
            if is_own:
                visited = 1
            elif distance < nodes + back:
                visited = width if distance % nodes else width - 1
            made = visited * total if trains else 0
            image = total if image or (visited and trains) else 0
            cast = made // total * feature if self.softmax and feature < total else 0
            of_image = (feature if self.softmax else total) if visited and trains and image else 0
            adding = (2 * total if lag and carried else total) if (reducing or carried) and turn < home else 0
            live = held + block + following + hop + shard + before + reducing + arriving + 2 * carried + own + made + image
            live += max(of_image + cast, adding + (visited * part if lag and part < total else 0))
            yield Turn(self.operations(visited, products), intra * self.rows, inter * self.rows, live * self.rows)

            settled = turn - 2 * lag
            carried = total if trains and 1 <= settled < nodes else 0
            own = total if own or (is_own and trains) else 0
            reducing = visited * part if lag and trains and not is_own else 0
            if hop:
                before, shard = (shard, feature) if lag else (0, 0)
            if lag:
                block = following or block
            elif hop:
                block = feature

    def _statistics(self, cluster: Cluster, kept: float) -> Turn:
        """Over all processes, of every column the maximum of references, and the sum of exponentials in float64."""
        share = 2 * (cluster.devices - 1) / cluster.devices
        return Turn(0, *self._collective(share * self.batch * (SUMS + DOUBLE), cluster), kept + self.batch * MERGING)

    @staticmethod
    def _collective(sent: float, cluster: Cluster) -> tuple[float, float]:
        """Bytes over fast and slow links of a ring through all processes, in which one of each node sends to the next one."""
        slow = sent / cluster.width if cluster.nodes > 1 else 0.0
        return sent - slow, slow


def _predict(strategy: str, turns: list[Turn], cluster: Cluster) -> Prediction:
    compute = [turn.operations / (cluster.tflops * 1e12) for turn in turns]
    travel = [max(turn.intra / cluster.intra, turn.inter / cluster.inter) / 1e9 for turn in turns]
    travel = [seconds + cluster.latency / 1e6 * (seconds > 0) for seconds in travel]
    return Prediction(strategy, sum(turn.intra for turn in turns), sum(turn.inter for turn in turns), max(turn.live for turn in turns),
                      sum(compute), sum(travel), sum(map(max, compute, travel)))


def table(found: list[Prediction]) -> list[str]:
    """The predictions as lines of text, and which one wins."""
    lines = [f"{'strategy':<10}{'fast links':>14}{'slow links':>14}{'memory':>14}{'compute':>12}{'travel':>12}{'together':>12}"]
    for one in found:
        sizes = (one.intra_bytes, one.inter_bytes, one.memory_bytes)
        seconds = (one.compute_seconds, one.communication_seconds, one.seconds)
        lines.append(f"{one.strategy:<10}" + "".join(f"{value / 2**20:>10.1f} MiB" for value in sizes)
                     + "".join(f"{1e3 * value:>9.2f} ms" for value in seconds))
    return [*lines, f"fastest: {found[0].strategy}; least memory: {min(found, key=lambda one: one.memory_bytes).strategy}"]
