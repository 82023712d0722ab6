"""Training states on disk: committed by a rename, checked by hash, taken up again."""
