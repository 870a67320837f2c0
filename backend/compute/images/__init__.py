"""Images: diffusers pipelines and CLIP, on one rank or several. Imports nothing."""
