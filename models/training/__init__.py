"""One loop, four stages: optical flow, VQGAN, indexer, the five-section network. Takes arrays; knows no file format of volumes."""
