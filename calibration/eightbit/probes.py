"""Outputs more of a graph, which tell what its values are while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Probes:
    """Adds outputs to an `onnx_ir` graph. given: those that it added. values: all values of the graph, by name."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self.values = {str(value.name): value for value in graph.inputs}
        self.values |= {str(made.name): made for node in graph for made in node.outputs}
        self.given: list[Any] = []

    def constant(self, name: str, numbers: Any) -> Any:
        """An int64 initializer called `name`, the one that is there or a new one."""
        import onnx_ir

        found = self._graph.initializers.get(name)
        if found is None:
            found = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(numbers, np.int64), name=name))
            self._graph.register_initializer(found)
        return found

    def give(
        self, name: str, after: Any, make: Callable[[Any, Any], None], dtype: Any, shape: Sequence[int | None]
    ) -> None:
        """Add the output `name`. `make(tape, output)` writes its nodes, which follow the node `after`, None: all else
        follows them.
        """
        import onnx_ir

        tape = onnx_ir.tape.Tape()
        output = onnx_ir.val(name, dtype, shape)
        make(tape, output)
        self._graph.outputs.append(output)
        self.given.append(output)
        if after is None:
            self._graph.insert_before(self._graph[0], tape.nodes)
        else:
            self._graph.insert_after(after, tape.nodes)

    def sample(self, value: Any, shape: Sequence[int], most: int, tape: Any, output: Any) -> None:
        """Let `output` be up to about twice `most` of the first axis of `value` in `shape`, at an even distance.

        The distance is odd: with an even one, columns of a picture or channels would be left out as a whole.
        """
        name = ",".join(map(str, shape))
        zero, one, end = (self.constant(f"probe:{n}", [number]) for n, number in (("0", 0), ("1", 1), ("end", 2**62)))
        two, twice = self.constant("probe:two", 2), self.constant(f"probe:most:{most}", 2 * most)
        flat = tape.op("Reshape", [value, self.constant(f"probe:shape:{name}", shape)])
        count = tape.op("Gather", [tape.op("Shape", [flat]), zero], {"axis": 0})
        step = tape.op("Add", [tape.op("Mul", [tape.op("Div", [count, twice]), two]), one])
        tape.op("Slice", [flat, zero, end, zero, step], output=output)
