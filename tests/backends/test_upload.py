"""`upload` on the CPU; what it does on a device is in `emulation/inside/check_uploads.py`."""

from __future__ import annotations

import torch

from mla_backends import upload as uploads
from mla_backends.upload import upload, upload_into

CPU = torch.device("cpu")


def test_on_the_cpu_a_table_is_where_it_belongs() -> None:
    table = torch.arange(3)
    assert upload(table, CPU) is table


def test_on_the_cpu_a_buffer_is_filled_at_once() -> None:
    table, target = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    upload_into(table, target)
    table.zero_()
    assert target.tolist() == [0, 1, 2]
    assert not uploads._RINGS
