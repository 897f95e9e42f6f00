"""python -m helpers.experiments list | run NAME ... | verify NAME ... | readme"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from helpers import CourseError


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m helpers.experiments", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="experiments, and how much of them is recorded")
    actions.add_parser("readme", help="write the README's figures and its picture from the records")
    run = actions.add_parser("run", help="make the runs that are missing")
    run.add_argument("names", nargs="+", metavar="NAME")
    run.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    run.add_argument("--minutes", type=float, help="stop by then")
    run.add_argument("--keep", type=Path, metavar="DIR", help="keep the adapters, in 16 bits")
    verify = actions.add_parser("verify", help="repeat the first steps of a recorded run")
    verify.add_argument("names", nargs="+", metavar="NAME")
    verify.add_argument("--steps", type=int, default=5)
    for action in (run, verify):
        action.add_argument("--only", metavar="LABEL", help="runs with this text in their label")
    options = parser.parse_args(arguments)
    try:
        return _act(options)
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _act(options: argparse.Namespace) -> int:
    from helpers.experiments import read
    from helpers.experiments.catalogue import EXPERIMENTS

    if options.action == "list":
        for name, experiment in EXPERIMENTS.items():
            planned = {(trial.label, trial.seed) for trial in experiment.plan()}
            done = {(record["label"], record["seed"]) for record in read(name)}
            counts = f"{len(done):>3} recorded, {len(planned - done):>3} missing"
            print(f"{name:<9} {counts}  {experiment.question}")
        return 0
    if options.action == "readme":
        from helpers.experiments import readme

        readme.write()
        return 0
    for name in options.names:
        if name not in EXPERIMENTS:
            raise CourseError(
                f"There is no experiment {name!r}. Choose of {', '.join(EXPERIMENTS)}."
            )
    from helpers.experiments import runner  # torch, which `list` need not wait for

    if options.action == "run":
        failed = runner.run(
            options.names, options.only, options.jobs, options.minutes, options.keep
        )
        print(
            f"{len(failed)} runs failed or were not finished" if failed else "all runs are recorded"
        )
        return 1 if failed else 0
    agreed = True
    for name in options.names:
        text, agrees = runner.verify(name, options.only, options.steps)
        print(text)
        agreed &= agrees
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
