"""What a run would need on a pod, proved without one: memory by line item, and the step compiled
by the real TPU compiler.
"""
