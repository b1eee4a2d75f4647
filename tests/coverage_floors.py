"""Coverage floors of the packages, read from the .coverage file that pytest left; exit 1 where one is missed."""

import io
import sys

import coverage

FLOORS = {
    "moe_envs": 90,
    "cost": 85,
    "experts": 85,
    "experts/continual": 85,
    "agents": 90,
    "benchmarks": 85,
    "benchmarks/experiments/models": 85,
    "benchmarks/leaderboards": 85,
}


def main() -> int:
    data = coverage.Coverage()
    data.load()
    found = {name: data.report(include=f"*/{name}/*", omit="*/tests/*", file=io.StringIO()) for name in FLOORS}
    for name, floor in FLOORS.items():
        print(f"coverage of {name}: {found[name]:.1f} % (floor {floor} %)")
    return int(any(found[name] < floor for name, floor in FLOORS.items()))


if __name__ == "__main__":
    sys.exit(main())
