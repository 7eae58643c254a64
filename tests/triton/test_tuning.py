"""The tables of block sizes: every op has one, a device's own entries come first, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloop.ops import REGISTRY
from fastloop.triton_kernels import tuning

CPU = torch.device("cpu")


@pytest.mark.parametrize("path", sorted(tuning.TABLES.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_tables_are_whole(path: Path) -> None:
    content = tuning.read(path)
    assert set(content) <= {*REGISTRY, "device", "measured"}
    assert path.stem == "default" or tuning.table_path(content["device"]) == path
    if path.stem == "default":
        assert set(REGISTRY) <= set(content)
        for op in REGISTRY:  # the list ends with an entry that matches everything (of its dtype)
            assert not any(key.startswith("max_") for key in content[op][-1])


def test_names_of_devices_become_names_of_files() -> None:
    assert tuning.table_path("NVIDIA H100 80GB HBM3").name == "NVIDIA_H100_80GB_HBM3.json"


def with_tables(monkeypatch: pytest.MonkeyPatch, folder: Path, **tables: Any) -> None:
    for name, content in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(tuning, "TABLES", folder)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    for cached in (tuning.read, tuning.table, tuning._choose):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    for cached in (tuning.read, tuning.table, tuning._choose):
        cached.cache_clear()


def test_the_first_entry_that_matches_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [
        {"max_rows": 16, "epilogue": "gelu", "config": {"warps": 1}},
        {"max_rows": 16, "config": {"warps": 2}},
        {"config": {"warps": 4}},
    ]
    with_tables(monkeypatch, tmp_path, default={"linear": entries})
    assert tuning.choose("linear", CPU, rows=16, epilogue="gelu") == {"warps": 1}
    assert tuning.choose("linear", CPU, rows=16, epilogue="none") == {"warps": 2}
    assert tuning.choose("linear", CPU, rows=17, epilogue="gelu") == {"warps": 4}


def test_a_devices_own_entries_come_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    default = {
        "mel": [{"config": {"warps": 4}}],
        "decide": [{"config": {"warps": 8}}],
    }
    own = {"device": "A Card", "mel": [{"max_streams": 2, "config": {"warps": 1}}]}
    with_tables(monkeypatch, tmp_path, default=default, A_Card=own)
    card = torch.device("cuda", 0)
    assert tuning.choose("mel", card, streams=2) == {"warps": 1}
    assert tuning.choose("mel", card, streams=3) == {"warps": 4}
    assert tuning.choose("decide", card) == {"warps": 8}


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_tables(monkeypatch, tmp_path, default={"linear": [{"max_rows": 16, "config": {}}]})
    with pytest.raises(tuning.TableError, match=r"no table entry for op linear on cpu with \{'rows': 17\}"):
        tuning.choose("linear", CPU, rows=17)
    with_tables(monkeypatch, tmp_path, default={"linear": [{"max_rows": 16}]})
    with pytest.raises(tuning.TableError, match="linear: an entry has no config"):
        tuning.choose("linear", CPU, rows=1)
    (tmp_path / "default.json").write_text("{")
    tuning.read.cache_clear()
    tuning.table.cache_clear()
    with pytest.raises(tuning.TableError, match=r"default\.json"):
        tuning.choose("linear", CPU, rows=2)
