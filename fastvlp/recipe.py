"""What a training run is told: the system, its data, and how it is trained. Recipes in ``fastvlp.systems`` return one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import fiddle as fdl

from fastvlp.data.batch import Stage
from fastvlp.data.stream import Source

LENGTHS = ("steps", "samples", "epochs")
NO_DATA = ("SHARDS",)  # what stands where a recipe leaves its data to name


@dataclass(frozen=True)
class Run:
    """Where a run lives and how it starts.

    Attributes:
        name, dir: results go to ``dir/name``. seed: of initialisation, data order and augmentation.
        device: "auto" is CUDA where there is one, else the CPU.
        resume: "auto" continues from the run's last checkpoint if there is one, "none" starts over, a path continues from there.
        start: a run or model folder whose weights are taken, as far as they fit, before the first step; nothing else of it is. Or folders
            by part of the system: {image: runs/clip, lm: runs/simvlm}.
        log: loggers besides log.jsonl: tensorboard, wandb.
        timeout: seconds that a process may keep the others waiting before all of them stop.
    """

    name: str = "run"
    dir: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: str = "auto"
    start: str | dict[str, str] | None = None
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"name is {self.name!r}; a folder name without slashes is needed (the folder above it is run.dir)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it lies between 0 and 2**63 - 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it is a number of seconds, above 0")


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        train: shards or tables or folders (see ``fastvlp.data.expand``; mini:train is the data set that ships), or sources with weights.
        fields: the streams of a batch by name (``fastvlp.data.fields``).
        tokenizer: "mini", "clip", or the path of a tokenizer.json.
        batch_size: samples of a step over all processes; this defines a contrastive objective.
        workers: loading processes per process. max_bad: the share of unusable samples that stops the run. shuffle: window in samples.
    """

    train: tuple[str, ...] | tuple[Source, ...] = ("mini:train",)
    fields: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "mini"
    batch_size: int = 256
    workers: int = 1
    max_bad: float = 0.01
    shuffle: int = 1 << 15

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; name at least one shard, glob or mini:train")
        if len({isinstance(one, Source) for one in self.train}) > 1:
            raise ValueError("train mixes shards and sources; give each shard list a Source of its own")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it is at least 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; 0 loads in the training process itself")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is {self.max_bad}; it is a share between 0 and 1")
        if self.shuffle < 1:
            raise ValueError(f"shuffle is {self.shuffle}; it is at least 1 sample")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources; a plain list of shards is one."""
        if isinstance(self.train[0], Source):
            return self.train
        return (Source(self.train),)


@dataclass(frozen=True)
class Optim:
    """AdamW. Norms, biases, scalars and embeddings do not decay; grad_clip bounds the norm of the whole gradient (null: no bound).

    Attributes:
        scales: factors of the learning rate by the beginning of a parameter's name ({"image": 0.1}); the longest that fits counts.
        layer_decay: each block of a tower trains this much slower than the one above it (null: all alike).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.2
    grad_clip: float | None = None
    scales: dict[str, float] = field(default_factory=dict)
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr is {self.lr}; a finite number, not negative, is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; both must be at least 0 and below 1")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(f"eps is {self.eps} and weight_decay is {self.weight_decay}; eps must be positive, weight_decay not negative")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; it must be positive, or null for none")
        if any(not (scale >= 0 and math.isfinite(scale)) for scale in self.scales.values()):
            raise ValueError(f"scales is {self.scales}; factors are finite and not negative")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it lies above 0 and at most at 1")


@dataclass(frozen=True)
class Schedule:
    """How long, and how the learning rate and the data change.

    Attributes:
        steps, samples or epochs: the length of training; exactly one of them is set. Samples are rounded up to whole batches; an epoch
            is as many samples as all sources with a weight hold, counted before the first step.
        shape: after ``warmup`` steps of linear rise: "cosine" falls by half a cosine to ``final_lr`` times the peak; "wsd" stays at the
            peak and falls linearly over the last ``cooldown`` of all steps (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395);
            "infinite" falls by a cosine to ``constant_lr`` times the peak over the first quarter, stays, and falls as wsd does (Ibrahim et
            al. 2024, arXiv:2403.08763): training can go on from before its end.
        rewarm: steps of linear rise at the start of every stage but the first.
        stages: stretches of training in order; the last one reaches 1.0.
    """

    steps: int | None = None
    samples: int | None = None
    epochs: float | None = None
    shape: Literal["cosine", "wsd", "infinite"] = "cosine"
    warmup: int = 0
    final_lr: float = 0.0
    cooldown: float = 0.2
    constant_lr: float = 0.3
    rewarm: int = 0
    stages: tuple[Stage, ...] = (Stage(),)

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in LENGTHS if getattr(self, name) is not None}
        if len(lengths) != 1:
            given = " and ".join(f"{name}={value}" for name, value in lengths.items()) or "no length"
            raise ValueError(f"{given} is given; exactly one of {', '.join(LENGTHS)} is needed (the others null)")
        (name, value), = lengths.items()
        if not (value >= 1 if name != "epochs" else 0 < value < math.inf):
            raise ValueError(f"{name} is {value}; it is {'above 0' if name == 'epochs' else 'at least 1'}")
        if min(self.warmup, self.rewarm) < 0 or not 0 <= self.final_lr <= 1:
            raise ValueError(f"warmup is {self.warmup}, rewarm is {self.rewarm}, final_lr is {self.final_lr}; the first two count steps, "
                             "final_lr is a fraction of lr")
        if not 0 < self.cooldown <= 1 or not 0 <= self.constant_lr <= 1:
            raise ValueError(f"cooldown is {self.cooldown} and constant_lr is {self.constant_lr}; fractions of all steps and of lr are "
                             "needed")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"the stages end at {ends}; rising fractions are needed, the last one 1.0")


@dataclass(frozen=True)
class Train:
    """How a step is computed, and what is kept.

    Attributes:
        amp: precision of products: "auto" is bf16 on CUDA and none on the CPU.
        tokens: most tokens of one micro-batch by stream ({"image": 65536}); none: the whole batch at once. A loss that compares samples
            always sees the whole batch (GradCache).
        shard: over how many processes parameters, gradients and optimizer are sharded: 1 (every process holds all of them), a divisor of
            the number of processes (shards inside groups of so many, replicas across), or "world".
        compile: each block by torch.compile (true), or by a backend of it (aot_eager needs no C++ compiler).
        checkpointing: "blocks" recomputes each block in its backward, "selective" keeps the results of products and attention.
        offload: parameters and optimizer live in the memory of the CPU (sharded runs).
        ema: decay of the averaged weights that are evaluated and exported; null: none.
        episode: every so many steps the system's ``before_episode`` sees features of the training set; null: never.
        checkpoint_every: steps between checkpoints (0: only at the end). keep: how many stay. asynchronous: written while training goes on.
        max_nonfinite: this many non-finite losses or gradients in a row stop the run.
        log_every: steps between lines of log.jsonl. print_every: seconds between lines on the screen when it is no terminal.
    """

    amp: Literal["auto", "none", "off", "bf16", "fp16"] = "auto"
    tokens: dict[str, int] = field(default_factory=dict)
    shard: int | Literal["world"] = 1
    compile: bool | str = False
    checkpointing: Literal["blocks", "selective"] | None = None
    offload: bool = False
    ema: float | None = None
    episode: int | None = None
    checkpoint_every: int = 200
    keep: int = 2
    asynchronous: bool = False
    max_nonfinite: int = 10
    log_every: int = 1
    print_every: float = 10.0

    def __post_init__(self) -> None:
        if any(budget < 1 for budget in self.tokens.values()):
            raise ValueError(f"tokens is {self.tokens}; budgets are numbers of tokens, at least 1")
        if self.shard != "world" and self.shard < 1:
            raise ValueError(f"shard is {self.shard}; it is a number of processes, at least 1, or world")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; a decay between 0 and 1 (0.999, say), or null for none, is needed")
        if self.episode is not None and self.episode < 1:
            raise ValueError(f"episode is {self.episode}; it is a number of steps, or null for never")
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; a number of steps is needed, 0 for only at the end")
        if not self.print_every >= 0:
            raise ValueError(f"print_every is {self.print_every}; seconds between lines are needed, 0 for a line a step")
        for name in ("keep", "max_nonfinite", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Eval:
    """What is measured at the end, and every ``every`` steps before it (0: only at the end). Without shards a measure is left out.

    Attributes:
        zero_shot: shards whose samples carry a class. classes: a file of class names (see ``fastvlp eval --help``).
        templates: sentences with {} for the class name. retrieval: shards of pairs; also the source of the contact sheet.
        captions: shards of pairs, whose captions' bits per token are measured. pairs: shards of pairs, told from mismatched ones.
        knn, probe: shards with classes; features of ``probe_train`` are what neighbours are searched among, and what is fitted.
        batch_size: samples encoded at a time. workers: loading processes per process.
    """

    zero_shot: tuple[str, ...] = ()
    classes: str | None = None
    templates: tuple[str, ...] = ("{}",)
    retrieval: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    knn: tuple[str, ...] = ()
    probe: tuple[str, ...] = ()
    probe_train: tuple[str, ...] = ()
    every: int = 0
    batch_size: int = 256
    workers: int = 1

    def __post_init__(self) -> None:
        if self.zero_shot and self.classes is None:
            raise ValueError("zero_shot is set and classes is not; name the file of class names, or set zero_shot=[]")
        if any("{}" not in template for template in self.templates) or not self.templates:
            raise ValueError(f"templates is {list(self.templates)}; each needs {{}} where the class name goes")
        if (self.knn or self.probe) and not self.probe_train:
            raise ValueError("knn or probe is set and probe_train is not; name the shards that neighbours or the probe come from")
        if self.every < 0 or self.batch_size < 1 or self.workers < 0:
            raise ValueError(f"every is {self.every}, batch_size is {self.batch_size} and workers is {self.workers}; every counts steps, "
                             "batch_size is at least 1, workers is not negative")


@dataclass(frozen=True)
class Recipe:
    """A run that can be started: ``model`` is a constructor call that is not made yet (``fdl.Config``), the rest is settings."""

    model: Any
    schedule: Schedule
    data: Data = Data()
    run: Run = Run()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()

    def __post_init__(self) -> None:
        if not isinstance(self.model, fdl.Buildable):
            name = self.model.__name__ if isinstance(self.model, type) else type(self.model).__name__
            raise ValueError(f"model is a {name}; write the call that makes it, which is not made yet: fdl.Config({name}, ...)")
        for name, kind in (("schedule", Schedule), ("data", Data), ("run", Run), ("optim", Optim), ("train", Train), ("eval", Eval)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} is a {type(getattr(self, name)).__name__}; fastvlp.recipe.{kind.__name__}(...) is needed")

    @property
    def steps(self) -> int:
        """Length of training in steps. Raises ValueError: it is given in epochs, and nobody has counted the samples yet."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        if self.schedule.epochs is not None:
            raise ValueError(f"schedule.epochs is {self.schedule.epochs:g}, of data not yet counted; give samples or steps")
        # Rounded up, so that none of the samples that were asked for is left out.
        return math.ceil((self.schedule.samples or 0) / self.data.batch_size)
