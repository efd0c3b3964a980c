"""What a denoiser can be given, one file each: from the fields of a request to the inputs of a model call."""
