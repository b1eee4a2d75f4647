"""The reference language model: how it is trained, and what is shipped with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cost.files import save_json
from experts import profiles, zoo
from experts.bundle import PROFILE
from experts.language import corpus, debian, passages, pretraining
from experts.language.model import SHIPPED, LanguageModel, load
from experts.language.pretraining import PretrainingSettings
from experts.language.transformer import ModelSettings

NAME = "language"
MODEL = ModelSettings(d_model=192, heads=6)
SETTINGS = PretrainingSettings(steps=3200, learning_rate=6e-3)


def build(
    folder: Path | None = None, data: Path | None = None,
    report: Callable[[float, str], object] = lambda share, line: None,
) -> LanguageModel:  # fmt: skip
    """Train the reference model, an hour on two cores, and write it with its passages and its profile to `folder`
    (default: into the package).

    The corpus `data` is made if it is not given. Corpus and run lie in the user's cache, so that an interrupted
    training goes on.
    """
    place = zoo.cache_folder() / "language-training"
    text = data or place / "corpus"
    if data is None and not text.exists():
        debian.write(text, report=lambda line: report(0.0, line))
    if (place / "run" / pretraining.RUN).exists():
        model = pretraining.resume(place / "run", report)
    else:
        model = pretraining.train(text, place / "run", MODEL, SETTINGS, report=report)
    return ship(model, text, folder or SHIPPED / NAME)


def ship(model: LanguageModel, data: Path, folder: Path) -> LanguageModel:
    """Write a model, its weights in int8, passages of the corpus in the folder `data`, and a profile of this machine;
    returns the model as it is read again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save(folder, "int8")
    passages.save(folder, corpus.read(data), model.tokenizer)
    found = load(folder)
    save_json(folder / PROFILE, profiles.measure_language(found).model_dump(mode="json"))
    return found
