"""Find the nearest images of query images in a file of embeddings.

    mmljax search RUN --embeddings photos.parquet --images query.jpg

The search of float32 embeddings is exact. In a file of embed --dtype int8 or binary, --rescore N
scores the N best of each query again with float32, and prints for how many queries the answers are
proved to be those of the float32 search. A file of embed --dims N is searched with --dims N. Memory
holds one part of the queries and one chunk of the gallery, however large the gallery is. The same
command with --output resumes where it was interrupted. With --threshold, answers below it are left
out, and a query without an answer has "no match".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mmljax.cli import options as shared
from mmljax.errors import UserError, require
from mmljax.text import printable, text_table

STDOUT = Path("-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmljax search``."""
    shared.add_run(parser)
    shared.add_step(parser)
    shared.add_dims(parser)
    shared.add_embeddings(parser, "--embeddings")
    shared.add_images(parser)
    parser.add_argument(
        "--k", type=shared.at_least(1), default=10, help="answers per query; default 10"
    )
    parser.add_argument(
        "--rescore",
        type=shared.at_least(1),
        metavar="N",
        help="score the N best int8 or binary vectors of each query again with float32",
    )
    parser.add_argument(
        "--threshold",
        metavar="T",
        help="least similarity of an answer: a number, or the file that mmljax threshold wrote",
    )
    parser.add_argument(
        "--output",
        type=shared.local_path,
        default=STDOUT,
        help="file.parquet or file.jsonl to write; default: a table on standard output",
    )
    shared.add_force(parser)


def run(options: argparse.Namespace) -> int:
    """Answer the queries that the options name."""
    if options.output != STDOUT and options.output.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--output={options.output} must end in .parquet or .jsonl")
    require("pyarrow", extra="offline", purpose="mmljax search")
    from mmljax.inference import embed, search
    from mmljax.inference.embedding_file import read_metadata

    made_from = read_metadata(options.embeddings)
    trained = embed.load(options.run, step=options.step, dims=options.dims)
    search.check_fit(
        made_from, trained, k=options.k, rescore=options.rescore, where=options.embeddings
    )
    refuse_others(options, options.embeddings, search.differences(made_from, trained))
    threshold, chosen_for = read_threshold(options.threshold)
    if chosen_for is not None:
        refuse_others(options, options.threshold, search.differences(chosen_for, trained))
    queries = embed.chosen_images(trained, images=options.images, split=options.split)
    settings = {
        "k": options.k,
        "rescore": options.rescore,
        "rows_per_part": options.rows_per_part,
        "skip_corrupt": options.skip_corrupt,
        "threshold": threshold,
    }
    count = proved = 0
    if options.output != STDOUT:
        new = search.write_answers(trained, queries, options.embeddings, options.output, **settings)
        state = ", complete already" if new is None else ""
        print(printable(f"answers in {options.output}{state}"), file=sys.stderr)
        count, proved = new or (0, 0)
    else:
        for answers in search.answers(trained, queries, options.embeddings, **settings):
            print(_table(answers.to_pylist()), flush=True)
            if options.rescore is not None:
                part = search.count_proved(answers)
                count, proved = count + part[0], proved + part[1]
    if count:
        text = f"{proved} of {count} queries are proved to have the answers of the float32 search"
        print(text, file=sys.stderr)
    return 0


def refuse_others(options: argparse.Namespace, file: Path | str, differing: list[str]) -> None:
    """Refuse a file of another network, or warn with ``--force``."""
    if not differing:
        return
    text = f"{file} was made by another network ({'; '.join(differing)})"
    if not options.force:
        raise UserError(f"{text}; make it again with this run, or add --force")
    print(printable(f"warning: {text}"), file=sys.stderr)


def read_threshold(text: str | None) -> tuple[float | None, dict[str, Any] | None]:
    """The threshold that ``--threshold`` names, and the network it was chosen for, if known."""
    if text is None:
        return None, None
    try:
        value = float(text)
    except ValueError:
        from mmljax.inference.threshold import read_report

        report = read_report(Path(text))
        return report["threshold"], report["made_from"]
    if not -1 <= value <= 1:
        raise UserError(f"--threshold={text} is no cosine similarity; give one from -1 to 1")
    return value, None


def _table(answers: list[dict[str, Any]]) -> str:
    rows = [list(answers[0])] if answers else []
    for row in answers:
        label = "-" if row["label"] is None else str(row["label"])
        similarity = f"{row['similarity']:.4f}"
        rank, name = (row["rank"], row["id"]) if row["rank"] else ("-", "no match")
        proved = [{True: "yes", False: "no"}[row["proved"]]] if "proved" in row else []
        rows.append([row["query"], str(rank), similarity, name, label, *proved])
    return text_table([[printable(cell) for cell in row] for row in rows], left=(0, 3))
