"""Training states, taken from a running engine and put back into one of another topology."""
