"""Access to golden data, which are numbers computed once with the published code, and their comparison.

The folder is `$ADMFAST_GOLDEN`, or `shared/golden` next to the checkout, or the small copy in `tests/data`.
Every case in the folder becomes a test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from admfast.diffusion import DiffusionConfig

REPOSITORY = Path(__file__).resolve().parents[2]

# Limits of max|error| / max|expected|, from the table in the folder's README.
SCHEDULE_LIMIT = 1e-12
POINT_LIMIT = 1e-5
ANALYTIC_SAMPLES_LIMIT = 1e-5
ANALYTIC_XSTART_LIMIT = 1e-4
NETWORK_OUTPUT_LIMIT = 2e-5
NETWORK_GRADIENT_LIMIT = 1e-4
NETWORK_SAMPLES_LIMIT = 1e-4
NETWORK_XSTART_LIMIT = 3e-3
TRAINED_PARAMETERS_LIMIT = 3e-4


def _folder() -> Path:
    named = os.environ.get("ADMFAST_GOLDEN")
    if named:
        return Path(named)
    whole = REPOSITORY.parent / "shared" / "golden"
    return whole if whole.is_dir() else REPOSITORY / "tests" / "data" / "golden"


def golden_root() -> Path | None:
    """Return the folder of golden data, or None if there is none."""
    folder = _folder()
    return folder if folder.is_dir() else None


def cases(*parts: str, pattern: str = "*.json") -> list[Any]:
    """Return one `pytest.param` for each path that matches `pattern` in the folder `parts`.

    Its id is the relative path without the ending. A missing folder gives one skipped param that names the
    folder. A folder without a match raises FileNotFoundError.
    """
    folder = _folder().joinpath(*parts)
    if not folder.is_dir():
        reason = f"golden data is missing: {folder} (set ADMFAST_GOLDEN)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-golden-data")]
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no golden case matches {folder / pattern}")
    return [pytest.param(path, id=path.relative_to(folder).with_suffix("").as_posix()) for path in found]


def networks(*parts: str) -> list[Any]:
    """Return the cases of a folder that are networks: their `config.json` names a constructor."""
    found = cases(*parts, pattern="*/config.json")
    return [case for case in found if case.values[0] is None or "ctor" in load_json(case.values[0])]


def load_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return every array of an npz file. `path` may also be the JSON file with the same name."""
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every array of an npz file as a tensor."""
    return {name: torch.tensor(array) for name, array in load_npz(path).items()}


def compare(actual: Any, expected: Any, limit: float, name: str) -> float:
    """Assert max|actual - expected| <= limit * max|expected| and return the ratio.

    Shapes must be equal, and infinities and NaN must be at the same places. Integers must be equal, whatever
    the limit is. If all expected values are 0, the limit applies to the error itself.
    """
    a, e = _array(actual), _array(expected)
    assert a.shape == e.shape, f"{name}: shape {a.shape}, expected {e.shape}"
    if e.dtype.kind in "iub":
        assert a.dtype.kind == e.dtype.kind, f"{name}: dtype {a.dtype}, expected {e.dtype}"
        assert np.array_equal(a, e), f"{name}: {int((a != e).sum())} of {e.size} integers differ"
        return 0.0
    a, e = a.astype(np.float64), e.astype(np.float64)
    finite = np.isfinite(e)
    assert np.array_equal(a[~finite], e[~finite], equal_nan=True), f"{name}: NaN or infinities differ"
    assert np.isfinite(a[finite]).all(), f"{name}: NaN or infinity where a number is expected"
    if not finite.any():
        return 0.0
    ratio = float(np.abs(a - e)[finite].max() / (np.abs(e[finite]).max() or 1.0))
    assert ratio <= limit, f"{name}: max|error| / max|expected| = {ratio:.3g}, limit {limit:.3g}"
    return ratio


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def process_of(settings: dict[str, Any]) -> DiffusionConfig:
    """Return the process that a case's "diffusion" describes."""
    return DiffusionConfig(
        noise_schedule=settings["schedule"],
        steps=settings["steps"],
        rescale_timesteps=settings["rescale"],
        respacing=settings.get("respacing", ""),
        mean_type=settings["mean"],
        var_type=settings["var"],
        loss_type=settings["loss"],
    )
