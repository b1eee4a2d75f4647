"""The ways of learning task after task that are compared, and what is tuned of each.

A step of methods with a replay learns 96 inputs: 32 new and 64 old ones (32 of these for their logits in DER), or 96
where nothing is new; without a replay, and in the first task, it learns the 32 new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from experts.continual import ClosedForm, Expansion, Penalty, Replay, Strategy

CLASSES = 10  # of the streams on which small images are compared
SMALL_SIDE = 14
SMALL_BITS: Literal[4] = 4
ROW, SMALL_ROW = 28 * 28 + 4, SMALL_SIDE**2 * SMALL_BITS // 8 + 4  # bytes of an image with its label and task
SMALL_LOGITS_ROW = SMALL_ROW + 4 * CLASSES
SMALL_NETWORK = 354_000  # bytes of the network for small images and four added experts
PER_TASK = 32  # raw images in the bytes of an added expert
BUFFERS = (50, 200, 500, 2000)
ONE = (200,)
NONE = 0  # buffer of methods without one
Learned = Strategy | ClosedForm


@dataclass(frozen=True)
class Method:
    """`of(buffer)` makes a strategy; `weights` are values to try, `weighted` sets one. `per_task` raw images more are
    kept for each task after the first. `of_task`: needs the task."""

    of: Callable[[int], Learned]
    weights: tuple[float, ...] = ()
    weighted: Callable[[Any, float], Learned] = lambda learned, weight: learned
    buffers: tuple[int, ...] = BUFFERS
    per_task: int = 0
    of_task: bool = False

    @property
    def buffered(self) -> bool:
        """Whether it keeps images, or is as large as those that do."""
        return self.buffers != (NONE,)


GROWING = Expansion(8, similarity=1.0)
EWC, MAS = Penalty("ewc", 10.0), Penalty("mas", 1.0)
SHRINKAGES = (1e-5, 1e-4, 1e-3, 1e-1)  # beside 1e-2


def _er(kind: Literal["fifo", "reservoir", "balanced"] = "reservoir", **more: Any) -> Callable[[int], Strategy]:
    return lambda buffer: Strategy(replay=Replay(kind, buffer, 64), **more)


def _der(kind: Literal["reservoir", "balanced"] = "reservoir", **more: Any) -> Callable[[int], Strategy]:
    weight = more.pop("weight", 1.0)
    return lambda buffer: Strategy(
        replay=Replay(kind, buffer, 32, weight=weight, logits=0.3, late=True), all_classes=True, **more
    )


def _gdumb(buffer: int | None) -> Strategy:
    return Strategy(replay=Replay("balanced", buffer, 96, only=True))


def _small(made: Callable[[int], Strategy], row: int = SMALL_ROW) -> Callable[[int], Strategy]:
    return lambda buffer: replace(made(buffer * ROW // row), side=SMALL_SIDE, bits=SMALL_BITS)


def _small_form(kind: Literal["slda", "ridge"]) -> Callable[[int], ClosedForm]:
    """On as many random features as fit the bytes of a network and a buffer."""
    return lambda buffer: ClosedForm(
        kind, "random", int(((SMALL_NETWORK + ROW * buffer) / 2) ** 0.5) - CLASSES, side=SMALL_SIDE, bits=SMALL_BITS
    )


def _set_penalty(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.regularizer is not None
    return replace(strategy, regularizer=replace(strategy.regularizer, weight=weight))


def _set_logits(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.replay is not None
    return replace(strategy, replay=replace(strategy.replay, logits=weight))


def _set_distillation(strategy: Strategy, weight: float) -> Strategy:
    return replace(strategy, distillation=weight)


def _set_freezing(strategy: Strategy, weight: float) -> Strategy:
    return replace(strategy, freezing=weight)


def _set_similarity(strategy: Strategy, weight: float) -> Strategy:
    assert strategy.expansion is not None
    return replace(strategy, expansion=replace(strategy.expansion, similarity=weight))


def _set_shrinkage(form: ClosedForm, weight: float) -> ClosedForm:
    return replace(form, shrinkage=weight)


def _closed(
    kind: Literal["slda", "ridge"], features: Literal["pixels", "random", "trunk"], size: int = 64, small: bool = False
) -> Method:
    form = ClosedForm(kind, features, size)
    if small:
        form = replace(form, side=SMALL_SIDE, bits=SMALL_BITS)
    return Method(lambda buffer: form, SHRINKAGES, _set_shrinkage, (NONE,))


def _expanding(expansion: Expansion = GROWING, **more: Any) -> Callable[[int], Strategy]:
    return _er(expansion=expansion, freezing=0.1, **more)


METHODS: dict[str, Method] = {
    "no replay": Method(lambda buffer: Strategy(), buffers=(NONE,)),
    "EWC": Method(lambda buffer: Strategy(regularizer=EWC), (100.0,), _set_penalty, (NONE,)),
    "MAS": Method(lambda buffer: Strategy(regularizer=MAS), (10.0,), _set_penalty, (NONE,)),
    "distillation": Method(lambda buffer: Strategy(distillation=1.0), (3.0,), _set_distillation, (NONE,)),
    "expansion": Method(lambda buffer: Strategy(expansion=GROWING, freezing=0.1), (0.0,), _set_freezing, (NONE,)),
    "ER": Method(_er()),
    "ER, bytes of the experts": Method(_er(), per_task=PER_TASK, buffers=ONE),
    "ER, FIFO": Method(_er("fifo"), buffers=ONE),
    "ER, balanced": Method(_er("balanced")),
    "ER, even draws": Method(_er(balance="sampling"), buffers=ONE),
    "ER, class weights": Method(_er(balance="weights"), buffers=ONE),
    "ER, bfloat16": Method(_er(precision="bfloat16"), buffers=ONE),
    "ER + EWC": Method(_er(regularizer=EWC), (1.0, 100.0), _set_penalty),
    "ER + MAS": Method(_er(regularizer=MAS), (0.1, 10.0), _set_penalty),
    "ER + distillation": Method(_er(distillation=0.3), (0.1, 1.0), _set_distillation),
    "ER + freezing": Method(_er(freezing=0.1), (0.0,), _set_freezing),
    "ER + expansion": Method(_expanding(), (0.0, 1.0), _set_freezing),
    "ER + expansion, reuse": Method(_expanding(Expansion(8, similarity=0.9)), (0.7, 0.8), _set_similarity, ONE),
    "ER + expansion, merge": Method(
        _expanding(Expansion(5, similarity=1.0, merge=True)), (0.0, 1.0), _set_freezing, ONE
    ),
    "ER + domain gate": Method(_er(gate="domain"), buffers=ONE),
    "ER, task gate": Method(_er(gate="task"), buffers=ONE, of_task=True),
    "ER + expansion, task gate": Method(_expanding(gate="task"), (0.0, 1.0), _set_freezing, ONE, of_task=True),
    "ER-ACE": Method(_er("balanced", asymmetric=True)),
    "DER": Method(_der(weight=0.0), (0.1, 1.0), _set_logits, ONE),
    "DER++": Method(_der(), (0.1, 1.0), _set_logits),
    "DER++, ACE, shift": Method(_der("balanced", asymmetric=True, shift=2), (0.1, 1.0), _set_logits, ONE),
    "DER++, small images": Method(_small(_der("balanced"), SMALL_LOGITS_ROW), (0.1, 1.0), _set_logits),
    "GDumb": Method(_gdumb),
    "GDumb, small images": Method(_small(_gdumb)),
    "ER-ACE, small images": Method(_small(_er("balanced", asymmetric=True))),
    "together": Method(
        _small(_er("balanced", asymmetric=True, expansion=GROWING, freezing=0.1)), (0.0, 1.0), _set_freezing
    ),
    "SLDA, small images": Method(_small_form("slda"), SHRINKAGES, _set_shrinkage),
    "ridge, small images": Method(_small_form("ridge"), SHRINKAGES, _set_shrinkage),
    "SLDA, pixels": _closed("slda", "pixels"),
    "SLDA, trunk": _closed("slda", "trunk"),
    "SLDA, trunk, small images": _closed("slda", "trunk", small=True),
    "SLDA, 1000 random features": _closed("slda", "random", 1000),
    "ridge, trunk": _closed("ridge", "trunk"),
    "ridge, trunk, small images": _closed("ridge", "trunk", small=True),
    "ridge, 1000 random features": _closed("ridge", "random", 1000),
    "joint": Method(lambda buffer: _gdumb(None), buffers=(NONE,)),
}
