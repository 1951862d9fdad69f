"""The pyfuse3 file system: a thin protocol adapter over the engine (`novafs`)."""
