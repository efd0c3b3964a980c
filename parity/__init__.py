"""The first promise, run by anyone: the same seed gives the image that diffusers gives."""
