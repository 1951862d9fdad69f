"""NovaFS: virtual-machine disk images behind a cache that learns. The engine; it never imports pyfuse3.

What a program uses is named here and imported when it is first asked for, so that the command line starts without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from novafs.asynchierarchical import AsyncHierarchicalCache, PrefetchRequest, PrefetchResult
    from novafs.cacheconfig import CacheConfig
    from novafs.cachestats import CacheStats
    from novafs.errors import NovaError
    from novafs.hierarchical import HierarchicalCache
    from novafs.registry import ChunkFeatures, Predictor, Scorer, register_model, unregister_model

__version__ = "0.1.0"

_WHERE: Final = {
    "AsyncHierarchicalCache": "asynchierarchical",
    "CacheConfig": "cacheconfig",
    "CacheStats": "cachestats",
    "ChunkFeatures": "registry",
    "HierarchicalCache": "hierarchical",
    "NovaError": "errors",
    "Predictor": "registry",
    "PrefetchRequest": "asynchierarchical",
    "PrefetchResult": "asynchierarchical",
    "Scorer": "registry",
    "register_model": "registry",
    "unregister_model": "registry",
}

__all__ = [
    "AsyncHierarchicalCache",
    "CacheConfig",
    "CacheStats",
    "ChunkFeatures",
    "HierarchicalCache",
    "NovaError",
    "Predictor",
    "PrefetchRequest",
    "PrefetchResult",
    "Scorer",
    "__version__",
    "register_model",
    "unregister_model",
]


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'novafs' has no attribute {name!r}")
    return getattr(importlib.import_module(f"novafs.{where}"), name)
