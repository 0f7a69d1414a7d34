"""A person's tastes in ComfyUI: where they lie, and the page in the panel on which they vote."""
