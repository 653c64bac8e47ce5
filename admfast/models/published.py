"""Published results of the systems, by the published evaluator on 50,000 samples."""

from __future__ import annotations

from dataclasses import dataclass

_GUIDED = "250 steps, classifier guidance"
_UNGUIDED = "250 steps, no guidance"
_DDIM = "25 steps of DDIM, classifier guidance"
_UPSAMPLED = "250 steps of the guided base model and 250 of the upsampler"
_LSUN = "1000 steps"


@dataclass(frozen=True)
class Metric:
    """A published result: lower FID and sFID are better, higher precision, recall and inception_score.

    A number is None where the source that was read has none. conditions: how the samples were made.
    """

    fid: float
    sfid: float | None
    precision: float | None
    recall: float | None
    conditions: str
    inception_score: float | None = None
    source: str = "Dhariwal & Nichol 2021, table 5"


_TABLE_4, _TABLE_6 = "Dhariwal & Nichol 2021, table 4", "Dhariwal & Nichol 2021, table 6"
# The first row of a system is that of its default settings. Inception Scores of 128 pixels are from the
# evaluator's own output on the published samples.
PUBLISHED: dict[str, tuple[Metric, ...]] = {
    "imagenet64": (
        Metric(2.07, 4.29, 0.74, 0.63, "250 steps, no guidance, trained with dropout"),
        # Users of the authors' 64-pixel npz report 2.61.
        Metric(2.61, 3.77, 0.73, 0.63, "250 steps, no guidance, without dropout: the authors' npz"),
    ),
    "imagenet128": (
        Metric(2.97, 5.09, 0.78, 0.59, _GUIDED, 141.48),
        Metric(5.91, 5.09, 0.70, 0.65, _UNGUIDED),
        Metric(5.98, 7.04, 0.78, 0.51, _DDIM),
    ),
    "imagenet256": (
        Metric(4.59, 5.25, 0.82, 0.52, _GUIDED, 186.70),
        Metric(10.94, 6.02, 0.69, 0.63, _UNGUIDED, 100.98),
        Metric(5.44, 5.32, 0.81, 0.49, _DDIM),
    ),
    "imagenet256-uncond": (
        Metric(12.00, None, 0.76, 0.44, "250 steps, classifier guidance 10", source=_TABLE_4),
        Metric(33.03, None, None, None, "250 steps, classifier guidance 1", source=_TABLE_4),
        Metric(26.21, None, None, None, _UNGUIDED, source=_TABLE_4),
    ),
    "imagenet512": (
        Metric(7.72, 6.57, 0.87, 0.42, _GUIDED, 172.71),
        Metric(23.24, 10.19, 0.73, 0.60, _UNGUIDED, 58.06),
        Metric(8.41, 9.67, 0.83, 0.47, _DDIM),
    ),
    "imagenet256-up": (
        Metric(3.94, 6.14, 0.83, 0.53, _UPSAMPLED, 215.84, _TABLE_6),
        Metric(7.49, 5.13, 0.72, 0.63, "250 and 250 steps, no guidance", 127.49, _TABLE_6),
    ),
    "imagenet512-up": (
        Metric(3.85, 5.86, 0.84, 0.53, _UPSAMPLED, 221.72, _TABLE_6),
        Metric(4.11, 9.57, 0.83, 0.55, "250 and 25 steps, guided base model", 219.29, _TABLE_6),
        Metric(5.96, 12.10, 0.81, 0.54, "25 and 25 steps, guided base model", 187.87, _TABLE_6),
        Metric(9.96, 5.62, 0.75, 0.64, "250 and 250 steps, no guidance", 121.78, _TABLE_6),
    ),
    "lsun-bedroom": (Metric(1.90, 5.59, 0.66, 0.51, f"{_LSUN}, trained with dropout"),),
    "lsun-cat": (Metric(5.57, 6.69, 0.63, 0.52, f"{_LSUN}, trained with dropout"),),
    "lsun-horse": (Metric(2.57, 6.81, 0.71, 0.55, f"{_LSUN}, trained with dropout"),),
    "lsun-horse-nodropout": (Metric(2.95, None, 0.69, 0.55, f"{_LSUN}, trained without dropout"),),
}
