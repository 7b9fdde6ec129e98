"""One published method a file: a frozen dataclass whose `plan` says what a layer computes."""
