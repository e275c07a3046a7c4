"""The nearest are those of a whole sort; a file gives back what went into it; another model's index is refused."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from raymed.config import UserError
from raymed.tasks import index as module
from raymed.tasks.index import Index, load_index, write_index

D = 12


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def made() -> Index:
    """100 embeddings, the last 20 equal to the first 20."""
    vectors = unit(np.random.default_rng(0).normal(size=(80, D)))
    return Index(
        embeddings=np.concatenate([vectors, vectors[:20]]),
        rows=np.arange(100) * 2 + 1,
        captions=[f"caption {i}, Übersicht" for i in range(100)],
        images=[f"{i:016x}" for i in range(100)],
        model="a" * 64,
        run="train-1/final",
    )


@pytest.mark.parametrize("k", [1, 7, 100, 1000])
@pytest.mark.parametrize("chunk", [1, 350, 2**24])
def test_the_nearest_of_a_whole_sort(k, chunk, made, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    queries = unit(np.random.default_rng(1).normal(size=(9, D)))
    places, cosines = made.search(queries, k)
    every = np.stack([made.embeddings @ query for query in queries])
    wanted = np.argsort(-every, axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(cosines, np.take_along_axis(every, wanted, axis=1), atol=1e-6)
    assert places.shape == (9, min(k, 100)) and (places.dtype, cosines.dtype) == (np.int64, np.float32)
    assert np.all(np.diff(cosines, axis=1) <= 0)
    assert all(len(set(row)) == min(k, 100) for row in places.tolist())


def test_of_equal_ones_the_earlier(made):
    axes = np.eye(D, dtype=np.float32)[np.arange(100) % 5]
    places, cosines = replace(made, embeddings=axes).search(axes[:5], 3)
    assert places.tolist() == [[i, i + 5, i + 10] for i in range(5)] and np.all(cosines == 1)


def test_matches_are_plain_values(made):
    (found,) = made.matches(made.embeddings[3:4], 2)
    assert [(m["rank"], m["row"], m["caption"], m["image"]) for m in found] == [
        (1, 7, "caption 3, Übersicht", f"{3:016x}"),
        (2, 167, "caption 83, Übersicht", f"{83:016x}"),
    ]
    assert json.loads(json.dumps(found)) == found


def test_a_file_gives_back_what_went_into_it(made, tmp_path):
    write_index(tmp_path / "new" / "index.parquet", made)
    found = load_index(tmp_path / "new" / "index.parquet", made.model)
    assert np.array_equal(found.embeddings, made.embeddings) and found.embeddings.dtype == np.float32
    assert np.array_equal(found.rows, made.rows)
    assert list(found.captions) == list(made.captions) and list(found.images) == list(made.images)
    assert (found.model, found.of, found.run) == (made.model, "image", "train-1/final")


def test_any_reader_of_parquet_reads_it(made, tmp_path):
    write_index(tmp_path / "index.parquet", made)
    schema = pq.read_schema(tmp_path / "index.parquet")
    assert str(schema.field("embedding").type).startswith("fixed_size_list<")
    assert schema.field("embedding").type.list_size == D
    described = json.loads(schema.metadata[b"raymed"])
    assert (described["model"], described["dimension"]) == (made.model, D)
    table = pd.read_parquet(tmp_path / "index.parquet")
    assert list(table) == ["row", "embedding", "caption", "image"]
    assert np.array_equal(np.stack(table["embedding"]), made.embeddings)


def test_an_index_in_a_bucket(made, s3):
    write_index(f"{s3.url}/found/index.parquet", made)
    assert s3.keys() == ["found/index.parquet"]
    assert np.array_equal(load_index(f"{s3.url}/found/index.parquet").embeddings, made.embeddings)


def test_an_index_of_another_model_is_refused(made, tmp_path):
    write_index(tmp_path / "index.parquet", made)
    with pytest.raises(
        UserError, match=r"another model \(aaaaaaaaaaaa of run train-1/final, this one is bbbbbbbbbbbb\)"
    ):
        load_index(tmp_path / "index.parquet", "b" * 64)
    assert len(load_index(tmp_path / "index.parquet")) == 100, "where nobody says for which model"


def test_what_is_no_index_is_refused(made, tmp_path):
    (tmp_path / "text").write_text("row,embedding\n")
    pd.DataFrame({"row": [1]}).to_parquet(tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(UserError, match="not an index of embeddings"):
            load_index(tmp_path / name)
    with pytest.raises(UserError, match="there is no"):
        load_index(tmp_path / "nothing.parquet")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": np.arange(99)}, "N rows"),
        ({"embeddings": np.ones((100, D), np.float32)}, "embedding 0 must be of unit norm, it is 3.46"),
        ({"embeddings": np.full((100, D), np.nan, np.float32)}, "embedding 0 must be of unit norm, it is nan"),
        ({"of": "sound"}, "one of 'image', 'text'"),
    ],
)
def test_embeddings_that_cannot_be_searched_are_refused(change, why, made):
    with pytest.raises(UserError, match=why):
        replace(made, **change)


def test_queries_that_cannot_be_compared_are_refused(made):
    with pytest.raises(UserError, match=r"queries must be \(Q, 12\), got \(1, 5\)"):
        made.search(unit(np.ones((1, 5))), 3)
    with pytest.raises(UserError, match="query 1 must be of unit norm"):
        made.search(np.stack([made.embeddings[0], made.embeddings[0] * 2]), 3)
    with pytest.raises(UserError, match="k must be >= 1"):
        made.search(made.embeddings[:1], 0)


def test_nothing_to_search_for_and_nothing_to_search_in(made, tmp_path):
    places, cosines = made.search(np.empty((0, D), np.float32), 3)
    assert places.shape == cosines.shape == (0, 3)
    nothing = replace(made, embeddings=np.empty((0, D), np.float32), rows=np.empty(0), captions=[], images=[])
    write_index(tmp_path / "empty.parquet", nothing)
    assert load_index(tmp_path / "empty.parquet").matches(made.embeddings[:2], 3) == [[], []]
