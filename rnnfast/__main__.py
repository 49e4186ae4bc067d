"""`python -m rnnfast info` prints what this installation is and what it runs on."""

from __future__ import annotations

import argparse

from rnnfast import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description=__doc__)
    parser.add_argument("command", choices=["info"])
    parser.parse_args()
    for key, value in info().items():
        print(f"{key:10} {_text(value)}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(number)}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
