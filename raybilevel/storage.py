"""Where an experiment is kept: a local folder, a shared one or an object store, seen by every node.

`locate` finds the storage at a folder or a URI. `check_access` raises if a node cannot use it.
"""

from raybilevel._cluster.local_files import local_filesystem
from raybilevel._cluster.storage import Storage, check_access, locate

__all__ = ["Storage", "check_access", "local_filesystem", "locate"]
