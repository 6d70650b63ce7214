"""How much of what others wrote emsr takes in: each bound is a message, so that no file can fill a machine's memory.

Bounds of shape and type stand where a value is read; these are the bounds of size.
"""

from __future__ import annotations

MAX_YAML_BYTES = 4 << 20
MAX_YAML_VALUES = 100_000
"""Values in a YAML file, an alias counted as often as it stands: a few lines of aliases can stand for billions."""
MAX_YAML_DEPTH = 12
MAX_PROBLEMS = 50
"""Lines of one message about a YAML file."""
MAX_METADATA_BYTES = 16 << 20
"""Of one metadata object, decompressed. Parsed it takes some ten times as much memory."""
MAX_CHUNK_BYTES = 1 << 30
"""Of one chunk, decompressed: it is decoded whole in memory."""
MAX_SHARD_CHUNKS = 1 << 24
"""Chunks of a shard, whose index is read whole, 16 bytes each."""
MAX_MINISHARD_BITS = 20
"""The same for precomputed shards: 2 to this power entries of 16 bytes."""
MAX_TASKS = 10**9
"""Each takes a byte in the client."""
MAX_SURVEYED = 1_000_000
"""Sections in which detection looks for bad ones: some 10 kB of measurements each."""
MAX_BAD_SECTIONS = 10_000
"""The plan records each; a volume with more is to be repaired first."""
MAX_WEIGHTS_BYTES = 4 << 30
"""Of a weights file that is fetched."""
MAX_MEASURED_BYTES = 4 << 20
"""Of the file of `cluster.measured`."""
