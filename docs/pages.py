"""Generate each environment's page from its docstring, with a picture of an episode, and their navigation (a hook of
mkdocs; `make docs` runs it)."""

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
    picture = "" if SPECS[name].nondeterministic else f"![an episode of a trained agent]({name}.gif)\n\n"
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


def draw(name: str, path: Path, policy: Any, **arguments: Any) -> None:
    """Write an animated picture of one episode of a policy, in the small environment or with these arguments."""
    import gymnasium
    import numpy as np
    from PIL import Image

    from moe_envs import SPECS

    env = gymnasium.make(f"moe_envs:{name}", render_mode="rgb_array", **(arguments or SPECS[name].small))
    observation, _ = env.reset(seed=0)
    frames, ended, state = [env.render()], False, None
    while not ended:
        masked = {"action_masks": env.unwrapped.action_masks()[None]} if hasattr(env.unwrapped, "action_masks") else {}
        action, state = policy.predict(np.asarray(observation)[None], state=state, deterministic=True, **masked)
        observation, _, ended, _, _ = env.step(action[0])
        frames.append(env.render())
    pictures = [Image.fromarray(frame).convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, loop=0)


def trained(name: str) -> Any:
    """Our PPO, trained with the tuned settings in the environment that is drawn."""
    from agents import training, tuned
    from moe_envs import SPECS

    env_id = f"moe_envs:{name}"
    return training.train(
        env_id, "ppo", "own", seed=0, env_kwargs=dict(SPECS[name].small), settings=tuned.settings("ppo", env_id, "own")
    ).agent


def on_config(config: Any) -> Any:
    """Add every environment's page and every published leaderboard to the navigation."""
    from moe_envs import SPECS

    for section in config["nav"]:
        if "Environments" in section:
            section["Environments"] = [f"environments/{name}.md" for name in SPECS]
        if "Results" in section:
            boards = [{name: f"leaderboards/{name}/report.md"} for name in SPECS if (LEADERBOARDS / name).exists()]
            section["Results"] += boards
    return config


def on_pre_build(config: Any) -> None:
    """Write all pages, and the pictures that are missing: a training each, so delete one to have it drawn again."""
    from moe_envs import SPECS

    for name, spec in SPECS.items():
        (FOLDER / f"{name}.md").write_text(page(name))
        if not spec.nondeterministic and not (FOLDER / f"{name}.gif").exists():
            draw(name, FOLDER / f"{name}.gif", trained(name))
