"""Eight bits: what is quantized, with which scales, and what that loses, all measured on the real loop."""
