"""`python -m bench.gpu.chosen`: which implementation attention really runs on here, and why not xformers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from admfast.cli.examples import examples
from admfast.ops import watch


def main(argv: Sequence[str] | None = None) -> int:
    """Attend once in every dtype, with and without a gradient; the last line is the answer."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.chosen", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    device = parser.parse_args(argv).device
    names, reasons = [], []
    for op, call, run in examples(device):
        if op != "attention":
            continue
        with watch() as seen:
            run()
        choice = next(choice for choice in seen if choice.op == op)
        why = choice.passed_over.get("xformers", "another comes first here")
        names.append(choice.name)
        reasons += [] if choice.name == "xformers" else [why]
        print(f"{call}: {choice.name}" + ("" if choice.name == "xformers" else f" (xformers: {why})"))
    count = names.count("xformers")
    print(f"xformers chosen in {count} of {len(names)} calls" + (f": {reasons[0]}" if reasons else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
