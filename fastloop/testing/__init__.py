"""What tests/ and bench/ share: random models, error measures, the timer."""
