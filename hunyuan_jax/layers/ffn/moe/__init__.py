"""The mixture of experts: routing, dispatch, experts."""
