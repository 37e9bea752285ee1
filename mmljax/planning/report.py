"""Plans as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmljax.errors import UserError
from mmljax.planning.chips import Target
from mmljax.planning.plan import STEP, Bounds, Plan, TooLarge
from mmljax.text import size_text, text_table

_GROUPS = {  # of state_bytes: row of the table
    "network": "parameters of the network",
    "optimizer of the rest": "optimiser of the network",
    "proxies": "proxies",
    "optimizer of proxies": "optimiser of the proxies",
    "statistics": "BatchNorm's statistics",
    "average": "average of the weights",
    "memory": "cross-batch memory",
}


def plan_text(plan: Plan, *, buffers: int = 0, price: float = 0.0) -> str:
    """A plan as aligned tables.

    Args:
      plan: of one target.
      buffers: how many of the largest buffers to list.
      price: of one chip for an hour, in any currency; 0 for none.
    """
    blocks = [_title(plan), _memory(plan), _traffic(plan), _times(plan)]
    if plan.bounds:
        blocks.append(_run(plan, plan.bounds, price=price))
    if buffers:
        blocks.append(_buffers(plan, buffers))
    return "\n\n".join(block for block in blocks if block)


def comparison_text(plans: Sequence[Plan], *, price: float = 0.0) -> str:
    """One row for each target, for a choice among them.

    The bound is the largest of those of a step, so the images per second are an upper bound.

    Args:
      plans: of one config on several targets.
      price: of one chip for an hour, in any currency; 0 for none.
    """
    head = ["target", "devices", "batch", "MiB of a step", "of", "bound of a step, ms"]
    rows = [[*head, "images/s at most", "run at least, s", *(["cost at least"] if price else [])]]
    for plan in plans:
        row = [plan.target, str(plan.devices), str(plan.batch_size)]
        row += [_mib(plan.memory[STEP].total), _mib(plan.available)]
        if plan.bounds:
            step = max(plan.bounds)
            row += [f"{1e3 * step:.3f}", f"{plan.batch_size / step:.0f}"]
            row += [f"{plan.steps * step:.0f}"]
            row += [f"{_cost(plan, step, price):.2f}"] if price else []
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return text_table(rows)


def _cost(plan: Plan, step: float, price: float) -> float:
    """Of a run whose steps take so many seconds."""
    return plan.steps * step / 3600 * plan.devices * price


def _title(plan: Plan) -> str:
    known = plan.counts
    test = f", {known.queries:,} queries" if known.queries else ""
    test += f", {known.gallery:,} gallery images" if known.gallery else ""
    size = f" of {size_text(plan.available)}" if plan.available else ""
    return (
        f"{plan.target}: {plan.devices} devices{size}, batch "
        f"{plan.batch_size}, {known.classes:,} classes, {known.images:,} images{test}"
    )


def _memory(plan: Plan) -> str:
    """State and batch of the training step, then every program's parts and total."""
    names = list(plan.memory)
    blank = [""] * (len(names) - 1)
    rows = [["MiB per device", *names]]
    groups = {**_GROUPS, **{group: group for group in plan.state if group not in _GROUPS}}
    rows += [
        [label, _mib(plan.state[group]), *blank]
        for group, label in groups.items()
        if group in plan.state
    ]
    rows.append(["batch", _mib(plan.batch), *blank])
    rows.append(["padding of tiles", _mib(plan.padding), *blank])
    parts = {
        "arguments": [one.arguments for one in plan.memory.values()],
        "results beside them": [one.outputs - one.aliased for one in plan.memory.values()],
        "activations and work": [one.work for one in plan.memory.values()],
        "program": [one.code for one in plan.memory.values()],
        "total": [one.total for one in plan.memory.values()],
    }
    rows += [[name, *map(_mib, sizes)] for name, sizes in parts.items()]
    if plan.available:
        rows.append(["memory of a device", *(_mib(plan.available) for _ in names)])
    return text_table(rows)


def _traffic(plan: Plan) -> str:
    if not plan.traffic:
        return ""
    rows = [["collectives of a step", "count", "MiB", "of these asynchronous"]]
    rows += [
        [kind, str(one.number), _mib(one.bytes), _mib(one.asynchronous)]
        for kind, one in sorted(plan.traffic.items())
    ]
    return text_table(rows)


def _times(plan: Plan) -> str:
    rows = [["operations of a step and device", "T", "T of bfloat16 passes"]]
    rows += [
        [name, f"{one.number / 1e12:.3f}", f"{one.passes / 1e12:.3f}"]
        for name, one in plan.operations.items()
    ]
    text = text_table(rows)
    if plan.bounds is None:
        return text
    limits = [["lower bounds of a step's time", "ms"]]
    limits += [
        [name, f"{1e3 * seconds:.3f}"]
        for name, seconds in zip(
            ("arithmetic at peak rate", "main memory", "links between chips"),
            plan.bounds,
            strict=True,
        )
    ]
    return f"{text}\n\n{text_table(limits)}"


def _run(plan: Plan, bounds: Bounds, *, price: float) -> str:
    seconds = plan.steps * max(bounds)
    least = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    text = f"{plan.steps} steps: at least {least}"
    if price:
        cost = _cost(plan, max(bounds), price)
        text += f" and {cost:.2f} ({plan.devices} chips, {price:g} an hour each)"
    return f"{text}, without evaluation, input wait and start"


def _buffers(plan: Plan, count: int) -> str:
    rows = [["largest buffers of the training step", "MiB", "number", "made by"]]
    rows += [
        [one.shape, _mib(one.bytes), str(one.number), f"{one.kind} {one.origin[-70:]}".strip()]
        for one in plan.buffers[:count]
    ]
    return text_table(rows, left=(0, 3))


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON; the numbers of the tables in bytes, operations and seconds."""
    return {
        "target": plan.target,
        "fits": True,
        "devices": plan.devices,
        "available": plan.available,
        "batch_size": plan.batch_size,
        "steps": plan.steps,
        "counts": plan.counts._asdict(),
        "state": dict(plan.state),
        "batch": plan.batch,
        "padding": plan.padding,
        "programs": {
            name: {**one._asdict(), "total": one.total} for name, one in plan.memory.items()
        },
        "collectives": {kind: one._asdict() for kind, one in plan.traffic.items()},
        "operations": {name: one._asdict() for name, one in plan.operations.items()},
        "lower_bounds_in_seconds": plan.bounds and plan.bounds._asdict(),
        "buffers": [one._asdict() for one in plan.buffers],
    }


def refusal_json(target: Target, error: UserError) -> dict[str, Any]:
    """A target without a plan as JSON: ``fits`` is null where the compiler crashed."""
    common = {"target": target.name, "devices": len(target.devices), "error": str(error)}
    if not isinstance(error, TooLarge):
        return {**common, "fits": None}
    return {
        **common,
        "fits": False,
        "program": error.program,
        "needed": error.needed,
        "available": error.available,
    }


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
