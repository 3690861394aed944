"""Evidence that decoding is lossless: exact laws of sampled decoding, and checks of anybody's outputs."""
