"""What a compiled kernel's machine code says of it: its vital signs, and whether it may be launched.

flow -> groups -> ordering; flow -> products, dependent; access -> assembly (vital signs)
products, ordering -> verdict (at run time)
"""

from __future__ import annotations

from .assembly import Code, read

__all__ = ["Code", "read"]
