"""The command line of the sample models. It does not know what they are made of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backend.errors import LoadError
from backend.samples import SAMPLES, fetch_all


def main(arguments: Sequence[str] | None = None) -> int:
    """One folder a line on standard output."""
    parser = argparse.ArgumentParser(prog="python -m backend.samples", description="Fetch and make sample models.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(SAMPLES)}; all if none is named")
    try:
        for folder in fetch_all(parser.parse_args(arguments).tasks or SAMPLES):
            print(folder)
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
