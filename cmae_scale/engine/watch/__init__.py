"""What a run tells about itself: metrics.jsonl, monitors, bad samples, the progress line."""
