"""Linear regions of an ONNX graph → fewer convolutions, found by algebra, whatever the network's classes are called.

A region has one source and one result, and nothing outside it reads what lies between. `regions` finds the cheapest way
to compute each, so that nothing becomes slower; here it is written, and each fold is computed beside the region that it
replaces (`prove`), in float64, before it is taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import ParityError
from .border import find_borders
from .edit import GraphView, attributes, drop_unread, sum_stacks
from .linear import Form
from .prove import TOLERANCE, measure_fold
from .regions import Plan, Regions, Term


@dataclass(frozen=True, slots=True)
class Fold:
    """One region that became a convolution.

    Attributes:
        output: The tensor that the convolution makes now.
        source: The tensor that it reads.
        replaced: Names (or, where a node has none, outputs) of the nodes that it replaces.
        branches: Paths that were summed; 1 for a sequence.
        kernels_before: Each convolution and pooling in the region, such as `3×3 depthwise dilated by 2`.
        kernel_after: The folded convolution, in the same words.
        error: Largest difference from the region, as a share of the sum of the absolute values of its terms.
        macs_before: Multiply-accumulates per source pixel; BatchNorm, Mul, Add count as one per element.
        macs_after: Likewise.
        bytes_saved: Of float32 weights.
    """

    output: str
    source: str
    replaced: tuple[str, ...]
    branches: int
    kernels_before: tuple[str, ...]
    kernel_after: str
    error: float
    macs_before: Fraction
    macs_after: Fraction
    bytes_saved: int

    @property
    def kernels(self) -> str:
        """Kernels before and after, such as `2 of 3×3 + 1×1 → 3×3 depthwise`; what holds for all is said once."""
        before, shared = list(self.kernels_before), " depthwise"
        if all(kind.endswith(shared) for kind in (*before, self.kernel_after)):
            before = [kind.removesuffix(shared) for kind in before]
        counts = Counter(before)
        return f"{' + '.join(f'{n} of {kind}' if n > 1 else kind for kind, n in counts.items())} → {self.kernel_after}"


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What `fold_branches` did.

    Attributes:
        folds: In the order of the graph.
        left: Sums of branches that remain, by the name of their tensor, and why.
    """

    folds: tuple[Fold, ...]
    left: tuple[tuple[str, str], ...]


def fold_branches(model: onnx.ModelProto) -> tuple[onnx.ModelProto, FoldReport]:
    """Writes each linear region with the fewest multiply-accumulates.

    Args:
        model: FP32, opset 11 or newer, with topologically ordered nodes; it is not changed.

    Returns:
        The folded model and what was done. Without anything to fold, the nodes are those of before.

    Raises:
        ParityError: A fold differs from the region that it was to replace: a fault of this program.
    """
    view = GraphView(sum_stacks(drop_unread(model)))
    view.borders, unread = find_borders(view)
    regions = Regions(view, unread)
    writer = _Writer(view, regions)
    for node in view.nodes:
        if not any(output in regions.inputs for output in node.output):
            writer.keep(node)
    for name in regions.results():
        writer.write(name)
    folded = view.rebuild(writer.nodes, writer.initializers)
    return folded, FoldReport(tuple(writer.folds), tuple(writer.left(folded)))


class _Writer:
    """Nodes of the folded graph."""

    def __init__(self, view: GraphView, regions: Regions) -> None:
        self._view, self._regions = view, regions
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.folds: list[Fold] = []
        self._written: set[str] = set()

    def keep(self, node: onnx.NodeProto) -> None:
        """A node stays as it is."""
        if not any(output in self._written for output in node.output):
            self._written.update(node.output)
            self.nodes.append(node)

    def write(self, name: str) -> None:
        """A tensor is to be made, in the cheapest way from its topmost source; and that source, too."""
        while name in self._regions.inputs and name not in self._written:
            source = self._regions.sources[name][0]
            self._follow(name, source)
            name = source

    def _follow(self, result: str, source: str) -> None:
        if result == source or result in self._written:
            return
        plan = self._regions.best(result, source)
        if plan.through:
            self._follow(plan.through, source)
            self._follow(result, plan.through)
        elif plan.form is not None:
            self._convolve((Term(result, 1),), source, plan.form, result)
        elif plan.blocks:
            self._sum(result, source, plan)
        else:
            self.keep(self._view.made_by[result])

    def _sum(self, result: str, source: str, plan: Plan) -> None:
        terms = self._regions.terms(result, source)
        made: list[Term] = []
        for block in plan.blocks:
            chosen = tuple(terms[index] for index in block)
            if len(chosen) == 1:
                self._follow(chosen[0].name, source)
                made.append(chosen[0])
            else:
                best = self._regions.block_plan(chosen, source)
                assert best is not None and best.form is not None
                name = self._view.new_name(result)
                self._convolve(chosen, source, best.form, name)
                made.append(Term(name, 1))
        if all(len(block) == 1 for block in plan.blocks):
            for name in self._sums_within(result, source):
                self.keep(self._view.made_by[name])
            return
        self._add(result, sorted(made, key=lambda term: -term.sign))

    def _sums_within(self, result: str, source: str) -> list[str]:
        inner = [
            t.name
            for t in self._regions.inputs[result]
            if t.name not in {x.name for x in self._regions.terms(result, source)}
        ]
        return [result, *(name for each in inner for name in self._sums_within(each, source))]

    def _add(self, result: str, terms: Sequence[Term]) -> None:
        if terms[0].sign < 0:  # all are subtracted
            minus = self._view.new_name(result)
            self.nodes.append(helper.make_node("Neg", [terms[0].name], [minus], name=minus))
            terms = [Term(minus, 1), *terms[1:]]
        left = terms[0].name
        for index, term in enumerate(terms[1:], 2):
            output = result if index == len(terms) else self._view.new_name(result)
            kind = "Add" if term.sign > 0 else "Sub"
            self.nodes.append(helper.make_node(kind, [left, term.name], [output], name=f"{output}.{kind.lower()}"))
            left = output
        self._written.add(result)

    def _convolve(self, terms: tuple[Term, ...], source: str, form: Form, output: str) -> None:
        full, shift = form.weights()
        rows, columns = form.rows, form.columns
        kernel = np.ascontiguousarray(full[:, :, :: rows.step, :: columns.step], np.float32)
        bias = shift.astype(np.float32)
        weight_name, bias_name = self._view.new_name(f"{output}.weight"), self._view.new_name(f"{output}.bias")
        self.initializers += [numpy_helper.from_array(kernel, weight_name), numpy_helper.from_array(bias, bias_name)]
        node = helper.make_node(
            "Conv",
            [source, weight_name, bias_name],
            [output],
            name=f"{output}.conv",
            kernel_shape=kernel.shape[2:],
            group=form.groups,
            strides=[rows.stride, columns.stride],
            dilations=[rows.step, columns.step],
            pads=[rows.pads[0], columns.pads[0], rows.pads[1], columns.pads[1]],
        )
        self.nodes.append(node)
        self._written.add(output)
        weights = (kernel.astype(np.float64), bias.astype(np.float64))
        error = measure_fold(self._view, [(t.name, t.sign) for t in terms], source, folded=node, weights=weights)
        if not error <= TOLERANCE:
            raise ParityError(
                f"{output}: the folded convolution differs from its region by {error:.1e} of the sum of absolute terms",
                remedy="this is a fault of repvgg-deploy: please report it, with the ONNX",
            )
        inside = set().union(*(self._regions.between(term.name, source) for term in terms))
        replaced = [n for n in self._view.nodes if n.output and n.output[0] in inside]
        stored = [tensor for tensor in map(self._view.stored, _weights_of(replaced)) if tensor is not None]
        before = sum(math.prod(tensor.dims) for tensor in stored)
        self.folds.append(
            Fold(
                output=output,
                source=source,
                replaced=tuple(n.name or n.output[0] for n in replaced),
                branches=len(terms) if len(terms) > 1 else _count_branches(self._regions, terms[0].name, source),
                kernels_before=tuple(
                    _describe(self._view, n) for n in replaced if n.op_type in ("Conv", "AveragePool")
                ),
                kernel_after=_describe_kernel(kernel.shape, form.groups, (rows.step, columns.step)),
                error=error,
                macs_before=sum((self._cost(name, source) for name in inside), Fraction(0)),
                macs_after=Fraction(form.macs, form.area),
                bytes_saved=4 * (before - kernel.size - bias.size),
            )
        )

    def _cost(self, name: str, source: str) -> Fraction:
        """Multiply-accumulates of one node per source pixel."""
        if name in self._regions.operators:
            before = self._regions.inputs[name][0].name
            return self._regions.as_it_is(name).cost / self._regions.area(before, source)
        channels = (self._view.shape(name) or (0, 0))[1] or 0
        return Fraction(channels * (len(self._regions.inputs[name]) - 1), self._regions.area(name, source))

    def left(self, folded: onnx.ModelProto) -> Iterator[tuple[str, str]]:
        """Sums of branches that are still there, with the reason."""
        yield from self._regions.broken.items()
        still = {output for node in folded.graph.node for output in node.output}
        for name, terms in self._regions.inputs.items():
            branches = self._regions.between(name, self._regions.sources[name][-1])
            branching = any(self._view.made_by[inner].op_type in ("Conv", "AveragePool") for inner in branches)
            if len(terms) > 1 and branching and name in still and self._view.made_by[name] in self.nodes:
                reason = self._regions.refused.get(name)
                yield (
                    name,
                    reason or "one convolution would need more multiply-accumulates, or other nodes read its branches",
                )


def _weights_of(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The constants that some nodes read, once each."""
    return list(dict.fromkeys(name for node in nodes for name in node.input if name))


def _count_branches(regions: Regions, result: str, source: str) -> int:
    """Summands of the last sum of a region; 1 where it has none."""
    name = result
    while name != source and name in regions.operators:
        name = regions.inputs[name][0].name
    return 1 if name == source else len(regions.terms(name, source))


def _describe(view: GraphView, node: onnx.NodeProto) -> str:
    named = attributes(node)
    if node.op_type == "AveragePool":
        return "average pooling " + "×".join(str(n) for n in named["kernel_shape"])
    kernel = view.stored(node.input[1])
    assert kernel is not None
    dilations = tuple(named.get("dilations") or (1, 1))
    return _describe_kernel(tuple(kernel.dims), int(named.get("group", 1)), dilations)


def _describe_kernel(shape: tuple[int, ...], groups: int, dilations: tuple[int, ...]) -> str:
    text = f"{shape[2]}×{shape[3]}"
    if groups > 1:
        text += " depthwise" if shape[1] == 1 and groups == shape[0] else f" in {groups} groups"
    return text if set(dilations) == {1} else f"{text} dilated by {dilations[0]}"
