"""Programs that run one engine each, in that engine's own environment, and answer JSON lines (see protocol.py).

They import nothing of hasten (but hasten.py), as the environments of peers do not have it.
"""
