"""Many devices: what a compiled program sends between them.

| file | what |
|---|---|
| `collectives` | communication of a compiled program, read from its text |
"""

from woodjax.scale.collectives import Collective, collectives, gathered_bytes, largest_gather, wire_bytes

__all__ = ["Collective", "collectives", "gathered_bytes", "largest_gather", "wire_bytes"]
