"""Compile a config for chips that need not be present: memory, communication, bounds of its time.

    mmljax plan --config configs/inshop.py --topology v5e:2x4 v6e:2x4

Nothing is run and no image is read. Without --topology the plan is for the devices of this machine.
The exit code is 2 if a program does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

from mmljax.cli import options as shared
from mmljax.errors import UserError
from mmljax.text import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax plan``."""
    shared.add_config(parser, workdir=False)
    parser.add_argument(
        "--topology",
        nargs="+",
        action="extend",
        default=[],
        metavar="CHIP:SHAPE",
        help="one or more of v4, v5e, v5p, v6e with a shape, such as v5e:2x4",
    )
    sizes = {
        "classes": "of the training split",
        "images": "of the training split",
        "queries": "for the search",
        "gallery": "for the search; without it the queries are searched among themselves",
    }
    for name, text in sizes.items():
        parser.add_argument(
            f"--{name}",
            type=shared.at_least(1),
            default=0,
            metavar="N",
            help=f"{text}; default: of the config's data, or of its benchmark",
        )
    parser.add_argument(
        "--find-batch-size",
        action="store_true",
        help="plan the largest batch that fits, to within 1/32; compiles several times",
    )
    parser.add_argument(
        "--buffers", type=shared.at_least(0), default=0, metavar="N", help="list the N largest"
    )
    parser.add_argument(
        "--price",
        type=float,
        default=0.0,
        help="of one chip for an hour, for the run's least cost in the table",
    )
    parser.add_argument(
        "--cache",
        type=shared.local_path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmljax",
        help="folder of what is known of compiled programs; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(options: argparse.Namespace) -> int:
    """Print the plan of each topology as it is made."""
    config = shared.load_config(options)
    if config is None:
        raise UserError("--config is missing; for a first plan: --config quickstart")
    from mmljax.planning import chips, plan, report
    from mmljax.planning.alone import CompilerCrashed, Task, compile_alone
    from mmljax.planning.counts import count
    from mmljax.planning.programs import Cache

    targets = [chips.tpu_target(name) for name in options.topology] or [chips.present_target()]
    sizes = {name: getattr(options, name) for name in ("classes", "images", "queries", "gallery")}
    counts = count(config, **sizes)
    found, plans, code = [], [], 0
    for target in targets:
        chosen = plan.fitting_config(config, counts, devices=len(target.devices))
        cache = Cache(options.cache)
        if options.topology:
            task = Task(chosen, counts, target.name, options.cache, options.find_batch_size)
            cache = cache._replace(fill=partial(compile_alone, task))
        try:
            if options.find_batch_size:
                size = plan.find_batch_size(chosen, counts, target, cache=cache)
                chosen = plan.with_batch_size(chosen, size)
            made = plan.make_plan(
                chosen, counts, target, cache=cache, buffers=max(options.buffers, 20)
            )
        except (plan.TooLarge, CompilerCrashed) as error:
            print(f"mmljax: error: {printable(str(error))}", file=sys.stderr)
            found.append(report.refusal_json(target, error))
            code = 2
            continue
        plans.append(made)
        found.append(report.plan_json(made))
        if not options.json:
            text = report.plan_text(made, buffers=options.buffers, price=options.price)
            print(text, end="\n\n", flush=True)
    if options.json:
        print(json.dumps(found, indent=2))
    elif len(plans) > 1:
        print(report.comparison_text(plans, price=options.price))
    return code
