"""The page of each environment is its class docstring, with a picture of an episode; `make docs` writes them anew (a
hook of mkdocs)."""

import inspect
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "environments"
LEADERBOARDS = Path(__file__).parent / "leaderboards"


def page(name: str) -> str:
    """The Markdown page of a registered environment."""
    from gymnasium.envs.registration import load_env_creator

    from moe_envs import SPECS

    doc = load_env_creator(SPECS[name].entry_point).__doc__
    make = f'```python\ngymnasium.make("moe_envs:{name}")\n```'
    picture = "" if SPECS[name].nondeterministic else f"![an episode of random actions]({name}.gif)\n\n"
    return f"# {name}\n\n{make}\n\n{picture}{inspect.cleandoc(str(doc))}\n{leaderboard(name)}"


def leaderboard(name: str) -> str:
    """What the published leaderboard of an environment says in short, where there is one."""
    from benchmarks.leaderboards.report import summary

    path = LEADERBOARDS / name / "results.json"
    if not path.exists():
        return ""
    lines = "\n".join(summary(json.loads(path.read_text())))
    said = "Every policy, what the bound is, learning curves, hypervolumes"
    more = f"{said}: [the report](../leaderboards/{name}/report.md)."
    return f"\n## Leaderboard\n\n{lines}\n\n{more}\n"


def draw(name: str, path: Path) -> None:
    """An animated picture of an episode of random actions, valid ones where there are masks."""
    import gymnasium
    from PIL import Image

    from moe_envs import SPECS

    env = gymnasium.make(f"moe_envs:{name}", render_mode="rgb_array", **SPECS[name].small)
    env.reset(seed=0)
    env.action_space.seed(0)
    frames, ended = [env.render()], False
    while not ended:
        masked = {"mask": env.unwrapped.action_masks().astype("int8")} if hasattr(env.unwrapped, "action_masks") else {}
        _, _, ended, _, _ = env.step(env.action_space.sample(**masked))
        frames.append(env.render())
    pictures = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE, colors=32) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, loop=0)


def on_pre_build(config: Any) -> None:
    """Write all pages and pictures."""
    from moe_envs import SPECS

    for name, spec in SPECS.items():
        (FOLDER / f"{name}.md").write_text(page(name))
        if not spec.nondeterministic:
            draw(name, FOLDER / f"{name}.gif")
