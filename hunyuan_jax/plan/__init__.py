"""Plans a run on a pod without one: estimates its memory, and compiles its step for TPUs."""
