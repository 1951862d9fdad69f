"""Who comes early: candidates, the gate that judges them, the governor that holds accuracy. They know nothing of I/O."""
