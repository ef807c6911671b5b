"""How many devices take part in one group of a collective, in every notation that XLA has for groups."""

import math
import re

_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}\s]*?\})?\s*\}")  # {{0,1},{2,3}}; {} is all devices
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=")  # [groups,size]<=[4,2]T(1,0)
_MESH = re.compile(r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")  # mesh['x'=2,'y'=4] {'y'}
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")


def group_size(attributes: str, devices: int) -> int:
    """Devices in the largest group.

    Args:
        attributes: Of a collective, as written in the text of a program.
        devices: All of the program's.

    Returns:
        Their number. Of pairs of senders and receivers, the devices that send to or receive from another; 1 for none.

    Raises:
        ValueError: A notation that is not known.

    Example:
        >>> [group_size(f"replica_groups={x}", 8) for x in ("{{0,1},{2,3}}", "{}", "[2,4]<=[4,2]T(1,0)")]
        [2, 8, 4]
        >>> [group_size(f"replica_groups=mesh['x'=2,'y'=4] {x}", 8) for x in ("{'y'}", "{'x','y':(2)2}", "{}")]
        [4, 4, 1]
        >>> [group_size(f"source_target_pairs={x}", 8) for x in ("{{0,1},{1,0}}", "{{0,0}}")]
        [2, 1]
    """
    if pairs := _PAIRS.search(attributes):
        sent = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return max(len({device for pair in sent for device in pair}), 1)
    if iota := _IOTA.search(attributes):
        return int(iota[1].split(",")[-1])
    if mesh := _MESH.search(attributes):
        sizes = dict(axis.rsplit("=", 1) for axis in mesh[1].split(","))
        # Of a part of an axis, its own size stands after the size of what comes before it: 'y':(2)2.
        axes = [axis.strip() for axis in mesh[2].split(",") if axis.strip()]
        return math.prod(int(axis.rsplit(")", 1)[1] if ":(" in axis else sizes[axis]) for axis in axes)
    if explicit := _EXPLICIT.search(attributes):
        groups = re.findall(r"\{([\d,\s]+)\}", explicit[1] or "")
        return max((len(group.split(",")) for group in groups), default=devices)
    written = attributes[attributes.find("replica_groups=") :][:120] if "replica_groups=" in attributes else "none"
    raise ValueError(f"A collective has groups in a notation that is not known: {written}")
