"""How int8 and binary galleries answer, before and after rescoring, against float32.

    mmljax features --config finetune --config.data.directory=photos --output photos.features
    mmljax train --config heads --config.data.directory=photos.features --workdir heads
    mmljax embed heads --split query --output query.parquet
    python -m benchmarks.small_gallery query.parquet

Each query is searched among the others, or in the file that ``--gallery`` names. Per row: queries
whose nearest neighbour is that of the float32 search, and whose k neighbours are in the same order;
the share of its neighbours that are found (recall); Recall@1 by label; and the queries of which
``mmljax search --rescore N`` proves that the k neighbours are those of the float32 search.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from pyarrow import parquet

from benchmarks import machine
from mmljax.inference.embedding_file import read_gallery
from mmljax.retrieval.quantization import quantize
from mmljax.retrieval.rescoring import rescored_nearest_neighbors
from mmljax.retrieval.streaming import streamed_nearest_neighbors


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and labels of a file of embeddings."""
    vectors = read_gallery(path, exact=True).vectors
    assert vectors is not None
    return np.array(vectors), parquet.read_table(path, columns=["label"])["label"].to_numpy()


def main() -> None:
    """Search in every way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("queries", type=Path, help="Parquet file of mmljax embed")
    parser.add_argument("--gallery", type=Path, help="another; default: the other queries")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rescore", type=int, nargs="+", default=[20, 50, 100])
    options = parser.parse_args()
    k = options.k
    queries, labels = read(options.queries)
    own = None if options.gallery else np.arange(len(queries), dtype=np.int32)
    gallery, gallery_labels = read(options.gallery) if options.gallery else (queries, labels)
    exact = streamed_nearest_neighbors(queries, gallery, k=k, self_index=own)
    wanted = np.asarray(exact.indices)
    print(machine.describe())
    print(f"{len(queries)} queries, {len(gallery)} rows of {gallery.shape[1]} dimensions, k {k}")
    print("| gallery | rescored | same nearest | same k | recall | Recall@1 | proved |")
    print("|---|---|---|---|---|---|---|")

    def row(name: str, candidates: int | None, found: np.ndarray, proved: float) -> None:
        nearest = np.mean(found[:, 0] == wanted[:, 0])
        same = np.mean((found == wanted).all(axis=1))
        recall = np.mean([len(np.intersect1d(*pair)) for pair in zip(found, wanted, strict=True)])
        first = np.mean(gallery_labels[found[:, 0]] == labels)
        print(
            f"| {name} | {candidates or '-'} | {nearest:.2%} | {same:.2%} | {recall / k:.2%} | "
            f"{first:.2%} | {proved:.1%} |"
        )

    row("float32", None, wanted, 1)
    for dtype in ("int8", "binary"):
        codes = quantize(gallery, dtype=dtype)
        found = streamed_nearest_neighbors(queries, codes, k=k, self_index=own)
        row(dtype, None, np.asarray(found.indices), 0)
        for candidates in options.rescore:
            best, proved = rescored_nearest_neighbors(
                queries, codes, gallery, k=k, candidates=candidates, self_index=own
            )
            row(dtype, candidates, np.asarray(best.indices), float(proved.mean()))


if __name__ == "__main__":
    main()
