"""The shipped bundles: what they are trained on and how, and their rebuilding from the data."""

from pathlib import Path

from cost.profile import measure_experts
from experts import bundle, data
from experts.bundle import Bundle
from experts.training import TrainingSettings

SETTINGS = {
    "digits": TrainingSettings(widths=(2, 2, 4, 4, 8, 8, 16, 16), epochs=60, batch_size=32),
    "fashion-mnist": TrainingSettings(widths=(4, 4, 8, 8, 16, 16, 32, 64), epochs=5, batch_size=128),
}


def rebuild(name: str, folder: Path) -> Bundle:
    """Train, tabulate and profile a reference model on this machine into `folder` / name, replacing what is there."""
    if name not in SETTINGS:
        raise ValueError(f"{name!r} is not a reference bundle; there are {', '.join(SETTINGS)}")
    source = data.load(name)
    return bundle.build(
        name,
        source.inputs,
        source.labels,
        splits=source.splits,
        settings=SETTINGS[name],
        profile=measure_experts,
        data={"name": source.name, "sha256": source.sha256},
        folder=folder,
        overwrite=True,
    )
