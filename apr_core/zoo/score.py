"""What a matrix says: kills, survivors, alarms, rates, and whether each claim has earned its row. Nothing runs here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apr_core.contract.layout import role_of
from apr_core.errors import Exit
from apr_core.falsify.claims import Claim, load_claims
from apr_core.falsify.verdict import Verdict
from apr_core.zoo.registry import Benign, Defect, Later

IDENTITY = frozenset({"F-GT-010", "F-GT-011"})
BEYOND_THE_FILE = frozenset({"reference", "golden", "golden_logits"})
PREFLIGHT = "preflight"
CRASH = "CRASH"
# What a claim must have killed to keep its row: defects, classes, and defects that it alone of its notebook kills.
EARNED = (3, 2, 1)


@dataclass(frozen=True)
class Judged:
    """One claim's word about one planted item; ``seconds`` is what asking it took."""

    claim: str
    verdict: str
    reason: str
    seconds: float
    behind_gate: bool = False


@dataclass(frozen=True)
class Outcome:
    """
    What became of one planted item.

    Attributes:
        id: The item's.
        judged: Every claim in the order asked, ``preflight`` first when the file did not open.
        not_applicable: Why the recipe could not damage this model.
        crash: The first exception that no gate should let out, with the place.
        seconds: Planting and examining.
    """

    id: str
    judged: tuple[Judged, ...] = ()
    not_applicable: str = ""
    crash: str = ""
    seconds: float = 0.0

    @classmethod
    def of_json(cls, body: Mapping[str, Any]) -> Outcome:
        """Rebuild an outcome from what ``asdict`` made of it."""
        return cls(**{**body, "judged": tuple(Judged(**row) for row in body["judged"])})

    def killers(self, claims: Iterable[str]) -> list[Judged]:
        """The claims out of ``claims`` that refuted it, in the order asked, each once."""
        allowed, found = {*claims, PREFLIGHT}, dict[str, Judged]()
        for row in self.judged:
            if row.verdict == Verdict.FALSIFIED and row.claim in allowed:
                found.setdefault(row.claim, row)
        return list(found.values())

    def seconds_to(self, killer: Judged, claims: Iterable[str]) -> float:
        """How long the claims of a matrix take until this one has spoken."""
        allowed = {*claims, PREFLIGHT}
        return sum(row.seconds for row in self.judged[: self.judged.index(killer) + 1] if row.claim in allowed)


def claim_sets() -> dict[str, frozenset[str]]:
    """The claims of each matrix."""
    claims = load_claims()
    return {
        "alone": frozenset(c.id for c in claims.values() if not BEYOND_THE_FILE & set(c.needs)),
        "with_reference": frozenset(claims),
        "without_identity": frozenset(claims) - IDENTITY,
    }


@dataclass(frozen=True, eq=False)
class Matrix:
    """
    Everything that was planted on one model, and what each claim said.

    Attributes:
        defects: The defects that were tried.
        benign: The legal oddities that were tried, the healthy model itself among them.
        later: Classes that cannot be planted yet.
        outcomes: Id -> outcome.
        suite_faults: Rows of the suite's own faults: id, klass, what, caught, claims and more.
        redundant: Claim -> the claim that covers it.
        unavailable: Claim -> why it cannot run here.
        about: model, digest, provenance, seconds, quick, and ``touched``: defect id -> tensors that its recipe changes.
    """

    defects: Sequence[Defect]
    benign: Sequence[Benign]
    later: Sequence[Later]
    outcomes: Mapping[str, Outcome]
    suite_faults: Sequence[Mapping[str, Any]]
    redundant: Mapping[str, str]
    unavailable: Mapping[str, str]
    about: Mapping[str, Any]

    @property
    def planted(self) -> list[Defect]:
        """The defects that this model can have."""
        return [d for d in self.defects if not self.outcomes[d.id].not_applicable]

    def killed(self, defect: Defect, claims: Iterable[str]) -> list[Judged]:
        """The killers of a defect; none when a gate crashed on it, whatever the others say."""
        outcome = self.outcomes[defect.id]
        return [] if outcome.crash else outcome.killers(claims)

    @property
    def survivors(self) -> list[dict[str, str]]:
        """Defects that no claim kills with a reference, or that are visible alone and killed by none alone."""
        sets, rows = claim_sets(), []
        for d in self.planted:
            why = ""
            if self.outcomes[d.id].crash:
                why = f"a gate crashed: {self.outcomes[d.id].crash}"
            elif not self.killed(d, sets["with_reference"]):
                why = "no claim kills it with a reference"
            elif not d.invisible_alone and not self.killed(d, sets["alone"]):
                why = "visible alone, and no claim kills it alone"
            rows += [{"defect": d.id, "class": d.klass, "what": d.what, "why": why}] if why else []
        return rows

    @property
    def alarms(self) -> list[dict[str, str]]:
        """Legal oddities that a claim, the opening or a crash refused."""
        rows = []
        for b in self.benign:
            outcome = self.outcomes[b.id]
            said = [(j.claim, j.reason) for j in outcome.judged if j.verdict == Verdict.FALSIFIED]
            said += [("crash", outcome.crash)] if outcome.crash else []
            rows += [{"benign": b.id, "what": b.what, "claim": c, "reason": r} for c, r in said]
        return rows

    @property
    def broken_promises(self) -> list[dict[str, str]]:
        """Claims that a defect says must kill it, could run here, and did not."""
        rows = []
        for d in self.planted:
            killers = {j.claim for j in self.outcomes[d.id].killers(load_claims())}
            for claim in d.kills:
                if claim not in killers and claim not in self.unavailable:
                    said = next((j for j in self.outcomes[d.id].judged if j.claim == claim), None)
                    found = f"{said.verdict} {said.reason}".strip() if said else "not asked"
                    rows.append({"defect": d.id, "claim": claim, "found": found})
        return rows

    @property
    def crashes(self) -> list[dict[str, str]]:
        """Items on which a gate, or the planting, raised what it should not."""
        items: list[Defect | Benign] = [*self.defects, *self.benign]
        return [{"item": i.id, "crash": self.outcomes[i.id].crash} for i in items if self.outcomes[i.id].crash]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """One row per claim: what it killed, and whether that earns its place."""
        deeds = [(d.id, d.klass, {j.claim for j in self.killed(d, load_claims())}) for d in self.planted]
        deeds += [(s["id"], s["klass"], set(s["claims"])) for s in self.suite_faults if s["caught"]]
        return [self._row(claim, deeds) for claim in load_claims().values()]

    def _row(self, claim: Claim, deeds: Sequence[tuple[str, str, set[str]]]) -> dict[str, Any]:
        peers = {c.id for c in load_claims().values() if c.notebook == claim.notebook}
        mine = [(id_, klass) for id_, klass, killers in deeds if claim.id in killers]
        only = [id_ for id_, _, killers in deeds if killers & peers == {claim.id}]
        classes = sorted({klass for _, klass in mine})
        covered = self.redundant.get(claim.id, "")
        reason = ""
        if claim.id in self.unavailable:
            verdict, reason = str(Verdict.NOT_RUN), self.unavailable[claim.id]
        elif not mine:
            verdict, reason = str(Verdict.INCONCLUSIVE), "no planted defect"
        elif covered:
            verdict, reason = "redundant", f"covered by {covered}"
        elif (len(mine), len(classes), len(only)) >= EARNED and len(classes) >= EARNED[1] and len(only) >= EARNED[2]:
            verdict = "earned"
        else:
            # a sample cannot say that a claim has no defect of its own: only the whole matrix takes a row away
            verdict = "sampled" if self.about.get("quick") else "unearned"
            reason = f"{len(mine)} defects, {len(classes)} classes, {len(only)} of its own"
        return {
            "claim": claim.id,
            "notebook": claim.notebook,
            "title": claim.title,
            "defects": [id_ for id_, _ in mine],
            "classes": classes,
            "only": only,
            "redundant_with": covered,
            "verdict": verdict,
            "reason": reason,
        }

    def _matrix(self, name: str, claims: frozenset[str]) -> dict[str, Any]:
        """One of the three: a row per defect, and its rates."""
        rows: list[dict[str, Any]] = []
        for d in self.planted:
            killers = self.killed(d, claims)
            rows.append(
                {
                    "defect": d.id,
                    "class": d.klass,
                    "kills": [j.claim for j in killers],
                    "first_killer": killers[0].claim if killers else None,
                    "second_killer": killers[1].claim if killers[1:] else None,
                    "time_to_kill_s": round(self.outcomes[d.id].seconds_to(killers[0], claims), 4) if killers else None,
                    "counts": name != "alone" or not d.invisible_alone,
                    "invisible": d.invisible_alone if name == "alone" else "",
                }
            )
        counted = [r for r in rows if r["counts"]]
        return {
            "claims": [c for c in load_claims() if c in claims],
            "kills": rows,
            "of": len(counted),
            "killed": sum(bool(r["kills"]) for r in counted),
            "survivors": [r["defect"] for r in counted if not r["kills"]],
            "kill_rate": _share(sum(bool(r["kills"]) for r in counted), len(counted)),
            "second_killer_rate": _share(sum(len(r["kills"]) > 1 for r in counted), len(counted)),
        }

    def _rates(self, matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
        tried = [b for b in self.benign if not self.outcomes[b.id].not_applicable]
        caught = sum(bool(s["caught"]) for s in self.suite_faults)
        return {
            "kill_rate": matrices["with_reference"]["kill_rate"],
            "kill_rate_without_identity": matrices["without_identity"]["kill_rate"],
            "second_killer_rate": matrices["with_reference"]["second_killer_rate"],
            "kill_rate_alone": matrices["alone"]["kill_rate"],
            "share_invisible_alone": _share(sum(bool(d.invisible_alone) for d in self.planted), len(self.planted)),
            "false_alarm_rate": _share(len({a["benign"] for a in self.alarms}), len(tried)),
            "suite_fault_rate": _share(caught, len(self.suite_faults)),
        }

    def as_json(self) -> dict[str, Any]:
        """The whole matrix as plain values."""
        matrices = {name: self._matrix(name, claims) for name, claims in claim_sets().items()}
        kills = [
            {"defect": d.id, "claim": j.claim, "behind_gate": j.behind_gate, "reason": j.reason, "seconds": j.seconds}
            for d in self.planted
            for j in self.killed(d, load_claims())
        ]
        items: list[Defect | Benign] = [*self.defects, *self.benign]
        absent = [(i.id, self.outcomes[i.id].not_applicable) for i in items]
        return {
            **{key: value for key, value in self.about.items() if key != "touched"},
            "exit_code": int(self.exit_code),
            "rates": self._rates(matrices),
            "defects": [
                _defect_row(d, self.outcomes[d.id], self.about.get("touched", {}).get(d.id, ())) for d in self.defects
            ],
            "benign": [
                {"id": b.id, "what": b.what, "why": b.why, "seconds": self.outcomes[b.id].seconds} for b in self.benign
            ],
            "claims": self.claims,
            "kills": kills,
            "survivors": self.survivors,
            "alarms": self.alarms,
            "crashes": self.crashes,
            "broken_promises": self.broken_promises,
            "matrices": matrices,
            "suite_faults": list(self.suite_faults),
            "not_plantable": [asdict(item) for item in self.later],
            "not_applicable": [{"item": id_, "reason": reason} for id_, reason in absent if reason],
        }

    @property
    def exit_code(self) -> Exit:
        """5 when anything was missed or cried wolf, 11 when a claim that can run has no planted defect, else 0."""
        uncaught = [s for s in self.suite_faults if not s["caught"]]
        if self.survivors or self.alarms or self.crashes or self.broken_promises or uncaught:
            return Exit.REFUTED
        return Exit.INCONCLUSIVE if any(c["verdict"] == Verdict.INCONCLUSIVE for c in self.claims) else Exit.OK


def _defect_row(defect: Defect, outcome: Outcome, touched: Sequence[str]) -> dict[str, Any]:
    """A defect as the matrix lists it: role and tensor are the first that the recipe really changed."""
    row = describe(defect)
    row["tensor"] = row["tensor"] or next(iter(touched), "")
    role = role_of(row["tensor"])
    row["role"] = row["role"] or (role.name if role else "")
    became = {"not_applicable": outcome.not_applicable, "crash": outcome.crash, "seconds": outcome.seconds}
    return {**row, "tensors": list(touched), **became}


def describe(defect: Defect) -> dict[str, Any]:
    """A defect as plain values; ``planted_in`` says whether it damages a file, a backend or the copies."""
    kept = ("id", "klass", "what", "source", "cause", "kills", "role", "tensor", "invisible_alone")
    row = {"class" if key == "klass" else key: getattr(defect, key) for key in kept}
    return {**row, "planted_in": "file" if defect.recipe else "backend" if defect.hook else "copies"}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
