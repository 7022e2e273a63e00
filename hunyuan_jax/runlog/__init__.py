"""What a run writes about itself: metrics, goodput, the progress line, the watchdog."""
