"""`python -m bench.gpu.sanitizer TOOL MODULE ...`: run a module under NVIDIA's compute-sanitizer.

TOOL is memcheck (accesses out of bounds or misaligned) or racecheck (hazards in shared memory). If the
sanitizer is missing or refuses the device, as on some virtualised hosts, the last line says so and the exit
status is 0. The exit status is 1 if it found anything, or if its output does not show that it ran.
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

# Its messages if it can't inspect the device, the process or its code; it counts them as errors.
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
    """Return the path of compute-sanitizer, on PATH or in a CUDA toolkit; None if it is missing."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def verdict(code: int, output: str) -> tuple[bool, str]:
    """Return whether the check passes, and the reason in a few words."""
    tool_lines = [line.strip("= \n") for line in output.splitlines() if line.startswith("====")]
    refused = next((line for line in tool_lines for sign in REFUSALS if sign in line), None)
    found = FINDINGS.search(output)
    if found:
        return False, found[0].strip("= ")
    if refused:
        return True, f"not run: {refused}"
    if code:
        return False, f"exit status {code}"
    # A sanitizer that is too old for the driver runs nothing and exits with 0.
    last = next((line for line in reversed(output.splitlines()) if not line.startswith("====")), "")
    if not NOTHING_FOUND.search(output) or not last.strip():
        return False, "no sign that it checked anything"
    return True, f"nothing found: {last.strip()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the module under the tool and print its output as it comes; return the exit status."""
    tool, *module = sys.argv[1:] if argv is None else argv
    sanitizer = program()
    if sanitizer is None:
        print(f"{tool}: not run: compute-sanitizer is not installed")
        return 0
    # 86, because Python itself exits with 1 or 2 on an error.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "86", sys.executable, "-m", *module]
    # One allocation per tensor: in torch's pool, an access beyond one tensor would hit another.
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
