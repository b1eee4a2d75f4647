"""How a stream is learned: a typed configuration whose parts are switched on alone or together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

ReplayKind = Literal["fifo", "reservoir", "balanced"]
PenaltyKind = Literal["ewc", "mas"]
GateInput = Literal["input", "task", "domain"]
ClassBalance = Literal["none", "weights", "sampling"]
Optimizer = Literal["adamw", "sgd"]
Precision = Literal["float32", "bfloat16"]


def _require(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def _require_from(name: str, value: float, least: float, most: float = float("inf")) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name}={value!r}: must be from {least:g} to {most:g}")


@dataclass(frozen=True)
class Replay:
    """Inputs of earlier tasks are kept and learned again.

    The `size` inputs kept are the last ones ("fifo"), a uniform sample of all (reservoir sampling, Vitter 1985), or as
    many of each class ("balanced", greedy, Prabhu et al. 2020). Each step learns `batch_size` of them, whose
    cross-entropy counts `weight`. With `logits` > 0 the network's logits are kept as well and matched on a second
    draw (DER++, Buzzega et al. 2020; DER with a `weight` of 0). With `only` nothing else is learned: after each task
    a new network is trained on what is kept (GDumb, Prabhu et al. 2020), in as many steps as all tasks had so far;
    without a `size` that is joint training, the bound.

    Inputs are offered in the first epoch of a task, or with `late` in the last one, when kept logits are those of a
    network that has learned them. A control may set `keep` to False: then a task offers none. With `confident` > 0 only
    inputs are offered, late, whose label the network gives at least this probability among the task's classes: wrong
    labels are learned last (Arpit et al. 2017).
    """

    kind: ReplayKind = "reservoir"
    size: int | None = 200
    batch_size: int = 32
    weight: float = 1.0
    logits: float = 0.0
    only: bool = False
    late: bool = False
    keep: bool = True
    confident: float = 0.0

    def __post_init__(self) -> None:
        _require("kind", self.kind, get_args(ReplayKind))
        _require_from("confident", self.confident, 0, 1)
        if (self.confident or self.late) and self.only:
            raise ValueError("late and confident need a network that learns the inputs, which only=True does not have")
        if self.size is not None:
            _require_from("size", self.size, 1)
        _require_from("batch_size", self.batch_size, 1)
        _require_from("weight", self.weight, 0)
        _require_from("logits", self.logits, 0)
        if self.only and self.logits:
            raise ValueError("logits are those of a network that learns the inputs, which only=True does not have")
        if not (self.weight or self.logits or self.only):
            raise ValueError("weight=0 and logits=0 replay nothing")
        if self.size is None and not self.only:
            raise ValueError("size=None keeps all inputs, which only a joint training does: set only=True")


@dataclass(frozen=True)
class Penalty:
    """Weights of trunk, gate and head that mattered are held by a quadratic penalty of `weight`.

    The importance of a weight is the Fisher information ("ewc", Kirkpatrick et al. 2017) or the sensitivity of the
    squared logits ("mas", Aljundi et al. 2018), diagonal, of `samples` inputs a task, summed over tasks.
    """

    kind: PenaltyKind = "ewc"
    weight: float = 100.0
    samples: int = 128

    def __post_init__(self) -> None:
        _require("kind", self.kind, get_args(PenaltyKind))
        _require_from("weight", self.weight, 0)
        _require_from("samples", self.samples, 1)


@dataclass(frozen=True)
class Expansion:
    """A task adds an expert, up to `budget` experts, if no earlier task is similar: if the cosine between the mean
    trunk features of both is below `similarity`. Otherwise the experts of the most similar task are used again, and
    are not slowed down by `freezing`. With `merge` the two experts that are most alike become one where the budget is
    reached."""

    budget: int = 8
    similarity: float = 0.9
    merge: bool = False

    def __post_init__(self) -> None:
        _require_from("budget", self.budget, 1)
        _require_from("similarity", self.similarity, -1, 1)


@dataclass(frozen=True)
class Strategy:
    """`distillation` weights the distance from the logits of the network before the task, on its inputs (Li & Hoiem
    2016). `freezing` multiplies the learning rate of experts that earlier tasks use. `gate` adds to the gate's logits a
    learned vector of the task ("task", known at test in that scenario only) or of the tasks with similar features
    ("domain"). `asymmetric` lets the cross-entropy of new inputs compare the task's own classes only (ER-ACE, Caccia et
    al. 2022), but for domains. With `all_classes` the head has the classes of all tasks from the start, as DER assumes:
    logits of classes to come are kept and matched, too. `balance` weights the classes of new inputs ("weights") or
    draws the replay evenly from classes ("sampling").

    Inputs: images are shrunk to `side` pixels and stored with `bits` a pixel, in the replay and everywhere else, so
    that more fit the same bytes; `shift` moves training images by up to so many pixels. A task is `epochs` of batches
    of `batch_size`, by AdamW or SGD with momentum 0.9, with a rate that falls to 0 within each task.
    """

    replay: Replay | None = None
    regularizer: Penalty | None = None
    expansion: Expansion | None = None
    distillation: float = 0.0
    freezing: float = 1.0
    gate: GateInput = "input"
    asymmetric: bool = False
    all_classes: bool = False
    balance: ClassBalance = "none"
    side: int | None = None
    bits: Literal[1, 2, 4, 8] = 8
    shift: int = 0
    epochs: int = 3
    batch_size: int = 32
    optimizer: Optimizer = "adamw"
    learning_rate: float = 2e-3
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            _require(name, getattr(self, name), get_args(known))
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits={self.bits!r} is not 1, 2, 4 or 8")
        _require_from("distillation", self.distillation, 0)
        _require_from("freezing", self.freezing, 0, 1)
        _require_from("shift", self.shift, 0)
        _require_from("epochs", self.epochs, 1)
        _require_from("batch_size", self.batch_size, 2)
        _require_from("learning_rate", self.learning_rate, 0)
        if self.side is not None:
            _require_from("side", self.side, 4)
        if self.balance == "sampling" and self.replay is None:
            raise ValueError("balance='sampling' draws from the replay: set replay")
        if self.replay is not None and self.replay.only:
            plain = Strategy()
            if idle := [name for name in _IDLE if getattr(self, name) != getattr(plain, name)]:
                raise ValueError(f"replay.only=True learns from the replay alone, without {', '.join(idle)}")
            if self.balance == "weights":
                raise ValueError("balance='weights' is for new inputs, of which replay.only=True learns none")


_IDLE = "regularizer", "expansion", "distillation", "freezing", "gate", "asymmetric"
_CHOICES = {"gate": GateInput, "balance": ClassBalance, "optimizer": Optimizer, "precision": Precision}


@dataclass(frozen=True)
class NetworkShape:
    """Of a `ContinualNetwork`: two strided convolutions in front ("conv", for images), a linear layer ("linear"), or
    the one that fits the inputs ("auto"); then a layer of experts of `d_ff` hidden units over `d_model` features.

    The router is one that looks at each input alone: "topk", "top-p" or "sampled" of `experts.routers`."""

    trunk: Literal["auto", "conv", "linear"] = "auto"
    d_model: int = 64
    d_ff: int = 32
    num_experts: int = 4
    k: int = 2
    router: str = "topk"
    graph: str | None = None
    channels: tuple[int, int] = field(default=(16, 32))

    def __post_init__(self) -> None:
        _require("trunk", self.trunk, ("auto", "conv", "linear"))
        _require("router", self.router, ("topk", "top-p", "sampled"))
        for name in ("d_model", "d_ff", "num_experts", "k"):
            _require_from(name, getattr(self, name), 1)
        if self.k > self.num_experts:
            raise ValueError(f"k={self.k}: must be at most num_experts={self.num_experts}")
