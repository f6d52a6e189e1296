"""From numbers to words: whether two sets differ, in what most, and what follows for a discriminator that is right on
one of them and not on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.data_tools.compare.classifier import ToldApart
from verl.data_tools.compare.gap import Gap
from verl.data_tools.compare.overlap import Overlap
from verl.data_tools.compare.statistics import ALPHA, CONFIDENCE, Finding, holm, share

# How large an effect is called, from the largest: above so much.
CALLED = ((0.5, "very much"), (0.25, "much"), (0.1, "clearly"), (0.0, "a little"))
SAID = 3
# Effects below which a set is too much like the other for a shift to explain a fall of the accuracy.
SMALL = 0.1
# Share of B's prompts in A from which B is no held-out set.
SHARED = 0.02


@dataclass(frozen=True)
class Ranked:
    """A finding with its p among all that were made (Holm), the largest significant effect first."""

    finding: Finding
    adjusted: float

    @property
    def differs(self) -> bool:
        """Whether it is more than chance."""
        return self.adjusted < ALPHA


def rank(findings: Sequence[Finding]) -> list[Ranked]:
    """Those that are more than chance by their effect, then the others by their p."""
    adjusted = holm([finding.p for finding in findings])
    ranked = [Ranked(finding, p) for finding, p in zip(findings, adjusted, strict=True)]
    return sorted(ranked, key=lambda each: (not each.differs, -each.finding.effect if each.differs else each.finding.p))


def headline(ranked: Sequence[Ranked], names: tuple[str, str]) -> str:
    """The verdict in one line."""
    differing = [each.finding for each in ranked if each.differs]
    who = f"{names[0]} and {names[1]}"
    if not differing:
        least = min(each.adjusted for each in ranked)
        return (
            f"{who} cannot be told apart: none of {len(ranked)} comparisons shows more than chance (least p "
            f"{least:.2g}, adjusted for their number)"
        )
    how = next(word for above, word in CALLED if differing[0].effect >= above)
    parts, seen = [], set()
    for finding in differing:
        kind = finding.aspect.split(":")[0].split(",")[0]
        if kind not in seen:
            seen.add(kind)
            parts.append(finding.says)
    rest = len(differing) - min(SAID, len(parts))
    more = f"; and {rest} of {len(ranked)} comparisons more" if rest else ""
    return f"{who} differ {how}; most of all, {'; then, '.join(parts[:SAID])}{more}"


def discriminator_reading(
    ranked: Sequence[Ranked],
    names: tuple[str, str],
    tests: Sequence[ToldApart],
    overlap: Overlap,
    gap: Gap | None,
    accuracies: tuple[float, float] | None,
    pairs: int,
) -> list[str]:
    """Sentences on a discriminator whose accuracy is high on A's prompts and falls on B's: over-fitting, or a shift."""
    said = [_by_data(ranked, names, tests)]
    if overlap.same.value > SHARED:
        said.append(
            f"{overlap.same.value:.1%} of {names[1]}'s prompts are {names[0]}'s too: on these, {names[1]} is no test; "
            "measure on the others."
        )
    if accuracies is not None:
        said.append(_of_accuracies(accuracies, names, pairs))
    if gap is not None:
        said.append(_of_gap(gap, names))
    said.append(
        "What the data alone cannot say: how often the discriminator saw each pair; and whether the student wrote its "
        "answers alike for both (temperature or greedy, limits, the same weights). To decide: keep some rows of "
        f"{names[0]} out of training and measure there too. An accuracy that falls there as well is over-fitting; one "
        f"that holds there and falls on {names[1]} is a shift."
    )
    return said


def _by_data(ranked: Sequence[Ranked], names: tuple[str, str], tests: Sequence[ToldApart]) -> str:
    differing = [each.finding.aspect for each in ranked if each.differs]
    if not differing:
        visible = max(test.visible for test in tests)
        return (
            f"The data speaks for over-fitting on {names[0]}'s prompts and shows no shift: what a discriminator had "
            f"learned of how answers differ would hold on {names[1]} too. A shift too small for so few rows (a "
            f"classifier's accuracy below about {visible:.2f}) cannot be ruled out."
        )
    effect = max(each.finding.effect for each in ranked if each.differs)
    if effect < SMALL:
        return (
            f"The sets differ a little ({'; '.join(differing[:SAID])}; largest effect {effect:.2f}): real, and "
            "too small to explain an accuracy that falls by more than that. Such a fall speaks for over-fitting on "
            f"{names[0]}."
        )
    prompts = [aspect for aspect in differing if "prompts" in aspect]
    said = (
        f"The data supports a shift between the sets ({'; '.join(differing[:SAID])}): accuracy may fall on {names[1]} "
        "without any over-fitting, which the data neither shows nor rules out."
    )
    if not prompts:
        said += (
            " The prompts look alike and the answers do not: another teacher, another version of it, or other settings."
        )
    return said


def _of_accuracies(accuracies: tuple[float, float], names: tuple[str, str], pairs: int) -> str:
    there = share(round(accuracies[1] * pairs), pairs)
    said = (
        f"{accuracies[1]:.1%} over {pairs} prompts of {names[1]} has the {CONFIDENCE:.0%} interval {there.low:.1%} to "
        f"{there.high:.1%}: "
    )
    if there.low > 0.5:
        return said + f"above chance; it lost {accuracies[0] - accuracies[1]:.1%} and still tells them apart."
    if there.high >= 0.5:
        return said + (
            "no more than a coin. Of what it learned nothing holds there, as with pairs learned by heart, or sets that "
            "have nothing in common."
        )
    return said + (
        "below chance. Over-fitting alone ends at 50%: here it prefers the student, so what it learned turned round: a "
        "shift, or answers that were made, cut or scored otherwise in testing."
    )


def _of_gap(gap: Gap, names: tuple[str, str]) -> str:
    shift = gap.shift
    if shift.low > 0:
        verdict = f"a shift: {names[1]} costs {shift.value:.1%} [{shift.low:.1%}, {shift.high:.1%}] beyond over-fitting"
    elif shift.high < 0:
        verdict = (
            f"{names[1]} is even easier than {names[0]}, by {-shift.value:.1%} [{-shift.high:.1%}, {-shift.low:.1%}]"
        )
    else:
        verdict = f"no shift is seen (difference {shift.value:+.1%} [{shift.low:+.1%}, {shift.high:+.1%}])"
    return (
        f"Tried with a linear judge of words on these very answers: {gap.known_pairs:.1%} right on pairs it was "
        f"trained on, {gap.other_prompts.value:.1%} on other prompts of {names[0]}, {gap.b.value:.1%} on {names[1]}. "
        f"Over-fitting costs it {gap.known:.1%}; {verdict}."
    )
