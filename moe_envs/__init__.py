"""Gymnasium environments on real Mixture-of-Experts models with measured costs.

Importing this package registers the `Spec` of every environment module.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules

from moe_envs.core.spec import SPECS, Spec, find, full_id, register

try:
    __version__ = version("moe-envs")
except PackageNotFoundError:  # imported from its folder, not installed
    __version__ = "unknown"
__all__ = ["SPECS", "Spec", "__version__", "find", "full_id", "register"]

for _module in iter_modules(__path__):
    for _value in vars(import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_value, Spec):
            register(_value)
