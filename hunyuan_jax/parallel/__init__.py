"""Meshes, the table from logical dimension names to mesh axes, and the shard_map island."""
