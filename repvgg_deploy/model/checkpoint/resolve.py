"""The content of a file → one model in it: its state dict under official names, its architecture, what is said of it.

`resolve` gives every state dict of the file (`candidates`) official names (`names`) and an architecture (`identify`),
and chooses among the complete ones: the only one; else the one average of the model's weights; else it is refused until
`Asked.weights` says which. What was not chosen is always mentioned.
"""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass, replace

from ...errors import CheckpointError
from .averages import find_averages, is_average, is_openmmlab, is_role, swapped_by_mmengine
from .candidates import Candidate, find_candidates
from .containers import Content
from .identify import Asked, Embedded, Resolved, identify, read_embedded
from .lazy import LazyTensor, MalformedError, count_held, listing, load_each, printable
from .names import Translation, translate
from .objects import ForeignObject

_MAX_COMPARED = 8
_MAX_ATTEMPTS = 256


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One model of one state dict, and what came of it: `found`, or the `problem` with it."""

    candidate: Candidate
    translation: Translation
    key: str
    averaged: bool
    unclear: bool = False
    found: Resolved | None = None
    problem: CheckpointError | None = None


def resolve(content: Content, asked: Asked) -> Resolved:
    """Chooses and identifies the model.

    Args:
        content: As `containers.read_file` gives it.
        asked: What the caller says of it.

    Raises:
        CheckpointError: No RepVGG is in the file, it is incomplete or of another architecture, or holds several of
            which none is the one to take.
    """
    try:
        candidates = find_candidates(content.root)
    except MalformedError as error:
        remedy = "save the state dict alone: torch.save(model.state_dict(), …)"
        raise CheckpointError(f"cannot be read: {error}", remedy=remedy) from error
    if not candidates:
        raise _no_tensors(content)
    try:
        return _choose(content, candidates, asked)
    except CheckpointError as error:
        if not content.suspicious:
            raise
        # Whoever is told only that a tensor is missing may go on to open the file with a program that runs its code.
        raise CheckpointError(
            f"{error.message}; {_security_notes(content)[0]}",
            remedy="do not open it elsewhere: it may be made to run code on your machine; where you trust its source, "
            f"{error.remedy}",
        ) from error


def _choose(content: Content, candidates: list[Candidate], asked: Asked) -> Resolved:
    """Every complete model of the file, then the one to take."""
    embedded = read_embedded(content)
    attempts, first = _attempt_all(content, [c for c in candidates if not c.merged], asked=asked, embedded=embedded)
    if not any(attempt.found and not attempt.found.headless for attempt in attempts):
        side_by_side = [candidate for candidate in candidates if candidate.merged]
        merged, _ = _attempt_all(content, side_by_side, asked=asked, embedded=embedded)
        attempts = [attempt for attempt in merged if attempt.found and not attempt.found.headless] or attempts
    if not attempts:
        assert first is not None  # every candidate gives an attempt or an error
        raise first
    attempts = _with_averages(content, attempts, candidates, asked=asked, embedded=embedded)
    complete = [attempt for attempt in attempts if attempt.found]
    if not complete:
        raise _best_problem(attempts)
    chosen = _pick(complete, attempts, asked.weights)
    assert chosen.found is not None
    notes = [*_security_notes(content), *_choice_notes(chosen, complete, attempts)]
    others = tuple(attempt.key for attempt in complete if attempt is not chosen)
    return replace(chosen.found, notes=(*notes, *chosen.found.notes), others=others)


def _attempt_all(
    content: Content, candidates: list[Candidate], *, asked: Asked, embedded: Embedded
) -> tuple[list[_Attempt], CheckpointError | None]:
    """Each model of each state dict; and, of those that are none, the error of the largest."""
    attempts: list[_Attempt] = []
    errors: list[tuple[int, CheckpointError]] = []
    swapped = swapped_by_mmengine(content.root)
    for candidate in candidates:
        if len(attempts) > _MAX_ATTEMPTS:
            remedy = "save the state dict of one model in a file of its own"
            raise CheckpointError(f"holds more than {_MAX_ATTEMPTS} models, expected a few", remedy=remedy)
        try:
            translations = translate({n: t.shape for n, t in candidate.tensors.items()}, numpy=content.numpy)
        except CheckpointError as error:
            errors.append((len(candidate.tensors), error))
            continue
        for translation in translations:
            key = ".".join(part for part in (candidate.where, translation.prefix.rstrip(".")) if part) or "."
            averaged = is_average(key) if not swapped else key.split(".")[0] == "state_dict"
            attempt = _Attempt(candidate, translation, key, averaged, is_role(key))
            attempts.append(_identified(attempt, asked, embedded))
    largest = max(errors, key=lambda pair: pair[0], default=(0, None))
    return attempts, largest[1]


def _identified(attempt: _Attempt, asked: Asked, embedded: Embedded) -> _Attempt:
    try:
        return replace(
            attempt, found=identify(attempt.candidate, attempt.translation, asked, embedded=embedded, key=attempt.key)
        )
    except CheckpointError as error:
        return replace(attempt, problem=error)


def _with_averages(
    content: Content, attempts: list[_Attempt], candidates: list[Candidate], *, asked: Asked, embedded: Embedded
) -> list[_Attempt]:
    """The models of a file, and averages of their parameters that are kept in other shapes than a state dict's."""
    done = [attempt.candidate for attempt in attempts if attempt.found]
    apart = [candidate for candidate in candidates if not candidate.merged and not any(candidate is c for c in done)]
    parts = [(a.key, a.candidate.tensors, a.translation.names) for a in attempts if a.averaged and not a.found]
    result = []
    for given in attempts:
        attempt, averages = given, []
        if not attempt.averaged:
            model, translation = attempt.candidate, attempt.translation
            openmmlab = is_openmmlab(content.root)
            averages = find_averages(model, translation, parts, [model, *apart], openmmlab=openmmlab)
            spent = {name for average in averages for name in average.spent}
            if spent:
                extra = tuple(name for name in translation.extra if name not in spent)
                unclear = any(average.unclear for average in averages)
                plain = replace(attempt, translation=replace(translation, extra=extra), unclear=unclear, problem=None)
                attempt = _identified(plain, asked, embedded)
        result.append(attempt)
        for average in averages if attempt.found else ():
            translation = attempt.translation
            translation = replace(translation, notes=(*translation.notes, average.note))
            candidate = replace(attempt.candidate, tensors={**attempt.candidate.tensors, **average.tensors})
            made = _Attempt(candidate, translation, average.key, not average.unclear, average.unclear)
            result.append(_identified(made, asked, embedded))
    found = {attempt.key for attempt in result if attempt.found}
    return [attempt for attempt in result if attempt.found or attempt.key not in found]


def _best_problem(attempts: list[_Attempt]) -> CheckpointError:
    """The problem of the raw model of the file that has most of a RepVGG's names."""
    best = max(attempts, key=lambda attempt: (len(attempt.translation.names), not attempt.averaged))
    assert best.problem is not None
    return best.problem


def _pick(complete: list[_Attempt], attempts: list[_Attempt], weights: str | None) -> _Attempt:
    """The model to take: the one asked for, the only one, or the only average."""
    if weights is not None:
        wanted = weights.strip(".") or "."
        named = [a for a in attempts if a.key == wanted] or [
            a for a in attempts if a.key.startswith(f"{wanted}.") or a.candidate.where == wanted
        ]
        if len([a for a in named if a.found]) == 1:
            return next(a for a in named if a.found)
        if len(named) == 1 and named[0].problem is not None:
            raise named[0].problem
        message = f"has {len(named) or 'no'} models under {printable(weights)!r}; complete are: {_keys(complete)}"
        raise CheckpointError(message, remedy=f"give --weights {_key(complete[0])}")
    averages = [attempt for attempt in complete if attempt.averaged]
    if len(complete) == 1 or _all_equal(complete):
        return complete[0]
    if len(averages) == 1 and not any(attempt.unclear for attempt in complete):
        return averages[0]
    reason = "none is an average of the others"
    if len(averages) > 1:
        reason = f"{len(averages)} are averages"
    elif any(attempt.unclear and not is_role(attempt.key) for attempt in complete):
        reason = "mmcv's EMAHook swaps the two where it runs before the file is saved, which the file does not tell"
    ways = " or ".join(f"--weights {_key(attempt)}" for attempt in complete[:4])
    raise CheckpointError(
        f"holds {len(complete)} complete sets of weights, and {reason}: {_keys(complete)}", remedy=f"say which: {ways}"
    )


def _key(attempt: _Attempt) -> str:
    return shlex.quote(printable(attempt.key))


def _keys(attempts: list[_Attempt]) -> str:
    return listing([attempt.key for attempt in attempts], 8)


def _all_equal(complete: list[_Attempt]) -> bool:
    """Whether all sets hold the same numbers, as where a file keeps one state dict twice."""
    first = complete[0].found
    assert first is not None
    if len(complete) > _MAX_COMPARED:
        return False
    for attempt in complete[1:]:
        assert attempt.found is not None
        mine, theirs = first.tensors, attempt.found.tensors
        if attempt.found.form != first.form or attempt.found.spec != first.spec or set(mine) != set(theirs):
            return False
        pairs = [(one, theirs[name]) for name, one in mine.items() if not name.endswith(".num_batches_tracked")]
        different = [(one, two) for one, two in pairs if one is not two]
        if not _hold_equal([(one, two) for one, two in different if one is not None and two is not None]):
            return False
        if any(one is None or two is None for one, two in different):
            return False
    return True


def _hold_equal(pairs: list[tuple[LazyTensor, LazyTensor]]) -> bool:
    """Whether the two tensors of each pair hold the same numbers; False where that cannot be told."""
    if any(one.dtype != two.dtype for one, two in pairs) or (pairs and importlib.util.find_spec("torch") is None):
        return False
    # A few bytes that pose as many numbers are refused where they are loaded.
    if any(sum(tensor.nbytes for tensor in side) > count_held(side) for side in zip(*pairs, strict=True)):
        return False
    loaded = load_each([tensor for pair in pairs for tensor in pair])
    try:
        return all(one.equal(two) for one, two in zip(loaded, loaded, strict=True))
    except MalformedError:
        return False  # said where it is loaded


def _choice_notes(chosen: _Attempt, complete: list[_Attempt], attempts: list[_Attempt]) -> list[str]:
    notes = []
    if chosen.averaged:
        notes.append(f"these are averaged weights (EMA, SWA), found under {printable(chosen.key)!r}")
    others = [attempt for attempt in complete if attempt is not chosen]
    if others:
        ways = ", ".join(f"--weights {_key(attempt)}" for attempt in others[:8])
        notes.append(f"{printable(chosen.key)!r} was taken; also complete in the file, not used: {ways}")
    for attempt in attempts:
        if attempt.averaged and attempt.problem is not None:
            notes.append(f"the averaged weights in {printable(attempt.key)} were not used: {attempt.problem.message}")
    return notes


def _security_notes(content: Content) -> tuple[str, ...]:
    if not content.suspicious:
        return ()
    named = listing(sorted(content.suspicious))
    return (f"WARNING: ordinary unpickling of this file would reach for {named}; nothing was called here",)


def _no_tensors(content: Content) -> CheckpointError:
    if content.suspicious:
        return CheckpointError(
            f"is a pickle without tensors that would reach for {listing(sorted(content.suspicious))} when it is "
            f"unpickled; nothing was called",
            remedy="delete it: it is made to run code on your machine, or it is no checkpoint",
        )
    root = content.root
    what = f"an object of {printable(root.name)}" if isinstance(root, ForeignObject) else f"a {type(root).__name__}"
    what += f" with {listing(root)}" if isinstance(root, dict) and root else ""
    remedy = "save the state dict: torch.save(model.state_dict(), 'model.pth')"
    return CheckpointError(f"holds no tensors: it is {what}", remedy=remedy)
