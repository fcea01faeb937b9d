"""Compile the sparse kernels when the package is built; without a compiler it installs all the same, and is slower."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Runs ``secateur.kernels.build``, which needs nothing but the standard library and a C++ compiler."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or os.environ.get("SECATEUR_BUILD_KERNELS") == "0":
            return
        file = Path(self.root) / "src" / "secateur" / "kernels" / "build.py"
        spec = importlib.util.spec_from_file_location("secateur_kernels_build", file)
        assert spec is not None and spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        done = build.build()
        for name, problem in done.items():
            self.app.display_info(f"sparse kernels, {name}: {problem or 'built'}")
        if any(problem is None for problem in done.values()):
            build_data["artifacts"].append("src/secateur/kernels/built/*.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"  # no part of Python or torch is linked
