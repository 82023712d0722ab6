"""Training states on disk, readable without an engine: committed by a rename, checked by hash."""
