"""The tiers (`base`): L1 `memory`, L2 `redis`, and `tiered`, the read path between them and L3."""
