"""The slim half: prompt → tokens → embeddings → the denoising loop → image."""
