"""An index: embeddings of one model as a Parquet file, and the exact search for those nearest to a query.

    row        int64, number of the data row in the manifest, from 1
    embedding  fixed_size_list<float32, D>, of unit norm: of the image, or of its text
    caption    string, "" where there is none
    image      string, the first 16 hexadecimal digits of the sha256 of the image's pixels, "" where there is none

Under the key `raymed` of the file's metadata stand, as JSON, the identity of the model (embeddings of two models cannot
be compared), what was embedded, D, and the run that trained the model. Any program that reads Parquet reads it; the
search here is exact, a matrix product over blocks of queries.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raymed.config import UserError, check_choice, check_range
from raymed.storage import local_copy, write_bytes
from raymed.storage.locations import Location

FORMAT = 1
_KEY = b"raymed"
_CHUNK = 2**24  # cosines held at a time: 64 MB
_COLUMNS = ("row", "embedding", "caption", "image")
Of = Literal["image", "text"]


@dataclass(frozen=True)
class Index:
    """N embeddings of one model.

    embeddings: (N, D) float32 of unit norm. rows: (N,) int64. captions, images: N texts each, as the module says.
    model: identity of the model (`Embedder.identity`). of: what was embedded. run: key of the run that trained it.
    Raises UserError when the lengths differ, or an embedding is not finite or not of unit norm.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    captions: Sequence[str]
    images: Sequence[str]
    model: str
    of: Of = "image"
    run: str | None = None

    def __post_init__(self) -> None:
        check_choice("index: of", self.of, ("image", "text"))
        lengths = {len(self.embeddings), len(self.rows), len(self.captions), len(self.images)}
        if self.embeddings.ndim != 2 or len(lengths) > 1:
            shape = self.embeddings.shape
            raise UserError(f"an index needs (N, D) embeddings and N rows, captions and images: got {shape}, {lengths}")
        _check_unit("embedding", self.embeddings)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def dimension(self) -> int:
        """D."""
        return self.embeddings.shape[1]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of every query, by the cosine.

        Args:
            queries: (Q, D) float32 of unit norm, of this index's model. k: >= 1; at most N are found.

        Returns:
            (places (Q, k) int64, 0 to N - 1, into `rows`, `captions` and `images`; cosines (Q, k) float32), the nearest
            first; of equal cosines the earlier in the index.

        Raises:
            UserError: k is below 1; queries of another shape, not finite or not of unit norm.
        """
        check_range("k", k, 1)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise UserError(f"queries must be (Q, {self.dimension}), got {queries.shape}")
        _check_unit("query", queries)
        k, step = min(k, len(self)), max(1, _CHUNK // max(1, len(self)))
        parts = [_nearest(queries[i : i + step] @ self.embeddings.T, k) for i in range(0, len(queries), step)]
        places = [np.empty((0, k), np.int64), *(found for found, _ in parts)]
        return np.concatenate(places), np.concatenate([np.empty((0, k), np.float32), *(best for _, best in parts)])

    def matches(self, queries: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        """`search` as plain values: of every query its nearest, each {"rank" from 1, "row", "cosine", "caption",
        "image"}."""
        places, cosines = self.search(queries, k)
        return [
            [self._match(rank, place, cosine) for rank, (place, cosine) in enumerate(zip(*found, strict=True), start=1)]
            for found in zip(places.tolist(), cosines.tolist(), strict=True)
        ]

    def _match(self, rank: int, place: int, cosine: float) -> dict[str, Any]:
        row, caption, image = int(self.rows[place]), self.captions[place], self.images[place]
        return {"rank": rank, "row": row, "cosine": cosine, "caption": caption, "image": image}


def write_index(location: Location, index: Index) -> None:
    """Write an index as Parquet, whole or not at all; the location may be s3://BUCKET/KEY."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    described = {"format": FORMAT, "model": index.model, "of": index.of, "dimension": index.dimension, "run": index.run}
    values = pa.array(np.ascontiguousarray(index.embeddings, np.float32).ravel())
    columns = [
        pa.array(np.asarray(index.rows, np.int64)),
        pa.FixedSizeListArray.from_arrays(values, index.dimension),
        pa.array(list(index.captions), pa.string()),
        pa.array(list(index.images), pa.string()),
    ]
    table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
    file = pa.BufferOutputStream()
    described_table = table.replace_schema_metadata({_KEY: json.dumps(described)})
    pq.write_table(described_table, file, use_dictionary=["caption"])  # type: ignore[arg-type]
    write_bytes(location, file.getvalue().to_pybytes())


def load_index(location: Location, model: str | None = None) -> Index:
    """Read an index; the location may be s3://BUCKET/KEY.

    Args:
        model: identity of the model whose queries it is to answer (`Embedder.identity`); None = not checked.

    Raises:
        UserError: there is no such file, it is no index or a newer one, or an index of another model.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = _existing(location)
    try:
        table = pq.read_table(path)
        described = json.loads((table.schema.metadata or {})[_KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(f"{location} is not an index of embeddings ({type(error).__name__}): make it anew") from error
    if described["format"] > FORMAT:
        raise UserError(f"{location} was written by a newer raymed: this one reads indices up to format {FORMAT}")
    if model is not None and described["model"] != model:
        raise UserError(
            f"{location} was made with another model ({_name(described['model'], described['run'])}, this one is "
            f"{model[:12]}): embeddings of two models cannot be compared. Make the index anew with this model"
        )
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Index(
        embeddings=flat.reshape(-1, described["dimension"]),
        rows=table["row"].to_numpy(),
        captions=tuple(table["caption"].to_pylist()),
        images=tuple(table["image"].to_pylist()),
        model=described["model"],
        of=described["of"],
        run=described["run"],
    )


def _existing(location: Location) -> str:
    path = local_copy(location)
    if not path.is_file():
        raise UserError(f"there is no index at {location}")
    return str(path)


def _name(model: str, run: str | None) -> str:
    return f"{model[:12]} of run {run}" if run else model[:12]


def _check_unit(what: str, vectors: np.ndarray) -> None:
    """Raise UserError, with the place, for a row whose norm is not 1 (or not a number)."""
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(wrong):
        raise UserError(f"{what} {wrong[0]} must be of unit norm, it is {norms[wrong[0]]:g} ({len(wrong)} are not)")


def _nearest(cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, N) -> places and values (Q, k) of the largest, the largest first, of equal ones the earlier."""
    if k < cosines.shape[1]:
        # Of those equal to the k-th some may lie beyond the partition: all of them are looked at.
        least = np.partition(cosines, -k, axis=1)[:, -k]
        rows = [np.flatnonzero(row >= bound) for row, bound in zip(cosines, least, strict=True)]
    else:
        rows = [np.arange(cosines.shape[1])] * len(cosines)
    places = np.empty((len(cosines), k), np.int64)
    for i, found in enumerate(rows):
        places[i] = found[np.argsort(-cosines[i, found], kind="stable")][:k]
    return places, np.take_along_axis(cosines, places, axis=1)
