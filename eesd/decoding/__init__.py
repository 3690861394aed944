"""The decode loop that every method goes through, and the sampling that keeps it lossless."""
