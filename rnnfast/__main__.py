"""`python -m rnnfast info` prints what this installation is and what it runs on."""

from __future__ import annotations

import argparse

from rnnfast import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    for key, value in info().items():
        print(f"{key:10} {', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
