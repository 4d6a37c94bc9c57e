"""The embedded model is the published file or nothing at all."""

from __future__ import annotations

import pytest

from conftest import script
from stepladder.errors import ModelError
from stepladder.model import embedded


def test_is_reused_when_it_is_there(smollm2) -> None:
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    done = script("fetch_model")
    assert done.code == 0 and "there already" in done.out, done
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before


def test_holds_safetensors_tokenizer_and_template(smollm2) -> None:
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in smollm2.iterdir()
    }


@pytest.mark.parametrize("fault", ["truncated", "tampered"])
def test_a_wrong_file_leaves_nothing(fault, tmp_path) -> None:
    """Guards against a half-written or a changed model that later runs would reuse."""
    gguf = tmp_path / "model.gguf"
    with gguf.open("wb") as out:
        out.truncate(embedded.SIZE - (1 if fault == "truncated" else 0))
    done = script("fetch_model", "--gguf", gguf, "--output_dir", tmp_path / "models" / "smollm2")
    assert done.code == 2, done
    assert "not the published file" in done.err and "Traceback" not in done.err, done
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_is_something_else_is_kept(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        embedded.fetch(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
