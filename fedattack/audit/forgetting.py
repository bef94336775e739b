"""What a mechanism leaves of forgotten samples, asked of shadow trainings: U-LiRA beside what looks forgotten.

"Not forgotten" when the interval of the likelihood-ratio test's AUC lies above 0.5 and above chance, over all
samples, and reaches 0.9 over all or one kind of them; "traces remain" below that. "No trace found" needs the AUC's
upper end below 0.55, and models that are better than chance. The rest is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedattack.audit.family import (
    AuditResult,
    Drawing,
    Family,
    Leakage,
    Level,
    Metric,
    at_chance,
    extremes,
    interval_fields,
)
from fedattack.audit.forgetting_scores import (
    MARGIN_AUC,
    MAX_FPR,
    ChallengeEpsilon,
    Ranking,
    Scores,
    challenge_epsilon,
    klom,
    population_test,
    tug_of_war,
    u_lira,
)
from fedattack.errors import DataError
from fedattack.metrics import Interval, chance_auc, roc_points
from fedattack.metrics.statistics import REPLICATES, student_mean
from fedattack.reporting import formats
from fedattack.rng import numpy_rng

TOLD_AUC = 0.9
"""From here on it is as good as told which sample was forgotten."""

MISLABELLED, RANDOM = "mislabelled", "random"
"""Kinds of targets beside those that an attack chose, which bear its name."""


@dataclass(frozen=True)
class Shadows:
    """Scores ``log p_y - log(1 - p_y)`` of T models after they forgot, and of as many trained without the targets.

    Of row t: a model trained on what its coins give it of the targets, and made to forget those; `control`: one that
    never had any target, of other draws.
    """

    asked: NDArray[np.bool_]  # (T, K): trained on and forgotten
    after: Scores  # (T, K): of the targets
    control: Scores  # (T, K)
    probed: NDArray[np.bool_]  # (T, R): retained samples that row t was trained on; the others it never saw
    probes_before: Scores  # (T, R): before anything was forgotten
    probes_after: Scores  # (T, R)
    retained: tuple[Scores, Scores]  # (T, n) of samples that all keep: after, control
    held_out: tuple[Scores, Scores]  # (T, h) of samples that none has
    accuracies: tuple[Scores, Scores]  # (T, 3) on forgotten, retained and held-out samples: after, control
    samples: NDArray[np.int64]  # (K,)
    labels: NDArray[np.int64]  # (K,): as trained on
    kinds: NDArray[np.str_]  # (K,): RANDOM, MISLABELLED, or the attack that chose it
    classes: NDArray[np.int64]  # labels of the held-out samples


def audit_forgetting(
    mechanism: str, shadows: Shadows, *, samples_passed: float = 0.0, seconds: float = 0.0, seed: int = 0
) -> AuditResult:
    """Score one mechanism; a record per target.

    Parameters
    ----------
    samples_passed
        What forgetting cost each model: samples taken forwards and backwards.

    Raises
    ------
    DataError
        If there are too few trainings to fit two Gaussians to each half of them, or a score is not finite.
    """
    s, asked = shadows, shadows.asked
    scores = (s.after, s.control, s.probes_before, s.probes_after, *s.retained, *s.held_out)
    if not all(np.isfinite(one).all() for one in scores):
        raise DataError(f"mechanism {mechanism!r}: a model's answers are not finite; it has diverged")
    unlearned, unseen = np.where(asked, s.after, np.nan), np.where(asked, np.nan, s.after)
    retrained = np.where(asked, s.control, np.nan)  # as many models on either side
    told, plain = u_lira(unlearned, unseen), population_test(unlearned, unseen)
    efficacy, looks = u_lira(unlearned, retrained), population_test(unlearned, retrained)
    before, after = (
        u_lira(np.where(s.probed, one, np.nan), np.where(s.probed, np.nan, one))
        for one in (s.probes_before, s.probes_after)
    )
    divergence = klom(unlearned, retrained)
    bins = klom(unlearned, retrained, "histogram")
    epsilon = challenge_epsilon(unlearned, retrained)
    kinds = {kind: told.of(s.kinds == kind) for kind in dict.fromkeys(s.kinds.tolist())}
    each, each_plain = told.each(len(s.kinds)), plain.each(len(s.kinds))
    accuracy = s.accuracies[0][:, 2]
    tow = student_mean(tug_of_war(*s.accuracies))

    def area(of: Ranking) -> dict[str, Any]:
        return interval_fields(of.auc)

    metrics: dict[str, Any] = {
        "auc": area(told) | extremes(each.tolist()),
        "auc_retrained": area(efficacy),
        "population_auc": area(plain) | extremes(each_plain.tolist()),
        "population_auc_retrained": area(looks),
        **{f"auc_{kind}": area(ranking) for kind, ranking in kinds.items()},
        "tpr_at_1_percent_fpr": interval_fields(told.tpr(seed)),
        "retained_auc_before": area(before),
        "retained_auc": area(after),
        "klom": _median(divergence, seed),
        "klom_histogram": _median(bins, seed),
        "klom_retained": _median(klom(*s.retained), seed),
        "klom_held_out": _median(klom(*s.held_out), seed),
        "epsilon": _median(epsilon.epsilon, seed),
        "tug_of_war": interval_fields(tow),
        "accuracy": interval_fields(student_mean(accuracy)),
        "accuracy_retrained": interval_fields(student_mean(s.accuracies[1][:, 2])),
    }
    count = int(asked.sum()), int((~asked).sum())
    commonest = float(np.bincount(s.classes).max() / len(s.classes))
    idle = at_chance(float(accuracy.mean()), commonest, len(s.classes))
    level, verdict = verdict_of(told.auc, plain.auc, {k: r.auc for k, r in kinds.items()}, *count, idle)
    summary = {
        "family": "forgetting",
        "count": len(s.samples),
        "trainings": len(asked),
        "kinds": {kind: int((s.kinds == kind).sum()) for kind in kinds},
        "metrics": metrics,
        "floors": {
            "chance": {
                "auc": {**interval_fields(chance_auc(*count)), **extremes([0.5])},
                "population_auc": interval_fields(chance_auc(*count)),
                "tpr_at_1_percent_fpr": {"mean": MAX_FPR, "low": None, "high": None},
            }
        },
        "best_floor": "chance",
        "epsilon": {
            "cap": epsilon.cap,
            "score": epsilon.score,
            "told_apart": int(np.isinf(epsilon.epsilon).sum()),
        },
        "samples_passed": samples_passed,
        "seconds": float(seconds),
        "level": level,
        "verdict": verdict,
    }
    records = [
        {"attack": mechanism, "family": "forgetting", "sample": int(s.samples[k]), "label": int(s.labels[k])}
        | {"kind": str(s.kinds[k]), "auc": float(each[k]), "population_auc": float(each_plain[k])}
        | {"klom": float(divergence[k]), "klom_histogram": float(bins[k])}
        | {"epsilon": float(epsilon.epsilon[k])}
        for k in range(len(s.samples))
    ]
    curves = {"tests": {"U-LiRA": _curve(told), "population test": _curve(plain)}}
    curves["scores"] = {
        "unlearned": s.after[asked].tolist(),
        "never seen": s.after[~asked].tolist(),
        "kind": np.broadcast_to(s.kinds, asked.shape)[asked].tolist(),
        "kind, never seen": np.broadcast_to(s.kinds, asked.shape)[~asked].tolist(),
    }
    return AuditResult(mechanism, "forgetting", records, summary, verdict, level, curves=curves)


def _median(values: Scores, seed: int) -> dict[str, Any]:
    """Median over samples as "mean", and its percentile bootstrap interval; infinite where so many values are."""
    draws = numpy_rng(seed, "bootstrap").integers(len(values), size=(REPLICATES, len(values)))
    middle, medians = _middle(values[None]), np.sort(_middle(values[draws]))
    low, high = (float(medians[round(q * (REPLICATES - 1))]) for q in (0.025, 0.975))
    return {"mean": float(middle[0]), "low": low, "high": high, **extremes(values.tolist())}


def _middle(values: Scores) -> Scores:
    """Median of each row, infinities included."""
    ordered, count = np.sort(values, axis=1), values.shape[1]
    below, above = ordered[:, (count - 1) // 2], ordered[:, count // 2]
    return np.where(np.isinf(above), above, (below + above) / 2)


def _curve(ranking: Ranking) -> dict[str, Any]:
    fpr, tpr = roc_points(ranking.scores, ranking.unlearned)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def verdict_of(
    auc: Interval, plain: Interval, kinds: dict[str, Interval], unlearned: int, unseen: int, idle: str = ""
) -> tuple[Level, str]:
    """Level and sentence; `plain`: of the population test, `kinds`: of each kind of targets."""
    level: Level = "undecided"
    worst = max(kinds, key=lambda kind: kinds[kind].mean)
    why = ""
    if auc.low > 0.5 and auc.mean > chance_auc(unlearned, unseen).high:
        level = "leak" if max(auc.mean, kinds[worst].mean) >= TOLD_AUC else "partial"
    elif auc.high < MARGIN_AUC and not idle:
        level = "none"
    elif not idle:
        why = "; more shadow trainings or targets would tell"
    if level in ("none", "undecided") and idle:
        level, why = "undecided", f"; {idle}"
    text = f"U-LiRA AUC {_told(auc)}, of unlearned against never seen"
    if len(kinds) > 1:
        text += f" ({', '.join(f'{kind} {found.mean:.2f}' for kind, found in kinds.items())})"
    text += f"{why}; one threshold for all samples sees {_told(plain)}"
    return level, f"{FORGETTING.words(level)}: {text}"


def _told(area: Interval) -> str:
    return f"{area.mean:.3f} [{area.low:.3f}, {area.high:.3f}]"


def _beside(result: AuditResult) -> list[str]:
    s, m = result.summary, result.summary["metrics"]
    epsilon, digits = s["epsilon"], formats.decimal
    against = f"{digits(m['auc_retrained']['mean'], 3)} {formats.interval(m['auc_retrained'], 3)}"
    finite = f"median epsilon {digits(m['epsilon']['mean'])}, score {digits(epsilon['score'], 3)}"
    before, after = (digits(m[name]["mean"], 3) for name in ("retained_auc_before", "retained_auc"))
    kloms = [digits(m[f"klom{kind}"]["mean"], 2) for kind in ("", "_retained", "_held_out")]
    return [
        f"unlearned against retrained: U-LiRA AUC {against}, population "
        f"{digits(m['population_auc_retrained']['mean'], 3)}",
        f"retained samples, trained on against never seen: U-LiRA AUC {before} before, {after} after",
        f"KLoM (Gaussian fit; medians) of forgotten, retained, held-out samples: {', '.join(kloms)}; with 20 bins "
        f"{digits(m['klom_histogram']['mean'], 2)} of the forgotten",
        f"the challenge's {finite}; {epsilon['told_apart']} of {s['count']} infinite, no finite one above "
        f"{digits(epsilon['cap'])} with so many models",
        f"tug-of-war against retraining {digits(m['tug_of_war']['mean'], 3)}, test accuracy "
        f"{formats.percent(m['accuracy']['mean'])} (retrained {formats.percent(m['accuracy_retrained']['mean'])})",
    ]


def _remarks(result: AuditResult) -> Sequence[str]:
    s = result.summary
    kinds = ", ".join(f"{number} {kind}" for kind, number in s["kinds"].items())
    return [
        f"{result.attack}: {s['trainings']} shadow trainings, targets: {kinds}",
        f"forgetting passed {formats.count(round(s['samples_passed']))} samples through each model",
        f"time: {formats.seconds(s['seconds'])}",
    ]


def _kinds(s: Any) -> str:
    """AUC of each kind of targets, in the order in which the verdict names them."""
    return "\n".join(formats.decimal(s["metrics"][f"auc_{kind}"]["mean"], 2) for kind in s["kinds"])


def _epsilon_cell(s: Any) -> str:
    """Median, and the most that could have been."""
    most = formats.decimal(s["epsilon"]["cap"])
    return f"{formats.decimal(s['metrics']['epsilon']['mean'])}\nof {most}"


def _short(key: str, digits: int, scale: float = 1.0) -> Any:
    """A cell of mean above interval, for narrow columns."""
    return lambda s: Metric(key, digits=digits, scale=scale).two_lines(s["metrics"])


def _area(key: str, title: str) -> Metric:
    return Metric(key, title, digits=3, worst="max")


FORGETTING: Family = Family(
    name="forgetting",
    question="Can it be told which samples a model was made to forget?",
    title="What forgetting leaves (with 95 % interval over samples and trainings)",
    subject="mechanism",
    metrics=(
        _area("auc", "U-LiRA AUC, against never seen"),
        _area("auc_retrained", "U-LiRA AUC, against retrained"),
        _area("population_auc", "population AUC, against never seen"),
        _area("population_auc_retrained", "population AUC, against retrained"),
        Metric("tpr_at_1_percent_fpr", "found at 1 % false positives", "%", 100.0, worst="max"),
        _area("retained_auc_before", "retained: U-LiRA AUC before"),
        _area("retained_auc", "retained: U-LiRA AUC after"),
        Metric("klom", "KLoM, median", digits=2, worst="max"),
        Metric("epsilon", "challenge's epsilon, median", digits=1, worst="max"),
        Metric("tug_of_war", "tug-of-war", digits=3),
        Metric("accuracy", "test accuracy", "%", 100.0),
    ),
    floors={"chance": "scores that know nothing"},
    headlines={"leak": "not forgotten", "partial": "traces remain", "none": "no trace found"},
    leakage=Leakage(
        "AUC",
        "AUC of U-LiRA",
        lambda s: s["metrics"]["auc"],
        nothing=0.5,
        span=0.5,
        title="What mechanisms leave of forgotten samples",
        digits=3,
    ),
    columns=(
        ("U-LiRA\nAUC", _short("auc", 2)),
        ("of each\nkind", _kinds),
        ("popu-\nlation", _short("population_auc", 2)),
        ("% found\nat 1 %", _short("tpr_at_1_percent_fpr", 0, 100.0)),
        ("KLoM,\nmedian", lambda s: formats.decimal(s["metrics"]["klom"]["mean"], 2)),
        ("epsilon,\nmedian", _epsilon_cell),
        ("test\naccuracy", lambda s: formats.percent(s["metrics"]["accuracy"]["mean"])),
    ),
    remarks=_remarks,
    beside=_beside,
    drawings=(
        Drawing(
            "forgetting-roc",
            "fedattack.reporting.forgetting:roc",
            "ROC curves of U-LiRA and of the population test, for each mechanism",
            "U-LiRA knows how each sample's score spreads over trainings; the population test has one threshold.",
            each=False,
        ),
        Drawing(
            "forgetting-scores",
            "fedattack.reporting.forgetting:densities",
            "Distributions of the log-odds of forgotten and of never seen samples, for each mechanism",
            "Where the two distributions of a kind lie apart, forgetting shows.",
            each=False,
        ),
    ),
    types={"sample": "Int64", "label": "Int64", "kind": "string"},
    glossary="""
U-LiRA: For each sample two Gaussians, of its log-odds in models that unlearned it and in models that never saw it,
fitted on half of the trainings; the likelihood ratio is tested on the other half.

Population test: One threshold on the log-odds for all samples.

KLoM: KL divergence of a sample's log-odds in retrained from those in unlearned models, in nats.

Challenge's epsilon: How surely the best threshold tells unlearned from retrained models of a sample.

Tug-of-war: Product over forgotten, retained and held-out samples of 1 - |difference of accuracy to retraining|.
""",
)

__all__ = ["FORGETTING", "ChallengeEpsilon", "Shadows", "audit_forgetting", "verdict_of"]
