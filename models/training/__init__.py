"""Training of the four stages: optical flow, VQGAN, indexer and the five-section network, by one loop.

It takes arrays; volumes are opened by the caller.
"""
