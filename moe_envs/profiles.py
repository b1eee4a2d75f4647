"""Which measured costs an environment is paid with: the reference shipped with a bundle, or this machine's own."""

import logging
from pathlib import Path

from filelock import FileLock

from cost import profile as profiles
from cost.profile import Profile
from experts import bundle as bundles
from experts import zoo
from experts.bundle import PROFILE, Bundle

log = logging.getLogger("moe_envs")


def machine_path(bundle: Bundle) -> Path:
    """Where this machine's profile of a bundle is cached."""
    return zoo.cache_folder() / "profiles" / f"{bundle.path.name}-{bundle.sha256[:12]}.json"


def select(bundle: Bundle, costs: str) -> Profile:
    """The profile for `costs="reference"`, or this machine's for `"machine"` and `"live"`.

    A bundle that was built without a profile has this machine as its reference. The machine's profile is measured when
    it is first asked for, cached, and refused with a `ProfileError` once the machine or its libraries have changed.
    """
    if costs == "reference" and bundle.profile is not None:
        return profiles.parse(bundle.profile, str(bundle.path / PROFILE))
    path = machine_path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # one process measures, the others wait and read
        if not path.exists():
            log.warning("measuring the costs of bundle %r on this machine into %s", bundle.path.name, path)
            measure(bundle)
    return Profile.load(path)


def measure(bundle: Bundle, repeats: int = 200, progress: bool = False) -> Profile:
    """Measure a bundle's experts on this machine and cache the profile."""
    profile = profiles.measure_experts(bundle.model(), bundle.examples, repeats, progress)
    profile.save(machine_path(bundle))
    return profile


def prepare(bundle: str, costs: str) -> None:
    """Measure what is not measured yet, once, before several processes ask for it."""
    select(bundles.load(bundle), costs)
