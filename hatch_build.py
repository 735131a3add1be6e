"""Builds libsamepage with `make -C native` and puts it into the wheel.

An editable install builds the library and leaves it in native/build, where the binding finds it.
"""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = Path("native/build/libsamepage.so")


class NativeLibraryHook(BuildHookInterface[Any]):
    """Makes the wheel one for this platform, and for any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        subprocess.run(["make", "-C", str(Path(self.root) / "native")], check=True)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":
            build_data["force_include"][str(LIBRARY)] = "samepage/libsamepage.so"
