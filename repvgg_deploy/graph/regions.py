"""Linear regions of a graph, and the cheapest way to compute each.

Every linear tensor knows its sources: the tensors through which all paths to it lead. Between a source and a result the
cheapest of these is taken: one convolution for all of it; two regions in a row; or, where branches are summed,
convolutions for some of the branches together. Cheapest is fewest multiply-accumulates, then fewest nodes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx

from .edit import GraphView
from .linear import Form, add, chain, identity, padding, read_operator, scaling

_DEEPEST = 64  # operators in a row that are looked at together; of more, the last so many
_MOST_BRANCHES = 6  # partitions of so many branches are compared one by one (203 of 6); of more, the sum of all only


@dataclass(frozen=True, slots=True)
class Plan:
    """The cheapest way found from a source to a result.

    Attributes:
        cost: Multiply-accumulates per source pixel.
        count: Nodes.
        form: The one convolution that does it; None for several nodes.
        through: Tensors in between that are made on the way: first the source's side.
        blocks: Of a sum: which terms go together.
    """

    cost: Fraction
    count: int
    form: Form | None = None
    through: str = ""
    blocks: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Term:
    """A summand: the tensor and its sign."""

    name: str
    sign: int


class Regions:
    """Which tensors are linear in which, and the cheapest plans."""

    def __init__(self, view: GraphView, unread: Collection[str] = ()) -> None:
        self.view = view
        self.inputs: dict[str, list[Term]] = {}
        """By a linear tensor: what it is made of, one term for an operator of one input."""
        self.operators: dict[str, Form] = {}
        self.sources: dict[str, list[str]] = {}
        self.refused: dict[str, str] = {}
        """By a tensor: why its operator, or all that leads to it, is no convolution."""
        self.refused |= dict.fromkeys(unread, "a border that is overwritten, and with what cannot be computed here")
        self.broken: dict[str, str] = {}
        """By a sum: why one of its branches is not linear."""
        self._owners = {inner: name for name, border in view.borders.items() for inner in border.inner}
        for node in view.nodes:
            self._read(node)
        self._sum = functools.cache(self._sum_form)

    def _read(self, node: onnx.NodeProto) -> None:
        is_constant = all(self.view.stored(name) is not None for name in node.input if name)
        if len(node.output) != 1 or node.output[0] in self._owners or is_constant:
            return
        name = node.output[0]
        if not self.view.may_be_float32(name):
            return
        if border := self.view.borders.get(name):
            form = padding(len(border.values), border.before, border.after, border.values)
            found: tuple[str, Form] | str | None = (border.data, form)
        else:
            found = read_operator(self.view, node)
        if isinstance(found, tuple):
            data, form = found
            self.inputs[name], self.operators[name] = [Term(data, 1)], form
            self.view.channels[name] = form.out_channels
            self.sources[name] = [*self.sources.get(data, []), data][-_DEEPEST:]
            return
        if node.op_type in ("Add", "Sub", "Sum") and node.domain in ("", "ai.onnx"):
            terms = [Term(data, -1 if node.op_type == "Sub" and index else 1) for index, data in enumerate(node.input)]
            own = [[*self.sources.get(term.name, []), term.name][-_DEEPEST:] for term in terms]
            common = [source for source in own[0] if all(source in other for other in own[1:])]
            shapes = [None if data in self.view.channels else self.view.shape(data) for data in node.input]
            channels = {self._channels(data) for data in node.input}
            known = all(
                data in self.view.channels or (shape is not None and len(shape) == 4)
                for data, shape in zip(node.input, shapes, strict=True)
            )
            is_image = known and None not in channels
            if is_image and common and len(channels) == 1:
                self.inputs[name], self.sources[name] = terms, common
                self.view.channels[name] = channels.pop() or 0
            elif common and None in channels and all(shape is None or len(shape) == 4 for shape in shapes):
                self.broken[name] = "the number of channels of a branch is not known"
            elif not common:
                self._blame(name, terms, is_image=is_image, shapes=shapes)
        elif isinstance(found, str):
            self.refused[name] = found

    def _blame(
        self, name: str, terms: list[Term], *, is_image: bool, shapes: list[tuple[int | None, ...] | None]
    ) -> None:
        """Says of a sum without a common source which operator, at a branch's end or before it, is no convolution."""
        for term in terms:
            first = self.sources.get(term.name, [term.name])[0]
            if first in self.refused:
                kind = self.view.made_by[first].op_type
                if is_image or (None in shapes and kind in ("Conv", "BatchNormalization", "AveragePool")):
                    self.broken[name] = f"{kind}: {self.refused[first]}"

    def _channels(self, name: str) -> int | None:
        """Of a tensor: by its operator, whose weights say it, or by its shape."""
        shape = self.view.shape(name)
        found = shape[1] if shape is not None and len(shape) == 4 else None
        return self.view.channels.get(name, found)

    def results(self) -> list[str]:
        """Linear tensors that something reads which is not linear, or that are outputs."""
        return [name for name in self.inputs if self._leaves(name)]

    def _leaves(self, name: str) -> bool:
        readers = self.view.readers.get(name, [])
        return name in self.view.kept or any(self._owner(reader) not in self.inputs for reader in readers)

    def _owner(self, reader: onnx.NodeProto) -> str:
        """What a reader makes; of a node within a padding with constants, the padding's result."""
        name: str = reader.output[0]
        return self._owners.get(name, name)

    def between(self, result: str, source: str) -> set[str]:
        """The linear tensors on the paths from a source to a result, without the source."""
        found: set[str] = set()
        stack = [result]
        while stack:
            name = stack.pop()
            if name not in found and name != source:
                found.add(name)
                stack.extend(term.name for term in self.inputs[name])
        return found

    def is_closed(self, result: str, source: str) -> bool:
        """Whether nothing outside reads what lies between, so that one convolution makes all of it superfluous."""
        inside = self.between(result, source)
        return not any(
            self._leaves(name) or any(self._owner(reader) not in inside for reader in self.view.readers[name])
            for name in inside - {result}
        )

    def form(self, result: str, source: str) -> Form | str:
        """The whole way as one convolution, or why not."""
        if result == source:
            shape = self.view.shape(source)
            assert shape is not None and shape[1] is not None
            return identity(shape[1])
        return self._form(result, source)

    @functools.cache  # noqa: B019  (lives as long as one fold)
    def _form(self, result: str, source: str) -> Form | str:
        if result in self.operators:
            before = self.inputs[result][0].name
            first = None if before == source else self.form(before, source)
            if isinstance(first, str):
                return first
            if first is None:
                alone = self.operators[result]
                return alone if alone.border is None else "a padding with constants is no convolution by itself"
            return chain(first, self.operators[result])
        return self._sum(source, tuple(self.inputs[result]))

    def _sum_form(self, source: str, terms: tuple[Term, ...]) -> Form | str:
        forms: list[Form] = []
        for term in terms:
            form = self._term_form(term, source)
            if isinstance(form, str):
                return form
            forms.append(form)
        return add(forms)

    def _term_form(self, term: Term, source: str) -> Form | str:
        form = self.form(term.name, source)
        if isinstance(form, str) or term.sign == 1:
            return form
        minus = scaling(-np.ones(form.out_channels), np.zeros(form.out_channels))
        return chain(form, minus)

    def terms(self, result: str, source: str) -> list[Term]:
        """The summands of a sum; sums between it and the source that only it reads, once, are opened."""
        found: list[Term] = []
        inputs = self.inputs[result]
        for term in inputs:
            name = term.name
            is_sum = name in self.inputs and name not in self.operators and name != source
            alone = len(self.view.readers.get(name, [])) == 1 and not self._leaves(name)
            if is_sum and alone and [other.name for other in inputs].count(name) == 1:
                found += [Term(inner.name, inner.sign * term.sign) for inner in self.terms(name, source)]
            else:
                found.append(term)
        return found

    @functools.cache  # noqa: B019
    def best(self, result: str, source: str) -> Plan:
        """The cheapest way from a source to a result."""
        if result == source:
            return Plan(Fraction(0), 0)
        plans = list(self._split(result, source))
        if result in self.operators and self.inputs[result][0].name == source:
            plans.append(self.as_it_is(result))
        elif result not in self.operators:
            plans += self._in_blocks(result, source)
        if self.is_closed(result, source) and self._is_worth_it(result, source):
            form = self.form(result, source)
            if isinstance(form, Form):
                plans.append(Plan(Fraction(form.macs, form.area), 1, form))
            else:
                self.refused.setdefault(result, form)
        # The first of equals: what stands already, before a convolution that gains nothing.
        return min(plans, key=lambda plan: (plan.cost, plan.count))

    def _is_worth_it(self, result: str, source: str) -> bool:
        """Whether there is a convolution or pooling to fold into: scalings alone stay what they are."""
        names = self.between(result, source)
        return len(names) > 1 and any(self.view.made_by[name].op_type in ("Conv", "AveragePool") for name in names)

    def as_it_is(self, result: str) -> Plan:
        """An operator of one input as it stands."""
        form = self.operators[result]
        free = self.view.made_by[result].op_type in ("Identity", "Pad") or form.border is not None
        return Plan(Fraction(0) if free else Fraction(form.macs, form.area), 1)

    def _split(self, result: str, source: str) -> Iterator[Plan]:
        own = self.sources[result]
        for middle in own[own.index(source) + 1 :]:
            first, second = self.best(middle, source), self.best(result, middle)
            form = self.form(middle, source)
            area = form.area if isinstance(form, Form) else self.area(middle, source)
            yield Plan(first.cost + second.cost / area, first.count + second.count, through=middle)

    def area(self, result: str, source: str) -> int:
        """Source pixels for one pixel of the result, also where it is no convolution of the source."""
        area = 1
        while result != source:
            if result in self.operators:
                area *= self.operators[result].area
            result = self.inputs[result][0].name
        return area

    def _in_blocks(self, result: str, source: str) -> Iterator[Plan]:
        terms = self.terms(result, source)
        area, channels = self.area(result, source), (self.view.shape(result) or (0, 0))[1] or 0
        everything = range(len(terms))
        for blocks in (
            _partitions(tuple(everything)) if len(terms) <= _MOST_BRANCHES else [tuple((i,) for i in everything)]
        ):
            if len(blocks) == 1:
                continue  # that is the one convolution for all
            cost, count = Fraction(channels * (len(blocks) - 1), area), len(blocks) - 1
            for block in blocks:
                plan = self.block_plan(tuple(terms[index] for index in block), source)
                if plan is None:
                    break
                cost, count = cost + plan.cost, count + plan.count
            else:
                yield Plan(cost, count, blocks=blocks)

    def block_plan(self, terms: tuple[Term, ...], source: str) -> Plan | None:
        """The cheapest way to some summands of a sum together; None where they are no convolution."""
        if len(terms) == 1:
            return self.best(terms[0].name, source)
        inside = set().union(*(self.between(term.name, source) for term in terms))
        names = {term.name for term in terms} - {source}
        if not any(self.view.made_by[name].op_type in ("Conv", "AveragePool") for name in inside):
            return None
        for name in inside:
            outside = [reader for reader in self.view.readers[name] if self._owner(reader) not in inside]
            if self._leaves(name) or (outside and (name not in names or len(self.view.readers[name]) > 1)):
                return None
        form = self._sum(source, terms)
        return Plan(Fraction(form.macs, form.area), 1, form) if isinstance(form, Form) else None


def _partitions(items: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """All ways to put items into blocks, single ones first."""
    if not items:
        yield ()
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for chosen in itertools.combinations(rest, size):
            left = tuple(item for item in rest if item not in chosen)
            for others in _partitions(left):
                yield ((first, *chosen), *others)
