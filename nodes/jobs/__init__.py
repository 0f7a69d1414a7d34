"""Training jobs in ComfyUI's process: the registry, the HTTP routes, and who may use them."""
