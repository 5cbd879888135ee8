"""What engines would do with a checkpoint: `judge` applies the rules of loader_rules.py to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..formats import MXFP8
from .load_case import ENGINES, Case, Engine, declared_for, scale_histograms
from .loader_rules import OUTCOMES, READ, REFUSES, RULES, SCHEMES, WRONG
from .survey import Survey, Weight


@dataclass(frozen=True)
class Objection:
    """What an engine would do about one thing in a checkpoint."""

    rule: str
    outcome: str
    where: str
    what: str
    source: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {"rule": self.rule, "outcome": self.outcome, "where": self.where, "what": self.what} | {
            "source": self.source
        }


@dataclass(frozen=True)
class Verdict:
    """What an engine would do with a checkpoint, and why."""

    engine: Engine
    reads: str
    scheme: str
    objections: tuple[Objection, ...]

    @property
    def outcome(self) -> str:
        """ "loads", "loads wrongly" or "refuses": the worst of the objections, cautions aside."""
        worst = max((OUTCOMES.index(o.outcome) for o in self.objections), default=0)
        return "loads" if worst == 0 else OUTCOMES[worst]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "engine": self.engine,
            "outcome": self.outcome,
            "reads": self.reads,
            "scheme": self.scheme,
            "objections": [objection.to_json() for objection in self.objections],
        }


def parse_engines(text: str) -> tuple[Engine, ...]:
    """Engines from a comma-separated list; "all" for each.

    Raises:
        CheckpointError: an unknown name.
    """
    known: dict[str, Engine] = {engine: engine for engine in ENGINES}
    wanted = [part.strip().lower() for part in text.split(",") if part.strip()]
    wanted = list(ENGINES) if wanted == ["all"] else wanted
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise CheckpointError(
            f"--for {text}: no engine {', '.join(unknown) or 'named'}; choose from {', '.join(ENGINES)}, or all"
        )
    return tuple(dict.fromkeys(known[name] for name in wanted))


def judge(
    found: Survey,
    engines: Sequence[Engine] = ENGINES,
    tensor_parallel: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    histograms: Mapping[str, Tensor] | None = None,
) -> list[Verdict]:
    """What each engine would do; reads scales, but no elements.

    histograms: of block-scale bytes, as `scale_histograms` gives them, where they are known already.

    Raises:
        CheckpointError: a tensor cannot be read, or neither config nor tensors are of NVFP4 or MXFP8.
    """
    declarations = {engine: declared_for(found, engine) for engine in engines}
    if not found.weights and not any(d is not None and d.scheme in SCHEMES for d in declarations.values()):
        schemes = ", ".join(sorted({"nothing" if d is None else d.scheme for d in declarations.values()}))
        raise CheckpointError(
            f"{found.checkpoint.directory}: declares {schemes} and has no weight in NVFP4 or MXFP8; this knows no other"
        )
    histograms = scale_histograms(found, progress) if histograms is None else histograms
    verdicts = []
    for engine in engines:
        declared = declarations[engine]
        if declared is None:
            what = "no quantization is declared, so the engine builds a model in high precision"
            outcomes = {_undeclared(weight, engine) for weight in found.weights}
            objections = tuple(
                Objection("names", outcome, "config.json", what, f"{READ[engine]}, its reader of quantization_config")
                for outcome in sorted(outcomes, key=OUTCOMES.index)[-1:]
            )
            verdicts.append(Verdict(engine, "config.json", "none", objections))
            continue
        case = Case(found, engine, declared, tensor_parallel, histograms)
        verdicts.append(Verdict(engine, declared.file, declared.scheme, tuple(_objections(case))))
    return verdicts


def _undeclared(weight: Weight, engine: Engine) -> str:
    """What becomes of a quantized weight in a model that is built in high precision.

    vLLM knows no such name; elsewhere what has another name is left out, and elements of 8 bits are cast.
    """
    fits = isinstance(weight.format, MXFP8) or (
        weight.spelling.layout == "compressed-tensors" and engine != "tensorrt-llm"
    )
    return WRONG if fits and engine != "vllm" else REFUSES


def _objections(case: Case) -> Iterator[Objection]:
    declared, engine = case.declared, case.engine
    if declared.scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        what = f"declares {declared.scheme!r}, which is none of the schemes of NVFP4 and MXFP8: {known}"
        yield Objection("scheme", REFUSES, declared.file, what, READ[engine])
        return
    if (found := SCHEMES[declared.scheme].get(engine)) is not None:
        what = f"{declared.scheme}: {engine} {found.why}"
        yield Objection("scheme", found.outcome, declared.file, what, f"{READ[engine]}, {found.source}")
        if found.outcome == REFUSES:
            return  # nothing is read after that
    for rule in RULES:
        if (answer := rule.answer(engine, declared.method)) is not None:
            for where, what in rule.check(case):
                yield Objection(rule.name, answer.outcome, where, what, f"{READ[engine]}, {answer.source}")
