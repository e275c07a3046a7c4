"""Tokenizers: open_clip's ids, the end token kept, lengths before the cut, and a way through JSON."""

import json
import pickle
import random

import pytest
import torch
from tiny_biomedclip import CONTEXT, TEXT_TOWER, VOCABULARY, write_tiny_biomedclip

from raymed.config import UserError
from raymed.models.clip import ClipConfig, build_tokenizer
from raymed.models.tokens import Tokenizer, open_clip_tokenizer, transformers_tokenizer

TEXTS = [
    "",
    "Chest radiograph: right-sided pleural effusion, 3.5 cm; no pneumothorax.",
    "  Two\tlines \n and   spaces\u00a0between ",
    "It's the patient's 2nd X-ray & it doesn&amp;t help &lt;b&gt;",
    "Röntgen-Thorax p.a. — große Verschattung “rechts”, 東京 é\u0301 😀 µg/ml ½",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 40,
    "cafÃ© mojibake, _underscores_ and C1-C7/T12 (a.-p.) 10⁻³",
]
"""Umlauts, wrong encodings, entities, symbols, digits, and a text longer than every context."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_biomedclip(tmp_path_factory.mktemp("tiny"))


def padded(tokens: torch.Tensor, width: int, pad_id: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=pad_id)


@pytest.mark.parametrize("clean", ["lower", "canonicalize"])
def test_ids_of_open_clips_own_encoding(clean):
    from open_clip import SimpleTokenizer

    ours = open_clip_tokenizer(77, clean)
    tokens, lengths = ours(TEXTS)
    expected = SimpleTokenizer(clean=clean)
    assert torch.equal(padded(tokens, 77, 0), expected(TEXTS))
    assert lengths.tolist() == [len(expected.encode(text)) + 2 for text in TEXTS]
    assert tokens[5, -1] == expected.eot_token_id and lengths[5] > 77


def test_ids_of_random_words():
    from open_clip import SimpleTokenizer

    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-.,'/()ßé%"
    texts = [" ".join("".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(8)) for _ in range(200)]
    tokens, _ = open_clip_tokenizer(77)(texts)
    assert torch.equal(padded(tokens, 77, 0), SimpleTokenizer()(texts))


def test_compact_vocabulary_spells_everything_with_fewer_tokens():
    tokenizer = build_tokenizer(ClipConfig())
    tokens, lengths = tokenizer(TEXTS)
    _, full = open_clip_tokenizer(77)(TEXTS)
    assert tokens.max() == 4095 and (tokens == 4095).sum(1).tolist() == [1] * len(TEXTS)
    assert (lengths >= full).all() and lengths[1] <= 1.6 * full[1]
    texts = ["chest radiograph with a nodule in the left lung", "no pneumothorax"]
    ids = [row[row > 0].tolist() for row in tokenizer(texts)[0]]
    assert [tokenizer._backend.decode(row).replace("</w>", " ").strip() for row in ids] == texts


def test_ids_of_a_checkpoints_own_tokenizer(folder):
    import open_clip

    name = f"local-dir:{folder}"
    ours, theirs = build_tokenizer(ClipConfig(name)), open_clip.get_tokenizer(name)
    tokens, lengths = ours(TEXTS)
    assert torch.equal(padded(tokens, CONTEXT, ours.pad_id), theirs(TEXTS))
    assert (ours.context_length, ours.pad_id) == (CONTEXT, 0)
    whole = [len(theirs.tokenizer(theirs.clean_fn(text)).input_ids) for text in TEXTS]
    assert lengths.tolist() == whole and max(whole) > 10 * CONTEXT
    assert tokens[whole.index(max(whole)), -1] == VOCABULARY.index("[SEP]")


def test_a_folder_with_nothing_but_a_vocabulary(folder, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = transformers_tokenizer(str(tmp_path), CONTEXT)(TEXTS[:4])
    expected = transformers_tokenizer(str(folder), CONTEXT)(TEXTS[:4])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_stripped_sep_token(folder):
    from open_clip.tokenizer import HFTokenizer

    tokens, _ = transformers_tokenizer(str(folder), CONTEXT, "canonicalize", strip_sep_token=True)(TEXTS)
    expected = HFTokenizer(str(folder), CONTEXT, clean="canonicalize", strip_sep_token=True)(TEXTS)
    assert torch.equal(padded(tokens, CONTEXT, 0), expected)


@pytest.mark.parametrize("name", ["small", "local"])
def test_through_json_and_pickle(name, folder):
    tokenizer = build_tokenizer(ClipConfig() if name == "small" else ClipConfig(f"local-dir:{folder}"))
    for copy in (Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        for found, expected in zip(copy(TEXTS), tokenizer(TEXTS), strict=True):
            assert torch.equal(found, expected)
        assert (copy.context_length, copy.pad_id) == (tokenizer.context_length, tokenizer.pad_id)
    assert len(tokenizer.to_json()) < 400_000


def test_no_texts():
    tokens, lengths = open_clip_tokenizer(77)([])
    assert tokens.shape == (0, 0) and lengths.shape == (0,)


def test_missing_and_damaged_files(tmp_path):
    folder = write_tiny_biomedclip(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        UserError, match="tokenizer cannot be read from .*Wanted are tokenizer.json and tokenizer_config"
    ):
        build_tokenizer(ClipConfig(f"local-dir:{folder}"))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        UserError, match=f"tokenizer is missing: put tokenizer.json and .* of {TEXT_TOWER} into {folder}"
    ):
        build_tokenizer(ClipConfig(f"local-dir:{folder}"))


def test_what_is_not_supported_is_refused(tmp_path):
    folder = write_tiny_biomedclip(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_mode"] = "clips"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokenizer's option tokenizer_mode is not supported"):
        build_tokenizer(ClipConfig(f"local-dir:{folder}"))
