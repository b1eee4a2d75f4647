"""Those who decide: learners, glue for Stable-Baselines3, yardsticks that do not learn, policies leaving the gym.

`agents` is also the import name of the PyPI package openai-agents; `benchmarks.cli` says so where that one shadows us.
"""

DISTRIBUTION = "moe-envs"  # whose `agents` this is
