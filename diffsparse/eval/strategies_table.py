"""The table of `diffsparse eval strategies`: for each density its rows by PSNR, each held against the default."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from diffsparse.eval.paired_statistics import bootstrap_interval, sign_test
from diffsparse.eval.strategy_rows import REFERENCE
from diffsparse.eval.sweep_results import Score, SweepResults, Variant

LARGEST_MISS = 0.15
"""Relative difference of the measured density to the wanted one above which a row is marked."""


@dataclass(frozen=True)
class TableRow:
    """A variant over the complete pairs.

    Attributes:
        psnr_db, ssim, density: means; of density over the videos with sparse calls, 1 where there is none.
        lpips: mean; None where not every video was judged by it.
        time: of the denoising steps, those that are dense included, as a share of the dense video's; the median.
        differences: of PSNR in dB to the reference, pair by pair, where both are finite; None where there is none.
        error: relative error of the attention output, on the recorded calls.
        dial: the option and its value.
    """

    variant: Variant
    psnr_db: float
    ssim: float
    density: float
    lpips: float | None
    time: float
    differences: list[float] | None
    error: float
    dial: str

    @property
    def label(self) -> str:
        """Name, tail, and a star where the density is another than the table's."""
        tail = " + tail" if self.variant.tail else ""
        return f"{self.variant.row}{tail}{'' if self.is_reached else ' *'}"

    @property
    def is_reached(self) -> bool:
        """Whether the measured density is about the wanted one."""
        return abs(self.density - self.variant.density) <= LARGEST_MISS * self.variant.density


def table_rows(results: SweepResults) -> list[TableRow]:
    """All variants, the highest PSNR first; those at another density than the table's behind the others."""
    pairs = results.complete_pairs()
    rows = []
    for variant in results.variants:
        scores = [results.scores[pair, variant] for pair in pairs]
        reference = Variant(REFERENCE, variant.density, True)
        others = [results.scores.get((pair, reference)) for pair in pairs]
        dial = results.settings["dials"][variant.row][str(variant.density)]
        rows.append(
            TableRow(
                variant=variant,
                psnr_db=statistics.fmean(score.psnr_db for score in scores),
                ssim=statistics.fmean(score.ssim for score in scores),
                density=statistics.fmean(1.0 if score.density is None else score.density for score in scores),
                lpips=_mean([score.lpips for score in scores]),
                time=statistics.median(score.seconds / score.dense_seconds for score in scores),
                differences=None if variant == reference else _differences(scores, others),
                error=dial["error_with_tail" if variant.tail else "error"],
                dial=f"{dial['option']}={_short(dial['value'])}",
            )
        )
    return sorted(rows, key=lambda row: (row.is_reached, row.psnr_db), reverse=True)


def as_markdown(results: SweepResults, has_time: bool = False) -> str:
    """A table for each density, and what a reader has to know besides."""
    rows = table_rows(results)
    net = results.settings.get("lpips_net")
    columns = ["SSIM", *([] if net is None else [f"LPIPS, {net}"]), *(["time of dense"] if has_time else [])]
    columns += ["error of attention", "dial"]
    parts = []
    for density in dict.fromkeys(variant.density for variant in results.variants):
        parts.append(f"### {100 * density:g} %\n")
        parts.append(
            f"| strategy | density | PSNR to dense, dB | − {REFERENCE} + tail [95 %] | better, worse; p | "
            f"{' | '.join(columns)} |"
        )
        parts.append("|---" * (5 + len(columns)) + "|")
        parts += [_line(row, net is not None, has_time) for row in rows if row.variant.density == density]
        parts.append("")
    notes = [
        results.coverage(),
        "Density is that of the sparse calls, measured.",
        f"The difference is of PSNR in dB on the same prompts and seeds, with the interval of its mean by bootstrap, "
        f"then how many videos are better and worse than those of {REFERENCE} + tail, and the sign test.",
        "The error is relative, on sampled rows of one dense video.",
        *(["Time is that of all denoising steps, as a share of the dense video's."] if has_time else []),
    ]
    if any(not row.is_reached for row in rows):
        notes.append(
            f"\\* more than {100 * LARGEST_MISS:g} % from the density of the table: the nearest that this dial reaches."
        )
    return "\n".join([*parts, " ".join(notes)])


def _line(row: TableRow, has_lpips: bool, has_time: bool) -> str:
    name = f"**{row.label}**" if row.variant.row == REFERENCE else row.label
    psnr = "equal" if math.isinf(row.psnr_db) else f"{row.psnr_db:.2f}"
    cells = [name, f"{100 * row.density:.1f} %", psnr, *_compared(row.differences), f"{row.ssim:.3f}"]
    if has_lpips:
        cells.append("–" if row.lpips is None else f"{row.lpips:.3f}")
    if has_time:
        cells.append(f"{100 * row.time:.0f} %")
    return f"| {' | '.join([*cells, f'{row.error:.3f}', f'`{row.dial}`'])} |"


def _compared(differences: list[float] | None) -> tuple[str, str]:
    """Mean difference with its interval, and the counts of signs with their test, in words."""
    if not differences:
        return "–", "–"
    interval = bootstrap_interval(differences)
    between = "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return f"{statistics.fmean(differences):+.2f}{between}", f"{better}, {worse}; {sign_test(differences):.3f}"


def _differences(scores: list[Score], others: list[Score | None]) -> list[float]:
    pairs = [(score.psnr_db, other.psnr_db) for score, other in zip(scores, others) if other is not None]
    return [psnr - other for psnr, other in pairs if math.isfinite(psnr) and math.isfinite(other)]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _short(value: str) -> str:
    """A value that fits into a table."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
