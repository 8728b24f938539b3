"""`accelerate`: the fastest model within a stated quality, found by measured costs, proven on held-out text."""
