"""The measurement of memory: that every estimator is measured, on a transformer of the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import Transformer, estimators, main, measured


def test_every_estimator_is_measured_in_training_steps() -> None:
    rows = {row.estimator: row for row in measured(8, 1, 6)}
    assert rows.keys() == estimators(6).keys()
    weights = sum(weight.numel() for weight in Transformer(8, 1).parameters())
    assert all(row.weights == weights and row.memory > 1 and row.time > 0 for row in rows.values())
    # Products with second derivatives keep the graph of a gradient. Steps do not.
    assert rows["first order"].peak_bytes < min(row.peak_bytes for name, row in rows.items() if name != "first order")


def test_the_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--sizes", "4x1", "--products", "1"])
    assert "unrolled" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "memory.json").read_text())["rows"]) == len(estimators(1))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--sizes", "5x1"])
    assert "invalid size value: '5x1'" in capsys.readouterr().err
