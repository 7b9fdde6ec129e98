"""One published method a file, a frozen dataclass whose `plan` says what a layer computes; and the parts they share."""
