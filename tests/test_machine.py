"""`meshloom info`: what runs here, measured, and the table of chips with its sources."""

import io
import json
import re

from rich.console import Console

from meshloom import machine
from meshloom.core.hardware import CHIPS
from tests.command_line import MEASURED, run


def test_info_is_json_with_versions_devices_and_measured_rates(capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda device, progress: MEASURED)
    status, out, err = run(capsys, "info", "--json")
    values = json.loads(out)
    assert (status, err) == (0, "")
    assert values["devices"] == ["cpu"] * 8
    assert {"meshloom", "jax", "flax", "memory_bytes", "cache", "compilation_cache"} <= set(values)
    assert values["measured"]["bandwidth_bytes_per_s"] == MEASURED.bandwidth
    assert values["measured"]["products_flops"] == MEASURED.flops
    assert values["chip"]["flops"] == {dtype: rate / 8 for dtype, rate in MEASURED.flops.items()}
    text = run(capsys, "info")[1]
    assert f"flax                 {values['flax']}\n" in text
    assert re.search(r"STREAM copy +│ 16 GB/s", text)
    assert re.search(r"int8 products +│ 320 GFLOP/s", text)


def test_info_without_measuring_says_so_and_prints_the_table_with_sources(capsys):
    values = json.loads(run(capsys, "info", "--no-measure", "--json")[1])
    assert (values["measured"], values["chip"]) == (None, None)
    chips = json.loads(run(capsys, "info", "--chips", "--json")[1])["chips"]
    assert chips["v5e"]["link_bandwidth"] == 200e9
    assert "bidirectional" in chips["v5e"]["sources"]["link_bandwidth"]
    assert re.search(r"h100 +│ hbm_bandwidth +│ 3350 GB/s +│ NVIDIA H100", run(capsys, "info", "--chips")[1])


def test_a_measurement_stands_beside_the_data_sheet():
    console = Console(file=io.StringIO(), width=120)
    console.print(machine.measured_table(MEASURED, CHIPS["v5e"]))
    assert re.search(r"STREAM copy +│ 16 GB/s +│ 819 GB/s +│ 2%", console.file.getvalue())
