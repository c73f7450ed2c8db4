"""The weights that implementations of one scenario need once between them, because they pack them alike."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.subjects.setting import Setting, implementation_setting, make_ops
from mla.bench.workload.implementations import OURS, parse_one
from mla.layer.ops import Ops

# Roles whose packed weights may be views of one tensor: they count as shared if all of them are.
GROUPS = (("qkv_a_proj",), ("q_b_proj",), ("o_proj",), ("kv_b_proj", "w_uk", "w_uv"))


def shared_bytes(setting: Setting, names: Sequence[str], with_reference: bool) -> int:
    """Return the bytes that these implementations save on the device when they exist together.

    `with_reference`: a copy of the reference, of one layer, exists as well.
    """
    parsed = [named for named in map(parse_one, names) if named.base in OURS]
    ops = [make_ops(implementation_setting(setting, named)) for named in parsed]
    reference = make_ops(implementation_setting(setting, parse_one(OURS[1]))) if with_reference else None
    groups = [group for group in GROUPS if ops and group[0] in ops[0].names()]
    return sum(_saved(group, ops, reference, setting) for group in groups)


def _saved(group: Sequence[str], ops: Sequence[Ops], reference: Ops | None, setting: Setting) -> int:
    layouts = [tuple(one[role].key() for role in group) for one in ops]
    copies = (len(layouts) - len(set(layouts))) * setting.layers
    if reference is not None:
        copies += tuple(reference[role].key() for role in group) in layouts
    specs = [ops[0][role].spec for role in group]
    size = sum(spec.groups * spec.in_features * spec.out_features for spec in specs)
    return copies * size * setting.dtype.itemsize
