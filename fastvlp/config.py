"""What a training run is told: frozen sections, YAML recipes, and ``key=value`` changes on the command line.

    config = load("mini", ["run.name=first", "optim.lr=1e-3"])

A recipe is a YAML file with the sections of ``Config``; what it leaves out keeps the defaults below. Every length of time is counted
in steps or samples, never in seconds, so that a resumed run is the same run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fastvlp._schema import ConfigError, build, keys, unknown
from fastvlp.models import ModelConfig
from fastvlp.recipes import DEFAULT_RECIPE, recipe_path


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts.

    Attributes:
        name, dir: results go to ``dir/name``. seed: of initialisation, data order and augmentation.
        device: "auto" is CUDA where there is one, else the CPU.
        resume: "auto" continues from the run's last checkpoint if there is one, "none" starts over, a path continues from there.
        log: loggers besides log.jsonl: tensorboard, wandb.
    """

    name: str = "run"
    dir: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: str = "auto"
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise ValueError(f"name is {self.name!r}; a folder name without slashes is needed (the folder above it is run.dir)")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pairs are trained on.

    Attributes:
        train: shards: paths, globs, brace ranges {0000..0003}, or mini:train for the data set that ships.
        tokenizer: "mini", "clip", or the path of a tokenizer.json.
        batch_size: pairs per step over all processes; this defines the contrastive objective. workers: loading processes per process.
        max_captions: a sample's caption is drawn from its first so many (null: from all).
    """

    train: tuple[str, ...] = ("mini:train",)
    tokenizer: str = "mini"
    batch_size: int = 256
    workers: int = 1
    max_captions: int | None = None

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train is empty; name at least one shard, glob or mini:train")
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; a contrastive batch needs at least 2 pairs")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; 0 loads in the training process itself")
        if self.max_captions is not None and self.max_captions < 1:
            raise ValueError(f"max_captions is {self.max_captions}; it is at least 1, or null for all")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective and how it crosses processes (``fastvlp.losses``).

    Attributes:
        strategy: "gather", "ring" or "grouped"; ``fastvlp plan`` says which is the fastest and what fits.
        node_size: for "grouped": processes that share fast links; null: those of a machine.
    """

    name: Literal["clip", "siglip"] = "clip"
    strategy: Literal["gather", "ring", "grouped"] = "gather"
    node_size: int | None = None

    def __post_init__(self) -> None:
        if self.node_size is not None and (self.strategy != "grouped" or self.node_size < 1):
            raise ValueError(f"node_size is {self.node_size} and strategy is {self.strategy}; it is at least 1, and for grouped alone")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW. Norms, biases, scalars and embeddings do not decay; grad_clip bounds the norm of the whole gradient (null: no bound)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.2
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        if not (self.lr >= 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr is {self.lr}; a finite number, not negative, is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; both must be at least 0 and below 1")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(f"eps is {self.eps} and weight_decay is {self.weight_decay}; eps must be positive, weight_decay not negative")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip is {self.grad_clip}; it must be positive, or null for none")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stretch of training, up to the fraction ``until`` of all steps; the other fields are those of ``fastvlp.data.Stage``."""

    until: float = 1.0
    image_size: int = 64
    keep: float = 1.0
    augment: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until is {self.until}; a fraction of all steps, above 0 and at most 1, is needed")
        if self.image_size < 1 or not 0 < self.keep <= 1 or not 0 <= self.augment <= 4:
            raise ValueError(f"image_size is {self.image_size}, keep is {self.keep}, augment is {self.augment}; "
                             "allowed: image_size from 1, keep above 0 up to 1, augment from 0 to 4")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate and the pictures change.

    Attributes:
        steps or samples: the length of training; exactly one of the two is set. Samples are rounded up to whole batches.
        warmup: steps of linear rise; a half cosine follows, down to ``final_lr`` times the peak.
        stages: resolution and token stages in order; the last one reaches 1.0.
    """

    steps: int | None = None
    samples: int | None = None
    warmup: int = 0
    final_lr: float = 0.0
    stages: tuple[StageConfig, ...] = (StageConfig(),)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.samples is None):
            raise ValueError(f"steps is {self.steps} and samples is {self.samples}; exactly one of them is needed (the other null)")
        if min(x for x in (self.steps, self.samples) if x is not None) < 1:
            raise ValueError("steps (or samples) must be at least 1")
        if self.warmup < 0 or not 0 <= self.final_lr <= 1:
            raise ValueError(f"warmup is {self.warmup} and final_lr is {self.final_lr}; warmup counts steps, final_lr is a fraction of lr")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
            raise ValueError(f"the stages end at {ends}; rising fractions are needed, the last one 1.0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a step is computed, and what is kept.

    Attributes:
        amp: "auto" is bf16 on CUDA and none on the CPU.
        image_tokens, text_tokens: most tokens of one micro-batch of images or captions; null: the whole batch at once. The loss always
            sees the whole batch (GradCache).
        ema: decay of the averaged weights that are evaluated and exported; null: none.
        checkpoint_every: steps between checkpoints (0: only at the end). keep: how many stay.
        max_nonfinite: this many non-finite losses in a row stop the run.
        log_every: steps between lines of log.jsonl. print_every: seconds between lines on the screen when it is no terminal.
    """

    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"
    image_tokens: int | None = None
    text_tokens: int | None = None
    ema: float | None = None
    checkpoint_every: int = 200
    keep: int = 2
    max_nonfinite: int = 10
    log_every: int = 1
    print_every: float = 10.0

    def __post_init__(self) -> None:
        for name in ("image_tokens", "text_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; a number of tokens, or null for no limit, is needed")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; a decay between 0 and 1 (0.999, say), or null for none, is needed")
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; a number of steps is needed, 0 for only at the end")
        for name in ("keep", "max_nonfinite", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured at the end, and every ``every`` steps before it (0: only at the end). Without shards a measure is left out.

    Attributes:
        zero_shot: shards whose samples carry a class. classes: a file of class names (see ``fastvlp eval --help``).
        templates: sentences with {} for the class name. retrieval: shards of pairs; also the source of the contact sheet.
    """

    zero_shot: tuple[str, ...] = ()
    classes: str | None = None
    templates: tuple[str, ...] = ("{}",)
    retrieval: tuple[str, ...] = ()
    every: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.zero_shot and self.classes is None:
            raise ValueError("zero_shot is set and classes is not; name the file of class names, or set zero_shot=[]")
        if any("{}" not in template for template in self.templates) or not self.templates:
            raise ValueError(f"templates is {list(self.templates)}; each needs {{}} where the class name goes")
        if self.every < 0 or self.batch_size < 1:
            raise ValueError(f"every is {self.every} and batch_size is {self.batch_size}; every counts steps, batch_size is at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that ``fastvlp.train.train`` needs."""

    schedule: ScheduleConfig
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def steps(self) -> int:
        """Length of training in steps."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        return math.ceil((self.schedule.samples or 0) / self.data.batch_size)


def load(recipe: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a recipe with changes.

    Args:
        recipe: name of a recipe that ships, or the path of a YAML file; None is the default recipe.
        overrides: changes such as "optim.lr=1e-3" or "schedule.stages.0.keep=0.5"; values are YAML.

    Raises:
        ConfigError: for a recipe that does not exist, or a key or value that is not allowed.
    """
    path = recipe_path(recipe or DEFAULT_RECIPE)
    values = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds no sections; it needs the keys {', '.join(keys(Config))}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r} is no change; write key=value, for example optim.lr=1e-3")
        _check_key(key)
        values = _set(values, key.split("."), _yaml(text, override), key)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that nested mappings describe; the inverse of ``to_dict``."""
    config: Config = build(Config, values)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts and lists that YAML and JSON can hold."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def differences(one: Config, other: Config) -> list[str]:
    """Dotted keys whose values differ, as "key: one -> other"."""
    left, right = dict(_leaves(to_dict(one))), dict(_leaves(to_dict(other)))
    return [f"{key}: {left.get(key)} -> {right.get(key)}" for key in {**left, **right} if left.get(key) != right.get(key)]


def dump(config: Config) -> str:
    """The whole configuration as YAML."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _yaml(text: str, source: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError("recipes need PyYAML, which is not installed: pip install 'fastvlp[train]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def _set(values: Any, path: list[str], new: Any, key: str) -> Any:
    """``values`` with one nested entry changed; lists are entered by number, a list's end may be extended by one."""
    if not path:
        return new
    if isinstance(values, list):
        if not path[0].isdigit() or int(path[0]) > len(values):
            raise ConfigError(f"{key}: {path[0]} is no place in a list of {len(values)}; 0 to {len(values)} are allowed")
        index = int(path[0])
        old = values[index] if index < len(values) else {}
        return [*values[:index], _set(old, path[1:], new, key), *values[index + 1:]]
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{key}: there is a value above {path[0]}, not a section")
    values = dict(values or {})
    values[path[0]] = _set(values.get(path[0]), path[1:], new, key)
    return values


def _check_key(key: str) -> None:
    """Refuse a dotted key that leads nowhere; suggests across sections, so that ``lr`` finds ``optim.lr``."""
    known = list(_paths(Config))
    if any(key == path or key.startswith(f"{path}.") for path in known if path not in keys(Config)) or key in keys(Config):
        return
    same_name = [path for path in known if path.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        raise ConfigError(f"unknown key {key}; did you mean {' or '.join(near[:3])}?")
    section, _, rest = key.partition(".")
    fields = {field.name: field for field in dataclasses.fields(Config)}
    if rest and section in fields:
        inside = [path[len(section) + 1:] for path in known if path.startswith(f"{section}.")]
        raise ConfigError(unknown(rest, inside, section))
    raise ConfigError(unknown(section, keys(Config)))


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass, sections included."""
    hints = typing.get_type_hints(cls)
    for name in keys(cls):
        yield prefix + name
        hint = next((h for h in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(h)), None)
        if hint is not None and typing.get_origin(hints[name]) is not tuple:
            yield from _paths(typing.cast(type, hint), f"{prefix}{name}.")
