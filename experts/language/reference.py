"""The reference language model: how it is trained, and what is shipped with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cost.files import load_json
from experts import profiles, zoo
from experts.bundle import PROFILE
from experts.data import DataError
from experts.language import corpus, debian, passages, pretraining
from experts.language.model import SHIPPED, LanguageModel, load
from experts.language.pretraining import PretrainingSettings
from experts.language.transformer import ModelSettings
from experts.offload import loads
from experts.serving import served, timing

NAME = "language"
MODEL = ModelSettings(d_model=192, heads=6)
SETTINGS = PretrainingSettings(steps=3200, learning_rate=6e-3)


def build(
    folder: Path | None = None, data: Path | None = None, model: ModelSettings = MODEL,
    settings: PretrainingSettings = SETTINGS, report: Callable[[float, str], object] = lambda share, line: None,
) -> LanguageModel:  # fmt: skip
    """Train the reference model, an hour on two cores, and write it with its passages and its profile to `folder`
    (default: into the package).

    The corpus `data` is made if it is not given. Corpus and run lie in the user's cache until the model is written, so
    that an interrupted training goes on. Raises `ValueError` where the run there is another one.
    """
    place = zoo.cache_folder() / "language-training"
    text = data or place / "corpus"
    if data is None and not text.exists():
        debian.write(text, report=lambda line: report(0.0, line))
    run = place / "run"
    if (run / pretraining.RUN).exists():
        about = load_json(run / pretraining.RUN, DataError, f"delete {run}")
        wanted = {"model": asdict(model), "settings": asdict(settings), "corpus": corpus.read(text).sha256}
        if {name: about.get(name) for name in wanted} != wanted:
            raise ValueError(f"{run} holds a run with other settings or of another corpus: delete it")
        trained = pretraining.resume(run, report)
    else:
        trained = pretraining.train(text, run, model, settings, report=report)
    found = ship(trained, text, folder or SHIPPED / NAME)
    shutil.rmtree(run)
    return found


def ship(model: LanguageModel, data: Path, folder: Path) -> LanguageModel:
    """Write a model, its weights in int8, passages of the corpus in the folder `data`, and profiles of this machine;
    returns the model as it is read again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save(folder, "int8")
    passages.save(folder, corpus.read(data), model.tokenizer)
    found = load(folder)
    profiles.measure_language(found).save(folder / PROFILE)
    loads.measure_loads(found, found.settings.k).save(folder / profiles.LOADS)
    timing.measure_service(served.load(folder)).save(folder / timing.FILE)
    return found
