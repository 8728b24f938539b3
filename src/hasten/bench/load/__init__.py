"""Load on a server, as its users would bring it: `hasten bench-serve` (docs/load.md).

trace or Poisson process -> Arrival -> request body -> Exchange (HTTP, SSE, chunks) -> Record -> summary -> report
"""
