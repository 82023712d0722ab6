"""What a run tells about itself: metrics.jsonl, its writers, health, times, bad samples."""
