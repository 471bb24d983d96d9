"""Narrow products that share a factor or a sum, joined in what is compiled.

The queries, keys and values of a block read one input, and so do the adapters beside them. A LoRA's products are as
narrow as its rank: they take the time in which their inputs are read and their outputs written, whatever they compute.
So three of them that read the same take the time of three, and their join that of one:

- x A_q, x A_k, x A_v                  ->  x [A_q A_k A_v], forward
- g_q^T x, g_k^T x, g_v^T x            ->  [g_q g_k g_v]^T x, the gradients of the factors
- g_q A_q^T + g_k A_k^T + g_v A_v^T    ->  [g_q g_k g_v] [A_q A_k A_v]^T, the gradient of the input

The compiler has the whole block before it, so this is a pass over its graph: modules, names of weights, files and what
is not compiled stay as they are. The first two change no number but by the order in which a library sums; the third
rounds a sum once where it rounded each product and each partial sum.

The base's own products are left alone. They are bound by arithmetic, so reading their input once would spare nothing; a
join of three gradients in 8 bits would have one scale for a row of all three.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

WIDEST = 256  # a side up to this is narrow: ranks beyond it are bound by arithmetic as the base is
_ATEN = torch.ops.aten
MM, ADD, CAT = _ATEN.mm.default, _ATEN.add.Tensor, _ATEN.cat.default
# What leaves the numbers of a product as they are, or rounds them.
THROUGH = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip
COUNTER = "qif_joined_products"


class JoinNarrowProducts(CustomGraphPass):
    """The pass, as inductor's `post_grad_custom_pre_pass` takes it."""

    def __call__(self, graph: Graph) -> None:
        """Join what can be joined, in place."""
        for kind in (_same_first, _same_second, _summed):
            # One at a time: what depends on what changes by each join.
            while (found := next(kind(graph), None)) is not None:
                found()
                counters[COUNTER][kind.__name__] += 1
                torch._inductor.pattern_matcher.stable_topological_sort(graph)
        graph.eliminate_dead_code()
        graph.lint()

    def uuid(self) -> Any:
        """For the compiler's cache of what it made: another text of this file is another pass."""
        return get_hash_for_files((__file__,))


Join = Callable[[], None]


def _same_first(graph: Graph) -> Iterator[Join]:
    """(rows, k) times (k, n) with small n, one first factor."""
    for products in _groups(graph, shared=0, narrow=lambda first, second: second[1], wide=lambda first: first):
        yield lambda products=products: _join(graph, products, side=1)  # type: ignore[misc]


def _same_second(graph: Graph) -> Iterator[Join]:
    """(m, k) times (k, n) with small m, one second factor."""
    for products in _groups(graph, shared=1, narrow=lambda first, second: first[0], wide=lambda second: second):
        yield lambda products=products: _join(graph, products, side=0)  # type: ignore[misc]


def _groups(
    graph: Graph, shared: int, narrow: Callable[[Any, Any], Any], wide: Callable[[Any], Any]
) -> Iterator[list[Node]]:
    """Products of one factor, the first (0) or the second (1), that wait for none of each other."""
    by_factor: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is MM:
            shapes = [_shape(factor) for factor in node.args]
            if _is_narrow(narrow(*shapes), wide(shapes[shared])):
                by_factor[node.args[shared]].append(node)
    for products in by_factor.values():
        if len(group := _independent(graph, products)) > 1:
            yield group


def _join(graph: Graph, products: list[Node], side: int) -> None:
    """One product in place of several that share a factor; each of them becomes a slice of it.

    Args:
        side: 1: their second factors are put side by side; 0: their first ones one below the other.
    """
    with graph.inserting_before(products[-1]):
        others = _call(graph, CAT, [product.args[side] for product in products], side)
        shared = products[0].args[1 - side]
        joined = _call(graph, MM, *((shared, others) if side else (others, shared)))
        begin = 0
        for product in products:
            end = begin + _shape(product)[side]
            part = _call(graph, _ATEN.slice.Tensor, joined, side, begin, end)
            product.replace_all_uses_with(part)
            graph.erase_node(product)
            begin = end


def _summed(graph: Graph) -> Iterator[Join]:
    """Terms (rows, k) times (k, n) with small k, of one sum."""
    for root in graph.nodes:
        if not _is_sum(root) or any(_is_sum(user) and _alike(user, root) for user in root.users):
            continue
        by_kind: dict[Any, list[tuple[Node, Node]]] = defaultdict(list)
        for product, addition in _terms(root):
            by_kind[str(_shape(product)), product.meta["val"].dtype].append((product, addition))
        for terms in by_kind.values():
            group = _independent(graph, [product for product, _ in terms])
            if len(group) > 1:
                additions = dict(terms)
                yield lambda group=group, additions=additions: _join_sum(graph, group, additions)  # type: ignore[misc]


def _terms(addition: Node) -> Iterator[tuple[Node, Node]]:
    """Narrow products among the terms of a sum, each with the addition that it is an argument of."""
    for term in addition.args[:2]:
        if not isinstance(term, Node) or len(term.users) > 1 or not _alike(term, addition):
            continue
        if _is_sum(term):
            yield from _terms(term)
            continue
        product = term
        while product.target in THROUGH and len(product.all_input_nodes[0].users) == 1:
            product = product.all_input_nodes[0]
        if product.target is MM and _is_narrow(_shape(product.args[0])[1], _shape(product)):
            yield product, addition


def _join_sum(graph: Graph, products: list[Node], additions: dict[Node, Node]) -> None:
    """The last of the products becomes all of them; the others leave the sum."""
    *others, last = products
    with graph.inserting_before(last):
        first = _call(graph, CAT, [product.args[0] for product in products], 1)
        second = _call(graph, CAT, [product.args[1] for product in products], 0)
        last.replace_all_uses_with(_call(graph, MM, first, second))
        graph.erase_node(last)
    for product in others:
        addition = additions[product]
        [rest] = (term for term in addition.all_input_nodes if not _comes_from(term, product))
        around = next(iter(addition.users), addition)  # of which the other term is an argument from now on
        addition.replace_all_uses_with(rest)
        graph.erase_node(addition)
        additions.update({each: around for each, where in additions.items() if where is addition})


def _comes_from(term: Any, product: Node) -> bool:
    while term is not product and term.target in THROUGH:
        term = term.args[0]
    return term is product


def _is_sum(node: Node) -> bool:
    return node.op == "call_function" and node.target is ADD and not node.kwargs


def _alike(node: Node, other: Node) -> bool:
    """Of one shape and dtype."""
    one, two = node.meta.get("val"), other.meta.get("val")
    return one is not None and two is not None and one.shape == two.shape and one.dtype == two.dtype


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_narrow(side: Any, others: Iterable[Any]) -> bool:
    """Whether a side is known, and small beside the others; those that are variables are large."""
    return isinstance(side, int) and side <= WIDEST and all(not isinstance(o, int) or side < o for o in others)


def _independent(graph: Graph, products: list[Node]) -> list[Node]:
    """Those of them, from the first on, none of which waits for the result of another."""
    if len(products) < 2:
        return products
    bits = {product: 1 << number for number, product in enumerate(products)}
    waits: dict[Node, int] = {}  # which products each node waits for, itself included
    for node in graph.nodes:
        waits[node] = bits.get(node, 0)
        for needed in node.all_input_nodes:
            waits[node] |= waits[needed]
    chosen: list[Node] = []
    for product in products:
        if not any(waits[product] & bits[other] for other in chosen):
            chosen.append(product)
    return chosen


def _call(graph: Graph, operator: Any, *arguments: Any) -> Node:
    """A new node, with what passes after this one ask of it: a tensor without memory that is like its result."""
    node = graph.call_function(operator, arguments)
    node.meta["val"] = operator(*torch.fx.map_arg(arguments, lambda each: each.meta["val"]))
    return node
