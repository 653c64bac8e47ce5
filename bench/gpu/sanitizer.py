"""`python -m bench.gpu.sanitizer TOOL MODULE ...`: a module under NVIDIA's compute-sanitizer, where it runs.

TOOL is memcheck (accesses out of bounds or misaligned) or racecheck (hazards in shared memory). Where the
sanitizer is missing or refuses the device, as on some virtualised hosts, the last line says so and the exit
status is 0: nothing was found, as nothing was looked for. Anything found, or no sign that it looked, is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What it prints where it can't look at the device, the process or its code; it counts that among its errors.
REFUSALS = (
    "Device not supported",
    "Failed to initialize",
    "Internal Sanitizer Error",
    "No attachable process",
    "before first instrumented API call",
    "nsufficient permission",
)
FINDINGS = re.compile(r"^=+ .*(Invalid __|Misaligned|Race reported|[Hh]azard detected|Potential)", re.M)
NOTHING_FOUND = re.compile(r"^=+ (ERROR|RACECHECK) SUMMARY: 0 ", re.M)


def program() -> str | None:
    """Return where compute-sanitizer is, on PATH or in a toolkit; None where it isn't."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def verdict(code: int, output: str) -> tuple[bool, str]:
    """Tell whether a run may pass, and why in a few words."""
    said = [line.strip("= \n") for line in output.splitlines() if line.startswith("====")]
    refused = next((line for line in said for sign in REFUSALS if sign in line), None)
    found = FINDINGS.search(output)
    if found:
        return False, found[0].strip("= ")
    if refused:
        return True, f"not run: {refused}"
    if code:
        return False, f"exit status {code}"
    # One that is too old for the driver exits with 0 and has run nothing.
    last = next((line for line in reversed(output.splitlines()) if not line.startswith("====")), "")
    if not NOTHING_FOUND.search(output) or not last.strip():
        return False, "no sign that it looked at anything"
    return True, f"nothing found: {last.strip()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module under the tool and print what it says as it says it; returns the exit status."""
    tool, *module = sys.argv[1:] if argv is None else argv
    sanitizer = program()
    if sanitizer is None:
        print(f"{tool}: not run: compute-sanitizer is not installed")
        return 0
    # Python's own signals of an error are 1 and 2.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, "-m", *module]
    # Each tensor its own allocation: in torch's pool what lies beyond one is another's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    piped: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=environment, errors="replace", **piped) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
    passed, why = verdict(process.returncode, output)
    print(f"{tool}: {why}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
