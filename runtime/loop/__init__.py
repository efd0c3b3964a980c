"""The denoising loop: a batch of rows that is stepped, on the host or on a device."""
