"""Who leaves a tier: policies behind one interface. They know nothing of I/O."""
