"""NovaFS: virtual-machine disk images behind a cache that learns. The engine; it never imports pyfuse3."""

__version__ = "0.1.0"
