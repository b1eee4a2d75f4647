"""The page of each environment is its class docstring; `make docs` writes them anew (a hook of mkdocs)."""

import inspect
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "environments"


def page(name: str) -> str:
    """The Markdown page of a registered environment."""
    from gymnasium.envs.registration import load_env_creator

    from moe_envs import ENVIRONMENTS

    doc = load_env_creator(ENVIRONMENTS[name]["entry_point"] + "Env").__doc__
    make = f'```python\ngymnasium.make("moe_envs:{name}")\n```'
    return f"# {name}\n\n{make}\n\n{inspect.cleandoc(str(doc))}\n"


def on_pre_build(config: Any) -> None:
    """Write all pages."""
    from moe_envs import ENVIRONMENTS

    for name in ENVIRONMENTS:
        (FOLDER / f"{name}.md").write_text(page(name))
