"""The decisions: registered Gymnasium environments over real Mixture-of-Experts models with measured costs.

Every module here that ends in a `Spec` is registered by importing this package.
"""

from importlib import import_module
from pkgutil import iter_modules

from moe_envs.core.spec import SPECS, Spec, find, full_id, register

__all__ = ["SPECS", "Spec", "find", "full_id", "register"]

for _module in iter_modules(__path__):
    for _value in vars(import_module(f"{__name__}.{_module.name}")).values():
        if isinstance(_value, Spec):
            register(_value)
