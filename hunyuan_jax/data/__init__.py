"""Text to training batches: documents and their split (source.py), packed and resumable batches
(loader.py).
"""
